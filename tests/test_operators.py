"""The registered operators: opcheck, torch.compile, torch.export, and the decoding step under both."""

import pytest
import torch
from problems import make

from minimamba import _operators, selective_scan, selective_state_update


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
