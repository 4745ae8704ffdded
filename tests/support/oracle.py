"""IsoBN in float64, written from the definition and not from the package: what every backend is compared with.

The training step and the scale are NumPy. `gradient` is the same formula in float64 torch, left to autograd: the
gradients of `stop_gradient=False` are checked against it, not against the formulas that the package derives by hand.
Written for the eye, not for speed; equation numbers are those of `isobn_kernels.reference`.
"""

from typing import NamedTuple

import numpy as np
import torch


class State(NamedTuple):
    """The statistics, float64; ``t`` counts updates."""

    C: np.ndarray
    sigma: np.ndarray
    scale: np.ndarray
    t: int


def fresh_state(D):
    return State(np.zeros((D, D)), np.zeros(D), np.ones(D), 0)


def train_step(x, state, momentum=0.05, eps=1e-3, beta=0.5, bias_correction=False, largest=np.inf):
    """(out, new state) of one training step on ``x`` (N, D).

    ``largest``: a variance above it counts as infinite, as it does in an arithmetic of less range than float64.
    """
    x = np.asarray(x, dtype=np.float64)
    N = x.shape[0]
    if N < 2:  # one row has no variance, none has nothing at all
        return x * state.scale, state
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = x - x[0]
        y = shifted - shifted.mean(axis=0)  # (1)
        s = np.sqrt((y * y).mean(axis=0))  # (2)
        B = y.T @ y / N  # (3)
    updated = seen(x, largest)
    C, sigma = state.C.copy(), state.sigma.copy()
    both = np.outer(updated, updated)
    C[both] = (1 - momentum) * state.C[both] + momentum * B[both]  # (4)
    sigma[updated] = (1 - momentum) * state.sigma[updated] + momentum * s[updated]
    t = state.t + 1
    scale = compute_scale(C, sigma, t, momentum, eps, beta, bias_correction)
    with np.errstate(invalid="ignore"):
        return x * scale, State(C, sigma, scale, t)  # (10)


def seen(x, largest=np.inf):
    """(D,): the features whose variance is finite. The others are skipped."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.square(x - x[0] - (x - x[0]).mean(0)).mean(0) <= largest


def compute_scale(C, sigma, t=0, momentum=0.05, eps=1e-3, beta=0.5, bias_correction=False):
    """(5)-(9)."""
    w = correction(t, momentum, bias_correction)
    C, sigma = C / w, sigma / w
    R = np.clip(correlation(C, sigma), -1, 1)  # (5)
    gamma = (R * R).mean(axis=1)  # (6)
    power = (gamma * sigma + eps) ** -beta  # (7)
    E = np.trace(C)  # (8)
    if E == 0:
        return np.ones_like(sigma)
    return power * np.sqrt(E / ((np.diag(C) * power**2).sum() + eps))  # (9)


def correlation(C, sigma):
    """(5) before the clamp; 0 for a feature that never varied."""
    product = np.outer(sigma, sigma)
    return np.divide(C, product, out=np.zeros_like(C), where=product > 0)


def correction(t, momentum, bias_correction):
    w = 1 - (1 - momentum) ** t if bias_correction else 1.0
    return w if w != 0 else 1.0


def gradient(x, dout, state, momentum=0.05, eps=1e-3, beta=0.5, bias_correction=False, largest=np.inf, open=None):
    """d(sum(out * dout)) / dx through the statistics, by autograd. ``state`` is the one before the step.

    ``open`` (D, D), symmetric: the correlations that pass a gradient, where |R_ij| < 1 is not to decide it.
    """
    x = torch.tensor(np.asarray(x, dtype=np.float64), requires_grad=True)
    dout = torch.tensor(np.asarray(dout, dtype=np.float64))
    C, sigma = torch.tensor(state.C), torch.tensor(state.sigma)
    if x.shape[0] < 2:
        return (dout * torch.tensor(state.scale)).numpy()
    w = correction(state.t + 1, momentum, bias_correction)

    # A skipped feature takes no part; 0 in its place keeps its NaN, Inf or overflow out of autograd's products.
    with torch.no_grad():
        y = x - x.mean(0)
        seen = y.square().mean(0).isfinite() & (y.square().mean(0) <= largest)
    clean = torch.where(seen, x, 0.0)
    y = clean - clean[0]
    y = y - y.mean(0)
    variance = y.square().mean(0)
    varies = seen & ((clean - clean[0]) != 0).any(0)
    s = torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)
    C = torch.where(torch.outer(seen, seen), (1 - momentum) * C + momentum * (y.T @ y) / x.shape[0], C) / w
    sigma = torch.where(seen, (1 - momentum) * sigma + momentum * s, sigma) / w

    # No gradient at |R| >= 1: there R is a constant, its sign.
    known = torch.outer(sigma > 0, sigma > 0)
    R = torch.where(known, C / torch.where(known, torch.outer(sigma, sigma), 1.0), 0.0)
    open = R.abs() < 1 if open is None else torch.tensor(open)
    R = torch.where(open, R, R.detach().clamp(-1, 1))
    power = (R.square().mean(1) * sigma + eps) ** -beta
    E = C.diagonal().sum()
    E_prime = (C.diagonal() * power.square()).sum()
    scale = torch.ones_like(sigma) if E == 0 else power * (E / (E_prime + eps)).sqrt()

    (x * scale * dout).sum().backward()
    return x.grad.numpy()


class Layer(torch.nn.Module):
    """The operation as a layer in float64, to stand where IsoBN stands in a net; its gradient is that of `gradient`."""

    def __init__(self, D, stop_gradient=True, state=None, **options):
        super().__init__()
        self.state, self.stop_gradient, self.options = state or fresh_state(D), stop_gradient, options

    def forward(self, x):
        if not self.training:
            return x * torch.tensor(self.state.scale)
        before = self.state
        _, self.state = train_step(x.detach().numpy(), before, **self.options)
        return _Step.apply(x, self.state.scale, None if self.stop_gradient else (before, self.options))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, through):
        ctx.saved = x.detach().numpy(), scale, through
        return x * torch.tensor(scale)

    @staticmethod
    def backward(ctx, dout):
        x, scale, through = ctx.saved
        if through is None:
            return dout * torch.tensor(scale), None, None
        before, options = through
        with torch.enable_grad():
            return torch.tensor(gradient(x, dout.detach().numpy(), before, **options)), None, None


def clamp_margin(x, state, momentum=0.05, bias_correction=False, **_):
    """How near any |R_ij| of the step on ``x`` comes to 1, where the gradient jumps.

    Exactly 1 (features of a single batch that are one another's multiples, each of itself, all of two rows) does not
    count: R is at its largest there, and the gradient 0 either way.
    """
    _, after = train_step(x, state, momentum=momentum, bias_correction=bias_correction)
    w = correction(after.t, momentum, bias_correction)
    distance = np.abs(np.abs(correlation(after.C / w, after.sigma / w)) - 1)
    return distance[distance >= 1e-12].min(initial=1)
