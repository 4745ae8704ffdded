"""The commands of ``python -m isobn_kernels``, one file each: ``add_parser`` declares one, its ``run`` does it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from isobn_kernels.cli import demo, finetune, info
from isobn_kernels.cli._errors import CommandError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 where something the user can put right stood in the way.

    Args:
        argv: the words after ``python -m isobn_kernels``; those of this process where None.

    Example:
        >>> from isobn_kernels.cli import main
        >>> main(["info"])  # doctest: +ELLIPSIS
        isobn_kernels ...
        0
    """
    parser = argparse.ArgumentParser(
        prog="python -m isobn_kernels", description="Isotropic batch normalization (IsoBN) for PyTorch."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (info, demo, finetune):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
