"""What concerns the CUDA kernels alone, on the emulator: ``ISOBN_TEST_CUDA=emulated``.

The conformance suite runs there too, as the case "cuda-emulated" of `cases.CASES`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import building
import emulated_cuda
import numpy as np
import oracle
import pytest
import stubs
import torch
from cases import REFERENCE, Case
from helpers import assert_untouched, batch, fresh, same_bits, to_numpy, train_with_gradient, upstream, warm
from tolerance import assert_right, named, scale_rightly, train_rightly

from isobn_kernels import backends, functional, isobn
from isobn_kernels.state import Where

pytestmark = pytest.mark.skipif(
    not emulated_cuda.SELECTED, reason="ISOBN_TEST_CUDA=emulated is not set, which runs the kernels on a CPU"
)
if emulated_cuda.SELECTED and emulated_cuda.missing():
    pytestmark = pytest.mark.skip(reason=emulated_cuda.missing())

ROOT = Path(__file__).parents[2]
CUDA = Case("cuda-emulated", "cuda", large=True)
# Rows of each kind: (N, D, dtype). One block and many, full and not; accesses of one value and of four.
SHAPES = [
    (2, 1, torch.float32),
    (17, 7, torch.bfloat16),
    (128, 65, torch.float32),
    (33, 100, torch.float16),
    (32, 384, torch.float32),
]


@pytest.fixture(autouse=True)
def tried_out():
    """The launch that tries the device out is behind us."""
    assert backends.load("cuda").device_reason(-1) is None


def transposed(x):
    return x.T.contiguous().T


def in_longer_rows(x):
    return torch.nn.functional.pad(x, (0, 1))[:, :-1]


def at_an_odd_address(x):
    return torch.nn.functional.pad(x.reshape(-1), (1, 0))[1:].view(x.shape)


def every_second_column(x):
    return x.repeat_interleave(2, dim=1)[:, ::2]


def steps(N, D, dtype, layout=torch.clone):
    """Everything that two training steps, their gradients, and a scale from the statistics give."""
    state, found = warm(D, dtype), []
    for step in range(2):
        x, dout = batch(N, D, step, dtype), upstream(N, D, step, dtype)
        x, dout = layout(x).requires_grad_(), layout(dout)
        out = isobn(
            x,
            **state.tensors,
            training=True,
            backend="cuda",
            bias_correction=step == 0,
            stop_gradient=False,
        )
        found += [out.detach(), *torch.autograd.grad(out, x, dout)]
    found.append(isobn(x.detach().float(), state.running_cov, state.running_std, backend="cuda"))
    return [*found, *state.tensors.values()]


def assert_same(found, expected):
    for got, want in zip(found, expected, strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_and_blocks_may_run_in_any_order(shape):
    """To the bit. What a barrier should have ordered, and does not, is read too early in one order or the other."""
    expected = steps(*shape)
    with emulated_cuda.descending():
        assert_same(steps(*shape), expected)


@pytest.mark.parametrize("layout", [transposed, every_second_column, in_longer_rows, at_an_odd_address])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_wide_accesses_change_no_bit(layout, dtype):
    assert_same(steps(17, 68, dtype, layout), steps(17, 68, dtype))


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_launches_equal_one(tmp_path, shape, order):
    """A GPU that cannot wait in a grid, and one too small for all blocks at once."""
    expected = steps(*shape)
    for number, cooperative in ((132, False), (0, True)):
        with emulated_cuda.another_device(tmp_path, number, cooperative) as emulator:
            emulator.isobn_emulation_order(order == "descending")
            assert_same(steps(*shape), expected)


def test_a_part_of_the_device_that_is_too_small_for_one_launch(tmp_path):
    """Found out only when launching, as in a green context."""
    expected = steps(17, 65, torch.float32)
    with emulated_cuda.another_device(tmp_path) as emulator:
        assert_same(steps(17, 65, torch.float32), expected)
        emulator.isobn_emulation_device(1, True, 1, 232448, 48 << 10)
        assert backends.load("cuda").extension.one_launch(0, 65, -1)  # as was planned
        assert_same(steps(17, 65, torch.float32), expected)


@pytest.mark.parametrize(("processors", "groups"), [(16, 3), (3, 16), (8, 6)])
def test_more_rows_for_a_block_on_a_smaller_gpu(tmp_path, processors, groups):
    """Equal to the bit in all but the scale, whose two sums are added up in other parts."""
    D = 384
    assert -(-D // (8 * groups)) <= processors < -(-D // (8 * (groups - 1)))
    expected = steps(32, D, torch.float32)
    with emulated_cuda.another_device(tmp_path, processors) as emulator:
        assert backends.load("cuda").extension.one_launch(0, D, -1)
        found = steps(32, D, torch.float32)
        emulator.isobn_emulation_order(1)
        assert_same(steps(32, D, torch.float32), found)
        state = warm(D)
        for step in range(2):
            train_rightly(batch(32, D, step), state, CUDA, upstream(32, D, step), stop_gradient=False)
        scale_rightly(state, CUDA)
    assert_same(found[-4:-2], expected[-4:-2])


def test_shared_memory_that_is_too_small_for_one_launch(tmp_path):
    expected = steps(17, 640, torch.float32)
    with emulated_cuda.another_device(tmp_path, shared=20 << 10):
        assert not backends.load("cuda").extension.one_launch(0, 640, -1)
        assert_same(steps(17, 640, torch.float32), expected)


def test_shared_memory_that_needs_permission(tmp_path):
    """Permission is a kernel's, whatever the size: what a small D asks for must not take it from a larger one."""
    shapes = [(17, 640, torch.float32), (17, 384, torch.float32)]
    expected = [steps(*shape) for shape in shapes]
    with emulated_cuda.another_device(tmp_path, without_permission=20 << 10):
        assert all(backends.load("cuda").extension.one_launch(0, D, -1) for _, D, _ in shapes)
        for shape, want in zip(shapes, expected, strict=True):
            assert_same(steps(*shape), want)
        assert_same(steps(*shapes[0]), expected[0])


def test_the_widest_rows(tmp_path):
    """D = 2048, the limit. In two launches, for which the emulator needs less memory."""
    with emulated_cuda.another_device(tmp_path, cooperative=False):
        train_rightly(batch(2, 2048), fresh(2048), CUDA)


def test_number_of_launches(monkeypatch):
    """One for a training step, for a scale and for the default backward; three more for the other one."""
    monkeypatch.setattr(functional, "_SMALL", -1)  # a GPU's batches are never left to plain PyTorch
    launches = emulated_cuda.EMULATOR.isobn_emulation_launches

    def count(run):
        before = launches()
        run()
        return launches() - before

    x, state = batch(17, 65).requires_grad_(), warm(65)
    both = {"training": True, "backend": "cuda"}
    assert count(lambda: isobn(x, **state.tensors, **both)) == 1
    assert count(lambda: isobn(x, state.running_cov, state.running_std, backend="cuda")) == 1
    out = isobn(x, **state.tensors, **both)
    assert count(lambda: torch.autograd.grad(out.sum(), x)) == 1
    out = isobn(x, **state.tensors, **both, stop_gradient=False)
    assert count(lambda: torch.autograd.grad(out.sum(), x)) == 3


@pytest.mark.parametrize("training", [True, False])
def test_an_error_of_cuda_is_named_and_the_state_stays(training):
    state = warm(65)
    before = state.clone()
    tensors = state.tensors if training else {name: state.tensors[name] for name in ("running_cov", "running_std")}
    emulated_cuda.EMULATOR.isobn_emulation_fail_after(0)
    try:
        with pytest.raises(RuntimeError, match=r"cudaLaunch\w+.* failed: cudaErrorInvalidValue: invalid argument"):
            isobn(batch(17, 65), **tensors, training=training, backend="cuda")
    finally:
        emulated_cuda.EMULATOR.isobn_emulation_fail_after(-1)
    assert_untouched(state, before)
    assert emulated_cuda.EMULATOR.isobn_emulation_current_device() == 0


@pytest.mark.parametrize(
    ("N", "D", "dtype", "words"),
    [
        (129, 7, torch.float32, "x has 129 rows and it takes at most 128"),
        (2, 2049, torch.float32, "x has 2049 features and it takes at most 2048"),
        (4, 7, torch.float64, "x is float64 and it takes float16, bfloat16 and float32"),
    ],
)
def test_what_it_does_not_take_is_refused_in_words(N, D, dtype, words):
    state = fresh(D, dtype)
    before = state.clone()
    with pytest.raises(RuntimeError, match=f"'cuda' was asked for, but {words}"):
        isobn(torch.ones(N, D, dtype=dtype), **state.tensors, training=True, backend="cuda")
    assert_untouched(state, before)


def test_a_device_that_runs_no_kernel(monkeypatch):
    cuda = emulated_cuda.EmulatedBackend(backends.load("cuda").extension)  # which has tried nothing yet
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    emulated_cuda.EMULATOR.isobn_emulation_fail_after(0)
    try:
        reason = cuda.unsupported_reason(batch(2, 3))
    finally:
        emulated_cuda.EMULATOR.isobn_emulation_fail_after(-1)
    for word in ("an old GPU of sm_75", "this build has code for", "cudaErrorInvalidValue"):
        assert word in reason
    assert cuda.unsupported_reason(batch(2, 3)) is None


def test_only_the_gpu_of_the_tensor_is_tried_out(monkeypatch):
    """A launch makes a context there, which the other processes of a machine with several GPUs need the memory of."""
    cuda, tried = backends.load("cuda"), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(cuda, "device_reason", tried.append)
    assert cuda.unavailable_reason() is None
    assert tried == []
    backends.select(Where("cuda"), batch(2, 3))
    assert tried == [-1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cuda.unavailable_reason() is None
    assert tried == [-1, 0]


def test_the_stub_is_true():
    assert stubs.contents_of(backends.load("cuda").extension) == stubs.stub_of("_cuda")


# ---- Sanitizers ----

SANITIZED = [  # N, D, dtype, layout in sanitized.py, bias correction, one launch
    *((17, 68, torch.float32, layout, False, True) for layout in range(4)),
    *((N, D, torch.float32, 0, False, True) for N in (2, 3, 17) for D in (1, 7, 64, 65)),
    (128, 65, torch.float32, 1, True, True),
    (128, 68, torch.float16, 3, True, True),
    (17, 65, torch.bfloat16, 0, False, False),
    (17, 384, torch.bfloat16, 0, False, True),
    (33, 100, torch.float32, 0, True, False),
    (5, 1000, torch.float32, 0, False, True),
]


def test_addresses_and_arithmetic_are_sound(tmp_path):
    """In both orders, by AddressSanitizer and UndefinedBehaviorSanitizer, and right by the float64 oracle."""
    sanitizer = building.address_sanitizer()
    if sanitizer is None:
        pytest.skip("g++ has no AddressSanitizer: libasan is not installed")
    given, expected, codes = {}, {}, backends.load("cuda").dtypes
    for N, D, dtype, layout, bias_correction, whole in SANITIZED:
        key = f"{N}x{D}/{codes[dtype]},{layout},{int(bias_correction)},{int(whole)}"
        x, dout = batch(N, D, dtype=dtype), upstream(N, D, dtype=dtype)
        as_it_lies = torch.int16 if dtype == torch.bfloat16 else dtype
        given[f"{key}/x"], given[f"{key}/dout"] = (t.view(as_it_lies).numpy() for t in (x, dout))
        expected[key] = (x, dout, bias_correction)
    np.savez(tmp_path / "cases.npz", **given)
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tests/support/sanitized.py"), str(emulated_cuda.build(sanitize=True))),
            *(str(tmp_path / "cases.npz"), str(tmp_path / "results.npz")),
        ],
        env={**os.environ, **sanitizer},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:3000]
    results = np.load(tmp_path / "results.npz")
    for key, (x, dout, bias_correction) in expected.items():
        state, truth = fresh(x.shape[1]), oracle.fresh_state(x.shape[1])
        options = {"bias_correction": bias_correction}
        for _ in range(2):
            before = truth
            out, dx = train_with_gradient(x, dout, state, REFERENCE, stop_gradient=False, **options)
            true_out, truth = oracle.train_step(to_numpy(x), truth, **options)
        true = named(truth, out=true_out, dx=oracle.gradient(to_numpy(x), to_numpy(dout), before, **options))
        if oracle.clamp_margin(to_numpy(x), before, **options) < 1e-6:
            del true["dx"]  # either of two values
        reference = named(state, out=out, dx=dx)
        for order in (0, 1):
            found = {}
            for name in ("out", "dx", "C", "sigma", "scale", "computed"):
                value = results[f"{key}/{order}/{name}"]
                if value.dtype == np.int16:
                    value = torch.from_numpy(value).view(torch.bfloat16).double().numpy()
                found[name] = value
            assert (found["C"] == found["C"].T).all(), key
            for scale in (found["scale"], found["computed"]):
                assert_right({**found, "scale": scale}, reference, true)


# ---- The emulator itself ----

# What is taken out of step.cuh, and must be missed.
BARRIERS = {
    "of the grid": ("  if (p.phase == Phase::whole) cooperative_groups::this_grid().sync();\n", ""),
    "before the product": ("      __syncthreads();\n\n      // (2) and (3).", "      // (2) and (3)."),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_seen(tmp_path, name):
    sources = tmp_path / "sources"
    for folder in ("csrc", "tests/support/emulation"):
        shutil.copytree(ROOT / folder, sources / folder)
    for file in ("building.py", "emulated_cuda.py"):
        shutil.copy(ROOT / "tests/support" / file, sources / "tests/support")
    kernels = sources / "csrc/cuda/step.cuh"
    text, (barrier, instead) = kernels.read_text(), BARRIERS[name]
    assert text.count(barrier) == 1
    kernels.write_text(text.replace(barrier, instead))
    expected = steps(17, 65, torch.float32)
    before = emulated_cuda.EMULATOR
    emulator = emulated_cuda.install(emulated_cuda.build(sources=sources, folder=tmp_path))
    try:
        wrong = []
        for order in (0, 1):
            emulator.isobn_emulation_order(order)
            found = steps(17, 65, torch.float32)
            wrong.append(any(not same_bits(a, b) for a, b in zip(found, expected, strict=True)))
    finally:
        emulated_cuda.install(emulated_cuda.build())
        emulated_cuda.EMULATOR = before
    assert any(wrong)
