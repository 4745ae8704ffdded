"""Who is measured: a step of IsoBN in several hands, and the gate that a provider passes before it is timed.

* published: the formula of the paper in eager PyTorch, with the statistics in plain tensors;
* lean: the same formula written as well as plain PyTorch allows: few operations, in place, no new D x D memory;
* compiled: published under torch.compile; on CUDA also compiled-reduce-overhead and compiled-max-autotune;
* batch_norm: torch.nn.functional.batch_norm, the price of a simpler normalisation: it computes something else;
* each backend of isobn_kernels that can run on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from isobn_kernels import backends, isobn
from isobn_kernels.state import Where

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


Step = Callable[[Tensor, State], Tensor]


@dataclass
class Provider:
    """Functions of a batch and a state, which return the output; ``train`` also updates the state in place."""

    train: Step
    evaluate: Step
    prepare: Callable[[State], None] = lambda state: None  # sees each state before its first step


# ---- The formula in plain PyTorch ----


def published(x: Tensor, cov: Tensor, std: Tensor) -> Tensor:
    """The formula as the paper's authors compute it. Half-precision batches get float32 statistics, as ours do."""
    batch = x.detach().to(cov.dtype)
    y = batch - batch.mean(dim=0)
    batch_std = (y**2).mean(dim=0) ** 0.5
    batch_cov = y.T @ y / len(y)
    cov += MOMENTUM * (batch_cov - cov)
    std += MOMENTUM * (batch_std - std)
    return published_evaluation(x, cov, std)


def published_evaluation(x: Tensor, cov: Tensor, std: Tensor) -> Tensor:
    """The scale is no part of their state: it is computed anew."""
    correlation = torch.clamp(cov / torch.outer(std, std), -1, 1)
    gamma = (correlation**2).mean(dim=1)
    scale = 1 / (gamma * std + EPS) ** BETA
    variance = torch.diag(cov)
    scale = scale * (variance.sum() / ((variance * scale**2).sum() + EPS)) ** 0.5
    return (x * scale).to(x.dtype)


def lean(x: Tensor, state: State, work: Tensor) -> Tensor:
    """The same numbers; ``work`` (D, D) takes the correlations, so that no step allocates as much."""
    cov, std, scale, _ = state
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


def scaled(x: Tensor, state: State) -> Tensor:
    """Evaluation where the scale is part of the state; that of our backends is the same expression."""
    return (x * state.scale).to(x.dtype)


# ---- Providers, made for a batch ----


def published_provider(x: Tensor) -> Provider:
    return Provider(
        lambda x, state: published(x, state.cov, state.std),
        lambda x, state: published_evaluation(x, state.cov, state.std),
    )


def lean_provider(x: Tensor) -> Provider:
    work = torch.empty(x.shape[1], x.shape[1], device=x.device)
    return Provider(partial(lean, work=work), scaled)


def compiled_provider(mode: str, x: Tensor) -> Provider:
    torch._functorch.config.donated_buffer = False  # it rules retain_graph out, which timing the backward alone needs

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")  # its own affair

    def prepare(state: State) -> None:
        for tensor in state:  # a tensor that is written keeps reduce-overhead from making CUDA graphs, unless it is
            torch._dynamo.mark_static_address(tensor)  # known to stay where it is

    train = torch.compile(published, dynamic=False, fullgraph=True, mode=mode)
    evaluate = torch.compile(published_evaluation, dynamic=False, fullgraph=True, mode=mode)
    return Provider(
        lambda x, state: train(x, state.cov, state.std), lambda x, state: evaluate(x, state.cov, state.std), prepare
    )


def batch_norm_provider(x: Tensor) -> Provider:
    def step(x: Tensor, state: State, training: bool) -> Tensor:
        return F.batch_norm(x, state.scale, state.std, training=training, momentum=MOMENTUM)

    return Provider(partial(step, training=True), partial(step, training=False))


def one_step(x: Tensor, state: State, name: str, stop_gradient: bool = True, training: bool = True) -> Tensor:
    """A step of one of our backends."""
    return isobn(
        x,
        state.cov,
        state.std,
        training=training,
        momentum=MOMENTUM,
        eps=EPS,
        beta=BETA,
        backend=name,
        scale=state.scale,
        num_batches_tracked=state.batches,
        stop_gradient=stop_gradient,
    )


def backend_provider(name: str, x: Tensor) -> Provider:
    backends.select(Where(name), x)  # raises with the reason if it cannot run
    return Provider(partial(one_step, name=name), partial(one_step, name=name, training=False))


BACKENDS: dict[str, Callable[[Tensor], Provider]] = {
    name: partial(backend_provider, name)
    for name in backends.NAMES  # fastest first
}
COMPILED: dict[str, Callable[[Tensor], Provider]] = {
    "compiled": partial(compiled_provider, "default"),
    "compiled-reduce-overhead": partial(compiled_provider, "reduce-overhead"),
    "compiled-max-autotune": partial(compiled_provider, "max-autotune"),
}
PROVIDERS: dict[str, Callable[[Tensor], Provider]] = {
    "published": published_provider,
    "lean": lean_provider,
    **COMPILED,
    "batch_norm": batch_norm_provider,
    **dict(reversed(BACKENDS.items())),
}
UNGATED = ("batch_norm",)  # computes something else


def usable(device: str) -> tuple[list[str], dict[str, str]]:
    """Names of the providers for ``device``, in the order of PROVIDERS, and for each of the others why not."""
    reasons = {}
    if device == "cpu":
        reasons = {name: "it is made for GPUs" for name in COMPILED if name != "compiled"}
    for name, make in BACKENDS.items():
        try:
            make(torch.zeros(2, 2, device=device))
        except RuntimeError as error:
            reasons[name] = str(error)
    return [name for name in PROVIDERS if name not in reasons], reasons


def base_of(names: list[str]) -> str:
    """The provider that the others are compared with: our fastest that can run."""
    return next(name for name in BACKENDS if name in names)


# ---- Correctness ----


def exact(x: Tensor, dout: Tensor, state: State) -> dict[str, Tensor]:
    """One step in float64: what a provider's output, gradient, covariance and deviation are compared with."""
    x, dout = x.detach().double(), dout.double()
    y = x - x.mean(dim=0)
    cov = torch.lerp(state.cov.double(), y.T @ y / x.shape[0], MOMENTUM)
    std = torch.lerp(state.std.double(), y.std(dim=0, correction=0), MOMENTUM)
    gamma = (cov / std / std[:, None]).clamp(-1, 1).square().mean(dim=0)
    t = (gamma * std + EPS).pow(-BETA)
    scale = t * (cov.trace() / (cov.diagonal() @ t.square() + EPS)).sqrt()
    return {"out": x * scale, "grad": dout * scale, "cov": cov, "std": std}


def gate(
    step: Step, x: Tensor, dout: Tensor, start: State, expected: dict[str, Tensor], evaluate: Step | None = None
) -> str | None:
    """What is wrong with one step from ``start``, or with evaluation after it, or None. ``start`` stays as it is."""
    state = start.clone()
    out = step(x, state)
    if out.dtype != x.dtype:
        return f"out is {out.dtype}, expected {x.dtype}"
    (grad,) = torch.autograd.grad(out, x, dout)
    deviation = expected["cov"].diagonal().sqrt()
    sizes = {name: expected[name].abs().amax(dim=0) for name in ("out", "grad")}
    sizes |= {"cov": torch.outer(deviation, deviation), "std": expected["std"]}
    found = {"out": out, "grad": grad, "cov": state.cov, "std": state.std}
    if evaluate:  # of the same batch: the same output
        found["evaluation"] = evaluate(x.detach(), state)
    for name, tensor in found.items():
        of = "out" if name == "evaluation" else name
        error = ((tensor.detach().double() - expected[of]).abs() / sizes[of]).max().item()
        tolerance = TOLERANCE + (torch.finfo(x.dtype).eps if of in ("out", "grad") else 0)
        if not error <= tolerance:  # NaN is wrong, too
            return f"{name} is off by {error:.1e}, tolerance {tolerance:.1e}"
    return None


def draw(shape: Shape, dtype: str, device: str) -> tuple[Callable[[], Tensor], State]:
    """A source of batches of one distribution, and a state that has seen one: from an empty one is a special case."""
    N, D = shape
    random = torch.Generator(device).manual_seed(N + D)
    spread = torch.rand(D, device=device, generator=random) + 0.1
    mean = torch.randn(D, device=device, generator=random)

    def batch() -> Tensor:
        found: Any = torch.randn(N, D, device=device, generator=random) * spread + mean
        return found.to(getattr(torch, dtype))

    zeros = partial(torch.zeros, device=device)
    state = State(zeros(D, D), zeros(D), zeros(D) + 1, zeros((), dtype=torch.int64))
    published(batch(), state.cov, state.std)
    return batch, state
