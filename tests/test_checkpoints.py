"""Chapter 13's files: both published layouts, transformers as the reference, and every way a file can be wrong."""

import json
import os
import pickle
import shutil

import pytest
import torch

from minimamba import checkpoints
from minimamba.language_model import MambaConfig, MambaLM

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = {"vocab_size": 37, "d_model": 16, "n_layer": 2, "d_state": 4, "dt_rank": 3}
SHAPES = [
    {"vocab_size": 40, "d_model": 32, "n_layer": 2},
    {"vocab_size": 37, "d_model": 24, "n_layer": 3, "d_state": 5, "dt_rank": 7, "expand": 3, "bias": True},
    {"vocab_size": 64, "d_model": 16, "n_layer": 1, "d_conv": 3, "conv_bias": False, "tie_embeddings": False,
     "residual_in_fp32": False, "norm_epsilon": 0.01, "pad_vocab_size_multiple": 1},
]  # fmt: skip

THEIRS = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_layer": "num_hidden_layers", "d_state": "state_size",
    "dt_rank": "time_step_rank", "expand": "expand", "d_conv": "conv_kernel", "bias": "use_bias",
    "conv_bias": "use_conv_bias", "tie_embeddings": "tie_word_embeddings", "residual_in_fp32": "residual_in_fp32",
    "norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip


def make(seed=0, dtype=None, **options):
    """Random in every parameter, so that no two could be exchanged."""
    torch.manual_seed(seed)
    model = MambaLM(MambaConfig(**(SMALL | options)), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name in (checkpoints.EMBEDDING, checkpoints.HEAD):
                parameter[model.config.vocab_size :] = 0
    return model


def draw(model, *shape):
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def same(a, b):
    """Whether two models are equal in configuration and in every bit of every parameter."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return a.config == b.config and all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)


def state_spaces(model, directory, **changes):
    """Write the layout of state-spaces/mamba-*, as the official save_pretrained does."""
    directory.mkdir(exist_ok=True)
    c = model.config
    config = {
        "d_model": c.d_model, "n_layer": c.n_layer, "vocab_size": c.vocab_size, "rms_norm": True,
        "ssm_cfg": {"d_state": c.d_state, "dt_rank": c.dt_rank, "d_conv": c.d_conv, "expand": c.expand},
        "residual_in_fp32": c.residual_in_fp32, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config | changes))
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return directory


@pytest.fixture
def saved(tmp_path):
    """A directory in transformers' layout, and the model in it."""
    model = make()
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


# --- transformers ---


@pytest.mark.parametrize("options", SHAPES)
def test_transformers_reads_what_we_write(tmp_path, options):
    model = make(**options)
    model.save_pretrained(tmp_path)
    theirs, report = transformers.MambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    tokens = draw(model, 2, 33)
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert theirs.config.eos_token_id is None and theirs.config.vocab_size == model.config.vocab_size


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("shard", ["5GB", "12kB"])
def test_logits_and_gradients_equal_transformers_own_random_model(tmp_path, options, shard):
    torch.manual_seed(3)
    config = {THEIRS[name]: value for name, value in options.items() if name in THEIRS}
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**config))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "12kB")
    ours = MambaLM.from_pretrained(tmp_path)
    assert ours.config == MambaConfig(**(options | {"pad_vocab_size_multiple": 1}))
    tokens = draw(ours, 2, 33)
    logits, expected = ours(tokens), theirs(tokens).logits
    assert (logits - expected).abs().max() < 1e-4
    upstream = torch.randn_like(expected)
    logits.backward(upstream)
    expected.backward(upstream)
    wanted = {name.replace("embeddings", "embedding"): x.grad for name, x in theirs.named_parameters()}
    found = {name: x.grad[: len(wanted[name])] for name, x in ours.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).abs().max() < 1e-4 * wanted[name].abs().max().clamp_min(1), name


# --- our own round trips ---


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_survives_the_round_trip_bit_for_bit(tmp_path, options, dtype):
    model = make(**options, dtype=dtype)
    model.save_pretrained(tmp_path)
    assert same(MambaLM.from_pretrained(tmp_path, dtype=dtype), model)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == str(dtype)[6:]


def test_what_is_written_has_no_padding_and_no_tied_head(saved):
    tensors = safetensors_torch.load_file(saved[0] / "model.safetensors")
    assert tensors["backbone.embeddings.weight"].shape == (37, 16)
    assert "lm_head.weight" not in tensors and len(tensors) == 2 * 10 + 2


def test_saving_twice_leaves_the_second(saved):
    other = make(seed=1, n_layer=3)
    other.save_pretrained(saved[0])
    assert same(MambaLM.from_pretrained(saved[0]), other)


def test_a_loaded_model_is_ready_to_use(saved):
    model = MambaLM.from_pretrained(saved[0])
    assert not model.training and model.lm_head.weight is model.backbone.embedding.weight
    assert model.backbone.layers[0].mixer.A_log._no_weight_decay
    half = MambaLM.from_pretrained(saved[0], dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16 and half.backbone.layers[0].mixer.A_log.dtype == torch.float32


# --- the layout of state-spaces ---


def test_the_layout_of_state_spaces(tmp_path):
    model = make()
    assert same(MambaLM.from_pretrained(state_spaces(model, tmp_path)), model)


def test_the_layout_of_state_spaces_as_it_was_published_first(tmp_path):
    """mamba-130m: an empty ssm_cfg, everything by default."""
    model = make(d_state=16, dt_rank="auto")
    assert same(MambaLM.from_pretrained(state_spaces(model, tmp_path, ssm_cfg={})), model)


def test_the_published_config_of_the_transformers_layout(tmp_path):
    """mamba-130m-hf: keys of both layouts side by side, the vocabulary padded already."""
    published = {
        "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
        "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
        "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
        "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
        "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {},
        "state_size": 16, "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1,
        "time_step_min": 0.001, "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32",
        "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = MambaConfig(**checkpoints.read_config(tmp_path / "config.json"))
    assert config == MambaConfig(vocab_size=50280, d_model=768, n_layer=24, dt_rank=48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer: expected 'Mamba1', got 'Mamba2'"),
        ({"rms_norm": False}, "rms_norm: expected True, got False"),
        ({"d_intermediate": 64}, "d_intermediate: expected 0, got 64"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx: expected \[\], got \[1\]"),
        ({"d_model": -4}, "d_model: expected an integer >= 1, got -4"),
        ({"model_type": "mamba2"}, "model_type: expected 'mamba', got 'mamba2'"),
        ({"model_type": "mamba", "hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"model_type": "mamba"}, "expected the key hidden_size"),
    ],
)
def test_what_is_no_such_model_is_refused(tmp_path, changes, message):
    state_spaces(make(), tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json: {message}"):
        MambaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["d_model", "n_layer", "vocab_size"])
def test_a_missing_key_is_named(tmp_path, key):
    state_spaces(make(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: expected the key {key}$"):
        MambaLM.from_pretrained(tmp_path)


# --- files that are missing or broken ---


def test_missing_files_are_named(saved):
    directory, _ = saved
    os.rename(directory / "model.safetensors", directory / "else")
    with pytest.raises(FileNotFoundError, match=rf"^{directory}: expected model.safetensors, .*or pytorch_model.bin"):
        MambaLM.from_pretrained(directory)
    os.remove(directory / "config.json")
    with pytest.raises(FileNotFoundError, match=f"^{directory}/config.json: no such file"):
        MambaLM.from_pretrained(directory)
    with pytest.raises(FileNotFoundError, match=f"^{directory}/nowhere: expected a directory"):
        MambaLM.from_pretrained(str(directory / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"^nowhere/at/all: expected a directory"):
        MambaLM.from_pretrained("nowhere/at/all")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'"text"'])
def test_a_broken_config_is_named(saved, content):
    (saved[0] / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{saved[0]}/config.json: expected (a )?JSON"):
        MambaLM.from_pretrained(saved[0])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, name, kept):
    model = make()
    state_spaces(model, tmp_path) if name.endswith(".bin") else model.save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: expected a whole"):
        MambaLM.from_pretrained(tmp_path)


def test_a_pickle_that_would_run_a_program_does_not(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    state_spaces(make(), tmp_path)
    for write in (torch.save, lambda x, file: file.write_bytes(pickle.dumps(x, protocol=2))):
        write({"backbone.embedding.weight": Trap()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model.bin: expected a whole file of tensors and nothing else"):
            MambaLM.from_pretrained(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"step": 3}, torch.ones(3)])
def test_a_bin_file_of_something_else_is_refused(tmp_path, content):
    state_spaces(make(), tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: expected a dictionary of tensors"):
        MambaLM.from_pretrained(tmp_path)


SECOND_D = "backbone.layers.1.mixer.D"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(SECOND_D), f"tensor {SECOND_D} is missing$"),
        (lambda t: (t.pop(SECOND_D), t.pop("backbone.norm_f.weight")), f"tensor {SECOND_D} is missing, and 1 others$"),
        (lambda t: t.update({"backbone.layers.2.mixer.D": torch.ones(2)}), "tensor backbone.layers.2.* is unknown"),
        (lambda t: t.update({SECOND_D: torch.ones(31)}), rf"{SECOND_D}: expected shape \(32,\), got \(31,\)"),
        (lambda t: t.update({SECOND_D: torch.ones(1, 32)}), rf"{SECOND_D}: expected shape \(32,\), got \(1, 32\)"),
        (lambda t: t.update({SECOND_D: torch.ones(32).int()}), f"{SECOND_D}: expected floating-point numbers, got"),
        (lambda t: t.update({"backbone.embeddings.weight": torch.ones(36, 16)}),
         r"backbone.embedding.weight: expected shape \(40, 16\) or \(37, 16\), got \(36, 16\)"),
        (lambda t: t.update({"lm_head.weight": torch.ones(37, 16)}), "lm_head.weight: expected backbone.embedding"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named_and_nothing_is_half_loaded(saved, change, message):
    directory, model = saved
    tensors = safetensors_torch.load_file(directory / "model.safetensors")
    tensors = {name: x + 1 for name, x in tensors.items()}
    change(tensors)
    safetensors_torch.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^{directory}/model.safetensors: {message}"):
        MambaLM.from_pretrained(directory)
    with pytest.raises(ValueError):
        checkpoints.fill(model, checkpoints.read(directory))
    assert same(model, make())


def test_rows_that_pad_the_vocabulary_are_filled_with_zeros(saved):
    other = make(seed=1)
    other.backbone.embedding.weight.data[37:] = 1
    checkpoints.fill(other, checkpoints.read(saved[0]))
    assert same(other, saved[1])


def test_an_untied_head_must_be_there(tmp_path):
    make(tie_embeddings=False).save_pretrained(tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor lm_head.weight is missing"):
        MambaLM.from_pretrained(tmp_path)


def test_broken_shards_are_named(tmp_path):
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="8kB")
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    name, shard = next(iter(index["weight_map"].items()))
    other = next(file for file in index["weight_map"].values() if file != shard)

    index_file.write_text(json.dumps({"weight_map": index["weight_map"] | {name: other}}))
    with pytest.raises(ValueError, match=f"^{index_file}: expected the tensor {name} in {other}"):
        MambaLM.from_pretrained(tmp_path)
    for places in ({name: f"../{shard}"}, {name: 3}, [name], None):
        index_file.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(ValueError, match=f"^{index_file}: weight_map: expected"):
            MambaLM.from_pretrained(tmp_path)
    index_file.write_text(json.dumps(index))
    os.remove(tmp_path / shard)
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/{shard}: no such file"):
        MambaLM.from_pretrained(tmp_path)


def test_a_write_that_fails_leaves_the_old_files(saved, monkeypatch):
    directory, model = saved

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors_torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make(seed=1).save_pretrained(directory)
    assert same(MambaLM.from_pretrained(directory), model)


# --- Hugging Face ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub without a network, with this cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("layout", ["transformers", "sharded", "state-spaces"])
def test_a_repository_is_read_from_the_cache_of_huggingface_hub(hub, tmp_path, layout):
    model = make()
    if layout == "state-spaces":
        state_spaces(model, tmp_path / "files")
    else:
        model.save_pretrained(tmp_path / "files")
    if layout == "sharded":
        theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "files")
        shutil.rmtree(tmp_path / "files")
        theirs.save_pretrained(tmp_path / "files", max_shard_size="8kB")
    repository = hub / "models--someone--mamba"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tmp_path / "files", repository / "snapshots" / ("0" * 40))
    assert same(MambaLM.from_pretrained("someone/mamba"), model)


@pytest.mark.parametrize("name", ["someone/nothing", "nothing", "not a name", "-/-"])
def test_an_unknown_repository_is_named(hub, name):
    with pytest.raises(FileNotFoundError, match=rf"^{name}/config.json: .+"):
        MambaLM.from_pretrained(name)
