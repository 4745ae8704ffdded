"""The CUDA backend. Tensors are addresses (`Tensor.data_ptr`), strides are in elements; 0 stands for None."""

DTYPES: dict[str, int]
TRAIN_FORWARD: int
COMPUTE_SCALE: int
TRAIN_BACKWARD: int
MAX_ROWS: int
MAX_FEATURES: int

def workspace_bytes(function: int, D: int) -> int: ...
def train_forward(
    x: int,
    dtype: int,
    row_stride: int,
    col_stride: int,
    N: int,
    D: int,
    running_cov: int,
    running_std: int,
    num_batches_tracked: int,
    scale: int,
    saved_scale: int,
    out: int,
    momentum: float,
    eps: float,
    beta: float,
    bias_correction: bool,
    device: int,
    stream: int,
    workspace: int,
) -> None: ...
def compute_scale(
    dtype: int,
    D: int,
    running_cov: int,
    running_std: int,
    num_batches_tracked: int,
    scale: int,
    momentum: float,
    eps: float,
    beta: float,
    bias_correction: bool,
    device: int,
    stream: int,
    workspace: int,
) -> None: ...
def apply_scale(
    x: int, dtype: int, row_stride: int, col_stride: int, N: int, D: int, scale: int, out: int, device: int, stream: int
) -> None: ...
def train_backward(
    dout: int,
    dout_row_stride: int,
    dout_col_stride: int,
    x: int,
    dtype: int,
    row_stride: int,
    col_stride: int,
    N: int,
    D: int,
    running_cov: int,
    running_std: int,
    num_batches_tracked: int,
    scale: int,
    dx: int,
    momentum: float,
    eps: float,
    beta: float,
    bias_correction: bool,
    device: int,
    stream: int,
    workspace: int,
) -> None: ...
def one_launch(dtype: int, D: int, device: int) -> bool: ...
def probe(device: int) -> str: ...
def driver_version() -> int: ...
def runtime_version() -> int: ...
def build_info() -> dict[str, str]: ...
