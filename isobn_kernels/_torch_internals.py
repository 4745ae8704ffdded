"""Every private name of PyTorch that this package uses, each in a function that says what it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo  # torch.compiler.disable would import the compiler now
from torch.autograd import forward_ad

__all__ = [
    "define",
    "disable_dynamo",
    "group_named",
    "is_plain",
    "is_recomputation",
    "is_transformed",
    "library",
    "register_autograd",
    "with_tangents",
]


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing repeats it there."""
    return torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active, also while compiling.

    ``x.requires_grad`` does not tell: the compiler reports False under `torch.func.grad`.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def with_tangents(names: Sequence[str], tensors: Sequence[Tensor | None]) -> Sequence[str]:
    """The names of those that carry a derivative of forward-mode differentiation. Inside an operator none seems to."""
    if forward_ad._current_level < 0:
        return ()
    named = zip(names, tensors, strict=True)
    return [name for name, x in named if x is not None and forward_ad.unpack_dual(x).tangent is not None]


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called on the tensors without going through the dispatcher, which costs microseconds.

    It may not where something else has to see the call (a compiler, tracer, mode or transform), or where the values
    of a tensor are not what lies at its address.
    """
    if (
        torch.compiler.is_compiling()
        or is_transformed()
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._len_torch_function_stack() != 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for x in tensors:
        if x is not None and (
            type(x) is not Tensor
            or not torch._C._has_storage(x)  # sparse, opaque, or a wrapper of a transform that has ended
            or x.is_meta
            or x.is_neg()
            or x._is_zerotensor()
        ):
            return False
    return True


def register_autograd(library: torch.library.Library, name: str, rule: Callable[..., Any]) -> None:
    """Have autograd call ``rule(below, *args)``, where ``below(*args)`` is the operator without autograd.

    `torch.library.register_autograd` does not take operators that write to their arguments.
    """
    operator = getattr(getattr(torch.ops, library.ns), name).default

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        def below(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        return rule(below, *args)

    library.impl(name, disable_dynamo(kernel), "Autograd", with_keyset=True)


def library(namespace: str, part: str) -> torch.library.Library:
    """A new library for that part of the operators of a namespace; what an earlier one registered is taken back.

    `importlib.reload`, or a second import after names were deleted from `sys.modules`, registers everything anew.
    """
    libraries = vars(getattr(torch.ops, namespace)).setdefault("libraries", {})
    if part in libraries:
        libraries[part]._destroy()
    libraries[part] = torch.library.Library(namespace, "FRAGMENT")
    return libraries[part]


def define(namespace: str, signature: str) -> None:
    """Define an operator once in the life of the process: compiled graphs point to the definition."""
    operators = getattr(torch.ops, namespace)
    if not hasattr(operators, signature.partition("(")[0]):
        if "definitions" not in vars(operators):
            operators.definitions = torch.library.Library(namespace, "DEF")
        operators.definitions.define(signature)


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of that name: the arguments of a registered operator cannot be groups."""
    return dist.distributed_c10d._resolve_process_group(cast(Any, name))
