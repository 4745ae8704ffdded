"""`fold_isobn`, and the export of models before and after it."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from tolerance import assert_right
from torch import nn

from isobn_kernels import IsoBN, fold_isobn


def trained(model: nn.Module, D: int = 16) -> nn.Module:
    torch.manual_seed(0)
    model.train()
    for _ in range(5):
        model(torch.randn(32, D) * torch.linspace(0.1, 3, D) + 1)
    return model.eval()


class Classifier(nn.Module):
    """As users write it: the order of the layers stands in the code."""

    def __init__(self, D: int = 16, linear: int = 16) -> None:
        super().__init__()
        self.isobn, self.dropout, self.classifier = IsoBN(D), nn.Dropout(0.5), nn.Linear(linear, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.isobn(x.tanh())))


def isobn_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, IsoBN)]


SEQUENCES = {
    "linear": lambda: nn.Sequential(IsoBN(16), nn.Linear(16, 3)),
    "dropout": lambda: nn.Sequential(nn.Tanh(), IsoBN(16), nn.Dropout(0.5), nn.Linear(16, 3)),
    "no bias": lambda: nn.Sequential(IsoBN(16), nn.Linear(16, 3, bias=False)),
    "nested": lambda: nn.Sequential(nn.Sequential(IsoBN(16), nn.Identity(), nn.Linear(16, 16)), nn.Tanh()),
    "two": lambda: nn.Sequential(IsoBN(16), nn.Linear(16, 16), nn.Tanh(), IsoBN(16), nn.Linear(16, 3)),
}


@pytest.mark.parametrize("build", SEQUENCES.values(), ids=SEQUENCES)
def test_sequence(build) -> None:
    model = trained(build())
    names = [name for name, _ in model.named_parameters()]
    x = torch.randn(8, 16)
    expected, exact = model(x), copy.deepcopy(model).double()(x.double())
    assert fold_isobn(model) is model
    assert not isobn_layers(model)
    assert_right({"out": model(x)}, {"out": expected}, {"out": exact})
    assert list(model.state_dict()) == names


def test_layer_given_by_name() -> None:
    model = trained(nn.ModuleDict({"head": Classifier()})["head"])
    outer = nn.Sequential(nn.Identity(), model)
    x = torch.randn(8, 16)
    expected, exact = outer(x), copy.deepcopy(outer).double()(x.double())
    fold_isobn(outer, {"1.isobn": "1.classifier"})
    assert not isobn_layers(outer)
    assert_right({"out": outer(x)}, {"out": expected}, {"out": exact})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_type_are_rounded_once(dtype: torch.dtype) -> None:
    model = trained(SEQUENCES["linear"]()).to(dtype)
    weight, scale = model[1].weight.detach().clone(), model[0].scale
    fold_isobn(model)
    assert model[1].weight.dtype == dtype
    assert torch.equal(model[1].weight, (weight.double() * scale.double()).to(scale.dtype).to(dtype))


def test_untrained_is_the_identity() -> None:
    model = SEQUENCES["linear"]()
    weight = model[1].weight.detach().clone()
    assert torch.equal(fold_isobn(model)[1].weight, weight)


def shared_isobn() -> nn.Module:
    isobn = IsoBN(16)
    return nn.ModuleList([nn.Sequential(isobn, nn.Linear(16, 16)), nn.Sequential(isobn, nn.Linear(16, 16))])


def shared_linear() -> nn.Module:
    linear = nn.Linear(16, 16)
    return nn.Sequential(linear, nn.ReLU(), IsoBN(16), linear)


def tied_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), IsoBN(16), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    return model


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self[0](x)
        return self[1](y) + y


class Shifted(IsoBN):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def hooked() -> nn.Module:
    model = nn.Sequential(IsoBN(16), nn.Linear(16, 3))
    model[0].register_forward_hook(lambda module, args, out: out + 1)
    return model


def with_weight_norm() -> nn.Module:
    return nn.Sequential(IsoBN(16), nn.utils.parametrizations.weight_norm(nn.Linear(16, 3)))


def pruned() -> nn.Module:
    return nn.Sequential(IsoBN(16), nn.utils.prune.random_unstructured(nn.Linear(16, 3), "weight", 0.5))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.linear = IsoBN(16), IsoBN(16), nn.Linear(16, 3)


BAD = {
    "IsoBN in two places": (shared_isobn, None, "each be in one place only, got '0.0', '1.0', '0.1.weight'"),
    "linear layer in two places": (shared_linear, None, "in one place only, got '2', '0.weight', '3.weight'"),
    "tied weight": (tied_weight, None, "in one place only, got '1', '0.weight', '2.weight'"),
    "two IsoBN, one linear layer": (Two, {"a": "linear", "b": "linear"}, "not one to one"),
    "a forward of its own": (lambda: Residual(IsoBN(16), nn.Linear(16, 16)), None, "behind IsoBN '0' is not known"),
    "a subclass": (lambda: nn.Sequential(Shifted(16), nn.Linear(16, 3)), None, "hooks or a forward of its own"),
    "a hook": (hooked, None, "hooks or a forward of its own"),
    "weight norm": (with_weight_norm, None, "weight of '1' is computed from others"),
    "pruning": (pruned, None, "weight of '1' is computed from others"),
    "no IsoBN": (lambda: nn.Linear(2, 2), None, "no IsoBN to fold"),
    "unknown layer": (Classifier, None, "behind IsoBN 'isobn' is not known; expected IsoBN, dropout and"),
    "not next": (lambda: nn.Sequential(IsoBN(4), nn.Tanh(), nn.Linear(4, 2)), None, "behind IsoBN '0' is not known"),
    "one of two": (lambda: nn.Sequential(SEQUENCES["linear"](), IsoBN(16)), None, "behind IsoBN '1' is not known"),
    "no such layer": (Classifier, {"isobn": "output"}, "'output' must be a torch.nn.Linear with in_features=16"),
    "no linear layer": (Classifier, {"isobn": "dropout"}, "'dropout' must be a torch.nn.Linear"),
    "another width": (lambda: Classifier(16, 8), {"isobn": "classifier"}, "with in_features=16, as IsoBN, got Linear"),
    "another width in sequence": (
        lambda: nn.Sequential(IsoBN(4), nn.Linear(3, 2)),
        None,
        "'1' must be .*in_features=4",
    ),
    "no such IsoBN": (Classifier, {"bn": "classifier"}, "'bn' must be the name of an IsoBN layer, got nothing of that"),
}


@pytest.mark.parametrize(("build", "into", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_folded_is_left_alone(build, into, message) -> None:
    model = build()
    for layer in isobn_layers(model):
        layer.scale.fill_(2)
    before, shown = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(ValueError, match=message):
        fold_isobn(model, into)
    assert repr(model) == shown
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---- Export: plain ATen, with IsoBN and without ----


@pytest.fixture(params=["as trained", "folded"])
def served(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A tiny BERT for evaluation, and its arguments."""
    transformers = pytest.importorskip("transformers", reason='needs pip install "isobn_kernels[finetune]"')
    from isobn_kernels.integrations.transformers import apply_isobn

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=64, initializer_range=0.2)
    model = apply_isobn(transformers.BertForSequenceClassification(config)).train()
    inputs = (torch.randint(0, 40, (6, 9)), torch.ones(6, 9, dtype=torch.long))
    for _ in range(3):
        model(*inputs)
    model.eval()
    return fold_isobn(model) if request.param == "folded" else model, inputs


def assert_as_right(logits, model, inputs) -> None:
    """Logits of another program are at most twice as far from those in float64 as the model's own."""
    exact = copy.deepcopy(model).double()(*inputs).logits
    assert_right({"out": logits}, {"out": model(*inputs).logits}, {"out": exact})


def test_exported_program(served) -> None:
    model, inputs = served
    program = torch.export.export(model, inputs)
    assert "isobn_kernels" not in str(program.graph)
    assert_as_right(program.module()(*inputs).logits, model, inputs)


def test_onnx(served, tmp_path) -> None:
    onnx, onnxruntime, _ = (
        pytest.importorskip(module, reason=f"needs pip install {module}")
        for module in ("onnx", "onnxruntime", "onnxscript")
    )
    model, inputs = served
    path = tmp_path / "model.onnx"
    rows, length = torch.export.Dim("rows"), torch.export.Dim("length")
    shapes = {"input_ids": {0: rows, 1: length}, "attention_mask": {0: rows, 1: length}}
    torch.onnx.export(model, inputs, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_inputs()]
    assert {node.domain for node in onnx.load(path).graph.node} == {""}, "an operator that is not ONNX's own"
    for rows in (6, 3):
        given = [tensor[:rows] for tensor in inputs]
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)})
        assert_as_right(torch.tensor(logits), model, given)
