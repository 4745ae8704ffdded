"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, width of memory accesses.

    python -m tools.aot [--output FILE]

The launches are those that the backend itself makes: its host code runs with kernels that only record their arguments,
over one shape for each row of its table and every dtype, and each recorded launch is compiled ahead of time for every
target. Needs triton and no GPU.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import parser_for

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# One (N, D) for each path through each row of backends.triton.TABLE, and one that needs the unfused tail.
SHAPES = [(16, 384), (16, 768), (32, 384), (32, 768), (128, 384), (128, 768), (4096, 384), (4096, 1024), (64, 4096)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


@dataclass
class Launch:
    """One launch as the host code asked for it."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass
class Compiled:
    """What the compiler made of a launch for one target."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    wide_loads: int  # of 128 bits
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    instructions: int


class _Recorder:
    """Stands in for a kernel: notes each launch and does nothing."""

    def __init__(self, name: str, kernel: Any, launches: list[Launch]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            options: dict[str, int] = {
                key: kwargs.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in kwargs
            }
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            assert set(arguments) == set(self.kernel.arg_names), f"{self.name}: arguments do not match"
            self.launches.append(Launch(self.name, grid, arguments, options))

        return launch


def record(N: int, D: int, dtype: torch.dtype) -> dict[str, list[Launch]]:
    """The launches of each function of the backend on a contiguous (N, D) batch, by name of the function."""
    from isobn_kernels.backends.triton import kernels
    from isobn_kernels.backends.triton.launches import TritonBackend
    from isobn_kernels.state import Options, State

    found: dict[str, list[Launch]] = {}
    x = torch.zeros(N, D, dtype=dtype)
    cov, std, scale = torch.zeros(D, D), torch.zeros(D), torch.ones(D)
    count = torch.zeros((), dtype=torch.int64)
    state, options = State(cov, std, scale, count), Options()
    for function, call in (
        ("train_forward", lambda backend: backend.train_forward(x, state, options)),
        ("compute_scale", lambda backend: backend.compute_scale(state, options)),
        ("apply_scale", lambda backend: backend.apply_scale(x, scale)),
        ("train_backward", lambda backend: backend.train_backward(x, x, state, options)),
    ):
        found[function] = []
        recorders = {name: _Recorder(name, getattr(kernels, name), found[function]) for name in kernels.__all__}
        call(TritonBackend(SimpleNamespace(**recorders)))
    return found


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compiles as the JIT would: tensors are 16-byte aligned, integers of 1 or divisible by 16 are specialised."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from isobn_kernels.backends.triton import kernels

    kernel = getattr(kernels, launch.kernel)
    signature, constexprs, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constexprs[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTER[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constexprs[(index,)] = "constexpr", 1
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launch.options)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    return read(launch.kernel, target, compiled)


def _read_nvidia(kernel: str, target: str, compiled: Any) -> Compiled:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    wide_load = r"ld\.global[.\w]*\.v4\.b32|ld\.global[.\w]*\.v8\.b16|ld\.global[.\w]*\.v2\.b64"
    accesses = _accesses(compiled.asm["ptx"], (wide_load, r"ld\.global"), (r"st\.global[.\w]*\.v4\.b32", r"st\.global"))
    instructions = len(re.findall(r"\n\t(?!\.|//)[@a-z]", compiled.asm["ptx"]))
    spills = int(found["STACK"]) + int(found["LOCAL"])
    return Compiled(kernel, target, int(found["REG"]), spills, compiled.metadata.shared, *accesses, instructions)


def _accesses(text: str, loads: tuple[str, str], stores: tuple[str, str]) -> tuple[int, int, int, int]:
    """Wide loads and others, wide stores and others, by the patterns of wide ones and of all."""
    wide_loads, all_loads, wide_stores, all_stores = (len(re.findall(pattern, text)) for pattern in (*loads, *stores))
    return wide_loads, all_loads - wide_loads, wide_stores, all_stores - wide_stores


def _read_amd(kernel: str, target: str, compiled: Any) -> Compiled:
    text = compiled.asm["amdgcn"]

    def value(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(match.group(1)) if match else 0

    loads, stores = (
        (rf"(?:global|buffer)_{kind}_dwordx4", rf"(?:global|buffer)_{kind}_") for kind in ("load", "store")
    )
    spills = value("vgpr_spill_count") + value("sgpr_spill_count")
    instructions = len(re.findall(r"\n\t[a-z]", text))
    accesses = _accesses(text, loads, stores)
    return Compiled(kernel, target, value("vgpr_count"), spills, compiled.metadata.shared, *accesses, instructions)


def launches(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, int, int, torch.dtype, Launch]]:
    """Every launch at these shapes (N, D), each binary once: the function, N, D and dtype that it was found with."""
    seen = set()
    for N, D in shapes:
        for dtype in DTYPES:
            for function, found in record(N, D, dtype).items():
                for launch in found:
                    values = {
                        name: value.dtype if isinstance(value, Tensor) else value
                        for name, value in launch.arguments.items()
                        if name not in ("N", "chunks", "rows_per_chunk")
                    }
                    key = (launch.kernel, str(values), str(launch.options))
                    if key not in seen:
                        seen.add(key)
                        yield function, N, D, dtype, launch


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("python -m tools.aot", __doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: unset it, the interpreter compiles nothing")
    head = f"{'launch':34} {'kernel':18} {'target':7} {'regs':>5} {'spill':>5} {'shared':>7} "
    head += f"{'ld128':>5} {'ld':>4} {'st128':>5} {'st':>4} {'instr':>6}"
    made = f"triton {importlib.metadata.version('triton')}, torch {torch.__version__}, compiled ahead of time on "
    made += f"{date.today()}, run on no GPU; python -m tools.aot"
    lines = [made, head]
    print(*lines, sep="\n", flush=True)
    for target in args.targets:
        for function, N, D, dtype, launch in launches(SHAPES):
            c = compile_launch(launch, target)
            label = f"{function} {N}x{D} {str(dtype).removeprefix('torch.')}"
            line = f"{label:34} {c.kernel:18} {target:7} {c.registers:5} {c.spills:5} {c.shared:7} "
            line += f"{c.wide_loads:5} {c.narrow_loads:4} {c.wide_stores:5} {c.narrow_stores:4} {c.instructions:6}"
            lines.append(line)
            print(line, flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
