"""The same input twice gives the same bits: over many repeats, at any number of threads, from several at once."""

import concurrent.futures

import pytest
import torch
from helpers import State, batch, fresh, to_bytes, train_with_gradient, upstream, warm

from isobn_kernels import isobn

BOTH_MODES = pytest.mark.parametrize("stop_gradient", [True, False], ids=["default", "through statistics"])
MOST_THREADS = torch.get_num_threads()


def training_bytes(case, shape, stop_gradient, dtype=torch.float32, start=warm):
    """Everything that a training step and an evaluation return or leave behind, as bytes."""
    x, dout = (f(*shape, dtype=dtype, device=case.device) for f in (batch, upstream))
    state = start(shape[1], dtype, case.device)

    def run():
        after = state.clone()
        results = train_with_gradient(x, dout, after, case, stop_gradient=stop_gradient)
        scaled = isobn(x, after.running_cov, after.running_std, backend=case.backend)
        return b"".join(map(to_bytes, (*results, scaled, *after.tensors.values())))

    return run


def repeats_that_differ(run, repeats):
    first = run()
    return [i for i in range(1, repeats) if run() != first]


@pytest.mark.parametrize("shape", [(17, 65), (300, 64)], ids=str)
def test_200_repeats_with_all_threads(case, threads, shape):
    threads(MOST_THREADS)
    assert repeats_that_differ(training_bytes(case, shape, stop_gradient=False), 200) == []


def test_a_difference_in_the_last_bit_of_one_repeat_is_seen():
    state, count = fresh(7), iter(range(200))

    def run():
        if next(count) == 137:
            state.running_std[3] = torch.nextafter(state.running_std[3], torch.tensor(1.0))
        else:
            state.running_std.zero_()
        return b"".join(map(to_bytes, state.tensors.values()))

    assert repeats_that_differ(run, 200) == [137]


@BOTH_MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (17, 65), (129, 384), (1030, 65), (5, 1000)], ids=str)
def test_kernels_give_the_same_bits_at_any_number_of_threads(kernel_case, threads, shape, dtype, stop_gradient):
    """More threads than cores, and than rows or columns, included."""
    run = training_bytes(kernel_case, shape, stop_gradient, dtype)
    results = set()
    for number in (1, 2, 3, 8):
        threads(number)
        results.add(run())
    assert len(results) == 1


def test_training_from_several_threads_at_once(case):
    """Each with its own state. A workspace shared by mistake would show: the kernels do not hold the GIL."""
    runs = [training_bytes(case, shape, stop_gradient=False) for shape in ((17, 65), (33, 200), (300, 64), (2, 7))]
    expected = [run() for run in runs]

    def many(run):
        torch.set_num_threads(1)
        return {run() for _ in range(25)}

    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
        for found, want in zip(pool.map(many, runs), expected, strict=True):
            assert found == {want}


def test_evaluation_while_training(case):
    """A second state is read while the first is written."""
    read, written = warm(65, device=case.device), warm(65, device=case.device)
    x = batch(17, 65, device=case.device)
    expected = to_bytes(isobn(x, read.running_cov, read.running_std, backend=case.backend))

    def evaluate():
        return {to_bytes(isobn(x, read.running_cov, read.running_std, backend=case.backend)) for _ in range(50)}

    def train():
        for _ in range(50):
            isobn(x, **State(**written.tensors).tensors, training=True, backend=case.backend)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        training = pool.submit(train)
        assert pool.submit(evaluate).result() == {expected}
        training.result()
    assert written.num_batches_tracked == 60
