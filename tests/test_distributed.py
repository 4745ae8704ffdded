"""Statistics over several processes: gloo, through torchrun. The checks stand in `distributed_worker.py`."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import assert_untouched, batch, warm

from isobn_kernels import IsoBN, isobn

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs a torch with gloo"
)

WORKER = Path(__file__).with_name("distributed_worker.py")


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    source = os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", *launch, str(WORKER), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_all_checks(processes: int, tmp_path: Path) -> None:
    done = torchrun(processes, str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) > 20
    failed = {name: error for name, error in results.items() if error}
    assert not failed, "\n".join(f"{name}, {error}" for name, error in failed.items())


def test_a_rank_that_dies_ends_the_run() -> None:
    """With an error: nobody waits for it for ever."""
    done = torchrun(2, "--die")
    assert done.returncode != 0
    assert "exitcode  : 3" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices for NCCL")
def test_nccl(tmp_path: Path) -> None:
    done = torchrun(2, str(tmp_path), "--cuda")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results.json").read_text()) == {"fifty_steps": None}


@pytest.fixture
def world():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("group", ["gloo", 0, object()], ids=str)
def test_what_is_no_group_is_refused(group) -> None:
    state = warm(7)
    before = state.clone()
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup.*got"):
        isobn(batch(4, 7), **state.tensors, training=True, process_group=group)
    assert_untouched(state, before)
    for build in (lambda: IsoBN(7, process_group=group), lambda: IsoBN.convert_sync_isobn(IsoBN(7), group)):
        with pytest.raises(TypeError, match="process_group must be"):
            build()


def test_conversion_needs_a_group() -> None:
    layer = IsoBN(7)
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group\(\) first"):
        IsoBN.convert_sync_isobn(layer)
    assert layer.process_group is None


def test_destroyed_group(world) -> None:
    layer = IsoBN.convert_sync_isobn(IsoBN(7))
    before = copy.deepcopy(layer.state_dict())
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match=r"process_group .* was destroyed"):
        layer(batch(4, 7))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
    layer.eval()(batch(4, 7))  # asks nobody


def test_pickle_without_a_group() -> None:
    layer = IsoBN(7)
    assert pickle.loads(pickle.dumps(layer)).process_group is None
    assert copy.deepcopy(layer).process_group is None
