"""The tokenizer: byte-pair encoding (BPE) learnt by merging the most frequent pair again and again.

    python tokenizer.py train corpus.parquet --out tok --vocab_size 29298
    python tokenizer.py stats corpus.parquet --tokenizer tok

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units" (arXiv:1508.07909). A text is cut
into pieces (every punctuation mark and every digit alone, a space at the head of what follows it), a piece into
characters, and the learnt merges are applied in the order in which they were learnt:

    merges (天, 气), (天气, 预), ...      "今天天气，好" -> 今天天气 | ， | 好 -> 今天 天气 ， 好

Characters outside the alphabet become their UTF-8 bytes, <0xE2> <0x82> <0xAC>, so every string has a code and comes
back whole. The exception is a literal special token: "[EOS]" in a text becomes the token, which decode leaves out.
Learning and encoding both work on whole arrays of text with numpy; tests hold them to textbook versions.
tokenizer.json is Hugging Face's format, and AutoTokenizer gives the same ids.
"""
import argparse
import codecs
import contextlib
import csv
import errno
import gzip
import heapq
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SPECIAL_TOKENS = ["[PAD]", "[EOS]", "[SEP]", "[BOS]", "[CLS]", "[MASK]", "[UNK]"]  # ids 0 to 6
PAD, EOS, UNK = 0, 1, 6
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]  # ids 7 to 262
FIRST_BYTE, FIRST_CHAR = len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 256
MOST_TOKENS = 1 << 18
REPLACEMENT_CHAR = 0xFFFD  # what a lone surrogate, or a byte that is not UTF-8, is read as
CHUNK_CHARS = 1 << 18  # texts are encoded in batches of about this many characters

# --- characters: where a piece begins, and NFKC -------------------------------------------------------------------------------

# The Rust crates behind tokenizers know Unicode's punctuation of version 8 (two marks have since moved to other
# categories), its numerals of version 17, and NFKC of version 9. Listed here is what they take otherwise than Python, or
# than a later Python will: found by trying every character of Unicode 18 with both, alone and with marks around it.
LATER_PUNCTUATION = (
    "61d 9fd a76 c77 c84 1b4e-1b4f 1b7d-1b7f 2e43-2e4f 2e52-2e63 10d6e 10ead 10ed0 10f55-10f59 10f86-10f89 113d4-113d8 "
    "1144b-1144f 1145a-1145d 11660-1166c 116b9 1183b 11944-11946 119e2 11a3f-11a46 11a9a-11aa2 11b00-11b09 11be1 "
    "11c41-11c45 11c70-11c71 11ef7-11ef8 11f43-11f4f 11fff 12ff1-12ff2 16d6d-16d6f 16e97-16e9a 16fe2 1e5ff 1e95e-1e95f")
EARLIER_PUNCTUATION = "166d 111c9"
LATER_NUMERALS = (
    "10d40-10d49 116d0-116e3 11bf0-11bf9 11de0-11de9 11f50-11f59 16130-16139 16d70-16d79 16ff4-16ff6 1ccf0-1ccf9 "
    "1d2c0-1d2d3 1e4f0-1e4f9 1e5f1-1e5fa")
LATER_NFKC = (
    "558 58b-58c 5c8-5c9 7fd 897-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1af0 1df6-1dfa 209d-209f 32ff a7f1-a7f4 a82c "
    "ab69 105c9 105d2 105da 105e4 10781-107bf 10d24-10d27 10d69-10d6d 10eab-10eac 10ecb-10ecf 10ef0-10eff 10f46-10f50 "
    "10f82-10f85 11070 1133b 11382-11385 1138b 1138e 11390-11391 113b8 113bb 113c2 113c5 113c7-113d0 1145e 11839-1183a "
    "11930 11935 11938 1193d-1193e 11943 119e0 11a34 11a47 11a99 11d42-11d45 11d97 11f41-11f42 1611e-1612f 16d63 "
    "16d67-16d6a 16ff0-16ff1 1b123-1b126 1ccd6-1ccf9 1d127-1d128 1d250-1d25f 1d280-1d281 1d6a6 1df95 1dfcd-1dfff "
    "1e030-1e06d 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef 1e6e3-1e6f5 1f16c 1fbf0-1fbf9")
BEGINS, ENDS = 1, 2  # a piece begins at this character; a piece ends with it


def code_ranges(text: str) -> list[tuple[int, int]]:
    """"61d 1b4e-1b4f" -> [(0x61d, 0x61d), (0x1b4e, 0x1b4f)]"""
    bounds = [item.partition("-") for item in text.split()]
    return [(int(first, 16), int(last or first, 16)) for first, _, last in bounds]


def character_classes() -> np.ndarray:
    """(0x110000,) uint8: BEGINS | ENDS for what stands alone (punctuation, digits), BEGINS for a space, 0 for the rest."""
    table = np.zeros(0x110000, dtype=np.uint8)
    for code in range(0x20000):  # above are ideographs and private use
        if unicodedata.category(chr(code))[0] in "PN":
            table[code] = BEGINS | ENDS
    for ranges, value in ((LATER_PUNCTUATION, 0), (EARLIER_PUNCTUATION, BEGINS | ENDS), (LATER_NUMERALS, BEGINS | ENDS)):
        for first, last in code_ranges(ranges):
            table[first:last + 1] = value
    table[[ord(c) for c in "$+<=>^`|~"]] = BEGINS | ENDS  # symbols to Unicode, punctuation to ASCII
    table[ord(" ")] = BEGINS
    return table


CLASSES = character_classes()
UNNORMALIZED = re.compile("([" + "".join(f"{chr(a)}-{chr(b)}" for a, b in code_ranges(LATER_NFKC)) + "])")


def normalize(text: str) -> str:
    """NFKC, as tokenizers knows it: characters that are too new for it stay as they are."""
    if not UNNORMALIZED.search(text):
        return unicodedata.normalize("NFKC", text)
    return "".join(part if i % 2 else unicodedata.normalize("NFKC", part) for i, part in enumerate(UNNORMALIZED.split(text)))


def to_codepoints(text: str) -> np.ndarray:
    """The codepoints of a string, uint32; lone surrogates become U+FFFD."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    surrogate = codes - np.uint32(0xD800) < 0x800
    return np.where(surrogate, np.uint32(REPLACEMENT_CHAR), codes) if surrogate.any() else codes


def piece_starts(codes: np.ndarray, text_begins: np.ndarray, classes: np.ndarray = CLASSES) -> np.ndarray:
    """True (N,) where a piece begins: at a text's beginning, at and after what stands alone, at a space."""
    kinds = classes[codes]
    starts = (kinds & BEGINS).astype(bool)
    starts[1:] |= (kinds[:-1] & ENDS).astype(bool)
    starts[text_begins[text_begins < len(codes)]] = True
    return starts


def joined_ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """begins [5, 1], sizes [3, 2] -> [5, 6, 7, 1, 2]"""
    return np.arange(sizes.sum()) + np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)


# --- merging -------------------------------------------------------------------------------------------------------------------

NO_MERGE = np.int32(0x7FFFFFFF)  # the rank of a pair that is no merge: after all others


class Merger:
    """Applies merges to many pieces at once, to each as textbook BPE does: the pair of lowest rank first, of equals the left.

    Symbols c d can come to stand in one token only if some merge joins a token that ends in c to one that begins with d.
    Where none does, a piece is cut, and its parts are merged as if the other did not exist. `joins` holds these c d by a
    hash of so many bits: a wrong hit only means that a cut is missed. What is left are short runs, a row of a matrix each.
    """
    HASH_BITS, WIDEST = 21, 128  # runs of more symbols are merged by themselves, with a heap

    def __init__(self, vocab: list[str], merges: list[tuple[int, int]], merged: list[int]):
        """vocab: tokens by id; merges: pairs of ids, in the order of their ranks; merged: the id that each becomes."""
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.merged, self.merged_ids = np.array(merged, dtype=np.int32), merged
        pairs = sorted((left << 32 | right, rank) for (left, right), rank in self.ranks.items()) + [(2 ** 63 - 1, NO_MERGE)]
        self.pairs, self.pair_ranks = np.array([p for p, _ in pairs], np.int64), np.array([r for _, r in pairs], np.int32)
        first, last, joins = {}, {}, set()  # the symbols that a token begins and ends with
        for new, (a, b) in sorted(zip(merged, merges), key=lambda made: len(vocab[made[0]])):  # parts before what they make
            joins.add((last.get(a, a), first.get(b, b)))
            first[new], last[new] = first.get(a, a), last.get(b, b)
        self.joins = np.zeros(1 << self.HASH_BITS, dtype=bool)
        left, right = np.array(list(joins), dtype=np.uint32).reshape(-1, 2).T
        self.joins[self.hashes(left, right)] = True

    def hashes(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left * np.uint32(0x9E3779B1) ^ right * np.uint32(0x85EBCA6B)) >> np.uint32(32 - self.HASH_BITS)

    def lookup(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """left, right (N,) int32 ids -> ranks (N,) int32, NO_MERGE where there is none."""
        pairs = left.astype(np.int64) << 32 | right
        places = self.pairs.searchsorted(pairs)
        return np.where(self.pairs[places] == pairs, self.pair_ranks[places], NO_MERGE)

    def merge(self, symbols: np.ndarray, starts: np.ndarray) -> None:
        """In place: symbols (N,) int32; starts (N,) bool, True where a piece begins. The tokens of a run stand at its
        first places, and -1 at those that are left over."""
        codes = symbols.view(np.uint32)
        cut = starts.copy()
        cut[1:] |= ~self.joins[self.hashes(codes[:-1], codes[1:])]
        begins = np.flatnonzero(cut)
        sizes = np.diff(begins, append=len(symbols))
        width = 2
        while width <= self.WIDEST:
            rows = np.flatnonzero((sizes > width // 2) & (sizes <= width))
            if len(rows):
                self.merge_rows(symbols, begins[rows], sizes[rows], width)
            width *= 2
        for row in np.flatnonzero(sizes > self.WIDEST).tolist():
            self.merge_long(symbols[begins[row]:begins[row] + sizes[row]])

    def merge_rows(self, symbols: np.ndarray, begins: np.ndarray, sizes: np.ndarray, width: int) -> None:
        """Runs of up to `width` symbols. In every round each row merges its next pair, and what stands behind moves up."""
        columns = np.arange(width)
        inside = columns < sizes[:, None]
        places = joined_ranges(begins, sizes)
        ids = np.full(inside.shape, -1, dtype=np.int32)  # (rows, width)
        ids[inside] = symbols[places]
        ranks = np.full((len(ids), width - 1), NO_MERGE)  # of a symbol and the one after it
        ranks[inside[:, 1:]] = self.lookup(ids[:, :-1][inside[:, 1:]], ids[:, 1:][inside[:, 1:]])
        done, rows = ids, np.arange(len(ids))
        while True:
            at = ranks.argmin(1)
            rank = ranks[np.arange(len(rows)), at]
            going = np.flatnonzero(rank != NO_MERGE)
            if len(going) < len(rows):
                if ids is not done:
                    done[rows] = ids
                if not len(going):
                    break
                rows, ids, ranks, at, rank = rows[going], ids[going], ranks[going], at[going], rank[going]
            row = np.arange(len(rows))
            behind = columns > at[:, None]
            ids[row, at] = self.merged[rank]
            ids[:, :-1] = np.where(behind[:, :-1], ids[:, 1:], ids[:, :-1])
            ids[:, -1] = -1
            ranks[:, :-1] = np.where(behind[:, :-2], ranks[:, 1:], ranks[:, :-1])
            ranks[:, -1] = NO_MERGE
            ranks[row, at] = NO_MERGE
            right, left = np.flatnonzero(ids[row, at + 1] >= 0), np.flatnonzero(at)  # rows with a symbol after it, before it
            row, at = np.concatenate([right, left]), np.concatenate([at[right], at[left] - 1])
            ranks[row, at] = self.lookup(ids[row, at], ids[row, at + 1])
        symbols[places] = done[inside]

    def merge_long(self, symbols: np.ndarray) -> None:
        """One long run, in place: a heap of (rank, position), neighbours linked, O(n log n)."""
        ids, ranks, merged = symbols.tolist(), self.ranks, self.merged_ids
        after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        heap = [(rank, i) for i, pair in enumerate(zip(ids, ids[1:])) if (rank := ranks.get(pair)) is not None]
        heapq.heapify(heap)
        ids.append(-1)  # after the last: in no pair
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i] if ids[i] >= 0 else -1
            if ranks.get((ids[i], ids[j])) != rank:
                continue  # one of the two has been merged since
            ids[i], ids[j] = merged[rank], -1
            after[i] = after[j]
            if after[i] < len(ids) - 1:
                before[after[i]] = i
            for left in (before[i], i):
                if left >= 0 and (rank := ranks.get((ids[left], ids[after[left]]))) is not None:
                    heapq.heappush(heap, (rank, left))
        tokens = [i for i in ids if i >= 0]
        symbols[:] = -1
        symbols[:len(tokens)] = tokens


# --- the tokenizer ---------------------------------------------------------------------------------------------------------------

class Tokenizer:
    """Text to ids and back, with tokenizer.json of two forms: ours, which spells unknown characters in bytes and keeps
    every space, and ChatLM-mini-Chinese's (`spaced`), which puts ▁ before every piece and writes [UNK]."""

    def __init__(self, vocab: list[str], merges: list[tuple[int, int]], nfkc: bool = False, append_eos: bool = True,
                 spaced: bool = False, added: dict[str, bool] | None = None):
        """vocab: tokens by id, SPECIAL_TOKENS first, then, unless spaced, BYTE_TOKENS; merges: pairs of ids, in the order
        learnt; nfkc: normalise texts first; append_eos: end them with [EOS]; added: the tokens that are cut out of a text
        before all else, with True for special ones (others are sought when it has been normalised)."""
        self.vocab, self.merges, self.nfkc, self.append_eos, self.spaced = vocab, merges, nfkc, append_eos, spaced
        self.added = added or dict.fromkeys(SPECIAL_TOKENS, True)
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.special_ids = {self.ids[token] for token, special in self.added.items() if special}
        self.byte_ids = range(0) if spaced else range(FIRST_BYTE, FIRST_CHAR)
        self.char_ids = np.full(0x110000, UNK if spaced else -1, dtype=np.int32)  # -1: written as bytes
        for token, i in self.ids.items():
            if len(token) == 1 and i not in self.special_ids:
                self.char_ids[ord(token)] = i
        self.classes = CLASSES
        if spaced:
            self.char_ids[ord(" ")] = self.char_ids[ord("▁")]
            self.classes = CLASSES.copy()
            self.classes[ord("▁")] = BEGINS
        self.merger = Merger(vocab, merges, [self.ids[vocab[a] + vocab[b]] for a, b in merges])
        self.cutters = []  # patterns of the special and of the other added tokens, the longest first
        for kind in (True, False):
            tokens = sorted((token for token, special in self.added.items() if special is kind), key=len, reverse=True)
            self.cutters.append(re.compile("(" + "|".join(map(re.escape, tokens)) + ")" if tokens else "(?!)"))

    def __len__(self) -> int:
        return len(self.vocab)

    def __eq__(self, other) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    # --- encoding -------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The ids of a text: what AutoTokenizer(text).input_ids is."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        ids, lengths = self.encode_arrays(texts)
        flat, ends = ids.tolist(), np.cumsum(lengths).tolist()
        return [flat[a:b] for a, b in zip([0] + ends, ends)]

    def encode_arrays(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """All texts' ids one after the other (int32), and how many each has (int64)."""
        parts = [self._encode_chunk(chunk) for chunk in batches(texts, CHUNK_CHARS)]
        parts.append((np.empty(0, np.int32), np.empty(0, np.int64)))
        ids, lengths = (np.concatenate(arrays) for arrays in zip(*parts))
        return ids, lengths

    def _cut(self, text: str) -> Iterator[tuple[str, int]]:
        """The parts of a text: plain ones, normalised, with -1, and added tokens, with their ids."""
        special, other = self.cutters
        for i, part in enumerate(special.split(text)):
            if i % 2:
                yield part, self.ids[part]
                continue
            for j, piece in enumerate(other.split(normalize(part) if self.nfkc else part)):
                if piece:
                    yield piece, self.ids[piece] if j % 2 else -1

    def _lay_out(self, texts: list[str]) -> tuple[np.ndarray, ...]:
        """Texts -> the codepoints of all, one after the other; where a text begins; where a part of one begins (texts
        are cut at added tokens); where an added token stands, as one character, and its id."""
        joined, none = "".join(texts), np.empty(0, dtype=np.int64)
        if not self.nfkc and not any(cutter.search(joined) for cutter in self.cutters):
            begins = np.cumsum([0] + [len(text) for text in texts])[:-1]
            return to_codepoints(joined), begins, begins, none, none
        cut = [list(self._cut(text)) for text in texts]
        parts = [(part if i < 0 else "\0", i) for text in cut for part, i in text]
        begins = np.cumsum([0] + [len(part) for part, _ in parts])
        text_begins = begins[np.cumsum([0] + [len(text) for text in cut])[:-1]]
        ids = np.array([i for _, i in parts], dtype=np.int64)
        return to_codepoints("".join(part for part, _ in parts)), text_begins, begins[:-1], begins[:-1][ids >= 0], ids[ids >= 0]

    def _encode_chunk(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        codes, text_begins, part_begins, token_places, token_ids = self._lay_out(texts)
        symbols, starts = self.char_ids[codes], piece_starts(codes, part_begins, self.classes)
        symbols[token_places] = token_ids
        prefixed = np.zeros(len(codes), dtype=bool)
        if self.spaced:
            prefixed = starts & (codes != ord(" ")) & (codes != ord("▁"))
            prefixed[token_places] = False
        unknown = symbols < 0
        if prefixed.any() or unknown.any():  # some characters are several symbols: ▁ and itself, or its bytes
            sizes = 1 + prefixed
            sizes[unknown] += np.searchsorted([0x80, 0x800, 0x10000], codes[unknown], side="right")
            places = np.cumsum(sizes) - sizes
            first, text_begins = places[starts], np.append(places, sizes.sum())[text_begins]
            symbols = np.repeat(symbols, sizes)
            symbols[places[prefixed]] = self.char_ids[ord("▁")]
            spelled = codes[unknown].tobytes().decode("utf-32-le").encode()
            symbols[symbols < 0] = np.frombuffer(spelled, dtype=np.uint8) + np.int32(FIRST_BYTE)
            starts = np.zeros(len(symbols), dtype=bool)
            starts[first] = True
        self.merger.merge(symbols, starts)
        kept = symbols >= 0
        before = np.concatenate([[0], np.cumsum(kept)])[np.append(text_begins, len(symbols))]  # tokens before each text
        ids, lengths = symbols[kept], np.diff(before)
        return (np.insert(ids, before[1:], EOS), lengths + 1) if self.append_eos else (ids, lengths)

    # --- decoding -------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids (any iterable of int); those that are no token are passed over, as tokenizers does."""
        return "".join(self.stream(ids, skip_special_tokens))

    def stream(self, ids: Iterable[int], skip_special_tokens: bool = True) -> Iterator[str]:
        """decode's text in the parts in which it comes to be known, never half a character: for ids that come one by one.

        A run of bytes is text when it has ended; one that is not UTF-8 becomes U+FFFD for each byte.
        """
        pending, first = bytearray(), True
        for i in map(int, ids):
            if not 0 <= i < len(self.vocab) or skip_special_tokens and i in self.special_ids:
                continue
            if i in self.byte_ids:
                pending.append(i - FIRST_BYTE)
                continue
            token = self.vocab[i].replace("▁", "" if first else " ") if self.spaced else self.vocab[i]
            yield spelled_text(pending) + token
            pending, first = bytearray(), False
        yield spelled_text(pending)

    # --- files ----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """tokenizer.json, as tokenizers reads it."""
        mark = metaspace("▁", "always")
        eos, a, b = {"SpecialToken": {"id": "[EOS]", "type_id": 0}}, *({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        return json.dumps({
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [dict(id=self.ids[token], content=token, single_word=False, lstrip=False, rstrip=False,
                                  normalized=not special, special=special) for token, special in self.added.items()],
            "normalizer": {"type": "NFKC"} if self.nfkc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Punctuation", "behavior": "Isolated"}, {"type": "Digits", "individual_digits": True},
                mark if self.spaced else metaspace(" ", "never")]},
            "post_processor": {"type": "TemplateProcessing", "single": [a, eos], "pair": [a, eos, b, eos],
                               "special_tokens": {"[EOS]": {"id": "[EOS]", "ids": [EOS], "tokens": ["[EOS]"]}}}
            if self.append_eos else None,
            "decoder": mark if self.spaced else {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {**MODEL_DEFAULTS, "unk_token": "[UNK]" if self.spaced else None, "byte_fallback": not self.spaced,
                      "vocab": self.ids, "merges": [[self.vocab[a], self.vocab[b]] for a, b in self.merges]}},
            ensure_ascii=False) + "\n"

    @classmethod
    def from_pretrained(cls, folder, append_eos: bool | None = None) -> "Tokenizer":
        """Read folder/tokenizer.json; append_eos: end every text with [EOS] or not; None: as the file says.

        Raises FileNotFoundError without one, ValueError for one cut off or of another form, naming the part.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        try:
            form = json.loads(path.read_text("utf-8"))
            kind, added = form["model"].get("type"), form["added_tokens"]
            if kind != "BPE":
                raise NotImplementedError(f"this kind of model is not supported: {kind}")
            ids = form["model"]["vocab"] | {token["content"]: token["id"] for token in added}
            if [ids.get(token) for token in SPECIAL_TOKENS] != list(range(len(SPECIAL_TOKENS))):
                raise NotImplementedError(f"the vocabulary does not begin with {' '.join(SPECIAL_TOKENS)}")
            vocab = sorted(ids, key=ids.__getitem__)
            if [ids[token] for token in vocab] != list(range(len(vocab))) or "" in ids:
                raise ValueError("the ids are not 0, 1, 2, ..., one for each token")
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in form["model"]["merges"]]
            if missing := {token for a, b in pairs for token in (a, b, a + b)} - ids.keys():
                raise ValueError(f"its merges have {missing.pop()!r}, which the vocabulary has not")
            found = canonical(form)
            if found["normalizer"] and (odd := [t["content"] for t in added if normalize(t["content"]) != t["content"]]):
                raise NotImplementedError(f"the added token {odd[0]!r}, which NFKC changes, is not supported")
            tokenizer = cls(vocab, [(ids[a], ids[b]) for a, b in pairs], nfkc=found["normalizer"] is not None,
                            append_eos=found["post_processor"] is not None, spaced=found["model"]["unk_token"] is not None,
                            added={token["content"]: token["special"] for token in added})
            known = canonical(json.loads(tokenizer.to_json()))
            for part in known:
                if found[part] != known[part]:
                    shown = json.dumps(found[part], ensure_ascii=False)
                    raise NotImplementedError(f"this kind of {part} is not supported: {shown[:200]}")
            if not tokenizer.spaced and vocab[FIRST_BYTE:FIRST_CHAR] != BYTE_TOKENS:
                raise NotImplementedError("the 256 bytes do not follow the special tokens")
        except NotImplementedError as e:
            raise ValueError(f"{path}: {e}") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
            raise ValueError(f"{path} is damaged: {type(e).__name__}: {e}") from None
        if append_eos is not None:
            tokenizer.append_eos = append_eos
        if (config := Path(folder) / "tokenizer_config.json").is_file():
            check_added_tokens(config, tokenizer)
        return tokenizer

    def save_pretrained(self, folder) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
        names = dict(pad_token="[PAD]", eos_token="[EOS]", sep_token="[SEP]", bos_token="[BOS]", cls_token="[CLS]",
                     mask_token="[MASK]", unk_token="[UNK]")
        config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
                      model_input_names=["input_ids", "attention_mask"], model_max_length=10 ** 9, **names)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "tokenizer.json", self.to_json())
        write_file(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        write_file(folder / "special_tokens_map.json", json.dumps(names, indent=2) + "\n")

    # --- training -------------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 29298, min_frequency: int = 2, character_coverage: float = 0.9999,
              nfkc: bool = False, workers: int = 1, memory_bytes: int | None = None, progress: bool = False) -> "Tokenizer":
        """Learn a tokenizer: always merge the most frequent adjacent pair, ties by the smaller (left id, right id).

        min_frequency: pairs seen less often are not merged, so the vocabulary can stay smaller than vocab_size.
        character_coverage: the alphabet holds the most frequent characters that make up this share of the text; ids
        follow their frequency. memory_bytes: what all processes together may use; where the texts do not fit, a uniform
        sample of them is taken, and texts must be such as can be read twice. The result does not depend on workers.
        Raises ValueError for a corpus without text or a vocabulary too small for alphabet, bytes and specials.
        """
        if vocab_size > MOST_TOKENS or min_frequency < 1:
            raise ValueError(f"vocab_size must be {MOST_TOKENS:,} at most, and min_frequency 1 at least")
        pieces = count_pieces(texts, vocab_size, nfkc, workers, memory_bytes, progress)
        counts = pieces.characters
        if not counts.any():
            raise ValueError("the corpus has no text to learn a tokenizer from")
        alphabet = np.flatnonzero(counts)
        alphabet = alphabet[np.argsort(-counts[alphabet], kind="stable")]  # by frequency, then codepoint
        covered = np.cumsum(counts[alphabet])
        alphabet = alphabet[:1 + np.searchsorted(covered, character_coverage * covered[-1])]
        if vocab_size < FIRST_CHAR + len(alphabet):
            raise ValueError(f"vocab_size {vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens, 256 bytes and "
                             f"{len(alphabet)} characters need at least {FIRST_CHAR + len(alphabet)} (a lower character_coverage "
                             "makes fewer characters)")
        char_ids = np.full(0x110000, -1, dtype=np.int32)
        char_ids[alphabet] = np.arange(FIRST_CHAR, FIRST_CHAR + len(alphabet))
        vocab = SPECIAL_TOKENS + BYTE_TOKENS + [chr(c) for c in alphabet]
        merges = learn_merges(*pieces.laid_out(char_ids.astype(id_type(vocab_size))), vocab, vocab_size, min_frequency, progress)
        return cls(vocab, merges, nfkc=nfkc)


def check_added_tokens(path: Path, tokenizer: Tokenizer) -> None:
    """Raises ValueError for special tokens that only tokenizer_config.json has: AutoTokenizer would add them to those of tokenizer.json."""
    try:
        config = json.loads(path.read_text("utf-8"))
        tokens = [token["content"] for token in (config.get("added_tokens_decoder") or {}).values()]
        for name in ("additional_special_tokens", "extra_special_tokens"):
            more = config.get(name) or []
            tokens += [token if isinstance(token, str) else token["content"] for token in (more.values() if isinstance(more, dict) else more)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged") from None
    if missing := [token for token in tokens if token not in tokenizer.added]:
        raise ValueError(f"{path} has the special token {missing[0]!r}, and tokenizer.json has not: load the folder with transformers and "
                         "save it again")


MODEL_DEFAULTS = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}


def metaspace(mark: str, prefix: str) -> dict:
    return {"type": "Metaspace", "replacement": mark, "prepend_scheme": prefix, "split": True}


def canonical(form: dict) -> dict:
    """tokenizer.json without what differs between versions of tokenizers (a sequence of one, what had a default then)
    and without vocabulary and merges."""
    def part(value):
        if not isinstance(value, dict):
            return value
        steps = next((value[k] for k in ("normalizers", "pretokenizers", "decoders") if k in value), None)
        if steps is not None:
            return part(steps[0]) if len(steps) == 1 else [part(step) for step in steps]
        if value.get("type") == "Metaspace":
            prefix = value.get("prepend_scheme", "always" if value.get("add_prefix_space", True) else "never")
            return {**metaspace(value["replacement"], prefix), "split": value.get("split", True)}
        return None if value.get("type") == "TemplateProcessing" and not value["special_tokens"] else value

    model = {k: v for k, v in {**MODEL_DEFAULTS, **form["model"]}.items() if k not in ("vocab", "merges")}
    # not padding and truncation, which a file may have too: AutoTokenizer resets them, so they change no ids
    names = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {name: part(form.get(name)) for name in names} | {"model": model}


def spelled_text(spelled: bytearray) -> str:
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return chr(REPLACEMENT_CHAR) * len(spelled)


# --- learning: pieces and their frequencies ----------------------------------------------------------------------------------------

class Block(NamedTuple):
    """Pieces, each once, in order of their hashes; equal hashes are taken for equal pieces (of 64 bits: only a text made for
    it has two pieces with one hash). A unit is one of UTF-16: two bytes, one for nearly every character, two for the rest."""
    hashes: np.ndarray  # (P,) uint64
    sizes: np.ndarray  # (P,) int32, in units
    frequencies: np.ndarray  # (P,) int64
    units: np.ndarray  # (N,) uint16, of one piece after the other


EMPTY = Block(*(np.empty(0, kind) for kind in (np.uint64, np.int32, np.int64, np.uint16)))
HASH_FACTOR = 0x9E3779B97F4A7C15
HASH_UNITS = np.random.default_rng(0).integers(0, 1 << 64, size=1 << 16, dtype=np.uint64)


def united(blocks: list[Block]) -> Block:
    """The pieces of several blocks, or of one that is neither in order nor without repetition."""
    hashes, sizes, frequencies, units = (np.concatenate([block[i] for block in blocks]) for i in range(4))
    order = np.argsort(hashes)
    hashes = hashes[order]
    first = np.flatnonzero(np.concatenate([np.ones(min(1, len(hashes)), bool), hashes[1:] != hashes[:-1]]))
    if len(first):
        frequencies = np.add.reduceat(frequencies[order], first)
    begins, order = np.cumsum(sizes) - sizes, order[first]
    return Block(hashes[first], sizes[order], frequencies, units[joined_ranges(begins[order], sizes[order])])


def cut_pieces(job: tuple[list[str], bool]) -> tuple[int, np.ndarray, np.ndarray, Block]:
    """Texts, and whether to normalise them -> how many characters they have; the codepoints in them, normalised, and how
    often each occurs; the pieces of two units and more, which alone can hold merges."""
    texts, nfkc = job
    chars = sum(map(len, texts))
    if nfkc:
        texts = [normalize(text) for text in texts]
    codes = to_codepoints("".join(texts))
    starts = piece_starts(codes, np.cumsum([0] + [len(text) for text in texts]))
    counts = np.bincount(codes)
    units, wide = codes.astype(np.uint16), np.flatnonzero(codes > 0xFFFF)
    if len(wide):  # two units each, of which the second begins no piece
        units = np.frombuffer(codes.tobytes().decode("utf-32-le").encode("utf-16-le"), dtype=np.uint16)
        starts = np.insert(starts, wide + 1, False)
    begins = np.flatnonzero(starts)
    sizes = np.diff(begins, append=len(units))
    # A piece's hash: the sum of a random number a unit times factor^position, from sums over the whole chunk
    powers = np.cumprod(np.full(len(units), HASH_FACTOR, dtype=np.uint64))
    inverse = np.cumprod(np.full(len(units), pow(HASH_FACTOR, -1, 1 << 64), dtype=np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(HASH_UNITS[units] * powers, dtype=np.uint64)])
    hashes = (sums[begins + sizes] - sums[begins]) * inverse[begins]
    long = sizes > 1
    block = Block(hashes[long], sizes[long].astype(np.int32), np.ones(np.count_nonzero(long), np.int64), units[np.repeat(long, sizes)])
    seen = np.flatnonzero(counts)
    return chars, seen, counts[seen], united([block])


class Pieces:
    """What learning needs to know of a corpus: how often each character occurs, and each piece.

    Blocks are kept apart by the first bits of the hashes, and those of a part united as they come to be half again as
    many, so that there is little twice and little to copy at a time.
    """
    PARTS = 16

    def __init__(self):
        self.characters = np.zeros(0x110000, dtype=np.int64)
        self.parts: list[list[Block]] = [[EMPTY] for _ in range(self.PARTS)]
        self.edges = np.arange(1, self.PARTS, dtype=np.uint64) * np.uint64((1 << 64) // self.PARTS)

    def add(self, seen: np.ndarray, counts: np.ndarray, block: Block) -> None:
        self.characters[seen] += counts
        hashes, sizes, frequencies, units = block
        ends = np.append(np.searchsorted(hashes, self.edges), len(hashes))
        unit_ends = np.concatenate([[0], np.cumsum(sizes)])[ends]
        a = b = 0
        for part, c, d in zip(self.parts, ends.tolist(), unit_ends.tolist()):
            part.append(Block(hashes[a:c].copy(), sizes[a:c].copy(), frequencies[a:c].copy(), units[b:d].copy()))
            a, b = c, d
            if sum(len(block.units) for block in part[1:]) > len(part[0].units) // 2 + (1 << 16):
                part[:] = [united(part)]

    def unite(self) -> None:
        for part in self.parts:
            part[:] = [united(part)] if len(part) > 1 else part

    def cells(self) -> int:
        """How many places the corpus takes: a unit each, and a separator for every piece."""
        return sum(len(block.sizes) + len(block.units) for part in self.parts for block in part)

    def need_bytes(self, vocab_size: int) -> int:
        """What they take, or what learning from them takes, whichever is more. Found by measuring, with corpora of long and
        short pieces that all differ; tests/test_tokenizer.py holds it to that."""
        blocks = [block for part in self.parts for block in part]
        held = sum(array.nbytes for block in blocks for array in block)
        repeated = sum(int((block.sizes[block.frequencies > 1] + 1).sum()) for block in blocks)
        learning = self.cells() * (8 + id_type(vocab_size).itemsize) + 4 * repeated
        return max(held * 3 // 2, learning)

    def laid_out(self, char_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All pieces as ids of characters, with -1 around each and for what has no id: those that occur more than once
        at the front. And how often each place there occurs; the last number, 1, goes for all behind. Empties self."""
        corpus, front, back, weights = np.full(self.cells() + 1, -1, char_ids.dtype), 1, self.cells() + 1, [np.ones(1, np.int64)]
        for part in self.parts:
            _, sizes, frequencies, units = united(part)
            part.clear()
            second = np.concatenate([[0], np.cumsum((units & 0xFC00) == 0xDC00)])  # units that end a character of two
            ends = np.cumsum(sizes)
            sizes = sizes - (second[ends] - second[ends - sizes])
            ids = char_ids[np.frombuffer(units.tobytes().decode("utf-16-le").encode("utf-32-le"), dtype=np.uint32)]
            ids = np.insert(ids, np.cumsum(sizes), -1)
            several = np.repeat(frequencies > 1, sizes + 1)
            weights.append(np.repeat(frequencies, sizes + 1)[several])
            corpus[front:front + len(weights[-1])] = ids[several]
            corpus[back - len(ids) + len(weights[-1]):back] = ids[~several]
            front, back = front + len(weights[-1]), back - len(ids) + len(weights[-1])
        weight = np.concatenate([*weights, np.ones(1, np.int64)])
        return corpus, weight.astype(np.min_scalar_type(weight.max()))


LEARNING_CHUNK_CHARS, LONGEST_TEXT = 1 << 19, 1 << 17  # texts are cut into pieces in batches of about so many characters
PROCESS_BYTES, WORKER_BYTES, LEAST_PIECES_BYTES = 300_000_000, 150_000_000, 240_000_000  # measured, and rounded up
SCAN_CELLS = 1 << 20  # pairs are counted in stretches of this many places


def id_type(vocab_size: int) -> np.dtype:
    """What learn_merges needs to hold ids, and as many negative numbers."""
    return np.dtype(np.int16 if vocab_size < 1 << 15 else np.int32)


def most_cells(vocab_size: int) -> int:
    """How many places learn_merges can number: two ids and a place are one uint64, a place by itself is an int32."""
    return min(1 << 64 - 2 * (vocab_size - 1).bit_length(), 1 << 31)


def count_pieces(texts: Iterable[str], vocab_size: int, nfkc: bool, workers: int, memory_bytes: int | None,
                 progress: bool) -> Pieces:
    """The pieces of texts or, where memory_bytes would not hold what learning takes, of a uniform sample: of the texts
    whose hash is below a share of all hashes. The share is found by trying, and is the same for any number of workers.
    (A text of more than LONGEST_TEXT characters counts as several. The hash's seed makes it another than data.py split's.)"""
    budget_bytes, share, cell_bytes = None, 1.0, 12 + id_type(vocab_size).itemsize  # that a new one takes at the most
    if memory_bytes is not None:
        heap_bytes = 2000 * vocab_size  # of learn_merges: four pairs a token at the most, with their places
        least = PROCESS_BYTES + heap_bytes + LEAST_PIECES_BYTES
        if memory_bytes < least:
            raise ValueError(f"{memory_bytes / 1e6:,.0f} MB are not enough to learn {vocab_size:,} tokens in: the least is {least / 1e6:,.0f} MB")
        if iter(texts) is texts:
            raise ValueError("with memory_bytes, texts must be such as can be read twice, like a list")
        processes_bytes = max(PROCESS_BYTES, memory_bytes // 4)
        budget_bytes = memory_bytes - processes_bytes - heap_bytes
        workers = min(workers, max(1, (processes_bytes - PROCESS_BYTES) // WORKER_BYTES))
    while True:
        pieces, chars_read, chars_counted, need_bytes, cells_then, shown_s = Pieces(), 0, 0, 0, 0, time.monotonic()

        def sample() -> Iterator[str]:
            nonlocal chars_read
            for whole in texts:
                for begin in range(0, len(whole), LONGEST_TEXT):
                    text = whole[begin:begin + LONGEST_TEXT]
                    if share == 1 or xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed=1) < share * 2 ** 64:
                        chars_read += len(text)
                        yield text

        reading = sample()
        jobs = ((chunk, nfkc) for chunk in batches(reading, LEARNING_CHUNK_CHARS))
        for chars, *counted in in_order(cut_pieces, jobs, workers):
            pieces.add(*counted)
            chars_counted += chars
            cells = pieces.cells()
            if budget_bytes and (need_bytes + (cells - cells_then) * cell_bytes > budget_bytes or cells > most_cells(vocab_size)):
                pieces.unite()  # it may be too much
                need_bytes, cells_then = pieces.need_bytes(vocab_size), pieces.cells()
                if need_bytes > 0.9 * budget_bytes or cells_then > 0.9 * most_cells(vocab_size):
                    break
            if progress and time.monotonic() - shown_s > 1:
                shown_s = time.monotonic()
                print(f"\r{chars_counted:,} characters read ", end="", file=sys.stderr, flush=True)
        else:
            if progress:
                print(f"\r{chars_counted:,} characters read{' ' * 20}", file=sys.stderr)
            return pieces
        if share == 1:
            deque(reading, maxlen=0)  # to know how many characters there are
            share = 0.95 * chars_counted / chars_read
        else:
            share *= 0.8
        print("\r\x1b[K" * progress + f"the corpus does not fit into the memory allowed: learning from a sample of {100 * share:.1f} % "
              "of its texts", file=sys.stderr)


def learn_merges(corpus: np.ndarray, weight: np.ndarray, vocab: list[str], vocab_size: int, min_frequency: int,
                 progress: bool = False) -> list[tuple[int, int]]:
    """Textbook BPE over Pieces.laid_out's corpus and weight, growing vocab in place; the merges in their order.

    A token stands at its first character's place, and where it ends stands ~token (for one of a single character both are
    one place, and the token stands there): so what follows is found by adding a token's length, what precedes by reading
    the place before, and a merge touches only its own places.

    A heap holds (-count, left, right) for all pairs up to `bound`, one such triple, with the places of each. A count in it
    may be too high, since merges take occurrences away, never too low. So a popped pair is counted anew: if the count
    stands, no other pair comes before it, and it is merged; else it goes back with its true count. The pairs that a merge
    makes are new ones, and enter the heap if they come before the bound. When it is empty, all pairs are counted over the
    whole corpus, up to a farther bound.

    Should a merge make a token that exists already, by another way (ab + c, where a + bc is known), known pairs can become
    more frequent: then too all are counted anew. Hugging Face's trainer differs here: its queue then holds such a pair
    twice, each with a part of its places, and merges one part later than the other, and than it should.
    """
    separator, dead, several = -1, np.iinfo(corpus.dtype).min, len(weight) - 1
    id_bits = (vocab_size - 1).bit_length()
    whole = (1 << id_bits) - 1  # a bound of this pair leaves out none of its count
    place_bits = 64 - 2 * id_bits  # see most_cells
    place_mask = np.uint64((1 << place_bits) - 1)
    if len(corpus) > most_cells(vocab_size):
        raise ValueError(f"{len(corpus):,} characters of distinct pieces are too many at once for {vocab_size:,} tokens: name "
                         "memory_bytes, to learn from a sample, or a smaller vocab_size")
    length = np.ones(vocab_size, dtype=np.int32)
    ids = {token: i for i, token in enumerate(vocab)}
    merges: list[tuple[int, int]] = []
    heap: list[tuple[int, int, int]] = []
    places: dict[tuple[int, int], np.ndarray] = {}
    bound, heap_pairs, stale, shown_s = (-sys.maxsize, 0, 0), 0, False, time.monotonic()
    slot_bits = min(22, len(corpus).bit_length())

    def times(at: np.ndarray) -> np.ndarray:
        return weight[np.minimum(at, several)]

    def packed(left: np.ndarray, right: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Occurrences as one uint64 each, so that sorting groups them by pair and orders them by place."""
        pair = left.astype(np.uint64) << np.uint64(id_bits) | right.astype(np.uint64)
        return pair << np.uint64(place_bits) | at.astype(np.uint64)

    def enter(occurrences: np.ndarray) -> None:
        """Sort occurrences into pairs; those up to the bound enter the heap; if they are too many, the bound comes nearer."""
        nonlocal bound, heap
        occurrences.sort()
        while len(occurrences):
            last = occurrences[min(SCAN_CELLS, len(occurrences)) - 1] | place_mask  # a stretch ends with a pair
            part, occurrences = np.split(occurrences, [np.searchsorted(occurrences, last, "right")])
            pairs, at = part >> np.uint64(place_bits), (part & place_mask).astype(np.int32)
            begins = np.concatenate([[0], np.flatnonzero(pairs[1:] != pairs[:-1]) + 1])
            counts, pairs = np.add.reduceat(times(at), begins, dtype=np.int64), pairs[begins]
            last = np.uint64(bound[1] << id_bits | bound[2])
            near = np.flatnonzero((counts > -bound[0]) | (counts == -bound[0]) & (pairs <= last))
            ends = np.append(begins, len(at))[near + 1]
            for count, pair, begin, end in zip(*(x.tolist() for x in (counts[near], pairs[near], begins[near], ends))):
                left, right = divmod(pair, 1 << id_bits)
                found = at[begin:end].copy()
                if left == right:  # in x x x there are two, of which one can be merged
                    count = int(times(found[every_other(found, int(length[left]))]).sum(dtype=np.int64))
                    if (-count, left, right) > bound:
                        continue
                places[left, right] = found
                heapq.heappush(heap, (-count, left, right))
            if len(heap) > 2 * heap_pairs:
                heap = heapq.nsmallest(heap_pairs, heap)
                bound, kept = heap[-1], {(left, right) for _, left, right in heap}
                for pair in places.keys() - kept:
                    del places[pair]

    def scan() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every stretch of the corpus: its occurrences of pairs, and a slot for each, which several pairs may share."""
        for begin in range(0, len(corpus), SCAN_CELLS):
            at = np.flatnonzero(corpus[begin:begin + SCAN_CELLS] >= 0) + begin
            left = corpus[at]
            right = corpus[at + length[left]]
            inside = right >= 0
            found = packed(left[inside], right[inside], at[inside])
            yield found, ((found >> np.uint64(place_bits)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - slot_bits)).view(np.int64)

    while len(vocab) < vocab_size:
        if stale or not heap:
            # Count what falls into each slot, which is no less than any of its pairs; the bound shall let in some twice as
            # many pairs as there are tokens to come.
            slots = np.zeros(1 << slot_bits)
            for found, slot in scan():
                slots += np.bincount(slot, times(found & place_mask), len(slots))
            ranked = np.sort(slots[slots >= min_frequency])
            if not len(ranked) or not stale and bound == (-min_frequency, whole, whole):
                break
            heap_pairs = 2 * (vocab_size - len(vocab)) + 1000
            floor = int(ranked[-min(len(ranked), heap_pairs)])
            if not stale:  # what comes before the old bound is done
                floor = min(floor, -bound[0] if bound[1] < whole else -bound[0] // 2)
            floor = max(floor, min_frequency)
            bound, heap, places, stale = (-floor, whole, whole), [], {}, False
            rounds = min(8, 1 + int(slots[slots >= floor].sum()) // max(1 << 23, len(corpus) // 8))
            for i in range(rounds):  # some of the slots at a time, to sort less at once
                now = slots >= floor
                now[np.arange(len(slots)) % rounds != i] = False
                enter(np.concatenate([found[now[slot]] for found, slot in scan()]))
            continue
        count, a, b = heapq.heappop(heap)
        at = places.pop((a, b))
        at = at[corpus[at] == a]
        at = at[corpus[at + length[a]] == b]
        mergeable = at[every_other(at, int(length[a]))] if a == b and len(at) > 1 else at
        true_count = int(times(mergeable).sum(dtype=np.int64))
        if true_count != -count:
            if (-true_count, a, b) <= bound:
                places[a, b] = at
                heapq.heappush(heap, (-true_count, a, b))
            continue
        at = mergeable
        token = vocab[a] + vocab[b]
        new = ids.setdefault(token, len(vocab))
        stale = new < len(vocab)
        if not stale:
            vocab.append(token)
            length[new] = length[a] + length[b]
        merges.append((a, b))
        end = at + (length[new] - 1)
        corpus[at] = new
        corpus[at + length[a]] = dead
        corpus[end] = ~new
        if not stale:
            before, after = corpus[at - 1], corpus[end + 1]
            before = np.where(before < separator, ~before, before)
            left, right = (before != separator) & (before != new), after != separator  # (new, new) is counted from its left
            before, after = before[left], after[right]
            made = np.concatenate([packed(before, np.full(len(before), new), at[left] - length[before]),
                                   packed(np.full(len(after), new), after, at[right])])
            enter(made)
        if progress and time.monotonic() - shown_s > 1:
            shown_s = time.monotonic()
            print(f"\rvocabulary {len(vocab):,} of {vocab_size:,}, newest pair seen {true_count:,} times ",
                  end="", file=sys.stderr, flush=True)
    if progress:
        print(f"\rvocabulary {len(vocab):,}, {len(merges):,} merges{' ' * 40}", file=sys.stderr)
    return merges


def every_other(positions: np.ndarray, step: int) -> np.ndarray:
    """Which of the sorted positions of a pair (x, x) can be merged, from the left: in a run of neighbours `step` apart
    every other one. [3, 4, 5, 9], step 1 -> [True, False, True, True]"""
    index = np.arange(len(positions))
    new_run = np.concatenate([[True], np.diff(positions) != step])
    return (index - np.maximum.accumulate(np.where(new_run, index, 0))) % 2 == 0


# --- what the scripts share: processes, files, and a command line that speaks to people (kept in the file all import) ----

KILLED = "a background process was killed (is there enough memory? --workers 1 takes the least)"


def in_order(function: Callable, jobs: Iterable, workers: int) -> Iterator:
    """function(job) of every job, in their order; with more than one worker in so many processes, a job each at a time.

    Raises ChildProcessError when one of them has been killed.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    try:
        sent = received = 0
        for job in jobs:
            if len(pipes) < workers:
                ours, theirs = context.Pipe()
                processes.append(context.Process(target=serve, args=(function, theirs), daemon=True))
                processes[-1].start()
                theirs.close()
                pipes.append(ours)
            done = [receive(pipes[received % workers])] if sent - received == workers else []
            try:
                pipes[sent % workers].send(job)
            except OSError:
                raise ChildProcessError(KILLED) from None
            sent, received = sent + 1, received + len(done)
            yield from done
        for i in range(received, sent):
            yield receive(pipes[i % workers])
    finally:
        for process in processes:
            process.kill()


def serve(function: Callable, pipe) -> None:
    """In a background process: answer jobs until the other end of the pipe has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            job = pipe.recv()
            try:
                pipe.send((function(job), None))
            except Exception as e:
                pipe.send((None, e))
    except (EOFError, ConnectionError):
        pass


def receive(pipe):
    """serve's answer; raises the error that it met."""
    try:
        result, error = pipe.recv()
    except (EOFError, OSError):
        raise ChildProcessError(KILLED) from None
    if error is not None:
        raise error
    return result


def batches(texts: Iterable, chars: int, length: Callable = len) -> Iterator[list]:
    """Lists of texts, or of what length(item) is known of, with about so many characters each."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += length(text)
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def atomic_write(path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to. At the end it is synced to disk and renamed, so that `path` is
    either the old file or the new one, whole; after an error it is deleted."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        with write_errors(path):
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_errors(path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn OSError, and what else a library raises when it cannot write, into an OSError that names path and the cause."""
    try:
        yield
    except (OSError, *kinds) as e:
        code = re.search(r"\b(?:os error|errno) (\d+)", str(e), re.I)  # as safetensors and pyarrow print it
        number = getattr(e, "errno", None) or (int(code[1]) if code else errno.EIO)
        cause = os.strerror(number) if number != errno.EIO else f"{e} (is the disk full?)"
        raise OSError(number, f"could not be written: {cause}", str(path)) from None


def write_file(path, text: str) -> None:
    """Write a text file by atomic_write."""
    with atomic_write(path) as temporary, write_errors(path):
        temporary.write_text(text, "utf-8")


@contextlib.contextmanager
def locked(path, message: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a lock on a file or folder that is there, so that two processes do not write to one place. Raises ValueError(message)
    if another process still holds it after patience_s."""
    if fcntl is None:
        yield
        return
    handle, begin_s = os.open(path, os.O_RDONLY), time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - begin_s >= patience_s:
                    raise ValueError(message) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def memory_hint(flag: str) -> Iterator[None]:
    """Turn every kind of out-of-memory error, of Python, numpy, torch or CUDA, into a MemoryError that names the flag to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        text = str(e)
        if not isinstance(e, MemoryError) and not re.search("out of memory|ALLOC_FAILED|allocate memory|not enough memory", text, re.I):
            raise
        kind = "GPU memory" if re.search("cuda|cublas|gpu", text, re.I) else "memory"
        raise MemoryError(f"out of {kind}: lower {flag}") from None


def check_folder(path) -> None:
    """Raises OSError if a folder cannot be made or written to there: said before the work, not after it."""
    there = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(there))
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, "no permission to write", str(there))


class Problems(Counter):
    """What was wrong in files that were read all the same: reason -> how often; `first` tells where it was met first."""

    def __init__(self):
        super().__init__()
        self.first: dict[str, str] = {}

    def note(self, reason: str, where: str, times: int = 1) -> None:
        self.first.setdefault(reason, where)
        self[reason] += times

    def warn(self) -> None:
        for reason, n in self.items():
            print(f"{Path(sys.argv[0]).name}: warning: {n:,} x {reason} (first in {self.first[reason]})", file=sys.stderr)


undecodable = [0]  # bytes of text files that were read as U+FFFD so far


def replace_and_count(error: UnicodeDecodeError) -> tuple[str, int]:
    undecodable[0] += error.end - error.start
    return chr(REPLACEMENT_CHAR), error.end


def undecodable_in(head: bytes, encoding: str) -> int:
    """Bytes at the beginning of a file that are not of the encoding."""
    before = undecodable[0]
    codecs.getincrementaldecoder(encoding)("replace_and_count").decode(head)
    after, undecodable[0] = undecodable[0], before
    return after - before


codecs.register_error("replace_and_count", replace_and_count)
csv.field_size_limit(1 << 30)


BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def encoding_of(path: Path, head: bytes) -> str:
    """The encoding of a text file, by its first bytes: what a byte-order mark says, else UTF-8, or GB18030 for a .csv or .txt
    file whose beginning fits that better. (JSON is UTF-8.)"""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    if kind_of(path) in (".csv", ".txt"):
        return min(("utf-8-sig", "gb18030"), key=lambda codec: undecodable_in(head, codec))
    return "utf-8-sig"


@contextlib.contextmanager
def open_text(path: Path, problems: Problems) -> Iterator[io.TextIOBase]:
    """A text file, also .gz, decoded by encoding_of. Bytes that are not of the encoding become U+FFFD and are noted. Raises
    ValueError, naming the file, where it, or what is made of it meanwhile, is damaged."""
    bad, encoding = undecodable[0], "utf-8-sig"
    open_bytes = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_bytes(path, "rb") as f:
            encoding = encoding_of(path, f.read(1 << 16))
        with open_bytes(path, "rt", encoding=encoding, errors="replace_and_count", newline="") as f:
            yield f
    except (EOFError, gzip.BadGzipFile, zlib.error, csv.Error, ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read: {' '.join(str(e).split())}") from None
    finally:
        if undecodable[0] > bad:
            problems.note(f"byte that is not {encoding.removesuffix('-sig')}, read as U+FFFD", str(path), undecodable[0] - bad)


def read_rows(paths: Iterable[str | Path], problems: Problems | None = None, outputs: Iterable = ()) -> Iterator[dict]:
    """The rows of files and folders as dicts: .parquet, .jsonl, .json (lines or one list), .csv, .txt, each also .gz.

    A line of text is {"text": line}. Lines that are not JSON objects, and CSV records that do not fit the header, are skipped
    and noted in problems, and so are bytes that are not of the encoding. outputs: see input_files. Raises FileNotFoundError or
    ValueError, naming the file, where one is missing, damaged or of another kind, and for a bad line if there is nowhere to
    note it.
    """
    for path in input_files(paths, outputs):
        if kind_of(path) == ".parquet":
            try:
                yield from read_parquet(path)
            except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as e:
                raise ValueError(f"{path} cannot be read: {' '.join(str(e).split())}") from None
        else:
            yield from read_text_rows(path, problems)


def read_text_rows(path: Path, problems: Problems | None) -> Iterator[dict]:
    """read_rows of one file that is not Parquet."""
    def bad(reason: str, line: int, detail: str) -> None:
        if problems is None:
            raise ValueError(f"line {line:,}: {detail}")
        problems.note(reason, f"{path}, line {line:,}")

    with open_text(path, Problems() if problems is None else problems) as f:
        kind = kind_of(path)
        if kind == ".csv":
            yield from read_csv(f, bad)
        elif kind == ".txt":
            for number, line in enumerate(iter(lambda: f.readline(1 << 22), ""), 1):  # a longer line is several
                if problems is not None and WIKI_TAG.fullmatch(line.strip()):
                    problems.note("tag line of WikiExtractor, skipped", f"{path}, line {number:,}")
                    continue
                yield {"text": line.rstrip("\r\n")}
        elif peek(f, 1024).lstrip().startswith("["):
            yield from read_json_list(f)
        else:
            for number, line in enumerate(f, 1):
                line = line.strip(" \t\r\n")
                try:
                    if line and not isinstance(row := json.loads(line), dict):
                        raise ValueError("not an object")
                except (ValueError, RecursionError) as e:
                    bad("line is not JSON", number, str(e))
                    continue
                if line:
                    yield row


WIKI_TAG = re.compile("<doc( [^>]*)?>|</doc>")  # what WikiExtractor writes around an entry


def read_csv(f, bad: Callable[[str, int, str], None]) -> Iterator[dict]:
    """The records of a CSV file with a header. bad(reason, line, detail) is told of records with more fields than the header,
    which are skipped, and of records with a bad quote: the line where such a record begins is skipped, and the rest is read."""
    taken: list[str] = []  # the lines of the present record
    again: deque[str] = deque()  # lines that were taken for a part of a bad record

    def lines() -> Iterator[str]:
        while line := again.popleft() if again else f.readline():
            taken.append(line)
            yield line

    header, begins, reader = None, 1, csv.reader(lines(), strict=True)
    while True:
        taken.clear()
        try:
            fields = next(reader)
        except StopIteration:
            if header is None:
                raise ValueError("it is empty, without a header") from None
            return
        except csv.Error as e:
            if header is None:
                raise ValueError(f"line {begins:,}: {e}") from None
            bad("bad quote in a CSV file, line skipped", begins, str(e))
            again.extendleft(reversed(taken[1:]))
            begins, reader = begins + 1, csv.reader(lines(), strict=True)
            continue
        if header is None:
            header = fields if any(fields) else None  # blank lines may come first
            if header and (twice := [name for name, n in Counter(header).items() if n > 1]):
                raise ValueError(f"the header has the column {twice[0]!r} twice")
        elif len(fields) > len(header):
            bad("record with more fields than the header, skipped", begins, f"{len(fields)} fields, and the header has {len(header)}")
        elif fields:
            yield dict(zip(header, fields)) | dict.fromkeys(header[len(fields):])
        begins += len(taken)


def whole_rows(paths: Iterable[str | Path], columns: tuple[str, ...], problems: Problems | None = None, outputs: Iterable = ()) -> Iterator[dict]:
    """The rows of files that have text in each of the columns. Those that have not are skipped and noted in problems,
    or raise ValueError if there is nowhere to note them, naming file and row; and so does a file without the column."""
    for path in input_files(paths, outputs):
        for i, row in enumerate(read_rows([path], problems), 1):
            lacking = next((c for c in columns if not isinstance(row.get(c), str)), None)
            if lacking is None:
                yield row
            elif problems is None or i == 1 and lacking not in row:
                raise ValueError(f"{path}, row {i:,} has no text in {lacking!r}; its columns are {', '.join(map(str, row))}")
            else:
                problems.note(f"row without text in {lacking!r}, skipped", f"{path}, row {i:,}")


def read_parquet(path: Path) -> Iterator[dict]:
    """The rows of one file, a few at a time however large its row groups are; dates and times are left out. (pyarrow is
    imported where it is needed, so that what only cuts or answers text starts fast and small.)"""
    import pyarrow as pa
    import pyarrow.parquet as pq
    with tempfile.TemporaryFile() if path.suffix.lower() == ".gz" else open(path, "rb") as f:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as source:
                shutil.copyfileobj(source, f)
        try:
            file = pq.ParquetFile(f, pre_buffer=False, buffer_size=1 << 20)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            rows = min((group.num_rows * (1 << 23) // max(1, group.total_byte_size) for group in groups if group.num_rows), default=1)
            columns = [field.name for field in file.schema_arrow if not pa.types.is_temporal(field.type)]
            for batch in file.iter_batches(max(1, min(1024, rows)), columns=columns):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, OverflowError) as e:
            raise ValueError(e) from None


def peek(f, chars: int) -> str:
    """The first characters of a text file that open_text opened; it stays at its beginning."""
    counted = undecodable[0]
    head = f.read(chars)
    f.seek(0)
    undecodable[0] = counted
    return head


def read_json_list(f) -> list[dict]:
    """The objects of a JSON list. All of it is in memory at once: some five times the size of the file."""
    rows = json.load(f)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"item {i:,} of its list is {json.dumps(row, ensure_ascii=False)[:40]}, not an object")
    return rows


KINDS = (".parquet", ".jsonl", ".json", ".csv", ".txt")
MODEL_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json")


def kind_of(path: Path) -> str:
    """.jsonl for a.jsonl, A.JSONL and a.jsonl.gz; .txt also for wiki_00, as WikiExtractor names its files"""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), ".txt" if re.fullmatch(r"wiki_\d+", name) else "")


NOT_DATA = {*MODEL_FILES, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "adapter_config.json"}  # of models and datasets
reported_skips: set[str] = set()


def input_files(paths: Iterable[str | Path], outputs: Iterable[str | Path] = ()) -> list[Path]:
    """The files meant by names of files and folders, in a fixed order. In folders, links are followed, and what is hidden, of an
    unknown type, or one of outputs, which the command writes itself, is skipped and reported once. Raises FileNotFoundError, or
    ValueError for an unknown type or an input that is an output."""
    written, files = {os.path.realpath(output) for output in outputs}, []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        if path.is_dir():
            files += folder_files(path, written)
        elif not path.is_file() or not kind_of(path):
            raise ValueError(f"{path}: unknown kind of file; known are {' '.join(KINDS)}, also .gz")
        elif os.path.realpath(path) in written:
            raise ValueError(f"{path} is both input and output: write to another file")
        else:
            files.append(path)
    return files


def folder_files(folder: Path, written: set[str]) -> list[Path]:
    """input_files of one folder."""
    def refuse(error: OSError) -> None:
        raise error

    def hidden(name: str) -> bool:
        return name.startswith(".") or name == "__MACOSX"

    found, skipped, seen, unknown = [], Counter(), set(), ""
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        skipped["hidden"] += sum(map(hidden, folders + names))
        folders[:] = sorted(name for name in folders if not hidden(name))
        for name in [name for name in folders if os.path.realpath(os.path.join(place, name)) in written]:
            folders.remove(name)
            skipped["that this command writes"] += 1
        for name in names:
            file = Path(place, name)
            real = os.path.realpath(file)
            if hidden(name) or name.endswith(".tmp") and any(real.startswith(output) for output in written):
                continue
            if name in NOT_DATA:
                skipped["of a model or data set description"] += 1
            elif not file.is_file():
                skipped["broken links or special files"] += 1
            elif real in written:
                skipped["that this command writes"] += 1
            elif not kind_of(file):
                unknown = unknown or name
                skipped["of unknown type"] += 1
            else:
                found.append(file)
    if unknown:
        skipped[f"of unknown type ({unknown}, ...)"] = skipped.pop("of unknown type")
    note = f"skipped in {folder}: " + ", ".join(f"{n:,} {reason}" for reason, n in skipped.items() if n)
    if not found:
        raise ValueError(f"{folder} has no files that can be read ({' '.join(KINDS)}, also .gz)" + (f"; {note}" if skipped.total() else ""))
    if skipped.total() and note not in reported_skips:
        reported_skips.add(note)
        print(f"{Path(sys.argv[0]).name}: note: {note}", file=sys.stderr)
    return sorted(found)


def read_texts(paths: Iterable[str | Path], problems: Problems | None = None) -> Iterator[str]:
    """The texts of files: of pairs their prompts and responses, of other rows every string."""
    for row in read_rows(paths, Problems() if problems is None else problems):
        chosen = [row[c] for c in ("prompt", "response")] if {"prompt", "response"} <= row.keys() else row.values()
        if isinstance(row.get("conversations"), list):  # of turns, each {"from": ..., "value": text}
            chosen = [turn.get("value") for turn in row["conversations"] if isinstance(turn, dict)]
        yield from (value for value in chosen if isinstance(value, str) and value)


class Corpus:
    """The texts of files, to be read as often as one likes."""

    def __init__(self, paths: list[str]):
        self.paths, self.problems = paths, Problems()
        input_files(paths)  # fails early

    def __iter__(self) -> Iterator[str]:
        self.problems = Problems()
        return read_texts(self.paths, self.problems)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in --help, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False or action.default == "" else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, and one line for an error."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:  # such as of a shell variable that is not set
            value = getattr(found, action.dest, None)
            if "" in (value if isinstance(value, list) else [value]) and action.dest not in ("prompt", "freeze"):
                self.error(f"{'/'.join(action.option_strings) or action.dest} is empty")
        return found, rest

    def error(self, message: str):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def number(kind: type, low: float, high: float = float("inf"), above: bool = False):
    """An argparse type: an int or float from low to high; with above, more than low."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
        if not (low < value if above else low <= value) or not value <= high or not math.isfinite(value):
            limit = f"more than {low:g}" if above else f"{low:g} or more"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limit}" + (f", {high:.10g} at most" if high < 1e300 else ""))
        return value
    return parse


def memory_size(text: str) -> int:
    """An argparse type: 4GB, 512MB, 4GiB, or bytes -> bytes."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ")) if match else 0
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 4GB or 512MB")
    return size


class AgreedError(ValueError):
    """An error that every process of a distributed run raises: the first process of each machine prints it."""


def run(main) -> None:
    """Call main() and end as a command should: an error is one line on stderr, status 2, or 1 where disk or memory is full."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # of a progress line

    def end(text: str, status: int, quiet: bool = False) -> None:
        if not quiet:
            print(f"{clear}{Path(sys.argv[0]).name}: {' '.join(map(str.strip, text.splitlines()))}", file=sys.stderr)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # at a normal exit the threads of a process group would abort, or wait for others
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)

    try:
        main()
    except KeyboardInterrupt:
        end("interrupted", 130)
    except MemoryError as e:
        end(f"error: {e or 'out of memory'}", 1)
    except (ValueError, OSError) as e:
        if isinstance(e, BrokenPipeError):  # the reader of our output has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        text, status = str(e), 2
        if isinstance(e, OSError) and e.strerror:
            text = f"{e.filename}: {e.strerror}" if e.filename else e.strerror
            status = 1 if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) else 2
        is_repeated = isinstance(e, AgreedError) and os.environ.get("LOCAL_RANK", "0") != "0"
        end(f"error: {text}", status, quiet=is_repeated)


def main() -> None:
    parser = ArgumentParser(description="Train a BPE tokenizer, or measure one.")
    commands = parser.add_subparsers(dest="command", required=True)
    kinds = ".parquet .jsonl .json .csv .txt, .gz, or folders of them; columns prompt and response where both are there, else all text"
    train = commands.add_parser("train", help="learn a tokenizer from files of text or pairs")
    train.add_argument("input", nargs="+", metavar="IN", help=kinds)
    train.add_argument("--out", required=True, metavar="DIR", help="folder for tokenizer.json")
    train.add_argument("--vocab_size", type=number(int, 264, MOST_TOKENS), default=29298, help="tokens, or fewer where no pair is frequent enough")
    train.add_argument("--min_frequency", type=number(int, 1), default=2, help="pairs seen less often are not merged")
    train.add_argument("--character_coverage", type=number(float, 0, 1, above=True), default=0.9999,
                       help="share of the text that the alphabet spells without bytes")
    train.add_argument("--nfkc", action="store_true", help="normalise text to NFKC first (decoding gives the normalised text)")
    train.add_argument("--memory", type=memory_size, default="4GB", help="resident memory that all processes together stay below, "
                       "600MB at the least; of a corpus too large for it a sample is taken")
    train.add_argument("--workers", type=number(int, 1), default=os.cpu_count(), help="processes that cut the corpus into pieces, or fewer "
                       "where --memory is small")
    stats = commands.add_parser("stats", help="characters per token, byte-fallback rate, speed")
    stats.add_argument("input", nargs="+", metavar="IN", help=kinds)
    stats.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.json")
    args = parser.parse_args()
    corpus = Corpus(args.input)
    try:
        if args.command == "train":
            check_folder(args.out)
            tokenizer = Tokenizer.train(corpus, args.vocab_size, args.min_frequency, args.character_coverage, args.nfkc,
                                        args.workers, args.memory, progress=sys.stderr.isatty())
            tokenizer.save_pretrained(args.out)
            print(f"{args.out}: {len(tokenizer):,} tokens, {len(tokenizer.merges):,} merges")
        else:
            measure(Tokenizer.from_pretrained(args.tokenizer), corpus)
    finally:
        corpus.problems.warn()


def measure(tokenizer: Tokenizer, corpus: Corpus) -> None:
    """Print what tokenizer.py stats tells."""
    chars = tokens = unknown = 0
    encode_s = 0.0
    for texts in batches(corpus, CHUNK_CHARS):
        begin_s = time.perf_counter()
        ids, _ = tokenizer.encode_arrays(texts)
        encode_s += time.perf_counter() - begin_s
        chars += sum(map(len, texts))
        tokens += len(ids) - len(texts) * tokenizer.append_eos
        unknown += np.count_nonzero(ids == UNK if tokenizer.spaced else (ids >= FIRST_BYTE) & (ids < FIRST_CHAR))
    if not tokens:
        raise ValueError("no text in " + " ".join(corpus.paths))
    print(f"{chars:,} characters, {tokens:,} tokens: {chars / tokens:.3f} characters a token, {100 * unknown / tokens:.4f} % of the tokens "
          f"are {'[UNK]' if tokenizer.spaced else 'bytes'}, {chars / encode_s / 1e6:.2f} million characters/s")


if __name__ == "__main__":
    run(main)
