"""How evenly an embedding matrix fills its space; `isobn_kernels.isotropy.plots` draws it."""

from isobn_kernels.isotropy.metrics import (
    deviation_spread,
    explained_variance,
    mean_absolute_correlation,
    measure,
)

__all__ = ["deviation_spread", "explained_variance", "mean_absolute_correlation", "measure"]
