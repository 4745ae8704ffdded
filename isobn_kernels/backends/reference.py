"""The equations of `isobn_kernels.reference` as a backend."""

from __future__ import annotations

from isobn_kernels import reference
from isobn_kernels.backends.base import Backend


class ReferenceBackend(Backend):
    """It runs everywhere and takes every tensor; the others are compared with it."""

    name = "reference"

    train_forward = staticmethod(reference.train_forward)
    compute_scale = staticmethod(reference.compute_scale)
    apply_scale = staticmethod(reference.apply_scale)
    train_backward = staticmethod(reference.train_backward)


create = ReferenceBackend
