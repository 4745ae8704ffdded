"""The benchmarks' gate, statistics and reports. Nothing here depends on how long anything takes."""

import argparse
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from helpers import to_numpy

from isobn_kernels import available_backends, backends, functional, isobn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
PACKAGE = Path(backends.__file__).parents[2]
CPU_BACKENDS = [name for name in available_backends() if name in ("cpu", "reference")]
NAMES = ("clocks", "compare", "host", "model", "plot", "providers", "readme", "results")
clocks, compare, host, model, plot, providers, readme, results = (
    importlib.import_module(f"benchmarks.{name}") for name in NAMES
)
bench = importlib.import_module("benchmarks.run")


def verdict(step, dtype="float32"):
    x, dout, state = providers.draw((16, 12), dtype, "cpu")
    before = state.clone()
    found = providers.gate(step, x, dout, state, providers.in_float64(providers.published_step, x, dout, state))
    assert all(map(torch.equal, state, before)), "the gate changed the state it was given"
    return found


# ---- Providers and their gate ----


def test_what_the_gate_expects_equals_the_oracle():
    x, dout, state = providers.draw((16, 12), "float32", "cpu")
    found = providers.in_float64(providers.published_step, x, dout, state)
    out, after = oracle.train_step(to_numpy(x), oracle.State(*map(to_numpy, state[:3]), 0))
    expected = {"out": out, "evaluation": out, "cov": after.C, "std": after.sigma, "grad": to_numpy(dout) * after.scale}
    assert set(found) == set(expected)
    for name, value in expected.items():
        # Both in float64. Sums of N and D terms are off by N + D units of 1.1e-16; the rest is room for the powers.
        torch.testing.assert_close(found[name], torch.tensor(value), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["published", "lean", pytest.param("compiled", marks=pytest.mark.full), *CPU_BACKENDS])
def test_gate_lets_right_providers_pass(name, dtype):
    assert verdict(providers.provider(name, torch.zeros(16, 12)), dtype) is None


def wrong_step(what):
    def step(x, state, training):
        out = providers.published_step(x, state, training)
        if what == "evaluation":
            return out if training else out * 1.001
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


@pytest.mark.parametrize("what", ["out", "grad", "evaluation", "cov", "std", "dtype", "NaN"])
def test_gate_catches(what):
    assert verdict(wrong_step(None)) is None
    assert verdict(wrong_step(what)).startswith("out" if what in ("dtype", "NaN") else what)


def test_lean_makes_nothing_of_the_size_of_the_covariance():
    x, _, state = providers.draw((4, 64), "float32", "cpu")
    largest = {}
    for name in ("lean", "published"):
        step = providers.provider(name, x)
        largest[name] = clocks.counts(lambda step=step: step(x, state, True), "cpu").largest_bytes
    assert largest["lean"] < 64 * 64 * 4 == largest["published"]


def test_ours_are_those_that_take_a_tensor_of_the_device(monkeypatch):
    monkeypatch.setattr(providers, "available_backends", lambda: ("triton", *CPU_BACKENDS))
    assert providers.ours("cpu") == CPU_BACKENDS


# ---- Clocks and counts ----


def test_ratio_is_the_median_of_the_pairs():
    samples, base = [2.0, 30.0, 12.0], [1.0, 10.0, 2.0]  # ratios 2, 3, 6; the ratio of the medians is 6
    assert clocks.paired_ratio(samples, base) == (2.5, 3.0, 4.5)
    with pytest.raises(ValueError):
        clocks.paired_ratio([1.0, 2.0], [1.0])


def test_a_sample_fills_five_milliseconds():
    assert [clocks.repeats(seconds) for seconds in (1.0, 5e-3, 2e-3, 1e-9)] == [1, 1, 3, 10_000]


@pytest.mark.parametrize(("seconds", "rounds"), [(100.0, 4), (0.0, 3)])
def test_rounds_are_interleaved_in_rotating_order(seconds, rounds):
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    samples = clocks.interleaved(samplers, 4, seconds)
    assert "".join(order) == "abcbcacababc"[: 3 * rounds]  # three rounds at least
    assert samples == {name: [1.0] * rounds for name in "abc"}


def test_the_wall_clock_makes_as_many_calls_as_it_divides_by(monkeypatch):
    now = 0.0

    def call():
        nonlocal now
        now += 2e-3

    monkeypatch.setattr(clocks, "timer", lambda: now)
    sample = clocks.wall(call)
    before = now
    assert sample() == pytest.approx(2e-3)
    assert now - before == pytest.approx((1 + 3) * 2e-3)  # one untimed


def test_counts_of_a_call(monkeypatch):
    # Filling fresh memory with NaN, as tests do, would count.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    a = torch.ones(64, 64)
    found = clocks.counts(lambda: (a + a).mul_(a), "cpu")
    assert found == clocks.Counts(operations=2, allocations=1, peak_bytes=64 * 64 * 4, largest_bytes=64 * 64 * 4)
    assert clocks.counts(lambda: a.mul_(a), "cpu") == clocks.Counts(1, 0, 0, 0)


PAGES = """
import torch
from benchmarks import clocks
clocks.settle_allocator()
call = lambda: torch.ones(1 << 21)
clocks.page_faults(call, 30)
print(clocks.page_faults(call, 5))
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_the_settled_allocator_keeps_its_pages():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PAGES], env=environment, capture_output=True, text=True)
    assert float(done.stdout) < 100, done.stderr  # of 2048 pages


# ---- run ----


def test_wrong_and_failing_providers_are_reported_and_not_timed(monkeypatch):
    def failing(x):
        raise RuntimeError("no such device\nand more")

    monkeypatch.setitem(providers.OTHERS, "wrong", lambda x: wrong_step("cov"))
    monkeypatch.setitem(providers.OTHERS, "failing", failing)
    names = ["published", "batch_norm", "wrong", "failing", *reversed(CPU_BACKENDS)]
    base = names[-1]
    rows, wrong = bench.measure((4, 8), "float32", "cpu", names, base, rounds=3, seconds=10)
    assert [fault.partition(" is off")[0] for fault in wrong] == [
        "wrong: WRONG: cov",
        "failing: failed: RuntimeError: no such device",
    ]
    # Evaluation is the same expression for all of ours: timed for one.
    assert [(row["provider"], row["mode"]) for row in rows] == [
        (name, mode)
        for name in ("published", "batch_norm", *reversed(CPU_BACKENDS))
        for mode in bench.MODES
        if mode != "evaluation" or name not in CPU_BACKENDS[1:]
    ]
    for row in rows:
        assert 0 < row["q1_us"] <= row["median_us"] <= row["q3_us"]
        assert row["ratio"] == 1 or row["provider"] != base
        assert row["rounds"] == 3
        assert row["operations"] > 0
    _, *lines = bench.time_table(rows).splitlines()
    assert [line.split()[:3] for line in lines] == [[row["mode"], "wall", row["provider"]] for row in rows]


@pytest.mark.parametrize(("share", "busy"), [(0.01, False), (0.2, True)])
def test_the_processor_time_of_others_makes_the_machine_busy(share, busy, monkeypatch, capsys):
    now, cores = 1000.0, os.cpu_count()
    monkeypatch.setattr(results.time, "monotonic", lambda: now)
    monkeypatch.setattr(results.Watch, "seconds_of_others", lambda self=None: (now - 1000) * cores * share)
    watch = results.Watch()
    now += 50
    found = watch.finish("a wide spread")
    words = ["other processes took 20% of the processors"] * busy + ["a wide spread"]
    assert found["busy"] == "; ".join(words)
    assert capsys.readouterr().out.count("BUSY MACHINE") == len(words)


def test_the_processor_time_of_this_process_and_its_children_is_not_that_of_others(monkeypatch):
    # user, nice, system, idle, waiting, interrupts of two kinds, stolen: all count but idle and waiting
    monkeypatch.setattr(Path, "read_text", lambda self: "cpu  100 20 50 7777 999 5 5 20 0 0\ncpu0 1 1 1\n")
    monkeypatch.setattr(os, "sysconf", {"SC_CLK_TCK": 100}.get)
    monkeypatch.setattr(os, "times", lambda: (0.1, 0.2, 0.3, 0.4, 9999.0))
    assert results.Watch.seconds_of_others() == pytest.approx(2.0 - 1.0)


def test_a_wide_spread_is_a_reason_not_to_trust_the_figures():
    quiet = {"provider": "cpu", "base": "cpu", "q1_us": 1.0, "q3_us": 1.2}
    noisy = quiet | {"q3_us": 2.0}
    assert bench.spread([quiet] * 3 + [noisy]) == bench.spread([]) == []
    assert bench.spread([quiet] * 2 + [noisy, noisy | {"provider": "lean"}]) == [
        "quartiles of cpu more than a factor 1.3 apart in 1 of 3 rows"
    ]


def test_batches_of_32_are_timed_on_one_thread_too(threads):
    threads(2)
    assert bench.cells("cpu", [(32, 8), (64, 8)], None) == [((32, 8), 1), ((32, 8), 2), ((64, 8), 2)]
    assert bench.cells("cuda", [(32, 8)], None) == [((32, 8), 2)]
    assert bench.cells("cpu", [(32, 8)], [4]) == [((32, 8), 4)]


def test_run_plot_and_readme(tmp_path, capsys):
    """From measuring to the README's section, through the table."""
    table, page = tmp_path / "deep" / "results.csv", tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    options = ["--shapes", "32x8", "16x768", "--threads", "1", "--rounds", "2", "--output", str(table)]
    assert bench.main(options) == 0
    told = capsys.readouterr().out
    assert "[2/2] 16x768, threads: 1" in told
    assert "load average" in told
    lines = results.read(table)
    assert {(line["N"], line["provider"]) for line in lines} == {
        (N, name) for N in ("32", "16") for name in ("published", "lean", "batch_norm", *CPU_BACKENDS)
    }
    for line in lines:
        assert float(line["copy_gb_s"]) > 0
        assert line["torch"] == torch.__version__
        assert line["commit"]
        assert line["date"]
        assert line["load_before"]
        assert line["base"] == CPU_BACKENDS[0]
    figures = [table.parent / name for name in ("speedup_cpu.svg", "scaling_cpu.svg")]
    drawn = []
    for _ in range(2):
        assert plot.main(["--table", str(table)]) == 0
        drawn.append([path.read_bytes() for path in figures])
    assert drawn[0] == drawn[1]  # the same bytes from the same table
    assert readme.main(["--table", str(table), "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n\nOn a CPU")
    assert text.endswith(f"scaling_cpu.svg)\n\n{readme.END}\nafter\n")
    assert "old" not in text


@pytest.mark.parametrize("bad", ["--shapes 4y8", "--shapes 1x8", "--threads 0", "--device tpu", "--rounds 1"])
def test_bad_arguments(bad):
    with pytest.raises(SystemExit, match="2"):
        bench.parse_arguments(bad.split())


def test_a_narrowed_run_does_not_replace_the_stored_result():
    assert bench.parse_arguments(["--shapes", "4x8"]).output is None
    assert bench.parse_arguments([]).output == ROOT / "benchmarks" / "results" / "results.csv"


def test_commands(capsys):
    main = importlib.import_module("benchmarks.__main__")
    assert main.main([]) == main.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert main.main(["fly"]) == 2
    for command in main.COMMANDS:
        assert f"\n{command} " in told
        with pytest.raises(SystemExit, match="0"):
            main.main([command, "--help"])
        assert f"usage: benchmarks {command}" in capsys.readouterr().out


# ---- The table ----


def line(**values):
    common = {"device": "cpu", "machine": "M", "threads": 2, "dtype": "float32", "N": 32, "D": 768, "mode": "forward"}
    common |= {"clock": "wall", "provider": "lean", "date": "2026-01-01T00:00Z", "commit": "a" * 40}
    return common | values


def test_a_later_run_replaces_what_it_measured_anew(tmp_path):
    table = tmp_path / "t.csv"
    first = [line(median_us=1.0), line(median_us=1.0, provider="gone"), line(median_us=2.0, N=8)]
    results.upsert(table, [*first, line(median_us=3.0, machine="other")])
    results.upsert(table, [line(median_us=4.5, commit="b" * 40)])
    found = [(row["machine"], row["N"], row["provider"], row["median_us"]) for row in results.read(table)]
    assert found == [("M", "8", "lean", "2"), ("M", "32", "lean", "4.5"), ("other", "32", "lean", "3")]


def test_the_stored_table_can_be_read():
    lines = results.read(results.TABLE)
    assert readme.section(lines, results.TABLE).startswith("On a CPU")


def test_what_is_no_table_is_left_alone(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("device,b\n1,2\n")
    with pytest.raises(ValueError, match="not a table of results"):
        results.upsert(other, [line()])
    with pytest.raises(SystemExit, match="2"):
        bench.parse_arguments(["--output", str(other)])
    assert other.read_text() == "device,b\n1,2\n"


def steps(**ratios):
    """Lines of forward and backward at 32 x 768."""
    common = {"mode": "forward+backward", "base": "cpu", "q1_us": 1.0, "q3_us": 3.0, "cores": 2, "torch": "2"}
    return [line(**common, provider=name, ratio=ratio, median_us=100.0 * ratio) for name, ratio in ratios.items()]


def test_the_section_of_the_readme(tmp_path):
    table = tmp_path / "t.csv"
    results.upsert(table, steps(cpu=1.0, published=12.3, lean=4.0, batch_norm=0.25))
    text = readme.section(results.read(table), table)
    assert "| 32 x 768 | 2 | forward + backward | 100 us | 1,230 us, 12x | 400 us, 4.0x | - | 25.0 us, 0.25x |" in text
    assert text.endswith("M, 2 cores, torch 2, 2026-01-01, commit aaaaaaa.")
    results.upsert(table, [line(N=8, median_us=1.0, commit="9" * 40, busy="load average 9")])
    assert "commits 9999999, aaaaaaa. The machine was busy: load average 9." in readme.section(
        results.read(table), table
    )


def test_markers_of_the_readme(tmp_path, capsys):
    text = (ROOT / "README.md").read_text()
    assert text.index(readme.BEGIN) < text.index(readme.END)
    page = tmp_path / "README.md"
    page.write_text("no markers")
    assert readme.main(["--readme", str(page)]) == 2
    assert "to write between" in capsys.readouterr().err


def test_nothing_to_plot(tmp_path, capsys):
    assert plot.main(["--table", str(tmp_path / "none.csv")]) == 2
    assert "python -m benchmarks run" in capsys.readouterr().err


def test_the_floor_of_a_step():
    fast, slow = 1e12, 1.0
    shape = {"N": "32", "D": "4096"}
    moved = 1.5 * 4 * 4096**2 + 4 * 4 * 32 * 4096
    assert plot.floor_us(shape | {"copy_gb_s": slow, "matmul_gflop_s": fast}) == pytest.approx(moved / 1e3, rel=1e-3)
    computed = 32 * 4096**2
    assert plot.floor_us(shape | {"copy_gb_s": fast, "matmul_gflop_s": slow}) == pytest.approx(computed / 1e3, rel=1e-3)


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


def test_a_process_answers_with_times(monkeypatch, capsys):
    def answers(backend, *requests):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{json.dumps(request)}\n" for request in requests)))
        compare.serve("cpu", "float32", backend, "1")
        return list(map(json.loads, capsys.readouterr().out.splitlines()))

    package, wrong, *seconds = answers("reference", [4, 8], *compare.MODES)
    assert package == str(PACKAGE)
    assert wrong is None
    assert len(seconds) == 2
    assert min(seconds) > 0
    monkeypatch.setitem(providers.OTHERS, "wrong", lambda x: wrong_step("cov"))
    assert answers("wrong", [4, 8])[1].startswith("cov is off by")
    assert answers("none such", [4, 8])[1].startswith("failed: ValueError: backend must be one of")


ANSWERS = """
import json, sys
print(json.dumps(sys.argv[1]), flush=True)
name = sys.argv[1][-1]
for line in sys.stdin:
    mode = isinstance(json.loads(line), str)
    with open("../order", "a") as file:
        file.write(name if mode else "")
    print(json.dumps({"a": 1.0, "b": 2.0}[name] if mode else None), flush=True)
"""


def compared(*trees, rounds):
    args = argparse.Namespace(device="cpu", dtype="float32", threads=1, backend="reference")
    args.shapes, args.pairs, args.rounds = [(4, 8)], 2, rounds
    return compare.measure(trees, args)


def test_samples_of_both_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "SERVE", ANSWERS)
    trees = [tmp_path / name for name in "ab"]
    for tree in trees:
        tree.mkdir()
    found = compared(*trees, rounds=3)
    assert found == {("4x8", mode): [([1.0] * 3, [2.0] * 3)] * 2 for mode in compare.MODES}
    assert (tmp_path / "order").read_text() == "abbaab" * 4  # two modes, two pairs of processes


@pytest.mark.full
def test_the_package_of_each_tree_is_timed():
    """The processes as they are, with the package of this checkout on both sides."""
    assert set(compared(PACKAGE, PACKAGE, rounds=2)) == {("4x8", mode) for mode in compare.MODES}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('\"/elsewhere\"')", "took isobn_kernels from /elsewhere rather than from"),
        ("exit(3)", "ended with status 3"),
    ],
)
def test_a_process_that_is_not_what_was_asked_for(code, words, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "SERVE", code)
    with pytest.raises(compare.Broken, match=words), compare.serving(tmp_path, []):
        pass


def test_comparing_what_does_not_exist(capsys):
    assert compare.main(["no-such-commit", "HEAD"]) == 1
    assert "no-such-commit" in capsys.readouterr().err


# ---- model ----


def test_steps_of_a_model(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(model.ENCODERS, "cpu", ("tiny", sizes | {"intermediate_size": 16}))
    output = tmp_path / "t.csv"
    assert model.main(["--batch", "4", "--length", "6", "--rounds", "2", "--output", str(output)]) == 0
    rows = {row["provider"]: row for row in results.read(output)}
    assert set(rows) == {"none", "published", "ours", "published alone", "ours alone"}
    assert {row["mode"] for row in rows.values()} == {"model tiny, length 6"}
    assert float(rows["none"]["ratio"]) == 1
    assert float(rows["ours alone"]["ratio"]) > 0
    (sentence,) = readme.whole_steps(list(rows.values()))
    assert "4 texts, D = 8" in sentence
    assert " none" not in sentence


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


def test_host_times(monkeypatch, capsys):
    before = replaced_by_stubs()
    monkeypatch.setattr(clocks, "MIN_SAMPLE", 1e-4)
    assert host.main(["--rounds", "2"]) == 0
    assert replaced_by_stubs() == before
    printed = capsys.readouterr().out
    assert "Launches are stubbed" in printed
    assert f"torch: {torch.__version__}" in printed
    for name in ("x * scale", "argument checks", *(name for name in host.STUBS if name not in host.missing())):
        for case in ("32x768  float32", "32x384  bfloat16"):
            assert re.search(f"^{case} +{re.escape(name)} ", printed, re.MULTILINE)
