"""The public functions: the selective scan and the short convolution by every method, and the official drop-ins."""

import torch

from minimamba import _autocast, _operators, parallel_scan, sequential_scan
from minimamba._validation import (
    check_conv_arguments,
    check_conv_update_arguments,
    check_once,
    check_option,
    check_scan_arguments,
    check_shape,
    check_tensor,
    check_update_arguments,
    document_borders,
)
from minimamba.causal_conv1d import convolve, update, update_now
from minimamba.triton_scan import TRITON_IS_INSTALLED

ACTIVATIONS = (None, "silu", "swish")
METHODS = ("auto", "sequential", "hillis_steele", "blelloch", "chunked", "cpu", "triton")


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    *,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    initial_state=None,
    return_final_state=False,
    cu_seqlens=None,
    method="auto",
):
    """Run h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = (C_t h_t + D u_t) silu(z_t).

    Parameters
    ----------
    u : (B, L, D) input; float16, bfloat16, float32 or float64.
    delta : (B, L, D) step size Δ, or what becomes it: delta + delta_bias, through softplus if `delta_softplus`.
    A : (D, N) state matrix, real and negative.
    B, C : (B, L, N), or (B, L, G, N) in G groups of D / G neighbouring channels, or constant (D, N).
    D : (D,) skip connection, optional.
    z : (B, L, D) gate, optional.
    delta_bias : (D,) optional.
    initial_state : (B, D, N) state before the first step, zero if None.
    cu_seqlens : (documents + 1,) int32 or int64, borders of the documents packed in one row: 0, ..., L.
        The batch B is then 1, each document starts afresh, and the states are (documents, D, N).
    method : "sequential", "hillis_steele", "blelloch", "chunked" (the chapters' algorithms, in PyTorch),
        "cpu" (fused in C; without a C compiler, and on a GPU, the fastest in PyTorch), "triton" (fused for a GPU)
        or "auto" ("triton" on a GPU, else "cpu").

    delta, B, C and z have u's dtype or float32; A, D, delta_bias and the states are float32. In float64 all
    are. Under autocast u, B, C and z are cast to its dtype. The state and the exponentials are never half.

    Returns
    -------
    y (B, L, D) in u's dtype; with `return_final_state`, (y, final_state), the latter (B, D, N) float32 or
    float64. Differentiable in every tensor argument, initial_state and final_state included.

    Raises
    ------
    TypeError, ValueError : the message begins with the name of the argument at fault.

    Source: Mamba (Gu and Dao, 2023), Algorithm 2 and equation 2a; packed rows as in flash-attention.
    """
    u, delta, A, B, C, D, z, delta_bias, initial_state = _autocast.scan_arguments(
        u, delta, A, B, C, D, z, delta_bias, initial_state
    )
    check_once(check_scan_arguments, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    check_option("method", method, METHODS)
    if method == "auto":
        method = _fastest(u)
    if method in _operators.BACKENDS:
        scan = _operators.selective_scan
    else:
        scan = _scan_by_autograd
    y, final_state = scan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, method)
    return (y, final_state) if return_final_state else y


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """The official package's `selective_scan_fn`: channels before time.

    u, delta, z (B, D, L); A (D, N); B, C (D, N), (B, N, L) or (B, G, N, L); D, delta_bias (D,).
    Returns out (B, D, L), with `return_last_state` also the last state (B, D, N). Dtypes and errors as in
    `selective_scan`. Source: state-spaces/mamba, `mamba_ssm.ops.selective_scan_interface`.
    """
    check_scan_arguments(u, delta, A, B, C, D, z, delta_bias, time_last=True)
    y, state = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        _time_second(B),
        _time_second(C),
        D,
        z=None if z is None else z.transpose(1, 2),
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        return_final_state=True,
    )
    out = y.transpose(1, 2)
    return (out, state) if return_last_state else out


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """One decoding step: h <- exp(Δ A) h + Δ B x in place, y = (C h + D x) silu(z).

    state (B, D, N), float32 or float64, overwritten; x, dt, z (B, D); A (D, N); B, C (B, N) or (B, G, N);
    D, dt_bias (D,). With heads: state (B, H, P, N); x, dt, z (B, H, P); A (H, P, N); D, dt_bias (H, P).
    Returns y in x's dtype and shape. Has no gradient. Errors as in `selective_scan`.
    Source: state-spaces/mamba, `mamba_ssm.ops.triton.selective_state_update`.
    """
    check_once(check_update_arguments, state, x, dt, A, B, C, D, z, dt_bias)
    if _operators.nothing_listens(state, x, dt, A, B, C, D, z, dt_bias):
        torch.autograd.graph.increment_version(state)
        return _operators.update_now(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return _operators.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def causal_conv1d(
    x, weight, bias=None, *, activation=None, initial_state=None, return_final_state=False, cu_seqlens=None,
    method="auto",
):  # fmt: skip
    """Convolve each channel with its own W taps: y_t = act(bias + Σ_k weight_k x_{t-W+1+k}), which sees no later step.

    Parameters
    ----------
    x : (B, L, D) input; float16, bfloat16, float32 or float64. Contiguous along D or along L is equally fast.
    weight : (D, W) taps, the last for the present step, W from 2 to 4; in x's dtype or float32.
    bias : (D,) in x's dtype or float32, optional.
    activation : None, or "silu" ("swish" is the same).
    initial_state : (B, D, W - 1) steps before the first, in x's dtype; zero if None.
    cu_seqlens : (documents + 1,) int32 or int64, borders of the documents packed in one row: 0, ..., L.
        The batch B is then 1, each document starts afresh, and the states are (documents, D, W - 1).
    method : "cpu" (in PyTorch, runs everywhere), "triton" (fused for a GPU) or "auto" ("triton" on a GPU, else "cpu").

    Computed in float32, float64 in float64. Under autocast x is cast to its dtype, float32 weights are not.

    Returns
    -------
    y (B, L, D) in x's dtype; with `return_final_state`, (y, final_state), the last W - 1 steps (B, D, W - 1) in x's
    dtype. Differentiable in every tensor argument, initial_state and final_state included.

    Raises
    ------
    TypeError, ValueError : the message begins with the name of the argument at fault.

    Source: Mamba (Gu and Dao, 2023), section 3.4 and figure 3; H3 (Fu et al., 2022) for the short convolution.
    """
    x, weight, bias, initial_state = _autocast.conv_arguments(x, weight, bias, initial_state)
    check_once(check_conv_arguments, x, weight, bias, initial_state, cu_seqlens)
    check_option("activation", activation, ACTIVATIONS)
    check_option("method", method, ("auto", "cpu", "triton"))
    if method == "auto":
        method = "triton" if x.is_cuda and TRITON_IS_INSTALLED else "cpu"
    y, final_state = convolve(
        x, weight, bias, initial_state, cu_seqlens, activation is not None, return_final_state, method
    )
    return (y, final_state) if return_final_state else y


def _check_conv_fn_arguments(x, weight, bias, initial_states):
    check_conv_arguments(x, weight, bias, initial_states, time_last=True, state_name="initial_states")


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    """The causal-conv1d package's `causal_conv1d_fn`: channels before time.

    x (B, D, L); weight (D, W); bias (D,); initial_states, final_states_out (B, D, W - 1), the latter written to.
    Returns out (B, D, L), with `return_final_states` also the last states. `seq_idx` is refused: `causal_conv1d`
    packs documents by `cu_seqlens`. Dtypes and errors as in `causal_conv1d`.
    Source: Dao-AILab/causal-conv1d, `causal_conv1d_interface`.
    """
    if seq_idx is not None:
        raise ValueError("seq_idx: not supported; give minimamba.causal_conv1d the documents' borders as cu_seqlens")
    check_once(_check_conv_fn_arguments, x, weight, bias, initial_states)
    if return_final_states and final_states_out is not None:
        check_tensor("final_states_out", final_states_out, dtypes=(x.dtype,), device=x.device, like=" (x's)")
        check_shape("final_states_out", final_states_out, (*x.shape[:2], weight.shape[1] - 1))
    options = {"activation": activation, "initial_state": initial_states}
    if not return_final_states:
        return causal_conv1d(x.mT, weight, bias, **options).mT
    y, state = causal_conv1d(x.mT, weight, bias, return_final_state=True, **options)
    return y.mT, state if final_states_out is None else final_states_out.copy_(state)


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
    """One step of the causal convolution: x goes in as the last column of `conv_state`, in place, the oldest falls out.

    x (B, D); conv_state (B, D, W), (B, D, W - 1) or longer, in x's dtype; weight (D, W); bias (D,). Returns y (B, D) in
    x's dtype. Has no gradient. Errors as in `causal_conv1d`.
    Source: Dao-AILab/causal-conv1d, `causal_conv1d_interface`.
    """
    check_once(check_conv_update_arguments, x, conv_state, weight, bias)
    check_option("activation", activation, ACTIVATIONS)
    if _operators.nothing_listens(x, conv_state, weight, bias):
        torch.autograd.graph.increment_version(conv_state)
        return update_now(x, conv_state, weight, bias, activation is not None)
    return update(x, conv_state, weight, bias, activation is not None)


def _fastest(u):
    """What method="auto" stands for: "triton" on a GPU, else "cpu", whatever the shape and the dtype.

    Measured (kernels/results): each is the fastest on its device, from one step of one channel on. Where Triton or a
    C compiler is missing, "cpu" is PyTorch: on small problems other methods are then faster, but only this one never
    holds a (B, L, D, N) tensor.
    """
    return "triton" if u.is_cuda and TRITON_IS_INSTALLED else "cpu"


def _scan_by_autograd(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, method):
    """The chapters' scans: one core each, with the parts around it in PyTorch, differentiated by autograd."""
    wide = A.dtype  # float32, or float64 in float64
    delta = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias
    if delta_softplus:
        delta = torch.nn.functional.softplus(delta)
    borders = [0, u.shape[1]] if cu_seqlens is None else document_borders(cu_seqlens, u.shape[1])
    if initial_state is None:
        initial_state = A.new_zeros(u.shape[0] * (len(borders) - 1), *A.shape)

    outputs, final_states = [], []
    sequences = zip(borders[:-1], borders[1:], initial_state.split(u.shape[0]), strict=True)
    for start, stop, state in sequences:
        if start < stop:
            part = slice(start, stop)
            y, state = _core(
                method,
                u[:, part].to(wide),
                delta[:, part],
                A,
                _grouped(B, u.shape)[:, part].to(wide),
                _grouped(C, u.shape)[:, part].to(wide),
                state,
            )
            outputs.append(y)
        final_states.append(state)
    y = torch.cat(outputs, dim=1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(wide))
    return y.to(u.dtype), torch.cat(final_states)


def _core(method, *arguments):
    if method == "sequential":
        return sequential_scan.selective_scan_sequential(*arguments)
    return parallel_scan.selective_scan_parallel(*arguments, algorithm=method)


def _grouped(B, shape):
    """Bring B or C to (Batch, L, G, N); a constant one is a view with one group per channel."""
    if B.ndim == 2:
        return B.expand(shape[0], shape[1], *B.shape)
    return B if B.ndim == 4 else B[:, :, None]


def _time_second(B):
    """(B, N, L) -> (B, L, N), (B, G, N, L) -> (B, L, G, N); a constant (D, N) stays."""
    return B if B.ndim == 2 else B.movedim(-1, 1)
