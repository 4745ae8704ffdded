"""The benchmarks' gates, statistics, choices and reports. Nothing here depends on how long anything takes."""

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

from isobn_kernels import available_backends, functional, isobn
from isobn_kernels.backends import cpu, cuda, triton

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CPU_BACKENDS = [name for name in available_backends() if name in ("cpu", "reference")]
bench_op, bench_host, tune = (
    importlib.import_module(f"benchmarks.{name}") for name in ("bench_op", "bench_host", "tune")
)


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


# ---- tune.py ----

FIRST, SECOND, THIRD = (triton.Config(block, 16, 4, "ieee") for block in (32, 64, 128))
CELLS = [((8, 384), "float32"), ((16, 384), "float32")]


def times(**rows):
    """Quartiles of which only the median counts."""
    names = {"first": FIRST, "second": SECOND, "third": THIRD}
    return {
        names[name]: {cell: (0, us, 1e9) for cell, us in zip(CELLS, row, strict=False)} for name, row in rows.items()
    }


def test_every_row_of_the_table_has_shapes_that_it_serves():
    found = [tune.shapes_of(index) for index in range(len(triton.TABLE))]
    assert all(found)
    assert sorted(shape for shapes in found for shape in shapes) == sorted(tune.SHAPES)
    assert found[0] == [(8, 384), (16, 384)]


def test_candidates():
    odd = triton.Config(256, 16, 4, "ieee")
    for config in (FIRST, odd):
        every, quick = (tune.candidates((triton._ANY, 512, config), quick) for quick in (False, True))
        assert every[0] == quick[0] == config
        assert len(set(every)) == len(every) == 54 + (config is odd)
        assert set(quick) < set(every)
    assert len(tune.candidates((triton._ANY, 512, FIRST), quick=True)) == 1 + 2 + 2 + 2 + 1
    whole = tune.candidates((32, 512, triton.Config(32, 32, 4, "ieee")), quick=False)
    assert {config.block_n for config in whole} == {32, 64}


def test_a_candidate_takes_the_place_of_its_row_and_leaves_it():
    before = triton.TABLE
    with tune.instead(1, THIRD):
        assert triton.config_for(16, 768) is THIRD
        assert triton.config_for(16, 384) is before[0][2]
        assert triton.config_for(32, 768) is before[3][2]
    assert triton.TABLE is before
    with pytest.raises(ZeroDivisionError), tune.instead(1, THIRD):
        raise ZeroDivisionError
    assert triton.TABLE is before


def test_the_candidate_of_a_step_is_in_place_for_that_step_only(monkeypatch):
    def one_step(x, state, name):
        assert name == "triton"
        assert triton.config_for(8, 384) is SECOND
        raise RuntimeError("out of shared memory")

    before = triton.TABLE
    monkeypatch.setattr(tune, "one_step", one_step)
    with pytest.raises(RuntimeError, match="shared memory"):
        tune.step_with(0, SECOND)(None, None)
    assert triton.TABLE is before


def test_the_ranking_is_by_the_geometric_mean():
    found = tune.ranking(times(first=(1, 9), second=(4, 4), third=(2, 2)), CELLS)
    assert list(found) == [THIRD, FIRST, SECOND]  # the sums would say third, second, first
    assert list(found.values()) == pytest.approx([2**0.5, 4.5**0.5, 8**0.5])


def test_who_did_not_run_everywhere_is_not_ranked():
    assert list(tune.ranking(times(first=(1,), second=(4, 4)), CELLS)) == [SECOND]
    assert tune.ranking(times(first=(1,), second=()), CELLS) == {}


def test_slow_ones():
    found = tune.slow_ones(times(first=(2, 2), second=(6, 2), third=(7, 2)), CELLS[0])
    assert found == {THIRD: "slow: 3.5x the fastest at 8x384 float32"}
    assert tune.slow_ones(times(first=(2,)), CELLS[1]) == {}


def test_the_first_that_nothing_is_wrong_with_is_chosen():
    ratios = {THIRD: 1.0, FIRST: 1.1, SECOND: 1.2}
    assert tune.choose(ratios, {THIRD: "wrong", SECOND: "wrong"}.get) == (FIRST, {THIRD: "wrong"})
    assert tune.choose(ratios, lambda config: "wrong") == (None, dict.fromkeys(ratios, "wrong"))


def test_candidates_that_are_wrong_or_fail_are_reported_and_not_timed():
    def failing(x, state):
        raise RuntimeError("out of resource: shared memory\nand more")

    steps = {FIRST: wrong_step("cov"), SECOND: failing, THIRD: wrong_step(None)}
    found = tune.measure(((8, 12), "float32"), steps, 2, "cpu", "wall")
    assert found[FIRST].startswith("WRONG: cov is off by")
    assert found[SECOND] == "failed: RuntimeError: out of resource: shared memory"
    q1, median, q3 = found[THIRD]
    assert 0 < q1 <= median <= q3


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_yardstick_of_candidates_equals_the_oracle(stop_gradient):
    x, dout, start = tune.draw(((16, 12), "float32"), "cpu")
    found = tune.in_float64(x, dout, start, stop_gradient)
    out, after = oracle.train_step(to_numpy(x), oracle.State(*map(to_numpy, start[:3]), 0))
    expected = {"out": out, "cov": after.C, "std": after.sigma}
    of_constant_scale = torch.tensor(to_numpy(dout) * after.scale)
    assert torch.allclose(found["grad"], of_constant_scale, rtol=1e-12) == stop_gradient
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(value), rtol=1e-12, atol=1e-14)
    assert start.cov.dtype == torch.float32
    assert start.batches == 0


def test_the_gate_through_the_statistics(monkeypatch):
    def one_step(x, state, name, stop_gradient):
        assert (triton.config_for(8, 12) is SECOND) == (name == "triton")
        return real(x, state, "reference", stop_gradient or (forgets and name == "triton"))

    real, cells = tune.one_step, [((8, 12), "float32")]
    monkeypatch.setattr(tune, "one_step", one_step)
    forgets = False
    assert tune.wrong_through_statistics(0, SECOND, cells, "cpu") is None
    forgets = True
    found = tune.wrong_through_statistics(0, SECOND, cells, "cpu")
    assert found.startswith("through the statistics at 8x12 float32: grad is off by")


def test_the_printed_table_is_the_table():
    for table in (triton.TABLE, ((16, triton._ANY, FIRST), (triton._ANY, 7, triton.Config(64, 32, 8, "tf32x3")))):
        names = {"_ANY": triton._ANY, "Config": triton.Config}
        text = tune.table_text(table, "Measured somewhere.")
        exec(text, names)
        assert names["TABLE"] == table
        assert text.startswith("# Measured somewhere.\nTABLE")


def test_the_table_in_the_package_is_as_it_would_be_printed():
    text = tune.table_text(triton.TABLE, "")
    assert text.removeprefix("# \n") in Path(triton.__file__).read_text()


def test_table_of_candidates():
    found = times(first=(1, 9), second=(4, 4), third=(2,))
    header, *lines = tune.time_table(found, tune.ranking(found, CELLS), {THIRD: "WRONG: cov"}, CELLS).splitlines()
    assert header.split() == ["candidate", "ratio", "8x384", "float32", "16x384", "float32"]
    assert [line.split(")")[0] + ")" for line in lines] == list(map(tune.config_text, (FIRST, SECOND, THIRD)))
    assert lines[2].endswith("WRONG: cov")


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_tuning_needs_a_gpu(interpret):
    done = run(sys.executable, "benchmarks/tune.py", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET=interpret)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs a GPU, and changed nothing" in done.stderr


# ---- bench_host.py ----


def replaced_by_stubs():
    kernels = [] if triton._MISSING else vars(triton.kernels).values()
    replaced = [cuda._cuda, cuda._DEVICE_TYPE, cuda._REASON, cuda._machine_reason, cuda._stream]
    return list(map(id, [*kernels, *replaced, triton.INTERPRETED, functional._SMALL, cpu._C]))


@pytest.mark.parametrize("name", [name for name in bench_host.STUBS if name not in bench_host.missing()])
def test_stubs_launch_nothing_and_are_gone_afterwards(name):
    before = replaced_by_stubs()
    x, cov, std = torch.randn(4, 8, requires_grad=True), torch.zeros(8, 8), torch.zeros(8)
    with bench_host.STUBS[name]():
        torch.autograd.grad(isobn(x, cov, std, training=True, backend=name).sum(), x)
    assert not cov.any()
    assert not std.any()
    assert replaced_by_stubs() == before
    with pytest.raises(ZeroDivisionError), bench_host.STUBS[name]():
        raise ZeroDivisionError
    assert replaced_by_stubs() == before


def test_host_times(tmp_path, monkeypatch, capsys):
    before = replaced_by_stubs()
    rows = bench_host.measure(rounds=2, calls=5)
    assert replaced_by_stubs() == before
    names = {"x * scale", "argument checks", *(name for name in bench_host.STUBS if name not in bench_host.missing())}
    assert {row.what for row in rows} == names
    assert {(row.shape, row.dtype) for row in rows} == {((32, 768), "float32"), ((32, 384), "bfloat16")}
    for row in rows:
        q1, median, q3 = row.microseconds
        assert 0 < q1 <= median <= q3
    monkeypatch.setattr(bench_host, "measure", lambda: rows)
    assert bench_host.main(["--output", str(tmp_path / "deep" / "host.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Launches are stubbed")
    assert "Triton's own launcher" in printed
    result = json.loads((tmp_path / "deep" / "host.json").read_text())
    assert result["versions"]["torch"] == torch.__version__
    assert result["date"]
    assert len(result["rows"]) == len(rows)
