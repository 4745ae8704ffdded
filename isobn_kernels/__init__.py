"""Isotropic batch normalization (IsoBN) for PyTorch."""

from isobn_kernels.backends import available_backends
from isobn_kernels.folding import fold_isobn
from isobn_kernels.functional import isobn
from isobn_kernels.module import IsoBN

__all__ = ["IsoBN", "available_backends", "fold_isobn", "isobn"]
__version__ = "0.1.0"
