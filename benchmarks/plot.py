"""Draws the table of results: speed-ups as bars, and time against N and against D with the floor in it.

    python -m benchmarks plot [--table FILE]

Writes speedup_DEVICE.svg and scaling_DEVICE.svg, one pair for each device in the table, beside it: of forward and
backward in float32, with the most threads measured, by the wall clock. Ratios are medians over rounds, not ratios of
medians. The floor is what a large copy of as many bytes as a step cannot do without would take, or a large matrix
product of as many operations, whichever is longer, at the rates measured in the same run. It is PyTorch's floor: a
kernel whose product is faster than PyTorch's own (as ours is on AMD's processors) goes below it.

Exit status: 0; 2 if the table has nothing to draw.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import parser_for, results
from benchmarks.results import Line

MODE, DTYPE, CLOCK = "forward+backward", "float32", "wall"
BARS = ("published", "lean", "compiled", "batch_norm")
COLOURS = {"published": "tab:red", "lean": "tab:orange", "compiled": "tab:purple", "batch_norm": "tab:gray"}
AT_N, AT_D = 32, 768  # fixed while the other varies


def main_lines(lines: list[Line], device: str) -> list[Line]:
    """Those that are drawn and shown in the README: of one machine, the one measured last."""
    drawn = (device, DTYPE, CLOCK)
    found = [line for line in lines if (line["device"], line["dtype"], line["clock"]) == drawn and line["median_us"]]
    last = max(found, key=lambda line: line["date"], default=None)
    return [line for line in found if last and line["machine"] == last["machine"]]


def shape_of(line: Line) -> tuple[int, int]:
    return int(line["N"]), int(line["D"])


def floor_us(line: Line) -> float:
    """Microseconds of a forward and backward at the rates of the same run, if nothing were done that need not be.

    Two batches are read and two written, the upper triangle of C is read and C written, and half of y^T y computed.
    """
    N, D = shape_of(line)
    moved = 4 * (4 * N * D + D * (D + 1) / 2 + D * D)  # bytes
    computed = N * D * (D + 1)
    return max(moved / float(line["copy_gb_s"]), computed / float(line["matmul_gflop_s"])) / 1e3


def draw_speedups(plt: Any, lines: list[Line]) -> Any:
    ratios = {(shape_of(line), line["provider"]): float(line["ratio"]) for line in lines}
    shapes = sorted({shape for shape, _ in ratios if shape[0] == AT_N or shape[1] == AT_D}, key=lambda s: (s[1], s[0]))
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(BARS)
    for i, name in enumerate(BARS):
        here = {k: ratios[shape, name] for k, shape in enumerate(shapes) if (shape, name) in ratios}
        places = [k + (i - (len(BARS) - 1) / 2) * width for k in here]
        axes.bar(places, here.values(), width, label=name, color=COLOURS[name])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), ["{}x{}".format(*shape) for shape in shapes], rotation=45, ha="right")
    axes.set(yscale="log", ylabel=f"time / time of our {lines[0]['base']} kernel")
    axes.set_title(f"forward + backward on {lines[0]['machine']}: above 1, ours is faster")
    axes.legend()
    return figure


def draw_scaling(plt: Any, lines: list[Line]) -> Any:
    base = lines[0]["base"]
    figure, pair = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for axes, varies in zip(pair, (0, 1), strict=True):
        here = sorted(
            (line for line in lines if shape_of(line)[1 - varies] == (AT_N, AT_D)[1 - varies]),
            key=lambda line: shape_of(line)[varies],
        )
        for name in (*BARS, base):
            of = [line for line in here if line["provider"] == name]
            places, colour = [shape_of(line)[varies] for line in of], COLOURS.get(name, "tab:blue")
            q1, median, q3 = ([float(line[column]) for line in of] for column in ("q1_us", "median_us", "q3_us"))
            axes.plot(places, median, "o-", markersize=3, label=name, color=colour)
            axes.fill_between(places, q1, q3, alpha=0.2, color=colour, linewidth=0)
            if name == base:
                axes.plot(places, list(map(floor_us, of)), "k:", label="at the rate of PyTorch's copy and matmul")
        axes.set(xscale="log", yscale="log", xlabel="ND"[varies], title=(f"D = {AT_D}", f"N = {AT_N}")[varies])
        sizes = sorted({shape_of(line)[varies] for line in here})
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    pair[0].set_ylabel("microseconds, quartiles shaded")
    pair[1].legend(loc="upper left", fontsize="small")
    figure.suptitle(f"forward + backward on {lines[0]['machine']}")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("benchmarks plot", __doc__)
    parser.add_argument("--table", type=Path, default=results.TABLE)
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ModuleNotFoundError:
        print('plot needs matplotlib: pip install ".[finetune]"', file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in results.read(args.table) if line["mode"] == MODE]
    if not any(main_lines(lines, device) for device in ("cpu", "cuda")):
        print(f"{args.table} has no row of {MODE} in {DTYPE} by the {CLOCK} clock: run `python -m benchmarks run`",
              file=sys.stderr)  # fmt: skip
        return 2
    for device in ("cpu", "cuda"):
        here = main_lines(lines, device)
        most = max((line["threads"] for line in here), key=int, default="")
        here = [line for line in here if line["threads"] == most]
        for name, draw in (("speedup", draw_speedups), ("scaling", draw_scaling)) if here else ():
            path = args.table.parent / f"{name}_{device}.svg"
            with matplotlib.rc_context({"svg.hashsalt": "isobn"}):  # the same bytes from the same table
                draw(plt, here).savefig(path, metadata={"Date": None})
            plt.close("all")
            print(f"written: {path}")
    return 0
