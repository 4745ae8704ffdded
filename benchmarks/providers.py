"""Who is measured: a step of IsoBN in several hands, and the gate that a provider passes before it is timed.

* published: the formula of the paper in eager PyTorch, with the statistics in plain tensors;
* lean: the same formula written as well as plain PyTorch allows: few operations, in place, no new D x D memory;
* compiled: published under torch.compile;
* batch_norm: torch.nn.functional.batch_norm, the price of a simpler normalisation: it computes something else;
* each backend of isobn_kernels that can run on the device.

Of isobn_kernels only public names are used here, as `compare` runs this code with the package of an older commit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from isobn_kernels import available_backends, isobn

MOMENTUM, EPS, BETA = 0.05, 1e-3, 0.5
TOLERANCE = 1e-5  # of the gate, relative, plus one rounding to the dtype of x for output and gradient

Shape = tuple[int, int]


class State(NamedTuple):
    cov: Tensor
    std: Tensor
    scale: Tensor
    batches: Tensor

    def clone(self) -> State:
        return State(*(tensor.clone() for tensor in self))


Provider = Callable[[Tensor, State, bool], Tensor]  # of a batch and a state, which it updates where the flag is set


# ---- The formula in plain PyTorch ----


def published(x: Tensor, cov: Tensor, std: Tensor, training: bool) -> Tensor:
    """The formula as the paper's authors compute it. Half-precision batches get float32 statistics, as ours do.

    The scale is no part of their state: it is computed anew in evaluation.
    """
    if training:
        batch = x.detach().to(cov.dtype)
        y = batch - batch.mean(dim=0)
        batch_std = (y**2).mean(dim=0) ** 0.5
        batch_cov = y.T @ y / len(y)
        cov += MOMENTUM * (batch_cov - cov)
        std += MOMENTUM * (batch_std - std)
    correlation = torch.clamp(cov / torch.outer(std, std), -1, 1)
    gamma = (correlation**2).mean(dim=1)
    scale = 1 / (gamma * std + EPS) ** BETA
    variance = torch.diag(cov)
    scale = scale * (variance.sum() / ((variance * scale**2).sum() + EPS)) ** 0.5
    return (x * scale).to(x.dtype)


def published_step(x: Tensor, state: State, training: bool) -> Tensor:
    return published(x, state.cov, state.std, training)


def lean(x: Tensor, state: State, training: bool, work: Tensor) -> Tensor:
    """The same numbers; ``work`` (D, D) takes the correlations, so that no step allocates as much."""
    cov, std, scale, _ = state
    if not training:
        return (x * scale).to(x.dtype)
    N, D = x.shape
    with torch.no_grad():
        y = x.to(cov.dtype)
        y = y - y.mean(dim=0)
        cov.addmm_(y.T, y, beta=1 - MOMENTUM, alpha=MOMENTUM / N)
        std.lerp_(torch.linalg.vector_norm(y, dim=0).mul_(N**-0.5), MOMENTUM)
        torch.div(cov, std, out=work).div_(std[:, None]).clamp_(-1, 1)
        gamma = torch.linalg.vector_norm(work, dim=1).square_().mul_(1 / D)
        torch.pow(gamma.mul_(std).add_(EPS), -BETA, out=scale)
        variance = cov.diagonal()
        scale.mul_((variance.sum() / (torch.dot(variance, scale.square()) + EPS)).sqrt_())
        factor = scale.to(x.dtype, copy=True)  # the backward needs it, and the next step overwrites the buffer
    return x * factor


# ---- Providers, made for a batch ----


def lean_step(x: Tensor) -> Provider:
    return partial(lean, work=torch.empty(x.shape[1], x.shape[1], device=x.device))


def compiled_step(x: Tensor) -> Provider:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")  # its own affair
    torch._inductor.config.compile_threads = 1  # in this process, where its time is known to be ours
    torch.compiler.reset()  # compiled code has the shape and the number of threads built in
    compiled = torch.compile(published, dynamic=False, fullgraph=True)
    return lambda x, state, training: compiled(x, state.cov, state.std, training)


def batch_norm_step(x: Tensor, state: State, training: bool) -> Tensor:
    return F.batch_norm(x, state.scale, state.std, training=training, momentum=MOMENTUM)


def our_step(x: Tensor, state: State, training: bool, **options: Any) -> Tensor:
    options |= {"momentum": MOMENTUM, "eps": EPS, "beta": BETA, "training": training}
    return isobn(x, state.cov, state.std, scale=state.scale, num_batches_tracked=state.batches, **options)


OTHERS: dict[str, Callable[[Tensor], Provider]] = {
    "published": lambda x: published_step,
    "lean": lean_step,
    "compiled": compiled_step,
    "batch_norm": lambda x: batch_norm_step,
}
UNGATED = ("batch_norm",)  # computes something else


def provider(name: str, x: Tensor) -> Provider:
    return OTHERS[name](x) if name in OTHERS else partial(our_step, backend=name)


def ours(device: str) -> list[str]:
    """Our backends that can run on ``device``, fastest first. The first is the base of all ratios."""
    found = []
    for name in available_backends():
        try:
            our_step(*draw((2, 2), "float32", device)[::2], True, backend=name)
        except RuntimeError:  # it takes tensors of another device
            continue
        found.append(name)
    return found


# ---- Correctness ----


def draw(shape: Shape, dtype: str, device: str) -> tuple[Tensor, Tensor, State]:
    """A batch, an upstream gradient, and a state that has seen another batch: starting empty is a special case."""
    N, D = shape
    random = torch.Generator(device).manual_seed(N + D)
    spread = torch.rand(D, device=device, generator=random) + 0.1
    mean = torch.randn(D, device=device, generator=random)
    batches = torch.randn(3, N, D, device=device, generator=random) * spread + mean
    x, dout, before = batches.to(getattr(torch, dtype))
    zeros = partial(torch.zeros, device=device)
    state = State(zeros(D, D), zeros(D), zeros(D) + 1, zeros((), dtype=torch.int64))
    published(before, state.cov, state.std, training=True)
    return x.clone().requires_grad_(), dout.clone(), state


def step_of(provider: Provider, x: Tensor, dout: Tensor, start: State) -> dict[str, Tensor]:
    """What a step from ``start`` gives, and evaluation of the same batch after it. ``start`` stays as it is."""
    state = start.clone()
    out = provider(x, state, True)
    (grad,) = torch.autograd.grad(out, x, dout)
    found = {"out": out.detach(), "grad": grad, "cov": state.cov, "std": state.std}
    return found | {"evaluation": provider(x.detach(), state, False)}


def in_float64(provider: Provider, x: Tensor, dout: Tensor, start: State) -> dict[str, Tensor]:
    """The same step in float64."""
    state = State(start.cov.double(), start.std.double(), start.scale.double(), start.batches)
    return step_of(provider, x.detach().double().requires_grad_(), dout.double(), state)


def gate(provider: Provider, x: Tensor, dout: Tensor, start: State, expected: dict[str, Tensor]) -> str | None:
    """What is wrong with a step from ``start``, or None."""
    deviation = expected["cov"].diagonal().sqrt()
    sizes = {name: expected[name].abs().amax(dim=0) for name in ("out", "grad", "evaluation")}
    sizes |= {"cov": torch.outer(deviation, deviation), "std": expected["std"]}
    found = step_of(provider, x, dout, start)
    if found["out"].dtype != x.dtype:
        return f"out is {found['out'].dtype}, expected {x.dtype}"
    for name, tensor in found.items():
        error = ((tensor.double() - expected[name]).abs() / sizes[name]).max().item()
        tolerance = TOLERANCE + (0 if name in ("cov", "std") else torch.finfo(x.dtype).eps)
        if not error <= tolerance:  # NaN is wrong, too
            return f"{name} is off by {error:.1e}, tolerance {tolerance:.1e}"
    return None
