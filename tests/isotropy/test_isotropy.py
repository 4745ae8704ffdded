"""Metrics of isotropy against NumPy, and the figure."""

import warnings

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


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def in_inference_mode(a: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return torch.tensor(a)


FORMS = {
    "NumPy": lambda a: a,
    "read-only": read_only,
    "columns first": np.asfortranarray,
    "every second row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "negative strides": lambda a: a[::-1].copy()[::-1],
    "big-endian": lambda a: a.astype(">f8"),
    "long double": lambda a: a.astype(np.longdouble),
    "lists": np.ndarray.tolist,
    "tuples": lambda a: tuple(map(tuple, a)),
    "list of arrays": lambda a: list(read_only(a)),
    "list of tensors": lambda a: list(torch.tensor(a)),
    "list of tensors with grad": lambda a: list(torch.tensor(a, requires_grad=True)),
    "generator": lambda a: (row for row in a),
    "requires grad": lambda a: torch.tensor(a, requires_grad=True) * 1,
    "parameter": lambda a: torch.nn.Parameter(torch.tensor(a)),
    "transposed": lambda a: torch.tensor(a.T.copy()).T,
    "sparse": lambda a: torch.tensor(a).to_sparse(),
    "inference": in_inference_mode,
}


@pytest.mark.parametrize("form", FORMS)
def test_whatever_holds_the_rows(form: str, x: torch.Tensor) -> None:
    """As ``encode`` gives them, as a model gives them, and as people write them: the same figures, no warning."""
    a = x.double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", message="Sparse")  # PyTorch's own, of a beta state
        assert measure(FORMS[form](a)) == pytest.approx(measure(torch.tensor(a)), rel=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "uint8", "bool"])
def test_dtypes_of_numpy_and_torch(dtype: str) -> None:
    """``encode(precision="int8")`` too."""
    a = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, (20, 5)).astype(dtype)
    expected = measure(torch.tensor(a.astype("float64")))
    assert measure(a) == measure(torch.tensor(a)) == measure(a.tolist()) == expected


def test_bfloat16(x: torch.Tensor) -> None:
    assert measure(x.bfloat16()) == measure(x.bfloat16().double())


def test_table_of_pandas(x: torch.Tensor) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pip install pandas")
    assert measure(pandas.DataFrame(x.double().numpy())) == pytest.approx(measure(x), rel=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensor_of_a_gpu(x: torch.Tensor, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "isobn_kernels[finetune]"')
    from isobn_kernels.isotropy.plots import plot_isotropy

    assert explained_variance(x.cuda()).is_cuda
    assert measure(x.cuda()) == pytest.approx(measure(x), rel=1e-9)
    plot_isotropy({"stage": x.cuda()}, tmp_path / "isotropy.png", "Title")


@pytest.mark.parametrize(
    "x",
    [
        "abc",
        None,
        5,
        {"a": [1.0, 2.0]},
        [["a", "b"], ["c", "d"]],
        np.array([["a", "b"], ["c", "d"]]),
        np.array([[1, None], [2, 3]]),
        np.ones((3, 2), dtype=complex),
        torch.ones(3, 2, dtype=torch.complex64),
        [[1j, 2], [3, 4]],
        [object(), object()],
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_holds_no_rows_of_numbers(x) -> None:
    for function in (measure, explained_variance, deviation_spread, mean_absolute_correlation):
        with pytest.raises(TypeError, match=r"x must (be a tensor, a NumPy array or a list|hold real numbers)"):
            function(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[1.0, 2.0], [3.0]], r"rows of one length, got shapes \[\(1,\), \(2,\)\]"),
        ([1.0, 2.0], r"shape \(N, D\)"),
        ([], r"shape \(N, D\)"),
        (np.ones((2, 3, 4)), r"shape \(N, D\)"),
        (np.array([[1.0, np.inf], [2.0, 3.0]]), "finite"),
        ([[float("nan"), 1.0], [2.0, 3.0]], "finite"),
    ],
)
def test_unfit_arrays_and_lists(x, message: str) -> None:
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


@pytest.mark.parametrize("form", ["NumPy", "lists", "requires grad", "list of tensors with grad"])
def test_figure_of_whatever_holds_the_rows(form: str, x: torch.Tensor, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "isobn_kernels[finetune]"')
    from isobn_kernels.isotropy.plots import plot_isotropy

    given = {"before": FORMS[form](x.double().numpy()), "after": x.bfloat16()}
    plot_isotropy(given, tmp_path / "found.png", "Title")
    plot_isotropy({"before": x.double(), "after": x.bfloat16()}, tmp_path / "expected.png", "Title")
    assert (tmp_path / "found.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


@pytest.mark.parametrize("x", [torch.ones(4, 4), torch.eye(4)[:, :1], "a"], ids=["constant", "one feature", "text"])
def test_figure_of_what_is_no_embedding_leaves_no_file(x, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "isobn_kernels[finetune]"')
    from isobn_kernels.isotropy.plots import plot_isotropy

    with pytest.raises((TypeError, ValueError), match=r"^x "):
        plot_isotropy({"before": torch.rand(5, 4), "after": x}, tmp_path / "none.png", "Title")
    assert not list(tmp_path.iterdir())
