"""The tokenizer learns textbook BPE, and encodes and decodes as tokenizers does from the same file."""
import json
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data import make_demo
from tokenizer import BYTE_TOKENS, CLASSES, SPECIAL_TOKENS, ArgumentParser, Tokenizer, input_files, number, piece_starts, read_rows, to_codepoints

CORPUS = [text for pair in make_demo()[0][:4000] for text in pair] + ["Hello, world! 3.14 def f(x):\n    return x + 1", "哈哈哈哈哈哈哈"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, vocab_size=2500, character_coverage=0.999)


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory) -> tokenizers.Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def naive_bpe(texts: list[str], vocab_size: int, min_frequency: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Textbook BPE: count every pair, merge the most frequent everywhere, start again."""
    chars = Counter("".join(texts))
    vocab = SPECIAL_TOKENS + BYTE_TOKENS + sorted(chars, key=lambda c: (-chars[c], c))
    words = []
    for text in filter(None, texts):
        starts = np.flatnonzero(piece_starts(to_codepoints(text), np.array([0]))).tolist()
        words += [[vocab.index(c) for c in text[a:b]] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    merges = []
    while len(vocab) < vocab_size:
        counts: Counter = Counter()
        for word in words:
            last = None  # where a pair (x, x) was counted: in x x x the next one overlaps it
            for i in range(len(word) - 1):
                twin = word[i] == word[i + 1]
                if not (twin and last == i - 1):
                    counts[word[i], word[i + 1]] += 1
                    last = i if twin else None
                else:
                    last = None
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], p))
        if counts[pair] < min_frequency:
            break
        token = vocab[pair[0]] + vocab[pair[1]]
        if token not in vocab:
            vocab.append(token)
        merges.append(pair)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i:i + 2] = [vocab.index(token)]
                i += 1
    return vocab, merges


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(alphabet="ab", max_size=40), st.text(alphabet="abc 你好，1", max_size=30)), min_size=1, max_size=15),
       st.integers(1, 3), st.integers(0, 40))
def test_merges_are_textbook_bpe(texts, min_frequency, extra):
    if not "".join(texts):
        return
    size = len(SPECIAL_TOKENS + BYTE_TOKENS) + len(set("".join(texts))) + extra
    vocab, merges = naive_bpe(texts, size, min_frequency)
    ours = Tokenizer.train(texts, size, min_frequency, character_coverage=1.0)
    assert (ours.vocab, ours.merges) == (vocab, merges)


def test_merges_are_textbook_bpe_on_text():
    texts = CORPUS[:700]
    vocab, merges = naive_bpe(texts, 1100, 2)
    ours = Tokenizer.train(texts, 1100, 2, character_coverage=1.0)
    assert (ours.vocab, ours.merges) == (vocab, merges)


def assert_same(tokenizer: Tokenizer, theirs: tokenizers.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text).ids
    assert tokenizer.decode(ids) == theirs.decode(ids)
    if not any(t in text for t in SPECIAL_TOKENS):
        assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=80), st.text(alphabet="的首都是北京，。 1a[EOS]PAD▁\n\t\u0301\u200d😀", max_size=80)))
def test_fuzzed_text_has_tokenizers_ids_and_comes_back(tokenizer, theirs, text):
    assert_same(tokenizer, theirs, text)


@pytest.mark.parametrize("text", ["", "[EOS]", "a[PAD]b[EOS", "[[EOS]]", "[CLS][SEP]中国[UNK]", "  a  b ", "▁ ▁", "\0\x01\r\n\t", "Ⅷ〇½②٣", "e\u0301",
                                  "👨\u200d👩\u200d👧", "哈" * 1001, "哈哈哈，" * 300, "首都" * 3000, "a" * 127, "a" * 128, "a" * 129, "\u2e43中\u166d国\U00010ead"])
def test_difficult_text_has_tokenizers_ids(tokenizer, theirs, text):
    assert_same(tokenizer, theirs, text)


def test_batches_are_single_texts(tokenizer, theirs):
    texts = [*CORPUS[:3000], "", "哈" * 5000, *CORPUS[:10]]
    batch = tokenizer.encode_batch(texts)
    assert batch == [e.ids for e in theirs.encode_batch(texts)]
    assert batch[:50] == [tokenizer.encode(t) for t in texts[:50]]
    assert tokenizer.encode_batch([]) == []


def test_pieces_are_tokenizers_for_every_character():
    both = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Punctuation("isolated"), tokenizers.pre_tokenizers.Digits(individual_digits=True)])
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for i in range(0, len(points), 1 << 16):
        part = points[i:i + (1 << 16)]
        pieces = both.pre_tokenize_str("".join("a" + chr(c) for c in part))
        alone = {span[0] // 2 for piece, span in pieces if span[0] % 2 and len(piece) == 1 and piece != "a"}
        assert alone == {k for k, c in enumerate(part) if CLASSES[c] == 2}
    assert unicodedata.unidata_version  # the tables hold whatever Unicode this Python knows


def test_lone_surrogates_are_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("中\ud800国")) == "中\ufffd国"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 262), st.integers(0, 2499)), max_size=30))
def test_decoding_is_tokenizers_for_any_ids(tokenizer, theirs, ids):
    ids = [i for i in ids if i < len(tokenizer)]
    assert tokenizer.decode(ids) == theirs.decode(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


def test_auto_tokenizer_reads_the_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    text = "法国的首都是哪里？ Hello  world 123"
    assert auto(text).input_ids == tokenizer.encode(text)
    assert auto.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert (auto.pad_token_id, auto.eos_token_id, len(auto)) == (0, 1, len(tokenizer))
    assert Tokenizer.from_pretrained(tmp_path) == tokenizer


def test_nfkc_normalises_as_tokenizers_does(tmp_path):
    tokenizer = Tokenizer.train(CORPUS[:500], 1500, nfkc=True)
    tokenizer.save_pretrained(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("ＡＢＣ１２３，㎏①ﬁ", "法国的首都？", "e\u0301"):
        assert tokenizer.encode(text) == theirs.encode(text).ids
    assert Tokenizer.from_pretrained(tmp_path) == tokenizer


def test_training_does_not_depend_on_order():
    assert Tokenizer.train(CORPUS[:1000], 1500) == Tokenizer.train(CORPUS[:1000][::-1], 1500)


def test_bad_tokenizer_files_are_refused(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = tokenizer.to_json()
    for text in (whole[:len(whole) // 2], "[]", "{}", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            Tokenizer.from_pretrained(tmp_path)
    for part, value in (("pre_tokenizer", {"type": "Whitespace"}), ("decoder", None), ("model", {"type": "Unigram"})):
        changed = json.loads(whole)
        changed[part] = {**changed[part], **value} if part == "model" else value
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"kind of {part} is not supported"):
            Tokenizer.from_pretrained(tmp_path)


def test_bad_corpora_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        Tokenizer.train([])
    with pytest.raises(ValueError, match="no text"):
        Tokenizer.train(["", ""])
    with pytest.raises(ValueError, match="at least 265"):
        Tokenizer.train(["ab"], vocab_size=264)
    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        input_files([tmp_path / "nothing.txt"])
    with pytest.raises(ValueError, match="no files"):
        input_files([tmp_path])
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read"):
        list(read_rows([tmp_path]))


def test_rows_are_read_from_every_kind_of_file(tmp_path):
    import gzip
    row = {"prompt": "问，\"题\"", "response": "答\n案"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row), "utf-8")
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps([row, row]), "utf-8")
    (tmp_path / "c.json").write_text(json.dumps(row) + "\n", "utf-8")
    (tmp_path / "d.csv").write_text('prompt,response\n"问，""题""","答\n案"\n', "utf-8")
    with gzip.open(tmp_path / "e.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    assert list(read_rows([tmp_path])) == [row] * 7
    (tmp_path / "f.txt").write_text("一\n二", "utf-8")
    assert list(read_rows([tmp_path / "f.txt"])) == [{"text": "一"}, {"text": "二"}]


def test_command_line(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS[:500]), "utf-8")

    def call(*args: str):
        return subprocess.run([sys.executable, "tokenizer.py", *args], capture_output=True, text=True, timeout=60)

    done = call("train", str(tmp_path), "--out", str(tmp_path / "tok"), "--vocab_size=800")
    assert done.returncode == 0, done.stderr
    assert "800 tokens" in done.stdout
    done = call("train", str(tmp_path / "corpus.txt"), "--out", str(tmp_path / "two"), "--vocab_size=800", "--workers", "2", "--memory", "1GB")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == (tmp_path / "tok" / "tokenizer.json").read_bytes()
    done = call("train", str(tmp_path / "corpus.txt"), "--out", str(tmp_path / "sample"), "--vocab_size=800", "--memory", "200.3MB")
    assert done.returncode == 0 and "training on a sample of" in done.stderr, done.stderr
    done = call("stats", str(tmp_path / "corpus.txt"), "--tokenizer", str(tmp_path / "tok"))
    assert done.returncode == 0, done.stderr
    assert "characters a token" in done.stdout
    for args in (["train", "no.txt", "--out", "x"], ["train", str(tmp_path), "--out", str(tmp_path / "y"), "--vocab_size", "300"],
                 ["train", str(tmp_path), "--out", "x", "--vocab_size", "many"], ["train", str(tmp_path), "--out", "x", "--memory", "much"], ["stats", str(tmp_path), "--tokenizer", "nowhere"], []):
        done = call(*args)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "y").exists()


def test_number_types(capsys):
    parser = ArgumentParser(prog="x")
    parser.add_argument("--n", type=number(float, 0, 1, above=True))
    assert parser.parse_args(["--n=1"]).n == 1
    for bad in ("0", "1.5", "nan", "a"):
        with pytest.raises(SystemExit) as e:
            parser.parse_args(["--n", bad])
        assert e.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
