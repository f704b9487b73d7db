"""The model: T5, an encoder that reads the prompt and a decoder that writes the answer.

    from chatlm import ChatLM, ChatLMConfig
    model = ChatLM(ChatLMConfig.preset("small", vocab_size=29298))
    logits, loss = model(input_ids, attention_mask, labels=labels)

T5 is two stacks of the same blocks. The encoder sees the whole prompt. The decoder sees the answer
so far, and the encoder's output. Each layer adds its result to one stream of vectors, x:

    prompt "法国的首都是哪里？[EOS]"                 answer so far "[PAD]法国的首"
      ids (B, S)                                      ids (B, T)
       |  shared: (V, D), one row per token            |  shared
      x (B, S, D)                                     x (B, T, D)
       |  num_layers times:                            |  num_decoder_layers times:
       |    x += attention(norm(x), all positions)     |    x += attention(norm(x), those so far)
       |    x += feed_forward(norm(x))                 |    x += attention(norm(x), encoded)  <--+
       |  norm                                         |    x += feed_forward(norm(x))           |
      encoded (B, S, D) -------------------------------|-----------------------------------------+
                                                       |  norm, then times shared transposed
                                                      logits (B, T, V): one score per token -> "都"

Attention compares every query with every key and mixes the values by the result:

    attention(q, k, v) = softmax(q k^T + bias) v            one head: q (T, K), k and v (S, K)

T5 has no position embeddings. The bias depends on the distance between key and query instead, and
each head learns it: near distances have a number each, far ones share buckets that get wider.

    distance  0 1 2 3 4 5 6 7  8-11  12-15  16-22  23-31  32-45  46-63  64-90  91 and more
    bucket    0 1 2 3 4 5 6 7   8     9      10     11     12     13     14     15

These are the encoder's buckets for looking back; looking ahead has 16 more. The decoder, which only
looks back, has a bucket for each distance up to 15, and 16 wider ones.

The loss is the mean of -log p(token) over the answer's tokens. With three tokens, logits [2, 1, 0]
and the first token correct: p = [0.665, 0.245, 0.090], the loss is -log 0.665 = 0.41, and its
gradient with respect to the logits is p - [1, 0, 0] = [-0.335, 0.245, 0.090]. See
LinearCrossEntropy.

A new model starts from counts of tokens and of which token follows which (init_bigrams).

Modules and config fields have the names of Hugging Face's T5, so our state_dict is the
model.safetensors that transformers loads. Try next: print model.decoder.position_bias(...) of a
trained model and see which heads look near and which far. Give a preset half the heads, or half the
layers, and compare the loss after the same number of steps.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer" (arXiv:1910.10683).

Shapes in comments: B batch, S source length, T target length, L either of them, D d_model, H heads,
K head width (d_kv), F feed-forward width (d_ff), V vocabulary, N rows, I inputs and O outputs of a
linear layer.
"""
import dataclasses
import importlib.util
import json
import math
import re
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import (
    IGNORED,
    atomic_write,
    check_name,
    read_json,
    refuse_pointer,
    round_up,
    write_errors,
    write_file,
)

PRESETS = {  # parameters with 29,298 tokens: small 14.8 million, 0.2b 187.7 million
    "demo": {"d_model": 128, "d_ff": 512, "d_kv": 32, "num_heads": 4,
             "num_layers": 2, "num_decoder_layers": 2},
    "small": {"d_model": 256, "d_ff": 1024, "d_kv": 64, "num_heads": 4,
              "num_layers": 4, "num_decoder_layers": 4},
    "0.2b": {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12,
             "num_layers": 10, "num_decoder_layers": 10},
}
T5_DEFAULTS = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6,
               "num_heads": 8}  # what transformers assumes where a config.json leaves a field out
T5_ALIASES = {"hidden_size": "d_model", "num_attention_heads": "num_heads",
              "num_hidden_layers": "num_layers", "head_dim": "d_kv"}
LOSS_CHUNK_BYTES = 1 << 26  # logits that the loss holds at once
CACHE_BYTES = 1 << 23  # logits that stay in a CPU's cache while several operations pass over them
ROW_BLOCK = 64  # see Linear


# --- config ---------------------------------------------------------------------------------------


@dataclass
class ChatLMConfig:
    """The fields of transformers' T5Config that change the computation, under the same names."""
    vocab_size: int = 29298
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 3072
    num_layers: int = 10
    num_decoder_layers: int | None = None  # None: as many as the encoder has
    num_heads: int = 12
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"  # or "gated-gelu", as in T5 1.1
    tie_word_embeddings: bool = True  # the head is the embedding matrix, transposed
    scale_decoder_outputs: bool | None = None  # times D^-0.5 before the head; None: when tied
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self):
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.tie_word_embeddings
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            raise ValueError(f"feed_forward_proj {self.feed_forward_proj!r} is not supported: "
                             "relu or gated-gelu")
        for field in dataclasses.fields(self):
            kind: Any = (get_args(field.type) or [field.type])[0]  # of int | None: int
            self.check_field(field.name, kind)

    def check_field(self, name: str, kind: type) -> None:
        value, least = getattr(self, name), 0 if name.endswith("_token_id") else 1
        most = 1000 if name.endswith("_layers") else (1 << 31) - 1
        if kind is int and (type(value) is not int or not least <= value <= most):
            raise ValueError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
        if kind is float and (type(value) not in (int, float) or not 0 <= value < math.inf):
            raise ValueError(f"{name} must be a number of 0 or more, not {value!r}")
        if kind is bool and type(value) is not bool:
            raise ValueError(f"{name} must be true or false, not {value!r}")
        if name.endswith("_token_id") and value >= self.vocab_size:
            raise ValueError(f"{name} is {value}, and the vocabulary has only "
                             f"{self.vocab_size} tokens")
        if name == "relative_attention_max_distance":
            buckets = self.relative_attention_num_buckets
            if buckets < 4 or value <= buckets // 2:
                raise ValueError(f"{name} {value} needs fewer than {2 * value} relative_attention_"
                                 f"num_buckets, and at least 4, not {buckets}")

    @classmethod
    def preset(cls, name: str, **changes) -> "ChatLMConfig":
        """One of PRESETS, with any field changed. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}: choose from {', '.join(PRESETS)}")
        return cls(**PRESETS[name] | changes)

    @classmethod
    def from_pretrained(cls, folder) -> "ChatLMConfig":
        """Read config.json, and token ids from generation_config.json, which transformers prefers.
        Raises FileNotFoundError without a config.json, ValueError for an unsupported model.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            if (Path(folder) / "adapter_config.json").is_file():
                raise ValueError(f"{folder} is a LoRA adapter, not a model: merge it first with  "
                                 "python dpo.py merge --model BASE_MODEL --adapter "
                                 f"{shlex.quote(str(folder))} --out MERGED")
            raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
        fields, generation = read_json(path), read_generation(folder)
        if fields.get("model_type") != "t5":
            raise ValueError(f"{path}: model_type is {fields.get('model_type')!r}, and only 't5' "
                             "can be loaded")
        fields = {T5_ALIASES.get(name, name): value for name, value in fields.items()}
        known = {field.name for field in dataclasses.fields(cls)}
        values = T5_DEFAULTS | {name: value for name, value in fields.items() if name in known}
        if "scale_decoder_outputs" in values:  # null is false there, but "when tied" in our config
            values["scale_decoder_outputs"] = bool(values["scale_decoder_outputs"])
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            if (preferred := generation.get(name)) is not None:
                if name != "eos_token_id" and fields.get(name) not in (None, preferred):
                    raise ValueError(f"{folder}: config.json and generation_config.json have "
                                     f"different values of {name}")
                values[name] = preferred
            if isinstance(values.get(name), list) and len(values[name]) == 1:
                values[name] = values[name][0]
        try:
            config = cls(**values)
        except ValueError as e:
            field = str(e).split()[0]  # with which every message of check_field begins
            is_in_other = generation.get(field) is not None
            shown = path.with_name("generation_config.json") if is_in_other else path
            raise ValueError(f"{shown}: {e}") from None
        derived = config.derived()
        for name in ("dense_act_fn", "is_gated_act"):
            if fields.get(name, derived[name]) != derived[name]:
                raise ValueError(f"{path}: {name} {fields[name]!r} is not supported with "
                                 f"feed_forward_proj {config.feed_forward_proj!r}")
        return config

    def derived(self) -> dict:
        """The fields of config.json that transformers derives from ours."""
        gated = self.feed_forward_proj == "gated-gelu"
        return {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
                "is_encoder_decoder": True, "is_gated_act": gated, "use_cache": True,
                "dense_act_fn": "gelu_new" if gated else "relu"}

    def to_json(self) -> str:
        return json.dumps({**self.derived(), **dataclasses.asdict(self)}, indent=2) + "\n"


# --- norm, attention, feed-forward ----------------------------------------------------------------


def empty_embedding(rows: int, width: int) -> nn.Embedding:
    """An nn.Embedding without initial values: on the meta device, torch would import its compiler
    to fill them."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Dropout(nn.Module):
    """nn.Dropout that reads its rate from the config, so that it can change after loading."""

    def __init__(self, config: ChatLMConfig):
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout_rate) if self.training else x


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of matrix products with a weight: autocast's if enabled, else the weight's."""
    device = weight.device.type
    enabled = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else weight.dtype


def row_block(weight: Tensor) -> int:
    """Rows of a product are padded to a multiple of this; see Linear."""
    has_16_bits = compute_dtype(weight) in (torch.bfloat16, torch.float16)
    return ROW_BLOCK if weight.is_cpu and has_16_bits else 1


def pad_rows(x: Tensor, block: int) -> Tensor:
    """(N, D) -> (M, D): rows of zeros are appended up to the next multiple of block."""
    return F.pad(x, (0, 0, 0, -len(x) % block)) if len(x) % block else x


class Linear(nn.Linear):
    """x -> x @ weight.T, without a bias. In 16 bits on a CPU, oneDNN compiles a kernel for every
    new number of rows, which takes longer than the product. So under autocast the rows are padded
    with zeros to a multiple of ROW_BLOCK."""

    def __init__(self, inputs: int, outputs: int, device=None, dtype=None):
        super().__init__(inputs, outputs, False, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        if not torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return F.linear(x, self.weight)
        rows = x.reshape(-1, x.size(-1))
        y = F.linear(pad_rows(rows, row_block(self.weight)), self.weight)
        return y[:len(rows)].view(*x.shape[:-1], self.out_features)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: a layer norm without centering and without bias. The
    result has the dtype of the matrix products that follow, so they need no cast."""

    def __init__(self, config: ChatLMConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(self.weight)
        if x.is_cuda:  # one kernel, plus a cast of what is not float32
            y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
            return y.to(dtype)
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * (x * inverse).to(self.weight.dtype)).to(dtype)


def relative_position_bucket(distance: Tensor, bidirectional: bool, num_buckets: int,
                             max_distance: int) -> Tensor:
    """Sort distances (key position - query position, int64, any shape) into num_buckets buckets.
    Half of them hold one near distance each. The others get wider with the logarithm of the
    distance; the last one holds everything beyond max_distance. If bidirectional, half of all
    buckets look back and half ahead.

        num_buckets 32, not bidirectional:  0 -> 0, -1 -> 1, -15 -> 15, -17 -> 16, -200 -> 31
    """
    bucket = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    near = num_buckets // 2
    ratio = torch.log(distance.float() / near) / math.log(max_distance / near)
    far = near + (ratio * (num_buckets - near)).long()
    return bucket + torch.where(distance < near, distance, far.clamp(max=num_buckets - 1))


class Attention(nn.Module):
    """Multi-head attention without biases. There is no scale 1/sqrt(K): T5 makes q smaller at
    initialization instead. has_position_bias: for the first layer of a stack."""

    def __init__(self, config: ChatLMConfig, has_position_bias: bool = False):
        super().__init__()
        self.config = config
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner)
        self.k = Linear(config.d_model, inner)
        self.v = Linear(config.d_model, inner)
        self.o = Linear(inner, config.d_model)
        if has_position_bias:
            self.relative_attention_bias = empty_embedding(config.relative_attention_num_buckets,
                                                           config.num_heads)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, H * K) -> (B, H, L, K)"""
        return x.unflatten(-1, (self.config.num_heads, self.config.d_kv)).transpose(1, 2)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> keys and values, each (B, H, S, K)."""
        return self.split_heads(self.k(source)), self.split_heads(self.v(source))

    def forward(self, x: Tensor, bias: Tensor, source: Tensor | None = None) -> Tensor:
        """x (B, T, D) attends to source (B, S, D), or to itself -> (B, T, D). bias: (B or 1, H or
        1, T or 1, S), the dtype's lowest number where a query must not attend."""
        keys, values = self.keys_values(x if source is None else source)
        dropout = self.config.dropout_rate if self.training else 0.0
        y = F.scaled_dot_product_attention(
            self.split_heads(self.q(x)), keys, values, attn_mask=bias.to(keys.dtype), scale=1.0,
            dropout_p=dropout)
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """wo(relu(wi x)), or gated: wo(gelu(wi_0 x) * wi_1 x)."""

    def __init__(self, config: ChatLMConfig):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.wi_0 = Linear(config.d_model, config.d_ff)
            self.wi_1 = Linear(config.d_model, config.d_ff)
        else:
            self.wi = Linear(config.d_model, config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model)
        self.dropout = Dropout(config)

    def activation(self, h: Tensor) -> Tensor:
        """(..., F), or gated (..., 2 F) -> (..., F)"""
        if not self.gated:
            return F.relu(h)
        gate, h = h.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * h

    def forward(self, x: Tensor) -> Tensor:
        up = torch.cat([self.wi_0(x), self.wi_1(x)], -1) if self.gated else self.wi(x)
        h = self.dropout(self.activation(up))
        if h.dtype == torch.float16:  # the product can pass float16's 65,504
            return self.wo(h / 16).float() * 16
        return self.wo(h)


# --- blocks and stacks ----------------------------------------------------------------------------


class Residual(nn.Module):
    """x + dropout(module(norm(x), ...)). name: of the module in Hugging Face's T5."""

    def __init__(self, config: ChatLMConfig, name: str, module: nn.Module):
        super().__init__()
        self.name = name
        self.add_module(name, module)
        self.layer_norm = RMSNorm(config)
        self.dropout = Dropout(config)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return x + self.dropout(getattr(self, self.name)(self.layer_norm(x), *context))


class Block(nn.Module):
    """Self-attention, in the decoder also cross-attention, then feed-forward."""

    def __init__(self, config: ChatLMConfig, is_decoder: bool, is_first: bool):
        super().__init__()
        layers = [Residual(config, "SelfAttention", Attention(config, is_first)),
                  Residual(config, "DenseReluDense", FeedForward(config))]
        if is_decoder:
            layers.insert(1, Residual(config, "EncDecAttention", Attention(config)))
        self.layer = nn.ModuleList(layers)

    def forward(self, x: Tensor, bias: Tensor, encoded: Tensor | None = None,
                mask: Tensor | None = None) -> Tensor:
        """x (B, L, D), in the decoder with encoded (B, S, D) and mask (B, 1, 1, S) -> (B, L, D)"""
        x = self.layer[0](x, bias)
        if encoded is not None:
            x = self.layer[1](x, mask, encoded)
        return self.layer[-1](x)


class Stack(nn.Module):
    """The blocks of the encoder or of the decoder. The first block's position bias serves all."""

    def __init__(self, config: ChatLMConfig, is_decoder: bool):
        super().__init__()
        self.config, self.is_decoder = config, is_decoder
        blocks = config.num_decoder_layers if is_decoder else config.num_layers
        self.block: Any = nn.ModuleList(Block(config, is_decoder, is_first=i == 0)
                                   for i in range(blocks or 0))
        self.final_layer_norm = RMSNorm(config)
        self.dropout = Dropout(config)
        self.checkpoint_activations = False

    def position_bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The bias of every head, by distance: positions (T,) and (S,) -> (1, H, T, S)."""
        c = self.config
        bucket = relative_position_bucket(
            keys[None, :] - queries[:, None], not self.is_decoder,
            c.relative_attention_num_buckets, c.relative_attention_max_distance)  # (T, S)
        bias = self.block[0].layer[0].SelfAttention.relative_attention_bias(bucket)  # (T, S, H)
        return bias.permute(2, 0, 1)[None].contiguous()  # as GPU kernels need it

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D). With checkpoint_activations, backward runs each block again
        instead of keeping its activations."""
        for block in self.block:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
        return x


# --- the model ------------------------------------------------------------------------------------


class ChatLM(nn.Module):
    """See the top of the file. generation: the content of generation_config.json."""

    def __init__(self, config: ChatLMConfig):
        super().__init__()
        self.config = config
        self.generation: dict = {"max_new_tokens": 256}
        self.lora: dict = {}  # of adapter_config.json, see add_lora
        self.shared = empty_embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        if self.shared.weight.device.type != "meta":
            init_weights(self)

    def encode(self, input_ids: Tensor,
               attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """input_ids (B, S) int64 -> encoder output (B, S, D), and the mask as a bias (B, 1, 1, S):
        0 for tokens, the lowest number for padding. attention_mask: (B, S), 0 for padding; None: no
        padding. Both results have the dtype of the matrix products."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.encoder.dropout(self.shared(input_ids))
        length, dtype = input_ids.size(1), compute_dtype(self.shared.weight)
        # attention on GPUs reads masks whose rows begin at multiples of 8: pad, then slice
        positions = torch.arange(length + -length % 8, device=x.device)
        padded = F.pad(attention_mask, (0, len(positions) - length))
        mask = (padded[:, None, None, :] == 0).to(dtype) * torch.finfo(dtype).min
        bias = self.encoder.position_bias(positions[:length], positions).to(dtype) + mask
        bias = bias[..., :length]  # (B, H, S, S)
        x = self.encoder(x, bias)
        return self.encoder.dropout(self.encoder.final_layer_norm(x)), mask[..., :length]

    def decode(self, decoder_input_ids: Tensor, encoded: Tensor, mask: Tensor) -> Tensor:
        """decoder_input_ids (B, T), with encode's output -> hidden states (B, T, D), after the last
        norm and scale: times head_weight they are logits."""
        x = self.decoder.dropout(self.shared(decoder_input_ids))
        length, dtype = decoder_input_ids.size(1), compute_dtype(self.shared.weight)
        keys = torch.arange(length + -length % 8, device=x.device)  # as in encode
        queries = keys[:length]
        bias = self.decoder.position_bias(queries, keys).to(dtype)
        bias = bias.masked_fill(keys > queries[:, None], torch.finfo(dtype).min)
        bias = bias[..., :length]  # (1, H, T, T)
        return self.to_head(self.decoder(x, bias, encoded, mask))

    def to_head(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D): the last norm, and the scale that a tied head needs."""
        x = self.decoder.dropout(self.decoder.final_layer_norm(x))
        return x * self.config.d_model ** -0.5 if self.config.scale_decoder_outputs else x

    def head_weight(self) -> Tensor:
        """(V, D)"""
        return self.shared.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def shift_right(self, labels: Tensor) -> Tensor:
        """labels (B, T) -> decoder_input_ids (B, T): a start token, then all but the last."""
        ids = labels.roll(1, dims=1)
        ids = ids.masked_fill(ids == IGNORED, self.config.pad_token_id)
        ids[:, 0] = self.config.decoder_start_token_id
        return ids

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                decoder_input_ids: Tensor | None = None,
                labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V), and the mean nats per label, () float32, or None without labels.

        input_ids, attention_mask: (B, S) int64; the mask is 0 for padding (None: no padding).
        decoder_input_ids: (B, T) int64; None: the labels, shifted right.
        labels: (B, T) int64, -100 for padding.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("the decoder needs decoder_input_ids or labels")
            decoder_input_ids = self.shift_right(labels)
        hidden = self.decode(decoder_input_ids, *self.encode(input_ids, attention_mask))
        logits = F.linear(hidden, self.head_weight())
        if labels is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        return logits, loss

    def target_states(self, encoded: Tensor, mask: Tensor, labels: Tensor,
                      targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The hidden states (N, D) that predict the labels that are not -100, those labels (N,),
        and their flat positions (N,), which are `targets` if given."""
        if targets is None:
            targets = find_targets(labels)
        hidden = self.decode(self.shift_right(labels), encoded, mask).flatten(0, 1)
        return hidden.index_select(0, targets), labels.flatten().index_select(0, targets), targets

    def loss_sum(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor,
                 targets: Tensor | None = None) -> Tensor:
        """The loss for training, (): summed over the labels, without holding all logits. targets:
        find_targets(labels); if given, there is no device sync."""
        encoded, mask = self.encode(input_ids, attention_mask)
        hidden, labels, _ = self.target_states(encoded, mask, labels, targets)
        if torch.is_grad_enabled():
            return LinearCrossEntropy.apply(hidden, self.head_weight(), labels)
        return -LinearLogProbs.apply(hidden, self.head_weight(), labels).sum()

    def sequence_logps(self, encoded: Tensor, mask: Tensor, labels: Tensor,
                       targets: Tensor | None = None) -> Tensor:
        """Log-probabilities (B,) of labels (B, T), given encode's output. targets: see loss_sum.
        Logits exist for one chunk at a time, also in backward, which recomputes them."""
        hidden, chosen, targets = self.target_states(encoded, mask, labels, targets)
        logps = LinearLogProbs.apply(hidden, self.head_weight(), chosen)
        rows = targets // labels.size(1)
        return torch.zeros(len(labels), device=labels.device).index_add(0, rows, logps)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def train_flops(self, source_tokens: float, target_tokens: float) -> float:
        """Operations of the matrix products in a forward and a backward pass: 6 for each weight
        that a token meets. Attention's own products, a few percent, are left out."""
        def size(module: nn.Module) -> int:
            return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

        cross = [block.layer[1].EncDecAttention for block in self.decoder.block]
        crossed = sum(size(a.k) + size(a.v) for a in cross)  # the decoder's, met by source tokens
        source = size(self.encoder) + crossed
        target = size(self.decoder) - crossed + self.head_weight().numel()
        return 6.0 * (source_tokens * source + target_tokens * target)

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype | None = None, device=None) -> "ChatLM":
        """See load_model. dtype None keeps the file's."""
        return load_model(folder, dtype, device)

    def save_pretrained(self, folder) -> None:
        """Write config.json, generation_config.json and model.safetensors, each atomically."""
        save_model(self, Path(folder))


def find_targets(labels: Tensor) -> Tensor:
    """labels (B, T) -> the positions (N,) of those that are not -100, in the flat labels."""
    return (labels.flatten() != IGNORED).nonzero()[:, 0]


class LinearCrossEntropy(torch.autograd.Function):
    """sum_i -log softmax(hidden_i @ weight.T)[labels_i]: hidden (N, D), weight (V, D), labels (N,)
    -> () float32. forward computes the gradients too, and backward only scales them: three matrix
    products, as many as without chunks, and LOSS_CHUNK_BYTES of memory instead of N * V logits."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        loss, *gradients = head_gradients(ctx, hidden, weight, labels, compute_dtype(weight))
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *(None if x is None else x * grad for x in ctx.saved_tensors), None


class LinearLogProbs(torch.autograd.Function):
    """log softmax(hidden_i @ weight.T)[labels_i] -> (N,) float32. Shapes as in LinearCrossEntropy.
    The gradient of each row is known only in backward, which computes the logits again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.dtype = compute_dtype(weight)
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(ctx.dtype)
            for part, _, logits in logit_chunks(hidden.to(ctx.dtype), w):
                label = labels[part]
                logits = logits[:len(label)]
                for rows in cache_parts(logits):
                    x = logits[rows].float()
                    logps[part][rows] = -F.cross_entropy(x, label[rows], reduction="none")
        return logps

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, labels = ctx.saved_tensors
        _, *gradients = head_gradients(ctx, hidden, weight, labels, ctx.dtype, -grad)
        return *gradients, None


def head_gradients(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype,
                   scale: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of LinearCrossEntropy, (), and the gradients that ctx needs, one chunk of rows at a
    time. dtype: of the matrix products; the loss and the weight's gradient are float32. scale:
    (N,), a factor for each row's gradient. The gradient of the logits is softmax minus one-hot."""
    needs_hidden, needs_weight, _ = ctx.needs_input_grad
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
    loss = hidden.new_zeros((), dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.to(dtype)
        for part, h, logits in logit_chunks(hidden.to(dtype), w):
            label = labels[part]
            loss += logits_to_gradient(logits[:len(label)], label)
            if scale is not None:
                logits[:len(label)] *= scale[part, None]
            if grad_hidden is not None:
                grad_hidden[part] = (logits @ w)[:len(label)]
            if grad_weight is not None and dtype == torch.float32:
                grad_weight.addmm_(logits.T, h)  # without a temporary as large as the weight
            elif grad_weight is not None:
                grad_weight += logits.T @ h
    return loss, grad_hidden, grad_weight


def logit_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """hidden (N, D), weight (V, D) of one dtype -> for each chunk of n rows: their slice, hidden
    states (M, D) and logits (M, V), which the next chunk overwrites. M >= n, because a CPU needs
    rows in multiples (see Linear): the last chunk ends with rows of zeros, which must stay zeros.
    """
    n, block = len(hidden), row_block(weight)
    rows = LOSS_CHUNK_BYTES // (weight.element_size() * len(weight)) // block * block or block
    # rows of the buffer begin on a cache line: a third faster
    hidden, width = pad_rows(hidden, block), round_up(len(weight), 64)
    buffer = weight.new_empty(min(rows, len(hidden)), width)
    buffer[:, len(weight):] = 0  # bfloat16 kernels on CPUs also read the padding: no NaN there
    for i in range(0, n, rows):
        h = hidden[i:i + rows]
        logits = torch.mm(h, weight.T, out=buffer[:len(h), :len(weight)])
        yield slice(i, min(i + rows, n)), h, logits


def logits_to_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Replace logits (N, V) in place by their gradient, softmax - one-hot; return the loss, ().
    A GPU runs it as one compiled function if it can."""
    if logits.is_cuda and compiled_gradient.is_usable:
        return compiled_gradient(logits, labels)
    loss = logits.new_zeros((), dtype=torch.float32)
    for rows in cache_parts(logits):
        x, label = logits[rows].float(), labels[rows, None]
        top, chosen = x.amax(-1), x.gather(1, label)[:, 0]
        p = torch.softmax(x, -1, out=x)
        # log(sum(exp(x))) = top - log(p of top)
        loss += (top - p.amax(-1).log() - chosen).sum()
        logits[rows] = p.scatter_add_(1, label, -torch.ones_like(label, dtype=p.dtype))
    return loss


def cache_parts(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of logits (N, V). On a CPU, a slice fits the cache as float32; on a GPU,
    one slice has all rows."""
    rows = max(1, CACHE_BYTES // (4 * logits.size(1)) if logits.is_cpu else len(logits))
    for i in range(0, len(logits), rows):
        yield slice(i, i + rows)


def plain_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """logits_to_gradient as its definition. Compiled, it passes over the logits three times."""
    x = logits.float()
    total = x.logsumexp(-1, keepdim=True)
    loss = (total - x.gather(1, labels[:, None])).sum()
    is_label = torch.arange(x.size(1), device=x.device) == labels[:, None]
    logits.copy_((x - total).exp() - is_label.float())
    return loss


class CompiledFunction:
    """A function that torch.compile turns into few GPU kernels, at its first call. is_usable is
    False without Triton, and once compiling has failed (for example, no C compiler)."""

    def __init__(self, function: Callable, backend: str = "inductor"):
        self.plain, self.backend = function, backend
        self.compiled: Callable | None = None
        self.is_usable = backend != "inductor" or importlib.util.find_spec("triton") is not None

    def __call__(self, *args: Tensor):
        try:
            if self.compiled is None:  # not above: it imports torch's compiler, which takes seconds
                self.compiled = torch.compile(self.plain, dynamic=True, backend=self.backend)
            return self.compiled(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # noqa: BLE001 (compilers fail in many ways, before they compute)
            self.is_usable = False
            reason = f"{type(e).__name__}: {e}".partition("\n")[0]
            print(f"note: the loss is not compiled: {reason:.200}", file=sys.stderr)
            return self.plain(*args)


compiled_gradient = CompiledFunction(plain_gradient)


# --- initialization -------------------------------------------------------------------------------


@torch.no_grad()
def init_weights(model: ChatLM) -> None:
    """T5's initialization: normal with std 1/sqrt(inputs), 1 for embeddings, and q smaller by
    sqrt(K), for the scale that attention leaves out."""
    c, factor = model.config, model.config.initializer_factor
    for name, p in model.named_parameters():
        kind = name.split(".")[-2]
        if "norm" in kind:
            p.fill_(factor)
        elif kind in ("shared", "lm_head"):
            p.normal_(std=factor)
        elif kind == "q":
            p.normal_(std=factor * (c.d_model * c.d_kv) ** -0.5)
        elif kind == "relative_attention_bias":
            p.normal_(std=factor * c.d_model ** -0.5)
        else:
            p.normal_(std=factor * p.size(1) ** -0.5)


class Bigrams:
    """How much likelier v is after u than elsewhere, the positive pointwise mutual information, and
    its best approximation of low rank (Levy and Goldberg 2014; see tests/COUNTS.md):

        M[u, v] = max(0, log p(u, v) / (p(u) p(v)))  ~  spread * a_u . b_v

    a and b (V, R) are the singular value decomposition of M, with weight p(u) p(v) for each pair.
    Both are scaled to mean square 1 under p, so `spread` is the typical size of an entry.
    """

    def __init__(self, before: Tensor, after: Tensor, vocab_size: int, rank: int):
        """before, after: (N,) int64 on a CPU, each token and the one that follows it."""
        pairs, count = torch.unique(before * vocab_size + after, return_counts=True)
        u, v = pairs // vocab_size, pairs % vocab_size
        counts = torch.stack([torch.bincount(x, minlength=vocab_size) for x in (before, after)])
        self.counted = counts.any(0)  # (V,)
        # smoothing: no probability is 0, and a pair that was seen once counts half
        smooth = (counts + 0.3).double() / (len(after) + 0.3 * vocab_size)
        self.p_before, self.p_after = smooth  # (V,) each
        weight = (self.p_before[u] * self.p_after[v]).sqrt()
        information = ((count - 0.5) / len(after) / weight ** 2).log().clamp(min=0)
        with warnings.catch_warnings():  # torch calls its sparse rows a beta feature
            warnings.simplefilter("ignore")
            matrix = torch.sparse_coo_tensor(torch.stack([u, v]), information * weight,
                                             (vocab_size, vocab_size)).to_sparse_csr()
            # float64, or the vectors would depend visibly on the number of threads
            left, values, right = torch.svd_lowrank(matrix, rank, niter=1)
        self.spread = values.square().mean().sqrt()
        self.a = left / self.p_before.sqrt()[:, None]  # (V, R)
        self.b = right * values / self.spread / self.p_after.sqrt()[:, None]  # (V, R)


COUNTS_NEED = "a tied head, ReLU layers, and d_ff >= 2 d_model"


def fits_counts(config: ChatLMConfig) -> bool:
    """Whether init_bigrams can initialize such a model."""
    is_tied = bool(config.tie_word_embeddings and config.scale_decoder_outputs)
    is_wide = config.d_ff >= 2 * config.d_model
    return is_tied and is_wide and config.feed_forward_proj == "relu"


@torch.no_grad()
def init_bigrams(model: ChatLM, before: Tensor, after: Tensor) -> None:
    """Initialize from unigram and bigram counts, so that at first about

        logits[v after u] = log p(v) + spread * a_u . b_v            (see Bigrams)

    before, after: (N,) int64 on a CPU, from answers: each token and the one that follows it. Raises
    ValueError for an untied head, and for gated or narrow feed-forward layers.

    Row v of the embedding, which is the head too, is [constant | log p(v) | a_v | b_v]. The last
    feed-forward layer of the decoder gets the row of u, and copies two parts to other places:

        row of u       constant    log p(u)    a_u    b_u
        its copy           0       constant     0     a_u
        head, row v    constant    log p(v)    a_v    b_v       copy . row v = log p(v) + a_u . b_v

    (up to constant factors). The layer also subtracts the row of u itself; otherwise each token
    would predict tokens like itself. As relu(x) - relu(-x) = x, the ReLU layer is linear here. The
    other layers start smaller, by 1/sqrt(their number) as in GPT-2. Tokens that were not counted
    keep random values, except for the first two.
    """
    c, last = model.config, model.decoder.block[-1].layer[-1].DenseReluDense
    if not fits_counts(c):
        raise ValueError(f"init_bigrams needs {COUNTS_NEED}")
    rank = min(c.d_model // 2 - 1, c.vocab_size)
    counts = Bigrams(before, after, c.vocab_size, rank)
    p = counts.p_before

    log_p = counts.p_after.log()
    log_p = (log_p - counts.p_after @ log_p)[:, None]  # (V, 1), mean 0
    constant = torch.full_like(log_p, c.d_model ** 0.5 / 4)
    rows = torch.cat([constant, log_p, counts.a, counts.b], 1)
    rows = F.pad(rows, (0, c.d_model - rows.size(1)))  # (V, D)

    size = rows.square().mean(1).sqrt()  # (V,): the layer's norm makes row / size of a row
    strength = 2.0  # of the copy next to what other layers add
    copy = torch.zeros(c.d_model, c.d_model, dtype=torch.float64)  # (D, D): copy @ row of u
    copy[1, 0] = strength / (counts.spread * constant[0])
    copy[2 + rank:2 + 2 * rank, 2:2 + rank] = strength * torch.eye(rank)
    copy -= p @ size * torch.eye(c.d_model)
    after_layer = rows + rows / size[:, None] @ copy.T  # (V, D), per token
    # the last norm divides by the size of its input, and its weight restores the counts' scale
    final_scale = counts.spread / strength / (p @ (1 / size / after_layer.norm(dim=1)))

    model.decoder.final_layer_norm.weight.fill_(final_scale)
    for name, parameter in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            parameter.mul_((3 * len(model.decoder.block)) ** -0.5)
    eye = torch.eye(c.d_model)
    last.wi.weight[:2 * c.d_model] = torch.cat([eye, -eye])
    last.wo.weight[:, :2 * c.d_model] = torch.cat([copy, -copy], 1)
    uncounted = torch.cat([rows[:, :2], model.shared.weight[:, 2:].double().cpu()], 1)
    model.shared.weight.copy_(torch.where(counts.counted[:, None], rows, uncounted))


# --- LoRA -----------------------------------------------------------------------------------------


class LoRALinear(Linear):
    """W x + (alpha / rank) B A dropout(x): W (out, in) is frozen, A (rank, in) starts random and
    B (out, rank) at 0. Hu et al. 2021 (arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight = base.weight
        self.scale, self.dropout = alpha / rank, dropout
        device, dtype = base.weight.device, base.weight.dtype
        # drawn on the CPU: GPUs of two kinds draw different numbers from one seed
        self.lora_A = Linear(base.in_features, rank, dtype=dtype).to(device)
        self.lora_B = Linear(rank, base.out_features, device, dtype)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        low_rank = self.lora_A(F.dropout(x, self.dropout, self.training))
        return super().forward(x) + self.lora_B(low_rank) * self.scale


def is_target(name: str, targets: str | list[str]) -> bool:
    """PEFT's rule for target_modules: "all-linear", a regular expression for a module's whole name,
    or a list of names or endings of names."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def find_linear(model: ChatLM, targets: str | list[str]) -> dict[str, nn.Linear]:
    """The linear layers that targets name, see is_target."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and is_target(name, targets)}


def add_lora(model: ChatLM, rank: int, alpha: float, targets: str | Iterable[str],
             dropout: float = 0.0) -> None:
    """Replace the linear layers that targets name by LoRALinear, and freeze everything else.
    targets: see is_target; a list with "all" means "all-linear". Raises ValueError if they name no
    layer, or the head, whose weight is used without its layer."""
    if not isinstance(targets, str):
        targets = list(targets)
        targets = "all-linear" if "all" in targets else targets
    model.requires_grad_(False)
    found = find_linear(model, targets)
    if targets == "all-linear":
        found.pop("lm_head", None)
    if "lm_head" in found:
        raise ValueError("LoRA for lm_head is not supported")
    if not found:
        raise ValueError("the model has no such linear layer")
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(module, rank, alpha, dropout))
    model.lora = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout,
                  "target_modules": targets}


def merge_lora(model: ChatLM) -> None:
    """Add every low-rank product to its weight, and put plain linear layers back."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, LoRALinear):
                continue
            plain = Linear(child.in_features, child.out_features, device="meta")
            product = child.lora_B.weight.float() @ child.lora_A.weight.float()
            merged = (child.weight + child.scale * product).to(child.weight.dtype)
            plain.weight = nn.Parameter(merged.detach())
            setattr(parent, name, plain)


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_adapter(model: ChatLM, folder: Path, base: str, base_hash: str = "") -> None:
    """Write an adapter as PEFT does. base: the model's folder; base_hash: of its weights, for
    `dpo.py merge`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"base_model.model.{name}": p.detach().contiguous()
               for name, p in model.named_parameters() if ".lora_" in name}
    config = {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", **model.lora, "bias": "none",
              "base_model_name_or_path": base, "fan_in_fan_out": False, "inference_mode": True}
    if config["target_modules"] == "all-linear":
        config["target_modules"] = sorted({name.split(".")[-3] for name in weights})
    metadata = {"format": "pt", "base_hash": base_hash}
    write_tensors(weights, folder / "adapter_model.safetensors", metadata)
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    turns = model.generation.get("turns")  # see data.py clean --turns
    generation = {"turns": turns} if turns else {}
    write_file(folder / "generation_config.json", json.dumps(generation) + "\n")


def adapter_base_hash(folder: Path) -> str:
    """The hash of the weights that an adapter was trained on; "" if its file does not say."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as f:
        return (f.metadata() or {}).get("base_hash", "")


def load_adapter(model: ChatLM, folder: Path) -> None:
    """Add the LoRA adapter of a folder, ours or PEFT's, to a model. Raises FileNotFoundError, or
    ValueError if it is damaged, for another model, or has an option that is not applied here."""
    files = [folder / name for name in ADAPTER_FILES]
    if not all(path.is_file() for path in files):
        raise FileNotFoundError(f"{folder} is not an adapter: it needs adapter_config.json and "
                                "adapter_model.safetensors")
    refuse_pointer(files[1])
    try:
        config, weights = read_json(files[0]), load_file(files[1])
    except (ValueError, SafetensorError) as e:
        raise ValueError(f"{folder} is not a whole LoRA adapter: {e}") from None
    check_adapter(config, files[0])
    try:
        add_lora(model, config["r"], config["lora_alpha"], config["target_modules"])
    except (ValueError, re.error) as e:
        raise ValueError(f"{files[0]}: target_modules {config['target_modules']!r} does not fit "
                         f"the model: {e}") from None
    weights = {name.removeprefix("base_model.model."): w for name, w in weights.items()}
    own = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    if wrong := first_misfit(own, weights):
        raise ValueError(f"{folder}: the adapter is for another model, or its weights are not "
                         f"those that adapter_config.json describes, first at {wrong}")
    common_dtype(weights, folder)
    check_finite(weights, folder)
    model.load_state_dict(weights, strict=False)
    if turns := read_generation(folder).get("turns"):
        model.generation["turns"] = turns


# Fields of adapter_config.json that load_adapter applies, or that only matter while training
ADAPTER_FIELDS = """r lora_alpha target_modules peft_type task_type base_model_name_or_path
    revision inference_mode auto_mapping peft_version lora_dropout init_lora_weights bias
    megatron_core qalora_group_size runtime_config eva_config"""
ADAPTER_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # do not change the base


def check_adapter(config: dict, path: Path) -> None:
    """Raise ValueError, naming the field, for an option that load_adapter does not apply."""
    def reject(field: str, why: str) -> None:
        shown = json.dumps(config.get(field), ensure_ascii=False)[:80]
        raise ValueError(f"{path}: {field} {shown} {why}")

    if config.get("peft_type") != "LORA":
        reject("peft_type", "is not supported, only LORA")
    if type(config.get("r")) is not int or not 1 <= config["r"] <= 1 << 20:
        reject("r", "is not a whole number of 1 or more")
    alpha: Any = config.get("lora_alpha")
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        reject("lora_alpha", "is not a number")
    targets = config.get("target_modules")
    is_list = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
    if not targets or not (isinstance(targets, str) or is_list):
        reject("target_modules", "is neither a regular expression nor a list of names")
    if config.get("init_lora_weights", True) not in ADAPTER_INITS:
        reject("init_lora_weights", "changes the base model too, which is not supported: convert "
               "the adapter to plain LoRA with PEFT")
    if config.get("bias", "none") != "none":
        reject("bias", "is not supported, only none")
    for field, value in config.items():
        empty = isinstance(value, (dict, list, str)) and not value
        known = field in ADAPTER_FIELDS.split()
        if not known and value is not None and value is not False and not empty:
            reject(field, "is not supported")


# --- weights in and out ---------------------------------------------------------------------------


def load_model(folder, dtype: torch.dtype | None, device) -> ChatLM:
    """A model in evaluation mode, from a Hugging Face T5 folder: config.json and model.safetensors,
    in one file or in shards. Raises FileNotFoundError or ValueError naming what is missing or does
    not fit."""
    check_name(folder)
    config = ChatLMConfig.from_pretrained(folder)
    weights = read_weights(Path(folder))
    # a file of tied weights may keep them under any one of these names
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    names = ["shared.weight", *copies] + ["lm_head.weight"] * config.tie_word_embeddings
    shared = next((weights[name] for name in names if name in weights), None)
    if shared is None:
        raise ValueError(f"{folder}: the weights have no shared.weight, so they are not a T5's")
    for name in copies:
        if name in weights and not torch.equal(weights[name], shared):
            raise ValueError(f"{folder}: {name} differs from the shared embedding: such models are "
                             "not supported")
    stored = common_dtype(weights, folder)
    dtype = dtype or stored
    head = weights.get("lm_head.weight")
    # the weights decide: a file may hold a copy of the tied head, or leave it out
    config.tie_word_embeddings = head is None or torch.equal(head, shared)
    weights["shared.weight"] = shared
    copies += ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]
    copies += ["lm_head.weight"] * config.tie_word_embeddings
    weights = {name: w.to(dtype).to(device)  # cast first, or a GPU holds both
               for name, w in weights.items() if name not in copies}
    with torch.device("meta"):
        model = ChatLM(config)
    if wrong := first_misfit(dict(model.named_parameters()), weights):
        raise ValueError(f"{folder}: config.json and the weights do not fit, first at {wrong}")
    check_finite(weights, folder)
    model.load_state_dict(weights, assign=True)
    model.generation = read_generation(folder) or model.generation
    return model.eval()


def first_misfit(parameters: dict[str, Any], weights: dict[str, Tensor]) -> str | None:
    """The first name that only one of the two has, or whose shapes differ."""
    wrong = sorted(parameters.keys() ^ weights.keys())
    wrong += [name for name, p in parameters.items() if p.shape != weights.get(name, p).shape]
    return wrong[0] if wrong else None


def common_dtype(weights: dict[str, Tensor], folder) -> torch.dtype:
    """The dtype of most numbers: transformers keeps a float16 model's wo in float32. Raises
    ValueError for quantized weights."""
    numbers: Counter[torch.dtype] = Counter()
    for name, w in weights.items():
        if not w.is_floating_point() or w.element_size() < 2:
            raise ValueError(f"{folder}: {name} has dtype {w.dtype}: quantized weights are not "
                             "read")
        numbers[w.dtype] += w.numel()
    return numbers.most_common(1)[0][0]


def check_finite(weights: dict[str, Tensor], folder) -> None:
    """Raise ValueError for weights with NaN or infinity, which would give empty answers."""
    sums = torch.stack([w.sum(dtype=torch.float32).cpu() for w in weights.values()])
    bad = [name for name, total in zip(weights, sums.tolist()) if not math.isfinite(total)]
    if bad:
        raise ValueError(f"{folder}: {bad[0]} is not finite: the file is damaged, or its training "
                         "went wrong")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of its shards, mapped from disk."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"{index} is damaged: it has no weight_map")
        files = sorted({folder / name for name in names.values()})
    else:
        raise FileNotFoundError(f"{folder} has no model.safetensors; other formats are not read: "
                                "load the model with transformers, and save_pretrained it")
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            refuse_pointer(path)
            weights |= load_file(path)
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is missing or damaged: {e}") from None
    return weights


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically. Raises OSError if the disk is full or fails."""
    with atomic_write(path) as temporary, write_errors(path, SafetensorError):
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)  # save_file makes it readable for its owner only
        # save_file writes metadata in random order: order it, so that equal tensors are equal files
        with open(temporary, "rb+") as f:  # every order has the same length
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size)) | {"__metadata__": metadata}
            f.seek(8)
            f.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())


MODEL_FILES = ("config.json", "model.safetensors")


def save_model(model: ChatLM, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    generation = model.generation | {name: getattr(model.config, name) for name in ids}
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    write_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    write_file(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    write_file(folder / "config.json", model.config.to_json())


def read_generation(folder) -> dict:
    """The content of generation_config.json, if there is one."""
    path = Path(folder) / "generation_config.json"
    return read_json(path) if path.is_file() else {}
