"""`IsoBNModule` in models of sentence-transformers, on a tiny BERT with random weights."""

# ruff: noqa: E402 -- what may be missing is asked for before it is imported

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from helpers import same_bits

from isobn_kernels import IsoBN

for _module in ("accelerate", "datasets", "sentence_transformers"):
    pytest.importorskip(_module, reason='needs pip install "isobn_kernels[sentence-transformers]"')

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel

from isobn_kernels.integrations.sentence_transformers import IsoBNModule

WORDS = ["good", "bad", "film", "book", "very", "not", "the", "a", "was", "it"]
TEXTS = ["it was good", "the film was not bad", "a very bad book", "not the book", "good"]
D = 32
OPTIONS = {"eps": 1e-2, "momentum": 0.2, "beta": 0.4, "bias_correction": True, "stop_gradient": False}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT and its tokenizer, as from the hub."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=15, max_position_embeddings=40, initializer_range=0.2, **sizes)
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 40}')
    return folder


def make_model(encoder: Path, *more: torch.nn.Module, **options) -> SentenceTransformer:
    modules = [Transformer(str(encoder)), Pooling(D), IsoBNModule(D, **options), *more]
    return SentenceTransformer(modules=modules, device="cpu")


def step(model: SentenceTransformer, *batches: list[str]) -> list[torch.Tensor]:
    """A training forward of each batch."""
    model.train()
    return [model(model.preprocess(texts))["sentence_embedding"] for texts in batches]


def embed(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


def load(folder: Path, **options) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=True, **options)


def assert_same_state(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


def train(model: SentenceTransformer, folder: Path, loss: torch.nn.Module, **arguments) -> SentenceTransformerTrainer:
    draw = random.Random(0)
    pairs = [(f"it was {word}", f"the {draw.choice(WORDS)} was {word}") for word in draw.choices(WORDS, k=40)]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            num_train_epochs=4,
            learning_rate=1e-3,
            save_strategy="epoch",
            logging_strategy="epoch",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]}),
        loss=loss,
    )
    trainer.train(**arguments)
    return trainer


def test_evaluation_scales_the_pooled_embedding(encoder: Path) -> None:
    model = make_model(encoder)
    pooled = SentenceTransformer(modules=list(model)[:2], device="cpu")
    assert same_bits(embed(model), embed(pooled))  # the identity before training
    step(model, TEXTS)
    scale = model[2].isobn.scale
    assert not torch.equal(scale, torch.ones(D))
    assert same_bits(embed(model), embed(pooled) * scale)
    assert model[2].isobn.num_batches_tracked == 1  # encode is evaluation
    assert model.get_embedding_dimension() == model[2].get_embedding_dimension() == D


def test_other_features_pass(encoder: Path) -> None:
    features = {"sentence_embedding": torch.randn(4, D), "attention_mask": torch.ones(4, 3)}
    found = IsoBNModule(D)(features)
    assert found.keys() == features.keys()
    assert found["attention_mask"] is features["attention_mask"]


def test_several_forwards_before_one_backward(encoder: Path) -> None:
    """Each keeps the scale that it used, whatever later forwards do to the statistics."""
    module = IsoBNModule(D).train()
    inputs = [torch.randn(6, D, requires_grad=True) for _ in range(3)]
    scales, total = [], 0.0
    for x in inputs:
        total = total + module({"sentence_embedding": x})["sentence_embedding"].sum()
        scales.append(module.isobn.scale.clone())
    total.backward()
    assert len({tuple(scale.tolist()) for scale in scales}) == 3
    for x, scale in zip(inputs, scales, strict=True):
        assert same_bits(x.grad, scale.expand(6, D).contiguous())
    assert module.isobn.num_batches_tracked == 3


def test_training_and_round_trip(encoder: Path, tmp_path: Path) -> None:
    model = make_model(encoder, Normalize(), **OPTIONS)
    trainer = train(model, tmp_path / "run", losses.MultipleNegativesRankingLoss(model))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < logged[0]
    # Five steps an epoch; the anchors and the positives are two forwards.
    assert model[2].isobn.num_batches_tracked == 2 * 4 * 5
    model.save_pretrained(str(tmp_path / "out"))
    assert (tmp_path / "out" / "2_IsoBNModule" / "model.safetensors").is_file()
    saved = json.loads((tmp_path / "out" / "2_IsoBNModule" / "config.json").read_text())
    assert saved == {"num_features": D, "backend": "auto", **OPTIONS}

    loaded = load(tmp_path / "out")
    assert type(loaded[2]) is IsoBNModule
    assert repr(loaded[2]) == repr(model[2])
    assert repr(loaded[2].isobn) == repr(model[2].isobn)
    assert_same_state(loaded, model)
    assert same_bits(embed(loaded), embed(model))
    torch.testing.assert_close(embed(loaded).norm(dim=1), torch.ones(len(TEXTS)))
    step(loaded, TEXTS)
    assert loaded[2].isobn.num_batches_tracked == 2 * 4 * 5 + 1


def test_without_safetensors(encoder: Path, tmp_path: Path) -> None:
    module = IsoBNModule(D)
    module({"sentence_embedding": torch.randn(4, D)})
    module.save(str(tmp_path), safe_serialization=False)
    assert (tmp_path / "pytorch_model.bin").is_file()
    assert_same_state(IsoBNModule.load(str(tmp_path)), module)


def test_resumed_training_equals_the_uninterrupted_one(encoder: Path, tmp_path: Path) -> None:
    expected = make_model(encoder)
    train(expected, tmp_path, losses.MultipleNegativesRankingLoss(expected))
    model = make_model(encoder)
    checkpoint = str(tmp_path / "checkpoint-10")
    train(model, tmp_path, losses.MultipleNegativesRankingLoss(model), resume_from_checkpoint=checkpoint)
    assert model[2].isobn.num_batches_tracked == 2 * 4 * 5
    assert_same_state(model, expected)


def test_cached_loss_counts_each_mini_batch_once(encoder: Path, tmp_path: Path) -> None:
    model = make_model(encoder)
    train(model, tmp_path, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4))
    assert model[2].isobn.num_batches_tracked == 2 * 2 * 4 * 5


def loss_over_layers(kind: str, model: SentenceTransformer) -> torch.nn.Module:
    inner = losses.MultipleNegativesRankingLoss(model)
    if kind == "last layer":
        return inner
    if kind == "Matryoshka2dLoss":
        return losses.Matryoshka2dLoss(model, inner, [D, D // 2], n_layers_per_step=-1)
    weight = 1.0 if kind.endswith("KL") else 0.0
    return losses.AdaptiveLayerLoss(model, inner, n_layers_per_step=-1, kl_div_weight=weight)


@pytest.mark.parametrize("kind", ["AdaptiveLayerLoss", "AdaptiveLayerLoss, KL", "Matryoshka2dLoss"])
def test_losses_over_earlier_layers_count_the_last_layer_only(encoder: Path, kind: str) -> None:
    """The statistics are those of a loss on the last layer; embeddings of earlier layers take its scale."""
    layers, scales = [], []
    for loss_kind in ("last layer", kind):
        model = make_model(encoder, **OPTIONS).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss = loss_over_layers(loss_kind, model)
        model[2].register_forward_hook(lambda module, *_: scales.append(module.isobn.scale.clone()))
        for number in range(3):
            scales.clear()
            loss([model.preprocess(TEXTS[number:]), model.preprocess(TEXTS[: len(TEXTS) - number])], None).backward()
        layers.append(model[2])
    assert layers[1].isobn.num_batches_tracked == layers[0].isobn.num_batches_tracked > 0
    assert_same_state(layers[1], layers[0])
    # The last layer first, one forward or one for each side; then the embedding layer and the first one.
    assert len(scales) >= 3
    assert all(same_bits(scale, layers[1].isobn.scale) for scale in scales[1:])
    assert model[0].auto_model.get_input_embeddings().weight.grad.isfinite().all()


def test_embedding_of_an_earlier_layer_is_that_of_evaluation() -> None:
    torch.manual_seed(0)
    module = IsoBNModule(D)
    hidden = tuple(torch.randn(6, 3, D, requires_grad=True) for _ in range(3))

    def features(layer: int) -> dict:
        tokens = hidden[layer]
        return {"token_embeddings": tokens, "all_layer_embeddings": hidden, "sentence_embedding": tokens.mean(dim=1)}

    module(features(2))
    for layer in (0, 1):
        scale = module.isobn.scale.clone()
        out = module(features(layer))["sentence_embedding"]
        assert same_bits(out, hidden[layer].mean(dim=1) * scale)
        assert module.isobn.num_batches_tracked == layer + 1
        module(features(2))  # a later step does not reach the gradient of this one
        assert not same_bits(module.isobn.scale, scale)
        out.sum().backward()
        torch.testing.assert_close(hidden[layer].grad, (scale / 3).expand(6, 3, D))
    # FSDP in mixed precision rounds the statistics: they are float32 again, as in an ordinary step.
    module.isobn.scale.data = module.isobn.scale.half()
    with pytest.warns(UserWarning, match="float32 again"):
        module(features(0))
    assert module.isobn.scale.dtype is torch.float32
    # Where the states of all layers are asked for, but not one of them is put in place of the last: an ordinary step.
    module({**features(2), "token_embeddings": hidden[2] * 1})
    assert module.isobn.num_batches_tracked == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_the_statistics(encoder: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(encoder)
    step(model, TEXTS, TEXTS[:3])
    model.save_pretrained(str(tmp_path))
    loaded = load(tmp_path, model_kwargs={"dtype": dtype})
    for half in (loaded, copy.deepcopy(model).to(dtype)):
        assert half[0].auto_model.dtype == dtype
        assert_same_state(half[2], model[2])
        assert embed(half).dtype == dtype
        (out,) = step(half, TEXTS)
        assert out.dtype == dtype
        assert half[2].isobn.running_cov.dtype == torch.float32


def test_copies_are_independent(encoder: Path) -> None:
    model = make_model(encoder)
    step(model, TEXTS)
    other = copy.deepcopy(model)
    assert same_bits(embed(other), embed(model))
    step(other, TEXTS)
    assert model[2].isobn.num_batches_tracked == 1
    assert not torch.equal(other[2].isobn.running_cov, model[2].isobn.running_cov)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": 2}, ValueError, "momentum must be in"),
        ({"momentun": 0.1}, TypeError, "momentun"),
        ({"process_group": None}, TypeError, "process_group"),
    ],
)
def test_wrong_options(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        IsoBNModule(D, **options)


def test_defaults_are_those_of_the_layer() -> None:
    assert (
        vars(IsoBNModule(D).isobn).items()
        >= {name: value for name, value in vars(IsoBN(D)).items() if not name.startswith("_")}.items()
    )


def test_embedding_of_another_size(encoder: Path) -> None:
    modules = [Transformer(str(encoder)), Pooling(D), IsoBNModule(D + 1)]
    model = SentenceTransformer(modules=modules, device="cpu")
    with pytest.raises(ValueError, match=f"{D + 1}"):
        model.encode(TEXTS)
