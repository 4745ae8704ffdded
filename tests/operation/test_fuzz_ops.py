"""The short version of `python -m tools.fuzz_ops`, and what shows that it notices."""

import sys
from pathlib import Path

import pytest
import torch

from isobn_kernels import reference

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools import fuzz_ops

CASES = 400


def test_random_calls(capsys):
    status = fuzz_ops.main(["--cases", str(CASES), "--seed", "1", "--backend", "reference", "cpu"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert f"0 of {2 * CASES} calls" in printed


def test_a_case_is_drawn_from_its_number_alone():
    first, second, other = (fuzz_ops.Drawer(0, number).case() for number in (7, 7, 8))
    assert str(first) == str(second) != str(other)
    assert torch.equal(first.x.nan_to_num(), second.x.nan_to_num())


FAULTS = {
    # What is broken in the reference, and how.
    "scale": ("scale_of", lambda f: lambda *args: f(*args) * 1.0001),
    "covariance": ("gram", lambda f: lambda y: f(y) * 1.001),
    "one correlation": ("correlation", lambda f: lambda C, sigma: f(C, sigma).tril() * 0.9999 + f(C, sigma).triu(1)),
    "gradient": ("through_statistics", lambda f: lambda *args: f(*args) * 1.01),
    "output": ("apply_scale", lambda f: lambda x, scale: f(x, scale) + 1e-3),
}


@pytest.mark.parametrize(("name", "broken"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_noticed(monkeypatch, capsys, name, broken):
    monkeypatch.setattr(reference, name, broken(getattr(reference, name)))
    assert fuzz_ops.main(["--cases", "60", "--backend", "reference"]) == 1
    assert "--backend reference  # " in capsys.readouterr().out
