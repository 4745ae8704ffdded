"""python -m benchmarks COMMAND [OPTIONS]; every command has a --help of its own.

run      time every provider of an IsoBN step, side by side, into benchmarks/results/results.csv
model    the share of a fine-tuning step that the normaliser takes, into the same table
plot     draw the speed-ups and the scaling curves of the table
readme   write the README's speed section from the table
compare  time two commits on this machine, interleaved
host     what Python costs per call, with the launches stubbed
ranks    what a step across ranks costs, beside its messages and a step alone
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = ("run", "model", "plot", "readme", "compare", "host", "ranks")


def main(argv: list[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__, end="")
        return 0
    if command not in COMMANDS:
        print(f"no command {command!r}: choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # Only the one that is asked for: most import torch, and some take a while.
    module = importlib.import_module(f"benchmarks.{command}")
    return int(module.main(rest))


if __name__ == "__main__":
    sys.exit(main())
