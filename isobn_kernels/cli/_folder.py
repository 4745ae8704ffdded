"""A folder for the results of one command, with a manifest of its files and a lock.

`ResultsFolder` writes files of any kind. It lists each of them in the manifest, with a hash of the content. A file is
replaced or removed only if it is listed and its content matches the hash. All other files belong to the user.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from isobn_kernels.cli._errors import CommandError

_MANIFEST = "isobn-manifest.json"
_LOCK = "isobn-manifest.lock"
_MADE_BY = "isobn_kernels"
# Files that the Trainer writes, listed once they are complete. A folder of this name elsewhere belongs to the user.
_SCRATCH = re.compile(r"runs/[^/]+/checkpoint-\d+/.")


class ResultsFolder:
    """The results of one command in ``path``. Names are relative to ``path``, with "/" between their parts.

    A command reserves the names of its files and folders with `claim`. None of them may exist, unless an earlier
    command made it. Each write is atomic and recorded in the manifest, even if the process is killed.

    Every method but `locked` needs the lock. Every method raises CommandError if the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity: dict[str, Any] | None = None  # what the results depend on; None without results
        self.notes: dict[str, str] = {}
        self._claimed: list[str] = []
        self._writing: list[str] = []  # names that a killed process may have left incomplete
        # Name of a file and the hashes that it may have: two while it is being replaced.
        self._files: dict[str, list[str]] = {}
        self._lock: FileLock | None = None

    def locked(self) -> bool:
        """Make the folder, lock it and read its manifest. Returns False if another process has the lock.

        The operating system releases the lock when its process ends, in whatever way.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"--output {self.path}: this folder cannot be made ({error.strerror})") from error
        file = self.path / _LOCK
        if os.path.islink(file) or (os.path.exists(file) and not (file.is_file() and file.stat().st_size == 0)):
            raise CommandError(f"--output {self.path}: {_LOCK} in it is not of this command; give another --output")
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            raise CommandError(f"--output {self.path}: this folder cannot be locked or written ({error})") from error
        self._lock = lock
        try:
            self._read_manifest()
            with self._in_words():
                self._recover()
        except CommandError:
            self.unlock()
            raise
        return True

    def unlock(self) -> None:
        """Release the lock, if this process has it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def differences(self, identity: dict[str, Any]) -> list[str]:
        """The differences between the identity of these results and another one, in words."""
        earlier = self.identity or {}
        differ = [name for name in {**earlier, **identity} if earlier.get(name) != identity.get(name)]
        return [
            f"{name} changed"
            if str(identity.get(name)).startswith(_HASH)
            else f"{name} was {earlier.get(name)}, now {identity.get(name)}"
            for name in differ
        ]

    def check(self, names: Iterable[str]) -> None:
        """Raise CommandError unless these names are free or ours, and all our files are unchanged."""
        foreign = []
        for name in names:
            for folder in Path(name).parents[:-1]:
                if os.path.lexists(self.path / folder) and not (self.path / folder).is_dir():
                    foreign.append(f"{folder} is no folder")
            if name not in self._claimed:
                foreign += [
                    f"{other} exists and is not a result of this command"
                    for other in (name, _part(name), _old(name))
                    if os.path.lexists(self.path / other)
                ]
        for name in self._claimed:
            foreign += self._foreign(name)
        foreign = list(dict.fromkeys(foreign))
        if foreign:
            more = f", and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise CommandError(
                f"--output {self.path}: {'; '.join(foreign[:5])}{more}. Nothing was changed. Move it away to keep it, "
                "or delete it, or give another --output"
            )

    def start(
        self, identity: dict[str, Any], names: Iterable[str], notes: dict[str, str], keep: Collection[str] = ()
    ) -> None:
        """Remove all results except those under the names in ``keep``, and claim these names. Call `check` first."""
        with self._in_words():
            for name in [name for name in self._claimed if name not in keep]:
                self._remove(name)
                self._claimed.remove(name)
        self.identity, self.notes = identity, notes
        self.claim(names)

    def claim(self, names: Iterable[str]) -> None:
        """Reserve names for files or folders. Call `check` first."""
        self._claimed = list(dict.fromkeys([*self._claimed, *names]))
        self._save()

    def owner(self, path: Path) -> str | None:
        """The name under which ``path`` is a result of this folder, or None."""
        place = Path(os.path.realpath(path))
        return next((x for x in self._claimed if place.is_relative_to(os.path.realpath(self.path / x))), None)

    def find(self, pattern: str) -> list[str]:
        """Names of the listed files that exist, by a pattern of `fnmatch`."""
        return [name for name in self._files if fnmatch.fnmatch(name, pattern) and (self.path / name).is_file()]

    def whole(self, name: str) -> bool:
        """Whether files are listed under this name and all of them exist."""
        files = self._listed(name)
        return bool(files) and all((self.path / file).is_file() for file in files)

    def write(self, name: str, fill: Callable[[Path], Any]) -> None:
        """Make or replace the file or folder ``name``. ``fill`` gets a path and writes there.

        Raises:
            CommandError: a file under this name was changed after it was written.
        """
        place, part, old = (self.path / other for other in (name, _part(name), _old(name)))
        with self._in_words():
            self._refuse_foreign(name)
            self._writing = [name]
            self._save()
            _delete(part)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                fill(part)
            except CommandError:
                raise
            except Exception as error:  # libraries report a full disk by exceptions of their own
                _delete(part)
                raise CommandError(f"--output {self.path}: {name} cannot be written ({error})") from error
            self._refuse_foreign(name)  # while this was being written, too
            before = self._listed(name)
            new = {name + file: content_hash(part / file.lstrip("/")) for file in _files_in(part)}
            # List the new files before they exist: if the process is killed here, they are still known as ours.
            for file, content in new.items():
                self._files[file] = [*self._files.get(file, []), content]
            self._save()
            if place.is_dir():
                place.rename(old)
            part.replace(place)
            self._discard_old(name)
            for file in before:
                self._files.pop(file)
            self._files |= {file: [content] for file, content in new.items()}
            self._writing = []
        self._save()

    def record(self, name: str) -> None:
        """List the files that another library has written into the folder ``name``."""
        with self._in_words():
            for file in _files_in(self.path / name):
                self._files[name + file] = [content_hash(self.path / (name + file))]
        self._save()

    def remove(self, name: str) -> None:
        """Remove the listed files under ``name``, and only these."""
        with self._in_words():
            self._remove(name)
        self._save()

    def _remove(self, name: str) -> None:
        listed = self._listed(name)
        # An interrupted checkpoint has files of the same names as a complete one.
        scratch = {Path(file).name for file in self._files if _SCRATCH.match(file)}
        for file in _files_in(self.path / name):
            whole, place = name + file, self.path / (name + file)
            ours = self._is_ours(whole) if whole in listed else _SCRATCH.match(whole) and place.name in scratch
            if ours:
                place.unlink()
        _remove_empty(self.path / name)
        _delete(self.path / _part(name))
        self._discard_old(name)
        for file in listed:
            self._files.pop(file)

    def _discard_old(self, name: str) -> None:
        """Remove the listed files of the replaced folder. A user may have put other files there."""
        old = self.path / _old(name)
        for file in self._listed(name):
            (old / file[len(name) + 1 :] if file != name else old).unlink(missing_ok=True)
        _remove_empty(old)

    def _is_ours(self, file: str) -> bool:
        """Whether a listed file is unchanged."""
        place = self.path / file
        return not place.is_symlink() and content_hash(place) in self._files[file]

    def _listed(self, name: str) -> list[str]:
        return [file for file in self._files if file == name or file.startswith(f"{name}/")]

    def _foreign(self, name: str) -> list[str]:
        """Files under ``name`` that are not listed, or changed after they were written; in words."""
        found = []
        for file in _files_in(self.path / name):
            if name + file not in self._files:
                if not _SCRATCH.match(name + file):
                    found.append(f"{name + file} exists and is not a result of this command")
            elif not self._is_ours(name + file):
                found.append(f"{name + file} has changed since this command wrote it")
        return found

    def _refuse_foreign(self, name: str) -> None:
        foreign = self._foreign(name)
        if foreign:
            raise CommandError(
                f"--output {self.path}: {'; '.join(foreign[:5])}. It was left as it is, and the finished runs are "
                "kept: move it away, and go on with --resume"
            )

    def _recover(self) -> None:
        """Undo the incomplete writes of a killed process."""
        _delete(self.path / _part(_MANIFEST))
        for name in dict.fromkeys([*self._claimed, *self._writing]):
            if not os.path.lexists(self.path / name) and os.path.lexists(self.path / _old(name)):
                (self.path / _old(name)).rename(self.path / name)
            _delete(self.path / _part(name))
            self._discard_old(name)

    def _read_manifest(self) -> None:
        file = self.path / _MANIFEST
        self.identity, self.notes, self._claimed, self._writing, self._files = None, {}, [], [], {}
        if not os.path.lexists(file):
            return
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            if manifest["made_by"] != _MADE_BY:
                raise ValueError("it is someone else's")
            self.identity, self.notes = dict(manifest["identity"]), dict(manifest["notes"])
            self._claimed = [_inside(name) for name in manifest["claimed"]]
            self._writing = [_inside(name) for name in manifest["writing"]]
            self._files = {_inside(name): [str(x) for x in hashes] for name, hashes in manifest["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.identity, self.notes, self._claimed, self._writing, self._files = None, {}, [], [], {}
            raise CommandError(
                f"--output {self.path}: {_MANIFEST}, which lists the results in this folder, cannot be read "
                f"({type(error).__name__}: {error}): cut short, or no manifest of this command. Nothing was changed. "
                "Give another --output, or move this folder away"
            ) from error

    def _save(self) -> None:
        manifest = {
            "made_by": _MADE_BY,
            "identity": self.identity or {},
            "notes": self.notes,
            "claimed": self._claimed,
            "writing": self._writing,
            "files": self._files,
        }
        part = self.path / _part(_MANIFEST)
        with self._in_words():
            _delete(part)
            with part.open("x", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path / _MANIFEST)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            name = f"{error.filename} " if error.filename else ""
            raise CommandError(
                f"--output {self.path}: {name}cannot be written or removed ({error.strerror or error})"
            ) from error


_HASH = "sha256:"


def content_hash(data: Path | Iterable[Any]) -> str:
    """A hash of a file, or of a series of bytes-like objects."""
    digest = hashlib.sha256()
    if isinstance(data, Path):
        with data.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    else:
        for block in data:
            digest.update(block)
    return _HASH + digest.hexdigest()


def _part(name: str) -> str:
    """The name of an incomplete file. It keeps the suffix, by which libraries choose the format."""
    path = Path(name)
    return path.with_name(f".{path.stem}.isobn-part{path.suffix}").as_posix()


def _old(name: str) -> str:
    """The name of a file or folder that is being replaced."""
    path = Path(name)
    return path.with_name(f".{path.stem}.isobn-old{path.suffix}").as_posix()


def _files_in(path: Path) -> list[str]:
    """Paths of all files and links in a folder, as suffixes of ``path``; [""] if ``path`` is a file."""
    if os.path.islink(path) or os.path.isfile(path):
        return [""]
    found = []
    for folder, folders, files in os.walk(path):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [f"/{(Path(folder) / name).relative_to(path).as_posix()}" for name in [*files, *links]]
    return sorted(found)


def _inside(name: Any) -> str:
    """The name, if it lies within the folder."""
    if not isinstance(name, str) or name.startswith("/") or ".." in Path(name).parts or not Path(name).parts:
        raise ValueError(f"{name!r} is no name within this folder")
    return name


def _delete(path: Path) -> None:
    """Delete a file or folder of our own, by one of the names above."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(path: Path) -> None:
    """Remove the empty folders in a folder, and the folder itself if it is then empty."""
    if not path.is_dir() or path.is_symlink():
        return
    for folder, _, _ in os.walk(path, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)
