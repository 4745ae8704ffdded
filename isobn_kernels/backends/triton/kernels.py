"""All Triton kernels, by name."""

from isobn_kernels.backends.triton.backward import backward_features, column_products, gradient
from isobn_kernels.backends.triton.forward import column_sums, finish, inspect_pairs, scale_rows, shrink, update_pairs

__all__ = [
    "backward_features",
    "column_products",
    "column_sums",
    "finish",
    "gradient",
    "inspect_pairs",
    "scale_rows",
    "shrink",
    "update_pairs",
]
