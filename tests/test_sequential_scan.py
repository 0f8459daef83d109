"""The reference loop of chapter 07 against the oracle; what the public interface adds is tested beside it."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make, relative_error

from minimamba.sequential_scan import discretize_step, per_channel, selective_scan_sequential

BARE = {"D": False, "z": False, "delta_bias": False, "delta_softplus": False, "B": "grouped", "C": "grouped"}


def core(problem):
    return [problem.tensors[name] for name in ("u", "delta", "A", "B", "C", "initial_state")]


@settings(deadline=None, max_examples=50)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 30),
    per_group=st.integers(1, 4),
    states=st.integers(1, 5),
    groups=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_equals_the_oracle(batch, length, per_group, states, groups, seed):
    problem = make(batch, length, groups * per_group, states, groups, seed=seed, **BARE)
    y, h = selective_scan_sequential(*core(problem))
    expected_y, expected_h = problem.expected()
    assert relative_error(y, expected_y) < 1e-12 and relative_error(h, expected_h) < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck(groups):
    inputs = [x.requires_grad_() for x in core(make(2, 4, 2, 3, groups, **BARE))]
    assert torch.autograd.gradcheck(selective_scan_sequential, inputs)


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_resumes_anywhere(cut):
    u, delta, A, B, C, h0 = core(make(length=9, **BARE))
    y, h = selective_scan_sequential(u, delta, A, B, C, h0)
    first, saved = selective_scan_sequential(u[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], h0)
    second, last = selective_scan_sequential(u[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], saved)
    assert torch.equal(torch.cat([first, second], dim=1), y) and torch.equal(last, h)


def test_the_step_is_zoh_for_a_and_euler_for_b():
    from minimamba.discretization import zoh_euler_diagonal

    u, delta, A, B, *_ = core(make(**BARE))
    A_bar, B_bar_u = discretize_step(u[:, 0], delta[:, 0], A, B[:, 0])
    expected_A, expected_B = zoh_euler_diagonal(A.expand_as(A_bar), B[:, 0].expand_as(A_bar), delta[:, 0])
    torch.testing.assert_close(A_bar, expected_A)
    torch.testing.assert_close(B_bar_u, expected_B * u[:, 0, :, None])


def test_neighbouring_channels_share_a_group():
    B = torch.arange(6.0).reshape(1, 3, 2)  # 3 groups, N = 2
    assert per_channel(B, 6)[0, :, 0].tolist() == [0, 0, 2, 2, 4, 4]
    assert per_channel(B[:, :1], 6).shape == (1, 1, 2)


def test_the_oracle_itself_on_numbers_done_by_hand():
    # One channel, one state, two steps: h1 = 0.5 h0 + 1·2·3, h2 = 0.25 h1 + 2·1·(-1), with exp(Δ A) = 2^-Δ.
    column = lambda *values: np.array(values, dtype=np.float64).reshape(1, -1, 1)
    y, h = oracle.selective_scan(
        column(3, -1),
        column(1, 2),
        np.array([[-np.log(2)]]),
        column(2, 1),
        column(1, 10),
        D=np.ones(1),
        initial_state=np.full((1, 1, 1), 4.0),
    )
    h1 = 0.5 * 4 + 6
    h2 = 0.25 * h1 - 2
    assert y[0, :, 0].tolist() == pytest.approx([h1 + 3, 10 * h2 - 1]) and h.item() == pytest.approx(h2)
