"""Answers to the exercises of chapter 07."""

import math

import numpy as np
import torch

from minimamba import selective_scan

from . import Answers

answers = Answers()


# scan_one


@answers.right("scan_one")
def loop(u, delta, A, B, C, h):
    y = []
    for t in range(len(u)):
        h = torch.exp(delta[t] * A) * h + delta[t] * B[t] * u[t]
        y.append(C[t] * h)
    return torch.stack(y)


@answers.right("scan_one")
def in_python_numbers(u, delta, A, B, C, h):
    y = torch.empty_like(u)
    for t, (x, step, into, out) in enumerate(zip(*(v.tolist() for v in (u, delta, B, C)), strict=True)):
        h = math.exp(step * A) * h + step * into * x
        y[t] = out * h
    return y


@answers.right("scan_one")
def as_one_matrix(u, delta, A, B, C, h):
    past = torch.cumsum(delta.double(), 0)
    decays = torch.exp(A * (past[:, None] - past[None, :])).tril()
    states = decays @ (delta * B * u).double() + torch.exp(A * past) * h
    return (C * states).to(u.dtype)


@answers.wrong("scan_one", "y from h_{t−1}")
def read_first(u, delta, A, B, C, h):
    y = torch.zeros_like(u)
    for t in range(len(u)):
        y[t] = C[t] * h
        h = torch.exp(delta[t] * A) * h + delta[t] * B[t] * u[t]
    return y


@answers.wrong("scan_one", "the initial state dropped")
def from_zero(u, delta, A, B, C, h):
    return loop(u, delta, A, B, C, 0.0)


@answers.wrong("scan_one", "Δ missing in the input's weight")
def no_delta(u, delta, A, B, C, h):
    y = []
    for t in range(len(u)):
        h = torch.exp(delta[t] * A) * h + B[t] * u[t]
        y.append(C[t] * h)
    return torch.stack(y)


@answers.wrong("scan_one", "exact ZOH in place of ΔB")
def exact_hold(u, delta, A, B, C, h):
    y = []
    for t in range(len(u)):
        A_bar = torch.exp(delta[t] * A)
        h = A_bar * h + (A_bar - 1) / A * B[t] * u[t]
        y.append(C[t] * h)
    return torch.stack(y)


@answers.wrong("scan_one", "the wrong sign of A")
def minus_A(u, delta, A, B, C, h):
    return loop(u, delta, -A, B, C, h)


@answers.wrong("scan_one", "Δ of the step before in the decay")
def decay_of_the_step_before(u, delta, A, B, C, h):
    y = []
    for t in range(len(u)):
        h = torch.exp(delta[t - 1] * A) * h + delta[t] * B[t] * u[t]
        y.append(C[t] * h)
    return torch.stack(y)


@answers.wrong("scan_one", "B one step late")
def B_of_the_step_before(u, delta, A, B, C, h):
    y = []
    for t in range(len(u)):
        h = torch.exp(delta[t] * A) * h + delta[t] * B[t - 1] * u[t]
        y.append(C[t] * h)
    return torch.stack(y)


@answers.wrong("scan_one", "u one step late")
def no_input_at_first(u, delta, A, B, C, h):
    y, before = [], 0.0
    for t in range(len(u)):
        h = torch.exp(delta[t] * A) * h + delta[t] * B[t] * before
        before = u[t]
        y.append(C[t] * h)
    return torch.stack(y)


@answers.wrong("scan_one", "C forgotten")
def states_only(u, delta, A, B, C, h):
    y = []
    for t in range(len(u)):
        h = torch.exp(delta[t] * A) * h + delta[t] * B[t] * u[t]
        y.append(h)
    return torch.stack(y)


@answers.wrong("scan_one", "B and C swapped")
def other_way_round(u, delta, A, B, C, h):
    return loop(u, delta, A, C, B, h)


@answers.wrong("scan_one", "type")
def list_of_numbers(u, delta, A, B, C, h):
    return loop(u, delta, A, B, C, h).tolist()[-1]


@answers.wrong("scan_one", "shape")
def last_output_only(u, delta, A, B, C, h):
    return loop(u, delta, A, B, C, h)[-1]


@answers.wrong("scan_one", "NumPy")
def as_numpy(u, delta, A, B, C, h):
    return np.array([float(x) for x in loop(u, delta, A, B, C, h)])


@answers.wrong("scan_one", "raises")
def one_step_too_far(u, delta, A, B, C, h):
    y = []
    for t in range(len(u) + 1):
        h = torch.exp(delta[t] * A) * h + delta[t] * B[t] * u[t]
        y.append(C[t] * h)
    return torch.stack(y)


@answers.wrong("scan_one", "the new input decayed with the old state")
def input_decayed_too(u, delta, A, B, C, h):
    y = []
    for t in range(len(u)):
        h = torch.exp(delta[t] * A) * (h + delta[t] * B[t] * u[t])
        y.append(C[t] * h)
    return torch.stack(y)


# scan


@answers.right("scan")
def by_einsum(u, delta, A, B, C, D):
    h, y = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        A_bar = torch.exp(torch.einsum("bd,dn->bdn", delta[:, t], A))
        h = A_bar * h + torch.einsum("bd,bn->bdn", delta[:, t] * u[:, t], B[:, t])
        y.append(torch.einsum("bdn,bn->bd", h, C[:, t]) + D * u[:, t])
    return torch.stack(y, dim=1), h


@answers.right("scan")
def number_by_number(u, delta, A, B, C, D):
    batch, length, channels = u.shape
    y, h = torch.zeros_like(u), torch.zeros(batch, *A.shape, dtype=u.dtype)
    for i in range(batch):
        for d in range(channels):
            for t in range(length):
                h[i, d] *= torch.exp(delta[i, t, d] * A[d])
                h[i, d] += delta[i, t, d] * u[i, t, d] * B[i, t]
                y[i, t, d] = C[i, t] @ h[i, d] + D[d] * u[i, t, d]
    return y, h


@answers.right("scan")
def all_decays_at_once(u, delta, A, B, C, D):
    past = delta.double().cumsum(1)[..., None] * A.double()  # (B, L, D, N)
    decays = (past[:, :, None] - past[:, None]).exp()  # (B, t, s, D, N)
    mask = torch.ones(u.shape[1], u.shape[1]).tril().double()
    h = torch.einsum("ts,btsdn,bsd,bsn->btdn", mask, decays, (delta * u).double(), B.double())
    y = torch.einsum("btdn,btn->btd", h, C.double()) + D.double() * u.double()
    return y.to(u.dtype), h[:, -1].to(u.dtype)


@answers.right("scan")
def the_library(u, delta, A, B, C, D):
    return selective_scan(u, delta, A, B, C, D=D, return_final_state=True)


def looped(decay="Δ", read="after", last=False):
    def scan(u, delta, A, B, C, D):
        h, y = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
        for t in range(u.shape[1]):
            rate = delta[:, t - 1] if decay == "previous" else delta[:, t]
            before = h
            h = torch.exp(rate[:, :, None] * A) * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t][:, None]
            seen = before if read == "before" else h
            y.append((seen @ C[:, t, :, None])[..., 0] + D * u[:, t])
        return torch.stack(y, dim=1), before if last else h

    return scan


answers.wrong("scan", "Δ of the step before in the decay")(looped(decay="previous"))
answers.wrong("scan", "y from h_{t−1}")(looped(read="before"))
answers.wrong("scan", None)(looped(last=True))


@answers.wrong("scan", "A transposed")
def rows_and_columns_of_A(u, delta, A, B, C, D):
    h, y = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        A_bar = torch.exp(torch.einsum("bd,nd->bdn", delta[:, t], A))
        h = A_bar * h + torch.einsum("bd,bn->bdn", delta[:, t] * u[:, t], B[:, t])
        y.append(torch.einsum("bdn,bn->bd", h, C[:, t]) + D * u[:, t])
    return torch.stack(y, dim=1), h


@answers.wrong("scan", "the skip D u_t lost")
def without_skip(u, delta, A, B, C, D):
    return by_einsum(u, delta, A, B, C, torch.zeros_like(D))


@answers.wrong("scan", "the skip D without u_t")
def skip_as_bias(u, delta, A, B, C, D):
    y, h = by_einsum(u, delta, A, B, C, torch.zeros_like(D))
    return y + D, h


@answers.wrong("scan", "the skip summed over N")
def skip_inside_the_sum(u, delta, A, B, C, D):
    h, y = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        A_bar = torch.exp(delta[:, t, :, None] * A)
        h = A_bar * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None] + (D * u[:, t])[..., None]).sum(-1))
    return torch.stack(y, dim=1), h


@answers.wrong("scan", "B one step late")
def B_from_before(u, delta, A, B, C, D):
    return by_einsum(u, delta, A, torch.cat([0 * B[:, :1], B[:, :-1]], dim=1), C, D)


@answers.wrong("scan", "u one step late")
def u_from_before(u, delta, A, B, C, D):
    h, y = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        A_bar = torch.exp(delta[:, t, :, None] * A)
        h = A_bar * h + (delta[:, t] * u[:, t - 1])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(y, dim=1), h


@answers.wrong("scan", "exact ZOH in place of ΔB")
def zoh(u, delta, A, B, C, D):
    h, y = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        A_bar = torch.exp(delta[:, t, :, None] * A)
        h = A_bar * h + (A_bar - 1) / A * B[:, t, None] * u[:, t, :, None]
        y.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(y, dim=1), h


@answers.wrong("scan", "dtype")
def always_float32(u, delta, A, B, C, D):
    h, y = torch.zeros(u.shape[0], *A.shape), torch.zeros(u.shape)
    for t in range(u.shape[1]):
        h = (torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]).float()
        y[:, t] = (h * C[:, t, None]).sum(-1) + D * u[:, t]
    return y, h


@answers.wrong("scan", "count")
def outputs_only(u, delta, A, B, C, D):
    return by_einsum(u, delta, A, B, C, D)[0]


@answers.wrong("scan", "shape")
def time_first(u, delta, A, B, C, D):
    y, h = by_einsum(u, delta, A, B, C, D)
    return y.transpose(0, 1), h


@answers.wrong("scan", "shape")
def axes_left_to_luck(u, delta, A, B, C, D):
    h, y = 0.0, []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t] * A) * h + delta[:, t] * u[:, t] * B[:, t]
        y.append((h * C[:, t]).sum(-1) + D * u[:, t])
    return torch.stack(y, dim=1), h


memory = {}


@answers.wrong("scan", "remembers")
def a_state_that_stays(u, delta, A, B, C, D):
    h, y = memory.get(A.shape, torch.zeros(u.shape[0], *A.shape)).to(u.dtype), []
    if h.shape[0] != u.shape[0]:
        h = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype)
    for t in range(u.shape[1]):
        A_bar = torch.exp(delta[:, t, :, None] * A)
        h = A_bar * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
    memory[A.shape] = h.clone()
    return torch.stack(y, dim=1), h


# stream


@answers.right("stream")
def step_by_step(pieces, A):
    h = 0.0
    for u, delta, B, C in pieces:
        ys = []
        for t in range(u.shape[1]):
            h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
            ys.append((h * C[:, t, None]).sum(-1))
        yield torch.stack(ys, dim=1)


@answers.right("stream")
def with_the_library(pieces, A):
    state = None
    for u, delta, B, C in pieces:
        y, state = selective_scan(u, delta, A, B, C, initial_state=state, return_final_state=True)
        yield y


def piece_by_hand(h, u, delta, A, B, C):
    ys = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1), h


@answers.right("stream")
def state_kept_in_place(pieces, A):
    h = None
    while True:
        try:
            u, delta, B, C = next(pieces)
        except StopIteration:
            return
        h = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype) if h is None else h
        y = torch.empty_like(u)
        for t in range(u.shape[1]):
            h *= torch.exp(torch.einsum("bd,dn->bdn", delta[:, t], A))
            h += torch.einsum("bd,bd,bn->bdn", delta[:, t], u[:, t], B[:, t])
            y[:, t] = torch.einsum("bdn,bn->bd", h, C[:, t])
        yield y


@answers.right("stream")
def a_generator_expression(pieces, A):
    held = [None]

    def one(u, delta, B, C):
        y, held[0] = selective_scan(u, delta, A, B, C, initial_state=held[0], return_final_state=True)
        return y

    return (one(*piece) for piece in pieces)


@answers.wrong("stream", "the state lost between pieces")
def each_alone(pieces, A):
    for u, delta, B, C in pieces:
        yield selective_scan(u, delta, A, B, C)


@answers.wrong("stream", "the first piece's state used for all later ones")
def kept_for_good(pieces, A):
    saved = None
    for u, delta, B, C in pieces:
        y, h = selective_scan(u, delta, A, B, C, initial_state=saved, return_final_state=True)
        if saved is None:
            saved = h
        yield y


@answers.wrong("stream", "a state that is one piece old")
def too_old(pieces, A):
    older, newer = None, None
    for u, delta, B, C in pieces:
        y, h = selective_scan(u, delta, A, B, C, initial_state=older, return_final_state=True)
        older, newer = newer, h
        yield y


@answers.wrong("stream", "states added up")
def accumulated(pieces, A):
    total = 0
    for u, delta, B, C in pieces:
        start = total if isinstance(total, torch.Tensor) else None
        y, h = selective_scan(u, delta, A, B, C, initial_state=start, return_final_state=True)
        total = total + h
        yield y


@answers.wrong("stream", "all pieces taken before the first output")
def glued_and_cut(pieces, A):
    pieces = list(pieces)
    u, delta, B, C = (torch.cat(x, dim=1) for x in zip(*pieces, strict=True))
    yield from selective_scan(u, delta, A, B, C).split([piece[0].shape[1] for piece in pieces], dim=1)


@answers.wrong("stream", "type")
def yields_the_state_too(pieces, A):
    state = None
    for u, delta, B, C in pieces:
        y, state = selective_scan(u, delta, A, B, C, initial_state=state, return_final_state=True)
        yield y, state


@answers.wrong("stream", "a function without yield")
def nothing_given(pieces, A):
    state = None
    for u, delta, B, C in pieces:
        _, state = selective_scan(u, delta, A, B, C, initial_state=state, return_final_state=True)


@answers.wrong("stream", "all pieces taken before the first output")
def a_list_at_the_end(pieces, A):
    return list(with_the_library(pieces, A))


@answers.wrong("stream", "shape")
def the_last_piece_missing(pieces, A):
    waiting = None
    for y in with_the_library(pieces, A):
        if waiting is not None:
            yield waiting
        waiting = y


@answers.wrong("stream", "raises")
def state_forgotten_in_the_call(pieces, A):
    for u, delta, B, C in pieces:
        y, state = selective_scan(u, delta, A, B, C, initial_state=state, return_final_state=True)  # noqa: F821
        yield y + 0 * state.sum()


# scan_bfloat16


@answers.right("scan_bfloat16")
def all_in_float32(u, delta, A, B, C):
    out = u.dtype
    u, delta, B, C = (x.float() for x in (u, delta, B, C))
    h, y = torch.zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1))
    return torch.stack(y, dim=1).to(out), h


@answers.right("scan_bfloat16")
def all_in_float64(u, delta, A, B, C):
    y, h = piece_by_hand(0.0, u.double(), delta.double(), A.double(), B.double(), C.double())
    return y.bfloat16(), h.float()


@answers.right("scan_bfloat16")
def only_the_state_in_float32(u, delta, A, B, C):
    h, y = torch.zeros(u.shape[0], *A.shape, dtype=torch.float32), torch.empty_like(u)
    for t in range(u.shape[1]):
        h *= torch.exp(delta[:, t, :, None] * A)
        h += (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        y[:, t] = (h * C[:, t, None]).sum(-1)
    return y, h


@answers.wrong("scan_bfloat16", "the state in half precision")
def dtype_of_the_input(u, delta, A, B, C):
    h, y = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        h *= torch.exp(delta[:, t, :, None] * A)
        h += (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1))
    return torch.stack(y, dim=1), h


@answers.wrong("scan_bfloat16", "the state in half precision")
def everything_in_bfloat16(u, delta, A, B, C):
    A = A.bfloat16()
    h, y = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1))
    return torch.stack(y, dim=1), h


@answers.wrong("scan_bfloat16", "the state in half precision")
def promoted_at_the_end(u, delta, A, B, C):
    y, h = everything_in_bfloat16(u, delta, A, B, C)
    return y, h.to(torch.float32)


@answers.wrong("scan_bfloat16", "the state in half precision")
def state_stored_in_bfloat16(u, delta, A, B, C):
    h, y = torch.zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[1]):
        A_bar = torch.exp(delta[:, t, :, None].float() * A)
        h = (A_bar * h.float() + (delta[:, t].float() * u[:, t])[..., None] * B[:, t, None]).bfloat16()
        y.append((h.float() * C[:, t, None]).sum(-1))
    return torch.stack(y, dim=1).bfloat16(), h.float()


@answers.wrong("scan_bfloat16", "the decay in half precision")
def decay_rounded(u, delta, A, B, C):
    h, y = torch.zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[1]):
        A_bar = (delta[:, t, :, None] * A).to(u.dtype).exp()
        h = A_bar * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1))
    return torch.stack(y, dim=1).to(u.dtype), h


@answers.wrong("scan_bfloat16", "y left in float32")
def nothing_rounded(u, delta, A, B, C):
    y, h = all_in_float32(u.float(), delta, A, B, C)
    return y, h


@answers.wrong("scan_bfloat16", "dtype")
def in_double_to_the_end(u, delta, A, B, C):
    return piece_by_hand(0.0, *(x.double() for x in (u, delta, A, B, C)))
