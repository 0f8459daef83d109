"""The registered operators: opcheck, torch.compile, torch.export, and the decoding step under both."""

import pytest
import torch
from problems import make

from minimamba import _operators, causal_conv1d, selective_scan, selective_state_update


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles the same function anew, and the compiler would count that as recompiling too often."""
    torch._dynamo.reset()


def arguments(problem, method, save):
    x = problem.tensors
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    tensors = [None if x[n] is None else x[n].requires_grad_() for n in names]
    return (*tensors, problem.cu_seqlens, problem.delta_softplus, method, save)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"documents": 2}, {"B": "constant", "C": "grouped", "groups": 2, "z": False, "D": False}],
    ids=["full", "packed", "bare"],
)
@pytest.mark.parametrize("method", ["cpu", "triton"])
def test_opcheck(method, options, save):
    problem = make(length=35, **options)
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if save:
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(_operators._forward, arguments(problem, method, save), test_utils=tests)


def test_opcheck_of_the_step():
    problem = make(batch=2, length=1)
    x = problem.tensors
    torch.library.opcheck(
        _operators.selective_state_update,
        (x["initial_state"], x["u"][:, 0].clone(), x["delta"][:, 0].clone(), x["A"], x["B"][:, 0].clone(),
         x["C"][:, 0].clone(), x["D"], x["z"][:, 0].clone(), x["delta_bias"], True),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "documents"),
    [("cpu", None), ("cpu", 2), ("triton", None), ("triton", 2), ("sequential", None), ("blelloch", None)],
)
def test_compiled_equals_eager(method, documents):
    problem = make(length=6, documents=documents)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        problem.run(compiled, method=method), problem.run(selective_scan, method=method), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    expected = problem.gradients(selective_scan, method=method)
    for name, gradient in problem.gradients(compiled, method=method).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)


def test_export_keeps_the_scan_as_one_operator():
    problem = make(length=6)
    x = problem.tensors

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, method="cpu")

    inputs = tuple(x[name] for name in ("u", "delta", "A", "B", "C"))
    program = torch.export.export(Scan(), inputs)
    assert "minimamba.selective_scan.default" in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), Scan()(*inputs))


def test_the_step_compiles():
    torch.manual_seed(0)
    state, other = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)
    arguments = torch.randn(2, 4), torch.rand(2, 4), -torch.rand(4, 3), torch.randn(2, 3), torch.randn(2, 3)
    compiled = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(state, *arguments), selective_state_update(other, *arguments))
    assert state.abs().sum() > 0
    torch.testing.assert_close(state, other)


# Where nothing records or replaces operators a kernel is called without one. Elsewhere it must not be.


def five(dtype=torch.float64):
    return [make(length=6).tensors[name].to(dtype) for name in ("u", "delta", "A", "B", "C")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_operator():
    u, *others = five()
    traced = torch.jit.trace(lambda x: selective_scan(x, *others, method="cpu"), u)
    torch.testing.assert_close(traced(3 * u), selective_scan(3 * u, *others, method="cpu"))


@pytest.mark.parametrize("k", range(5))
def test_a_negated_view_is_not_read_as_it_lies(k):
    tensors = five()
    expected = selective_scan(*tensors, method="cpu")
    tensors[k] = torch._neg_view(-tensors[k])
    torch.testing.assert_close(selective_scan(*tensors, method="cpu"), expected)


@pytest.mark.parametrize("k", range(5))
def test_any_argument_may_be_of_a_subclass_without_memory(k):
    from torch.testing._internal.two_tensor import TwoTensor

    tensors = five()
    expected = selective_scan(*tensors, method="cpu")
    tensors[k] = TwoTensor(tensors[k], tensors[k].clone())
    torch.testing.assert_close(selective_scan(*tensors, method="cpu").a, expected)


def test_a_second_derivative_is_refused_and_not_zero():
    problem = make(batch=1, length=5)
    u = problem.tensors["u"].requires_grad_()
    y = problem.run(selective_scan, method="cpu")[0]
    (du,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan_backward"):
        du.sum().backward()


@pytest.mark.parametrize("k", range(5))
def test_forward_mode_is_refused_and_not_zero(k):
    tensors = five()

    def scan(x):
        return selective_scan(*tensors[:k], x, *tensors[k + 1 :], method="cpu")

    with pytest.raises(NotImplementedError, match=r"^method: .*forward-mode"):
        torch.func.jvp(scan, (tensors[k],), (tensors[k],))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=r"^method: .*forward-mode"):
            scan(torch.autograd.forward_ad.make_dual(tensors[k], tensors[k]))
        torch.testing.assert_close(scan(tensors[k]), selective_scan(*tensors, method="sequential"))


def test_vmap_runs_the_operator_for_each():
    u, *others = five()
    batch = torch.stack([u, 2 * u])
    result = torch.vmap(lambda x: selective_scan(x, *others, method="cpu"))(batch)
    torch.testing.assert_close(result[1], selective_scan(2 * u, *others, method="cpu"))


@pytest.mark.parametrize("scan", [True, False])
def test_a_mode_sees_the_backward_pass(scan):
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    u, *others = five()
    u.requires_grad_()
    y = selective_scan(u, *others, method="cpu") if scan else causal_conv1d(u, others[1], method="triton")
    with Watch():
        y.sum().backward()
    assert any("backward" in name for name in seen if name.startswith("minimamba"))


@pytest.mark.parametrize("documents", [None, 2])
def test_meta_tensors_give_shapes(documents):
    problem = make(length=6, documents=documents).to(torch.float32, "meta")
    y, state = problem.run(selective_scan, method="cpu")
    assert y.is_meta and y.shape == problem.tensors["u"].shape
    assert state.is_meta and state.shape == problem.tensors["initial_state"].shape
