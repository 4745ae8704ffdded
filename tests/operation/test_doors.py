"""Every door to a kernel checks what it passes on: a kernel trusts the addresses that it is given.

The doors are the functions, methods and registered operators of the package; each gets, one argument at a time, what it
must not take. The whole sweep also runs on a build of the C++ kernels that AddressSanitizer watches.
"""

import os
import subprocess
import sys

import building
import pytest
import torch
from helpers import batch, fresh, same_bits, upstream, warm
from torch.autograd import forward_ad

from isobn_kernels import IsoBN, backends, isobn
from isobn_kernels.state import Options, State

N, D = 6, 7
# As in setup.py, which cannot be imported; AddressSanitizer needs one with intrinsics and one without.
INSTRUCTION_SETS = {
    "csrc/cpu/baseline.cpp": (),
    "csrc/cpu/avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "csrc/cpu/avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}
NUMBERS = (0.05, 1e-3, 0.5)
STATISTICS = ("running_cov", "running_std", "scale", "num_batches_tracked")


class Arguments:
    """What a door is given, by name."""

    def __init__(self, backend, dtype=torch.float32):
        state = warm(D, dtype)
        self.x, self.dout = batch(N, D, dtype=dtype), upstream(N, D, dtype=dtype)
        self.running_cov, self.running_std = state.running_cov, state.running_std
        self.scale, self.num_batches_tracked = state.scale, state.num_batches_tracked
        self.momentum, self.eps, self.beta, self.bias_correction, self.backend = *NUMBERS, True, backend

    @property
    def state(self):
        return tuple(getattr(self, name) for name in STATISTICS)

    @property
    def options(self):
        return self.momentum, self.eps, self.beta, self.bias_correction, self.backend


def functional(training, stored=True):
    def door(given):
        names = STATISTICS if stored else ("running_cov", "running_std", "num_batches_tracked")
        names += ("momentum", "eps", "beta", "bias_correction", "backend")
        arguments = {name: getattr(given, name) for name in names}
        return isobn(given.x, training=training, stop_gradient=False, **arguments)

    return door


def operator(name, *leading):
    def door(given):
        call = getattr(torch.ops.isobn_kernels, name)
        return call(*(getattr(given, argument) for argument in leading), *given.state, *given.options)

    return door


def compute_scale(given):
    cov, std, _, count = given.state
    return torch.ops.isobn_kernels.compute_scale(cov, std, count, *given.options)


def module_of(given):
    """A layer whose buffers are those tensors, as a hand or `load_state_dict(assign=True)` may have put them there."""
    layer = IsoBN(D, backend=given.backend, bias_correction=True)
    for name in STATISTICS:
        layer._buffers[name] = getattr(given, name)
    for name in ("momentum", "eps", "beta"):
        setattr(layer, name, getattr(given, name))
    return layer


def load_published_statistics(given):
    """Into a layer of its own; what is loaded is converted, but has to be of the right shape."""
    IsoBN(D, backend=given.backend).load_published_statistics(given.running_cov, given.running_std)


TENSORS = {"x", *STATISTICS}
# door: (call, the arguments that it takes)
DOORS = {
    "isobn in training": (functional(True), TENSORS),
    "isobn in evaluation": (functional(False), TENSORS),
    "isobn in evaluation without a scale": (functional(False, stored=False), TENSORS - {"scale"}),
    "train_forward": (operator("train_forward", "x"), TENSORS),
    "train_forward_through_statistics": (operator("train_forward_through_statistics", "x"), TENSORS),
    "train_backward": (operator("train_backward", "dout", "x"), {"dout", *TENSORS}),
    "compute_scale": (compute_scale, TENSORS - {"x", "scale"}),
    "layer": (lambda given: module_of(given)(given.x), TENSORS),
    "refresh_scale": (lambda given: module_of(given).refresh_scale(), TENSORS - {"x"}),
    "load_published_statistics": (load_published_statistics, {"running_cov", "running_std"}),
}


def wrong_tensors(name, tensor):
    """{what is wrong: a tensor that is wrong in that}, for an argument."""
    size = tensor.shape[-1] if tensor.dim() else 1
    wrong = {
        "too large": torch.ones([n + 1 for n in tensor.shape] or (2,), dtype=tensor.dtype),
        "too small": torch.ones([n - 1 for n in tensor.shape] or (0,), dtype=tensor.dtype),
        "empty": torch.ones(0, dtype=tensor.dtype),
        "one dimension more": torch.ones((1, *tensor.shape), dtype=tensor.dtype),
        "integer": torch.ones(tensor.shape, dtype=torch.int32),
        "float16": tensor.to(torch.float16),
        "bfloat16": tensor.to(torch.bfloat16),
        "float64": tensor.double(),
        "complex": tensor.to(torch.complex64),
        "on another device": tensor.to("meta"),
        "sparse": tensor.to_sparse(),
        "None": None,
        "a number": 1.0,
    }
    if name in STATISTICS and tensor.dim():
        wrong["expanded"] = torch.ones((), dtype=tensor.dtype).expand(tensor.shape)
        wrong["every second"] = torch.ones(*tensor.shape[:-1], 2 * size, dtype=tensor.dtype)[..., ::2]
        wrong["requires grad"] = tensor.clone().requires_grad_()
    if name == "running_cov":
        wrong["transposed"] = tensor.T
    return wrong


# What looks wrong and is right: {(argument, what): doors}.
FUNCTIONAL = ("isobn in training", "isobn in evaluation")
CONVERTED = ("float16", "bfloat16", "float64", "expanded", "every second", "transposed", "requires grad")
RIGHT = {
    ("x", "one dimension more"): {*FUNCTIONAL, "isobn in evaluation without a scale", "layer"},
    **{("x", dtype): set(DOORS) - {"train_backward"} for dtype in ("float16", "bfloat16")},
    **{(name, dtype): {"layer", "refresh_scale"} for name in STATISTICS[:3] for dtype in ("float16", "bfloat16")},
    ("scale", "None"): {*FUNCTIONAL, "train_forward", "train_forward_through_statistics"},
}


for _name in STATISTICS[:2]:
    for _what in CONVERTED:
        RIGHT[_name, _what] = {"load_published_statistics", *RIGHT.get((_name, _what), ())}


def sweep(backend):
    """Gives every door every wrong argument. Returns the number of refusals, and what was not refused."""
    refused, taken = 0, []
    for door, (call, names) in DOORS.items():
        call(Arguments(backend))  # what is right is taken
        for name in sorted(names):
            for what, tensor in wrong_tensors(name, getattr(Arguments(backend), name)).items():
                if what in ("None", "a number") and door in ("layer", "refresh_scale"):
                    continue  # no loader makes something other than a tensor of a buffer
                given = Arguments(backend)
                setattr(given, name, tensor)
                others = {s: getattr(given, s) for s in STATISTICS if s != name}
                before = {s: other.clone() for s, other in others.items()}
                try:
                    call(given)
                except (TypeError, ValueError, RuntimeError) as error:
                    untouched = all(same_bits(other, before[s]) for s, other in others.items())
                    if not (str(error) and untouched):
                        taken.append((door, name, what, "changed the state"))
                    refused += 1
                else:
                    if door not in RIGHT.get((name, what), ()):
                        taken.append((door, name, what))
    return refused, taken


def test_every_door_refuses_what_a_kernel_must_not_get(case):
    refused, taken = sweep(case.backend)
    assert not taken
    assert refused > 500


def test_statistics_that_carry_a_tangent():
    """Their derivative would be lost without a word; batch norm raises too."""
    for name in ("running_cov", "running_std", "scale"):
        for door in ("isobn in training", "isobn in evaluation", "train_forward", "refresh_scale"):
            given = Arguments("auto")
            with forward_ad.dual_level():
                statistic = getattr(given, name)
                setattr(given, name, forward_ad.make_dual(statistic, torch.ones_like(statistic)))
                with pytest.raises(ValueError, match=f"{name} must not carry a forward-mode tangent"):
                    DOORS[door][0](given)

    given = Arguments("auto")
    cov = given.running_cov

    def step(cov):
        return isobn(given.x, cov, given.running_std, training=True)

    with pytest.raises(ValueError, match="running_cov must not carry a forward-mode tangent"):
        torch.func.jvp(step, (cov,), (torch.ones_like(cov),))
    with pytest.raises(ValueError, match="running_cov must not require grad"):
        torch.func.grad(lambda cov: step(cov).sum())(cov)


def test_forward_mode_of_a_captured_step_is_refused():
    """The operator has a gradient and no forward mode; without these words the tangent of x would be lost."""
    given = Arguments("auto")
    with forward_ad.dual_level():
        given.x = forward_ad.make_dual(given.x, torch.ones_like(given.x))
        for door in ("train_forward", "train_forward_through_statistics"):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                DOORS[door][0](given)


def test_every_door_under_address_sanitizer():
    """Bad arguments and good ones of all layouts, on a build of the C++ kernels whose accesses are watched."""
    reason = building.missing()
    if reason or building.address_sanitizer() is None:
        pytest.skip(reason or "g++ has no AddressSanitizer: libasan is not installed")
    sources = {"csrc/bindings.cpp": (), "csrc/cpu/cpu.cpp": (), **INSTRUCTION_SETS}
    built_from = [path.relative_to(building.ROOT) for path in sorted((building.ROOT / "csrc").rglob("*.*"))]
    flags = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", *building.SANITIZE]
    extension = building.build("_C", sources, flags, built_from)
    done = subprocess.run(
        [sys.executable, __file__, str(extension)],
        env={**os.environ, **building.address_sanitizer(), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.split()[-1] == "refused"


def good_calls():
    """Steps of all dtypes and layouts, on every instruction set that is here."""
    from isobn_kernels import _C

    for isa in _C.instruction_sets():
        _C.set_instruction_set(isa)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for rows, features in ((0, 3), (1, 3), (2, 1), (5, 7), (17, 65), (130, 33)):
                for layout in (lambda t: t, lambda t: t.T.contiguous().T, lambda t: t.repeat_interleave(2, 1)[:, ::2]):
                    for options in ({}, {"stop_gradient": False, "bias_correction": True}):
                        state, x = fresh(features, dtype), layout(batch(rows, features, dtype=dtype)).requires_grad_()
                        out = isobn(x, **state.tensors, training=True, backend="cpu", **options)
                        out.backward(out.detach()[:1].expand_as(out) if rows else out.detach())
                    parts_of_a_step_across_ranks(layout(batch(rows, features, dtype=dtype)), fresh(features, dtype))


def parts_of_a_step_across_ranks(x, state):
    """One part after the other, as a group calls them."""
    backend, bundle = backends.load("cpu"), State(**state.tensors)
    sums = backend.column_sums(x)
    gram = backend.centred_gram(x, sums, state.running_cov.dtype)
    for arguments in (bundle, bundle._replace(scale=None, num_batches_tracked=None)):
        after = backend.next_state(gram.clone(), sums, arguments, Options())
        backend.write_state(arguments, after, sums)


if __name__ == "__main__":
    sys.modules["isobn_kernels._C"] = building.load(sys.argv[1], "isobn_kernels._C")
    good_calls()
    print(*sweep("cpu")[:1], "refused")
