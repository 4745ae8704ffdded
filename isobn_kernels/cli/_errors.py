"""Errors of the commands, shown without a traceback."""

from __future__ import annotations

import importlib.util


class CommandError(Exception):
    """Something the user can put right: what was wrong, what was expected and what to do. Shown without traceback."""


def require_extra(extra: str, modules: tuple[str, ...]) -> None:
    """Raise CommandError unless all ``modules`` of the optional dependency ``extra`` are installed."""
    missing = missing_modules(modules)
    if missing:
        raise CommandError(
            f'{", ".join(missing)} not installed; this command needs: pip install "isobn_kernels[{extra}]"'
        )


def missing_modules(modules: tuple[str, ...]) -> list[str]:
    """The names in ``modules`` that cannot be imported. Only their parent packages are imported here."""
    return [module for module in modules if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing too
        return False
