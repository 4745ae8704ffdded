"""IsoBN inside the sequence classifiers of the `transformers` library.

One insertion serves all families. A classifier of the library ends in dropout and a linear output layer; `apply_isobn`
hangs IsoBN and that dropout before the output layer, so that the pooled, activated embedding goes through IsoBN first:

    pooled embedding -> IsoBN -> dropout -> output layer

`_FAMILIES` says where each family keeps the two. Pretrained weights keep their names; the statistics are those of
``<output layer>.isobn``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from isobn_kernels.folding import check_foldable, fold_scale
from isobn_kernels.module import IsoBN

try:
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
    from transformers import initialization as init
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'isobn_kernels.integrations.transformers needs transformers: pip install "isobn_kernels[finetune]"',
        name=error.name,
    ) from error


@dataclass(frozen=True)
class _Family:
    """Where a class of models keeps the end of its head; paths as for `torch.nn.Module.get_submodule`."""

    output: str
    dropout: str
    dense: str | None = None  # a linear layer further up that goes through the same dropout


# By class, those with IsoBN among them; and the class with IsoBN that belongs to one without.
_FAMILIES: dict[type, _Family] = {}
_WITH_ISOBN: dict[type, Any] = {}


def apply_isobn(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Put IsoBN between the pooled embedding of a sequence classifier and its dropout + output layer, in place.

    The model becomes one of ``IsoBNBertForSequenceClassification`` or its like: a subclass of what it was, with a
    model type of its own ("isobn-bert"), so that what it saves is never loaded without IsoBN by mistake. To load it,
    import this module and call `AutoModelForSequenceClassification.from_pretrained` as usual. Weights keep their
    names. Checkpoints of the Trainer hold the statistics; in half precision they stay float32.

    With PEFT, apply IsoBN first and wrap then. The statistics are saved with the classifier, which PEFT saves in full
    for the task type SEQ_CLS, and otherwise with ``modules_to_save=["classifier"]``; name ``target_modules``, and leave
    the output layer out of them. To load an adapter, make its base the same way:
    ``PeftModel.from_pretrained(apply_isobn(base), adapter)``. Quantize a folded model: tools that replace linear layers
    would take IsoBN out with the output layer. Over several processes, see `isobn_kernels.IsoBN.convert_sync_isobn`;
    for serving, `isobn_kernels.fold_isobn`.

    Args:
        model: a sequence classifier of BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ELECTRA, DeBERTa-v2, ALBERT, MPNet or
            ModernBERT, or of a class given to `register_family`.
        options: keyword arguments of `isobn_kernels.IsoBN` but for ``process_group`` and ``device``; saved in the
            configuration as ``isobn``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: an option is not one of IsoBN's.
        ValueError: the model is of another kind, or has IsoBN already, or an option is out of range. The model is
            untouched.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from isobn_kernels.integrations.transformers import apply_isobn
        >>> tiny = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = apply_isobn(BertForSequenceClassification(tiny), momentum=0.1)
        >>> model.classifier.isobn
        IsoBN(8, eps=0.001, momentum=0.1, beta=0.5)
        >>> model(torch.ones(4, 5, dtype=torch.long)).logits.shape
        torch.Size([4, 2])

    Source: Zhou, Lin and Ren, AAAI 2021, https://arxiv.org/abs/2005.02178.
    """
    for name in ("process_group", "device", "num_features"):
        if name in options:
            raise TypeError(
                f"{name} is no option here: num_features is the model's; move it with model.to(device), and use "
                "IsoBN.convert_sync_isobn(model) for statistics across processes"
            )
    family = _family(model)
    if isinstance(model, _WithIsoBN):
        raise ValueError(f"model, a {type(model).__name__}, has IsoBN already")
    _insert(model, family, options)
    model.__class__ = _WITH_ISOBN[type(model)]
    _give_config(model, model.config_class, options)
    # It is no longer what it was loaded from, which PEFT would note as the base of an adapter.
    model.name_or_path = model.config._name_or_path = ""
    return model


def register_family(
    model_class: type[PreTrainedModel], *, output: str, dropout: str, dense: str | None = None
) -> type[PreTrainedModel]:
    """Teach `apply_isobn` another class of models, whose head is dropout and then a linear output layer.

    Call it where the model is made and where it is loaded, before either.

    Args:
        model_class: a subclass of `transformers.PreTrainedModel` with its ``config_class``.
        output: where it keeps the output layer, such as "classifier" or "head.out_proj"; a `torch.nn.Linear`.
        dropout: where it keeps the dropout that this layer's input comes from; a `torch.nn.Dropout`, which nothing
            else goes through.
        dense: where it keeps a second linear layer whose input comes from the same dropout, as in RoBERTa's head.

    Returns:
        The class of the model with IsoBN, for pickle to be found in this module.

    Raises:
        ValueError: the class is registered already.

    Example:
        >>> from transformers import CamembertForSequenceClassification
        >>> from isobn_kernels.integrations.transformers import register_family
        >>> register_family(
        ...     CamembertForSequenceClassification,
        ...     output="classifier.out_proj",
        ...     dropout="classifier.dropout",
        ...     dense="classifier.dense",
        ... ).__name__
        'IsoBNCamembertForSequenceClassification'
    """
    if model_class in _FAMILIES:
        raise ValueError(f"{model_class.__name__} is registered already")
    config_class = model_class.config_class
    model_type = f"isobn-{config_class.model_type}"
    with_config = type(
        f"IsoBN{config_class.__name__}", (config_class,), {"__module__": __name__, "model_type": model_type}
    )
    with_isobn = type(
        f"IsoBN{model_class.__name__}",
        (_WithIsoBN, model_class),
        {
            "__module__": __name__,
            "__doc__": _WithIsoBN.__doc__,
            "config_class": with_config,
            "_plain_class": model_class,
        },
    )
    _FAMILIES[model_class] = _FAMILIES[with_isobn] = _Family(output, dropout, dense)
    _WITH_ISOBN[model_class] = with_isobn
    globals().update({with_config.__name__: with_config, with_isobn.__name__: with_isobn})
    AutoConfig.register(model_type, with_config)
    AutoModelForSequenceClassification.register(with_config, with_isobn)
    # The encoder alone and the tokenizer are those of the plain model.
    for mapping in (AutoModel._model_mapping, TOKENIZER_MAPPING):
        if config_class in mapping:
            mapping.register(with_config, mapping[config_class])
    return with_isobn


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The output layer of a classifier with or without IsoBN; its input in evaluation is the pooled embedding (N, D).

    Raises:
        ValueError: the model is of a class that `apply_isobn` does not know.
    """
    layer = model.get_submodule(_family(model).output)
    assert isinstance(layer, nn.Linear)
    return layer


class _DropoutLinear(nn.Linear):
    """A linear layer with dropout before it."""

    dropout: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


class _IsoBNLinear(_DropoutLinear):
    """The output layer: IsoBN, dropout, linear."""

    isobn: IsoBN

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.isobn(x))


class _WithIsoBN(PreTrainedModel):
    """A sequence classifier with IsoBN before its dropout and output layer; see `apply_isobn`."""

    _plain_class: Any
    # Not "isobn", which would also turn the integer counter into float32 on loading.
    _keep_in_fp32_modules_strict = ["isobn.running_cov", "isobn.running_std", "isobn.scale"]  # noqa: RUF012

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        options = getattr(config, "isobn", {})
        _insert(self, _family(self), options)
        if not isinstance(config, self.config_class):
            _give_config(self, self.config_class, options)

    def _init_weights(self, module: nn.Module) -> None:
        # Buffer by buffer, with functions that leave alone what a checkpoint has filled.
        if isinstance(module, IsoBN):
            init.zeros_(module.running_cov)
            init.zeros_(module.running_std)
            init.ones_(module.scale)
            init.zeros_(module.num_batches_tracked)
        else:
            super()._init_weights(module)

    def _fold_isobn(self) -> Callable[[], None]:
        """The step that gives the scale to the weights and makes this the library's own model, checked now."""
        if type(self) not in _FAMILIES:
            raise ValueError(f"model is a {type(self).__name__}: fold the model itself, before sharding or subclassing")
        family = _FAMILIES[type(self)]
        output = self.get_submodule(family.output)
        if [module for module in self.modules() if isinstance(module, IsoBN)] != [getattr(output, "isobn", None)]:
            raise ValueError(f"{family.output} of the model is wrapped: unwrap it first (PEFT: merge_and_unload)")
        if _is_hooked(output):
            raise ValueError(
                f"{family.output} has hooks of accelerate: remove_hook_from_module(model, recurse=True) first"
            )
        check_foldable(self, output.isobn, output, family.output)

        def fold() -> None:
            fold_scale(output.isobn, output)
            self.set_submodule(family.dropout, output.dropout)
            for path in filter(None, (family.output, family.dense)):
                linear = self.get_submodule(path)
                _become(linear, nn.Linear)
                del linear.dropout
            del output.isobn
            _give_config(self, self._plain_class.config_class, None)
            self.__class__ = self._plain_class

        return fold


def _give_config(model: PreTrainedModel, config_class: type, options: dict[str, Any] | None) -> None:
    """Give the model and its parts a configuration of that class; the one it has may be another model's too."""
    old, new = model.config, copy.deepcopy(model.config)
    new.__class__ = config_class
    vars(new).pop("isobn", None)
    if options is not None:
        new.isobn = options
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = new


def _insert(model: PreTrainedModel, family: _Family, options: dict[str, Any]) -> None:
    output, dropout = model.get_submodule(family.output), model.get_submodule(family.dropout)
    linears = [output] if family.dense is None else [output, model.get_submodule(family.dense)]
    for linear in linears:
        if type(linear) is not nn.Linear or _is_hooked(linear):
            raise ValueError(
                f"the head of {type(model).__name__} must be of plain torch.nn.Linear layers, got {linear}: "
                "apply IsoBN before anything else is done to the model (quantization, device_map, offloading)"
            )
    isobn = IsoBN(output.in_features, device=output.weight.device, **options)
    # Nothing is changed before all of it is there. The classes are swapped, so that parameters, their names and
    # whatever is attached to the layers stay as they are; modules, unlike hooks, survive deepcopy and pickle.
    model.set_submodule(family.dropout, nn.Identity())
    for linear in linears:
        _become(linear, _DropoutLinear)
        linear.dropout = dropout
    _become(output, _IsoBNLinear)
    output.isobn = isobn.train(output.training)


def _is_hooked(module: nn.Module) -> bool:
    """Whether the module has a forward of its own, which would go past IsoBN: accelerate dispatches models that way."""
    return vars(module).get("forward", module.forward) != type(module).forward.__get__(module)


def _become(module: nn.Module, module_class: type[nn.Module]) -> None:
    vars(module).pop("forward", None)  # that of the old class, which removed hooks leave behind
    module.__class__ = module_class


def _family(model: PreTrainedModel) -> _Family:
    # A subclass of a class with IsoBN keeps its head where that does; one of a library class may do anything.
    known = [kind for kind in type(model).__mro__ if kind in _FAMILIES]
    if not known or (known[0] is not type(model) and not issubclass(known[0], _WithIsoBN)):
        supported = ", ".join(kind.__name__ for kind in _WITH_ISOBN)
        raise ValueError(
            f"model is a {type(model).__name__}, which apply_isobn does not know; expected one of {supported}. "
            "register_family teaches it another class; apply it before wrapping a model (PEFT, DDP, compile)"
        )
    return _FAMILIES[known[0]]


_LAYER = {"output": "classifier", "dropout": "dropout"}
_HEAD = {"output": "classifier.out_proj", "dropout": "classifier.dropout", "dense": "classifier.dense"}
for _name, _where in {
    "AlbertForSequenceClassification": _LAYER,
    "BertForSequenceClassification": _LAYER,
    "DebertaV2ForSequenceClassification": _LAYER,
    "DistilBertForSequenceClassification": _LAYER,
    "ElectraForSequenceClassification": _HEAD,
    "MPNetForSequenceClassification": _HEAD,
    "ModernBertForSequenceClassification": {"output": "classifier", "dropout": "drop"},
    "RobertaForSequenceClassification": _HEAD,
    "XLMRobertaForSequenceClassification": _HEAD,
}.items():
    register_family(getattr(transformers, _name), **_where)
