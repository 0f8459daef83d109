"""The teaching kernels of chapter 10, in the interpreter and compiled; the GPU runs share the same checks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import lay_out, relative_error

from minimamba import triton_scan
from minimamba.triton_scan import linear_scan_triton, scan_blocks_with_carry, scan_one_block


def draw(shape, seed=0, dtype=torch.float64):
    """a in (0, 1), some near either end, b and the initial state normal."""
    rng = np.random.default_rng(seed)
    a = torch.from_numpy(np.exp(-(10 ** rng.uniform(-3, 1, shape))))
    b = torch.from_numpy(rng.standard_normal(shape))
    start = torch.from_numpy(rng.standard_normal(shape[:1] + shape[2:]))
    return a.to(dtype), b.to(dtype), start.to(dtype)


def oracle(a, b, start, reverse=False):
    """The recurrence, one step after another, in NumPy float64."""
    a, b, h = (x.cpu().double().numpy() for x in (a, b, start))
    out = np.empty_like(b)
    for t in reversed(range(b.shape[1])) if reverse else range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        out[:, t] = h
    return torch.from_numpy(out)


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 70),
    rest=st.lists(st.integers(1, 3), max_size=2),
    layout=st.sampled_from(["contiguous", "transposed", "poisoned", "expanded"]),
    reverse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_layout_and_direction(length, rest, layout, reverse, seed):
    a, b, start = (lay_out(x, layout) for x in draw((2, length, *rest), seed))
    h = linear_scan_triton(a, b, start, reverse=reverse)
    assert relative_error(h, oracle(a, b, start, reverse)) < 1e-12


@pytest.mark.parametrize("length", [1, 16, 17, 1024, 1025, 2500])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_carry_crosses_blocks(length, reverse):
    a, b, start = draw((1, length), seed=length)
    h = linear_scan_triton(a, b, start, reverse=reverse)
    assert relative_error(h, oracle(a, b, start, reverse)) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_the_first_two_kernels(length):
    a, b, start = draw((1, length), seed=length)
    expected = oracle(a, b, torch.zeros_like(start))[0]
    for layout in ("contiguous", "poisoned"):
        x, y = lay_out(a[0], layout), lay_out(b[0], layout)
        assert relative_error(scan_one_block(x, y), expected) < 1e-12
        assert relative_error(scan_blocks_with_carry(x, y, block=16), expected) < 1e-12


def test_kernels_stay_inside_their_tensors():
    # NaN around the inputs: a number read beyond an end poisons what it meets. A mark around the output: a number
    # written there shows, which NaN would hide, since what is computed from NaN is NaN.
    from minimamba.kernels import linear_scan

    a, b, _ = draw((1, 21))
    large = torch.full((3, 64), torch.nan, dtype=torch.float64)
    large[0, 8:29], large[1, 8:29], large[2] = a[0], b[0], -77.0
    x, y, h = (row[8:29] for row in large)
    linear_scan.scan_one_block_kernel[(1,)](x, y, h, 21, BLOCK=32)
    assert relative_error(h[None], oracle(a, b, torch.zeros(1, dtype=torch.float64))) < 1e-12
    h.fill_(torch.nan)
    linear_scan.scan_blocks_with_carry_kernel[(1,)](x, y, h, 21, BLOCK=16)
    assert relative_error(h[None], oracle(a, b, torch.zeros(1, dtype=torch.float64))) < 1e-12
    assert (large[2, :8] == -77).all() and (large[2, 29:] == -77).all()


# One unit in the last place for half precision: the interpreter truncates where a GPU rounds.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def check_dtype(dtype, device, shape):
    for reverse in (False, True):
        a, b, start = (x.to(device) for x in draw(shape, dtype=dtype))
        h = linear_scan_triton(a, b, start, reverse=reverse)
        assert h.dtype == dtype
        assert relative_error(h, oracle(a, b, start, reverse)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    check_dtype(dtype, "cpu", (2, 90, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_device(dtype):
    check_dtype(dtype, "cuda", (3, 2500, 7))


def test_the_reverse_scan_is_the_forward_one_flipped():
    a, b, start = draw((2, 33, 2))
    flipped = linear_scan_triton(a.flip(1), b.flip(1), start).flip(1)
    torch.testing.assert_close(linear_scan_triton(a, b, start, reverse=True), flipped, rtol=0, atol=1e-13)


def test_equals_the_scans_of_the_other_chapters():
    from minimamba.parallel_scan import blelloch, combine
    from minimamba.scan_gradient import linear_scan

    a, b, start = draw((2, 40, 3))
    h = linear_scan_triton(a, b, start)
    torch.testing.assert_close(h, linear_scan(a, b, start), rtol=0, atol=1e-12)
    _, other = blelloch(combine, (a.movedim(1, 0), b.movedim(1, 0)))
    torch.testing.assert_close(linear_scan_triton(a, b), other.movedim(0, 1), rtol=0, atol=1e-12)


# --- compiling -----------------------------------------------------------------------------------------

MODULE = "minimamba.kernels.linear_scan"
STRIDES = "a_batch a_t a_rest b_batch b_t b_rest start_batch start_rest h_batch h_t h_rest"


def job(name, dtype="fp32", capability=90, **constants):
    arguments = ["a", "b", "h"] + (["initial_state"] if name == "scan_rows_kernel" else [])
    counts = ["L"] + (["rest", *STRIDES.split()] if name == "scan_rows_kernel" else [])
    signature = dict.fromkeys(arguments, f"*{dtype}") | dict.fromkeys(counts, "i32")
    return {
        "kernel": (MODULE, name), "signature": signature, "constants": {"BLOCK": 128} | constants,
        "capability": capability, "num_warps": 4,
    }  # fmt: skip


def test_every_kernel_compiles_for_a_gpu():
    jobs = []
    for capability in (80, 90):
        jobs += [
            job(name, capability=capability) for name in ("scan_one_block_kernel", "scan_blocks_with_carry_kernel")
        ]
        for dtype in ("bf16", "fp16", "fp32", "fp64"):
            wide = "fp64" if dtype == "fp64" else "fp32"
            jobs += [
                job("scan_rows_kernel", dtype, capability, REVERSE=reverse, DTYPE=wide) for reverse in (False, True)
            ]
    for made, asked in zip(triton_scan.compile_kernels(jobs), jobs, strict=True):
        assert f".target sm_{asked['capability']}" in made["ptx"]
        assert 0 < made["registers"] <= 255 and made["stack"] == 0


def test_a_kernel_that_does_not_compile_says_why():
    wrong = job("scan_one_block_kernel")
    wrong["constants"] = {"BLOCK": 100}  # not a power of two
    with pytest.raises(RuntimeError, match=r"triton: compilation failed(.|\n)*power of 2"):
        triton_scan.compile_kernels([wrong])


# --- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "error", "arguments"),
    [
        ("a: expected shape", ValueError, (torch.ones(2, 3), torch.ones(2, 4))),
        ("b: expected shape", ValueError, (torch.ones(4), torch.ones(4))),
        ("b: expected L >= 1", ValueError, (torch.ones(2, 0), torch.ones(2, 0))),
        ("b: expected a real tensor", TypeError, (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.complex64))),
        ("a: expected a torch.Tensor", TypeError, (1.0, torch.ones(2, 3))),
        ("initial_state: expected shape", ValueError, (torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))),
    ],
)
def test_bad_input_is_named(message, error, arguments):
    with pytest.raises(error, match=rf"^{message}"):
        linear_scan_triton(*arguments)


def test_a_block_is_a_power_of_two():
    with pytest.raises(ValueError, match=r"^block: expected a power of two"):
        scan_blocks_with_carry(torch.ones(5), torch.ones(5), block=48)


def test_a_cell_goes_on_where_triton_has_no_build(monkeypatch, capsys):
    cells = []

    class Shell:
        def register_magic_function(self, function, kind, name):
            assert (kind, name) == ("cell", "triton")
            self.magic = function

        def run_cell(self, cell):
            cells.append(cell)
            return self

        def raise_error(self):
            cells.append("raised")

    shell = Shell()
    triton_scan.load_ipython_extension(shell)
    shell.magic("", "x = 1")
    assert cells == ["x = 1", "raised"] and capsys.readouterr().out == ""
    monkeypatch.setattr(triton_scan, "TRITON_IS_INSTALLED", False)
    shell.magic("", "x = 2")
    assert "x = 2" not in cells and "Triton has no build for this system" in capsys.readouterr().out


def test_loops_and_rows_in_machine_code():
    sass = """
.L_x_0:
        /*0000*/                   MUFU.EX2 R1, R2 ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   MUFU.EX2 R1, R2 ;
        /*0030*/                   MUFU.EX2 R3, R2 ;
        /*0040*/                   FMUL R1, R1, R3 ;
        /*0050*/                   MUFU.EX2 R3, R2 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""
    loop = triton_scan.longest_loop(sass)
    assert [instruction.split()[0] for instruction in loop] == ["MUFU.EX2", "MUFU.EX2", "FMUL", "MUFU.EX2", "@P0"]
    assert triton_scan.row_length(loop, "MUFU") == pytest.approx(5 / 3)
