"""Decoding: one prompt, a chat, a whole file, or scores.

    python sample.py --prompt "法国的首都是哪里？"
    python sample.py                                              chat, tokens as they come
    python sample.py --input prompts.jsonl --output answers.jsonl
    python sample.py --score valid.parquet                        loss, perplexity, BLEU-4, exact match

generate() takes transformers' argument names in their meaning and gives, for greedy and beam search, its tokens. A row
that has finished leaves the batch, so it costs nothing more.
"""
import itertools
import json
import math
import os
import re
import sys
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chatlm import ChatLM, ChatLMConfig, FeedForward, RMSNorm, read_json
from data import (ArgumentParser, Rows, hash_files, input_files, locked, memory_hint, number, run, write_errors,
                  write_file)
from tokenizer import Tokenizer

FINISHED = -1e9  # what a beam that may not go on, or has not ended, scores: finite, as in transformers
WINDOW = 4096  # prompts of a file that are sorted by length together


# --- the decoder, one token at a time -------------------------------------------------------------

Product = Callable[[Tensor], Tensor]  # (N, in) -> (N, out), for few rows N


def sliced_product(weight: Tensor) -> Product:
    """x -> x @ weight.T in float32 on a CPU, for a weight (O, I).

    torch's own product reads the weight with one thread if x has one row, and is slow for a few
    rows. A batched product over slices of the weight (P, O / P, I) takes between a quarter and four
    fifths of that time: one slice per thread for very few rows, more and smaller slices for others.
    """
    outputs, inputs = weight.shape
    threads = torch.get_num_threads()

    def slices(least: int, most: int) -> Tensor:
        """The number of slices from least to most that keeps all threads equally busy."""
        divisors = (p for p in range(least, most + 1) if outputs % p == 0)
        parts = min(divisors, key=lambda p: math.ceil(p / threads) / p, default=1)
        return weight.view(parts, -1, inputs)

    large = slices(1, threads)
    small = slices(max(threads, outputs // 256), max(threads, outputs // 64))

    def product(x: Tensor) -> Tensor:
        rows = len(x)
        if rows >= 8:
            y = torch.bmm(x.expand(len(small), rows, inputs), small.mT)
            return y.transpose(0, 1).reshape(rows, outputs)
        columns = x.contiguous().as_strided((len(large), inputs, rows), (0, 1, inputs))
        return torch.bmm(large, columns).as_strided((rows, outputs), (1, rows)).contiguous()
    return product


def packed_product(weight: Tensor, dtype: torch.dtype) -> Product:
    """x -> x @ weight.T on a CPU, with the weight packed for FBGEMM.

    float16: the weight is rounded, and the arithmetic is float32. int8: each row of the weight is
    scaled to -127 .. 127, x is quantized to 8 bits at every call, and integers are summed.
    """
    ops = torch.ops.quantized
    if dtype == torch.float16:
        packed = ops.linear_prepack_fp16(weight, None)
        return lambda x: ops.linear_dynamic_fp16(x, packed)
    with warnings.catch_warnings():  # quantized tensors are deprecated; 2.11 to 2.13 have them
        warnings.simplefilter("ignore")
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        zero = torch.zeros(len(weight), dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        packed = ops.linear_prepack(quantized)
    return lambda x: ops.linear_dynamic(x, packed, True)


def quick_norm(norm: RMSNorm) -> Product:
    """RMSNorm in four operations, for float32: x / sqrt(|x|^2 + D eps) * (sqrt(D) weight)."""
    width = len(norm.weight)
    weight = norm.weight * width ** 0.5
    floor = norm.weight.new_tensor((width * norm.eps) ** 0.5)

    def normalize(x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(size, floor) * weight
    return normalize


class LayerProducts(NamedTuple):
    """What one decoder block applies to its rows."""
    norm: Product
    qkv: Product  # query, key and value side by side
    out: Product
    cross_norm: Product
    cross_q: Product
    cross_out: Product
    feed_norm: Product
    feed_forward: Product


class Products:
    """The decoder's layers and head as products for few rows. In float32 on a CPU the weights are
    laid out for speed; dtype float16 or int8 packs them. Later weight updates are not picked up."""

    def __init__(self, model: ChatLM, dtype: torch.dtype | None = None):
        weight = model.shared.weight
        self.dtype, self.quick = dtype, weight.is_cpu and weight.dtype == torch.float32
        self.head = self.of(model.head_weight())
        self.layers = [self.layer(*block.layer) for block in model.decoder.block]

    def of(self, weight: Tensor) -> Product:
        if self.dtype:
            return packed_product(weight.detach(), self.dtype)
        return sliced_product(weight.detach()) if self.quick else lambda x: F.linear(x, weight)

    def side_by_side(self, *linears: nn.Module) -> Product:
        """The outputs of several linear layers, concatenated."""
        if not all(type(module) is nn.Linear for module in linears):  # LoRALinear
            return lambda x: torch.cat([module(x) for module in linears], -1)
        weights = [module.weight for module in linears]
        return self.of(weights[0] if len(weights) == 1 else torch.cat(weights))

    def norm(self, module: RMSNorm) -> Product:
        return quick_norm(module) if self.quick else module

    def feed_forward(self, module: FeedForward) -> Product:
        if not self.quick:
            return module
        names = ("wi_0", "wi_1") if module.gated else ("wi",)
        up = self.side_by_side(*(getattr(module, name) for name in names))
        down = self.side_by_side(module.wo)
        return lambda x: down(module.activation(up(x)))

    def layer(self, own: nn.Module, cross: nn.Module, feed: nn.Module) -> LayerProducts:
        a, c = own.SelfAttention, cross.EncDecAttention
        return LayerProducts(
            self.norm(own.layer_norm), self.side_by_side(a.q, a.k, a.v), self.side_by_side(a.o),
            self.norm(cross.layer_norm), self.side_by_side(c.q), self.side_by_side(c.o),
            self.norm(feed.layer_norm), self.feed_forward(feed.DenseReluDense))


packed_models: weakref.WeakKeyDictionary[ChatLM, Products] = weakref.WeakKeyDictionary()


def pack(model: ChatLM, dtype: torch.dtype | None = None) -> None:
    """Lay the decoder's weights out once, for all answers of a model that will not change.

    dtype: torch.float16 or torch.int8 decode with weights of 2 bytes or 1; the model must be
    float32 on a CPU. Raises ValueError if the model or the processor cannot.
    """
    weight = model.shared.weight
    if dtype and (weight.dtype != torch.float32 or not weight.is_cpu):
        raise ValueError(f"{dtype} weights are for decoding on a CPU, from a model in float32")
    try:
        packed_models[model] = Products(model, dtype)
    except (RuntimeError, AttributeError) as e:
        raise ValueError(f"this processor, or this torch, has no products with {dtype} weights: "
                         f"{str(e).splitlines()[0]}") from None


class Decoder:
    """ChatLM.decode one token at a time: it computes the newest position of every row only.

    Each source has N rows, such as the beams of a search. They share the source's keys and values,
    which are computed once. The keys and values of earlier answer tokens are in the KV cache. The
    position bias depends on the distance only, so each step uses a slice of one table.

        on a CPU   p0 p1 p2 new                 the cache grows, and a step attends to all of it
        on a GPU   new p0 p1 p2 --  --  --      a step attends to the whole cache, with the empty
                                                part masked: every step runs the same kernels on the
                                                same memory, so a CUDA graph can replay it; then the
                                                newest keys and values move to their place
    """
    graph_owner: Callable = staticmethod(lambda: None)  # one decoder has a graph: they share memory

    @torch.inference_mode()
    def __init__(self, model: ChatLM, input_ids: Tensor, attention_mask: Tensor | None = None,
                 rows_per_source: int = 1, static: bool | None = None):
        """input_ids, attention_mask: (B, S). static: the GPU's layout; None: on a GPU."""
        c = model.config
        self.model, self.heads = model, (c.num_heads, c.d_kv)
        self.rows, self.length = len(input_ids) * rows_per_source, 0
        self.static = input_ids.is_cuda if static is None else static
        self.products = packed_models.get(model) or Products(model)
        encoded, self.mask = model.encode(input_ids, attention_mask)
        self.sources = [block.layer[1].EncDecAttention.keys_values(encoded)  # (B, H, S, K) each
                        for block in model.decoder.block]
        # keys and values in turn for each layer: (2 * layers, rows, capacity, H * K)
        self.cache = encoded.new_empty(2 * len(self.sources), self.rows, 0, c.num_heads * c.d_kv)
        self.bias = self.visible = encoded.new_empty(0)  # (1, H, 1, capacity); visible is masked
        self.graph: torch.cuda.CUDAGraph | None = None
        self.same_steps = 0  # steps since the number of rows or the cache changed

    def grow_cache(self, rows: int, length: int) -> None:
        """Make room for so many rows and positions. The capacity is a power of two of at least 32;
        of at least 320 with static, where empty positions cost less than another graph."""
        capacity = 32 << max(0, math.ceil(math.log2(max(1, length) / 32)))
        if self.static:
            capacity = max(320, capacity)
        old, self.cache = self.cache, self.cache.new_zeros(
            len(self.cache), rows, capacity, self.cache.size(3))
        self.cache[:, :old.size(1), :old.size(2)] = old
        positions = torch.arange(capacity, device=self.cache.device)
        bias = self.model.decoder.position_bias(positions[-1:], positions)
        self.bias = bias.to(self.cache.dtype)  # of distances capacity - 1 .. 0
        self.visible = torch.full_like(self.bias, torch.finfo(self.bias.dtype).min)
        self.visible[..., 0] = self.bias[..., -1]
        self.graph, self.same_steps = None, 0

    @torch.inference_mode()
    def step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The newest ids (rows,) -> float32 logits (rows, V) of the next, hidden (rows, D)."""
        place = self.length + self.static
        if place >= self.cache.size(2):
            self.grow_cache(self.cache.size(1), place + 1)
        self.length += 1
        if not self.static:
            return self.forward(ids, place, self.length, self.bias[..., -self.length:])
        self.visible[..., 1:self.length] = self.bias[..., -self.length:-1]
        replays = ids.is_cuda and self.same_steps > 8 and Decoder.graph_owner() in (None, self)
        if replays:
            logits, hidden = self.replay(ids)
        else:
            logits, hidden = self.forward(ids, 0, self.cache.size(2), self.visible)
        self.cache[:, :self.rows, place] = self.cache[:, :self.rows, 0]
        self.same_steps += 1
        return logits, hidden

    def replay(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The static step as a CUDA graph, captured at the first call."""
        if self.graph is None:
            self.ids, self.graph = ids.clone(), torch.cuda.CUDAGraph()
            Decoder.graph_owner = weakref.ref(self)
            # thread_local: other threads, such as TensorBoard's, may use the GPU meanwhile
            with torch.cuda.device(ids.device), torch.cuda.graph(
                    self.graph, capture_error_mode="thread_local"):
                self.result = self.forward(self.ids, 0, self.cache.size(2), self.visible)
        self.ids.copy_(ids)
        self.graph.replay()
        logits, hidden = self.result
        return logits.clone(), hidden.clone()

    def forward(self, ids: Tensor, place: int, end: int, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Run ids (rows,) through the decoder. Their keys and values go to `place` in the cache,
        and they attend to the positions before `end` with bias (1, H, 1, end)."""
        rows, attend = self.rows, F.scaled_dot_product_attention
        heads = (rows, self.heads[0], 1, self.heads[1])  # (rows, H, 1, K)
        newest = self.cache[:, :rows, place].unbind()
        past = self.cache[:, :rows, :end].unflatten(-1, self.heads).transpose(2, 3).unbind()
        x = self.model.shared(ids)  # (rows, D)
        for i, layer in enumerate(self.products.layers):
            q, k, v = layer.qkv(layer.norm(x)).view(rows, 3, -1).unbind(1)
            newest[2 * i].copy_(k)
            newest[2 * i + 1].copy_(v)
            y = attend(q.view(heads), past[2 * i], past[2 * i + 1], attn_mask=bias, scale=1.0)
            x = x + layer.out(y.view(rows, -1))
            q = layer.cross_q(layer.cross_norm(x)).view(len(self.mask), -1, *self.heads)
            q = q.transpose(1, 2)  # (B, H, N, K): the N rows of a source are its queries
            y = attend(q, *self.sources[i], attn_mask=self.mask, scale=1.0)
            x = x + layer.cross_out(y.transpose(1, 2).reshape(rows, -1))
            x = x + layer.feed_forward(layer.feed_norm(x))
        hidden = self.model.to_head(x)
        return self.products.head(hidden).float(), hidden

    @torch.inference_mode()
    def select(self, rows: Tensor, sources: Tensor | None = None) -> None:
        """Keep these rows, in this order, some perhaps several times; and these sources."""
        used = self.length + self.static
        if sources is not None:
            self.mask = self.mask[sources]
            self.sources = [(k[sources], v[sources]) for k, v in self.sources]
        if len(rows) > self.cache.size(1):
            self.grow_cache(len(rows), used)
        if rows.is_cuda:
            self.cache[:, :len(rows), :used] = self.cache[:, rows, :used]
        else:  # copy only the rows that move
            moved = [(to, row) for to, row in enumerate(rows.tolist()) if to != row]
            copies = [self.cache[:, row, :used].clone() for _, row in moved]
            for (to, _), copy in zip(moved, copies):
                self.cache[:, to, :used] = copy
        if len(rows) != self.rows or sources is not None:
            self.rows, self.graph, self.same_steps = len(rows), None, 0


# --- strategies -----------------------------------------------------------------------------------


RANGES = {"max_new_tokens": (1, 1 << 20), "min_new_tokens": (0, 1 << 20), "num_beams": (1, 1000), "num_return_sequences": (1, 10 ** 6),
          "temperature": (1e-3, 1e3), "top_k": (0, 1 << 31), "top_p": (1e-9, 1), "repetition_penalty": (1e-3, 1e3),
          "no_repeat_ngram_size": (0, 1 << 20), "length_penalty": (-100, 100), "penalty_alpha": (0, 1)}
# Options of transformers that change answers and that we do not have; a value of None, 0, 1 or [] is none
UNSUPPORTED = set("""max_length min_length min_p typical_p epsilon_cutoff eta_cutoff suppress_tokens begin_suppress_tokens bad_words_ids
    force_words_ids forced_bos_token_id forced_eos_token_id num_beam_groups diversity_penalty encoder_repetition_penalty
    encoder_no_repeat_ngram_size sequence_bias guidance_scale exponential_decay_length_penalty stop_strings max_time dola_layers""".split())


@dataclass
class GenerationConfig:
    """transformers' names and meanings."""
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # True: as soon as num_beams have ended; "never": only when none can do better
    penalty_alpha: float = 0.0  # above 0, with top_k above 1: contrastive search

    def __post_init__(self):
        if self.temperature == 0:  # as people mean it
            self.do_sample, self.temperature = False, 1.0
        for field in fields(self):
            self.check_field(field.name, type(field.default))
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping must be True, False or 'never', not {self.early_stopping!r}")
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            raise ValueError(f"num_return_sequences must be at most num_beams without sampling, not {self.num_return_sequences}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens must be at most max_new_tokens ({self.max_new_tokens}), not {self.min_new_tokens}")

    def check_field(self, name: str, kind: type) -> None:
        """Raise ValueError if a field is not of its kind, or out of range."""
        value = getattr(self, name)
        if name == "do_sample" and type(value) is not bool:
            raise ValueError(f"do_sample must be true or false, not {value!r}")
        if name not in RANGES:
            return
        low, high = RANGES[name]
        if type(value) is not int and (kind is int or type(value) is not float) or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} must be {what} from {low:g} to {high:g}, not {value!r}")

    @property
    def contrastive(self) -> bool:
        return self.penalty_alpha > 0 and self.top_k > 1 and self.num_beams == 1 and not self.do_sample

    def process(self, scores: Tensor, ids: Tensor, eos: int) -> Tensor:
        """scores (N, V) of what may follow ids (N, L), start token included -> scores, in transformers' order."""
        if self.repetition_penalty != 1:
            seen = scores.gather(1, ids)
            seen = torch.where(seen < 0, seen * self.repetition_penalty, seen / self.repetition_penalty)
            scores = scores.scatter(1, ids, seen)
        if 0 < self.no_repeat_ngram_size <= ids.size(1):
            n = self.no_repeat_ngram_size
            grams = ids.unfold(1, n, 1)  # (N, L - n + 1, n)
            repeats = (grams[:, :, :-1] == ids[:, None, ids.size(1) - n + 1:]).all(-1)
            rows, at = repeats.nonzero(as_tuple=True)
            scores = scores.index_put((rows, grams[rows, at, -1]), scores.new_tensor(-math.inf))
        if ids.size(1) - 1 < self.min_new_tokens:
            scores[:, eos] = -math.inf
        if self.do_sample:
            at_least = 2 if self.num_beams > 1 else 1  # a beam must have something besides [EOS]
            scores = scores / self.temperature
            if self.top_k:
                least = scores.topk(min(max(self.top_k, at_least), scores.size(-1)))[0][:, -1:]
                scores = scores.masked_fill(scores < least, -math.inf)
            if self.top_p < 1:
                ordered, order = scores.sort()
                drop = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
                drop[:, -at_least:] = False
                scores = scores.masked_fill(drop.scatter(1, order, drop), -math.inf)
        return scores


def generate(model: ChatLM, input_ids: Tensor, attention_mask: Tensor | None = None, **options) -> Tensor:
    """Answers to prompts: input_ids (B, S) int64 -> ids (B * num_return_sequences, L), start token in front; what follows
    an answer's [EOS] is padding (0), after beam search [EOS].

    attention_mask: (B, S), 0 where input_ids is padding. options: the fields of GenerationConfig.
    Raises ValueError for an option out of range.
    """
    config = GenerationConfig(**options)
    with torch.inference_mode():
        if config.num_beams > 1:
            ids = beam_search(model, input_ids, attention_mask, config)
        elif config.contrastive:
            ids = contrastive_search(model, input_ids, attention_mask, config)
        else:
            if config.num_return_sequences > 1:
                input_ids = input_ids.repeat_interleave(config.num_return_sequences, 0)
                attention_mask = None if attention_mask is None else attention_mask.repeat_interleave(config.num_return_sequences, 0)
            ids = deque(steps(model, input_ids, attention_mask, config), maxlen=1)[0]
    return ids.clone()  # a tensor like any other


def draw(scores: Tensor, count: int) -> Tensor:
    """Sample indices (N, count) from scores (N, V). Raises ValueError if every token is forbidden."""
    try:
        return torch.multinomial(scores.softmax(-1), count)
    except RuntimeError:
        raise ValueError("no token is left to choose: lower --no_repeat_ngram_size or --min_new_tokens") from None


@torch.inference_mode()
def steps(model: ChatLM, input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig) -> Iterator[Tensor]:
    """Greedy decoding or sampling; yields ids (B, L) after every new token."""
    c = model.config
    decoder = Decoder(model, input_ids, attention_mask)
    ids = input_ids.new_full((len(input_ids), config.max_new_tokens + 1), c.pad_token_id)
    ids[:, 0] = c.decoder_start_token_id
    rows = torch.arange(len(ids), device=ids.device)  # those that go on
    for length in range(1, config.max_new_tokens + 1):
        scores = config.process(decoder.step(ids[rows, length - 1])[0], ids[rows, :length], c.eos_token_id)
        chosen = draw(scores, 1)[:, 0] if config.do_sample else scores.argmax(-1)
        ids[rows, length] = chosen
        yield ids[:, :length + 1]
        going = (chosen != c.eos_token_id).nonzero()[:, 0]
        if not len(going):
            return
        if len(going) < len(rows):
            rows = rows[going]
            decoder.select(going, going)


def beam_search(model: ChatLM, input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig) -> Tensor:
    """The num_return_sequences best of num_beams (N) hypotheses for each prompt, by sum of log-probabilities / length^penalty.

    Every step takes the 2 N best continuations of a prompt's N beams: those among the first N that end are weighed
    against the N best that have ended so far, and the N best of the others go on. As in transformers, a prompt is done
    when early_stopping is true and N have ended, or when its best running beam, at the length of now ("never" with a
    positive penalty: at the greatest length), scores no better than the worst that has ended. As there, what follows
    an answer's [EOS] is [EOS] again, not padding.
    """
    c, n, limit = model.config, config.num_beams, config.max_new_tokens
    decoder = Decoder(model, input_ids, attention_mask, rows_per_source=n)
    batch, device = len(input_ids), input_ids.device
    results = input_ids.new_full((batch, config.num_return_sequences, limit + 1), c.eos_token_id)
    prompts = torch.arange(batch, device=device)  # those not done, in the order of the tensors below
    running = input_ids.new_full((batch, n, limit + 1), c.eos_token_id)
    running[:, :, 0] = c.decoder_start_token_id
    scores = torch.zeros(batch, n, device=device)
    scores[:, 1:] = FINISHED  # at first all beams are equal: go on from one
    ended, ended_scores = running.clone(), torch.full((batch, n), FINISHED, device=device)
    is_ended = torch.zeros(batch, n, dtype=torch.bool, device=device)
    for length in range(1, limit + 1):
        flat = running[:, :, :length].flatten(0, 1)
        logits = decoder.step(flat[:, -1])[0]
        new = config.process(logits.log_softmax(-1), flat, c.eos_token_id)
        total = (new.view(len(prompts), n, -1) + scores[:, :, None]).flatten(1)
        if config.do_sample:
            index = draw(total, 2 * n)
            best = total.gather(1, index)
        else:
            best, index = total.topk(2 * n)
        beam, token = index // new.size(-1), index % new.size(-1)
        continued = running.gather(1, beam[:, :, None].expand(-1, -1, limit + 1))
        continued[:, :, length] = token
        stops = token == c.eos_token_id if length < limit else torch.ones_like(token, dtype=torch.bool)
        # the beams that go on
        scores, keep = (best + stops * FINISHED).topk(n)
        running = continued.gather(1, keep[:, :, None].expand(-1, -1, limit + 1))
        source = (beam.gather(1, keep) + n * torch.arange(len(prompts), device=device)[:, None]).flatten()
        # the beams that have ended
        ends = stops & (torch.arange(2 * n, device=device) < n)
        full = is_ended.all(1, keepdim=True) & (config.early_stopping is True)
        weighed = best / length ** config.length_penalty + (full.float() + (~ends).float()) * FINISHED
        ended_scores, keep = torch.cat([ended_scores, weighed], 1).topk(n)
        ended = torch.cat([ended, continued], 1).gather(1, keep[:, :, None].expand(-1, -1, limit + 1))
        is_ended = torch.cat([is_ended, ends], 1).gather(1, keep)
        # which prompts are done
        far = limit if config.early_stopping == "never" and config.length_penalty > 0 else length
        worst = torch.where(is_ended, ended_scores.min(1, keepdim=True)[0], FINISHED)
        hopeful = (scores[:, :1] / far ** config.length_penalty > worst).any(1)
        going = hopeful & ~(is_ended.all(1) & (config.early_stopping is True))
        if length == limit:
            going = torch.zeros_like(going)
        if not going.all():
            results[prompts[~going]] = ended[~going, :config.num_return_sequences]
        alive = going.nonzero()[:, 0]
        if not len(alive):
            break
        if len(alive) < len(prompts):
            source = source.view(-1, n)[alive].flatten()
            prompts, running, scores = prompts[alive], running[alive], scores[alive]
            ended, ended_scores, is_ended = ended[alive], ended_scores[alive], is_ended[alive]
        decoder.select(source, alive if len(alive) < len(going) else None)
    results = results.flatten(0, 1)
    is_eos = results == c.eos_token_id
    longest = torch.where(is_eos.any(1), is_eos.int().argmax(1), limit).max() + 1
    return results[:, :longest]


def contrastive_search(model: ChatLM, input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig) -> Tensor:
    """Su et al. 2022 (arXiv:2202.06417), equation 5: of the top_k (N) likeliest tokens the one with the greatest

        (1 - alpha) p(token | before) - alpha max_j cos(h(token), h(j)),    j over the positions before,

    h being the decoder's last hidden state: likely, and unlike all that was said. Every candidate is fed to see its h.
    """
    c, n, alpha = model.config, min(config.top_k, model.config.vocab_size), config.penalty_alpha
    decoder = Decoder(model, input_ids, attention_mask)
    ids = input_ids.new_full((len(input_ids), config.max_new_tokens + 1), c.pad_token_id)
    ids[:, 0] = c.decoder_start_token_id
    rows = torch.arange(len(ids), device=ids.device)  # those that go on
    logits, hidden = decoder.step(ids[:, 0])
    before = F.normalize(hidden.float(), dim=-1)[:, None]  # (B, L, D)
    for length in range(1, config.max_new_tokens + 1):
        p, tokens = config.process(logits, ids[rows, :length], c.eos_token_id).softmax(-1).topk(n)  # (B, N)
        decoder.select(torch.arange(len(rows), device=ids.device).repeat_interleave(n))
        logits, hidden = decoder.step(tokens.flatten())
        unit = F.normalize(hidden.float(), dim=-1).view(len(rows), n, -1)
        best = ((1 - alpha) * p - alpha * (unit @ before.mT).amax(-1)).argmax(1)
        at = torch.arange(len(rows), device=ids.device)
        chosen = tokens[at, best]
        ids[rows, length] = chosen
        going = (chosen != c.eos_token_id).nonzero()[:, 0]
        if not len(going):
            break
        before = torch.cat([before, unit[at, best][:, None]], 1)[going]
        logits = logits.view(len(rows), n, -1)[at, best][going]
        decoder.select((at * n + best)[going], going if len(going) < len(rows) else None)
        rows = rows[going]
    return ids[:, :length + 1]


# --- text in, text out -------------------------------------------------------------------------------------------------------

def to_batch(tokenizer: Tokenizer, prompts: list[str], max_len: int, device) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, S); a prompt of more than max_len tokens is cut, its [EOS] kept."""
    rows = [ids if len(ids) <= max_len else ids[:max_len - 1] + ids[-1:] for ids in tokenizer.encode_batch(prompts)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def answer(model: ChatLM, tokenizer: Tokenizer, prompts: list[str], batch_size: int = 32, max_len: int = 512, **options) -> list[str]:
    """The model's answers, num_return_sequences a prompt one after the other, in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per = options.get("num_return_sequences", 1)
    answers = [""] * (len(prompts) * per)
    device = model.shared.weight.device
    for begin in range(0, len(order), batch_size):
        rows = order[begin:begin + batch_size]
        ids = generate(model, *to_batch(tokenizer, [prompts[i] for i in rows], max_len, device), **options).tolist()
        for k, row in enumerate(ids):
            answers[rows[k // per] * per + k % per] = tokenizer.decode(row)
    return answers


def stream_answer(model: ChatLM, tokenizer: Tokenizer, prompt: str, max_len: int, config: GenerationConfig) -> Iterator[str]:
    """An answer in the parts in which it comes, never half a character."""
    ids = steps(model, *to_batch(tokenizer, [prompt], max_len, model.shared.weight.device), config)
    return tokenizer.stream(int(row[0, -1]) for row in ids)


# --- scores --------------------------------------------------------------------------------------------------------------------

def bleu4(answers: list[str], references: list[str]) -> float:
    """Corpus BLEU of characters, 0 to 100: sacrebleu's with tokenize="char" (white space does not count).

    Papineni et al. 2002: the geometric mean of the precisions of 1- to 4-grams, times exp(1 - r / c) where the answers
    (c characters) are shorter than the references (r). An n-gram order without a match counts 1/2, the next 1/4, ...
    """
    hits, totals, answer_chars, reference_chars = [0] * 4, [0] * 4, 0, 0
    for answer_text, reference in zip(answers, references, strict=True):
        a, r = "".join(answer_text.split()), "".join(reference.split())
        answer_chars, reference_chars = answer_chars + len(a), reference_chars + len(r)
        for n in range(1, 5):
            ours, theirs = (Counter(t[i:i + n] for i in range(len(t) - n + 1)) for t in (a, r))
            hits[n - 1] += (ours & theirs).total()
            totals[n - 1] += ours.total()
    if not totals[0] or not hits[0]:
        return 0.0
    logs, smooth = 0.0, 1.0
    for hit, total in zip(hits, totals):
        if not total:
            return 0.0
        if not hit:
            smooth *= 2
        logs += math.log(hit / total if hit else 1 / (smooth * total))
    return 100 * math.exp(logs / 4 + min(0.0, 1 - reference_chars / answer_chars))


def triples(text: str) -> set[str]:
    """[(s,p,o),(s,p,o)] -> {"s,p,o", ...}"""
    return {",".join(part.strip() for part in t.split(",")) for t in re.findall(r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)", text)}


def losses(model: ChatLM, tokenizer: Tokenizer, rows: list[dict], max_len: int, batch_size: int = 16) -> tuple[float, int, int]:
    """Sum of nats over the responses of rows, cut to max_len tokens; their tokens; the characters that those spell."""
    nats, tokens, chars = 0.0, 0, 0
    device = model.shared.weight.device
    for begin in range(0, len(rows), batch_size):
        part = rows[begin:begin + batch_size]
        labels, there = to_batch(tokenizer, [r["response"] for r in part], max_len, device)
        with torch.no_grad():
            nats += float(model.loss_sum(*to_batch(tokenizer, [r["prompt"] for r in part], max_len, device),
                                         labels.masked_fill(there == 0, -100)))
        tokens += int(there.sum())
        chars += sum(len(tokenizer.decode(row)) for row in labels.tolist())
    return nats, tokens, chars


def score(model: ChatLM, tokenizer: Tokenizer, rows: list[dict], max_len: int = 512, batch_size: int = 32, **options) -> tuple[dict, list[str]]:
    """Scores of a model on rows of prompt and response, and its answers."""
    ordered = sorted(rows, key=lambda r: len(r["response"]))
    nats, tokens, chars = losses(model, tokenizer, ordered, max_len)
    answers = answer(model, tokenizer, [r["prompt"] for r in rows], batch_size, max_len, **options)
    references = [r["response"] for r in rows]
    result = {"rows": len(rows), "loss": nats / tokens, "ppl": math.exp(min(700.0, nats / tokens)),
              "nats_per_char": nats / max(1, chars), "bleu4": bleu4(answers, references),
              "exact_match": sum(a.strip() == r.strip() for a, r in zip(answers, references)) / len(rows)}
    if all(r.startswith("[(") and r.endswith(")]") for r in references):
        pairs = [(triples(a), triples(r)) for a, r in zip(answers, references)]
        right, said, there = (sum(len(x) for x in column) for column in zip(*[(a & r, a, r) for a, r in pairs]))
        precision, recall = right / max(1, said), right / max(1, there)
        result |= {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(1e-9, precision + recall)}
    return result, answers


# --- the command ---------------------------------------------------------------------------------------------------------------

def pick_device(name: str | None) -> torch.device:
    """A device by name: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one. A GPU becomes the current one, set up for
    batches of many shapes. Raises ValueError for a device that is not there."""
    # With segments that can grow, blocks of many sizes share memory; the allocator reads this when it first allocates.
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda can be used")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", 0)
        if device.type == "cuda" and device.index >= torch.cuda.device_count():
            raise RuntimeError(f"this machine has {torch.cuda.device_count()} GPUs that torch can use")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name or 'cuda'}: {str(e).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention has given NaN gradients with a mask, and plans anew for every shape
    return device


def load(folder: str, dtype: str | None, device: torch.device) -> ChatLM:
    """The model, to answer with. On a CPU float16 and int8 are what the decoder's weights are packed in, and the rest is float32.

    Raises ValueError for int8 on a GPU.
    """
    if device.type == "cuda":
        if dtype == "int8":
            raise ValueError("--dtype int8 is for CPUs; on a GPU take float16 or bfloat16")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # 8 MB and not 32 a stream
    wanted: torch.dtype | None = getattr(torch, dtype) if dtype else None
    packed = device.type == "cpu" and dtype in ("float16", "int8")
    model = ChatLM.from_pretrained(folder, torch.float32 if packed else wanted, device).requires_grad_(False)
    pack(model, wanted if packed else None)
    return model


def read_prompts(source: str, outputs: Iterable[str]) -> Iterator[str]:
    """The prompts of a file or folder: column prompt, or text, such as the lines of a .txt file, of which blank ones are
    skipped. outputs: files that the command writes, which are not read."""
    for i, row in enumerate(Rows(source, outputs=outputs), 1):
        prompt = row.get("prompt", row.get("text"))
        if not isinstance(prompt, str):
            raise ValueError(f"{source}, row {i:,} has no text in prompt; its columns are {', '.join(map(str, row))}")
        if prompt.strip() or row.keys() != {"text"}:
            yield prompt


def model_hash(folder: str) -> str:
    """A hash of a model folder's weights, configuration and tokenizer."""
    names = ("config.json", "generation_config.json", "tokenizer.json")
    files = [*sorted(Path(folder).glob("*.safetensors")), *(Path(folder) / name for name in names if (Path(folder) / name).is_file())]
    return hash_files(files)


def count_answers(prompts: Iterator[str], target: Path, record: Path, made_by: dict) -> int:
    """How many answers target holds already: to the first of the prompts, by the model and settings of made_by. Raises ValueError,
    and changes nothing, where target holds something else. A last line that was cut off is not counted."""
    if not target.stat().st_size:
        return 0
    other = f"delete it, or name another file than {target}"
    if not record.is_file():
        raise ValueError(f"{target} was not written by this command, or its {record.name} is lost: {other}")
    before = read_json(record)
    if changed := [name for name in made_by if before.get(name) != made_by[name]]:
        raise ValueError(f"{target} holds answers with another {changed[0]} ({before.get(changed[0])}, now {made_by[changed[0]]}): {other}")
    done = 0
    with open(target, "rb") as f:
        for line in f:
            if not line.endswith(b"\n"):
                break
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{target}, line {done + 1:,} is not an answer: {other}") from None
            if prompt != next(prompts, None):
                raise ValueError(f"{target}, line {done + 1:,} answers another prompt than --input has there: {other}")
            done += 1
    return done


def answer_file(model: ChatLM, tokenizer: Tokenizer, source: str, target: str, batch_size: int, max_len: int, options: dict,
                made_by: dict, outputs: Iterable[str] = ()) -> int:
    """Append {"prompt", "response"} lines to target (with num_return_sequences "responses", a list), in the order of
    source, from where target ends. made_by: model and settings, kept beside target in a hidden file, so that answers of
    others are never mixed in; outputs: more files not to be read. Returns the rows written; raises ValueError where target is another file."""
    out = Path(target)
    record = out.with_name(f".{out.name}.settings")
    outputs, is_new = [target, *outputs], not out.exists()
    if not is_new and not out.is_file():
        raise ValueError(f"--output {target} is not a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.touch()  # something to lock
    try:
        with locked(out, f"another process is writing {target}: wait for its end, or choose another file"):
            done = count_answers(read_prompts(source, outputs), out, record, made_by)
            total = sum(1 for _ in read_prompts(source, outputs))
            write_file(record, json.dumps(made_by) + "\n")
            return write_answers(model, tokenizer, source, out, done, total, batch_size, max_len, options, outputs)
    finally:
        if is_new and not out.stat().st_size:
            out.unlink()
            record.unlink(missing_ok=True)


def write_answers(model: ChatLM, tokenizer: Tokenizer, source: str, out: Path, done: int, total: int, batch_size: int, max_len: int,
                  options: dict, outputs: list[str]) -> int:
    """answer_file's work: the answers after the first `done`."""
    with open(out, "ab+") as f:  # drop a line that was cut off
        f.seek(0)
        f.truncate(sum(len(line) for line in f if line.endswith(b"\n")))
    written, begin_s = 0, time.monotonic()
    prompts = itertools.islice(read_prompts(source, outputs), done, None)
    while window := list(itertools.islice(prompts, WINDOW)):
        answers = answer(model, tokenizer, window, batch_size, max_len, **options)
        per = len(answers) // len(window)
        rows = [{"prompt": prompt, "response": answers[i]} if per == 1 else {"prompt": prompt, "responses": answers[i * per:(i + 1) * per]}
                for i, prompt in enumerate(window)]
        with write_errors(out), open(out, "a", encoding="utf-8", errors="backslashreplace") as f:  # half a surrogate pair as JSON escapes it
            f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            f.flush()
            os.fsync(f.fileno())
        written += len(window)
        left_s = (time.monotonic() - begin_s) / written * (total - done - written)
        print(f"{done + written:,} of {total:,} answers, {left_s:,.0f} s left", file=sys.stderr)
    return written


HELP = """/set NAME VALUE   change a setting: {names}
/reset            the settings of the start
/help             this
/quit, Ctrl-D     leave; Ctrl-C stops an answer"""


def chat(model: ChatLM, tokenizer: Tokenizer, max_len: int, options: dict) -> None:
    """Read prompts, print answers, until Ctrl-D or Ctrl-C at the prompt."""
    print("Every question is answered by itself: the model does not see what was said before. /help lists commands.")
    config = GenerationConfig(**options)
    while True:
        try:
            prompt = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        words = prompt.split()
        try:
            if not words:
                continue
            if words[0] == "/quit":
                return
            if words[0] == "/help":
                print(HELP.format(names=", ".join(f.name for f in fields(GenerationConfig))))
            elif words[0] == "/reset":
                config = GenerationConfig(**options)
            elif words[0] == "/set":
                config = changed(config, *words[1:])
            elif words[0].startswith("/"):
                print(f"unknown command {words[0]}; /help lists them")
            else:
                say_answer(model, tokenizer, prompt, max_len, config)
        except KeyboardInterrupt:
            print(" (stopped)")
        except (ValueError, TypeError) as e:
            print(f"error: {e}")


def changed(config: GenerationConfig, name: str = "", value: str = "") -> GenerationConfig:
    """A config with one field set from text: do_sample follows when temperature, top_k or top_p is set."""
    values = asdict(config)
    if name not in values or not value:
        raise ValueError(f"/set NAME VALUE, with NAME one of {', '.join(values)}")
    kind = type(values[name])
    try:
        values[name] = early_stopping(value) if name == "early_stopping" else value.lower() in ("true", "1", "yes") if kind is bool else kind(value)
    except ValueError:
        raise ValueError(f"{name} takes {'a whole number' if kind is int else 'a number'}, not {value!r}") from None
    if name in ("temperature", "top_k", "top_p"):
        values["do_sample"] = True
    return GenerationConfig(**values)


def say_answer(model: ChatLM, tokenizer: Tokenizer, prompt: str, max_len: int, config: GenerationConfig) -> None:
    """Print an answer, as it comes where the strategy allows it."""
    said = False
    if config.num_beams > 1 or config.num_return_sequences > 1 or config.contrastive:
        parts: Iterable[str] = ["\n".join(answer(model, tokenizer, [prompt], 1, max_len, **asdict(config)))]
    else:
        parts = stream_answer(model, tokenizer, prompt, max_len, config)
    for part in parts:
        said = said or bool(part)
        print(part, end="", flush=True)
    print("" if said else "(the model ended its answer at once: it has nothing to say to this)")


REFERENCE = dict(num_beams=5, do_sample=True, top_k=50, top_p=0.95, no_repeat_ngram_size=4, length_penalty=-2.0, early_stopping=True)


def early_stopping(text: str) -> bool | str:
    if text.lower() not in ("true", "false", "never"):
        raise ValueError(text)
    return {"true": True, "false": False}.get(text.lower(), "never")


def decoding_options(args, model: ChatLM) -> dict:
    """The fields of GenerationConfig: from flags, else from --reference_settings, else from the model's generation_config.json."""
    names = [f.name for f in fields(GenerationConfig)]
    said = {name: model.generation[name] for name in names if model.generation.get(name) is not None}
    if args.reference_settings:
        said |= REFERENCE
    if ignored := sorted(name for name in UNSUPPORTED if model.generation.get(name) not in (None, False, 0, 1, [], {})):
        print(f"note: {', '.join(ignored)} of the model's generation_config.json {'is' if len(ignored) == 1 else 'are'} not supported and "
              "ignored", file=sys.stderr)
    said |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        config = GenerationConfig(**said)
    except ValueError as e:
        name = str(e).split()[0]
        of_model = name in model.generation and getattr(args, name, None) is None
        raise ValueError(f"{args.model}/generation_config.json: {e}" if of_model else str(e)) from None
    report_unused(args, config)
    return asdict(config)


def report_unused(args, config: GenerationConfig) -> None:
    """Print a line for every flag that has no effect with these settings."""
    needs = {"temperature": (config.do_sample, "--do_sample"), "top_p": (config.do_sample, "--do_sample"),
             "seed": (config.do_sample, "--do_sample"),
             "top_k": (config.do_sample or config.penalty_alpha > 0, "--do_sample or --penalty_alpha"),
             "penalty_alpha": (config.contrastive, "--top_k of 2 or more, or with --num_beams or --do_sample"),
             "length_penalty": (config.num_beams > 1, "--num_beams"), "early_stopping": (config.num_beams > 1, "--num_beams")}
    for name, (works, what) in needs.items():
        if getattr(args, name, None) is not None and not works:
            print(f"note: --{name} changes nothing without {what}", file=sys.stderr)


def main() -> None:
    parser = ArgumentParser(description="Answer one prompt, chat, answer a file, or score a model. Without --prompt, --input or --score: chat. "
                            "What no flag says is as the model's generation_config.json says, else as given after the semicolon.")
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="answer this")
    what.add_argument("--input", metavar="F", help="answer the prompts of a .parquet, .jsonl (column prompt) or .txt (lines) file")
    what.add_argument("--score", metavar="F", help="loss, perplexity, BLEU-4 and exact match on a file of pairs")
    add("--output", metavar="G.jsonl", help="where the answers to --input go; a file that is there is continued")
    add("--model", default="out", metavar="DIR", help="model folder")
    add("--batch_size", type=number(int, 1), help="prompts at a time, of a file; lower it if memory runs out (default: 32)")
    add("--max_len", type=number(int, 2, 1 << 20), default=512, help="tokens of a prompt; what is longer is cut")
    add("--max_new_tokens", type=number(int, 1, 1 << 20), help="tokens of an answer; 256")
    add("--min_new_tokens", type=number(int, 0), help="tokens of an answer; 0")
    add("--num_beams", type=number(int, 1), help="1: no beam search; 1")
    add("--num_return_sequences", type=number(int, 1), help="answers a prompt; 1")
    add("--do_sample", action="store_true", default=None, help="draw from the distribution; otherwise the likeliest token")
    add("--temperature", type=number(float, 0), help="of sampling, 0: greedy; 1")
    add("--top_k", type=number(int, 0), help="sample from the k likeliest, 0: all; 0")
    add("--top_p", type=number(float, 0, 1, above=True), help="sample from the likeliest that make up p; 1")
    add("--penalty_alpha", type=number(float, 0, 1), help="above 0, with --top_k: contrastive search, likely and unlike what was said; 0")
    add("--repetition_penalty", type=number(float, 0, above=True), help="above 1: tokens already there become less likely; 1")
    add("--no_repeat_ngram_size", type=number(int, 0), help="n: no n tokens in a row twice, 0: off; 0")
    add("--length_penalty", type=number(float, -100, 100), help="beam search, above 0 favours longer answers; 1")
    add("--early_stopping", type=early_stopping, nargs="?", const=True, metavar="true|false|never",
        help="beam search, true: end when num_beams answers have ended, never: only when none can do better; false")
    add("--reference_settings", action="store_true", help="as ChatLM-mini-Chinese answers: 5 beams, sampled, top-k 50, top-p 0.95, no 4 tokens twice")
    add("--dtype", choices=["float32", "bfloat16", "float16", "int8"], help="of the weights; float16 and int8 are quick on a CPU; none: as in the file")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), help="of sampling")
    add("--device", help="cpu, cuda or cuda:N; none: a GPU if there is one")
    args = parser.parse_args()
    if bool(args.input) != bool(args.output):
        parser.error("--input and --output need each other")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty")
    many = args.input or args.score
    if args.score and (args.num_return_sequences or 1) > 1:
        parser.error("--num_return_sequences has no place in --score")
    if args.batch_size and not many:
        parser.error("--batch_size is for --input and --score")
    args.batch_size = args.batch_size or 32
    with memory_hint("--batch_size" if many else "--max_new_tokens or --num_beams (--batch_size is for files)"):
        run_command(args)


def run_command(args) -> None:
    """Answer the prompt or the file, score, or chat."""
    if not any((Path(args.model) / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"no model in {args.model!r}: train one first with  python train.py  or name its folder with --model")
    ChatLMConfig.from_pretrained(args.model)  # fails early
    if args.input:
        input_files([args.input], [args.output])
    device = pick_device(args.device)
    tokenizer = Tokenizer.from_pretrained(args.model, append_eos=True)
    model = load(args.model, args.dtype, device)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{args.model}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    options = decoding_options(args, model)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if args.prompt is not None:
        if len(tokenizer.encode(args.prompt)) > args.max_len:
            print(f"the prompt is cut to --max_len {args.max_len} tokens", file=sys.stderr)
        say_answer(model, tokenizer, args.prompt, args.max_len, GenerationConfig(**options))
    elif args.input:
        made_by = {"model": model_hash(args.model), **options, "dtype": args.dtype, "max_len": args.max_len,
                   "seed": args.seed if options["do_sample"] else None}
        n = answer_file(model, tokenizer, args.input, args.output, args.batch_size, args.max_len, options, made_by)
        print(f"{args.output}: {n:,} answers written")
    elif args.score:
        rows = list(Rows(args.score, ("prompt", "response")))
        if not rows:
            raise ValueError(f"{args.score} has no rows")
        result, _ = score(model, tokenizer, rows, args.max_len, args.batch_size, **options)
        for name, value in result.items():
            print(f"{name:>14}  {value:.4f}" if isinstance(value, float) else f"{name:>14}  {value:,}")
        print(json.dumps(result))
    else:
        chat(model, tokenizer, args.max_len, options)


if __name__ == "__main__":
    run(main)
