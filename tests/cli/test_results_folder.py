"""The folder of a command's results: what it makes, what it leaves alone, and what is left of it when it is killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isobn_kernels.cli import _folder
from isobn_kernels.cli._errors import CommandError
from isobn_kernels.cli._folder import ResultsFolder

NAMES = ["table.md", "model", "runs/a"]


def opened(path: Path) -> ResultsFolder:
    folder = ResultsFolder(path)
    assert folder.locked()
    return folder


def fill_model(version: str, more: tuple[str, ...] = ()):
    def fill(place: Path) -> None:
        place.mkdir()
        for name in ("config.json", "weights.bin", *more):
            (place / name).write_text(f"{name} {version}")

    return fill


def fill_results(folder: ResultsFolder, version: str) -> None:
    folder.write("table.md", lambda place: place.write_text(f"table {version}"))
    folder.write("model", fill_model(version))
    folder.write("runs/a/run.json", lambda place: place.write_text(f"run {version}"))
    checkpoint = folder.path / "runs/a/checkpoint-4"
    checkpoint.mkdir(exist_ok=True)
    for name in ("state.json", "weights.bin"):
        (checkpoint / name).write_text(f"{name} {version}")
    folder.record("runs/a/checkpoint-4")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with the results of a command."""
    folder = opened(tmp_path / "out")
    folder.check(NAMES)
    folder.start({"--epochs": 1}, NAMES, {})
    fill_results(folder, "1")
    folder.unlock()
    return folder.path


def contents(path: Path) -> dict[str, str]:
    names = ("isobn-manifest.json", "isobn-manifest.lock")
    return {
        str(file.relative_to(path)): file.read_text()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in names
    }


@pytest.mark.parametrize(
    "mine",
    [
        "notes.txt",
        "runs/other/log",
        "model.old/weights.bin",
        "model.part/x",
        "table.part.md",
        "runs/a-notes",
        ".hidden",
    ],
)
def test_a_new_command_removes_what_is_listed_and_no_more(results: Path, mine: str) -> None:
    (results / mine).parent.mkdir(parents=True, exist_ok=True)
    (results / mine).write_text("mine")
    folder = opened(results)
    folder.check(NAMES)
    folder.start({"--epochs": 2}, NAMES, {})
    assert contents(results) == {mine: "mine"}
    fill_results(folder, "2")
    folder.unlock()
    assert opened(results).identity == {"--epochs": 2}
    assert contents(results)[mine] == "mine"
    assert contents(results)["model/weights.bin"] == "weights.bin 2"


@pytest.mark.parametrize("mine", ["table.md", "model", "model/README.md", "runs", "runs/a/x", "runs/a"])
@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_is_not_listed_is_in_the_way(tmp_path: Path, mine: str, kind: str) -> None:
    place = tmp_path / "out" / mine
    place.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").write_text("mine")
    if kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nothing"))
    folder = opened(tmp_path / "out")
    with pytest.raises(CommandError, match="no folder" if mine == "runs" else "exists and is not a result"):
        folder.check(NAMES)
    assert place.is_symlink() or place.read_text() == "mine"
    assert (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("table.md", "table.md has changed since this command wrote it"),
        ("model/weights.bin", "model/weights.bin has changed since this command wrote it"),
        ("model/README.md", "model/README.md exists and is not a result"),
        ("runs/a/run.json", "runs/a/run.json has changed since this command wrote it"),
        ("runs/a/notes", "runs/a/notes exists and is not a result"),
        ("runs/a/checkpoint-4/weights.bin", "checkpoint-4/weights.bin has changed since this command wrote it"),
    ],
)
def test_what_the_user_changed_or_added_is_theirs(results: Path, name: str, message: str) -> None:
    (results / name).write_text("mine")
    before = contents(results)
    with pytest.raises(CommandError, match=message):
        opened(results).check(NAMES)
    assert contents(results) == before


@pytest.mark.parametrize("name", ["table.md", "model/weights.bin", "model", "runs/a"])
def test_a_link_in_place_of_a_result_is_the_users(results: Path, tmp_path: Path, name: str) -> None:
    """As after moving results to a larger disk: what it points to is not written over."""
    (results / name).rename(tmp_path / "elsewhere")
    (results / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CommandError, match=f"{name} (has changed|exists and is not a result)"):
        opened(results).check(NAMES)


def test_a_file_changed_meanwhile_is_not_replaced(results: Path) -> None:
    folder = opened(results)
    (results / "table.md").write_text("mine")
    (results / "model" / "README.md").write_text("mine")
    for name, fill in (("table.md", lambda place: place.write_text("2")), ("model", fill_model("2"))):
        with pytest.raises(CommandError, match="left as it is"):
            folder.write(name, fill)
    assert contents(results)["table.md"] == contents(results)["model/README.md"] == "mine"


def test_a_file_of_mine_in_a_checkpoint_stays(results: Path) -> None:
    (results / "runs/a/checkpoint-4/notes").write_text("mine")
    (results / "runs/a/checkpoint-8").mkdir()
    (results / "runs/a/checkpoint-8/weights.bin").write_text("cut short")  # by a kill: known by its name
    folder = opened(results)
    folder.check(NAMES)
    folder.start({}, NAMES, {})
    assert contents(results) == {"runs/a/checkpoint-4/notes": "mine"}


class Killed(BaseException):
    pass


def test_killed_at_any_moment(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each change of the disk, while results are replaced: each is the old one or the new one, and is ours."""
    changing = [(Path, "replace"), (Path, "rename"), (Path, "unlink"), (_folder, "_delete"), (_folder.os, "fsync")]
    old = contents(results)
    for last in range(200):
        calls = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > last:  # noqa: B023
                    raise Killed
                return function(*args, **kwargs)

            return call

        folder = opened(results)
        try:
            with monkeypatch.context() as patch:
                for owner, name in changing:
                    patch.setattr(owner, name, counted(getattr(owner, name)))
                folder.write("table.md", lambda place: place.write_text("table 2"))
                folder.write("model", fill_model("2", more=("new.json",)))
        except Killed:
            done = False
        else:
            done = True
        folder.unlock()

        folder = opened(results)
        folder.check(NAMES)
        found = contents(results)
        assert found["table.md"] in ("table 1", "table 2")
        model = {name: text for name, text in found.items() if name.startswith("model/")}
        expected = {name: text for name, text in old.items() if name.startswith("model/")}
        assert model in (expected, {f"model/{n}": f"{n} 2" for n in ("config.json", "weights.bin", "new.json")})
        assert set(found) <= {*old, "model/new.json"}, "something is left behind"
        # Back to the beginning.
        folder.start({"--epochs": 1}, NAMES, {})
        assert contents(results) == {}
        fill_results(folder, "1")
        folder.unlock()
        if done:
            break
    assert done
    assert last > 10


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"made_by": "me"}', "half", "not utf-8", "outside", "nested"])
def test_a_manifest_that_cannot_be_read(results: Path, text: str) -> None:
    manifest = results / "isobn-manifest.json"
    whole = manifest.read_text()
    made = {
        "half": whole[: len(whole) // 2].encode(),
        "not utf-8": b"\xff\xfe",
        "outside": whole.replace('"model/', '"../model/').encode(),
        "nested": b"[" * 100_000,
    }.get(text, text.encode())
    manifest.write_bytes(made)
    before = contents(results)
    with pytest.raises(CommandError, match="cut short, or no manifest"):
        ResultsFolder(results).locked()
    assert contents(results) == before
    assert manifest.read_bytes() == made
    manifest.unlink()
    with pytest.raises(CommandError, match="not a result of this command"):  # nobody knows now whose they are
        opened(results).check(NAMES)


def test_places_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("file", "file/out", "dangling", "x" * 300):
        with pytest.raises(CommandError, match="cannot be made"):
            ResultsFolder(tmp_path / name).locked()
    (tmp_path / "isobn-manifest.lock").write_text("mine")
    with pytest.raises(CommandError, match="not of this command"):
        ResultsFolder(tmp_path).locked()
    assert (tmp_path / "isobn-manifest.lock").read_text() == "mine"


def test_one_at_a_time(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    assert not ResultsFolder(tmp_path).locked()
    folder.unlock()
    folder = opened(tmp_path)
    folder.unlock()


def test_the_lock_of_a_process_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys; from isobn_kernels.cli._folder import ResultsFolder\n"
        "assert ResultsFolder(pathlib.Path(sys.argv[1])).locked(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    source = str(Path(_folder.__file__).parents[2])
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={"PYTHONPATH": source}, check=False)
    assert killed.returncode == -signal.SIGKILL
    opened(tmp_path).unlock()


def test_differences_name_what_changed(results: Path) -> None:
    folder = opened(results)
    folder.identity = {"--epochs": 1, "the training rows": _folder.content_hash([b"a"]), "the version of torch": "2.13"}
    assert folder.differences(json.loads(json.dumps(folder.identity))) == []
    now = {"--epochs": 2, "the training rows": _folder.content_hash([b"b"]), "the number of processes": 2}
    assert folder.differences(now) == [
        "--epochs was 1, now 2",
        "the training rows changed",
        "the version of torch was 2.13, now None",
        "the number of processes was None, now 2",
    ]


@pytest.mark.parametrize("name", ["model/checkpoint-500/weights.bin", "runs/a/checkpoint-10-mine/weights.bin"])
def test_a_checkpoint_of_the_user_stays(results: Path, name: str) -> None:
    """Only what lies in runs/NAME/checkpoint-NUMBER is the Trainer's: training goes on in a saved model, too."""
    (results / name).parent.mkdir(parents=True)
    (results / name).write_text("mine")
    with pytest.raises(CommandError, match="exists and is not a result"):
        opened(results).check(NAMES)
    opened(results).remove(name.split("/checkpoint")[0])
    assert (results / name).read_text() == "mine"
