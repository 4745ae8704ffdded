"""The runs of ``finetune``: one for each normalizer and seed, with the Trainer of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from isobn_kernels import IsoBN
from isobn_kernels.cli._data import Data
from isobn_kernels.cli._errors import CommandError
from isobn_kernels.integrations.transformers import apply_isobn, output_layer
from isobn_kernels.isotropy import measure

BEFORE, AFTER, SCALED = "before training", "after training", "after scaling"
_MAX_LENGTH = 256  # the paper's
# Over several processes without a GPU both accelerate and the Trainer have to be told that this is meant.
_ON_CPU = not torch.accelerator.is_available()


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


def processes() -> PartialState:
    """This process among those that were started with it, by torchrun or accelerate; or alone."""
    return PartialState(cpu=_ON_CPU)


def train_all(
    data: Data,
    model_name: str,
    *,
    normalizers: list[str],
    seeds: list[int],
    isobn_options: dict[str, float],
    max_length: int | None,
    epochs: int,
    patience: int,
    batch_size: int,
    learning_rate: float,
    output: Path,
) -> Iterator[tuple[Run, dict[str, Tensor]]]:
    """Train, measure, and save the best model of each normalizer, with the tokenizer, in ``output/normalizer``.

    A run that is found finished in ``output/runs`` is not repeated, and one found interrupted goes on. Over several
    processes each calls this, and gets the same.

    Yields:
        Each run as it is done, and for the first seed its dev embeddings (N, D) by stage.

    Raises:
        CommandError: there is no such model, apply_isobn does not know it, ``max_length`` is beyond it, or training
            diverged.
    """
    here = processes()
    tokenizer, max_length = _load_tokenizer(model_name, max_length)

    def tokenize(rows: dict[str, Any]) -> Any:
        return tokenizer(*(rows[field] for field in data.fields), truncation=True, max_length=max_length)

    with here.main_process_first():  # the others find its cached result
        train, dev = (split.map(tokenize, batched=True, remove_columns=data.fields) for split in (data.train, data.dev))
    best = dict.fromkeys(normalizers, -float("inf"))
    for path in output.glob("runs/*/run.json"):  # of seeds that are not asked for now, too
        run = _finished(path.parent)
        best[run.normalizer] = max(best.get(run.normalizer, -float("inf")), run.metrics[data.metrics[0]])
    for seed in seeds:
        for normalizer in normalizers:
            folder = output / "runs" / f"{normalizer}-seed{seed}"
            if (folder / "run.json").is_file():
                run = _finished(folder)
                yield run, torch.load(folder / "embeddings.pt") if seed == seeds[0] else {}
                continue
            checkpoint = _last_checkpoint(folder)
            if here.is_main_process:
                print(f"\nnormalizer {normalizer}, seed {seed}{', going on' if checkpoint else ''}", flush=True)
            # Before the model is made, for the new head: the normalizers start from the same weights.
            set_seed(seed)
            model, pooler_is_new = _load_model(model_name, data)
            if normalizer == "isobn":
                apply_isobn(model, **isobn_options)
                if here.num_processes > 1:
                    IsoBN.convert_sync_isobn(model)
            trainer = Trainer(
                model=model,
                args=TrainingArguments(
                    output_dir=str(folder),
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
                    save_total_limit=1,  # and the best
                    load_best_model_at_end=True,
                    metric_for_best_model=data.metrics[0],
                    greater_is_better=True,
                    restore_callback_states_from_checkpoint=True,
                    report_to="none",
                    use_cpu=_ON_CPU,
                    dataloader_pin_memory=torch.cuda.is_available(),
                ),
                train_dataset=train,
                eval_dataset=dev,
                data_collator=DataCollatorWithPadding(tokenizer),
                compute_metrics=data.compute_metrics,
                callbacks=[EarlyStoppingCallback(patience)],
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
            if any((x == x[0]).all() for x in stages.values()):
                raise CommandError(
                    f"with seed {seed} all {len(dev)} dev texts have the same embedding: they are the same tokens, or "
                    "training collapsed; try a lower --learning-rate"
                )
            run = Run(
                normalizer,
                seed,
                metrics={name: evaluated[f"eval_{name}"] for name in data.metrics},
                isotropy={stage: measure(x) for stage, x in stages.items()},
                pooler_is_new=pooler_is_new,
                best_epoch=round(trainer.state.best_global_step * epochs / trainer.state.max_steps),
                train_seconds=seconds,
            )
            score = run.metrics[data.metrics[0]]
            if here.is_main_process:
                if score > best[normalizer]:
                    model.save_pretrained(output / normalizer)
                    tokenizer.save_pretrained(output / normalizer)
                for leftover in folder.glob("checkpoint-*"):
                    shutil.rmtree(leftover)
                torch.save(stages, folder / "embeddings.pt")
                # Last, and whole or not at all: it says that this run is finished.
                (folder / "run.json.part").write_text(json.dumps(asdict(run), indent=2) + "\n")
                (folder / "run.json.part").replace(folder / "run.json")
            best[normalizer] = max(best[normalizer], score)
            here.wait_for_everyone()
            yield run, stages if seed == seeds[0] else {}


def _finished(folder: Path) -> Run:
    return Run(**json.loads((folder / "run.json").read_text()))


def _last_checkpoint(folder: Path) -> str | None:
    # The Trainer writes this file last: a checkpoint without it was cut short.
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if last is None else str(last)


def _load_tokenizer(model_name: str, max_length: int | None) -> tuple[Any, int]:
    try:
        config = AutoConfig.from_pretrained(model_name)
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"--model {model_name}: configuration or tokenizer cannot be loaded; expected the name of an encoder on "
            f"the hub, or a folder with config.json, weights and tokenizer files.\n{error}"
        ) from error
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length))
    if max_length is not None and max_length > limit:
        raise CommandError(f"--max-length {max_length}: {model_name} takes at most {limit} tokens")
    return tokenizer, max_length or min(_MAX_LENGTH, limit)


def _load_model(model_name: str, data: Data) -> tuple[Any, bool]:
    """The library's classifier with a new output layer; and whether its pooler is new too, for want of weights."""
    names = dict(enumerate(data.classes)) or {0: "score"}
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            model_name,
            # Not the dtype of the checkpoint: AdamW on half-precision weights loses small updates.
            dtype=torch.float32,
            num_labels=len(names),
            id2label=names,
            label2id={name: number for number, name in names.items()},
            problem_type="single_label_classification" if data.classes else "regression",
            ignore_mismatched_sizes=True,  # an output layer of other classes
            output_loading_info=True,
        )
        output = output_layer(model)
    except (OSError, ValueError) as error:
        raise CommandError(f"--model {model_name}: {error}") from error
    if any(isinstance(module, IsoBN) for module in model.modules()):
        raise CommandError(f"--model {model_name}: has IsoBN already; give the encoder that it was made from")
    new = {
        f"{name}.{part}" for name, module in model.named_modules() if module is output for part in ("weight", "bias")
    }
    return model, bool(set(loading["missing_keys"]) - new)


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
