"""The tokenizer: byte-pair encoding (BPE), learned by merging the most frequent pair of tokens.

    python tokenizer.py train corpus.parquet --out tok --vocab_size 29298
    python tokenizer.py stats corpus.parquet --tokenizer tok

A model computes with numbers, so text becomes a list of ids from a fixed vocabulary. Characters
would make long lists, and words an endless vocabulary. BPE lies between: it starts from characters
and merges what occurs together most often (Sennrich et al. 2016, "Neural Machine Translation of
Rare Words with Subword Units", arXiv:1508.07909).

A text is first cut into pieces, and no token crosses their borders: every punctuation mark and
every digit is a piece, and a space begins one. Then the learned merges are applied, in the order in
which they were learned:

    今天天气，好    pieces   今天天气 | ， | 好
                   merges   (天, 气), (今, 天), ...
                   tokens   今天 天气 ， 好

Learning, with the three pieces 天气好, 天气 and 好天 as an example:

    count adjacent pairs    (天, 气): 2   (气, 好): 1   (好, 天): 1
    merge the most frequent 天气 is a new token:   天气 好 | 天气 | 好 天
    repeat                  (天气, 好): 1   (好, 天): 1, until the vocabulary is full

Ties go to the smaller (left id, right id). The alphabet is the most frequent characters. All others
are written as their UTF-8 bytes, € as <0xE2> <0x82> <0xAC>, so every text has ids. decode returns
the text, with two exceptions: a literal "[EOS]" becomes that special token, which decode leaves
out, and with --nfkc the text is normalized.

    ids   0-6 special tokens | 7-262 bytes | characters, by frequency | merged tokens, as learned

The plain algorithm recounts the corpus after every merge. MergeLearner counts only what a merge
changes, and Merger encodes thousands of pieces at once, both with numpy; tests compare them with
the plain version. tokenizer.json is in Hugging Face's format: AutoTokenizer gives the same ids.

Try next: print the longest tokens of a vocabulary and guess what the corpus was; train with
--vocab_size 5000 and 30000 and compare the characters per token that `stats` shows.
"""
import argparse
import heapq
import json
import math
import os
import re
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from data import (
    EOS,
    HASH_FACTOR,
    READABLE,
    ArgumentParser,
    Progress,
    Texts,
    batches,
    check_folder,
    joined_ranges,
    note_once,
    number,
    ordered_map,
    refuse_pointer,
    run,
    run_begins,
    to_codepoints,
    write_file,
)

SPECIAL_TOKENS = ["[PAD]", "[EOS]", "[SEP]", "[BOS]", "[CLS]", "[MASK]", "[UNK]"]  # ids 0 to 6
# {"pad_token": "[PAD]", ...}
SPECIAL_NAMES = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
UNK = 6
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]  # ids 7 to 262
FIRST_BYTE, FIRST_CHAR = len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 256
MAX_TOKENS = 1 << 18
CHUNK_CHARS = 1 << 18  # texts are encoded in batches of about this many characters


# --- pieces ---------------------------------------------------------------------------------------

BEGINS, ENDS = 1, 2  # a piece begins at such a character; a piece ends with it


def piece_starts(codes: np.ndarray, text_begins: np.ndarray,
                 classes: np.ndarray | None = None) -> np.ndarray:
    """True (N,) where a piece begins: where a text begins, at a space, and at and after a
    punctuation mark or digit. codes: (N,) codepoints; text_begins: (M,) indices into codes."""
    kinds = (CLASSES if classes is None else classes)[codes]
    starts = (kinds & BEGINS).astype(bool)
    starts[1:] |= (kinds[:-1] & ENDS).astype(bool)
    starts[text_begins[text_begins < len(codes)]] = True
    return starts


# --- merging --------------------------------------------------------------------------------------

NO_MERGE = np.int32(0x7FFFFFFF)  # the rank of a pair that is not a merge: after all others


class Merger:
    """Applies merges to many pieces at once, with the result of textbook BPE for each: always the
    pair of lowest rank first, of equal ones the leftmost.

    If no merge joins a token that ends in c with a token that begins with d, then neighboring
    symbols c d never share a token. There a piece is cut into runs, each a row of a matrix. `joins`
    holds all c d that may share one, by a hash of 21 bits; a collision costs a cut, never
    correctness.
    """
    HASH_BITS = 21
    MAX_WIDTH = 128  # longer runs are merged one by one, with a heap

    def __init__(self, vocab: list[str], merges: list[tuple[int, int]], merged: list[int]):
        """vocab: tokens by id; merges: pairs of ids by rank; merged: each pair's token."""
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.merged = np.array(merged, dtype=np.int32)
        pairs = sorted((left << 32 | right, rank) for (left, right), rank in self.ranks.items())
        pairs.append((2 ** 63 - 1, int(NO_MERGE)))  # a last one, so that every search finds a place
        self.pairs = np.array([pair for pair, _ in pairs], np.int64)
        self.pair_ranks = np.array([rank for _, rank in pairs], np.int32)
        first = list(range(len(vocab)))  # the first symbol of each token
        last = first.copy()
        joins = set()
        by_length = sorted(zip(merged, merges), key=lambda item: len(vocab[item[0]]))
        for new, (a, b) in by_length:  # parts come before the tokens they form
            joins.add((last[a], first[b]))
            first[new], last[new] = first[a], last[b]
        self.joins = np.zeros(1 << self.HASH_BITS, dtype=bool)
        left, right = np.array(list(joins), dtype=np.uint32).reshape(-1, 2).T
        self.joins[self.hashes(left, right)] = True

    def hashes(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        mixed = left * np.uint32(0x9E3779B1) ^ right * np.uint32(0x85EBCA6B)
        return mixed >> np.uint32(32 - self.HASH_BITS)

    def lookup(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """left, right (N,) int32 ids -> ranks (N,) int32, NO_MERGE if there is none."""
        pairs = left.astype(np.int64) << 32 | right
        places = self.pairs.searchsorted(pairs)
        return np.where(self.pairs[places] == pairs, self.pair_ranks[places], NO_MERGE)

    def merge(self, symbols: np.ndarray, starts: np.ndarray) -> None:
        """Merge in place. symbols: (N,) int32; starts: (N,) bool, True where a piece begins. The
        tokens of a run move to its beginning; the rest of its cells become -1."""
        codes = symbols.view(np.uint32)
        cut = starts.copy()
        cut[1:] |= ~self.joins[self.hashes(codes[:-1], codes[1:])]
        begins = np.flatnonzero(cut)
        sizes = np.diff(begins, append=len(symbols))
        width = 2
        while width <= self.MAX_WIDTH:
            rows = np.flatnonzero((sizes > width // 2) & (sizes <= width))
            if len(rows):
                self.merge_rows(symbols, begins[rows], sizes[rows], width)
            width *= 2
        for row in np.flatnonzero(sizes > self.MAX_WIDTH).tolist():
            self.merge_long(symbols[begins[row]:begins[row] + sizes[row]])

    def merge_rows(self, symbols: np.ndarray, begins: np.ndarray, sizes: np.ndarray,
                   width: int) -> None:
        """Merge R runs of up to `width` symbols in place. In each round, every row merges its best
        pair and closes the gap. Finished rows drop out."""
        columns = np.arange(width)
        inside = columns < sizes[:, None]
        places = joined_ranges(begins, sizes)
        ids = np.full(inside.shape, -1, dtype=np.int32)  # (R, width)
        ids[inside] = symbols[places]
        ranks = np.full((len(ids), width - 1), NO_MERGE)  # of each symbol and the next one
        is_pair = inside[:, 1:]
        ranks[is_pair] = self.lookup(ids[:, :-1][is_pair], ids[:, 1:][is_pair])
        results, rows = ids, np.arange(len(ids))  # results: filled as rows finish
        while True:
            at = ranks.argmin(1)
            rank = ranks[np.arange(len(rows)), at]
            going = np.flatnonzero(rank != NO_MERGE)
            if len(going) < len(rows):
                results[rows] = ids
                if not len(going):
                    break
                rows, ids, ranks = rows[going], ids[going], ranks[going]
                at, rank = at[going], rank[going]
            row = np.arange(len(rows))
            behind = columns > at[:, None]
            ids[row, at] = self.merged[rank]
            ids[:, :-1] = np.where(behind[:, :-1], ids[:, 1:], ids[:, :-1])
            ids[:, -1] = -1
            ranks[:, :-1] = np.where(behind[:, :-2], ranks[:, 1:], ranks[:, :-1])
            ranks[:, -1] = NO_MERGE
            ranks[row, at] = NO_MERGE
            # only the pairs on both sides of the new token have new ranks
            right, left = np.flatnonzero(ids[row, at + 1] >= 0), np.flatnonzero(at)
            row, at = np.concatenate([right, left]), np.concatenate([at[right], at[left] - 1])
            ranks[row, at] = self.lookup(ids[row, at], ids[row, at + 1])
        symbols[places] = results[inside]

    def merge_long(self, symbols: np.ndarray) -> None:
        """Merge one long run in place, O(n log n): a heap of (rank, position), and links between
        neighbors."""
        ids, ranks = symbols.tolist(), self.ranks
        after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
        heapq.heapify(heap)
        ids.append(-1)  # behind the last one; it is in no pair
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i] if ids[i] >= 0 else -1  # -1: the entry behind the last one
            if ranks.get((ids[i], ids[j])) != rank:
                continue  # one of the two has been merged since
            ids[i], ids[j] = int(self.merged[rank]), -1
            after[i] = after[j]
            if after[i] < len(ids) - 1:
                before[after[i]] = i
            for left in (before[i], i):
                pair = (ids[left], ids[after[left]]) if left >= 0 else None
                if pair in ranks:
                    heapq.heappush(heap, (ranks[pair], left))
        tokens = [i for i in ids if i >= 0]
        symbols[:] = -1
        symbols[:len(tokens)] = tokens


# --- the tokenizer --------------------------------------------------------------------------------


class Tokenizer:
    """Text to ids and back. There are two forms: ours writes unknown characters as bytes and keeps
    every space; that of ChatLM-mini-Chinese (`spaced`) puts ▁ before every piece and writes [UNK].
    """

    def __init__(self, vocab: list[str], merges: list[tuple[int, int]], nfkc: bool = False,
                 append_eos: bool = True, spaced: bool = False,
                 added: dict[str, bool] | None = None):
        """vocab: tokens by id, SPECIAL_TOKENS first, then, unless spaced, BYTE_TOKENS. merges:
        pairs of ids by rank. nfkc: normalize texts first. append_eos: end them with [EOS]. added:
        tokens that are cut out of a text first; True for special ones, which are found before
        normalization (default: SPECIAL_TOKENS)."""
        self.vocab, self.merges, self.nfkc = vocab, merges, nfkc
        self.append_eos, self.spaced = append_eos, spaced
        self.added = added or dict.fromkeys(SPECIAL_TOKENS, True)
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.special_ids = {self.ids[token] for token, special in self.added.items() if special}
        self.byte_ids = range(0) if spaced else range(FIRST_BYTE, FIRST_CHAR)
        self.char_ids = np.full(0x110000, UNK if spaced else -1, dtype=np.int32)  # -1: as bytes
        for token, i in self.ids.items():
            if len(token) == 1 and i not in self.special_ids:
                self.char_ids[ord(token)] = i
        self.classes = CLASSES
        if spaced:
            self.char_ids[ord(" ")] = self.char_ids[ord("▁")]
            self.classes = CLASSES.copy()
            self.classes[ord("▁")] = BEGINS
        merged = [self.ids[vocab[a] + vocab[b]] for a, b in merges]
        self.merger = Merger(vocab, merges, merged)
        self.special_pattern = pattern_of(t for t, special in self.added.items() if special)
        self.other_pattern = pattern_of(t for t, special in self.added.items() if not special)

    def __len__(self) -> int:
        return len(self.vocab)

    def __eq__(self, other) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    # --- encoding

    def encode(self, text: str) -> list[int]:
        """The ids of a text, the same as AutoTokenizer(text).input_ids."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text."""
        ids, lengths = self.encode_arrays(texts)
        flat, ends = ids.tolist(), np.cumsum(lengths).tolist()
        return [flat[a:b] for a, b in zip([0] + ends, ends)]

    def encode_arrays(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts in one array (int32), and how many ids each text has (int64)."""
        if isinstance(texts, str):
            raise TypeError("texts is a list of strings; use encode for one string")
        parts = [self._encode_chunk(chunk) for chunk in batches(texts, CHUNK_CHARS)]
        parts.append((np.empty(0, np.int32), np.empty(0, np.int64)))
        ids, lengths = map(np.concatenate, zip(*parts))
        return ids, lengths

    def _cut(self, text: str) -> Iterator[tuple[str, int]]:
        """The parts of a text: normalized text with -1, and "\\0" with the id of an added token."""
        for i, part in enumerate(self.special_pattern.split(text)):
            if i % 2:
                yield "\0", self.ids[part]
                continue
            part = normalize(part) if self.nfkc else part
            for j, piece in enumerate(self.other_pattern.split(part)):
                if j % 2:
                    yield "\0", self.ids[piece]
                elif piece:
                    yield piece, -1

    def _lay_out(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Texts as one array of symbols, (N,) int32; where pieces begin, (N,) bool; and the place
        where each text begins."""
        whole = "".join(texts)
        part_begins = text_begins = np.cumsum([0] + [len(text) for text in texts])[:-1]
        added_at = ids = np.empty(0, dtype=np.int64)  # of added tokens
        if self.nfkc or self.special_pattern.search(whole) or self.other_pattern.search(whole):
            cut = [list(self._cut(text)) for text in texts]
            parts = [part for text in cut for part in text]
            whole = "".join(part for part, _ in parts)
            part_begins = np.cumsum([0] + [len(part) for part, _ in parts])
            text_begins = part_begins[np.cumsum([0] + [len(text) for text in cut])[:-1]]
            ids = np.array([i for _, i in parts], dtype=np.int64)
            added_at, ids = part_begins[:-1][ids >= 0], ids[ids >= 0]
        codes = to_codepoints(whole)
        symbols, starts = self.char_ids[codes], piece_starts(codes, part_begins, self.classes)
        symbols[added_at] = ids
        unknown = symbols < 0
        if not self.spaced and not unknown.any():
            return symbols, starts, text_begins
        # some characters are several symbols: ▁ and the character, or its bytes
        prefixed = np.zeros(len(codes), dtype=bool)
        if self.spaced:
            prefixed = starts & (codes != ord(" ")) & (codes != ord("▁"))
            prefixed[added_at] = False
        sizes = 1 + prefixed
        sizes[unknown] += np.searchsorted([0x80, 0x800, 0x10000], codes[unknown], side="right")
        ends = np.cumsum(sizes)
        begins = ends - sizes
        symbols = np.repeat(symbols, sizes)
        symbols[begins[prefixed]] = self.char_ids[ord("▁")]
        spelled = codes[unknown].tobytes().decode("utf-32-le").encode()
        symbols[symbols < 0] = np.frombuffer(spelled, np.uint8) + np.int32(FIRST_BYTE)
        first = np.zeros(len(symbols), dtype=bool)
        first[begins[starts]] = True
        return symbols, first, np.append(0, ends)[text_begins]

    def _encode_chunk(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        symbols, starts, text_begins = self._lay_out(texts)
        self.merger.merge(symbols, starts)
        kept = symbols >= 0
        tokens_before = np.append(0, np.cumsum(kept))
        ends = tokens_before[np.append(text_begins, len(symbols))]
        ids, lengths = symbols[kept], np.diff(ends)
        if self.append_eos:
            return np.insert(ids, ends[1:], EOS), lengths + 1
        return ids, lengths

    # --- decoding

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids. As in tokenizers, numbers that are not ids are ignored."""
        return "".join(self.stream(ids, skip_special_tokens))

    def stream(self, ids: Iterable[int], skip_special_tokens: bool = True) -> Iterator[str]:
        """decode for ids that come one by one: yields the text in parts, never half a character.
        A run of bytes becomes text when it ends. If it is not UTF-8, each byte becomes U+FFFD."""
        pending, is_first = bytearray(), True
        for i in map(int, ids):
            skipped = skip_special_tokens and i in self.special_ids
            if not 0 <= i < len(self.vocab) or skipped:
                continue
            if i in self.byte_ids:
                pending.append(i - FIRST_BYTE)
                continue
            token = self.vocab[i]
            if self.spaced:
                token = token.replace("▁", "" if is_first else " ")
            yield decode_bytes(pending) + token
            pending, is_first = bytearray(), False
        yield decode_bytes(pending)

    # --- training

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 29298, min_frequency: int = 2,
              character_coverage: float = 0.9999, nfkc: bool = False, workers: int = 1,
              memory_bytes: int | None = None, progress: bool = False) -> "Tokenizer":
        """Learn a tokenizer. The result does not depend on workers.

        min_frequency: less frequent pairs are not merged, so the vocabulary can stay smaller than
        vocab_size. character_coverage: the share of the text that the alphabet covers.
        memory_bytes: the limit of all processes together; if the texts do not fit, a uniform sample
        of them is used, and texts must be iterable more than once. Raises ValueError for a corpus
        without text, or a vocabulary too small for special tokens, bytes and alphabet.
        """
        if isinstance(texts, str):
            raise TypeError("texts is an iterable of strings, not one string")
        if vocab_size > MAX_TOKENS or min_frequency < 1 or not 0 < character_coverage <= 1:
            raise ValueError(f"vocab_size must be at most {MAX_TOKENS:,}, min_frequency at least "
                             "1, and character_coverage above 0, at most 1")
        pieces = count_pieces(texts, vocab_size, nfkc, workers, memory_bytes, progress)
        counts = pieces.characters
        if not counts.any():
            raise ValueError("the corpus has no text to learn a tokenizer from")
        alphabet = np.argsort(-counts, kind="stable")[:np.count_nonzero(counts)]
        covered = np.cumsum(counts[alphabet])
        alphabet = alphabet[:1 + np.searchsorted(covered, character_coverage * covered[-1])]
        if vocab_size < FIRST_CHAR + len(alphabet):
            raise ValueError(f"vocab_size {vocab_size} is too small: {len(SPECIAL_TOKENS)} special "
                             f"tokens, 256 bytes and {len(alphabet)} characters need at least "
                             f"{FIRST_CHAR + len(alphabet)} (a lower character_coverage means "
                             "fewer characters)")
        char_ids = np.full(0x110000, -1, dtype=id_type(vocab_size))
        char_ids[alphabet] = np.arange(FIRST_CHAR, FIRST_CHAR + len(alphabet))
        vocab = SPECIAL_TOKENS + BYTE_TOKENS + [chr(c) for c in alphabet]
        corpus, weight = pieces.lay_out(char_ids)
        learner = MergeLearner(corpus, weight, vocab, vocab_size, min_frequency)
        return cls(vocab, learner.learn(progress), nfkc=nfkc)

    # --- files

    def to_json(self) -> str:
        """The content of tokenizer.json, as tokenizers reads it."""
        return json.dumps(tokenizer_json(self), ensure_ascii=False) + "\n"

    @classmethod
    def from_pretrained(cls, folder, append_eos: bool | None = None) -> "Tokenizer":
        """Read folder/tokenizer.json. append_eos: end texts with [EOS] or not; None: as the file
        says. Raises FileNotFoundError, or ValueError for a damaged file or an unsupported form."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        refuse_pointer(path)
        try:
            tokenizer = parse_tokenizer(json.loads(path.read_text("utf-8")))
        except Unsupported as e:
            raise ValueError(f"{path}: {e}") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
            raise ValueError(f"{path} is damaged: {type(e).__name__}: {e}") from None
        if append_eos is not None:
            tokenizer.append_eos = append_eos
        check_configuration(Path(folder), tokenizer)
        return tokenizer

    def save_pretrained(self, folder) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "clean_up_tokenization_spaces": False,
                  "model_input_names": ["input_ids", "attention_mask"],
                  "model_max_length": 10 ** 9, **SPECIAL_NAMES}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "tokenizer.json", self.to_json())
        write_file(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        write_file(folder / "special_tokens_map.json", json.dumps(SPECIAL_NAMES, indent=2) + "\n")


def pattern_of(tokens: Iterable[str]) -> re.Pattern:
    """A pattern whose split cuts a text at these tokens, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else "(?!)")


def decode_bytes(spelled: bytearray) -> str:
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(spelled)


# --- learning: merges -----------------------------------------------------------------------------

SCAN_CELLS = 1 << 20  # pairs are counted in stretches of this many cells


class MergeLearner:
    """Learns the merges of textbook BPE, which is:

        while len(vocab) < vocab_size:
            counts = how often each adjacent pair occurs in all pieces
            best = min(counts, key=lambda pair: (-counts[pair], pair))
            if counts[best] < min_frequency:
                break
            replace `best` by a new token in all pieces, from the left

    All pieces are in one array, with -1 around each. A token has its id in the cell of its first
    character and ~id in that of its last one. So both neighbors are found at once: the next token
    begins after its length, and the cell before it holds ~id of the previous one. A merge changes
    only its own cells:

        -1 天 气 预 报 -1    merge (天, 气):   -1 [天气] ~[天气] 预 报 -1

    Counting all pairs for every merge would be slow. So a heap holds the most frequent pairs as
    (-count, pair), where pair is one integer, and `places` where each occurs. Merges remove
    occurrences, so a count in the heap can be too high, never too low:

    1. count_pairs counts the whole corpus and fills the heap with all pairs up to a `bound`, which
       is such an entry too. It is called again, with a farther bound, when the heap is empty.
    2. pop_best takes the first pair and counts it again. If its count is still right, it is the
       best pair. Otherwise it goes back with its true count.
    3. merge replaces the pair, and pushes the new pairs that are within the bound.

    A merge can make a token that exists already (ab + c after a + bc). Then known pairs can become
    more frequent, and everything is counted again (`stale`). Hugging Face's trainer differs here:
    its queue holds such a pair twice, each time with a part of its places.
    """

    def __init__(self, corpus: np.ndarray, weight: np.ndarray, vocab: list[str], vocab_size: int,
                 min_frequency: int):
        """corpus, weight: see Pieces.lay_out. vocab grows in place. Raises ValueError if the corpus
        is too long."""
        if len(corpus) > max_cells(vocab_size):
            raise ValueError(f"{len(corpus):,} characters of distinct pieces are too many for "
                             f"{vocab_size:,} tokens: give memory_bytes, to learn from a sample, "
                             "or a smaller vocab_size")
        self.corpus, self.weight, self.vocab = corpus, weight, vocab
        self.vocab_size, self.min_frequency = vocab_size, min_frequency
        self.length = np.ones(vocab_size, dtype=np.int32)  # of each token, in characters
        self.ids = {token: i for i, token in enumerate(vocab)}
        # an occurrence is one uint64, a pair and its place: sorting groups them by pair
        self.id_bits = (vocab_size - 1).bit_length()
        self.place_bits = np.uint64(64 - 2 * self.id_bits)
        self.place_mask = (np.uint64(1) << self.place_bits) - np.uint64(1)
        self.slot_bits = min(22, len(corpus).bit_length())
        self.heap: list[tuple[int, int]] = []
        self.target_heap_size = 0
        self.places: dict[int, np.ndarray] = {}
        self.last_pair = (1 << 2 * self.id_bits) - 1  # of those with equal counts
        self.bound = (-sys.maxsize, 0)
        self.stale = False

    def learn(self, progress: bool = False) -> list[tuple[int, int]]:
        """The merges, in order."""
        merges: list[tuple[int, int]] = []
        shown = Progress()
        while len(self.vocab) < self.vocab_size:
            if self.stale or not self.heap:
                if not self.count_pairs():
                    break
                continue
            left, right, places = self.pop_best()
            if len(places):
                merges.append((left, right))
                self.merge(left, right, places)
            if progress:
                missing = self.vocab_size - len(self.vocab)
                shown.show(f"vocabulary {len(self.vocab):,} of {self.vocab_size:,}",
                           len(merges) / (len(merges) + missing))
        shown.clear()
        if progress:
            print(f"vocabulary {len(self.vocab):,}, {len(merges):,} merges", file=sys.stderr)
        return merges

    def count_pairs(self) -> bool:
        """Fill the heap with about twice as many pairs as there are tokens to come; False if no
        pair is left. Pairs are first counted in 2^22 slots by a hash, and only those in frequent
        slots are sorted."""
        slots = np.zeros(1 << self.slot_bits)
        for found, slot in self.occurrences():
            slots += np.bincount(slot, self.times(found & self.place_mask), len(slots))
        self.target_heap_size = 2 * (self.vocab_size - len(self.vocab)) + 1000
        min_count = self.next_min_count(slots)
        if min_count is None:
            return False
        self.bound = (-min_count, self.last_pair)
        self.heap, self.places, self.stale = [], {}, False
        # some of the slots at a time, to sort less at once
        occurrences = int(slots[slots >= min_count].sum())
        rounds = min(8, 1 + occurrences // max(1 << 23, len(self.corpus) // 8))
        for i in range(rounds):
            chosen = np.zeros(len(slots), bool)
            chosen[i::rounds] = slots[i::rounds] >= min_count
            self.push(np.concatenate([found[chosen[slot]] for found, slot in self.occurrences()]))
        return True

    def next_min_count(self, slots: np.ndarray) -> int | None:
        """The smallest count that enters the heap this time; None if no pair is left. At most half
        of the last one; if the heap was full, at most the last one; if it was stale, any. slots:
        see count_pairs."""
        ranked = np.sort(slots[slots >= self.min_frequency])
        is_done = self.bound == (-self.min_frequency, self.last_pair) and not self.stale
        if not len(ranked) or is_done:
            return None
        min_count = int(ranked[-min(len(ranked), self.target_heap_size)])
        if not self.stale:  # all pairs before the old bound are done
            count, pair = self.bound
            min_count = min(min_count, -count // 2 if pair == self.last_pair else -count)
        return max(min_count, self.min_frequency)

    def occurrences(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For every stretch of the corpus: its occurrences of pairs, and the slot of each."""
        for begin in range(0, len(self.corpus), SCAN_CELLS):
            at = np.flatnonzero(self.corpus[begin:begin + SCAN_CELLS] >= 0) + begin
            left = self.corpus[at]
            right = self.corpus[at + self.length[left]]
            inside = right >= 0
            found = self.pack(left[inside], right[inside], at[inside])
            mixed = (found >> self.place_bits) * np.uint64(HASH_FACTOR)
            yield found, (mixed >> np.uint64(64 - self.slot_bits)).view(np.int64)

    def pack(self, left: np.ndarray, right: np.ndarray, at: np.ndarray) -> np.ndarray:
        pair = left.astype(np.uint64) << np.uint64(self.id_bits) | right.astype(np.uint64)
        return pair << self.place_bits | at.astype(np.uint64)

    def times(self, at: np.ndarray) -> np.ndarray:
        """How often the cells `at` occur."""
        return self.weight[np.minimum(at, len(self.weight) - 1)]

    def mergeable(self, left: int, right: int, at: np.ndarray) -> tuple[np.ndarray, int]:
        """The places of a pair that can be merged, and how often they occur. Of the two pairs in
        x x x, only one can."""
        if left == right:
            at = every_other(at, int(self.length[left]))
        return at, int(self.times(at).sum(dtype=np.int64))

    def push(self, found: np.ndarray) -> None:
        """Sort occurrences into pairs, and push those up to the bound. When the heap is too large,
        keep the best pairs and tighten the bound."""
        found.sort()
        while len(found):
            last = found[min(SCAN_CELLS, len(found)) - 1] | self.place_mask  # end after a pair
            part, found = np.split(found, [np.searchsorted(found, last, "right")])
            self.push_sorted(part >> self.place_bits, (part & self.place_mask).astype(np.int32))
            if len(self.heap) > 2 * self.target_heap_size:
                self.heap = heapq.nsmallest(self.target_heap_size, self.heap)
                self.bound = self.heap[-1]
                self.places = {pair: self.places[pair] for _, pair in self.heap}

    def push_sorted(self, pairs: np.ndarray, at: np.ndarray) -> None:
        """pairs: (N,) sorted; at: the place of each occurrence."""
        begins = run_begins(pairs)
        counts, pairs = np.add.reduceat(self.times(at), begins, dtype=np.int64), pairs[begins]
        most, last = -self.bound[0], np.uint64(self.bound[1])
        near = np.flatnonzero((counts > most) | (counts == most) & (pairs <= last))
        ends = np.append(begins, len(at))[near + 1]
        columns = (counts[near], pairs[near], begins[near], ends)
        for count, pair, begin, end in zip(*(column.tolist() for column in columns)):
            found = at[begin:end].copy()
            left, right = divmod(pair, 1 << self.id_bits)
            if left == right:
                count = self.mergeable(left, right, found)[1]
                if (-count, pair) > self.bound:
                    continue
            self.places[pair] = found
            heapq.heappush(self.heap, (-count, pair))

    def pop_best(self) -> tuple[int, int, np.ndarray]:
        """The first pair in the heap, and the places to merge; none if its count was too high."""
        count, pair = heapq.heappop(self.heap)
        left, right = divmod(pair, 1 << self.id_bits)
        at = self.places.pop(pair)
        at = at[self.corpus[at] == left]
        at = at[self.corpus[at + self.length[left]] == right]
        mergeable, true_count = self.mergeable(left, right, at)
        if true_count == -count:
            return left, right, mergeable
        if (-true_count, pair) <= self.bound:
            self.places[pair] = at
            heapq.heappush(self.heap, (-true_count, pair))
        return left, right, at[:0]

    def merge(self, left: int, right: int, at: np.ndarray) -> None:
        """Replace a pair at these places by one token, and push the pairs that this creates."""
        corpus, separator = self.corpus, -1
        token = self.vocab[left] + self.vocab[right]
        self.stale = token in self.ids
        new = self.ids.setdefault(token, len(self.vocab))
        if not self.stale:
            self.vocab.append(token)
            self.length[new] = self.length[left] + self.length[right]
        end = at + (self.length[new] - 1)
        corpus[at] = new
        corpus[at + self.length[left]] = np.iinfo(corpus.dtype).min  # inside a token
        corpus[end] = ~new
        if self.stale:
            return
        before, after = corpus[at - 1], corpus[end + 1]
        before = np.where(before < separator, ~before, before)
        # (new, new) is counted from its left one
        has_before, has_after = (before != separator) & (before != new), after != separator
        before, after = before[has_before], after[has_after]
        self.push(np.concatenate([
            self.pack(before, np.full(len(before), new), at[has_before] - self.length[before]),
            self.pack(np.full(len(after), new), after, at[has_after])]))


def every_other(positions: np.ndarray, step: int) -> np.ndarray:
    """The positions of a pair (x, x) that can be merged, from the left: every other one in a run of
    neighbors `step` apart. [3, 4, 5, 9], step 1 -> [3, 5, 9]"""
    index = np.arange(len(positions))
    new_run = np.append(True, np.diff(positions) != step)
    return positions[(index - np.maximum.accumulate(np.where(new_run, index, 0))) % 2 == 0]


# --- learning: pieces and their frequencies -------------------------------------------------------


class Block(NamedTuple):
    """Distinct pieces, sorted by hash. Pieces with equal 64-bit hashes count as equal. A unit is a
    UTF-16 code unit: one for nearly every character, two for the rest."""
    hashes: np.ndarray  # (P,) uint64
    sizes: np.ndarray  # (P,) int32, in units
    frequencies: np.ndarray  # (P,) int64
    units: np.ndarray  # (N,) uint16, one piece after the other


NO_PIECES = Block(*(np.empty(0, kind) for kind in (np.uint64, np.int32, np.int64, np.uint16)))
HASH_UNITS = np.random.default_rng(0).integers(0, 1 << 64, size=1 << 16, dtype=np.uint64)


def combine(blocks: list[Block]) -> Block:
    """One block of all pieces. The blocks may be unsorted and have repetitions."""
    hashes, sizes, frequencies, units = map(np.concatenate, zip(*blocks))
    order = np.argsort(hashes)
    hashes = hashes[order]
    first = run_begins(hashes)
    frequencies = np.add.reduceat(frequencies[order], first)
    begins, order = np.cumsum(sizes) - sizes, order[first]
    units = units[joined_ranges(begins[order], sizes[order])]
    return Block(hashes[first], sizes[order], frequencies, units)


class ChunkCounts(NamedTuple):
    """What count_chunk found. codes: distinct codepoints, after normalization."""
    chars: int
    codes: np.ndarray
    code_counts: np.ndarray
    pieces: Block  # of two units and more: shorter ones have no merges


def count_chunk(job: tuple[list[str], bool]) -> ChunkCounts:
    """Cut texts into pieces and count them. job: (texts, whether to normalize them)."""
    texts, nfkc = job
    chars = sum(map(len, texts))
    if nfkc:
        texts = [normalize(text) for text in texts]
    codes = to_codepoints("".join(texts))
    counts = np.bincount(codes)
    starts = piece_starts(codes, np.cumsum([0] + [len(text) for text in texts]))
    units, wide = codes.astype(np.uint16), np.flatnonzero(codes > 0xFFFF)
    if len(wide):  # two units each; the second one begins no piece
        encoded = codes.tobytes().decode("utf-32-le").encode("utf-16-le")
        units = np.frombuffer(encoded, dtype=np.uint16)
        starts = np.insert(starts, wide + 1, False)
    begins = np.flatnonzero(starts)
    sizes = np.diff(begins, append=len(units)).astype(np.int32)
    # hash of a piece: the sum of (random number of the unit) * factor^(offset in the piece)
    offsets = joined_ranges(np.zeros_like(begins), sizes)
    powers = np.uint64(HASH_FACTOR) ** np.arange(sizes.max(initial=0), dtype=np.uint64)
    hashes = np.add.reduceat(HASH_UNITS[units] * powers[offsets], begins)
    long = sizes > 1
    block = Block(hashes[long], sizes[long], np.ones(np.count_nonzero(long), np.int64),
                  units[np.repeat(long, sizes)])
    codes = np.flatnonzero(counts)
    return ChunkCounts(chars, codes, counts[codes], combine([block]))


class Pieces:
    """How often each character and each piece occurs in a corpus. Blocks are divided into 16 parts
    by their hashes. New blocks of a part are combined with the old one when they are half its size,
    so little is held or copied twice."""
    PARTS = 16

    def __init__(self):
        self.characters = np.zeros(0x110000, dtype=np.int64)
        self.parts: list[list[Block]] = [[NO_PIECES] for _ in range(self.PARTS)]
        steps = np.arange(1, self.PARTS, dtype=np.uint64)
        self.edges = steps * np.uint64((1 << 64) // self.PARTS)

    def add(self, found: ChunkCounts) -> None:
        self.characters[found.codes] += found.code_counts
        hashes, sizes, frequencies, units = found.pieces
        edges = np.searchsorted(hashes, self.edges)
        unit_edges = np.append(0, np.cumsum(sizes))[edges]
        columns = [np.split(x, edges) for x in (hashes, sizes, frequencies)]
        for part, *block in zip(self.parts, *columns, np.split(units, unit_edges)):
            part.append(Block(*map(np.copy, block)))
            new = sum(len(block.units) for block in part[1:])
            if new > len(part[0].units) // 2 + (1 << 16):
                part[:] = [combine(part)]

    def cells(self) -> int:
        """Length of the learner's corpus: a cell per unit and a separator per piece."""
        return sum(len(block.sizes) + len(block.units) for part in self.parts for block in part)

    def peak_bytes(self, vocab_size: int) -> int:
        """Combine all blocks; return the peak bytes of counting or learning, whichever is more.
        The factors are measured, and a test checks the bound."""
        for part in self.parts:  # one after the other: only one is held twice
            part[:] = [combine(part)]
        held = repeated = 0
        for [block] in self.parts:
            held += sum(array.nbytes for array in block)
            repeated += int((block.sizes[block.frequencies > 1] + 1).sum())
        learning = self.cells() * (8 + id_type(vocab_size).itemsize) + 4 * repeated
        return max(held * 3 // 2, learning)

    def lay_out(self, char_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus and weights for MergeLearner. Empties self.

        The corpus (N,) is all pieces as character ids, with -1 around each piece and for characters
        without an id. Pieces that occur more than once come first. weight holds how often each of
        their cells occurs, and ends with a 1 for all other cells.
        """
        one = np.ones(1, np.int64)
        repeated, single, weights = [np.full(1, -1, char_ids.dtype)], [], [one]
        for part in self.parts:
            _, sizes, frequencies, units = combine(part)
            part.clear()
            is_second = (units & 0xFC00) == 0xDC00  # the second unit of one character
            sizes -= np.add.reduceat(is_second, np.cumsum(sizes) - sizes, dtype=np.int32)
            codes = units.tobytes().decode("utf-16-le").encode("utf-32-le")
            ids = char_ids[np.frombuffer(codes, dtype=np.uint32)]
            ids = np.insert(ids, np.cumsum(sizes), -1)
            frequencies = np.repeat(frequencies, sizes + 1)
            repeated.append(ids[frequencies > 1])
            single.append(ids[frequencies == 1])
            weights.append(frequencies[frequencies > 1])
        weight = np.concatenate([*weights, one])
        return np.concatenate(repeated + single), weight.astype(np.min_scalar_type(weight.max()))


LEARNING_CHUNK_CHARS = 1 << 19  # texts are cut into pieces in batches of about this size
MAX_TEXT_CHARS = 1 << 17  # a longer text counts as several when a sample is drawn
PROCESS_BYTES, WORKER_BYTES = 300_000_000, 150_000_000  # measured, and rounded up
MIN_PIECES_BYTES = 240_000_000


def id_type(vocab_size: int) -> np.dtype:
    """The type of MergeLearner's corpus: it holds ids, and as many negative numbers."""
    return np.dtype(np.int16 if vocab_size < 1 << 15 else np.int32)


def max_cells(vocab_size: int) -> int:
    """The longest corpus for MergeLearner: two ids and a place fit in a uint64, and a place in an
    int32."""
    return min(1 << 64 - 2 * (vocab_size - 1).bit_length(), 1 << 31)


def divide_memory(memory_bytes: int, vocab_size: int, workers: int) -> tuple[int, int]:
    """How many workers fit, and the bytes for counting and learning. Raises ValueError if the
    memory is too little to learn in."""
    heap_bytes = 2000 * vocab_size  # MergeLearner: up to four pairs per token, and their places
    least = PROCESS_BYTES + heap_bytes + MIN_PIECES_BYTES
    if memory_bytes < least:
        raise ValueError(f"{memory_bytes / 1e6:,.0f} MB are not enough to learn "
                         f"{vocab_size:,} tokens: at least {least / 1e6:,.0f} MB are needed")
    processes_bytes = max(PROCESS_BYTES, memory_bytes // 4)
    fitting = max(1, (processes_bytes - PROCESS_BYTES) // WORKER_BYTES)
    return min(workers, fitting), memory_bytes - processes_bytes - heap_bytes


class Sample:
    """The texts whose hash is below a share of all hashes. The hash has another seed than that of
    data.py split: the sample does not depend on the split."""

    def __init__(self, texts: Iterable[str], share: float):
        self.texts, self.share, self.chars_read, self.chars_counted = texts, share, 0, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            for i in range(0, len(text), MAX_TEXT_CHARS):
                part = text[i:i + MAX_TEXT_CHARS]
                if self.share < 1:
                    digest = xxhash.xxh3_64_intdigest(part.encode("utf-8", "surrogatepass"), seed=1)
                    if digest >= self.share * 2 ** 64:
                        continue
                self.chars_read += len(part)
                yield part


def count_pieces(texts: Iterable[str], vocab_size: int, nfkc: bool, workers: int,
                 memory_bytes: int | None, progress: bool) -> Pieces:
    """Count the pieces of texts, or of a uniform sample if memory_bytes is too little for all. The
    share of the sample is found by trying; it does not depend on workers."""
    max_bytes = math.inf
    if memory_bytes is not None:
        workers, max_bytes = divide_memory(memory_bytes, vocab_size, workers)
        if iter(texts) is texts:
            raise ValueError("with memory_bytes, texts must be iterable more than once, like a "
                             "list")
    share = 1.0
    while True:
        sample = Sample(texts, share)
        parts = iter(sample)
        pieces = count_sample(sample, parts, max_bytes, vocab_size, nfkc, workers, progress)
        if pieces:
            return pieces
        if share == 1:
            deque(parts, maxlen=0)  # read the rest, to know its size
            share = 0.95 * sample.chars_counted / sample.chars_read
        else:
            share *= 0.8
        note_once("note: the corpus does not fit into the memory allowed: learning from a sample "
                  f"of {100 * share:.1f} % of its texts")


def count_sample(sample: Sample, parts: Iterator[str], max_bytes: float, vocab_size: int,
                 nfkc: bool, workers: int, progress: bool) -> Pieces | None:
    """The pieces of a sample, or None as soon as they do not fit in max_bytes. parts: iter(sample);
    after None, its rest is unread."""
    pieces, need_bytes, cells_then = Pieces(), 0, 0
    cell_bytes = 12 + id_type(vocab_size).itemsize  # what a new cell takes at most
    # without a memory limit nothing is sampled: MergeLearner raises ValueError instead
    limit = max_cells(vocab_size) if max_bytes < math.inf else math.inf
    shown = Progress()
    jobs = ((chunk, nfkc) for chunk in batches(parts, LEARNING_CHUNK_CHARS))
    for found in ordered_map(count_chunk, jobs, workers):
        pieces.add(found)
        sample.chars_counted += found.chars
        cells = pieces.cells()
        estimate = need_bytes + (cells - cells_then) * cell_bytes
        if estimate > max_bytes or cells > limit:  # it may be too much: look closely
            need_bytes, cells_then = pieces.peak_bytes(vocab_size), pieces.cells()
            if need_bytes > 0.9 * max_bytes or cells_then > 0.9 * limit:
                shown.clear()
                return None
        if progress:
            share = sample.texts.share() if isinstance(sample.texts, Texts) else 0.0
            shown.show(f"{sample.chars_counted:,} characters read", share)
    shown.clear()
    if progress:
        print(f"{sample.chars_counted:,} characters read", file=sys.stderr)
    return pieces


# --- tokenizer.json -------------------------------------------------------------------------------

MODEL_DEFAULTS = {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}


def metaspace(mark: str, prefix: str) -> dict:
    return {"type": "Metaspace", "replacement": mark, "prepend_scheme": prefix, "split": True}


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The content of tokenizer.json."""
    vocab, spaced = tokenizer.vocab, tokenizer.spaced
    added = [{"id": tokenizer.ids[token], "content": token, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": not special, "special": special}
             for token, special in tokenizer.added.items()]
    splits = [{"type": "Punctuation", "behavior": "Isolated"},
              {"type": "Digits", "individual_digits": True},
              metaspace("▁", "always") if spaced else metaspace(" ", "never")]
    eos = {"SpecialToken": {"id": "[EOS]", "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    append_eos = {"type": "TemplateProcessing", "single": [a, eos], "pair": [a, eos, b, eos],
                  "special_tokens": {"[EOS]": {"id": "[EOS]", "ids": [EOS], "tokens": ["[EOS]"]}}}
    join_bytes = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFKC"} if tokenizer.nfkc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": append_eos if tokenizer.append_eos else None,
        "decoder": metaspace("▁", "always") if spaced else join_bytes,
        "model": {**MODEL_DEFAULTS, "unk_token": "[UNK]" if spaced else None,
                  "byte_fallback": not spaced, "vocab": tokenizer.ids,
                  "merges": [[vocab[a], vocab[b]] for a, b in tokenizer.merges]}}


class Unsupported(ValueError):
    """A correct tokenizer.json of a form that this program does not have."""


def parse_tokenizer(form: dict) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises Unsupported for another form. A damaged file raises
    ValueError, KeyError, TypeError, IndexError or AttributeError."""
    kind, added = form["model"].get("type"), form["added_tokens"]
    if kind != "BPE":
        raise Unsupported(f"this kind of model is not supported: {kind}")
    ids = form["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    if [ids.get(token) for token in SPECIAL_TOKENS] != list(range(len(SPECIAL_TOKENS))):
        raise Unsupported(f"the vocabulary does not begin with {' '.join(SPECIAL_TOKENS)}")
    vocab = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in vocab] != list(range(len(vocab))) or "" in ids:
        raise ValueError("the ids are not 0, 1, 2, ..., one for each token")
    pairs = [m.split(" ") if isinstance(m, str) else m for m in form["model"]["merges"]]
    missing = {token for a, b in pairs for token in (a, b, a + b)} - ids.keys()
    if missing:
        raise ValueError(f"its merges have {missing.pop()!r}, which is not in the vocabulary")
    found = canonical(form)
    changed = [t["content"] for t in added if normalize(t["content"]) != t["content"]]
    if found["normalizer"] and changed:
        raise Unsupported(f"the added token {changed[0]!r}, which NFKC changes, is not supported")
    short = [t["content"] for t in added if t["special"] and len(t["content"]) == 1]
    if found["normalizer"] and short:  # NFKC may turn another character into it
        raise Unsupported(f"the special token {short[0]!r}, one character, is not supported with "
                          "NFKC")
    tokenizer = Tokenizer(
        vocab, [(ids[a], ids[b]) for a, b in pairs], nfkc=found["normalizer"] is not None,
        append_eos=found["post_processor"] is not None,
        spaced=found["model"]["unk_token"] is not None,
        added={token["content"]: token["special"] for token in added})
    for part, known in canonical(tokenizer_json(tokenizer)).items():
        value = found[part]
        if value != known:
            if isinstance(value, list) and isinstance(known, list):
                value = next((x for x in value if x not in known), value)
            shown = json.dumps(value, ensure_ascii=False)[:200]
            raise Unsupported(f"this kind of {part} is not supported: {shown}")
    if not tokenizer.spaced and vocab[FIRST_BYTE:FIRST_CHAR] != BYTE_TOKENS:
        raise Unsupported("the 256 bytes do not follow the special tokens")
    return tokenizer


def canonical(form: dict) -> dict:
    """The parts of tokenizer.json except vocabulary and merges, in one form for all versions of
    tokenizers: a sequence of one step is that step, and missing fields get their defaults."""
    def part(value):
        if not isinstance(value, dict):
            return value
        for name in ("normalizers", "pretokenizers", "decoders"):
            if name in value:
                steps = [part(step) for step in value[name]]
                return steps[0] if len(steps) == 1 else steps
        if value.get("type") == "Metaspace":
            old_default = "always" if value.get("add_prefix_space", True) else "never"
            prefix = value.get("prepend_scheme", old_default)
            return metaspace(value["replacement"], prefix) | {"split": value.get("split", True)}
        if value.get("type") == "TemplateProcessing":  # pairs of texts are not encoded here
            value = {k: v for k, v in value.items() if k != "pair"}
            return value if value["special_tokens"] else None
        return value

    model = {**MODEL_DEFAULTS, **form["model"]}
    model = {k: v for k, v in model.items() if k not in ("vocab", "merges")}
    # padding and truncation are left out: AutoTokenizer resets them, so they change no ids
    names = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {name: part(form.get(name)) for name in names} | {"model": model}


# classes of transformers whose ids are those of tokenizer.json
PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")


def check_configuration(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a file next to tokenizer.json with which AutoTokenizer would give other
    ids."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text("utf-8"))
            if name == "added_tokens.json":
                config = {"extra_special_tokens": list(config.keys())}
            problem = find_change(config, tokenizer)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} is damaged") from None
        if problem:
            raise ValueError(f"{path}: {problem}")


def find_change(config: dict, tokenizer: Tokenizer) -> str:
    """What a configuration of transformers changes in the ids of a tokenizer; "" if nothing."""
    known = {token["content"]: token for token in tokenizer_json(tokenizer)["added_tokens"]}
    described = list((config.get("added_tokens_decoder") or {}).values())
    tokens = described + [token for name, token in config.items()  # bos_token, image_token, ...
                          if name.endswith("_token") and token and type(token) is not bool]
    for name in ("additional_special_tokens", "extra_special_tokens",
                 "model_specific_special_tokens"):
        more = config.get(name) or []
        tokens += more.values() if isinstance(more, dict) else more
    for token in tokens:
        content = token if isinstance(token, str) else token["content"]
        if content not in known:
            return (f"it has the special token {content!r}, and tokenizer.json has not: load the "
                    "folder with transformers and save it again")
    for token in described:
        own = known[token["content"]]
        if any(token.get(name, own[name]) != own[name]
               for name in ("lstrip", "rstrip", "single_word", "special")):
            return f"the token {token['content']!r} has other options than in tokenizer.json"
    if config.get("split_special_tokens"):
        return "split_special_tokens is not supported"
    if (kind := config.get("tokenizer_class")) not in PLAIN_CLASSES:
        return (f"the tokenizer_class {kind!r} may have rules of its own: if tokenizer.json is "
                "all, make it PreTrainedTokenizerFast")
    return ""


# --- Unicode --------------------------------------------------------------------------------------

# tokenizers knows the punctuation of Unicode 8, the numerals of Unicode 17 and the NFKC of Unicode
# 9. These are the characters that Python treats differently, and between them some that both treat
# alike; tests compare every character.
LATER_PUNCTUATION = """\
61d 9fd a76 c77 c84 1b4e-1b4f 1b7d-1b7f 2e43-2e63 10d6e 10ead-10ed0 10f55-10f89 113d4-1144f
1145a-1145d 11660-116b9 1183b 11944-11946 119e2-11be1 11c41-11c45 11c70-11c71 11ef7-11f4f 11fff
12ff1-12ff2 16d6d-16d6f 16e97-16fe2 1e5ff 1e95e-1e95f"""
EARLIER_PUNCTUATION = "166d 111c9"  # has moved to other categories since
LATER_NUMERALS = """\
10d40-10d49 116d0-116e3 11bf0-11bf9 11de0-11de9 11f50-11f59 16130-16139 16d70-16d79
16ff4-16ff6 1ccf0-1ccf9 1d2c0-1d2d3 1e4f0-1e4f9 1e5f1-1e5fa"""
LATER_NFKC = """\
558 58b-58c 5c8-5c9 7fd 897-8d3 9fe c3c d3b-d3c eba 1715 1abf-1af0 1df6-1dfa 209d-209f 32ff
a7f1-a7f4 a82c ab69 105c9-107bf 10d24-10f85 11070 1133b 11382-113d0 1145e 11839-11a99
11d42-1612f 16d63-1b126 1ccd6-1d128 1d250-1d281 1d6a6 1df95-1dfff 1e030-1e6f5 1f16c 1fbf0-1fbf9"""


def code_ranges(text: str) -> list[tuple[int, int]]:
    """"61d 1b4e-1b4f" -> [(0x61d, 0x61d), (0x1b4e, 0x1b4f)]"""
    bounds = [item.partition("-") for item in text.split()]
    return [(int(first, 16), int(last or first, 16)) for first, _, last in bounds]


def character_classes() -> np.ndarray:
    """(0x110000,) uint8: BEGINS | ENDS for punctuation and digits, BEGINS for a space, else 0."""
    alone = BEGINS | ENDS
    table = np.zeros(0x110000, dtype=np.uint8)
    for code in range(0x20000):  # above are ideographs and private use
        if unicodedata.category(chr(code))[0] in "PN":
            table[code] = alone
    for text, value in ((LATER_PUNCTUATION, 0), (EARLIER_PUNCTUATION, alone),
                        (LATER_NUMERALS, alone)):
        for first, last in code_ranges(text):
            table[first:last + 1] = value
    table[[ord(c) for c in "$+<=>^`|~"]] = alone  # ASCII punctuation, though symbols in Unicode
    table[ord(" ")] = BEGINS
    return table


CLASSES = character_classes()
UNNORMALIZED = re.compile(
    "([" + "".join(f"{chr(a)}-{chr(b)}" for a, b in code_ranges(LATER_NFKC)) + "])")


def normalize(text: str) -> str:
    """NFKC as tokenizers does it: characters that are too new for it do not change."""
    parts = UNNORMALIZED.split(text)
    parts[::2] = [unicodedata.normalize("NFKC", part) for part in parts[::2]]
    return "".join(parts)


# --- the command ----------------------------------------------------------------------------------


def memory_size(text: str) -> int:
    """An argparse type: 4GB, 512MB, 4GiB, or bytes -> bytes."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)\s*([KMGT]?)(I)?B?", text.strip().upper())
    size = 0
    if match:
        base, exponent = 1024 if match[3] else 1000, " KMGT".index(match[2] or " ")
        size = int(float(match[1]) * base ** exponent)
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 4GB or 512MB")
    return size


def print_stats(tokenizer: Tokenizer, corpus: Texts) -> None:
    """Print characters per token, the share of byte tokens or [UNK], and the speed of encoding."""
    chars = tokens = unknown = 0
    encode_s = 0.0
    for texts in batches(Progress("texts", corpus), CHUNK_CHARS):
        begin_s = time.perf_counter()
        ids, _ = tokenizer.encode_arrays(texts)
        encode_s += time.perf_counter() - begin_s
        chars += sum(map(len, texts))
        tokens += len(ids) - len(texts) * tokenizer.append_eos
        is_unknown = ids == UNK if tokenizer.spaced else (ids >= FIRST_BYTE) & (ids < FIRST_CHAR)
        unknown += int(np.count_nonzero(is_unknown))
    if not tokens:
        raise ValueError("no text in " + " ".join(map(str, corpus.rows.files)))
    name = "[UNK]" if tokenizer.spaced else "bytes"
    print(f"{chars:,} characters, {tokens:,} tokens: {chars / tokens:.3f} characters per token, "
          f"{100 * unknown / tokens:.4f} % of the tokens are {name}, "
          f"{chars / encode_s / 1e6:.2f} million characters/s")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Train a BPE tokenizer, or measure one.")
    commands = parser.add_subparsers(dest="command", required=True)
    inputs = (f"files ({READABLE}) or folders of them; from rows with prompt and response these "
              "two, from others all text")

    sub = commands.add_parser("train", help="learn a tokenizer from files of text or pairs")
    add = sub.add_argument
    add("input", nargs="+", metavar="IN", help=inputs)
    add("--out", required=True, metavar="DIR", help="folder for tokenizer.json")
    add("--vocab_size", type=number(int, 264, MAX_TOKENS), default=29298,
        help="number of tokens; fewer if no pair is frequent enough")
    add("--min_frequency", type=number(int, 1), default=2,
        help="pairs that occur less often are not merged")
    add("--character_coverage", type=number(float, 0, 1, above=True), default=0.9999,
        help="share of the text whose characters are in the alphabet; others become bytes")
    add("--nfkc", action="store_true",
        help="normalize text to NFKC first (decoding gives the normalized text)")
    add("--memory", type=memory_size, default="4GB",
        help="memory limit of all processes together, at least 600MB; a larger corpus is sampled")
    add("--workers", type=number(int, 1), default=os.cpu_count(),
        help="processes that cut the corpus into pieces; fewer if --memory is small")

    sub = commands.add_parser("stats", help="characters per token, share of bytes, speed")
    sub.add_argument("input", nargs="+", metavar="IN", help=inputs)
    sub.add_argument("--tokenizer", required=True, metavar="DIR", help="folder of tokenizer.json")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    corpus = Texts(args.input)
    try:
        if args.command == "stats":
            print_stats(Tokenizer.from_pretrained(args.tokenizer), corpus)
            return
        if Path(args.out, "config.json").exists():
            raise ValueError(f"{args.out} holds a model, which needs the tokenizer that it has: "
                             "choose another --out")
        check_folder(args.out)
        tokenizer = Tokenizer.train(
            corpus, args.vocab_size, args.min_frequency, args.character_coverage, args.nfkc,
            args.workers, args.memory, progress=sys.stderr.isatty())
        tokenizer.save_pretrained(args.out)
        print(f"{args.out}: {len(tokenizer):,} tokens, {len(tokenizer.merges):,} merges")
    finally:
        corpus.rows.problems.warn()


if __name__ == "__main__":
    run(main)
