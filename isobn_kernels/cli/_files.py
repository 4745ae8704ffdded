"""Data files, read as they are: CSV, TSV and JSON into columns, or an error that shows the row."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from isobn_kernels.cli._errors import CommandError


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()  # what stands in a column where an object of a JSON file has no such key


@dataclass(frozen=True)
class Table:
    """Named columns of equal length. The values of an untyped one are all text: a CSV file knows no other."""

    name: str
    columns: dict[str, list[Any]]
    typed: bool

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def row(self, number: int) -> str:
        """Row ``number``, counted from 1, for a message."""
        return shown({name: column[number - 1] for name, column in self.columns.items()})


def read_table(path: Path) -> Table:
    """Read a file by its ending: .csv, .tsv, .json or .jsonl; the last two hold an object a line, or one array.

    In a TSV file a line is a row and a quotation mark is a character, as in those of GLUE.

    Raises:
        CommandError: the file cannot be read, or a row of it is not what the header or the format says.
    """
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise CommandError(f"{path}: expected a file ending in {', '.join(_READERS)}")
    # Not path.exists(), which raises an error where the name is too long.
    if not os.path.exists(path):
        raise CommandError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise CommandError(f"{path}: not a file; expected one ending in {', '.join(_READERS)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CommandError(f"{path}: cannot be read ({error.strerror})") from error
    if not content:
        raise CommandError(f"{path}: the file is empty")
    try:
        text = content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        shown_line = content.split(b"\n")[line - 1]
        raise CommandError(
            f"{path}: line {line} is not UTF-8 ({error.reason}): {shown(shown_line)}. Save the file in UTF-8"
        ) from error
    return Table(str(path), _READERS[kind](text, str(path), kind), typed=kind not in _DIALECTS)


def shown(value: Any) -> str:
    """``repr(value)``, cut to what a message can hold."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


# strict: a quotation mark in the wrong place is an error, and not something to guess about.
_DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ",", "strict": True},
    ".tsv": {"delimiter": "\t", "strict": True, "quoting": csv.QUOTE_NONE},
}
_QUOTING = {
    ".csv": "Put a text that holds a comma, a line break or a quotation mark into quotation marks, and double those "
    "within it",
    ".tsv": "A text in a .tsv file holds no tab and no line break; a .csv file takes them in quotation marks",
}


def _read_separated(text: str, name: str, kind: str) -> dict[str, list[Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), **_DIALECTS[kind])
    rows: list[list[str]] = []
    lines: list[int] = []  # on which each row begins
    line = 1
    before = csv.field_size_limit(len(text) + 1)  # of this process; the usual one is shorter than some articles
    try:
        for row in reader:
            if row:  # else the line is blank
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        start = next(text for number, text in enumerate(io.StringIO(text, newline=""), start=1) if number == line)
        raise CommandError(
            f"{name}: cannot be read as {kind[1:]}: {f'row {len(rows)}' if rows else 'the header'}, on line {line}, "
            f"begins {shown(start.rstrip())} ({error}). {_QUOTING[kind]}"
        ) from error
    finally:
        csv.field_size_limit(before)
    header, *body = rows or [[]]
    doubled = [column for column, count in Counter(header).items() if count > 1 and column]
    if doubled:
        raise CommandError(f"{name}: the header names {shown(doubled[0])} more than once: {shown(header)}")
    if set(map(len, body)) - {len(header)}:
        number = next(number for number, row in enumerate(body, start=1) if len(row) != len(header))
        row = body[number - 1]
        raise CommandError(
            f"{name}: row {number}, on line {lines[number]}, has {len(row)} fields and the header has {len(header)}: "
            f"{shown(row)}. {_QUOTING[kind]}"
        )
    if kind == ".tsv" and '""' in text:
        for number, row in enumerate(body, start=1):
            if any(_is_quoted_as_in_csv(field) for field in row):
                raise CommandError(
                    f"{name}: row {number}, on line {lines[number]}, is quoted as in a CSV file: {shown(row)}. In a "
                    ".tsv file a quotation mark is a character like others; write a .csv file instead"
                )
    columns: Sequence[Sequence[str]] = list(zip(*body, strict=True)) or [()] * len(header)
    return {column: list(values) for column, values in zip(header, columns, strict=True)}


def _is_quoted_as_in_csv(field: str) -> bool:
    return len(field) > 3 and field[0] == field[-1] == '"' and '"' in field[1:-1] and _only_doubled(field[1:-1])


def _only_doubled(text: str) -> bool:
    return '"' not in text.replace('""', "")


def _read_json(text: str, name: str, kind: str) -> dict[str, list[Any]]:
    expected = "expected an object a line, or one array of objects"
    try:
        if text.lstrip()[:1] == "[":
            where = "its array"
            rows = json.loads(text, object_pairs_hook=_object)
        else:
            # Only the line breaks of files: some of those that str.splitlines knows may stand in a JSON text.
            rows = []
            for number, line in enumerate(io.StringIO(text, newline=None), start=1):
                where = f"line {number} is {shown(line.rstrip())}"
                if line.strip():
                    rows.append(json.loads(line, object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{name}: cannot be read as {kind[1:]}: {where} ({error}); {expected}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise CommandError(f"{name}: row {number} is {shown(row)}; {expected}")
    keys = dict.fromkeys(chain.from_iterable(rows))
    return {key: [row.get(key, MISSING) for row in rows] for key in keys}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{name!r} is named more than once")
    return found


_READERS: dict[str, Callable[[str, str, str], dict[str, list[Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_separated,
    ".tsv": _read_separated,
}
