"""``finetune``: an encoder learns a classification task, with and without IsoBN, and what that does to isotropy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from isobn_kernels import IsoBN
from isobn_kernels.cli._data import TASKS, load_data
from isobn_kernels.cli._errors import CommandError, require_extra

MODULES = ("accelerate", "datasets", "matplotlib", "sklearn", "transformers")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune an encoder with or without IsoBN, and measure isotropy",
        description="Fine-tune an encoder to classify sentences or pairs of sentences: pooler output, IsoBN, dropout, "
        "linear layer. Prints and saves the dev metric over the seeds and the isotropy of the dev embeddings before "
        "training, after it, and after IsoBN's scaling; saves the best model of each normalizer.",
        epilog="examples:\n"
        "  %(prog)s --model bert-base-cased --task rte --normalizer isobn none --seeds 1 2 3\n"
        "  %(prog)s --model path/to/encoder --train-file train.jsonl --dev-file dev.jsonl",
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
        "--max-length", type=at_least_1, default=128, metavar="N", help="longer texts are cut (%(default)s tokens)"
    )
    data.add_argument(
        "--output",
        type=Path,
        default=Path("runs/finetune"),
        metavar="DIR",
        help="folder for models, results and figure, replacing those of an earlier run (%(default)s)",
    )

    training = parser.add_argument_group("training", "AdamW (eps 1e-6, no weight decay), 6 % warm-up, linear decay")
    training.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N", help="one run each (1)")
    training.add_argument(
        "--epochs", type=at_least_1, default=3, metavar="N", help="passes over the data (%(default)s)"
    )
    training.add_argument("--batch-size", type=at_least_1, default=16, metavar="N", help="rows of a step (%(default)s)")
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
    from isobn_kernels.cli._training import Run, train_all

    isobn_options = {"momentum": args.momentum, "eps": args.eps, "beta": args.beta}
    try:
        IsoBN(1, **isobn_options)
    except ValueError as error:
        raise CommandError(f"--{error}") from error
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {args.output}: this folder cannot be made ({error.strerror})") from error
    data = load_data(args.task, args.train_file, args.dev_file, args.max_train_samples, args.max_dev_samples)
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    runs: list[Run] = []
    embeddings: dict[tuple[str, str], Tensor] = {}
    for run, stages in train_all(
        data,
        args.model,
        # Each once, in the order given.
        normalizers=list(dict.fromkeys(args.normalizer)),
        seeds=list(dict.fromkeys(args.seeds)),
        isobn_options=isobn_options,
        max_length=args.max_length,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        output=args.output,
    ):
        runs.append(run)
        if run.seed == args.seeds[0]:
            embeddings |= {(run.normalizer, stage): x for stage, x in stages.items()}
        # After every run, so that an interruption loses only the one under way.
        report = write_report(runs, embeddings, data, settings, args.output)
    print("\n" + report)


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
