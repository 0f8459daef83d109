"""Chapter 13: a Mamba language model. It keeps a state where a Transformer keeps a cache.

    p(x_1, ..., x_L) = Π p(x_t | x_<t)           a text's probability, one token given those before it
    h_0     = E[x]                                token -> vector, a row of the embedding
    h_{i+1} = h_i + Mamba_i(RMSNorm_i(h_i))       n_layer times; the sum, the residual stream, is float32
    logits  = RMSNorm(h_n) Eᵀ                     the same E: the head is tied to the embedding
    p(x_{t+1} | x_<=t) = softmax(logits_t)        so logits at t are compared with the token at t + 1

Parameters have the names of the official checkpoints (state-spaces/mamba-*). Reading and writing files is in
checkpoints.py, choosing tokens in generation.py. Wrong arguments raise TypeError or ValueError, and the message begins
with the argument's name.

Source: Mamba (Gu and Dao, 2023), section 3.4 and figure 3; RMSNorm: Zhang and Sennrich, 2019, equation 4.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from minimamba import checkpoints, generation
from minimamba._autocast import widen
from minimamba._validation import check_shape
from minimamba.mamba_block import Mamba


@dataclass
class MambaConfig:
    """The sizes of a `MambaLM` on tokens (B, L): the official names, and defaults that make a small model of bytes.

    d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init_floor, bias and conv_bias go to each `Mamba` block.
    pad_vocab_size_multiple: the embedding has rows up to the next multiple, which suits a GPU's matrix products; the
    logits of these rows are cut off. residual_in_fp32: the sum over the layers is float32 even if the weights are half.
    Source: state-spaces/mamba, `mamba_ssm.models.config_mamba.MambaConfig`.
    """

    vocab_size: int = 256
    d_model: int = 256
    n_layer: int = 4
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | str = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    bias: bool = False
    conv_bias: bool = True
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "n_layer", "d_state", "d_conv", "expand", "pad_vocab_size_multiple"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.dt_rank == "auto":
            self.dt_rank = math.ceil(self.d_model / 16)
        if type(self.dt_rank) is not int or self.dt_rank < 1:
            raise ValueError(f"dt_rank: expected 'auto' or an integer >= 1, got {self.dt_rank!r}")
        for name in ("bias", "conv_bias", "residual_in_fp32", "tie_embeddings"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if type(self.norm_epsilon) not in (int, float) or not 0 <= self.norm_epsilon < math.inf:
            raise ValueError(f"norm_epsilon: expected a finite number >= 0, got {self.norm_epsilon!r}")

    @property
    def padded_vocab_size(self):
        """The number of rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


class MambaLM(nn.Module):
    """A language model of `Mamba` blocks: token ids (B, L) -> logits (B, L, vocab_size) in float32.

    dtype is that of the weights; each block's A_log and D stay float32, since an error in log A is one in the exponent
    of a decay that is applied thousands of times. Initial values are the official ones: embedding normal with standard
    deviation 0.02, each block's output divided by √n_layer, so that the residual stream does not grow with depth.
    Source: state-spaces/mamba, `mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel`.
    """

    def __init__(self, config, device=None, dtype=None):
        super().__init__()
        if not isinstance(config, MambaConfig):
            raise TypeError(f"config: expected a MambaConfig, got {type(config).__name__}")
        factory = {"device": device, "dtype": dtype}
        self.config = config
        rows = config.padded_vocab_size
        self.backbone = nn.ModuleDict(
            {
                "embedding": nn.Embedding(rows, config.d_model, **factory),
                "layers": nn.ModuleList(Block(config, i, **factory) for i in range(config.n_layer)),
                "norm_f": RMSNorm(config.d_model, config.norm_epsilon, **factory),
            }
        )
        self.lm_head = nn.Linear(config.d_model, rows, bias=False, **factory)
        with torch.no_grad():
            nn.init.normal_(self.backbone.embedding.weight, std=0.02)
            for padded in (self.backbone.embedding.weight, self.lm_head.weight):
                padded[config.vocab_size :] = 0
            for layer in self.backbone.layers:
                layer.mixer.out_proj.weight /= math.sqrt(config.n_layer)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, input_ids, cache=None, *, mask=None, cu_seqlens=None, last_only=False):
        """Return logits (B, L, vocab_size), float32 or float64; with last_only only the last step's (B, 1, vocab_size).

        input_ids (B, L) int64 or int32. cache: what `allocate_cache` returned; the model goes on from it and updates
        it in place, so a text may come whole, in pieces or token by token. mask (B, L) bool, True for real tokens:
        where it is False the state stays as it is. cu_seqlens (documents + 1,): borders of documents packed in one
        row, B = 1; each begins afresh.
        """
        self._check_tokens(input_ids, cache)
        x = self.backbone.embedding(input_ids)  # (B, L, d_model)
        if self.config.residual_in_fp32:
            x = widen(x)
        for i, layer in enumerate(self.backbone.layers):
            x = layer(x, None if cache is None else cache[i], mask=mask, cu_seqlens=cu_seqlens)
        if last_only:
            x = x[:, -1:]
        logits = self.lm_head(self.backbone.norm_f(x))
        return widen(logits[..., : self.config.vocab_size])

    def allocate_cache(self, batch_size, dtype=None):
        """Return the zero state of each layer, a list of `MambaCache`: all the memory a text of any length needs."""
        return [layer.mixer.allocate_inference_cache(batch_size, dtype=dtype) for layer in self.backbone.layers]

    # Text from the model: see generation.py.
    generate = generation.generate
    stream = generation.stream

    @classmethod
    def from_pretrained(cls, directory_or_repo_id=None, device=None, dtype=None):
        """Return the model stored in a directory, or under a name such as "state-spaces/mamba-130m" on Hugging Face.

        By default it is the model that comes with this package: trained on Python's standard library, byte by byte.

        Both layouts are read, state-spaces' (config.json, pytorch_model.bin) and transformers' (config.json,
        model.safetensors, whole or in shards). dtype: default float32. Raises FileNotFoundError or ValueError, which
        name the file and the key or tensor at fault. A name of Hugging Face needs the package huggingface_hub.
        """
        checkpoint = checkpoints.read(checkpoints.SHIPPED if directory_or_repo_id is None else directory_or_repo_id)
        try:
            model = cls(MambaConfig(**checkpoint.config), device, dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint.file.parent / 'config.json'}: {error}") from error
        checkpoints.fill(model, checkpoint)
        return model.eval()

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors, which `from_pretrained` and transformers read."""
        checkpoints.write(self, directory)

    def _check_tokens(self, input_ids, cache):
        if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            got = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise TypeError(f"input_ids: expected an int64 or int32 tensor, got {got}")
        check_shape("input_ids", input_ids, ("B", "L"))
        if input_ids.numel() == 0:
            raise ValueError(f"input_ids: expected at least one token, got shape {tuple(input_ids.shape)}")
        if cache is not None and len(cache) != self.config.n_layer:
            raise ValueError(f"cache: expected the states of {self.config.n_layer} layers, got {len(cache)}")
        # On a GPU a look at the values would wait for it; there the embedding itself stops the program.
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(value) for value in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"input_ids: expected tokens from 0 to {self.config.vocab_size - 1}, got {wrong}")


class Block(nn.Module):
    """x (B, L, d_model) -> x + Mamba(RMSNorm(x)). The sum has x's dtype: float32 if the residual stream has it."""

    def __init__(self, config, layer_idx, device=None, dtype=None):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_epsilon, device, dtype)
        names = ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init_floor", "conv_bias", "bias")
        options = {name: getattr(config, name) for name in names}
        self.mixer = Mamba(config.d_model, **options, layer_idx=layer_idx, device=device, dtype=dtype)

    def forward(self, x, cache=None, *, mask=None, cu_seqlens=None):
        return x + self.mixer(self.norm(x), cache, mask=mask, cu_seqlens=cu_seqlens)


class RMSNorm(nn.Module):
    """x (..., size) -> weight · x / √(mean(x²) + epsilon), computed in float32 or float64, in the weight's dtype.

    Unlike LayerNorm it subtracts no mean and adds no bias. Source: Zhang and Sennrich, 2019, equation 4.
    """

    def __init__(self, size, epsilon=1e-5, device=None, dtype=None):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def forward(self, x):
        y = F.rms_norm(widen(x), self.weight.shape, widen(self.weight), self.epsilon)
        return y.to(self.weight.dtype)
