"""Answers to the exercises of chapter 12."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import Answers

answers = Answers()


# convolution


@answers.right("convolution")
def sum_of_taps(x, weight, bias):
    length, taps = x.shape[1], weight.shape[1]
    past = F.pad(x, (0, 0, taps - 1, 0))
    total = bias + sum(weight[:, k] * past[:, k : k + length] for k in range(taps))
    return total * torch.sigmoid(total)


@answers.right("convolution")
def by_conv1d(x, weight, bias):
    y = F.conv1d(x.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[1]]).mT


@answers.right("convolution")
def windows(x, weight, bias):
    batch, _, channels = x.shape
    padded = torch.cat([x.new_zeros(batch, weight.shape[1] - 1, channels), x], dim=1)
    return F.silu(torch.einsum("bldw,dw->bld", padded.unfold(1, weight.shape[1], 1), weight) + bias)


@answers.right("convolution")
def step_by_step(x, weight, bias):
    out = x.clone()
    for t in range(x.shape[1]):
        total = bias.clone()
        for back in range(min(t + 1, weight.shape[1])):
            total = total + x[:, t - back] * weight[:, -1 - back]
        out[:, t] = F.silu(total)
    return out


def conv(x, weight, bias, padding, start=0, stop=None, function=F.silu):
    y = F.conv1d(F.pad(x.mT, padding), weight[:, None], bias, groups=x.shape[2])
    return function(y[..., start:stop]).mT


@answers.wrong("convolution", "the output not truncated")
def too_long(x, weight, bias):
    return F.silu(F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=x.shape[2])).mT


@answers.wrong("convolution", "the last L outputs kept")
def wrong_end(x, weight, bias):
    y = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=x.shape[2])
    return F.silu(y[..., -x.shape[1] :]).mT


@answers.wrong("convolution", "the last L outputs kept")
def front_cut_off(x, weight, bias):
    history = weight.shape[1] - 1
    return conv(x, weight, bias, (history, history), history)


@answers.wrong("convolution", 'padding="same"')
def same(x, weight, bias):
    behind = weight.shape[1] // 2
    return conv(x, weight, bias, (weight.shape[1] - 1 - behind, behind))


@answers.wrong("convolution", "the output one step late")
def late(x, weight, bias):
    return conv(x, weight, bias, (weight.shape[1], 0), 0, x.shape[1])


@answers.wrong("convolution", "the output one step late")
def last_input_not_read(x, weight, bias):
    return sum_of_taps(F.pad(x, (0, 0, 1, 0))[:, :-1], weight, bias)


@answers.wrong("convolution", "the output one step early")
def early(x, weight, bias):
    history = weight.shape[1] - 1
    return conv(x, weight, bias, (history, history), 1, 1 + x.shape[1])


@answers.wrong("convolution", "the taps mirrored")
def as_in_mathematics(x, weight, bias):
    total = torch.zeros_like(x) + bias
    for t in range(x.shape[1]):
        for k in range(min(t + 1, weight.shape[1])):
            total[:, t] += weight[:, k] * x[:, t - k]
    return F.silu(total)


@answers.wrong("convolution", "the SiLU forgotten")
def linear(x, weight, bias):
    return conv(x, weight, bias, (weight.shape[1] - 1, 0), function=torch.clone)


@answers.wrong("convolution", "the SiLU before the convolution")
def silu_first(x, weight, bias):
    return linear(F.silu(x), weight, bias)


@answers.wrong("convolution", "the bias added after the SiLU")
def bias_outside(x, weight, bias):
    return bias + by_conv1d(x, weight, torch.zeros_like(bias))


@answers.wrong("convolution", "the bias forgotten")
def no_bias(x, weight, bias):
    return F.silu(F.conv1d(F.pad(x.mT, (weight.shape[1] - 1, 0)), weight[:, None], groups=x.shape[2]).mT)


@answers.wrong("convolution", "a sigmoid in place of the SiLU")
def sigmoid(x, weight, bias):
    return linear(x, weight, bias).sigmoid()


@answers.wrong("convolution", "the first step repeated in place of zeros")
def repeated(x, weight, bias):
    padded = torch.cat([x[:, :1]] * (weight.shape[1] - 1) + [x], dim=1)
    return F.silu(F.conv1d(padded.mT, weight[:, None], bias, groups=x.shape[2]).mT)


@answers.wrong("convolution", "shape")
def channels_first(x, weight, bias):
    return by_conv1d(x, weight, bias).mT


@answers.wrong("convolution", "raises")
def groups_forgotten(x, weight, bias):
    return F.silu(F.conv1d(F.pad(x.mT, (weight.shape[1] - 1, 0)), weight[:, None], bias)).mT


@answers.wrong("convolution", "changes its input")
def in_place(x, weight, bias):
    for t in reversed(range(x.shape[1])):
        past = [x[:, t - k] * weight[:, -1 - k] for k in range(min(t + 1, weight.shape[1]))]
        x[:, t] = F.silu(sum(past) + bias)
    return x


@answers.wrong("convolution", None)
def four_taps_always(x, weight, bias):
    return by_conv1d(x, F.pad(weight, (0, 4))[:, :4], bias)


answers.equivalent(
    "convolution", "0 -> 1, place 3", "One more zero behind the end, which no step that is kept looks at."
)


# parameters


@answers.right("parameters")
def tensor_by_tensor(d_model, d_state, d_conv, expand):
    inner = expand * d_model
    rank = (d_model + 15) // 16
    in_proj = d_model * 2 * inner
    conv1d = inner * d_conv + inner
    x_proj = inner * (rank + 2 * d_state)
    dt_proj = rank * inner + inner
    return in_proj + conv1d + x_proj + dt_proj + inner * d_state + inner + inner * d_model


@answers.right("parameters")
def in_one_line(d_model, d_state, d_conv, expand):
    return expand * d_model * (3 * d_model + 2 * math.ceil(d_model / 16) + 3 * d_state + d_conv + 3)


@answers.right("parameters")
def by_layers(d_model, d_state, d_conv, expand):
    inner, rank, device = expand * d_model, -(-d_model // 16), "meta"
    layers = [
        nn.Linear(d_model, 2 * inner, bias=False, device=device),
        nn.Conv1d(inner, inner, d_conv, groups=inner, device=device),
        nn.Linear(inner, rank + 2 * d_state, bias=False, device=device),
        nn.Linear(rank, inner, device=device),
        nn.Linear(inner, d_model, bias=False, device=device),
    ]
    return inner * d_state + inner + sum(p.numel() for layer in layers for p in layer.parameters())


@answers.right("parameters")
def as_numpy_integer(d_model, d_state, d_conv, expand):
    d, N, W, E = np.array([d_model, d_state, d_conv, expand * d_model])
    R = np.ceil(d / 16).astype(int)
    return np.dot([2 * d, W + 1, R + 2 * N, R + 1, N, 1, d], [E] * 7)


def total(d, N, W, expand, R=None, E=None, extra=0):
    E, R = E or expand * d, math.ceil(d / 16) if R is None else R
    return 2 * d * E + E * W + E + E * R + 2 * E * N + R * E + E + E * N + E + E * d + extra


@answers.wrong("parameters", "D or a bias forgotten")
def no_D(d, N, W, expand):
    return in_one_line(d, N, W, expand) - expand * d


@answers.wrong("parameters", "D or a bias forgotten")
def no_convolution_bias(d, N, W, expand):
    E, R = d * expand, math.ceil(d / 16)
    return 2 * d * E + E * W + E * (R + 2 * N) + E * (R + 1) + E * N + E + E * d


@answers.wrong("parameters", "two of D and the two biases forgotten")
def no_bias_at_all(d, N, W, expand):
    E, R = d * expand, math.ceil(d / 16)
    return 2 * d * E + E * W + E * (R + 2 * N) + E * R + E * N + E + E * d


@answers.wrong("parameters", "in_proj made for x alone, or out_proj forgotten")
def half_of_in_proj(d, N, W, expand):
    return total(d, N, W, expand) - d * d * expand


@answers.wrong("parameters", "A forgotten, or B and C taken for one")
def one_of_B_and_C(d, N, W, expand):
    E, R = d * expand, math.ceil(d / 16)
    return 2 * d * E + E * (W + 1) + E * (R + N) + E * (R + 1) + E * N + E + E * d


@answers.wrong("parameters", "A shared by all channels")
def one_A(d, N, W, expand):
    E, R = d * expand, math.ceil(d / 16)
    return 2 * d * E + E * (W + 1) + E * (R + 2 * N) + E * (R + 1) + N + E + E * d


@answers.wrong("parameters", "a convolution across channels")
def dense_convolution(d, N, W, expand):
    E, R = d * expand, math.ceil(d / 16)
    return 2 * d * E + E * E * W + E + E * (R + 2 * N) + E * (R + 1) + E * N + E + E * d


@answers.wrong("parameters", "the rank of Δ rounded down")
def rounded_down(d, N, W, expand):
    return total(d, N, W, expand, R=d // 16)


@answers.wrong("parameters", "the rank of Δ rounded down")
def rounded_down_to_one_at_least(d, N, W, expand):
    return total(d, N, W, expand, R=max(d // 16, 1))


@answers.wrong("parameters", "a Δ of full rank")
def full_rank(d, N, W, expand):
    return total(d, N, W, expand, R=d * expand)


@answers.wrong("parameters", "d_model for the inner width")
def not_expanded(d, N, W, expand):
    return total(d, N, W, expand, E=d)


@answers.wrong("parameters", "a bias in in_proj and out_proj")
def biases_everywhere(d, N, W, expand):
    return total(d, N, W, expand, extra=2 * expand * d + d)


@answers.wrong("parameters", "type")
def prints_it(d, N, W, expand):
    total(d, N, W, expand)


@answers.wrong("parameters", "the rank of Δ not rounded")
def rank_not_rounded(d, N, W, expand):
    return total(d, N, W, expand, R=d / 16)


# step


@answers.right("step")
def one_token(w, h, conv_state, ssm_state):
    rank, size = w["dt_proj.weight"].shape[1], w["A_log"].shape[1]
    x, z = (h @ w["in_proj.weight"].T).chunk(2, dim=-1)
    window = torch.cat([conv_state, x[..., None]], dim=-1)
    u = F.silu((window * w["conv1d.weight"][:, 0]).sum(-1) + w["conv1d.bias"])
    dt, B, C = (u @ w["x_proj.weight"].T).split([rank, size, size], dim=-1)
    delta = F.softplus(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"])[..., None]
    state = torch.exp(-delta * torch.exp(w["A_log"])) * ssm_state + delta * u[..., None] * B[:, None]
    y = (state * C[:, None]).sum(-1) + w["D"] * u
    return (y * F.silu(z)) @ w["out_proj.weight"].T, window[..., 1:], state


@answers.right("step")
def in_place_on_the_states(w, h, conv_state, ssm_state):
    inner = len(w["D"])
    both = F.linear(h, w["in_proj.weight"])
    window = torch.cat([conv_state, both[:, :inner, None]], dim=-1)
    conv_state.copy_(window[..., 1:])
    u = F.silu(F.conv1d(window, w["conv1d.weight"], w["conv1d.bias"], groups=inner))[..., 0]
    rank, size = w["dt_proj.weight"].shape[1], w["A_log"].shape[1]
    parts = F.linear(u, w["x_proj.weight"])
    delta = F.softplus(F.linear(parts[:, :rank], w["dt_proj.weight"], w["dt_proj.bias"]))
    B, C = parts[:, rank : rank + size], parts[:, rank + size :]
    ssm_state *= torch.exp(torch.einsum("bd,dn->bdn", delta, -w["A_log"].exp()))
    ssm_state += torch.einsum("bd,bn->bdn", delta * u, B)
    y = torch.einsum("bdn,bn->bd", ssm_state, C) + u * w["D"]
    z = both[:, inner:]
    return F.linear(y * z * torch.sigmoid(z), w["out_proj.weight"]), conv_state, ssm_state


@answers.right("step")
def in_double_with_loops(w, h, conv_state, ssm_state):
    dtype, w = h.dtype, {name: x.double() for name, x in w.items()}
    inner, size = w["A_log"].shape
    rank = w["dt_proj.weight"].shape[1]
    projected = h.double() @ w["in_proj.weight"].T
    x, z = projected[:, :inner], projected[:, inner:]
    past = conv_state.double()
    u = w["conv1d.bias"] + w["conv1d.weight"][:, 0, -1] * x
    for k in range(past.shape[-1]):
        u = u + w["conv1d.weight"][:, 0, k] * past[..., k]
    u = u / (1 + torch.exp(-u))
    made = u @ w["x_proj.weight"].T
    delta = torch.log1p(torch.exp(made[:, :rank] @ w["dt_proj.weight"].T + w["dt_proj.bias"]))
    states, y = [], w["D"] * u
    for n in range(size):
        decay = torch.exp(-delta * torch.exp(w["A_log"][:, n]))
        states.append(decay * ssm_state[..., n].double() + delta * made[:, rank + n, None] * u)
        y = y + states[-1] * made[:, rank + size + n, None]
    out = (y * F.silu(z)) @ w["out_proj.weight"].T
    new = torch.cat([past[..., 1:], x[..., None]], dim=-1)
    return [result.to(dtype) for result in (out, new, torch.stack(states, dim=-1))]


answers.equivalent("step", "-1 -> 1", "A matrix (B, 2 E) is split along its last axis, which is axis 1.")
answers.equivalent("step", "-1 -> 1, place 3", "The same for (B, R + 2 N).")
answers.equivalent("step", "0 -> -1", "The middle axis of the convolution's weight has one entry.")


def slip(gate=lambda y, z: y * F.silu(z), act=F.silu, positive=F.softplus, decay=lambda a: -a.exp(), skip=True):
    """A step with something else in one place."""

    def step(w, h, conv_state, ssm_state):
        N = w["A_log"].shape[1]
        projected = h @ w["in_proj.weight"].T
        x, z = projected.split(len(w["D"]), dim=1)
        window = torch.cat([conv_state, x.unsqueeze(2)], dim=2)
        u = act(torch.einsum("bdw,dw->bd", window, w["conv1d.weight"].squeeze(1)) + w["conv1d.bias"])
        dt, B, C = (u @ w["x_proj.weight"].T).split([w["dt_proj.weight"].shape[1], N, N], dim=1)
        delta = positive(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"]).unsqueeze(2)
        state = torch.exp(delta * decay(w["A_log"])) * ssm_state + delta * B.unsqueeze(1) * u.unsqueeze(2)
        y = torch.einsum("bdn,bn->bd", state, C)
        y = y + w["D"] * u if skip else y
        return gate(y, z) @ w["out_proj.weight"].T, window[:, :, 1:], state

    return step


answers.wrong("step", "the SiLU on y in place of z")(slip(gate=lambda y, z: z * F.silu(y)))
answers.wrong("step", "the SiLU on y and on z")(slip(gate=lambda y, z: F.silu(z) * F.silu(y)))
answers.wrong("step", "the gate without its SiLU")(slip(gate=lambda y, z: z * y))
answers.wrong("step", "no gate")(slip(gate=lambda y, z: y))
answers.wrong("step", "no SiLU after the convolution")(slip(act=torch.clone))
answers.wrong("step", "the softplus forgotten")(slip(positive=torch.clone))
answers.wrong("step", "A without its minus")(slip(decay=torch.exp))
answers.wrong("step", "A_log read as A")(slip(decay=torch.clone))
answers.wrong("step", "the skip D lost")(slip(skip=False))
answers.wrong("step", None)(slip(act=torch.tanh))


@answers.wrong("step", "a stale convolution state")
def window_never_moves(w, h, conv_state, ssm_state):
    out, _, state = one_token(w, h, conv_state, ssm_state)
    return out, conv_state, state


@answers.wrong("step", "a stale convolution state")
def newest_dropped(w, h, conv_state, ssm_state):
    out, new, state = one_token(w, h, conv_state, ssm_state)
    return out, torch.cat([conv_state[..., :1], new], dim=-1)[..., :-1], state


@answers.wrong("step", "the whole window kept")
def grows(w, h, conv_state, ssm_state):
    out, new, state = one_token(w, h, conv_state, ssm_state)
    return out, torch.cat([conv_state, new[..., -1:]], dim=-1), state


@answers.wrong("step", "u kept in place of x")
def keeps_u(w, h, conv_state, ssm_state):
    out, new, state = one_token(w, h, conv_state, ssm_state)
    x = torch.cat([conv_state, new[..., -1:]], dim=-1)
    u = F.silu((x * w["conv1d.weight"][:, 0]).sum(-1) + w["conv1d.bias"])
    return out, torch.cat([new[..., :-1], u[..., None]], dim=-1), state


@answers.wrong("step", "the state of the scan not carried")
def state_forgotten(w, h, conv_state, ssm_state):
    out, new, _ = one_token(w, h, conv_state, ssm_state)
    return out, new, ssm_state


@answers.wrong("step", "x and z swapped")
def halves_swapped(w, h, conv_state, ssm_state):
    rows = w["in_proj.weight"].chunk(2)
    return one_token(w | {"in_proj.weight": torch.cat(rows[::-1])}, h, conv_state, ssm_state)


@answers.wrong("step", "B and C swapped")
def C_before_B(w, h, conv_state, ssm_state):
    N = w["A_log"].shape[1]
    dt, B, C = w["x_proj.weight"].split([w["dt_proj.weight"].shape[1], N, N])
    return one_token(w | {"x_proj.weight": torch.cat([dt, C, B])}, h, conv_state, ssm_state)


@answers.wrong("step", "count")
def output_only(w, h, conv_state, ssm_state):
    return one_token(w, h, conv_state, ssm_state)[0]


@answers.wrong("step", "shape")
def state_of_all_channels(w, h, conv_state, ssm_state):
    out, new, state = one_token(w, h, conv_state, ssm_state)
    return out, new, state.mean(1)


# remember


@answers.right("remember")
def gathered(conv_state, x, lengths):
    seen = torch.cat([conv_state, x.mT], dim=-1)
    columns = lengths[:, None] + torch.arange(conv_state.shape[-1])
    return seen.gather(-1, columns[:, None].expand_as(conv_state))


@answers.right("remember")
def step_after_step(conv_state, x, lengths):
    state = conv_state.clone()
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            state[row] = torch.cat([state[row, :, 1:], x[row, t, :, None]], dim=-1)
    return state


@answers.right("remember")
def by_unfolding(conv_state, x, lengths):
    windows = torch.cat([conv_state, x.transpose(1, 2)], dim=2).unfold(2, conv_state.shape[2], 1)
    return windows[torch.arange(len(x)), :, lengths]


@answers.right("remember")
def rolled(conv_state, x, lengths):
    seen = torch.cat([conv_state, x.mT], dim=-1)
    rows = [row.roll(-int(n), dims=-1)[:, : conv_state.shape[-1]] for row, n in zip(seen, lengths, strict=True)]
    return torch.stack(rows)


@answers.wrong("remember", "only the piece looked at")
def last_of_the_piece(conv_state, x, lengths):
    return F.pad(x, (0, 0, conv_state.shape[-1] - x.shape[1], 0)).mT


@answers.wrong("remember", "the old inputs replaced by zeros")
def zeros_in_front(conv_state, x, lengths):
    W = conv_state.shape[-1]
    rows = [F.pad(row[:n], (0, 0, W - int(n), 0)).mT for row, n in zip(x, lengths, strict=True)]
    return torch.stack(rows)


@answers.wrong("remember", "the lengths ignored")
def last_of_all(conv_state, x, lengths):
    return torch.cat([conv_state, x.mT], dim=-1)[:, :, -conv_state.shape[-1] :]


@answers.wrong("remember", "one length for all rows")
def longest(conv_state, x, lengths):
    return last_of_all(conv_state, x[:, : lengths.max()], lengths)


@answers.wrong("remember", "one length for all rows")
def that_of_the_first_row(conv_state, x, lengths):
    start = int(lengths[0])
    return torch.cat([conv_state, x.mT], dim=-1)[..., start : start + conv_state.shape[-1]]


@answers.wrong("remember", "a stale convolution state")
def unchanged(conv_state, x, lengths):
    return conv_state


@answers.wrong("remember", "the newest input left out")
def one_too_few(conv_state, x, lengths):
    return by_unfolding(conv_state, x, torch.where(lengths > 0, lengths - 1, 0))


@answers.wrong("remember", "the newest input at the front")
def backwards(conv_state, x, lengths):
    return by_unfolding(conv_state, x, lengths).flip(2)


@answers.wrong("remember", "raises")
def one_column_late(conv_state, x, lengths):
    seen = torch.cat([conv_state, x.mT], dim=-1)
    columns = lengths[:, None] + torch.arange(1, 1 + conv_state.shape[-1])
    return seen.gather(-1, columns[:, None].expand_as(conv_state))


@answers.wrong("remember", "shape")
def time_before_channels(conv_state, x, lengths):
    return gathered(conv_state, x, lengths).mT


@answers.wrong("remember", "changes its input")
def overwrites(conv_state, x, lengths):
    return conv_state.copy_(gathered(conv_state, x, lengths))


@answers.wrong("parameters", "the rank made of E")
def _(d_model, d_state, d_conv, expand):
    E = expand * d_model
    R = math.ceil(E / 16)
    return 2 * E * d_model + E * d_conv + E + E * (R + 2 * d_state) + R * E + E + E * d_state + E + E * d_model


def by_einsum(w, h, conv_state, ssm_state, bias=True, A_of=lambda log: -log.exp(), skip_x=False):
    x, z = torch.einsum("bd,ed->be", h, w["in_proj.weight"]).chunk(2, -1)
    window = torch.cat([conv_state, x.unsqueeze(-1)], -1)
    u = F.silu(torch.einsum("bew,ew->be", window, w["conv1d.weight"].squeeze(1)) + w["conv1d.bias"])
    N = ssm_state.shape[-1]
    low, B, C = F.linear(u, w["x_proj.weight"]).split([w["dt_proj.weight"].shape[1], N, N], -1)
    delta = F.softplus(F.linear(low, w["dt_proj.weight"], w["dt_proj.bias"] if bias else None))
    fade = torch.exp(torch.einsum("be,en->ben", delta, A_of(w["A_log"])))
    state = fade * ssm_state + torch.einsum("be,be,bn->ben", delta, u, B)
    y = torch.einsum("ben,bn->be", state, C) + w["D"] * (x if skip_x else u)
    return F.linear(y * F.silu(z), w["out_proj.weight"]), window[..., 1:], state


@answers.right("step")
def _(w, h, conv_state, ssm_state):
    return by_einsum(w, h, conv_state, ssm_state)


@answers.right("step")
def _(weights, token, inputs, memory):
    out, new_inputs, new_memory = by_einsum(weights, token, inputs, memory)
    inputs.copy_(new_inputs)  # as the official cache does
    memory.copy_(new_memory)
    return out, inputs, memory


@answers.wrong("step", "dt_proj's bias forgotten")
def _(w, h, conv_state, ssm_state):
    return by_einsum(w, h, conv_state, ssm_state, bias=False)


@answers.wrong("step", "A_log read as A")
def _(w, h, conv_state, ssm_state):
    return by_einsum(w, h, conv_state, ssm_state, A_of=lambda log: -log)


@answers.wrong("step", "x in the skip D")
def _(w, h, conv_state, ssm_state):
    return by_einsum(w, h, conv_state, ssm_state, skip_x=True)


@answers.wrong("remember", "the padding kept as zeros")
def _(conv_state, x, lengths):
    x = x.clone()
    for row, length in zip(x, lengths.tolist(), strict=True):
        row[length:] = 0
    return torch.cat([conv_state, x.mT], -1)[..., -conv_state.shape[-1] :]
