"""Pictures of isotropy, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isobn_kernels.isotropy.metrics import (
    as_matrix,
    correlation,
    deviation_spread,
    explained_variance,
    mean_absolute_correlation,
)

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'isobn_kernels.isotropy.plots needs matplotlib: pip install "isobn_kernels[finetune]"', name=error.name
    ) from error


def plot_isotropy(embeddings: Mapping[str, Any], path: str | Path, title: str) -> None:
    """Draw deviations, correlations and explained variance of several embedding matrices, side by side, into a file.

    Args:
        embeddings: name of a stage, such as "before training", and its matrix (N, D): a tensor, NumPy array or list of
            rows; at least one.
        path: of the picture; its ending, such as ``.png``, chooses the format.
        title: above the whole.

    Raises:
        TypeError, ValueError: a matrix is not as the functions of `isobn_kernels.isotropy` expect.

    Example:
        >>> import tempfile, torch
        >>> from isobn_kernels.isotropy.plots import plot_isotropy
        >>> x = torch.randn(50, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_isotropy({"before": x, "after": x * torch.rand(8)}, f"{folder}/isotropy.png", "Two matrices")
    """
    embeddings = {name: as_matrix(x).cpu() for name, x in embeddings.items()}
    spreads = {name: deviation_spread(x) for name, x in embeddings.items()}
    correlations = {name: mean_absolute_correlation(x) for name, x in embeddings.items()}
    # In units of their mean: the stages differ in size, which is not a matter of isotropy.
    deviations = {name: _relative_deviations(x) for name, x in embeddings.items()}
    largest = max(float(values.max()) for values in deviations.values())
    columns = len(embeddings)
    # A Figure of its own, not pyplot: no window system, and nothing shared with the caller's figures.
    figure = Figure(figsize=(3.7 * max(columns, 2) + 1, 12), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=15)
    figure.supxlabel(
        "A scale for each feature changes deviations and explained variance; it cannot change correlations.",
        fontsize=10,
    )
    grid = figure.add_gridspec(3, 1, height_ratios=(1, 1.5, 1.1))
    histograms, heat_maps = (
        grid[row].subgridspec(1, columns).subplots(sharex=True, sharey=True, squeeze=False)[0] for row in (0, 1)
    )
    curves = figure.add_subplot(grid[2])

    for number, (name, x) in enumerate(embeddings.items()):
        colour = f"C{number}"
        axes = histograms[number]
        axes.hist(deviations[name].numpy(), bins=40, range=(0, 1.05 * largest), color=colour)
        axes.axvline(1, color="0.3", linestyle="--", linewidth=1)
        axes.set_title(f"{name}\nspread of deviations {spreads[name]:.2f}")
        axes.set_xlabel("deviation / mean deviation")

        axes = heat_maps[number]
        R = correlation(x)
        R = R[order := _block_order(R)][:, order]
        image = axes.imshow(R.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axes.set_title(f"{name}\nmean |correlation| {correlations[name]:.2f}")
        axes.set_xlabel("feature (sorted)")

        explained = explained_variance(x)
        k = torch.arange(1, len(explained) + 1)
        curves.plot(k.numpy(), explained.numpy(), color=colour, label=name, linewidth=2)

    histograms[0].set_ylabel("number of features")
    heat_maps[0].set_ylabel("feature (sorted)")
    figure.colorbar(image, ax=list(heat_maps), label="correlation", shrink=0.85)
    curves.plot(k.numpy(), (k / len(k)).numpy(), color="0.4", linestyle="--", label="isotropic")
    curves.set(xscale="log", xlim=(1, len(k)), ylim=(0, 1.02))
    curves.set_title("cumulative explained variance of the centred embeddings")
    curves.set_xlabel("k strongest directions (log scale)")
    curves.set_ylabel("share of the variance, EV_k")
    curves.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    curves.grid(alpha=0.3)
    curves.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def _relative_deviations(x: Tensor) -> Tensor:
    sigma = x.std(dim=0, correction=0)
    return sigma / sigma.mean()


def _block_order(R: Tensor) -> Tensor:
    """An order of the features in which correlated ones are neighbours: by angle in the two strongest directions.

    Source: Friendly, "Corrgrams: Exploratory displays for correlation matrices", The American Statistician 56, 2002.
    """
    second, first = torch.linalg.eigh(R).eigenvectors[:, -2:].unbind(dim=1)
    return torch.atan2(second, first).argsort()
