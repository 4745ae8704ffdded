"""The registry of backends, and the rule that picks one.

To add a backend, derive a class from `isobn_kernels.backends.base.Backend`, give its module a function ``create()``
that returns the backend of this process, and name the module below.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from functools import cache

from torch import Tensor

from isobn_kernels.backends.base import Backend
from isobn_kernels.state import Where

# Fastest first.
_MODULES = {
    "cuda": "isobn_kernels.backends.cuda",
    "triton": "isobn_kernels.backends.triton.launches",
    "cpu": "isobn_kernels.backends.cpu",
    "reference": "isobn_kernels.backends.reference",
}

NAMES = tuple(_MODULES)

# Taken only when asked for by name: tested on emulators and compiled for GPUs, but not yet run on one.
_BY_NAME_ONLY = ("cuda", "triton")

# What "auto" means to this process, where it can run; read once, at import.
_PREFERRED = os.environ.get("ISOBN_BACKEND", "auto")

_registered: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """The backend called ``name``; its module is imported at the first call."""
    if name not in _registered:
        _registered[name] = importlib.import_module(_MODULES[name]).create()
    return _registered[name]


def register(backend: Backend) -> None:
    """Hand out ``backend`` under its name from now on, in place of the one before."""
    _registered[backend.name] = backend
    _auto_order.cache_clear()


@contextlib.contextmanager
def replaced(backend: Backend) -> Iterator[None]:
    """Inside, ``backend`` is handed out under its name."""
    before = load(backend.name)
    register(backend)
    try:
        yield
    finally:
        register(before)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, fastest first. Does not initialise CUDA.

    Example:
        >>> import isobn_kernels
        >>> "reference" in isobn_kernels.available_backends()
        True
    """
    return tuple(name for name in _MODULES if load(name).unavailable_reason() is None)


def check_name(backend: str) -> None:
    """Raise ValueError unless ``backend`` is "auto" or the name of a backend."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str, got {type(backend).__name__}")
    if backend != "auto" and backend not in _MODULES:
        raise ValueError(f"backend must be one of {('auto', *_MODULES)}, got {backend!r}")


def select(where: Where, x: Tensor) -> Backend:
    """The backend asked for; with the name of a process group, on the rows of all its ranks."""
    chosen = _select(where.backend, x)
    if not where.group:
        return chosen
    from isobn_kernels.backends.across_ranks import across_ranks

    return across_ranks(chosen, where.group)


def _select(backend: str, x: Tensor) -> Backend:
    """The backend called ``backend``, or for "auto" the fastest that can take ``x``.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the one asked for cannot run here or cannot take ``x``; says why and what to do.
    """
    if backend != "auto":
        check_name(backend)
        chosen = load(backend)
        reason = chosen.unavailable_reason() or chosen.unsupported_reason(x)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} was asked for, but {reason}")
        return chosen
    for candidate in _auto_order():
        if candidate.unsupported_reason(x) is None:
            return candidate
    raise AssertionError("the reference takes every tensor")


@cache
def _auto_order() -> tuple[Backend, ...]:
    names = [name for name in _MODULES if name not in (*_BY_NAME_ONLY, _PREFERRED)]
    if _PREFERRED in _MODULES:
        names.insert(0, _PREFERRED)
    elif _PREFERRED != "auto":
        warnings.warn(f"ISOBN_BACKEND={_PREFERRED} is not followed: the backends are {NAMES}", stacklevel=2)
    order = []
    for name in names:
        reason = load(name).unavailable_reason()
        if reason is None:
            order.append(load(name))
        elif name == _PREFERRED:
            warnings.warn(f"ISOBN_BACKEND={name} is not followed: {reason}", stacklevel=2)
    return tuple(order)
