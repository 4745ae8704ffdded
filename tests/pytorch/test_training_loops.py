"""The layer in the loops that people write: mixed precision, accumulation, averaged weights, `torch.func`, resuming.

Every test runs with `torch.use_deterministic_algorithms(True)` on, as all of this suite does (`poisoned_memory` in
conftest.py): that no operation refuses it is part of what they show.
"""

import copy
import functools
import warnings
from collections import OrderedDict

import oracle
import pytest
import torch
import torch.distributed as dist
from cases import CASES, skip_unless_available
from helpers import State, assert_same_state, same_bits, to_numpy
from tolerance import assert_right, named, scale_rightly
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.optim import swa_utils
from torch.utils import checkpoint

from isobn_kernels import IsoBN, isobn

# The compiler itself still calls torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

BOTH_MODES = pytest.mark.parametrize("stop_gradient", [True, False], ids=["default", "through statistics"])
F, D = 6, 9


@pytest.fixture(params=[case for case in CASES if case.isa in (None, "baseline")], ids=lambda case: case.name)
def case(request):
    """One instruction set of the CPU kernels: what is around them does not depend on it, and compiling takes long."""
    skip_unless_available(request.param)
    with request.param.selected():
        yield request.param


def classifier(case, dropout=0.1, norm=None, **options):
    """Encoder, IsoBN, dropout, linear: always the same one."""
    torch.manual_seed(0)
    layers = OrderedDict(
        encoder=nn.Linear(F, D),
        norm=IsoBN(D, backend=case.backend, **options) if norm is None else norm,
        dropout=nn.Dropout(dropout),
        head=nn.Linear(D, 2),
    )
    return nn.Sequential(layers).to(case.device).train()


def examples(step, case, N=16):
    """A batch with labels that can be learned. Its first column is 0, so that the tests may put something there."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(N, F, generator=generator)
    x[:, 0] = 0
    return x.to(case.device), (x[:, 1] + x[:, 2] > 0).long().to(case.device)


def state_of(layer):
    return State(*layer.buffers())


def assert_same_model(a, b):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert same_bits(p, q), name


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters()}


def exact_classifier(stop_gradient=True):
    """In float64, with the oracle for IsoBN; on the CPU."""
    cpu = CASES[0]
    return classifier(cpu, dropout=0.0, norm=oracle.Layer(D, stop_gradient)).double()


# ---- Mixed precision ----


def scaled_step(net, optimizer, scaler, x, y, dtype):
    with torch.autocast(x.device.type, dtype=dtype):
        loss = cross_entropy(net(x), y)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


@BOTH_MODES
@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 6e4), (torch.bfloat16, 1e38)], ids=["fp16", "bf16"])
def test_mixed_precision_recovers_from_an_overflow(case, dtype, large, stop_gradient):
    """The encoder overflows in feature 0: the scaler skips the step, and the other features' statistics are as ever."""
    net = classifier(case, stop_gradient=stop_gradient)
    with torch.no_grad():
        net.encoder.weight[:, 0] = 0
        net.encoder.weight[0, 0] = 50
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(case.device, init_scale=1024.0)
    losses = [scaled_step(net, optimizer, scaler, *examples(step, case), dtype) for step in range(5)]
    assert scaler.get_scale() == 1024

    before, harmless = copy.deepcopy(net), copy.deepcopy(net)
    x, y = examples(5, case)
    with torch.autocast(case.device, dtype=dtype):
        harmless(x)
    x[3, 0] = large
    scaled_step(net, optimizer, scaler, x, y, dtype)
    assert scaler.get_scale() == 512
    for (name, p), q in zip(net.named_parameters(), before.parameters(), strict=True):
        assert same_bits(p, q), name
    norm = net.norm
    assert same_bits(norm.running_cov[1:, 1:], harmless.norm.running_cov[1:, 1:])
    assert same_bits(norm.running_std[1:], harmless.norm.running_std[1:])
    assert same_bits(norm.running_cov[0], before.norm.running_cov[0])
    assert same_bits(norm.running_std[0], before.norm.running_std[0])
    assert norm.scale.isfinite().all()
    assert norm.num_batches_tracked == 6

    losses += [scaled_step(net, optimizer, scaler, *examples(step, case), dtype) for step in range(6, 26)]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())


def test_loss_scale_that_overflows_leaves_the_statistics_alone(case):
    """The gradients are infinite, the batch is not: its statistics are those of a loop without a scaler."""
    net, plain = classifier(case), classifier(case)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(case.device, init_scale=2.0**40)
    x, y = examples(0, case)
    scaled_step(net, optimizer, scaler, x, y, torch.float16)
    assert scaler.get_scale() == 2.0**39
    with torch.autocast(case.device, dtype=torch.float16):
        plain(x)
    assert_same_model(net, plain)


# ---- Sharded models: FSDP on one rank ----


@pytest.fixture
def fsdp(case):
    """`FullyShardedDataParallel` over a group of this process alone."""
    if case.device != "cpu":
        pytest.skip("FSDP is tested on CPU tensors")
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP is switching to use `NO_SHARD`")
        yield functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
    dist.destroy_process_group()


def half_everywhere(dtype, **changed):
    """The policy that accelerate sets up for FSDP."""
    from torch.distributed.fsdp import MixedPrecision

    return MixedPrecision(**{"param_dtype": dtype, "reduce_dtype": dtype, "buffer_dtype": dtype, **changed})


def beside(net):
    """The IsoBN of a wrapped model, and a copy that gets the same inputs without FSDP."""
    (norm,) = (module for module in net.modules() if isinstance(module, IsoBN))
    copied = copy.deepcopy(norm)

    def follow(_, args, out):
        copied.train(norm.training)(args[0].detach())

    norm.register_forward_hook(follow)
    return norm, copied


WRAPPED = {
    "whole": lambda fsdp, net, policy: fsdp(net, mixed_precision=policy),
    "in parts": lambda fsdp, net, policy: fsdp(
        nn.Sequential(fsdp(net[:2], mixed_precision=policy), net[2:]), mixed_precision=policy
    ),
    "original parameters": lambda fsdp, net, policy: fsdp(net, mixed_precision=policy, use_orig_params=True),
    "by class": lambda fsdp, net, policy: fsdp(
        net, mixed_precision=policy, auto_wrap_policy=lambda module, recurse, **_: recurse or type(module) is nn.Linear
    ),
}


@BOTH_MODES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("how", WRAPPED)
def test_fsdp_in_mixed_precision_has_statistics_of_float32(case, fsdp, how, dtype, stop_gradient):
    """FSDP casts buffers past `.half()`, at the first forward. New statistics lose nothing, and nothing is said."""
    net = WRAPPED[how](fsdp, classifier(case, stop_gradient=stop_gradient), half_everywhere(dtype))
    norm, expected = beside(net)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*IsoBN")
        for step in range(3):
            x, y = examples(step, case)
            cross_entropy(net.train()(x.to(dtype)).float(), y).backward()
            net.eval()(x.to(dtype))
    assert [buffer.dtype for buffer in norm.buffers()] == [torch.float32] * 3 + [torch.int64]
    assert norm.num_batches_tracked == 3
    assert_same_state(state_of(norm), state_of(expected))
    saved = {name.rpartition("norm.")[2]: tensor for name, tensor in net.state_dict().items()}
    assert all(same_bits(saved[name.rpartition("norm.")[2]], buffer) for name, buffer in norm.named_buffers())


def trained_in_float32(case):
    net = classifier(case)
    for step in range(3):
        net(examples(step, case)[0])
    return net.eval()


def test_fsdp_rounds_statistics_from_before_and_says_so(case, fsdp):
    net = fsdp(trained_in_float32(case), mixed_precision=half_everywhere(torch.bfloat16))
    norm = beside(net)[0]
    rounded = State(*(b.bfloat16().float() if b.is_floating_point() else b.clone() for b in norm.buffers()))
    with pytest.warns(UserWarning, match="set buffer_dtype=torch.float32"):
        net(examples(9, case)[0].bfloat16())
    assert_same_state(state_of(norm), rounded)


def test_fsdp_with_the_option_of_the_warning_keeps_every_bit(case, fsdp):
    net = trained_in_float32(case)
    before = state_of(net.norm).clone()
    net = fsdp(net, mixed_precision=half_everywhere(torch.bfloat16, buffer_dtype=torch.float32))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*IsoBN")
        assert net(examples(9, case)[0].bfloat16()).dtype == torch.bfloat16
    assert_same_state(state_of(beside(net)[0]), before)


def test_fsdp_materialises_a_model_of_the_meta_device(case, fsdp):
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(F, D), nn.ModuleDict({"norm": IsoBN(D, backend=case.backend)}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reset_parameters", category=UserWarning)
        norm = beside(fsdp(net))[0]
    assert_same_state(state_of(norm), state_of(IsoBN(D)))


# ---- Several forwards, one backward ----


def test_gradient_accumulation(case):
    """The gradient is that of the loop written out with the oracle; the statistics have seen three batches."""
    net, exact = classifier(case, dropout=0.0), exact_classifier()
    reference = classifier(case._replace(backend="reference"), dropout=0.0)
    for step in range(2):  # the second from statistics that are not zero
        results = []
        for n in (net, reference, exact):
            n.zero_grad()
            for micro in range(3):
                x, y = examples(3 * step + micro, case, N=16 - micro)
                if n is exact:
                    x, y = x.cpu().double(), y.cpu()
                (cross_entropy(n(x), y) / 3).backward()
            results.append(named(exact.norm.state if n is exact else state_of(n.norm), dx=list(gradients(n).values())))
        assert_right(*results)
    assert net.norm.num_batches_tracked == exact.norm.state.t == 6


def contrastive(outputs):
    """Each row of the first view finds its own in the others, among all rows."""
    first, *others = [nn.functional.normalize(out) for out in outputs]
    rows = torch.arange(len(first), device=first.device)
    return sum(cross_entropy(first @ other.T / 0.1, rows) for other in others)


@BOTH_MODES
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_siamese_training(case, stop_gradient, views, how):
    """Two or three forwards, one backward: each passes the gradient of its own statistics.

    Beside it each view goes through a layer of its own, which starts where the one before ended.
    """
    torch.manual_seed(0)
    norm = IsoBN(D, backend=case.backend, stop_gradient=stop_gradient, device=case.device)
    encoders = [nn.Linear(F, D).to(case.device)]
    encoders.append(copy.deepcopy(encoders[0]))
    xs = [examples(view, case)[0] for view in range(views)]
    norm(encoders[0](examples(9, case)[0]).detach())
    before = state_of(norm).oracle()
    alone = [copy.deepcopy(norm)]
    for x in xs:
        alone.append(copy.deepcopy(alone[-1]))
        alone[-1](encoders[1](x).detach())
        assert not same_bits(alone[-1].scale, alone[-2].scale)
    after = alone.pop()

    def loss_of(encoder, layers):
        return contrastive([layer(encoder(x)) for layer, x in zip(layers, xs, strict=True)])

    run = loss_of
    if how == "compiled":
        torch._dynamo.reset()
        run = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    loss, expected = run(encoders[0], [norm] * views), loss_of(encoders[1], alone)
    loss.backward()
    expected.backward()
    assert_same_model(norm, after)
    # The views' gradients may be added up in any order.
    exact = copy.deepcopy(encoders[0]).cpu().double()
    exact.zero_grad()
    layer = oracle.Layer(D, stop_gradient, before)
    contrastive([layer(exact(x.cpu().double())) for x in xs]).backward()
    assert_right(*({"dx": [p.grad for p in encoder.parameters()]} for encoder in (*encoders, exact)))


# ---- Activation checkpointing ----


@BOTH_MODES
@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: checkpoint.checkpoint_sequential(net, 2, x, use_reentrant=False),
        lambda net, x: checkpoint.checkpoint_sequential(net, 1, x, use_reentrant=True),
        lambda net, x: checkpoint.checkpoint(
            net,
            x,
            use_reentrant=False,
            context_fn=functools.partial(
                checkpoint.create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]
            ),
        ),
    ],
    ids=["sequential", "sequential, reentrant", "selective"],
)
def test_checkpointed_training(case, forward, stop_gradient):
    plain, saving = (classifier(case, stop_gradient=stop_gradient) for _ in range(2))
    for step in range(3):
        x, y = examples(step, case)
        for net, run in ((plain, lambda net, x: net(x)), (saving, forward)):
            net.zero_grad()
            torch.manual_seed(step)  # the dropout
            cross_entropy(run(net, x.clone().requires_grad_()), y).backward()
        for (name, p), q in zip(saving.named_parameters(), plain.parameters(), strict=True):
            assert same_bits(p.grad, q.grad), name
    assert_same_model(saving, plain)


@BOTH_MODES
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_last_of_two_forwards_may_be_checkpointed(case, stop_gradient, use_reentrant):
    """One checkpointed forward between backwards is promised: its recomputation uses the scale that is stored then."""
    results = []
    for last in (lambda net, x: net(x), functools.partial(checkpoint.checkpoint, use_reentrant=use_reentrant)):
        net = classifier(case, dropout=0.0, stop_gradient=stop_gradient)
        xs = [examples(view, case)[0].requires_grad_() for view in range(2)]
        (net(xs[0]).square().sum() + last(net, xs[1]).square().sum()).backward()
        results.append((net, [x.grad for x in xs] + list(gradients(net).values())))
    for got, want in zip(results[1][1], results[0][1], strict=True):
        assert same_bits(got, want)
    assert_same_model(results[1][0], results[0][0])


# ---- Averaged weights, teachers ----


@pytest.mark.parametrize("use_buffers", [True, False], ids=["averaged buffers", "copied buffers"])
@pytest.mark.parametrize(
    "average",
    [
        {},
        {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
        {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    ],
    ids=["swa", "ema", "ema multi", "swa multi"],
)
def test_averaging_treats_the_counter_as_that_of_batch_norm(case, average, use_buffers):
    """Whatever PyTorch makes of an int64 buffer, an error included, a user of BatchNorm has seen it."""
    outcomes = []
    for norm in (IsoBN(D, backend=case.backend), nn.BatchNorm1d(D)):
        net = classifier(case, norm=norm)
        averaged = swa_utils.AveragedModel(net, use_buffers=use_buffers, **average)
        try:
            for step in range(4):
                net(examples(step, case)[0])
                averaged.update_parameters(net)
            outcomes.append(averaged.module.norm.num_batches_tracked.item())
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_averaged_model_with_copied_buffers(case):
    """PyTorch's default: weights are averaged, the statistics are the student's, and they belong together."""
    net = classifier(case)
    averaged = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(4):
        x, y = examples(step, case)
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
        averaged.update_parameters(net)
    teacher = averaged.module.norm
    assert_same_state(state_of(teacher), state_of(net.norm))
    assert not same_bits(averaged.module.head.weight, net.head.weight)
    scale = teacher.scale.clone()
    teacher.refresh_scale()
    wanted = oracle.compute_scale(*state_of(teacher).oracle()[:2])
    assert_right({"scale": teacher.scale}, {"scale": scale}, {"scale": wanted})


def test_averaged_buffers_need_refresh_scale(case):
    """A mean of scales is not the scale of the mean statistics."""
    net = classifier(case)
    averaged = swa_utils.AveragedModel(net, use_buffers=True, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    seen = []
    for step in range(3):
        net(examples(step, case)[0])
        averaged.update_parameters(net)
        seen.append(net.norm.running_cov.clone())
    teacher = averaged.module.norm
    mean, exact = (a / 4 + b / 4 + c / 2 for a, b, c in (seen, [C.double() for C in seen]))
    assert_right({"C": teacher.running_cov}, {"C": mean}, {"C": to_numpy(exact)})
    wanted = scale_rightly(state_of(teacher), case)
    assert (teacher.scale / wanted - 1).abs().max() > 1e-3
    teacher.refresh_scale()
    assert same_bits(teacher.scale, wanted)


def test_statistics_of_averaged_weights(case):
    """`update_bn` knows BatchNorm only. The way for this layer: reset it, and pass the data in training mode."""
    net = classifier(case, bias_correction=True)
    averaged = swa_utils.AveragedModel(net)
    net.encoder.weight.data.mul_(2)
    net(examples(9, case)[0])
    averaged.update_parameters(net)
    averaged.update_parameters(net)
    loader = [examples(step, case)[0] for step in range(3)]

    averaged.module.norm.reset_running_stats()
    averaged.train()
    with torch.no_grad():
        for x in loader:
            averaged(x)

    expected = IsoBN(D, backend=case.backend, device=case.device, bias_correction=True)
    for x in loader:
        expected(averaged.module.encoder(x).detach())
    assert_same_state(state_of(averaged.module.norm), state_of(expected))


def test_teacher_stays_while_the_student_trains(case):
    """A deepcopy in evaluation mode, the target of a consistency loss."""
    student = classifier(case)
    student(examples(9, case)[0])
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    probe = examples(8, case)[0]
    answer, before = teacher(probe), copy.deepcopy(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(3):
        x, y = examples(step, case)
        out = student(x)
        optimizer.zero_grad()
        (cross_entropy(out, y) + (out - teacher(x)).square().mean()).backward()
        optimizer.step()
    assert same_bits(teacher(probe), answer)
    assert_same_model(teacher, before)
    assert student.norm.num_batches_tracked == 4


# ---- torch.func ----


def state_and_parameters(net):
    return (
        {name: p.detach().clone() for name, p in net.named_parameters()},
        {name: b.clone() for name, b in net.named_buffers()},
    )


@BOTH_MODES
def test_functional_call_updates_the_state_it_is_given(case, stop_gradient):
    """The statistics in the dictionary move, as those of BatchNorm would; the module's own stay."""
    net, plain = (classifier(case, dropout=0.0, stop_gradient=stop_gradient) for _ in range(2))
    parameters, buffers = state_and_parameters(net)
    x, y = examples(0, case)

    def loss(parameters, buffers, x):
        return cross_entropy(functional_call(net, (parameters, buffers), (x,)), y)

    for _ in range(2):
        found = torch.func.grad(loss)(parameters, buffers, x)
        plain.zero_grad()
        cross_entropy(plain(x), y).backward()
        for name, gradient in gradients(plain).items():
            assert same_bits(found[name], gradient), name
    for name, buffer in plain.named_buffers():
        assert same_bits(buffers[name], buffer), name
    assert buffers["norm.running_cov"].any()
    assert net.norm.num_batches_tracked == 0


def test_per_sample_gradients_in_evaluation(case):
    net = classifier(case, dropout=0.0)
    net(examples(9, case)[0])
    net.eval()
    parameters, buffers = state_and_parameters(net)
    x, y = examples(0, case, N=5)

    def loss(parameters, x, y):
        return cross_entropy(functional_call(net, (parameters, buffers), (x[None],)), y[None])

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    exact = copy.deepcopy(net).cpu().double()  # in evaluation it multiplies by the scale and does no more
    for row in range(5):
        results = [{"dx": [gradient[row] for gradient in found.values()]}]
        for n, inputs in ((net, x), (exact, x.cpu().double())):
            n.zero_grad()
            cross_entropy(n(inputs[row : row + 1]), y[row : row + 1].to(inputs.device)).backward()
            results.append({"dx": list(gradients(n).values())})
        assert_right(*results)


@BOTH_MODES
@pytest.mark.parametrize(
    "run",
    [
        lambda f, xs: torch.vmap(f)(xs),
        lambda f, xs: torch.vmap(f)(xs[:, 0]),
        lambda f, xs: torch.vmap(f)(xs.clone().requires_grad_()),
        lambda f, xs: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(xs),
        lambda f, xs: torch.func.grad(lambda xs: torch.vmap(f)(xs).sum())(xs),
        lambda f, xs: torch.compile(torch.vmap(f), backend="aot_eager", fullgraph=True)(xs),
    ],
    ids=["batches", "rows", "leaf", "per-sample gradients", "inside grad", "compiled"],
)
@pytest.mark.parametrize("form", ["module", "function"])
def test_vmap_of_a_training_step_is_refused(case, run, form, stop_gradient):
    torch._dynamo.reset()
    layer = IsoBN(D, backend=case.backend, stop_gradient=stop_gradient, device=case.device)
    xs = torch.stack([examples(step, case)[0] @ torch.ones(F, D, device=case.device) for step in range(3)])
    layer(xs[0])
    before = state_of(layer).clone()

    def function(x):
        cov, std = layer.running_cov, layer.running_std
        return isobn(x, cov, std, training=True, stop_gradient=stop_gradient, backend=case.backend)

    with pytest.raises(RuntimeError, match=r"torch\.(vmap|compile) .* is not supported.* evaluation mode"):
        run(layer if form == "module" else function, xs)
    assert_same_state(state_of(layer), before)
    assert torch.vmap(layer.eval())(xs).shape == xs.shape  # what the message advises


@BOTH_MODES
def test_vmap_over_something_else(case, stop_gradient):
    """The layer's input is the same for every slice: it runs once."""
    layer, plain = (IsoBN(F, backend=case.backend, stop_gradient=stop_gradient, device=case.device) for _ in range(2))
    x = examples(0, case)[0]
    factors = torch.arange(3.0, device=case.device)
    out = torch.vmap(lambda factor: layer(x) * factor)(factors)
    assert same_bits(out[1], plain(x))
    assert_same_state(state_of(layer), state_of(plain))


def dual(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, x))


@pytest.mark.parametrize(
    "run",
    [
        dual,
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: torch.func.jvp(torch.func.grad(lambda x: f(x).sum()), (x,), (x,)),
        lambda f, x: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x,))[1].sum())(x),
    ],
    ids=["dual", "jvp", "jacfwd", "forward over reverse", "reverse over forward"],
)
def test_forward_mode_through_the_statistics_changes_nothing(case, run):
    layer = IsoBN(F, backend=case.backend, stop_gradient=False, device=case.device)
    x = examples(0, case)[0]
    layer(x)
    before = state_of(layer).clone()
    with pytest.raises(NotImplementedError, match="stop_gradient=False has no forward-mode derivative"):
        run(layer, x)
    assert_same_state(state_of(layer), before)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).pow(3).sum()),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](x)[0],
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
    "hessian product": lambda f: lambda x: torch.func.jvp(torch.func.grad(lambda x: f(x).pow(3).sum()), (x,), (x,))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_compiled_transforms(case, transform):
    torch._dynamo.reset()
    plain, compiled = (IsoBN(F, backend=case.backend, device=case.device) for _ in range(2))
    for step in range(2):
        x = examples(step, case)[0]
        expected = transform(plain)(x)
        found = torch.compile(transform(compiled), backend="aot_eager", fullgraph=True)(x)
        assert expected.abs().max() > 0
        assert same_bits(found, expected)
    assert_same_state(state_of(compiled), state_of(plain))


def test_compiled_transforms_through_the_statistics(case):
    """One graph is refused; with a break allowed, the part that cannot be compiled runs as it is."""
    torch._dynamo.reset()
    plain, compiled = (IsoBN(F, backend=case.backend, stop_gradient=False, device=case.device) for _ in range(2))
    x = examples(0, case)[0]
    before = state_of(compiled).clone()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="with stop_gradient=False is not supported"):
        torch.compile(TRANSFORMS["grad"](compiled), backend="aot_eager", fullgraph=True)(x)
    assert_same_state(state_of(compiled), before)
    torch._dynamo.reset()
    found = torch.compile(TRANSFORMS["grad"](compiled), backend="aot_eager")(x)
    assert same_bits(found, TRANSFORMS["grad"](plain)(x))
    assert_same_state(state_of(compiled), state_of(plain))


@BOTH_MODES
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_transform_that_the_compiler_gives_up(case, compiler, stop_gradient):
    """It goes on with what is called inside, piece by piece. Of a backend it once made a crash, in most runs."""
    torch._dynamo.reset()
    layers = [IsoBN(F, backend=case.backend, stop_gradient=stop_gradient, device=case.device) for _ in range(2)]
    plain, compiled = layers
    exact = oracle.Layer(F, stop_gradient)

    def loss(x):
        torch._dynamo.graph_break()
        return compiled(x).pow(3).sum()

    for step in range(3):
        x = examples(step, case)[0]
        found = torch.compile(torch.func.grad(loss), backend=compiler)(x)
        truth = x.cpu().double().requires_grad_()
        exact(truth).pow(3).sum().backward()
        assert_right({"dx": found}, {"dx": TRANSFORMS["grad"](plain)(x)}, {"dx": truth.grad})
        assert_same_state(state_of(compiled), state_of(plain))


# ---- torch.compile ----


@BOTH_MODES
def test_compiled_loop(case, stop_gradient):
    """Model and loss in one graph for all batch sizes, the optimizer in another.

    With the compiler's own code generation: `test_op.test_inductor_training_equals_eager`.
    """
    torch._dynamo.reset()
    eager, compiled = (classifier(case, dropout=0.0, stop_gradient=stop_gradient) for _ in range(2))
    # Not Adam: compiled, it rounds in another order, whatever the model.
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (eager, compiled)]
    counter = CompileCounterWithBackend("aot_eager")
    loss_of = torch.compile(lambda x, y: cross_entropy(compiled(x), y), fullgraph=True, backend=counter)
    step_optimizer = torch.compile(optimizers[1].step, backend="aot_eager")
    for step, N in enumerate((16, 9, 2, 32)):
        x, y = examples(step, case, N)
        for tensor in (x, y):
            torch._dynamo.mark_dynamic(tensor, 0)
        for optimizer in optimizers:
            optimizer.zero_grad()
        cross_entropy(eager(x), y).backward()
        loss_of(x, y).backward()
        optimizers[0].step()
        step_optimizer()
    assert counter.frame_count == 1
    assert_same_model(compiled, eager)


def test_module_compile(case):
    """`nn.Module.compile`, in place; a copy of the module goes on by itself."""
    torch._dynamo.reset()
    net, plain = classifier(case, dropout=0.0), classifier(case, dropout=0.0)
    net.compile(fullgraph=True, backend="aot_eager")
    x = examples(0, case)[0]
    assert same_bits(net(x), plain(x))
    assert_same_state(state_of(net.norm), state_of(plain.norm))
    other = copy.deepcopy(net)
    other(x)
    assert (net.norm.num_batches_tracked, other.norm.num_batches_tracked) == (1, 2)


# ---- Saving, resuming, loading ----


@BOTH_MODES
def test_resumed_training_equals_uninterrupted_training(case, stop_gradient, tmp_path):
    """To the last bit, dropout included: all there is to save is in the `state_dict`."""

    def start():
        net = classifier(case, stop_gradient=stop_gradient, bias_correction=True)
        return net, torch.optim.AdamW(net.parameters(), lr=0.05)

    def train(net, optimizer, steps):
        for step in steps:
            x, y = examples(step, case)
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()

    def random_state():
        return {"cpu": torch.get_rng_state(), "gpu": torch.cuda.get_rng_state_all() if case.device == "cuda" else []}

    file = tmp_path / "checkpoint.pt"
    net, optimizer = start()
    train(net, optimizer, range(3))
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "random": random_state()}, file)
    train(net, optimizer, range(3, 6))

    resumed, optimizer = start()
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"]["cpu"])
    if case.device == "cuda":
        torch.cuda.set_rng_state_all(saved["random"]["gpu"])
    train(resumed, optimizer, range(3, 6))
    assert_same_model(resumed, net)


def test_load_state_dict_by_assignment(case):
    """The usual way for a model made on the meta device; training goes on in the tensors it was given."""
    net, x = classifier(case), examples(0, case)[0]
    net(x)
    with torch.device("meta"):
        loaded = classifier(case._replace(device="meta"))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    loaded.load_state_dict(state, assign=True)
    h = net.encoder(x).detach()
    assert same_bits(loaded.norm(h), net.norm(h))
    assert_same_model(loaded, net)
    assert loaded.norm.scale.data_ptr() == state["norm.scale"].data_ptr()


@pytest.mark.parametrize("start", ["meta", "cpu"])
def test_to_empty_then_reset(case, start):
    """Memory that nobody wrote (in this suite: NaN) becomes a new layer."""
    layer = IsoBN(D, backend=case.backend, device=start).to_empty(device=case.device)
    layer.reset_parameters()
    assert_same_state(state_of(layer), state_of(IsoBN(D, device=case.device)))
    h = examples(0, case)[0] @ torch.ones(F, D, device=case.device)
    assert layer(h).isfinite().all()
