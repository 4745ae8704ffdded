"""The runs of ``finetune``: one for each normalizer and seed, with the Trainer of transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from isobn_kernels import IsoBN, fold_isobn
from isobn_kernels.cli._data import Data
from isobn_kernels.cli._errors import CommandError, missing_modules
from isobn_kernels.cli._folder import ResultsFolder, content_hash
from isobn_kernels.cli.finetune import TOKENIZER_MODULES
from isobn_kernels.cli.info import version
from isobn_kernels.integrations.transformers import apply_isobn, output_layer
from isobn_kernels.isotropy import measure

BEFORE, AFTER, SCALED = "before training", "after training", "after scaling"
_MAX_LENGTH = 256  # the paper's
# Over several processes without a GPU both accelerate and the Trainer have to be told that this is meant.
_ON_CPU = not torch.accelerator.is_available()
_INSTALL = 'pip install "isobn_kernels[finetune]"'
_T = TypeVar("_T")


@dataclass(frozen=True)
class Run:
    """What one training run gave; ``isotropy`` by stage, as `isobn_kernels.isotropy.measure` reports it."""

    normalizer: str
    seed: int
    metrics: dict[str, float]
    isotropy: dict[str, dict[str, float]]
    pooler_is_new: bool
    best_epoch: int
    train_seconds: float


@dataclass(frozen=True)
class Start:
    """What all runs start from: an encoder, in memory, for the file may change meanwhile, and the data for it.

    ``weights`` has neither an output layer nor what the encoder came without: each run makes these anew. ``content``
    holds hashes of what the encoder is.
    """

    model_class: Any
    config: Any
    weights: dict[str, Tensor]
    pooler_is_new: bool
    tokenizer: Any
    max_length: int
    train: Any  # a `datasets.Dataset` of tokens
    dev: Any
    content: dict[str, str]


def processes() -> PartialState:
    """This process among those that were started with it, by torchrun or accelerate; or alone."""
    return PartialState(cpu=_ON_CPU)


def on_main_process(here: PartialState, function: Callable[[], _T]) -> _T:
    """What ``function`` returns on the main process, the only one to call it; its CommandError is raised on all."""
    outcome: list[Any] = [None]
    if here.is_main_process:
        try:
            outcome = [function()]
        except CommandError as error:
            outcome = [error]
    if here.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], CommandError):
        raise outcome[0]
    return outcome[0]


def versions() -> dict[str, str]:
    """What may change the numbers between one day and another."""
    found = {"isobn_kernels": version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return {f"the version of {name}": value for name, value in found.items()}


def run_folder(normalizer: str, seed: int) -> str:
    """Where a run keeps its checkpoints and what came out of it."""
    return f"runs/{normalizer}-seed{seed}"


def finished_runs(folder: ResultsFolder) -> dict[tuple[str, int], Run]:
    """The runs in the folder that are done, by normalizer and seed.

    Raises:
        CommandError: a record is not readable, or the model of finished runs is gone.
    """
    done = {}
    for name in folder.find("runs/*/run.json"):
        try:
            run = Run(**json.loads((folder.path / name).read_text()))
            embeddings = f"{run_folder(run.normalizer, run.seed)}/embeddings.pt"
        except (OSError, ValueError, TypeError) as error:
            raise CommandError(
                f"{folder.path / name} cannot be read ({error}); delete it to repeat that run"
            ) from error
        if folder.whole(embeddings):
            done[run.normalizer, run.seed] = run
    for normalizer in {normalizer for normalizer, _ in done}:
        if not folder.whole(normalizer):
            raise CommandError(
                f"{folder.path / normalizer}, the best model so far, is gone or not whole; put it back, or start anew "
                "without --resume or in another --output"
            )
    return done


def load_start(model_name: str, data: Data, max_length: int | None) -> Start:
    """Load encoder and tokenizer, and see that they fit together and to the data.

    Raises:
        CommandError: there is no such model, apply_isobn does not know it, ``max_length`` is beyond it, or its
            tokenizer is another one's.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            model_name,
            # Not the dtype of the checkpoint: AdamW on half-precision weights loses small updates.
            dtype=torch.float32,
            output_loading_info=True,
        )
        output = output_layer(model)
        if any(isinstance(module, IsoBN) for module in model.modules()):
            fold_isobn(model)  # the library's own class again; its output layer is not kept
    except Exception as error:  # of many libraries, and of many kinds: none of them raises one of its own
        missing = missing_modules(TOKENIZER_MODULES)
        hint = f"\n{', '.join(missing)} not installed, which some tokenizers need: {_INSTALL}" if missing else ""
        raise CommandError(
            f"--model {model_name}: cannot be loaded; expected the name of an encoder on the hub, or a folder with "
            f"config.json, weights and tokenizer files.\n{type(error).__name__}: {error}{hint}"
        ) from error
    # A layer of another task is of no use to this one, though it may have as many classes.
    (path,) = (name for name, module in model.named_modules() if module is output)
    new = {f"{path}.weight", f"{path}.bias"}
    absent = {name for name in loading["missing_keys"] if ".isobn." not in name}
    weights = {name: x.detach() for name, x in model.state_dict().items() if name not in new | absent}
    names = dict(enumerate(data.classes)) or {0: "score"}
    config = copy.deepcopy(model.config)
    config.id2label = names  # the number of labels is that of these
    config.label2id = {name: number for number, name in names.items()}
    config.problem_type = "single_label_classification" if data.classes else "regression"
    length = _fitting_length(model_name, model, tokenizer, data, max_length)

    def tokenize(rows: dict[str, Any]) -> Any:
        return tokenizer(*(rows[field] for field in data.fields), truncation=True, max_length=length)

    train, dev = (split.map(tokenize, batched=True, remove_columns=data.fields) for split in (data.train, data.dev))
    _check_tokens(model.config, tokenizer, train, dev)
    content = _content(model.config, weights, tokenizer)
    return Start(type(model), config, weights, bool(absent - new), tokenizer, length, train, dev, content)


def train_all(
    data: Data,
    start: Start,
    done: dict[tuple[str, int], Run],
    asked: list[tuple[str, int]],
    *,
    isobn_options: dict[str, float],
    epochs: int,
    patience: int,
    batch_size: int,
    learning_rate: float,
    folder: ResultsFolder,
) -> Iterator[tuple[Run, dict[str, Tensor]]]:
    """Train, measure, and save the best model of each normalizer, with the tokenizer, under its name in ``folder``.

    A run that is in ``done`` is not repeated, and one found interrupted goes on. Over several processes each calls
    this, and gets the same; only the main one uses the folder.

    Args:
        asked: normalizer and seed of each run, in order.

    Yields:
        Each run as it is done, and for the first seed its dev embeddings (N, D) by stage; on the main process only if
        it was done before.

    Raises:
        CommandError: training diverged, or the folder cannot be written.
    """
    here = processes()
    best: dict[str, float] = {}
    for run in done.values():  # of seeds that are not asked for now, too
        best[run.normalizer] = max(best.get(run.normalizer, -float("inf")), run.metrics[data.metrics[0]])
    first_seed = asked[0][1]
    for normalizer, seed in asked:
        name = run_folder(normalizer, seed)
        if (normalizer, seed) in done:
            stages: dict[str, Tensor] = {}
            if here.is_main_process:
                _remove_checkpoints(folder, name)
                stages = torch.load(folder.path / name / "embeddings.pt") if seed == first_seed else {}
            yield done[normalizer, seed], stages
            continue
        checkpoint = on_main_process(here, lambda: _last_checkpoint(folder, name))  # noqa: B023
        if here.is_main_process:
            print(f"\nnormalizer {normalizer}, seed {seed}{', going on' if checkpoint else ''}", flush=True)
        # Before the model is made, for the new head: the normalizers start from the same weights.
        set_seed(seed)
        model = start.model_class.from_pretrained(
            None,
            config=copy.deepcopy(start.config),
            state_dict={key: x.clone() for key, x in start.weights.items()},
            dtype=torch.float32,
        )
        if normalizer == "isobn":
            apply_isobn(model, **isobn_options)
            if here.num_processes > 1:
                IsoBN.convert_sync_isobn(model)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder.path / name),
                seed=seed,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=4 * batch_size,
                learning_rate=learning_rate,
                adam_epsilon=1e-6,
                weight_decay=0.0,
                warmup_steps=0.06,
                lr_scheduler_type="linear",
                logging_strategy="epoch",
                eval_strategy="epoch",
                save_strategy="epoch",
                load_best_model_at_end=True,
                metric_for_best_model=data.metrics[0],
                greater_is_better=True,
                restore_callback_states_from_checkpoint=True,
                report_to="none",
                use_cpu=_ON_CPU,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=start.train,
            eval_dataset=start.dev,
            data_collator=DataCollatorWithPadding(start.tokenizer),
            compute_metrics=data.compute_metrics,
            callbacks=[EarlyStoppingCallback(patience), _Checkpoints(folder, name, here)],
        )
        stages = {BEFORE: _embed(trainer)}
        seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
        evaluated = trainer.evaluate()
        stages[AFTER] = _embed(trainer)
        for layer in model.modules():
            if isinstance(layer, IsoBN):
                stages[SCALED] = stages[AFTER] * layer.scale.cpu()
        if not all(x.isfinite().all() for x in stages.values()):
            raise CommandError(f"training with seed {seed} diverged to NaN or Inf; try a lower --learning-rate")
        if any(map(_are_equal, stages.values())):
            raise CommandError(
                f"with seed {seed} all {len(start.dev)} dev texts have the same embedding: they are the same tokens, "
                "or training collapsed; try a lower --learning-rate"
            )
        run = Run(
            normalizer,
            seed,
            metrics={name: evaluated[f"eval_{name}"] for name in data.metrics},
            isotropy={stage: measure(x) for stage, x in stages.items()},
            pooler_is_new=start.pooler_is_new,
            best_epoch=round(trainer.state.best_global_step * epochs / trainer.state.max_steps),
            train_seconds=seconds,
        )
        is_best = run.metrics[data.metrics[0]] > best.get(normalizer, -float("inf"))
        on_main_process(here, lambda: _keep(folder, run, stages, model if is_best else None, start.tokenizer))  # noqa: B023
        if is_best:
            best[normalizer] = run.metrics[data.metrics[0]]
        yield run, stages if seed == first_seed else {}


def _are_equal(x: Tensor) -> bool:
    """Whether the rows of ``x`` differ by rounding at most. A matrix product may round equal rows of a batch apart."""
    return bool((x - x[0]).abs().max() <= 1e-5 * x.abs().max())


def _keep(folder: ResultsFolder, run: Run, stages: dict[str, Tensor], model: Any, tokenizer: Any) -> None:
    """Save what came out of a run, and the model if there is one: it is the best so far."""
    if model is not None:

        def save(place: Path) -> None:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)

        folder.write(run.normalizer, save)
    name = run_folder(run.normalizer, run.seed)
    folder.write(f"{name}/embeddings.pt", lambda place: torch.save(stages, place))
    # After these, for it says that the run is finished; and before the checkpoints go.
    folder.write(f"{name}/run.json", lambda place: place.write_text(json.dumps(asdict(run), indent=2) + "\n"))
    _remove_checkpoints(folder, name)


class _Checkpoints(TrainerCallback):
    """Lists the checkpoints of a run in its folder, and keeps the last one and the best."""

    def __init__(self, folder: ResultsFolder, name: str, here: PartialState) -> None:
        self.folder, self.name, self.here = folder, name, here

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # The folder may have been moved since the checkpoint that this goes on from.
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.here.wait_for_everyone()  # each process has a part in a checkpoint
        on_main_process(self.here, lambda: self._list({state.global_step, state.best_global_step}))

    def _list(self, keep: set[int]) -> None:
        self.folder.record(f"{self.name}/checkpoint-{max(keep)}")
        for checkpoint in _checkpoints(self.folder, self.name):
            if _step(checkpoint) not in keep:
                self.folder.remove(checkpoint)


def _checkpoints(folder: ResultsFolder, name: str) -> list[str]:
    """The checkpoints of a run that are listed, the last one first. One that was cut short is not."""
    found = {state.rpartition("/")[0] for state in folder.find(f"{name}/checkpoint-*/trainer_state.json")}
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])


def _remove_checkpoints(folder: ResultsFolder, name: str) -> None:
    for checkpoint in (folder.path / name).glob("checkpoint-*"):
        folder.remove(f"{name}/{checkpoint.name}")


def _last_checkpoint(folder: ResultsFolder, name: str) -> str | None:
    """The last checkpoint that is whole, and so is the best one that it speaks of."""
    for checkpoint in _checkpoints(folder, name):
        state = json.loads((folder.path / checkpoint / "trainer_state.json").read_text())
        if all(folder.whole(f"{name}/checkpoint-{step}") for step in (_step(checkpoint), state["best_global_step"])):
            return str(folder.path / checkpoint)
    return None


def _fitting_length(model_name: str, model: Any, tokenizer: Any, data: Data, max_length: int | None) -> int:
    """The number of tokens that texts are cut to."""
    limit = min(
        tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    )
    for name, layer in model.named_modules():
        # In RoBERTa and its like the positions of a text begin behind that of padding.
        if name.endswith("position_embeddings") and getattr(layer, "padding_idx", None) is not None:
            limit = min(limit, layer.num_embeddings - layer.padding_idx - 1)
    least = tokenizer.num_special_tokens_to_add(pair=len(data.fields) == 2) + len(data.fields)
    if max_length is not None and max_length > limit:
        raise CommandError(f"--max-length {max_length}: {model_name} takes at most {limit} tokens")
    max_length = max_length or min(_MAX_LENGTH, limit)
    if max_length < least:
        raise CommandError(
            f"--max-length: {max_length} tokens leave no room for text; at least {least} are needed, as {model_name} "
            f"puts {least - len(data.fields)} of its own to a row"
        )
    return max_length


def _check_tokens(config: Any, tokenizer: Any, train: Any, dev: Any) -> None:
    """See that tokenizer and model belong together: each may be that of another one, or have lost its files."""
    if tokenizer.pad_token_id is None:
        raise CommandError("--model: its tokenizer has no padding token, which batches of texts need")
    limits = {"input_ids": config.vocab_size, "token_type_ids": getattr(config, "type_vocab_size", 0)}
    for split in (train, dev):
        for name, limit in limits.items():
            if limit and name in split.column_names:
                largest = _flat(split, name).max()
                if largest >= limit:
                    raise CommandError(
                        f"--model: the tokenizer gives {name} up to {largest}, and the model takes those below "
                        f"{limit}; expected the tokenizer that belongs to the model"
                    )
    if np.isin(_flat(train, "input_ids"), tokenizer.all_special_ids).all():
        raise CommandError(
            "--model: its tokenizer knows no word of the training texts; expected one with its vocabulary, whose file "
            "may be missing"
        )


def _flat(split: Any, name: str) -> Any:
    """All numbers in a column of lists."""
    return split.data.column(name).combine_chunks().flatten().to_numpy()


def _content(config: Any, weights: dict[str, Tensor], tokenizer: Any) -> dict[str, str]:
    """Hashes of what decides about a run, by what they are: the same whatever the files are called."""
    ignored = {
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "id2label",
        "label2id",
        "problem_type",
    }
    settings = {key: value for key, value in config.to_dict().items() if key not in ignored}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.model_max_length]
    described = [json.dumps(words, default=str), "" if backend is None else backend.to_str()]
    return {
        "the weights of --model": content_hash(
            part
            for name, x in sorted(weights.items())
            for part in (
                f"{name} {x.dtype} {tuple(x.shape)}".encode(),
                x.contiguous().reshape(-1).view(torch.uint8).numpy(),
            )
        ),
        "the configuration of --model": content_hash([json.dumps(settings, sort_keys=True, default=str).encode()]),
        "the tokenizer of --model": content_hash(text.encode() for text in described),
    }


def _embed(trainer: Trainer) -> Tensor:
    """Embeddings of the dev set (N, D), on the CPU, in the order of its rows: what IsoBN, or dropout, takes."""
    batches: list[Tensor] = []
    # Not the Trainer's loader, which gives each process a part.
    loader = DataLoader(trainer.eval_dataset, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    keep = output_layer(trainer.model).register_forward_pre_hook(lambda _, args: batches.append(args[0].float().cpu()))
    trainer.model.eval()
    with torch.inference_mode(), keep:
        for batch in loader:
            trainer.model(**batch.to(trainer.args.device))
    return torch.cat(batches)
