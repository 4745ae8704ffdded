"""Every private name of PyTorch that this package uses, with what it is for. tests/test_torch_internals.py calls each."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo  # torch.compiler.disable would import the compiler now
from torch.autograd import forward_ad

__all__ = ["disable_dynamo", "group_named", "is_plain", "is_recomputation", "is_transformed", "libraries"]


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing repeats it there."""
    return torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active, also while compiling.

    ``x.requires_grad`` does not tell: the compiler reports False under `torch.func.grad`.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_plain(x: Tensor) -> bool:
    """Whether a kernel may be called on ``x`` without going through the dispatcher, which costs microseconds.

    It may not where something else has to see the call (a compiler, tracer, mode or transform), or where the values
    of the tensor are not what lies at its address.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.layout is torch.strided
        and not x.is_meta
        and torch._C._has_storage(x)
        and not x.is_neg()
        and not x._is_zerotensor()
        and not is_transformed()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def libraries(namespace: str) -> tuple[torch.library.Library, torch.library.Library]:
    """One to define operators in, which lives as long as the process, and a new one for what they do.

    `importlib.reload`, or a second import after names were deleted from `sys.modules`, registers everything anew. The
    functions of the earlier import go; its definitions stay, because graphs that are compiled already point to them.
    """
    operators = getattr(torch.ops, namespace)
    definitions, earlier = vars(operators).get("libraries", (None, None))
    if earlier is None:
        definitions = torch.library.Library(namespace, "DEF")
    else:
        earlier._destroy()
    operators.libraries = definitions, torch.library.Library(namespace, "FRAGMENT")
    return operators.libraries


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of that name: the arguments of a registered operator cannot be groups."""
    return dist.distributed_c10d._resolve_process_group(cast(Any, name))
