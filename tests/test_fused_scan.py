"""What is particular to the fused kernels: tiles and their borders, memory, compilation; and the device runs."""

import pytest
import torch
from problems import KINDS, make, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from minimamba import fused_scan, selective_scan
from minimamba.triton_scan import compile_kernels


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65])
def test_lengths_around_a_tile(length):
    assert fused_scan.tile_for(3, 4).steps == 32
    problem = make(batch=1, length=length, layout="poisoned")
    y, state = problem.run(selective_scan, method="triton")
    expected_y, expected_state = problem.expected()
    assert relative_error(y, expected_y) < 1e-12 and relative_error(state, expected_state) < 1e-12
    expected = problem.gradients(selective_scan, method="sequential")
    for name, gradient in problem.gradients(selective_scan, method="triton").items():
        assert relative_error(gradient, expected[name]) < 1e-10, name


@pytest.mark.parametrize(("channels", "groups", "states"), [(70, 1, 1), (9, 3, 17), (2, 1, 130), (1, 1, 256)])
def test_channels_and_states_around_a_tile(channels, groups, states):
    kind = "grouped" if groups > 1 else "varying"
    problem = make(
        batch=1, length=18, channels=channels, states=states, groups=groups, B=kind, C=kind, layout="poisoned"
    )
    y, state = problem.run(selective_scan, method="triton")
    expected_y, expected_state = problem.run(selective_scan, method="sequential")
    assert relative_error(y, expected_y) < 1e-12 and relative_error(state, expected_state) < 1e-12
    expected = problem.gradients(selective_scan, method="sequential")
    for name, gradient in problem.gradients(selective_scan, method="triton").items():
        assert relative_error(gradient, expected[name]) < 1e-10, name


def test_several_programs_share_a_group_in_the_backward_pass():
    # 40 channels in blocks of 8 on 2 programs, so that each sums dB and dC over several blocks.
    problem = make(batch=2, length=34, channels=40, states=8)
    sizes = fused_scan._Sizes(*(problem.tensors[name] for name in ("u", "A", "B", "C")), None)
    blocks = -(-40 // sizes.tile.channels)
    assert 1 < fused_scan.programs_per_group(sizes.group_size, blocks, 8) < blocks
    expected = problem.gradients(selective_scan, method="cpu")
    for name, gradient in problem.gradients(selective_scan, method="triton").items():
        assert relative_error(gradient, expected[name]) < 1e-10, name


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that PyTorch creates."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize(("B", "C"), KINDS[:3])
@pytest.mark.parametrize("method", ["cpu", "triton"])
def test_no_tensor_of_length_times_channels_times_states(method, B, C):
    problem = make(batch=1, length=260, channels=6, states=8, B=B, C=C, delta_softplus=False).to(torch.float32)
    u, delta, A, B_, C_ = (problem.tensors[name] for name in ("u", "delta", "A", "B", "C"))
    leaves = [x.requires_grad_() for x in (u, delta, A, B_, C_)]
    with LargestTensor() as largest:
        y = selective_scan(u, delta, A, B_, C_, method=method)
    with LargestTensor() as largest_back:
        torch.autograd.grad(y.sum(), leaves)
    everything = 260 * 6 * 8
    assert largest.elements <= everything / 4 and largest_back.elements <= everything / 4


def test_checkpoints_are_kept_only_for_a_backward_pass():
    x = make(length=70).tensors
    arguments = [x[n] for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")]
    assert fused_scan.forward(*arguments, None, True, save=False)[2].numel() == 0
    assert fused_scan.forward(*arguments, None, True, save=True)[2].shape == (2 * 70 // 32 + 2, 4, 3)


# --- without a GPU, every variant compiles -------------------------------------------------------------


HALF = {"u", "delta", "B", "C", "z", "y", "grad_y", "du", "ddelta", "dz"}
STRIDES = {"u", "delta", "z", "y", "grad_y", "du", "ddelta", "dz", "B", "C"}
COUNTS = {"L", "channels", "states", "group_size", "blocks_per_group", "programs_per_group", "batch_size"}


def signature(names, half, wide):
    """Triton's type of each kernel argument that is not a constexpr."""

    def kind(name):
        if name in COUNTS or (name[:-2] in STRIDES and name[-2] == "_"):
            return "i32"
        if name == "cu_seqlens":
            return "*i64"
        return f"*{half if name in HALF else wide}"

    return {name: kind(name) for name in names}


def test_kernels_compile_for_a_gpu():
    import minimamba.kernels.selective_scan as kernels

    jobs = []
    for name in ("selective_scan_forward_kernel", "selective_scan_backward_kernel"):
        names = getattr(kernels, name).arg_names
        constants = {n for n in names if n.isupper() and n not in ("A", "B", "C", "D", "L")}
        flags = {n: True for n in constants if not n.startswith("BLOCK") and n != "DTYPE"}
        for half, wide in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
            values = flags | {"DTYPE": wide, "BLOCK_T": 32, "BLOCK_D": 4, "BLOCK_N": 16}
            types = signature([n for n in names if n not in constants], half, wide)
            job = {"kernel": (kernels.__name__, name), "signature": types, "constants": values, "num_warps": 4}
            jobs += [job | {"capability": 80}, job | {"capability": 90}]
    bare = jobs[0]["constants"] | {n: False for n, value in jobs[0]["constants"].items() if value is True}
    jobs.append(jobs[0] | {"constants": bare})
    for made, asked in zip(compile_kernels(jobs), jobs, strict=True):
        assert f".target sm_{asked['capability']}" in made["ptx"]


# --- on a GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("B", "C"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_device(dtype, B, C, seed):
    options = {"D": seed != 1, "z": seed != 2, "delta_bias": seed != 3, "initial_state": seed != 0}
    layout = ["contiguous", "transposed", "poisoned", "expanded"][seed]
    documents = 5 if seed in (1, 2) else None
    shape = {"batch": 2, "length": 131, "channels": 36, "states": [1, 5, 16, 100][seed], "groups": 2}
    problem = make(**shape, B=B, C=C, documents=documents, layout=layout, seed=seed, **options)
    problem = problem.to(dtype, "cuda")
    y, state = problem.run(selective_scan, method="triton")
    expected_y, expected_state = problem.expected()
    wide = {torch.float64: 1e-10}.get(dtype, 1e-5)
    half = max(wide, torch.finfo(dtype).eps)
    assert relative_error(y, expected_y) < half
    assert relative_error(state, expected_state) < wide
    expected = problem.to(torch.float64).gradients(selective_scan, method="cpu")
    one, other = (problem.gradients(selective_scan, method="triton") for _ in range(2))
    for name, gradient in one.items():
        tolerance = 2 * half if gradient.dtype == dtype else 4 * wide
        assert relative_error(gradient, expected[name]) < tolerance, name
        assert torch.equal(gradient, other[name]), f"{name}: two runs differ"


@pytest.mark.gpu
def test_device_compiles_captures_and_autocasts():
    problem = make(length=40).to(torch.float32, "cuda")
    expected = problem.run(selective_scan, method="triton")
    compiled = torch.compile(selective_scan, fullgraph=True)
    for one, other in zip(problem.run(compiled), expected, strict=True):
        torch.testing.assert_close(one, other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run(selective_scan)
    graph.replay()
    for one, other in zip(captured, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with torch.autocast("cuda", torch.bfloat16):
        y, state = problem.run(selective_scan)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32


@pytest.mark.gpu
def test_device_offsets_beyond_two_to_the_31():
    length, channels = 2**20 + 3, 2050  # 2.15e9 elements of u
    u = torch.zeros(1, length, channels, dtype=torch.bfloat16, device="cuda")
    u[0, -5:] = torch.randn(5, channels, device="cuda")
    B, C = (torch.randn(1, length, 1, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    A = -torch.rand(channels, 1, device="cuda")
    delta = torch.full((1, 1, 1), 0.1, dtype=torch.bfloat16, device="cuda").expand_as(u)
    y = selective_scan(u, delta, A, B, C)
    tail = slice(length - 5, None)
    expected = selective_scan(u[:, tail], delta[:, tail], A, B[:, tail], C[:, tail])
    torch.testing.assert_close(y[:, tail], expected)
    assert not y[:, : length - 5].any()
