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
from helpers import batch, fresh

from isobn_kernels import IsoBN

WORKER = Path(distributed_worker.__file__)


HANGS = 3600  # seconds after which ranks that wait for each other are ended: many times what a busy machine takes


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
        pytest.fail(f"{ranks} ranks still ran {what!r} after {HANGS} s; done: {reports(folder)}\n{output[-5000:]}")
    return process.returncode, output


def reports(folder):
    """{file of a rank: {check: its traceback or None}}."""
    return {
        file.stem: dict(json.loads(line) for line in file.read_text().splitlines())
        for file in sorted(folder.glob("rank*.jsonl"))
    }


def failures(folder, ranks, expected):
    """What went wrong, in words, each with the name of its check."""
    found = reports(folder)
    trouble = [f"{name} on {rank}:\n{text}" for rank, done in found.items() for name, text in done.items() if text]
    for r in range(ranks):
        missing = expected - set(found.get(f"rank{r}", {}))
        if missing:
            trouble.append(f"rank{r} did not get to: {', '.join(sorted(missing))}")
    return "\n\n".join(trouble)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_checks_of_the_worker(ranks, tmp_path):
    status, output = torchrun(ranks, tmp_path / "out", "all")
    expected = {name for name, (worlds, _) in distributed_worker.CHECKS.items() if ranks in worlds}
    trouble = failures(tmp_path / "out", ranks, expected)
    assert not trouble, trouble
    assert status == 0, output
    if ranks == 2:
        a_checkpoint_of_two_ranks_continues_on_one(tmp_path / "out" / "two_ranks.pt")


def a_checkpoint_of_two_ranks_continues_on_one(file):
    D = distributed_worker.D
    layer = IsoBN(D, bias_correction=True)
    layer.load_state_dict(torch.load(file))
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
