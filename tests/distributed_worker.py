"""What `test_distributed.py` runs on every rank: ``torchrun tests/distributed_worker.py FOLDER``.

A check is a function that all ranks call. Rank 0 writes to ``FOLDER/results.json`` what went wrong with each: nothing,
or the traceback of the first rank that failed.
"""

import copy
import datetime
import io
import json
import os
import pickle
import sys
import traceback
from pathlib import Path

import helpers
import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from helpers import batch, fresh, same_bits, to_numpy, upstream, warm
from tolerance import covariance_error, relative
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from isobn_kernels import IsoBN, isobn

D = 33
CHECKS = {}
DEVICE = "cuda" if "--cuda" in sys.argv else "cpu"


def check(function):
    CHECKS[function.__name__] = function
    return function


def rank():
    return dist.get_rank()


def ranks():
    return dist.get_world_size()


def share(x, sizes=None):
    """This rank's rows of ``x``: as even as it goes, or ``sizes``, which repeats over the ranks."""
    if sizes is None:
        return x.tensor_split(ranks())[rank()]
    edges = np.cumsum([0, *(sizes[one % len(sizes)] for one in range(ranks()))])
    return x[edges[rank()] : edges[rank() + 1]]


def total(sizes):
    return sum(sizes[one % len(sizes)] for one in range(ranks()))


def gather(tensor):
    """The tensors of all ranks, whatever their shapes."""
    found = [None] * ranks()
    dist.all_gather_object(found, tensor.detach())
    return found


def assert_same_on_all_ranks(tensors):
    for name, tensor in tensors.items():
        for one, other in enumerate(gather(tensor)):
            assert same_bits(tensor, other), f"{name} of rank {one} differs from that of rank {rank()}"


def assert_close(found, expected, bound=1e-6):
    """Two states, by the measures of SPEC; the second is exact."""
    errors = {
        "C": covariance_error(to_numpy(found.running_cov), to_numpy(expected.running_cov)),
        "sigma": relative(to_numpy(found.running_std), to_numpy(expected.running_std)),
        "scale": relative(to_numpy(found.scale), to_numpy(expected.scale)),
    }
    assert max(errors.values()) <= bound, errors
    assert found.num_batches_tracked == expected.num_batches_tracked


def synced(x, state, **options):
    return isobn(x, **state.tensors, training=True, process_group=dist.group.WORLD, **options)


def alone(x, state, **options):
    """One process on all rows."""
    return isobn(x, **state.tensors, training=True, **options)


SIZES = {
    "even": (16,),
    "uneven": (3, 17, 1, 8),
    "empty rank": (0, 12),
    "one row each": (1,),
    "one rank has all": (9, 0, 0, 0),
}


@check
def fifty_steps():
    for sizes in SIZES.values():
        if total(sizes) < 2:
            continue
        for options in ({}, {"bias_correction": True}, {"stop_gradient": False}):
            state, expected = fresh(D, device=DEVICE), oracle.fresh_state(D)
            numbers = {name: value for name, value in options.items() if name != "stop_gradient"}
            for step in range(50):
                x = batch(total(sizes), D, seed=step, device=DEVICE)
                out = synced(share(x, sizes), state, **options)
                exact, expected = oracle.train_step(to_numpy(x), expected, **numbers)
            assert_same_on_all_ranks(state.tensors)
            errors = {
                "C": covariance_error(to_numpy(state.running_cov), expected.C),
                "sigma": relative(to_numpy(state.running_std), expected.sigma),
                "scale": relative(to_numpy(state.scale), expected.scale),
                "out": relative(to_numpy(out), share(exact, sizes)) if len(out) else 0.0,
            }
            assert max(errors.values()) <= 1e-6, (sizes, options, errors)
            assert state.num_batches_tracked == expected.t == 50
            helpers.assert_symmetric(state.running_cov)


@check
def half_and_double_precision():
    for dtype, bound in ((torch.float16, 1e-6), (torch.bfloat16, 1e-6), (torch.float64, 1e-13)):
        state, whole = fresh(D, dtype), fresh(D, torch.float64)
        for step in range(5):
            x = batch(21, D, seed=step, dtype=dtype)
            out = synced(share(x), state)
            assert out.dtype == dtype
            alone(x.double(), whole)
        assert_same_on_all_ranks(state.tensors)
        assert_close(state, whole, bound)


@check
def mean_far_above_the_deviation():
    state, whole = fresh(D), fresh(D, torch.float64)
    for step in range(5):
        x = batch(40, D, seed=step, offset=1e4)
        synced(share(x), state)
        alone(x.double(), whole)
    assert_close(state, whole)


@check
def fewer_than_two_rows_in_all():
    for total_rows in (0, 1):
        for stop_gradient in (True, False):
            x = batch(total_rows, D).requires_grad_()
            mine = share(x, (total_rows, 0, 0, 0))
            state = warm(D)
            before = state.clone()
            out = synced(mine, state, stop_gradient=stop_gradient)
            helpers.assert_untouched(state, before)
            assert same_bits(out, (mine * before.scale).detach())
            out.sum().backward()
            expected = before.scale.expand(total_rows, D) if rank() == 0 else torch.zeros(total_rows, D)
            assert same_bits(x.grad, expected.contiguous())


@check
def one_row_on_each_of_two_ranks():
    if ranks() < 2:
        return
    state, whole, x = warm(D), warm(D, torch.float64), batch(2, D)
    synced(share(x, (1, 1, 0, 0)), state)
    alone(x.double(), whole)
    assert_close(state, whole)


@check
def constant_feature():
    for dtype, value in ((torch.float32, 0.1), (torch.float32, -3.7), (torch.float64, 0.1), (torch.float64, 1e5 / 3)):
        x = batch(23, D, dtype=dtype)
        x[:, 5] = value
        state = fresh(D, dtype)
        synced(share(x, (5, 18, 0, 0) if ranks() > 1 else None), state)
        assert state.running_std[5] == 0
        assert not state.running_cov[5].any()
        assert state.scale.isfinite().all()


@check
def constant_on_each_rank_but_not_over_all():
    if ranks() < 2:
        return
    x = batch(8 * ranks(), D)
    x[:, 5] = torch.arange(ranks()).repeat_interleave(8)
    state, whole = fresh(D), fresh(D, torch.float64)
    synced(share(x, (8,)), state)
    alone(x.double(), whole)
    assert state.running_std[5] > 0
    assert_close(state, whole)


@check
def nan_or_inf_on_one_rank():
    for value in (float("nan"), float("inf")):
        for stop_gradient in (True, False):
            x = batch(20, D)
            x[-1, [0, 7]] = value  # a row of the last rank
            x.requires_grad_()
            state, whole = warm(D), warm(D)
            before = state.clone()
            synced(share(x), state, stop_gradient=stop_gradient).sum().backward()
            alone(x.detach(), whole)
            for feature in (0, 7):
                assert same_bits(state.running_cov[feature], before.running_cov[feature])
                assert same_bits(state.running_std[feature], before.running_std[feature])
            helpers.assert_finite(state)
            assert_same_on_all_ranks(state.tensors)
            assert covariance_error(to_numpy(state.running_cov), to_numpy(whole.running_cov)) < 1e-6
            assert state.running_std[1] != before.running_std[1]


@check
def gradient_through_the_statistics():
    for sizes in SIZES.values():
        for start in (fresh, warm):
            for options in ({}, {"bias_correction": True}):
                if total(sizes) < 2:
                    continue
                state = start(D, torch.float64)
                x, dout = (make(total(sizes), D, dtype=torch.float64) for make in (batch, upstream))
                exact = oracle.gradient(to_numpy(x), to_numpy(dout), state.oracle(), **options)
                mine = share(x, sizes).clone().requires_grad_()
                out = synced(mine, state, stop_gradient=False, **options)
                (dx,) = torch.autograd.grad(out, mine, share(dout, sizes))
                # Relative to the largest of each feature over all rows.
                error = np.abs(to_numpy(dx) - share(exact, sizes)).max(axis=0, initial=0) / np.abs(exact).max(axis=0)
                assert error.max() < 1e-11, (sizes, start.__name__, options, error.max())


@check
def default_gradient():
    state = warm(D)
    x = share(batch(20, D)).requires_grad_()
    dout = share(upstream(20, D))
    synced(x, state).backward(dout)
    assert same_bits(x.grad, dout * state.scale)


@check
def gradient_of_half_precision():
    x, dout = batch(20, D, dtype=torch.bfloat16), upstream(20, D, dtype=torch.bfloat16)
    mine, whole = share(x).clone().requires_grad_(), x.clone().requires_grad_()
    synced(mine, warm(D), stop_gradient=False).backward(share(dout))
    alone(whole, warm(D), stop_gradient=False).backward(dout)
    torch.testing.assert_close(mine.grad, share(whole.grad), rtol=2**-7, atol=1e-6)


@check
def without_scale_and_counter():
    x, state, other = batch(20, D), warm(D), warm(D)
    out = synced(share(x), state)
    bare = isobn(share(x), other.running_cov, other.running_std, training=True, process_group=dist.group.WORLD)
    assert same_bits(out, bare)
    one = x[:1] if rank() == 0 else x[:0]
    expected = isobn(one, other.running_cov, other.running_std)
    assert same_bits(
        isobn(one, other.running_cov, other.running_std, training=True, process_group=dist.group.WORLD), expected
    )


@check
def leading_shapes_and_views():
    x = batch(2 * 3 * ranks(), D)
    state, other = warm(D), warm(D)
    out = synced(share(x).view(2, 3, D), state)
    assert same_bits(out.view(-1, D), synced(share(x.T.contiguous().T), other))
    helpers.assert_same_state(state, other)


@check
def autocast_changes_no_bit():
    state, other, x = warm(D), warm(D), share(batch(20, D))
    with torch.autocast("cpu", torch.bfloat16):
        out = synced(x, state)
    assert same_bits(out, synced(x, other))
    helpers.assert_same_state(state, other)


@check
def subgroups():
    """Ranks 0 and 1 share their statistics; the others are not asked."""
    if ranks() < 2:
        return
    group = dist.new_group([0, 1])
    if rank() > 1:
        with pytest.raises(TypeError, match="that this process belongs to"):
            IsoBN(D, process_group=group)
        return
    layer, expected = IsoBN(D, process_group=group), IsoBN(D)
    for step in range(3):
        x = batch(20, D, seed=step)
        layer(x.tensor_split(2)[rank()])
        expected(x)
    assert_close(layer, expected)


def classifier(dropout=0.0, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, D), nn.Tanh(), IsoBN(D, **options), nn.Dropout(dropout), nn.Linear(D, 3))


def texts(step, rows=16):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 12, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def train(model, steps=4, mine=True):
    """The loss of the whole batch is the mean of those of the ranks, which DDP averages the gradients of."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        x, labels = texts(step)
        if mine:
            x, labels = share(x), share(labels)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model


@check
def ddp_equals_one_process():
    for options in ({}, {"stop_gradient": False}, {"bias_correction": True}):
        model = DistributedDataParallel(IsoBN.convert_sync_isobn(classifier(**options)))
        train(model)
        whole = train(classifier(**options), mine=False)
        assert_same_on_all_ranks(model.module.state_dict())
        assert_close(model.module[2], whole[2], bound=2e-5)
        for (name, found), expected in zip(model.module.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)


@check
def ddp_without_a_group():
    for broadcast_buffers in (True, False):
        model = DistributedDataParallel(classifier(), broadcast_buffers=broadcast_buffers)
        train(model)
        layer = model.module[2]
        assert layer.num_batches_tracked == 4
        assert_same_on_all_ranks(dict(model.named_parameters()))
        x, _ = texts(9)
        if broadcast_buffers:  # before the forward, from rank 0
            model(x[:0])
            assert_same_on_all_ranks(dict(layer.named_buffers()))
        elif ranks() > 1:
            assert len({helpers.to_bytes(std) for std in gather(layer.running_std)}) == ranks()


@check
def ddp_checkpointed():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = IsoBN.convert_sync_isobn(classifier())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model = train(DistributedDataParallel(Checkpointed()))
    plain = train(DistributedDataParallel(IsoBN.convert_sync_isobn(classifier())))
    for (name, found), expected in zip(
        model.module.inner.state_dict().items(), plain.module.state_dict().values(), strict=True
    ):
        assert same_bits(found, expected), name


@check
def ddp_two_forwards_and_accumulation():
    model = DistributedDataParallel(IsoBN.convert_sync_isobn(classifier()), broadcast_buffers=False)
    whole = classifier()
    (x, _), (z, _) = texts(0), texts(1)
    with model.no_sync():
        (model(share(x)) * model(share(z))).mean().backward()
    (model(share(z)) * model(share(x))).mean().backward()
    for first, second in ((x, z), (z, x)):
        (whole(first) * whole(second)).mean().backward()
    for found, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert model.module[2].num_batches_tracked == 4
    assert_close(model.module[2], whole[2])


@check
def fsdp2():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = IsoBN.convert_sync_isobn(classifier())
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks(),)))
    train(model)
    assert_same_on_all_ranks(dict(model[2].named_buffers()))
    assert_close(model[2], train(classifier(), mine=False)[2], bound=2e-5)


@check
def accelerate():
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError:
        return  # of the extra "finetune"
    accelerator = Accelerator(cpu=True)
    model = classifier()
    model, optimizer = accelerator.prepare(
        IsoBN.convert_sync_isobn(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    )
    for step in range(4):
        x, labels = (share(tensor) for tensor in texts(step))
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(x), labels))
        optimizer.step()
    layer = accelerator.unwrap_model(model)[2]
    assert_same_on_all_ranks(dict(layer.named_buffers()))
    assert_close(layer, train(classifier(), mine=False)[2], bound=2e-5)


@check
def compiled():
    for stop_gradient in (True, False):
        eager, traced = (IsoBN.convert_sync_isobn(classifier(stop_gradient=stop_gradient)) for _ in range(2))
        run = torch.compile(traced, backend="aot_eager", fullgraph=True)
        for step in range(3):
            for model, call in ((eager, eager), (traced, run)):
                model.zero_grad()
                call(share(texts(step, rows=16 + 4 * step)[0])).square().sum().backward()
        for (name, a), b in zip(eager.named_parameters(), traced.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)
        assert_same_on_all_ranks(dict(traced[2].named_buffers()))
        assert_close(traced[2], eager[2])


@check
def copies_and_pickles():
    model = IsoBN.convert_sync_isobn(classifier())
    layer = model[2]
    model(share(texts(0)[0]))
    assert layer.process_group is dist.group.WORLD
    assert f"ranks={ranks()}" in repr(layer)
    twin = copy.deepcopy(model)[2]
    assert twin.process_group is layer.process_group
    assert twin.running_cov is not layer.running_cov
    loaded = pickle.loads(pickle.dumps(layer))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (loaded, torch.load(file, weights_only=False)[2]):
        assert other.process_group is None
        for name, buffer in layer.named_buffers():
            assert same_bits(buffer, getattr(other, name))
    assert layer.process_group is dist.group.WORLD


@check
def conversion_keeps_the_layers():
    model = classifier()
    buffers = list(model.buffers())
    assert IsoBN.convert_sync_isobn(model, dist.group.WORLD) is model
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))


@check
def collectives_do_not_depend_on_the_batch():
    """Ranks that made different calls, or calls of different sizes, would hang."""
    seen, all_reduce = [], dist.all_reduce

    def watched(tensor, *args, **kwargs):
        seen.append((tuple(tensor.shape), tensor.dtype))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = watched
    try:
        for rows in (0, 1, 2, 40):
            synced(batch(rows, D), fresh(D))
            assert seen == [((1 + D,), torch.float64), ((D, D), torch.float32)], (rows, seen)
            seen.clear()
    finally:
        dist.all_reduce = all_reduce


@check
def training_goes_on_from_a_checkpoint_with_other_ranks():
    """What one process would have saved: a run may go on with any number of ranks."""
    model = train(DistributedDataParallel(IsoBN.convert_sync_isobn(classifier())), steps=2).module
    restored, whole = classifier(), train(classifier(), steps=2, mine=False)
    restored.load_state_dict(model.state_dict())
    assert_close(restored[2], whole[2], bound=2e-5)
    train(restored, mine=False)
    assert restored[2].num_batches_tracked == 6


@check
def evaluation_asks_nobody():
    layer = IsoBN.convert_sync_isobn(IsoBN(D)).eval()
    if rank() == 0:  # the others would be waited for
        layer(batch(4, D))


def main(folder):
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", timeout=datetime.timedelta(seconds=40))
    if folder == "--die":
        layer = IsoBN(D, process_group=dist.group.WORLD)
        for step in range(6):
            if step == 3 and rank() == ranks() - 1:
                os._exit(3)
            layer(batch(8, D, seed=step))
        return
    results = {}
    for name, function in CHECKS.items():
        if DEVICE == "cuda" and function is not fifty_steps:
            continue
        try:
            function()
            error = None
        except Exception:
            error = f"rank {rank()}:\n{traceback.format_exc()}"
        errors = [None] * ranks()
        dist.all_gather_object(errors, error)
        results[name] = next((error for error in errors if error), None)
    if rank() == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
