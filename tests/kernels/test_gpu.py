"""The Triton and the CUDA kernels on a GPU: full sizes, addresses beyond 32 bits, CUDA graphs, streams, many repeats.

The conformance suite itself runs there too, as the cases "triton-gpu" and "cuda-gpu" of `cases.CASES`. What a backend
does not take, as it says itself, is skipped.
"""

import pytest
import torch
from helpers import State, batch, fresh, same_bits, warm
from tolerance import SLACK, assert_right, named

from isobn_kernels import IsoBN, backends, isobn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that PyTorch can use"),
]
NAMES = ("running_cov", "running_std", "scale")


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """One GPU backend after the other."""
    reason = backends.load(request.param).unavailable_reason()
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def step(backend):
    """A training step on it."""
    return lambda x, state: isobn(x, **state.tensors, training=True, backend=backend)


def in_float64(state):
    return State(*(getattr(state, name).double() for name in NAMES), state.num_batches_tracked.clone())


def plain_step(x, state):
    """The reference on the GPU: in float64 the truth, from the same rounded input and state."""
    return isobn(x, **state.tensors, training=True, backend="reference")


def errors_on_gpu(state, out, exact, truth):
    """The measures of tolerance.py, without moving D x D to the CPU."""
    C = exact.running_cov
    deviation = C.diagonal().sqrt()
    return {
        "C": ((state.running_cov - C).abs() / (deviation[:, None] * deviation)).max().item(),
        "sigma": (state.running_std / exact.running_std - 1).abs().max().item(),
        "scale": (state.scale / exact.scale - 1).abs().max().item(),
        "out": ((out - truth).abs().amax(0) / truth.abs().amax(0)).max().item(),
    }


def random_batch(N, D, dtype=torch.float32):
    """Made on the GPU: features of deviation 0.1 to 1 that share three factors, mean 1."""
    generator = torch.Generator("cuda").manual_seed(N * 31 + D)
    mixing = torch.randn(3, D, device="cuda", generator=generator)
    factors = torch.randn(N, 3, device="cuda", generator=generator)
    x = torch.randn(N, D, device="cuda", generator=generator) + 0.5 * factors @ mixing
    return (x * torch.linspace(0.1, 1, D, device="cuda") + 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("N", "D"),
    [
        (16, 384),
        (16, 768),
        (32, 768),
        (64, 1024),
        (128, 1100),
        (128, 2048),
        (64, 4096),
        (4096, 1024),
        (65536, 768),
        (64, 8192),
    ],
    ids=str,
)
def test_full_size(step, N, D, dtype):
    state, x = fresh(D, device="cuda"), random_batch(N, D, dtype)
    for _ in range(2):  # the second from statistics that are not zero
        exact, reference = in_float64(state), state.clone()
        truth, plain, out = plain_step(x.double(), exact), plain_step(x, reference), step(x, state)
        far, fair = errors_on_gpu(state, out, exact, truth), errors_on_gpu(reference, plain, exact, truth)
        assert all(far[name] <= 2 * fair[name] + SLACK[torch.float32] for name in far), (far, fair)
        assert same_bits(state.running_cov, state.running_cov.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "D"), [(16, 384), (32, 768), (128, 2048), (64, 4096), (4096, 1024)], ids=str)
def test_gradient_through_statistics(backend, N, D, dtype):
    """At most twice the error of the reference, as in the conformance suite."""
    seen = random_batch(8192, D).double()
    # Statistics that have seen much, with R_ii a little below 1: at the clamp, where R_ii is by itself, the gradient is
    # either of two values.
    start = fresh(D, device="cuda")
    start.running_cov.copy_(seen.T.cov())
    start.running_std.copy_(seen.std(0) * 1.02)
    x, dout = random_batch(N, D, dtype), random_batch(N + 1, D, dtype)[1:]

    def gradient(backend, x, state):
        x = x.detach().requires_grad_()
        out = isobn(x, **state.tensors, training=True, backend=backend, stop_gradient=False)
        out.backward(dout.to(out.dtype))
        return x.grad.double()

    truth = gradient("reference", x.double(), in_float64(start))
    found, reference = (gradient(name, x, start.clone()) for name in (backend, "reference"))
    assert_right({"dx": found}, {"dx": reference}, {"dx": truth}, dtype=dtype)


def test_more_elements_than_32_bits_count(step):
    """3 million rows of 768: the same 3,000 over and over, whose statistics are known.

    The tolerance: a chain of n additions of squares is off by at most n half units in the last place, 2^-24. A chunk is
    1,465 blocks of 32 rows, and there are 64, so that a deviation, half as far off as its square, is within 4.6e-5; as
    rounding errors cancel, a simulation finds 8e-7. A row at a wrong address would show in the third digit.
    """
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs a GPU with 24 GiB of memory")
    base = random_batch(3000, 768, torch.bfloat16)
    x = base.repeat(1000, 1)
    assert x.numel() > 1 << 31
    state, small = fresh(768, device="cuda"), fresh(768, device="cuda")
    out = step(x, state)
    expected = step(base, small)
    torch.testing.assert_close(state.running_std, small.running_std, rtol=1e-5, atol=0)
    torch.testing.assert_close(state.scale, small.scale, rtol=1e-5, atol=0)
    for rows in (out[:3000], out[-3000:]):
        torch.testing.assert_close(rows, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("shape", [(32, 768), (256, 768), (64, 4096)], ids=str)
def test_graph_replay_equals_eager(step, shape):
    xs = [random_batch(*shape) + i for i in range(4)]
    eager, replayed = fresh(shape[1], device="cuda"), fresh(shape[1], device="cuda")
    expected = [step(x, eager) for x in xs]
    x, warm_up = xs[0].clone(), fresh(shape[1], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(x, warm_up)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x, replayed)
    for tensor, start in zip(replayed.tensors.values(), fresh(shape[1], device="cuda").tensors.values(), strict=True):
        tensor.copy_(start)
    for value, want in zip(xs, expected, strict=True):
        x.copy_(value)
        graph.replay()
        assert same_bits(out, want)
    for name, tensor in eager.tensors.items():
        assert same_bits(replayed.tensors[name], tensor), name


def test_two_streams_at_once(step):
    xs = [random_batch(32, 768) + i for i in range(2)]
    alone = [fresh(768, device="cuda") for _ in xs]
    expected = []
    for x, state in zip(xs, alone, strict=True):
        for _ in range(100):
            out = step(x, state)
        expected.append(out)
    states = [fresh(768, device="cuda") for _ in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    found = [None, None]
    # Both wait for a kernel of a tenth of a second, in which all their steps are queued: then they run side by side.
    torch.cuda._sleep(200_000_000)
    gate = torch.cuda.current_stream().record_event()
    for stream in streams:
        stream.wait_event(gate)
    for _ in range(100):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i] = step(xs[i], states[i])
    torch.cuda.synchronize()
    for i in range(2):
        assert same_bits(found[i], expected[i])
        assert same_bits(states[i].running_cov, alone[i].running_cov)


def test_another_device_than_the_current_one(step):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = batch(32, 64, device="cuda:1")
    state, here = warm(64, device="cuda:1"), warm(64, device="cuda:0")
    assert torch.cuda.current_device() == 0
    assert same_bits(step(x, state), step(x.to("cuda:0"), here))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(("N", "D"), [(32, 768), (300, 384)], ids=str)
def test_ten_thousand_repeats_give_the_same_bits(step, N, D):
    x, start = random_batch(N, D), warm(D, device="cuda")
    expected = start.clone()
    out = step(x, expected)
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        state = start.clone()
        differences += (step(x, state) != out).sum() + (state.running_cov != expected.running_cov).sum()
        differences += (state.scale != expected.scale).sum()
    assert differences.item() == 0


@pytest.mark.parametrize("stop_gradient", [True, False], ids=["default", "through statistics"])
def test_a_step_does_not_wait_for_the_gpu(backend, stop_gradient):
    layer = IsoBN(768, backend=backend, stop_gradient=stop_gradient, device="cuda").train()
    x = random_batch(32, 768).requires_grad_()
    dout = torch.ones_like(x)
    layer(x).backward(dout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_with_cuda_graphs(backend):
    compiled, eager = (IsoBN(64, backend=backend, device="cuda").train() for _ in range(2))
    run = torch.compile(compiled, fullgraph=True, mode="reduce-overhead")
    for seed in range(5):
        x = batch(32, 64, seed, device="cuda")
        assert same_bits(run(x), eager(x))
    for name, buffer in eager.named_buffers():
        assert same_bits(compiled.get_buffer(name), buffer), name


def head(backend, stop_gradient):
    """Linear, IsoBN, linear; always the same one. Dropout would draw other numbers in a graph."""
    torch.manual_seed(0)
    norm = IsoBN(64, backend=backend, stop_gradient=stop_gradient)
    return torch.nn.Sequential(torch.nn.Linear(16, 64), norm, torch.nn.Linear(64, 2)).cuda().train()


BOTH_MODES = pytest.mark.parametrize("stop_gradient", [True, False], ids=["default", "through statistics"])


def exact_head(stop_gradient):
    return head("reference", stop_gradient).double()


def assert_as_right(net, eager, exact):
    """Statistics, parameters and their gradients: at most twice as far from float64 as the eager ones."""

    def results(net):
        state = State(*net[1].buffers())
        parameters = [p.detach() for p in net.parameters()]
        return named(state, parameters=parameters, gradients=[p.grad for p in net.parameters()])

    assert_right(*map(results, (net, eager, exact)))


@BOTH_MODES
def test_whole_training_step_in_a_graph(backend, stop_gradient):
    """Forward, backward and optimizer captured once and replayed on other batches."""
    eager, captured = head(backend, stop_gradient), head(backend, stop_gradient)
    exact = exact_head(stop_gradient)
    start = {name: tensor.clone() for name, tensor in captured.state_dict().items()}
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (eager, captured, exact)]
    x = random_batch(32, 16)

    def step(net, optimizer, x):
        optimizer.zero_grad(set_to_none=False)
        net(x).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured, optimizers[1], x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, optimizers[1], x)
    captured.load_state_dict(start)  # copies into the tensors that the graph writes
    for seed in range(4):
        value = random_batch(32, 16) + seed
        step(eager, optimizers[0], value)
        step(exact, optimizers[2], value.double())
        x.copy_(value)
        graph.replay()
    assert_as_right(captured, eager, exact)
    assert captured[1].num_batches_tracked.item() == 4


@BOTH_MODES
def test_make_graphed_callables(backend, stop_gradient):
    """It warms up with steps of its own, which count as updates: the state is put back afterwards."""
    eager, graphed, exact = head(backend, stop_gradient), head(backend, stop_gradient), exact_head(stop_gradient)
    start = {name: tensor.clone() for name, tensor in graphed.state_dict().items()}
    run = torch.cuda.make_graphed_callables(graphed, (random_batch(32, 16),))
    graphed.load_state_dict(start)
    for seed in range(3):
        x = random_batch(32, 16) + seed
        for net, forward in ((eager, eager), (graphed, run), (exact, exact)):
            net.zero_grad()
            forward(x.to(net[0].weight.dtype)).square().mean().backward()
        assert_as_right(graphed, eager, exact)


@BOTH_MODES
def test_compiled_training_with_cuda_graphs(backend, stop_gradient):
    """The backward too, and two batch sizes."""
    torch._dynamo.reset()
    eager, compiled, exact = head(backend, stop_gradient), head(backend, stop_gradient), exact_head(stop_gradient)
    run = torch.compile(compiled, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        for N in (32, 48):
            x = random_batch(N, 16) + seed
            torch.compiler.cudagraph_mark_step_begin()
            for net, forward in ((eager, eager), (compiled, run), (exact, exact)):
                net.zero_grad()
                forward(x.to(net[0].weight.dtype)).square().mean().backward()
            assert_as_right(compiled, eager, exact)


def test_a_training_step_is_one_launch():
    """For the CUDA kernels, wherever they serve the sizes that people train with."""
    cuda = backends.load("cuda")
    if reason := cuda.unavailable_reason():
        pytest.skip(f"cuda: {reason}")
    assert cuda.device_reason(0) is None
    properties = torch.cuda.get_device_properties(0)
    if properties.multi_processor_count < 128:
        pytest.skip("needs a GPU of 128 multiprocessors, for all blocks to be there at once")
    for D in (384, 768, 1024):
        assert cuda.extension.one_launch(0, D, 0)
