"""Runs the emulated CUDA kernels on the cases of a file, under AddressSanitizer; see test_cuda.py.

    LD_PRELOAD=libasan.so python sanitized.py EXTENSION CASES.npz RESULTS.npz

NumPy alone: every array lies in a piece of memory of its own, whose ends the sanitizer watches.
"""

import ctypes
import importlib.util
import sys

import numpy as np

MOMENTUM, EPS, BETA = 0.05, 1e-3, 0.5


def load(path):
    spec = importlib.util.spec_from_file_location("emulated._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(path)


def laid_out(x, layout):
    """A copy: in rows, in columns, in rows one element apart, in rows from an odd address on."""
    N, D = x.shape
    if layout == 2:
        return np.pad(x, ((0, 0), (0, 1)))[:, :D]
    if layout == 3:
        return np.pad(x.reshape(-1), (1, 0))[1:].reshape(N, D)
    return x.copy(order="F" if layout == 1 else "C")


def strides(x):
    return [stride // x.itemsize for stride in x.strides]


def run(cuda, x, dout, dtype, bias_correction, device):
    """out, dx and the state after two training steps, and the scale computed from it."""
    (N, D), stream = x.shape, 0
    C, sigma, scale = (np.zeros(shape, np.float32) for shape in ((D, D), D, D))
    saved, computed, count = np.empty_like(scale), np.empty_like(scale), np.zeros((), np.int64)
    out, dx, scaled = (np.empty((N, D), x.dtype) for _ in range(3))
    state = [C.ctypes.data, sigma.ctypes.data, count.ctypes.data]
    numbers = [MOMENTUM, EPS, BETA, bias_correction, device, stream]
    functions = (cuda.TRAIN_FORWARD, cuda.COMPUTE_SCALE, cuda.TRAIN_BACKWARD)
    work = [np.full(cuda.workspace_bytes(function, D), 255, np.uint8) for function in functions]
    there = [x.ctypes.data, dtype, *strides(x), N, D]
    for _ in range(2):
        cuda.train_forward(
            *there, *state, scale.ctypes.data, saved.ctypes.data, out.ctypes.data, *numbers, work[0].ctypes.data
        )
    cuda.compute_scale(cuda.DTYPES["float32"], D, *state, computed.ctypes.data, *numbers, work[1].ctypes.data)
    cuda.apply_scale(*there, saved.ctypes.data, scaled.ctypes.data, device, stream)
    through = [*state, scale.ctypes.data, dx.ctypes.data]
    cuda.train_backward(dout.ctypes.data, *strides(dout), *there, *through, *numbers, work[2].ctypes.data)
    assert scaled.tobytes() == out.tobytes()
    assert scale.tobytes() == saved.tobytes()
    return {"out": out, "dx": dx, "C": C, "sigma": sigma, "scale": scale, "computed": computed}


def main(extension, cases, results):
    cuda, emulator = load(extension)
    found = {}
    given = np.load(cases)
    for key in sorted({name.rsplit("/", 1)[0] for name in given}):
        dtype, layout, bias_correction, whole = (int(part) for part in key.split("/")[1].split(","))
        x, dout = (laid_out(given[f"{key}/{name}"], layout) for name in ("x", "dout"))
        # Device 0 is too small for one launch; what is planned for a device stays.
        emulator.isobn_emulation_device(132 if whole else 0, 1, 1, ctypes.c_size_t(232448), ctypes.c_size_t(48 << 10))
        for descending in (0, 1):
            emulator.isobn_emulation_order(descending)
            for name, value in run(cuda, x, dout, dtype, bool(bias_correction), whole).items():
                found[f"{key}/{descending}/{name}"] = value
    np.savez(results, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
