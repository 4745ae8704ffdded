"""The parts of a step across ranks, each backend's against the reference's, in one process.

`test_distributed.py` has the steps themselves, on several ranks.
"""

import numpy as np
import pytest
import torch
from helpers import DTYPES, assert_symmetric, assert_untouched, batch, same_bits, state_dtype, to_numpy, warm
from tolerance import SLACK, covariance_error, relative

from isobn_kernels import backends
from isobn_kernels.reference import from_upper_triangle
from isobn_kernels.state import Options
from isobn_kernels.state import State as Bundle

FEATURES = (1, 7, 64, 129, 200)
LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.T.contiguous().T,
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


def bundle(state, **replaced):
    return Bundle(**{**state.tensors, **replaced})


def parts(x, parts_of=3):
    """Uneven rows of ranks, one of them without any."""
    first = x.shape[0] // parts_of
    return x.split([first, 0, x.shape[0] - first])


def sums_of_all(backend, x):
    return torch.stack([backend.column_sums(rows) for rows in parts(x)]).sum(0)


def gram_of_all(backend, x):
    sums = sums_of_all(backend, x)
    return sum(backend.centred_gram(rows, sums, state_dtype(x.dtype)) for rows in parts(x)), sums


def awkward(N, D, dtype):
    """A batch with a constant feature, and with features that are skipped."""
    x = batch(N, D, dtype=dtype)
    x[:, 1 % D] = 0.1
    for j, value in ((3, float("nan")), (5, float("inf")), (6, torch.finfo(dtype).max)):
        if j < D:
            x[0, j] = value
    return x


def after(backend, gram, sums, state, options):
    """What the parts make of the state; the arguments are left alone."""
    changed = state.clone()
    arguments = bundle(changed)
    following = backend.next_state(gram.clone(), sums, arguments, options)
    assert_untouched(changed, state)
    backend.write_state(arguments, following, sums)
    return changed, following.scale_and_std[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_column_sums(case, dtype, layout):
    backend = backends.load(case.backend)
    for N, D in ((0, 3), (1, 1), (5, 7), (130, 65)):
        x = LAYOUTS[layout](batch(N, D, dtype=dtype).to(case.device))
        sums = backend.column_sums(x)
        assert sums.shape == (1 + (2 if dtype is torch.float64 else 1) * D,)
        assert sums[0] == N
        total = to_numpy(sums[1:]).reshape(-1, D).sum(0)
        assert relative(total, to_numpy(x).sum(0) if N else np.zeros(D)) < 1e-13
        assert same_bits(sums, backend.column_sums(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_feature_adds_nothing(case, dtype):
    backend = backends.load(case.backend)
    x = batch(37, 9, dtype=dtype).to(case.device)
    for value in (0.1, -977.3):
        x[:, 4] = value
        gram, _ = gram_of_all(backend, x)
        i, j = torch.triu_indices(9, 9)
        assert not gram[(i == 4) | (j == 4)].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_centred_gram(case, dtype, layout):
    """Each entry by the size of its two features, at most twice as far off as the reference's."""
    backend, reference = (backends.load(name) for name in (case.backend, "reference"))
    for N, D, offset in ((5, 1, 1), (9, 7, 1), (300, 129, 1), (40, 65, 1e4)):
        x = LAYOUTS[layout](batch(N, D, dtype=dtype, offset=offset).to(case.device))
        y = to_numpy(x) - to_numpy(x).mean(0)
        far, fair = (
            covariance_error(to_numpy(from_upper_triangle(gram_of_all(b, x)[0], D)), y.T @ y)
            for b in (backend, reference)
        )
        assert far <= 2 * fair + SLACK[state_dtype(dtype)]
        assert same_bits(gram_of_all(backend, x)[0], gram_of_all(backend, x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", FEATURES)
def test_covariance_has_the_bits_of_the_reference(case, dtype, D):
    """The scale is what the backend computes from any statistics."""
    backend, reference = (backends.load(name) for name in (case.backend, "reference"))
    for make in (batch, awkward):
        for options in (Options(), Options(momentum=0.37, beta=0.7, bias_correction=True), Options(momentum=1.0)):
            state = warm(D, dtype).to(case.device)
            state.running_cov[-1, 0] += D > 1  # below the diagonal, where it does not count
            gram, sums = gram_of_all(reference, make(41, D, dtype=dtype).to(case.device))
            found, scale = after(backend, gram, sums, state, options)
            expected, _ = after(reference, gram, sums, state, options)
            for name in ("running_cov", "num_batches_tracked"):
                assert same_bits(found.tensors[name], expected.tensors[name]), name
            assert relative(to_numpy(found.running_std), to_numpy(expected.running_std)) <= SLACK[dtype] / 4
            assert_symmetric(found.running_cov)
            assert found.running_cov.isfinite().all()
            assert same_bits(scale, found.scale)
            assert same_bits(scale, backend.compute_scale(bundle(found), options))


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_change_nothing(case, rows):
    backend = backends.load(case.backend)
    for D in FEATURES:
        x = batch(rows, D).to(case.device)
        state = warm(D).to(case.device)
        state.running_cov[-1, 0] += D > 1  # below the diagonal: even that is not tidied up
        gram, sums = gram_of_all(backend, x)
        for options in (Options(), Options(bias_correction=True)):
            found, scale = after(backend, gram, sums, state, options)
            assert_untouched(found, state)
            assert same_bits(scale, state.scale)
            following = backend.next_state(gram.clone(), sums, bundle(state, scale=None), options)
            assert same_bits(following.scale_and_std[0], backend.compute_scale(bundle(state), options))


def test_a_state_without_scale_and_counter(case):
    backend = backends.load(case.backend)
    whole = warm(65).to(case.device)
    bare = whole.clone()
    gram, sums = gram_of_all(backend, batch(12, 65).to(case.device))
    for arguments in (bundle(whole), bundle(bare, scale=None, num_batches_tracked=None)):
        backend.write_state(arguments, backend.next_state(gram.clone(), sums, arguments, Options()), sums)
    assert same_bits(bare.running_cov, whole.running_cov)
    assert same_bits(bare.running_std, whole.running_std)


def test_bits_do_not_depend_on_threads(case, threads):
    backend = backends.load(case.backend)
    if backend.name == "reference":
        pytest.skip("reference: its bits are promised at a fixed number of threads only")
    x = batch(70, 300).to(case.device)
    found = []
    for count in (1, 2, 5):
        threads(count)
        gram, sums = gram_of_all(backend, x)
        state, scale = after(backend, gram, sums, warm(300).to(case.device), Options())
        found.append((gram, scale, *state.tensors.values()))
    for others in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], others, strict=True))


def test_autograd_is_told_of_the_writes(case):
    """A backward that saved a statistic is refused after a step has overwritten it."""
    backend = backends.load(case.backend)
    state = warm(7).to(case.device)
    gram, sums = gram_of_all(backend, batch(9, 7).to(case.device))
    before = [tensor._version for tensor in state.tensors.values()]
    backend.write_state(bundle(state), backend.next_state(gram, sums, bundle(state), Options()), sums)
    assert all(tensor._version > v for tensor, v in zip(state.tensors.values(), before, strict=True))
