"""Metrics of isotropy against NumPy, and the figure."""

import numpy as np
import pytest
import torch

from isobn_kernels.isotropy import deviation_spread, explained_variance, mean_absolute_correlation, measure


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(7, 7, generator=generator)
    return 0.99 + 0.01 * torch.randn(40, 7, generator=generator) @ mixing


def test_against_numpy(x: torch.Tensor) -> None:
    a = x.double().numpy()
    squares = np.linalg.svd(a - a.mean(axis=0), compute_uv=False) ** 2
    np.testing.assert_allclose(explained_variance(x).numpy(), np.cumsum(squares) / squares.sum(), rtol=1e-9)
    deviations = a.std(axis=0)
    assert deviation_spread(x) == pytest.approx(deviations.std() / deviations.mean(), rel=1e-9)
    off_diagonal = ~np.eye(7, dtype=bool)
    expected = np.abs(np.corrcoef(a, rowvar=False))[off_diagonal].mean()
    assert mean_absolute_correlation(x) == pytest.approx(expected, rel=1e-9)


def test_more_features_than_rows() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    explained = explained_variance(x)
    assert explained.shape == (12,)
    assert (explained.diff() >= 0).all()
    # 5 centred rows span 4 directions.
    assert explained[3] == pytest.approx(1)


def test_scaling_a_feature_leaves_correlations(x: torch.Tensor) -> None:
    scaled = x * torch.arange(1, 8)
    assert mean_absolute_correlation(scaled) == pytest.approx(mean_absolute_correlation(x), rel=1e-5)
    assert deviation_spread(scaled) != pytest.approx(deviation_spread(x), rel=1e-2)


def test_constant_feature_correlates_with_nothing() -> None:
    x = torch.tensor([[1.0, 1.0, 5.0], [2.0, 2.0, 5.0], [4.0, 4.0, 5.0]])
    # Of the six ordered pairs only the two of the first two features.
    assert mean_absolute_correlation(x) == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(4), r"shape \(N, D\)"),
        (torch.ones(1, 4), "N at least 2"),
        (torch.full((4, 4), float("nan")), "finite"),
        (torch.ones(4, 4), "all its rows are equal"),
        (torch.eye(2), "at least 3 features"),
    ],
)
def test_unfit_matrices(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(x)


@pytest.mark.parametrize("stages", [1, 4])
def test_figure(stages: int, x: torch.Tensor, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "isobn_kernels[finetune]"')
    from isobn_kernels.isotropy.plots import plot_isotropy

    path = tmp_path / "isotropy.png"
    plot_isotropy({f"stage {number}": x * (1 + number) for number in range(stages)}, path, "Title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
