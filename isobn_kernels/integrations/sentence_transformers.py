"""IsoBN as a module of the `sentence_transformers` library, for training sentence embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from isobn_kernels.functional import isobn
from isobn_kernels.module import IsoBN

try:
    from sentence_transformers.sentence_transformer.modules import Module
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "isobn_kernels.integrations.sentence_transformers needs sentence-transformers 5.4 or later: "
        'pip install "isobn_kernels[sentence-transformers]"',
        name=error.name,
    ) from error


class IsoBNModule(Module):
    """IsoBN for the sentence embedding: a module of `SentenceTransformer`, placed after Pooling.

    Place it before Normalize. Embeddings of unit length leave less to correct, and scaling after Normalize would undo
    the unit length. If this module is the third, ``model[2].isobn`` is the layer with the statistics. In half precision
    the statistics stay float32.

    ``model.save_pretrained(path)`` saves the statistics and the options. sentence-transformers 6 loads modules of other
    packages, this one among them, only with ``SentenceTransformer(path, trust_remote_code=True)``, from a local folder
    too. Checkpoints of the trainer need no such argument.

    Each forward in training counts as one update. A loss that compares pairs makes two forwards a step, one of the
    anchors and one of the positives: ``num_batches_tracked`` grows by two. With the same ``momentum`` the averages
    then cover half as many steps. Anchors and positives share the statistics.

    Losses with a cache (``CachedMultipleNegativesRankingLoss``) count each of their mini-batches, and compute the
    gradient with the newest scale for all mini-batches of a step. Losses that embed with earlier layers of the encoder
    too (``AdaptiveLayerLoss``, ``Matryoshka2dLoss``) count the last layer only: embeddings of earlier layers take its
    scale, as they do where the encoder is cut off later. Over several processes, see
    `isobn_kernels.IsoBN.convert_sync_isobn`.

    Args:
        num_features: dimension of the sentence embedding, ``pooling.get_embedding_dimension()``.
        eps, momentum, beta, bias_correction, stop_gradient, backend: as for `isobn_kernels.IsoBN`.

    Raises:
        TypeError, ValueError: as for `isobn_kernels.IsoBN`.

    Example:
        >>> import torch
        >>> from isobn_kernels.integrations.sentence_transformers import IsoBNModule
        >>> module = IsoBNModule(8, momentum=0.1)
        >>> features = module({"sentence_embedding": torch.randn(4, 8)})  # what Pooling hands on
        >>> features["sentence_embedding"].shape
        torch.Size([4, 8])
        >>> module.isobn
        IsoBN(8, eps=0.001, momentum=0.1, beta=0.5)

        In a model::

            model = SentenceTransformer(modules=[transformer, pooling, IsoBNModule(384), Normalize()])

    Source: Zhou, Lin and Ren, AAAI 2021, https://arxiv.org/abs/2005.02178.
    """

    config_keys = ["num_features", "eps", "momentum", "beta", "bias_correction", "stop_gradient", "backend"]  # noqa: RUF012

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-3,
        momentum: float = 0.05,
        beta: float = 0.5,
        *,
        bias_correction: bool = False,
        stop_gradient: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.isobn = IsoBN(
            num_features,
            eps,
            momentum,
            beta,
            bias_correction=bias_correction,
            stop_gradient=stop_gradient,
            backend=backend,
        )

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        embedding: Tensor = features["sentence_embedding"]
        layer = self.isobn
        if _is_from_earlier_layer(features):
            layer._ensure_float32()
            embedding = isobn(embedding, layer.running_cov, layer.running_std, backend=layer.backend, scale=layer.scale)
        else:
            embedding = layer(embedding)
        return {**features, "sentence_embedding": embedding}

    def get_embedding_dimension(self) -> int:
        return self.isobn.num_features

    def get_config_dict(self) -> dict[str, Any]:
        return {key: getattr(self.isobn, key) for key in self.config_keys}

    def _fold_isobn(self) -> None:
        raise ValueError("IsoBNModule cannot be folded: it would be saved without its layer. It is one multiplication")

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> IsoBNModule:
        where = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        module = cls(**cls.load_config(model_name_or_path, **where))
        cls.load_torch_weights(model_name_or_path, model=module, **where)
        return module


def _is_from_earlier_layer(features: dict[str, Any]) -> bool:
    """Whether the embedding is that of an earlier layer, which `AdaptiveLayerLoss` puts in place of the last one's."""
    earlier = (features.get("all_layer_embeddings") or ())[:-1]
    return any(features.get("token_embeddings") is layer for layer in earlier)
