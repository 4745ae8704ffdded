"""Isotropic batch normalization (IsoBN) for PyTorch."""

from isobn_kernels.backends import available_backends
from isobn_kernels.functional import isobn
from isobn_kernels.module import IsoBN

__all__ = ["IsoBN", "available_backends", "isobn"]
