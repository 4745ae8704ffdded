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
import transformers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
)

from isobn_kernels.cli import _training
from isobn_kernels.cli._data import TASKS, Data, load_data
from isobn_kernels.cli._errors import CommandError
from isobn_kernels.cli._folder import ResultsFolder

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
    folder = ResultsFolder(tmp_path)
    assert folder.locked()
    name = _training.run_folder("isobn", 1)
    folder.claim([name])
    assert _training._last_checkpoint(folder, name) is None
    for step, best in ((4, 4), (8, 4), (12, 12)):
        (tmp_path / name / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / name / f"checkpoint-{step}" / "model").touch()
        (tmp_path / name / f"checkpoint-{step}" / "trainer_state.json").write_text(f'{{"best_global_step": {best}}}')
        if step < 12:  # the last was killed before it was listed
            folder.record(f"{name}/checkpoint-{step}")
    assert _training._last_checkpoint(folder, name) == str(tmp_path / name / "checkpoint-8")
    # It goes on from the last one, and at the end takes the best: neither may be gone.
    (tmp_path / name / "checkpoint-8" / "model").unlink()
    assert _training._last_checkpoint(folder, name) == str(tmp_path / name / "checkpoint-4")
    (tmp_path / name / "checkpoint-8" / "model").touch()
    (tmp_path / name / "checkpoint-4" / "model").unlink()
    assert _training._last_checkpoint(folder, name) is None
    folder.unlock()


def test_embeddings_that_are_all_equal(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = write_rows(tmp_path / "train.jsonl", pairs(16, 0))
    dev = write_rows(tmp_path / "dev.jsonl", [{**PAIR, "label": label} for label in (0, 1)])
    words = ["finetune", "--model", str(encoder), "--train-file", str(train), "--dev-file", str(dev)]
    assert cli.main([*words, "--output", str(tmp_path / "out"), "--epochs", "1", "--seeds", "1"]) == 2
    assert "all 2 dev texts have the same embedding" in capsys.readouterr().err


def test_embeddings_that_rounding_moved_apart_are_equal() -> None:
    x = torch.randn(1, 8).expand(6, 8)
    assert _training._are_equal(x)
    assert _training._are_equal(x * (1 + 1e-6 * torch.rand(6, 8)))
    assert _training._are_equal(torch.zeros(2, 8))
    assert not _training._are_equal(x * (1 + 1e-3 * torch.rand(6, 8)))


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
    gpt2, no_words, more_words, no_padding, one_type, cut = (tmp_path / name for name in "abcdef")
    GPT2Model(GPT2Config(vocab_size=15, n_embd=8, n_head=2, n_layer=1)).save_pretrained(gpt2)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(gpt2)
    for folder in (no_words, more_words, no_padding, cut):
        shutil.copytree(encoder, folder)
    (no_words / "vocab.txt").unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{n}" for n in range(10)), *WORDS]
    (more_words / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = json.loads((no_padding / "tokenizer_config.json").read_text())
    (no_padding / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "pad_token": None}))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    BertModel(BertConfig(**TINY, max_position_embeddings=40, type_vocab_size=1)).save_pretrained(one_type)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(one_type)
    output = tmp_path / "out"
    before = run_finetune(encoder, train, dev, output, "--epochs", "1")
    for model, message in {
        gpt2: "expected one of Albert",
        no_words: "knows no word of the training texts",
        more_words: "the tokenizer gives input_ids up to",
        no_padding: "has no padding token",
        one_type: "the tokenizer gives token_type_ids up to 1, and the model takes those below 1",
        cut: "cannot be loaded",
        tmp_path / "nothing": "expected the name of an encoder on the hub, or a folder",
    }.items():
        words = ["finetune", "--model", str(model), "--train-file", str(train), "--dev-file", str(dev)]
        assert cli.main([*words, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err, model
        # And the results of the command before are still there.
        assert json.loads((output / "results.json").read_text()) == before


@pytest.fixture(scope="module")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    return write_rows(folder / "train.jsonl", pairs(32, 0)), write_rows(folder / "dev.jsonl", pairs(20, 1))


@pytest.mark.parametrize("normalizer", ["isobn", "none"])
def test_a_classifier_gets_a_new_output_layer(
    normalizer: str, encoder: Path, data_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of a classifier of another task only the encoder goes on, also where it has as many classes, or IsoBN."""
    more = ["--learning-rate", "1e-3"]
    run_finetune(encoder, *data_files, tmp_path / "first", *more, "--normalizer", normalizer)
    classifier, only = tmp_path / "first" / normalizer, tmp_path / "only"
    AutoModel.from_pretrained(classifier).save_pretrained(only)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(only)
    more += ["--normalizer", "none", "isobn", "--epochs", "1", "--seeds", "2"]
    results = [run_finetune(model, *data_files, tmp_path / model.name, *more) for model in (classifier, only)]
    for a, b in zip(*(found["runs"] for found in results), strict=True):
        assert {**a, "train_seconds": 0} == {**b, "train_seconds": 0}
    first, second = (
        AutoModelForSequenceClassification.from_pretrained(path)
        for path in (classifier, tmp_path / normalizer / "isobn")
    )
    assert second.classifier.isobn.num_batches_tracked == 2
    assert not torch.allclose(first.classifier.weight, second.classifier.weight, atol=0.01)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / normalizer / "none")
    assert type(plain) is BertForSequenceClassification


@pytest.mark.parametrize(
    ("kind", "options", "limit"),
    [
        ("Bert", {}, 40),
        ("Roberta", {"pad_token_id": 0}, 39),
        ("Roberta", {"pad_token_id": 3}, 36),
        ("XLMRoberta", {"pad_token_id": 1}, 38),
        ("MPNet", {"pad_token_id": 0}, 38),  # whose code takes 1 for padding, whatever its configuration says
        ("Electra", {}, 40),
        ("DistilBert", {}, 40),
    ],
)
def test_texts_as_long_as_the_model_takes(
    kind: str, options: dict, limit: int, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / kind
    sizes = {**TINY, **options, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 40}
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).save_pretrained(model)
    shutil.copy(encoder / "vocab.txt", model)
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')  # no length, as from scratch
    long = [{"sentence": " ".join(random.Random(n).choices(WORDS, k=60)), "label": n % 2} for n in range(8)]
    files = [write_rows(tmp_path / f"{name}.jsonl", long) for name in ("train", "dev")]
    words = ["finetune", "--model", str(model), "--train-file", str(files[0]), "--dev-file", str(files[1])]
    words += ["--output", str(tmp_path / "out"), "--max-length"]
    assert cli.main([*words, str(limit + 1)]) == 2
    assert f"takes at most {limit} tokens" in capsys.readouterr().err
    assert cli.main([*words, "2"]) == 2
    assert "2 tokens leave no room for text; at least 3 are needed" in capsys.readouterr().err
    data = load_data(None, *files)
    start = _training.load_start(str(model), data, None)
    assert start.max_length == limit
    tokens = start.tokenizer(list(data.train["sentence"]), truncation=True, max_length=limit, return_tensors="pt")
    start.model_class(start.config).eval()(**tokens)


def test_output_in_a_project(
    encoder: Path, data_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--output .`` leaves alone what is there: logs in ./runs, other models, tables and hidden files."""
    mine = [
        "runs/Nov01/events.out",
        "runs/isobn-seed7/run.json",
        "models/a.bin",
        "results.csv",
        ".git/HEAD",
        "isobn.py",
    ]
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    monkeypatch.chdir(tmp_path)
    for seed in ("1", "2"):  # the second replaces the results of the first
        run_finetune(encoder, *data_files, Path("."), "--epochs", "1", "--seeds", seed)
    for name in mine:
        assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "runs/isobn-seed1").exists()
    assert (tmp_path / "runs/isobn-seed2/run.json").exists()


def test_what_the_folder_holds_is_in_its_table(
    encoder: Path, data_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out"
    arguments = (encoder, *data_files, output, "--epochs", "1")
    whole = run_finetune(*arguments, "--normalizer", "isobn", "none")
    # More runs may be added; those that are there stay, in the table too.
    more = run_finetune(*arguments, "--normalizer", "isobn", "--seeds", "2", "--resume")
    assert [(run["normalizer"], run["seed"]) for run in more["runs"]] == [("isobn", 2), ("isobn", 1), ("none", 1)]
    assert more["runs"][1:] == whole["runs"]

    words = ["finetune", "--model", str(encoder), "--train-file", str(data_files[0]), "--dev-file", str(data_files[1])]
    words += ["--max-length", "16", "--epochs", "1", "--seeds", "1", "--resume", "--output", str(output)]
    manifest = output / "isobn-manifest.json"
    text = manifest.read_text()
    changes = {
        '"the number of processes": 1': ('"the number of processes": 2', "the number of processes was 2, now 1"),
        f'"the version of torch": "{torch.__version__}"': ('"the version of torch": "1.0"', "version of torch was 1.0"),
    }
    for before, (after, message) in changes.items():
        assert before in text
        manifest.write_text(text.replace(before, after))
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err
    manifest.write_text(text)
    other = tmp_path / "encoder"
    shutil.copytree(encoder, other)  # the same model in another place is the same model
    assert cli.main([*words[:2], str(other), *words[3:]]) == 0
    BertModel(BertConfig(**TINY, max_position_embeddings=40)).save_pretrained(other)
    assert cli.main([*words[:2], str(other), *words[3:]]) == 2
    assert "--resume: the weights of --model changed. " in capsys.readouterr().err
    rows = pairs(32, 0)
    changed = write_rows(tmp_path / "train.jsonl", [{**rows[0], "label": 1 - rows[0]["label"]}, *rows[1:]])
    assert cli.main([*words[:4], str(changed), *words[5:]]) == 2
    assert "--resume: the training rows changed. " in capsys.readouterr().err
    renamed = []
    for file in data_files:
        lines = map(json.loads, file.read_text().splitlines())
        renamed.append(
            write_rows(tmp_path / f"renamed-{file.name}", [{**row, "label": row["label"] + 1} for row in lines])
        )
    assert cli.main([*words[:4], str(renamed[0]), words[5], str(renamed[1]), *words[7:]]) == 2
    assert "--resume: the names of the classes changed. " in capsys.readouterr().err

    shutil.move(output / "none", tmp_path / "moved")
    assert cli.main([*words, "--seeds", "3"]) == 2
    assert "the best model so far, is gone" in capsys.readouterr().err
    assert json.loads((output / "results.json").read_text())["runs"] == [more["runs"][n] for n in (1, 2, 0)]

    # A new command does not leave the model of a normalizer beside a table that has no such row.
    shutil.move(tmp_path / "moved", output / "none")
    assert [run["seed"] for run in run_finetune(*arguments, "--seeds", "4")["runs"]] == [4]
    assert not (output / "none").exists()
    assert sorted(path.name for path in (output / "runs").iterdir()) == ["isobn-seed4"]


def test_the_model_lies_among_the_results(
    encoder: Path, data_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read before it is replaced, kept for the command to be resumed, and the same for all seeds."""
    output, more = tmp_path / "out", ["--normalizer", "none", "--learning-rate", "1e-3", "--epochs", "2"]
    run_finetune(encoder, *data_files, output, *more, "--seeds", "7")
    shutil.copytree(output / "none", tmp_path / "kept")
    expected = run_finetune(tmp_path / "kept", *data_files, tmp_path / "other", *more, "--seeds", "1", "2")

    keep = _training._keep

    def interrupted(folder, run, *args) -> None:
        keep(folder, run, *args)
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(_training, "_keep", interrupted)
        run_finetune(output / "none", *data_files, output, *more, "--seeds", "1", "2")
    assert (output / "start/model.safetensors").read_bytes() == (tmp_path / "kept/model.safetensors").read_bytes()
    shutil.move(output, tmp_path / "moved")
    output = tmp_path / "moved"
    found = run_finetune(output / "none", *data_files, output, *more, "--seeds", "1", "2", "--resume")
    for a, b in zip(found["runs"], expected["runs"], strict=True):
        assert {**a, "train_seconds": 0} == {**b, "train_seconds": 0}
    # That copy may itself be where the next command starts.
    again = run_finetune(output / "start", *data_files, output, *more, "--seeds", "2")
    assert {**again["runs"][0], "train_seconds": 0} == {**expected["runs"][1], "train_seconds": 0}


@pytest.mark.parametrize("option", ["--train-file", "--dev-file"])
def test_data_among_the_results_are_refused(
    option: str, encoder: Path, data_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out"
    folder = ResultsFolder(output)
    assert folder.locked()
    folder.start({"--epochs": 1}, ["isobn"], {})
    (output / "isobn").mkdir()
    shutil.copy(data_files[0], output / "isobn" / "data.jsonl")
    folder.record("isobn")
    folder.unlock()
    words = ["finetune", "--model", str(encoder), "--train-file", str(data_files[0]), "--dev-file", str(data_files[1])]
    assert cli.main([*words, "--output", str(output), option, str(output / "isobn" / "data.jsonl")]) == 2
    assert f"{option} {output / 'isobn' / 'data.jsonl'} is a result in --output" in capsys.readouterr().err
    assert (output / "isobn" / "data.jsonl").exists()


def test_a_second_command_waits(
    encoder: Path, data_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    other = ResultsFolder(tmp_path / "out")
    assert other.locked()
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert not (tmp_path / "out" / "isobn-manifest.json").exists()
        if len(slept) == 2:
            other.unlock()

    monkeypatch.setattr(finetune.time, "sleep", sleep)
    run_finetune(encoder, *data_files, tmp_path / "out", "--epochs", "1")
    assert len(slept) == 2
    assert "waiting: another command is at work in" in capsys.readouterr().out


class Killed(BaseException):
    pass


@pytest.mark.parametrize("last", [2, 4, 6, 9, 12])
def test_killed_between_two_files(
    last: int, encoder: Path, data_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of the nth change is not written any more: what is there is taken up, and the end is the same."""
    arguments = (encoder, *data_files)
    more = ["--epochs", "2", "--learning-rate", "1e-3"]
    expected = run_finetune(*arguments, tmp_path / "whole", *more)
    saved = 0

    def save(folder: ResultsFolder) -> None:
        nonlocal saved
        saved += 1
        if saved > last:
            raise Killed
        as_it_is(folder)

    as_it_is = ResultsFolder._save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResultsFolder, "_save", save)
        run_finetune(*arguments, tmp_path / "out", *more)
    found = run_finetune(*arguments, tmp_path / "out", *more, "--resume")
    assert {**found["runs"][0], "train_seconds": 0} == {**expected["runs"][0], "train_seconds": 0}
    listed = [sorted(str(p.relative_to(tmp_path / n)) for p in (tmp_path / n).rglob("*")) for n in ("whole", "out")]
    assert listed[0] == listed[1]
    weights = [(tmp_path / name / "isobn" / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_a_command_moved_and_resumed_after_its_last_epoch(
    encoder: Path, data_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best checkpoint is found at its new place: the model that is kept is that of the best epoch."""
    scores = [0.5, 0.9, 0.4]

    def run(output: Path, *more: str) -> dict:
        ahead = iter([*scores, 0.9] if not more else [0.9])
        monkeypatch.setattr(Data, "compute_metrics", lambda self, prediction: {"accuracy": next(ahead)})
        return run_finetune(encoder, *data_files, output, *more)

    expected = run(tmp_path / "whole")
    keep = _training._keep
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(_training, "_keep", lambda *args: (_ for _ in ()).throw(Interrupted))
        run(tmp_path / "out")
    assert _training._keep is keep
    shutil.move(tmp_path / "out", tmp_path / "moved")
    found = run(tmp_path / "moved", "--resume")
    assert {**found["runs"][0], "train_seconds": 0} == {**expected["runs"][0], "train_seconds": 0}
    weights = [(tmp_path / name / "isobn" / "model.safetensors").read_bytes() for name in ("whole", "moved")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("missing", [("sentencepiece",), ("google", "google.protobuf")])
def test_a_tokenizer_that_needs_more_packages(
    missing: tuple[str, ...], encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)

    def fail(*args, **kwargs):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(CommandError, match=rf"{missing[-1]}.* not installed.*isobn_kernels\[finetune\]"):
        _training.load_start(str(encoder), None, None)


def test_fuzz_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short version; the long one is ``python -m tools.fuzz_finetune``."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from tools import fuzz_finetune

    failures, counts = fuzz_finetune.run(40, 7, tmp_path)
    assert not failures, "\n".join(failures)
    assert counts["read as written"] > 5


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
        ([GOOD, {"sentence": "it", "label": 0.5}], [], "'label' of row 2 is 0.5; expected a class"),
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
        ("text.txt", "a", "expected a file ending in .json, .jsonl, .csv, .tsv"),
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
