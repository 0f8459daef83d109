"""Reading and writing a language model's weights, in the two layouts that Mamba's weights are published in.

    layout          state-spaces/mamba-*                  state-spaces/mamba-*-hf, which transformers reads
    config.json     d_model, n_layer, ssm_cfg, ...        model_type "mamba", hidden_size, num_hidden_layers, ...
    weights         pytorch_model.bin                     model.safetensors, or shards that an index lists
    one name        backbone.embedding.weight             backbone.embeddings.weight; all others are the same

`read` gives the same answer for both, `fill` puts it into a model, `write` makes the second layout. Everything is
checked before the first weight is copied, so a model is filled as a whole or not at all. A .bin file is a pickle, which
can run any program: it is read with weights_only=True, which refuses all but tensors.

Raises FileNotFoundError for what is missing and ValueError for what is wrong; the message names the file first.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

# Our names for the keys of config.json in transformers' layout. Where a key is absent, both have the same default.
TRANSFORMERS = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layer", "state_size": "d_state",
    "conv_kernel": "d_conv", "expand": "expand", "time_step_rank": "dt_rank", "time_step_min": "dt_min",
    "time_step_max": "dt_max", "time_step_floor": "dt_init_floor", "use_bias": "bias", "use_conv_bias": "conv_bias",
    "layer_norm_epsilon": "norm_epsilon", "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
# The keys of state-spaces' layout that we read under their own name: of the model, and of its "ssm_cfg".
OWN = ("vocab_size", "d_model", "n_layer", "residual_in_fp32", "tie_embeddings", "pad_vocab_size_multiple")
OWN_SSM = ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init_floor", "conv_bias", "bias")
SIZES = ("vocab_size", "d_model", "n_layer")
SHIPPED = Path(__file__).parent / "pretrained"
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


class Checkpoint(NamedTuple):
    """What was read: arguments of `MambaConfig`, {name: tensor} with our names, and the file of the tensors."""

    config: dict
    tensors: dict
    file: Path


def read(directory_or_repo_id):
    """Return the `Checkpoint` in a directory, or of a repository of Hugging Face (fetched by huggingface_hub)."""
    find = _finder(directory_or_repo_id)
    config_file = find("config.json")
    config = read_config(config_file)
    for name, read_tensors in (
        ("model.safetensors", read_safetensors),
        ("model.safetensors.index.json", partial(read_shards, find=find)),
        ("pytorch_model.bin", read_pickle),
    ):
        file = find(name, required=False)
        if file is not None:
            tensors = read_tensors(file)
            renamed = {name.replace("backbone.embeddings.", "backbone.embedding."): x for name, x in tensors.items()}
            return Checkpoint(config, renamed, file)
    raise FileNotFoundError(
        f"{config_file.parent}: expected model.safetensors, model.safetensors.index.json or pytorch_model.bin"
    )


def fill(model, checkpoint):
    """Copy a checkpoint's tensors into a `MambaLM`, or raise ValueError and leave it as it is.

    Names and shapes must be the model's. The head may be absent if it is tied, and rows of the embedding that only pad
    the vocabulary may be absent too: they become zero.
    """
    wanted = dict(model.named_parameters(remove_duplicate=False))
    tensors, file = dict(checkpoint.tensors), checkpoint.file
    if model.config.tie_embeddings:
        wanted.pop(HEAD)
        head = tensors.pop(HEAD, None)
        if head is not None and not torch.equal(head, tensors.get(EMBEDDING, head)):
            raise ValueError(f"{file}: {HEAD}: expected {EMBEDDING}, to which config.json ties it")
    for problem, names in (("is missing", wanted.keys() - tensors), ("is unknown", tensors.keys() - wanted)):
        if names:
            first, *others = sorted(names)
            more = f", and {len(others)} others" if others else ""
            raise ValueError(f"{file}: tensor {first} {problem}{more}")
    for name, parameter in wanted.items():
        shapes = [tuple(parameter.shape)]
        if name in (EMBEDDING, HEAD):
            shapes.append((model.config.vocab_size, *shapes[0][1:]))
        tensor = tensors[name]
        if tuple(tensor.shape) not in shapes:
            expected = " or ".join(map(str, dict.fromkeys(shapes)))
            raise ValueError(f"{file}: {name}: expected shape {expected}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{file}: {name}: expected floating-point numbers, got {tensor.dtype}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            tensor = tensors[name]
            parameter[: len(tensor)] = tensor.to(parameter.device, parameter.dtype)
            parameter[len(tensor) :] = 0


def write(model, directory):
    """Write a `MambaLM` as config.json and model.safetensors in transformers' layout.

    Rows that pad the vocabulary are left out, since transformers would sample from them. Each file is written under
    another name and renamed when it is whole.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, x in model.named_parameters():  # a tied head comes once, as the embedding
        if name in (EMBEDDING, HEAD):
            x = x[: model.config.vocab_size]
        tensors[name.replace("backbone.embedding.", "backbone.embeddings.")] = x.detach().cpu().contiguous()
    config = {theirs: getattr(model.config, ours) for theirs, ours in TRANSFORMERS.items()}
    config |= {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_act": "silu",
        "intermediate_size": model.config.expand * model.config.d_model,
        # transformers would take token 0 for each of these.
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "pad_vocab_size_multiple": model.config.pad_vocab_size_multiple,
    }  # fmt: skip
    _replace(directory / "model.safetensors", lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    _replace(directory / "config.json", lambda part: part.write_text(json.dumps(config, indent=2) + "\n"))


# --- config.json -------------------------------------------------------------------------------------------------


def read_config(file):
    """Return the arguments of `MambaConfig` that a config.json of either layout stands for."""
    config = _read_json(file)
    if "model_type" in config:
        _require(file, config, "model_type", ("mamba",))
        _require(file, config, "hidden_act", ("silu", None))
        known = {ours: config[theirs] for theirs, ours in TRANSFORMERS.items() if theirs in config}
        known["pad_vocab_size_multiple"] = config.get("pad_vocab_size_multiple", 1)
        names = {ours: theirs for theirs, ours in TRANSFORMERS.items()}
    else:
        ssm = config.get("ssm_cfg") or {}
        _require(file, ssm, "layer", ("Mamba1", None), prefix="ssm_cfg.")
        _require(file, config, "rms_norm", (True, None))
        _require(file, config, "d_intermediate", (0, None))
        _require(file, config, "attn_layer_idx", ([], None))
        known = {name: config[name] for name in OWN if name in config}
        known |= {name: ssm[name] for name in OWN_SSM if name in ssm}
        names = {}
    for name in SIZES:
        if name not in known:
            raise ValueError(f"{file}: expected the key {names.get(name, name)}")
    return known


def _require(file, config, key, values, prefix=""):
    if config.get(key) not in values:
        raise ValueError(f"{file}: {prefix}{key}: expected {values[0]!r}, got {config[key]!r}")


def _read_json(file):
    try:
        content = json.loads(Path(file).read_text())
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{file}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


# --- files of tensors --------------------------------------------------------------------------------------------


def read_safetensors(file):
    """Return {name: tensor}. The package safetensors checks the file's length against its header."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: expected a whole safetensors file: {error}") from error


def read_shards(index_file, find):
    """Return {name: tensor} of all the files that model.safetensors.index.json names."""
    places = _read_json(index_file).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) and Path(x).name == x for x in places.values()):
        raise ValueError(f"{index_file}: weight_map: expected {{tensor: name of a file beside this one}}")
    shards = {name: read_safetensors(find(name)) for name in sorted(set(places.values()))}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise ValueError(f"{index_file}: expected the tensor {tensor} in {name}")
    return {tensor: shards[name][tensor] for tensor, name in places.items()}


def read_pickle(file):
    """Return {name: tensor} of what torch.save wrote."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{file}: expected a whole file of tensors and nothing else: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise ValueError(f"{file}: expected a dictionary of tensors, got {type(tensors).__name__}")
    return tensors


def _finder(source):
    """Return find(name, required=True) -> the path of a file in the directory or repository `source`, or None."""
    directory = Path(source)
    if directory.is_dir():
        fetch, missing = lambda name: directory / name if (directory / name).is_file() else None, ()
    else:
        # What is no name of a repository, owner/name, can only be meant as a directory.
        if not isinstance(source, str) or source.count("/") > 1 or source.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{source}: expected a directory, or a name on Hugging Face")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

        missing = (EntryNotFoundError, HFValidationError, RepositoryNotFoundError)
        fetch = lambda name: Path(hf_hub_download(source, name))

    def find(name, required=True):
        path, reason = None, None
        try:
            path = fetch(name)
        except missing as error:
            reason = error
        if path is None and required:
            raise FileNotFoundError(f"{directory / name}: {reason or 'no such file'}") from reason
        return path

    return find


def _replace(file, write_to):
    part = file.with_name(file.name + ".part")
    write_to(part)
    os.replace(part, file)
