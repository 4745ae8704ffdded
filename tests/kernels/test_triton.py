"""What concerns the Triton kernels alone, in Triton's interpreter: `TRITON_INTERPRET=1`."""

import os

import pytest
import torch
from cases import Case
from helpers import batch, same_bits, upstream, warm
from tolerance import scale_rightly, train_rightly

from isobn_kernels import backends, isobn
from isobn_kernels.backends.triton.config import Settings
from isobn_kernels.backends.triton.launches import TritonBackend

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set, which runs the kernels on a CPU"
)


def triton_with(**settings):
    """Inside, the kernels are launched by other settings."""
    return backends.replaced(TritonBackend(backends.load("triton").kernels, settings=Settings(**settings)))


def steps(N, D, stop_gradient):
    """Output, gradient and state of three training steps, and a scale computed from the statistics."""
    state = warm(D)
    found = []
    for step in range(3):
        x = batch(N, D, step).requires_grad_()
        out = isobn(
            x, **state.tensors, training=True, backend="triton", bias_correction=True, stop_gradient=stop_gradient
        )
        out.backward(upstream(N, D))
        found += [out.detach(), x.grad]
    statistics = {name: state.tensors[name] for name in ("running_cov", "running_std")}
    found.append(isobn(x.detach(), **statistics, backend="triton"))
    return [*found, *state.tensors.values()]


def assert_steps_right(N, D):
    """The same by the rule of tolerance.py: for what adds up in another order."""
    case, state = Case("triton-interpreted", "triton"), warm(D)
    for step in range(3):
        train_rightly(batch(N, D, step), state, case, upstream(N, D), bias_correction=True)
    scale_rightly(state, case)


@pytest.mark.parametrize("stop_gradient", [True, False], ids=["default", "through statistics"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize(("N", "D"), [(17, 65), (40, 65), (130, 65)], ids=str)
def test_programs_may_run_in_any_order(monkeypatch, N, D, fused, stop_gradient):
    """To the bit: no program reads what another one of the same launch writes, and sums have a fixed order."""
    from triton.runtime.interpreter import InterpreterBuilder

    settings = {} if fused else {"fused_features": 0}
    with triton_with(**settings):
        expected = steps(N, D, stop_gradient)
    set_grid_idx = InterpreterBuilder.set_grid_idx

    seen = []

    def last_first(builder, *index):
        seen.append(index)
        set_grid_idx(builder, *(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", last_first)
    with triton_with(**settings):
        found = steps(N, D, stop_gradient)
    for got, want in zip(found, expected, strict=True):
        assert same_bits(got, want)
    assert seen


@pytest.mark.parametrize(("N", "D"), [(17, 65), (130, 200)], ids=str)
def test_unfused_tail_is_as_right_as_the_fused_one(N, D):
    """It is for more features than the interpreter can take; other tests hold the fused one to the oracle."""
    with triton_with(fused_features=0):
        assert_steps_right(N, D)


def test_many_features_are_added_up_chunk_by_chunk():
    """Chunks as of D above 1024, which is too many for the interpreter: only the order of two sums is another."""
    with triton_with(chunk_elements=64):  # 16 features at a time
        assert_steps_right(17, 65)


def test_float64_is_refused_in_words():
    state = warm(7, torch.float64)
    with pytest.raises(RuntimeError, match="takes float16, bfloat16 and float32"):
        isobn(batch(4, 7, dtype=torch.float64), **state.tensors, training=True, backend="triton")
