"""Times our kernels as they are in two commits, interleaved, on this machine.

    python -m benchmarks compare HEAD~1 HEAD
    python -m benchmarks compare v0.1.0 HEAD --shapes 32x4096 --device cuda

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.clocks import Call, Quartiles, paired_ratio, quartiles, repeats, settle_allocator
from benchmarks.results import ROOT
from benchmarks.run import grid, parse_shape

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


def serve(device: str, dtype: str, threads: str, backend: str) -> None:
    """Answers each line of JSON on stdin with one on stdout: a shape is made ready, a mode is timed."""
    import torch

    import isobn_kernels
    from benchmarks.clocks import synchronized_clock, wall_clock
    from benchmarks.measure import call_of, failure
    from benchmarks.providers import BACKENDS, base_of, draw, exact, gate, usable

    torch.set_num_threads(int(threads))
    if device == "cpu":
        settle_allocator()
    name = base_of(usable(device)[0]) if backend == "fastest" else backend
    clock = wall_clock if device == "cpu" else synchronized_clock
    print(json.dumps({"package": str(Path(isobn_kernels.__file__).parent), "backend": name}), flush=True)
    calls: dict[str, Call] = {}
    times: dict[str, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, str):
            calls[request]()
            answer: Any = clock(calls[request], times[request])
        else:
            try:
                batch, start = draw(tuple(request), dtype, device)
                x, dout = batch().requires_grad_(), batch()
                provider = BACKENDS[name](x)
                answer = gate(provider.train, x, dout, start, exact(x, dout, start), provider.evaluate)
                calls = {mode: call_of(mode, provider, x, dout, start) for mode in MODES}
                for mode in MODES:
                    clock(calls[mode], 1)
                    times[mode] = repeats(clock(calls[mode], 1))
            except Exception as error:
                answer = failure(error)
        print(json.dumps(answer), flush=True)


class Server:
    """Speaks to that process."""

    def __init__(self, tree: Path, options: list[str]) -> None:
        command = [sys.executable, "-c", SERVE, str(tree), str(ROOT), *options]
        self.process = subprocess.Popen(command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello = self.read()
        if Path(self.hello["package"]).parent != tree:
            raise Broken(f"took isobn_kernels from {self.hello['package']} rather than from {tree}")

    def read(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise Broken(f"its process ended with status {self.process.wait()}; see above")
        return json.loads(line)

    def ask(self, request: Any) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


# ---- Builds ----


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
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

Samples = dict[tuple[str, str], list[tuple[list[float], list[float]]]]  # shape and mode: for each pair, A's and B's


def measure(trees: tuple[Path, Path], args: argparse.Namespace) -> tuple[str, Samples]:
    """The backend's name and the samples, in seconds."""
    options = [args.device, args.dtype, str(args.threads), args.backend]
    found: Samples = {}
    backend = ""
    for pair in range(args.pairs):
        with contextlib.ExitStack() as stack:
            servers = []
            for tree in trees:
                servers.append(Server(tree, options))
                stack.callback(servers[-1].close)
            names = [server.hello["backend"] for server in servers]
            if names[0] != names[1]:
                raise Broken(f"the fastest backend is {names[0]} in A and {names[1]} in B: choose one with --backend")
            backend = names[0]
            for shape in args.shapes:
                label = "{}x{}".format(*shape)
                print(f"[pair {pair + 1}/{args.pairs}] {label}", file=sys.stderr, flush=True)
                for which, server in zip("AB", servers, strict=True):
                    wrong = server.ask(shape)
                    if wrong:
                        raise Broken(f"{which} at {label}: {wrong}")
                for mode in MODES:
                    samples: tuple[list[float], list[float]] = ([], [])
                    for i in range(args.rounds):
                        for k in (i % 2, 1 - i % 2):
                            time.sleep(PAUSE)
                            samples[k].append(servers[k].ask(mode))
                    found.setdefault((label, mode), []).append(samples)
    return backend, found


def verdict(pairs: list[tuple[list[float], list[float]]]) -> tuple[Quartiles, str]:
    """Quartiles of B's time over A's, and what they allow to say."""
    ratios = [b / a for samples in pairs for a, b in zip(*samples, strict=True)]
    q1, median, q3 = quartiles(ratios)
    medians = [paired_ratio(b, a)[1] for a, b in pairs]
    if q1 > 1 and min(medians) > 1:
        return (q1, median, q3), f"B is slower, by {(median - 1) * 100:.0f} %"
    if q3 < 1 and max(medians) < 1:
        return (q1, median, q3), f"B is faster, by {(1 / median - 1) * 100:.0f} %"
    return (q1, median, q3), "no difference shown"


def main(argv: list[str] | None = None) -> int:
    title, details = str(__doc__).split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks compare", description=title, epilog=details, formatter_class=formatter)
    add = parser.add_argument
    add("a", metavar="A", help="a commit")
    add("b", metavar="B", help="another")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--backend", default="fastest", help="of isobn_kernels; default: the fastest that can run")
    add("--shapes", type=parse_shape, nargs="+", metavar="NxD", default=SHAPES)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--pairs", type=int, default=6, help="of processes (%(default)s)")
    add("--rounds", type=int, default=20, help="of each pair, for each shape and mode (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.threads, args.pairs, args.rounds) < 1:
        parser.error("--threads, --pairs and --rounds must be at least 1")
    before = os.getloadavg()[0]
    try:
        # At once: a branch may move while this runs.
        hashes = [git("rev-parse", "--short", "--verify", f"{name}^{{commit}}") for name in (args.a, args.b)]
        with built(hashes[0], args.device) as tree_a, built(hashes[1], args.device) as tree_b:
            backend, found = measure((tree_a, tree_b), args)
    except Broken as error:
        print(error, file=sys.stderr)
        return 1
    lines = [["shape", "mode", "A us", "B us", "B/A [quartiles]", "verdict"]]
    for (label, mode), pairs in found.items():
        (q1, median, q3), words = verdict(pairs)
        times = [f"{statistics.median([s for pair in pairs for s in pair[k]]) * 1e6:.1f}" for k in range(2)]
        lines.append([label, mode, *times, f"{median:.3f} [{q1:.3f}..{q3:.3f}]", words])
    print(f"A: {args.a} ({hashes[0]}), B: {args.b} ({hashes[1]}), backend {backend}, {args.device}, {args.dtype}, "
          f"threads: {args.threads}\n\n{grid(lines)}\n")  # fmt: skip
    print(f"load average {before:.2f} before, {os.getloadavg()[0]:.2f} after")
    return 0
