"""The registered ops, torch.compile and export."""

import oracle
import pytest
import torch
from helpers import State, assert_untouched, batch, same_bits, upstream, warm
from tolerance import assert_right, named
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from isobn_kernels import IsoBN, isobn

BOTH_MODES = pytest.mark.parametrize("stop_gradient", [True, False], ids=["default", "through statistics"])
OPS = torch.ops.isobn_kernels

# torch.export and torch.library.opcheck themselves still call torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- The registered ops ----


def op_options(case, bias_correction=False):
    return 0.05, 1e-3, 0.5, bias_correction, case.backend, ""


def op_layouts(N, D, case, dtype=torch.float32):
    x = batch(N, D, dtype=dtype, device=case.device)
    return [x, x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("N", [0, 1, 17])
def test_opcheck_train_forward(case, N, dtype):
    state = warm(7, dtype, case.device)
    for x in op_layouts(N, 7, case, dtype):
        full = (x, *state.tensors.values(), *op_options(case, bias_correction=True))
        bare = (x, state.running_cov, state.running_std, None, None, *op_options(case))
        torch.library.opcheck(OPS.train_forward.default, full)
        torch.library.opcheck(OPS.train_forward.default, bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_compute_scale(case, dtype):
    state = warm(7, dtype, case.device)
    statistics = state.running_cov, state.running_std
    torch.library.opcheck(OPS.compute_scale.default, (*statistics, None, *op_options(case)))
    torch.library.opcheck(OPS.compute_scale.default, (*statistics, state.num_batches_tracked, *op_options(case, True)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_opcheck_train_backward(case, dtype):
    state = warm(7, dtype, case.device)
    saved = state.running_cov, state.running_std, state.scale
    dout = upstream(17, 7, dtype=dtype, device=case.device)
    for x in op_layouts(17, 7, case, dtype):
        for dout_view in (dout, dout.T.contiguous().T, dout[:1].expand(17, 7)):
            torch.library.opcheck(OPS.train_backward.default, (dout_view, x, *saved, None, *op_options(case)))
    counted = (dout, x, *saved, state.num_batches_tracked, *op_options(case, True))
    torch.library.opcheck(OPS.train_backward.default, counted)


# ---- torch.compile ----


def run_module(layer, run, xs):
    """Outputs and gradients of a few steps of ``run``, which is the layer or what a compiler made of it."""
    results = []
    for x in xs:
        x = x.clone().requires_grad_()
        out = run(x)
        out.square().sum().backward()
        results += [out, x.grad]
    return results


def pair_of_modules(D, case, **options):
    return [IsoBN(D, backend=case.backend, device=case.device, **options).train() for _ in range(2)]


def assert_same_buffers(a, b):
    for (name, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
        assert same_bits(p, q), name


@BOTH_MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_training_equals_eager(case, stop_gradient, dtype):
    eager, compiled = pair_of_modules(65, case, stop_gradient=stop_gradient)
    xs = [batch(17, 65, step, dtype, case.device) for step in range(3)]
    expected = run_module(eager, eager, xs)
    found = run_module(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"), xs)
    for got, want in zip(found, expected, strict=True):
        assert same_bits(got, want)
    assert_same_buffers(compiled, eager)


@BOTH_MODES
def test_inductor_training_equals_eager(case, stop_gradient):
    """The default compiler, with something to fuse on either side, and an input in another order.

    Its code may round otherwise than eager code, in another way on each processor. What stands around the layer here is
    exact wherever it runs: each layer sees the same input and the same gradient, and is held to the oracle on them.
    """
    compiled = IsoBN(7, backend=case.backend, device=case.device, stop_gradient=stop_gradient)
    eager = IsoBN(7, backend="reference", device=case.device, stop_gradient=stop_gradient)
    exact = oracle.Layer(7, stop_gradient)
    xs = [batch(17, 7, device=case.device), batch(17, 7, 1, device=case.device).T.contiguous().T]
    dout = upstream(17, 7, device=case.device)

    def around(layer):
        return lambda x: layer(torch.where(x > 0, 4 * x, -x)).abs() * 2

    def run(f, dtype=torch.float32):
        results = []
        for x in xs:
            x = x.detach().to(dtype).requires_grad_()
            out = f(x)
            out.backward(dout.to(dtype))
            results.append((out.detach(), x.grad))
        return zip(*results, strict=True)

    runs = run(torch.compile(around(compiled), fullgraph=True)), run(around(eager)), run(around(exact), torch.float64)
    states = State(*compiled.buffers()), State(*eager.buffers()), exact.state
    assert_right(*(named(s, out=out, dx=dx) for s, (out, dx) in zip(states, runs, strict=True)))


@BOTH_MODES
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second column", "three dimensions"])
def test_compiled_training_of_any_layout(case, layout, stop_gradient):
    x = batch(6, 7, device=case.device)
    x = {
        "contiguous": x,
        "transposed": x.T.contiguous().T,
        "every second column": x.repeat_interleave(2, 1)[:, ::2],
        "three dimensions": x.view(2, 3, 7).transpose(0, 1),
    }[layout]
    eager, compiled = pair_of_modules(7, case, stop_gradient=stop_gradient)
    expected = run_module(eager, eager, [x])
    found = run_module(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"), [x])
    for got, want in zip(found, expected, strict=True):
        assert same_bits(got, want)
    assert_same_buffers(compiled, eager)


@pytest.mark.parametrize("N", [0, 1, 17])
def test_compiled_batch_sizes_that_update_nothing(case, N):
    eager, compiled = pair_of_modules(7, case)
    xs = [batch(17, 7, device=case.device), batch(N, 7, 1, device=case.device)]
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for got, want in zip(run_module(compiled, run, xs), run_module(eager, eager, xs), strict=True):
        assert same_bits(got, want)
    assert_same_buffers(compiled, eager)


@BOTH_MODES
def test_compiled_activation_checkpointing(case, stop_gradient):
    """The compiler repeats the forward in the backward's graph; the op sees that it runs there and updates nothing."""
    eager, compiled = pair_of_modules(7, case, stop_gradient=stop_gradient)

    def run(x):
        return checkpoint(lambda t: torch.sin(compiled(torch.sin(t))), x, use_reentrant=False)

    xs = [batch(17, 7, step, device=case.device) for step in range(2)]
    expected = run_module(eager, lambda x: torch.sin(eager(torch.sin(x))), xs)
    found = run_module(compiled, torch.compile(run, fullgraph=True, backend="aot_eager"), xs)
    for got, want in zip(found, expected, strict=True):
        assert same_bits(got, want)
    assert_same_buffers(compiled, eager)


@BOTH_MODES
def test_one_graph_for_all_batch_sizes(case, stop_gradient):
    eager, compiled = pair_of_modules(7, case, stop_gradient=stop_gradient)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter)
    for step, N in enumerate((2, 16, 17, 32, 64)):
        xs = [batch(N, 7, step, device=case.device).requires_grad_() for _ in range(2)]
        torch._dynamo.mark_dynamic(xs[1], 0)
        expected, found = eager(xs[0]), run(xs[1])
        assert same_bits(found, expected)
        for out in (expected, found):
            out.square().sum().backward()
        assert same_bits(xs[1].grad, xs[0].grad)
    assert counter.frame_count == 1
    assert_same_buffers(compiled, eager)


def test_few_graphs_without_a_mark(case):
    """One for the first size, one that is dynamic; 0 and 1 may add one each."""
    layer = IsoBN(7, backend=case.backend, device=case.device)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(layer, fullgraph=True, backend=counter)
    for N in (17, 32, 2, 64, 5, 300):
        run(batch(N, 7, device=case.device))
    assert counter.frame_count <= 2
    for N in (0, 1, 3):
        run(batch(N, 7, device=case.device))
    assert counter.frame_count <= 4


def test_compiled_training_is_one_node(case):
    """The call appears in the graph as our op, once, and nothing of its insides does."""
    seen = []

    def compiler(graph, _):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    from torch._dynamo.backends.common import aot_autograd

    layer = IsoBN(7, backend=case.backend, device=case.device)
    torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(batch(17, 7, device=case.device))
    names = [str(target) for target in seen[0]]
    assert sum("isobn_kernels" in name or "auto_functionalized" in name for name in names) == 1
    assert not any("mm" in name or "pow" in name for name in names)


def test_compiled_evaluation_equals_eager(case):
    layer = IsoBN(7, backend=case.backend, device=case.device)
    layer(batch(17, 7, device=case.device))
    layer.eval()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    xs = [batch(N, 7, 1, device=case.device) for N in (17, 5, 1, 0)]
    for got, want in zip(run_module(layer, run, xs), run_module(layer, layer, xs), strict=True):
        assert same_bits(got, want)


def test_compiled_functional_evaluation_computes_the_scale(case):
    state = warm(7, device=case.device)

    def f(x):
        return isobn(x, state.running_cov, state.running_std, backend=case.backend)

    x = batch(17, 7, device=case.device)
    assert same_bits(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_exported_evaluation_holds_no_op_of_ours(case):
    layer = IsoBN(7, backend=case.backend, device=case.device)
    layer(batch(17, 7, device=case.device))
    layer.eval()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(layer, (batch(17, 7, device=case.device),), dynamic_shapes={"x": {0: rows}})
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets
    assert all(target.startswith("aten.") for target in targets), targets
    x = batch(33, 7, 1, device=case.device)
    assert same_bits(program.module()(x), layer(x))


def test_exported_training_calls_the_op(case):
    layer = IsoBN(7, backend=case.backend, device=case.device).train()
    before = State(*layer.buffers()).clone()
    program = torch.export.export(layer, (batch(17, 7, device=case.device),))
    assert "isobn_kernels" in str(program.graph)
    assert_untouched(State(*layer.buffers()), before)
