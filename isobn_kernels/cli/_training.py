"""The runs of ``finetune``: one for each normalizer and seed, with the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from isobn_kernels import IsoBN
from isobn_kernels.cli._data import Data
from isobn_kernels.cli._errors import CommandError
from isobn_kernels.integrations.transformers import IsoBNForSequenceClassification
from isobn_kernels.isotropy import measure

BEFORE, AFTER, SCALED = "before training", "after training", "after scaling"


@dataclass(frozen=True)
class Run:
    """What one training run gave; ``isotropy`` by stage, as `isobn_kernels.isotropy.measure` reports it."""

    normalizer: str
    seed: int
    metrics: dict[str, float]
    isotropy: dict[str, dict[str, float]]
    pooler_is_new: bool
    train_seconds: float


def train_all(
    data: Data,
    model_name: str,
    *,
    normalizers: list[str],
    seeds: list[int],
    isobn_options: dict[str, float],
    max_length: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    output: Path,
) -> Iterator[tuple[Run, dict[str, Tensor]]]:
    """Train, measure, and save the best model of each normalizer, with the tokenizer, in ``output/normalizer``.

    Yields:
        Each run as it is done, and its dev embeddings (N, D) by stage.

    Raises:
        CommandError: there is no such model, it is not an encoder, ``max_length`` is beyond it, or training diverged.
    """
    tokenizer = _load_tokenizer(model_name, max_length)

    def tokenize(rows: dict[str, Any]) -> Any:
        return tokenizer(*(rows[field] for field in data.fields), truncation=True, max_length=max_length)

    train, dev = (split.map(tokenize, batched=True, remove_columns=data.fields) for split in (data.train, data.dev))
    best = dict.fromkeys(normalizers, -float("inf"))
    for seed in seeds:
        for normalizer in normalizers:
            print(f"\nnormalizer {normalizer}, seed {seed}", flush=True)
            # Before the model is made, for the new head: the normalizers start from the same weights.
            set_seed(seed)
            model = _load_model(
                model_name,
                num_labels=len(data.classes),
                id2label=dict(enumerate(data.classes)),
                label2id={name: number for number, name in enumerate(data.classes)},
                normalizer=normalizer,
                isobn_options=isobn_options if normalizer == "isobn" else None,
            )
            trainer = Trainer(
                model=model,
                args=TrainingArguments(
                    output_dir=str(output / normalizer),
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
                    save_strategy="no",
                    report_to="none",
                    dataloader_pin_memory=torch.cuda.is_available(),
                ),
                train_dataset=train,
                eval_dataset=dev,
                data_collator=DataCollatorWithPadding(tokenizer),
                compute_metrics=data.compute_metrics,
            )
            stages = {BEFORE: _embed(trainer)}
            seconds = trainer.train().metrics["train_runtime"]
            evaluated = trainer.evaluate()
            stages[AFTER] = _embed(trainer)
            if isinstance(model.isobn, IsoBN):
                stages[SCALED] = stages[AFTER] * model.isobn.scale.cpu()
            if not all(x.isfinite().all() for x in stages.values()):
                raise CommandError(f"training with seed {seed} diverged to NaN or Inf; try a lower --learning-rate")
            metrics = {name: evaluated[f"eval_{name}"] for name in data.metrics}
            if metrics[data.metrics[0]] > best[normalizer]:
                best[normalizer] = metrics[data.metrics[0]]
                model.save_pretrained(output / normalizer)
                tokenizer.save_pretrained(output / normalizer)
            isotropy = {stage: measure(x) for stage, x in stages.items()}
            yield Run(normalizer, seed, metrics, isotropy, model.pooler_is_new, seconds), stages


def _load_tokenizer(model_name: str, max_length: int) -> Any:
    try:
        config = AutoConfig.from_pretrained(model_name)
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"--model {model_name}: configuration or tokenizer cannot be loaded; expected the name of an encoder on "
            f"the hub, or a folder with config.json, weights and tokenizer files.\n{error}"
        ) from error
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", max_length))
    if max_length > limit:
        raise CommandError(f"--max-length {max_length}: {model_name} takes at most {limit} tokens")
    return tokenizer


def _load_model(model_name: str, **config: Any) -> IsoBNForSequenceClassification:
    try:
        return IsoBNForSequenceClassification.from_encoder(model_name, **config)
    except (OSError, ValueError) as error:
        raise CommandError(f"--model {model_name}: {error}") from error


def _embed(trainer: Trainer) -> Tensor:
    """Embeddings of the dev set (N, D), on the CPU, in the order of its rows."""
    trainer.model.eval()
    batches = []
    with torch.inference_mode():
        for batch in trainer.get_eval_dataloader():
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            batches.append(trainer.model.embed(**inputs).float().cpu())
    return torch.cat(batches)
