"""The tasks, their data, and every check of it that can be made before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isobn_kernels.cli._errors import CommandError


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
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv"}
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

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """The task's metrics of a `transformers.EvalPrediction`, in the order of ``metrics``."""
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        functions: dict[str, Callable[..., float]] = {
            "accuracy": accuracy_score,
            "f1": f1_score,
            "matthews_correlation": matthews_corrcoef,
            "pearson": lambda labels, guess: pearsonr(labels, guess).statistic,
            "spearman": lambda labels, guess: spearmanr(labels, guess).statistic,
        }
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

    Files are JSON (one object a line, or one array) or CSV. Without a task the fields are ``sentence``, or
    ``sentence1`` and ``sentence2``, the classes are the different labels of the training file, sorted, and the metric
    is accuracy. A subset is drawn at random, the same one every time.

    Raises:
        CommandError: anything wrong with the files, the fields or the labels.
    """
    task = TASKS[task_name] if task_name else None
    if train_file and dev_file:
        splits = {str(file): _load_file(file) for file in (train_file, dev_file)}
    elif task and not train_file and not dev_file:
        splits = {f"GLUE {task_name}, {name}": _load_glue(task_name, name) for name in ("train", task.dev_split)}
    else:
        raise CommandError("no data: give --task NAME, or --train-file and --dev-file, or all three")
    if len(splits) < 2:
        raise CommandError(f"{train_file} is both --train-file and --dev-file; the dev set has to be other text")

    (train_name, train), _ = splits.items()
    fields = task.fields if task else _find_fields(train.column_names, train_name)
    for name, split in splits.items():
        _check_columns(split, fields, name)
    if task and not task.classes:
        labels = None
        for name, split in splits.items():
            _check_scores(split["label"], name)
    else:
        labels = _find_labels(task_name, splits, train_name)
    train, dev = (
        _draw(split.select_columns([*fields, "label"]), limit, labels)
        for split, limit in zip(splits.values(), (max_train_samples, max_dev_samples), strict=True)
    )
    classes = task.classes if task else tuple(map(str, labels or ()))
    return Data(train, dev, fields, classes, task.metrics if task else ("accuracy",))


def _load_glue(task_name: str | None, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset("nyu-mll/glue", task_name, split=split)
    except OSError as error:
        raise CommandError(
            f"GLUE task {task_name} could not be fetched from the hub ({_first_line(error)}). Without a connection, "
            "give its files: --train-file and --dev-file, beside --task for its fields and metric"
        ) from error


def _load_file(path: Path) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if path.suffix not in _FORMATS:
        raise CommandError(f"{path}: expected a file ending in {', '.join(_FORMATS)}")
    if not path.is_file():
        raise CommandError(f"{path}: no such file")
    if not path.stat().st_size:
        raise CommandError(f"{path}: the file is empty")
    try:
        # In a CSV file "NA" and "None" are words; nothing is missing but an empty field.
        options = {"keep_default_na": False, "na_values": [""]} if path.suffix == ".csv" else {}
        return load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", **options)
    except (DatasetGenerationError, ValueError) as error:  # the second where there is not one row
        raise CommandError(
            f"{path}: cannot be read as {path.suffix[1:]} ({_first_line(error.__cause__ or error)}); expected "
            "rows with the same fields throughout and labels of one kind"
        ) from error


def _find_fields(columns: Sequence[str], name: str) -> tuple[str, ...]:
    for fields in (_PAIR, ("sentence",)):
        if set(fields) <= set(columns):
            return fields
    raise CommandError(
        f"{name}: has the fields {_listed(columns)}; expected 'sentence', or 'sentence1' and 'sentence2', and 'label'. "
        "Rename them, or name the GLUE task whose fields they are with --task"
    )


def _check_columns(split: Any, fields: tuple[str, ...], name: str) -> None:
    missing = [field for field in (*fields, "label") if field not in split.column_names]
    if missing:
        raise CommandError(
            f"{name}: has the fields {_listed(split.column_names)}; {_listed(missing)} missing of the expected "
            f"{_listed((*fields, 'label'))}"
        )
    if len(split) < 2:
        raise CommandError(f"{name}: has {len(split)} rows; at least 2 are needed")
    for field in fields:
        for row, text in enumerate(split[field], start=1):
            if not isinstance(text, str):
                raise CommandError(f"{name}: {field!r} of row {row} is {text!r}; expected text")


def _check_labels(labels: Iterable[Any], name: str) -> None:
    first = None
    for row, label in enumerate(labels, start=1):
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise CommandError(
                f"{name}: 'label' of row {row} is {label!r}; expected a class, as a whole number or a word"
            )
        first = label if first is None else first
        if type(label) is not type(first):
            raise CommandError(
                f"{name}: 'label' is {first!r} in row 1 and {label!r} in row {row}; expected either numbers "
                "or words throughout"
            )
        if isinstance(label, int) and label < 0:
            raise CommandError(
                f"{name}: 'label' of row {row} is {label}; GLUE's test splits hide their labels this way. "
                "Use a labelled split"
            )


def _find_labels(task_name: str | None, splits: dict[str, Any], train_name: str) -> list[Any]:
    """The labels that stand for the classes, in their order: those of the task, or else of the training file."""
    for name, split in splits.items():
        _check_labels(split["label"], name)
    labels = list(range(len(TASKS[task_name].classes))) if task_name else sorted(set(splits[train_name]["label"]))
    if len(labels) < 2:
        raise CommandError(f"{train_name}: every label is {labels[0]!r}; a classifier needs at least two classes")
    for name, split in splits.items():
        unknown = sorted(set(split["label"]) - set(labels), key=str)
        if unknown:
            expected = f"those of {task_name or train_name}"
            raise CommandError(f"{name}: unknown labels {_listed(unknown)}; expected {expected}: {_listed(labels)}")
    return labels


def _check_scores(labels: Iterable[Any], name: str) -> None:
    for row, label in enumerate(labels, start=1):
        if isinstance(label, bool) or not isinstance(label, (int, float)) or not math.isfinite(label):
            raise CommandError(f"{name}: 'label' of row {row} is {label!r}; expected a number")


def _draw(split: Any, limit: int | None, labels: list[Any] | None) -> Any:
    if limit is not None and limit < len(split):
        split = split.shuffle(seed=_SUBSET_SEED).select(range(limit))
    numbers = [float(label) if labels is None else labels.index(label) for label in split["label"]]
    return split.remove_columns("label").add_column("label", numbers)


def _listed(values: Iterable[Any]) -> str:
    values = list(values)
    return ", ".join(map(repr, values[:10])) + (", ..." if len(values) > 10 else "")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
