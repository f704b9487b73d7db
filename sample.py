"""Decoding: from a trained model to text. One prompt, a chat, a whole file, or scores.

    python sample.py --prompt "法国的首都是哪里？"
    python sample.py                                              chat in the terminal
    python sample.py --input prompts.jsonl --output answers.jsonl
    python sample.py --score valid.parquet                        loss, BLEU-4, exact match
    python sample.py --serve 8000                                 a chat page, and OpenAI's API

The model gives every token that may come next a score (a logit). softmax turns the scores into
probabilities, and a decoding strategy picks a token, which the model sees in the next step, until
it picks [EOS]:

    prompt -> encoder                              the answer so far:  [PAD] 巴
                 |                                                       |
              decoder -> logits of 29,298 tokens -> pick one:  黎  ------+

greedy        the token with the highest probability. Exact and repeatable, sometimes dull.
sampling      draw a token by its probability. temperature T divides the logits: below 1 likely
              tokens become likelier. top_k keeps the k likeliest tokens, top_p the likeliest ones
              that together have probability p. From 0.5, 0.3, 0.15, 0.05, top_k 2 and top_p 0.8
              both keep the first two, which then have 0.625 and 0.375.
beam search   keep the N likeliest beginnings: the best answer is not always the one that begins
              best.
contrastive   of the likely tokens, the one least like those before.

In attention, a token needs only the keys and values of the tokens before it, and these do not
change. So they are kept in a KV cache, and a step computes one token instead of all again. It still
reads every weight of the decoder, 105 million numbers in 0.2b: memory bandwidth is the limit, and
answers in a batch share each read.

    token       x = embedding[id]
    10 layers   x += o(attend(q, k and v of all tokens so far))      one product makes q, k, v
                x += o(attend(q, k and v of the prompt))             computed once
                x += feed_forward(x)
    logits      x @ embedding.T                                      a fifth of all that is read

generate() takes transformers' arguments and returns its tokens for greedy and beam search.

Try next: ask the same question with --num_beams 5, with --do_sample --temperature 1.5, and with
--penalty_alpha 0.6 --top_k 4.
"""
import argparse
import contextlib
import functools
import hmac
import itertools
import json
import math
import os
import platform
import random
import re
import secrets
import socket
import sys
import threading
import time
import urllib.parse
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chatlm import ChatLM, ChatLMConfig, Linear, RMSNorm, pad_rows
from data import (
    IGNORED,
    KINDS,
    PAIR,
    SEP,
    ArgumentParser,
    Progress,
    Rows,
    hash_files,
    input_files,
    list_columns,
    locked,
    memory_hint,
    note_once,
    number,
    read_json,
    run,
    write_errors,
    write_file,
)
from tokenizer import Tokenizer

# --- the decoder, one token at a time -------------------------------------------------------------

EAGER_STEPS = 9  # steps before a CUDA graph is captured, which pays only if more follow


class StepGraph(NamedTuple):
    """A captured step, its input and its output."""
    graph: torch.cuda.CUDAGraph
    ids: Tensor
    logits: Tensor
    hidden: Tensor


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention in the dtype of keys and values; the result has the dtype of q."""
    y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=mask, scale=1.0)
    return y.to(q.dtype)


class Decoder:
    """ChatLM.decode one token at a time, for the newest position of every row.

    Each source (prompt) has N rows, such as beams, which share its keys and values. Those of answer
    tokens are in the KV cache. The position bias depends on the distance only, so each step uses a
    slice of one table.

        on a CPU   p0 p1 p2 --  --  --      a step attends to the filled part
        on a GPU   p0 p1 p2 --  --  --      a step attends to the whole cache, with the empty part
                                            masked: a CUDA graph replays the same kernels
    """

    @torch.inference_mode()
    def __init__(self, model: ChatLM, input_ids: Tensor, attention_mask: Tensor | None = None,
                 rows_per_source: int = 1, static: bool | None = None):
        """input_ids, attention_mask: (B, S); None: no padding. rows_per_source: N. static: attend
        as on a GPU; None: if the model is on one."""
        c, weight = model.config, model.shared.weight
        self.model, self.heads = model, (c.num_heads, c.d_kv)
        self.static = weight.is_cuda if static is None else static
        self.products = getattr(model, "packed", None) or Products(model)
        # by number of rows: steps since the cache or the sources changed, and the graph
        self.step_counts: Counter = Counter()
        self.graphs: dict[int, StepGraph] = {}
        self.stream: torch.cuda.Stream | None = None  # of captures
        self.can_capture = True
        # keys and values in turn for each layer: (2 * layers, rows, H, capacity, K); those of the
        # prompts: sources (2 * layers, B, H, S, K), with mask (B, 1, 1, S)
        self.cache = weight.new_empty(2 * len(model.decoder.block), 0, c.num_heads, 0, c.d_kv,
                                      dtype=self.products.attention_dtype)
        self.sources = self.mask = self.cache.new_empty(0)
        # (1, H, 1, capacity); masked_bias has the lowest number at empty positions
        self.bias = self.masked_bias = self.cache.new_empty(0)
        # where in the cache the newest keys and values are
        self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.begin(input_ids, attention_mask, rows_per_source)

    @torch.inference_mode()
    def begin(self, input_ids: Tensor, attention_mask: Tensor | None = None,
              rows_per_source: int = 1) -> None:
        """Read prompts, and forget earlier ones. Graphs stay valid if there are as many sources as
        before, none longer."""
        # for few tokens, casting the encoder's weights takes longer than it saves
        rounds = self.products.encodes_in_bfloat16 and input_ids.numel() >= 64
        with torch.autocast("cpu", torch.bfloat16) if rounds else contextlib.nullcontext():
            encoded, mask = self.model.encode(input_ids, attention_mask)
            (count, _, _, length), lowest = mask.shape, torch.finfo(self.cache.dtype).min
            fits = self.static and count == len(self.mask) and length <= self.mask.size(3)
            if not fits:
                width = length + (-length % 64 if self.static else 0)
                heads, kv = self.heads
                self.mask = self.cache.new_empty(count, 1, 1, width)
                self.sources = self.cache.new_empty(len(self.cache), count, heads, width, kv)
                self.forget_graphs()
            for i, block in enumerate(self.model.decoder.block):
                for j, x in enumerate(block.layer[1].EncDecAttention.keys_values(encoded)):
                    self.sources[2 * i + j, :, :, :length] = x
        # what is masked must be finite, too: 0 * NaN is NaN
        self.sources[..., length:, :], self.mask[..., length:] = 0, lowest
        # float32's lowest number would be -inf in bfloat16
        self.mask[..., :length] = mask.double().clamp(min=lowest)
        self.rows, self.length = len(input_ids) * rows_per_source, 0
        if self.rows > self.cache.size(1):
            layers, _, heads, _, width = self.cache.shape
            self.cache = self.cache.new_empty(layers, self.rows, heads, 0, width)
        else:
            self.cache.zero_()
            self.masked_bias.fill_(lowest)

    def grow_cache(self, rows: int, length: int) -> None:
        """Make room for so many rows, and for positions: the next power of two, or 32 if that is
        more; 320 with static, because empty positions cost less than another graph."""
        old = self.cache
        least = 320 if self.static else 32
        capacity = max(least, old.size(3), 1 << (length - 1).bit_length())
        self.cache = old.new_zeros(len(old), rows, old.size(2), capacity, old.size(4))
        self.cache[:, :old.size(1), :, :old.size(3)] = old
        positions = torch.arange(capacity, device=self.cache.device)
        bias = self.model.decoder.position_bias(positions[-1:], positions)
        self.bias = bias.to(self.cache.dtype)  # of distances capacity - 1 .. 0
        self.masked_bias = torch.full_like(self.bias, torch.finfo(self.bias.dtype).min)
        self.forget_graphs()

    def forget_graphs(self) -> None:
        self.graphs.clear()
        self.step_counts.clear()

    @torch.inference_mode()
    def step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The newest ids (rows,) -> float32 logits (rows, V) of the next ids, hidden (rows, D)."""
        if self.length == self.cache.size(3):
            self.grow_cache(self.cache.size(1), self.length + 1)
        self.position.fill_(self.length)
        self.length += 1
        bias = self.bias[..., -self.length:]
        if not self.static:
            return self.forward(ids, bias)
        self.masked_bias[..., :self.length] = bias
        self.step_counts[self.rows] += 1
        if ids.is_cuda and self.step_counts[self.rows] > EAGER_STEPS and self.can_capture:
            return self.replay(ids)
        return self.forward(ids, self.masked_bias)

    def replay(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A static step by a CUDA graph, captured at the first call for this number of rows."""
        if self.rows not in self.graphs:
            try:
                self.graphs[self.rows] = self.capture(ids.clone())
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                self.can_capture = False
                reason = str(e).partition("\n")[0]
                note_once(f"note: decoding without a CUDA graph, which is slower: {reason}")
                return self.forward(ids, self.masked_bias)
        step = self.graphs[self.rows]
        step.ids.copy_(ids)
        step.graph.replay()
        return step.logits.clone(), step.hidden.clone()

    def capture(self, ids: Tensor) -> StepGraph:
        """Record the kernels of a step as a CUDA graph, without running them."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(ids.device)
        if self.stream is None:  # one for all captures: cuBLAS has a workspace per stream
            self.stream = torch.cuda.Stream(ids.device)
        # the outer stream() restores the current stream even if the capture fails;
        # thread_local: other threads, such as TensorBoard's, may use the GPU meanwhile
        with (torch.cuda.device(ids.device), torch.cuda.stream(current),
              torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")):
            result = self.forward(ids, self.masked_bias)
        return StepGraph(graph, ids, *result)

    def forward(self, ids: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A step for ids (rows,). Their keys and values go to self.position of the cache, and they
        attend to its first L positions. bias: (1, H, 1, L)."""
        rows = self.rows
        past, sources = self.cache[:, :rows, :, :bias.size(3)].unbind(), self.sources.unbind()
        x = self.model.shared(ids)  # (rows, D)
        if x.dtype == torch.float16:  # sums of many layers can pass its 65,504
            x = x.float()
        for i, layer in enumerate(self.products.layers):
            qkv = layer.qkv(layer.norm(x)).view(rows, 3, *self.heads)
            newest = qkv[:, 1:].transpose(0, 1).unsqueeze(3).to(self.cache.dtype)
            self.cache[2 * i:2 * i + 2, :rows].index_copy_(3, self.position, newest)
            q, keys, values = qkv[:, 0].unsqueeze(2), past[2 * i], past[2 * i + 1]
            y = attend(q, keys, values, bias)  # (rows, H, 1, K)
            x = x + layer.out(y.view(rows, -1))
            q = layer.cross_q(layer.cross_norm(x)).view(len(self.mask), -1, *self.heads)
            q = q.transpose(1, 2)  # (B, H, N, K): the N rows of a source are its queries
            y = attend(q, sources[2 * i], sources[2 * i + 1], self.mask)
            x = x + layer.cross_out(y.transpose(1, 2).reshape(rows, -1))
            x = layer.feed(x)
        hidden = self.products.to_head(x)
        return self.products.head(hidden).float(), hidden

    def should_drop_rows(self, unfinished: int) -> bool:
        """Whether to drop finished rows; on a GPU if half have finished, as graphs are costly."""
        return unfinished <= (self.rows // 2 if self.static else self.rows - 1)

    @torch.inference_mode()
    def select(self, rows: Tensor, sources: Tensor | None = None) -> None:
        """Keep these rows, in this order, perhaps several times, and these sources."""
        if sources is not None:
            self.mask, self.sources = self.mask[sources], self.sources[:, sources]
            self.forget_graphs()
        if len(rows) > self.cache.size(1):
            self.grow_cache(len(rows), self.length)
        if rows.is_cuda:
            self.cache[:, :len(rows), :, :self.length] = self.cache[:, rows, :, :self.length]
        else:  # copy only the rows that move
            moved = [(to, row) for to, row in enumerate(rows.tolist()) if to != row]
            copies = [self.cache[:, row, :, :self.length].clone() for _, row in moved]
            for (to, _), copy in zip(moved, copies):
                self.cache[:, to, :, :self.length] = copy
        self.rows = len(rows)


# --- strategies -----------------------------------------------------------------------------------

IMPOSSIBLE = -1e9  # the score of a beam that may not be chosen: finite, as in transformers
# options of transformers that change answers and that we do not have; None, 0, 1 and [] are off
UNSUPPORTED = """
    max_length min_length min_p typical_p epsilon_cutoff eta_cutoff suppress_tokens bad_words_ids
    begin_suppress_tokens force_words_ids forced_bos_token_id forced_eos_token_id num_beam_groups
    diversity_penalty encoder_repetition_penalty encoder_no_repeat_ngram_size sequence_bias
    guidance_scale exponential_decay_length_penalty stop_strings max_time dola_layers top_h
    watermarking_config renormalize_logits constraints"""
NEVER_OFF = ("forced_bos_token_id", "forced_eos_token_id", "max_time")  # unless they are None


def option(default: Any, help: str, low: float = 0, high: float = 1) -> Any:
    """A field of GenerationConfig, and its flag. low, high: the range of a number."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass
class GenerationConfig:
    """Options of generate, with transformers' names and meanings."""
    max_new_tokens: int = option(256, "tokens per answer", 1, 1 << 20)
    min_new_tokens: int = option(0, "tokens per answer, at least", 0, 1 << 20)
    num_return_sequences: int = option(1, "answers per prompt", 1, 10 ** 6)
    do_sample: bool = option(False, "draw tokens by their probability, instead of the likeliest")
    temperature: float = option(1.0, "sampling: below 1 likely tokens become likelier; 0: greedy",
                                1e-3, 1e3)
    top_k: int = option(0, "sampling: only from the k likeliest tokens; 0: from all", 0, 1 << 31)
    top_p: float = option(1.0, "sampling: only from the likeliest tokens whose probabilities add "
                          "up to p")
    num_beams: int = option(1, "beams of a beam search; 1: none", 1, 1000)
    length_penalty: float = option(1.0, "beam search: above 0 favors longer answers", -20, 20)
    early_stopping: bool | str = option(False, "beam search, when num_beams answers have ended: "
                                        "true: stop; false: go on while a running beam scores "
                                        "better than the worst of them; never: go on while one "
                                        "still could")
    penalty_alpha: float = option(0.0, "above 0, with --top_k: contrastive search, likely tokens "
                                  "that are unlike earlier ones", 0, 1)
    repetition_penalty: float = option(1.0, "above 1: tokens that occurred become less likely",
                                       1e-3, 1e3)
    no_repeat_ngram_size: int = option(0, "no N tokens in a row occur twice; 0: off", 0, 1 << 20)

    def __post_init__(self):
        if self.temperature == 0:  # which people write for greedy decoding
            self.do_sample, self.temperature = False, 1.0
        if type(self.do_sample) is not bool:
            raise ValueError(f"do_sample must be true or false, not {self.do_sample!r}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError("early_stopping must be True, False or 'never', not "
                             f"{self.early_stopping!r}")
        for f in fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            low, high = f.metadata["low"], f.metadata["high"]
            is_number = type(value) in (int, kind)
            if kind is not bool and not (is_number and low <= value <= high):
                what = "a whole number" if kind is int else "a number"
                also = ", or 0" if f.name == "temperature" else ""
                raise ValueError(f"{f.name} must be {what} from {low:g} to {high:g}{also}, not "
                                 f"{value!r}")
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            raise ValueError("num_return_sequences must be at most num_beams without sampling, not "
                             f"{self.num_return_sequences}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens must be at most max_new_tokens "
                             f"({self.max_new_tokens}), not {self.min_new_tokens}")

    @property
    def contrastive(self) -> bool:
        is_plain = self.num_beams == 1 and not self.do_sample
        return self.penalty_alpha > 0 and self.top_k > 1 and is_plain

    def unused(self) -> dict[str, str]:
        """Options that have no effect here, and what they need."""
        unused: dict[str, str] = {}
        if not self.do_sample:
            unused |= dict.fromkeys(("temperature", "top_p", "seed"), "do_sample")
            if not self.penalty_alpha:
                unused["top_k"] = "do_sample or penalty_alpha"
        if self.top_k < 2:
            unused["penalty_alpha"] = "top_k of 2 or more"
        elif self.do_sample:
            unused["penalty_alpha"] = "greedy decoding"
        elif self.num_beams > 1:
            unused["penalty_alpha"] = "num_beams 1"
        if self.num_beams == 1:
            unused |= dict.fromkeys(("length_penalty", "early_stopping"), "num_beams")
        return unused

    def process(self, scores: Tensor, ids: Tensor, eos: int) -> Tensor:
        """Apply the options, in transformers' order, to the scores (N, V) of the next token after
        ids (N, L), which include the start token. scores may be changed in place."""
        if self.repetition_penalty != 1:
            seen = scores.gather(1, ids)
            lower = torch.where(seen < 0, seen * self.repetition_penalty,
                                seen / self.repetition_penalty)
            scores = scores.scatter(1, ids, lower)
        if ids.size(1) - 1 < self.min_new_tokens:
            scores[:, eos] = -math.inf
        n = self.no_repeat_ngram_size
        if 0 < n <= ids.size(1):
            grams = ids.unfold(1, n, 1)  # (N, L - n + 1, n)
            last = ids[:, None, ids.size(1) - n + 1:]  # (N, 1, n - 1)
            rows, at = (grams[:, :, :-1] == last).all(-1).nonzero(as_tuple=True)
            scores[rows, grams[rows, at, -1]] = -math.inf
            if bool(scores.amax(-1).isneginf().any()):  # nonzero has waited for the device anyway
                raise ValueError("no token is left to choose: lower --no_repeat_ngram_size or "
                                 "--min_new_tokens")
        return self.filter(scores / self.temperature) if self.do_sample else scores

    def filter(self, scores: Tensor) -> Tensor:
        """top_k and top_p: scores (N, V) of tokens that cannot be drawn become -inf."""
        at_least = 2 if self.num_beams > 1 else 1  # a beam needs a token besides [EOS]
        if self.top_k:
            k = min(max(self.top_k, at_least), scores.size(-1))
            least = scores.topk(k)[0][:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p < 1:
            ordered, order = scores.sort()
            drop = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            drop[:, -at_least:] = False
            scores = scores.masked_fill(drop.scatter(1, order, drop), -math.inf)
        return scores


OPTION_NAMES = [f.name for f in fields(GenerationConfig)]


def generate(model: ChatLM, input_ids: Tensor, attention_mask: Tensor | None = None,
             **options) -> Tensor:
    """Answers to prompts: input_ids (B, S) int64 -> ids (B * num_return_sequences, L) int64, with
    the start token. After an answer's [EOS] comes padding; after beam search [EOS] if padding is 0.

    attention_mask: (B, S), 0 for padding. options: fields of GenerationConfig. Raises ValueError
    for one out of range.
    """
    config = GenerationConfig(**options)
    with torch.inference_mode():
        if config.num_beams > 1:
            ids = beam_search(model, input_ids, attention_mask, config)
        elif config.contrastive:
            ids = contrastive_search(model, input_ids, attention_mask, config)
        else:
            if (n := config.num_return_sequences) > 1:
                input_ids = input_ids.repeat_interleave(n, 0)
                if attention_mask is not None:
                    attention_mask = attention_mask.repeat_interleave(n, 0)
            *_, ids = deque(steps(model, input_ids, attention_mask, config), maxlen=1)
    return ids.clone()  # an ordinary tensor, usable outside of inference mode


def draw(scores: Tensor, count: int) -> Tensor:
    """Sample indices (N, count) from scores (N, V). Raises ValueError, on a CPU, for NaN."""
    try:
        return scores.softmax(-1).multinomial(count)
    except RuntimeError as e:
        if "probability tensor" not in str(e):  # no memory, for example
            raise
        raise ValueError("the model's scores are not finite: its weights are damaged") from None


@torch.inference_mode()
def steps(model: ChatLM, input_ids: Tensor, attention_mask: Tensor | None,
          config: GenerationConfig, idle: list[Decoder] | None = None) -> Iterator[Tensor]:
    """Greedy decoding or sampling. Yields ids (B, L) after every new token.

    idle: a list that keeps the Decoder between calls, for the same model with the same weights.
    """
    if idle:
        decoder = idle.pop()
        decoder.begin(input_ids, attention_mask)
    else:
        decoder = Decoder(model, input_ids, attention_mask)
    ids = new_answers(model, input_ids, config)
    rows = torch.arange(len(ids), device=ids.device)  # the decoder's
    alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)  # of these the unfinished
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    try:
        for length in range(1, config.max_new_tokens + 1):
            logits = decoder.step(ids[rows, length - 1])[0]
            scores = config.process(logits, ids[rows, :length], eos)
            chosen = draw(scores, 1)[:, 0] if config.do_sample else scores.argmax(-1)
            chosen = torch.where(alive, chosen, pad)
            ids[rows, length] = chosen
            yield ids[:, :length + 1]
            alive &= chosen != eos
            going = alive.nonzero()[:, 0]
            if not len(going):
                return
            if decoder.should_drop_rows(len(going)):
                rows, alive = rows[going], alive[going]
                decoder.select(going, going)
    finally:
        if idle is not None:
            idle[:] = [decoder]


def new_answers(model: ChatLM, input_ids: Tensor, config: GenerationConfig) -> Tensor:
    """Ids (B, max_new_tokens + 1): the start token, then padding."""
    ids = input_ids.new_full((len(input_ids), config.max_new_tokens + 1), model.config.pad_token_id)
    ids[:, 0] = model.config.decoder_start_token_id
    return ids


class Beams:
    """The hypotheses of P prompts: for each, N that are running and the N best that have ended.

    A score is the sum of log-probabilities; of an ended one, divided by length^length_penalty.
    """

    def __init__(self, input_ids: Tensor, config: GenerationConfig, c: ChatLMConfig):
        self.config, self.eos = config, c.eos_token_id
        prompts, n, device = len(input_ids), config.num_beams, input_ids.device
        # ids (P, N, max length); after an answer comes padding, but [EOS] if the id of padding is
        # 0, as in transformers
        self.running = input_ids.new_full((prompts, n, config.max_new_tokens + 1),
                                          c.pad_token_id or c.eos_token_id)
        self.running[:, :, 0] = c.decoder_start_token_id
        self.scores = torch.zeros(prompts, n, device=device)
        self.scores[:, 1:] = IMPOSSIBLE  # all beams are equal at first: go on from one
        self.ended = self.running.clone()
        self.ended_scores = torch.full((prompts, n), IMPOSSIBLE, device=device)
        self.is_ended = torch.zeros(prompts, n, dtype=torch.bool, device=device)

    def extend(self, scores: Tensor, length: int) -> Tensor:
        """Append a token to the hypotheses, which become `length` long. scores: (P, N, V). Returns
        the previous row (P * N,) of every running hypothesis.

        Of a prompt's 2 N best continuations, those of the first N that end compete with the ended
        ones, and the N best that do not end go on.
        """
        config, limit = self.config, self.config.max_new_tokens
        prompts, n, vocab = scores.shape
        total = (scores + self.scores[:, :, None]).flatten(1)
        if config.do_sample:
            index = draw(total, 2 * n)
            best = total.gather(1, index)
        else:
            best, index = total.topk(2 * n)
        beam, token = index // vocab, index % vocab
        continued = take_rows(self.running, beam)
        continued[:, :, length] = token
        stops = token == self.eos if length < limit else torch.ones_like(token, dtype=torch.bool)
        self.scores, kept = (best + stops * IMPOSSIBLE).topk(n)
        self.running = take_rows(continued, kept)
        first = n * torch.arange(prompts, device=beam.device)[:, None]
        source = (beam.gather(1, kept) + first).flatten()
        ends = stops & (torch.arange(2 * n, device=beam.device) < n)
        full = self.is_ended.all(1, keepdim=True) & (config.early_stopping is True)
        weighted = best / float(length) ** config.length_penalty
        weighted = weighted + (full.float() + (~ends).float()) * IMPOSSIBLE
        self.ended_scores, kept = torch.cat([self.ended_scores, weighted], 1).topk(n)
        self.ended = take_rows(torch.cat([self.ended, continued], 1), kept)
        self.is_ended = torch.cat([self.is_ended, ends], 1).gather(1, kept)
        return source

    def unfinished(self, length: int) -> list[int]:
        """The prompts that go on. As in transformers, a prompt is done if N hypotheses have ended,
        and early_stopping is True or no running one can beat the worst of them. The score of a
        running one is that at its present length; with "never" and a positive length_penalty, at
        the greatest length."""
        config, limit = self.config, self.config.max_new_tokens
        if length == limit:
            return []
        is_far = config.early_stopping == "never" and config.length_penalty > 0
        best = self.scores[:, :1] / float(limit if is_far else length) ** config.length_penalty
        worst = torch.where(self.is_ended, self.ended_scores.min(1, keepdim=True)[0], IMPOSSIBLE)
        is_full = self.is_ended.all(1) & (config.early_stopping is True)
        going = (best > worst).any(1) & ~is_full
        return [i for i, goes_on in enumerate(going.tolist()) if goes_on]  # the only sync

    def keep(self, prompts: Tensor) -> None:
        for name in ("running", "scores", "ended", "ended_scores", "is_ended"):
            setattr(self, name, getattr(self, name)[prompts])


def take_rows(ids: Tensor, rows: Tensor) -> Tensor:
    """ids (P, N, L), rows (P, M) -> (P, M, L)"""
    return ids.take_along_dim(rows[:, :, None], 1)


def beam_search(model: ChatLM, input_ids: Tensor, attention_mask: Tensor | None,
                config: GenerationConfig) -> Tensor:
    """The num_return_sequences best hypotheses of each prompt. See Beams."""
    c, n = model.config, config.num_beams
    decoder = Decoder(model, input_ids, attention_mask, rows_per_source=n)
    beams = Beams(input_ids, config, c)
    prompts = list(range(len(input_ids)))  # of the decoder's sources
    results: dict[int, Tensor] = {}  # of those that are done
    for length in range(1, config.max_new_tokens + 1):
        ids = beams.running[:, :, :length].flatten(0, 1)  # (P * N, length)
        logits = decoder.step(ids[:, -1])[0]
        scores = config.process(logits.log_softmax(-1), ids, c.eos_token_id)
        source = beams.extend(scores.view(len(prompts), n, -1), length)
        unfinished = beams.unfinished(length)
        for i, prompt in enumerate(prompts):
            if i not in unfinished:
                results.setdefault(prompt, beams.ended[i, :config.num_return_sequences])
        going = [i for i in unfinished if prompts[i] not in results]
        if not going:
            break
        alive = None  # the sources that stay, if some are dropped
        if decoder.should_drop_rows(n * len(going)):
            prompts = [prompts[i] for i in going]
            alive = torch.tensor(going, device=ids.device)
            beams.keep(alive)
            source = source.view(-1, n)[alive].flatten()
        decoder.select(source, alive)
    ids = torch.cat([results[prompt] for prompt in range(len(input_ids))])
    before_end = (ids[:, 1:] == c.eos_token_id).cumsum(1) == 0
    return ids[:, :2 + before_end.sum(1).max()]


def contrastive_search(model: ChatLM, input_ids: Tensor, attention_mask: Tensor | None,
                       config: GenerationConfig) -> Tensor:
    """Su et al. 2022 (arXiv:2202.06417), equation 5: of the top_k (N) likeliest tokens the one with
    the greatest

        (1 - alpha) p(token | before) - alpha max_j cos(h(token), h(j)),    j over earlier positions

    where h is the decoder's last hidden state, which needs a step with every candidate.
    """
    c, alpha = model.config, config.penalty_alpha
    n = min(config.top_k, c.vocab_size)
    decoder = Decoder(model, input_ids, attention_mask)
    ids = new_answers(model, input_ids, config)
    rows = torch.arange(len(ids), device=ids.device)  # the unfinished ones
    logits, hidden = decoder.step(ids[:, 0])
    before = F.normalize(hidden.float(), dim=-1)[:, None]  # (B, L, D)
    for length in range(1, config.max_new_tokens + 1):
        scores = config.process(logits, ids[rows, :length], c.eos_token_id)
        p, tokens = scores.softmax(-1).topk(n)  # (B, N)
        at = torch.arange(len(rows), device=ids.device)
        decoder.select(at.repeat_interleave(n))
        logits, hidden = decoder.step(tokens.flatten())
        unit = F.normalize(hidden.float(), dim=-1).view(len(rows), n, -1)
        best = ((1 - alpha) * p - alpha * (unit @ before.mT).amax(-1)).argmax(1)
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


# --- products of a decoding step ------------------------------------------------------------------

# x (N, I) -> x @ weight.T (N, O), for few rows N and a weight (O, I). Those for CPUs take and
# return float32.
Product = Callable[[Tensor], Tensor]


@functools.cache
def is_amd() -> bool:
    """Whether this is an AMD CPU. On these, unlike Intel's, MKL uses one thread for a product with
    one row, and FBGEMM's float16 product is faster than its embedding bag."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        return "AuthenticAMD" in f.read(1 << 12)
    return "AuthenticAMD" in platform.processor()  # Windows


def float32_product(weight: Tensor) -> Product:
    """The fastest product with a float32 weight on a CPU depends on the number of rows:

        1 or 2     torch's own; on AMD's CPUs split_product, for 1 to 4
        up to 16   oneDNN's weight @ x.T, which copies only x into a layout of its own
        more       torch's own
    """
    few: Product = functools.partial(F.linear, weight=weight)
    most_few = 2
    if is_amd() and torch.backends.mkl.is_available():
        few, most_few = split_product(weight), 4
    has_onednn = torch.backends.mkldnn.is_available()

    def product(x: Tensor) -> Tensor:
        if len(x) <= most_few:
            return few(x)
        if not has_onednn or len(x) > 16:
            return F.linear(x, weight)
        y = torch.ops.mkldnn._linear_pointwise(weight, x, None, "none", [], "")  # (O, N)
        return y.t().contiguous()
    return product


def split_product(weight: Tensor) -> Product:
    """A batch of products: each thread takes an equal part of the weight. The few rows that remain
    are another product."""
    parts = max(1, min(torch.get_num_threads(), len(weight) // 64))
    rows = len(weight) // parts * parts
    batch, rest = weight[:rows].view(parts, -1, weight.size(1)), weight[rows:]

    def product(x: Tensor) -> Tensor:
        y = torch.bmm(batch, x.t().expand(parts, -1, -1)).flatten(0, 1)  # (O, N)
        if len(rest):
            y = torch.cat([y, rest @ x.t()])
        return y.t().contiguous()
    return product


def packed_product(weight: Tensor) -> Product:
    """A weight of bfloat16, packed for oneDNN, which keeps a kernel of about a megabyte for every
    number of rows: more than 8 are padded to a multiple of 8."""
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight.contiguous(), 16)  # rows of x that it expects

    def product(x: Tensor) -> Tensor:
        rows = pad_rows(x, 8) if len(x) > 8 else x
        y = ops._linear_pointwise(rows.bfloat16(), packed, None, "none", [], "")
        return y[:len(x)].float()
    return product


class ColumnSum:
    """For one row x: the sum of the columns of the weight, rounded to bfloat16, each times a number
    of x. That is an embedding bag, and FBGEMM's reads ahead in memory: on Intel's CPUs it takes two
    thirds of the time of oneDNN's product. The weight is transposed, in a part per thread:

        table (parts * I, O / parts):    row p * I + i is column i of the p-th part of the weight
    """

    def __init__(self, weight: Tensor):
        out, width = weight.shape
        parts = min(torch.get_num_threads(), -(-out // 64))
        padding = (0, 0, 0, -out % parts)
        table = F.pad(weight.bfloat16(), padding).view(parts, -1, width).transpose(1, 2)
        self.out, self.table = out, table.flatten(0, 1).contiguous()
        self.index = torch.arange(parts * width, dtype=torch.int32)
        self.begins = self.index[::width]  # one bag per part

    def weight(self) -> Tensor:
        """The rounded weight."""
        parts = self.table.unflatten(0, (len(self.begins), -1))
        return parts.transpose(1, 2).flatten(0, 1)[:self.out]

    def __call__(self, x: Tensor) -> Tensor:
        x = x.bfloat16().expand(len(self.begins), -1).reshape(-1)
        y = F.embedding_bag(self.index, self.table, self.begins, mode="sum", per_sample_weights=x)
        return y.view(1, -1)[:, :self.out].float()


class Float16Product:
    """The weight is packed as float16 by FBGEMM, the arithmetic is float32. Weights under 6e-5 lose
    some digits."""

    def __init__(self, weight: Tensor):
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def weight(self) -> Tensor:
        """The rounded weight, in float32."""
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class BFloat16Product:
    """The weight is rounded to bfloat16. One row, which a chat needs, takes ColumnSum on Intel's
    CPUs, float16 on AMD's, where it is faster for up to 8 rows. The first call with more rows packs
    the weight anew: for oneDNN, or on a CPU without bfloat16 as float16."""

    def __init__(self, weight: Tensor):
        self.many = packed_product if has_bfloat16(weight.device) else Float16Product
        few = Float16Product if is_amd() else ColumnSum
        self.product: Any = few(weight.bfloat16())
        self.most_rows = 8 if is_amd() else 1
        if few is self.many:
            self.most_rows = sys.maxsize

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > self.most_rows:
            weight, self.most_rows = self.product.weight().bfloat16(), sys.maxsize
            self.product = None  # free it first
            self.product = self.many(weight)
        return self.product(x)


def int8_product(weight: Tensor) -> Product:
    """FBGEMM's product of 8-bit integers: rows of the weight are scaled to -127 .. 127, x is
    quantized at every call."""
    with warnings.catch_warnings():  # quantized tensors are deprecated; 2.11 to 2.13 have them
        warnings.simplefilter("ignore")
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        zero = torch.zeros(len(weight), dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantized)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)


PACKED_PRODUCTS: dict[torch.dtype, Callable[[Tensor], Product]] = {
    torch.bfloat16: BFloat16Product, torch.float16: Float16Product, torch.int8: int8_product}


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def fast_norm(norm: RMSNorm, scale: float = 1.0) -> Product:
    """RMSNorm times scale. On a GPU: one kernel, and a cast if x is not of the weights' dtype. In
    float32 on a CPU: x / sqrt(|x|^2 + D eps) * (sqrt(D) weight)."""
    dtype, width, eps = norm.weight.dtype, len(norm.weight), norm.eps
    weight = norm.weight * scale
    if weight.is_cuda:
        weight32 = weight.float()

        def on_gpu(x: Tensor) -> Tensor:
            if x.dtype == dtype:
                return F.rms_norm(x, weight.shape, weight, eps)
            return F.rms_norm(x, weight.shape, weight32, eps).to(dtype)
        return on_gpu
    if dtype != torch.float32:
        return norm if scale == 1 else lambda x: norm(x) * scale
    weight, floor = weight * width ** 0.5, weight.new_tensor((width * eps) ** 0.5)

    def on_cpu(x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(size, floor) * weight
    return on_cpu


class LayerProducts(NamedTuple):
    """What one decoder block applies to its rows."""
    norm: Product
    qkv: Product  # query, key and value side by side
    out: Product
    cross_norm: Product
    cross_q: Product
    cross_out: Product
    feed: Product  # x -> x + feed-forward(norm(x))


class Products:
    """The decoder's layers and head as products. dtype: how the weights are packed on a CPU; None:
    as they are. Later weight updates are not picked up. replaces_weights: the model's weights
    become slices of the concatenated ones, to save memory.

    With bfloat16 and int8, the encoder computes in bfloat16 if the CPU can; attention only with
    AMX, as it would be slower without."""

    def __init__(self, model: ChatLM, dtype: torch.dtype | None = None,
                 replaces_weights: bool = False):
        weight, self.dtype, self.replaces_weights = model.shared.weight, dtype, replaces_weights
        self.is_cpu_float32 = weight.is_cpu and weight.dtype == torch.float32
        rounds = dtype in (torch.bfloat16, torch.int8)
        self.encodes_in_bfloat16 = weight.is_cpu and rounds and has_bfloat16(weight.device)
        has_amx = self.encodes_in_bfloat16 and torch.cpu._is_amx_tile_supported()
        self.attention_dtype = torch.bfloat16 if has_amx else weight.dtype
        self.head = self.product(model.head_weight())
        self.layers = [self.layer(*block.layer) for block in model.decoder.block]
        c, norm = model.config, model.decoder.final_layer_norm
        self.to_head = fast_norm(norm, c.d_model ** -0.5 if c.scale_decoder_outputs else 1.0)

    def product(self, weight: Tensor) -> Product:
        if self.dtype:
            return PACKED_PRODUCTS[self.dtype](weight.detach())
        if self.is_cpu_float32:
            return float32_product(weight.detach())
        return lambda x: F.linear(x, weight)

    def concatenated(self, *linears: Any) -> Product:
        """The outputs of several linear layers, concatenated."""
        if not all(type(module) is Linear for module in linears):  # LoRALinear
            return lambda x: torch.cat([module(x) for module in linears], -1)
        weights = [module.weight for module in linears]
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        if self.replaces_weights:
            for module, part in zip(linears, whole.split([len(w) for w in weights])):
                module.weight.data = part
        return self.product(whole)

    def feed(self, layer: Any) -> Product:
        """x -> x + feed-forward(norm(x)). On a GPU, the first product's kernel includes relu. Its
        input is divided by 16: the second product could pass float16's 65,504."""
        norm, module = fast_norm(layer.layer_norm), layer.DenseReluDense
        linears = [module.wi_0, module.wi_1] if module.gated else [module.wi]
        is_plain = all(type(linear) is Linear for linear in (*linears, module.wo))
        if layer.layer_norm.weight.is_cuda and is_plain and not module.gated:
            norm = fast_norm(layer.layer_norm, 1 / 16)
            wi, wo = module.wi.weight.t(), module.wo.weight
            zeros = wi.new_zeros(wi.size(1))
            return lambda x: torch.add(
                x, F.linear(torch._addmm_activation(zeros, norm(x), wi), wo), alpha=16)
        if not self.is_cpu_float32:
            return lambda x: x + module(norm(x))
        up, down = self.concatenated(*linears), self.concatenated(module.wo)
        return lambda x: x + down(module.activation(up(norm(x))))

    def layer(self, own: Any, cross: Any, feed: Any) -> LayerProducts:
        a, c = own.SelfAttention, cross.EncDecAttention
        return LayerProducts(
            fast_norm(own.layer_norm), self.concatenated(a.q, a.k, a.v), self.concatenated(a.o),
            fast_norm(cross.layer_norm), self.concatenated(c.q), self.concatenated(c.o),
            self.feed(feed))

    def __reduce__(self):
        """Copied or pickled, this becomes None: the weights of the copy may change."""
        return type(None), ()


def pack(model: ChatLM, dtype: torch.dtype | None = None) -> None:
    """Lay the decoder's weights out for a model that will not change. dtype: torch.float16,
    torch.bfloat16 or torch.int8, for a model in float32 on a CPU. Raises ValueError if the model or
    the processor cannot."""
    weight = model.shared.weight
    if dtype and (weight.dtype != torch.float32 or not weight.is_cpu):
        raise ValueError(f"{dtype} weights are for decoding on a CPU, from a model in float32")
    if dtype and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError(f"{dtype} weights need torch with FBGEMM and a processor with AVX2")
    packed = Products(model, dtype, replaces_weights=dtype is None)
    model.packed = packed  # type: ignore[assignment]


# --- text in, text out ----------------------------------------------------------------------------


def in_batches(rows: list, size: int, progress: Progress) -> Iterator[list]:
    """Parts of `size` rows. Shows the progress."""
    for begin in range(0, len(rows), size):
        part = rows[begin:begin + size]
        yield part
        progress.add(len(part))
    progress.clear()


def to_batch(tokenizer: Tokenizer, texts: list[str], max_len: int, device,
             kind: str = "prompts") -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, S) int64. Longer texts are cut to max_len tokens; their
    [EOS] stays. kind: of texts, for a note."""
    rows = tokenizer.encode_batch(texts)
    if any(len(ids) > max_len for ids in rows):
        note_once(f"note: {kind} longer than --max_len {max_len} tokens are cut")
        rows = [ids if len(ids) <= max_len else ids[:max_len - 1] + ids[-1:] for ids in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([[len(row)] for row in rows], device=device)
    return ids, (torch.arange(width, device=device) < lengths).long()


def answer(model: ChatLM, tokenizer: Tokenizer, prompts: list[str], batch_size: int = 32,
           max_len: int = 512, progress: Progress | None = None, **options) -> list[str]:
    """The model's answers, num_return_sequences for each prompt in turn. max_len: tokens per
    prompt. progress: pass it if the prompts are a part of a longer task."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_prompt = options.get("num_return_sequences", 1)
    answers = [""] * (len(prompts) * per_prompt)
    progress = progress or Progress("prompts answered", total=len(prompts))
    for rows in in_batches(order, batch_size, progress):
        texts = [prompts[i] for i in rows]
        batch = to_batch(tokenizer, texts, max_len, model.shared.weight.device)
        for k, ids in enumerate(generate(model, *batch, **options).tolist()):
            answers[rows[k // per_prompt] * per_prompt + k % per_prompt] = tokenizer.decode(ids)
    return answers


def stream_answer(model: ChatLM, tokenizer: Tokenizer, prompt: str, max_len: int,
                  config: GenerationConfig, idle: list[Decoder] | None = None) -> Iterator[str]:
    """An answer in parts, as they are decoded, never half a character. idle: see steps."""
    batch = to_batch(tokenizer, [prompt], max_len, model.shared.weight.device)
    return tokenizer.stream(int(ids[0, -1]) for ids in steps(model, *batch, config, idle))


# --- scores ---------------------------------------------------------------------------------------


def bleu4(answers: list[str], references: list[str]) -> float:
    """Corpus BLEU of characters without white space, 0 to 100: sacrebleu's with tokenize="char".

    Papineni et al. 2002: the geometric mean of the precisions of 1- to 4-grams, times
    exp(1 - r / c) if the answers (c characters) are shorter than the references (r). The first
    n-gram order without a match counts as 1/2 match, the next as 1/4, ...
    """
    pairs = [["".join(text.split()) for text in pair]
             for pair in zip(answers, references, strict=True)]
    logs, smooth = 0.0, 1.0
    for n in range(1, 5):
        hits = total = 0
        for pair in pairs:
            ours, theirs = (Counter(t[i:i + n] for i in range(len(t) - n + 1)) for t in pair)
            hits += (ours & theirs).total()
            total += ours.total()
        if not total or n == 1 and not hits:
            return 0.0
        if not hits:
            smooth *= 2
        logs += math.log(hits / total if hits else 1 / (smooth * total))
    c, r = (sum(map(len, texts)) for texts in zip(*pairs))
    return 100 * math.exp(logs / 4 + min(0.0, 1 - r / c))


def triples(text: str) -> set[str]:
    """[(s,p,o),(s,p,o)] -> {"s,p,o", ...}"""
    found = re.findall(r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)", text)
    return {",".join(part.strip() for part in triple.split(",")) for triple in found}


def losses(model: ChatLM, tokenizer: Tokenizer, rows: list[dict],
           max_len: int) -> tuple[float, int, int]:
    """Nats, tokens and characters of the responses, each cut to max_len tokens, summed."""
    nats, tokens, chars = 0.0, 0, 0
    device = model.shared.weight.device
    for part in in_batches(rows, 16, Progress("losses", total=len(rows))):
        batch = to_batch(tokenizer, [row["prompt"] for row in part], max_len, device)
        labels, mask = to_batch(tokenizer, [row["response"] for row in part], max_len, device,
                                "for the loss, responses")
        with torch.no_grad():
            nats += float(model.loss_sum(*batch, labels.masked_fill(mask == 0, IGNORED)))
        tokens += int(mask.sum())
        chars += sum(len(tokenizer.decode(row)) for row in labels.tolist())
    return nats, tokens, chars


def score(model: ChatLM, tokenizer: Tokenizer, rows: list[dict], max_len: int = 512,
          batch_size: int = 32, **options) -> tuple[dict, list[str]]:
    """Scores on rows (at least one) of prompt and response, and the answers. Also precision, recall
    and F1 if all responses are lists of triples."""
    ordered = sorted(rows, key=lambda row: len(row["response"]))
    nats, tokens, chars = losses(model, tokenizer, ordered, max_len)
    prompts, references = ([row[column] for row in rows] for column in PAIR)
    answers = answer(model, tokenizer, prompts, batch_size, max_len, **options)
    exact = sum(a.strip() == r.strip() for a, r in zip(answers, references))
    result = {"rows": len(rows), "loss": nats / tokens, "ppl": math.exp(min(nats / tokens, 700.0)),
              "nats_per_char": nats / max(1, chars), "bleu4": bleu4(answers, references),
              "exact_match": exact / len(rows)}
    is_list = [r.startswith("[(") and r.endswith(")]") for r in references]
    if any(is_list) and all(x or r == "[]" for x, r in zip(is_list, references)):
        ours, theirs = (list(map(triples, texts)) for texts in (answers, references))
        right = sum(len(a & r) for a, r in zip(ours, theirs))
        precision = right / max(1, sum(map(len, ours)))
        recall = right / max(1, sum(map(len, theirs)))
        f1 = 2 * precision * recall / max(1e-9, precision + recall)
        result |= {"precision": precision, "recall": recall, "f1": f1}
    return result, answers


# --- multiple choice ------------------------------------------------------------------------------

CHOICES = "ABCD"
CHOICE_COLUMNS = ("question", *CHOICES.lower(), "answer")  # in any case


def read_choices(path: Path) -> list[dict[str, str]]:
    """Questions in the format of C-Eval and CMMLU. Raises ValueError for a row without a column."""
    found = []
    for i, row in enumerate(Rows(path), 1):
        row = {str(name).lower(): str(value).strip() for name, value in row.items()
               if value is not None}
        missing = [name for name in CHOICE_COLUMNS if not row.get(name)]
        if missing:
            is_answer = missing[0] == "answer"
            hint = " (files named test may have none: take val or dev)" if is_answer else ""
            raise ValueError(f"{path}, row {i:,} has no {missing[0]}{hint}")
        row["answer"] = row["answer"].upper()
        if row["answer"] not in list(CHOICES):
            raise ValueError(f"{path}, row {i:,}: answer {row['answer']!r} is not A, B, C or D")
        found.append(row)
    return found


@torch.no_grad()
def response_logps(model: ChatLM, tokenizer: Tokenizer, prompts: list[str], responses: list[str],
                   max_len: int) -> list[float]:
    """Log-probabilities of responses without their [EOS], equally many for each prompt in turn."""
    device = model.shared.weight.device
    encoded, mask = model.encode(*to_batch(tokenizer, prompts, max_len, device))
    n = len(responses) // len(prompts)
    labels, is_token = to_batch(tokenizer, responses, max_len, device, "choices")  # (B * n, T)
    ignored = (is_token == 0) | (labels == model.config.eos_token_id)
    logps = model.sequence_logps(encoded.repeat_interleave(n, 0), mask.repeat_interleave(n, 0),
                                 labels.masked_fill(ignored, IGNORED))
    return logps.tolist()


def score_choices(model: ChatLM, tokenizer: Tokenizer, rows: list[dict[str, str]], max_len: int,
                  batch_size: int) -> tuple[int, int]:
    """The numbers of right answers by letter (the likeliest after question and choices) and by text
    (the choice with the highest log-probability per character after the question alone)."""
    by_letter = by_text = 0
    for part in in_batches(rows, batch_size, Progress("questions", total=len(rows))):
        questions = [row["question"] for row in part]
        listed = ["\n".join([row["question"], *(f"{c}. {row[c.lower()]}" for c in CHOICES), "答案："])
                  for row in part]
        texts = [row[c.lower()] for row in part for c in CHOICES]
        letters = response_logps(model, tokenizer, listed, list(CHOICES) * len(part), max_len)
        scores = response_logps(model, tokenizer, questions, texts, max_len)
        scores = [score / len(text) for score, text in zip(scores, texts)]
        for i, row in enumerate(part):
            four, right = range(4 * i, 4 * i + 4), 4 * i + CHOICES.index(row["answer"])
            by_letter += max(four, key=letters.__getitem__) == right
            by_text += max(four, key=scores.__getitem__) == right
    return by_letter, by_text


def score_subjects(model: ChatLM, tokenizer: Tokenizer, files: list[Path], max_len: int,
                   batch_size: int) -> dict:
    """Print the accuracy on each file, a subject, and their mean. Returns the means."""
    shares = []
    print(f"{'questions':>10}  {'letter':>7}  {'text':>7}  subject (chance: 25.0 %)")
    for path in files:
        rows = read_choices(path)
        if not rows:
            note_once(f"note: {path} has no questions and is skipped")
            continue
        right = score_choices(model, tokenizer, rows, max_len, batch_size)
        letter, text = (n / len(rows) for n in right)
        shares.append((letter, text))
        print(f"{len(rows):>10,}  {100 * letter:>5.1f} %  {100 * text:>5.1f} %  {path.stem}")
    letter, text = (sum(column) / len(shares) for column in zip(*shares))
    print(f"{'mean':>10}  {100 * letter:>5.1f} %  {100 * text:>5.1f} %")
    return {"subjects": len(shares), "accuracy_letter": letter, "accuracy_text": text,
            "chance": 0.25}


# --- devices and models ---------------------------------------------------------------------------


def pick_device(name: str | None) -> torch.device:
    """A device by name: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one. A GPU becomes the
    current device. Raises ValueError for a device that is not there."""
    # expandable segments fragment less; torch reads this at its first allocation
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda can be used")
        if device.type == "cuda":
            device, count = torch.device("cuda", device.index or 0), torch.cuda.device_count()
            if device.index >= count:
                raise RuntimeError(f"this machine has {count} GPUs that torch can use")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).partition("\n")[0]
        raise ValueError(f"--device {name or 'cuda'}: {reason}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention has given NaN gradients with a mask, and plans anew for every shape
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def load(folder: str, dtype: str | None, device: torch.device) -> ChatLM:
    """A model for decoding. On a CPU its weights are float32, and dtype is for packed copies of the
    decoder's. Raises ValueError for int8 on a GPU."""
    wanted = getattr(torch, dtype) if dtype else None
    if device.type == "cuda":
        if dtype == "int8":
            raise ValueError("--dtype int8 is for CPUs; on a GPU take float16 or bfloat16")
        # cuBLAS's workspace: 8 MB per stream instead of 32
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
        model, packed = ChatLM.from_pretrained(folder, wanted, device), None
    else:
        model = ChatLM.from_pretrained(folder, None, device)
        packed = wanted or model.shared.weight.dtype
        model.float()
    model.requires_grad_(False)
    pack(model, packed if packed in PACKED_PRODUCTS else None)
    return model


def model_hash(folder: str) -> str:
    """A hash of a model folder's weights, configuration and tokenizer."""
    names = ("config.json", "generation_config.json", "tokenizer.json")
    files = [*sorted(Path(folder).glob("*.safetensors")), *(Path(folder, name) for name in names)]
    return hash_files(path for path in files if path.is_file())


# --- files ----------------------------------------------------------------------------------------

WINDOW = 256  # prompts of a file that are sorted by length, answered and written together


def read_prompts(rows: Rows) -> Iterator[str]:
    """Yield the column prompt, else text; blank lines of a .txt file are skipped. Raises ValueError
    for a row that has neither."""
    for row in rows:
        prompt = row.get("prompt", row.get("text"))
        if type(prompt) is not str:
            raise ValueError(f"{rows.place()} has no text in prompt; its columns are "
                             f"{list_columns(row)}")
        if prompt.strip() or row.keys() != {"text"}:
            yield prompt


def count_answers(prompts: Iterator[str], target: Path, record: Path, made_by: dict) -> int:
    """The number of answers that target has already: to the first prompts, by the model and
    settings of made_by. A last line that was cut off does not count. Raises ValueError if target
    has something else."""
    if not target.stat().st_size:
        return 0
    advice = f"delete it, or name another file than {target}"
    if not record.is_file():
        raise ValueError(f"{target} was not written by this command, or its {record.name} is lost: "
                         f"{advice}")
    before = read_json(record)
    for name, value in made_by.items():
        if before.get(name) != value:
            raise ValueError(f"{target} holds answers with another {name} ({before.get(name)}, now "
                             f"{value}): {advice}")
    done = 0
    with open(target, "rb") as f:
        for line in f:
            if not line.endswith(b"\n"):
                break
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{target}, line {done + 1:,} is not an answer: "
                                 f"{advice}") from None
            if prompt != next(prompts, None):
                raise ValueError(f"{target}, line {done + 1:,} answers another prompt than --input "
                                 f"has there: {advice}")
            done += 1
    return done


def answer_file(model: ChatLM, tokenizer: Tokenizer, source: str, target: str, batch_size: int,
                max_len: int, options: dict, made_by: dict, outputs: Iterable[str] = ()) -> int:
    """Append {"prompt", "response"} lines to target, in the order of source, after the answers that
    it has already; with num_return_sequences "responses", a list. With a seed and the same
    batch_size, an interrupted run that is continued writes what a whole one writes.

    made_by: model and settings, with "seed", kept in a hidden file next to target. outputs: more
    files not to read. Returns the number of new rows. Raises ValueError if target is not a file of
    the same prompts and made_by.
    """
    out = Path(target)
    if out.exists() and not out.is_file():
        raise ValueError(f"--output {target} is not a file")
    record = out.with_name(f".{out.name}.settings")
    rows, is_new = Rows(source, outputs=[target, *outputs]), not out.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.touch()  # something to lock
    busy = f"another process is writing {target}: wait for its end, or choose another file"
    with locked(out, busy):
        try:
            done = count_answers(read_prompts(rows), out, record, made_by)
            total = sum(1 for _ in read_prompts(rows))
            if not total:
                raise ValueError(f"{source} has no prompts")
            write_file(record, json.dumps(made_by) + "\n")
            window = max(WINDOW, batch_size)
            if done < total:
                done -= done % window  # the last window may be incomplete
            with open(out, "rb+") as f:
                f.truncate(sum(map(len, itertools.islice(f, done))))
            prompts = itertools.islice(read_prompts(rows), done, None)
            progress = Progress("prompts answered", total=total - done)
            for begin in range(done, total, window):
                if made_by.get("seed") is not None:  # samples depend on the window only
                    key = f"{made_by['seed']} {begin}"
                    torch.manual_seed(random.Random(key).getrandbits(63))
                part = list(itertools.islice(prompts, window))
                answers = answer(model, tokenizer, part, batch_size, max_len, progress, **options)
                append_answers(out, part, answers)
            return total - done
        finally:
            if is_new and not out.stat().st_size:  # nothing was answered
                out.unlink()
                record.unlink(missing_ok=True)


def append_answers(out: Path, prompts: list[str], answers: list[str]) -> None:
    """Write answers, equally many for each prompt, to the end of a file."""
    n = len(answers) // len(prompts)
    # a lone surrogate, which JSON can escape, is written as its escape
    with write_errors(out), open(out, "a", encoding="utf-8", errors="backslashreplace") as f:
        for i, prompt in enumerate(prompts):
            found = answers[i * n:(i + 1) * n]
            row = {"response": found[0]} if n == 1 else {"responses": found}
            f.write(json.dumps({"prompt": prompt, **row}, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


# --- chat -----------------------------------------------------------------------------------------

CHAT_HELP = """/set NAME VALUE   change a setting: {names}
/reset            the settings of the start
/new              forget the conversation so far
/help             this
/quit, Ctrl-D     leave; Ctrl-C stops an answer"""
MAX_TURNS = 1000


def known_turns(model: ChatLM) -> int:
    """How many questions the model was trained to see: "turns" in generation_config.json; 1: only
    the last one. Raises ValueError if it is not a number of turns."""
    turns = model.generation.get("turns", 1)
    if type(turns) is not int or not 1 <= turns <= MAX_TURNS:
        raise ValueError(f"generation_config.json: turns {turns!r} is not a whole number from 1 to "
                         f"{MAX_TURNS}")
    return turns


def with_history(tokenizer: Tokenizer, texts: list[str], turns: int, max_len: int) -> str:
    """Join the last `turns` questions of `texts` (question, answer, ..., question), with the
    answers between them; fewer if they do not fit in max_len tokens."""
    texts = texts[1 - 2 * turns:]
    if turns > 1:
        texts = [text.replace(SEP, " ") for text in texts]
    while len(texts) > 1 and len(tokenizer.encode(SEP.join(texts))) > max_len:
        texts = texts[2:]
    return SEP.join(texts)


def chat(model: ChatLM, tokenizer: Tokenizer, max_len: int, options: dict) -> None:
    """Read prompts and print answers until Ctrl-D, or Ctrl-C at the prompt."""
    turns = known_turns(model)
    seen = "Each question is answered on its own: the model does not see earlier turns."
    if turns > 1:
        seen = (f"The model sees the last {turns} questions and its answers to them; /new begins "
                "anew.")
    print(f"{seen} /help lists commands.")
    config = GenerationConfig(**options)
    texts: list[str] = []  # question, answer, question, ...
    idle: list[Decoder] = []  # see steps
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a bad line must not end the chat
    while True:
        try:
            prompt = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt, RuntimeError):  # RuntimeError: stdin is closed
            print()
            return
        words = prompt.split() or [""]
        if words[0] == "/quit":
            return
        try:
            refuse_undecodable(prompt, "the input")
            if words[0] == "/new":
                texts.clear()
                print("the conversation is forgotten")
            elif prompt.startswith("/"):
                config = chat_command(words, config, options)
            elif prompt:
                asked = with_history(tokenizer, [*texts, prompt], turns, max_len)
                said = print_answer(model, tokenizer, asked, max_len, config, idle)
                texts += [prompt, said] if said else []
        except KeyboardInterrupt:
            print(" (stopped)")
        except (ValueError, TypeError) as e:
            print(f"error: {e}")


def refuse_undecodable(text: str, name: str) -> None:
    """Raise ValueError for a text with bytes of another encoding, which Python reads as lone
    surrogates."""
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{name} is not in this terminal's encoding: convert it to UTF-8")


def chat_command(words: list[str], config: GenerationConfig, options: dict) -> GenerationConfig:
    """Execute a command of the chat. Returns the settings from now on."""
    if words[0] == "/help":
        print(CHAT_HELP.format(names=", ".join(OPTION_NAMES)))
    elif words[0] == "/reset":
        config = GenerationConfig(**options)
        print("settings reset")
    elif words[0] == "/set":
        config = with_setting(config, *words[1:])
        name = words[1]
        needs = config.unused().get(name)
        hint = f" (no effect without {needs})" if needs else ""
        if name == "temperature" and float(words[2]) == 0:
            name, hint = "do_sample", " (temperature 0 is greedy decoding)"
        print(f"{name} = {getattr(config, name)}{hint}")
    else:
        print(f"unknown command {words[0]}; /help lists them")
    return config


def with_setting(config: GenerationConfig, name: str = "", value: str = "",
                 *more: str) -> GenerationConfig:
    """A config with one field set from text. Raises ValueError for a bad name or value."""
    values = asdict(config)
    if name not in values or not value or more:
        raise ValueError(f"/set NAME VALUE, with NAME one of {', '.join(values)}")
    kind = type(values[name])
    try:
        if name == "early_stopping":
            values[name] = early_stopping(value)
        elif kind is bool:
            values[name] = {"true": True, "false": False}[value.lower()]
        else:
            values[name] = kind(value)
    except (ValueError, KeyError):
        kinds = {int: "a whole number", float: "a number", bool: "true or false"}
        what = "true, false or never" if name == "early_stopping" else kinds[kind]
        raise ValueError(f"{name} takes {what}, not {value!r}") from None
    return GenerationConfig(**values)


def print_answer(model: ChatLM, tokenizer: Tokenizer, prompt: str, max_len: int,
                 config: GenerationConfig, idle: list[Decoder] | None = None) -> str:
    """Print an answer, if possible token by token, and return it; of several answers the first."""
    if config.num_beams > 1 or config.num_return_sequences > 1 or config.contrastive:
        if idle:
            idle.clear()  # only one Decoder at a time has graphs
        answers = answer(model, tokenizer, [prompt], 1, max_len, **asdict(config))
        print("\n".join(answers) or "(the model gave an empty answer)")
        return answers[0]
    said = ""
    for part in stream_answer(model, tokenizer, prompt, max_len, config, idle):
        said += part
        print(part, end="", flush=True)
    print("" if said else "(the model gave an empty answer)")
    return said


# --- server ---------------------------------------------------------------------------------------

MAX_BODY_BYTES = 1 << 20
# options of --serve, which decodes one answer at a time, token by token
STREAMING = {"num_beams": 1, "num_return_sequences": 1, "penalty_alpha": 0.0}
MAX_WAITING = 16  # requests that wait for the model; others are told to come back
PAGE = """<!doctype html><html lang="zh"><meta charset="utf-8"><title>ChatLM</title>
<meta name="viewport" content="width=device-width"><style>
body { font: 16px sans-serif; max-width: 40em; margin: 2em auto; padding: 0 1em }
:root { color-scheme: light dark } pre { white-space: pre-wrap; font: inherit } input { width: 70% }
</style><h1>ChatLM</h1><p>ABOUT</p><div id="log"></div>
<form id="form"><input id="text" autofocus autocomplete="off"> <button id="go">发送</button></form>
<script>
let running = null
const messages = []
const key = new URLSearchParams(location.search).get("key")
form.onsubmit = async event => {
  event.preventDefault()
  if (running) return running.abort()
  const prompt = text.value.trim()
  if (!prompt) return
  const say = content => log.appendChild(document.createElement("pre")).textContent = content
  say("> " + prompt)
  const answer = log.appendChild(document.createElement("pre"))
  messages.push({role: "user", content: prompt})
  running = new AbortController(); go.textContent = "停止"; text.value = ""
  try {
    const headers = {"Content-Type": "application/json"}
    if (key) headers.Authorization = "Bearer " + key
    const seen = messages.slice(1 - 2 * TURNS)
    const response = await fetch("v1/chat/completions", {method: "POST", headers,
      signal: running.signal, body: JSON.stringify({stream: true, messages: seen})})
    if (!response.ok) throw (await response.json()).error.message
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
    for (let rest = "", part; !(part = await reader.read()).done;) {
      const lines = (rest + part.value).split("\\n\\n"); rest = lines.pop()
      for (const line of lines) {
        if (line.endsWith("[DONE]")) continue
        const event = JSON.parse(line.slice(6))
        if (event.error) throw event.error.message
        answer.textContent += event.choices[0]?.delta.content ?? ""
      }
    }
  } catch (error) { say(error.name == "AbortError" ? "（已停止）" : String(error)) }
  if (answer.textContent) messages.push({role: "assistant", content: answer.textContent})
  else messages.pop()
  running = null; go.textContent = "发送"
}
</script></html>
"""


class BadRequest(ValueError):
    """A request that the client must change. status: of HTTP; code: of OpenAI."""

    def __init__(self, message: str, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class ChatServer(ThreadingHTTPServer):
    """OpenAI's chat interface. Each connection has a thread; one answer is decoded at a time.

        client -> thread -> is there room to wait? (503) -> lock -> steps -> events -> client
    """
    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted

    def __init__(self, address: tuple[str, int], model: ChatLM, tokenizer: Tokenizer, name: str,
                 max_len: int, options: dict, api_key: str | None):
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, ChatHandler)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_len, self.options, self.api_key = max_len, options, api_key
        self.turns = known_turns(model)
        self.idle: list[Decoder] = []  # see steps
        self.lock, self.room = threading.Lock(), threading.BoundedSemaphore(1 + MAX_WAITING)

    def handle_error(self, request, client_address) -> None:
        """A client that has gone is no error; others are printed in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"sample.py: error: {error}", file=sys.stderr)


ROLES = ("user", "assistant")
SYSTEM_ROLES = ("system", "developer")


def text_of(message: dict) -> str:
    """The text of a message; "" if it has none. Raises BadRequest for other kinds of content."""
    content = message.get("content")
    if type(content) is list:
        parts = [part for part in content if type(part) is dict]
        kinds = [part.get("type", "text") for part in parts]
        if others := [kind for kind in kinds if kind != "text"]:
            raise BadRequest(f"content of type {others[0]!r} is not supported, only text")
        content = "".join(part["text"] for part in parts if type(part.get("text")) is str)
    return content if type(content) is str and content.strip() else ""


def read_messages(messages: Any) -> list[str]:
    """The texts of a conversation: question, answer, ..., question, from the last messages in which
    user and assistant take turns. Raises BadRequest."""
    if type(messages) is not list or not messages or any(type(m) is not dict for m in messages):
        raise BadRequest("messages must be a list of objects with role and content")
    roles = [message.get("role", "user") for message in messages]
    if unknown := [role for role in roles if role not in ROLES + SYSTEM_ROLES]:
        raise BadRequest(f"the role {unknown[0]!r} is not supported")
    if set(roles[:-1]) & set(SYSTEM_ROLES):
        note_once("note: system messages have no effect: the model was not trained on them")
    texts: list[str] = []  # from the end: question, answer, question, ...
    for message in reversed(messages):
        text, role = text_of(message), message.get("role")
        if texts and not (text and role == ROLES[len(texts) % 2]):
            break
        if not text:
            raise BadRequest("the last message has no text in content")
        if not texts and role == "assistant":
            raise BadRequest("the last message is an answer: add a question")
        texts.append(text)
    texts.reverse()
    return texts if len(texts) % 2 else texts[1:]


# fields of a request that become options of GenerationConfig
OPTIONS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
OPTIONS |= {name: name for name in ("temperature", "top_p", "top_k", "repetition_penalty",
                                    "no_repeat_ngram_size")}
# fields that would change the answer: they are refused unless they have a neutral value
REFUSED = {"tools", "tool_choice", "functions", "function_call", "response_format", "logprobs",
           "top_logprobs", "frequency_penalty", "presence_penalty", "logit_bias", "modalities",
           "audio", "num_beams", "best_of", "min_p"}
NEUTRAL: tuple = (None, False, 0, "", "auto", "none", [], {}, {"type": "text"}, ["text"])


class ChatRequest:
    """The body of a request, checked. Raises BadRequest, naming the field."""

    def __init__(self, body: Any, defaults: dict):
        if type(body) is not dict:
            raise BadRequest("the body is not a JSON object")
        for name, value in body.items():
            is_off = value in NEUTRAL or name in ("num_beams", "best_of") and value == 1
            if name in REFUSED and not is_off:
                raise BadRequest(f"{name} is not supported: leave it out")
        self.texts, self.stream = read_messages(body.get("messages")), body.get("stream") or False
        if type(self.stream) is not bool:
            raise BadRequest("stream must be true or false")
        stop = body.get("stop") or []
        self.stop = [stop] if type(stop) is str else stop
        if type(self.stop) is not list or not all(type(s) is str and s for s in self.stop):
            raise BadRequest("stop must be a text or a list of texts")
        self.answers = 1 if body.get("n") is None else body["n"]
        if type(self.answers) is not int or not 1 <= self.answers <= 16:
            raise BadRequest("n must be a whole number from 1 to 16")
        self.seed = body.get("seed")
        if self.seed is not None and (type(self.seed) is not int or abs(self.seed) >= 1 << 63):
            raise BadRequest("seed must be a whole number of 64 bits")
        given = {OPTIONS[name]: body[name] for name in OPTIONS if body.get(name) is not None}
        if given.get("top_k") == -1:  # as vLLM writes "off"
            given["top_k"] = 0
        options = defaults | STREAMING | given
        options["do_sample"] |= "temperature" in given or "top_p" in given
        try:
            self.config = config = GenerationConfig(**options | {"min_new_tokens": 0})
        except ValueError as e:
            raise BadRequest(str(e).replace("max_new_tokens", "max_tokens")) from None
        config.min_new_tokens = min(options["min_new_tokens"], config.max_new_tokens)
        usage = body.get("stream_options")
        self.with_usage = type(usage) is dict and usage.get("include_usage") is True


def until_stop(parts: Iterable[str], stops: list[str]) -> Iterator[str]:
    """Yield the text before the first of `stops`. Text that may begin one is held back."""
    held, longest = "", max(map(len, stops), default=1) - 1
    for part in parts:
        held += part
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            yield held[:min(found)]
            return
        ready = max(0, len(held) - longest)
        yield held[:ready]
        held = held[ready:]
    yield held


def error_body(status: int, message: str, code: str | None = None) -> dict:
    """An error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class ChatHandler(BaseHTTPRequestHandler):
    """One connection."""
    server: ChatServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte from the client

    def log_message(self, format: str, *args) -> None:
        """Requests are not logged: prompts are private."""

    def parse_request(self) -> bool:
        """Read the head of a request, and answer what no path accepts."""
        if not super().parse_request():
            return False
        has_body = "Transfer-Encoding" in self.headers or "Content-Length" in self.headers
        if has_body and self.command != "POST":
            self.close_connection = True  # its body is not read
        path = self.path.partition("?")[0]
        methods = "POST" if path == "/v1/chat/completions" else ""
        if path in ("/", "/health", "/v1/models") or path.startswith("/v1/models/"):
            methods = "GET, HEAD"
        if not methods:
            self.send_error(404, f"there is no {path}")
        elif self.command == "OPTIONS":
            self.reply(200, b"", headers={"Allow": methods})
        elif self.command not in methods.split(", "):
            self.close_connection = True
            self.refuse(405, f"{path} is for {methods}", {"Allow": methods})
        else:
            return True
        return False

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse, and close the connection. The base class calls this, too."""
        self.close_connection = True
        self.refuse(int(code), message or "the request cannot be read")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            seen = self.server.turns
            about = f"模型能看到最近 {seen} 个问题。" if seen > 1 else "每个问题单独回答，模型不记得前文。"
            page = PAGE.replace("ABOUT", about).replace("TURNS", str(seen))
            self.reply(200, page.encode(), "text/html; charset=utf-8")
        elif path == "/health":
            self.reply(200, {"status": "ok"})
        elif self.is_allowed():
            model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "ChatLM"}
            asked = urllib.parse.unquote(path[len("/v1/models/"):])
            if not asked:
                self.reply(200, {"object": "list", "data": [model]})
            elif asked == self.server.name:
                self.reply(200, model)
            else:
                self.refuse(404, f"there is no model {asked}, only {self.server.name}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if not self.is_allowed():
            return
        try:
            request = ChatRequest(self.read_body(), self.server.options)
            prompt = self.read_prompt(request)
        except BadRequest as e:
            self.refuse(e.status, str(e), code=e.code)
            return
        if not self.server.room.acquire(blocking=False):
            self.refuse(503, "too many requests wait for the model", {"Retry-After": "5"})
            return
        try:
            device, is_seeded = self.server.model.shared.weight.device, request.seed is not None
            gpus = [device] if device.type == "cuda" else []
            with self.server.lock, torch.random.fork_rng(gpus, enabled=is_seeded):
                if is_seeded:
                    torch.manual_seed(request.seed)
                if not self.has_left():
                    self.answer(request, prompt)
        except (ValueError, RuntimeError, MemoryError) as e:
            message = str(e).partition("\n")[0] or "out of memory"
            if request.stream:  # its head has been sent
                self.send_event(error_body(500, message))
            else:
                self.refuse(500, message)
        finally:
            self.server.room.release()

    def is_allowed(self) -> bool:
        key = self.server.api_key
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")  # the bytes sent
        if key is None or hmac.compare_digest(given, f"Bearer {key}".encode()):
            return True
        self.send_error(401, "the API key is missing or wrong")
        return False

    def read_body(self) -> Any:
        """The JSON of the body. Raises BadRequest."""
        lengths = set(self.headers.get_all("Content-Length", []))
        is_one = len(lengths) == 1 and re.fullmatch("[0-9]{1,18}", max(lengths))
        if not is_one or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise BadRequest("one header Content-Length is needed, a number (bodies in chunks are "
                             "not read)", 400 if lengths else 411)
        length = int(max(lengths))
        if length > MAX_BODY_BYTES:
            self.close_connection = True
            raise BadRequest(f"the body has more than {MAX_BODY_BYTES:,} bytes", 413)
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionResetError
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as e:
            raise BadRequest(f"the body is not JSON: {e}") from None

    def read_prompt(self, request: ChatRequest) -> str:
        """The question, with earlier ones that the model sees. Raises BadRequest if it is too
        long."""
        tokenizer, most = self.server.tokenizer, self.server.max_len
        prompt = with_history(tokenizer, request.texts, self.server.turns, most)
        if (tokens := len(tokenizer.encode(prompt))) > most:
            raise BadRequest(f"the message has {tokens:,} tokens, and the server takes {most:,} "
                             "(--max_len)", code="context_length_exceeded")
        return prompt

    def has_left(self) -> bool:
        """Whether the client has closed the connection."""
        timeout = self.connection.gettimeout()
        self.connection.settimeout(0)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        finally:
            self.connection.settimeout(timeout)

    def answer(self, request: ChatRequest, prompt: str) -> None:
        """Decode, and send the answers as events or as one object."""
        tokenizer, limit = self.server.tokenizer, request.config.max_new_tokens
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind,
                "created": int(time.time()), "model": self.server.name}
        choices: list[dict] = []
        prompt_tokens, completion_tokens = len(tokenizer.encode(prompt)), 0

        def send(delta: dict, reason: str | None = None) -> None:
            if request.stream:
                choice = {"index": index, "delta": delta, "finish_reason": reason}
                self.send_event({**head, "choices": [choice]})

        if request.stream:
            self.reply(200, None, "text/event-stream; charset=utf-8")
        for index in range(request.answers):
            text, ids = "", list[int]()
            send({"role": "assistant", "content": ""})
            with contextlib.closing(self.decode(prompt, request.config, ids)) as tokens:
                for part in until_stop(tokenizer.stream(tokens), request.stop):
                    text += part
                    if part:
                        send({"content": part})
            completion_tokens += len(ids)
            has_ended = ids[-1] == self.server.model.config.eos_token_id
            is_cut = len(ids) == limit and not has_ended and text == tokenizer.decode(ids)
            reason = "length" if is_cut else "stop"
            send({}, reason)
            message = {"role": "assistant", "content": text}
            choices.append({"index": index, "message": message, "finish_reason": reason})
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
                 "total_tokens": prompt_tokens + completion_tokens}
        if not request.stream:
            self.reply(200, {**head, "choices": choices, "usage": usage})
            return
        if request.with_usage:
            self.send_event({**head, "choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def decode(self, prompt: str, config: GenerationConfig,
               ids: list[int]) -> Generator[int, None, None]:
        """Yield ids, and append them to ids. Raises ConnectionResetError if the client leaves."""
        server, device = self.server, self.server.model.shared.weight.device
        if device.type == "cuda":  # every thread has its own current device
            torch.cuda.set_device(device)
        batch = to_batch(server.tokenizer, [prompt], server.max_len, device)
        for row in steps(server.model, *batch, config, server.idle):
            if self.has_left():
                raise ConnectionResetError
            ids.append(int(row[0, -1]))
            yield ids[-1]

    def send_event(self, data: dict) -> None:
        text = json.dumps(data, ensure_ascii=False)
        self.wfile.write(f"data: {text}\n\n".encode("utf-8", "replace"))

    def refuse(self, status: int, message: str, headers: dict[str, str] | None = None,
               code: str | None = None) -> None:
        self.reply(status, error_body(status, message, code), headers=headers)

    def reply(self, status: int, body: dict | bytes | None, kind: str = "application/json",
              headers: dict[str, str] | None = None) -> None:
        """Send a whole response. body None: its head; the rest ends with the connection."""
        content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
        headers = {"Content-Type": kind, **(headers or {})}
        if body is None:
            headers["Cache-Control"] = "no-cache"
            self.close_connection = True
        else:
            headers["Content-Length"] = str(len(content))
        if self.close_connection:
            headers["Connection"] = "close"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body is not None and self.command != "HEAD":
            self.wfile.write(content)


def serve(model: ChatLM, tokenizer: Tokenizer, args: argparse.Namespace, options: dict) -> None:
    """Answer requests until Ctrl-C. Raises ValueError for a port that is in use."""
    for option, value in STREAMING.items():
        if options[option] != value:
            note_once(f"note: {option} {options[option]} has no effect with --serve, which streams")
    try:
        server = ChatServer((args.host, args.serve), model, tokenizer,
                            Path(args.model).resolve().name, args.max_len, options, args.api_key)
    except (OSError, UnicodeError, TypeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ValueError(f"--serve {args.serve} --host {args.host}: {reason}") from None
    host = f"[{args.host}]" if ":" in args.host else args.host
    url = f"http://{host}:{server.server_port}/"
    print(f"{url} is a chat page; programs use {url}v1. Ctrl-C stops.", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        server.server_close()


# --- the command ----------------------------------------------------------------------------------

REFERENCE_SETTINGS = {"num_beams": 5, "do_sample": True, "top_k": 50, "top_p": 0.95,
                      "no_repeat_ngram_size": 4, "length_penalty": -2.0, "early_stopping": True}


def early_stopping(text: str) -> bool | str:
    choices: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
    if text.lower() not in choices:
        raise ValueError(text)
    return choices[text.lower()]


def decoding_options(args: argparse.Namespace, model: ChatLM) -> dict:
    """The fields of GenerationConfig: from flags, else from --reference_settings, else from the
    model's generation_config.json. Prints what has no effect."""
    def chosen(values: dict) -> dict:
        return {name: values[name] for name in OPTION_NAMES if values.get(name) is not None}

    stored = model.generation
    options, given = chosen(stored), chosen(vars(args))
    if args.reference_settings:
        options |= REFERENCE_SETTINGS
    off: tuple = (0, 1, [], {})
    ignored = sorted(name for name in UNSUPPORTED.split() if stored.get(name) is not None
                     and (name in NEVER_OFF or stored[name] not in off))
    if ignored:
        note_once(f"note: {', '.join(ignored)} of the model's generation_config.json "
                  f"{'is' if len(ignored) == 1 else 'are'} not supported and ignored")
    try:
        config = GenerationConfig(**options | given)
    except ValueError as e:
        name = str(e).split()[0]
        is_stored = name in stored and name not in given
        raise ValueError(f"{args.model}/generation_config.json: {e}" if is_stored else e) from None
    is_greedy, unused = (options | given).get("temperature") == 0, config.unused()
    if is_greedy:
        del unused["temperature"]
    # a chat can set everything later, a request to the server what sampling needs
    is_chat = args.prompt is None and not args.input and not args.score
    for name, needs in unused.items():
        flags = re.sub(r"\b(?=do_sample|penalty_alpha|top_k|num_beams)", "--", needs)
        why = f"without {flags}"
        if is_greedy and needs.startswith("do_sample"):
            why = "with temperature 0, which is greedy"
        may_work = is_chat and (args.serve is None or needs.startswith("do_sample"))
        if getattr(args, name, None) is not None and not may_work:
            note_once(f"note: --{name} has no effect {why}")
    return asdict(config)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(
        description="Answer one prompt, answer a file, score a model, serve, or chat (without any "
        "of --prompt, --input, --score and --serve). Options of decoding that are not given come "
        "from the model's generation_config.json.")
    group = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    group.add_argument("--prompt", metavar="TEXT", help="answer this")
    group.add_argument("--input", metavar="F", help="answer the prompts of a file or folder "
                       "(column prompt; of .txt files the lines)")
    group.add_argument("--score", metavar="F",
                       help="loss, perplexity, BLEU-4 and exact match on a file of pairs; accuracy "
                       "on multiple choice (question, A, B, C, D, answer), a file per subject")
    group.add_argument("--serve", metavar="PORT", type=number(int, 0, 65535),
                       help="a chat page and an OpenAI-compatible HTTP server on this port")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address for --serve; others need --api_key")
    add("--api_key", metavar="KEY", help="key that clients of --serve must send, the chat page as "
        "/?key=KEY (default: none)")
    add("--output", metavar="G.jsonl",
        help="where the answers to --input go; an existing file is continued")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="out", metavar="DIR", help="model folder")
    add("--dtype", choices=["float32", "bfloat16", "float16", "int8"],
        help="of the weights; on a CPU int8 is the fastest, and bfloat16 for many prompts at a "
        "time if the CPU has it (default: as stored)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--batch_size", type=number(int, 1), help="prompts decoded together, of a file; lower it "
        "if memory runs out (default: 32)")
    add("--max_len", type=number(int, 2, 1 << 20), default=512,
        help="tokens per prompt; longer ones are cut")

    add = parser.add_argument_group("decoding").add_argument
    for f in fields(GenerationConfig):
        kind: Any = type(f.default)
        low = 0 if f.name == "temperature" else f.metadata["low"]
        how: dict[str, Any] = {"type": number(kind, low, f.metadata["high"])}
        if f.name == "do_sample":
            how = {"action": "store_true", "default": None}
        elif f.name == "early_stopping":
            how = {"type": early_stopping, "nargs": "?", "const": True,
                   "metavar": "true|false|never"}
        default = str(f.default).lower() if kind is bool else f"{f.default:g}"
        add(f"--{f.name}", help=f"{f.metadata['help']} (default: {default})", **how)
    add("--seed", type=number(int, 0, 2 ** 63 - 1), help="seed of sampling (default: random)")
    add("--reference_settings", action="store_true", help="decode like ChatLM-mini-Chinese: "
        + ", ".join(f"{name} {value}" for name, value in REFERENCE_SETTINGS.items()))
    args = parser.parse_args()
    check_args(parser, args)
    args.batch_size = args.batch_size or 32
    return args


def check_args(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with an error for flags that exclude each other, or have no effect together."""
    if bool(args.input) != bool(args.output):
        parser.error("--input and --output need each other")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty")
    refuse_undecodable(args.prompt or "", "--prompt")
    suffix = Path(args.output or "").suffix.lower()
    if suffix in (*KINDS, ".gz") and suffix != ".jsonl":
        parser.error(f"--output {args.output}: answers are written as JSON lines, name it .jsonl")
    serves = args.serve is not None
    if not serves and (args.host != "127.0.0.1" or args.api_key):
        parser.error("--host and --api_key are for --serve")
    if args.host not in ("127.0.0.1", "localhost", "::1") and not args.api_key:
        parser.error(f"--host {args.host} can be reached by others: set --api_key")
    if serves and (args.num_return_sequences or args.penalty_alpha):
        parser.error("--num_return_sequences and --penalty_alpha have no effect with --serve")
    if serves and (args.num_beams or 1) > 1:
        parser.error("--num_beams has no effect with --serve, which streams")
    if args.score and (args.num_return_sequences or 1) > 1:
        parser.error("--num_return_sequences has no effect with --score")
    if args.batch_size and not args.input and not args.score:
        parser.error("--batch_size is for --input and --score")


@memory_hint("--batch_size, --num_beams or --max_new_tokens")
def main() -> None:
    args = parse_args()
    if not any(Path(args.model, name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"no model in {args.model!r}: train one first with  python "
                                "train.py  or name its folder with --model")
    ChatLMConfig.from_pretrained(args.model)  # fails early
    if args.input:
        input_files([args.input], [args.output])  # fails early
    device = pick_device(args.device)
    tokenizer = Tokenizer.from_pretrained(args.model, append_eos=True)
    model = load(args.model, args.dtype, device)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{args.model}: the tokenizer has {len(tokenizer)} tokens, the model "
                         f"{model.config.vocab_size}")
    options = decoding_options(args, model)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if args.prompt is not None:
        print_answer(model, tokenizer, args.prompt, args.max_len, GenerationConfig(**options))
    elif args.input:
        made_by = {"model": model_hash(args.model), **options, "dtype": args.dtype,
                   "max_len": args.max_len, "seed": args.seed if options["do_sample"] else None}
        n = answer_file(model, tokenizer, args.input, args.output, args.batch_size, args.max_len,
                        options, made_by)
        print(f"{args.output}: {n:,} answers written")
    elif args.serve is not None:
        serve(model, tokenizer, args, options)
    elif args.score:
        score_file(args, model, tokenizer, options)
    else:
        chat(model, tokenizer, args.max_len, options)


def score_file(args: argparse.Namespace, model: ChatLM, tokenizer: Tokenizer,
               options: dict) -> None:
    """Print scores on a file of pairs, or on files of multiple choice."""
    rows = Rows(args.score)
    is_packed = model.shared.weight.is_cpu and args.dtype not in (None, "float32")
    if {str(name).lower() for name in next(iter(rows), {})} >= set(CHOICE_COLUMNS[:-1]):
        for name in OPTION_NAMES + ["seed", "reference_settings"] + ["dtype"] * is_packed:
            if getattr(args, name, None) not in (None, False):
                note_once(f"note: --{name} has no effect on multiple choice")
        result = score_subjects(model, tokenizer, rows.files, args.max_len, args.batch_size)
    else:
        rows.columns = PAIR
        pairs = list(rows)
        if not pairs:
            raise ValueError(f"{args.score} has no rows")
        if is_packed:
            note_once(f"note: --dtype {args.dtype} is for the answers; the loss is computed in "
                      "float32")
        result, _ = score(model, tokenizer, pairs, args.max_len, args.batch_size,
                          **options | {"num_return_sequences": 1})
        for name, value in result.items():
            shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
            print(f"{name:>14}  {shown}")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
