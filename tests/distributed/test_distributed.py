"""Statistics across ranks, on several processes of this machine: the checks of `distributed_worker.py`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from filelock import FileLock
from helpers import batch, fresh

from isobn_kernels import IsoBN

WORKER = Path(distributed_worker.__file__)
HANGS = 3600  # seconds after which ranks that wait for each other are ended: many times what a busy machine takes
CHECKS = [(ranks, name) for name, (worlds, _) in distributed_worker.CHECKS.items() for ranks in worlds]


def torchrun(ranks, folder, what):
    """(exit status, output) of `ranks` processes that run the worker; all are gone when this returns."""
    folder.mkdir(exist_ok=True)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [sys.executable, *words, str(WORKER), str(folder), what],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"\n{ranks} ranks still ran {what!r} after {HANGS} s"
    return process.returncode, output


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """The folder of the one run of all checks on so many ranks, which the processes of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def folder_of(ranks):
        folder = base / f"{ranks}-ranks"
        with FileLock(base / f"{ranks}-ranks.lock"):
            if not (folder / "run.json").exists():
                (folder / "run.json").write_text(json.dumps(torchrun(ranks, folder, "all")))
        return folder

    return folder_of


@pytest.mark.parametrize(("ranks", "check"), CHECKS)
def test_check(ranks, check, run_of):
    for rank in range(ranks):
        report = run_of(ranks) / f"rank{rank}.jsonl"
        done = dict(map(json.loads, report.read_text().splitlines())) if report.exists() else {}
        output = json.loads((run_of(ranks) / "run.json").read_text())[1]
        assert check in done, f"rank {rank} did not get to it\n{output[-5000:]}"
        assert done[check] is None, f"rank {rank}:\n{done[check]}"


@pytest.mark.parametrize("ranks", sorted({ranks for ranks, _ in CHECKS}))
def test_all_ranks_end(ranks, run_of):
    status, output = json.loads((run_of(ranks) / "run.json").read_text())
    assert status == 0, output


def test_checkpoint_of_two_ranks_continues_on_one(run_of):
    D = distributed_worker.D
    layer = IsoBN(D, bias_correction=True)
    layer.load_state_dict(torch.load(run_of(2) / "two_ranks.pt"))
    alone = distributed_worker.Alone(fresh(D))
    for step in range(10):
        x = batch(10, D, seed=step)
        if step >= 5:
            layer(x)
        alone.train(x, bias_correction=True)
    alone.check(distributed_worker.state_of(layer))


def test_a_rank_that_dies_ends_the_run(tmp_path):
    status, output = torchrun(2, tmp_path / "out", "die")
    assert status != 0
    assert "exitcode  : 3" in output


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, {torch.cuda.device_count()} found")
def test_two_gpus(tmp_path):
    status, output = torchrun(2, tmp_path / "out", "nccl")
    assert status == 0, output
