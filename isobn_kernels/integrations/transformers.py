"""A sequence classifier with IsoBN over any encoder of the `transformers` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isobn_kernels.module import IsoBN

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForSequenceClassification,
        BertConfig,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers import initialization as init
    from transformers.modeling_outputs import SequenceClassifierOutput
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'isobn_kernels.integrations.transformers needs transformers: pip install "isobn_kernels[finetune]"',
        name=error.name,
    ) from error

NORMALIZERS = ("isobn", "none")


class IsoBNClassifierConfig(PreTrainedConfig):
    """What `IsoBNForSequenceClassification` is made of; saved with it as ``config.json``.

    Args:
        encoder: configuration of the encoder, or its ``to_dict()``; BERT-base where None.
        normalizer: "isobn", or "none" for the same classifier without it.
        isobn_options: keyword arguments of `isobn_kernels.IsoBN`, such as ``momentum``, ``eps`` and ``beta``.
        dropout: probability of dropping a feature between IsoBN and the linear layer.
        kwargs: of every configuration, such as ``num_labels`` or ``id2label``.

    Raises:
        ValueError: ``normalizer`` is not one of the two.

    Example:
        >>> from isobn_kernels.integrations.transformers import IsoBNClassifierConfig
        >>> config = IsoBNClassifierConfig(isobn_options={"momentum": 0.1}, num_labels=3)
        >>> config.encoder.model_type, config.isobn_options, config.num_labels
        ('bert', {'momentum': 0.1}, 3)
    """

    model_type = "isobn-classifier"
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012 -- as the base class declares it

    def __init__(
        self,
        encoder: Any = None,
        normalizer: str = "isobn",
        isobn_options: dict[str, Any] | None = None,
        dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer must be one of {NORMALIZERS}, got {normalizer!r}")
        if encoder is None:
            encoder = BertConfig()
        elif isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**encoder)
        self.encoder = encoder
        self.normalizer = normalizer
        self.isobn_options = dict(isobn_options or {})
        self.dropout = dropout
        super().__init__(**kwargs)


class IsoBNForSequenceClassification(PreTrainedModel):
    """Encoder -> pooler output -> IsoBN -> dropout -> linear: the network of the paper.

    An encoder without a pooler (DistilBERT, ELECTRA, DeBERTa) gets a new one of BERT's form, tanh of a linear layer
    over the first token, which is trained with the rest.

    The IsoBN statistics are saved and loaded with the model, and stay float32 when it is loaded in half precision.

    Args:
        config: an `IsoBNClassifierConfig`.
        encoder: the encoder itself, where there is one already; otherwise built from ``config.encoder`` with random
            weights. `from_encoder` is the usual way to start from a pretrained one.

    Attributes:
        isobn: the `isobn_kernels.IsoBN` layer; `torch.nn.Identity` with ``normalizer="none"``.

    Raises:
        ValueError: the model is not an encoder (encoder-decoder, or a decoder whose first token sees only itself).

    Example:
        >>> import torch
        >>> from transformers import BertConfig
        >>> from isobn_kernels.integrations.transformers import IsoBNClassifierConfig, IsoBNForSequenceClassification
        >>> tiny = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = IsoBNForSequenceClassification(IsoBNClassifierConfig(tiny, num_labels=3))
        >>> model(torch.ones(4, 5, dtype=torch.long)).logits.shape
        torch.Size([4, 3])

    Source: Zhou, Lin and Ren, AAAI 2021, https://arxiv.org/abs/2005.02178.
    """

    config_class = IsoBNClassifierConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # Not "isobn", which would also turn the integer counter into float32 on loading.
    _keep_in_fp32_modules_strict = ["isobn.running_cov", "isobn.running_std", "isobn.scale"]  # noqa: RUF012
    # The loss is a mean over the batch: the Trainer has to divide it itself when it accumulates gradients.
    accepts_loss_kwargs = False
    # Whether from_encoder had to initialise the pooler, because the checkpoint holds none.
    pooler_is_new = False

    def __init__(self, config: IsoBNClassifierConfig, encoder: Any = None) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder) if encoder is None else encoder
        # One object: a change of it, such as another attention implementation, reaches the encoder.
        config.encoder = self.encoder.config
        hidden_size = config.encoder.hidden_size
        self.pooler = None
        if getattr(self.encoder, "pooler", None) is None:
            self.pooler = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Tanh())
        if config.encoder.is_encoder_decoder or (
            self.pooler is not None and config.encoder.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        ):
            raise ValueError(
                f"encoder must be an encoder such as BERT, got a model of type {config.encoder.model_type!r}, "
                "whose first token does not see the whole text"
            )
        self.isobn = IsoBN(hidden_size, **config.isobn_options) if config.normalizer == "isobn" else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(hidden_size, config.num_labels)
        self.post_init()

    @classmethod
    def from_encoder(cls, name_or_path: str | Path, **config: Any) -> IsoBNForSequenceClassification:
        """A classifier to fine-tune: a pretrained encoder, in float32, under a new head.

        Args:
            name_or_path: hub name or folder, as for `transformers.AutoModel`.
            config: the arguments of `IsoBNClassifierConfig` other than ``encoder``.

        Raises:
            OSError: there is no such model.
            ValueError: it is not an encoder, or an argument is wrong.
        """
        # Not the dtype of the checkpoint: AdamW on half-precision weights loses small updates.
        encoder, loading = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
        model = cls(IsoBNClassifierConfig(encoder.config.to_dict(), **config), encoder)
        model.pooler_is_new = model.pooler is not None or any(
            key.startswith("pooler.") for key in loading["missing_keys"]
        )
        return model

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The sentence embeddings (N, D) that IsoBN takes: the pooler output.

        Args:
            input_ids: (N, L) token numbers.
            attention_mask: (N, L), 0 where padded.
            token_type_ids: (N, L), for encoders that tell the two sentences of a pair apart.
        """
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        output = self.encoder(input_ids, **{name: value for name, value in given.items() if value is not None})
        return output.pooler_output if self.pooler is None else self.pooler(output.last_hidden_state[:, 0])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (N, num_labels) and, given ``labels`` (N,), the mean cross entropy. The rest is as for `embed`."""
        embedding = self.embed(input_ids, attention_mask, token_type_ids)
        logits = self.classifier(self.dropout(self.isobn(embedding)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _init_weights(self, module: nn.Module) -> None:
        # Buffer by buffer, with functions that leave alone what a checkpoint has filled.
        if isinstance(module, IsoBN):
            init.zeros_(module.running_cov)
            init.zeros_(module.running_std)
            init.ones_(module.scale)
            init.zeros_(module.num_batches_tracked)
        else:
            super()._init_weights(module)


AutoConfig.register(IsoBNClassifierConfig.model_type, IsoBNClassifierConfig)
AutoModelForSequenceClassification.register(IsoBNClassifierConfig, IsoBNForSequenceClassification)
