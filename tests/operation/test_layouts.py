"""Views, strides, leading shapes: the same result whatever the tensors look like in memory, and not a byte beside."""

import oracle
import pytest
import torch
from cases import REFERENCE
from helpers import (
    DTYPES,
    State,
    assert_same_state,
    assert_untouched,
    batch,
    fresh,
    same_bits,
    to_numpy,
    train,
    train_with_gradient,
    upstream,
    warm,
)
from tolerance import assert_right, named

from isobn_kernels import isobn

BOTH_MODES = pytest.mark.parametrize("stop_gradient", [True, False], ids=["default", "through statistics"])
SENTINEL = 12345.0


def transposed(x):
    return x.T.contiguous().T


def every_second_column(x):
    return torch.full((x.shape[0], 2 * x.shape[1]), SENTINEL, dtype=x.dtype, device=x.device)[:, ::2].copy_(x)


def every_second_row(x):
    return torch.full((2 * x.shape[0], x.shape[1]), SENTINEL, dtype=x.dtype, device=x.device)[1::2].copy_(x)


def columns_of_a_wider_buffer(x):
    N, D = x.shape
    return torch.full((N + 2, D + 5), SENTINEL, dtype=x.dtype, device=x.device)[1:-1, 3:-2].copy_(x)


def offset_by_one_element(x):
    return torch.full((x.numel() + 1,), SENTINEL, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def assert_as_right(x, dout, stop_gradient, found, plain):
    """Two orders of a sum: (out, dx, state) of a view is at most twice as far from the oracle as without the view."""
    before = oracle.fresh_state(x.shape[1])
    out, after = oracle.train_step(to_numpy(x), before)
    dx = to_numpy(dout) * after.scale if stop_gradient else oracle.gradient(to_numpy(x), to_numpy(dout), before)
    found, plain = (named(state, out=out, dx=dx) for out, dx, state in (found, plain))
    assert_right(found, plain, named(after, out=out, dx=dx), dtype=x.dtype)


VIEWS = [transposed, every_second_column, every_second_row, columns_of_a_wider_buffer, offset_by_one_element]
by_view = pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)


@BOTH_MODES
@by_view
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(17, 65), (300, 7)], ids=str)
def test_views_of_x_and_dout(case, view, dtype, shape, stop_gradient):
    x, dout = (f(*shape, dtype=dtype, device=case.device) for f in (batch, upstream))
    plain, viewed = fresh(shape[1], dtype, case.device), fresh(shape[1], dtype, case.device)
    out, dx = train_with_gradient(x, dout, plain, case, stop_gradient=stop_gradient)
    x_view, dout_view = view(x), view(dout)
    beside = [v._base.clone() if v._is_view() else v.clone() for v in (x_view, dout_view)]
    out_view, dx_view = train_with_gradient(x_view, dout_view, viewed, case, stop_gradient=stop_gradient)
    # The order of a sum may depend on the strides in plain PyTorch, and on a GPU in Triton, which spreads a block over
    # the threads by how wide it can be read and adds up what a thread holds first. Any other kernel has one order.
    if case is REFERENCE or case.name == "triton-gpu":
        assert_as_right(x, dout, stop_gradient, (out_view, dx_view, viewed), (out, dx, plain))
    else:
        assert same_bits(out_view, out)
        assert same_bits(dx_view, dx)
        assert_same_state(viewed, plain)
    for v, before in zip((x_view, dout_view), beside, strict=True):
        assert same_bits(v._base if v._is_view() else v, before), "an input or what lies around it was overwritten"


@by_view
def test_views_in_evaluation(case, view):
    x, state = batch(17, 65, device=case.device), warm(65, device=case.device)
    buffers = state.running_cov, state.running_std
    expected = isobn(x, *buffers, backend=case.backend)
    assert same_bits(isobn(view(x), *buffers, backend=case.backend), expected)


@pytest.mark.parametrize("rows", [2, 17])
def test_one_row_expanded(case, rows):
    """Stride 0 between the rows: no variance."""
    state = fresh(7, device=case.device)
    x = batch(1, 7, device=case.device).expand(rows, 7)
    assert same_bits(train(x, state, case), x)
    assert not state.running_std.any()


def test_one_column_expanded(case):
    """Stride 0 between the columns."""
    x = batch(17, 1, device=case.device)
    plain, viewed = fresh(7, device=case.device), fresh(7, device=case.device)
    found, dout = [], upstream(17, 7, device=case.device)
    for rows, state in ((x.expand(17, 7), viewed), (x.repeat(1, 7), plain)):
        found.append((*train_with_gradient(rows, dout, state, case), state))
    assert_as_right(x.repeat(1, 7), dout, True, *found)


@BOTH_MODES
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (2, 1, 3, 7), (0, 3, 7), (3, 0, 7)], ids=str)
def test_leading_shapes_are_flattened(case, shape, stop_gradient):
    rows = torch.Size(shape[:-1]).numel()
    x, dout = (f(rows, 7, device=case.device) for f in (batch, upstream))
    flat, shaped = warm(7, device=case.device), warm(7, device=case.device)
    expected = train_with_gradient(x, dout, flat, case, stop_gradient=stop_gradient)
    found = train_with_gradient(x.view(shape), dout.view(shape), shaped, case, stop_gradient=stop_gradient)
    for got, want in zip(found, expected, strict=True):
        assert same_bits(got, want.view(shape))
    assert_same_state(shaped, flat)
    evaluated = isobn(x.view(shape), shaped.running_cov, shaped.running_std, scale=shaped.scale, backend=case.backend)
    assert same_bits(evaluated, (x * flat.scale).view(shape))


def test_leading_dimensions_in_another_order(case):
    """(2, 3, D) whose rows do not lie one after the other."""
    x = batch(6, 7, device=case.device).view(2, 3, 7)
    plain, viewed = fresh(7, device=case.device), fresh(7, device=case.device)
    out = train(x.transpose(0, 1).contiguous(), plain, case)
    assert same_bits(train(x.transpose(0, 1), viewed, case), out)
    assert_same_state(viewed, plain)


@BOTH_MODES
@pytest.mark.parametrize("shape", [(17, 65), (2, 3, 7), (1, 7)], ids=str)
def test_expanded_gradient(case, shape, stop_gradient):
    """`.sum().backward()` sends a gradient of stride 0; it is read as it is and not written to."""
    D = shape[-1]
    x = batch(torch.Size(shape[:-1]).numel(), D, device=case.device).view(shape)
    plain, expanded = warm(D, device=case.device), warm(D, device=case.device)
    _, expected = train_with_gradient(
        x, torch.full(shape, 3.0, device=case.device), plain, case, stop_gradient=stop_gradient
    )
    one = torch.tensor(3.0, device=case.device)
    _, dx = train_with_gradient(x, one.expand(shape), expanded, case, stop_gradient=stop_gradient)
    assert same_bits(dx, expected)
    assert one == 3


@BOTH_MODES
def test_gradient_expanded_over_rows_or_columns(case, stop_gradient):
    x = batch(17, 65, device=case.device)
    for dout in (
        upstream(1, 65, device=case.device).expand(17, 65),
        upstream(17, 1, device=case.device).expand(17, 65),
    ):
        found = []
        for d in (dout, dout.contiguous()):
            state = fresh(65, device=case.device)
            found.append((*train_with_gradient(x, d, state, case, stop_gradient=stop_gradient), state))
        assert_as_right(x, dout, stop_gradient, *found)


@BOTH_MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("D", [1, 7, 64, 65])
def test_nothing_is_written_beside_the_state(case, D, dtype, stop_gradient):
    """The buffers lie inside larger ones, at an address that no vector is aligned to."""
    inner, guarded = fresh(D, dtype, case.device), {}
    wide = {}
    for name, tensor in inner.tensors.items():
        wide[name] = torch.full((tensor.numel() + 11,), int(SENTINEL), dtype=tensor.dtype, device=case.device)
        guarded[name] = wide[name][5:-6].view(tensor.shape).copy_(tensor)
    for step in range(2):
        x, dout = (f(17, D, step, dtype, case.device) for f in (batch, upstream))
        expected = train_with_gradient(x, dout, inner, case, stop_gradient=stop_gradient)
        found = train_with_gradient(x, dout, State(**guarded), case, stop_gradient=stop_gradient)
        assert same_bits(found[0], expected[0])
        assert same_bits(found[1], expected[1])
    assert_same_state(State(**guarded), inner)
    for name, buffer in wide.items():
        assert (buffer[:5] == SENTINEL).all(), f"written before {name}"
        assert (buffer[-6:] == SENTINEL).all(), f"written after {name}"


class GuardedEmpty:
    """Stands in for `torch.empty` and `torch.empty_like`: memory with sentinel bytes on both sides."""

    MARGIN, BYTE = 64, 0xA5

    def __init__(self):
        self.blocks = []
        self.empty = torch.empty

    def __call__(self, *shape, dtype=torch.float32, device=None):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        size = shape.numel() * dtype.itemsize
        block = self.empty(size + 2 * self.MARGIN, dtype=torch.uint8, device=device).fill_(self.BYTE)
        self.blocks.append(block)
        inside = block[self.MARGIN : self.MARGIN + size]
        return inside.fill_(0xFF).view(dtype).view(shape)  # 0xFF... is NaN

    def like(self, tensor):
        return self(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def intact(self):
        edges = [edge for block in self.blocks for edge in (block[: self.MARGIN], block[-self.MARGIN :])]
        return all((edge == self.BYTE).all() for edge in edges)


@pytest.fixture
def guard(monkeypatch):
    guard = GuardedEmpty()
    monkeypatch.setattr(torch, "empty", guard)
    monkeypatch.setattr(torch, "empty_like", guard.like)
    return guard


@BOTH_MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (17, 65), (300, 9), (5, 130)], ids=str)
def test_nothing_is_written_beside_output_gradient_and_workspace(kernel_case, guard, shape, dtype, stop_gradient):
    x, dout = (f(*shape, dtype=dtype, device=kernel_case.device) for f in (batch, upstream))
    state = fresh(shape[1], dtype, kernel_case.device)
    train_with_gradient(x, dout, state, kernel_case, stop_gradient=stop_gradient)
    isobn(x, state.running_cov, state.running_std, backend=kernel_case.backend)
    assert len(guard.blocks) >= 4, "the backend was expected to allocate with torch.empty"
    assert guard.intact()


def test_the_guard_notices(guard):
    torch.empty(3, 5)
    assert guard.intact()
    guard.blocks[0][-guard.MARGIN] = 0
    assert not guard.intact()


def test_input_is_never_written(case):
    x, state = batch(17, 65, device=case.device), warm(65, device=case.device)
    before = x.clone()
    train(x, state, case)
    assert same_bits(x, before)
    before = state.clone()
    isobn(x, state.running_cov, state.running_std, scale=state.scale, backend=case.backend)
    isobn(x, state.running_cov, state.running_std, backend=case.backend)
    assert_untouched(state, before)
