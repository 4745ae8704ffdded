"""The ``finetune`` command, on a tiny BERT with random weights."""

# ruff: noqa: E402 -- what may be missing is asked for before it is imported

import csv
import json
import os
import random
import shutil
import subprocess
import sys
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
    GPT2Config,
    GPT2Model,
)

from isobn_kernels.cli import _training
from isobn_kernels.cli._data import TASKS, Data, load_data

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
    words += ["--output", str(output), "--max-length", "16", "--epochs", "3", "--seeds", "1", *more]
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
            best = max(results["runs"], key=lambda run: (run["normalizer"] == "isobn", run["metrics"]["f1"]))
            assert model.classifier.isobn.beta == 0.4
            assert model.classifier.isobn.num_batches_tracked == 4 * best["best_epoch"]


def scored(count: int, seed: int) -> list[dict]:
    """Pairs of sentences with a score, 5 where the first words are the same and less where they are not."""
    return [{**row, "label": 4.5 * row["label"] + 0.25 * (row["idx"] % 3)} for row in pairs(count, seed)]


def test_regression(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = write_rows(tmp_path / "train.jsonl", scored(96, 0))
    dev = write_rows(tmp_path / "dev.jsonl", scored(40, 1))
    more = ["--task", "stsb", "--epochs", "10", "--patience", "10", "--learning-rate", "2e-3"]
    results = run_finetune(encoder, train, dev, tmp_path / "out", *more)
    (run,) = results["runs"]
    assert list(run["metrics"]) == ["pearson", "spearman"]
    assert run["metrics"]["pearson"] > 0.3
    assert results["classes"] == []
    assert "a number to predict" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "isobn")
    assert model.config.problem_type == "regression"
    assert model.config.num_labels == 1


def test_training_stops_without_gain_and_keeps_the_best_epoch(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.6, 0.4, 0.6, 0.9, 0.7])
    monkeypatch.setattr(Data, "compute_metrics", lambda self, prediction: {"accuracy": next(scores)})
    train = write_rows(tmp_path / "train.jsonl", pairs(32, 0))
    dev = write_rows(tmp_path / "dev.jsonl", pairs(20, 1))
    more = ["--epochs", "9", "--patience", "2"]
    (run,) = run_finetune(encoder, train, dev, tmp_path / "out", *more)["runs"]
    # Stopped after the fourth epoch, whose 0.6 is no gain; the fifth score is that of the model which was kept.
    assert run["best_epoch"] == 2
    assert run["metrics"]["accuracy"] == 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "isobn")
    assert model.classifier.isobn.num_batches_tracked == 4


class Interrupted(Exception):
    pass


def test_resumed_runs_equal_uninterrupted_ones(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = write_rows(tmp_path / "train.jsonl", pairs(64, 0))
    dev = write_rows(tmp_path / "dev.jsonl", pairs(40, 1))
    arguments = (encoder, train, dev)
    more = ["--normalizer", "none", "isobn", "--learning-rate", "1e-3"]
    expected = run_finetune(*arguments, tmp_path / "whole", *more)

    class EarlyStoppingCallback(_training.EarlyStoppingCallback):
        """Stops the second run in the middle of its third epoch. Of the same name, by which its state is found."""

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if "isobn" in args.output_dir and state.global_step == 10:
                raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(_training, "EarlyStoppingCallback", EarlyStoppingCallback)
        with pytest.raises(Interrupted):
            run_finetune(*arguments, tmp_path / "out", *more)
    finished = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [run["normalizer"] for run in finished] == ["none"]

    found = run_finetune(*arguments, tmp_path / "out", *more, "--resume")
    assert found["runs"][0] == finished[0]
    for a, b in zip(found["runs"], expected["runs"], strict=True):
        assert {**a, "train_seconds": 0} == {**b, "train_seconds": 0}
    for name in ("none", "isobn"):
        weights = [(tmp_path / folder / name / "model.safetensors").read_bytes() for folder in ("out", "whole")]
        assert weights[0] == weights[1], name
    assert not list((tmp_path / "out").rglob("checkpoint-*"))

    # More seeds may be added later, in any order; other settings may not.
    found = run_finetune(*arguments, tmp_path / "out", *more, "--seeds", "2", "--resume")
    found = run_finetune(*arguments, tmp_path / "out", *more, "--seeds", "2", "1", "--resume")
    assert [run["seed"] for run in found["runs"]] == [2, 2, 1, 1]
    assert found["runs"][2] == finished[0]
    for name in ("none", "isobn"):
        scores = {run["seed"]: run["metrics"]["accuracy"] for run in found["runs"] if run["normalizer"] == name}
        first = (tmp_path / "whole" / name / "model.safetensors").read_bytes()
        kept = (tmp_path / "out" / name / "model.safetensors").read_bytes()
        assert (kept == first) == (scores[1] >= scores[2]), (name, scores)


def test_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    for name, files in {"checkpoint-4": ["trainer_state.json"], "checkpoint-12": ["model.safetensors"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    assert _training._last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-12" / "trainer_state.json").touch()
    assert _training._last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")
    assert _training._last_checkpoint(tmp_path / "nothing") is None


def test_embeddings_that_are_all_equal(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = write_rows(tmp_path / "train.jsonl", pairs(16, 0))
    dev = write_rows(tmp_path / "dev.jsonl", [{**PAIR, "label": label} for label in (0, 1)])
    words = ["finetune", "--model", str(encoder), "--train-file", str(train), "--dev-file", str(dev)]
    assert cli.main([*words, "--output", str(tmp_path / "out"), "--epochs", "1", "--seeds", "1"]) == 2
    assert "all 2 dev texts have the same embedding" in capsys.readouterr().err


def test_words_that_mean_nothing_is_there(tmp_path: Path) -> None:
    rows = [
        {"sentence": word, "label": label}
        for word, label in zip(("NA", "None", "x"), ("null", "NA", "null"), strict=True)
    ]
    data = load_data(None, write_rows(tmp_path / "a.csv", rows), write_rows(tmp_path / "b.csv", rows))
    assert data.classes == ("NA", "null")
    assert list(data.train["sentence"]) == ["NA", "None", "x"]


def test_two_processes_equal_one(tmp_path: Path, encoder: Path) -> None:
    """Half the batch on each of two processes: the same steps, and the same statistics, as the whole batch on one."""
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # else each process draws its own
    (folder / "config.json").write_text(json.dumps(config))
    train = write_rows(tmp_path / "train.jsonl", pairs(64, 0))
    dev = write_rows(tmp_path / "dev.jsonl", pairs(41, 1))
    one = run_finetune(folder, train, dev, tmp_path / "one", "--batch-size", "16")
    words = ["finetune", "--model", str(folder), "--train-file", str(train), "--dev-file", str(dev), "--seeds", "1"]
    words += ["--output", str(tmp_path / "two"), "--max-length", "16", "--epochs", "3", "--batch-size", "8"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "isobn_kernels", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dev embeddings") == 1
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["runs"][0]["metrics"] == pytest.approx(one["runs"][0]["metrics"])
    models = [AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "isobn") for name in ("one", "two")]
    layers = [model.classifier.isobn for model in models]
    assert layers[0].num_batches_tracked == layers[1].num_batches_tracked
    for name in ("running_std", "scale"):
        torch.testing.assert_close(getattr(layers[1], name), getattr(layers[0], name), rtol=1e-4, atol=0)


def test_resuming_with_other_settings_is_refused(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = write_rows(tmp_path / "train.jsonl", pairs(16, 0))
    dev = write_rows(tmp_path / "dev.jsonl", pairs(8, 1))
    run_finetune(encoder, train, dev, tmp_path / "out", "--epochs", "1")
    words = ["finetune", "--model", str(encoder), "--train-file", str(train), "--dev-file", str(dev)]
    words += ["--output", str(tmp_path / "out"), "--max-length", "16", "--epochs", "2", "--seeds", "1", "--resume"]
    assert cli.main(words) == 2
    assert "--resume: --epochs was 1, now 2" in capsys.readouterr().err


def test_models_that_do_not_fit(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = write_rows(tmp_path / "train.jsonl", pairs(16, 0))
    dev = write_rows(tmp_path / "dev.jsonl", pairs(8, 1))
    run_finetune(encoder, train, dev, tmp_path / "out", "--epochs", "1")
    other = tmp_path / "gpt2"
    GPT2Model(GPT2Config(vocab_size=15, n_embd=8, n_head=2, n_layer=1)).save_pretrained(other)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(other)
    for model, message in [(tmp_path / "out" / "isobn", "has IsoBN already"), (other, "expected one of Albert")]:
        words = ["finetune", "--model", str(model), "--train-file", str(train), "--dev-file", str(dev)]
        assert cli.main([*words, "--output", str(tmp_path / "out2")]) == 2
        assert message in capsys.readouterr().err


def test_csv_with_words_for_labels(encoder: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.csv", sentences(48, 0))
    dev = write_rows(tmp_path / "dev.csv", sentences(20, 1))
    more = ["--epochs", "10", "--patience", "10", "--learning-rate", "2e-3", "--max-train-samples", "40"]
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


@pytest.mark.parametrize(("labels", "guess"), [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])])
def test_nothing_to_correlate(labels: list[float], guess: list[float]) -> None:
    from transformers import EvalPrediction

    data = Data(None, None, (), (), ("pearson", "spearman"))
    prediction = EvalPrediction(torch.tensor(guess)[:, None].numpy(), torch.tensor(labels).numpy())
    assert data.compute_metrics(prediction) == {"pearson": 0.0, "spearman": 0.0}


GOOD = {"sentence": "it was good", "label": 1}
PAIR = {"sentence1": "it was good", "sentence2": "it was bad", "label": 1}


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"text": "it", "label": 1}] * 3, [], "has the fields 'text', 'label'; expected 'sentence'"),
        ([{"sentence": "it"}] * 3, [], "'label' missing"),
        ([GOOD] * 3, ["--task", "rte"], "'sentence1', 'sentence2' missing of the expected"),
        ([PAIR, {**PAIR, "label": "low"}], ["--task", "stsb"], "'label' of row 2 is 'low'; expected a number"),
        ([PAIR, {**PAIR, "label": None}], ["--task", "stsb"], "'label' of row 2 is None; expected a number"),
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
    dev = write_rows(tmp_path / "dev.jsonl", [{**PAIR, **GOOD}, {**PAIR, "sentence": "it", "label": 5}])
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
