"""`IsoBN`, the layer: state, its life through device moves, checkpoints and copies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from isobn_kernels import backends
from isobn_kernels._checks import check_hyperparameters, check_state, check_tangents
from isobn_kernels._torch_internals import disable_dynamo
from isobn_kernels.backends import across_ranks
from isobn_kernels.functional import compute_scale, isobn
from isobn_kernels.state import Options, State, Where

_Module = TypeVar("_Module", bound=nn.Module)

_HALF = (torch.float16, torch.bfloat16)

# A new layer: statistics of no batch, and the scale that changes nothing.
_INITIAL = {"running_cov": 0, "running_std": 0, "scale": 1, "num_batches_tracked": 0}


class IsoBN(nn.Module):
    """Isotropic batch normalization of a sentence embedding, between the pooler output and dropout + classifier.

    Each feature is multiplied by a scale that shrinks features of large deviation and features correlated with many
    others, and keeps the total variance. Nothing is learned: the scale follows from moving averages of the batch
    covariance and deviation, updated in training. Evaluation applies the scale of the last training step; an
    untrained module is the identity.

    Args:
        num_features: D, the size of the last dimension of the input.
        eps: added before the power and to the scaled variance; above 0.
        momentum: weight of a batch in the moving averages, in [0, 1].
        beta: strength of the correction; 0 is none.
        bias_correction: divide the statistics by ``1 - (1 - momentum) ** num_batches_tracked``, as Adam does.
        stop_gradient: treat the scale as a constant in the backward, as the paper does.
        process_group: a `torch.distributed.ProcessGroup`, such as ``torch.distributed.group.WORLD`` once
            ``init_process_group`` was called: statistics over the rows of all its ranks, the same on each. Every rank
            must call each training forward, with an empty batch too, and with ``stop_gradient=False`` each backward.
            None is this process alone. For a finished model see `convert_sync_isobn`.
        backend: "auto", or a name from `isobn_kernels.available_backends`.
        device: of the buffers.

    Shape:
        Input and output: (..., num_features); float16, bfloat16 or float32, or float64 after ``.double()``.

    Attributes:
        running_cov: (num_features, num_features) float32 buffer.
        running_std: (num_features,) float32 buffer.
        scale: (num_features,) float32 buffer, what evaluation multiplies by.
        num_batches_tracked: () int64 buffer, the number of updates.

    The statistics stay float32 through ``.half()``, ``.bfloat16()`` and ``.to(half dtype)``. Where they have become
    half precision in another way, the next forward makes them float32 again and warns that they were rounded. FSDP does
    that with ``MixedPrecision(buffer_dtype=torch.bfloat16)``; ``buffer_dtype=torch.float32`` keeps every bit. A layer
    made on the meta device is as new after ``to_empty``. A pickled layer loads without its process group;
    `copy.deepcopy` shares it. `torch.fx` records the layer as one node, as it does batch norm.

    Raises:
        TypeError, ValueError: an argument or the input is not as described; the statistics are untouched.
        RuntimeError: ``backend`` cannot run here, or ``process_group`` has been destroyed.

    Example:
        >>> import torch
        >>> from isobn_kernels import IsoBN
        >>> head = torch.nn.Sequential(IsoBN(384), torch.nn.Dropout(0.1), torch.nn.Linear(384, 2))
        >>> head(torch.randn(16, 384)).shape
        torch.Size([16, 2])
        >>> head[0]
        IsoBN(384, eps=0.001, momentum=0.05, beta=0.5)

    Source: Zhou, Lin and Ren, AAAI 2021, https://arxiv.org/abs/2005.02178; equations in `isobn_kernels.reference`.
    """

    # Of the state_dict. A checkpoint holds the version that saved it; version 1 has the four buffers.
    _version: int = 1

    running_cov: Tensor
    running_std: Tensor
    scale: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-3,
        momentum: float = 0.05,
        beta: float = 0.5,
        *,
        bias_correction: bool = False,
        stop_gradient: bool = True,
        process_group: Any = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_features, bool) or not isinstance(num_features, int):
            raise TypeError(f"num_features must be an int, got {type(num_features).__name__}")
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        check_hyperparameters(momentum, eps, beta)
        backends.check_name(backend)
        if process_group is not None:
            across_ranks.check_group(process_group)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.beta = beta
        self.bias_correction = bias_correction
        self.stop_gradient = stop_gradient
        self.process_group = process_group
        self.backend = backend
        # float32 whatever the default dtype: the statistics of a half-precision model are float32.
        for name, shape in (("running_cov", (num_features, num_features)), ("running_std", (num_features,))):
            self.register_buffer(name, torch.empty(shape, device=device, dtype=torch.float32))
        self.register_buffer("scale", torch.empty(num_features, device=device, dtype=torch.float32))
        self.register_buffer("num_batches_tracked", torch.empty((), device=device, dtype=torch.int64))
        self.reset_parameters()

    @classmethod
    def convert_sync_isobn(cls, module: _Module, process_group: Any = None) -> _Module:
        """Have every IsoBN inside ``module`` take its statistics from all ranks, in place.

        In the manner of `torch.nn.SyncBatchNorm.convert_sync_batchnorm`. The layers and their tensors stay the same
        objects, so that it does not matter whether an optimizer or a wrapper has seen them.

        Args:
            module: a model, or an IsoBN.
            process_group: the ranks; None is ``torch.distributed.group.WORLD``, all of them.

        Returns:
            ``module`` itself.

        Raises:
            RuntimeError: ``process_group`` is None and `torch.distributed.init_process_group` was not called.
            TypeError: ``process_group`` is no group. Nothing was changed.

        Example:
            >>> import torch
            >>> from isobn_kernels import IsoBN
            >>> model = torch.nn.Sequential(IsoBN(8), torch.nn.Linear(8, 2))
            >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
            >>> IsoBN.convert_sync_isobn(model)[0]
            IsoBN(8, eps=0.001, momentum=0.05, beta=0.5, synchronised over 1 rank)
            >>> torch.distributed.destroy_process_group()
        """
        if process_group is None:
            process_group = across_ranks.world()
        across_ranks.check_group(process_group)
        for layer in module.modules():
            if isinstance(layer, IsoBN):
                layer.process_group = process_group
        return module

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Forget all batches: statistics 0, scale 1 (the identity in evaluation)."""
        for name, value in _INITIAL.items():
            getattr(self, name).fill_(value)

    def reset_parameters(self) -> None:
        """The same, under the name by which `torch.nn` modules are initialised after ``to_empty`` (FSDP, recipes)."""
        self.reset_running_stats()

    @torch.no_grad()
    def refresh_scale(self) -> None:
        """Recompute ``scale`` from the statistics, after these were edited, averaged or loaded by hand."""
        self._ensure_float32()
        scale = self._scale_of(self.running_cov, self.running_std)
        self.scale.copy_(scale)

    def _scale_of(self, running_cov: Tensor, running_std: Tensor) -> Tensor:
        state = State(running_cov, running_std, self.scale, self.num_batches_tracked)
        options = Options(self.momentum, self.eps, self.beta, self.bias_correction)
        check_state(state, options)
        check_tangents(state)
        return compute_scale(state, options, Where(self.backend))

    @torch.no_grad()
    def load_published_statistics(self, cov: Tensor, std: Tensor) -> None:
        """Take over the statistics of the paper's published code, which keeps them in plain tensors.

        Args:
            cov: (num_features, num_features), its attribute ``cov``.
            std: (num_features,), its attribute ``std``.

        ``num_batches_tracked`` is left as it is: that code does not count.

        Raises:
            TypeError: an argument is not a tensor of floating-point numbers.
            ValueError: a shape is wrong or a value is not finite. The layer is unchanged after either.

        Example:
            >>> import torch
            >>> from isobn_kernels import IsoBN
            >>> layer = IsoBN(4)
            >>> layer.load_published_statistics(torch.eye(4), torch.ones(4))
            >>> bool((layer.scale > 0).all())
            True
        """
        converted = []
        for name, given, kept in (("cov", cov, self.running_cov), ("std", std, self.running_std)):
            if not isinstance(given, Tensor) or not given.is_floating_point() or given.layout is not torch.strided:
                got = f"{given.dtype}, {given.layout}" if isinstance(given, Tensor) else type(given).__name__
                raise TypeError(f"{name} must be a dense torch.Tensor of floating-point numbers, got {got}")
            if given.shape != kept.shape:
                raise ValueError(f"{name} must have shape {tuple(kept.shape)}, got {tuple(given.shape)}")
            converted.append(given.detach().to(kept).contiguous())
            if not converted[-1].isfinite().all():
                raise ValueError(f"{name} must be finite, got NaN or Inf in {kept.dtype}: these statistics are lost")
        scale = self._scale_of(*converted)
        for kept, new in zip((self.running_cov, self.running_std, self.scale), (*converted, scale), strict=True):
            kept.copy_(new)

    def forward(self, x: Tensor) -> Tensor:
        function = isobn
        if isinstance(x, Proxy):
            path = x.tracer.path_of_module(self)
            # Hooks are recorded around this call, and a call of the module would run them again.
            if path and not self._forward_hooks and not self._forward_pre_hooks:
                return x.tracer.create_proxy("call_module", path, (x,), {})
            function = _record_isobn
        self._ensure_float32()
        # `self.running_cov` is a call of `nn.Module.__getattr__`. For four buffers: 2 of the 11 us around a kernel.
        buffers: dict[str, Tensor] = self._buffers  # type: ignore[assignment]
        return function(
            x,
            buffers["running_cov"],
            buffers["running_std"],
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            beta=self.beta,
            backend=self.backend,
            scale=buffers["scale"],
            num_batches_tracked=buffers["num_batches_tracked"],
            bias_correction=self.bias_correction,
            stop_gradient=self.stop_gradient,
            process_group=self.process_group,
        )

    def _ensure_float32(self) -> None:
        """Make the statistics float32 again where FSDP or a checkpoint has made them half precision."""
        buffers: dict[str, Tensor] = self._buffers  # type: ignore[assignment]
        cov, std, scale = buffers["running_cov"], buffers["running_std"], buffers["scale"]
        if cov.dtype in _HALF or std.dtype in _HALF or scale.dtype in _HALF:
            self._make_float32()

    @disable_dynamo
    def _make_float32(self) -> None:
        """The tensors stay the same objects, which DDP may hold."""
        half = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype in _HALF}
        for name, buffer in half.items():
            if not buffer.isfinite().all():
                raise ValueError(
                    f"{name} of IsoBN has become {buffer.dtype} and holds Inf or NaN: it was too large for that dtype. "
                    "Load the statistics anew, or call reset_running_stats(), and keep them float32 (FSDP: "
                    "MixedPrecision(buffer_dtype=torch.float32))"
                )
        if self.num_batches_tracked:
            warnings.warn(
                f"statistics of IsoBN ({', '.join(half)}) had become {next(iter(half.values())).dtype}, which rounds "
                "them; they are float32 again. To keep every bit, set buffer_dtype=torch.float32 in FSDP's "
                "MixedPrecision (accelerate: in its mixed_precision_policy), or load a checkpoint of float32",
                stacklevel=2,
            )
        with torch.inference_mode(False):
            for name, buffer in half.items():
                if buffer.is_inference():  # which could not be updated in training
                    self._buffers[name] = buffer.float()
                else:
                    buffer.data = buffer.float()

    def extra_repr(self) -> str:
        options = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, beta={self.beta}"
        for name, default in (("bias_correction", False), ("stop_gradient", True), ("backend", "auto")):
            if getattr(self, name) != default:
                options += f", {name}={getattr(self, name)!r}"
        if self.process_group is not None:
            ranks = self.process_group.size()
            options += f", synchronised over {ranks} rank{'s' * (ranks > 1)}"
        return options

    def __getstate__(self) -> dict[str, Any]:
        # A process group means something in this process only, and cannot be pickled.
        return {**self.__dict__, "process_group": None}

    def __copy__(self) -> IsoBN:
        copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> IsoBN:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group  # shared: it cannot be copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IsoBN:
        def keep_precision(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            if buffer.is_floating_point() and moved.dtype not in (torch.float32, torch.float64):
                return buffer.to(moved.device, torch.float32)
            return moved

        had_no_memory = any(buffer.is_meta for buffer in self.buffers())
        super()._apply(keep_precision, recurse)
        if had_no_memory:  # what to_empty has given it now holds anything
            self.reset_running_stats()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        layer = f"IsoBN {prefix[:-1]!r}" if prefix else "IsoBN"
        std = state_dict.get(prefix + "running_std")
        if isinstance(std, Tensor) and std.dim() == 1 and len(std) != self.num_features:
            error_msgs.append(
                f"{layer}: the checkpoint is of num_features={len(std)}, this layer of num_features={self.num_features}"
            )
        # A warning: `strict` is always True here, and an error would stop those who load the rest with strict=False.
        remedy = _remedy([name for name in _INITIAL if prefix + name not in state_dict], prefix, state_dict)
        if remedy:
            warnings.warn(f"{layer}: {remedy}", stacklevel=2)

    @property
    def _is_hf_initialized(self) -> bool:
        """The mark of `transformers` on a module whose weights it has initialised, where a checkpoint lacks them.

        The library knows batch norm by its class and fills its buffers before it sets the mark. For other modules the
        model's author has to, or missing statistics are uninitialised memory. Here setting the mark fills them.
        """
        return self.__dict__.get("_is_hf_initialized", False)

    @_is_hf_initialized.setter
    @torch.no_grad()
    def _is_hf_initialized(self, value: bool) -> None:
        if value and not self._is_hf_initialized:
            for name, initial in _INITIAL.items():
                buffer = getattr(self, name)
                if not getattr(buffer, "_is_hf_initialized", False):  # the mark of a tensor from the checkpoint
                    buffer.fill_(initial)
        self.__dict__["_is_hf_initialized"] = value


def _remedy(missing: list[str], prefix: str, state_dict: dict[str, Any]) -> str | None:
    """What to do about a checkpoint that lacks those of the buffers; None where there are all, or none."""
    if prefix + "cov" in state_dict and prefix + "std" in state_dict:
        return (
            'the checkpoint holds "cov" and "std", the statistics of the published code: take the two out of it, '
            "load the rest with strict=False and call load_published_statistics(cov, std)"
        )
    if missing == ["scale"]:
        return "the checkpoint lacks the scale: load it with strict=False and call refresh_scale()"
    if missing == ["num_batches_tracked"]:
        return (
            "the checkpoint lacks the number of updates, which only bias_correction=True needs: add it, "
            f'state_dict["{prefix}num_batches_tracked"] = torch.tensor(0)'
        )
    if missing and len(missing) < len(_INITIAL):
        return (
            f"the checkpoint lacks {', '.join(missing)}, which cannot be computed from the rest: find one that is "
            "whole, or load it with strict=False, call reset_running_stats() and train"
        )
    return None


def _record_isobn(*args: Any, **kwargs: Any) -> Any:
    """`isobn` as a node of the graph that `torch.fx` is recording."""
    return args[0].tracer.create_proxy("call_function", isobn, args, kwargs)
