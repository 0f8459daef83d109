"""Chapter 12: the block against NumPy and transformers, cut, padded, packed, stepped, compiled, with replaced parts."""

import copy
import inspect
import io
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import relative_error
from torch import nn
from torch.func import functional_call
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from minimamba import mamba_block
from minimamba.mamba_block import Mamba, MambaCache

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16


def make(d_model=6, d_state=3, d_conv=4, *, dtype=f64, seed=0, dt_rank=2, bias=True, **options):
    """A block whose parameters are all random: fresh ones are too regular (A alike in all channels, D one)."""
    torch.manual_seed(seed)
    block = Mamba(d_model, d_state, d_conv, dt_rank=dt_rank, bias=bias, dtype=dtype, **options)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.normal_()
            if name.endswith("proj.weight"):
                parameter.mul_(1.5 * parameter.shape[1] ** -0.5)
        block.dt_proj.bias.sub_(1)
    return block


def draw(*shape, dtype=f64, seed=1):
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_numpy(block, hidden_states):
    """The block from figure 3 and algorithm 2 of the paper, in float64: output, convolution inputs, final state."""
    weights = {name: x.detach().double().numpy() for name, x in block.state_dict().items()}
    sigmoid = lambda x: np.exp(-np.logaddexp(0, -x))
    linear = lambda x, name: x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)
    h = hidden_states.detach().double().numpy()
    xz = linear(h, "in_proj")
    inner = xz.shape[-1] // 2
    x, z = xz[..., :inner], xz[..., inner:]
    taps = weights["conv1d.weight"][:, 0]  # (d_inner, d_conv)
    mixed = np.zeros_like(x) + weights.get("conv1d.bias", 0)
    for t in range(x.shape[1]):
        for lag in range(taps.shape[1]):
            if t - lag >= 0:
                mixed[:, t] += taps[:, -1 - lag] * x[:, t - lag]
    u = mixed * sigmoid(mixed)
    rank, states = weights["dt_proj.weight"].shape[1], weights["A_log"].shape[1]
    projected = u @ weights["x_proj.weight"].T
    assert projected.shape[-1] == rank + 2 * states
    B, C = projected[..., rank : rank + states], projected[..., rank + states :]
    delta = np.logaddexp(0, linear(projected[..., :rank], "dt_proj"))
    y, state = oracle.selective_scan(u, delta, -np.exp(weights["A_log"]), B, C, weights["D"])
    out = linear(y * z * sigmoid(z), "out_proj")
    return tuple(torch.from_numpy(value) for value in (out, x, state))


def last_inputs(x, width):
    """The last `width` rows of x (B, L, d_inner), zeros before the first, as conv_state holds them."""
    return torch.cat([x.new_zeros(x.shape[0], width, x.shape[2]), x], dim=1)[:, -width:].mT


def gradients(block, inputs, *outputs):
    """Return {name: gradient} of a random linear function of `outputs`, for every parameter and the inputs."""
    loss = sum((x * draw(*x.shape, dtype=x.dtype, seed=i)).sum() for i, x in enumerate(outputs))
    leaves = {"inputs": inputs, **dict(block.named_parameters())}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def filled_cache(block, batch, dtype=None, seed=5):
    """The cache after something has been read."""
    cache = block.allocate_inference_cache(batch, dtype=dtype)
    cache.conv_state.copy_(draw(*cache.conv_state.shape, seed=seed))
    cache.ssm_state.copy_(draw(*cache.ssm_state.shape, seed=seed + 1))
    return cache


def copied(cache):
    return MambaCache(*(x.clone() for x in cache))


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# --- the official package's names and initial values ---------------------------------------------------


def test_the_signature_is_the_official_one():
    arguments = {name: p.default for name, p in inspect.signature(Mamba).parameters.items()}
    assert list(arguments.items()) == [
        ("d_model", inspect.Parameter.empty), ("d_state", 16), ("d_conv", 4), ("expand", 2), ("dt_rank", "auto"),
        ("dt_min", 0.001), ("dt_max", 0.1), ("dt_init", "random"), ("dt_scale", 1.0), ("dt_init_floor", 1e-4),
        ("conv_bias", True), ("bias", False), ("use_fast_path", True), ("layer_idx", None), ("device", None),
        ("dtype", None),
    ]  # fmt: skip
    assert list(inspect.signature(Mamba.step).parameters) == ["self", "hidden_states", "conv_state", "ssm_state"]
    cache = list(inspect.signature(Mamba.allocate_inference_cache).parameters)
    assert cache == ["self", "batch_size", "max_seqlen", "dtype"]


def test_parameters_have_the_official_names_and_shapes():
    shapes = {
        "A_log": (80, 5), "D": (80,), "in_proj.weight": (160, 40), "conv1d.weight": (80, 1, 3), "conv1d.bias": (80,),
        "x_proj.weight": (3 + 2 * 5, 80), "dt_proj.weight": (80, 3), "dt_proj.bias": (80,), "out_proj.weight": (40, 80),
    }  # fmt: skip
    block = Mamba(40, 5, 3, layer_idx=7)  # the rank of Δ is d_model / 16, rounded up
    assert {name: tuple(x.shape) for name, x in block.state_dict().items()} == shapes
    assert block.layer_idx == 7
    with_biases = Mamba(40, 5, 3, bias=True).state_dict()
    assert with_biases.keys() - shapes == {"in_proj.bias", "out_proj.bias"}
    assert shapes.keys() - Mamba(40, 5, 3, conv_bias=False).state_dict().keys() == {"conv1d.bias"}
    assert Mamba(40, expand=3, dt_rank=9).dt_proj.weight.shape == (120, 9)
    assert Mamba(6, expand=1.5).d_inner == 9


def test_initial_values_are_the_official_ones():
    torch.manual_seed(0)
    block = Mamba(800, 5)
    torch.testing.assert_close(block.A, -torch.arange(1.0, 6.0).expand(1600, 5))
    assert torch.equal(block.D, torch.ones(1600))
    step = softplus(block.dt_proj.bias.detach().double())
    assert 0.001 <= step.min() * (1 + 1e-5) < 0.0011 and 0.09 < step.max() <= 0.1 * (1 + 1e-5)
    assert step.log().mean().exp().item() == pytest.approx(0.01, rel=0.1)  # log-uniform: the geometric mean
    bound = 50**-0.5
    assert 0.98 * bound < block.dt_proj.weight.max() <= bound and -bound <= block.dt_proj.weight.min() < -0.98 * bound
    doubled = Mamba(800, 5, dt_scale=2.0).dt_proj.weight
    assert 0.98 * 2 * bound < doubled.max() <= 2 * bound
    assert torch.equal(Mamba(32, dt_init="constant", dt_scale=3.0).dt_proj.weight, torch.full((64, 2), 3 * 2**-0.5))
    assert softplus(Mamba(32, dt_min=1e-6, dt_max=1e-5).dt_proj.bias).allclose(torch.tensor(1e-4))
    assert softplus(Mamba(32, dt_min=1.0, dt_max=1.0).dt_proj.bias).allclose(torch.tensor(1.0))


def marked(block, mark="_no_weight_decay"):
    return {name for name, x in block.named_parameters() if getattr(x, mark, False)}


def test_marks_say_what_not_to_decay_and_survive_copies():
    block = Mamba(8, 3)
    assert marked(block) == {"A_log", "D"}
    assert marked(block, "_no_reinit") == {"dt_proj.bias"}
    model = nn.Sequential(nn.Linear(8, 8), block)
    assert marked(copy.deepcopy(model)) == {"1.A_log", "1.D"}
    block.load_state_dict(copy.deepcopy(block.state_dict()), assign=True)
    assert marked(block) == {"A_log", "D"}
    stored = io.BytesIO()
    torch.save(block, stored)
    stored.seek(0)
    assert marked(torch.load(stored, weights_only=False)) == {"A_log", "D"}


@pytest.mark.parametrize("dtype", [None, f32, bf16, torch.float16, f64], ids=str)
def test_what_makes_the_state_is_never_half(dtype):
    block = Mamba(8, 3, dtype=dtype)
    wide = f64 if dtype == f64 else f32
    given = {name: wide if name in ("A_log", "D") else dtype or f32 for name, _ in block.named_parameters()}
    assert {name: x.dtype for name, x in block.named_parameters()} == given
    for _ in range(2):
        cache = block.allocate_inference_cache(2)
        assert (cache.conv_state.dtype, cache.ssm_state.dtype) == (dtype or f32, wide)
        assert block.A.dtype == wide
        if dtype != torch.float16:  # moved as a whole, A and the state still stay wide
            block.to(dtype)
        x = draw(2, 3, 8, dtype=dtype or f32)
        assert block(x, cache).dtype == block.step(x[:, :1], *cache)[0].dtype == x.dtype
    assert block.allocate_inference_cache(2, dtype=bf16).conv_state.dtype == bf16


def test_a_float16_block_runs_under_bfloat16_autocast():
    block, x = make(dtype=torch.float16), draw(2, 5, 6, dtype=torch.float16)
    with torch.autocast("cpu", bf16):
        assert relative_error(block(x), by_numpy(block, x)[0]) < 0.05


def test_a_block_can_be_made_and_traced_without_memory():
    block = Mamba(8, 3, device="meta")
    assert all(x.is_meta for x in block.parameters())
    assert block(torch.empty(2, 5, 8, device="meta")).shape == (2, 5, 8)


def test_weights_survive_a_file_and_a_copy():
    block, other, x = make(), make(seed=1), draw(2, 5, 6)
    stored = io.BytesIO()
    torch.save(block.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(other(x), block(x))
    assert torch.equal(copy.deepcopy(block)(x), block(x))


# --- right ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 10), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3),
    st.sampled_from([1, 2]), st.booleans(), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_equals_numpy_from_the_weights(batch, length, d_model, d_state, d_conv, dt_rank, expand, bias, conv_bias, seed):
    block = make(
        d_model, d_state, d_conv, dt_rank=dt_rank, expand=expand, bias=bias, conv_bias=conv_bias, seed=seed
    )  # fmt: skip
    hidden_states = draw(batch, length, d_model, seed=seed)
    expected, x, state = by_numpy(block, hidden_states)
    assert relative_error(block(hidden_states), expected) < 1e-10
    cache = block.allocate_inference_cache(batch)
    assert relative_error(block(hidden_states, cache), expected) < 1e-10
    assert relative_error(cache.ssm_state, state) < 1e-10
    assert relative_error(cache.conv_state, last_inputs(x, d_conv)) < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(f32, 1e-5), (torch.float16, 5e-3), (bf16, 3e-2)], ids=str)
def test_fresh_blocks_equal_numpy_in_every_precision(dtype, tolerance):
    torch.manual_seed(0)
    block, hidden_states = Mamba(20, 4, dtype=dtype), draw(2, 60, 20, dtype=dtype)
    out = block(hidden_states)
    assert out.dtype == dtype
    assert relative_error(out, by_numpy(block, hidden_states)[0]) < tolerance


@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_mixer_of_transformers_in_values_and_gradients(bias):
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = mamba.MambaConfig(
        hidden_size=12, state_size=5, conv_kernel=3, expand=2, time_step_rank=4, num_hidden_layers=1, use_bias=bias
    )
    torch.manual_seed(0)
    theirs = mamba.MambaMixer(config, layer_idx=0)
    ours = Mamba(12, 5, 3, dt_rank=4, bias=bias)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    inputs = draw(2, 13, 12, dtype=f32).requires_grad_()
    out, expected = ours(inputs), theirs(inputs)
    assert relative_error(out, expected) < 1e-5
    expected_gradients = gradients(theirs, inputs, expected)
    for name, gradient in gradients(ours, inputs, out).items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-4, name


def test_inputs_of_any_strides_give_the_same():
    block, x = make(), draw(2, 5, 6)
    for strided in (x.mT.contiguous().mT, x.repeat_interleave(2, dim=2)[..., ::2]):
        assert not strided.is_contiguous()
        assert_close(block(strided), block(x))
    assert_close(block(x[:1].expand(3, -1, -1)), block(x[:1].repeat(3, 1, 1)))


def test_no_output_sees_a_later_input():
    block, x = make(), draw(1, 9, 6)
    changed = x.clone()
    changed[:, 5] += 1
    same = (block(changed) == block(x)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 4


def test_a_nan_is_not_hidden():
    block, x = make(), draw(2, 6, 6)
    x[1, 3, 0] = torch.nan
    bad = block(x).isnan().any(-1)
    assert bad.tolist() == [[False] * 6, [False] * 3 + [True] * 3]


# --- cut and stepped -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 5), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_any_split_equals_the_whole(lengths, d_conv, carried, with_gradient, seed):
    block, x = make(d_conv=d_conv, seed=seed), draw(2, sum(lengths), 6, seed=seed)
    cache = filled_cache(block, 2) if carried else block.allocate_inference_cache(2)
    pieces, addresses = copied(cache), [state.data_ptr() for state in cache]
    whole = block(x, cache)
    with torch.set_grad_enabled(with_gradient):  # decides how a piece of one step is computed
        outputs = [block(piece, pieces) for piece in x.split(lengths, dim=1)]
    assert_close(torch.cat(outputs, dim=1), whole)
    assert_close(tuple(pieces), tuple(cache))
    assert [state.data_ptr() for state in cache] == addresses
    assert not any(state.requires_grad for state in (*cache, *pieces))
    if not carried:
        assert_close(block(x), whole)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(f64, False), (f64, True), (f32, False), (f32, True), (bf16, False), (bf16, True), (torch.float16, False)],
)
@pytest.mark.parametrize("d_conv", [4, 5])
def test_steps_equal_the_whole_sequence(dtype, autocast, d_conv):
    block, x = make(d_conv=d_conv, dtype=dtype), draw(2, 9, 6, dtype=dtype)
    half = dtype in (bf16, torch.float16) or (autocast and dtype == f32)  # autocast leaves float64 alone
    # PyTorch's product of one row rounds half precision otherwise than that of many.
    tolerance = 8 * torch.finfo(bf16).eps if half else 100 * torch.finfo(dtype).eps
    with torch.autocast("cpu", bf16, enabled=autocast):
        cache, state_dtype = block.allocate_inference_cache(2), None
        y = block(x, cache)
        for state_dtype in (None, f64 if dtype == f64 else f32):
            for prompt in (0, 4):  # the first steps read at once, the others one by one
                again = block.allocate_inference_cache(2, dtype=state_dtype)
                if prompt:
                    block(x[:, :prompt], again)
                outputs = []
                for t in range(prompt, 9):
                    out, *states = block.step(x[:, t : t + 1], *again)
                    assert states[0] is again.conv_state and states[1] is again.ssm_state
                    assert out.dtype == y.dtype and not out.requires_grad
                    outputs.append(out)
                assert relative_error(torch.cat(outputs, dim=1), y[:, prompt:]) < tolerance
                for got, expected in zip(again, cache, strict=True):
                    assert relative_error(got, expected) < tolerance


def test_a_fresh_cache_is_zero_and_of_its_own():
    block = make()
    cache = block.allocate_inference_cache(3, max_seqlen=1000)
    conv_state, ssm_state = cache
    assert conv_state.shape == (3, 12, 4) and ssm_state.shape == (3, 12, 3)
    assert not conv_state.any() and not ssm_state.any() and not ssm_state.requires_grad
    before = {name: x.clone() for name, x in block.state_dict().items()}
    block.step(draw(3, 1, 6), *cache)
    assert ssm_state.all() and conv_state[..., -1].all() and not conv_state[..., :-1].any()
    assert all(torch.equal(x, before[name]) for name, x in block.state_dict().items())
    assert len({row.data_ptr() for row in ssm_state}) == 3


def test_one_step_asked_of_forward_is_a_step(monkeypatch):
    block, taken = make(), []
    step = block.step
    monkeypatch.setattr(block, "step", lambda *a: (taken.append(1), step(*a))[1])
    with torch.no_grad():
        block(draw(2, 1, 6), block.allocate_inference_cache(2))
        assert taken == [1]
        block(draw(2, 1, 6))
        block(draw(2, 1, 6), block.allocate_inference_cache(2), mask=torch.tensor([[True], [False]]))
    block(draw(2, 1, 6), block.allocate_inference_cache(2)).sum().backward()
    assert taken == [1]


@pytest.mark.parametrize("method", ["cpu", "triton"])
def test_gradients_of_a_piece_stop_at_the_cache(method, monkeypatch):
    convolution = partial(mamba_block.causal_conv1d, method=method)  # the kernel keeps the state it was given
    monkeypatch.setattr(mamba_block, "causal_conv1d", convolution)
    block, x = make(), draw(2, 8, 6).requires_grad_()
    cache = block.allocate_inference_cache(2)
    first = block(x[:, :5], cache)
    start = copied(cache)
    second = block(x[:, 5:], cache)
    block(x[:, 5:].detach(), cache)  # the cache goes on before the gradients are asked for
    gradient = torch.autograd.grad(second.sum(), x, retain_graph=True)[0]
    assert not gradient[:, :5].any() and gradient[:, 5:].all()
    assert_close(gradient, torch.autograd.grad(block(x[:, 5:], start).sum(), x)[0])
    assert torch.autograd.grad(first.sum(), x)[0][:, :5].all()


# --- padded and packed ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 8), st.booleans(), st.integers(1, 5), st.integers(0, 99))
def test_padding_is_as_if_it_were_not_there(data, length, carried, d_conv, seed):
    """Wherever it stands, whatever is in it, with something read before or not; gradients too."""
    block, x = make(d_conv=d_conv, seed=seed), draw(3, length, 6, seed=seed)
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=3, max_size=3))
    mask = torch.tensor(rows)
    x[~mask] = torch.nan
    x.requires_grad_()
    start = filled_cache(block, 3) if carried else block.allocate_inference_cache(3)
    cache = copied(start)
    out = block(x, cache, mask=mask)
    assert_close(block(x, mask=mask), out) if not carried else None
    assert not out[~mask].any()
    alone = torch.zeros_like(out)
    for i in range(3):
        one = MambaCache(*(state[i : i + 1].clone() for state in start))
        if mask[i].any():
            alone = alone.index_put((torch.tensor(i), mask[i].nonzero()[:, 0]), block(x[i : i + 1, mask[i]], one)[0])
        assert_close(tuple(state[i : i + 1] for state in cache), tuple(one))
    assert_close(out, alone)
    if mask.any():
        assert_close(gradients(block, x, out), gradients(block, x, alone))


def test_padding_of_long_rows():
    block, x = make(), draw(2, 300, 6)
    mask = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) < 0.5
    out = block(x, mask=mask)
    for i in range(2):
        assert_close(out[i, mask[i]], block(x[i : i + 1, mask[i]])[0])


@pytest.mark.parametrize("dtype", [f32, bf16, torch.float16], ids=str)
def test_padding_in_lower_precision(dtype):
    block, x = make(dtype=dtype), draw(2, 8, 6, dtype=dtype)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = mask[1, 6:] = False
    cache, out = block.allocate_inference_cache(2), None
    out = block(x, cache, mask=mask)
    for i, part in ((0, slice(3, 8)), (1, slice(0, 6))):
        one = block.allocate_inference_cache(1)
        assert relative_error(out[i : i + 1, part], block(x[i : i + 1, part], one)) < 8 * torch.finfo(dtype).eps
        for got, expected in zip(cache, one, strict=True):
            assert relative_error(got[i : i + 1], expected) < 8 * torch.finfo(dtype).eps


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), st.integers(1, 5), st.integers(0, 99))
@example([0, 2, 0, 1], 1, 0)
def test_packed_documents_equal_separate_runs(lengths, d_conv, seed):
    block = make(d_conv=d_conv, seed=seed)
    x = draw(1, sum(lengths), 6).requires_grad_()
    packed = block(x, cu_seqlens=torch.tensor(np.cumsum([0, *lengths])))
    apart = torch.cat([block(part) for part in x.split(lengths, dim=1) if part.shape[1]], dim=1)
    assert_close(packed, apart)
    assert_close(gradients(block, x, packed), gradients(block, x, apart))


# --- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cu_seqlens": torch.tensor([0, 1, 4])}], ids=["whole", "packed"])
def test_gradcheck_for_every_parameter_and_input(options):
    block = make(2, 2, 3, dt_rank=1, expand=1)
    names = [name for name, _ in block.named_parameters()]
    assert len(names) == 11

    def run(x, *parameters):
        return functional_call(block, dict(zip(names, parameters, strict=True)), (x,), options)

    inputs = draw(1, 4, 2), *(x.detach() for x in block.parameters())
    assert torch.autograd.gradcheck(run, tuple(x.clone().requires_grad_() for x in inputs))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=str)
def test_gradients_of_a_fresh_block_reach_every_element(dtype, autocast):
    torch.manual_seed(0)
    block = Mamba(20, 4, dtype=dtype)
    x = draw(2, 200, 20, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", bf16, enabled=autocast):
        out = block(x)
    found = gradients(block, x, out)
    for name, parameter in {"inputs": x, **dict(block.named_parameters())}.items():
        assert found[name].dtype == parameter.dtype and found[name].isfinite().all() and found[name].any(-1).all(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same_bits(reentrant):
    block, x = make(), draw(2, 7, 6).requires_grad_()
    plain = gradients(block, x, block(x))
    again = checkpoint(block, x, use_reentrant=reentrant)
    leaves = [x, *block.parameters()]
    (again * draw(*again.shape, seed=0)).sum().backward()
    for leaf, expected in zip(leaves, plain.values(), strict=True):
        assert torch.equal(leaf.grad, expected)


# --- precision -----------------------------------------------------------------------------------------


def test_autocast_leaves_the_step_size_in_full_precision(monkeypatch):
    """In bfloat16 a bias of -7 is off by up to 1/64, and so Δ by 1.6 %, in the same direction at every step."""
    torch.manual_seed(0)
    block, x = Mamba(64), draw(2, 300, 64, dtype=f32)
    seen = []
    scan = mamba_block.selective_scan
    monkeypatch.setattr(mamba_block, "selective_scan", lambda u, delta, *a, **k: (seen.append(delta), scan(u, delta, *a, **k))[1])  # fmt: skip # noqa: E501
    copy.deepcopy(block).double()(x.double())
    with torch.autocast("cpu", bf16):
        out = block(x)
    exact, under_autocast = (softplus(delta.double()) for delta in seen)
    assert seen[1].dtype == f32 and out.dtype == bf16
    relative = under_autocast / exact - 1
    assert relative.mean(1).abs().max() < 1e-3 and relative.abs().max() < 5e-3
    bias = block.dt_proj.bias.detach()
    assert (softplus(bias.to(bf16).double()) / softplus(bias.double()) - 1).abs().max() > 1e-2  # what is avoided


def test_a_step_layer_kept_in_float32_serves_a_half_block():
    block, x = make(dtype=bf16), draw(2, 9, 6, dtype=bf16)
    block.dt_proj.float()
    out = block(x)
    assert out.dtype == bf16 and relative_error(out, by_numpy(block, x)[0]) < 0.05
    cache = block.allocate_inference_cache(2)
    steps = torch.cat([block.step(x[:, t : t + 1], *cache)[0] for t in range(9)], dim=1)
    assert relative_error(steps, out) < 8 * torch.finfo(bf16).eps


# --- compiled, and with replaced parts -----------------------------------------------------------------


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_break(padded, autocast):
    block, x = make(dtype=f32), draw(2, 7, 6, dtype=f32).requires_grad_()
    options = {"mask": torch.arange(7) >= torch.tensor([[2], [0]])} if padded else {}
    run = compiled(block)
    with torch.autocast("cpu", bf16, enabled=autocast):
        out, expected = run(x, **options), block(x, **options)
        assert torch.equal(out, expected)
        for got, wanted in zip(*(gradients(block, x, y).values() for y in (out, expected)), strict=True):
            torch.testing.assert_close(got, wanted)
        cache, eager = block.allocate_inference_cache(2), block.allocate_inference_cache(2)
        with torch.no_grad():
            assert torch.equal(run(x, cache, **options), block(x, eager, **options))
        step = compiled(block.step)
        for t in range(2):
            assert torch.equal(step(x[:, t : t + 1], *cache)[0], block.step(x[:, t : t + 1], *eager)[0])
        assert all(torch.equal(a, b) for a, b in zip(cache, eager, strict=True))


def test_packed_rows_compile():
    block, x = make(dtype=f32), draw(1, 7, 6, dtype=f32)
    borders = torch.tensor([0, 3, 7])
    assert torch.equal(compiled(block)(x, cu_seqlens=borders), block(x, cu_seqlens=borders))


class LowRank(nn.Module):
    """A frozen layer plus a low-rank update, with no `weight` to be read (LoRA; Hu and others, 2021)."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        dtype = next(base.parameters()).dtype
        if isinstance(base, nn.Conv1d):
            self.down = nn.Conv1d(base.in_channels, 2, 1, bias=False, dtype=dtype)
            self.up = nn.Conv1d(2, base.out_channels, base.kernel_size, padding=base.padding, bias=False, dtype=dtype)
        else:
            self.down = nn.Linear(base.in_features, 2, bias=False, dtype=dtype)
            self.up = nn.Linear(2, base.out_features, bias=False, dtype=dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj", "conv1d"])
def test_any_layer_can_be_replaced(name, autocast):
    block, x = make(dtype=f32), draw(2, 6, 6, dtype=f32)
    plain = copy.deepcopy(block)
    adapted = LowRank(getattr(block, name))
    nn.init.zeros_(adapted.up.weight)
    setattr(block, name, adapted)
    tolerance = 8 * torch.finfo(bf16).eps if autocast else 1e-5
    with torch.autocast("cpu", bf16, enabled=autocast):
        assert relative_error(block(x), plain(x)) < tolerance
    nn.init.normal_(adapted.up.weight)
    with torch.autocast("cpu", bf16, enabled=autocast):  # a new one: it keeps its copies of the weights until it ends
        cache = block.allocate_inference_cache(2)
        out = block(x, cache)
        assert relative_error(out, plain(x)) > 0.1  # it is called
        again = block.allocate_inference_cache(2)
        steps = [block(x[:, :3], again), *(block.step(x[:, t : t + 1], *again)[0] for t in range(3, 6))]
        assert relative_error(torch.cat(steps, dim=1), out) < 2 * tolerance
        alone = torch.cat([block(x[:1, :2]), block(x[:1, 2:])], dim=1)
        assert relative_error(block(x[:1], cu_seqlens=torch.tensor([0, 2, 6])), alone) < 2 * tolerance
        out.float().sum().backward()
    assert adapted.up.weight.grad.any() and adapted.down.weight.grad.any()


def test_a_parametrised_convolution_is_called():
    block, x = make(), draw(2, 6, 6)
    expected = block(x)
    nn.utils.parametrizations.weight_norm(block.conv1d)
    assert_close(block(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [f32, bf16, f64], ids=str)
def test_a_gpu_gives_what_the_cpu_gives(dtype):
    torch.manual_seed(0)
    block, x = Mamba(48, dtype=dtype), draw(3, 50, 48, dtype=dtype)
    on_gpu = copy.deepcopy(block).cuda()
    tolerance = {f64: 1e-11, f32: 1e-4, bf16: 3e-2}[dtype]
    mask = torch.arange(50) >= torch.tensor([[0], [7], [20]])
    caches = block.allocate_inference_cache(3), on_gpu.allocate_inference_cache(3)
    for options in ({}, {"mask": mask}):
        expected = block(x, caches[0], **options)
        got = on_gpu(x.cuda(), caches[1], **{name: value.cuda() for name, value in options.items()})
        assert relative_error(got.cpu(), expected) < tolerance
    for _ in range(3):
        expected, got = block.step(x[:, :1], *caches[0])[0], on_gpu.step(x[:, :1].cuda(), *caches[1])[0]
        assert relative_error(got.cpu(), expected) < tolerance
    for got, expected in zip(caches[1], caches[0], strict=True):
        assert relative_error(got.cpu(), expected) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_a_step_can_be_recorded_as_a_cuda_graph(dtype):
    torch.manual_seed(0)
    block, x = Mamba(48, dtype=dtype, device="cuda"), draw(2, 6, 48, dtype=dtype).cuda()
    cache, inputs = block.allocate_inference_cache(2), x[:, :1].clone()
    expected = block(x, cache)
    states = block.allocate_inference_cache(2)
    block.step(inputs, *copied(states))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block.step(inputs, *states)[0]
    for state in states:
        state.zero_()
    for t in range(6):
        inputs.copy_(x[:, t : t + 1])
        graph.replay()
        assert relative_error(out, expected[:, t : t + 1]) < 3e-2
    assert relative_error(states.ssm_state, cache.ssm_state) < 3e-2


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model: expected an integer >= 1, got 0"),
        ({"d_model": 8.0}, "d_model: expected an integer"),
        ({"d_state": -1}, "d_state: expected an integer"),
        ({"d_conv": 0}, "d_conv: expected an integer"),
        ({"d_conv": True}, "d_conv: expected an integer"),
        ({"expand": 0.1}, "expand: expected a number with"),
        ({"expand": "2"}, "expand: expected a number with"),
        ({"expand": float("nan")}, "expand: expected a number with"),
        ({"dt_rank": 0}, "dt_rank: expected an integer"),
        ({"dt_rank": "full"}, "dt_rank: expected an integer"),
        ({"dt_min": 0}, "dt_min: expected 0 < dt_min"),
        ({"dt_max": float("inf")}, "dt_max: expected a finite number"),
        ({"dt_init": "zero"}, "dt_init: expected one of 'random', 'constant', got 'zero'"),
        ({"dt_scale": -1.0}, "dt_scale: expected a finite number"),
        ({"dt_init_floor": "low"}, "dt_init_floor: expected a finite number"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Mamba(**{"d_model": 8, **options})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_states": [1.0]}, TypeError, r"hidden_states: expected a torch.Tensor, got list"),
        ({"hidden_states": draw(5, 6)}, ValueError, r"hidden_states: expected shape \(B, L, 6\), got \(5, 6\)"),
        ({"hidden_states": draw(2, 5, 7)}, ValueError, r"hidden_states: expected shape \(B, L, 6\), got \(2, 5, 7\)"),
        ({"hidden_states": draw(2, 0, 6)}, ValueError, r"hidden_states: expected L >= 1"),
        ({"hidden_states": draw(2, 5, 6, dtype=f32)}, TypeError, r"hidden_states: expected torch.float64 \(the block"),
        ({"hidden_states": torch.ones(2, 5, 6, dtype=torch.int64)}, TypeError, r"hidden_states: expected a floating"),
        ({"hidden_states": draw(2, 5, 6).to("meta")}, ValueError, r"hidden_states: expected device cpu"),
        ({"cache": {}}, TypeError, r"cache: expected a MambaCache, got dict"),
        ({"cache": (draw(2, 12, 4),)}, TypeError, r"cache: expected a MambaCache, got tuple"),
        ({"cache": (draw(3, 12, 4), draw(3, 12, 3))}, ValueError, r"conv_state: expected shape \(2, 12, 4\)"),
        ({"cache": (draw(2, 12, 3), draw(2, 12, 3))}, ValueError, r"conv_state: expected shape \(2, 12, 4\)"),
        ({"cache": (draw(2, 12, 4), draw(2, 12, 4))}, ValueError, r"ssm_state: expected shape \(2, 12, 3\)"),
        ({"cache": (draw(2, 12, 4), draw(2, 12, 3, dtype=f32))}, TypeError, r"ssm_state: expected torch.float64"),
        ({"cache": (None, draw(2, 12, 3))}, TypeError, r"conv_state: expected a torch.Tensor, got NoneType"),
        ({"mask": torch.ones(2, 5)}, TypeError, r"mask: expected a bool tensor, .* got torch.float32"),
        ({"mask": [[True]]}, TypeError, r"mask: expected a bool tensor, .* got list"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask: expected shape \(2, 5\), got \(2, 4\)"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")}, ValueError, r"mask: expected device cpu"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"x: expected batch 1 beside cu_seqlens"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    block = make()
    with pytest.raises(error, match=f"^{message}"):
        block(**{"hidden_states": draw(2, 5, 6), **arguments})


def test_what_does_not_go_together_is_refused():
    block, x, borders = make(), draw(1, 5, 6), torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"^cache: expected None beside cu_seqlens, got MambaCache"):
        block(x, block.allocate_inference_cache(1), cu_seqlens=borders)
    with pytest.raises(ValueError, match=r"^mask: expected None beside cu_seqlens, got Tensor"):
        block(x, mask=torch.ones(1, 5, dtype=torch.bool), cu_seqlens=borders)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected borders rising from 0 to L = 5"):
        block(x, cu_seqlens=torch.tensor([0, 4]))


def test_bad_steps_are_named_and_change_nothing():
    block = make()
    cache = filled_cache(block, 2)
    before = copied(cache)
    with pytest.raises(ValueError, match=r"^hidden_states: expected shape \(B, 1, 6\), got \(2, 2, 6\)"):
        block.step(draw(2, 2, 6), *cache)
    with pytest.raises(ValueError, match=r"^ssm_state: expected shape \(2, 12, 3\), got \(2, 12, 5\)"):
        block.step(draw(2, 1, 6), cache.conv_state, draw(2, 12, 5))
    with pytest.raises(ValueError, match=r"^batch_size: expected an integer >= 1, got 0"):
        block.allocate_inference_cache(0)
    assert all(torch.equal(a, b) for a, b in zip(cache, before, strict=True))
