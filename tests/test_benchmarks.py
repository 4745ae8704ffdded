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

from isobn_kernels import available_backends, backends, functional, isobn
from isobn_kernels.backends.triton import config as triton

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CPU_BACKENDS = [name for name in available_backends() if name in ("cpu", "reference")]
NAMES = ("clocks", "compare", "host", "measure", "model", "plot", "providers", "readme", "results", "tune")
clocks, compare, host, measure, model, plot, providers, readme, results, tune = (
    importlib.import_module(f"benchmarks.{name}") for name in NAMES
)
bench = importlib.import_module("benchmarks.run")


def example(N=16, D=12, dtype=torch.float32):
    """A batch, an upstream gradient, and a state that has seen one other batch."""
    random = torch.Generator().manual_seed(0)
    other, x, dout = torch.randn(3, N, D, generator=random).to(dtype) + 1
    scale, batches = torch.ones(D), torch.zeros((), dtype=torch.int64)
    state = providers.State(torch.zeros(D, D), torch.zeros(D), scale, batches)
    providers.published(other, state.cov, state.std)
    return x.requires_grad_(), dout, state


def verdict(step, dtype=torch.float32, evaluate=None):
    x, dout, state = example(dtype=dtype)
    before = state.clone()
    found = providers.gate(step, x, dout, state, providers.exact(x, dout, state), evaluate)
    assert all(map(torch.equal, state, before)), "the gate changed the state it was given"
    return found


# ---- Providers and their gate ----


@pytest.mark.parametrize("formula", ["published", "exact"])
def test_the_baseline_and_the_yardstick_equal_the_oracle(formula):
    x, dout, state = example()
    out, after = oracle.train_step(to_numpy(x), oracle.State(*map(to_numpy, state[:3]), 0))
    out, C, sigma, grad = map(torch.tensor, (out, after.C, after.sigma, to_numpy(dout) * after.scale))
    if formula == "exact":
        found = providers.exact(x, dout, state)
    else:
        x, cov, std = x.detach().double().requires_grad_(), state.cov.double(), state.std.double()
        found = {"out": providers.published(x, cov, std), "cov": cov, "std": std}
        (found["grad"],) = torch.autograd.grad(found["out"], x, dout.double())
    for name, expected in (("out", out), ("grad", grad), ("cov", C), ("std", sigma)):
        # Both in float64. Sums of N and D terms are off by N + D units of 1.1e-16; the rest is room for the powers.
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["published", "lean", pytest.param("compiled", marks=pytest.mark.full), *CPU_BACKENDS])
def test_gate_lets_right_providers_pass(name, dtype):
    provider = providers.PROVIDERS[name](torch.zeros(2, 12, dtype=dtype))
    assert verdict(provider.train, dtype, provider.evaluate) is None


def wrong_step(what):
    def step(x, state):
        out = providers.published(x, state.cov, state.std)
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


def test_gate_catches_a_wrong_evaluation():
    published = providers.published_provider(torch.zeros(2, 12))
    assert verdict(published.train, evaluate=published.evaluate) is None
    stale = verdict(published.train, evaluate=providers.scaled)  # this provider leaves the scale in the state alone
    assert stale.startswith("evaluation is off by")


def test_lean_makes_nothing_of_the_size_of_the_covariance():
    x, _, state = example(N=4, D=64)
    D2 = 64 * 64 * 4
    for name, most in (("lean", D2 - 1), ("published", D2)):
        provider = providers.PROVIDERS[name](x)
        found = clocks.counts(lambda provider=provider: provider.train(x, state), "cpu")
        assert found.largest_bytes <= most
        assert (found.largest_bytes == D2) == (name == "published")


def test_usable_providers():
    names, reasons = providers.usable("cpu")
    assert set(names) | set(reasons) == set(providers.PROVIDERS)
    assert {"published", "lean", "compiled", "batch_norm", "reference"} <= set(names)
    assert "GPU" in reasons["compiled-max-autotune"]
    assert providers.base_of(names) == CPU_BACKENDS[0]


# ---- Clocks and counts ----


def test_ratio_is_the_median_of_the_pairs():
    samples, base = [2.0, 30.0, 12.0], [1.0, 10.0, 2.0]  # ratios 2, 3, 6; the ratio of the medians is 6
    assert clocks.paired_ratio(samples, base) == (2.5, 3.0, 4.5)
    with pytest.raises(ValueError):
        clocks.paired_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 9.0]])
def test_quartiles(values):
    assert clocks.quartiles(values) == pytest.approx(tuple(np.quantile(values, [0.25, 0.5, 0.75])))


def test_a_sample_fills_a_millisecond():
    assert [clocks.repeats(seconds) for seconds in (1.0, 1e-3, 0.4e-3, 1e-9)] == [1, 1, 3, 1000]


def test_the_event_clock_returns_seconds_per_call(monkeypatch):
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
    assert clocks.event_clock(call, 4) == pytest.approx(3e-3)
    assert now == 12.0


def test_counts_of_a_call(monkeypatch):
    # Filling fresh memory with NaN, as tests do, would count.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    a = torch.ones(64, 64)
    found = clocks.counts(lambda: (a + a).mul_(a), "cpu")
    assert found == clocks.Counts(operations=2, allocations=1, peak_bytes=64 * 64 * 4, largest_bytes=64 * 64 * 4)
    assert clocks.counts(lambda: a.mul_(a), "cpu") == clocks.Counts(1, 0, 0, 0)


PAGES = """
import sys
import torch
from benchmarks import clocks
if sys.argv[1] == "settled":
    clocks.settle_allocator()
call = lambda: torch.ones(1 << 21)
clocks.page_faults(call, 30)
print(clocks.page_faults(call, 5))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_the_settled_allocator_keeps_its_pages():
    done = run(sys.executable, "-c", PAGES, "settled")
    assert float(done.stdout) < 100, done.stderr  # of 2048 pages


def test_clones_exceed_the_cache():
    for shape in ((32, 768), (8, 384), (64, 4096)):
        number = measure.clones_for(shape, 4, 50 << 20)
        held = number * (4 * shape[1] ** 2 + 3 * 4 * shape[0] * shape[1])
        assert 1 <= number <= measure.MAX_CLONES
        assert held >= 3 * (50 << 20) or number == measure.MAX_CLONES


# ---- Measuring ----


def test_wrong_and_failing_providers_are_reported_and_not_timed(monkeypatch, threads):
    def failing(x):
        raise RuntimeError("no such device\nand more")

    threads(1)
    wrong = providers.Provider(wrong_step("cov"), providers.scaled)
    monkeypatch.setitem(providers.PROVIDERS, "wrong", lambda x: wrong)
    monkeypatch.setitem(providers.PROVIDERS, "failing", failing)
    names = ["published", "batch_norm", "wrong", "failing", "reference"]
    rows = measure.measure((4, 8), "float32", "cpu", 1, names, "reference", rounds=3, seconds=10)
    by_name = {row.provider: row for row in rows}
    assert by_name["wrong"].status.startswith("WRONG: cov is off by")
    assert by_name["failing"].status == "failed: RuntimeError: no such device"
    assert by_name["wrong"].microseconds is by_name["failing"].microseconds is None
    for name in ("published", "batch_norm", "reference"):
        here = [row for row in rows if row.provider == name]
        assert [row.mode for row in here] == list(measure.MODES)
        for row in here:
            assert row.status == "ok"
            assert row.rounds == 3
            assert row.counts.operations > 0
            assert row.page_faults >= 0
            q1, median, q3 = row.microseconds
            assert 0 < q1 <= median <= q3
            assert row.ratio == (1, 1, 1) or name != "reference"
    header, *lines = bench.time_table(rows, names, "reference").splitlines()
    assert header.split() == ["shape", "threads", "mode", "clock", *names]
    assert len(lines) == 4
    assert all("WRONG" in line and "failed" in line for line in lines)


def test_evaluation_is_timed_for_one_backend_only():
    x, dout, start = example(4, 8)
    expected = providers.exact(x, dout, start)
    for base, modes in (("reference", 4), ("cpu", 3)):
        rows, timed = measure.prepared("reference", base, x, dout, start, expected, 1, None)
        assert len(rows) == len(timed) == modes


def test_busy_machine_is_flagged():
    quiet = measure.Row((4, 8), "float32", 1, "forward", "wall", "cpu", microseconds=(1, 1, 1))
    noisy = measure.Row((4, 8), "float32", 2, "forward", "wall", "cpu", microseconds=(1, 1, 9))
    assert noisy.noisy
    assert bench.busy_reasons(0.1, 2.1, 2, [quiet], "cpu") == []
    assert "before" in bench.busy_reasons(1.0, 2.1, 2, [quiet], "cpu")[0]
    assert "after" in bench.busy_reasons(0.1, 3.0, 2, [quiet], "cpu")[0]
    assert "1 of 2 rows" in bench.busy_reasons(0.1, 2.1, 2, [quiet, noisy], "cpu")[0]


def test_floor():
    size, flop = measure.floor((32, 4096), 4, "forward")
    assert size == pytest.approx(1.5 * 4 * 4096**2 + 2 * 4 * 32 * 4096, rel=1e-3)
    assert flop == pytest.approx(32 * 4096**2, rel=1e-3)
    batch = 2 * 4 * 32 * 4096
    assert measure.floor((32, 4096), 4, "forward+backward")[0] == size + batch
    assert measure.floor((32, 4096), 4, "backward")[0] == measure.floor((32, 4096), 4, "evaluation")[0] == batch


def test_the_grid_of_the_cpu():
    assert max(N * D**2 for N, D in bench.CPU_SHAPES) <= 2**33
    assert {(4096, 1024), (256, 4096), (8, 384)} <= set(bench.CPU_SHAPES)
    assert len(bench.COMPILE_SHAPES) <= 3
    args = bench.parse_arguments([])
    assert {threads for (N, _), threads in bench.cells(args) if N != 32} == {torch.get_num_threads()}
    told = bench.skipped(args, {"cuda": "no GPU"})
    assert "cuda: no GPU" in told
    assert any("2^33" in line for line in told)


def run(*command, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_run_plot_and_readme(tmp_path):
    """From measuring to the README's section, through the table."""
    table = tmp_path / "deep" / "results.csv"
    options = ["--shapes", "32x8", "16x768", "--compile-shapes", "--threads", "1", "--rounds", "3", "--seconds", "0.1"]
    command = [sys.executable, "-m", "benchmarks"]
    done = run(*command, "run", "--device", "cpu", *options, "--output", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2] 16x768, threads: 1" in done.stderr
    assert "skipped:" in done.stdout
    assert "load average" in done.stdout
    lines = results.read(table)
    names = {"published", "lean", "batch_norm", *CPU_BACKENDS}
    assert {(line["N"], line["mode"], line["provider"]) for line in lines} == {
        (N, mode, name)
        for N in ("32", "16")
        for mode in measure.MODES
        for name in names
        if mode != "evaluation" or name not in CPU_BACKENDS[1:]
    }
    for line in lines:
        assert 0 < float(line["q1_us"]) <= float(line["median_us"]) <= float(line["q3_us"])
        assert float(line["copy_gb_s"]) > 0
        assert line["torch"] == torch.__version__
        assert line["commit"]
        assert line["date"]
        assert line["rounds"] == "3"
        assert line["base"] == CPU_BACKENDS[0]
    assert plot.main(["--table", str(table)]) == 0
    for figure in ("speedup_cpu.svg", "scaling_cpu.svg"):
        assert (table.parent / figure).read_text().startswith("<?xml")


def test_bad_arguments(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for bad in (
        ["--shapes", "4y8"],
        ["--shapes", "1x8"],
        ["--threads", "0"],
        ["--device", "tpu"],
        ["--output", str(other)],
    ):
        with pytest.raises(SystemExit, match="2"):
            bench.parse_arguments(bad)


def test_a_narrowed_run_does_not_replace_the_stored_result():
    assert bench.parse_arguments(["--shapes", "4x8"]).output is None
    assert bench.parse_arguments(["--quick"]).output is None
    assert bench.parse_arguments([]).output == ROOT / "benchmarks" / "results" / "results.csv"


def test_commands(capsys):
    main = importlib.import_module("benchmarks.__main__")
    assert main.main([]) == main.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert main.main(["fly"]) == 2
    for command in main.COMMANDS:
        assert f"\n{command} " in told
        assert (ROOT / "benchmarks" / f"{command}.py").exists()
        with pytest.raises(SystemExit, match="0"):
            main.main([command, "--help"])
        assert f"usage: benchmarks {command}" in capsys.readouterr().out


# ---- The table ----


def line(**values):
    common = {"device": "cpu", "machine": "M", "threads": 2, "dtype": "float32", "N": 32, "D": 768, "mode": "forward"}
    common |= {"clock": "wall", "provider": "lean", "status": "ok", "date": "2026-01-01T00:00Z", "commit": "a" * 40}
    return common | values


def test_upsert_replaces_what_has_the_same_key(tmp_path):
    table = tmp_path / "t.csv"
    results.upsert(table, [line(median_us=1.0), line(median_us=2.0, N=8), line(median_us=3.0, machine="other")])
    results.upsert(table, [line(median_us=4.5, commit="b" * 40, date="2026-02-01T00:00Z")])
    found = {(row["machine"], row["N"]): row for row in results.read(table)}
    assert len(results.read(table)) == 3
    assert [found["M", N]["median_us"] for N in ("8", "32")] == ["2", "4.5"]
    assert found["M", "32"]["commit"] == "b" * 40
    assert [row["N"] for row in results.read(table)] == ["8", "32", "32"]  # as numbers


def test_upsert_of_a_provider_that_went_wrong_and_came_right(tmp_path):
    table = tmp_path / "t.csv"
    wrong = line(mode="all", clock="all", status="WRONG: cov")
    results.upsert(table, [line(median_us=1.0), line(median_us=1.0, mode="backward"), line(provider="other")])
    results.upsert(table, [wrong])
    assert [(row["provider"], row["mode"]) for row in results.read(table)] == [("lean", "all"), ("other", "forward")]
    results.upsert(table, [line(median_us=1.0)])
    assert [row["mode"] for row in results.read(table)] == ["forward", "forward"]


def steps(**ratios):
    """Lines of forward and backward at 32 x 768."""
    common = {"mode": "forward+backward", "base": "cpu", "q1_us": 1.0, "q3_us": 3.0, "cores": 2, "torch": "2"}
    return [line(**common, provider=name, ratio=ratio, median_us=100.0 * ratio) for name, ratio in ratios.items()]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "results.csv"
    results.upsert(path, steps(cpu=1.0, published=12.3, lean=4.0, batch_norm=0.25))
    return path


def test_readme_section_is_written_between_its_markers(table, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    arguments = ["--table", str(table), "--readme", str(page)]
    assert readme.main(arguments) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n\n")
    assert text.endswith(f"{readme.END}\nafter\n")
    assert "old" not in text
    assert "| 32 x 768 | 2 | forward + backward | 100 us | 1,230 us, 12x | 400 us, 4.0x | 25.0 us, 0.25x |" in text
    assert "2026-01-01" in text
    assert "M, 2 cores" in text
    assert "commit aaaaaaa." in text
    assert "busy" not in text
    assert readme.main(arguments) == 0
    assert page.read_text() == text
    results.upsert(table, [row | {"busy": "load average 9", "commit": "9" * 40} for row in steps(cpu=1.0)])
    assert readme.main(arguments) == 0
    assert "commits 9999999, aaaaaaa. The machine was busy: load average 9." in page.read_text()
    page.write_text("no markers")
    assert readme.main(arguments) == 2
    assert "to write between" in capsys.readouterr().err


def test_the_readme_has_the_markers():
    text = (ROOT / "README.md").read_text()
    assert text.index(readme.BEGIN) < text.index(readme.END)


def test_plots_are_the_same_bytes_from_the_same_table(table, tmp_path):
    for folder in ("a", "b"):
        assert plot.main(["--table", str(table), "--output", str(tmp_path / folder)]) == 0
    for name in ("speedup_cpu.svg", "scaling_cpu.svg"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second


def test_nothing_to_plot(tmp_path, capsys):
    assert plot.main(["--table", str(tmp_path / "none.csv")]) == 2
    assert "python -m benchmarks run" in capsys.readouterr().err


def test_the_floor_of_a_line():
    found = {"floor_bytes": "2e6", "floor_flop": "3e9", "copy_gb_s": "10", "matmul_gflop_s": "100"}
    assert plot.floor_us(found) == pytest.approx(30_000)
    assert plot.floor_us(found | {"floor_flop": "0"}) == pytest.approx(200)
    assert plot.floor_us(found | {"copy_gb_s": ""}) == 0


# ---- compare ----


def pair(ratio, noise=0.0):
    """Samples of one pair of processes."""
    return [1.0, 2.0, 1.0, 2.0], [ratio, 2 * ratio * (1 + noise), ratio * (1 - noise), 2 * ratio]


def test_a_verdict_needs_all_pairs_and_the_quartiles():
    assert compare.verdict([pair(1.2), pair(1.21), pair(1.19)])[1] == "B is slower, by 20 %"
    assert compare.verdict([pair(0.8), pair(0.8), pair(0.8)])[1] == "B is faster, by 25 %"
    assert compare.verdict([pair(1.0), pair(1.0)])[1] == "no difference shown"
    assert compare.verdict([pair(1.1), pair(1.1), pair(1.1), pair(1.1), pair(0.99)])[1] == "no difference shown"
    assert compare.verdict([pair(1.02, 0.3)])[1] == "no difference shown"


def test_both_processes_answer():
    """The protocol, with the package of this checkout on both sides."""
    package = Path(backends.__file__).parents[2]
    args = compare.argparse.Namespace(device="cpu", dtype="float32", threads=1, backend="reference")
    args.shapes, args.pairs, args.rounds = [(4, 8)], 1, 3
    backend, found = compare.measure((package, package), args)
    assert backend == "reference"
    assert set(found) == {("4x8", mode) for mode in compare.MODES}
    for ((a, b),) in found.values():
        assert len(a) == len(b) == 3
        assert min(a + b) > 0


def test_the_package_of_a_commit_is_the_one_that_is_timed(tmp_path):
    with pytest.raises(compare.Broken, match="rather than from"):
        compare.Server(tmp_path, ["cpu", "float32", "1", "reference"])


def test_comparing_what_does_not_exist(capsys):
    assert compare.main(["no-such-commit", "HEAD"]) == 1
    assert "no-such-commit" in capsys.readouterr().err


# ---- model ----


def test_steps_of_a_model(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=16))
    monkeypatch.setattr(model, "encoder_for", lambda device: ("tiny", tiny))
    output = tmp_path / "t.csv"
    assert model.main(["--batch", "4", "--length", "6", "--rounds", "3", "--output", str(output)]) == 0
    rows = {row["provider"]: row for row in results.read(output)}
    assert set(rows) == {"none", "published", "ours", "published alone", "ours alone"}
    assert {row["mode"] for row in rows.values()} == {"model tiny, length 6"}
    assert float(rows["none"]["ratio"]) == 1
    assert float(rows["ours alone"]["ratio"]) > 0
    (sentence,) = readme.whole_steps(list(rows.values()))
    assert "4 texts, D = 8" in sentence
    assert " none" not in sentence


# ---- gpu_check.sh ----


def test_gpu_check_explains_itself():
    done = run("bash", "benchmarks/gpu_check.sh")
    assert done.returncode == 2
    assert done.stdout.startswith("usage: benchmarks/gpu_check.sh OUTDIR")
    assert run("bash", "benchmarks/gpu_check.sh", "--help").returncode == 0


# ---- tune ----

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
    before = backends.load("triton")
    with tune.instead(1, THIRD):
        assert tune.config_for(16, 768) is THIRD
        assert tune.config_for(16, 384) is triton.TABLE[0][2]
        assert tune.config_for(32, 768) is triton.TABLE[3][2]
    assert backends.load("triton") is before
    with pytest.raises(ZeroDivisionError), tune.instead(1, THIRD):
        raise ZeroDivisionError
    assert backends.load("triton") is before


def test_the_candidate_of_a_step_is_in_place_for_that_step_only(monkeypatch):
    def one_step(x, state, name):
        assert name == "triton"
        assert tune.config_for(8, 384) is SECOND
        raise RuntimeError("out of shared memory")

    before = backends.load("triton")
    monkeypatch.setattr(tune, "one_step", one_step)
    with pytest.raises(RuntimeError, match="shared memory"):
        tune.step_with(0, SECOND)(None, None)
    assert backends.load("triton") is before


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
    x, dout, start = tune.example(((16, 12), "float32"), "cpu")
    found = tune.in_float64(x, dout, start, stop_gradient)
    out, after = oracle.train_step(to_numpy(x), oracle.State(*map(to_numpy, start[:3]), 0))
    expected = {"out": out, "cov": after.C, "std": after.sigma}
    of_constant_scale = torch.tensor(to_numpy(dout) * after.scale)
    assert torch.allclose(found["grad"], of_constant_scale, rtol=1e-12) == stop_gradient
    for name, value in expected.items():
        # Both in float64, as above.
        torch.testing.assert_close(found[name], torch.tensor(value), rtol=1e-12, atol=1e-14)
    assert start.cov.dtype == torch.float32
    assert start.batches == 0


def test_the_gate_through_the_statistics(monkeypatch):
    def one_step(x, state, name, stop_gradient):
        assert (tune.config_for(8, 12) is SECOND) == (name == "triton")
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
    done = run(sys.executable, "-m", "benchmarks", "tune", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET=interpret)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs a GPU, and changed nothing" in done.stderr


# ---- host ----


def replaced_by_stubs():
    return [*(id(backends.load(name)) for name in backends.NAMES), functional._SMALL]


@pytest.mark.parametrize("name", [name for name in host.STUBS if name not in host.missing()])
def test_stubs_launch_nothing_and_are_gone_afterwards(name):
    before = replaced_by_stubs()
    x, cov, std = torch.randn(4, 8, requires_grad=True), torch.zeros(8, 8), torch.zeros(8)
    with host.STUBS[name]():
        torch.autograd.grad(isobn(x, cov, std, training=True, backend=name).sum(), x)
    assert not cov.any()
    assert not std.any()
    assert replaced_by_stubs() == before
    with pytest.raises(ZeroDivisionError), host.STUBS[name]():
        raise ZeroDivisionError
    assert replaced_by_stubs() == before


def test_host_times(tmp_path, monkeypatch, capsys):
    before = replaced_by_stubs()
    rows = host.measure(rounds=2, calls=5)
    assert replaced_by_stubs() == before
    names = {"x * scale", "argument checks", *(name for name in host.STUBS if name not in host.missing())}
    assert {row.what for row in rows} == names
    assert {(row.shape, row.dtype) for row in rows} == {((32, 768), "float32"), ((32, 384), "bfloat16")}
    for row in rows:
        q1, median, q3 = row.microseconds
        assert 0 < q1 <= median <= q3
    monkeypatch.setattr(host, "measure", lambda: rows)
    assert host.main(["--output", str(tmp_path / "deep" / "host.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Launches are stubbed")
    assert "Triton's own launcher" in printed
    result = json.loads((tmp_path / "deep" / "host.json").read_text())
    assert result["torch"] == torch.__version__
    assert result["date"]
    assert len(result["rows"]) == len(rows)
