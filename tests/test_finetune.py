"""The ``finetune`` command, on a tiny BERT with random weights."""

# ruff: noqa: E402 -- what may be missing is asked for before it is imported

import csv
import json
import random
from pathlib import Path

import pytest
import torch

from isobn_kernels import cli
from isobn_kernels.cli import finetune

for _module in finetune.MODULES:
    pytest.importorskip(_module, reason='needs pip install "isobn_kernels[finetune]"')

import datasets
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

from isobn_kernels.cli._data import TASKS, load_data

WORDS = ["good", "bad", "film", "book", "very", "not", "the", "a", "was", "it"]
TINY = {
    "vocab_size": 15,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    # Ten times the usual: a first token that tells sentences apart, as that of a trained encoder does.
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT and its tokenizer, as from the hub."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(**TINY, max_position_embeddings=40)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 40}')
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def pairs(count: int, seed: int) -> list[dict]:
    """Two sentences are of class 1 where they have the same first word."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        first, second = draw.choice(WORDS[:2]), draw.choice(WORDS[:2])
        rows.append(
            {
                "sentence1": f"{first} {draw.choice(WORDS)}",
                "sentence2": f"{second} {draw.choice(WORDS)} {draw.choice(WORDS)}",
                "label": int(first == second),
                "idx": number,
            }
        )
    return rows


def sentences(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    words = [draw.choice(WORDS[:2]) for _ in range(count)]
    return [{"sentence": f"it was {word}, {draw.choice(WORDS)}", "label": f"is {word}"} for word in words]


def run_finetune(encoder: Path, train: Path, dev: Path, output: Path, *more: str) -> dict:
    words = ["finetune", "--model", str(encoder), "--train-file", str(train), "--dev-file", str(dev)]
    words += ["--output", str(output), "--max-length", "16", *more]
    assert cli.main(words) == 0
    return json.loads((output / "results.json").read_text())


def test_both_normalizers(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = write_rows(tmp_path / "train.jsonl", pairs(64, 0))
    dev = write_rows(tmp_path / "dev.jsonl", pairs(40, 1))
    more = ["--task", "mrpc", "--normalizer", "isobn", "none", "--seeds", "1", "2", "--beta", "0.4"]
    more += ["--epochs", "2", "--learning-rate", "1e-3"]
    results = run_finetune(encoder, train, dev, tmp_path / "out", *more)

    assert [(run["normalizer"], run["seed"]) for run in results["runs"]] == [
        ("isobn", 1),
        ("none", 1),
        ("isobn", 2),
        ("none", 2),
    ]
    before = "before training"
    for run in results["runs"]:
        assert list(run["metrics"]) == ["f1", "accuracy"]
        # Every run starts from the same pretrained encoder.
        assert run["isotropy"][before] == results["runs"][0]["isotropy"][before]
    assert list(results["runs"][0]["isotropy"]) == [before, "after training", "after scaling"]
    assert list(results["runs"][1]["isotropy"]) == [before, "after training"]

    printed = capsys.readouterr().out
    table = (tmp_path / "out" / "results.md").read_text()
    for text in ("isobn, after scaling", "none, after training", "EV_3", "deviation spread", "seed by seed"):
        assert text in printed
        assert text in table
    assert (tmp_path / "out" / "isotropy.png").read_bytes().startswith(b"\x89PNG")

    # What was saved is the best model, with its labels and tokenizer.
    for normalizer in ("isobn", "none"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / normalizer).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / normalizer)
        assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
        rows = [json.loads(line) for line in dev.read_text().splitlines()]
        texts = [[row[field] for row in rows] for field in ("sentence1", "sentence2")]
        guess = model(**tokenizer(*texts, padding=True, return_tensors="pt")).logits.argmax(dim=-1)
        accuracy = (guess == torch.tensor([row["label"] for row in rows])).double().mean().item()
        runs = [run["metrics"] for run in results["runs"] if run["normalizer"] == normalizer]
        assert accuracy == pytest.approx(max(runs, key=lambda metrics: metrics["f1"])["accuracy"])
        if normalizer == "isobn":
            assert model.isobn.beta == 0.4
            assert model.isobn.num_batches_tracked == 8


def test_csv_with_words_for_labels(encoder: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.csv", sentences(48, 0))
    dev = write_rows(tmp_path / "dev.csv", sentences(20, 1))
    more = ["--epochs", "10", "--learning-rate", "1e-3", "--max-train-samples", "40"]
    results = run_finetune(encoder, train, dev, tmp_path / "out", *more)
    assert results["classes"] == ["is bad", "is good"]
    assert results["rows"] == {"train": 40, "dev": 20}
    assert results["runs"][0]["metrics"]["accuracy"] > 0.8


def test_json_array(tmp_path: Path) -> None:
    train = tmp_path / "train.json"
    train.write_text(json.dumps(pairs(10, 0)))
    dev = write_rows(tmp_path / "dev.jsonl", pairs(8, 1))
    data = load_data(None, train, dev, max_dev_samples=4)
    assert list(data.train["label"]) == [row["label"] for row in pairs(10, 0)]
    assert len(data.dev) == 4
    assert data.fields == ("sentence1", "sentence2")


def test_glue_comes_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        rows = {field: ["a", "b", "c"] for field in TASKS["mnli"].fields}
        return datasets.Dataset.from_dict({**rows, "label": [0, 1, 2], "idx": [0, 1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data("mnli", None, None)
    assert asked == [
        (("nyu-mll/glue", "mnli"), {"split": "train"}),
        (("nyu-mll/glue", "mnli"), {"split": "validation_matched"}),
    ]
    assert data.classes == ("entailment", "neutral", "contradiction")
    assert data.train.column_names == ["premise", "hypothesis", "label"]

    def no_connection(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_connection)
    assert cli.main(["finetune", "--model", "m", "--task", "rte", "--output", str(tmp_path)]) == 2
    assert "--train-file and --dev-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "metrics"),
    [("cola", ["matthews_correlation"]), ("mrpc", ["f1", "accuracy"]), ("rte", ["accuracy"])],
)
def test_metrics_by_hand(task: str, metrics: list[str], tmp_path: Path) -> None:
    train = write_rows(
        tmp_path / "train.jsonl", [{"sentence": "a", **row, "label": n % 2} for n, row in enumerate(pairs(8, 0))]
    )
    dev = write_rows(
        tmp_path / "dev.jsonl", [{"sentence": "b", **row, "label": n % 2} for n, row in enumerate(pairs(8, 1))]
    )
    data = load_data(task, train, dev)
    from transformers import EvalPrediction

    labels, guess = torch.tensor([1, 1, 1, 0, 0]), torch.tensor([1, 1, 0, 1, 0])
    found = data.compute_metrics(EvalPrediction(torch.nn.functional.one_hot(guess).double().numpy(), labels.numpy()))
    # 2 true positives, 1 false positive, 1 false negative, 1 true negative.
    by_hand = {"accuracy": 3 / 5, "f1": 4 / 6, "matthews_correlation": (2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5}
    assert list(found) == metrics
    assert found == pytest.approx({name: by_hand[name] for name in metrics})


GOOD = {"sentence": "it was good", "label": 1}


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"text": "it", "label": 1}] * 3, [], "has the fields 'text', 'label'; expected 'sentence'"),
        ([{"sentence": "it"}] * 3, [], "'label' missing"),
        ([GOOD] * 3, ["--task", "rte"], "'sentence1', 'sentence2' missing of the expected"),
        ([GOOD], [], "has 1 rows; at least 2"),
        ([GOOD] * 3, [], "every label is 1"),
        ([GOOD, {"sentence": None, "label": 0}], [], "'sentence' of row 2 is None; expected text"),
        ([GOOD, {"sentence": 7, "label": 0}], [], "'sentence' of row 2 is 7"),
        ([GOOD, {"sentence": "it", "label": "bad"}], [], "'label' is 1 in row 1 and 'bad' in row 2"),
        ([GOOD, {"sentence": "it", "label": 0.5}], [], "'label' of row 1 is 1.0; expected a class"),
        ([GOOD, {"sentence": "it", "label": None}], [], "'label' of row 2 is None; expected a class"),
        ([GOOD, {"sentence": "it", "label": -1}], [], "'label' of row 2 is -1; GLUE's test splits hide"),
        ([GOOD, {"sentence": "it", "label": 2}], ["--task", "cola"], "unknown labels 2; expected those of cola: 0, 1"),
        ([GOOD, {"sentence": "it", "label": 0}], [], "dev.jsonl: unknown labels 5"),
        ([GOOD, {"sentence": "it", "label": 5}], ["--max-length", "41"], "takes at most 40 tokens"),
        ([GOOD, {"sentence": "it", "label": 5}], ["--momentum", "2"], "--momentum must be in [0, 1], got 2.0"),
    ],
)
def test_bad_data(
    rows: list[dict], more: list[str], message: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows)
    dev = write_rows(tmp_path / "dev.jsonl", [GOOD, {"sentence": "it", "label": 5}])
    words = ["finetune", "--model", str(encoder), "--train-file", str(train), "--dev-file", str(dev)]
    assert cli.main([*words, "--output", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.csv", "", "the file is empty"),
        ("text.txt", "a", "expected a file ending in .json, .jsonl, .csv"),
        ("broken.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": ', "cannot be read as jsonl"),
    ],
)
def test_bad_files(name: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    words = ["finetune", "--model", "m", "--train-file", str(path), "--dev-file", str(path), "--output", str(tmp_path)]
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_no_data_no_model_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = ["--output", str(tmp_path / "out")]
    assert cli.main(["finetune", "--model", "m", *output]) == 2
    assert "give --task NAME, or --train-file and --dev-file" in capsys.readouterr().err

    train = write_rows(tmp_path / "train.jsonl", pairs(8, 0))
    dev = write_rows(tmp_path / "dev.jsonl", pairs(8, 1))
    files = ["--train-file", str(train), "--dev-file", str(dev)]
    assert cli.main(["finetune", "--model", str(tmp_path / "nothing"), *files, *output]) == 2
    assert "expected the name of an encoder on the hub, or a folder" in capsys.readouterr().err

    assert cli.main(["finetune", "--model", "m", *files, "--output", str(train)]) == 2
    assert "this folder cannot be made" in capsys.readouterr().err
