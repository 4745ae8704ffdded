"""`apply_isobn` on tiny classifiers of every family, with random weights."""

import copy
import inspect
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import python, same_bits
from tolerance import assert_right
from torch import nn

from isobn_kernels import IsoBN, fold_isobn

pytest.importorskip("transformers", reason='needs pip install "isobn_kernels[finetune]"')
pytest.importorskip("accelerate", reason='needs pip install "isobn_kernels[finetune]"')

import transformers
from accelerate import hooks
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from isobn_kernels.integrations.transformers import apply_isobn, output_layer, register_family

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 40}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
FAMILIES = {
    "Albert": {**SIZES, "embedding_size": 16, "classifier_dropout_prob": 0.1},
    "Bert": SIZES,
    "DebertaV2": SIZES,
    "DistilBert": {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "num_labels": 3},
    "Electra": {**SIZES, "embedding_size": 16},
    "MPNet": SIZES,
    "ModernBert": {**SIZES, **TOKENS, "classifier_dropout": 0.1},
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def plain(family: str = "Bert", **config):
    """The library's own classifier. Weights ten times the usual, for embeddings that differ from text to text."""
    torch.manual_seed(0)
    config = {**FAMILIES[family], "initializer_range": 0.2, **config}
    model_class = getattr(transformers, f"{family}ForSequenceClassification")
    return model_class(model_class.config_class(**config))


def assert_as_right(found, model) -> None:
    """The logits of ``found`` are at most twice as far from those of ``model`` in float64 as its own in float32."""
    exact = copy.deepcopy(model).double()
    assert_right(*({"out": m(**batch()).logits} for m in (found, model, exact)))


def batch(rows: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, 5, dtype=torch.long)
    mask[0, 3:] = 0
    return {"input_ids": torch.randint(5, 40, (rows, 5), generator=generator), "attention_mask": mask}


def trained(family: str = "Bert", **options):
    model = apply_isobn(plain(family), **options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        model(**batch(seed=step), labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def isobn_of(model) -> IsoBN:
    (layer,) = (module for module in model.modules() if isinstance(module, IsoBN))
    return layer


def embedding_of(model) -> torch.Tensor:
    """What the output layer is called with."""
    seen = []
    with output_layer(model).register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(**batch())
    return seen[0]


def assert_same_state(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


def test_weights_keep_their_names_and_values(family: str) -> None:
    model = plain(family).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert apply_isobn(model) is model
    after = model.state_dict()
    statistics = {name for name in after if ".isobn." in name}
    assert {name.rpartition(".")[2] for name in statistics} == {name for name, _ in IsoBN(1).named_buffers()}
    assert_same_state({name: after[name] for name in after.keys() - statistics}, before)
    # In the mode that the model was in.
    model(**batch())
    assert isobn_of(model).num_batches_tracked == 0


def test_only_the_scale_is_new(family: str) -> None:
    """With momentum 0 the statistics stay 0 and the scale 1: what is left is the library's model, dropout included."""
    set_seed(1)
    expected = plain(family).train()
    set_seed(1)
    model = apply_isobn(plain(family), momentum=0.0).train()
    for seed in range(3):
        outputs = []
        for one in (expected, model):
            set_seed(seed)
            outputs.append(one(**batch(), labels=LABELS))
            outputs[-1].loss.backward()
        assert same_bits(outputs[0].logits, outputs[1].logits)
        assert same_bits(outputs[0].loss, outputs[1].loss)
    for (name, a), b in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert same_bits(a.grad, b.grad), name
    assert isobn_of(model).num_batches_tracked == 3


def test_statistics_are_those_of_the_embedding_before_dropout(family: str) -> None:
    model = plain(family).eval()
    embedding = embedding_of(model).detach()
    # Not the embedding before its activation, nor a normalised one.
    apply_isobn(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    output = output_layer(model)
    output.dropout = nn.Dropout(0.9)
    output.train()
    model(**batch())
    wanted, exact = (0.05 * x.std(dim=0, correction=0) for x in (embedding, embedding.double()))
    assert_right({"sigma": output.isobn.running_std}, {"sigma": wanted}, {"sigma": exact})
    model.eval()
    parts = (embedding * output.isobn.scale, output.weight, output.bias)
    wanted, exact = nn.functional.linear(*parts), nn.functional.linear(*(part.double() for part in parts))
    assert_right({"out": model(**batch()).logits}, {"out": wanted}, {"out": exact})


def test_round_trip(family: str, tmp_path: Path) -> None:
    options = {"momentum": 0.2, "eps": 1e-2, "bias_correction": True}
    model = trained(family, **options)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is type(model)
    assert type(loaded).__name__ == f"IsoBN{family}ForSequenceClassification"
    assert loaded.config.isobn == options
    assert repr(loaded) == repr(model)
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert same_bits(loaded(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_the_statistics(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    converted = copy.deepcopy(model).to(dtype)
    for half in (loaded, converted):
        assert output_layer(half).weight.dtype == dtype
        assert_same_state(isobn_of(half).state_dict(), isobn_of(model).state_dict())
        assert half(**batch()).logits.dtype == dtype


def test_folding(family: str, tmp_path: Path) -> None:
    model = trained(family)
    assert not torch.equal(isobn_of(model).scale, torch.ones(32))
    folded = fold_isobn(copy.deepcopy(model))
    assert_as_right(folded, model)
    # It is the library's own again, dropout included, and saved as such.
    assert repr(folded) == repr(plain(family))
    assert folded.config.to_dict().keys() == plain(family).config.to_dict().keys()
    folded.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(plain(family))
    assert same_bits(loaded(**batch()).logits, folded(**batch()).logits)
    # And can be given IsoBN anew.
    assert isobn_of(apply_isobn(folded)).num_batches_tracked == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_independent(family: str, duplicate) -> None:
    model = trained(family)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = duplicate(model)
    assert same_bits(twin(**batch()).logits, model(**batch()).logits)
    twin.train()(**batch(), labels=LABELS).loss.backward()
    assert isobn_of(twin).num_batches_tracked == 4
    assert_same_state(model.state_dict(), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_meta_device_and_missing_statistics(family: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        assert isobn_of(apply_isobn(plain(family))).running_cov.is_meta
    # A checkpoint without statistics: memory that loading left as it was would show.
    model = plain(family)
    model.save_pretrained(tmp_path)
    with_isobn = type(apply_isobn(model))
    for dtype in (torch.float32, torch.bfloat16):
        loaded = with_isobn.from_pretrained(tmp_path, dtype=dtype)
        assert_same_state(isobn_of(loaded).state_dict(), IsoBN(32).state_dict())


def initialised(model_class, config, folder: Path, **options):
    """A model of which the checkpoint holds next to nothing, whatever lay in memory."""
    set_seed(3)
    return model_class.from_pretrained(folder, config=config, **options)


def test_missing_weights_are_those_of_the_family(family: str, tmp_path: Path) -> None:
    """All of them, to the bit: the library's own class initialises in the same order from the same seed."""
    model = plain(family)
    kept = next(iter(model.state_dict()))
    model.save_pretrained(tmp_path / "plain", state_dict={kept: model.state_dict()[kept]})
    apply_isobn(model)
    model.save_pretrained(tmp_path / "isobn", state_dict={kept: model.state_dict()[kept]})
    expected = initialised(model._plain_class, plain(family).config, tmp_path / "plain").state_dict()
    found = initialised(type(model), model.config, tmp_path / "isobn").state_dict()
    assert_same_state({name: tensor for name, tensor in found.items() if ".isobn." not in name}, expected)
    statistics = {name.rpartition(".")[2]: tensor for name, tensor in found.items() if ".isobn." in name}
    assert_same_state(statistics, IsoBN(32).state_dict())


def test_new_output_layer_for_other_labels(family: str, tmp_path: Path) -> None:
    """``from_pretrained(..., num_labels=..., ignore_mismatched_sizes=True)``: the family's own initialisation."""
    trained(family).save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=500, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 2
    fresh = type(loaded)(loaded.config)
    assert output_layer(loaded).weight.std().item() == pytest.approx(output_layer(fresh).weight.std().item(), rel=0.1)
    assert isobn_of(loaded).num_batches_tracked == 3


def test_initialising_again_leaves_trained_statistics_alone() -> None:
    model = trained()
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert_same_state(model.state_dict(), before)


class Own(transformers.BertPreTrainedModel):
    """A model as users write it, with IsoBN where they like, and not a word about its initialisation."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.head = nn.ModuleDict({"norm": IsoBN(config.hidden_size), "out": nn.Linear(config.hidden_size, 3)})
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.head["out"](self.head["norm"](self.bert(input_ids, attention_mask).pooler_output))


class OwnInitialisation(Own):
    def _init_weights(self, module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.1)


class Nested(transformers.PreTrainedModel):
    config_class = transformers.BertConfig

    def __init__(self, config) -> None:
        super().__init__(config)
        self.inner = Own(config)
        self.post_init()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_class", [Own, OwnInitialisation, Nested])
def test_own_model_from_an_encoder(model_class: type, dtype: torch.dtype, tmp_path: Path) -> None:
    """The statistics that no checkpoint has are those of a new layer; `poisoned_memory` would show others."""
    plain().bert.save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path, dtype=dtype)
    assert_same_state(isobn_of(model).state_dict(), IsoBN(32).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("missing", [(), ("scale",), ("running_cov", "running_std"), ("num_batches_tracked",)], ids=str)
def test_own_model_from_its_checkpoint(missing: tuple[str, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    """What the checkpoint has is loaded to the bit, in half precision too; the rest is that of a new layer."""
    torch.manual_seed(0)
    model = Own(plain().config).train()
    for seed in range(3):
        model(**batch(seed=seed))
    state = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] not in missing}
    model.save_pretrained(tmp_path, state_dict=state)
    expected = isobn_of(model).state_dict() | {name: IsoBN(32).state_dict()[name] for name in missing}
    loaded = Own.from_pretrained(tmp_path, dtype=dtype)
    assert_same_state(isobn_of(loaded).state_dict(), expected)
    assert loaded(**batch()).dtype == dtype


def test_own_model_keeps_statistics_when_initialised_again() -> None:
    model = Own(plain().config).train()
    model(**batch())
    for duplicate in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        duplicate.init_weights()
        assert isobn_of(duplicate).num_batches_tracked == 1
        assert isobn_of(duplicate).running_std.any()


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> dict:
        return {name: tensor[0] for name, tensor in batch(1, seed=row).items()} | {"labels": row % 3}


def train_with_trainer(model, folder: Path, callbacks=(), **arguments) -> Trainer:
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=6,
            save_steps=2,
            per_device_train_batch_size=6,
            learning_rate=1e-3,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
        ),
        train_dataset=Texts(),
        callbacks=list(callbacks),
    )
    trainer.train(**arguments)
    return trainer


def test_resumed_trainer_equals_an_uninterrupted_one(family: str, tmp_path: Path) -> None:
    expected = train_with_trainer(apply_isobn(plain(family)), tmp_path).model
    assert isobn_of(expected).num_batches_tracked == 6
    resumed = train_with_trainer(
        apply_isobn(plain(family)), tmp_path / "2", resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    ).model
    assert_same_state(resumed.state_dict(), expected.state_dict())


def test_killed_trainer_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
import torch
torch.set_num_threads(1)
from transformers import TrainerCallback
import test_transformers as here
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
here.train_with_trainer(here.apply_isobn(here.plain()), {str(tmp_path)!r}, [Kill()])
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    resumed = train_with_trainer(apply_isobn(plain()), tmp_path, resume_from_checkpoint=True).model
    expected = train_with_trainer(apply_isobn(plain()), tmp_path / "whole").model
    assert_same_state(resumed.state_dict(), expected.state_dict())


def test_without_this_package_loading_fails_loudly(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    code = "import sys, transformers as t; t.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "isobn-bert" in done.stderr


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_peft(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs pip install peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    model = peft.get_peft_model(apply_isobn(plain(family)), config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(3):
        model(**batch(seed=step), labels=LABELS).loss.backward()
        optimizer.step()
    expected = model.eval()(**batch()).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(apply_isobn(plain(family)), tmp_path).eval()
    assert same_bits(loaded(**batch()).logits, expected)
    with pytest.raises(ValueError, match="merge_and_unload"):
        fold_isobn(loaded)
    merged = loaded.merge_and_unload()
    assert isobn_of(merged).num_batches_tracked == 3
    exact = copy.deepcopy(merged).double()(**batch()).logits
    assert_right({"out": fold_isobn(merged)(**batch()).logits}, {"out": expected}, {"out": exact})


def test_peft_does_not_load_the_adapter_over_a_base_without_isobn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a hub
    peft = pytest.importorskip("peft", reason="needs pip install peft")
    plain().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    peft.get_peft_model(apply_isobn(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises((OSError, ValueError)):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_configuration_of_another_model_is_left_alone(tmp_path: Path) -> None:
    config = plain().config
    model_class = transformers.BertForSequenceClassification
    first, second, third = (model_class(config) for _ in range(3))
    apply_isobn(first, momentum=0.1)
    apply_isobn(second, beta=0.3)
    assert type(third.config) is transformers.BertConfig
    assert (first.config.isobn, second.config.isobn) == ({"momentum": 0.1}, {"beta": 0.3})
    # Within a model it is one, so that a change of it reaches the encoder.
    assert first.bert.config is first.config
    fold_isobn(first)
    assert first.bert.config is first.config
    assert type(first.config) is transformers.BertConfig
    assert second.config.isobn == {"beta": 0.3}


def test_built_from_the_configuration_of_a_plain_model(tmp_path: Path) -> None:
    config = plain().config
    model = type(apply_isobn(plain()))(config)
    model.save_pretrained(tmp_path)
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is type(model)
    assert type(config) is transformers.BertConfig
    assert type(fold_isobn(model)) is transformers.BertForSequenceClassification


def test_encoder_and_tokenizer_of_a_saved_model(family: str, tmp_path: Path) -> None:
    model = trained(family)
    model.save_pretrained(tmp_path)
    encoder = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is type(model.base_model)
    ours, plains = model.config_class, plain(family).config_class
    mapping = transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING
    assert (ours in mapping) == (plains in mapping)
    if plains in mapping:
        assert mapping[ours] == mapping[plains]


def test_folding_is_all_or_nothing() -> None:
    peft = pytest.importorskip("peft", reason="needs pip install peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    both = nn.ModuleList([nn.Sequential(IsoBN(4), nn.Linear(4, 2)), peft.get_peft_model(apply_isobn(plain()), config)])
    both[0][0].scale.fill_(2)
    weight = both[0][1].weight.detach().clone()
    with pytest.raises(ValueError, match="merge_and_unload"):
        fold_isobn(both)
    assert same_bits(both[0][1].weight, weight)
    assert isinstance(both[0][0], IsoBN)


def test_subclass_of_a_model_with_isobn() -> None:
    class Mine(type(apply_isobn(plain()))):
        pass

    model = Mine(plain().config)
    model(**batch())
    with pytest.raises(ValueError, match="Mine: fold the model itself"):
        fold_isobn(model)
    with pytest.raises(ValueError, match="does not know"):
        apply_isobn(type("Other", (transformers.BertForSequenceClassification,), {})(plain().config))


def test_regression(tmp_path: Path) -> None:
    model = apply_isobn(plain(num_labels=1, problem_type="regression"))
    output = model.train()(**batch(), labels=torch.rand(6))
    assert output.logits.shape == (6, 1)
    output.loss.backward()


def test_gradient_checkpointing_updates_once() -> None:
    model = apply_isobn(plain()).train()
    # The older name goes in transformers 6, the newer one came during 5.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(**batch(), labels=LABELS).loss.backward()
    assert isobn_of(model).num_batches_tracked == 1
    assert model.get_input_embeddings().weight.grad is not None


def test_compiled_training_is_one_graph_and_equals_eager() -> None:
    eager, compiled = apply_isobn(plain()).train(), apply_isobn(plain()).train()
    for model in (eager, compiled):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    exact, results = copy.deepcopy(eager).double(), []
    for model, forward in ((compiled, run), (eager, eager), (exact, exact)):
        losses = []
        for seed in range(2):
            losses.append(forward(**batch(seed=seed), labels=LABELS).loss)
            losses[-1].backward()
        C, sigma, scale, count = isobn_of(model).buffers()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])  # some are 0 in truth, as of a key's bias
        results.append({"loss": losses, "gradients": gradients, "C": C, "sigma": sigma, "scale": scale})
        assert count == 2
    assert_right(*results)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": 2}, ValueError, "momentum must be in"),
        ({"momentun": 0.1}, TypeError, "momentun"),
        ({"process_group": None}, TypeError, "convert_sync_isobn"),
        ({"device": "cpu"}, TypeError, "device is no option here"),
        ({"num_features": 9}, TypeError, "num_features is the model's"),
    ],
)
def test_wrong_options_leave_the_model_alone(options: dict, error: type, message: str) -> None:
    model = plain()
    with pytest.raises(error, match=message):
        apply_isobn(model, **options)
    assert repr(model) == repr(plain())
    assert type(model.config) is type(plain().config)


def test_other_models_are_refused() -> None:
    gpt = transformers.GPT2Config(vocab_size=15, n_embd=8, n_head=2, n_layer=1)
    model = transformers.GPT2ForSequenceClassification(gpt)
    with pytest.raises(
        ValueError, match=r"GPT2ForSequenceClassification.*expected one of .*BertForSeq.*register_family"
    ):
        apply_isobn(model)
    with pytest.raises(ValueError, match="has IsoBN already"):
        apply_isobn(apply_isobn(plain()))


class MyConfig(transformers.BertConfig):
    model_type = "my-own"


class MyModel(transformers.BertPreTrainedModel):
    """A classifier that the table does not hold: the mean of the last layer, tanh, dropout, linear."""

    config_class = MyConfig

    def __init__(self, config) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.end = nn.ModuleDict({"drop": nn.Dropout(0.1), "out": nn.Linear(config.hidden_size, config.num_labels)})
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        pooled = self.bert(input_ids, attention_mask).last_hidden_state.mean(dim=1).tanh()
        return self.end["out"](self.end["drop"](pooled))


def test_registered_family(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MyModel(MyConfig(**SIZES))
    with pytest.raises(ValueError, match="does not know"):
        apply_isobn(model)
    with_isobn = register_family(MyModel, output="end.out", dropout="end.drop")
    assert register_family(MyModel, output="end.out", dropout="end.drop") is with_isobn
    with pytest.raises(ValueError, match=r"MyModel is registered already, .*'end.out'.* got .*'end.other'"):
        register_family(MyModel, output="end.other", dropout="end.drop")
    apply_isobn(model).train()(**batch())
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same_bits(loaded(**batch()), model(**batch()))
    exact = copy.deepcopy(model).double()(**batch())
    assert_right({"out": fold_isobn(loaded)(**batch())}, {"out": model(**batch())}, {"out": exact})


def test_head_of_another_kind_is_refused() -> None:
    model = plain()
    model.classifier = nn.Sequential(nn.Linear(32, 3))
    with pytest.raises(ValueError, match=r"must be of plain torch\.nn\.Linear layers"):
        apply_isobn(model)


def test_hooks_of_accelerate_are_not_gone_past() -> None:
    model = plain()
    hooks.add_hook_to_module(model.classifier, hooks.ModelHook())
    with pytest.raises(ValueError, match="before anything else is done to the model"):
        apply_isobn(model)
    hooks.remove_hook_from_module(model, recurse=True)
    model = trained()
    hooks.add_hook_to_module(model.classifier, hooks.ModelHook())
    with pytest.raises(ValueError, match="remove_hook_from_module"):
        fold_isobn(model)
    hooks.remove_hook_from_module(model, recurse=True)
    fold_isobn(model)


# ---- Registered, and imported, again ----


def test_library_family_registered_by_hand() -> None:
    where = {"output": "classifier", "dropout": "dropout"}
    assert register_family(transformers.BertForSequenceClassification, **where) is type(apply_isobn(plain()))
    with pytest.raises(ValueError, match="BertForSequenceClassification is registered already"):
        register_family(transformers.BertForSequenceClassification, output="classifier", dropout="bert")


def test_second_class_of_a_model_type_is_refused(tmp_path: Path) -> None:
    """It would be loaded in place of the first."""
    trained().save_pretrained(tmp_path)
    where = {"output": "classifier", "dropout": "dropout"}
    with pytest.raises(
        ValueError, match=r"model type of BertConfig, 'bert', is that of BertForSequenceClass.*of its own"
    ):
        register_family(transformers.BertForMultipleChoice, **where)
    with pytest.raises(ValueError, match="does not know"):
        apply_isobn(transformers.BertForMultipleChoice(plain().config))
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(tmp_path), type(apply_isobn(plain())))


def define_anew() -> type:
    """The cell of a notebook, run again."""
    kind = type("InNotebook", (MyModel,), {"__module__": __name__, "config_class": NotebookConfig})
    kind.__qualname__ = "InNotebook"
    return kind


class NotebookConfig(MyConfig):
    model_type = "in-notebook"


def test_class_defined_anew_in_a_notebook(tmp_path: Path) -> None:
    first, second = define_anew(), define_anew()
    models = []
    for kind in (first, second):
        register_family(kind, output="end.out", dropout="end.drop")
        models.append(apply_isobn(kind(NotebookConfig(**SIZES))))
        models[-1](**batch())
    models[1].save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(models[1]) is not type(models[0])


def test_reloaded_and_imported_anew(tmp_path: Path) -> None:
    """A model made before still runs and is saved; new ones are made, loaded and given new layers."""
    code = f"""
import importlib, sys, torch, transformers
sys.path[:0] = {sys.path!r}
import isobn_kernels.integrations.transformers as integration
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
ids = torch.ones(4, 5, dtype=torch.long)

def make():
    model = integration.apply_isobn(BertForSequenceClassification(config)).train()
    model(ids)
    return model

models = [make()]
for again in ("reload", "reload", "import", "import"):
    if again == "reload":
        importlib.reload(sys.modules["isobn_kernels.module"])
        integration = importlib.reload(integration)
    else:
        for name in [name for name in sys.modules if name.partition(".")[0] == "isobn_kernels"]:
            del sys.modules[name]
        import isobn_kernels.integrations.transformers as integration
    models.append(make())
    models[-1].classifier = torch.nn.Linear(32, 2)
    for model in models:
        model.eval()
        model.save_pretrained({str(tmp_path)!r})
        loaded = AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})
        assert type(loaded) is type(models[-1])
        assert torch.equal(loaded(ids).logits, model(ids).logits)
print(len(models), models[-1].classifier.isobn)
"""
    assert python(code, HF_HUB_OFFLINE="1") == f"5 {IsoBN(32)}"


# ---- Whoever changes the head is told, or IsoBN stays ----


def replace_output(model, new: nn.Module, how: str = "assignment") -> None:
    path = model._where.output
    parent, _, name = path.rpartition(".")
    parent = model.get_submodule(parent)
    if how == "assignment":
        setattr(parent, name, new)
    elif how == "set_submodule":
        model.set_submodule(path, new)
    elif how == "add_module":
        parent.add_module(name, new)


@pytest.mark.parametrize("how", ["assignment", "set_submodule", "add_module"])
def test_new_output_layer_keeps_isobn_and_dropout(family: str, how: str, tmp_path: Path) -> None:
    model = trained(family)
    isobn, dropout = output_layer(model).isobn, output_layer(model).dropout
    new = nn.Linear(32, 5)
    weight = new.weight.detach().clone()
    replace_output(model, new, how)
    model.config.num_labels = model.num_labels = 5
    assert output_layer(model) is new
    assert isobn_of(model) is isobn
    assert new.dropout is dropout
    embedding = embedding_of(model)
    expected = nn.functional.linear(embedding * isobn.scale, weight, new.bias)
    assert same_bits(model(**batch()).logits, expected)
    model.train()(**batch(), labels=LABELS + 2).loss.backward()
    assert isobn.num_batches_tracked == 4
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_state(loaded.state_dict(), model.state_dict())
    folded = fold_isobn(copy.deepcopy(model))
    assert (folded(**batch()).logits - model(**batch()).logits).abs().max() < 1e-5
    assert repr(folded) == repr(plain(family, num_labels=5))


def test_old_output_layer_put_back() -> None:
    model = trained()
    expected, old = model(**batch()).logits, model.classifier
    model.classifier = nn.Linear(32, 5)
    model.classifier = old
    assert same_bits(model(**batch()).logits, expected)


def zeros_before_the_output(model) -> float:
    """Share of what comes from IsoBN that the dropout behind it sets to 0."""
    seen = {}
    output = output_layer(model)
    with (
        output.isobn.register_forward_hook(lambda _, args, out: seen.update(scaled=out)),
        output.dropout.register_forward_hook(lambda _, args, out: seen.update(given=args[0], dropped=out)),
    ):
        model.train()(**batch(rows=64))
    assert seen["given"] is seen["scaled"]
    return 1 - ((seen["dropped"] != 0).sum() / (seen["given"] != 0).sum()).item()


def test_new_dropout_acts_where_dropout_acts(family: str) -> None:
    model = trained(family)
    model.set_submodule(model._where.dropout, nn.Dropout(0.7))
    assert zeros_before_the_output(model) == pytest.approx(0.7, abs=0.05)
    model.get_submodule(model._where.dropout).p = 0.4
    assert model.get_submodule(model._where.dropout).p == output_layer(model).dropout.p == 0.4
    assert zeros_before_the_output(model) == pytest.approx(0.4, abs=0.05)
    model.set_submodule(model._where.dropout, nn.Identity())
    assert isinstance(output_layer(model).dropout, nn.Identity)
    dense = model._where.dense
    assert dense is None or isinstance(model.get_submodule(dense).dropout, nn.Identity)
    restored = fold_isobn(model).get_submodule(_where(family).dropout)
    assert type(restored) is nn.Identity


def _where(family: str):
    return type(apply_isobn(plain(family)))._where


HEADS = [name for name in FAMILIES if "." in _where(name).output]


@pytest.mark.parametrize("family", HEADS)
def test_new_head_of_the_library_keeps_isobn(family: str) -> None:
    """RobertaClassificationHead and its like: dense, dropout and output layer at once."""
    model = trained(family)
    before, isobn = copy.deepcopy(model), isobn_of(model)
    head = plain(family).classifier
    head.dropout.p = 0.6
    model.classifier = head.eval()
    assert isobn_of(model) is isobn
    for layer in (model.classifier.dense, model.classifier.out_proj):
        assert layer.dropout.p == 0.6
    assert head.dropout.p == 0.6
    assert zeros_before_the_output(model) == pytest.approx(0.6, abs=0.05)
    model.eval()
    before.classifier.dense.load_state_dict(head.dense.state_dict())
    before.classifier.out_proj.load_state_dict(head.out_proj.state_dict())
    assert same_bits(model(**batch()).logits, before.eval()(**batch()).logits)


@pytest.mark.parametrize("family", HEADS)
def test_new_dense_layer_keeps_its_dropout(family: str) -> None:
    model = trained(family)
    dropout = model.classifier.dense.dropout
    model.classifier.dense = nn.Linear(32, 32)
    assert model.classifier.dense.dropout is dropout
    with pytest.raises(ValueError, match=r"dense of \w+Head cannot become Bilinear.* in_features=32"):
        model.classifier.dense = nn.Bilinear(32, 32, 32)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def unfit_layers() -> dict[str, nn.Module | None]:
    hooked = nn.Linear(32, 3)
    hooks.add_hook_to_module(hooked, hooks.ModelHook())
    return {
        "sequence": nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3)),
        "another width": nn.Linear(16, 3),
        "a linear layer of another kind": Doubled(32, 3),
        "a width not known yet": nn.LazyLinear(3),
        "identity": nn.Identity(),
        "hooked": hooked,
        "nothing": None,
    }


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("kind", unfit_layers())
def test_output_layer_that_cannot_keep_isobn_is_refused(family: str, kind: str) -> None:
    model = trained(family)
    expected, shown = model(**batch()).logits, repr(model)
    with pytest.raises(ValueError, match=r"IsoBN or its dropout would be lost.*in_features=32.*fold_isobn") as raised:
        replace_output(model, unfit_layers()[kind])
    assert f"model.{model._where.output.rpartition('.')[2]}.isobn" in str(raised.value)
    assert repr(model) == shown
    assert same_bits(model(**batch()).logits, expected)


def test_head_put_together_by_the_user(family: str, tmp_path: Path) -> None:
    """What the message advises: IsoBN where the user wants it."""
    model = trained(family)
    isobn = isobn_of(model)
    replace_output(model, nn.Sequential(isobn, nn.Dropout(0.2), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3)))
    model.train()(**batch(), labels=LABELS).loss.backward()
    assert isobn_of(model) is isobn
    assert isobn.num_batches_tracked == 4
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is wrapped"):
        fold_isobn(model)


def test_going_on_without_isobn(family: str, tmp_path: Path) -> None:
    """The other advice: folded, it is the library's model, whose layers may be anything."""
    model = fold_isobn(trained(family))
    parent, _, name = _where(family).output.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Sequential(nn.Linear(32, 3)))
    model(**batch())
    model.save_pretrained(tmp_path)


TAKEN_OUT = {
    "_modules": lambda parent, name: parent._modules.update({name: nn.Linear(32, 3)}),
    "del, then assigned": lambda parent, name: (delattr(parent, name), setattr(parent, name, nn.Linear(32, 3))),
    "IsoBN itself": lambda parent, name: setattr(getattr(parent, name), "isobn", nn.Identity()),
}


@pytest.mark.parametrize("way", TAKEN_OUT)
def test_head_without_isobn_is_neither_run_nor_saved(family: str, way: str, tmp_path: Path) -> None:
    """In ways that no hook sees."""
    model = trained(family)
    parent, _, name = model._where.output.rpartition(".")
    TAKEN_OUT[way](model.get_submodule(parent), name)
    for use in (lambda: model(**batch()), lambda: model.forward(**batch()), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(RuntimeError, match=r"has no IsoBN: it went with .*fold_isobn\(model\) before the change"):
            use()
    assert not list(tmp_path.iterdir())


def test_replacing_a_whole_model_is_no_ones_business() -> None:
    wrapper = nn.ModuleDict({"model": trained(), "pair": nn.Sequential(trained())})
    wrapper["model"] = nn.Linear(2, 2)
    wrapper["pair"] = nn.Identity()
    sequence = nn.Sequential(IsoBN(4), nn.Linear(4, 2))
    sequence[0] = nn.Identity()  # a layer of the user's own
    assert not isinstance(sequence[0], IsoBN)


def test_forward_has_the_signature_of_the_family(family: str) -> None:
    """The Trainer and pipelines read it."""
    assert inspect.signature(apply_isobn(plain(family)).forward) == inspect.signature(plain(family).forward)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_peft_adapter_beside_isobn_is_refused(family: str) -> None:
    peft = pytest.importorskip("peft", reason="needs pip install peft")
    name = _where(family).output.rpartition(".")[2]
    with pytest.raises(ValueError, match=r"would be lost.*In PEFT and in quantization, leave this layer out"):
        peft.get_peft_model(apply_isobn(plain(family)), peft.LoraConfig(target_modules=[name], r=2))


@pytest.mark.parametrize("modules", [["classifier"], ["dense"], ["out_proj"]], ids=str)
def test_peft_modules_to_save(modules: list[str]) -> None:
    """The wrapper of PEFT, around the head and around a layer of it; and its removal."""
    peft = pytest.importorskip("peft", reason="needs pip install peft")
    model = apply_isobn(plain("Roberta"))
    config = peft.LoraConfig(target_modules=["query"], r=2, modules_to_save=modules)
    wrapped = peft.get_peft_model(model, config).train()
    loss = wrapped(**batch(), labels=LABELS).loss
    loss.backward()
    expected = wrapped.eval()(**batch()).logits
    merged = wrapped.merge_and_unload()
    assert (merged(**batch()).logits - expected).abs().max() < 1e-5
    assert isobn_of(merged).num_batches_tracked == 1


def test_quantization_leaves_the_output_layer_alone() -> None:
    quantization = pytest.importorskip("torch.ao.quantization", reason="needs torch.ao.quantization")
    model = trained()
    torch.use_deterministic_algorithms(False)  # quantized kernels have no such version
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this moves to torchao
        quantized = quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert same_bits(isobn_of(quantized).scale, isobn_of(model).scale)
    logits = model(**batch()).logits
    assert (quantized(**batch()).logits - logits).abs().max() < 0.2 * logits.abs().max()


# ---- Whoever loads past IsoBN is told ----


@pytest.fixture
def saved(family: str, tmp_path: Path) -> Path:
    trained(family).save_pretrained(tmp_path)
    return tmp_path


def test_class_of_the_library_refuses_a_model_with_isobn(family: str, saved: Path) -> None:
    plain_class = type(plain(family))
    subclass = type("Mine", (plain_class,), {})
    config = plain_class.config_class.from_pretrained(saved)
    for load in (
        lambda: plain_class.from_pretrained(saved),
        lambda: subclass.from_pretrained(saved),
        lambda: AutoModelForSequenceClassification.from_pretrained(saved, config=config),
        lambda: AutoModelForSequenceClassification.from_config(config),
        lambda: plain_class(trained(family).config),
    ):
        message = (
            rf"IsoBN, which (Mine|{family}\w+) would lose.*AutoModelForSequenceClassification, or IsoBN{family}For"
        )
        with pytest.raises(ValueError, match=message):
            load()


def test_what_may_be_loaded_from_a_model_with_isobn(family: str, saved: Path) -> None:
    """The encoder, another task, the plain model after folding, and a pipeline."""
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    expected = loaded(**batch()).logits
    encoder = transformers.AutoModel.from_pretrained(saved)
    assert type(encoder) is type(loaded.base_model)
    tokens = getattr(transformers, f"{family}ForTokenClassification").from_pretrained(saved)
    assert tokens(**batch()).logits.shape == (6, 5, 3)
    fold_isobn(loaded).save_pretrained(saved / "folded")
    folded = type(plain(family)).from_pretrained(saved / "folded")
    assert (folded(**batch()).logits - expected).abs().max() < 1e-5


def test_pipeline(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(35))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path), device="cpu")
    assert type(pipeline.model) is type(model)
    ids = {"input_ids": torch.tensor([[2, 5, 9, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    expected = model(**ids).logits.softmax(-1).max().item()
    assert pipeline(["word0 word4"])[0]["score"] == pytest.approx(expected, rel=1e-5)
