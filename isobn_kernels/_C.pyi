"""The CPU backend. Tensors are addresses (`Tensor.data_ptr`), strides are in elements; 0 stands for None."""

DTYPES: dict[str, int]
TRAIN_FORWARD: int
COMPUTE_SCALE: int
TRAIN_BACKWARD: int

def workspace_bytes(function: int, dtype: int, N: int, D: int, threads: int) -> int: ...
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
    threads: int,
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
    threads: int,
    workspace: int,
) -> None: ...
def apply_scale(
    x: int, dtype: int, row_stride: int, col_stride: int, N: int, D: int, scale: int, out: int, threads: int
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
    threads: int,
    workspace: int,
) -> None: ...
def column_sums(
    x: int, dtype: int, row_stride: int, col_stride: int, N: int, D: int, sums: int, threads: int
) -> None: ...
def centred_gram(
    x: int,
    dtype: int,
    row_stride: int,
    col_stride: int,
    N: int,
    D: int,
    sums: int,
    gram: int,
    threads: int,
    workspace: int,
) -> None: ...
def next_state(
    dtype: int,
    D: int,
    sums: int,
    running_cov: int,
    running_std: int,
    num_batches_tracked: int,
    scale: int,
    gram: int,
    scale_and_std: int,
    momentum: float,
    eps: float,
    beta: float,
    bias_correction: bool,
    threads: int,
    workspace: int,
) -> None: ...
def write_state(
    dtype: int,
    D: int,
    sums: int,
    triangle: int,
    scale_and_std: int,
    running_cov: int,
    running_std: int,
    num_batches_tracked: int,
    scale: int,
    threads: int,
) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> None: ...
def build_info() -> dict[str, str]: ...
