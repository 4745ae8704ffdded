"""`apply_isobn` on tiny classifiers of every family, with random weights."""

import copy
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import same_bits
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
sys.path.insert(0, {str(Path(__file__).parent)!r})
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
        gradients = [p.grad for p in model.parameters()]
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
    register_family(MyModel, output="end.out", dropout="end.drop")
    with pytest.raises(ValueError, match="MyModel is registered already"):
        register_family(MyModel, output="end.out", dropout="end.drop")
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
