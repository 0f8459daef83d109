"""The parallel scans of chapter 08: any operator, any length, counted work, and the selective scan on top."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make, relative_error

from minimamba import parallel_scan
from minimamba.parallel_scan import CHUNK, Counted, blelloch, chunked, combine, hillis_steele, selective_scan_parallel

SCANS = [hillis_steele, blelloch]
BARE = {"D": False, "z": False, "delta_bias": False, "delta_softplus": False, "B": "grouped", "C": "grouped"}


def core(problem):
    return [problem.tensors[name] for name in ("u", "delta", "A", "B", "C", "initial_state")]


def one_by_one(operator, elements):
    """The inclusive scan as its definition says: fold from the left."""
    results = [tuple(x[:1] for x in elements)]
    for t in range(1, len(elements[0])):
        results.append(operator(results[-1], tuple(x[t : t + 1] for x in elements)))
    return tuple(torch.cat(xs) for xs in zip(*results, strict=True))


def matrix_product(left, right):
    """An operator that is associative and as far from commutative as can be."""
    return (left[0] @ right[0],)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("length", [*range(1, 34), 63, 64, 65, 100])
def test_any_length_and_any_operator(scan, length):
    torch.manual_seed(length)
    matrices = (torch.linalg.qr(torch.randn(length, 3, 3, dtype=torch.float64))[0],)
    assert relative_error(scan(matrix_product, matrices)[0], one_by_one(matrix_product, matrices)[0]) < 1e-12
    pairs = torch.rand(length, 2, dtype=torch.float64), torch.randn(length, 2, dtype=torch.float64)
    for got, expected in zip(scan(combine, pairs), one_by_one(combine, pairs), strict=True):
        assert got.shape == expected.shape and relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("scan", SCANS)
def test_chunks_with_a_carry_equal_the_whole(scan):
    torch.manual_seed(0)
    a, b = torch.rand(50, 2, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    carry = (torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
    pieces = []
    for start, stop in ((0, 7), (7, 8), (8, 31), (31, 50)):
        pieces.append(chunked(combine, (a[start:stop], b[start:stop]), carry, scan))
        carry = tuple(x[-1:] for x in pieces[-1])
    for got, expected in zip(zip(*pieces, strict=True), one_by_one(combine, (a, b)), strict=True):
        assert relative_error(torch.cat(got), expected) < 1e-12


def test_work_and_depth_are_those_of_the_papers():
    for k in range(1, 9):
        length = 2**k
        for scan, work, depth in (
            (hillis_steele, length * k - length + 1, k),
            (blelloch, 2 * length - 2 - k, 2 * k - 1),
        ):
            counted = Counted(combine)
            scan(counted, (torch.ones(length), torch.ones(length)))
            assert (counted.operations, counted.depth) == (work, depth)


@pytest.mark.parametrize("length", [1, 3, 7, 100, 1000])
def test_work_and_depth_are_bounded_at_any_length(length):
    levels = math.ceil(math.log2(length))
    for scan, work, depth in ((hillis_steele, length * levels, levels), (blelloch, 2 * length, 2 * levels)):
        counted = Counted(combine)
        scan(counted, (torch.ones(length), torch.ones(length)))
        assert counted.operations <= work and counted.depth <= depth


def test_the_join_is_associative_and_does_not_commute():
    x, y, z = (tuple(torch.randn(2, 9, dtype=torch.float64)) for _ in range(3))
    left, right = combine(combine(x, y), z), combine(x, combine(y, z))
    for p, q in zip(left, right, strict=True):
        torch.testing.assert_close(p, q)
    assert not torch.allclose(combine(x, y)[1], combine(y, x)[1])


@pytest.mark.parametrize("algorithm", ["hillis_steele", "blelloch", "chunked"])
def test_the_selective_scan_equals_the_oracle(algorithm):
    @settings(deadline=None, max_examples=40)
    @given(
        batch=st.integers(1, 3),
        length=st.one_of(st.integers(1, 20), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])),
        per_group=st.integers(1, 2),
        states=st.integers(1, 4),
        groups=st.integers(1, 2),
        seed=st.integers(0, 999),
    )
    def check(batch, length, per_group, states, groups, seed):
        problem = make(batch, length, groups * per_group, states, groups, seed=seed, **BARE)
        y, h = selective_scan_parallel(*core(problem), algorithm)
        expected_y, expected_h = problem.expected()
        assert relative_error(y, expected_y) < 1e-12 and relative_error(h, expected_h) < 1e-12

    check()


@pytest.mark.parametrize("algorithm", ["hillis_steele", "blelloch", "chunked"])
def test_gradcheck(algorithm):
    inputs = [x.requires_grad_() for x in core(make(1, 5, 2, 2, 2, **BARE))]
    assert torch.autograd.gradcheck(lambda *x: selective_scan_parallel(*x, algorithm), inputs)


def test_gradcheck_across_chunk_borders(monkeypatch):
    steps = []

    def spy(operator, elements, carry):
        steps.append(len(elements[0]))
        return chunked(operator, elements, carry)

    monkeypatch.setattr(parallel_scan, "CHUNK", 2)
    monkeypatch.setattr(parallel_scan, "chunked", spy)
    inputs = [x.requires_grad_() for x in core(make(1, 5, 2, 2, 2, **BARE))]
    assert torch.autograd.gradcheck(lambda *x: selective_scan_parallel(*x, "chunked"), inputs)
    assert steps[:3] == [2, 2, 1]


@pytest.mark.parametrize("algorithm", ["hillis_steele", "blelloch", "chunked"])
def test_decays_that_underflow_stay_finite(algorithm):
    u, delta, A, B, C, h0 = (x.float() for x in core(make(1, 200, 2, 2, **BARE)))
    y, h = selective_scan_parallel(u, delta * 100, A, B, C, h0, algorithm)
    assert y.isfinite().all() and h.isfinite().all()
