"""`fold_isobn`: a trained model without IsoBN that computes the same, for serving."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from isobn_kernels.module import IsoBN


def fold_isobn(model: nn.Module, into: Mapping[str, str] | None = None) -> nn.Module:
    """Multiply the scale of every IsoBN into the linear layer after it, in place. Evaluation gives the same outputs.

    The linear layer is found in a `torch.nn.Sequential` of IsoBN, dropout and the layer, and in models made by
    `isobn_kernels.integrations.transformers.apply_isobn`, which get their original class back. In other models, name
    the layer in ``into``. A `torch.nn.Identity` replaces IsoBN, which keeps the names of the other layers.

    The statistics are removed, and further training runs without IsoBN. To keep both, fold a copy.

    Args:
        model: with trained statistics, in evaluation or training mode.
        into: names of IsoBN layers and of the `torch.nn.Linear` that takes their output, as in
            ``{"isobn": "classifier"}``. Only dropout may lie between them, and no other module may use that layer.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: there is no IsoBN, the layer behind one is not known, or it does not fit. The model is untouched.

    Example:
        >>> import torch
        >>> from isobn_kernels import IsoBN, fold_isobn
        >>> head = torch.nn.Sequential(IsoBN(8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))
        >>> _ = head(torch.randn(32, 8))  # a training step
        >>> x, head = torch.randn(4, 8), head.eval()
        >>> before = head(x)
        >>> torch.allclose(fold_isobn(head)(x), before, atol=1e-6)
        True
        >>> head[0]
        Identity()
    """
    named = dict(model.named_modules(remove_duplicate=False))
    folds: dict[IsoBN, Callable[[], None]] = {}
    pairs = []
    for name, target in (into or {}).items():
        isobn, linear = named.get(name), named.get(target)
        if not isinstance(isobn, IsoBN):
            raise ValueError(f"into: {name!r} must be the name of an IsoBN layer, got {_kind(isobn)}")
        pairs.append((isobn, linear, target))
    for name, module in named.items():
        # A subclass with a forward of its own may do more than to call one after the other.
        if type(module).forward is nn.Sequential.forward:
            pairs += [(isobn, linear, f"{name}.{n}".lstrip(".")) for isobn, linear, n in _in_sequence(module)]
        elif hasattr(module, "_fold_isobn"):  # a model that knows where it keeps its own
            fold = module._fold_isobn()
            folds |= {layer: fold for layer in module.modules() if isinstance(layer, IsoBN)}
    for isobn, linear, target in pairs:
        folds[isobn] = _fold(model, isobn, linear, target)
    layers = {module: name for name, module in named.items() if isinstance(module, IsoBN)}
    if not layers:
        raise ValueError("model has no IsoBN to fold")
    unknown = [name for isobn, name in layers.items() if isobn not in folds]
    if unknown:
        raise ValueError(
            f"the linear layer behind IsoBN {', '.join(map(repr, unknown))} is not known; expected IsoBN, dropout and "
            'torch.nn.Linear in a torch.nn.Sequential, or its name in into, such as {"isobn": "classifier"}'
        )
    distinct = {(isobn, linear) for isobn, linear, _ in pairs}
    if len(distinct) > len({isobn for isobn, _ in distinct}) or len(distinct) > len({linear for _, linear in distinct}):
        raise ValueError(
            "an IsoBN has several linear layers behind it, or a linear layer several IsoBN: not one to one"
        )
    for fold in dict.fromkeys(folds.values()):
        fold()
    return model


def check_foldable(model: nn.Module, isobn: IsoBN, linear: nn.Linear, target: str) -> None:
    """Raise if scaling the weight would differ from applying ``isobn``, or would affect other layers."""
    if type(isobn).forward is not IsoBN.forward or isobn._forward_hooks or isobn._forward_pre_hooks:
        raise ValueError(f"the IsoBN before {target!r} has hooks or a forward of its own, which folding would lose")
    weight = linear._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"the weight of {target!r} is computed from others: remove its parametrization or pruning first"
        )
    uses = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    places = [name for name, module in model.named_modules(remove_duplicate=False) if module is isobn]
    if len(uses) > 1 or len(places) > 1:
        raise ValueError(
            f"IsoBN and the layer behind it must each be in one place only, got {', '.join(map(repr, places + uses))}"
        )


@torch.no_grad()
def fold_scale(isobn: IsoBN, linear: nn.Linear) -> None:
    """Multiply the columns of the weight by the scale: ``linear(isobn(x))`` of evaluation becomes ``linear(x)``."""
    # One rounding to the type of the weight, which may be half; so may that of the scale, where FSDP has cast it.
    dtype = torch.promote_types(isobn.scale.dtype, torch.float32)
    linear.weight.copy_(linear.weight.to(dtype) * isobn.scale)


def _fold(model: nn.Module, isobn: IsoBN, linear: nn.Module | None, target: str) -> Callable[[], None]:
    """Check the arguments, and return the function that folds ``isobn`` into ``linear``."""
    if not isinstance(linear, nn.Linear) or linear.in_features != isobn.num_features:
        raise ValueError(
            f"{target!r} must be a torch.nn.Linear with in_features={isobn.num_features}, as IsoBN, got {_kind(linear)}"
        )
    check_foldable(model, isobn, linear, target)

    def fold() -> None:
        fold_scale(isobn, linear)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if child is isobn:
                    setattr(parent, name, nn.Identity())

    return fold


def _in_sequence(sequence: nn.Module) -> list[tuple[IsoBN, nn.Module, int]]:
    """Each IsoBN with the linear layer that follows it, nothing but dropout between, and where that is."""
    found: list[tuple[IsoBN, nn.Module, int]] = []
    last = None
    for position, module in enumerate(sequence._modules.values()):
        if isinstance(module, IsoBN):
            last = module
        elif isinstance(module, nn.Linear) and last is not None:
            found.append((last, module, position))
            last = None
        elif not isinstance(module, (nn.Dropout, nn.Identity)):
            last = None
    return found


def _kind(module: nn.Module | None) -> str:
    return "nothing of that name" if module is None else str(module)
