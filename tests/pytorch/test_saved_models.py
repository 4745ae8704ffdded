"""Models that an earlier version saved load, and give the same outputs.

`make` wrote the files in tests/pytorch/saved_models at commit 6b881cf, the first version whose models must load::

    git worktree add /tmp/isobn-6b881cf 6b881cf && cd /tmp/isobn-6b881cf
    python .../tests/pytorch/test_saved_models.py .../tests/pytorch/saved_models
"""

import sys
from pathlib import Path

import pytest
import torch

from isobn_kernels import IsoBN

FOLDER = Path(__file__).parent / "saved_models"
OPTIONS = {"momentum": 0.2, "eps": 1e-2, "beta": 0.4, "bias_correction": True, "backend": "reference"}
# The two are made of a few float32 operations each; another processor may round each of them in another way.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def make(folder):
    """Write the files: a layer's state, the layer itself, a tiny BERT, and what goes in and comes out of each."""
    from transformers import BertConfig, BertForSequenceClassification

    from isobn_kernels.integrations.transformers import apply_isobn

    torch.manual_seed(0)
    torch.set_num_threads(1)
    batches = torch.randn(4, 16, 6) @ torch.randn(6, 6)
    layer = IsoBN(6, **OPTIONS)
    for x in batches[:-1]:
        layer(x)
    torch.save(layer.state_dict(), folder / "layer_state.pt")
    torch.save(layer, folder / "layer.pt")
    x = batches[-1]
    evaluated, trained = layer.eval()(x), layer.train()(x)
    after = layer.state_dict()
    torch.save({"x": x, "evaluated": evaluated, "trained": trained, "after": after}, folder / "layer_outputs.pt")

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=30, max_position_embeddings=12, **sizes)
    model = apply_isobn(BertForSequenceClassification(config), momentum=0.1)
    for _ in range(3):
        model.train()(torch.randint(30, (8, 10)))
    model.eval().save_pretrained(folder / "bert")
    ids = torch.randint(30, (4, 10))
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits}, folder / "bert_outputs.pt")


def load(name, weights_only=True):
    return torch.load(FOLDER / name, weights_only=weights_only)


def layer_from_state():
    layer = IsoBN(6, **OPTIONS)
    state = load("layer_state.pt")
    assert state._metadata[""]["version"] == IsoBN._version
    assert str(layer.load_state_dict(state)) == "<All keys matched successfully>"
    return layer


@pytest.mark.parametrize("make_layer", [layer_from_state, lambda: load("layer.pt", weights_only=False)])
def test_layer(make_layer):
    layer, expected = make_layer(), load("layer_outputs.pt")
    assert repr(layer) == "IsoBN(6, eps=0.01, momentum=0.2, beta=0.4, bias_correction=True, backend='reference')"
    assert torch.equal(layer.eval()(expected["x"]), expected["evaluated"])  # one product: the same bits everywhere
    torch.testing.assert_close(layer.train()(expected["x"]), expected["trained"], **CLOSE)
    assert list(layer.state_dict()) == list(expected["after"])
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, expected["after"][name], **CLOSE)


def test_bert():
    transformers = pytest.importorskip("transformers")
    import isobn_kernels.integrations.transformers

    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        FOLDER / "bert", output_loading_info=True
    )
    assert not any(info.values())
    assert type(model) is isobn_kernels.integrations.transformers.IsoBNBertForSequenceClassification
    assert repr(model.classifier.isobn) == "IsoBN(8, eps=0.001, momentum=0.1, beta=0.5)"
    assert model.classifier.isobn.num_batches_tracked == 3
    assert (model.classifier.isobn.scale != 1).all()
    expected = load("bert_outputs.pt")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(expected["ids"]).logits, expected["logits"], **CLOSE)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    make(Path(sys.argv[1]))
