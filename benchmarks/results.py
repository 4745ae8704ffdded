"""The one table of results, benchmarks/results/results.csv: a row for each thing measured, replaced by a later run."""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "results" / "results.csv"

# What a row is about. A later run of the same replaces it, whatever its commit.
KEY = ("device", "machine", "threads", "dtype", "N", "D", "mode", "clock", "provider")
VALUES = (
    *("status", "q1_us", "median_us", "q3_us", "base", "ratio_q1", "ratio", "ratio_q3", "rounds"),
    *("operations", "allocations", "peak_bytes", "page_faults"),
    *("floor_bytes", "floor_flop", "percent_of_copy", "percent_of_matmul", "copy_gb_s", "matmul_gflop_s"),
    *("load_before", "load_after", "busy"),
    *("cores", "instruction_set", "driver", "python", "torch", "cuda", "triton", "commit", "date"),
)
COLUMNS = (*KEY, *VALUES)

Line = dict[str, str]


def read(path: Path) -> list[Line]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    unknown = set(lines[0]) ^ set(COLUMNS) if lines else set()
    if unknown:
        raise ValueError(f"{path} has other columns than this version writes ({', '.join(sorted(unknown))}): remove it")
    return lines


def text(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def upsert(path: Path, new: list[dict[str, object]]) -> None:
    """Adds lines to the table, in place of those with the same key, and sorts it."""
    lines = {tuple(line[column] for column in KEY): line for line in read(path)}
    for values in new:
        line = {column: text(values.get(column)) for column in COLUMNS}
        lines[tuple(line[column] for column in KEY)] = line
    # A provider that was timed has no row that says why it was not, and the other way round.
    about = {key[:6] + key[8:]: "all" for key in (tuple(text(v.get(c)) for c in KEY) for v in new) if key[6] == "all"}
    fresh = {tuple(text(values.get(column)) for column in KEY) for values in new}
    fresh_about = {key[:6] + key[8:] for key in fresh}
    kept = {
        key: line
        for key, line in lines.items()
        if key in fresh or not (key[:6] + key[8:] in about or (key[6] == "all" and key[:6] + key[8:] in fresh_about))
    }

    def order(key: tuple[str, ...]) -> tuple[object, ...]:
        return tuple(int(part) if part.isdecimal() else part for part in key)

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[key] for key in sorted(kept, key=order))


def version(module: str) -> str | None:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of the checkout; where it is none, what the environment variable GIT_COMMIT says."""
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.check_output(describe, cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT", "unknown")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def environment(device: str) -> dict[str, object]:
    """What the figures belong to: columns of the table."""
    try:
        instruction_set = importlib.import_module("isobn_kernels._C").instruction_set()
    except (ImportError, AttributeError):
        instruction_set = None
    driver = None
    if device == "cuda":
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.check_output(query, text=True).splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            pass
    return {
        "device": device,
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "instruction_set": instruction_set,
        "driver": driver,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
