"""Pairs of prompt and response: make, clean, deduplicate, split, and stream them into training.

    python data.py demo  --out demo                                     questions with known answers
    python data.py clean --source alpaca raw.json --out clean.parquet   a public dump -> clean pairs
    python data.py dedup clean.parquet --out unique.parquet             drop near-duplicates
    python data.py split unique.parquet --out pairs                     train.parquet, valid.parquet
    python data.py stats pairs/train.parquet                            rows and lengths

A chat model learns from pairs: a prompt, and the response to give. The way from public data sets
to the model is:

    dump -> clean -> dedup -> split -> Parquet: prompt, response -> PairStream -> batches of ids

clean   takes prompt and response from the fields of each source, repairs punctuation and spaces,
        and drops rows that teach little; it counts every reason.
dedup   drops near-duplicates: a text that is repeated a thousand times is memorized. Two texts are
        near if the Jaccard similarity of their sets of character 5-grams is high:

            J(A, B) = |A and B| / |A or B|           intersection over union

        今天天气很好 has the 5-grams 今天天气很 and 天天气很好; 今天天气很差 shares the first of
        them. Together they have 3, so J = 1/3. Ten million texts have too many pairs to compare.
        MinHash (Broder 1997) finds candidates: a text's 5-grams are hashed into 128 bins, and each
        bin keeps its smallest value. The share of bins with equal values estimates J. At the
        default threshold, eight bins make a band (four in this picture). Only texts that agree in a
        whole band are compared exactly:

            a   12 7 30 5 | 9 41 3 8 | ...      the first band is equal: compare a and b
            b   12 7 30 5 | 9 16 3 8 | ...      P(compared) = 1 - (1 - J^8)^16

            J              0.5     0.7     0.85    0.9
            P(compared)    6 %     61 %    99.4 %  99.99 %

split   puts a row on a side by a hash of its prompt, so the same question is never on both.

PairStream turns Parquet files into an endless sequence of batches. A batch is padded to its longest
text, so rows are shuffled within a window, and rows of similar lengths share a batch:

    file -> row groups -> windows -> batches                  a batch of 3 pairs
            8,192 rows    65,536     micro_batch_tokens       input_ids  法 国 的 首 都 ... (3, S)
                          rows       with padding             labels     巴 黎 。 [EOS] ... (3, T)

With the same settings, the sequence depends only on the files, the seed and the epoch, not on the
number of processes: a run can resume on another number of GPUs and still sees every row once per
epoch.

Try next: run dedup with --threshold 0.5 and see how many more it drops; print the share of padding
in a few batches of PairStream, and again with plan_batches replaced by a random order.
"""
import argparse
import codecs
import contextlib
import copy
import csv
import errno
import functools
import glob
import gzip
import hashlib
import html
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, compress, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PAD, EOS = 0, 1  # token ids
IGNORED = -100  # the label of padding
PAIR, PREFERENCE = ("prompt", "response"), ("prompt", "chosen", "rejected")
SEP = "[SEP]"  # a token: between the turns of a conversation
ROW_GROUP = 8192  # rows of a Parquet row group that we write


@functools.cache
def arrow():
    """pyarrow, imported when first used: programs that need no Parquet start faster and smaller."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet
    # slower than Arrow's own pool, but it returns freed memory
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    return pyarrow


# --- reading files --------------------------------------------------------------------------------


class Problems(Counter):
    """Problems in files that are read anyway: reason -> count. first: where each occurred first.
    Also how much of the files has been read (share)."""

    def __init__(self, files: Iterable[Path] = ()):
        super().__init__()
        self.first: dict[str, str] = {}
        self.total_bytes = sum(path.stat().st_size for path in files)
        self.closed_bytes = 0
        self.tell: Callable[[], float] = lambda: 0  # position in the open file, in bytes

    def share(self) -> float:
        """How much of the files has been read, 0 to 1."""
        return min(1.0, (self.closed_bytes + self.tell()) / max(1, self.total_bytes))

    def close(self, path: Path) -> None:
        """Call it when path has been read."""
        self.tell = lambda: 0
        self.closed_bytes += path.stat().st_size

    def note(self, reason: str, where: str, times: int = 1) -> None:
        self.first.setdefault(reason, where)
        self[reason] += times

    def warn(self) -> None:
        for reason, n in self.items():
            note_once(f"warning: {n:,} x {reason} (first in {self.first[reason]})")


@functools.cache
def note_once(text: str) -> None:
    """Print a line on stderr, once in this process."""
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)


def list_columns(names: Iterable) -> str:
    """Column names for a message: at most 20, of 40 characters each; unusual ones are quoted."""
    texts = [str(name)[:40] for name in names]
    plain = [text if text == text.strip() and text.isprintable() else repr(text)
             for text in texts[:20]]
    return ", ".join(plain) + (", ..." if len(texts) > 20 else "")


class Rows:
    """The rows of files and folders, as dicts. It can be iterated over many times.

    Files are .parquet, .jsonl, .json (lines or one list), .csv or .txt, the text formats also .gz.
    A line of a .txt file is {"text": line}.

    columns: every row must have text in these. skip: rows without it and bad lines are counted in
    `problems`, which restarts with every pass; otherwise they raise ValueError, which names file
    and row. A first row without one of the columns, a damaged file, and a file that changes between
    or during passes always raise ValueError; a missing file raises FileNotFoundError.
    """

    def __init__(self, paths, columns: tuple[str, ...] = (), skip: bool = False,
                 outputs: Iterable[str | Path] = ()):
        paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        self.columns, self.skip = columns, skip
        self.others: dict[str, None] = {}  # columns besides these, in order
        self.files = input_files(paths, outputs)
        self.versions = list(map(file_version, self.files))
        self.problems = Problems()

    def share(self) -> float:
        """How much of the files this pass has read, 0 to 1."""
        return self.problems.share()

    def place(self) -> str:
        return f"{self.path}, row {self.row:,}"

    def __iter__(self) -> Iterator[dict]:
        self.problems = Problems(self.files)
        for path in self.files:
            is_only = len(self.files) == 1
            for i, row in enumerate(read_file(path, self.problems, self.skip, is_only), 1):
                self.path, self.row = path, i
                missing = next((c for c in self.columns if not isinstance(row.get(c), str)), None)
                if missing is None:
                    if self.columns and len(row) > len(self.columns):
                        self.others |= dict.fromkeys(c for c in row if c not in self.columns)
                    yield row
                elif not self.skip or i == 1 and missing not in row:  # the wrong file
                    raise ValueError(f"{self.place()} has no text in {missing!r}; its columns are "
                                     f"{list_columns(row)}")
                else:
                    self.problems.note(f"row without text in {missing!r}, skipped", self.place())
        for path, version in zip(self.files, self.versions):
            if version != file_version(path):
                raise ValueError(f"{path} changed while it was being read: run the command again")
        if not self.skip:
            self.problems.warn()

    def note_columns(self) -> None:
        """Print a note if a pass has found more columns."""
        if self.others:
            note_once(f"note: only {', '.join(self.columns)} are kept, not "
                      f"{list_columns(self.others)}")


def file_version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class Texts:
    """The texts of files: prompt and response of pairs, the turns of conversations, and every
    string of other rows. It can be iterated over many times. Rows without text, and columns of
    lists and objects, are noted in rows.problems."""

    def __init__(self, paths):
        self.rows = Rows(paths, skip=True)
        self.share = self.rows.share

    def __iter__(self) -> Iterator[str]:
        for row in self.rows:
            values: Iterable = row.values()
            if "prompt" in row and "response" in row:
                values = [row[column] for column in PAIR]
            elif turns := turns_of(row):
                values = [text for _, text in turns]
            found = False
            for value in values:
                if isinstance(value, str) and value:
                    found = True
                    yield value
                elif isinstance(value, (list, dict)):
                    self.rows.problems.note("value that is a list or an object, not read",
                                            self.rows.place())
            if not found:
                self.rows.problems.note("row without text", self.rows.place())


TURNS = ("conversations", "messages")  # columns of conversations: of ShareGPT, and of OpenAI


def turns_of(row: dict) -> list[tuple[str, Any]]:
    """(role in lower case, text) of every turn of a conversation, {"from", "value"} or {"role",
    "content"}; [] for another row."""
    turns = next((row[column] for column in TURNS if row.get(column) is not None), None)
    found = []
    for turn in turns if isinstance(turns, list) else []:
        role = (turn.get("from") or turn.get("role")) if isinstance(turn, dict) else None
        if not isinstance(role, str):
            return []
        text = turn.get("value")
        found.append((role.lower(), turn.get("content") if text is None else text))
    return found


def read_file(path: Path, problems: Problems, skip: bool, is_only: bool,
              parse: Callable | None = None) -> Iterator[dict]:
    """The rows of one file. Bad lines are noted in problems; without skip they raise ValueError. A
    damaged file always does, and a JSON file without any good line if it is the only file. parse:
    reads a text file of another form, with the arguments of read_csv."""
    def bad(reason: str, line: int, detail: str) -> None:
        if not skip:
            raise ValueError(f"line {line:,}: {detail}")
        problems.note(reason, f"{path}, line {line:,}")

    kind = file_kind(path)
    try:
        if kind == ".parquet":
            yield from read_parquet(path, problems)
            return
        with open_text(path, problems) as f:
            if parse:
                yield from parse(f, bad)
            elif kind == ".csv":
                yield from read_csv(f, bad)
            elif kind == ".txt":
                yield from read_lines(f, bad if skip else None)
            elif f.peek(1024).lstrip().startswith("["):
                rows, size, done = read_json_list(f), path.stat().st_size, 0
                problems.tell = lambda: size * done / len(rows)  # the file has been read whole
                for done, row in enumerate(rows, 1):
                    yield row
            else:
                yield from read_json_lines(f, bad, is_only)
    except (EOFError, gzip.BadGzipFile, zlib.error, csv.Error, ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read: {' '.join(str(e).split())}") from None
    finally:
        problems.close(path)


def read_json_list(f) -> list[dict]:
    """The objects of a JSON list. It is read whole: about five times the file's size in memory."""
    try:
        rows = json.load(f)
    except json.JSONDecodeError as e:
        raise ValueError(f"it begins with [, but is not one JSON list: {e}") from None
    for i, row in enumerate(rows, 1):
        if type(row) is not dict:
            shown = json.dumps(row, ensure_ascii=False)[:40]
            raise ValueError(f"item {i:,} of its list is {shown}, not an object")
    return rows


def read_json_lines(f, bad: Callable, is_only: bool) -> Iterator[dict]:
    """One object per line; blank lines are skipped."""
    good, first_error = 0, ""
    for number, line in enumerate(f, 1):
        line = line.strip(" \t\r\n")
        if not line:
            continue
        try:
            row = json.loads(line)
            if type(row) is not dict:
                raise ValueError("not an object")
        except (ValueError, RecursionError) as e:
            bad("line is not JSON", number, str(e))
            hint = ": put each object on a line of its own, or all in one list"
            first_error = first_error or f"line {number:,}: {e}{hint if line[0] == '{' else ''}"
        else:
            good += 1
            yield row
    if first_error and not good and is_only:
        raise ValueError(f"no line of it is a JSON object ({first_error})")


WIKI_TAG = re.compile("<doc( [^>]*)?>|</doc>")  # what WikiExtractor writes around an entry


def read_lines(f, bad: Callable | None) -> Iterator[dict]:
    """Lines of text; those over 4 million characters are split. With bad, WikiExtractor's tags are
    skipped and reported."""
    for number, line in enumerate(iter(lambda: f.readline(1 << 22), ""), 1):
        if bad and "<" in line and WIKI_TAG.fullmatch(line.strip()):
            bad("tag line of WikiExtractor, skipped", number, "")
        else:
            yield {"text": line.rstrip("\r\n")}


csv.field_size_limit(1 << 30)


def read_csv(f, bad: Callable) -> Iterator[dict]:
    """The records of a CSV file with a header. pyarrow.csv would stop at the first bad record.

    bad(reason, line, detail) reports a record with more fields than the header, which is skipped,
    and a bad quote, after which only the first line of that record is skipped.
    """
    record: list[str] = []  # the lines of the current record
    unread: deque[str] = deque()  # lines to read again, which a bad record had swallowed

    def lines() -> Iterator[str]:
        while line := unread.popleft() if unread else f.readline():
            record.append(line)
            yield line

    begin, header, reader = 1, list[str](), csv.reader(lines(), strict=True)
    try:
        while not any(header):  # blank lines may come first
            begin += len(record)
            record.clear()
            header = [name.strip() for name in next(reader)]
    except StopIteration:
        raise ValueError("it is empty, without a header") from None
    except csv.Error as e:
        raise ValueError(f"line {begin:,}: {e}") from None
    if header[0].startswith("sep=") or len(header) == 1 and re.search(r"[;\t|]", header[0]):
        raise ValueError(f"its first line is {header[0][:60]!r}: a CSV file begins with the names "
                         "of its columns, separated by commas")
    twice = [name for name, n in Counter(header).items() if name and n > 1]
    if twice:
        raise ValueError(f"the header has the column {twice[0]!r} twice")
    while True:
        begin += len(record)
        record.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            bad("bad quote in a CSV file, line skipped", begin, str(e))
            unread.extendleft(reversed(record[1:]))
            del record[1:]
            reader = csv.reader(lines(), strict=True)
            continue
        if len(fields) > len(header):
            bad("record with more fields than the header, skipped", begin,
                f"{len(fields)} fields, and the header has {len(header)}")
        elif fields:
            row: dict = dict(zip_longest(header, fields))  # missing fields become None
            row.pop("", None)  # a column without a name: an index, or commas at the end of lines
            yield row


def read_json(path: Path) -> dict:
    """A JSON object. Raises ValueError, naming the file, for anything else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        value = None
    if type(value) is not dict:
        raise ValueError(f"{path} is damaged: not a JSON object")
    return value


def refuse_pointer(path: str | Path) -> None:
    """Raise ValueError for the few lines that git leaves in place of a large file without LFS."""
    with open(path, "rb") as f:
        if f.read(19) == b"version https://git":
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run  git lfs pull")


def read_parquet(path: Path, problems: Problems) -> Iterator[dict]:
    """The rows of a Parquet file, a few at a time even if a row group is large. Columns that hold
    dates or times are left out. Bytes that are UTF-8 become text: Spark may write it so."""
    pa, share, size = arrow(), 0.0, path.stat().st_size
    problems.tell = lambda: share * size
    with open(path, "rb") as f:
        try:
            file = pa.parquet.ParquetFile(f, pre_buffer=False, buffer_size=1 << 20)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            sizes = [group.total_byte_size / group.num_rows for group in groups if group.num_rows]
            schema, columns, has_bytes = file.schema_arrow, [], False
            for name, kind in zip(schema.names, schema.types):
                if schema.names.count(name) > 1:
                    raise ValueError(f"it has the column {name!r} twice")
                if contains(kind, pa.types.is_temporal):  # Python lacks some of these
                    problems.note("column of dates or times, not read", f"{path}, {name}")
                    continue
                columns.append(name)
                has_bytes |= contains(kind, is_bytes)
            rows = int((1 << 23) / max([1, *sizes]))  # 8 MB at a time
            for batch in file.iter_batches(max(1, min(1024, rows)), columns=columns):
                share += len(batch) / file.metadata.num_rows
                found = batch.to_pylist()
                yield from map(decode_bytes, found) if has_bytes else found
        except (pa.ArrowException, OSError, OverflowError) as e:
            raise ValueError(str(e)) from None


def decode_bytes(value: Any) -> Any:
    """Turn bytes, also inside of lists and dicts, into text; those that are not UTF-8 stay."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    elif isinstance(value, dict):
        return {name: decode_bytes(part) for name, part in value.items()}
    elif isinstance(value, list):
        return list(map(decode_bytes, value))
    return value


def contains(kind: Any, test: Callable) -> bool:
    """Whether a test is true for an Arrow type, or for a type inside of it."""
    if arrow().types.is_dictionary(kind):
        kind = kind.value_type
    return test(kind) or any(contains(kind.field(i).type, test) for i in range(kind.num_fields))


def is_bytes(kind: Any) -> bool:
    types = arrow().types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


class TextFile(io.TextIOWrapper):
    """A text file that counts U+FFFD: replaced bytes, and those already in the file."""
    undecodable = 0

    def read(self, size: int | None = -1) -> str:
        text = super().read(size)
        self.undecodable += text.count("\ufffd")
        return text

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        line = super().readline(size)
        self.undecodable += line.count("\ufffd")
        return line

    def peek(self, size: int) -> str:
        """The first characters. The file stays at its beginning."""
        text = super().read(size)
        self.seek(0)
        return text


@contextlib.contextmanager
def open_text(path: Path, problems: Problems) -> Iterator[TextFile]:
    """Open a text file, also .gz. Bytes that cannot be decoded become U+FFFD and are noted in
    problems. Raises ValueError for another kind of file."""
    open_bytes: Callable = gzip.open if path.suffix.lower() == ".gz" else open
    with open_bytes(path, "rb") as raw:
        problems.tell = getattr(raw, "fileobj", raw).tell
        head = raw.read(1 << 16)
        refuse_other_kinds(path, head)
        read = len(head)
        while head.isascii() and read < 1 << 26 and (more := raw.read(1 << 16)):
            head, read = more, read + len(more)  # ASCII shows no encoding: look further
        encoding = encoding_of(path, head)
        raw.seek(0)
        f = TextFile(raw, encoding, errors="replace", newline="")
        try:
            yield f
        finally:
            if f.undecodable:
                name = encoding.removesuffix("-sig")
                problems.note(f"character U+FFFD: bytes that are not {name}, or lost before",
                              str(path), f.undecodable)


FIRST_BYTES = {b"\x1f\x8b": "gzip: its name needs .gz",
               b"PAR1\x15": "Parquet: its name needs .parquet",
               b"PK\x03\x04": "a zip or Excel file: unpack it, or save it as CSV",
               b"BZh91AY&SY": "bzip2: unpack it", b"\xfd7zXZ": "xz: unpack it",
               b"\x28\xb5\x2f\xfd": "zstd: unpack it"}


def refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raise ValueError if the first bytes of a text file are those of another kind of file."""
    for begin, kind in FIRST_BYTES.items():
        if head.startswith(begin):
            raise ValueError(f"it is {kind}")
    if file_kind(path) != ".txt" and re.match(rb"\s*<(!doctype|html)", head, re.IGNORECASE):
        raise ValueError("it is an HTML page, not data")
    is_marked = head.startswith(tuple(BYTE_ORDER_MARKS))
    if not is_marked and head.count(0) > len(head) // 50:
        raise ValueError("it is not text in UTF-8: save it as UTF-8")


BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
                    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def encoding_of(path: Path, head: bytes) -> str:
    """The encoding of a text file, from some of its bytes: that of a byte-order mark, else UTF-8,
    or GB18030 if that fits better and much is not UTF-8."""
    def undecodable(encoding: str) -> int:
        text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
        in_file = head.count("\ufffd".encode(encoding.removesuffix("-sig")))
        return text.count("\ufffd") - in_file  # a U+FFFD that the file itself contains is no error

    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    beyond_ascii = len(head.translate(None, bytes(range(128))))
    if undecodable("utf-8-sig") < max(2, beyond_ascii / 4):
        return "utf-8-sig"  # a few errors are damage; GB18030 has one for every one or two bytes
    encoding = min(("utf-8-sig", "gb18030"), key=undecodable)
    if encoding == "gb18030":
        note_once(f"note: {path} is not UTF-8, and is read as GB18030")
    return encoding


KINDS = (".parquet", ".jsonl", ".json", ".csv", ".txt")
READABLE = f"{' '.join(KINDS)}, text also .gz"
METADATA_FILES = {  # of models and data sets
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json",
    "generation_config.json", "adapter_config.json", "dataset_info.json", "dataset_infos.json",
    "dataset_dict.json", "state.json"}


def file_kind(path: Path) -> str:
    """.jsonl for a.jsonl, A.JSONL and a.jsonl.gz; .txt also for wiki_00 of WikiExtractor; "" for an
    unknown type."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    if re.fullmatch(r"wiki_\d+", plain):
        return ".txt"
    kind = next((kind for kind in KINDS if plain.endswith(kind)), "")
    return "" if kind == ".parquet" and plain != name else kind


def input_files(paths: Iterable[str | Path], outputs: Iterable[str | Path] = ()) -> list[Path]:
    """Expand files and folders into a list of files, in a fixed order. outputs: what the command
    writes. Raises FileNotFoundError, or ValueError for a file that cannot be an input."""
    written, files = {os.path.realpath(output) for output in outputs}, []
    given = list(map(Path, paths))
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        if path.is_dir():
            files += folder_files(path, written)
        elif not path.is_file():
            raise ValueError(f"{path} is a pipe or device, which can be read only once: write it "
                             "to a file first")
        elif not file_kind(path):
            raise ValueError(f"{path}: unknown kind of file; known are {READABLE}")
        elif os.path.realpath(path) in written:
            raise ValueError(f"{path} is both input and output: write to another file")
        else:
            files.append(path)
    seen, again = set(), []
    for path in files:
        refuse_pointer(path)
        number = path.stat().st_dev, path.stat().st_ino
        if number in seen:
            again.append(path)
        seen.add(number)
    if again:
        more = ", ..." if len(again) > 1 else ""
        note_once(f"note: {len(again):,} files are given more than once ({again[0]}{more}), and "
                  "their rows are read again")
    return files


def folder_files(folder: Path, written: set[str]) -> list[Path]:
    """The files of one folder for input_files. Skipped ones are reported once."""
    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    skipped = Problems()
    seen: set[Any] = set()  # folders by name, files by number: each is read once
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        # also __MACOSX, and Spark's _temporary and _delta_log
        hidden = {name for name in folders if name.startswith((".", "_"))}
        hidden |= {name for name in names if name.startswith(".")}
        outputs = {name for name in folders if os.path.realpath(Path(place, name)) in written}
        for name in sorted(hidden):
            skipped.note("hidden", name)
        for name in sorted(outputs - hidden):
            skipped.note("that this command writes", name)
        folders[:] = sorted(set(folders) - hidden - outputs)
        for name in sorted(set(names) - hidden):
            file = Path(place, name)
            real = os.path.realpath(file)
            if name.endswith(".tmp") and real.startswith(tuple(written)):
                continue
            if name in METADATA_FILES:
                skipped.note("of a model or data set description", name)
            elif not file.is_file():
                skipped.note("broken links or special files", name)
            elif real in written:
                skipped.note("that this command writes", name)
            elif not file_kind(file):
                skipped.note("of unknown type", name)
            elif (number := (file.stat().st_dev, file.stat().st_ino)) in seen:
                skipped.note("links to files already read", name)
            else:
                seen.add(number)
                found.append(file)
    reasons = [f"{n:,} {reason} ({skipped.first[reason]}{', ...' if n > 1 else ''})"
               for reason, n in skipped.items()]
    note = f"skipped in {folder}: {', '.join(reasons)}"
    if not found:
        raise ValueError(f"{folder} has no files that can be read ({READABLE})"
                         + (f"; {note}" if skipped else ""))
    if skipped:
        note_once(f"note: {note}")
    return sorted(found)


def hash_file(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, xxhash.xxh3_64).hexdigest()


def hash_files(paths: Iterable[str | Path]) -> str:
    """A hash of the bytes of files, in their order."""
    return xxhash.xxh3_64_hexdigest("".join(map(hash_file, paths)).encode())


# --- writing files --------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path) -> Iterator[Path]:
    """Yield a temporary path to write to, then sync it and rename it to `path`, or to the file that
    this links to. Readers see the old file or the complete new one. After an error the temporary
    file is deleted; that of a killed process is deleted by the next write of `path`."""
    target = os.path.realpath(path)
    temporary, name = Path(f"{target}.{os.getpid()}.tmp"), Path(target).name
    for other in temporary.parent.glob(f"{glob.escape(name)}.*.tmp"):
        pid = other.name[len(name) + 1:-len(".tmp")]
        if pid.isdecimal() and not is_running(int(pid)):
            with contextlib.suppress(OSError):
                other.unlink()
    try:
        yield temporary
        with write_errors(path):
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # for example, a name that is too long
            temporary.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether there is such a process. True if the system cannot tell."""
    try:
        if os.name == "posix":
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


@contextlib.contextmanager
def write_errors(path, *kinds: Any) -> Iterator[None]:
    """Turn an OSError, and these errors of libraries, into an OSError that names path and cause."""
    try:
        yield
    except (OSError, *kinds) as e:
        # as safetensors and pyarrow print it
        code = re.search(r"\b(?:os error|errno) (\d+)", str(e), re.IGNORECASE)
        number = getattr(e, "errno", None) or (int(code[1]) if code else errno.EIO)
        cause = os.strerror(number) if number != errno.EIO else f"{e} (is the disk full?)"
        raise OSError(number, f"could not be written: {cause}", str(path)) from None


def write_file(path, text: str) -> None:
    """Write a text file atomically. Raises OSError, naming path and cause."""
    with atomic_write(path) as temporary, write_errors(path):
        temporary.write_text(text, "utf-8")


def delete_files(folder, names: Iterable[str]) -> None:
    """Delete files of a folder; those that are missing are ignored."""
    for name in names:
        Path(folder, name).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path, message: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a lock on an existing file or folder. Raises ValueError(message) if another process
    still holds it after patience_s."""
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
            except OSError:  # this file system has no locks: go on without one
                break
        yield
    finally:
        os.close(handle)


def check_name(path) -> None:
    """Raise ValueError for a name that pyarrow, torch and safetensors cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name {str(path)!r} is not UTF-8: choose another") from None


def check_folder(path) -> None:
    """Raise OSError or ValueError if a folder cannot be created or written to."""
    check_name(path)
    existing = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(existing))
    if not os.access(existing, os.W_OK):
        raise PermissionError(errno.EACCES, "no permission to write", str(existing))


class Writer:
    """Writes string columns to a Parquet file, see open_writer."""

    def __init__(self, path: Path, schema, parquet):
        self.path, self.schema, self.parquet = path, schema, parquet
        self.batch: list[dict] = []
        self.total = 0
        self.replaced = 0  # lone surrogates

    def write(self, row: dict) -> None:
        self.batch.append(row)
        if len(self.batch) == ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        pa = arrow()
        try:
            table = pa.Table.from_pylist(self.batch, self.schema)
        except UnicodeEncodeError:  # JSON may hold a lone surrogate, which is no character
            table = pa.Table.from_pylist(list(map(self.without_surrogates, self.batch)),
                                         self.schema)
        with write_errors(self.path, pa.ArrowException):
            self.parquet.write_table(table)
        self.total += len(self.batch)
        self.batch = []

    def without_surrogates(self, row: dict) -> dict:
        texts = {}
        for column in self.schema.names:
            texts[column], n = re.subn("[\ud800-\udfff]", "\ufffd", row[column])
            self.replaced += n
        return texts

    def finish(self) -> None:
        """Write the remaining rows and close the file."""
        if self.batch:
            self.flush()
        if self.replaced:
            note_once(f"warning: {self.path}: {self.replaced:,} lone surrogates (halves of a "
                      "character) became U+FFFD")
        with write_errors(self.path, arrow().ArrowException):
            self.parquet.close()


@contextlib.contextmanager
def open_writer(path, columns: tuple[str, ...] = PAIR, made_of: str = "") -> Iterator[Writer]:
    """A Writer of a Parquet file, which appears when the `with` block ends without an error.
    made_of: a hash of the command and its inputs for the file's metadata, see recipe."""
    pa, path = arrow(), Path(path)
    check_parquet_path(path)
    check_folder(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(c, pa.string()) for c in columns], {"made_of": made_of})
    with atomic_write(path) as temporary:
        with write_errors(path, pa.ArrowException):
            parquet = pa.parquet.ParquetWriter(temporary, schema, compression="zstd")
        try:
            writer = Writer(path, schema, parquet)
            yield writer
            writer.finish()
        finally:  # after an error; closing twice does nothing
            with contextlib.suppress(OSError, pa.ArrowException):
                parquet.close()


def check_parquet_path(path: Path) -> None:
    """Raise ValueError for a path to which no Parquet file can be written."""
    check_name(path)
    if path.suffix != ".parquet" or path.exists() and not path.is_file():
        raise ValueError(f"{path}: the output is a file whose name ends with .parquet")


def recipe(command: str, inputs: list[str]) -> str:
    """A hash of a command and its inputs for a file's metadata: it does not reveal the paths."""
    paths = [command, *map(os.path.realpath, inputs)]
    return xxhash.xxh3_64_hexdigest(os.fsencode("\0".join(paths)))


def check_outputs(inputs: list[str], outputs: list[Path], made_of: str) -> None:
    """Raise ValueError for an output that is no Parquet file, or a file of an input folder, unless
    the same command made it of the same inputs (made_of: see recipe)."""
    pa = arrow()
    folders = {Path(os.path.realpath(path)) for path in inputs if Path(path).is_dir()}
    for output in outputs:
        check_parquet_path(output)
        if not output.exists() or folders.isdisjoint(Path(os.path.realpath(output)).parents):
            continue
        try:
            metadata = pa.parquet.read_schema(output).metadata or {}
        except (pa.ArrowException, OSError):
            metadata = {}
        if metadata.get(b"made_of") != made_of.encode():
            raise ValueError(f"{output} is in the folder to read and would be overwritten: choose "
                             "another --out")


def write_pairs(path, rows: Iterable[dict], columns: tuple[str, ...] = PAIR) -> int:
    """Write rows' string columns to a Parquet file. Returns the number of rows."""
    with open_writer(path, columns) as writer:
        for row in rows:
            writer.write(row)
    return writer.total


def refuse_empty(rows: int, inputs: list[str], problems: Problems | None = None) -> None:
    """Raise ValueError if there is nothing to write."""
    if not rows:
        if problems:
            problems.warn()
        names = ", ".join(map(str, inputs))
        raise ValueError(f"{names}: no row can be used, and nothing was written")


def report(counts: Problems, problems: Problems) -> None:
    """Print a table of reasons and rows, and what was wrong in the files."""
    for reason, rows in [*counts.most_common(), ("all", counts.total())]:
        first = f"  (first: {counts.first[reason]})" if reason in counts.first else ""
        print(f"{rows:>12,}  {reason}{first}")
    problems.warn()


def duration(seconds: float) -> str:
    """3725 -> 1h02m, 65 -> 1m05s"""
    if not math.isfinite(seconds):
        return "?"
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s"


class Progress:
    """One line on stderr, updated in a terminal, otherwise printed anew every 10 seconds:
    "1,200 rows, 40 %, 0m30s left".

    Call show; or add, if the total is known; or iterate over Progress(text, rows), which yields the
    rows of a Rows or Texts. passes: how many times they will be iterated over.
    """

    def __init__(self, text: str = "", rows: Any = (), passes: int = 1, total: int = 0):
        self.text, self.rows, self.passes, self.total, self.done = text, rows, passes, total, 0
        self.is_terminal = sys.stderr.isatty()
        self.begin_s = self.shown_s = time.monotonic()
        self.passes_done = 0

    def show(self, text: str, share: float = 0.0) -> None:
        """share: how much of the work is done, up to 1; 0: unknown."""
        now_s = time.monotonic()
        if now_s - self.shown_s < (0.5 if self.is_terminal else 10):
            return
        self.shown_s = now_s
        if share > 0:
            left_s = (now_s - self.begin_s) * (1 - share) / share
            text += f", {100 * share:.0f} %, {duration(left_s)} left"
        line = f"\r\x1b[K{text}" if self.is_terminal else text + "\n"
        print(line, end="", file=sys.stderr, flush=True)

    def add(self, n: int) -> None:
        """n more of the total are done."""
        self.done = min(self.done + n, self.total)
        self.show(f"{self.done:,} of {self.total:,} {self.text}", self.done / self.total)

    def clear(self) -> None:
        if self.is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __iter__(self) -> Iterator:
        for i, row in enumerate(self.rows, 1):
            yield row
            if not i % 64:  # asking for the time and the share of every row would cost
                share = (self.passes_done + self.rows.share()) / self.passes
                self.show(f"{i:,} {self.text}", share)
        self.passes_done += 1
        self.clear()


# --- demo: a small world of facts, each asked in several ways -------------------------------------

CAPITALS = """\
中国:北京 日本:东京 韩国:首尔 朝鲜:平壤 蒙古:乌兰巴托 越南:河内 老挝:万象 柬埔寨:金边 泰国:曼谷 缅甸:内比都
菲律宾:马尼拉 印度:新德里 尼泊尔:加德满都 不丹:廷布 巴基斯坦:伊斯兰堡 阿富汗:喀布尔 伊朗:德黑兰 伊拉克:巴格达
叙利亚:大马士革 约旦:安曼 黎巴嫩:贝鲁特 也门:萨那 阿曼:马斯喀特 卡塔尔:多哈 土耳其:安卡拉 格鲁吉亚:第比利斯
亚美尼亚:埃里温 阿塞拜疆:巴库 塔吉克斯坦:杜尚别 法国:巴黎 英国:伦敦 德国:柏林 意大利:罗马 西班牙:马德里
葡萄牙:里斯本 荷兰:阿姆斯特丹 比利时:布鲁塞尔 奥地利:维也纳 瑞士:伯尔尼 丹麦:哥本哈根 挪威:奥斯陆 芬兰:赫尔辛基
瑞典:斯德哥尔摩 冰岛:雷克雅未克 爱尔兰:都柏林 波兰:华沙 捷克:布拉格 匈牙利:布达佩斯 罗马尼亚:布加勒斯特
保加利亚:索非亚 希腊:雅典 俄罗斯:莫斯科 乌克兰:基辅 白俄罗斯:明斯克 爱沙尼亚:塔林 拉脱维亚:里加 立陶宛:维尔纽斯
塞尔维亚:贝尔格莱德 克罗地亚:萨格勒布 美国:华盛顿 加拿大:渥太华 墨西哥:墨西哥城 古巴:哈瓦那 牙买加:金斯敦 海地:太子港
巴西:巴西利亚 秘鲁:利马 智利:圣地亚哥 阿根廷:布宜诺斯艾利斯 乌拉圭:蒙得维的亚 巴拉圭:亚松森 哥伦比亚:波哥大
委内瑞拉:加拉加斯 厄瓜多尔:基多 埃及:开罗 利比亚:的黎波里 摩洛哥:拉巴特 苏丹:喀土穆 肯尼亚:内罗毕 乌干达:坎帕拉
卢旺达:基加利 索马里:摩加迪沙 尼日利亚:阿布贾 加纳:阿克拉 塞内加尔:达喀尔 马里:巴马科 安哥拉:罗安达 赞比亚:卢萨卡
津巴布韦:哈拉雷 纳米比亚:温得和克 莫桑比克:马普托 澳大利亚:堪培拉 新西兰:惠灵顿"""
PROVINCES = """\
河北:冀:石家庄 山西:晋:太原 辽宁:辽:沈阳 吉林:吉:长春 黑龙江:黑:哈尔滨 江苏:苏:南京 浙江:浙:杭州 安徽:皖:合肥
福建:闽:福州 江西:赣:南昌 山东:鲁:济南 河南:豫:郑州 湖北:鄂:武汉 湖南:湘:长沙 广东:粤:广州 海南:琼:海口
四川:川:成都 贵州:黔:贵阳 云南:滇:昆明 陕西:陕:西安 甘肃:甘:兰州 青海:青:西宁"""
ANTONYMS = """\
大:小 多:少 高:低 长:短 快:慢 冷:热 黑:白 远:近 轻:重 新:旧 早:晚 真:假 好:坏 美:丑 胖:瘦 粗:细
深:浅 软:硬 强:弱 明:暗 左:右 前:后 上:下 里:外 东:西 南:北 天:地 开:关 进:出 来:去 生:死 买:卖
哭:笑 爱:恨 胜:负 得:失 输:赢 升:降 起:落 古:今 文:武 公:私 正:反 阴:阳 干:湿 甜:苦 饥:饱 贫:富
善:恶 勤:懒 松:紧 宽:窄 厚:薄 浓:淡 动:静 加:减 借:还 问:答 攻:守 安全:危险 成功:失败 光明:黑暗
温暖:寒冷 美丽:丑陋 聪明:愚笨 勇敢:胆怯 诚实:虚伪 谦虚:骄傲 勤劳:懒惰 快乐:悲伤 高兴:难过 简单:复杂 增加:减少
上升:下降 前进:后退 开始:结束 出现:消失 记住:忘记 喜欢:讨厌 表扬:批评 团结:分裂 和平:战争 进步:退步 积极:消极
主动:被动 主观:客观 先进:落后 富裕:贫穷 繁荣:萧条 热情:冷淡 安静:吵闹 整齐:杂乱 干净:肮脏 清楚:模糊 仔细:粗心
节约:浪费 延长:缩短 扩大:缩小 坚强:软弱 紧张:放松 公开:秘密 普通:特殊 朋友:敌人 优点:缺点 城市:农村 过去:未来
白天:黑夜 晴天:雨天 顺利:曲折 精致:粗糙 慷慨:吝啬 熟悉:陌生 永远:暂时 希望:失望 拥挤:宽敞 平坦:崎岖 鲜艳:暗淡"""
MEASURES = """\
本:书,词典,杂志,小说 只:鸟,猫,鸡,羊,兔子,蚂蚁 条:鱼,河,裙子,毛巾,蛇 匹:马,布 头:牛,猪,大象
张:纸,桌子,床,照片,地图 把:椅子,刀,伞,钥匙,扇子 支:笔,香烟,箭 辆:汽车,自行车,卡车 架:飞机,钢琴 艘:船,军舰
座:山,桥,城市,塔 棵:树,白菜,草 朵:花,云 件:衣服,礼物,事情 双:鞋,筷子,袜子,手套 杯:水,茶,咖啡,牛奶
碗:饭,汤,面条 首:歌,诗 台:电脑,电视,洗衣机 面:镜子,红旗,墙 颗:星星,牙齿,糖,珍珠 粒:米,沙子,种子
顶:帽子,轿子 盏:灯 封:信 幅:画 扇:门,窗户 口:井,锅 块:石头,手表,蛋糕 片:树叶,面包 位:老师,医生,客人
名:学生,警察,士兵 间:房间,教室 家:医院,商店,公司 所:学校,大学 部:电影,手机"""
UNITS = """\
千米:米:1000 米:厘米:100 米:分米:10 分米:厘米:10 厘米:毫米:10 千克:克:1000 吨:千克:1000
斤:两:10 千克:斤:2 小时:分钟:60 分钟:秒:60 天:小时:24 星期:天:7 元:角:10 角:分:10
升:毫升:1000 平方米:平方分米:100 世纪:年:100 年:个月:12"""
MONTH_DAYS = dict(enumerate([31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31], 1))
CYCLES = {"星期{}": "一二三四五六日", "{}年": "鼠牛虎兔龙蛇马羊猴鸡狗猪", "{}天": "春夏秋冬"}
# wordings of a question = its answer
CAPITAL = ("{0}的首都是哪里？|{0}的首都是哪座城市？|{0}首都在哪儿？|{0}的首都叫什么？|"
           "哪座城市是{0}的首都？|说出{0}的首都。|你知道{0}的首都吗？={0}的首都是{1}。")
PROVINCE = ("{0}省的省会是哪里？|{0}的省会是哪座城市？|{0}省会在哪儿？|哪座城市是{0}省的省会？|"
            "说出{0}省的省会。|你知道{0}的省会吗？|{0}省的省会叫什么？={0}省的省会是{2}。")
SHORT_NAME = ("{0}省的简称是什么？|{0}的简称是哪个字？|{0}省简称什么？|用一个字称呼{0}省。|"
              "说出{0}省的简称。|你知道{0}的简称吗？|{0}省的简称叫什么？={0}省的简称是{1}。")
CITY = ("{2}是哪个省的省会？|{2}是哪里的省会？|哪个省的省会是{2}？|{2}属于哪个省？|{2}在哪个省？|"
        "说出{2}所在的省。|你知道{2}是哪个省的吗？={2}是{0}省的省会。")
ANTONYM = ("{0}的反义词是什么？|“{0}”的反义词是什么？|{0}的反义词是哪个？|和{0}意思相反的词是什么？|"
           "说出{0}的反义词。|你知道{0}的反义词吗？|与“{0}”相反的词是哪个？={0}的反义词是{1}。")
MEASURE = ("{1}的量词是什么？|“{1}”用什么量词？|{1}用哪个量词？|一什么{1}？|说出{1}的量词。|"
           "你知道{1}的量词吗？|{1}前面用什么量词？=一{0}{1}。")
UNIT = ("{0}等于多少{1}？|{0}是多少{1}？|{0}有多少{1}？|把{0}换算成{1}。|多少{1}等于{0}？|"
        "{0}合多少{1}？|你知道{0}是多少{1}吗？={0}等于{2}{1}。")
MONTH = ("{0}月有多少天？|{0}月份有几天？|{0}月一共多少天？|平年的{0}月有几天？|说出{0}月的天数。|"
         "你知道{0}月有多少天吗？|{0}月是多少天？={0}月有{1}天。")
CYCLE = ("{0}的{1}是什么？|{0}{1}是哪个？|{0}的{2}是什么？|{0}的{2}是哪个？|说出{0}的{2}。|"
         "你知道{0}{1}是什么吗？|{0}的{1}一个是什么？={0}的{1}是{3}。")
CHAT = """\
你好|您好|你好呀|嗨|哈喽|早上好|很高兴认识你=你好！我是ChatLM，很高兴和你聊天。
你是谁|你叫什么名字|介绍一下你自己|你是什么|你能介绍一下自己吗|怎么称呼你|说说你是谁\
=我是ChatLM，一个从零开始训练的中文小模型。
谢谢|谢谢你|非常感谢|多谢了|太感谢你了|谢谢你的帮助|感谢你的回答=不客气，很高兴能帮到你。
再见|拜拜|下次再聊|我先走了|回头见|今天就到这里吧|我要走了=再见，欢迎下次再来！
你会做什么|你能做什么|你有什么本领|你可以帮我做什么|你会些什么|我可以问你什么|你懂什么\
=我会说首都、省会、反义词、量词和单位换算，也会做简单的加减法。
你有多大|你有多少参数|你是大模型吗|你的规模有多大|你有几个参数|你是小模型吗|你大不大\
=我很小，参数只有一百多万个。
晚安|祝你晚安|睡个好觉|该睡了，晚安|夜深了，晚安|道一声晚安|我睡了，晚安=晚安，祝你做个好梦！"""
OPENINGS = ["", "请问，", "你好，", "我想知道，", "请告诉我，", "问你一下，"]
DIGITS = "零一二三四五六七八九"


def fill(template: str, *values) -> tuple[list[str], str]:
    """"{0}大吗|{0}多大={0}很{1}" with 天, 大 -> (["天大吗", "天多大"], "天很大")"""
    wordings, answer = template.format(*values).split("=")
    return wordings.split("|"), answer


def demo_facts() -> Iterator[tuple[list[str], str]]:
    """Every fact of the demo: the wordings of its question, and its one answer."""
    def table(text: str) -> Iterator[list[str]]:
        return (entry.split(":") for entry in text.split())

    yield from (fill(CAPITAL, *row) for row in table(CAPITALS))
    for row in table(PROVINCES):
        yield from (fill(template, *row) for template in (PROVINCE, SHORT_NAME, CITY))
    for word, opposite in table(ANTONYMS):
        yield fill(ANTONYM, word, opposite)
        yield fill(ANTONYM, opposite, word)
    for measure, nouns in table(MEASURES):
        yield from (fill(MEASURE, measure, noun) for noun in nouns.split(","))
    for big, small, factor in table(UNITS):
        counted = "个" if big in ("小时", "星期", "世纪") else ""
        yield from (fill(UNIT, f"{n}{counted}{big}", small, n * int(factor)) for n in range(1, 10))
    yield from (fill(MONTH, month, days) for month, days in MONTH_DAYS.items())
    for name, cycle in CYCLES.items():
        for i, item in enumerate(cycle):
            for side, words, step in (("后面", "下一个", 1), ("前面", "上一个", -1)):
                neighbor = name.format(cycle[(i + step) % len(cycle)])
                yield fill(CYCLE, name.format(item), side, words, neighbor)
    yield from map(fill, CHAT.splitlines())


def in_words(n: int) -> str:
    """0 to 99: 7 -> 七, 10 -> 十, 23 -> 二十三."""
    tens, ones = divmod(n, 10)
    text = DIGITS[tens] if tens > 1 else ""
    text += "十" if tens else ""
    return text + (DIGITS[ones] if ones or not tens else "")


def demo_sums() -> Iterator[tuple[list[str], str]]:
    """Additions and subtractions, in digits up to 30 and in words up to 20."""
    for limit, say in ((30, str), (20, in_words)):
        for a in range(limit + 1):
            for b in range(limit + 1):
                yield fill("{0}加{1}等于多少？|{0}加上{1}是多少？={0}加{1}等于{2}。",
                           say(a), say(b), say(a + b))
                if b <= a:
                    yield fill("{0}减{1}等于多少？|{0}减去{1}是多少？={0}减{1}等于{2}。",
                               say(a), say(b), say(a - b))


def is_sum(prompt: str) -> bool:
    """Whether a demo question is one of demo_sums; train.py scores these apart."""
    return re.search("[加减].*(等于多少|是多少)？$", prompt) is not None


def make_demo(seed: int = 0) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(prompt, response) pairs for training, and held-out ones: one wording of every fact, which
    training has with other facts, and one in 20 sums, in every wording."""
    rng = random.Random(seed)
    train, valid = [], []
    for i, (wordings, answer) in enumerate(demo_facts()):
        for j, wording in enumerate(wordings):
            # not "你好，你好": no opening with which the wording begins; the empty one stays
            openings = [o for o in OPENINGS if not wording.startswith(o.rstrip("，") or " ")]
            if j == i % len(wordings):
                valid.append((rng.choice(openings) + wording, answer))
            else:
                train += [(opening + wording, answer) for opening in rng.sample(openings, 3)]
    for wordings, answer in demo_sums():
        if rng.random() < 0.05:
            valid.append((rng.choice(wordings), answer))
        else:
            train += [(opening + wording, answer)
                      for wording in wordings for opening in rng.sample(OPENINGS, 3)]
    rng.shuffle(train)
    return train, valid


def write_demo(folder, seed: int = 0) -> dict[str, int]:
    """Write make_demo's pairs to train.parquet and valid.parquet. Returns their numbers by path."""
    counts = {}
    for name, pairs in zip(("train", "valid"), make_demo(seed)):
        path = str(Path(folder) / f"{name}.parquet")
        counts[path] = write_pairs(path, (dict(zip(PAIR, pair)) for pair in pairs))
    return counts


# --- clean: rules ---------------------------------------------------------------------------------

CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TO_CHINESE = dict(zip(",;:!?", "，；：！？"))
CLEAN_CHARS = 1 << 19  # characters that a worker cleans at a time, about
MIN_CHARS = 5  # of a response, by default


def drop_controls(text: str) -> str:
    """Line ends become \\n; other control characters, zero-width marks, lone surrogates go."""
    text = re.sub("\r\n?|[\u2028\u2029]", "\n", text)
    text = re.sub("[\x0b\x0c]", " ", text)
    return re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff"
                  r"\ud800-\udfff]", "", text)


def squeeze_punctuation(text: str) -> str:
    """。。。。 -> 。 and ！！！ -> ！. …… and —— stay pairs; ... and ;; stay as they are in code."""
    text = re.sub(rf"([。！？，、；：])\1+|(?<=[{CHINESE}])([,;])\2+", r"\1\2", text)
    text = re.sub(r"([!?～])\1{2,}|(?<=[^\s~])(~)~{2,}|\.{4,}",
                  lambda m: m[1] or m[2] or "...", text)
    return re.sub(r"([…—])\1{2,}", r"\1\1", text)


def squeeze_spaces(text: str) -> str:
    """Several spaces inside a line become one, several blank lines one. Indents stay."""
    text = re.sub(r"(?<=[^ \t\u3000\xa0\n])[ \t\u3000\xa0]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n \u3000")


def chinese_punctuation(text: str) -> str:
    """你好,世界. -> 你好，世界。 Only after a Chinese character, not before a digit or a letter."""
    text = re.sub(f"(?<=[{CHINESE}])[,;:!?](?=[{CHINESE}“‘《（\\s]|$)",
                  lambda m: TO_CHINESE[m[0]], text)
    return re.sub(f"(?<=[{CHINESE}])\\.(?=[{CHINESE}“‘《（\\n]|$)", "。", text)


# marks of a line of code, of a table, or with an address
CODE = re.compile(r"[{}<>=$\\|`\t]|://|\w\(\)|^ {4}|^~~~", re.MULTILINE)
CUT_OFF = re.compile(rf"[。！？!?][”’」』）)】》]*([^。！？!?\n]*[{CHINESE}，、])$")
LIST_ITEM = re.compile(r"\s*([-*•·#]|[（(]?[\d一二三四五六七八九十]+[、.．)）])")


def trim_unfinished(text: str, min_chars: int = 200) -> str:
    """Cut a long answer that breaks off in mid-sentence after the last whole sentence of its last
    line. Lists, code, numbers and text without sentences stay."""
    found = len(text) >= min_chars and CUT_OFF.search(text)
    line = text.rfind("\n") + 1
    if not found or LIST_ITEM.match(text, line) or CODE.search(text, line):
        return text
    return text[:found.start(1)]


def chinese_share(text: str) -> float:
    """Share of Chinese characters among letters and digits, 0 to 1; 1 for a text without any."""
    letters = sum(map(str.isalnum, text))
    return len(re.findall(f"[{CHINESE}]", text)) / letters if letters else 1.0


def clean_text(text: str) -> str:
    """All rules. Lines that look like code, tables or addresses keep punctuation and spaces."""
    lines = [line.rstrip(" \t\u3000\xa0") for line in drop_controls(text).split("\n")]
    text = "\n".join(lines)
    if not CODE.search(text):
        return chinese_punctuation(squeeze_spaces(squeeze_punctuation(text)))
    lines = [line if CODE.search(line) else chinese_punctuation(squeeze_punctuation(line))
             for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def clean_pair(prompt, response, min_chars: int, max_chars: int,
               verbatim: bool = False) -> tuple[str, str] | str:
    """The cleaned pair, or the reason why it is dropped. verbatim: do not change the response."""
    if not isinstance(prompt, str) or not isinstance(response, str):
        return "a field is missing or not text"
    if max(len(prompt), len(response)) > 100 * max_chars:  # no rule shortens it enough
        return f"over {max_chars} characters"
    prompt, response = clean_text(prompt), drop_controls(response)
    if not verbatim:
        response = trim_unfinished(clean_text(response))
    if not prompt or not response:
        return "empty"
    if "\ufffd" in prompt + response:
        return "has characters that could not be read"
    if prompt == response:
        return "response repeats the prompt"
    if len(response) < min_chars:
        return f"response under {min_chars} characters"
    if max(len(prompt), len(response)) > max_chars:
        return f"over {max_chars} characters"
    if chinese_share(prompt + response) < 0.3:
        return "mostly not Chinese"
    return prompt, response


# --- clean: sources -------------------------------------------------------------------------------
# Each function turns a raw row into (prompt, response), or (prompt, chosen, rejected) for
# preferences, or returns why the row is dropped.


def dice(a: str, b: str) -> float:
    """Similarity of the character sets of two texts: 2 |A and B| / (|A| + |B|)."""
    return 2 * len(set(a) & set(b)) / max(1, len(set(a)) + len(set(b)))


def joined(first, second) -> str | None:
    """Title and description, or instruction and input: both, unless one is empty or says the same
    as the other."""
    if not isinstance(first, str) or not isinstance(second or "", str):
        return None
    return first if not second or dice(first, second) >= 0.9 else f"{first}\n{second}"


def from_columns(first: str, second: str, response: str) -> Callable:
    """A function for a source whose prompt is in two columns."""
    return lambda row: (joined(row.get(first), row.get(second)), row.get(response))


def from_webtext(row: dict):
    try:
        if int(float(row.get("star") or 0)) < 5:
            return "fewer than 5 stars"
    except (TypeError, ValueError, OverflowError):
        return "star is not a number"
    return row.get("title"), row.get("content")


ROLES = dict.fromkeys(("human", "user", "prompter"), "user") | dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")


def is_conversation(row: dict) -> bool:
    return any(row.get(column) is not None for column in TURNS)


def read_turns(row: dict) -> list[tuple] | str:
    """The (question, answer) pairs of a conversation, or why it is not one. A system turn at its
    beginning and a last question without an answer are left out."""
    turns = turns_of(row)
    if not turns:
        return "conversations is not a list of from and value, or of role and content"
    if turns[0][0] == "system":
        del turns[0]
    unknown = [role for role, _ in turns if role not in ROLES]
    if unknown:
        return f"conversation with the unknown role {unknown[0][:20]!r}"
    roles, texts = [ROLES[role] for role, _ in turns], [text for _, text in turns]
    if len(turns) < 2 or {*roles[::2]} != {"user"} or {*roles[1::2]} != {"assistant"}:
        return "conversation in which human and assistant do not take turns"
    return list(zip(texts[::2], texts[1::2]))


def from_belle(row: dict):
    """The three published forms; of conversations those with one turn."""
    if is_conversation(row):
        turns = read_turns(row)
        if isinstance(turns, str):
            return turns
        if len(turns) > 1:
            return "conversation of several turns (see --turns)"
        prompt, response = turns[0]
    elif "target" in row and "output" not in row:
        prompt, response = row.get("input"), row["target"]
    else:
        prompt = joined(row.get("instruction") or "", row.get("input"))
        response = row.get("output")
    return "translation or table" if is_foreign(prompt) else (prompt, response)


def is_foreign(prompt) -> bool:
    words = ("翻译", "译成", "译为", "表格")
    return isinstance(prompt, str) and any(word in prompt for word in words)


def unescaped(text):
    """Replace the two characters \\n, which some files have for line breaks, in a text without real
    ones. Before a letter they stay: \\neq and \\nu are LaTeX."""
    if not isinstance(text, str) or "\n" in text:
        return text
    return re.sub(r"\\n(?![A-Za-z])", "\n", text)


def from_preference(row: dict):
    """Texts, or lists of messages: then chosen and rejected may repeat the prompt."""
    texts = []
    for name, most in (("prompt", 1), ("chosen", 2), ("rejected", 2)):
        text = row.get(name)
        if name == "rejected" and text is None:
            text = row.get("reject")
        if turns := turns_of({TURNS[0]: text}):
            if len(turns) > most:
                return f"{name} is a conversation of several turns"
            text = turns[-1][1]
        texts.append(unescaped(text))
    return tuple(texts)


def from_duie(row: dict):
    def value(x):
        return x["@value"] if isinstance(x, dict) else x

    try:
        triples = [f"({t['subject']},{t['predicate']},{value(t['object'])})"
                   for t in row["spo_list"]]
    except (KeyError, TypeError):
        return "no spo_list of subject, predicate, object"
    if not isinstance(row.get("text"), str):
        return "a field is missing or not text"
    prompt = f"请抽取出下面这句话中的所有三元组：{row['text']}"
    return prompt, f"[{','.join(triples)}]" if triples else ""


WIKI_PROMPTS = [
    "什么是%s？", "介绍一下%s。", "请介绍一下%s。", "%s是什么？", "请解释一下%s。", "你知道%s吗？", "说说%s。",
    "告诉我%s是什么。", "请简要介绍%s。", "%s指的是什么？", "我想了解%s。", "如何理解%s？", "能讲讲%s吗？", "关于%s，你知道些什么？",
    "%s是什么意思？", "请说明%s的含义。", "帮我查一下%s。", "谈谈%s。", "请问%s是什么？", "给我讲讲%s。", "词条：%s",
]


def from_wiki(row: dict):
    """An entry's title becomes a question, its first sentences (512 characters) the answer."""
    title, text = row.get("title"), row.get("text")
    if not isinstance(title, str) or not isinstance(text, str):
        return "a field is missing or not text"
    title, text = html.unescape(title).strip(), html.unescape(text)  # WikiExtractor escapes both
    if not title:
        return "entry without a title"
    first, _, rest = text.strip().partition("\n")
    text = rest.strip() if first.strip() == title else text.strip()  # the title is repeated there
    end = 1 + max(text.rfind(mark, 0, 512) for mark in "。！？\n")
    answer = text[:end] if len(text) > 512 else text
    choice = xxhash.xxh3_64_intdigest(title.encode("utf-8", "replace")) % len(WIKI_PROMPTS)
    return WIKI_PROMPTS[choice] % title, answer


class Source(NamedTuple):
    """A public data set. fields: alternatives; a row must have all fields of one of them."""
    convert: Callable
    fields: tuple[tuple[str, ...], ...]
    verbatim: bool = False  # do not change responses, however short

    @property
    def has_conversations(self) -> bool:
        return CONVERSATION[0] in self.fields

    def fits(self, row: dict) -> bool:
        return any(set(names) <= row.keys() for names in self.fields)

    def needs(self) -> str:
        """"instruction and output, or title, content and star" """
        forms = [" and ".join(list_columns(names).rsplit(", ", 1)) for names in self.fields]
        return ", or ".join(forms)


CONVERSATION = tuple((column,) for column in TURNS)
SOURCES = {
    "webtext2019zh": Source(from_webtext, (("title", "content", "star"),)),
    "baike_qa2019": Source(from_columns("title", "desc", "answer"), (("title", "answer"),)),
    "chinese_medical": Source(from_columns("title", "ask", "answer"), (("title", "answer"),)),
    "zhihu_kol": Source(lambda row: (row.get("INSTRUCTION"), row.get("RESPONSE")),
                        (("INSTRUCTION", "RESPONSE"),)),
    "belle": Source(from_belle, (("instruction", "output"), ("input", "output"),
                                 ("input", "target"), *CONVERSATION)),
    "sharegpt": Source(from_belle, CONVERSATION),
    "wiki": Source(from_wiki, (("title", "text"),)),
    "alpaca": Source(from_columns("instruction", "input", "output"), (("instruction", "output"),)),
    "duie": Source(from_duie, (("text", "spo_list"),), verbatim=True),
    "preference": Source(from_preference, (PREFERENCE, ("prompt", "chosen", "reject"))),
}


def read_wiki(f, bad: Callable) -> Iterator[dict]:
    """Title and text of every entry, in the form of either WikiExtractor: <doc ... title="..."> to
    </doc>, a line of JSON, or "title:", the text and a blank line."""
    head = f.peek(1 << 16)
    is_tagged = "<doc " in head or head.lstrip().startswith("{")
    return tagged_entries(f, bad) if is_tagged else titled_entries(f, bad)


def titled_entries(lines: Iterable[str], bad: Callable) -> Iterator[dict]:
    """A title is a line that ends with a colon, at the beginning or after a blank line. Other
    paragraphs belong to the entry before them."""
    title, text, after_blank = None, list[str](), True
    for i, line in enumerate(lines, 1):
        stripped = line.strip()
        if after_blank and stripped.endswith((":", "：")):
            if title is not None:
                yield {"title": title, "text": "".join(text)}
            title, text = stripped[:-1], []
        elif title is not None:
            text.append(line)
        elif stripped:
            bad("line outside an entry", i, "")
        after_blank = not stripped
    if title is not None:
        yield {"title": title, "text": "".join(text)}


def tagged_entries(lines: Iterable[str], bad: Callable) -> Iterator[dict]:
    title, text = None, list[str]()
    for i, line in enumerate(lines, 1):
        if begin := re.match(r'<doc [^>]*title="(.*?)"[^"]*>$', line.rstrip()):
            if title is not None:
                bad("entry without an end", i, "")
            title, text = begin[1], []
        elif title is not None and line.rstrip() == "</doc>":
            yield {"title": title, "text": "".join(text)}
            title = None
        elif title is not None:
            text.append(line)
        elif line.startswith("{"):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                bad("line is not JSON", i, "")
        elif line.strip():
            bad("line outside an entry", i, "")
    if title is not None:
        bad("entry without an end", i, "")


MEDICAL = ["department", "title", "ask", "answer"]


def read_medical(f, bad: Callable) -> Iterator[dict]:
    """The records of department,title,ask,answer. Many of them are broken over several lines, or
    have commas and quotes in a field without quotes, so csv would read other rows: a line that does
    not begin like a record belongs to the one before, and the last field takes extra commas."""
    def split_record(text: str) -> list[str]:
        try:
            fields = next(csv.reader([text]), [])
        except csv.Error:
            fields = []
        return fields if len(fields) == 4 else text.split(",", 3)

    names = next(csv.reader(f.peek(1 << 16).splitlines()[:1]), [])
    header = [name.strip() for name in names]
    if header != MEDICAL and set(MEDICAL[1:]) <= set(header):  # another order
        yield from read_csv(f, bad)
        return
    lines = enumerate(chain(f, [""]), 1)  # "": the end
    if header == MEDICAL:
        next(lines)
    record, first_line, departments = "", 1, set()
    for i, line in lines:
        head = line.split(",", 3)
        opens_quote = ',"' in line and line.count('"') % 2 == 1  # the record goes on
        looks_new = (0 < len(head[0].strip()) <= 12 and (len(head) == 4 or opens_quote)
                     and record.count('"') % 2 == 0)
        begins = not line or not record or head[0] in departments or looks_new
        if not begins:
            record += line
            continue
        fields = split_record(record.rstrip("\r\n").replace("\r\n", "\n"))
        if len(fields) == 4:
            if fields[0] != MEDICAL[0]:
                yield dict(zip(MEDICAL, fields))
        elif record.strip():
            bad("record with fewer than four fields", first_line, "")
        record, first_line = line, i
        if len(head) == 4:
            departments.add(head[0])


# for sources whose text files have a form of their own
PARSERS = {("wiki", ".txt"): read_wiki, ("chinese_medical", ".csv"): read_medical}


# --- clean: the command ---------------------------------------------------------------------------


SHORTENED = "prompt without its earliest turns, which do not fit in --max_chars"


@dataclass
class Cleaner:
    """The settings of a clean command. It is sent to background processes."""
    name: str  # of the source
    fields: tuple[str, ...]  # columns of prompt and response, for the source pairs
    min_chars: int
    max_chars: int
    to_simplified: bool
    turns: int  # questions in a prompt, at most

    @property
    def source(self) -> Source:
        if self.name == "pairs":
            return Source(lambda row: tuple(row.get(f) for f in self.fields), (self.fields,))
        return SOURCES[self.name]

    def check(self, path: Path, rows: list[dict]) -> None:
        """Raise ValueError if none of a file's first rows has the fields of the source. Print a
        note if --turns has no effect on the file."""
        if self.turns > 1 and not any(map(is_conversation, rows)):
            note_once(f"note: {path} has no conversations: --turns has no effect on it")
        if not any(map(self.source.fits, rows)):
            hint = " (name them with --prompt_field and --response_field)"
            raise ValueError(f"{path}: {self.name} needs {self.source.needs()}; found "
                             f"{list_columns(rows[0])}{hint if self.name == 'pairs' else ''}")

    def clean_rows(self, job: tuple[Path, int, list[dict]]) -> tuple[list, list, list]:
        """job: a file, the number of its first row, and rows. Returns three lists: the cleaned
        rows; (reason, where) of each dropped row; (reason, where) of what was left out of a row."""
        source, (path, first, rows) = self.source, job
        kept, dropped, left_out = [], [], []
        for i, row in enumerate(map(without_nan, rows), first):
            where = f"{path}, row {i:,}"
            has_turns = self.turns > 1 and is_conversation(row)
            pairs = self.split_turns(row) if has_turns else [(source.convert(row), False)]
            roles = [role for role, _ in turns_of(row)] if source.has_conversations else []
            if roles[:1] == ["system"]:
                left_out.append(("system turn, left out", where))
            if self.name != "pairs":
                left_out += [(f"column {name}, left out", where)
                             for name in ("system", "history") if row.get(name)]
            if not isinstance(pairs[0][0], str) and ROLES.get(roles[-1] if roles else "") == "user":
                dropped.append(("last question has no answer", where))
            for texts, is_shortened in pairs:
                cleaned = texts if isinstance(texts, str) else self.clean_texts(*texts)
                if isinstance(cleaned, str):
                    dropped.append((cleaned, where))
                    continue
                kept.append(dict(zip(PAIR if len(cleaned) == 2 else PREFERENCE, cleaned)))
                if is_shortened:
                    left_out.append((SHORTENED, where))
        return kept, dropped, left_out

    def clean_texts(self, prompt, *responses) -> tuple[str, ...] | str:
        """What a source returned, cleaned, or why the row is dropped."""
        prompt, cleaned, verbatim = self.convert(prompt), [], self.source.verbatim
        shortest = 1 if verbatim else self.min_chars
        for i, response in enumerate(responses):
            pair = clean_pair(prompt, self.convert(response), shortest, self.max_chars, verbatim)
            if isinstance(pair, str):
                return f"rejected: {pair}" if i else pair
            prompt, response = pair
            if response in cleaned:
                return "chosen and rejected are equal"
            cleaned.append(response)
        return prompt, *cleaned

    def convert(self, text):
        """A raw text without a final [EOS], and in simplified characters if that was asked for."""
        if not isinstance(text, str):
            return text
        if text.rstrip().endswith("[EOS]"):  # the tokenizer adds it
            text = text.rstrip().removesuffix("[EOS]")
        # OpenCC refuses lone surrogates
        return opencc().convert(drop_controls(text)) if self.to_simplified else text

    def split_turns(self, row: dict) -> list[tuple[Any, bool]]:
        """A pair for every answer of a conversation, or the reason why there is none; and whether
        its prompt was shortened. The prompt is the question, after up to turns - 1 earlier ones
        with their answers, joined with [SEP]: as many as fit in max_chars. A turn without text is
        dropped, and the history begins anew."""
        turns = read_turns(row)
        if isinstance(turns, str):
            return [(turns, False)]
        pairs: list[tuple[Any, bool]] = []
        history: list[str] = []  # question, answer, question, ...
        for question, answer in turns:
            texts = [self.convert(text) for text in (question, answer)]
            usable = all(isinstance(t, str) and len(t) <= 100 * self.max_chars for t in texts)
            if usable:
                question, answer = (clean_text(text.replace(SEP, " ")) for text in texts)
                answer = trim_unfinished(answer)
            if not usable or not question or not answer:
                pairs.append(((question, answer), False))  # clean_texts drops and counts it
                history = []
                continue
            # turns > 1 here: the last turns - 1 questions and answers, then this question
            whole = asked = [*history[2 - 2 * self.turns:], question]
            while len(asked) > 1 and len(SEP.join(asked)) > self.max_chars:
                asked = asked[2:]
            pair = "translation or table" if is_foreign(question) else (SEP.join(asked), answer)
            pairs.append((pair, len(asked) < len(whole)))
            history += [question, answer]
        return pairs


def without_nan(row: dict) -> dict:
    """NaN, as pandas writes missing values, becomes None."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in row.items()}


@functools.cache
def opencc():
    """OpenCC's converter from traditional to simplified characters."""
    try:
        return importlib.import_module("opencc").OpenCC("t2s")
    except ImportError:
        raise ValueError("--to_simplified needs OpenCC:  pip install opencc") from None


def clean(inputs: list[str], source: str, out: str, fields: tuple[str, ...], min_chars: int,
          max_chars: int, workers: int, to_simplified: bool = False, turns: int = 1) -> None:
    """Clean the pairs of a source into the Parquet file `out`, and print how many rows each reason
    dropped. Raises ValueError if no row is kept, or a file does not fit the source."""
    made_of = recipe(f"clean {source}", inputs)
    check_outputs(inputs, [Path(out)], made_of)
    cleaner = Cleaner(source, fields, min_chars, max_chars, to_simplified, turns)
    files, counts, left_out = input_files(inputs, [out]), Problems(), Problems()
    problems = Problems(files)
    if to_simplified:
        opencc()  # fails early
    if turns > 1 and not cleaner.source.has_conversations:
        raise ValueError("--turns is for sources with conversations: belle and sharegpt")

    def jobs() -> Iterator[tuple[Path, int, list[dict]]]:
        for path in files:
            first = 1
            raw = read_file(path, problems, skip=True, is_only=len(files) == 1,
                            parse=PARSERS.get((source, file_kind(path))))
            for rows in batches(raw, CLEAN_CHARS, row_chars):
                if first == 1:
                    cleaner.check(path, rows)
                yield path, first, rows
                first += len(rows)

    with open_writer(out, PREFERENCE if source == "preference" else PAIR, made_of) as writer:
        progress = Progress()
        for kept, dropped, others in ordered_map(cleaner.clean_rows, jobs(), workers):
            for row in kept:
                writer.write(row)
            counts["kept"] += len(kept)
            for reason, where in dropped:
                counts.note(reason, where)
            for reason, where in others:
                left_out.note(reason, where)
            progress.show(f"{counts.total():,} rows", problems.share())
        progress.clear()
        # bad lines are rows too; bad characters and unread columns are not
        for reason in [r for r in problems if not r.startswith(("character", "column"))]:
            counts.note(reason, problems.first[reason], problems.pop(reason))
        report(counts, problems)
        left_out.warn()
        if not counts:
            raise ValueError(f"{' '.join(inputs)} has no rows; nothing was written")
        if not counts["kept"]:
            raise ValueError(f"no row was kept, and nothing was written; is {' '.join(inputs)} of "
                             f"the source {source}?")


# --- dedup ----------------------------------------------------------------------------------------

SHINGLE, BINS = 5, 128  # characters per shingle, values per signature
EMPTY_BIN, HASH_FACTOR = np.uint32(0xFFFFFFFF), 0x9E3779B97F4A7C15
# 64 permutations of the bins: from which bin an empty one copies
DONORS = np.random.default_rng(1).permuted(np.tile(np.arange(BINS), (64, 1)), axis=1)
BATCH_CHARS = 1 << 18  # texts are compared in batches of about this many characters
# candidates of a text: the first 4 and the previous 2 of each bucket, at most 32 in total
COMPARE_FIRST, COMPARE_PREVIOUS, MAX_CANDIDATES = 4, 2, 32
EQUAL, NEAR = "equal to an earlier one", "near-duplicate of an earlier one"


def to_codepoints(text: str) -> np.ndarray:
    """The codepoints of a string, uint32; lone surrogates become U+FFFD."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    surrogate = codes - np.uint32(0xD800) < 0x800
    return np.where(surrogate, np.uint32(0xFFFD), codes) if surrogate.any() else codes


def round_up(n: Any, multiple: int) -> Any:
    """The next multiple that is at least n, a number or an array: 17, 8 -> 24"""
    return -(-n // multiple) * multiple


def joined_ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """begins [5, 1], sizes [3, 2] -> [5, 6, 7, 1, 2]"""
    return np.arange(sizes.sum()) + np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)


@functools.cache
def compared_chars() -> np.ndarray:
    """(0x110000,) bool: False for punctuation, spaces, control and format characters."""
    ignored = ("P", "Z", "Cc", "Cf")
    table = np.ones(0x110000, dtype=bool)
    table[:0x20000] = [not unicodedata.category(chr(c)).startswith(ignored)
                       for c in range(0x20000)]
    table[0] = True  # the gaps of `shingles`
    return table


def shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (uint64) of the character 5-grams of all texts, one text after the other, and the
    number of each text (N,).

    Punctuation and spaces are left out. A shorter text is one shingle, padded with zeros; an empty
    one has none.
    """
    gap = "\0" * (SHINGLE - 1)  # after every text: no shingle reads into the next one
    texts = [text.replace("\0", "") + gap for text in texts]
    codes = to_codepoints("".join(texts))
    codes = codes[compared_chars()[codes]].astype(np.uint64)
    gaps = np.flatnonzero(codes == 0).reshape(-1, len(gap))  # a row of positions for each text
    begins = np.append(0, gaps[:, -1] + 1)[:-1]
    sizes = gaps[:, 0] - begins
    counts = np.where(sizes > 0, np.maximum(sizes - SHINGLE + 1, 1), 0)
    # a polynomial in the factor, of the 5 characters from each position on
    factor, square = np.uint64(HASH_FACTOR), np.uint64(HASH_FACTOR ** 2 % 2 ** 64)
    pair = codes[:-1] * factor + codes[1:]
    hashes = (pair[:-3] * square + pair[2:-1]) * factor + codes[4:]
    hashes = hashes[joined_ranges(begins, counts)]
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    return hashes, counts


def minhash(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Signatures (N, 128) uint32, whose share of equal values estimates the Jaccard similarity, and
    shingle counts (N,).

    Each shingle hash gives a bin and a value, and a bin keeps its minimum (one permutation). Each
    empty bin then copies from the bin that the next random permutation assigns to it, until all are
    full (Shrivastava 2017, arXiv:1703.04664).

        with permutations 1 0 3 2 and 2 3 0 1:    5 . . 7 -> 5 5 7 7
                                                  . . . 7 -> . . 7 7 -> 7 7 7 7
    """
    hashes, counts = shingles(texts)
    place = np.repeat(np.arange(len(texts)) * BINS, counts)
    place += (hashes >> np.uint64(57)).view(np.int64)
    flat = np.full(len(texts) * BINS, EMPTY_BIN)
    np.minimum.at(flat, place, (hashes & np.uint64(0x7FFFFFFF)).astype(np.uint32))
    signatures = flat.reshape(-1, BINS)
    for donor in DONORS[:6]:
        np.copyto(signatures, signatures[:, donor], where=signatures == EMPTY_BIN)
    for donor in DONORS[6:]:  # few texts still have empty bins
        rows = np.flatnonzero((signatures == EMPTY_BIN).any(1) & (counts > 0))
        if not len(rows):
            break
        part = signatures[rows]
        signatures[rows] = np.where(part == EMPTY_BIN, part[:, donor], part)
    return signatures, counts


def banding(threshold: float) -> tuple[int, int]:
    """(bands, values per band): the strictest that finds 99 % of the pairs at the threshold t, by
    1 - (1 - t^values)^bands."""
    rows = max(r for r in range(1, 65)
               if r == 1 or 1 - (1 - threshold ** r) ** (BINS // r) >= 0.99)
    return BINS // rows, rows


def sketch(texts: list[str], bands: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each whole text (N,) uint64, and keys of its bands (bands, N) uint32."""
    digests = (xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts)
    exact = np.fromiter(digests, np.uint64, len(texts))
    signatures, counts = minhash(texts)
    keys = np.zeros((len(texts), bands), dtype=np.uint64)
    for i in range(rows):  # band k has the values k, k + bands, k + 2 bands, ...
        keys = (keys ^ signatures[:, i * bands:(i + 1) * bands]) * np.uint64(HASH_FACTOR)
        keys ^= keys >> np.uint64(32)
    keys[counts == 0] = exact[counts == 0, None]  # no shingles: only an equal text matches
    return exact, keys.T.astype(np.uint32)


def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Two arrays of 32-bit numbers -> one of uint64, which sorts by high, then by low."""
    return high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The twin of pack: high and low, int64."""
    return ((packed >> np.uint64(32)).view(np.int64),
            (packed & np.uint64(0xFFFFFFFF)).view(np.int64))


def run_begins(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin: [5, 5, 7, 9, 9] -> [0, 2, 3]"""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])[:len(values)])


def place_in_run(values: np.ndarray) -> np.ndarray:
    """Sorted values -> how many equal ones come before each: [7, 7, 7, 9] -> [0, 1, 2, 0]"""
    begins = run_begins(values)
    return np.arange(len(values)) - np.repeat(begins, np.diff(begins, append=len(values)))


def bucket_pairs(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """keys (N,) of one band, of the texts `rows` (N,). Texts with equal keys are in one bucket.
    Returns the pairs to compare, (later, earlier) packed:

        keys 7 9 7 7, rows 0 1 2 5  ->  bucket of 7: texts 0 2 5  ->  (2, 0) (5, 2) (5, 0)

    A pair may come more than once. Large buckets give only some of their pairs: a text is paired
    with the COMPARE_PREVIOUS texts before it and with the COMPARE_FIRST first ones.
    """
    packed = np.sort(pack(keys, rows))
    key = packed >> np.uint64(32)
    same = np.concatenate([[False], key[1:] == key[:-1], [False]])
    key, row = unpack(packed[same[:-1] | same[1:]])  # without texts that are alone in their bucket
    place = place_in_run(key)
    pairs = []
    for distance in range(1, COMPARE_PREVIOUS + 1):
        later = np.flatnonzero(place >= distance)
        pairs.append(pack(row[later], row[later - distance]))
    for first in range(COMPARE_FIRST):
        later = np.flatnonzero(place > first)
        pairs.append(pack(row[later], row[later - place[later] + first]))
    return np.concatenate(pairs)


def find_candidates(exact: np.ndarray,
                    bands: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """exact: (N,) hashes of texts; then the keys (N,) of every band. Returns first (N,), True for
    the first of equal texts, and candidate pairs: later (M,) and earlier (M,) int64, sorted."""
    first = np.zeros(len(exact), dtype=bool)
    first[np.unique(exact, return_index=True)[1]] = True
    rows, pairs = np.flatnonzero(first), np.empty(0, np.uint64)
    for keys in bands:
        pairs = np.unique(np.concatenate([pairs, bucket_pairs(keys[first], rows)]))
        later, n = pairs >> np.uint64(32), MAX_CANDIDATES  # keep the first n of each later text
        pairs = pairs[np.append(np.ones(n, bool), later[n:] != later[:-n])[:len(pairs)]]
    return first, *unpack(pairs)


def shingle_sets(texts: list[str]) -> list[np.ndarray]:
    """The distinct shingles of each text, as 32-bit hashes, sorted."""
    hashes, counts = shingles(texts)
    owner = np.arange(len(texts), dtype=np.uint64) << np.uint64(32)
    packed = np.unique(np.repeat(owner, counts) | hashes >> np.uint64(32))
    return np.split(packed.astype(np.uint32), np.searchsorted(packed, owner[1:]))


def jaccard(left: list[np.ndarray], right: list[np.ndarray]) -> np.ndarray:
    """(M,) similarities of M pairs of sets: intersection over union."""
    sizes = np.array([len(a) + len(b) for a, b in zip(left, right)], dtype=np.int64)
    sets = chain.from_iterable(zip(left, right))
    both = np.concatenate([np.empty(0, np.uint32), *sets]).astype(np.uint64)
    both |= np.repeat(np.arange(len(sizes), dtype=np.uint64) << np.uint64(32), sizes)
    both.sort()
    shared = both[1:][both[1:] == both[:-1]] >> np.uint64(32)
    common = np.bincount(shared.astype(np.int64), minlength=len(sizes))
    return common / (sizes - common)


def find_duplicates(items: Iterable, text_of: Callable, threshold: float,
                    against: Sequence[str], workers: int) -> Iterator[tuple[Any, str]]:
    """Yield every item with "" if it stays, else the reason: its text equals an earlier one, or has
    at least the Jaccard similarity `threshold` to an earlier one that stays. MinHash finds
    candidates, and their exact similarity decides. The texts of `against` come before all items.
    Both are iterated over twice: for the sketches (8 bytes per text and 4 per band), then to
    compare."""
    # freeing a block of 16 MB makes glibc keep smaller freed blocks, for the next batch
    np.empty(1 << 24, np.uint8)
    bands, rows = banding(threshold)
    texts = batches(chain(against, map(text_of, items)), BATCH_CHARS)
    sketcher = functools.partial(sketch, bands=bands, rows=rows)
    sketches = list(ordered_map(sketcher, texts, workers, threads=True))
    if not sketches:
        return
    exact = np.concatenate([exact for exact, _ in sketches])
    keys = (np.concatenate([keys[band] for _, keys in sketches]) for band in range(bands))
    candidates = find_candidates(exact, keys)
    del sketches, keys
    pairs = chain(((text, None) for text in against), ((text_of(item), item) for item in items))
    jobs = batches(pairs, BATCH_CHARS, lambda pair: len(pair[0]))
    yield from islice(compare(jobs, *candidates, threshold), len(against), None)


def compare(jobs: Iterable[list[tuple[str, Any]]], first: np.ndarray, later: np.ndarray,
            earlier: np.ndarray, threshold: float) -> Iterator[tuple[Any, str]]:
    """Batches of (text, item) -> every item with the reason why it is dropped, "" if it stays.
    first, later, earlier: see find_candidates. Only the shingles of texts that a later one may
    still be compared with stay in memory."""
    keep = first.copy()  # (N,), final for the texts of earlier batches
    last_use = np.zeros(len(first), dtype=np.uint32)  # 0: it is never compared
    last_use[later] = later
    last_use[earlier] = later  # later is sorted, so the last one remains
    sets: dict[int, np.ndarray] = {}  # number of a text -> its shingles
    begin = 0
    for batch in jobs:
        end = begin + len(batch)
        held = begin + np.flatnonzero(last_use[begin:end])
        if len(held):
            sets.update(zip(held.tolist(), shingle_sets([batch[i - begin][0] for i in held])))
        pairs = np.arange(*np.searchsorted(later, [begin, end]))
        # cheap pass: one candidate per text, from before this batch, settles most duplicates
        settled = pairs[(earlier[pairs] < begin) & (place_in_run(later[pairs]) == 0)]
        for part in (settled, pairs):
            alive = part[keep[earlier[part]] & keep[later[part]]]
            left, right = earlier[alive].tolist(), later[alive].tolist()
            similar = jaccard([sets[i] for i in left], [sets[j] for j in right])
            near = (similar >= threshold).tolist()
            for i, j in compress(zip(left, right), near):  # by j, so keep[i] is final
                keep[j] &= ~keep[i]
        sets = {i: found for i, found in sets.items() if last_use[i] >= end and keep[i]}
        reasons = np.select([keep[begin:end], first[begin:end]], ["", NEAR], EQUAL).tolist()
        yield from ((item, reason) for (_, item), reason in zip(batch, reasons))
        begin = end


def dedup_indices(texts: Iterable[str], threshold: float = 0.85, against: Iterable[str] = (),
                  workers: int | None = None) -> np.ndarray:
    """Sorted indices (int64) of the texts to drop: near-duplicates of an earlier one that stays, or
    of a text of `against`. threshold: Jaccard similarity of character 5-grams, above 0, up to 1.
    workers: threads (default: one per core)."""
    texts = texts if isinstance(texts, list) else list(texts)
    found = find_duplicates(texts, str, threshold, list(against), workers or os.cpu_count() or 1)
    return np.flatnonzero(np.fromiter((reason != "" for _, reason in found), bool, len(texts)))


def pair_rows(paths: list[str], outputs: list[Path], made_of: str) -> Rows:
    """The rows of pairs or preferences, whichever the files have."""
    check_outputs(paths, outputs, made_of)
    rows = Rows(paths, skip=True, outputs=outputs)
    columns = list(next(iter(rows), {}))
    rows.columns = PREFERENCE if set(PREFERENCE) <= set(columns) else PAIR
    return rows


def row_text(row: dict, columns: tuple[str, ...]) -> str:
    return "\n".join([row[column] for column in columns])


def dedup(inputs: list[str], out: str, threshold: float, against: str | None, workers: int) -> None:
    """Write the rows of inputs without near-duplicates to the file `out`. threshold: Jaccard
    similarity of 5-grams, above 0, up to 1. against: its near-duplicates are dropped too."""
    made_of, others, counts = recipe("dedup", inputs), [], Problems()
    rows = pair_rows(inputs, [Path(out)], made_of)
    if against:
        other_rows = pair_rows([against], [Path(out)], made_of)
        if other_rows.columns != rows.columns:
            raise ValueError(f"--against {against} has {', '.join(other_rows.columns)}, and the "
                             f"input has {', '.join(rows.columns)}: they cannot be compared")
        others = [row_text(row, other_rows.columns) for row in other_rows]
        refuse_empty(len(others), [against], other_rows.problems)
        other_rows.problems.warn()
    found = find_duplicates(Progress("rows", rows, passes=2),
                            lambda row: row_text(row, rows.columns), threshold, others, workers)
    with open_writer(out, rows.columns, made_of) as writer:
        for row, reason in found:
            counts[reason or "kept"] += 1
            if not reason:
                writer.write(row)
        refuse_empty(counts.total(), inputs, rows.problems)
        if not counts["kept"]:
            report(counts, rows.problems)
            raise ValueError(f"every row is in --against {against}, or nearly: nothing was written")
    report(counts, rows.problems)
    rows.note_columns()


# --- split, stats ---------------------------------------------------------------------------------


def split(inputs: list[str], out: str, valid: float, test: float, seed: int = 0) -> None:
    """Split by a hash of the prompt: equal prompts are on the same side, and a row stays on its
    side when data is added. valid, test: shares, 0 to 1. seed: of the hash. Raises ValueError if
    nothing is left to train on, or no row can be used."""
    if valid + test >= 1:
        raise ValueError(f"--valid {valid} and --test {test} leave nothing to train on")
    shares = {"train": 1.0, "valid": valid, "test": test}
    ends = {"test": test, "valid": test + valid, "train": math.inf}
    paths = {side: Path(out) / f"{side}.parquet" for side in shares}
    made_of, counts = recipe("split", inputs), Problems()
    rows = pair_rows(inputs, list(paths.values()), made_of)
    with contextlib.ExitStack() as stack:
        writers = {side: stack.enter_context(open_writer(paths[side], rows.columns, made_of))
                   for side, share in shares.items() if share}
        for row in Progress("rows", rows):
            prompt = row["prompt"].encode("utf-8", "surrogatepass")
            digest = xxhash.xxh3_64_intdigest(prompt, seed)
            side = next(side for side, end in ends.items() if digest / 2 ** 64 < end)
            writers[side].write(row)
        for writer in writers.values():
            writer.finish()  # all of them, before the first one is renamed
            counts[str(writer.path)] = writer.total
        refuse_empty(counts.total(), inputs, rows.problems)
        cause = ("there are too few prompts for its share, or they are one side of an earlier "
                 "split, by the same hash: choose another --seed")
        if not writers["train"].total:
            raise ValueError(f"{paths['train']} would have no rows: {cause}")
    report(counts, rows.problems)
    rows.note_columns()
    for side in ("valid", "test"):
        if side not in writers and paths[side].exists():
            note_once(f"warning: {paths[side]} is of an earlier split, and its rows may be in "
                      "train.parquet now")
    for writer in writers.values():
        if not writer.total:
            note_once(f"warning: {writer.path} has no rows: {cause}")


def stats(inputs: list[str], tokenizer=None) -> None:
    """Print rows, characters, a histogram of lengths and, with a Tokenizer, tokens."""
    rows, total = Rows(inputs, skip=True), 0
    lengths: dict[str, Counter[int]] = {}
    tokens: Counter[str] = Counter()
    known, others = (*PREFERENCE, "response", "text"), dict[str, None]()
    for batch in batches(Progress("rows", rows), CLEAN_CHARS, row_chars):
        total += len(batch)
        columns = dict.fromkeys(c for row in batch for c in row)
        others |= dict.fromkeys(c for c in columns if c not in known)
        for column in [c for c in columns if c in known]:
            texts = [row[column] for row in batch if isinstance(row.get(column), str)]
            lengths.setdefault(column, Counter()).update(map(len, texts))
            if tokenizer and texts:
                tokens[column] += len(tokenizer.encode_arrays(texts)[0])
    print(f"{total:,} rows in {len(rows.files)} files")
    for column, counter in lengths.items():
        count, chars = counter.total(), sum(n * c for n, c in counter.items())
        if total > count:
            print(f"\n{column}: {total - count:,} rows have no text here")
        if not count:
            continue
        line = f"\n{column}: {chars:,} characters, {chars / count:.1f} per row"
        if tokenizer:
            line += f"; {tokens[column]:,} tokens, {tokens[column] / count:.1f} per row"
        print(line)
        edges = [1024, 512, 256, 128, 64, 32, 16, 8, 1, 0]
        bars: Counter[int] = Counter()
        for n, c in counter.items():
            bars[next(edge for edge in edges if edge <= n)] += c
        for edge, bar in sorted(bars.items()):
            print(f"{edge:>7}+ {bar:>11,} {'█' * max(1, round(50 * bar / max(bars.values())))}")
    if others:
        note_once(f"note: only {', '.join(known)} are counted, not {list_columns(others)}")
    rows.problems.warn()


# --- PairStream -----------------------------------------------------------------------------------

WINDOW_ROWS, WINDOW_BYTES = 1 << 16, 1 << 25  # rows are shuffled within windows of this size
SLICE_ROWS = 1024  # rows that are read and tokenized at a time
MAX_CHARS_PER_TOKEN = 16  # texts are cut to max_len times this before they are tokenized


def open_parquet(path, columns: tuple[str, ...]):
    """A pyarrow ParquetFile. Raises FileNotFoundError, or ValueError for a damaged file or one that
    does not have the columns as text."""
    pa = arrow()
    check_name(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    refuse_pointer(path)
    try:
        file = pa.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"{path} is not a whole Parquet file: {e}") from None
    names = file.schema_arrow.names
    for column in columns:
        if column not in names:
            raise ValueError(f"{path} has no column {column!r}; it has {list_columns(names)}")
        if names.count(column) > 1:
            raise ValueError(f"{path} has the column {column!r} twice")
        kind = file.schema_arrow.field(column).type
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        if text not in (pa.string(), pa.large_string(), pa.string_view()):
            raise ValueError(f"{path}: column {column!r} holds {kind}, not text")
    return file


def text_bytes(file, group: int, columns: tuple[str, ...]) -> int:
    """Bytes of the columns in a row group of a ParquetFile, before compression. Equal texts may
    count once."""
    meta = file.metadata.row_group(group)
    parts = [meta.column(i) for i in range(meta.num_columns)]
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema in columns)


class Slice(NamedTuple):
    """Rows of a row group: a whole one, or a part of a very large one."""
    path: str
    group: int
    begin: int  # first row in the row group
    rows: int
    before: int  # rows before it in all files
    share: float  # of a window


@dataclass
class Window:
    """Tokenized rows, and how they are divided into batches."""
    columns: list[tuple[np.ndarray, np.ndarray]]  # ids of all rows, and offsets (rows + 1,)
    numbers: np.ndarray  # (rows,) their numbers in all files
    batches: list[np.ndarray]  # rows of each batch
    first_unusable: str  # where the first row without text is; "" if there is none


# the open reader of a row group: (path, group, columns) -> rows read so far, remaining batches
readers: dict[tuple[str, int, tuple[str, ...]], tuple[int, Iterator]] = {}


def read_slice(piece: Slice, columns: tuple[str, ...]):
    """A pyarrow Table of the rows of a slice, without holding the whole row group. The rest stays
    open for the next slice."""
    pa = arrow()
    key = piece.path, piece.group, columns
    at, batches = readers.pop(key, (0, None))
    if batches is None or at > piece.begin:
        file = pa.parquet.ParquetFile(piece.path, pre_buffer=False, buffer_size=1 << 20)
        at, batches = 0, file.iter_batches(SLICE_ROWS, row_groups=[piece.group],
                                           columns=list(columns), use_threads=False)
    taken, end = [], piece.begin + piece.rows
    while at < end and (batch := next(batches, None)) is not None:
        if at >= piece.begin:
            taken.append(batch)
        at += len(batch)
    readers.clear()  # one is enough: slices of a row group are read in order
    readers[key] = at, batches
    table = pa.Table.from_batches(taken).slice(0, piece.rows)
    return pa.table({column: table[column].cast("large_string") for column in columns})


def read_window(job: tuple[list[Slice], list[int]], columns: tuple[str, ...], tokenizer: Any,
                max_len: int, micro_batch_tokens: int, round_to: int) -> Window:
    """Read and tokenize the rows of a window, without those that have no text in a column. job:
    its slices, and the seed of the order of its batches."""
    pa, (slices, seed) = arrow(), job
    tables, numbers, unusable = [], [], ""
    for piece in slices:
        try:
            table = read_slice(piece, columns)
            table.validate(full=True)  # also for text that is not UTF-8
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{piece.path}: row group {piece.group} cannot be read: "
                             f"{' '.join(str(e).split())}") from None
        usable = np.ones(len(table), dtype=bool)
        for column in table.columns:
            has_text = pa.compute.greater(pa.compute.binary_length(column), 0)
            usable &= has_text.fill_null(False).to_numpy()
        if not usable.all() and not unusable:
            row = piece.begin + int(usable.argmin()) + 1
            unusable = f"{piece.path}, row group {piece.group}, row {row:,}"
        tables.append(table.filter(pa.array(usable)))
        numbers.append(piece.before + np.flatnonzero(usable))
    texts = pa.concat_tables(tables).columns
    ids = [tokenize_column(column, tokenizer, max_len) for column in texts]
    lengths = np.stack([np.diff(offsets) for _, offsets in ids], axis=1)
    plan = plan_batches(round_up(lengths, round_to), micro_batch_tokens,
                        np.random.default_rng(seed))
    return Window(ids, np.concatenate(numbers), plan, unusable)


def tokenize_column(column, tokenizer, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all texts, each cut to max_len with [EOS] at its end, and offsets (rows + 1,)."""
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    ids, sizes = [np.empty(0, dtype)], [np.zeros(1, np.int64)]
    for at in range(0, len(column), SLICE_ROWS):
        texts = column.slice(at, SLICE_ROWS).to_pylist()
        texts = [text[:MAX_CHARS_PER_TOKEN * max_len] for text in texts]
        flat, lengths = tokenizer.encode_arrays(texts)
        cut = np.minimum(lengths, max_len)
        flat = flat[joined_ranges(np.cumsum(lengths) - lengths, cut)]
        flat[np.cumsum(cut) - 1] = EOS
        ids.append(flat.astype(dtype))
        sizes.append(cut)
    return np.concatenate(ids), np.cumsum(np.concatenate(sizes))


def plan_batches(lengths: np.ndarray, budget: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Divide rows into batches of similar lengths: token counts (N, columns) -> arrays of row
    numbers, in random order.

    A batch of B rows, padded to the longest in each column, has at most `budget` cells,
    B * (S + T). All rows are cut in two by the length of one column: where the padded cells of both
    halves, plus a cost per batch, are fewest. The halves are cut in the same way, until each fits.

        T |  . .  |  .          a cut by S, then one by T in each half:
          |-. . --|             rows of similar S and T stay together
          |  . .  |- . -
          +------------- S
    """
    found, halves = [], [rng.permutation(len(lengths))]
    while halves and len(lengths):
        rows = halves.pop()
        if len(rows) * lengths[rows].max(0).sum() <= budget:
            found.append(rows)
        else:
            halves += cut_rows(rows, lengths[rows], budget)
    return [found[i] for i in rng.permutation(len(found))]


def cut_rows(rows: np.ndarray, lengths: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest cut of plan_batches. rows: (N,), with lengths (N, columns)."""
    best, cut, below = np.inf, (rows, rows), np.arange(1, len(rows))
    for column in range(lengths.shape[1]):
        order = np.argsort(lengths[:, column], kind="stable")
        width = lengths[order]
        from_left = np.maximum.accumulate(width)[:-1]
        from_right = np.maximum.accumulate(width[::-1])[-2::-1]
        cost = np.zeros(len(below))
        for count, widest in ((below, from_left), (below[::-1], from_right)):
            cells = widest.sum(1)
            # padded cells, and 0.3 of a full batch for every batch that this half needs
            cost += count * cells + 0.3 * budget * -(-count // (budget // cells))
        least = np.flatnonzero(cost == cost.min())
        at = least[np.abs(least - len(rows) // 2).argmin()]  # of equal ones the most even
        if cost[at] < best:
            best, cut = cost[at], (rows[order[:at + 1]], rows[order[at + 1:]])
    return cut


def slice_row_groups(files: list[str], columns: tuple[str, ...]) -> list[list[Slice]]:
    """Divide every row group of the files into slices that fit a window."""
    row_groups, before = [], 0
    for path in files:
        file = open_parquet(path, columns)
        for g in range(file.num_row_groups):
            rows = file.metadata.row_group(g).num_rows
            share = max(rows / WINDOW_ROWS, text_bytes(file, g, columns) / WINDOW_BYTES)
            parts = max(1, math.ceil(share))
            step = max(1, math.ceil(rows / parts / SLICE_ROWS)) * SLICE_ROWS
            slices = []
            for at in range(0, rows, step):
                n = min(step, rows - at)
                slices.append(Slice(path, g, at, n, before + at, share * n / rows))
            row_groups.append(slices)
            before += rows
    if not before:
        raise ValueError(f"{', '.join(files)}: no rows")
    return row_groups


class Place(NamedTuple):
    """The place of a batch in the sequence. If batch is beyond its window, the rest is counted in
    the following windows."""
    epoch: int = 0
    window: int = 0
    batch: int = 0


class PairStream:
    """An endless sequence of batches, epoch after epoch: dicts of int64 tensors.

    input_ids and attention_mask (B, S), padding 0; labels (B, T), padding -100;
    B * (S + T) <= micro_batch_tokens. With columns prompt, chosen, rejected: chosen_labels and
    rejected_labels in place of labels, both within the limit, and rows (B,), their numbers in all
    files. S and T are multiples of round_to, for compiled kernels.

    A training step takes a group of G batches; rank r of W takes numbers r, r + W, ... of it. Every
    rank tokenizes every window, so ranks never wait for each other here.

        batches  b b b b | b b b b | ...        G = 4, W = 2
        rank     0 1 0 1 | 0 1 0 1 | ...

    state is the Place of the next group, as a dict. It advances just before the last batch of a
    group is yielded, so a checkpoint after that step does not repeat the group.

    Rows without text in a column are skipped and reported once. Raises FileNotFoundError or
    ValueError (see open_parquet), and ChildProcessError if a background process was killed.
    """

    def __init__(self, files, tokenizer, micro_batch_tokens: int = 8192, max_len: int = 320,
                 seed: int = 0, rank: int = 0, world_size: int = 1, state: dict | None = None,
                 group: int | None = None, columns: tuple[str, ...] = PAIR, workers: int = 0,
                 round_to: int = 1):
        """max_len: tokens per side with [EOS]; longer ones are cut. group: batches per step
        (default: one per rank). workers: background processes that read and tokenize ahead."""
        files = [str(f) for f in ([files] if isinstance(files, (str, Path)) else files)]
        if max_len < 1:
            raise ValueError(f"max_len is {max_len}, and must be at least 1")
        if micro_batch_tokens < len(columns) * round_up(max_len, round_to):
            raise ValueError(f"micro_batch_tokens {micro_batch_tokens} cannot hold one row of "
                             f"{len(columns)} x max_len {max_len} tokens")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        if not getattr(tokenizer, "append_eos", True):  # the model must learn where a text ends
            tokenizer = copy.copy(tokenizer)
            tokenizer.append_eos = True
        self.columns, self.round_to, self.seed, self.workers = columns, round_to, seed, workers
        labels = ["labels"] if len(columns) == 2 else [f"{name}_labels" for name in columns[1:]]
        self.names = ["input_ids", *labels]
        self.group = group or world_size
        self.own = range(rank, self.group, world_size)  # this rank's batches in a group
        self.state = dict(state or Place()._asdict())
        self.row_groups = slice_row_groups(files, columns)
        self.rows = sum(piece.rows for piece in chain.from_iterable(self.row_groups))
        self.read = functools.partial(read_window, columns=columns, tokenizer=tokenizer,
                                      max_len=max_len, micro_batch_tokens=micro_batch_tokens,
                                      round_to=round_to)
        self.warns = rank == 0  # about the first row without text
        self.planned: tuple[int, list] = (-1, [])  # an epoch and its windows
        self.loaded: dict[tuple[int, int], Window] = {}
        self.ahead: Iterator[Window] = iter(())  # the windows from self.next on
        self.next: tuple[int, int] | None = None
        self.pool: ParallelMap | None = None

    def plan(self, epoch: int) -> list[list[Slice]]:
        """The windows of an epoch: shuffled row groups, as many as fit."""
        if epoch != self.planned[0]:
            windows: list[list[Slice]] = [[]]
            filled = 0.0
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.row_groups))
            for piece in chain.from_iterable(self.row_groups[i] for i in order):
                if filled + piece.share > 1 and windows[-1]:
                    windows.append([])
                    filled = 0.0
                windows[-1].append(piece)
                filled += piece.share
            self.planned = epoch, windows
        return self.planned[1]

    def after(self, epoch: int, window: int) -> tuple[int, int]:
        """The next window: (epoch, number)."""
        is_last = window + 1 == len(self.plan(epoch))
        return (epoch + 1, 0) if is_last else (epoch, window + 1)

    def jobs(self, epoch: int, window: int) -> Iterator[tuple[list[Slice], list[int]]]:
        """The job of this window for read_window, then those of the next ones, without end."""
        while True:
            yield self.plan(epoch)[window], [self.seed, epoch, window]
            epoch, window = self.after(epoch, window)

    def read_ahead(self, epoch: int, window: int) -> Iterator[Window]:
        """This window and the next ones, without end. Background processes read ahead, if any."""
        jobs = self.jobs(epoch, window)
        if not self.workers:
            yield from map(self.read, jobs)
            return
        first = next(jobs)
        self.pool = ParallelMap(self.read, jobs, self.workers)
        yield self.read(first)  # in this process, while the workers start
        yield from self.pool

    def window(self, epoch: int, window: int) -> Window:
        """A window; it stays in memory until forget_before. Windows are best read in order."""
        place = epoch, window
        if place in self.loaded:
            return self.loaded[place]
        if place != self.next:
            self.close()
            self.ahead = self.read_ahead(*place)
        try:
            found = next(self.ahead)
        except ChildProcessError:
            if not (self.pool and self.pool.is_terminated()):
                raise
            # a SIGTERM to all processes of a run asks this one to save and stop
            note_once("note: the background processes were terminated; from now on this process "
                      "tokenizes alone")
            self.close()
            self.workers = 0
            return self.window(epoch, window)
        self.loaded[place], self.next = found, self.after(*place)
        if found.first_unusable and self.warns:
            self.warns = False
            note_once(f"warning: rows without text in {' or '.join(self.columns)} are skipped "
                      f"(first: {found.first_unusable})")
        return found

    def forget_before(self, epoch: int, window: int) -> None:
        """Drop the windows before this one from memory."""
        self.loaded = {k: v for k, v in self.loaded.items() if k >= (epoch, window)}

    def locate(self, epoch: int, window: int, batch: int) -> Place:
        """The same place with `batch` inside its window."""
        empty = 0
        while batch >= (n := len(self.window(epoch, window).batches)):
            batch, (epoch, window) = batch - n, self.after(epoch, window)
            empty = 0 if n else empty + 1
            if empty > len(self.plan(epoch)):
                raise ValueError("no row has text in every one of the columns "
                                 + ", ".join(self.columns))
        return Place(epoch, window, batch)

    @property
    def epoch(self) -> float:
        """Position in epochs, such as 1.25, counted in rows. May read a window."""
        epoch, window, batch = self.locate(**self.state)
        sizes = [sum(piece.rows for piece in slices) for slices in self.plan(epoch)]
        part = batch / len(self.window(epoch, window).batches)
        return epoch + (sum(sizes[:window]) + sizes[window] * part) / sum(sizes)

    def batch(self, place: Place) -> dict:
        """The tensors of a batch."""
        import torch  # not above: the processes that clean and tokenize do not need it
        window = self.window(place.epoch, place.window)
        rows = window.batches[place.batch]
        arrays: dict[str, np.ndarray] = {}
        for name, (ids, offsets) in zip(self.names, window.columns):
            lengths = offsets[rows + 1] - offsets[rows]
            inside = np.arange(round_up(lengths.max(), self.round_to)) < lengths[:, None]
            arrays[name] = np.full(inside.shape, IGNORED if arrays else PAD)
            arrays[name][inside] = ids[joined_ranges(offsets[rows], lengths)]
            arrays.setdefault("attention_mask", inside)
        if len(self.columns) > 2:
            arrays["rows"] = window.numbers[rows]
        return {name: torch.from_numpy(array.astype(np.int64, copy=False))
                for name, array in arrays.items()}

    def next_group(self) -> Iterator[dict]:
        """This rank's batches of the next group, perhaps none."""
        start = self.locate(**self.state)
        self.forget_before(start.epoch, start.window)
        places = [self.locate(*start[:2], start.batch + i) for i in self.own]
        for place in places[:-1]:
            yield self.batch(place)
        last = self.batch(places[-1]) if places else None
        self.state = start._replace(batch=start.batch + self.group)._asdict()
        if last is not None:
            yield last

    def __iter__(self) -> Iterator[dict]:
        if not self.own:
            raise ValueError("this rank has no batches: the group is smaller than the number of "
                             "ranks")
        while True:
            yield from self.next_group()

    def one_epoch(self) -> Iterator[dict]:
        """This rank's batches of epoch 0, once. The state does not change."""
        for window in range(len(self.plan(0))):
            for batch in range(len(self.window(0, window).batches)):
                if batch % self.group in self.own:
                    yield self.batch(Place(0, window, batch))
            self.forget_before(0, window + 1)

    def close(self) -> None:
        """Stop the background processes."""
        if self.pool:
            self.pool.close()
        self.pool = self.next = None


# --- background processes -------------------------------------------------------------------------


class ParallelMap:
    """Iterate once over function(job), in the order of jobs, computed by background processes or
    threads. Work starts at once, and is at most `workers` jobs ahead of what is used. An error of a
    job is raised in its place. Raises ChildProcessError if a process was killed."""

    def __init__(self, function: Callable, jobs: Iterable, workers: int, threads: bool = False):
        self.function, self.jobs = function, iter(jobs)
        self.running: deque = deque()
        self.pool: Executor = ThreadPoolExecutor(workers)
        if not threads:
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, spawn, start_worker)
        self.submit(workers)

    def submit(self, jobs: int) -> None:
        for job in islice(self.jobs, jobs):
            with starting_workers(self.function):
                self.running.append(self.pool.submit(self.function, job))

    def __iter__(self) -> Iterator:
        try:
            while self.running:
                self.submit(1)
                yield self.running.popleft().result()
        except BrokenProcessPool:
            raise ChildProcessError("a background process was killed (is there enough memory? a "
                                    "smaller --workers needs less)") from None
        self.pool.shutdown()  # waits: Python 3.11 may fail if it exits while a pool is ending

    def is_terminated(self) -> bool:
        """After ChildProcessError: whether processes were ended by SIGTERM only, not for lack of
        memory."""
        processes = list((getattr(self.pool, "_processes", None) or {}).values())
        deadline_s = time.monotonic() + 5
        while any(p.exitcode is None for p in processes) and time.monotonic() < deadline_s:
            time.sleep(0.01)  # the pool ends the others
        return all(p.exitcode == -signal.SIGTERM for p in processes)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def ordered_map(function: Callable, jobs: Iterable, workers: int,
                threads: bool = False) -> Iterable:
    """function(job) for every job, in order; with more than one worker, see ParallelMap."""
    return ParallelMap(function, jobs, workers, threads) if workers > 1 else map(function, jobs)


def start_worker() -> None:
    """In a background process: run at low priority, leave Ctrl-C to the parent, and exit when the
    parent exits, even after kill -9."""
    if hasattr(os, "nice"):
        os.nice(19)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            parent.join()
        os._exit(0)
    threading.Thread(target=watch, daemon=True).start()


main_module_lock = threading.Lock()


@contextlib.contextmanager
def starting_workers(function: Callable) -> Iterator[None]:
    """Processes that are started here never see Ctrl-C, not even while they import modules; this
    one sees it at the end. They do not import the main program (train.py would load torch, which
    takes two seconds), unless `function` is defined in it."""
    main = vars(sys.modules["__main__"])
    function = getattr(function, "func", function)  # of a functools.partial
    is_main = getattr(function, "__module__", "__main__") == "__main__"
    names = () if is_main else ("__file__", "__spec__")
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows: see start_worker
    with main_module_lock:
        hidden: dict[str, Any] = {name: main[name] for name in names if name in main}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if can_block else ()
        try:
            main.update(dict.fromkeys(hidden))
            yield
        finally:
            main.update(hidden)
            if can_block:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


def row_chars(row: dict) -> int:
    """About how many characters a row has, so that a batch of rows takes little memory."""
    return 100 + sum(len(x) for x in row.values() if isinstance(x, (str, bytes, list)))


def batches(items: Iterable, chars: int, length: Callable = len) -> Iterator[list]:
    """Group items into lists of about so many characters each, by length(item)."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += length(item)
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- command line ---------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults in --help, where there are any, and keeps the lines of tables and examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        has_none = default is None or default is False or default == ""
        return action.help if has_none else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, and one line for an error."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:  # an empty value may be a shell variable that is not set
            value = getattr(found, action.dest, None)
            is_empty = "" in (value if isinstance(value, list) else [value])
            if is_empty and action.dest not in ("prompt", "freeze"):  # where it has a meaning
                self.error(f"{'/'.join(action.option_strings) or action.dest} is empty")
        return found, rest

    def error(self, message: str):
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun, all processes have the same
            print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def number(kind: type, low: float, high: float = float("inf"), above: bool = False) -> Callable:
    """An argparse type: an int or float from low to high; with above, greater than low."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None
        too_low = value <= low if above else value < low
        if too_low or not value <= high or not math.isfinite(value):
            limit = f"more than {low:g}" if above else f"{low:g} or more"
            limit += f", {high:.10g} at most" if high < 1e300 else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limit}")
        return value
    return parse


class AgreedError(ValueError):
    """An error that every rank raises. The first rank of each machine prints it."""


@contextlib.contextmanager
def memory_hint(flag: str) -> Iterator[None]:
    """Turn every kind of out-of-memory error, of Python, numpy, torch or CUDA, into a MemoryError
    that names the flag to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        text = str(e)
        pattern = "out of memory|ALLOC_FAILED|allocate memory|not enough memory"
        if not isinstance(e, MemoryError) and not re.search(pattern, text, re.IGNORECASE):
            raise
        kind = "GPU memory" if re.search("cuda|cublas|gpu", text, re.IGNORECASE) else "memory"
        raise MemoryError(f"out of {kind}: lower {flag}") from None


class Output(io.FileIO):
    """Standard output or error. If its reader has gone, for example `head` or a terminal, text is
    dropped, and the command finishes its work."""

    def write(self, content) -> int | None:  # type: ignore[override]
        try:
            return super().write(content)
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):
                raise
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.fileno())
            return len(content)


def prepare_output(name: str) -> None:
    """Make sure that printing to stdout or stderr never ends a command: characters that the
    encoding lacks are escaped, and text for a closed stream is dropped."""
    stream = getattr(sys, name)
    if stream is None:
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
        is_buffered = isinstance(stream.buffer, io.BufferedWriter)
        if isinstance(stream.buffer.raw if is_buffered else stream.buffer, io.FileIO):
            raw: Any = Output(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(
                io.BufferedWriter(raw) if is_buffered else raw, stream.encoding, stream.errors,
                line_buffering=stream.line_buffering, write_through=stream.write_through))


def run(main: Callable) -> None:
    """Call main() and exit like a command: an error is one line on stderr and status 2, or 1 if
    disk or memory is full."""
    for name in ("stdout", "stderr"):
        prepare_output(name)
    try:
        main()
    except KeyboardInterrupt:
        leave("interrupted", 130)
    except MemoryError as e:
        leave(f"error: {e or 'out of memory'}", 1)
    except (ValueError, OSError) as e:
        text, status = str(e), 2
        if isinstance(e, OSError) and e.strerror:
            name = os.fsdecode(e.filename) if isinstance(e.filename, bytes) else e.filename
            text = f"{name}: {e.strerror}" if name else e.strerror
            full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
            status = 1 if e.errno in full else 2
        is_repeated = isinstance(e, AgreedError) and os.environ.get("LOCAL_RANK", "0") != "0"
        leave("" if is_repeated else f"error: {text}", status)


def leave(text: str, status: int) -> None:
    """Print a line, over a progress line if there is one, and exit."""
    if text:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        line = " ".join(map(str.strip, text.splitlines()))
        print(f"{clear}{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        # do not exit normally: threads of the process group would abort, or wait for other ranks
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Make, clean, deduplicate, split and count pairs of prompt "
                                        "and response.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, out: str = "", inputs: bool = True, **options):
        sub = commands.add_parser(name, help=text, description=text, **options)
        if inputs:
            sub.add_argument("input", nargs="+", metavar="IN",
                             help=f"files ({READABLE}) or folders of them")
        if out:
            sub.add_argument("--out", required=True, metavar=out, help="where to write")
        return sub.add_argument, sub.error

    add, _ = command("demo", "questions and answers from tables of facts", "DIR", inputs=False)
    add("--seed", type=number(int, 0), default=0, help="seed of the order and of what is held out")

    fields = "\n".join(f"  {name:<16}{source.needs()}" for name, source in SOURCES.items())
    add, error = command("clean", "turn a public dump into clean pairs", "X.parquet", epilog=(
        f"sources and their fields:\n{fields}\n  pairs           any two columns that you name"))
    add("--source", required=True, choices=sorted([*SOURCES, "pairs"]),
        help="data source; see below for its fields")
    add("--prompt_field", help="for --source pairs: column of the prompt (default: prompt)")
    add("--response_field", help="for --source pairs: column of the response (default: response)")
    add("--min_chars", type=number(int, 1), default=MIN_CHARS,
        help="shortest response, in characters")
    add("--max_chars", type=number(int, 1), default=1024,
        help="longest prompt and longest response, in characters")
    add("--turns", type=number(int, 1, 100), default=1, metavar="N", help="for conversations: a "
        "pair for every answer, its prompt has up to N questions, joined with [SEP]; 1: only "
        "conversations of one question")
    add("--to_simplified", action="store_true",
        help="convert traditional characters to simplified ones (needs OpenCC)")
    add("--workers", type=number(int, 1), default=os.cpu_count(), help="processes")

    add, _ = command("dedup", "drop near-duplicates; the first of each stays", "X.parquet")
    add("--threshold", type=number(float, 0, 1, above=True), default=0.85,
        help="Jaccard similarity of character 5-grams from which texts are near-duplicates")
    add("--against", metavar="Y.parquet", help="also drop near-duplicates of these pairs")
    add("--workers", type=number(int, 1), default=os.cpu_count(), help="threads")

    add, _ = command("split", "write train.parquet, valid.parquet and, with --test, test.parquet, "
                     "by a hash of the prompt", "DIR")
    add("--valid", type=number(float, 0, 1), default=0.01,
        help="share of the pairs that go to valid.parquet, 0 to 1")
    add("--test", type=number(float, 0, 1), default=0.0,
        help="share of the pairs that go to test.parquet, 0 to 1")
    add("--seed", type=number(int, 0, 2 ** 64 - 1), default=0,
        help="seed of the hash; another one splits a side of an earlier split anew")

    add, _ = command("stats", "rows, characters, lengths and tokens")
    add("--tokenizer", metavar="DIR", help="also count tokens of the tokenizer in this folder")

    args = parser.parse_args()
    has_fields = args.command == "clean" and (args.prompt_field or args.response_field)
    if has_fields and args.source != "pairs":
        error("--prompt_field and --response_field are for --source pairs")
    if args.command == "clean" and args.source != "duie" and args.min_chars > args.max_chars:
        error(f"--min_chars {args.min_chars} is above --max_chars {args.max_chars}")
    if args.command == "clean" and args.source == "duie" and args.min_chars != MIN_CHARS:
        note_once("note: --min_chars has no effect with --source duie: any triple is long enough")
    return args


def main() -> None:
    args = parse_args()
    if args.command == "demo":
        for path, pairs in write_demo(args.out, args.seed).items():
            print(f"{path}: {pairs:,} pairs")
    elif args.command == "clean":
        fields = args.prompt_field or "prompt", args.response_field or "response"
        clean(args.input, args.source, args.out, fields, args.min_chars, args.max_chars,
              args.workers, args.to_simplified, args.turns)
    elif args.command == "dedup":
        dedup(args.input, args.out, args.threshold, args.against, args.workers)
    elif args.command == "split":
        split(args.input, args.out, args.valid, args.test, args.seed)
    else:
        tokenizer = None
        if args.tokenizer:  # imported by name, and here: tokenizer.py itself imports this file
            tokenizer = importlib.import_module("tokenizer").Tokenizer
            tokenizer = tokenizer.from_pretrained(args.tokenizer)
        stats(args.input, tokenizer)


if __name__ == "__main__":
    run(main)
