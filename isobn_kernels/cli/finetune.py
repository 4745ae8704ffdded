"""``finetune``: an encoder learns a classification task, with and without IsoBN, and what that does to isotropy."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from isobn_kernels import IsoBN
from isobn_kernels.cli._data import TASKS, Data, load_data
from isobn_kernels.cli._errors import CommandError, require_extra
from isobn_kernels.cli._folder import ResultsFolder

MODULES = ("accelerate", "datasets", "matplotlib", "scipy", "sklearn", "transformers")
# Only some tokenizers need these: those that come as a file of SentencePiece.
TOKENIZER_MODULES = ("sentencepiece", "google.protobuf")

# What may differ between a command and the one it resumes: more runs, and the places of what is the same by content.
_NOT_COMPARED = {"normalizer", "seeds", "output", "resume", "model", "train_file", "dev_file"}
_START = "start"  # a copy of the model, where it was among the results that the command replaces


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
    at_least_1, at_least_2 = _whole_number(1, 2**31 - 1), _whole_number(2, 2**31 - 1)

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
        help="JSON (lines, or one array), CSV or TSV with 'sentence', or 'sentence1' and 'sentence2', and 'label'",
    )
    data.add_argument("--dev-file", type=Path, metavar="FILE", help="the same for the dev set")
    data.add_argument("--max-train-samples", type=at_least_2, metavar="N", help="train on a random subset")
    data.add_argument("--max-dev-samples", type=at_least_2, metavar="N", help="evaluate on a random subset")
    data.add_argument(
        "--max-length", type=at_least_1, metavar="N", help="longer texts are cut (256 tokens, or what the model takes)"
    )
    data.add_argument(
        "--output",
        type=Path,
        default=Path("runs/finetune"),
        metavar="DIR",
        help="folder for models, results and figure (%(default)s). Those of an earlier command there are replaced, and "
        "nothing else: a file in the way that no command made, or that was changed since, is an error. While another "
        "command is at work there, this one waits",
    )
    data.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted command in the same folder, or add runs: finished ones are kept. Data, model, "
        "settings, versions and number of processes have to be the same",
    )

    training = parser.add_argument_group(
        "training",
        "AdamW (eps 1e-6, no weight decay), 6 %% warm-up, linear decay; the epoch with the best dev metric is kept",
    )
    training.add_argument(
        "--seeds",
        type=_whole_number(0, 2**32 - 1),  # what NumPy takes
        nargs="+",
        default=[1, 2, 3, 4, 5],
        metavar="N",
        help="one run each (1 2 3 4 5)",
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
        type=_above_0,
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
    from isobn_kernels.cli._training import on_main_process, processes

    isobn_options = {"momentum": args.momentum, "eps": args.eps, "beta": args.beta}
    try:
        IsoBN(1, **isobn_options)
    except ValueError as error:
        raise CommandError(f"--{error}") from error
    data = load_data(args.task, args.train_file, args.dev_file, args.max_train_samples, args.max_dev_samples)
    folder = ResultsFolder(args.output)
    here = processes()
    try:
        if not on_main_process(here, folder.locked):
            if here.is_main_process:
                print(f"waiting: another command is at work in {args.output}", flush=True)
            while not on_main_process(here, folder.locked):
                time.sleep(1)
        _run(args, data, isobn_options, folder)
    finally:
        folder.unlock()


def _run(args: argparse.Namespace, data: Data, isobn_options: dict[str, float], folder: ResultsFolder) -> None:
    from isobn_kernels.cli._report import FILES, write_report
    from isobn_kernels.cli._training import (
        finished_runs,
        load_start,
        on_main_process,
        processes,
        run_folder,
        train_all,
        versions,
    )

    here = processes()
    # Each once, in the order given.
    normalizers, seeds = list(dict.fromkeys(args.normalizer)), list(dict.fromkeys(args.seeds))
    asked = [(normalizer, seed) for seed in seeds for normalizer in normalizers]
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    start = load_start(on_main_process(here, lambda: _model_to_read(args, folder)), data, args.max_length)
    identity = {
        **{f"--{name.replace('_', '-')}": value for name, value in settings.items() if name not in _NOT_COMPARED},
        "the number of processes": here.num_processes,
        **versions(),
        **start.content,
        **data.content,
    }
    names = [*FILES, *normalizers, *(run_folder(*key) for key in asked)]
    on_main_process(here, lambda: _prepare(args, folder, identity, names))

    done = on_main_process(here, lambda: finished_runs(folder))
    embeddings: dict[tuple[str, str], Tensor] = {}
    report = ""
    for run, stages in train_all(
        data,
        start,
        done,
        asked,
        isobn_options=isobn_options,
        epochs=args.epochs,
        patience=args.patience,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        folder=folder,
    ):
        done[run.normalizer, run.seed] = run
        embeddings |= {(run.normalizer, stage): x for stage, x in stages.items()}
        # After every run, for an interruption to leave something to look at; and with all runs of the folder, those
        # that a resumed command did not ask for at the end.
        runs = [done[key] for key in dict.fromkeys([*asked, *done]) if key in done]
        report = on_main_process(here, lambda: write_report(runs, embeddings, data, settings, folder))  # noqa: B023
    if here.is_main_process:
        print("\n" + report)


def _model_to_read(args: argparse.Namespace, folder: ResultsFolder) -> str:
    """The folder or name to load the model from: that of a copy where the one in the results was replaced since."""
    copied = args.resume and folder.notes.get(_START) == _place_in(folder, args.model)
    return str(folder.path / _START) if copied else args.model


def _place_in(folder: ResultsFolder, path: str) -> str:
    # Relative, for the folder may be moved.
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder.path))


def _prepare(args: argparse.Namespace, folder: ResultsFolder, identity: dict[str, Any], names: list[str]) -> None:
    """On resuming, see that the runs in the folder are of the same kind, and else clear it of earlier results."""
    identity = json.loads(json.dumps(identity))
    resume = args.resume and folder.identity is not None
    if resume and (differ := folder.differences(identity)):
        raise CommandError(
            f"--resume: {'; '.join(differ)}. Such runs do not belong into one table: give the same as before, or "
            "another --output"
        )
    for option, file in (("--train-file", args.train_file), ("--dev-file", args.dev_file)):
        if file and folder.owner(file):
            raise CommandError(f"{option} {file} is a result in --output {args.output}; copy it to another place")
    inside = folder.owner(Path(args.model)) if os.path.isdir(args.model) else None
    folder.check(names if not inside or resume else [*names, _START])
    if resume:
        folder.claim(names)
        return
    notes = {}
    if inside:
        # It is going to be replaced. A command that is resumed needs it still, and so may the user.
        print(f"--model {args.model} lies in --output: a copy is kept in {folder.path / _START}", flush=True)
        notes[_START] = _place_in(folder, args.model)
        if inside != _START:
            folder.claim([_START])
            folder.write(_START, lambda place: shutil.copytree(args.model, place))
    folder.start(identity, names, notes, keep=notes)


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected a whole number, {low} or above, got {text!r}")
        if value > high:
            raise argparse.ArgumentTypeError(f"expected a whole number, {high} or below, got {text!r}")
        return value

    return parse


def _above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
