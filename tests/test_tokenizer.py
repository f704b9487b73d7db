"""The tokenizer learns textbook BPE, and encodes and decodes as tokenizers does from the same file."""
import io
import json
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import tokenizers
from bench import our_pieces, rss_bytes
from conftest import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tokenizer as tokenizer_module
from data import Rows, input_files, make_demo, to_codepoints
from tokenizer import (
    BEGINS,
    BYTE_TOKENS,
    CLASSES,
    ENDS,
    SPECIAL_TOKENS,
    Block,
    Pieces,
    Tokenizer,
    count_chunk,
    normalize,
    piece_starts,
)

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
@given(st.lists(st.one_of(st.text(alphabet="ab", max_size=40), st.text(alphabet="abc 你好，1𠮷😀𝟙", max_size=30)), min_size=1, max_size=15),
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


@pytest.mark.quick
def test_pairs_of_twins_in_threes_are_counted_once():
    texts = ["，".join(chr(0x4E00 + i) * 3 for i in range(3000))] * 2  # x x x holds x x once, twice if one counts overlaps
    tokenizer = Tokenizer.train(texts, 3266, character_coverage=1.0)
    assert tokenizer.merges == [(264, 264), (265, 265)]


def test_learning_depends_on_neither_order_nor_workers():
    texts = CORPUS[:1000] * 40
    one = Tokenizer.train(texts, 1500)
    assert Tokenizer.train(texts[::-1], 1500) == one
    assert Tokenizer.train(iter(texts), 1500, workers=2) == one
    assert Tokenizer.train(texts, 1500, memory_bytes=10 ** 9) == one


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("mark", [3, 1000])  # every how many characters a mark ends a piece: many short ones, or few long
def test_memory_is_a_promise(tmp_path, mark):
    rng = np.random.default_rng(0)
    with open(tmp_path / "corpus.txt", "wb") as f:  # as bad as it gets: all pieces differ
        for _ in range(26 if mark == 3 else 28):  # somewhat more than fits
            codes = rng.integers(0x4E00, 0x6E00, size=1_000_000).astype("<u4")
            codes[mark - 1::mark] = ord("，")
            codes[::2000] = ord("\n")
            f.write(codes.tobytes().decode("utf-32-le").encode())
    command = [sys.executable, "tokenizer.py", "train", str(tmp_path), "--out", str(tmp_path / "tok"), "--vocab_size", "9000", "--memory", "600MB"]
    running, peak = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), 0
    while running.poll() is None:
        peak = max(peak, rss_bytes(running.pid))
        time.sleep(0.01)
    said = running.communicate()
    assert running.returncode == 0, said
    assert "learning from a sample of" in said[1]
    assert 200e6 < peak < 600e6


def test_combining_pieces_takes_no_more_memory_than_was_counted():
    pieces, rng = Pieces(), np.random.default_rng(0)
    for _ in range(6):
        codes = rng.integers(0x4E00, 0x6E00, size=500_000).astype("<u4")
        codes[3::4] = ord("，")
        pieces.add(count_chunk(([codes.tobytes().decode("utf-32-le")], False)))
    tracemalloc.start()
    try:
        pieces.parts = [[Block(*map(np.copy, block)) for block in part] for part in pieces.parts]
        limit = pieces.peak_bytes(29298)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def test_a_sample_is_the_same_for_any_number_of_workers(capsys, monkeypatch):
    for name in ("PROCESS_BYTES", "WORKER_BYTES", "MIN_PIECES_BYTES"):  # a tenth of them, and of everything, to take less time
        monkeypatch.setattr(tokenizer_module, name, getattr(tokenizer_module, name) // 10)
    rng = np.random.default_rng(0)  # somewhat more than the memory can hold
    texts = [rng.integers(0x4E00, 0x5200, size=6_000).astype("<u4").tobytes().decode("utf-32-le") for _ in range(500)]
    one = Tokenizer.train(texts, 1600, memory_bytes=60_000_000)
    assert Tokenizer.train(texts, 1600, memory_bytes=60_000_000, workers=2) == one
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "learning from a sample of" in said[0]  # the same line is printed once
    with pytest.raises(ValueError, match="more than once"):
        Tokenizer.train(iter(texts), 1600, memory_bytes=60_000_000)


@pytest.mark.quick
def test_compression_is_that_of_tokenizers_and_sentencepiece():
    train, held_out = CORPUS[::2], CORPUS[1::2]
    size = len(SPECIAL_TOKENS + BYTE_TOKENS) + len(set("".join(train))) + 300
    ours = Tokenizer.train(train, size, character_coverage=1.0)
    theirs = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    theirs.pre_tokenizer = tokenizers.Tokenizer.from_str(ours.to_json()).pre_tokenizer
    theirs.train_from_iterator(train, trainers.BpeTrainer(vocab_size=size, min_frequency=2, special_tokens=SPECIAL_TOKENS + BYTE_TOKENS, show_progress=False))
    # sentencepiece learns from our pieces, with a mark between them, and then spells each by itself
    mark = "\x01"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(mark.join(our_pieces(t)) for t in train), model_writer=model, model_type="bpe", vocab_size=size, character_coverage=1.0,
        byte_fallback=True, user_defined_symbols=SPECIAL_TOKENS[:4], pretokenization_delimiter=mark, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, split_by_unicode_script=False, split_by_number=False, minloglevel=2)
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokens = sum(map(len, ours.encode_batch(held_out))) - len(held_out)
    # what ties are broken by differs, so that the last tokens learnt are not the same
    assert tokens <= 1.005 * sum(len(e.ids) for e in theirs.encode_batch(held_out))
    assert tokens <= 1.005 * sum(len(spm.encode(piece)) for t in held_out for piece in our_pieces(t))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=25), st.lists(st.text(alphabet="abcd ", max_size=300), max_size=5),
       st.booleans())
def test_any_merges_are_applied_as_tokenizers_does(choices, texts, backwards):
    """Also merges that no learning would give, where one token is made in several ways."""
    vocab = SPECIAL_TOKENS + BYTE_TOKENS + list("abcd")
    merges: list[tuple[int, int]] = []
    for pair in choices:
        a, b = (263 + i % (len(vocab) - 263) for i in pair)
        if (a, b) not in merges and len(vocab[a] + vocab[b]) < 40:
            merges.append((a, b))
            if vocab[a] + vocab[b] not in vocab:
                vocab.append(vocab[a] + vocab[b])
    if backwards:  # a merge before the one that makes its part
        merges = merges[::-1]
    tokenizer = Tokenizer(vocab, merges)
    theirs = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert tokenizer.encode_batch(texts) == [e.ids for e in theirs.encode_batch(texts)]


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


@pytest.mark.quick
@pytest.mark.parametrize("text", ["", "[EOS]", "a[PAD]b[EOS", "[[EOS]]", "[CLS][SEP]中国[UNK]", "  a  b ", "▁ ▁", "\0\x01\r\n\t", "Ⅷ〇½②٣", "e\u0301",
                                  "👨\u200d👩\u200d👧", "哈" * 1001, "哈哈哈，" * 300, "首都" * 3000, "a" * 127, "a" * 128, "a" * 129, "\u2e43中\u166d国\U00010ead"])
def test_difficult_text_has_tokenizers_ids(tokenizer, theirs, text):
    assert_same(tokenizer, theirs, text)


@pytest.mark.quick
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
        assert alone == {k for k, c in enumerate(part) if CLASSES[c] == BEGINS | ENDS}


def test_lone_surrogates_are_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("中\ud800国")) == "中\ufffd国"


@pytest.mark.quick
@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 262), st.integers(0, 2499)), max_size=30))
def test_decoding_is_tokenizers_for_any_ids(tokenizer, theirs, ids):
    ids = [i for i in ids if i < len(tokenizer)]
    assert tokenizer.decode(ids) == theirs.decode(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.quick
@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 262), st.integers(0, 2499)), max_size=30), st.booleans())
def test_streaming_never_shows_half_a_character(tokenizer, ids, skip):
    assert "".join(tokenizer.stream(iter(ids), skip)) == tokenizer.decode(ids, skip)
    spelled = [i for char in "你😀" for i in (b + 7 for b in char.encode())]
    assert [p for p in tokenizer.stream([*spelled, 300, 301]) if p] == ["你😀" + tokenizer.vocab[300], tokenizer.vocab[301]]


@pytest.mark.quick
def test_auto_tokenizer_reads_the_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    text = "法国的首都是哪里？ Hello  world 123"
    assert auto(text).input_ids == tokenizer.encode(text)
    assert auto.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert (auto.pad_token_id, auto.eos_token_id, len(auto)) == (0, 1, len(tokenizer))
    assert Tokenizer.from_pretrained(tmp_path) == tokenizer


@pytest.fixture(scope="module", params=["as saved", "by transformers", "of an old version"])
def reference(request, tmp_path_factory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A tokenizer as ChatLM-mini-Chinese makes it, with tokenizers: read by us, and by tokenizers."""
    theirs = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    theirs.normalizer = normalizers.Sequence([normalizers.NFKC()])
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Metaspace()])
    theirs.add_special_tokens(SPECIAL_TOKENS)
    theirs.decoder = decoders.Metaspace()
    texts = [t.replace("\n", " ") for t in CORPUS]
    theirs.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, min_frequency=2, special_tokens=SPECIAL_TOKENS, show_progress=False))
    theirs.add_tokens(["\t", "\n"])
    folder = tmp_path_factory.mktemp("reference")
    if request.param == "by transformers":
        names = dict(zip(("pad", "eos", "sep", "bos", "cls", "mask", "unk"), SPECIAL_TOKENS))
        PreTrainedTokenizerFast(tokenizer_object=theirs, **{f"{k}_token": v for k, v in names.items()}).save_pretrained(folder)
    else:
        form = json.loads(theirs.to_str())
        if request.param == "of an old version":
            form["pre_tokenizer"]["pretokenizers"][2] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
            form["decoder"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
            form["model"]["merges"] = [" ".join(pair) for pair in form["model"]["merges"]]
            del form["model"]["ignore_merges"], form["model"]["byte_fallback"]
        (folder / "tokenizer.json").write_text(json.dumps(form), "utf-8")
    return Tokenizer.from_pretrained(folder), theirs


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text(alphabet="的首都是北京，。 1a[EOS]PAD▁\n\t\u0301\u0327\u200d😀Ａ１ﬁ㎏", max_size=60)))
def test_the_reference_form_has_tokenizers_ids(reference, text):
    ours, theirs = reference
    ids = ours.encode(text)
    assert ids == theirs.encode(text).ids
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, False) == theirs.decode(ids, skip_special_tokens=False)


def test_the_reference_form_is_saved_and_ends_texts_when_asked(reference, tmp_path):
    ours, theirs = reference
    ours.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path) == ours
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [e.ids for e in again.encode_batch(CORPUS)] == ours.encode_batch(CORPUS) == [e.ids for e in theirs.encode_batch(CORPUS)]
    ending = Tokenizer.from_pretrained(tmp_path, append_eos=True)
    assert ending.encode_batch(CORPUS[:100]) == [[*ids, 1] for ids in ours.encode_batch(CORPUS[:100])]
    ending.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(CORPUS[0]).input_ids == ending.encode(CORPUS[0])


def test_nfkc_is_tokenizers_for_every_character():
    theirs = normalizers.NFKC()
    for c in [*range(0xD800), *range(0xE000, 0x110000)]:
        text = f"a{chr(c)}\u0327\u0301"
        assert normalize(text) == theirs.normalize_str(text)


@pytest.mark.quick
def test_nfkc_normalises_as_tokenizers_does(tmp_path):
    tokenizer = Tokenizer.train(CORPUS[:500], 1500, nfkc=True)
    tokenizer.save_pretrained(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("ＡＢＣ１２３，㎏①ﬁ", "法国的首都？", "e\u0301"):
        assert tokenizer.encode(text) == theirs.encode(text).ids
    assert Tokenizer.from_pretrained(tmp_path) == tokenizer


@pytest.mark.quick
@pytest.mark.parametrize("state", ["truncation", "padding", "both"])
def test_padding_and_truncation_in_a_file_change_no_ids(tokenizer, tmp_path, state):
    """As after tokenizer.save_pretrained in a program that padded and truncated its batches."""
    tokenizer.save_pretrained(tmp_path)
    file = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if state != "padding":
        file.enable_truncation(5)
    if state != "truncation":
        file.enable_padding(pad_id=0, pad_token="[PAD]", length=40)
    file.save(str(tmp_path / "tokenizer.json"))
    ours, auto = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("法国的首都是哪里？", "好", "", CORPUS[-2] * 5):
        assert ours.encode(text) == tokenizer.encode(text) == auto(text).input_ids


def test_tags_of_wikiextractor_are_not_learnt(tmp_path):
    entry = '<doc id="{0}" url="https://zh.wikipedia.org/wiki?curid={0}" title="数学">\n数学\n\n数学是研究数量的学科。\n</doc>\n'
    (tmp_path / "wiki_00").write_text("".join(entry.format(i) for i in range(50)), "utf-8")
    done = subprocess.run([sys.executable, "tokenizer.py", "train", str(tmp_path), "--out", str(tmp_path / "tok"), "--vocab_size", "300"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "100 x tag line of WikiExtractor, skipped" in done.stderr, done.stderr
    learnt = set("".join(Tokenizer.from_pretrained(tmp_path / "tok").vocab[7 + 256:]))
    assert learnt == set("数学是研究数量的学科。")


@pytest.mark.quick
def test_bad_tokenizer_files_are_refused(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = tokenizer.to_json()
    wrong = []  # merges
    for merges in (["a b c"], ["ab"], {"a": 1}, [["no token", "of these"]]):
        wrong.append(json.loads(whole))
        wrong[-1]["model"]["merges"] = merges
    for text in (whole[:len(whole) // 2], "[]", "{}", "", *map(json.dumps, wrong)):
        path.write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            Tokenizer.from_pretrained(tmp_path)
    for part, value in (("pre_tokenizer", {"type": "Whitespace"}), ("decoder", None), ("model", {"type": "Unigram"})):
        changed = json.loads(whole)
        changed[part] = {**changed[part], **value} if part == "model" else value
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"kind of {part} is not supported"):
            Tokenizer.from_pretrained(tmp_path)


@pytest.mark.quick
def test_bad_corpora_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        Tokenizer.train([])
    with pytest.raises(ValueError, match="at most"):
        Tokenizer.train(["ab"], vocab_size=1 << 33)
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
        list(Rows(tmp_path))


def call(*args: str) -> subprocess.CompletedProcess:
    return run_script("tokenizer.py", *args)


def test_the_tokenizer_of_a_model_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.txt").write_text("今天天气很好\n" * 20, "utf-8")
    done = call("train", str(tmp_path / "a.txt"), "--out", str(tmp_path), "--vocab_size", "300")
    assert done.returncode == 2 and "holds a model" in done.stderr and not (tmp_path / "tokenizer.json").exists()


def test_command_line(tmp_path):
    corpus, tok = tmp_path / "corpus.txt", tmp_path / "tok"
    corpus.write_text("\n".join(CORPUS[:500]), "utf-8")
    done = call("train", str(tmp_path), "--out", str(tok), "--vocab_size=800")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "800 tokens" in done.stdout
    pq.write_table(pa.table({"prompt": CORPUS[:500:2], "response": CORPUS[1:500:2]}), tmp_path / "corpus.parquet")
    done = call("train", str(tmp_path / "corpus.parquet"), "--out", str(tmp_path / "two"), "--vocab_size=800", "--workers", "1", "--memory", "1GB")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == (tok / "tokenizer.json").read_bytes()
    done = call("stats", str(corpus), "--tokenizer", str(tok))
    assert done.returncode == 0, done.stderr
    assert "characters per token" in done.stdout
    corpus.write_bytes(corpus.read_bytes() + b"\xff\xfe")
    done = call("train", str(corpus), "--out", str(tmp_path / "three"), "--vocab_size=800")
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "2 x character U+FFFD" in done.stderr


def test_wrong_commands_end_with_one_line_and_change_nothing(tmp_path):
    corpus, tok = tmp_path / "corpus.txt", tmp_path / "tok"
    corpus.write_text("\n".join(CORPUS[:500]), "utf-8")
    (tmp_path / "empty.txt").write_text("")
    Tokenizer.train(CORPUS[:500], 700).save_pretrained(tok)
    before = {path: path.read_bytes() for path in tok.iterdir()}
    half = tmp_path / "half"
    half.mkdir()
    (half / "tokenizer.json").write_bytes(before[tok / "tokenizer.json"][:5000])
    to = ["--out", str(tok)]
    for args in (["train", "no.txt", *to], ["train", str(tmp_path / "empty.txt"), *to], ["train", str(tok), *to, "--vocab_size", "9"],
                 ["train", str(corpus), *to, "--vocab_size", "300"], ["train", str(corpus), *to, "--vocab_size", "many"],
                 ["train", str(corpus), *to, "--memory", "much"], ["train", str(corpus), *to, "--memory", "100MB"],
                 ["train", str(corpus), *to, "--workers", "0"], ["train", str(corpus), *to, "--character_coverage", "2"],
                 ["train", str(corpus), "--out", str(corpus)], ["stats", str(corpus), "--tokenizer", "nowhere"],
                 ["stats", str(corpus), "--tokenizer", str(half)], ["stats", str(tmp_path / "empty.txt"), "--tokenizer", str(tok)], []):
        done = call(*args)
        assert done.returncode == 2, args
        assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in tok.iterdir()} == before
    assert "need at least" in call("train", str(corpus), *to, "--vocab_size", "300").stderr


@pytest.mark.quick
@pytest.mark.parametrize("name", ["pad_token", "image_token"])
def test_a_special_token_that_is_a_number_is_damage(tokenizer, tmp_path, name):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: 5}))
    with pytest.raises(ValueError, match="tokenizer_config.json is damaged"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.quick
@pytest.mark.parametrize("change", [{"additional_special_tokens": ["你好"]}, {"extra_special_tokens": {"a": "<a>"}}, {"image_token": "<i>"}, {"added_tokens_decoder": {"9": {"content": "<b>"}}}], ids=str)
def test_special_tokens_of_the_configuration_alone_are_refused(tokenizer, tmp_path, change):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="has the special token .*save it again"):
        Tokenizer.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    try:  # what transformers then saves has them in both files, where its ids are ours
        ours = Tokenizer.from_pretrained(tmp_path / "again")
    except ValueError as error:
        assert "tokenizer.json" in str(error)
    else:
        assert ours.encode("你好<a><b>") == AutoTokenizer.from_pretrained(tmp_path / "again")("你好<a><b>").input_ids


@pytest.mark.quick
@pytest.mark.parametrize(("file", "content"), [
    ("tokenizer_config.json", {"eos_token": "</s>"}), ("tokenizer_config.json", {"pad_token": {"content": "<p>"}}), ("special_tokens_map.json", {"unk_token": "<unk>"}),
    ("special_tokens_map.json", {"additional_special_tokens": ["<a>"]}), ("added_tokens.json", {"<b>": 900}), ("tokenizer_config.json", {"split_special_tokens": True})], ids=str)
def test_special_tokens_outside_of_tokenizer_json_are_refused(tmp_path, file, content):
    Tokenizer.train(CORPUS[:100], 700).save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file}"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.quick
@pytest.mark.parametrize("change", [{"tokenizer_class": "GPT2TokenizerFast"}, {"tokenizer_class": "LlamaTokenizer"}, {"added_tokens_decoder": {
    "5": {"content": "[MASK]", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False, "special": True}}}], ids=str)
def test_a_configuration_that_changes_ids_is_refused(tmp_path, change):
    Tokenizer.train(CORPUS[:100], 700).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="tokenizer_config.json: the to"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.quick
def test_a_special_token_of_one_character_and_nfkc_are_refused_together(tmp_path):
    for nfkc in (False, True):
        Tokenizer.train(CORPUS[:100], 700, nfkc=nfkc).save_pretrained(tmp_path)
        auto = AutoTokenizer.from_pretrained(tmp_path)
        auto.add_special_tokens({"additional_special_tokens": ["0"]})
        auto.save_pretrained(tmp_path / "more")
        if nfkc:  # NFKC turns ０ into 0, which is then no special token
            with pytest.raises(ValueError, match="special token '0'"):
                Tokenizer.from_pretrained(tmp_path / "more")
        else:
            assert Tokenizer.from_pretrained(tmp_path / "more").encode("10０") == AutoTokenizer.from_pretrained(tmp_path / "more")("10０").input_ids


@pytest.mark.quick
def test_a_folder_that_transformers_saves_with_add_eos_token_loads(tmp_path):
    Tokenizer.train(CORPUS[:100], 700).save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    auto.add_eos_token = True
    auto.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_pretrained(tmp_path / "again").encode("你好") == AutoTokenizer.from_pretrained(tmp_path / "again")("你好").input_ids
