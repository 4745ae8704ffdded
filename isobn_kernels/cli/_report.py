"""What ``finetune`` leaves behind: ``results.json``, ``results.md`` and ``isotropy.png``."""

from __future__ import annotations

import json
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

from isobn_kernels.cli._data import Data
from isobn_kernels.cli._folder import ResultsFolder
from isobn_kernels.cli._training import AFTER, BEFORE, SCALED, Run
from isobn_kernels.isotropy.plots import plot_isotropy

FILES = ("results.json", "results.md", "isotropy.png")
_COLUMNS = {
    "EV_1": "EV_1",
    "EV_2": "EV_2",
    "EV_3": "EV_3",
    "deviation_spread": "deviation spread",
    "mean_absolute_correlation": "mean abs. correlation",
}
_NOTES = """\
EV_k: share of the variance of the centred embeddings in their k strongest directions. Deviation spread: standard
deviation over mean of the deviations of the features. Mean abs. correlation: over all pairs of different features; a
scale for each feature cannot change it. Isotropic embeddings have EV_k = k / {D}, spread 0 and correlation 0."""


def write_report(
    runs: list[Run],
    embeddings: dict[tuple[str, str], Tensor],
    data: Data,
    settings: dict[str, Any],
    folder: ResultsFolder,
) -> str:
    """Write the three files into ``folder``; returns what to print.

    Args:
        embeddings: of the first seed, by normalizer and stage; the figure shows them.
        settings: the arguments of the command.
    """
    seeds = list(dict.fromkeys(run.seed for run in runs))
    heading = "\n".join(
        [
            f"model  {settings['model']}",
            f"data   {settings['task'] or settings['train_file']}: {len(data.train)} training and {len(data.dev)} dev "
            f"rows, {f'{len(data.classes)} classes' if data.classes else 'a number to predict'}",
            f"seeds  {', '.join(map(str, seeds))}" + ("; medians, and (smallest..largest)" if len(seeds) > 1 else ""),
        ]
    )
    table = _table(runs, data.metrics)
    features = next(iter(embeddings.values())).shape[1]
    notes = "\n".join([*_comparison(runs, data.metrics[0]), _NOTES.format(D=features)])
    if runs[0].pooler_is_new:
        notes += "\nThe pooler of this encoder is not pretrained: before training it is a random projection."

    stages = {_row_name(normalizer, stage): x for (normalizer, stage), x in embeddings.items()}
    title = f"Isotropy of the {len(data.dev)} dev embeddings, seed {seeds[0]}"
    results = {
        "settings": settings,
        "rows": {"train": len(data.train), "dev": len(data.dev)},
        "classes": data.classes,
        "runs": [asdict(run) for run in runs],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    record, page, figure = FILES
    markdown = f"# Fine-tuning results\n\n```\n{heading}\n```\n\n{table}\n\n{notes}\n\n![isotropy]({figure})\n"
    folder.write(record, lambda path: path.write_text(json.dumps(results, indent=2, default=str) + "\n"))
    folder.write(page, lambda path: path.write_text(markdown, encoding="utf-8", errors="backslashreplace"))
    folder.write(figure, lambda path: plot_isotropy(stages, path, title))
    models = ", ".join(str(folder.path / name) for name in dict.fromkeys(run.normalizer for run in runs))
    return (
        f"{heading}\n\n{table}\n\n{notes}\n\n"
        f"models   {models}\nresults  {folder.path / record}, {folder.path / page}\nfigure   {folder.path / figure}"
    )


def _comparison(runs: list[Run], metric: str) -> list[str]:
    """Isobn against none on the same seed, which is a closer comparison than that of the medians."""
    scores = {(run.normalizer, run.seed): run.metrics[metric] for run in runs}
    differences = [
        scores["isobn", seed] - scores["none", seed]
        for normalizer, seed in scores
        if normalizer == "none" and ("isobn", seed) in scores
    ]
    listed = ", ".join(f"{difference:+.3f}" for difference in differences)
    return [f"{metric} of isobn minus none, seed by seed: {listed}.\n"] if differences else []


def _row_name(normalizer: str, stage: str) -> str:
    # All normalizers start from the same weights.
    return stage if stage == BEFORE else f"{normalizer}, {stage}"


def _table(runs: list[Run], metrics: tuple[str, ...]) -> str:
    """A Markdown table, aligned for reading as it is: medians over the seeds."""
    rows = {"": ["dev embeddings", *metrics, *_COLUMNS.values()]}
    for normalizer in dict.fromkeys(run.normalizer for run in runs):
        chosen = [run for run in runs if run.normalizer == normalizer]
        for stage in chosen[0].isotropy:
            name = _row_name(normalizer, stage)
            # The classifier sees the scaled embeddings where there are such.
            classified = stage == (SCALED if SCALED in chosen[0].isotropy else AFTER)
            scores = [_spread([run.metrics[metric] for run in chosen]) if classified else "" for metric in metrics]
            measures = [f"{median(run.isotropy[stage][column] for run in chosen):.3f}" for column in _COLUMNS]
            rows[name] = [name, *scores, *measures]
    widths = [max(map(len, column)) for column in zip(*rows.values(), strict=True)]
    header, *body = (
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows.values()
    )
    return "\n".join([header, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def _spread(values: list[float]) -> str:
    text = f"{median(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f}..{max(values):.3f})"
