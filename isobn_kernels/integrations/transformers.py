"""IsoBN inside the sequence classifiers of the `transformers` library.

One insertion serves all model families. A sequence classifier of the library ends in dropout and a linear output layer.
`apply_isobn` moves this dropout into the output layer and puts IsoBN before it:

    pooled embedding -> IsoBN -> dropout -> output layer

The table at the end of this file lists both layers of each family. Pretrained weights keep their names. The statistics
are the buffers of ``<output layer>.isobn``. If the user assigns a new output layer or dropout, `_keep_isobn` transfers
IsoBN to it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from isobn_kernels.folding import check_foldable, fold_scale
from isobn_kernels.module import IsoBN

try:
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'isobn_kernels.integrations.transformers needs transformers: pip install "isobn_kernels[finetune]"',
        name=error.name,
    ) from error


@dataclass(frozen=True)
class _Family:
    """Paths to the last layers of a model class, as for `torch.nn.Module.get_submodule`."""

    output: str
    dropout: str
    dense: str | None = None  # a linear layer further up that goes through the same dropout


# The class with IsoBN that belongs to one without.
_WITH_ISOBN: dict[type, Any] = {}


def apply_isobn(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Put IsoBN between the pooled embedding of a sequence classifier and its dropout + output layer, in place.

    The class of the model changes to a subclass, such as ``IsoBNBertForSequenceClassification``. This subclass has its
    own model type ("isobn-bert"), which prevents loading a saved model without IsoBN by mistake. To load a saved model,
    import this module and call `AutoModelForSequenceClassification.from_pretrained`. The original class raises an
    error. Weights keep their names. Checkpoints of the Trainer contain the statistics. In half precision the statistics
    stay float32.

    A new `torch.nn.Linear` for the output layer (``model.classifier = torch.nn.Linear(768, 5)``) takes over IsoBN and
    the dropout. A new dropout (``model.dropout = torch.nn.Dropout(0.3)``) acts after IsoBN. Any other layer is refused,
    unless it contains the IsoBN layer itself, as in ``torch.nn.Sequential(model.classifier.isobn, ...)``. To continue
    without IsoBN, call `isobn_kernels.fold_isobn` first.

    With PEFT, apply IsoBN before wrapping the model. The statistics are saved with the classifier. PEFT saves the
    classifier in full for the task type SEQ_CLS, and otherwise with ``modules_to_save=["classifier"]``. Set
    ``target_modules`` and leave the output layer out: its adapter would bypass IsoBN. To load an adapter, prepare its
    base in the same way: ``PeftModel.from_pretrained(apply_isobn(base), adapter)``. Fold a model before quantizing it:
    tools that replace linear layers would remove IsoBN with the output layer. For several processes, see
    `isobn_kernels.IsoBN.convert_sync_isobn`; for serving, `isobn_kernels.fold_isobn`.

    Args:
        model: a sequence classifier of BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ELECTRA, DeBERTa-v2, ALBERT, MPNet or
            ModernBERT, or of a class given to `register_family`.
        options: keyword arguments of `isobn_kernels.IsoBN` but for ``process_group`` and ``device``; saved in the
            configuration as ``isobn``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: an option is not one of IsoBN's.
        ValueError: the class of the model is not known, the model already has IsoBN, or an option is out of range. The
            model is unchanged.

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
    if _has_isobn(model):
        raise ValueError(f"model, a {type(model).__name__}, has IsoBN already")
    _insert(model, family, options)
    # A later init_weights() leaves its statistics alone, as it does the weights that were there before.
    isobn: Any = model.get_submodule(family.output).isobn
    isobn._is_hf_initialized = True
    model.__class__ = _WITH_ISOBN[type(model)]
    _give_config(model, model.config_class, options)
    # PEFT would record the original checkpoint as the base of an adapter.
    model.name_or_path = model.config._name_or_path = ""
    return model


def register_family(
    model_class: type[PreTrainedModel], *, output: str, dropout: str, dense: str | None = None
) -> type[PreTrainedModel]:
    """Register another model class for `apply_isobn`. Its head must end in dropout and a linear output layer.

    Call it before the model is created, and before it is loaded in another process. A second call with the same
    arguments, as in a notebook, has no effect.

    Args:
        model_class: a subclass of `transformers.PreTrainedModel` with its ``config_class``.
        output: where it keeps the output layer, such as "classifier" or "head.out_proj"; a `torch.nn.Linear`.
        dropout: where it keeps the dropout that this layer's input comes from; a `torch.nn.Dropout`, which nothing
            else goes through.
        dense: where it keeps a second linear layer whose input comes from the same dropout, as in RoBERTa's head.

    Returns:
        The class of the model with IsoBN, for pickle to be found in this module.

    Raises:
        ValueError: the class is registered already with other arguments, or another class has the model type of its
            configuration.

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
    where = _Family(output, dropout, dense)
    if model_class in _WITH_ISOBN:
        if _WITH_ISOBN[model_class]._where != where:
            raise ValueError(
                f"{model_class.__name__} is registered already, as {_WITH_ISOBN[model_class]._where}, got {where}"
            )
        return _WITH_ISOBN[model_class]
    config_class = model_class.config_class
    model_type = f"isobn-{config_class.model_type}"
    for other, known in _WITH_ISOBN.items():
        # The same name is the same class, defined anew in a notebook.
        is_same = (other.__module__, other.__qualname__) == (model_class.__module__, model_class.__qualname__)
        if known.config_class.model_type == model_type and not is_same:
            raise ValueError(
                f"the model type of {config_class.__name__}, {config_class.model_type!r}, is that of {other.__name__}, "
                f"which is registered already: give {model_class.__name__} a config_class with a model_type of its own"
            )
    with_config = type(
        f"IsoBN{config_class.__name__}", (config_class,), {"__module__": __name__, "model_type": model_type}
    )

    @functools.wraps(model_class.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _check_head(self)
        return model_class.forward(self, *args, **kwargs)

    with_isobn = type(
        f"IsoBN{model_class.__name__}",
        (_WithIsoBN, model_class),
        {
            "__module__": __name__,
            "__doc__": _WithIsoBN.__doc__,
            "config_class": with_config,
            "forward": forward,
            "_plain_class": model_class,
            "_where": where,
        },
    )
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


class _MovedDropout(nn.Identity):
    """What stands where the dropout was before it moved behind IsoBN."""

    moved: Any

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.__dict__["moved"] = dropout  # not as a module of this one: it acts elsewhere

    # model.dropout.p = 0.3 still sets the rate.
    @property
    def p(self) -> float:
        return self.moved.p

    @p.setter
    def p(self, value: float) -> None:
        self.moved.p = value


class _IsoBNLinear(_DropoutLinear):
    """The output layer: IsoBN, dropout, linear."""

    isobn: IsoBN

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.isobn(x))


class _WithIsoBN(PreTrainedModel):
    """A sequence classifier with IsoBN before its dropout and output layer; see `apply_isobn`."""

    _plain_class: Any
    _where: _Family
    # Not "isobn", which would also turn the integer counter into float32 on loading.
    _keep_in_fp32_modules_strict = ["isobn.running_cov", "isobn.running_std", "isobn.scale"]  # noqa: RUF012

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        options = getattr(config, "isobn", {})
        _insert(self, _family(self), options)
        if not isinstance(config, self.config_class):
            _give_config(self, self.config_class, options)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False for models of the library, which then initialises missing weights in the manner of their family."""
        return cls._plain_class.is_custom_code()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        _check_head(self)
        super().save_pretrained(*args, **kwargs)

    def _fold_isobn(self) -> Callable[[], None]:
        """The step that gives the scale to the weights and makes this the library's own model, checked now."""
        if "_where" not in vars(type(self)):
            raise ValueError(f"model is a {type(self).__name__}: fold the model itself, before sharding or subclassing")
        family = self._where
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
            _become(self.get_submodule(family.dropout), nn.Identity)
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
    # Everything is built first, then the model is changed. Only classes are swapped: parameters, their names and
    # attributes of the layers stay. Modules, unlike hooks, survive deepcopy and pickle.
    model.set_submodule(family.dropout, _MovedDropout(dropout))
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
    known = _WITH_ISOBN.get(type(model), type(model))
    if not hasattr(known, "_where"):
        supported = ", ".join(kind.__name__ for kind in _WITH_ISOBN)
        raise ValueError(
            f"model is a {type(model).__name__}, which apply_isobn does not know; expected one of {supported}. "
            "register_family teaches it another class; apply it before wrapping a model (PEFT, DDP, compile)"
        )
    return known._where


def _has_isobn(module: nn.Module) -> bool:
    # By name: after importlib.reload, layers made before are of the class of before.
    return any(kind.__name__ == "IsoBN" for layer in module.modules() for kind in type(layer).__mro__)


def _check_head(model: PreTrainedModel) -> None:
    """Raise where a head has lost IsoBN in a way that `_keep_isobn` does not see, such as ``del model.classifier``."""
    output = _family(model).output
    if not _has_isobn(model.get_submodule(output)):
        raise RuntimeError(
            f"{output} of {type(model).__name__} has no IsoBN: it went with the layer that was there before. Assign a "
            "torch.nn.Linear in place of the old layer, and it keeps IsoBN. To go on without IsoBN, call "
            "fold_isobn(model) before the change"
        )


def _check_class(model: PreTrainedModel) -> None:
    """Raise where a class without IsoBN is made from the configuration of one with IsoBN."""
    plain = next((kind for kind in type(model).__mro__ if kind in _WITH_ISOBN), None)
    if plain is not None and not hasattr(model, "_where") and hasattr(model.config, "isobn"):
        raise ValueError(
            f"the configuration is that of a model with IsoBN, which {type(model).__name__} would lose. Expected "
            f"AutoModelForSequenceClassification, or {_WITH_ISOBN[plain].__name__} of {__name__}. To go on without "
            "IsoBN, load the model so, call fold_isobn(model) and save it. If it has lost IsoBN already, delete "
            "'isobn' from its config.json"
        )


def _keep_isobn(parent: nn.Module, name: str, new: nn.Module | None) -> nn.Module | None:
    """Hand IsoBN and dropout on where a head is replaced, or a layer of it. PyTorch calls it for every new submodule.

    Returns:
        What ``parent`` gets in place of ``new``, or None.

    Raises:
        ValueError: ``new`` has no place for them. Nothing is changed.
    """
    old = parent._modules.get(name)
    if old is None:
        if isinstance(parent, PreTrainedModel):
            _check_class(parent)
        return None
    if new is old or any(isinstance(module, PreTrainedModel) for module in old.modules()):
        return None  # a whole model goes, its head with it
    layers = {path: layer for path, layer in old.named_modules() if isinstance(layer, (_DropoutLinear, _MovedDropout))}
    if not layers:
        return None
    found = {} if new is None else dict(new.named_modules())
    unfit = [path for path, layer in layers.items() if not _fits(found.get(path), layer)]
    # Of PEFT; it would stand beside IsoBN and dropout, not behind them.
    is_adapter = isinstance(getattr(new, "base_layer", None), _IsoBNLinear)
    has_its_own = unfit and any(
        isinstance(module, IsoBN if _has_isobn(old) else _DropoutLinear) for module in found.values()
    )
    if (old in found.values() or has_its_own) and not is_adapter:
        return None  # the old one wrapped, a copy of what a wrapper held, or a head that the user has put together
    if unfit or new is None:
        layer, where = layers[unfit[0]], f"{name}.{unfit[0]}".rstrip(".")
        expected = f"torch.nn.Linear with in_features={layer.in_features}" if isinstance(layer, nn.Linear) else "module"
        raise ValueError(
            f"{where} of {type(parent).__name__} cannot become {found.get(unfit[0])}: IsoBN or its dropout would be "
            f"lost. Expected a {expected}, which takes them over, or a layer that holds them itself, such as "
            f"torch.nn.Sequential(model.{where}.isobn, ...). To go on without IsoBN, call fold_isobn(model) first. In "
            "PEFT and in quantization, leave this layer out"
        )
    if isinstance(old, _MovedDropout):
        _move_dropout(new, parent)
        old.__dict__["moved"] = new
        return old
    for path, layer in layers.items():
        given: Any = found[path]
        if isinstance(layer, _DropoutLinear) and type(given) is nn.Linear:
            _become(given, _IsoBNLinear if isinstance(layer, _IsoBNLinear) else _DropoutLinear)
            given.dropout = layer.dropout
            if isinstance(layer, _IsoBNLinear):
                given.isobn = layer.isobn
    for path, layer in layers.items():
        if isinstance(layer, _MovedDropout) and not isinstance(found[path], _MovedDropout):
            _move_dropout(found[path], new)
            new.set_submodule(path, _MovedDropout(found[path]))
    return None


def _fits(given: nn.Module | None, layer: nn.Module) -> bool:
    """Whether ``given`` can stand where ``layer`` of a head stood: it is such a layer, or can be made one."""
    if isinstance(layer, _MovedDropout):
        return given is not None
    is_plain = type(given) is nn.Linear and given.in_features == layer.in_features and not _is_hooked(given)
    return is_plain or isinstance(given, _IsoBNLinear if isinstance(layer, _IsoBNLinear) else _DropoutLinear)


def _move_dropout(dropout: nn.Module, parent: nn.Module) -> None:
    """Put ``dropout`` before every linear layer of ``parent`` that has its dropout before it."""
    linears = [module for module in parent.modules() if isinstance(module, _DropoutLinear)]
    if not linears:
        raise ValueError(f"the dropout acts in the output layer now, not in {type(parent).__name__}: set it there")
    for linear in linears:
        linear.dropout = dropout


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

# One, also where importlib.reload has run this module before.
if "_HOOK" in globals():
    globals()["_HOOK"].remove()
_HOOK = register_module_module_registration_hook(_keep_isobn)  # type: ignore[arg-type]
