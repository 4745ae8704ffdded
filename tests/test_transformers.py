"""`IsoBNForSequenceClassification` over tiny encoders with random weights."""

from pathlib import Path

import pytest
import torch

from isobn_kernels import IsoBN

pytest.importorskip("transformers", reason='needs pip install "isobn_kernels[finetune]"')

from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    GPT2Config,
    T5Config,
)

from isobn_kernels.integrations.transformers import IsoBNClassifierConfig, IsoBNForSequenceClassification

TINY = {"vocab_size": 15, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def tiny_classifier(**config) -> IsoBNForSequenceClassification:
    torch.manual_seed(0)
    return IsoBNForSequenceClassification(IsoBNClassifierConfig(BertConfig(**TINY), num_labels=3, **config))


def batch(rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, 5, dtype=torch.long)
    mask[0, 3:] = 0
    return {"input_ids": torch.randint(5, 15, (rows, 5), generator=generator), "attention_mask": mask}


def trained_classifier(**config) -> IsoBNForSequenceClassification:
    model = tiny_classifier(**config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(**batch(), labels=torch.tensor([0, 1, 2, 0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("normalizer", ["isobn", "none"])
def test_round_trip(normalizer: str, tmp_path: Path) -> None:
    options = {"momentum": 0.2, "eps": 1e-2} if normalizer == "isobn" else None
    model = trained_classifier(normalizer=normalizer, isobn_options=options)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is IsoBNForSequenceClassification
    assert repr(loaded.isobn) == repr(model.isobn)
    for (name, expected), (loaded_name, found) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == loaded_name
        assert torch.equal(expected, found), name
    assert torch.equal(model(**batch()).logits, loaded(**batch()).logits)


def test_forward_is_pooler_isobn_linear() -> None:
    model = trained_classifier()
    embedding = model.encoder(**batch()).pooler_output
    assert torch.equal(model.embed(**batch()), embedding)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    output = model(**batch(), labels=labels)
    torch.testing.assert_close(output.logits, model.classifier(embedding * model.isobn.scale))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert not torch.equal(model.isobn.scale, torch.ones(32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_statistics(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained_classifier()
    model.save_pretrained(tmp_path)
    loaded = IsoBNForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    converted = trained_classifier().to(dtype)
    for half in (loaded, converted):
        assert half.classifier.weight.dtype == dtype
        for (name, expected), found in zip(model.isobn.named_buffers(), half.isobn.buffers(), strict=True):
            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), name
        assert half(**batch()).logits.dtype == dtype


def test_meta_device_and_missing_statistics(tmp_path: Path) -> None:
    model = trained_classifier(normalizer="none")
    with torch.device("meta"):
        assert tiny_classifier().isobn.running_cov.is_meta
    # A checkpoint without statistics: memory that loading left as it was would show.
    model.config.normalizer = "isobn"
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = IsoBNForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
        for found, expected in zip(loaded.isobn.buffers(), IsoBN(32).buffers(), strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


def test_from_encoder(tmp_path: Path) -> None:
    encoder = BertModel(BertConfig(**TINY)).half()
    encoder.save_pretrained(tmp_path)
    model = IsoBNForSequenceClassification.from_encoder(tmp_path, num_labels=4, dropout=0.3)
    for expected, found in zip(encoder.parameters(), model.encoder.parameters(), strict=True):
        # In float32 whatever the checkpoint is in.
        assert found.dtype == torch.float32
        assert torch.equal(expected.float(), found)
    assert model.classifier.out_features == 4
    assert model.dropout.p == 0.3
    assert not model.pooler_is_new
    assert model.encoder.config is model.config.encoder
    assert model.encoder.config._attn_implementation == "sdpa"


def test_checkpoint_without_pooler(tmp_path: Path) -> None:
    BertModel(BertConfig(**TINY), add_pooling_layer=False).save_pretrained(tmp_path)
    assert IsoBNForSequenceClassification.from_encoder(tmp_path).pooler_is_new


def test_encoder_without_pooler(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=15, dim=8, n_heads=2, n_layers=1, hidden_dim=16)
    model = IsoBNForSequenceClassification(IsoBNClassifierConfig(config)).train()
    model(**batch())
    model.eval().save_pretrained(tmp_path)
    loaded = IsoBNForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(model(**batch()).logits, loaded(**batch()).logits)
    assert model.embed(**batch()).abs().max() < 1


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=15, n_embd=8, n_head=2, n_layer=1),
        T5Config(vocab_size=15, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4),
    ],
)
def test_not_an_encoder(config) -> None:
    with pytest.raises(ValueError, match=f"must be an encoder such as BERT, got a model of type '{config.model_type}'"):
        IsoBNForSequenceClassification(IsoBNClassifierConfig(config))


def test_wrong_configuration() -> None:
    with pytest.raises(ValueError, match=r"normalizer must be one of .*, got 'batch'"):
        IsoBNClassifierConfig(normalizer="batch")
    with pytest.raises(ValueError, match="momentum must be in"):
        tiny_classifier(isobn_options={"momentum": 2})


def test_gradient_checkpointing_updates_once() -> None:
    model = tiny_classifier(dropout=0.0).train()
    # The older name goes in transformers 6, the newer one came during 5.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(**batch(), labels=torch.zeros(6, dtype=torch.long)).loss.backward()
    assert model.isobn.num_batches_tracked == 1
    assert model.get_input_embeddings().weight.grad is not None
