"""Benchmarks: ``python -m benchmarks`` lists the commands. Each is a module with a ``main``."""

import argparse


def parser_for(command: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the command's module."""
    title, _, details = str(doc).partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(command, description=title, epilog=details, formatter_class=formatter)
