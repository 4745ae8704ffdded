"""``info``: what this installation can do, what it cannot, and why. Needs nothing but torch."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import isobn_kernels
from isobn_kernels import backends
from isobn_kernels.cli import demo, finetune
from isobn_kernels.cli._errors import missing_modules

_EXTRAS = {
    "finetune": (*finetune.MODULES, *finetune.TOKENIZER_MODULES),
    "demo": demo.MODULES,
    "sentence-transformers": ("accelerate", "datasets", "sentence_transformers"),
}
_VARIABLES = {
    "ISOBN_BACKEND": 'the backend that "auto" means',
    "ISOBN_CPU_ISA": "instruction set of the cpu backend",
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    text = "Show versions, backends and why one is unavailable, instruction set, threads and environment variables."
    parser = commands.add_parser("info", help="what this installation can do, and what is missing", description=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    sections: list[tuple[str, dict[str, str]]] = [
        (f"isobn_kernels {version()}", _environment()),
        ("backends, fastest first", _backends()),
        ("compiled extension for CPUs", _extension()),
        ("compiled extension for NVIDIA GPUs", _cuda_extension()),
        ("extras", _extras()),
        (
            "environment variables",
            {f"{name} ({text})": os.environ.get(name, "not set") for name, text in _VARIABLES.items()},
        ),
    ]
    print("\n\n".join(_section(title, lines) for title, lines in sections))


def _section(title: str, lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in lines.items())])


def version() -> str:
    """The version of this package, in words where it is not installed."""
    try:
        return importlib.metadata.version("isobn_kernels")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: running from its source folder)"


def _environment() -> dict[str, str]:
    return {
        "location": str(Path(isobn_kernels.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads) of {os.cpu_count()} processors",
    }


def _backends() -> dict[str, str]:
    reasons = {name: backends.load(name).unavailable_reason() for name in backends.NAMES}
    return {name: "available" if reason is None else f"unavailable: {reason}" for name, reason in reasons.items()}


def _extension() -> dict[str, str]:
    try:
        extension = importlib.import_module("isobn_kernels._C")
    except ImportError as error:
        return {"isobn_kernels._C": f"missing ({error}); above, the cpu backend says how to get it"}
    # The extension keeps its default where another one was asked for and refused; nothing runs with it then.
    unavailable = backends.load("cpu").unavailable_reason() is not None
    return {
        "isobn_kernels._C": str(extension.__file__),
        "instruction set": "none in use: the cpu backend is unavailable"
        if unavailable
        else extension.instruction_set(),
        "of this processor": ", ".join(extension.instruction_sets()),
        **extension.build_info(),
    }


def _cuda_extension() -> dict[str, str]:
    try:
        extension = importlib.import_module("isobn_kernels._cuda")
    except ImportError as error:
        return {"isobn_kernels._cuda": f"missing ({error}); above, the cuda backend says how to get it"}
    lines = {"isobn_kernels._cuda": str(extension.__file__), **extension.build_info()}
    cuda = backends.load("cuda")
    if cuda.unavailable_reason() is None:
        for device in range(torch.cuda.device_count()):
            reason = cuda.unsupported_reason(torch.empty(0, 1, device=f"cuda:{device}"))
            lines[f"cuda:{device}"] = f"{torch.cuda.get_device_name(device)}: {reason or 'runs its kernels'}"
    return lines


def _extras() -> dict[str, str]:
    lines = {}
    for extra, modules in _EXTRAS.items():
        missing = missing_modules(modules)
        lines[extra] = f'missing {", ".join(missing)}: pip install "isobn_kernels[{extra}]"' if missing else "installed"
    return lines
