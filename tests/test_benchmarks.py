"""The benchmark's gate, statistics and report. Nothing here depends on how long anything takes."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from helpers import to_numpy

from isobn_kernels import available_backends

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CPU_BACKENDS = [name for name in available_backends() if name in ("cpu", "reference")]
bench_op = importlib.import_module("benchmarks.bench_op")


def example(N=16, D=12, dtype=torch.float32):
    """A batch, an upstream gradient, and a state that has seen one other batch."""
    random = torch.Generator().manual_seed(0)
    other, x, dout = torch.randn(3, N, D, generator=random).to(dtype) + 1
    scale, batches = torch.ones(D), torch.zeros((), dtype=torch.int64)
    state = bench_op.State(torch.zeros(D, D), torch.zeros(D), scale, batches)
    bench_op.published(other, state.cov, state.std)
    return x.requires_grad_(), dout, state


def verdict(step, dtype=torch.float32):
    x, dout, state = example(dtype=dtype)
    before = state.clone()
    found = bench_op.gate(step, x, dout, state, bench_op.exact(x, dout, state))
    assert all(map(torch.equal, state, before)), "the gate changed the state it was given"
    return found


@pytest.mark.parametrize("formula", ["published", "exact"])
def test_the_baseline_and_the_yardstick_equal_the_oracle(formula):
    x, dout, state = example()
    out, after = oracle.train_step(to_numpy(x), oracle.State(*map(to_numpy, state[:3]), 0))
    out, C, sigma, grad = map(torch.tensor, (out, after.C, after.sigma, to_numpy(dout) * after.scale))
    if formula == "exact":
        found = bench_op.exact(x, dout, state)
    else:
        x, cov, std = x.detach().double().requires_grad_(), state.cov.double(), state.std.double()
        found = {"out": bench_op.published(x, cov, std), "cov": cov, "std": std}
        (found["grad"],) = torch.autograd.grad(found["out"], x, dout.double())
    for name, expected in (("out", out), ("grad", grad), ("cov", C), ("std", sigma)):
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["published", pytest.param("compiled", marks=pytest.mark.full), *CPU_BACKENDS])
def test_gate_lets_right_providers_pass(name, dtype):
    assert verdict(bench_op.PROVIDERS[name](torch.zeros(2, 12, dtype=dtype)), dtype) is None


def wrong_step(what):
    def step(x, state):
        out = bench_op.published(x, state.cov, state.std)
        if what == "std":
            state.std[3] *= 1.001
        if what == "cov":
            state.cov[0, 5] += 1e-4
        if what == "out":
            return out + 1e-3
        if what == "grad":
            return out.detach() + x - x.detach()
        if what == "NaN":
            return out * torch.where(torch.arange(len(x)) == 2, torch.nan, 1.0)[:, None]
        return out.double() if what == "dtype" else out

    return step


@pytest.mark.parametrize("what", ["out", "grad", "cov", "std", "dtype", "NaN"])
def test_gate_catches(what):
    assert verdict(wrong_step(None)) is None
    found = verdict(wrong_step(what))
    assert found is not None
    assert found.startswith("out" if what in ("dtype", "NaN") else what)


def test_wrong_and_failing_providers_are_reported_and_not_timed(monkeypatch, threads):
    def failing(x):
        raise RuntimeError("no such device\nand more")

    threads(1)
    monkeypatch.setitem(bench_op.PROVIDERS, "wrong", lambda x: wrong_step("cov"))
    monkeypatch.setitem(bench_op.PROVIDERS, "failing", failing)
    args = bench_op.parse_arguments(["--shapes", "4x8", "--rounds", "3"])
    names = ["published", "wrong", "failing", "reference"]
    rows = bench_op.measure((4, 8), 1, names, "reference", args)
    by_name = {row.provider: row for row in rows}
    assert by_name["wrong"].status.startswith("WRONG: cov is off by")
    assert by_name["failing"].status == "failed: RuntimeError: no such device"
    assert by_name["wrong"].microseconds is by_name["failing"].microseconds is None
    assert [row.mode for row in rows if row.provider == "published"] == ["forward", "forward+backward"]
    assert by_name["published"].rounds == 3
    assert by_name["reference"].ratio == (1, 1, 1)
    header, *lines = bench_op.time_table(rows, names, "reference").splitlines()
    assert header.split() == ["shape", "threads", "mode", "clock", *names]
    assert len(lines) == 2
    assert all("WRONG" in line and "failed" in line for line in lines)


def test_ratio_is_the_median_of_the_pairs():
    samples, base = [2.0, 30.0, 12.0], [1.0, 10.0, 2.0]  # ratios 2, 3, 6; the ratio of the medians is 6
    assert bench_op.paired_ratio(samples, base) == (2.5, 3.0, 4.5)
    with pytest.raises(ValueError):
        bench_op.paired_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 9.0]])
def test_quartiles(values):
    assert bench_op.quartiles(values) == pytest.approx(tuple(np.quantile(values, [0.25, 0.5, 0.75])))


def test_device_clocks_return_seconds_per_call(monkeypatch):
    now = 0.0  # milliseconds, the unit of events

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now

        def elapsed_time(self, end):
            return end.at - self.at

    def call():
        nonlocal now
        now += 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert bench_op.event_clock(call, 4) == pytest.approx(3e-3)
    assert bench_op.replay_clock(call, 4) == pytest.approx(3e-3)
    assert now == 24.0


def test_busy_machine_is_flagged():
    quiet = bench_op.Row((4, 8), 1, "forward", "wall", "cpu", microseconds=(1, 1, 1))
    noisy = bench_op.Row((4, 8), 2, "forward", "wall", "cpu", microseconds=(1, 1, 9), noisy=True)
    assert bench_op.busy_reasons(0.1, 2.1, 2, [quiet], "cpu") == []
    assert "before" in bench_op.busy_reasons(1.0, 2.1, 2, [quiet], "cpu")[0]
    assert "after" in bench_op.busy_reasons(0.1, 3.0, 2, [quiet], "cpu")[0]
    assert "1 of 2 rows" in bench_op.busy_reasons(0.1, 2.1, 2, [quiet, noisy], "cpu")[0]


def test_floor():
    size, flop = bench_op.floor((32, 4096), torch.float32)
    assert size == pytest.approx(1.5 * 4 * 4096**2 + 2 * 4 * 32 * 4096, rel=1e-3)
    assert flop == pytest.approx(32 * 4096**2, rel=1e-3)


def run(*command, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_end_to_end(tmp_path):
    options = ["--device", "cpu", "--shapes", "4x8", "--compile-shapes", "--threads", "1", "2", "--rounds", "3"]
    done = run(sys.executable, "benchmarks/bench_op.py", *options, "--output", str(tmp_path / "deep" / "result.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2] 4x8, threads: 2" in done.stderr
    assert "load average" in done.stdout
    result = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert result["versions"]["torch"] == torch.__version__
    assert result["commit"]
    assert result["base"] == CPU_BACKENDS[0]
    names = {"published", *CPU_BACKENDS}
    expected = {(t, mode, name) for t in (1, 2) for mode in ("forward", "forward+backward") for name in names}
    assert {(row["threads"], row["mode"], row["provider"]) for row in result["rows"]} == expected
    for row in result["rows"]:
        q1, median, q3 = row["microseconds"]
        assert 0 < q1 <= median <= q3
        assert row["rounds"] == 3
        assert row["status"] == "ok"


def test_bad_arguments():
    for bad in (["--shapes", "4y8"], ["--shapes", "1x8"], ["--threads", "0"], ["--device", "tpu"]):
        with pytest.raises(SystemExit, match="2"):
            bench_op.parse_arguments(bad)


def test_a_narrowed_run_does_not_replace_the_stored_result():
    assert bench_op.parse_arguments(["--shapes", "4x8"]).output is None
    assert bench_op.parse_arguments([]).output == ROOT / "benchmarks" / "results" / "bench_op_cpu_float32.json"


def test_gpu_check_explains_itself():
    done = run("bash", "benchmarks/gpu_check.sh")
    assert done.returncode == 2
    assert done.stdout.startswith("usage: benchmarks/gpu_check.sh OUTDIR")
    assert run("bash", "benchmarks/gpu_check.sh", "--help").returncode == 0
