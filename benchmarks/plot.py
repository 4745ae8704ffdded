"""Draws the table of results: speed-ups as bars, and time against N and against D with the floor in it.

    python -m benchmarks plot [--table FILE] [--output DIR] [--device cpu]

Writes speedup_DEVICE.svg and scaling_DEVICE.svg, one pair for each device in the table, beside it: of forward and
backward in float32, with the most threads measured, by the wall clock. Ratios are medians over rounds, not ratios of
medians. The floor is what a large copy of as many bytes as a step cannot do without would take, or a large matrix
product of as many operations, whichever is longer, at the rates measured in the same run. It is PyTorch's floor: a
kernel whose product is faster than PyTorch's own (as ours is on AMD's processors) goes below it.

Exit status: 0; 2 if the table has nothing to draw.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import results
from benchmarks.results import Line

MODE, DTYPE, CLOCK = "forward+backward", "float32", "wall"
BARS = ("published", "lean", "compiled", "batch_norm")
COLOURS = {"published": "tab:red", "lean": "tab:orange", "compiled": "tab:purple", "batch_norm": "tab:gray"}
AT_N, AT_D = 32, 768  # fixed while the other varies


def main_lines(lines: list[Line], device: str) -> list[Line]:
    """Those that are drawn and shown in the README: of one machine, the one measured last."""
    found = [
        line
        for line in lines
        if line["status"] == "ok" and (line["device"], line["dtype"], line["clock"]) == (device, DTYPE, CLOCK)
    ]
    last = max(found, key=lambda line: line["date"], default=None)
    return [line for line in found if last and line["machine"] == last["machine"]]


def with_most_threads(lines: list[Line]) -> list[Line]:
    most = max((int(line["threads"]) for line in lines), default=0)
    return [line for line in lines if int(line["threads"]) == most]


def shape_of(line: Line) -> tuple[int, int]:
    return int(line["N"]), int(line["D"])


def floor_us(line: Line) -> float:
    """Microseconds that the machine needs at least, by the rates of the same run; 0 where they are not known."""
    if not line["copy_gb_s"]:
        return 0.0
    moved = float(line["floor_bytes"]) / float(line["copy_gb_s"]) / 1e3
    computed = float(line["floor_flop"]) / float(line["matmul_gflop_s"]) / 1e3
    return max(moved, computed)


def draw_speedups(lines: list[Line], path: Path) -> None:
    import matplotlib.pyplot as plt

    base = lines[0]["base"]
    ratios = {(shape_of(line), line["provider"]): float(line["ratio"]) for line in lines if line["ratio"]}
    shapes = sorted({shape for shape, _ in ratios if shape[0] == AT_N or shape[1] == AT_D}, key=lambda s: (s[1], s[0]))
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(BARS)
    for i, name in enumerate(BARS):
        here = [(k, ratios[shape, name]) for k, shape in enumerate(shapes) if (shape, name) in ratios]
        places = [k + (i - (len(BARS) - 1) / 2) * width for k, _ in here]
        axes.bar(places, [ratio for _, ratio in here], width, label=name, color=COLOURS[name])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), ["{}x{}".format(*shape) for shape in shapes], rotation=45, ha="right")
    axes.set_ylabel(f"time / time of our {base} kernel")
    axes.set_title(f"forward + backward on {lines[0]['machine']}: above 1, ours is faster")
    axes.legend()
    save(figure, path)


def draw_scaling(lines: list[Line], path: Path) -> None:
    import matplotlib.pyplot as plt

    base = lines[0]["base"]
    figure, pair = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for axes, varies, keep in (
        (pair[0], 0, lambda line: shape_of(line)[1] == AT_D),
        (pair[1], 1, lambda line: shape_of(line)[0] == AT_N),
    ):
        of = list(filter(keep, lines))
        for name in (*BARS, base):
            curve(axes, [line for line in of if line["provider"] == name], varies, name)
        floors = sorted((shape_of(line)[varies], floor_us(line)) for line in of if line["provider"] == base)
        if floors and floors[0][1]:
            axes.plot(*zip(*floors, strict=True), "k:", label="at the rate of PyTorch's copy and matmul")
        axes.set(xscale="log", yscale="log", xlabel="N" if varies == 0 else "D")
        sizes = sorted({shape_of(line)[varies] for line in of})
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes.minorticks_off()
        axes.set_title(f"D = {AT_D}" if varies == 0 else f"N = {AT_N}")
        axes.grid(alpha=0.3)
    pair[0].set_ylabel("microseconds, quartiles shaded")
    pair[1].legend(loc="upper left", fontsize="small")
    figure.suptitle(f"forward + backward on {lines[0]['machine']}")
    save(figure, path)


def curve(axes: object, lines: list[Line], varies: int, name: str) -> None:
    points = sorted(
        (shape_of(line)[varies], *(float(line[k]) for k in ("q1_us", "median_us", "q3_us"))) for line in lines
    )
    if points:
        places, q1, median, q3 = zip(*points, strict=True)
        colour = COLOURS.get(name, "tab:blue")
        axes.plot(places, median, "o-", markersize=3, label=name, color=colour)  # type: ignore[attr-defined]
        axes.fill_between(places, q1, q3, alpha=0.2, color=colour, linewidth=0)  # type: ignore[attr-defined]


def save(figure: object, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "isobn"}):  # the same bytes from the same table
        figure.savefig(path, metadata={"Date": None})  # type: ignore[attr-defined]
    print(f"written: {path}")


def main(argv: list[str] | None = None) -> int:
    title, details = str(__doc__).split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks plot", description=title, epilog=details, formatter_class=formatter)
    parser.add_argument("--table", type=Path, default=results.TABLE)
    parser.add_argument("--output", type=Path, help="folder; default: that of the table")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: both, where the table has both")
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ModuleNotFoundError:
        print('plot needs matplotlib: pip install ".[finetune]"', file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    output = args.output or args.table.parent
    output.mkdir(parents=True, exist_ok=True)
    lines = results.read(args.table)
    figures: dict[str, Callable[[list[Line], Path], None]] = {"speedup": draw_speedups, "scaling": draw_scaling}
    drawn = 0
    for device in (args.device,) if args.device else ("cpu", "cuda"):
        here = with_most_threads([line for line in main_lines(lines, device) if line["mode"] == MODE])
        for name, draw in figures.items() if here else ():
            draw(here, output / f"{name}_{device}.svg")
            drawn += 1
    if not drawn:
        print(f"{args.table} has no row of {MODE} in {DTYPE} by the {CLOCK} clock: run `python -m benchmarks run`",
              file=sys.stderr)  # fmt: skip
        return 2
    return 0
