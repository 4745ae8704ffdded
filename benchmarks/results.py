"""The one table of results, benchmarks/results/results.csv, and what its figures belong to: machine, versions, load."""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "results" / "results.csv"
MAX_OTHERS = 0.05  # of the processors' time; above, the machine is busy

# What is measured at once: a later run replaces all of it, whatever its commit.
KEY = ("device", "machine", "threads", "dtype", "N", "D", "mode")
COLUMNS = (
    *KEY,
    *("clock", "provider", "q1_us", "median_us", "q3_us", "base", "ratio_q1", "ratio", "ratio_q3", "rounds"),
    *("operations", "allocations", "peak_bytes", "page_faults", "copy_gb_s", "matmul_gflop_s"),
    *("load_before", "load_after", "busy"),
    *("cores", "instruction_set", "driver", "python", "torch", "cuda", "triton", "commit", "date"),
)

Line = dict[str, str]


def read(path: Path) -> list[Line]:
    """The lines of the table, none where there is no file. Columns of other versions are left out, or empty."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    if lines and not set(KEY) <= set(lines[0]):
        raise ValueError(f"{path} is not a table of results: it has no column {', '.join(set(KEY) - set(lines[0]))}")
    return [{column: line.get(column, "") for column in COLUMNS} for line in lines]


def upsert(path: Path, new: list[dict[str, object]]) -> None:
    """Adds lines to the table, in place of those with the same key, and sorts it."""

    def text(value: object) -> str:
        return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)

    def key(line: Line) -> tuple[str, ...]:
        return tuple(line[column] for column in KEY)

    def order(line: Line) -> tuple[Any, ...]:
        return tuple(int(part) if part.isdecimal() else part for part in (*key(line), line["clock"], line["provider"]))

    lines = [{column: text(values.get(column)) for column in COLUMNS} for values in new]
    replaced = set(map(key, lines))
    lines += [line for line in read(path) if key(line) not in replaced]
    lines.sort(key=order)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def grid(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# ---- What the figures belong to ----


def output_of(*command: str) -> str | None:
    """The first line that a command prints, or None where it fails."""
    try:
        return subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL).splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def commit() -> str:
    """Of the checkout; where it is none, what the environment variable GIT_COMMIT says."""
    found = output_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return found or os.environ.get("GIT_COMMIT", "unknown")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def environment(device: str) -> dict[str, object]:
    """Columns of the table."""
    try:
        instruction_set = importlib.import_module("isobn_kernels._C").instruction_set()
    except (ImportError, AttributeError):
        instruction_set = None
    cuda = device == "cuda"
    return {
        "device": device,
        "machine": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cores": os.cpu_count(),
        "instruction_set": instruction_set,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": next((found.version for found in importlib.metadata.distributions(name="triton")), None),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


class Watch:
    """What else the machine does from here to `finish`.

    The load average is written down only: it still counts what ran a minute before, and a short spell of other work
    hardly moves it. The machine is called busy by the processors' time that others took meanwhile.
    """

    def __init__(self) -> None:
        self.load, self.began, self.others = os.getloadavg()[0], time.monotonic(), self.seconds_of_others()

    @staticmethod
    def seconds_of_others() -> float:
        """Processor time since the start of the machine that neither this process nor its ended children took."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
        everyone = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return everyone - sum(os.times()[:4])

    def finish(self, *more: str) -> dict[str, object]:
        """Columns of the table, printed too. ``more``: further reasons not to trust the figures."""
        after = os.getloadavg()[0]
        elapsed = (time.monotonic() - self.began) * (os.cpu_count() or 1)
        share = (self.seconds_of_others() - self.others) / elapsed
        reasons = list(more)
        if share > MAX_OTHERS:
            reasons.insert(0, f"other processes took {share:.0%} of the processors")
        print(f"load average {self.load:.2f} before, {after:.2f} after; others took {share:.1%} of the processors")
        for reason in reasons:
            print(f"BUSY MACHINE, do not trust these figures: {reason}")
        return {"load_before": self.load, "load_after": after, "busy": "; ".join(reasons)}
