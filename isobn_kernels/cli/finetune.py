"""``finetune``: an encoder learns a classification task, with and without IsoBN, and what that does to isotropy."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from isobn_kernels import IsoBN
from isobn_kernels.cli._data import TASKS, load_data
from isobn_kernels.cli._errors import CommandError, require_extra

MODULES = ("accelerate", "datasets", "matplotlib", "scipy", "sklearn", "transformers")

# What may differ between a command and the one it resumes: more runs, in the same place.
_NOT_COMPARED = {"normalizer", "seeds", "output", "resume"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune an encoder with or without IsoBN, and measure isotropy",
        description="Fine-tune an encoder to classify sentences or pairs of sentences, or to score them: pooled "
        "embedding, IsoBN, dropout, linear layer. Prints and saves the dev metric over the seeds and the isotropy of "
        "the dev embeddings before training, after it, and after IsoBN's scaling; saves the best model of each "
        "normalizer. The settings are those of the paper where it has one.",
        epilog="examples:\n"
        "  %(prog)s --model bert-base-cased --task rte --normalizer isobn none\n"
        "  %(prog)s --model path/to/encoder --train-file train.jsonl --dev-file dev.jsonl --seeds 1\n"
        "several processes: torchrun --nproc-per-node 2 -m isobn_kernels finetune ..., or accelerate launch",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    at_least_1 = _number(int, lambda value: value >= 1, "a whole number, 1 or above")

    data = parser.add_argument_group("model and data")
    data.add_argument("--model", required=True, help="hub name or folder of an encoder, as for transformers' AutoModel")
    data.add_argument(
        "--task",
        choices=TASKS,
        help="GLUE task: its data from the hub or, with the two files, its fields, classes and metric",
    )
    data.add_argument(
        "--train-file",
        type=Path,
        metavar="FILE",
        help="JSON (lines, or one array) or CSV with 'sentence', or 'sentence1' and 'sentence2', and 'label'",
    )
    data.add_argument("--dev-file", type=Path, metavar="FILE", help="the same for the dev set")
    data.add_argument("--max-train-samples", type=at_least_1, metavar="N", help="train on a random subset")
    data.add_argument("--max-dev-samples", type=at_least_1, metavar="N", help="evaluate on a random subset")
    data.add_argument(
        "--max-length", type=at_least_1, metavar="N", help="longer texts are cut (256 tokens, or what the model takes)"
    )
    data.add_argument(
        "--output",
        type=Path,
        default=Path("runs/finetune"),
        metavar="DIR",
        help="folder for models, results and figure, replacing those of an earlier run (%(default)s)",
    )
    data.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted command in the same folder: its finished runs are kept",
    )

    training = parser.add_argument_group(
        "training",
        "AdamW (eps 1e-6, no weight decay), 6 %% warm-up, linear decay; the epoch with the best dev metric is kept",
    )
    training.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="N", help="one run each (1 2 3 4 5)"
    )
    training.add_argument(
        "--epochs", type=at_least_1, default=10, metavar="N", help="passes over the data, at most (%(default)s)"
    )
    training.add_argument(
        "--patience", type=at_least_1, default=3, metavar="N", help="stop after N epochs without gain (%(default)s)"
    )
    training.add_argument(
        "--batch-size", type=at_least_1, default=16, metavar="N", help="rows of a step, on each device (%(default)s)"
    )
    training.add_argument(
        "--learning-rate",
        type=_number(float, lambda value: 0 < value < float("inf"), "a number above 0"),
        default=5e-5,
        metavar="X",
        help="at its highest (%(default)s)",
    )

    isobn = parser.add_argument_group("IsoBN")
    isobn.add_argument(
        "--normalizer",
        choices=("isobn", "none"),
        nargs="+",
        default=["isobn"],
        help="both: compare them on the same seeds (isobn)",
    )
    isobn.add_argument(
        "--momentum", type=float, default=0.05, metavar="X", help="weight of a batch in the statistics (%(default)s)"
    )
    isobn.add_argument("--eps", type=float, default=1e-3, metavar="X", help="stabiliser (%(default)s)")
    isobn.add_argument("--beta", type=float, default=0.5, metavar="X", help="strength; 0 is none (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require_extra("finetune", MODULES)
    # Imported only now: they need the extra, and take seconds.
    from isobn_kernels.cli._report import write_report
    from isobn_kernels.cli._training import Run, processes, train_all

    isobn_options = {"momentum": args.momentum, "eps": args.eps, "beta": args.beta}
    try:
        IsoBN(1, **isobn_options)
    except ValueError as error:
        raise CommandError(f"--{error}") from error
    data = load_data(args.task, args.train_file, args.dev_file, args.max_train_samples, args.max_dev_samples)
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    here = processes()
    if here.is_main_process:
        _prepare(args.output, json.loads(json.dumps(settings, default=str)))
    here.wait_for_everyone()
    runs: list[Run] = []
    embeddings: dict[tuple[str, str], Tensor] = {}
    report = ""
    for run, stages in train_all(
        data,
        args.model,
        # Each once, in the order given.
        normalizers=list(dict.fromkeys(args.normalizer)),
        seeds=list(dict.fromkeys(args.seeds)),
        isobn_options=isobn_options,
        max_length=args.max_length,
        epochs=args.epochs,
        patience=args.patience,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        output=args.output,
    ):
        runs.append(run)
        embeddings |= {(run.normalizer, stage): x for stage, x in stages.items()}
        # After every run, for an interruption to leave something to look at.
        if here.is_main_process:
            report = write_report(runs, embeddings, data, settings, args.output)
    if here.is_main_process:
        print("\n" + report)


def _prepare(output: Path, settings: dict[str, Any]) -> None:
    """Make the folder; on resuming, see that the settings are those of its runs, and else clear it of them."""
    kept = output / "runs" / "settings.json"
    if settings["resume"] and kept.is_file():
        earlier = json.loads(kept.read_text())
        differ = [
            f"--{name.replace('_', '-')} was {earlier.get(name)}, now {value}"
            for name, value in settings.items()
            if name not in _NOT_COMPARED and earlier.get(name) != value
        ]
        if differ:
            raise CommandError(f"--resume: {'; '.join(differ)}. Give the same as before, or another --output")
        return
    try:
        shutil.rmtree(kept.parent, ignore_errors=True)
        kept.parent.mkdir(parents=True)
    except OSError as error:
        raise CommandError(f"--output {output}: this folder cannot be made ({error.strerror})") from error
    kept.write_text(json.dumps(settings, indent=2) + "\n")


def _number(kind: type, accept: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse
