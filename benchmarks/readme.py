"""Writes the README's speed section from the table of results, between the markers that are there.

    python -m benchmarks readme [--table FILE] [--readme FILE]

Whatever stands outside the markers stays. Exit status: 0; 2 if the table or the markers are missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import parser_for, results
from benchmarks.plot import main_lines
from benchmarks.results import Line

BEGIN, END = "<!-- speed: written by `python -m benchmarks readme` -->", "<!-- /speed -->"
# threads (0: the most), N, D, mode
SHOWN = (
    *((0, 32, 384, "forward+backward"), (1, 32, 768, "forward+backward")),
    *((0, 32, 768, mode) for mode in ("forward", "evaluation", "forward+backward")),
    *((0, N, D, "forward+backward") for N, D in ((32, 1024), (256, 1024), (4096, 1024), (32, 2048))),
    *((threads, 32, 4096, "forward+backward") for threads in (1, 0)),
)
OTHERS = {"published": "published, eager", "lean": "lean", "compiled": "torch.compile", "batch_norm": "`F.batch_norm`"}


def amount(line: Line) -> str:
    microseconds = float(line["median_us"])
    if microseconds < 1e4:
        return f"{microseconds:,.0f} us" if microseconds >= 99.5 else f"{microseconds:.1f} us"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e5 else f"{microseconds / 1e3:.0f} ms"


def times(line: Line) -> str:
    ratio = float(line["ratio"])
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x" if ratio >= 0.95 else f"{ratio:.2f}x"


def speed_table(lines: list[Line]) -> str:
    """A row for each of SHOWN that was measured. A provider that was not has a dash."""
    found = {
        (int(line["threads"]), int(line["N"]), int(line["D"]), line["mode"], line["provider"]): line for line in lines
    }
    base, most = lines[0]["base"], max(key[0] for key in found)
    rows = [["N x D", "threads", "pass", f"our `{base}` kernel", *OTHERS.values()], ["---"] * (4 + len(OTHERS))]
    for threads, N, D, mode in SHOWN:
        here = {name: found.get((threads or most, N, D, mode, name)) for name in (base, *OTHERS)}
        if ours := here.pop(base):
            cells = [f"{amount(line)}, {times(line)}" if line else "-" for line in here.values()]
            rows.append([f"{N} x {D}", str(threads or most), mode.replace("+", " + "), amount(ours), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def machine(lines: list[Line]) -> str:
    """What the figures belong to, in a sentence or two."""
    line = max(lines, key=lambda line: line["date"])
    where = f"{line['machine']}, {line['cores']} cores" if line["device"] == "cpu" else line["machine"]
    where += f" ({line['instruction_set']})" if line["device"] == "cpu" and line["instruction_set"] else ""
    commits = sorted({line["commit"][:7] for line in lines})
    commit = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    words = f"float32; {where}, torch {line['torch']}, {line['date'][:10]}, {commit}."
    busy = sorted({line["busy"] for line in lines if line["busy"]})
    return f"{words} The machine was busy: {'; '.join(busy)}." if busy else words


def whole_steps(lines: list[Line]) -> list[str]:
    """A sentence for each model whose training step was timed."""
    found = []
    for mode in sorted({line["mode"] for line in lines if line["mode"].startswith("model ")}):
        here = {line["provider"]: line for line in lines if line["mode"] == mode}
        none = here["none"]
        words = f"Of a training step of a whole model ({mode.removeprefix('model ')}, {none['N']} texts, "
        words += f"D = {none['D']}), {amount(none)} without a normaliser, forward and backward of a normaliser are: "
        shares = {name: float(line["ratio"]) for name, line in here.items() if name.endswith(" alone")}
        words += ", ".join(f"{name.removesuffix(' alone')} {share * 100:.2g} %" for name, share in shares.items())
        found.append(f"{words}.")
    return found


def section(lines: list[Line], table: Path) -> str:
    parts = []
    for device, name in {"cpu": "CPU", "cuda": "GPU"}.items():
        here = main_lines(lines, device)
        steps = [line for line in here if not line["mode"].startswith("model ")]
        if not steps:
            continue
        parts += [f"On a {name}: medians of interleaved rounds in one process; ratios to ours are medians of the ratio "
                  "within a round.", speed_table(steps), machine(here)]  # fmt: skip
        parts += whole_steps(here)
        for figure, words in (("speedup", "Speed-ups"), ("scaling", "Time against N and D")):
            if (table.parent / f"{figure}_{device}.svg").exists():
                parts.append(f"![{words} on a {name}](benchmarks/results/{figure}_{device}.svg)")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("benchmarks readme", __doc__)
    parser.add_argument("--table", type=Path, default=results.TABLE)
    parser.add_argument("--readme", type=Path, default=results.ROOT / "README.md")
    args = parser.parse_args(argv)
    before, begin, rest = args.readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    text = section(results.read(args.table), args.table)
    if not (begin and end):
        print(f"{args.readme} has no lines {BEGIN!r} and {END!r} to write between", file=sys.stderr)
        return 2
    if not text:
        print(f"{args.table} has nothing to show: run `python -m benchmarks run`", file=sys.stderr)
        return 2
    args.readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    print(f"written: {args.readme}")
    return 0
