"""The tasks, their data, and every check of it that can be made before a model is loaded."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from isobn_kernels.cli._errors import CommandError
from isobn_kernels.cli._files import Table, read_table, shown
from isobn_kernels.cli._folder import content_hash


@dataclass(frozen=True)
class Task:
    """A GLUE task: the fields of its text, its classes in GLUE's numbering, its metrics, its labelled dev split.

    Without classes it is a regression: its label is a number.
    """

    fields: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    dev_split: str = "validation"


_PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "mrpc": Task(_PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "rte": Task(_PAIR, ("entailment", "not_entailment")),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    "stsb": Task(_PAIR, (), ("pearson", "spearman")),
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), dev_split="validation_matched"),
}
# No leading zeros, which are part of a name; blanks around it are those behind a comma.
_WHOLE_NUMBER = re.compile(r"\s*-?(0|[1-9]\d{,17})\s*", re.ASCII)
_NUMBER = re.compile(r"\s*-?((0|[1-9]\d{,17})(\.\d*)?|\.\d+)\s*", re.ASCII)
_SUBSET_SEED = 0


@dataclass(frozen=True)
class Data:
    """Two `datasets.Dataset` with the text fields and ``label``; and what they are about.

    A label is the number of a class, or where there are no classes the number to be predicted.
    """

    train: Any
    dev: Any
    fields: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def content(self) -> dict[str, str]:
        """Hashes of the rows and of the names of the classes, by what they are."""
        hashes = {
            f"the {name} rows": content_hash(json.dumps(split[column][:]).encode() for column in split.column_names)
            for name, split in (("training", self.train), ("dev", self.dev))
        }
        return {**hashes, "the names of the classes": content_hash(name.encode() + b"\n" for name in self.classes)}

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """The task's metrics of a `transformers.EvalPrediction`, in the order of ``metrics``."""
        import numpy as np
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        functions: dict[str, Callable[..., float]] = {
            "accuracy": accuracy_score,
            "f1": f1_score,
            "matthews_correlation": matthews_corrcoef,
            "pearson": lambda labels, guess: pearsonr(labels, guess).statistic,
            "spearman": lambda labels, guess: spearmanr(labels, guess).statistic,
        }
        if not np.isfinite(prediction.predictions).all():
            raise CommandError("training diverged to NaN or Inf; try a lower --learning-rate")
        guess = prediction.predictions.argmax(axis=-1) if self.classes else prediction.predictions.reshape(-1)
        if not self.classes and any(values.min() == values.max() for values in (guess, prediction.label_ids)):
            return dict.fromkeys(self.metrics, 0.0)  # nothing to correlate, and NaN is never the best
        return {name: float(functions[name](prediction.label_ids, guess)) for name in self.metrics}


def load_data(
    task_name: str | None,
    train_file: Path | None,
    dev_file: Path | None,
    max_train_samples: int | None = None,
    max_dev_samples: int | None = None,
) -> Data:
    """The data of a GLUE task, from the hub or from files with its fields, or of files without a task.

    Files are JSON (one object a line, or one array), CSV or TSV. Without a task the fields are ``sentence``, or
    ``sentence1`` and ``sentence2``, the classes are the different labels of the training file, sorted, and the metric
    is accuracy. A subset is drawn at random, the same one every time.

    Raises:
        CommandError: anything wrong with the files, the fields or the labels.
    """
    task = TASKS[task_name] if task_name else None
    if train_file and dev_file:
        train, dev = (read_table(file) for file in (train_file, dev_file))
        if train_file.samefile(dev_file):
            raise CommandError(f"{dev_file} is both --train-file and --dev-file; the dev set has to be other text")
    elif task_name and task and not train_file and not dev_file:
        train, dev = (_load_glue(task_name, split) for split in ("train", task.dev_split))
    else:
        raise CommandError("no data: give --task NAME, or --train-file and --dev-file, or all three")

    tables = (train, dev)
    for table in tables:
        if len(table) < 2:
            raise CommandError(f"{table.name}: has {len(table)} rows; at least 2 are needed")
    fields = task.fields if task else _find_fields(train)
    for table in tables:
        _check_columns(table, fields)
    classes: tuple[str, ...] = ()
    labels: Sequence[Sequence[float]]
    if task and not task.classes:
        labels = [_scores(table) for table in tables]
    else:
        labels, classes = _classes(task, tables)
    splits = [
        _draw({field: table.columns[field] for field in fields} | {"label": numbers}, limit)
        for table, numbers, limit in zip(tables, labels, (max_train_samples, max_dev_samples), strict=True)
    ]
    return Data(splits[0], splits[1], fields, classes, task.metrics if task else ("accuracy",))


def _load_glue(task_name: str, split: str) -> Table:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset("nyu-mll/glue", task_name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise CommandError(
            f"GLUE task {task_name} could not be fetched from the hub ({_first_line(error)}). Without a connection, or "
            "a folder for its cache (HF_HOME), give its files: --train-file and --dev-file, beside --task for its "
            "fields and metric"
        ) from error
    return Table(f"GLUE {task_name}, {split}", {name: loaded[name][:] for name in loaded.column_names}, typed=True)


def _find_fields(table: Table) -> tuple[str, ...]:
    for fields in (_PAIR, ("sentence",)):
        if set(fields) <= set(table.columns):
            return fields
    raise CommandError(
        f"{table.name}: has the fields {_listed(table.columns)}; expected 'sentence', or 'sentence1' and 'sentence2', "
        "and 'label'. Rename them, or name the GLUE task whose fields they are with --task"
    )


def _check_columns(table: Table, fields: tuple[str, ...]) -> None:
    missing = [field for field in (*fields, "label") if field not in table.columns]
    if missing:
        raise CommandError(
            f"{table.name}: has the fields {_listed(table.columns)}; {_listed(missing)} missing of the expected "
            f"{_listed((*fields, 'label'))}"
        )
    # Whole columns at once: the large tasks have hundreds of thousands of rows.
    for field in fields:
        texts = table.columns[field]
        if set(map(type, texts)) != {str}:
            _refuse(table, field, lambda text: not isinstance(text, str), "expected text")
        if not table.typed and "" in texts:  # which is how a CSV file says that there is nothing
            _refuse(table, field, lambda text: text == "", "expected text")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            _refuse(table, field, _has_surrogates, "expected text without half a surrogate pair")


def _refuse(table: Table, column: str, is_wrong: Callable[[Any], bool], expected: str) -> NoReturn:
    """Raise the error about the first value of a column that is wrong."""
    row, value = next((row, x) for row, x in enumerate(table.columns[column], start=1) if is_wrong(x))
    raise CommandError(f"{table.name}: {column!r} of row {row} is {shown(value)}; {expected}. Row: {table.row(row)}")


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _classes(task: Task | None, tables: tuple[Table, Table]) -> tuple[list[list[int]], tuple[str, ...]]:
    """The labels as numbers of classes; and the classes: those of the task, or else of the training file."""
    columns = _class_labels(tables)
    if task:
        known: list[Any] = list(range(len(task.classes)))
        origin = next(name for name, entry in TASKS.items() if entry is task)
    else:
        known, origin = sorted(set(columns[0])), tables[0].name
    if len(known) < 2:
        raise CommandError(f"{origin}: every label is {known[0]!r}; a classifier needs at least two classes")
    for table, column in zip(tables, columns, strict=True):
        unknown = sorted(set(column) - set(known), key=str)
        if unknown:
            row = column.index(unknown[0]) + 1
            raise CommandError(
                f"{table.name}: unknown labels {_listed(unknown)}; expected those of {origin}: {_listed(known)}. "
                f"Row {row}: {table.row(row)}"
            )
    numbers = {label: number for number, label in enumerate(known)}
    return [[numbers[label] for label in column] for column in columns], task.classes if task else tuple(
        map(str, known)
    )


def _class_labels(tables: tuple[Table, Table]) -> list[list[Any]]:
    """The labels of both files, all of them whole numbers or all of them words."""
    expected = "expected a class, as a whole number or a word"
    typed = [table.columns["label"] for table in tables if table.typed]
    for table in tables:
        if table.typed:
            if not set(map(type, table.columns["label"])) <= {int, str, bool}:
                _refuse(table, "label", lambda label: type(label) not in (int, str, bool), expected)
        elif "" in table.columns["label"]:
            _refuse(table, "label", lambda label: label == "", expected)
    # Text from a CSV file is a number where the other file says so, or where all labels are numbers: not "01" among its
    # like, nor "1" beside "one".
    numeric = {type(label) for column in typed for label in column} <= {int}
    if numeric and typed:
        for table in tables:
            if not table.typed and not all(map(_WHOLE_NUMBER.fullmatch, set(table.columns["label"]))):
                other = next(table.name for table in tables if table.typed)
                _refuse(
                    table,
                    "label",
                    lambda label: not _WHOLE_NUMBER.fullmatch(label),
                    f"expected a whole number, as in {other}",
                )
    else:
        numeric = numeric and all(
            map(_NUMBER.fullmatch, {label for table in tables if not table.typed for label in table.columns["label"]})
        )
    columns = []
    for table in tables:
        column = table.columns["label"]
        if numeric and not table.typed:
            if not all(map(_WHOLE_NUMBER.fullmatch, set(column))):
                _refuse(table, "label", lambda label: not _WHOLE_NUMBER.fullmatch(label), expected)
            column = [int(label) for label in column]
        elif bool in set(map(type, column)):  # words, as which a CSV file has them
            column = [str(label) if isinstance(label, bool) else label for label in column]
        columns.append(column)
    _check_one_kind(tables, columns)
    for table, column in zip(tables, columns, strict=True):
        if isinstance(column[0], int) and min(column) < 0:
            row = next(row for row, label in enumerate(column, start=1) if label < 0)
            raise CommandError(
                f"{table.name}: 'label' of row {row} is {column[row - 1]}; GLUE's test splits hide their labels this "
                "way. Use a labelled split"
            )
    return columns


def _check_one_kind(tables: tuple[Table, Table], columns: list[list[Any]]) -> None:
    first = columns[0][0]
    for table, column in zip(tables, columns, strict=True):
        if set(map(type, column)) != {type(first)}:
            row = next(row for row, label in enumerate(column, start=1) if type(label) is not type(first))
            where = "" if table is tables[0] else f" of {tables[0].name}"
            raise CommandError(
                f"{table.name}: 'label' is {first!r} in row 1{where} and {shown(column[row - 1])} in row {row}; "
                "expected either numbers or words throughout"
            )


def _scores(table: Table) -> list[float]:
    """The labels as numbers to predict."""

    def is_wrong(label: Any) -> bool:
        if not table.typed:
            try:
                label = float(label.replace("_", "?"))  # Python takes 1_000 for a number
            except ValueError:
                return True
        return type(label) not in (int, float) or not abs(label) <= sys.float_info.max

    column = table.columns["label"]
    if any(map(is_wrong, column)):
        _refuse(table, "label", is_wrong, "expected a number")
    return [float(label) for label in column]


def _draw(columns: Mapping[str, Sequence[Any]], limit: int | None) -> Any:
    from datasets import Dataset

    split = Dataset.from_dict(columns)  # in memory: no cache on disk, which may be read-only or full
    if limit is not None and limit < len(split):
        split = split.shuffle(seed=_SUBSET_SEED).select(range(limit))
    return split


def _listed(values: Iterable[Any]) -> str:
    values = list(values)
    return ", ".join(map(repr, values[:10])) + (", ..." if len(values) > 10 else "")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
