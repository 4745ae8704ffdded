"""Times our kernels as they are in two commits, interleaved, on this machine.

    python -m benchmarks compare HEAD~1 HEAD
    python -m benchmarks compare v0.1.0 HEAD --shapes 32x4096 --device cuda --backend triton

Builds each commit in a temporary git worktree and runs each in a process of its own. A round takes a sample of both,
one right after the other and in turns first; the ratio is B's time over A's within a round. Processes differ by a few
per cent though they run the same code (where their memory lies), so that the pair is started anew several times. A
verdict is given only where the quartiles of all rounds lie on one side of 1 and the median of each pair of processes
does, too.

What is not committed is not seen. Exit status: 0; 1 if a commit does not build or gives wrong results; 2 if an argument
is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import parser_for, results
from benchmarks.clocks import Quartiles, Sampler, paired_ratio, quartiles, settle_allocator, wall
from benchmarks.providers import draw, gate, in_float64, provider, published_step
from benchmarks.run import call_of, failure, parse_shape

MODES = ("forward", "forward+backward")
SHAPES = [(32, 768), (256, 1024), (32, 4096)]
PAUSE = 0.01  # seconds; threads of one process wait actively for a while, which would slow the other

# The package comes from the commit, the benchmark from here.
SERVE = """
import sys
sys.path.insert(0, sys.argv[1])
import isobn_kernels
sys.path[0] = sys.argv[2]
from benchmarks.compare import serve
serve(*sys.argv[3:])
"""


class Broken(Exception):
    """A commit that cannot be measured, and why."""


# ---- The process of a commit ----


def serve(device: str, dtype: str, backend: str, threads: str) -> None:
    """Answers each line of JSON on stdin with one on stdout: a shape is made ready, a mode is timed."""
    import torch

    import isobn_kernels

    torch.set_num_threads(int(threads))
    if device == "cpu":
        settle_allocator()
    print(json.dumps(str(Path(isobn_kernels.__file__).parents[1])), flush=True)
    samplers: dict[str, Sampler] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, str):
            answer: Any = samplers[request]()
        else:
            try:
                x, dout, start = draw(tuple(request), dtype, device)
                ours = provider(backend, x)
                answer = gate(ours, x, dout, start, in_float64(published_step, x, dout, start))
                samplers = {mode: wall(call_of(mode, ours, x, dout, start)) for mode in MODES}
            except Exception as error:
                answer = failure(error)
        print(json.dumps(answer), flush=True)


@contextlib.contextmanager
def serving(tree: Path, options: list[str]) -> Iterator[Callable[[Any], Any]]:
    """Starts that process, and gives the function that asks it."""
    command = [sys.executable, "-c", SERVE, str(tree), str(results.ROOT), *options]
    with subprocess.Popen(command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def read() -> Any:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise Broken(f"its process ended with status {process.wait()}; see above")
            return json.loads(line)

        def ask(request: Any) -> Any:
            print(json.dumps(request), file=process.stdin, flush=True)
            return read()

        package = read()
        if Path(package) != tree:
            raise Broken(f"took isobn_kernels from {package} rather than from {tree}")
        yield ask


# ---- Builds ----


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=results.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def built(commit: str, device: str) -> Iterator[Path]:
    """A worktree of the commit with the extensions in place, which goes away."""
    with tempfile.TemporaryDirectory(prefix="isobn-compare-") as folder:
        tree = Path(folder).resolve() / "tree"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            print(f"building {commit}", file=sys.stderr, flush=True)
            environment = dict(os.environ)
            if device == "cpu":  # the CUDA kernels are not wanted, and building them for all GPUs takes minutes
                environment.setdefault("ISOBN_CUDA_ARCHS", "90")
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise Broken(f"{commit} does not build:\n{(done.stdout + done.stderr)[-2000:]}")
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


# ---- Comparing ----

Pair = tuple[list[float], list[float]]  # the samples of A and of B, in seconds


def measure(trees: tuple[Path, Path], args: argparse.Namespace) -> dict[tuple[str, str], list[Pair]]:
    """By shape and mode, the samples of each pair of processes."""
    found: dict[tuple[str, str], list[Pair]] = {}
    options = [args.device, args.dtype, args.backend or args.device, str(args.threads)]
    for number in range(args.pairs):
        with contextlib.ExitStack() as stack:
            asks = [stack.enter_context(serving(tree, options)) for tree in trees]
            for shape in args.shapes:
                label = "{}x{}".format(*shape)
                print(f"[pair {number + 1}/{args.pairs}] {label}", file=sys.stderr, flush=True)
                for which, ask in zip("AB", asks, strict=True):
                    wrong = ask(shape)
                    if wrong:
                        raise Broken(f"{which} at {label}: {wrong}")
                for mode in MODES:
                    pair: Pair = ([], [])
                    for i in range(args.rounds):
                        for k in (i % 2, 1 - i % 2):
                            time.sleep(PAUSE)
                            pair[k].append(asks[k](mode))
                    found.setdefault((label, mode), []).append(pair)
    return found


def verdict(pairs: list[Pair]) -> tuple[Quartiles, str]:
    """Quartiles of B's time over A's, and what they allow to say."""
    q1, median, q3 = quartiles([b / a for pair in pairs for a, b in zip(*pair, strict=True)])
    medians = [paired_ratio(b, a)[1] for a, b in pairs]
    words = "no difference shown"
    if q1 > 1 and min(medians) > 1:
        words = f"B is slower, by {(median - 1) * 100:.0f} %"
    if q3 < 1 and max(medians) < 1:
        words = f"B is faster, by {(1 / median - 1) * 100:.0f} %"
    return (q1, median, q3), words


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("benchmarks compare", __doc__)
    add = parser.add_argument
    add("a", metavar="A", help="a commit")
    add("b", metavar="B", help="another")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--backend", help="of isobn_kernels; default: that with the name of the device")
    add("--shapes", type=parse_shape, nargs="+", metavar="NxD", default=SHAPES)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--pairs", type=int, default=6, help="of processes (%(default)s)")
    add("--rounds", type=int, default=20, help="of each pair, for each shape and mode (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.threads, args.pairs) < 1 or args.rounds < 2:
        parser.error("--threads and --pairs must be at least 1, --rounds at least 2")
    try:
        # At once: a branch may move while this runs.
        hashes = [git("rev-parse", "--short", "--verify", f"{name}^{{commit}}") for name in (args.a, args.b)]
        with built(hashes[0], args.device) as tree_a, built(hashes[1], args.device) as tree_b:
            watch = results.Watch()
            found = measure((tree_a, tree_b), args)
    except Broken as error:
        print(error, file=sys.stderr)
        return 1
    lines = [["shape", "mode", "A us", "B us", "B/A [quartiles]", "verdict"]]
    for (label, mode), pairs in found.items():
        (q1, median, q3), words = verdict(pairs)
        times = [f"{statistics.median([s for pair in pairs for s in pair[k]]) * 1e6:.1f}" for k in range(2)]
        lines.append([label, mode, *times, f"{median:.3f} [{q1:.3f}..{q3:.3f}]", words])
    print(f"A: {args.a} ({hashes[0]}), B: {args.b} ({hashes[1]}), {args.device}, {args.dtype}, "
          f"threads: {args.threads}\n\n{results.grid(lines)}\n")  # fmt: skip
    watch.finish()
    return 0
