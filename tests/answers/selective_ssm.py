"""Answers to the exercises of chapter 06."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from . import Answers

answers = Answers()


# projections


@answers.right("projections")
def split_in_three(u, W_x, W_dt, b, N):
    R = W_dt.shape[1]
    low, B, C = (u @ W_x.T).split([R, N, N], dim=-1)
    return F.softplus(low @ W_dt.T + b), B, C


@answers.right("projections")
def three_products(u, W_x, W_dt, b, N):
    R = W_dt.size(1)
    W_low, W_B, W_C = W_x[:R], W_x[R : R + N], W_x[R + N :]
    v = F.linear(F.linear(u, W_low), W_dt, b)
    return torch.logaddexp(v, torch.zeros_like(v)), F.linear(u, W_B), F.linear(u, W_C)


@answers.right("projections")
def token_by_token(u, W_x, W_dt, b, N):
    R = W_dt.shape[1]
    delta = torch.empty_like(u)
    B, C = u.new_empty(*u.shape[:2], N), u.new_empty(*u.shape[:2], N)
    for i, t in itertools.product(*map(range, u.shape[:2])):
        x = W_x @ u[i, t]
        v = W_dt @ x[:R] + b
        delta[i, t] = v.clamp(min=0) + torch.log1p(torch.exp(-v.abs()))
        B[i, t], C[i, t] = x[R : R + N], x[-N:]
    return delta, B, C


@answers.right("projections")
def in_double(u, W_x, W_dt, b, N):
    x = torch.einsum("bld,rd->blr", u.double(), W_x.double())
    v = torch.einsum("blr,dr->bld", x[..., : -2 * N], W_dt.double())
    v += b.double()
    return [y.to(u.dtype) for y in (F.softplus(v), x[..., -2 * N : -N], x[..., -N:])]


@answers.wrong("projections", "no softplus")
def raw(u, W_x, W_dt, b, N):
    low, B, C = (u @ W_x.T).split([W_dt.shape[1], N, N], dim=-1)
    return low @ W_dt.T + b, B, C


@answers.wrong("projections", "softplus applied twice")
def twice(u, W_x, W_dt, b, N):
    delta, B, C = split_in_three(u, W_x, W_dt, b, N)
    return F.softplus(delta), B, C


@answers.wrong("projections", "the bias dropped")
def no_bias(u, W_x, W_dt, b, N):
    return three_products(u, W_x, W_dt, None, N)


@answers.wrong("projections", "the bias outside softplus")
def bias_outside(u, W_x, W_dt, b, N):
    delta, B, C = no_bias(u, W_x, W_dt, b, N)
    return b + delta, B, C


@answers.wrong("projections", "one Δ for all channels")
def mean_over_channels(u, W_x, W_dt, b, N):
    delta, B, C = split_in_three(u, W_x, W_dt, b, N)
    return delta.mean(dim=2, keepdim=True).repeat(1, 1, u.shape[2]), B, C


@answers.wrong("projections", "one Δ for all channels")
def one_row_of_weights(u, W_x, W_dt, b, N):
    return split_in_three(u, W_x, W_dt[:1].expand_as(W_dt), b[:1].expand_as(b), N)


@answers.wrong("projections", "log(1 + e^v), which overflows")
def from_the_formula(u, W_x, W_dt, b, N):
    low, B, C = (u @ W_x.T).split([W_dt.shape[1], N, N], dim=-1)
    return (1 + (low @ W_dt.T + b).exp()).log(), B, C


@answers.wrong("projections", "exp in place of softplus")
def exponential(u, W_x, W_dt, b, N):
    v, B, C = raw(u, W_x, W_dt, b, N)
    return v.exp(), B, C


@answers.wrong("projections", "relu in place of softplus")
def clamped(u, W_x, W_dt, b, N):
    v, B, C = raw(u, W_x, W_dt, b, N)
    return v.clamp(min=0), B, C


@answers.wrong("projections", "B and C swapped")
def C_first(u, W_x, W_dt, b, N):
    low, C, B = (u @ W_x.T).split([W_dt.shape[1], N, N], dim=-1)
    return F.softplus(low @ W_dt.T + b), B, C


@answers.wrong("projections", "the rows of Δ taken last")
def low_at_the_end(u, W_x, W_dt, b, N):
    B, C, low = (u @ W_x.T).split([N, N, W_dt.shape[1]], dim=-1)
    return F.softplus(low @ W_dt.T + b), B, C


@answers.wrong("projections", "shape")
def low_rank_step(u, W_x, W_dt, b, N):
    low, B, C = (u @ W_x.T).split([W_dt.shape[1], N, N], dim=-1)
    return F.softplus(low.sum(-1, keepdim=True) + b[:1]), B, C[..., None]


@answers.wrong("projections", "raises")
def W_dt_not_transposed(u, W_x, W_dt, b, N):
    low, B, C = (u @ W_x.T).split([W_dt.shape[1], N, N], dim=-1)
    if W_dt.shape[0] == 1:
        return F.softplus(low @ W_dt.T + b), B, C
    return F.softplus(low @ W_dt.double() + b.double()), B, C


@answers.wrong("projections", "count")
def delta_alone(u, W_x, W_dt, b, N):
    return split_in_three(u, W_x, W_dt, b, N)[0]


# dt_bias


@answers.right("dt_bias")
def log_uniform(channels, dt_min, dt_max):
    low, high = math.log(dt_min), math.log(dt_max)
    step = torch.exp(low + (high - low) * torch.rand(channels))
    return step + torch.log(-torch.expm1(-step))


@answers.right("dt_bias")
def in_numpy_then_torch(channels, dt_min, dt_max):
    step = 10 ** np.random.default_rng().uniform(np.log10(dt_min), np.log10(dt_max), size=channels)
    return torch.from_numpy(np.log(np.expm1(step)))


@answers.right("dt_bias")
def one_by_one(channels, dt_min, dt_max):
    b = torch.zeros(channels)
    for d in range(channels):
        step = dt_min * (dt_max / dt_min) ** torch.rand(()).item()
        b[d] = math.log(math.exp(step) - 1)
    return b


@answers.right("dt_bias")
def evenly_spaced_and_shuffled(channels, dt_min, dt_max):
    step = torch.logspace(math.log2(dt_min), math.log2(dt_max), channels, base=2)[torch.randperm(channels)]
    return torch.log(torch.expm1(step))


@answers.wrong("dt_bias", "Δ itself as the bias")
def softplus_not_undone(channels, dt_min, dt_max):
    return torch.exp(torch.empty(channels).uniform_(math.log(dt_min), math.log(dt_max)))


@answers.wrong("dt_bias", "softplus in place of its inverse")
def softplus_again(channels, dt_min, dt_max):
    return F.softplus(softplus_not_undone(channels, dt_min, dt_max))


@answers.wrong("dt_bias", "log Δ as the bias")
def log_step(channels, dt_min, dt_max):
    return torch.empty(channels).uniform_(math.log(dt_min), math.log(dt_max))


@answers.wrong("dt_bias", "the wrong sign of the bias")
def negative(channels, dt_min, dt_max):
    return -log_uniform(channels, dt_min, dt_max)


@answers.wrong("dt_bias", "one draw for many channels")
def one_number(channels, dt_min, dt_max):
    return log_uniform(1, dt_min, dt_max).expand(channels)


@answers.wrong("dt_bias", "a uniform draw of Δ")
def uniform(channels, dt_min, dt_max):
    step = torch.empty(channels).uniform_(dt_min, dt_max)
    return torch.log(torch.expm1(step))


@answers.wrong("dt_bias", "a uniform draw of the bias")
def uniform_bias(channels, dt_min, dt_max):
    low, high = (math.log(math.expm1(x)) for x in (dt_min, dt_max))
    return low + (high - low) * torch.rand(channels)


@answers.wrong("dt_bias", None)
def normal_in_the_middle(channels, dt_min, dt_max):
    low, high = math.log(dt_min), math.log(dt_max)
    place = (0.5 + 0.1 * torch.randn(channels)).clamp(0, 1)
    step = torch.exp(low + (high - low) * place)
    return torch.log(torch.expm1(step))


# hidden_attention


@answers.right("hidden_attention")
def pair_by_pair(delta, A_log, B, C):
    length = len(delta)
    M = torch.zeros(length, length, dtype=delta.dtype)
    for t in range(length):
        for j in range(t + 1):
            elapsed = delta[j + 1 : t + 1].sum()
            M[t, j] = (C[t] * torch.exp(-torch.exp(A_log) * elapsed) * delta[j] * B[j]).sum()
    return M


@answers.right("hidden_attention")
def all_at_once(delta, A_log, B, C):
    clock = delta.cumsum(0)
    elapsed = (clock[:, None] - clock[None, :]).tril()
    decay = torch.exp(-elapsed[..., None] * A_log.exp())
    return torch.einsum("tn,tjn,jn->tj", C, decay, delta[:, None] * B).tril()


@answers.right("hidden_attention")
def by_impulses(delta, A_log, B, C):
    columns = []
    for j in range(len(delta)):
        h, column = torch.zeros_like(A_log), []
        for t in range(len(delta)):
            h = torch.exp(-torch.exp(A_log) * delta[t]) * h + (delta[t] * B[t] if t == j else 0)
            column.append(C[t] @ h)
        columns.append(torch.stack(column))
    return torch.stack(columns, dim=1)


@answers.right("hidden_attention")
def from_the_bottom_row(delta, A_log, B, C):
    rows, kept = [], torch.zeros(0, len(A_log), dtype=delta.dtype)
    for t in range(len(delta)):
        kept = torch.cat([kept * torch.exp(-delta[t] * torch.exp(A_log)), delta[t] * B[t : t + 1]])
        rows.append(torch.cat([kept @ C[t], delta.new_zeros(len(delta) - t - 1)]))
    return torch.stack(rows)


@answers.wrong("hidden_attention", "A = +exp(A_log)")
def growing(delta, A_log, B, C):
    clock = delta.cumsum(0)
    decay = torch.exp((clock[:, None] - clock).tril()[..., None] * torch.exp(A_log))
    return torch.einsum("tn,tjn,jn->tj", C, decay, delta[:, None] * B).tril()


@answers.wrong("hidden_attention", "A = −A_log")
def log_forgotten(delta, A_log, B, C):
    clock = delta.cumsum(0)
    decay = torch.exp(-(clock[:, None] - clock).tril()[..., None] * A_log)
    return torch.einsum("tn,tjn,jn->tj", C, decay, delta[:, None] * B).tril()


@answers.wrong("hidden_attention", "Δ_j in the decay too")
def own_step_decays(delta, A_log, B, C):
    M = torch.zeros(len(delta), len(delta), dtype=delta.dtype)
    for t, j in zip(*np.tril_indices(len(delta)), strict=True):
        M[t, j] = (C[t] * torch.exp(-torch.exp(A_log) * delta[j : t + 1].sum()) * delta[j] * B[j]).sum()
    return M


@answers.wrong("hidden_attention", "Δ_j for Δ_t in the decay")
def range_one_early(delta, A_log, B, C):
    M = torch.zeros(len(delta), len(delta), dtype=delta.dtype)
    for t, j in zip(*np.tril_indices(len(delta)), strict=True):
        M[t, j] = (C[t] * torch.exp(-torch.exp(A_log) * delta[j:t].sum()) * delta[j] * B[j]).sum()
    return M


@answers.wrong("hidden_attention", "steps counted, not Δ summed")
def powers_of_one_step(delta, A_log, B, C):
    lag = torch.arange(len(delta))
    decay = torch.exp(-torch.exp(A_log)) ** (lag[:, None] - lag).clamp(min=0)[..., None].to(delta.dtype)
    return torch.einsum("tn,tjn,jn->tj", C, decay, delta[:, None] * B).tril()


@answers.wrong("hidden_attention", "Δ_j missing at B")
def B_alone(delta, A_log, B, C):
    return pair_by_pair(delta, A_log, B / delta[:, None], C)


@answers.wrong("hidden_attention", "the exact hold's weight")
def exact_hold(delta, A_log, B, C):
    A = -torch.exp(A_log)
    return pair_by_pair(delta, A_log, torch.expm1(delta[:, None] * A) / A * B / delta[:, None], C)


@answers.wrong("hidden_attention", "B and C swapped")
def roles(delta, A_log, B, C):
    return all_at_once(delta, A_log, C, B)


@answers.wrong("hidden_attention", "M transposed")
def rows_for_columns(delta, A_log, B, C):
    return pair_by_pair(delta, A_log, B, C).mT


@answers.wrong("hidden_attention", "the diagonal left out")
def strictly_earlier(delta, A_log, B, C):
    return all_at_once(delta, A_log, B, C).tril(-1)


@answers.wrong("hidden_attention", "a quotient of decays")
def divided(delta, A_log, B, C):
    product = torch.cumprod(torch.exp(-delta[:, None] * torch.exp(A_log)), dim=0)
    return ((C * product) @ (B * delta[:, None] / product).T).tril()


@answers.wrong("hidden_attention", "a mask by multiplication")
def zero_times_infinity(delta, A_log, B, C):
    clock, mask = delta.cumsum(0), torch.ones(len(delta), len(delta)).tril()
    decay = torch.exp(-(clock[:, None] - clock)[..., None] * torch.exp(A_log))
    return torch.einsum("tn,tjn,jn->tj", C, decay, delta[:, None] * B) * mask.to(B.dtype)


@answers.wrong("hidden_attention", "the future not hidden")
def not_causal(delta, A_log, B, C):
    clock = delta.cumsum(0)
    decay = torch.exp(-(clock[:, None] - clock)[..., None] * torch.exp(A_log))
    return torch.einsum("tn,tjn,jn->tj", C, decay, delta[:, None] * B)


@answers.wrong("hidden_attention", "shape")
def a_matrix_for_each_state(delta, A_log, B, C):
    clock = delta.cumsum(0)
    decay = torch.exp(-(clock[:, None] - clock).tril()[..., None] * torch.exp(A_log))
    return C[:, None] * decay * delta[:, None] * B


# fool


@answers.right("fool")
def first_change(K, noise):
    if K[0] * noise != 0:
        return torch.zeros(0), torch.tensor([noise])
    for k in range(1, len(K)):
        if K[k] != K[k - 1]:
            a = torch.zeros(k)
            a[0] = 5
            return a, torch.cat([a, torch.tensor([noise])])
    return torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])


@answers.right("fool")
def try_everything(K, noise):
    def last(line):
        return sum(float(K[len(line) - 1 - j]) * x for j, x in enumerate(line))

    for length in range(len(K)):
        for line in itertools.product([-1.0, 0.0, 2.0], repeat=length):
            for place in range(length + 1):
                longer = [*line[:place], noise, *line[place:]]
                if abs(last(line) - last(longer)) > 0.01:
                    return torch.tensor(line), torch.tensor(longer)
    return torch.tensor([0.0, 3.0]), torch.tensor([3.0, 0.0])


@answers.right("fool")
def unit_lines(K, noise):
    padded = torch.cat([torch.zeros(1, dtype=K.dtype), K])
    felt = (padded.diff() + K[0] * noise).clone()
    felt[0] = K[0] * noise
    if (felt == 0).all():
        return [7.0, -2.0], [-2.0, 7.0]
    k = int((felt != 0).nonzero()[0])
    line = [1.0] + [0.0] * (k - 1) if k else []
    return line, [*line, noise]


@answers.wrong("fool", "a noise token that this system does not feel")
def noise_alone(K, noise):
    return torch.zeros(0), torch.tensor([noise])


@answers.wrong("fool", "two orders that this system tells apart")
def swap_two(K, noise):
    return torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])


@answers.wrong("fool", "the same line twice")
def nothing_done(K, noise):
    return torch.ones(2), torch.ones(2)


@answers.wrong("fool", "a noise token that this system does not feel")
def noise_after_one(K, noise):
    return torch.tensor([1.0]), torch.tensor([1.0, noise])


@answers.wrong("fool", "the two lines swapped")
def the_other_way_round(K, noise):
    return first_change(K, noise)[::-1]


@answers.wrong("fool", None)
def any_two_lines(K, noise):
    return torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])


@answers.wrong("fool", "raises")
def out_of_range(K, noise):
    k = 0
    while K[k] == K[k + 1]:
        k += 1
    a = torch.eye(k + 1)[0]
    return a, torch.cat([a, torch.tensor([noise])])


answers.equivalent("fool", "5 -> 6", "Any token will do.")
answers.equivalent("fool", "5 -> 4", "Any token will do.")


@answers.wrong("dt_bias", "the same numbers in every call")
def _(channels, dt_min, dt_max):
    random = torch.Generator().manual_seed(0)
    step = dt_min * (dt_max / dt_min) ** torch.rand(channels, generator=random)
    return torch.log(torch.expm1(step))


@answers.wrong("dt_bias", "the same numbers in every call")
def _(channels, dt_min, dt_max):
    return torch.log(torch.expm1(dt_min * (dt_max / dt_min) ** torch.linspace(0, 1, channels)))


def by_hand(delta, A_log, B, C, fades, comes_in):
    M = torch.zeros(len(delta), len(delta), dtype=delta.dtype)
    for t in range(len(delta)):
        for j in range(t + 1):
            M[t, j] = (C[t] * torch.exp(-torch.exp(A_log) * fades(t, j)) * B[j]).sum() * comes_in(t, j)
    return M


@answers.wrong("hidden_attention", "Δ_t in place of Δ_j at B")
def _(delta, A_log, B, C):
    return by_hand(delta, A_log, B, C, lambda t, j: delta[j + 1 : t + 1].sum(), lambda t, j: delta[t])


@answers.wrong("hidden_attention", "Δ_t for each step")
def _(delta, A_log, B, C):
    return by_hand(delta, A_log, B, C, lambda t, j: (t - j) * delta[t], lambda t, j: delta[j])


@answers.right("hidden_attention")
def _(delta, A_log, B, C):
    state, rows = torch.zeros(len(delta), len(A_log), dtype=delta.dtype), []
    for t in range(len(delta)):  # one state for each input, all at once
        state = state * torch.exp(-delta[t] * A_log.exp())
        state[t] = delta[t] * B[t]
        rows.append(state @ C[t])
    return torch.stack(rows)
