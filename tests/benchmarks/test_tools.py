"""What needs no GPU of the tools for a GPU: how block sizes are chosen, and how the stages of a check are reported."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from isobn_kernels.backends import load
from isobn_kernels.backends.triton import config as triton

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import gpu_check, tune

FIRST, SECOND, THIRD = (triton.Config(block, 16, 4, "ieee") for block in (32, 64, 128))
CELLS = [((8, 12), "float32"), ((16, 12), "float32")]


# ---- tune ----


def test_every_row_of_the_table_has_shapes_that_it_serves():
    found = [tune.cells_of(index) for index in range(len(triton.TABLE))]
    assert all(found)
    assert {shape for cells in found for shape, _ in cells} == set(tune.SHAPES)
    assert {shape for shape, _ in found[0]} == {(8, 384), (16, 384)}


def test_candidates_differ_in_one_number_from_the_present_entry():
    for present in (FIRST, triton.Config(256, 16, 4, "ieee")):
        found = tune.candidates((triton._ANY, 512, present))
        assert found[0] == present
        assert len(set(found)) == len(found) == 1 + (3 if present.block == 256 else 2) + 2 + 2 + 1
    whole = tune.candidates((32, 512, triton.Config(32, 32, 4, "ieee")))
    assert {config.block_n for config in whole} == {32, 64}  # a batch fits one block of rows


def test_a_candidate_is_in_place_for_its_step_only(monkeypatch):
    def our_step(x, state, training, backend):
        assert backend == "triton"
        assert load("triton").settings.config_for(8, 384) is SECOND
        raise RuntimeError("out of shared memory")

    before = load("triton")
    monkeypatch.setattr(tune, "our_step", our_step)
    with pytest.raises(RuntimeError, match="shared memory"):
        tune.step_with(0, SECOND)(None, None, True)
    assert load("triton") is before


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_wrong_and_failing_candidates_are_told(stop_gradient, monkeypatch):
    """The reference in place of the Triton backend, with one candidate right, one wrong, one failing."""

    def our_step(x, state, training, backend, stop_gradient):
        if backend == "triton" and load("triton").settings.config_for(8, 12) is THIRD:
            raise RuntimeError("out of resource: shared memory\nand more")
        forgets = backend == "triton" and load("triton").settings.config_for(8, 12) is SECOND
        out = real(x, state, training, backend="reference", stop_gradient=stop_gradient or forgets)
        return out * 1.001 if forgets and stop_gradient else out

    real = tune.our_step
    monkeypatch.setattr(tune, "our_step", our_step)
    fault = partial(tune.fault_of, 0, cell=CELLS[0], where="cpu", stop_gradient=stop_gradient)
    assert fault(FIRST) is None
    assert fault(SECOND).startswith("out is off by" if stop_gradient else "grad is off by")
    assert fault(THIRD) == "failed: RuntimeError: out of resource: shared memory"


def test_the_ranking_is_by_the_geometric_mean():
    times = {FIRST: (1, 9), SECOND: (4, 4), THIRD: (2, 2)}  # the sums would say third, second, first
    found = tune.ranking({config: dict(zip(CELLS, row, strict=True)) for config, row in times.items()})
    assert list(found) == [THIRD, FIRST, SECOND]
    assert list(found.values()) == pytest.approx([2**0.5, 4.5**0.5, 8**0.5])
    assert tune.ranking({}) == {}


def test_the_fastest_that_is_right_in_both_modes_is_chosen(monkeypatch, capsys):
    wrong = {(THIRD, True): "too large", (SECOND, False): "grad is off"}
    seconds = {FIRST: 3.0, SECOND: 1.0}
    monkeypatch.setattr(tune, "candidates", lambda row: [FIRST, SECOND, THIRD])
    monkeypatch.setattr(
        tune, "fault_of", lambda index, config, cell, where, stop_gradient=True: wrong.get((config, stop_gradient))
    )
    monkeypatch.setattr(tune, "measure", lambda index, cell, configs: {config: seconds[config] for config in configs})
    assert tune.tune(0) == FIRST
    told = capsys.readouterr().out
    assert "too large" in told
    assert "through the statistics at 8x384 float32: grad is off" in told
    wrong[FIRST, False] = "grad is off"
    assert tune.tune(0) is None
    wrong |= {(FIRST, True): "no", (SECOND, True): "no"}
    assert tune.tune(0) is None


def test_the_printed_table_is_the_table():
    for table in (triton.TABLE, ((16, triton._ANY, FIRST), (triton._ANY, 7, triton.Config(64, 32, 8, "tf32x3")))):
        names = {"_ANY": triton._ANY, "Config": triton.Config}
        exec(tune.table_text(table), names)
        assert names["TABLE"] == table
    assert tune.table_text(triton.TABLE) in Path(triton.__file__).read_text()


def test_tuning_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(load("triton"), "unavailable_reason", lambda: "there is none")
    for interpreted in (False, True):
        monkeypatch.setattr(tune, "INTERPRETED", interpreted)
        assert tune.main([]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert "needs a GPU, and changed nothing" in told.err


# ---- gpu_check ----


def test_gpu_check_needs_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([str(tmp_path / "out")]) == 2
    assert "did nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stage_that_fails_does_not_stop_the_next(monkeypatch, tmp_path, capsys):
    def stages(out):
        return {
            "good": (60, [sys.executable, "-c", "import os; print('for', os.environ['ISOBN_CUDA_ARCHS'])"]),
            "bad": (60, [sys.executable, "-c", "print('a line'); raise SystemExit('the reason')"]),
            "slow": (1, [sys.executable, "-c", "import time; time.sleep(60)"]),
            "last": (60, [sys.executable, "-c", "print('done')"]),
        }

    monkeypatch.setenv("ISOBN_CUDA_ARCHS", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check.results, "environment", lambda device: {"machine": "H100", "commit": "abc"})
    monkeypatch.setattr(gpu_check, "stages", stages)
    out = tmp_path / "deep" / "out"
    assert gpu_check.main([str(out)]) == 1
    summary = (out / "summary.txt").read_text()
    assert summary == capsys.readouterr().out
    lines = [line.split() for line in summary.splitlines()]
    assert [line[1] for line in lines if line[0] in stages(out)] == ["ok", "FAILED:", "FAILED:", "ok"]
    for words in (["for", "90"], ["the", "reason"], ["done"], ["machine:", "H100"], ["commit:", "abc"]):
        assert words in lines
    assert "stopped after 1 s" in summary
    assert "a line" in (out / "bad.log").read_text()


def test_the_files_that_the_stages_name_exist(tmp_path):
    words = [word for _, command in gpu_check.stages(tmp_path).values() for word in command]
    for file in (word for word in words if word.endswith(".py")):
        assert (gpu_check.results.ROOT / file).exists()
