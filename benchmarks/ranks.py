"""What a step across ranks costs, beside the messages that it cannot do without and the step of one process.

    python -m benchmarks ranks [--rounds N]

On CPU processes of this machine that talk over gloo, one thread each. Three figures per shape, each a ratio of two
calls that are timed in turn, round by round, after a barrier: median and quartiles of the ratio, and the fastest times.

one process     a step with a process group of one rank, beside a step without a group
its parts       the parts of a step across ranks with their collectives in a group of one, beside the step without
two processes   a step across two ranks, beside the two bare all-reduces of its sizes and a step without a group
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks import parser_for, results
from benchmarks.clocks import Call, paired_ratio, settle_allocator
from isobn_kernels import backends, isobn
from isobn_kernels.backends.across_ranks import AcrossRanks, world
from isobn_kernels.state import Options, State

SHAPES = ((32, 768), (256, 768))
ROUNDS = 200


def pairs(N: int, D: int) -> dict[tuple[str, str], tuple[Call, Call]]:
    """What is compared on this number of ranks, by name and mode."""
    x, dout = torch.randn(N, D, requires_grad=True), torch.randn(N, D)
    state = State(torch.zeros(D, D), torch.zeros(D), torch.ones(D), torch.zeros((), dtype=torch.int64))
    sums, gram = torch.zeros(1 + D, dtype=torch.float64), torch.zeros(D * (D + 1) // 2)
    backend, options = backends.load("cpu"), Options()
    group = world()

    def step(group: Any) -> torch.Tensor:
        return isobn(x, **state._asdict(), training=True, backend="cpu", process_group=group)

    def beside_messages(call: Call) -> None:
        dist.all_reduce(sums)
        dist.all_reduce(gram)
        call()

    modes: dict[str, Callable[[Call], Call]] = {
        "forward": lambda forward: forward,
        "forward+backward": lambda forward: lambda: torch.autograd.grad(forward(), x, dout),
    }
    found: dict[tuple[str, str], tuple[Call, Call]] = {}
    for mode, of in modes.items():
        across, alone = of(partial(step, group)), of(partial(step, None))
        if dist.get_world_size() == 1:
            found["one process", mode] = across, alone
        else:
            found["two processes", mode] = across, partial(beside_messages, alone)
    if dist.get_world_size() == 1:
        rows = x.detach()
        parts = partial(AcrossRanks(backend, group).train_forward, rows, state, options)
        found["its parts", "forward"] = parts, partial(backend.train_forward, rows, state, options)
    return found


def measure(rank: int, ranks: int, folder: str, rounds: int) -> None:
    """Time every pair on one of the ranks; the first writes the lines of the table."""
    torch.set_num_threads(1)
    settle_allocator()
    dist.init_process_group("gloo", init_method=f"file://{folder}/{ranks}", rank=rank, world_size=ranks)
    lines = []
    for N, D in SHAPES:
        for (what, mode), calls in pairs(N, D).items():
            samples: tuple[list[float], list[float]] = ([], [])
            for i in range(rounds + 5):
                for k in (i % 2, 1 - i % 2):
                    dist.barrier()
                    samples[k].append(timeit(calls[k], number=1) * 1e6)
            across, beside = (times[5:] for times in samples)
            q1, median, q3 = paired_ratio(across, beside)
            fastest = f"{min(across):.0f} / {min(beside):.0f} = {min(across) / min(beside):.2f}"
            lines.append([f"{N}x{D}", what, mode, f"{median:.2f} [{q1:.2f}..{q3:.2f}]", fastest])
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, f"{ranks}.lines").write_text("\n".join("\t".join(line) for line in lines))


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("benchmarks ranks", __doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of each pair (default {ROUNDS})")
    args = parser.parse_args(argv)
    watch = results.Watch()
    lines = [["shape", "what", "mode", "ratio [quartiles]", "fastest, microseconds"]]
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            torch.multiprocessing.spawn(measure, (ranks, folder, args.rounds), nprocs=ranks)
            lines += [line.split("\t") for line in Path(folder, f"{ranks}.lines").read_text().splitlines()]
    print(results.grid(lines))
    watch.finish()
    return 0
