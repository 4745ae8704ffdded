"""Random calls of the operation against the float64 oracle of the tests.

    python -m tools.fuzz_ops --cases 100000 --seed 0

Each case is drawn from its seed and number alone. It draws a batch (dtype, shape, memory layout, magnitude, mean,
constant, repeated, overflowing, NaN and Inf features), a state, the options, the way to call, and runs it on each
backend. How far a result may be from the oracle is the rule of tests/support/tolerance.py. A failure prints one line
with the command that repeats the case. At the end the calls of each kind are counted. The exit status is 1 if any
failed.

``TRITON_INTERPRET=1`` adds the Triton kernels, ``ISOBN_TEST_CUDA=emulated`` the CUDA kernels, on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isobn_kernels import IsoBN, available_backends, backends, isobn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

import oracle
from helpers import State, fresh, round_to_bfloat16_when_interpreting, same_bits, state_dtype, to_numpy
from tolerance import SLACK, errors, named

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
LARGEST = {FP32: float(torch.finfo(FP32).max), FP64: np.inf}
OPS = torch.ops.isobn_kernels


# ---- Drawing ----


@dataclass
class Case:
    x: torch.Tensor
    dout: torch.Tensor
    state: State
    options: dict[str, Any]
    mode: str  # "default", "through statistics", "no gradient", "stored scale", "computed scale"
    entry: str  # "function", "module", "operator"
    kinds: list[str]  # what the case counts as

    def __str__(self) -> str:
        return ", ".join(self.kinds) + f", {tuple(self.x.shape)}, {self.options}"


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT


def every_second_column(t: torch.Tensor) -> torch.Tensor:
    return t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 7.0)[..., ::2].copy_(t)


def every_second_row(t: torch.Tensor) -> torch.Tensor:
    return t.new_full((2 * t.shape[0], *t.shape[1:]), 7.0)[1::2].copy_(t)


def inside_a_larger_one(t: torch.Tensor) -> torch.Tensor:
    return t.new_full((t.shape[0] + 2, *t.shape[1:-1], t.shape[-1] + 5), 7.0)[1:-1, ..., 3:-2].copy_(t)


def at_an_odd_address(t: torch.Tensor) -> torch.Tensor:
    return t.new_full((t.numel() + 1,), 7.0)[1:].view(t.shape).copy_(t)


def row_expanded(t: torch.Tensor) -> torch.Tensor:
    return t[:1].expand(t.shape)


def column_expanded(t: torch.Tensor) -> torch.Tensor:
    return t[..., :1].expand(t.shape)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.clone,
    "transposed": transposed,
    "every second column": every_second_column,
    "every second row": every_second_row,
    "inside a larger one": inside_a_larger_one,
    "at an odd address": at_an_odd_address,
    "one row expanded": row_expanded,
    "one column expanded": column_expanded,
}


class Drawer:
    def __init__(self, seed: int, number: int) -> None:
        self.rng = np.random.default_rng([seed, number])

    def one_of(self, weights: dict[Any, float]) -> Any:
        values = list(weights)
        shares = np.array(list(weights.values()))
        return values[self.rng.choice(len(values), p=shares / shares.sum())]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def case(self) -> Case:
        rng = self.rng
        self.kinds: list[str] = []
        dtype = self.one_of({FP32: 4, FP64: 2, FP16: 2, BF16: 2})
        mode = self.one_of(
            {"through statistics": 40, "default": 30, "no gradient": 10, "stored scale": 10, "computed scale": 10}
        )
        # There is no operator that only multiplies by a scale.
        entry = self.one_of({"function": 6, "module": 2, "operator": 2 * (mode != "stored scale")})
        N = self.one_of({0: 2, 1: 4, 2: 10, 3: 8, 257: 1, None: 75})
        N = int(2 ** self.between(2, np.log2(258))) if N is None else N
        D = self.one_of({1: 6, 2: 4, 400: 0.1, None: 90})
        # Few large ones: most of the time would go there.
        D = int(1 + 399 ** (self.between(0, 1) ** 1.5)) if D is None else D
        options = {
            "momentum": self.one_of({0.05: 50, 0.0: 6, 1.0: 10, self.between(0.001, 1): 34}),
            "eps": self.one_of({1e-3: 50, 1e-8: 15, 10.0: 5, 10 ** self.between(-8, 1): 30}),
            "beta": self.one_of({0.5: 60, 0.0: 6, 1.0: 8, self.between(0, 1.5): 26}),
            "bias_correction": self.chance(0.35),
        }
        self.distribution(D, dtype)
        x = torch.tensor(self.plant(self.rows(N), dtype)).to(dtype)
        dout = torch.tensor(rng.standard_normal((N, D)) * 10 ** self.between(-3, 3)).to(dtype)
        state = self.state(D, dtype, options)
        if self.overflowing.any():
            dout[:, torch.tensor(self.overflowing)] = 0  # with x beyond 1e19, dout * x would overflow as well
        divisors = [d for d in range(2, N) if N % d == 0] if self.chance(0.15) else []
        if divisors:
            self.kinds.append("three dimensions")
            shape = (divisors[int(rng.integers(len(divisors)))], -1, D)
            x, dout = x.view(shape), dout.view(shape)
        x, dout = self.laid_out(x, "x"), self.laid_out(dout, "dout")
        self.kinds = [str(dtype).removeprefix("torch."), mode, entry, *self.kinds]
        self.kinds.append(f"{N if N < 4 else '4 to 257'} rows")
        self.kinds.append("1 feature" if D == 1 else "2 to 32 features" if D <= 32 else "33 to 400 features")
        for name, default in (("momentum", 0.05), ("eps", 1e-3), ("beta", 0.5), ("bias_correction", False)):
            value = options[name]
            if value != default:
                self.kinds.append(f"{name} {value}" if value in (0.0, 1.0, True) else f"{name} drawn")
        return Case(x, dout, state, options, mode, entry, self.kinds)

    def distribution(self, D: int, dtype: torch.dtype) -> None:
        """Means, deviations and correlations of the features."""
        low, high = (-3, 2) if dtype is FP16 else (-6, 6)
        width = self.one_of({0.0: 2, 1.0: 4, 6.0: 2})
        exponent = self.between(low, high) + self.rng.uniform(-width, width, D)
        self.deviation = 10 ** np.clip(exponent, low, high)
        furthest = 10 if dtype in (FP16, BF16) else 1e4
        offset = self.one_of({0.0: 3, 1.0: 4, 10 ** self.between(0, np.log10(furthest)): 2})
        self.mean = offset * self.deviation * self.rng.choice([-1, 1], D)
        self.mixing = self.rng.standard_normal((self.one_of({0: 2, 1: 1, 3: 3}), D)) * self.between(0, 3)

    def rows(self, N: int) -> np.ndarray:
        D = len(self.mean)
        z = self.rng.standard_normal((N, len(self.mixing))) @ self.mixing + self.rng.standard_normal((N, D))
        return self.mean + self.deviation * z

    def plant(self, x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        """Features that something is odd about."""
        N, D = x.shape
        self.overflowing = np.zeros(D, bool)
        if self.chance(0.15):
            self.kinds.append("constant feature")
            x[:, self.some(D)] = self.one_of({0.0: 1, 0.7: 1, -977.3: 1})
        if self.chance(0.15) and D > 1:
            self.kinds.append("repeated feature")
            source = int(self.rng.integers(D))
            copies = self.some(D)
            x[:, copies] = x[:, [source]] * self.one_of({1.0: 3, -1.0: 2, 0.25: 1, self.between(-3, 3): 2})
            self.deviation[copies] = self.deviation[source]
        if self.chance(0.04) and dtype in (FP32, BF16) and N > 1:
            self.kinds.append("overflowing variance")
            feature = int(self.rng.integers(D))
            self.overflowing[feature] = True
            x[:, feature] = self.rng.standard_normal(N) * 1e25
            x[: N // 2, feature] = 1e25  # the variance overflows whatever was drawn
            x[N // 2, feature] = -1e25
        if self.chance(0.1) and N > 0:
            value = self.one_of({np.nan: 2, np.inf: 1, -np.inf: 1})
            self.kinds.append("NaN" if np.isnan(value) else "Inf")
            if self.chance(0.2):
                x[:, self.some(D)] = value
            else:
                for _ in range(self.rng.integers(1, 4)):
                    x[self.rng.integers(N), self.rng.integers(D)] = value
        return x

    def some(self, D: int) -> np.ndarray:
        return self.rng.choice(D, size=int(self.rng.integers(1, max(2, D // 4))), replace=False)

    def state(self, D: int, dtype: torch.dtype, options: dict[str, Any]) -> State:
        kind = self.one_of({"fresh": 4, "warm": 5, "of another distribution": 1})
        self.kinds.append(f"state {kind}")
        if kind == "fresh":
            return fresh(D, dtype)
        if kind == "of another distribution":
            self.distribution(D, dtype)
        start = oracle.fresh_state(D)
        for _ in range(self.rng.integers(1, 6)):
            rows = to_numpy(torch.tensor(self.rows(int(self.rng.integers(2, 40)))).to(dtype))
            _, start = oracle.train_step(rows, start, **{**options, "momentum": self.between(0.02, 0.5)})
        cov, std, scale = (torch.tensor(a).to(state_dtype(dtype)) for a in start[:3])
        if self.chance(0.1):
            self.kinds.append("state with another lower triangle")
            cov += torch.tensor(self.rng.standard_normal((D, D))).to(cov).tril(-1) * cov.diagonal().max()
        return State(cov, std, scale, torch.tensor(start.t))

    def laid_out(self, t: torch.Tensor, name: str) -> torch.Tensor:
        expanded = 0.2 if name == "x" else 1.0  # an expanded x has no variance, or no features of its own
        layouts = {layout: expanded if "expanded" in layout else 1.0 for layout in LAYOUTS} | {"contiguous": 8.0}
        if self.overflowing.any():
            del layouts["one column expanded"]  # see the gradient of 0 above
        layout = self.one_of(layouts)
        self.kinds.append(f"{name} {layout}")
        return LAYOUTS[layout](t) if t.numel() else t


# ---- Running ----


@dataclass
class Result:
    out: torch.Tensor  # (N, D), as dx
    dx: torch.Tensor | None
    state: State


def run(case: Case, backend: str) -> Result:
    state, D = case.state.clone(), case.x.shape[-1]
    x = case.x.detach().requires_grad_(case.mode != "no gradient")
    training, through = case.mode not in ("stored scale", "computed scale"), case.mode == "through statistics"
    if case.entry == "module":
        options = {**case.options, "stop_gradient": not through}
        layer = IsoBN(D, backend=backend, **options).train(training)
        if state.running_cov.dtype is FP64:
            layer.double()
        layer.load_state_dict(state.tensors)
        if case.mode == "computed scale":
            layer.refresh_scale()
        out, state = layer(x), State(*layer.buffers())
    elif case.entry == "operator":
        rest = (*case.options.values(), backend)
        rows, tensors = x.reshape(-1, D), state.tensors.values()
        if case.mode == "computed scale":
            scale = OPS.compute_scale(state.running_cov, state.running_std, state.num_batches_tracked, *rest)
            out = (x * scale).to(x.dtype)
        else:
            step = OPS.train_forward_through_statistics if through else OPS.train_forward
            out = step(rows, *tensors, *rest)[0].view(x.shape)
    else:
        arguments = dict(state.tensors)
        if case.mode == "computed scale":
            del arguments["scale"]
        options = {**case.options, "stop_gradient": not through}
        out = isobn(x, **arguments, training=training, backend=backend, **options)
    dx = torch.autograd.grad(out, x, case.dout.view(x.shape))[0] if x.requires_grad else None
    return Result(out.detach().reshape(-1, D), None if dx is None else dx.reshape(-1, D), state)


# ---- What is right ----


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit, except that one NaN is as good as another."""
    return same_bits(a.masked_fill(a.isnan(), 1), b.masked_fill(b.isnan(), 1)) and same_bits(a.isnan(), b.isnan())


class Judge:
    """What the results of a case are held to: the oracle, and the errors of the reference."""

    def __init__(self, case: Case) -> None:
        self.case, D = case, case.x.shape[-1]
        self.x, self.dout = (to_numpy(t.reshape(-1, D)) for t in (case.x, case.dout))
        # Of a covariance the upper triangle counts.
        self.covariance = case.state.running_cov.triu() + case.state.running_cov.triu(1).T
        self.dtype, self.before = case.x.dtype, case.state.oracle()._replace(C=to_numpy(self.covariance))
        self.unit = torch.finfo(case.state.running_cov.dtype).eps / 2
        self.numbers = {**case.options, "largest": LARGEST[case.state.running_cov.dtype]}
        self.training = case.mode not in ("stored scale", "computed scale")
        self.updates = self.training and len(self.x) > 1
        self.seen = np.ones(D, bool)
        if self.updates:
            self.out, self.after = oracle.train_step(self.x, self.before, **self.numbers)
            self.seen = oracle.seen(self.x, self.numbers["largest"])
        else:
            scale = self.before.scale
            if case.mode == "computed scale":
                scale = oracle.compute_scale(*self.before[:2], self.before.t, **case.options)
            with np.errstate(invalid="ignore"):
                self.out, self.after = self.x * scale, self.before._replace(scale=scale)
        self.rows = case.x.reshape(-1, D)
        self.reference: dict[str, float] = {}
        self.notes: Counter[str] = Counter()

    def faults(self, result: Result, is_reference: bool) -> list[str]:
        """What is wrong with it, in words. The reference comes first."""
        found = self.exact_faults(result)
        truth = {"out": self.out}
        values = {"out": to_numpy(result.out)}
        if self.updates:
            truth, values = named(self.after, **truth), named(result.state, **values)
        for name, bound in self.bounds().items():
            if name not in truth:
                continue
            if name == "out":
                values[name], truth[name] = self.representable(values[name], truth[name])
            (error,) = errors({name: values[name]}, {name: truth[name]}).values()
            if is_reference:
                self.reference[name], limit = error, bound
            else:
                limit = 2 * self.reference[name] + SLACK[state_dtype(self.dtype)]
            if not error <= limit:
                found.append(f"{name} is off by {error:.2e}, limit {limit:.2e}")
        if result.dx is not None and self.case.mode == "through statistics" and self.updates:
            found += self.faults_of_gradient(result, is_reference)
        return found

    def bounds(self) -> dict[str, float]:
        """Of the reference. A chain of N additions is off by at most N units; the rest is as in tolerance.BOUNDS."""
        N, unit = len(self.x), self.unit
        rounding = 0.0 if self.dtype in (FP32, FP64) else torch.finfo(self.dtype).eps / 2
        return {
            "C": (N + 16) * unit,
            "sigma": (N / 2 + 16) * unit,
            "scale": 64 * unit,
            "out": 64 * unit + rounding,
        }

    def representable(self, found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both without what the dtype of x cannot hold: an overflow when rounded, a rounding to a subnormal."""
        info = torch.finfo(self.dtype)
        with np.errstate(invalid="ignore"):
            beyond = (np.abs(truth) >= info.max * (1 - 1e-5)) & (np.abs(found) >= info.max) & (found * truth > 0)
            difference = found - truth
            nearer = np.clip(np.abs(difference) - info.smallest_normal * info.eps / 2, 0, None)
            found = np.where(np.isfinite(difference), truth + np.copysign(nearer, difference), found)
        return np.where(beyond, 0.0, found), np.where(beyond, 0.0, truth)

    def exact_faults(self, result: Result) -> list[str]:
        """What is promised to the bit."""
        case, state, before, found = self.case, result.state, self.case.state, []
        if result.out.dtype is not self.dtype or (result.dx is not None and result.dx.dtype is not self.dtype):
            found.append("a dtype is not that of x")
        if not self.updates:
            for name, tensor in state.tensors.items():
                if name == "scale" and case.mode == "computed scale":
                    continue
                if not same_bits(tensor, before.tensors[name]):
                    found.append(f"{name} changed")
        else:
            if state.num_batches_tracked != before.num_batches_tracked + 1:
                found.append("num_batches_tracked is not one more")
            if not all(tensor.isfinite().all() for tensor in state.tensors.values()):
                found.append("the state is not finite")
            if not same_bits(state.running_cov, state.running_cov.T):
                found.append("running_cov is not symmetric")
            for j in np.flatnonzero(~self.seen):
                if not same_bits(state.running_cov[j], self.covariance[j]):
                    found.append(f"feature {j} is skipped, and its covariance changed")
                if not same_bits(state.running_std[j], before.running_std[j]):
                    found.append(f"feature {j} is skipped, and its deviation changed")
        if case.mode != "computed scale":
            if not same_values(result.out, (self.rows * state.scale).to(self.dtype)):
                found.append("out is not x * scale")
            if result.dx is not None and not (case.mode == "through statistics" and self.updates):
                dout = case.dout.reshape(self.rows.shape)
                if not same_values(result.dx, (dout * state.scale).to(self.dtype)):
                    found.append("dx is not dout * scale")
        return found

    def faults_of_gradient(self, result: Result, is_reference: bool) -> list[str]:
        assert result.dx is not None
        dx, skipped = to_numpy(result.dx), ~self.seen
        state, (C, sigma) = result.state, map(to_numpy, (result.state.running_cov, result.state.running_std))
        if skipped.any():
            dout = self.case.dout.reshape(self.rows.shape)
            if not same_values(result.dx[:, skipped], (dout * state.scale).to(self.dtype)[:, skipped]):
                return ["dx of a skipped feature is not dout * scale"]
        # A gradient passes where |R_ij| < 1, with R of the updated statistics. It is computed from them with some four
        # roundings: within as many units of 1 the backend decides, once for both (i, j) and (j, i).
        w = oracle.correction(self.after.t, self.case.options["momentum"], self.case.options["bias_correction"])
        below = 1 - np.abs(oracle.correlation(C / w, sigma / w))
        open, unclear = below > 8 * self.unit, np.abs(below) <= 8 * self.unit
        truths = [self.gradient(choice) for choice in ([open, open | unclear] if unclear.any() else [open])]
        if not np.isfinite(self.x).all():
            # By the chain rule the NaN reaches all features: whether they are finite is all there is to compare.
            pairs = [self.representable(dx, truth) for truth in truths]
            same = [(np.isfinite(value) == np.isfinite(truth)).all() for value, truth in pairs]
            return [] if any(same) else ["dx is not finite in other places"]
        size = self.size_of_terms(open | unclear)
        found = [self.distance(dx, truth, size) for truth in truths]
        if min(excess for _, excess in found) > 1 and unclear.any():
            self.notes["correlations of 1, to rounding, that were tried one by one"] += 1
            found += [self.distance(dx, truth, size) for truth in self.one_by_one(open, unclear, truths[0])]
        error, excess = min(found)
        if is_reference:
            self.reference["dx"] = error
        elif error <= 2 * self.reference["dx"] + SLACK[state_dtype(self.dtype)]:
            return []
        else:
            self.notes["more than twice the reference's error, and explained by the size of the terms"] += excess <= 1
        return [] if excess <= 1 else [f"dx is off by {error:.2e}, {excess:.1f} times what rounding explains"]

    def gradient(self, open: np.ndarray) -> np.ndarray:
        return oracle.gradient(self.x, self.dout, self.before, open=open, **self.numbers)

    def distance(self, dx: np.ndarray, truth: np.ndarray, size: np.ndarray) -> tuple[float, float]:
        """The error by tolerance.py, and as a multiple of what rounding explains, with terms of this size."""
        units = sum(self.x.shape) + 32  # sums over N rows and over D features, and some 32 roundings beside
        value, true = self.representable(dx, truth)
        error, largest = np.abs(value - true).max(0), np.abs(true).max(0)
        rounding = 0.0 if self.dtype in (FP32, FP64) else torch.finfo(self.dtype).eps / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            excess = np.where(error > 0, error / (units * self.unit * size + rounding * largest), 0.0)
        return errors({"dx": value}, {"dx": true})["dx"], float(np.nan_to_num(excess, nan=np.inf).max())

    def one_by_one(self, open: np.ndarray, unclear: np.ndarray, closed: np.ndarray) -> Iterator[np.ndarray]:
        """The gradients for every choice of the unclear correlations that make a difference; none if these are many."""
        masks = []
        for i, j in np.argwhere(np.triu(unclear)):
            mask = np.zeros_like(open)
            mask[i, j] = mask[j, i] = True
            if errors({"dx": self.gradient(open | mask)}, {"dx": closed})["dx"] > self.unit:
                masks.append(mask)
        if len(masks) <= 8:
            for chosen in itertools.product((False, True), repeat=len(masks)):
                yield self.gradient(open | np.any([open, *itertools.compress(masks, chosen)], axis=0))

    def size_of_terms(self, open: np.ndarray) -> np.ndarray:
        """What the gradient of each feature adds up, each term with its absolute value.

        Terms may cancel: of two rows the gradient through a correlation is 0, and both of its terms are not. Each is
        rounded, so that what is left is off by units of this and not of itself. A correlation is off by units of
        sqrt(C_ii C_jj) / (sigma_i sigma_j), which exceeds 1 where the statistics are young.
        """
        momentum, eps, beta, bias_correction = self.case.options.values()
        N, D = self.x.shape
        w = oracle.correction(self.after.t, momentum, bias_correction)
        C, sigma = self.after.C / w, self.after.sigma / w
        y = np.where(self.seen, self.x, 0.0)
        y = y - y[0]
        y = np.abs(y - y.mean(0))
        s = np.sqrt((y * y).mean(0))
        varies, known = s > 0, np.outer(sigma > 0, sigma > 0)
        variance = np.diag(C)
        R = np.clip(oracle.correlation(C, sigma), -1, 1)
        gamma = (R * R).mean(1)
        u = gamma * sigma + eps
        t, E = u**-beta, variance.sum()
        direct = np.abs(self.dout * self.after.scale).max(0)
        if E == 0:
            return direct
        E_prime = (variance * t * t).sum()
        r = np.sqrt(E / (E_prime + eps))
        g = np.abs(self.dout * self.x).sum(0, where=self.seen)
        g = np.where(self.seen, g, np.abs((self.dout * np.where(self.seen, 0, self.x)).sum(0)))
        dr = (g * t).sum()
        dE, dE_prime = dr * r / (2 * E), dr * r / (2 * (E_prime + eps))
        du = beta * (g * r + 2 * dE_prime * variance * t) * u ** (-beta - 1)
        product = np.where(known, np.outer(sigma, sigma), 1.0)
        inflation = np.where(known, np.sqrt(np.outer(variance, variance)) / product, 0.0)
        dR = np.where(open, (2 / D) * np.add.outer(du * sigma, du * sigma) * np.maximum(inflation, 1) * known, 0.0)
        G = dR / product + np.diag(2 * (dE + dE_prime * t * t))
        h = du * gamma + np.divide(dR.sum(1), sigma, out=np.zeros(D), where=sigma > 0)
        through = y @ G + y * np.divide(h, s, out=np.zeros(D), where=varies)
        return direct + np.where(self.seen, momentum / (w * N) * through.max(0), 0.0)


def judge(case: Case, backends_to_run: list[str], repeat: bool) -> tuple[dict[str, list[str]], Counter[str]]:
    """({backend: what is wrong with its result}, what is to be counted beside)."""
    judge, found = Judge(case), {}
    given = case.x.clone(), case.dout.clone()
    for backend in ["reference", *(name for name in backends_to_run if name != "reference")]:
        if backends.load(backend).unsupported_reason(judge.rows) is not None:
            judge.notes[f"{backend} does not take"] += 1
            continue
        try:
            result = run(case, backend)
            faults = judge.faults(result, backend == "reference")
            if repeat:
                again = run(case, backend)
                tensors = [(r.out, r.out if r.dx is None else r.dx, *r.state.tensors.values()) for r in (result, again)]
                if not all(map(same_bits, *tensors)):
                    faults.append("a second call gives other bits")
        except Exception as error:
            faults = [f"{type(error).__name__}: {error}"]
        if not (same_bits(case.x, given[0]) and same_bits(case.dout, given[1])):
            faults.append("an input was overwritten")
        found[backend] = faults
    return found, judge.notes


# ---- The command ----


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz_ops", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000, help="how many (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: 0)")
    parser.add_argument("--case", type=int, help="only the case of this number, described")
    parser.add_argument("--backend", nargs="+", default=available_backends(), help="default: all that can run here")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        round_to_bfloat16_when_interpreting()
    numbers = range(args.cases) if args.case is None else [args.case]
    calls: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    failures = 0
    start = said = time.monotonic()
    for number in numbers:
        drawer = Drawer(args.seed, number)
        case = drawer.case()
        if args.case is not None:
            print(case)
        found, noted = judge(case, args.backend, repeat=drawer.chance(0.05))
        notes += noted
        for backend, faults in found.items():
            calls.update({"calls": 1, backend: 1, **{f"  {kind}": 1 for kind in set(case.kinds)}})
            if faults:
                failures += 1
                command = f"python -m tools.fuzz_ops --seed {args.seed} --case {number} --backend {backend}"
                print(f"{command}  # {'; '.join(faults)}", flush=True)
        if time.monotonic() - said > 10:
            said = time.monotonic()
            done = number + 1
            left = (said - start) / done * (args.cases - done)
            print(f"{done} of {args.cases} cases, {failures} failures, {left / 60:.0f} min left", flush=True)
    for name, count in sorted([*calls.items(), *notes.items()]):
        print(f"{count:9} {name}")
    print(f"{failures} of {calls['calls']} calls outside of the specification, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
