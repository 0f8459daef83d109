"""Answers to the exercises of chapter 09."""

import torch

from minimamba.sequential_scan import selective_scan_sequential

from . import Answers

answers = Answers()


# adjoint


@answers.right("adjoint")
def from_the_end(a, w):
    g = w.clone()
    for t in reversed(range(len(w) - 1)):
        g[t] = w[t] + a[t + 1] * g[t + 1]
    return g


@answers.right("adjoint")
def as_a_transpose(a, w):
    size = len(a)
    M = torch.eye(size, dtype=torch.float64)
    for t in range(1, size):
        M[t, :t] = a[t].double() * M[t - 1, :t]
    return (M.T @ w.double()).to(w.dtype)


@answers.right("adjoint")
def in_log_rounds(a, w):
    a = torch.cat([a[1:], torch.ones_like(a[:1])])
    g, distance = w, 1
    while distance < len(a):
        a_right = torch.nn.functional.pad(a[distance:], (0, distance), value=1.0)
        g_right = torch.nn.functional.pad(g[distance:], (0, distance))
        a, g = a * a_right, g + a * g_right
        distance *= 2
    return g


@answers.right("adjoint")
def by_pytorch(a, w):
    b = torch.zeros_like(a, requires_grad=True)
    h, loss = 0.0, 0.0
    for t in range(len(a)):
        h = a[t] * h + b[t]
        loss = loss + w[t] * h
    return torch.autograd.grad(loss, b)[0]


@answers.right("adjoint")
def flipped(a, w):
    g, out = 0.0, []
    for a_next, w_t in zip([0.0, *a.flip(0).tolist()[:-1]], w.flip(0).tolist(), strict=True):
        g = a_next * g + w_t
        out.insert(0, g)
    return torch.tensor(out, dtype=w.dtype)


@answers.wrong("adjoint", "unshifted a")
def same_step(a, w):
    g = w.clone()
    for t in reversed(range(len(w) - 1)):
        g[t] += a[t] * g[t + 1]
    return g


@answers.wrong("adjoint", "a shifted the wrong way")
def one_before(a, w):
    g = w.clone()
    for t in range(len(w) - 2, -1, -1):
        g[t] += a[t - 1] * g[t + 1]
    return g


@answers.wrong("adjoint", "the forward scan of w")
def forwards(a, w):
    g = w.clone()
    for t in range(1, len(w)):
        g[t] += a[t] * g[t - 1]
    return g


@answers.wrong("adjoint", "w_{t+1} in place of g_{t+1}")
def one_step_only(a, w):
    g = w.clone()
    g[:-1] += a[1:] * w[1:]
    return g


@answers.wrong("adjoint", "sums without a")
def plain_sums(a, w):
    g = w.clone()
    for t in reversed(range(len(w) - 1)):
        g[t] += g[t + 1]
    return g


@answers.wrong("adjoint", "w only at the last step")
def last_only(a, w):
    g = w.clone()
    for t in reversed(range(len(w) - 1)):
        g[t] = a[t + 1] * g[t + 1]
    return g


@answers.wrong("adjoint", "w itself")
def nothing_done(a, w):
    return w.clone()


@answers.wrong("adjoint", "changes its input")
def no_copy(a, w):
    for t in reversed(range(len(w) - 1)):
        w[t] += a[t + 1] * w[t + 1]
    return w


@answers.wrong("adjoint", "reversed")
def not_turned_back(a, w):
    return from_the_end(a, w).flip(0)


@answers.wrong("adjoint", "sign")
def downhill(a, w):
    return -from_the_end(a, w)


@answers.wrong("adjoint", "raises")
def one_too_far(a, w):
    g = w.clone()
    for t in reversed(range(len(w))):
        g[t] += a[t + 1] * g[t + 1]
    return g


# scan_backward


@answers.right("scan_backward")
def two_passes(a, b, h_0, w):
    h, previous = h_0, []
    for t in range(a.shape[1]):
        previous.append(h)
        h = a[:, t] * h + b[:, t]
    g = w.clone()
    for t in reversed(range(a.shape[1] - 1)):
        g[:, t] += a[:, t + 1] * g[:, t + 1]
    return torch.stack(previous, dim=1) * g, g, a[:, 0] * g[:, 0]


@answers.right("scan_backward")
def autograd(a, b, h_0, w):
    a, b, h_0 = (x.detach().requires_grad_() for x in (a, b, h_0))
    h, loss = h_0, 0.0
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        loss = loss + (w[:, t] * h).sum()
    loss.backward()
    return [a.grad, b.grad, h_0.grad]


@answers.right("scan_backward")
def row_by_row(a, b, h_0, w):
    da, db, dh = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(h_0)
    for i in range(len(a)):
        states = [h_0[i]]
        for t in range(a.shape[1]):
            states.append(a[i, t] * states[-1] + b[i, t])
        arriving = torch.zeros((), dtype=a.dtype)
        for t in range(a.shape[1] - 1, -1, -1):
            db[i, t] = w[i, t] + arriving
            da[i, t] = db[i, t] * states[t]
            arriving = a[i, t] * db[i, t]
        dh[i] = arriving
    return da, db, dh


def passes(shift=1, state="before", first="a", carry="g"):
    def answer(a, b, h_0, w):
        h = [h_0]
        for t in range(a.shape[1]):
            h.append(a[:, t] * h[-1] + b[:, t])
        h = torch.stack(h, dim=1)
        if state == "zero":
            h[:, 0] = 0
        g = w.clone()
        for t in reversed(range(a.shape[1] - 1)):
            g[:, t] += a[:, t + shift] * (g if carry == "g" else w)[:, t + 1]
        dh = {"a": a[:, 0] * g[:, 0], "g": g[:, 0], "zero": torch.zeros_like(h_0)}[first]
        return g * (h[:, 1:] if state == "same" else h[:, :-1]), g, dh

    return answer


answers.wrong("scan_backward", "unshifted a")(passes(shift=0))
answers.wrong("scan_backward", "h_t in place of h_{t−1} in da")(passes(state="same"))
answers.wrong("scan_backward", "h_0 left out of da")(passes(state="zero"))
answers.wrong("scan_backward", "dh_0 = g_1, without a_1")(passes(first="g"))
answers.wrong("scan_backward", "dh_0 = 0")(passes(first="zero"))
answers.wrong("scan_backward", "w_{t+1} in place of g_{t+1}")(passes(carry="w"))


@answers.wrong("scan_backward", "w in place of g")
def no_adjoint(a, b, h_0, w):
    h, previous = h_0, []
    for t in range(a.shape[1]):
        previous.append(h)
        h = a[:, t] * h + b[:, t]
    return torch.stack(previous, dim=1) * w, w.clone(), a[:, 0] * w[:, 0]


@answers.wrong("scan_backward", "shape")
def one_state_too_many(a, b, h_0, w):
    da, db, dh = two_passes(a, b, h_0, w)
    return da, torch.cat([db, dh[:, None]], dim=1), dh


@answers.wrong("scan_backward", "count")
def without_h_0(a, b, h_0, w):
    return two_passes(a, b, h_0, w)[:2]


@answers.wrong("scan_backward", "da and db swapped")
def da_and_db_swapped(a, b, h_0, w):
    da, db, dh = two_passes(a, b, h_0, w)
    return db, da, dh


# adjoint_chunked


@answers.right("adjoint_chunked")
def chunk_by_chunk(a, w, size, from_the_right):
    g, carry = w.clone(), from_the_right
    for s in reversed(range(0, len(w), size)):
        steps = range(len(w))[s : s + size]
        for t in reversed(steps):
            g[t] += carry
            carry = a[t] * g[t]
    return g, carry


@answers.right("adjoint_chunked")
def without_chunks(a, w, size, from_the_right):
    w = w.clone()
    w[-1] += from_the_right
    g = from_the_end(a, w)
    return g, a[0] * g[0]


@answers.right("adjoint_chunked")
def alone_then_joined(a, w, size, from_the_right):
    parts, carry = [], torch.tensor(from_the_right, dtype=w.dtype)
    for a_part, w_part in zip(reversed(a.split(size)), reversed(w.split(size)), strict=True):
        alone = as_a_transpose(a_part, w_part)
        reach = torch.stack([a_part[t + 1 :].prod() for t in range(len(a_part))])
        parts.insert(0, alone + reach * carry)
        carry = a_part[0] * parts[0][0]
    return torch.cat(parts), carry


def over_chunks(leave, first=1, to_all=False, shift=1):
    """leave(a, g, w, s, e): what goes from the chunk s ... e − 1 to the chunk on its left."""

    def answer(a, w, size, from_the_right):
        g, carry = w.clone(), first * from_the_right
        for s in range((len(w) - 1) // size * size, -1, -size):
            e = min(s + size, len(w))
            if not to_all:
                g[e - 1] += carry
            for t in range(e - 2, s - 1, -1):
                g[t] += a[t + shift] * g[t + 1]
            if to_all:
                g[s:e] += carry
            carry = leave(a, g, w, s, e)
        return g, carry

    return answer


def at_the_left(a, g, w, s, e):
    return a[s] * g[s]


answers.wrong("adjoint_chunked", "the reverse carry lost")(
    over_chunks(lambda a, g, w, s, e: at_the_left(a, g, w, s, e) if s == 0 else 0.0)
)
answers.wrong("adjoint_chunked", "the gradient from the right lost")(over_chunks(at_the_left, first=0))
answers.wrong("adjoint_chunked", "a forgotten at the borders")(over_chunks(lambda a, g, w, s, e: g[s].clone()))
answers.wrong("adjoint_chunked", "unshifted a at the borders")(
    over_chunks(lambda a, g, w, s, e: a[max(s - 1, 0)] * g[s])
)
answers.wrong("adjoint_chunked", "a carry from the next chunk only")(
    over_chunks(lambda a, g, w, s, e: a[s] * from_the_end(a[s:e], w[s:e])[0])
)
answers.wrong("adjoint_chunked", "an undecayed carry")(over_chunks(at_the_left, to_all=True))


@answers.wrong("adjoint_chunked", "chunks from the first to the last")
def forwards_in_chunks(a, w, size, from_the_right):
    g, carry = w.clone(), from_the_right
    for s in range(0, len(w), size):
        e = min(s + size, len(w))
        g[e - 1] += carry
        for t in range(e - 2, s - 1, -1):
            g[t] += a[t + 1] * g[t + 1]
        carry = a[s] * g[s]
    return g, carry


@answers.wrong("adjoint_chunked", "unshifted a")
def a_of_the_same_step(a, w, size, from_the_right):
    g = w.clone()
    g[-1] += from_the_right
    for t in reversed(range(len(w) - 1)):
        g[t] += a[t] * g[t + 1]
    return g, a[0] * g[0]


@answers.wrong("adjoint_chunked", "count")
def g_only(a, w, size, from_the_right):
    return chunk_by_chunk(a, w, size, from_the_right)[0]


@answers.wrong("adjoint_chunked", "from_the_right decayed once more")
def a_at_the_last_step_too(a, w, size, from_the_right):
    return chunk_by_chunk(a, w, size, a[-1] * from_the_right)


# selective_backward


@answers.right("selective_backward")
def by_the_table(u, delta, A, B, C, h_0, grad_y, grad_last):
    A_bar = torch.exp(delta[..., None] * A)
    h, before, after = h_0, [], []
    for t in range(u.shape[1]):
        before.append(h)
        h = A_bar[:, t] * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        after.append(h)
    g = torch.einsum("bld,bln->bldn", grad_y, C)
    g[:, -1] += grad_last
    for t in reversed(range(u.shape[1] - 1)):
        g[:, t] += A_bar[:, t + 1] * g[:, t + 1]
    dz = g * torch.stack(before, dim=1) * A_bar
    dx = torch.einsum("bldn,bln->bld", g, B)
    ddelta = torch.einsum("bldn,dn->bld", dz, A) + u * dx
    dA = torch.einsum("bld,bldn->dn", delta, dz)
    dB = torch.einsum("bld,bldn->bln", delta * u, g)
    dC = torch.einsum("bld,bldn->bln", grad_y, torch.stack(after, dim=1))
    return delta * dx, ddelta, dA, dB, dC, A_bar[:, 0] * g[:, 0]


@answers.right("selective_backward")
def differentiated(u, delta, A, B, C, h_0, grad_y, grad_last):
    leaves = [x.detach().requires_grad_() for x in (u, delta, A, B, C, h_0)]
    u, delta, A, B, C, h_0 = leaves
    y, h = selective_scan_sequential(u, delta, A, B[:, :, None], C[:, :, None], h_0)
    return torch.autograd.grad((y * grad_y).sum() + (h * grad_last).sum(), leaves)


@answers.right("selective_backward")
def one_step_at_a_time(u, delta, A, B, C, h_0, grad_y, grad_last):
    states = [h_0]
    for t in range(u.shape[1]):
        states.append(torch.exp(delta[:, t, :, None] * A) * states[-1] + (delta * u)[:, t, :, None] * B[:, t, None])
    du, ddelta, dA, dB, dC = (torch.zeros_like(x) for x in (u, delta, A, B, C))
    arriving = grad_last.clone()
    for t in range(u.shape[1] - 1, -1, -1):
        g = arriving + grad_y[:, t, :, None] * C[:, t, None]
        arriving = torch.exp(delta[:, t, :, None] * A) * g
        dC[:, t] = (grad_y[:, t, :, None] * states[t + 1]).sum(1)
        dB[:, t] = ((delta * u)[:, t, :, None] * g).sum(1)
        du[:, t] = delta[:, t] * (g @ B[:, t, :, None])[..., 0]
        ddelta[:, t] = (arriving * states[t] * A).sum(-1) + u[:, t] * (g * B[:, t, None]).sum(-1)
        dA += (arriving * states[t] * delta[:, t, :, None]).sum(0)
    return du, ddelta, dA, dB, dC, arriving


def loop(
    next_decay=True, carry=True, state="before", bar=True, terms=("decay", "input"), last=True, sums=True, dt=True
):
    def answer(u, delta, A, B, C, h_0, grad_y, grad_last):
        A_bar, L = torch.exp(torch.einsum("bld,dn->bldn", delta, A)), u.shape[1]
        h = torch.zeros(len(u), L + 1, *A.shape, dtype=u.dtype)
        h[:, 0] = h_0
        for t in range(L):
            h[:, t + 1] = A_bar[:, t] * h[:, t] + torch.einsum("bd,bd,bn->bdn", delta[:, t], u[:, t], B[:, t])
        g = grad_y[..., None] * C[:, :, None]
        if last:
            g[:, L - 1] += grad_last
        for t in range(L - 2, -1, -1):
            if carry:
                g[:, t] += A_bar[:, t + 1 if next_decay else t] * g[:, t + 1]
        d_decay = g * (h[:, :-1] if state == "before" else h[:, 1:])
        dz = d_decay * A_bar if bar else d_decay
        dx = (g * B[:, :, None]).sum(-1)
        ddelta = torch.zeros_like(delta)
        if "decay" in terms:
            ddelta += (A * dz).sum(-1)
        if "input" in terms:
            ddelta += u * dx
        dB = (delta * u)[..., None] * g
        dA = (delta[..., None] * dz if dt else dz).sum((0, 1))
        dC = (grad_y[..., None] * h[:, 1:]).sum(2)
        return delta * dx, ddelta, dA, dB.sum(2) if sums else dB, dC, A_bar[:, 0] * g[:, 0]

    return answer


answers.wrong("selective_backward", "unshifted Ā")(loop(next_decay=False))
answers.wrong("selective_backward", "the reverse carry lost")(loop(carry=False))
answers.wrong("selective_backward", "h_t in place of h_{t−1} in dĀ")(loop(state="after"))
answers.wrong("selective_backward", "half of dΔ missing")(loop(terms=("decay",)))
answers.wrong("selective_backward", "half of dΔ missing")(loop(terms=("input",)))
answers.wrong("selective_backward", "dB not summed over channels")(loop(sums=False))
answers.wrong("selective_backward", "Ā missing in the derivative of e^{ΔA}")(loop(bar=False))
answers.wrong("selective_backward", "the gradient of the last state lost")(loop(last=False))
answers.wrong("selective_backward", "Δ missing in dA")(loop(dt=False))


@answers.wrong("selective_backward", "dA not summed over the batch")
def one_dA_for_each_sequence(u, delta, A, B, C, h_0, grad_y, grad_last):
    rest = (B, C, h_0, grad_y, grad_last)
    results = list(by_the_table(u, delta, A, *rest))
    singles = (
        by_the_table(*(x[i : i + 1] for x in (u, delta)), A, *(x[i : i + 1] for x in rest)) for i in range(len(u))
    )
    results[2] = torch.stack([part[2] for part in singles])
    return tuple(results)


@answers.wrong("selective_backward", "Δ missing in du")
def du_through_B_only(u, delta, A, B, C, h_0, grad_y, grad_last):
    du, *others = by_the_table(u, delta, A, B, C, h_0, grad_y, grad_last)
    return du / delta, *others


@answers.wrong("selective_backward", "shape")
def gradients_of_h(u, delta, A, B, C, h_0, grad_y, grad_last):
    du, *others, dh = by_the_table(u, delta, A, B, C, h_0, grad_y, grad_last)
    return du, *others, dh.mT.reshape(dh.shape[0], -1)


@answers.wrong("selective_backward", "count")
def h_0_forgotten(u, delta, A, B, C, h_0, grad_y, grad_last):
    return by_the_table(u, delta, A, B, C, h_0, grad_y, grad_last)[:5]


@answers.wrong("selective_backward", "changes its input")
def spoils_delta(u, delta, A, B, C, h_0, grad_y, grad_last):
    results = by_the_table(u, delta, A, B, C, h_0, grad_y, grad_last)
    delta *= u
    return results


@answers.wrong("scan_backward", "h_0 taken for zero")
def _(a, b, h_0, w):
    h, g, sent = [torch.zeros_like(h_0)], torch.zeros_like(a), torch.zeros_like(h_0)
    for t in range(a.shape[1]):
        h.append(a[:, t] * h[-1] + b[:, t])
    for t in reversed(range(a.shape[1])):
        g[:, t] = w[:, t] + sent
        sent = a[:, t] * g[:, t]
    return g * torch.stack(h[:-1], 1), g, sent


@answers.wrong("adjoint_chunked", "a forgotten at the borders")
def _(a, w, size, from_the_right):
    pieces, carry = [], from_the_right
    for decays, weights in reversed(list(zip(a.split(size), w.split(size), strict=True))):
        g, sent = [], carry
        for decay, weight in zip(decays.flip(0), weights.flip(0), strict=True):
            g.insert(0, weight + sent)
            sent = decay * g[0]
        pieces.insert(0, torch.stack(g))
        carry = g[0]
    return torch.cat(pieces), sent
