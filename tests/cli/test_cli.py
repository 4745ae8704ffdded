"""``python -m isobn_kernels``: the commands that need no extra, and how missing ones are reported."""

import subprocess
import sys
from pathlib import Path

import pytest

import isobn_kernels
from isobn_kernels import cli
from isobn_kernels.cli import demo, finetune

OPTIONAL = sorted({*demo.MODULES, "numpy", "sentence_transformers"})


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, in which the optional packages cannot be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
    source = str(Path(isobn_kernels.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", blocked + code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": source, "PATH": "/usr/bin:/bin", **environment},
    )


def test_info_without_extras() -> None:
    process = run_python("from isobn_kernels.cli import main; sys.exit(main(['info']))", ISOBN_BACKEND="reference")
    assert process.returncode == 0, process.stderr
    names = ("isobn_kernels._C", "isobn_kernels._cuda", "ISOBN_CPU_ISA", "ISOBN_BACKEND")
    for text in ("isobn_kernels", "torch", "cpu", "cuda", "reference", "threads", *names):
        assert text in process.stdout
    for extra in ("finetune", "demo", "sentence-transformers"):
        assert f'pip install "isobn_kernels[{extra}]"' in process.stdout
    assert any("ISOBN_BACKEND" in line and line.endswith("reference") for line in process.stdout.splitlines())


def test_info_without_the_extension() -> None:
    code = "sys.modules['isobn_kernels._C'] = None\nfrom isobn_kernels.cli import main; sys.exit(main(['info']))"
    process = run_python(code)
    assert process.returncode == 0, process.stderr
    for text in ("cpu", "unavailable", "missing", "g++", "pip install -e ."):
        assert text in process.stdout


@pytest.mark.parametrize("asked", ["baseline", "sse9"])
def test_info_names_the_instruction_set_in_use(asked: str) -> None:
    """One that cannot be followed turns the cpu backend off: then none is in use, whatever the extension would take."""
    pytest.importorskip("isobn_kernels._C", reason="the compiled extension for CPUs")
    process = run_python("from isobn_kernels.cli import main; sys.exit(main(['info']))", ISOBN_CPU_ISA=asked)
    assert process.returncode == 0, process.stderr
    (line,) = (line for line in process.stdout.splitlines() if line.split()[:2] == ["instruction", "set"])
    expected = {"baseline": "baseline", "sse9": "none in use: the cpu backend is unavailable"}
    assert line.removeprefix("  instruction set").strip() == expected[asked]


def test_info_as_a_module() -> None:
    process = subprocess.run([sys.executable, "-m", "isobn_kernels", "info"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("isobn_kernels")


@pytest.mark.parametrize("command", ["finetune", "demo"])
def test_missing_extra(command: str) -> None:
    arguments = {"finetune": ["--model", "m", "--task", "rte"], "demo": []}[command]
    process = run_python(f"from isobn_kernels.cli import main; sys.exit(main({[command, *arguments]}))")
    assert process.returncode == 2
    assert f'pip install "isobn_kernels[{command}]"' in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("integrations.transformers", "finetune"),
        ("integrations.sentence_transformers", "sentence-transformers"),
        ("isotropy.plots", "finetune"),
    ],
)
def test_optional_modules_name_the_extra(module: str, extra: str) -> None:
    process = run_python(f"import isobn_kernels.isotropy, isobn_kernels.integrations\nimport isobn_kernels.{module}")
    assert "ModuleNotFoundError" in process.stderr
    assert f'pip install "isobn_kernels[{extra}]"' in process.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["info", "--help"], ["demo", "--help"], ["finetune", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == (0 if arguments else 2)
    printed = capsys.readouterr()
    assert "usage" in printed.out + printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "wnli"], "invalid choice"),
        (["--epochs", "0"], "a whole number, 1 or above, got '0'"),
        (["--batch-size", "x"], "a whole number, 1 or above, got 'x'"),
        (["--batch-size", str(2**63)], "a whole number, 2147483647 or below"),
        (["--seeds", "1", "-1"], "a whole number, 0 or above, got '-1'"),
        (["--seeds", "1", str(2**32)], "a whole number, 4294967295 or below"),
        (["--seeds", "9" * 5000], "a whole number, 0 or above"),
        (["--max-dev-samples", "1"], "a whole number, 2 or above, got '1'"),
        (["--learning-rate", "1e999"], "a number above 0, got '1e999'"),
        (["--learning-rate", "nan"], "a number above 0, got 'nan'"),
        (["--normalizer", "layer"], "invalid choice"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--model", "m", *arguments])
    assert message in capsys.readouterr().err


def test_demo_leaves_files_of_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    commands = []
    monkeypatch.setattr(demo, "require_extra", lambda *args: None)
    monkeypatch.setattr(demo, "files", Path)
    monkeypatch.setattr(demo, "_headlines", lambda: [(f"headline {n}", "sport") for n in range(2000)])
    monkeypatch.setattr(finetune, "run", commands.append)
    for _ in range(2):  # its own files are there the second time
        assert cli.main(["demo", "--output", str(tmp_path / "out")]) == 0
    assert len(commands) == 2
    for name in ("train.jsonl", "dev.jsonl"):
        for content in (b"mine", b"\xff"):
            (tmp_path / name).write_bytes(content)
            assert cli.main(["demo", "--output", str(tmp_path)]) == 2
            assert f"--output {tmp_path}: {name}" in capsys.readouterr().err
            assert (tmp_path / name).read_bytes() == content
        (tmp_path / name).unlink()
    (tmp_path / "file").write_text("mine")
    assert cli.main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "this folder cannot be made" in capsys.readouterr().err
    assert len(commands) == 2


def test_tasks_have_known_metrics() -> None:
    assert {metric for task in finetune.TASKS.values() for metric in task.metrics} == {
        "accuracy",
        "f1",
        "matthews_correlation",
        "pearson",
        "spearman",
    }
