"""The scripts of examples/, as a user starts them, on a tiny BERT with random weights."""

import json
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import isobn_kernels
from isobn_kernels import IsoBN

ROOT = Path(isobn_kernels.__file__).parents[1]
WORDS = ["good", "bad", "film", "book", "very", "not", "the", "a", "was", "it"]


def needs(extra: str, *modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f'needs pip install "isobn_kernels[{extra}]"')


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command in an empty folder; returns what it printed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def run(*words: str) -> str:
        process = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    return run


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """A folder with a tiny BERT and its tokenizer, as from the hub."""
    from transformers import BertConfig, BertModel

    folder = tmp_path / "encoder"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=15, max_position_embeddings=40, initializer_range=0.2, **sizes)
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 40}')
    return str(folder)


def write_rows(path: Path, names: tuple[str, ...], count: int) -> str:
    """Pairs of texts, and a third field, where it is asked for, that is 1 where they say the same and else 0."""
    draw = random.Random(count)
    rows = []
    for _ in range(count):
        first, second = draw.choice(WORDS[:2]), draw.choice(WORDS[:2])
        texts = f"it was {first}", f"the {draw.choice(WORDS)} was {second}"
        rows.append([*texts, int(first == second)])
    path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=False))) for row in rows) + "\n")
    return str(path)


def number_after(words: str, printed: str) -> float:
    (found,) = re.findall(rf"{words} ([\d.]+)", printed)
    return float(found)


@needs("finetune", "accelerate", "datasets", "transformers")
def test_trainer(run, encoder: str, tmp_path: Path) -> None:
    names = ("sentence1", "sentence2", "label")
    files = ["--train-file", write_rows(tmp_path / "train.jsonl", names, 40)]
    files += ["--dev-file", write_rows(tmp_path / "dev.jsonl", names, 16)]
    printed = run(str(ROOT / "examples/trainer.py"), "--model", encoder, *files, "--epochs", "2", "--output", "out")
    assert 0 <= number_after("accuracy", printed) <= 1
    assert "a IsoBNBertForSequenceClassification" in printed

    from transformers import AutoModelForSequenceClassification

    import isobn_kernels.integrations.transformers  # noqa: F401

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.classifier.isobn.num_batches_tracked == 2 * 5
    assert not torch.equal(model.classifier.isobn.scale, torch.ones(32))


@needs("sentence-transformers", "accelerate", "datasets", "sentence_transformers")
def test_sentence_embeddings(run, encoder: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", ("anchor", "positive"), 64)
    script = str(ROOT / "examples/sentence_embeddings.py")
    printed = run(script, "--model", encoder, "--train-file", file, "--epochs", "2", "--output", "out")
    assert number_after("loss", printed) > 0
    assert abs(number_after("similarity of the first pair", printed)) <= 1

    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tmp_path / "out"), device="cpu", trust_remote_code=True)
    assert model[2].isobn.num_batches_tracked == 2 * 2 * 2  # epochs, batches, forwards of a step
    assert not torch.equal(model[2].isobn.scale, torch.ones(32))


def test_ddp_trains_the_same_model_on_one_process_and_on_two(run, tmp_path: Path) -> None:
    script = [str(ROOT / "examples/ddp.py"), "--epochs", "1", "--output"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for printed in (run(*script, "one.pt"), run(*launcher, *script, "two.pt")):
        assert number_after("epoch 1: training accuracy", printed) > 0.9
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    isobn = IsoBN(128)
    isobn.load_state_dict({name[2:]: tensor for name, tensor in one.items() if name.startswith("2.")})
    assert isobn.num_batches_tracked == 2048 / 64
    assert not torch.equal(isobn.scale, torch.ones(128))
    assert two.keys() == one.keys()
    # Adam makes a whole step of a rounding error where a gradient is near 0, so that no bound follows from rounding.
    # Without a common batch the covariances are 0.8 apart.
    assert (two["2.running_cov"] - one["2.running_cov"]).abs().max() <= 0.1 * one["2.running_cov"].abs().max()
