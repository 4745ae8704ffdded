"""What each rank of `test_distributed.py` runs: one check after the other, under torchrun.

    torchrun --standalone --nproc-per-node K tests/distributed/distributed_worker.py FOLDER all|die|nccl

Each rank draws the whole batch from a seed and takes its rows of it, so that it can compare what the ranks did together
with the oracle, or with one process, on the concatenated batch. Reports go to FOLDER, a file for each rank.
"""

import contextlib
import copy
import datetime
import functools
import json
import os
import pickle
import sys
import traceback
from pathlib import Path
from unittest import mock

import oracle
import pytest
import torch
import torch.distributed as dist
from cases import kernels
from helpers import (
    DTYPES,
    State,
    assert_same_state,
    assert_untouched,
    batch,
    dtype_name,
    fresh,
    same_bits,
    to_bytes,
    to_numpy,
    upstream,
    warm,
)
from tolerance import BOUNDS, assert_right, named
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from isobn_kernels import IsoBN, available_backends, backends, isobn
from isobn_kernels.backends.across_ranks import AcrossRanks
from isobn_kernels.state import Options, Where
from isobn_kernels.state import State as Bundle

D = 12
# Inductor's cache does not know when the schema of an operator changes.
torch.compiler.config.force_disable_caches = True
SECONDS = 1800  # that a rank waits for another before it gives up: a hang is an error, a busy machine is not
CHECKS = {}


def check(*worlds):
    """Register a check for these numbers of ranks."""

    def register(function):
        CHECKS[function.__name__] = (worlds, function)
        return function

    return register


def rank():
    return dist.get_rank()


def world():
    return dist.get_world_size()


def splits():
    """Rows of each rank: even, uneven, none at all on some, one here and there."""
    return {
        1: ([8], [2]),
        2: ([8, 8], [7, 2], [0, 5], [1, 1]),
        4: ([4, 4, 4, 4], [5, 0, 1, 11], [1, 1, 0, 0], [0, 0, 0, 2]),
    }[world()]


def mine(rows, sizes):
    return rows.split(sizes)[rank()]


def everyone(value):
    """``value`` of every rank, in order."""
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def concatenated(rows):
    """The rows of all ranks."""
    return torch.cat(everyone(rows.detach()))


def assert_same_everywhere(state):
    for name, tensor in state.tensors.items():
        assert len(set(everyone(to_bytes(tensor)))) == 1, f"{name} differs between ranks"
    assert same_bits(state.running_cov, state.running_cov.T), "running_cov is not bit-symmetric"


class Alone:
    """The steps of one process on the rows of all ranks: by the oracle, and by the reference."""

    def __init__(self, state):
        self.reference, self.truth = state.clone(), state.oracle()

    def train(self, x, dout=None, **options):
        """One step; its output, and dx through the statistics where ``dout`` is given, are kept for `check`."""
        self.dtype, rows, before = x.dtype, x.detach().clone().requires_grad_(), self.truth
        through = {"stop_gradient": dout is None}
        out = isobn(rows, **self.reference.tensors, training=True, backend="reference", **through, **options)
        true, self.truth = oracle.train_step(to_numpy(x), before, **options)
        self.found, self.true = {"out": out.detach()}, {"out": true}
        if dout is not None:
            (self.found["dx through statistics"],) = torch.autograd.grad(out, rows, dout)
            self.true["dx through statistics"] = oracle.gradient(to_numpy(x), to_numpy(dout), before, **options)

    def check(self, state, bounds=None, **found):
        """By the rule of tolerance.py: the state, and what else was found."""
        reference, true = (named(s, **{k: more[k] for k in found}) for s, more in self.pairs())
        assert_right(named(state, **found), reference, true, bounds, self.dtype)
        assert int(state.num_batches_tracked) == self.truth.t

    def pairs(self):
        return (self.reference, self.found), (self.truth, self.true)


def state_of(layer):
    return State(*layer.buffers())


def train(x, state, **options):
    return isobn(x, **state.tensors, training=True, process_group=dist.group.WORLD, **options)


def untouched_without_update(rows, sizes, dtype=torch.float32):
    """A step of fewer than two rows in all leaves the state's bits alone and multiplies by the stored scale."""
    for state in (fresh(D, dtype), warm(D, dtype)):
        state.running_cov[1, 0] += 1.0  # below the diagonal: even that is not tidied up
        for options in ({}, {"stop_gradient": False}, {"bias_correction": True}):
            before = state.clone()
            x = mine(batch(rows, D, dtype=dtype), sizes).requires_grad_()
            dout = torch.ones_like(x)
            dout[:, 0] = float("inf")  # one that reaches other features would make them NaN
            out = train(x, state, **options)
            (dx,) = torch.autograd.grad(out, x, dout)
            for name, tensor in state.tensors.items():
                assert same_bits(tensor, before.tensors[name]), name
            assert same_bits(out, x * state.scale)
            assert same_bits(dx, dout * state.scale)


# ---- The operation ----


@check(1, 2, 4)
def fifty_steps():
    for sizes, options in zip(splits(), ({}, {"bias_correction": True}), strict=False):
        state, alone = fresh(D), Alone(fresh(D))
        for step in range(50):
            x = batch(sum(sizes), D, seed=step)
            out = train(mine(x, sizes), state, **options)
            alone.train(x, **options)
            if step % 10 == 0:
                alone.check(state, out=concatenated(out))
        assert_same_everywhere(state)
        alone.check(state)


@check(1, 2, 4)
def uneven_and_empty_batches():
    for sizes in splits():
        state, alone = warm(D), Alone(warm(D))
        state.running_cov[3, 1] += 1.0  # below the diagonal, where it does not count
        for step in range(3):
            x = batch(sum(sizes), D, seed=step)
            out = train(mine(x, sizes), state)
            alone.train(x)
            assert out.shape == (sizes[rank()], D)
            alone.check(state, out=concatenated(out))
        assert_same_everywhere(state)


@check(1, 2, 4)
def no_rows_at_all():
    for dtype in (torch.float32, torch.float64):
        untouched_without_update(0, [0] * world(), dtype)


@check(1, 2, 4)
def one_row_in_all():
    for owner in range(world()):
        untouched_without_update(1, [int(owner == r) for r in range(world())])


@check(2, 4)
def nan_and_infinity_on_one_rank():
    sizes = [5] * world()
    for bad in (float("nan"), float("inf"), -float("inf")):
        state = warm(D)
        before, alone = state.clone(), Alone(state)
        x = batch(sum(sizes), D)
        x[-1, 3] = bad
        x[-2, 7] = bad
        out = train(mine(x, sizes), state)
        alone.train(x)
        assert_same_everywhere(state)
        alone.check(state, out=concatenated(out))
        for j in (3, 7):
            assert same_bits(state.running_cov[j], before.running_cov[j])
            assert same_bits(state.running_std[j], before.running_std[j])
        seen = [j for j in range(D) if j not in (3, 7)]
        assert not same_bits(state.running_std[seen], before.running_std[seen])
        assert out[:, seen].isfinite().all()


@check(1, 2, 4)
def constant_feature_is_exactly_zero():
    for sizes in splits():
        for dtype in DTYPES:
            for value in (0.1, -977.3):
                state = fresh(D, dtype)
                x = batch(sum(sizes), D, dtype=dtype)
                x[:, 2] = value
                for _ in range(3):
                    train(mine(x, sizes), state)
                assert state.running_std[2] == 0
                assert not state.running_cov[2].any()
                assert not state.running_cov[:, 2].any()


@check(2, 4)
def constant_on_each_rank_but_not_over_all():
    sizes = [3] * world()
    state, alone = fresh(D), Alone(fresh(D))
    for step in range(5):
        x = batch(sum(sizes), D, seed=step)
        x[:, 2] = torch.arange(float(world())).repeat_interleave(3)
        train(mine(x, sizes), state)
        alone.train(x)
    assert state.running_std[2] > 0
    assert_same_everywhere(state)
    alone.check(state)


@check(1, 2, 4)
def mean_far_above_the_deviation():
    sizes = splits()[1]
    for offset in (1e3, 1e5):
        state, alone = fresh(D), Alone(fresh(D))
        for step in range(5):
            x = batch(sum(sizes), D, seed=step, offset=offset)
            train(mine(x, sizes), state)
            alone.train(x)
        assert_same_everywhere(state)
        alone.check(state)


@check(1, 2, 4)
def dtypes():
    """Against the oracle, and at most twice as far from it as the reference on the whole batch."""
    for dtype in DTYPES:
        for sizes in splits()[-3:]:
            for options in ({}, {"bias_correction": True}):
                state, alone = warm(D, dtype), Alone(warm(D, dtype))
                x = batch(sum(sizes), D, dtype=dtype)
                out = train(mine(x, sizes), state, **options)
                alone.train(x, **options)
                assert out.dtype == dtype
                assert_same_everywhere(state)
                alone.check(state, BOUNDS[dtype_name(dtype)], out=concatenated(out))


@check(1, 2, 4)
def gradient_through_statistics():
    """The rows of the gradient of one process, by the oracle's autograd in float64."""
    for dtype in DTYPES:
        for sizes in splits()[-3:]:
            for options in ({}, {"bias_correction": True, "beta": 0.7, "momentum": 0.3}):
                state, alone = warm(D, dtype), Alone(warm(D, dtype))
                x, dout = batch(sum(sizes), D, dtype=dtype), upstream(sum(sizes), D, dtype=dtype)
                x[:, 5] = 2.5
                rows = mine(x, sizes).requires_grad_()
                out = train(rows, state, stop_gradient=False, **options)
                (dx,) = torch.autograd.grad(out, rows, mine(dout, sizes))
                alone.train(x, dout, **options)
                found = {"out": concatenated(out), "dx through statistics": concatenated(dx)}
                alone.check(state, BOUNDS[dtype_name(dtype)], **found)
                assert dx.dtype == dtype
                assert_same_everywhere(state)


@check(2, 4)
def gradient_through_statistics_of_one_row_a_rank():
    """Correlations of 1 to rounding, whose gradient is 0 on either side of the clamp."""
    for sizes in ([1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]):
        sizes = sizes[: world()]
        for options in ({"bias_correction": True}, {"momentum": 1.0}):
            state, alone = fresh(D), Alone(fresh(D))
            x, dout = batch(sum(sizes), D), upstream(sum(sizes), D)
            rows = mine(x, sizes).requires_grad_()
            out = train(rows, state, stop_gradient=False, **options)
            (dx,) = torch.autograd.grad(out, rows, mine(dout, sizes))
            alone.train(x, dout, **options)
            alone.check(state, BOUNDS["float32"], **{"dx through statistics": concatenated(dx)})


@check(1, 2)
def default_gradient_is_the_scale():
    sizes = splits()[1]
    x, dout = batch(sum(sizes), D), upstream(sum(sizes), D)
    state = warm(D)
    rows = mine(x, sizes).requires_grad_()
    (dx,) = torch.autograd.grad(train(rows, state), rows, mine(dout, sizes))
    assert same_bits(dx, mine(dout, sizes) * state.scale)


@check(1, 2)
def leading_shapes_and_strides():
    sizes = [4] * world()
    x = batch(sum(sizes), D)
    flat, shaped, strided = fresh(D), fresh(D), fresh(D)
    out = train(mine(x, sizes), flat)
    assert same_bits(train(mine(x, sizes).view(2, 2, D), shaped).view(-1, D), out)
    assert same_bits(train(mine(x, sizes).T.contiguous().T, strided), out)
    for state in (shaped, strided):
        for name, tensor in state.tensors.items():
            assert same_bits(tensor, flat.tensors[name]), name


@check(1, 2)
def functional_form_without_scale_and_counter():
    sizes = splits()[1]
    for stop_gradient in (True, False):
        whole = warm(D)
        bare = whole.clone()
        for step in range(3):
            x = mine(batch(sum(sizes), D, seed=step), sizes).requires_grad_()
            dout = mine(upstream(sum(sizes), D, seed=step), sizes)
            found = []
            for state in (whole.tensors, {k: bare.tensors[k] for k in ("running_cov", "running_std")}):
                group = dist.group.WORLD
                out = isobn(x, **state, training=True, process_group=group, stop_gradient=stop_gradient)
                found += [out, *torch.autograd.grad(out, x, dout)]
            assert same_bits(found[0], found[2])
            assert same_bits(found[1], found[3])
        assert same_bits(bare.running_cov, whole.running_cov)
        assert same_bits(bare.running_std, whole.running_std)
    # One row in all: the scale that the statistics call for.
    x = mine(batch(1, D), [1] + [0] * (world() - 1))
    out = isobn(x, bare.running_cov, bare.running_std, training=True, process_group=dist.group.WORLD)
    assert same_bits(out, isobn(x, bare.running_cov, bare.running_std))


@check(2, 4)
def bits_do_not_depend_on_threads():
    """Once the sums are there; a rank may have more threads than another."""
    sizes = [70] * world()
    state = fresh(96)
    torch.set_num_threads(1 + rank() % 2)
    try:
        for step in range(3):
            train(mine(batch(sum(sizes), 96, seed=step), sizes), state)
    finally:
        torch.set_num_threads(1)
    assert_same_everywhere(state)


@check(2)
def autocast_is_off_inside():
    sizes = [40, 30]
    plain, mixed = fresh(D), fresh(D)
    for step in range(3):
        x = mine(batch(sum(sizes), D, seed=step), sizes)
        train(x, plain)
        with torch.autocast("cpu", torch.bfloat16):
            train(x, mixed)
    for name, tensor in plain.tensors.items():
        assert same_bits(mixed.tensors[name], tensor), name


class Calls:
    """The collectives while it is entered: the name and the shape of each."""

    NAMES = ("all_reduce", "broadcast")

    def __enter__(self):
        self.found = []
        self.patches = [mock.patch.object(dist, name, functools.partial(self.call, name)) for name in self.NAMES]
        self.real = {name: getattr(dist, name) for name in self.NAMES}
        for patch in self.patches:
            patch.start()
        return self.found

    def call(self, name, tensor, *args, **options):
        self.found.append((name, *tensor.shape, tensor.dtype))
        return self.real[name](tensor, *args, **options)

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


class NoCalls(Calls):
    def call(self, name, tensor, *_, **__):
        return None


class FailingCall(Calls):
    """Collectives of which one fails, on every rank alike: none then waits for another."""

    def __init__(self, number):
        self.number = number

    def call(self, name, tensor, *args, **options):
        if len(self.found) == self.number:
            raise RuntimeError("it failed")
        return super().call(name, tensor, *args, **options)


@check(2)
def an_error_within_a_step_leaves_the_state_alone():
    sizes = [5] * world()
    x = mine(batch(sum(sizes), D), sizes).requires_grad_()
    for backend in ("reference", "auto"):
        parts = [FailingCall(number) for number in range(3)]
        for name in ("next_state", "apply_scale"):
            owner = type(backends.select(Where(backend), x))
            parts.append(mock.patch.object(owner, name, side_effect=RuntimeError("it failed")))
        for failing in parts:
            for stop_gradient in (True, False):
                state, expected = warm(D), warm(D)
                before = state.clone()
                with pytest.raises(RuntimeError, match="it failed"), failing:
                    train(x, state, stop_gradient=stop_gradient, backend=backend)
                assert_untouched(state, before)
                for s in (state, expected):
                    train(x, s, stop_gradient=stop_gradient, backend=backend)
                assert_same_state(state, expected)


@check(1)
def a_group_of_one_is_a_process_alone():
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"stop_gradient": False}, {"bias_correction": True}):
            alone, grouped = warm(D, dtype), warm(D, dtype)
            for step, rows in enumerate((9, 0, 1, 5)):
                found = []
                for state, group in ((alone, None), (grouped, dist.group.WORLD)):
                    x = batch(rows, D, seed=step, dtype=dtype).requires_grad_()
                    with Calls() as calls:
                        out = isobn(x, **state.tensors, training=True, process_group=group, **options)
                        found.append((out, *torch.autograd.grad(out, x, upstream(rows, D, seed=step, dtype=dtype))))
                    assert not calls
                assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
                assert_same_state(grouped, alone)


@contextlib.contextmanager
def chosen(rank_choices):
    """What this rank chose of the backends and instruction sets of all ranks; yields the backend."""
    backend, isa = rank_choices[rank() % len(rank_choices)]
    before = kernels().instruction_set()
    kernels().set_instruction_set(isa or before)
    try:
        yield backend
    finally:
        kernels().set_instruction_set(before)


@check(2, 4)
def ranks_that_chose_differently():
    """Backends, and processors with other instructions: all ranks hold the same bits, and they are right."""
    if "cpu" not in available_backends():
        return
    native = kernels().instruction_set()
    pairs = [(("cpu", None), ("reference", None)), (("reference", None), ("cpu", None))]
    pairs += [(("cpu", isa), ("cpu", native)) for isa in kernels().instruction_sets()[:-1]]
    pairs += [(("cpu", native), ("reference", None), ("cpu", "baseline"))]
    for choices in pairs:
        for features in (1, 7, 129):
            for dtype in DTYPES:
                for options in ({}, {"bias_correction": True, "beta": 0.7}):
                    sizes = [9, 0, 6, 3][: world()]
                    state, alone = warm(features, dtype), Alone(warm(features, dtype))
                    for step in range(3):
                        x = batch(sum(sizes), features, seed=step, dtype=dtype)
                        dout = upstream(sum(sizes), features, seed=step, dtype=dtype)
                        if features > 2:
                            x[:, 1] = 2.5
                        rows = mine(x, sizes).requires_grad_()
                        with chosen(choices) as backend:
                            out = train(rows, state, backend=backend, stop_gradient=False, **options)
                            (dx,) = torch.autograd.grad(out, rows, mine(dout, sizes))
                        alone.train(x, dout, **options)
                        found = {"out": concatenated(out), "dx through statistics": concatenated(dx)}
                        alone.check(state, BOUNDS[dtype_name(dtype)], **found)
                        assert_same_everywhere(state)


@check(2)
def a_width_of_768():
    """Of the size of a sentence encoder, on ranks that chose differently, with a feature that is skipped."""
    if "cpu" not in available_backends():
        return
    sizes = [40, 23]
    for choices in ((("cpu", None), ("reference", None)), (("cpu", "baseline"), ("cpu", None))):
        state, alone = fresh(768), Alone(fresh(768))
        for step in range(3):
            x = batch(sum(sizes), 768, seed=step)
            if step == 1:
                x[-1, 700] = float("nan")
            with chosen(choices) as backend:
                out = train(mine(x, sizes), state, backend=backend)
            alone.train(x)
            alone.check(state, out=concatenated(out))
            assert_same_everywhere(state)


@check(2)
def collectives_of_fixed_size():
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (0, 1, 5, 33):
            x = batch(rows, D, dtype=dtype).requires_grad_()
            layer = IsoBN(D, process_group=dist.group.WORLD)
            with Calls() as forward:
                out = layer(x)
            with Calls() as backward:
                out.sum().backward()
            with Calls() as evaluation:
                layer.eval()(x).sum().backward()
            assert forward == [
                ("all_reduce", 1 + D, torch.float64),
                ("all_reduce", D * (D + 1) // 2, torch.float32),
                ("broadcast", 2, D, torch.float32),
            ]
            assert (backward, evaluation) == ([], [])
            layer = IsoBN(D, process_group=dist.group.WORLD, stop_gradient=False)
            out = layer(x)
            with Calls() as backward:
                out.sum().backward()
            assert backward == [("all_reduce", 1 + D, torch.float64), ("all_reduce", 2, D, torch.float32)]


@check(1)
def nothing_is_read_by_the_host():
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func), "a value of a tensor was read"
            assert "nonzero" not in str(func), "a shape depends on a value"
            return func(*args, **(kwargs or {}))

    options = Options(0.05, 1e-3, 0.5, True)
    for name in available_backends():
        state, x = warm(D), batch(9, D)
        step, bundle = AcrossRanks(backends.load(name), dist.group.WORLD), Bundle(*state.tensors.values())
        with NoCalls(), Reads():  # PyTorch 2.13 crashes on a collective under such a mode; of one rank it does nothing
            _, scale = step.train_forward(x, bundle, options)
            step.train_backward(x, x, bundle._replace(scale=scale), options)


@check(1)
def registered_operators():
    state = warm(D)
    operators = torch.ops.isobn_kernels
    for bias_correction in (False, True):
        numbers = (0.05, 1e-3, 0.5, bias_correction, "auto", dist.group.WORLD.group_name)
        full = (*state.tensors.values(), *numbers)
        torch.library.opcheck(operators.train_forward.default, (batch(9, D), *full))
        torch.library.opcheck(operators.train_backward.default, (upstream(9, D), batch(9, D), *full))
    bare = (state.running_cov, state.running_std, None, None, 0.05, 1e-3, 0.5, False, *numbers[-2:])
    torch.library.opcheck(operators.train_forward.default, (batch(9, D), *bare))


@check(1, 2)
def function_transforms():
    sizes = [5] * world()
    x, dout = mine(batch(sum(sizes), D), sizes), mine(upstream(sum(sizes), D), sizes)
    for stop_gradient in (True, False):
        state, transformed = warm(D), warm(D)
        rows = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(train(rows, state, stop_gradient=stop_gradient), rows, dout)
        _, vjp = torch.func.vjp(lambda r, s=transformed, g=stop_gradient: train(r, s, stop_gradient=g), x)
        assert same_bits(vjp(dout)[0], expected)
        assert same_bits(transformed.running_cov, state.running_cov)
        before = state.clone()

        def step(rows, state=state, stop_gradient=stop_gradient):
            return train(rows, state, stop_gradient=stop_gradient)

        with pytest.raises(RuntimeError, match="vmap"):
            torch.vmap(step)(x.expand(3, *x.shape))
        if not stop_gradient:
            with pytest.raises(NotImplementedError, match="forward-mode"):
                torch.func.jvp(step, (x,), (dout,))
        for name, tensor in state.tensors.items():
            assert same_bits(tensor, before.tensors[name]), name


@check(4)
def subgroups():
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = pairs[rank() % 2]
    sizes = [5, 3, 2, 4]
    layer = IsoBN(D, process_group=group)
    alone = Alone(fresh(D))
    for step in range(5):
        x = batch(sum(sizes), D, seed=step)
        layer(mine(x, sizes))
        parts = x.split(sizes)
        alone.train(torch.cat([parts[rank() % 2], parts[rank() % 2 + 2]]))
    alone.check(state_of(layer))
    states = everyone(to_bytes(layer.running_cov))
    assert states[0] == states[2] != states[1] == states[3]
    assert "2 ranks" in repr(layer)
    # A rank outside a group gets a number in its place.
    other = pairs[1 - rank() % 2]
    with pytest.raises(TypeError, match="process_group must be"):
        IsoBN(D, process_group=other)
    dist.barrier()
    dist.destroy_process_group(group)
    before = state_of(layer).clone()
    with pytest.raises(RuntimeError, match="process_group has been destroyed"):
        layer(batch(3, D))
    for name, tensor in state_of(layer).tensors.items():
        assert same_bits(tensor, before.tensors[name]), name
    layer.eval()(batch(3, D))  # needs no group


# ---- Models ----


def model(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, D), nn.Tanh(), IsoBN(D, **options), nn.Linear(D, 3))


def data(step, sizes):
    """This rank's inputs and labels, and those of all."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(sum(sizes), 8, generator=generator)
    labels = (inputs[:, :3]).argmax(1)
    return (mine(inputs, sizes), mine(labels, sizes)), (inputs, labels)


loss_of = nn.functional.cross_entropy


def models_alone(stop_gradient=True, **options):
    """The model for one process, and the same in float64 with the oracle for IsoBN."""
    exact = model()
    exact[2] = oracle.Layer(D, stop_gradient, **options)
    return model(stop_gradient=stop_gradient, **options), exact.double()


def in_dtype_of(m, inputs):
    return inputs.to(next(m.parameters()).dtype)


def assert_equal_models(found, alone, exact, parameters=None):
    """After the same steps, by the rule of tolerance.py; ``parameters`` where those of ``found`` are in pieces."""

    def results(m, parameters):
        state = m[2].state if m is exact else state_of(m[2])
        return named(state, parameters=[p.detach() for p in parameters])

    assert_right(*(results(m, ps or m.parameters()) for m, ps in ((found, parameters), (alone, None), (exact, None))))
    assert int(found[2].num_batches_tracked) == exact[2].state.t


def train_all(wrapped, alone, exact, steps=8):
    """Eight steps with even batches, on which the mean of the ranks' mean losses is that of the whole batch."""
    sizes = [6] * world()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (wrapped, alone, exact)]
    for step in range(steps):
        here, whole = data(step, sizes)
        for m, (inputs, labels), optimizer in zip(
            (wrapped, alone, exact), (here, whole, whole), optimizers, strict=True
        ):
            optimizer.zero_grad()
            loss_of(m(in_dtype_of(m, inputs)), labels).backward()
            optimizer.step()


@check(2, 4)
def ddp_with_convert_sync_isobn():
    for options in ({}, {"stop_gradient": False}, {"bias_correction": True}):
        for broadcast_buffers in (True, False):
            alone = models_alone(**options)
            wrapped = model(**options)
            tensors = dict(wrapped.named_buffers())
            assert IsoBN.convert_sync_isobn(wrapped) is wrapped
            assert all(b is tensors[name] for name, b in wrapped.named_buffers()), "a tensor was copied"
            wrapped = DDP(wrapped, broadcast_buffers=broadcast_buffers)
            train_all(wrapped, *alone)
            assert_equal_models(wrapped.module, *alone)
            assert_same_everywhere(state_of(wrapped.module[2]))


@check(1, 2)
def conversion_reaches_every_layer():
    group = dist.new_group()
    nested = nn.ModuleDict({"head": nn.Sequential(nn.Sequential(IsoBN(3)), nn.Linear(3, 4)), "last": IsoBN(4)})
    layers = [nested["head"][0][0], nested["last"]]
    assert IsoBN.convert_sync_isobn(nested, group) is nested
    assert all(layer.process_group is group for layer in layers)
    assert IsoBN.convert_sync_isobn(nested) is nested
    assert all(layer.process_group is dist.group.WORLD for layer in layers)
    bare = IsoBN(3)
    assert IsoBN.convert_sync_isobn(bare) is bare
    assert bare.process_group is dist.group.WORLD
    dist.destroy_process_group(group)


@check(2)
def ddp_without_process_group():
    for broadcast_buffers in (True, False):
        wrapped = DDP(model(), broadcast_buffers=broadcast_buffers)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.3)
        losses = []
        for step in range(30):
            inputs, labels = data(step, [8, 8])[0]
            optimizer.zero_grad()
            loss = loss_of(wrapped(inputs), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
        before = to_bytes(wrapped.module[2].running_cov)
        wrapped(data(99, [0, 0])[0][0])  # no rows: no update, only the broadcast
        after = to_bytes(wrapped.module[2].running_cov)
        if broadcast_buffers:
            assert len(set(everyone(after))) == 1
            assert everyone(before)[0] == after, "not rank 0's"
        else:
            assert before == after
            assert len(set(everyone(after))) == 2


@check(2)
def two_forwards_before_a_backward():
    """Siamese training: two updates, and each forward's own scale in the backward."""
    for options in ({}, {"stop_gradient": False}):
        for broadcast_buffers in (True, False):
            alone, exact = models_alone(**options)
            wrapped = DDP(IsoBN.convert_sync_isobn(model(**options)), broadcast_buffers=broadcast_buffers)
            for m, whole in ((wrapped, False), (alone, True), (exact, True)):
                optimizer = torch.optim.SGD(m.parameters(), lr=0.3)
                for step in range(4):
                    (a, labels), (b, other) = (data(2 * step + k, [6, 6])[whole] for k in (0, 1))
                    optimizer.zero_grad()
                    first, second = m(in_dtype_of(m, a)), m(in_dtype_of(m, b))
                    (loss_of(first, labels) + loss_of(second, other)).backward()
                    optimizer.step()
            assert_equal_models(wrapped.module, alone, exact)
            assert int(wrapped.module[2].num_batches_tracked) == 8
            assert_same_everywhere(state_of(wrapped.module[2]))


@check(2)
def accumulation_under_no_sync():
    alone, exact = models_alone()
    wrapped = DDP(IsoBN.convert_sync_isobn(model()))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (wrapped, alone, exact)]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (a, b), whole = zip(*(data(2 * step + k, [6, 6]) for k in (0, 1)), strict=True)
        with wrapped.no_sync():
            loss_of(wrapped(a[0]), a[1]).backward()
        loss_of(wrapped(b[0]), b[1]).backward()
        for inputs, labels in whole:
            for m in (alone, exact):
                loss_of(m(in_dtype_of(m, inputs)), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert_equal_models(wrapped.module, alone, exact)
    assert_same_everywhere(state_of(wrapped.module[2]))


class Checkpointed(nn.Module):
    def __init__(self, inner, use_reentrant):
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x):
        return self.inner[3](checkpoint(self.inner[1:3], self.inner[0](x), use_reentrant=self.use_reentrant))


@check(2, 4)
def activation_checkpointing_under_ddp():
    for options in ({}, {"stop_gradient": False}):
        for use_reentrant in (False, True):
            alone = models_alone(**options)
            wrapped = DDP(Checkpointed(IsoBN.convert_sync_isobn(model(**options)), use_reentrant))
            with Calls() as calls:
                train_all(wrapped, *alone, steps=4)
            assert len(calls) == 4 * (3 if not options else 5), "a recomputation called the other ranks"
            assert_equal_models(wrapped.module.inner, *alone)
            assert int(alone[0][2].num_batches_tracked) == 4
            assert_same_everywhere(state_of(wrapped.module.inner[2]))


@check(2)
def fsdp2():
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (world(),))
    for options in ({}, {"stop_gradient": False}):
        alone = models_alone(**options)
        sharded = IsoBN.convert_sync_isobn(model(**options))
        for layer in sharded:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        train_all(sharded, *alone)
        assert_equal_models(sharded, *alone, parameters=[p.full_tensor() for p in sharded.parameters()])
        assert_same_everywhere(state_of(sharded[2]))


@check(2)
def accelerator():
    from accelerate import Accelerator

    alone = models_alone()
    prepared = Accelerator(cpu=True).prepare(IsoBN.convert_sync_isobn(model()))
    assert isinstance(prepared, DDP)
    train_all(prepared, *alone)
    assert_equal_models(prepared.module, *alone)
    assert_same_everywhere(state_of(prepared.module[2]))


@check(2)
def compiled():
    """One graph for the step, all-reduces included; equal to eager. Inductor's code is no concern of the operators."""
    for options in ({}, {"stop_gradient": False}):
        eager, compiled = (IsoBN.convert_sync_isobn(model(**options)) for _ in range(2))
        run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        for step, rows in enumerate((4, 6, 9)):
            inputs, labels = data(step, [rows] * world())[0]
            for m in (eager, run):
                m.zero_grad()
                # Whether a forward is a repetition is asked when the graph runs, not when it is made.
                loss_of(checkpoint(m, inputs, use_reentrant=False), labels).backward()
            for (name, p), q in zip(compiled.named_parameters(), eager.parameters(), strict=True):
                assert same_bits(p.grad, q.grad), name
        assert_same_state(state_of(compiled[2]), state_of(eager[2]))
        assert int(compiled[2].num_batches_tracked) == 3
        assert_same_everywhere(state_of(compiled[2]))


@check(2)
def compiled_by_inductor_with_an_empty_rank():
    """The collectives of a rank without rows stay in its graph: its results are empty, and nobody reads them.

    Compiled and eager code round differently: the sum of the ranks' gradients is compared with the oracle's.
    """

    def gradients(m):
        return [torch.stack(everyone(p.grad)).sum(0) for p in m.parameters()]

    for options in ({}, {"stop_gradient": False}):
        eager, compiled = (IsoBN.convert_sync_isobn(model(**options)) for _ in range(2))
        _, exact = models_alone(**options)
        torch._dynamo.reset()
        run = torch.compile(compiled, fullgraph=True, dynamic=False)
        for step, sizes in enumerate(([5, 0], [0, 5], [0, 0], [5, 0])):
            whole = batch(sum(sizes), 8, seed=step)
            for m, inputs in ((eager, mine(whole, sizes)), (run, mine(whole, sizes)), (exact, whole.double())):
                m.zero_grad()
                m(inputs).square().sum().backward()
            found, reference = (named(state_of(m[2]), dx=gradients(m)) for m in (compiled, eager))
            assert_right(found, reference, named(exact[2].state, dx=[p.grad for p in exact.parameters()]))
            assert int(compiled[2].num_batches_tracked) == exact[2].state.t
        assert_same_everywhere(state_of(compiled[2]))


@check(1, 2)
def copies():
    group = dist.group.WORLD
    trained = model(process_group=group)
    trained(data(0, [5] * world())[0][0])
    for again in (copy.deepcopy(trained), copy.copy(trained)):
        assert again[2].process_group is group
        assert same_bits(again[2].running_cov, trained[2].running_cov)
    again = copy.deepcopy(trained)
    again(data(1, [5] * world())[0][0])
    assert not same_bits(again[2].running_cov, trained[2].running_cov), "a deepcopy shares its statistics"
    for loaded in (pickle.loads(pickle.dumps(trained)), copy.copy(trained[2])):
        layer = loaded[2] if isinstance(loaded, nn.Sequential) else loaded
        assert same_bits(layer.running_cov, trained[2].running_cov)
        assert layer.process_group is (None if layer is not loaded else group)
    assert trained[2].process_group is group
    assert f"synchronised over {world()} rank" in repr(trained)
    assert "synchronised" not in repr(IsoBN(3))


@check(2)
def saved_for_one_process():
    """The other half of `test_checkpoint_of_two_ranks_continues_on_one`."""
    layer = IsoBN(D, process_group=dist.group.WORLD, bias_correction=True)
    for step in range(5):
        layer(mine(batch(10, D, seed=step), [7, 3]))
    saved = {name: to_bytes(tensor) for name, tensor in layer.state_dict().items()}
    assert everyone(saved)[0] == saved
    if rank() == 0:
        torch.save(layer.state_dict(), FOLDER / "two_ranks.pt")


def run_checks():
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
    lines = []
    for name, (worlds, function) in CHECKS.items():
        if world() not in worlds:
            continue
        try:
            function()
            trouble = None
        except Exception:
            trouble = traceback.format_exc()
        lines.append(json.dumps([name, trouble]))
        (FOLDER / f"rank{rank()}.jsonl").write_text("\n".join(lines))
        dist.barrier()


def die():
    """Rank 1 is gone in the middle of training; the others must not wait for it forever."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
    layer = IsoBN(D, process_group=dist.group.WORLD)
    for step in range(10):
        if step == 3 and rank() == 1:
            os._exit(3)
        layer(batch(4, D, seed=step))


def nccl():
    """A GPU for each rank; no step waits for its GPU."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=datetime.timedelta(seconds=SECONDS))
    sizes = [5, *[3] * (world() - 1)]
    for options in ({}, {"stop_gradient": False, "bias_correction": True}):
        state, alone = fresh(D, device=device), Alone(fresh(D))
        for step in range(50):
            x, dout = (draw(sum(sizes), D, seed=step) for draw in (batch, upstream))
            rows, upper = (mine(t, sizes).to(device) for t in (x, dout))
            rows.requires_grad_()
            if step:  # the first one makes connections and handles
                torch.cuda.set_sync_debug_mode("error")
            out = train(rows, state, **options)
            (dx,) = torch.autograd.grad(out, rows, upper)
            torch.cuda.set_sync_debug_mode("default")
            alone.train(x, dout if options else None, bias_correction=bool(options))
            if step % 10 == 0 and options:
                alone.check(state, **{"dx through statistics": concatenated(dx.cpu())})
        assert_same_everywhere(state)
        alone.check(state)


if __name__ == "__main__":
    FOLDER, what = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN: a value read before it is written shows
    {"all": run_checks, "die": die, "nccl": nccl}[what]()
    dist.destroy_process_group()
