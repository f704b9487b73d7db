"""The tokenizer: byte-pair encoding (BPE) learnt by merging the most frequent pair again and again.

    python tokenizer.py train corpus.parquet --out tok --vocab_size 29298
    python tokenizer.py stats corpus.parquet --tokenizer tok

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units" (arXiv:1508.07909). A text is cut
into pieces (every punctuation mark and every digit alone, a space at the head of what follows it), a piece into
characters, and the learnt merges are applied in the order in which they were learnt:

    merges (天, 气), (天气, 预), ...      "今天天气，好" -> 今天天气 | ， | 好 -> 今天 天气 ， 好

Characters outside the alphabet become their UTF-8 bytes, <0xE2> <0x82> <0xAC>, so every string has a code and comes
back whole. Both training and encoding work on whole arrays of text with numpy; tests hold them to textbook versions.
tokenizer.json is Hugging Face's format, and AutoTokenizer gives the same ids.
"""
import argparse
import csv
import errno
import gzip
import heapq
import json
import multiprocessing
import os
import re
import sys
import time
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

SPECIAL_TOKENS = ["[PAD]", "[EOS]", "[SEP]", "[BOS]", "[CLS]", "[MASK]", "[UNK]"]  # ids 0 to 6
PAD, EOS = 0, 1
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]  # ids 7 to 262
FIRST_CHAR = len(SPECIAL_TOKENS) + 256
REPLACEMENT_CHAR = 0xFFFD  # what a lone surrogate is read as
CHUNK_CHARS = 1 << 18  # texts are encoded in batches of about this many characters
TRAINING_BYTES_PER_CHAR, TRAINING_BASE_BYTES = 90, 200_000_000  # of peak memory, rounded up from measurements
LONG_PIECE = 128  # pieces of more symbols are merged one at a time, with a heap

# The punctuation of the Rust crate behind tokenizers is that of Unicode 8: what came later is not punctuation there,
# and two marks that were since moved to other categories still are. Its numerals are those of Unicode 17.
LATER_PUNCTUATION = (
    "61d 9fd a76 c77 c84 1b4e-1b4f 1b7d-1b7f 2e43-2e4f 2e52-2e63 10d6e 10ead 10ed0 10f55-10f59 10f86-10f89 113d4-113d8 "
    "1144b-1144f 1145a-1145d 11660-1166c 116b9 1183b 11944-11946 119e2 11a3f-11a46 11a9a-11aa2 11b00-11b09 11be1 "
    "11c41-11c45 11c70-11c71 11ef7-11ef8 11f43-11f4f 11fff 12ff1-12ff2 16d6d-16d6f 16e97-16e9a 16fe2 1e5ff 1e95e-1e95f")
EARLIER_PUNCTUATION = "166d 111c9"
LATER_NUMERALS = (
    "10d40-10d49 116d0-116e3 11bf0-11bf9 11de0-11de9 11f50-11f59 16130-16139 16d70-16d79 16ff4-16ff6 1ccf0-1ccf9 "
    "1d2c0-1d2d3 1e4f0-1e4f9 1e5f1-1e5fa")
PLAIN, SPACE, ALONE = 0, 1, 2


def codepoint_classes() -> np.ndarray:
    """(0x110000,) uint8: what a codepoint does to a piece. ALONE: is one; SPACE: begins one; PLAIN: goes on."""
    table = np.zeros(0x110000, dtype=np.uint8)
    for cp in range(0x20000):  # above are ideographs and private use
        if unicodedata.category(chr(cp))[0] in "PN":
            table[cp] = ALONE
    for ranges, value in ((LATER_PUNCTUATION, PLAIN), (EARLIER_PUNCTUATION, ALONE), (LATER_NUMERALS, ALONE)):
        for item in ranges.split():
            first, _, last = item.partition("-")
            table[int(first, 16):int(last or first, 16) + 1] = value
    table[[ord(c) for c in "$+<=>^`|~"]] = ALONE  # symbols to Unicode, punctuation to ASCII
    table[ord(" ")] = SPACE
    return table


CLASSES = codepoint_classes()


def to_codepoints(text: str) -> np.ndarray:
    """The codepoints of a string, uint32; lone surrogates become U+FFFD."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    surrogate = codes - np.uint32(0xD800) < 0x800
    return np.where(surrogate, np.uint32(REPLACEMENT_CHAR), codes) if surrogate.any() else codes


def piece_starts(codes: np.ndarray, text_starts: np.ndarray) -> np.ndarray:
    """True (N,) where a piece begins: at a text's start, at and after what stands alone, at a space."""
    classes = CLASSES[codes]
    starts = classes != PLAIN
    starts[1:] |= classes[:-1] == ALONE
    starts[text_starts[text_starts < len(codes)]] = True
    return starts


class PairTable:
    """(left id, right id) -> rank of the merge, for whole arrays: open addressing, linear probing."""
    MISSING = np.int32(0x7FFFFFFF)

    def __init__(self, pairs: np.ndarray):
        """pairs: (M, 2) int64, in order of rank."""
        bits = max(4, int(4 * len(pairs)).bit_length())
        self.mask, self.shift = (1 << bits) - 1, np.uint64(64 - bits)
        self.keys = np.full(1 << bits, -1, dtype=np.int64)
        self.ranks = np.full(1 << bits, self.MISSING, dtype=np.int32)
        keys = pairs[:, 0] << 32 | pairs[:, 1]
        for rank, (key, slot) in enumerate(zip(keys.tolist(), self.slots(keys).tolist())):
            while self.keys[slot] >= 0 and self.keys[slot] != key:
                slot = slot + 1 & self.mask
            if self.keys[slot] < 0:
                self.keys[slot], self.ranks[slot] = key, rank

    def slots(self, keys: np.ndarray) -> np.ndarray:
        return (keys.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> self.shift).view(np.int64)

    def lookup(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """left, right (N,) int32 ids, negative for none -> ranks (N,) int32, MISSING for no such merge."""
        keys = left.astype(np.int64) << 32 | right
        slots = self.slots(keys)
        found = self.keys[slots]
        ranks = self.ranks[slots]
        wrong = np.flatnonzero(found != keys)
        ranks[wrong] = self.MISSING
        wrong = wrong[found[wrong] >= 0]
        while len(wrong):
            slots[wrong] = slots[wrong] + 1 & self.mask
            found = self.keys[slots[wrong]]
            hit = found == keys[wrong]
            ranks[wrong[hit]] = self.ranks[slots[wrong[hit]]]
            wrong = wrong[~hit & (found >= 0)]
        return ranks


def every_other(positions: np.ndarray, step: np.ndarray | int) -> np.ndarray:
    """Which of the sorted positions of a pair (x, x) can be merged, from the left: in a run of neighbours `step`
    apart every other one. [3, 4, 5, 9], step 1 -> [True, False, True, True]"""
    index = np.arange(len(positions))
    new_run = np.r_[True, np.diff(positions) != (step if np.isscalar(step) else step[1:])]
    return (index - np.maximum.accumulate(np.where(new_run, index, 0))) % 2 == 0


class Tokenizer:
    def __init__(self, vocab: list[str], merges: list[tuple[int, int]], nfkc: bool = False, append_eos: bool = True):
        """vocab: tokens by id, SPECIAL_TOKENS and BYTE_TOKENS first; merges: pairs of ids, in the order learnt."""
        self.vocab, self.merges, self.nfkc, self.append_eos = vocab, merges, nfkc, append_eos
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.special_pattern = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
        self.char_ids = np.full(0x110000, -1, dtype=np.int32)  # -1: written as bytes
        for i, token in enumerate(vocab[FIRST_CHAR:], FIRST_CHAR):
            if len(token) == 1:
                self.char_ids[ord(token)] = i
        self.pairs = PairTable(np.array(merges, dtype=np.int64).reshape(-1, 2))
        self.merged = np.array([self.ids[vocab[a] + vocab[b]] for a, b in merges], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.vocab)

    def __eq__(self, other) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    # --- encoding -------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The ids of a text, [EOS] at the end; what AutoTokenizer(text).input_ids is."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        ids, lengths = self.encode_arrays(list(texts))
        flat, ends = ids.tolist(), np.cumsum(lengths).tolist()
        return [flat[a:b] for a, b in zip([0] + ends, ends)]

    def encode_arrays(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """All texts' ids one after the other (int32), and how many each has (int64)."""
        parts, batch, chars = [], [], 0
        for text in texts:
            batch.append(unicodedata.normalize("NFKC", text) if self.nfkc else text)
            chars += len(text)
            if chars >= CHUNK_CHARS:
                parts.append(self._encode_chunk(batch))
                batch, chars = [], 0
        if batch or not parts:
            parts.append(self._encode_chunk(batch))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _encode_chunk(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        codes = to_codepoints("".join(texts))
        text_chars = np.array([len(t) for t in texts], dtype=np.int64)
        text_ends = np.cumsum(text_chars)
        text_starts = text_ends - text_chars
        # ids[i] is the token that begins at character i: -1 its bytes, DROPPED nothing begins here
        dropped = np.int32(-2)
        ids = self.char_ids[codes]
        starts = piece_starts(codes, text_starts)
        for text, offset in zip(texts, text_starts.tolist()):
            if "[" in text:
                for match in self.special_pattern.finditer(text):
                    a, b = offset + match.start(), offset + match.end()
                    ids[a:b], ids[a], starts[a:b] = dropped, self.ids[match[0]], True
                    starts[b:b + 1] = True
        self._merge(ids, starts, dropped)
        # lay the tokens out: a place each, as many as it has bytes for a character written as bytes, one for [EOS]
        size = (ids != dropped).astype(np.int64)
        as_bytes = np.flatnonzero(ids == -1)
        size[as_bytes] = 1 + np.searchsorted([0x80, 0x800, 0x10000], codes[as_bytes], side="right")
        places = np.concatenate([[0], np.cumsum(size)])
        lengths = places[text_ends] - places[text_starts]
        out = np.repeat(ids, size)
        for i in as_bytes.tolist():
            out[places[i]:places[i + 1]] = np.frombuffer(chr(codes[i]).encode(), dtype=np.uint8) + np.int32(len(SPECIAL_TOKENS))
        if self.append_eos:
            out = np.insert(out, places[text_ends], EOS)
            lengths += 1
        return out, lengths

    def _merge(self, ids: np.ndarray, starts: np.ndarray, dropped: np.int32) -> None:
        """Apply the merges to every piece of ids at once, in place: a merged token stands at its first character.

        A round merges, in every piece, the pair of lowest rank wherever it occurs, which is what BPE does to a piece
        next. A piece without a pair to merge is finished and leaves the arrays.
        """
        begins = np.flatnonzero(starts)
        lengths = np.diff(np.append(begins, len(ids)))
        for begin, length in zip(begins[lengths > LONG_PIECE].tolist(), lengths[lengths > LONG_PIECE].tolist()):
            self._merge_long(ids[begin:begin + length], dropped)
        keep = np.repeat((lengths > 1) & (lengths <= LONG_PIECE), lengths)
        place = np.flatnonzero(keep)  # where in ids a symbol stands
        symbols, first = ids[place], starts[place]
        rank = np.full(len(place), PairTable.MISSING)  # of the pair of a symbol and the one after it
        pair = np.flatnonzero(~first[1:])
        rank[pair] = self.pairs.lookup(symbols[pair], symbols[pair + 1])
        while len(place):
            begins = np.flatnonzero(first)
            sizes = np.diff(np.append(begins, len(place)))
            lowest = np.minimum.reduceat(rank, begins)
            alive = lowest != PairTable.MISSING
            if np.count_nonzero(alive) < 0.7 * len(alive):  # drop finished pieces, when there are enough of them
                keep = np.repeat(alive, sizes)
                ids[place] = symbols
                place, symbols, first, rank = place[keep], symbols[keep], first[keep], rank[keep]
                lowest, sizes = lowest[alive], sizes[alive]
            at = np.flatnonzero((rank == np.repeat(lowest, sizes)) & (rank != PairTable.MISSING))
            if not len(at):
                ids[place] = symbols
                return
            twins = at[1:] == at[:-1] + 1  # two pairs that share a symbol: (x, x) in x x x
            if twins.any():
                at = at[every_other(at, 1)]
            symbols[at] = self.merged[rank[at]]
            gone = at + 1
            ids[place[gone]] = dropped
            keep = np.ones(len(place), dtype=bool)
            keep[gone] = False
            place, symbols, first, rank = place[keep], symbols[keep], first[keep], rank[keep]
            at -= np.arange(len(at))  # where the merged symbols stand now
            changed = np.unique(np.concatenate([at, at[at > 0] - 1]))
            last = changed == len(place) - 1
            rank[changed[last]] = PairTable.MISSING
            changed = changed[~last]
            inside = ~first[changed + 1]
            rank[changed[~inside]] = PairTable.MISSING
            changed = changed[inside]
            rank[changed] = self.pairs.lookup(symbols[changed], symbols[changed + 1])

    def _merge_long(self, ids: np.ndarray, dropped: np.int32) -> None:
        """The same for one long piece, in place: a heap of (rank, position), neighbours linked, O(n log n)."""
        symbols = ids.tolist()
        after, before = list(range(1, len(symbols) + 1)), list(range(-1, len(symbols) - 1))
        merged, missing = self.merged, int(PairTable.MISSING)
        ranks = dict(zip(self.merges, range(len(self.merges)))) if not hasattr(self, "_ranks") else self._ranks
        self._ranks = ranks  # built once, the first time a long piece is met
        heap = [(r, i) for i, r in enumerate(self.pairs.lookup(ids[:-1], ids[1:]).tolist()) if r != missing]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            if symbols[i] < 0 or j >= len(symbols) or ranks.get((symbols[i], symbols[j])) != rank:
                continue  # one of the two has been merged since
            symbols[i], symbols[j] = int(merged[rank]), dropped
            after[i] = after[j]
            if after[i] < len(symbols):
                before[after[i]] = i
            for left in (before[i], i):
                right = after[left] if left >= 0 else len(symbols)
                if right < len(symbols) and (r := ranks.get((symbols[left], symbols[right]))) is not None:
                    heapq.heappush(heap, (r, left))
        ids[:] = symbols

    # --- decoding -------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids (any iterable of int). Bytes that are not UTF-8 become U+FFFD, one for each."""
        out, pending = [], bytearray()
        for i in map(int, ids):
            if not 0 <= i < len(self.vocab):
                continue  # as tokenizers does
            if len(SPECIAL_TOKENS) <= i < FIRST_CHAR:
                pending.append(i - len(SPECIAL_TOKENS))
                continue
            if skip_special_tokens and i < len(SPECIAL_TOKENS):
                continue
            out += [_decode_bytes(pending), self.vocab[i]]
            pending.clear()
        return "".join(out) + _decode_bytes(pending)

    # --- files ----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        added = [dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                 for i, t in enumerate(SPECIAL_TOKENS)]
        eos = {"SpecialToken": {"id": "[EOS]", "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        return json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "NFKC"} if self.nfkc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Punctuation", "behavior": "Isolated"},
                {"type": "Digits", "individual_digits": True},
                {"type": "Metaspace", "replacement": " ", "prepend_scheme": "never", "split": True}]},
            "post_processor": {"type": "TemplateProcessing", "single": [a, eos], "pair": [a, eos, b, eos],
                               "special_tokens": {"[EOS]": {"id": "[EOS]", "ids": [EOS], "tokens": ["[EOS]"]}}}
            if self.append_eos else None,
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "ignore_merges": False,
                      "vocab": {t: i for i, t in enumerate(self.vocab)},
                      "merges": [[self.vocab[a], self.vocab[b]] for a, b in self.merges]}}, ensure_ascii=False) + "\n"

    @classmethod
    def from_pretrained(cls, folder) -> "Tokenizer":
        """Read folder/tokenizer.json. Raises FileNotFoundError without one, ValueError naming what is not supported."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        try:
            form = json.loads(path.read_text("utf-8"))
            model = form["model"]
            ids: dict[str, int] = model["vocab"]
            vocab = sorted(ids, key=ids.__getitem__)
            merges = [(ids[a], ids[b]) for a, b in model["merges"]]
            tokenizer = cls(vocab, merges, nfkc=form["normalizer"] is not None, append_eos=form["post_processor"] is not None)
        except (ValueError, KeyError, TypeError, IndexError) as e:
            raise ValueError(f"{path} is damaged: {type(e).__name__}: {e}") from None
        ours = json.loads(tokenizer.to_json())
        for part in ours:
            mine, theirs = ours[part], form.get(part)
            if part == "model":
                mine, theirs = ({k: v for k, v in m.items() if k not in ("vocab", "merges")} for m in (mine, theirs))
            if mine != theirs:
                raise ValueError(f"{path}: this kind of {part} is not supported: {json.dumps(theirs)[:200]}")
        if vocab[:FIRST_CHAR] != SPECIAL_TOKENS + BYTE_TOKENS:
            raise ValueError(f"{path}: the vocabulary does not begin with {' '.join(SPECIAL_TOKENS)} and the 256 bytes")
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
    def train(cls, texts: Iterable[str], vocab_size: int = 29298, min_frequency: int = 2,
              character_coverage: float = 0.9999, nfkc: bool = False, workers: int = 1, progress: bool = False) -> "Tokenizer":
        """Learn a tokenizer: always merge the most frequent adjacent pair, ties by the smaller (left id, right id).

        min_frequency: pairs seen less often are not merged, so the vocabulary can stay smaller than vocab_size.
        character_coverage: the alphabet holds the most frequent characters that make up this share of the text.
        Raises ValueError for a corpus without text or a vocabulary too small for alphabet, bytes and specials.
        """
        counts = np.zeros(0x110000, dtype=np.int64)
        parts = []
        with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext() as pool:
            for seen, times, *part in (pool.imap if pool else map)(cut_chunk, ((c, nfkc) for c in batches(texts, CHUNK_CHARS))):
                counts[seen] += times
                parts.append(part)
        if not counts.any():
            raise ValueError("the corpus has no text to learn a tokenizer from")
        alphabet = np.flatnonzero(counts)
        alphabet = alphabet[np.argsort(-counts[alphabet], kind="stable")]  # by frequency, then codepoint
        covered = np.cumsum(counts[alphabet])
        alphabet = alphabet[:1 + np.searchsorted(covered, character_coverage * covered[-1])]
        if vocab_size < FIRST_CHAR + len(alphabet):
            raise ValueError(f"vocab_size {vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens, 256 bytes and "
                             f"{len(alphabet)} characters need at least {FIRST_CHAR + len(alphabet)}")
        char_ids = np.full(0x110000, -1, dtype=np.int32)
        char_ids[alphabet] = np.arange(FIRST_CHAR, FIRST_CHAR + len(alphabet))
        codes, sizes, frequency = unique_pieces(parts)
        vocab = SPECIAL_TOKENS + BYTE_TOKENS + [chr(c) for c in alphabet]
        merges = learn_merges(char_ids[codes], sizes, frequency, vocab, vocab_size, min_frequency, progress)
        return cls(vocab, merges, nfkc=nfkc)


def _decode_bytes(pending: bytearray) -> str:
    try:
        return pending.decode()
    except UnicodeDecodeError:
        return chr(REPLACEMENT_CHAR) * len(pending)


def cut_chunk(job: tuple[list[str], bool]) -> tuple[np.ndarray, ...]:
    """Texts, and whether to normalise them -> their characters and how often each occurs; the pieces of two characters
    and more, which alone can hold merges: codepoints one after the other, and sizes."""
    texts, nfkc = job
    if nfkc:
        texts = [unicodedata.normalize("NFKC", t) for t in texts]
    codes = to_codepoints("".join(texts))
    lengths = np.array([len(t) for t in texts], dtype=np.int64)
    sizes = np.diff(np.append(np.flatnonzero(piece_starts(codes, np.cumsum(lengths) - lengths)), len(codes)))
    return *np.unique(codes, return_counts=True), codes[np.repeat(sizes > 1, sizes)], sizes[sizes > 1]


def unique_pieces(parts: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equal pieces once, with their number: (codepoints, sizes) parts -> codepoints, sizes, frequency.

    Pieces are compared by a 64-bit hash: the sum of a random number a codepoint times an odd factor a position.
    """
    codes, sizes = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
    if not len(sizes):
        return codes, sizes, sizes
    rng = np.random.default_rng(0)
    per_code = rng.integers(0, 1 << 64, size=0x110000, dtype=np.uint64)
    begins = np.cumsum(sizes) - sizes
    inside = np.arange(len(codes)) - np.repeat(begins, sizes)
    factor = np.cumprod(np.full(sizes.max(), 0x9E3779B97F4A7C15, dtype=np.uint64))
    hashes = np.add.reduceat(per_code[codes] * factor[inside], begins)
    _, index, frequency = np.unique(hashes, return_index=True, return_counts=True)
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[index] = True
    in_order = np.zeros(len(sizes), dtype=np.int64)
    in_order[index] = frequency
    return codes[np.repeat(chosen, sizes)], sizes[chosen], in_order[chosen]


def learn_merges(symbols: np.ndarray, sizes: np.ndarray, frequency: np.ndarray, vocab: list[str], vocab_size: int,
                 min_frequency: int, progress: bool = False) -> list[tuple[int, int]]:
    """Textbook BPE over pieces (symbols one after the other, -1 for none), growing vocab in place.

    The corpus is one array with a separator around every piece. A token stands at its first character's place, and
    where it ends stands ~token (for one of a single character both are one place, and the token stands there): so
    what follows is found by adding a token's length, what precedes by reading the place before, and a merge touches
    only its own places.

    A heap holds (-count, left, right) for the pairs that occur `floor` times or more, with the positions of each. A
    count in it may be too high, since merges take occurrences away, never too low. So a popped pair is counted anew:
    if the count stands, no other pair can have more, and it is merged; else it goes back with its true count. The
    pairs that a merge makes are new ones, and enter the heap if they reach the floor. When it is empty, all pairs are
    counted over the whole corpus with a lower floor. (Should a merge make a token that exists already, by another
    way, known pairs can become more frequent: then too all are counted anew.)
    """
    separator, dead = -1, np.iinfo(np.int32).min
    n = len(symbols) + len(sizes) + 1
    corpus = np.full(n, separator, dtype=np.int32)
    corpus[1 + np.arange(len(symbols)) + np.repeat(np.arange(len(sizes)), sizes)] = symbols
    weight = np.zeros(n, dtype=np.int32)
    weight[1 + np.arange(len(symbols)) + np.repeat(np.arange(len(sizes)), sizes)] = np.repeat(frequency, sizes)
    length = np.ones(vocab_size, dtype=np.int32)
    ids = {token: i for i, token in enumerate(vocab)}
    merges: list[tuple[int, int]] = []
    heap: list[tuple[int, int, int]] = []
    positions: dict[tuple[int, int], np.ndarray] = {}
    floor, stale, shown_s = sys.maxsize, False, time.monotonic()

    def enter(left: np.ndarray, right: np.ndarray, at: np.ndarray) -> None:
        """Group the occurrences of pairs by pair; those that reach the floor enter the heap."""
        key = left.astype(np.int64) * vocab_size + right
        order = np.argsort(key, kind="stable")
        key, at = key[order], at[order]
        begins = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
        counts = np.add.reduceat(weight[at], begins, dtype=np.int64)
        ends = np.append(begins[1:], len(key))
        for i in np.flatnonzero(counts >= floor).tolist():
            a, b = divmod(int(key[begins[i]]), vocab_size)
            positions[a, b] = at[begins[i]:ends[i]].copy()
            heapq.heappush(heap, (-int(counts[i]), a, b))

    while len(vocab) < vocab_size:
        if not heap or stale:
            # Count all pairs, in slots that several may share: no pair that reaches the floor can be missed.
            at = np.flatnonzero(corpus >= 0).astype(np.int32)
            left = corpus[at]
            right = corpus[at + length[left]]
            at, left, right = at[right >= 0], left[right >= 0], right[right >= 0]
            slot = ((left.astype(np.uint32) * np.uint32(0x9E3779B1) ^ right.astype(np.uint32)) * np.uint32(0x85EBCA6B)) >> 10
            slot_counts = np.bincount(slot, weights=weight[at], minlength=1)
            most = int(slot_counts.max())
            if not stale:  # the heap ran empty: nothing is left that reaches the last floor
                most = min(most, floor - 1)
            if most < min_frequency:
                break
            floor = max(min_frequency, most // 4)
            enough = (slot_counts >= floor)[slot]
            heap, positions, stale = [], {}, False
            if enough.any():
                enter(left[enough], right[enough], at[enough])
            continue
        count, a, b = heapq.heappop(heap)
        at = positions.pop((a, b))
        at = at[corpus[at] == a]
        at = at[corpus[at + length[a]] == b]
        mergeable = at[every_other(at, int(length[a]))] if a == b and len(at) > 1 else at
        true_count = int(weight[mergeable].sum(dtype=np.int64))
        if true_count != -count:
            if true_count >= floor:
                positions[a, b] = at
                heapq.heappush(heap, (-true_count, a, b))
            continue
        at = mergeable
        token = vocab[a] + vocab[b]
        new = ids.setdefault(token, len(vocab))
        if new == len(vocab):
            vocab.append(token)
            length[new] = length[a] + length[b]
        else:
            stale = True
        merges.append((a, b))
        end = at + (length[new] - 1)
        corpus[at] = new
        corpus[at + length[a]] = dead
        corpus[end] = ~new
        if not stale:
            before = corpus[at - 1]
            before = np.where(before < separator, ~before, before)
            inside = (before != separator) & (before != new)  # (new, new) is counted from its left
            after = corpus[end + 1]
            right = after != separator
            left_at, new_ = at[inside] - length[before[inside]], np.int32(new)
            if len(left_at):
                enter(before[inside], np.full(len(left_at), new_), left_at)
            if right.any():
                enter(np.full(np.count_nonzero(right), new_), after[right], at[right])
        if progress and time.monotonic() - shown_s > 1:
            shown_s = time.monotonic()
            print(f"\rvocabulary {len(vocab):,} of {vocab_size:,}, newest pair seen {true_count:,} times ",
                  end="", file=sys.stderr, flush=True)
    if progress:
        print(f"\rvocabulary {len(vocab):,}, {len(merges):,} merges{' ' * 40}", file=sys.stderr)
    return merges


def batches(texts: Iterable[str], chars: int) -> Iterator[list[str]]:
    """Lists of texts with about so many characters each."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_file(path, text: str) -> None:
    """Write beside, sync, rename: the file is either the old one or the new one, whole."""
    beside = Path(f"{path}.tmp")
    with open(beside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


# --- what the scripts share: reading files, and a command line that speaks to people (kept in the file all import) -----

def read_rows(paths: Iterable[str | Path], report=None, encoding: str = "utf-8") -> Iterator[dict]:
    """The rows of files and folders as dicts: .parquet, .jsonl, .json (lines or one list), .csv, .txt, each also .gz.

    A line of text is {"text": line}. Rows that cannot be read are skipped and handed to report(path, row, reason).
    Raises FileNotFoundError or ValueError, naming the file, where it is missing, empty, damaged or of another kind.
    """
    for path in input_files(paths):
        kind = Path(path.name.removesuffix(".gz")).suffix
        try:
            if kind == ".parquet":
                for batch in pq.ParquetFile(path).iter_batches(8192):
                    yield from batch.to_pylist()
                continue
            with gzip.open(path, "rt", encoding=encoding, errors="replace") if path.suffix == ".gz" else \
                    open(path, encoding=encoding, errors="replace", newline="") as f:
                if kind == ".csv":
                    yield from csv.DictReader(f)
                elif kind == ".txt":
                    yield from ({"text": line.rstrip("\r\n")} for line in f)
                elif kind == ".json" and (head := f.read(1024).lstrip("\ufeff \t\r\n")) and head[0] == "[":
                    f.seek(0)
                    yield from json.loads(f.read().lstrip("\ufeff"))
                else:
                    f.seek(0)
                    for n, line in enumerate(f, 1):
                        if line.strip("\ufeff \t\r\n"):
                            try:
                                row = json.loads(line.lstrip("\ufeff"))
                                if not isinstance(row, dict):
                                    raise ValueError("not an object")
                                yield row
                            except ValueError as e:
                                if report is None:
                                    raise ValueError(f"line {n}: {e}") from None
                                report(path, n, f"not JSON: {e}")
        except (pa.ArrowException, EOFError, gzip.BadGzipFile, zlib.error, csv.Error, ValueError) as e:
            raise ValueError(f"{path} cannot be read: {e}") from None


def sampled_texts(paths: list[str], memory_bytes: int) -> Iterator[str]:
    """The texts of files, or of a corpus whose training would not fit the memory a uniform sample: those whose hash falls
    below the share that fits, the same whatever their order."""
    fits = max(1, (memory_bytes - TRAINING_BASE_BYTES) // TRAINING_BYTES_PER_CHAR)
    chars = sum(map(len, read_texts(paths)))
    if chars > fits:
        print(f"{chars:,} characters do not fit --memory: training on a sample of {100 * fits / chars:.1f} % of the texts", file=sys.stderr)
    for text in read_texts(paths):
        if chars <= fits or xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) < fits / chars * 2 ** 64:
            yield text


def memory_size(text: str) -> int:
    """An argparse type: 4GB, 512MB, or bytes -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 4GB or 512MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def input_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files meant by names of files and folders, in a fixed order."""
    kinds = (".parquet", ".jsonl", ".json", ".csv", ".txt")
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        found = sorted(p for p in path.rglob("*") if p.name.removesuffix(".gz").endswith(kinds)) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path} has no files that can be read ({' '.join(kinds)}, also .gz)")
        if not found[0].name.removesuffix(".gz").endswith(kinds):
            raise ValueError(f"{path}: unknown kind of file; known are {' '.join(kinds)}, also .gz")
        files += found
    return files


def read_texts(paths: Iterable[str | Path]) -> Iterator[str]:
    """The texts of files: of pairs their prompts and responses, of other rows every string."""
    for row in read_rows(paths, report=lambda path, n, reason: None):
        chosen = [row[c] for c in ("prompt", "response")] if {"prompt", "response"} <= row.keys() else row.values()
        yield from (value for value in chosen if isinstance(value, str) and value)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in --help, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, "", False) else action.help


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, and one line for an error."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

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
        if not (low < value if above else low <= value) or not value <= high:
            limit = f"more than {low:g}" if above else f"{low:g} or more"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limit}" + (f", {high:g} at most" if high < 1e300 else ""))
        return value
    return parse


def run(main) -> None:
    """Call main() and end as a command should: an error is one line on stderr, status 2, or 1 for a failing disk."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as e:
        if isinstance(e, BrokenPipeError):  # the reader of our output has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        text = f"{e.strerror}: {e.filename}" if isinstance(e, OSError) and e.filename else e.strerror if isinstance(e, OSError) and e.strerror else e
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        sys.exit(1 if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) else 2)


def main() -> None:
    parser = ArgumentParser(description="Train a BPE tokenizer, or measure one.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="learn a tokenizer from files of text or pairs")
    train.add_argument("input", nargs="+", metavar="IN", help=".parquet .jsonl .json .csv .txt, .gz, or folders of them")
    train.add_argument("--out", required=True, metavar="DIR", help="folder for tokenizer.json")
    train.add_argument("--vocab_size", type=number(int, 264), default=29298, help="tokens")
    train.add_argument("--min_frequency", type=number(int, 1), default=2, help="pairs seen less often are not merged")
    train.add_argument("--character_coverage", type=number(float, 0, 1, above=True), default=0.9999,
                       help="share of the text that the alphabet spells without bytes")
    train.add_argument("--nfkc", action="store_true", help="normalise text to NFKC first (decoding gives the normalised text)")
    train.add_argument("--memory", type=memory_size, default="4GB", help="what training may use; of a corpus too large for it, a sample is taken")
    train.add_argument("--workers", type=number(int, 1), default=1, help="processes that cut the corpus into pieces")
    stats = commands.add_parser("stats", help="characters per token, byte-fallback rate, speed")
    stats.add_argument("input", nargs="+", metavar="IN", help="files as for train")
    stats.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.json")
    args = parser.parse_args()
    if args.command == "train":
        tokenizer = Tokenizer.train(sampled_texts(args.input, args.memory), args.vocab_size, args.min_frequency,
                                    args.character_coverage, args.nfkc, args.workers, progress=sys.stderr.isatty())
        tokenizer.save_pretrained(args.out)
        print(f"{args.out}: {len(tokenizer):,} tokens, {len(tokenizer.merges):,} merges")
    else:
        tokenizer = Tokenizer.from_pretrained(args.tokenizer)
        chars = tokens = byte_tokens = 0
        encode_s = 0.0
        for texts in batches(read_texts(args.input), CHUNK_CHARS):
            start_s = time.perf_counter()
            ids, _ = tokenizer.encode_arrays(texts)
            encode_s += time.perf_counter() - start_s
            chars += sum(map(len, texts))
            tokens += len(ids) - len(texts) * tokenizer.append_eos
            byte_tokens += np.count_nonzero((ids >= len(SPECIAL_TOKENS)) & (ids < FIRST_CHAR))
        if not tokens:
            raise ValueError("no text in " + " ".join(args.input))
        print(f"{chars:,} characters, {tokens:,} tokens: {chars / tokens:.3f} characters a token, "
              f"{100 * byte_tokens / tokens:.4f} % of the tokens are bytes, {chars / encode_s / 1e6:.2f} million characters/s")


if __name__ == "__main__":
    run(main)
