"""Chapter 13: the language model against NumPy float64; cut, padded, packed, in half precision."""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

import minimamba.language_model as language_model
from minimamba.language_model import MambaConfig, MambaLM, RMSNorm

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
SMALL = {"vocab_size": 11, "d_model": 6, "n_layer": 2, "d_state": 3, "dt_rank": 2, "pad_vocab_size_multiple": 4}


def make(dtype=f64, seed=0, **options):
    """A small model whose parameters are all random: fresh ones are too regular."""
    torch.manual_seed(seed)
    model = MambaLM(MambaConfig(**(SMALL | options)), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_()
            if name.endswith("proj.weight"):
                parameter.mul_(1.5 * parameter.shape[1] ** -0.5)
    return model


def draw(*shape, vocab_size=11, seed=1):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def by_numpy(model, tokens):
    """The logits in float64, from the equations, with the parameters by their official names."""
    weights = {name: x.detach().double().numpy() for name, x in model.state_dict().items()}
    sigmoid = lambda x: np.exp(-np.logaddexp(0, -x))

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + model.config.norm_epsilon) * weight

    def mamba(x, prefix):
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        linear = lambda x, name: x @ own[f"{name}.weight"].T + own.get(f"{name}.bias", 0)
        x, z = np.split(linear(x, "in_proj"), 2, axis=-1)
        taps = own["conv1d.weight"][:, 0]
        mixed = np.zeros_like(x) + own.get("conv1d.bias", 0)
        for t in range(x.shape[1]):
            for lag in range(min(taps.shape[1], t + 1)):
                mixed[:, t] += taps[:, -1 - lag] * x[:, t - lag]
        u = mixed * sigmoid(mixed)
        rank, states = own["dt_proj.weight"].shape[1], own["A_log"].shape[1]
        dt, B, C = np.split(u @ own["x_proj.weight"].T, [rank, rank + states], axis=-1)
        delta = np.logaddexp(0, linear(dt, "dt_proj"))
        y, _ = oracle.selective_scan(u, delta, -np.exp(own["A_log"]), B, C, own["D"])
        return linear(y * z * sigmoid(z), "out_proj")

    h = weights["backbone.embedding.weight"][tokens.numpy()]
    for i in range(model.config.n_layer):
        prefix = f"backbone.layers.{i}."
        h = h + mamba(norm(h, weights[prefix + "norm.weight"]), prefix + "mixer.")
    head = weights["backbone.embedding.weight" if model.config.tie_embeddings else "lm_head.weight"]
    return torch.from_numpy(norm(h, weights["backbone.norm_f.weight"]) @ head[: model.config.vocab_size].T)


def assert_near(got, expected, tolerance=1e-10):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


# --- the whole against NumPy ---


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_embeddings": False, "bias": True}, {"conv_bias": False, "d_conv": 2, "expand": 3, "n_layer": 3},
     {"residual_in_fp32": False, "norm_epsilon": 0.1, "pad_vocab_size_multiple": 1}],
)  # fmt: skip
def test_logits_equal_the_oracle(options):
    model, tokens = make(**options), draw(2, 7)
    expected = by_numpy(model, tokens)
    assert_near(model(tokens), expected)
    assert_near(model.float()(tokens), expected.float(), 2e-5)


def test_gradients_of_every_parameter_are_those_of_the_function():
    model, tokens = make(n_layer=1, d_model=3, vocab_size=5, tie_embeddings=False, bias=True), draw(1, 4, vocab_size=5)
    names = list(dict(model.named_parameters()))
    run = lambda *values: functional_call(model, dict(zip(names, values, strict=True)), (tokens,))
    assert torch.autograd.gradcheck(run, [p.detach().requires_grad_() for p in model.parameters()])


def test_rms_norm_and_its_gradient():
    torch.manual_seed(0)
    norm = RMSNorm(5, 0.3, dtype=f64)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 5, dtype=f64, requires_grad=True)
    rows = x.detach().numpy()
    expected = [
        [[w * v / math.sqrt(sum(a * a for a in row) / 5 + 0.3) for w, v in zip(norm.weight.tolist(), row, strict=True)]
         for row in matrix] for matrix in rows
    ]  # fmt: skip
    assert_near(norm(x), torch.tensor(expected, dtype=f64))
    run = lambda x, weight: functional_call(norm, {"weight": weight}, (x,))
    assert torch.autograd.gradcheck(run, (x, norm.weight))


def test_a_token_changes_no_earlier_logits():
    model, tokens = make(), draw(1, 9)
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 11
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:5].max() == 0 and difference[5:].min() > 0


# --- the same text in other ways ---


@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6), batch=st.integers(1, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_a_text_in_pieces_gives_the_logits_of_the_whole(cuts, batch, seed):
    model, tokens = make(), draw(batch, sum(cuts), seed=seed)
    cache = model.allocate_cache(batch)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in tokens.split(cuts, dim=1)]
    assert_near(torch.cat(pieces, dim=1), model(tokens))


def test_a_cache_is_a_state_of_fixed_size_for_each_layer():
    model = make(f32, d_state=3, d_conv=4, expand=2)
    cache = model.allocate_cache(5)
    assert [tuple(x.shape) for layer in cache for x in layer] == [(5, 12, 4), (5, 12, 3)] * 2
    assert all(x.abs().max() == 0 for layer in cache for x in layer)
    assert [x.dtype for x in model.allocate_cache(1, dtype=bf16)[0]] == [bf16, f32]


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), seed=st.integers(0, 99), left=st.booleans())
@settings(deadline=None, max_examples=20)
def test_padding_counts_as_not_there(lengths, seed, left):
    model = make()
    texts = [draw(1, length, seed=seed + i) for i, length in enumerate(lengths)]
    tokens, mask = draw(len(lengths), max(lengths), seed=seed + 9), torch.zeros(len(lengths), max(lengths)).bool()
    for i, text in enumerate(texts):
        part = slice(max(lengths) - text.shape[1], None) if left else slice(0, text.shape[1])
        tokens[i, part], mask[i, part] = text[0], True
    cache = model.allocate_cache(len(lengths))
    with torch.no_grad():
        logits = model(tokens, cache, mask=mask)
        after = model(draw(len(lengths), 1, seed=seed), cache)
    for i, text in enumerate(texts):
        alone = model.allocate_cache(1)
        with torch.no_grad():
            assert_near(logits[i : i + 1, mask[i]], model(text, alone))
            assert_near(after[i : i + 1], model(draw(len(lengths), 1, seed=seed)[i : i + 1], alone))


def test_documents_in_one_row_do_not_see_each_other():
    model = make()
    texts = [draw(1, length, seed=length) for length in (3, 1, 5)]
    packed = model(torch.cat(texts, dim=1), cu_seqlens=torch.tensor([0, 3, 4, 9]))
    assert_near(packed, torch.cat([model(text) for text in texts], dim=1))


def test_last_only_gives_the_last_logits():
    model, tokens = make(), draw(3, 6)
    assert_near(model(tokens, last_only=True), model(tokens)[:, -1:], 1e-14)


def test_int32_tokens_are_tokens():
    model, tokens = make(), draw(2, 5)
    assert torch.equal(model(tokens.int()), model(tokens))


def test_a_compiled_model_gives_the_same():
    model, tokens = make(f32, n_layer=1), draw(2, 5)
    with torch.no_grad():
        assert_near(torch.compile(model, backend="eager", fullgraph=True)(tokens), model(tokens), 1e-6)


# --- parameters ---


def test_parameters_have_the_official_names_and_shapes():
    shapes = {name: tuple(x.shape) for name, x in make(n_layer=1).state_dict().items()}
    mixer = "backbone.layers.0.mixer."
    assert shapes == {
        "backbone.embedding.weight": (12, 6), "backbone.layers.0.norm.weight": (6,), mixer + "A_log": (12, 3),
        mixer + "D": (12,), mixer + "in_proj.weight": (24, 6), mixer + "conv1d.weight": (12, 1, 4),
        mixer + "conv1d.bias": (12,), mixer + "x_proj.weight": (8, 12), mixer + "dt_proj.weight": (12, 2),
        mixer + "dt_proj.bias": (12,), mixer + "out_proj.weight": (6, 12), "backbone.norm_f.weight": (6,),
        "lm_head.weight": (12, 6),
    }  # fmt: skip


def test_a_tied_head_is_the_embedding():
    tied, free = make(), make(tie_embeddings=False)
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert free.lm_head.weight is not free.backbone.embedding.weight
    assert len(list(free.parameters())) == len(list(tied.parameters())) + 1


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_pad_the_vocabulary_are_zero_and_learn_nothing(tied):
    model = MambaLM(MambaConfig(**SMALL, tie_embeddings=tied))
    assert model(draw(1, 3)).shape == (1, 3, 11)
    model(draw(1, 3)).logsumexp(-1).sum().backward()
    for weight in (model.backbone.embedding.weight, model.lm_head.weight):
        assert weight.shape == (12, 6)
        assert weight[11:].abs().max() == 0 and weight.grad[11:].abs().max() == 0


def test_initial_values_are_the_official_ones():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=500, d_model=64, n_layer=9))
    assert model.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in model.backbone.layers:
        bound = 128**-0.5 / 3  # nn.Linear's, over the square root of nine layers
        assert 0.95 * bound < layer.mixer.out_proj.weight.abs().max() <= bound
        assert layer.mixer.A_log.exp()[7].tolist() == pytest.approx(list(range(1, 17)))
    marked = [name for name, x in model.named_parameters() if getattr(x, "_no_weight_decay", False)]
    assert len(marked) == 18 and all(name.endswith(("A_log", "D")) for name in marked)


def test_options_reach_the_blocks():
    options = {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7, "bias": True, "conv_bias": False}
    model = MambaLM(MambaConfig(**(SMALL | options), dt_min=0.5, dt_max=0.5, dt_init_floor=1e-3))
    mixer = model.backbone.layers[1].mixer
    assert mixer.A_log.shape == (18, 5) and mixer.conv1d.weight.shape == (18, 1, 3)
    assert mixer.dt_proj.weight.shape == (18, 7)
    assert mixer.in_proj.bias is not None and mixer.conv1d.bias is None
    assert torch.nn.functional.softplus(mixer.dt_proj.bias).tolist() == pytest.approx([0.5] * 18)
    assert [MambaConfig(vocab_size=size).padded_vocab_size for size in (1, 8, 9, 16)] == [8, 8, 16, 16]
    assert MambaConfig(d_model=50).dt_rank == 4 and mixer.layer_idx == 1


# --- precision ---


def test_half_precision_keeps_what_must_be_wide():
    model = make(bf16)
    dtypes = {name.split(".")[-1] if "mixer" in name else "other": x.dtype for name, x in model.named_parameters()}
    assert dtypes["A_log"] == dtypes["D"] == f32 and dtypes["other"] == dtypes["weight"] == bf16
    logits = model(draw(2, 5))
    assert logits.dtype == f32
    assert make(f64)(draw(2, 5)).dtype == f64


@pytest.mark.parametrize("wide", [True, False])
def test_the_residual_stream_has_the_dtype_that_was_asked_for(wide):
    model, seen = make(bf16, residual_in_fp32=wide), []
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    model(draw(1, 4))
    assert set(seen) == {f32 if wide else bf16}


def test_a_half_precision_residual_stream_loses_what_small_layers_add():
    torch.manual_seed(0)
    tokens, options = draw(2, 8, vocab_size=16), {"vocab_size": 16, "d_model": 32, "n_layer": 24}

    def added(model):
        """What all layers together add to the stream."""
        ends = []
        model.backbone.layers[0].register_forward_pre_hook(lambda _, inputs: ends.append(inputs[0].double()))
        model.backbone.layers[-1].register_forward_hook(lambda _, inputs, output: ends.append(output.double()))
        model(tokens)
        return ends[1] - ends[0]

    narrow = MambaLM(MambaConfig(**options, residual_in_fp32=False), dtype=bf16)
    with torch.no_grad():
        narrow.backbone.embedding.weight.mul_(500)  # a stream beside which each layer is small
    wide, exact = MambaLM(MambaConfig(**options), dtype=bf16), MambaLM(MambaConfig(**options), dtype=f64)
    for model in (wide, exact):
        model.load_state_dict(narrow.state_dict())
    expected = added(exact)
    error = lambda model: ((added(model) - expected).norm() / expected.norm()).item()
    assert error(wide) < 0.02 and error(narrow) > 0.1, (error(wide), error(narrow))


def test_rms_norm_squares_in_float32():
    x = torch.tensor([[300.0, -400.0]], dtype=torch.float16)  # the squares are beyond float16
    assert RMSNorm(2, dtype=torch.float16)(x).tolist() == [
        [pytest.approx(0.8485, rel=1e-3), pytest.approx(-1.131, rel=1e-3)]
    ]
    assert RMSNorm(2, dtype=bf16)(x.float()).dtype == bf16


def test_autocast_trains_in_half_precision_with_a_wide_stream():
    model, seen = make(f32), []
    model.backbone.layers[1].register_forward_hook(
        lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype])
    )
    with torch.autocast("cpu", bf16):
        logits = model(draw(2, 5))
    logits.sum().backward()
    assert seen == [f32, f32] and logits.dtype == f32
    assert_near(logits, make(f32)(draw(2, 5)), 0.1)
    assert all(x.grad.dtype == f32 for x in model.parameters())


# --- bad arguments ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size: expected an integer >= 1, got 0"),
        ({"d_model": 6.0}, ValueError, "d_model: expected an integer"),
        ({"n_layer": True}, ValueError, "n_layer: "),
        ({"pad_vocab_size_multiple": -8}, ValueError, "pad_vocab_size_multiple: "),
        ({"dt_rank": "all"}, ValueError, "dt_rank: expected 'auto' or an integer >= 1, got 'all'"),
        ({"tie_embeddings": 1}, TypeError, "tie_embeddings: expected a bool"),
        ({"norm_epsilon": -1}, ValueError, "norm_epsilon: "),
        ({"norm_epsilon": "1e-5"}, ValueError, "norm_epsilon: "),
    ],
)
def test_a_wrong_size_is_named(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        MambaConfig(**options)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, r"input_ids: expected an int64 or int32 tensor, got torch.float32"),
        ([[1, 2]], TypeError, "input_ids: expected an int64 or int32 tensor, got list"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"input_ids: expected shape \(B, L\)"),
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, "input_ids: expected at least one token"),
        (torch.tensor([[3, 11]]), ValueError, "input_ids: expected tokens from 0 to 10, got 11"),
        (torch.tensor([[3, -1]]), ValueError, "input_ids: expected tokens from 0 to 10, got -1"),
    ],
)
def test_wrong_tokens_are_named(tokens, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()(tokens)


def test_other_wrong_arguments_are_named():
    model = make()
    with pytest.raises(TypeError, match=r"^config: expected a MambaConfig, got dict"):
        MambaLM({})
    with pytest.raises(ValueError, match=r"^cache: expected the states of 2 layers, got 1"):
        model(draw(1, 2), model.allocate_cache(1)[:1])
    with pytest.raises(TypeError, match=r"^mask: "):
        model(draw(1, 2), mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"^conv_state: expected shape \(2, 12, 4\)"):
        model(draw(2, 2), model.allocate_cache(3))


def test_the_module_needs_no_transformers():
    import subprocess
    import sys

    code = (
        "import sys, minimamba.language_model\n"
        "assert not {'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert language_model.MambaLM.generate.__module__ == "minimamba.generation"
