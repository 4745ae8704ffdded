"""Data, state and single steps, shared by the tests."""

import os
import subprocess
import sys
from dataclasses import dataclass, fields

import numpy as np
import oracle
import torch

from isobn_kernels import isobn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF_DTYPES = DTYPES[:2]


def state_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def to_numpy(tensor):
    """A float64 copy; exact for every dtype here."""
    return tensor.detach().cpu().double().numpy().copy()


def batch(N, D, seed=0, dtype=torch.float32, device="cpu", offset=1.0):
    """Correlated features; deviations from 0.1 to 1, means of ``offset`` deviations, of random sign."""
    fixed = np.random.default_rng(1000 + D)  # the distribution stays while the batches differ
    deviation = 10 ** fixed.uniform(-1, 0, D)
    mean = offset * deviation * fixed.choice([-1, 1], D)
    mixing = fixed.standard_normal((3, D))
    rng = np.random.default_rng(seed)
    z = 0.5 * rng.standard_normal((N, 3)) @ mixing + rng.standard_normal((N, D))
    return torch.tensor(mean + deviation * z).to(device, dtype)


def upstream(N, D, seed=0, dtype=torch.float32, device="cpu"):
    """A gradient for the output of `batch`."""
    return torch.tensor(np.random.default_rng(seed + 500_000).standard_normal((N, D))).to(device, dtype)


@dataclass
class State:
    """The four buffers of the functional form."""

    running_cov: torch.Tensor
    running_std: torch.Tensor
    scale: torch.Tensor
    num_batches_tracked: torch.Tensor

    @property
    def tensors(self):
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def clone(self):
        return State(**{name: tensor.clone() for name, tensor in self.tensors.items()})

    def to(self, device):
        return State(**{name: tensor.to(device) for name, tensor in self.tensors.items()})

    def oracle(self):
        """The same numbers for the oracle."""
        floats = (to_numpy(t) for t in (self.running_cov, self.running_std, self.scale))
        return oracle.State(*floats, int(self.num_batches_tracked))


def fresh(D, dtype=torch.float32, device="cpu"):
    """The state of a new module; ``dtype`` is that of the input."""
    dtype = state_dtype(dtype)
    return State(
        torch.zeros(D, D, dtype=dtype, device=device),
        torch.zeros(D, dtype=dtype, device=device),
        torch.ones(D, dtype=dtype, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )


def warm(D, dtype=torch.float32, device="cpu", steps=10, momentum=0.3, N=17):
    """The state after some training, by the oracle: it does not depend on the backend under test."""
    state = oracle.fresh_state(D)
    for step in range(steps):
        _, state = oracle.train_step(to_numpy(batch(N, D, seed=900 + step)), state, momentum=momentum)
    dtype = state_dtype(dtype)
    floats = (torch.tensor(a).to(device, dtype) for a in state[:3])
    return State(*floats, torch.tensor(state.t, device=device))


def train(x, state, case, **options):
    """One training step."""
    return isobn(x, **state.tensors, training=True, backend=case.backend, **options)


def train_with_gradient(x, dout, state, case, **options):
    """(out, dx) of one training step."""
    x = x.detach().requires_grad_()
    out = train(x, state, case, **options)
    (dx,) = torch.autograd.grad(out, x, dout)
    return out.detach(), dx


def same_bits(a, b):
    """Equal to the last bit: NaN equals NaN of the same payload, 0 differs from -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return to_bytes(a) == to_bytes(b)


def to_bytes(tensor):
    dense = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_untouched(state, before):
    for name, tensor in state.tensors.items():
        assert same_bits(tensor, before.tensors[name]), f"{name} changed"


def assert_same_state(a, b):
    for name, tensor in a.tensors.items():
        assert same_bits(tensor, b.tensors[name]), f"{name} differs"


def assert_finite(state):
    for name, tensor in state.tensors.items():
        assert tensor.isfinite().all(), f"{name} is not finite"


def assert_symmetric(running_cov):
    assert same_bits(running_cov, running_cov.T), "running_cov is not bit-symmetric"


def python(code, **environment):
    """What a fresh interpreter prints, run on ``code`` with these environment variables."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def round_to_bfloat16_when_interpreting():
    """Triton's interpreter cuts float32 off at 16 bits where every GPU rounds to the nearest bfloat16, ties to even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    as_it_is = InterpreterBuilder.cast_impl

    def cast(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return as_it_is(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), dst_type.scalar)

    InterpreterBuilder.cast_impl = cast
