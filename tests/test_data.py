"""Pairs are made, cleaned, deduplicated and split as promised, and PairStream gives the same batches to everyone."""
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import PairStream, clean_pair, clean_text, dedup_indices, make_demo, minhash, plan_batches, read_rows, shingles, write_pairs
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A file of pairs of very different lengths in several row groups, and a tokenizer."""
    rng = random.Random(0)
    pairs, _ = make_demo()
    texts = ["".join(pairs[rng.randrange(len(pairs))][1] for _ in range(rng.choice([1, 1, 2, 3, 5, 12]))) for _ in range(3001)]
    path = tmp_path_factory.mktemp("data") / "pairs.parquet"
    table = pa.table({"prompt": [f"第{i}问：{t[:20]}" for i, t in enumerate(texts)], "response": texts})
    pq.write_table(table, path, row_group_size=500)
    return path, Tokenizer.train(texts, 1500)


def take(stream, n: int) -> list[dict]:
    return list(itertools.islice(stream, n))


def same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


def epoch_of(stream: PairStream) -> list[dict]:
    return list(stream.one_epoch())


def test_every_row_comes_once_an_epoch_within_the_budget(demo, monkeypatch):
    path, tokenizer = demo
    monkeypatch.setattr(data, "WINDOW_ROWS", 1000)
    stream = PairStream(path, tokenizer, micro_batch_tokens=600, max_len=64)
    rows = pq.read_table(path).to_pylist()
    def cut(text):
        ids = tokenizer.encode(text)
        return tuple(ids if len(ids) <= 64 else [*ids[:63], 1])
    expected = sorted((cut(r["prompt"]), cut(r["response"])) for r in rows)
    for epoch in range(2):
        seen = []
        while stream.state["epoch"] == epoch:
            if stream.locate(**stream.state)[0] != epoch:
                break
            batch = next(iter(stream))
            b, s, t = *batch["input_ids"].shape, batch["labels"].shape[1]
            assert b * (s + t) <= 600
            assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)
            assert all(x.dtype == torch.int64 for x in batch.values())
            assert batch["attention_mask"][:, 0].all() and batch["attention_mask"].any(0).all() and (batch["labels"] >= 0).any(0).all()
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                seen.append((tuple(ids[ids != 0].tolist()), tuple(labels[labels != -100].tolist())))
        assert sorted(seen) == expected
        stream.state = dict(zip(("epoch", "window", "batch"), stream.locate(**stream.state), strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_one_sequence(demo, monkeypatch, world_size):
    path, tokenizer = demo
    monkeypatch.setattr(data, "WINDOW_ROWS", 1000)
    whole = take(PairStream(path, tokenizer, micro_batch_tokens=2000, max_len=64), 160)  # two epochs and more
    for rank in range(world_size):
        own = take(PairStream(path, tokenizer, micro_batch_tokens=2000, max_len=64, rank=rank, world_size=world_size), 160 // world_size)
        assert same(own, whole[rank::world_size][:160 // world_size])


def test_a_group_is_shared_whatever_the_ranks(demo):
    path, tokenizer = demo
    whole = take(PairStream(path, tokenizer, 2000, 64), 50)
    for world_size in (1, 2, 3):
        shares = [take(PairStream(path, tokenizer, 2000, 64, rank=r, world_size=world_size, group=5), 10 * len(range(r, 5, world_size))) for r in range(world_size)]
        for g in range(10):
            for r, share in enumerate(shares):
                n = len(range(r, 5, world_size))
                assert same(share[g * n:(g + 1) * n], whole[5 * g:5 * g + 5][r::world_size])


def test_it_goes_on_from_any_state_with_any_number_of_workers(demo, monkeypatch):
    path, tokenizer = demo
    monkeypatch.setattr(data, "WINDOW_ROWS", 1000)
    whole = take(PairStream(path, tokenizer, 2000, 64), 120)
    stream = PairStream(path, tokenizer, 2000, 64)
    for n, batch in enumerate(stream, 1):
        if n in (1, 17, 40, 79):
            state = json.loads(json.dumps(stream.state))
            again = PairStream(path, tokenizer, 2000, 64, state=state, workers=2 if n == 17 else 0)
            assert same(take(again, 30), whole[n:n + 30])
            again.close()
        if n == 80:
            break


def test_the_seed_and_the_epoch_change_the_order(demo):
    path, tokenizer = demo
    n = len(epoch_of(PairStream(path, tokenizer, 2000, 64)))
    first = take(PairStream(path, tokenizer, 2000, 64), 2 * n)
    assert not same(first[:n], first[n:])
    assert not same(first[:n], take(PairStream(path, tokenizer, 2000, 64, seed=1), n))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=200), st.integers(100, 1000), st.integers(0, 5))
def test_plans_hold_every_row_once_within_the_budget(lengths, budget, seed):
    lengths = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    plan = plan_batches(lengths, budget, np.random.default_rng(seed))
    assert sorted(i for rows in plan for i in rows) == list(range(len(lengths)))
    assert all(len(rows) * lengths[rows].max(0).sum() <= budget for rows in plan)


def test_little_is_padding(demo):
    path, tokenizer = demo
    cells = real = 0
    for b in epoch_of(PairStream(path, tokenizer, 1000, 128)):
        cells += b["input_ids"].numel() + b["labels"].numel()
        real += int(b["attention_mask"].sum() + (b["labels"] >= 0).sum())
    assert real / cells > 0.92


def test_rows_without_text_are_passed_over(demo, tmp_path):
    _, tokenizer = demo
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["问", None, "", "北"], "response": ["答", "答", "答", None]}), path)
    batches = epoch_of(PairStream(path, tokenizer, 100, 20))
    assert len(batches) == 1 and batches[0]["labels"].shape[0] == 1
    pq.write_table(pa.table({"prompt": pa.array([None, ""], pa.string()), "response": ["答", "答"]}), path)
    with pytest.raises(ValueError, match="no row has text"):
        next(iter(PairStream(path, tokenizer, 100, 20)))


def test_three_columns_carry_row_numbers(demo, tmp_path):
    _, tokenizer = demo
    path = tmp_path / "x.parquet"
    rows = [{"prompt": f"第{i}问", "chosen": f"北京{i}", "rejected": f"东京{i}"} for i in range(100)]
    write_pairs(path, rows, ("prompt", "chosen", "rejected"))
    seen = []
    for batch in epoch_of(PairStream(path, tokenizer, 500, 20, columns=("prompt", "chosen", "rejected"))):
        for n, chosen, rejected in zip(batch["rows"].tolist(), batch["chosen_labels"], batch["rejected_labels"], strict=True):
            assert tokenizer.decode(chosen[chosen >= 0]) == rows[n]["chosen"] and tokenizer.decode(rejected[rejected >= 0]) == rows[n]["rejected"]
            seen.append(n)
    assert sorted(seen) == list(range(100))


def test_bad_training_files_are_refused(demo, tmp_path):
    path, tokenizer = demo
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        PairStream(tmp_path / "none.parquet", tokenizer)
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        PairStream(tmp_path / "cut.parquet", tokenizer)
    pq.write_table(pa.table({"question": ["a"], "response": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column 'prompt'; it has question, response"):
        PairStream(tmp_path / "x.parquet", tokenizer)
    pq.write_table(pa.table({"prompt": [1], "response": ["b"]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="holds int64, not text"):
        PairStream(tmp_path / "y.parquet", tokenizer)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "response": pa.array([], pa.string())}), tmp_path / "z.parquet")
    with pytest.raises(ValueError, match="no rows"):
        PairStream(tmp_path / "z.parquet", tokenizer)
    with pytest.raises(ValueError, match="cannot hold one row"):
        PairStream(path, tokenizer, micro_batch_tokens=100, max_len=64)


def test_demo_is_deterministic_and_held_out():
    train, valid = make_demo()
    assert (train, valid) == make_demo() and train != make_demo(1)[0]
    assert 10_000 < len(train) < 100_000 and len(valid) > 500
    answers: dict[str, str] = {}
    for prompt, response in train + valid:
        assert answers.setdefault(prompt, response) == response  # one question, one answer
    bare = {p.rpartition("，")[2] for p, _ in train}
    assert not bare & {p.rpartition("，")[2] for p, _ in valid if "晚安" not in p and p.rpartition("，")[2]}
    known = {r for _, r in train}
    facts = [r for p, r in valid if not data.is_sum(p)]
    assert set(facts) <= known  # the facts are known, only the wording is new
    assert not {r for p, r in valid if data.is_sum(p)} & known  # the sums are not


@pytest.mark.parametrize(("raw", "clean"), [
    ("你好,世界!真的吗?", "你好，世界！真的吗？"), ("圆周率是3.14,约等于3。", "圆周率是3.14,约等于3。"), ("好。。。。", "好。"), ("等等……好——", "等等……好——"),
    ("a\r\nb\x00\u200bc", "a\nbc"), ("多   个　 空格", "多 个 空格"), ("第一\n\n\n\n第二", "第一\n\n第二"), ("完.", "完。"), ("见v1.2.3版.", "见v1.2.3版。"),
    ("def f(x):\n    return {1: x, 2: y}", "def f(x):\n    return {1: x, 2: y}"), ("1. 一\n2. 二", "1. 一\n2. 二"), ("时间:12:30", "时间:12:30")])
def test_cleaning_rules(raw, clean):
    assert clean_text(raw) == clean


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="你好，,.。!！?? \n\t ab12：:()…—", max_size=60))
def test_cleaning_is_idempotent(text):
    once = clean_text(text)
    assert clean_text(once) == once


def test_pairs_are_dropped_for_a_reason():
    assert clean_pair("问题", "这是一个回答", 1, 100) == ("问题", "这是一个回答")
    for prompt, response, reason in [("", "答案在这里", "empty"), ("一样", "一样", "response repeats the prompt"), (None, "答", "a field is missing or not text"), ("问", "短", "response under 2 characters"),
                                     ("问" * 200, "这是回答", "over 100 characters"), ("what", "this is English only", "mostly not Chinese")]:
        assert clean_pair(prompt, response, 2, 100) == reason
    long = "这是一句话。" * 40 + "这一句没有说"
    assert clean_pair("问题", long, 1, 1000)[1] == "这是一句话。" * 40


def test_near_duplicates_are_found_and_nothing_else():
    rng = random.Random(0)
    chars = [chr(c) for c in range(0x4e00, 0x4e00 + 500)]
    texts = ["".join(rng.choices(chars, k=rng.randint(30, 300))) for _ in range(400)]
    edited, expected = [], []
    for i, text in enumerate(texts):
        t = list(text)
        for _ in range(rng.choice([0, 1, 2, 5, 20])):
            t[rng.randrange(len(t))] = rng.choice(chars)
        edited.append("".join(t))
        a, b = set(shingles([text])[0].tolist()), set(shingles([edited[-1]])[0].tolist())
        expected.append(len(a & b) / len(a | b))
    dropped = set(dedup_indices(texts + edited, threshold=0.85).tolist())
    assert all(400 <= i for i in dropped)
    found = [400 + i in dropped for i in range(400)]
    assert all(e >= 0.85 for e, f in zip(expected, found, strict=True) if f)
    high = [f for e, f in zip(expected, found, strict=True) if e >= 0.9]
    assert len(high) > 100 and sum(high) / len(high) >= 0.95
    assert dedup_indices(["，。", "", "！", "短", "短。", "短文"]).tolist() == [4]
    assert dedup_indices(["一二三四五六七八", "别的句子在这里"], against=["一二三四五，六七八！"]).tolist() == [0]


def test_signatures_estimate_jaccard():
    rng = random.Random(1)
    chars = [chr(c) for c in range(0x4e00, 0x4e00 + 3000)]
    errors = []
    for _ in range(60):
        base = rng.choices(chars, k=rng.randint(20, 800))
        other = base[:]
        for _ in range(rng.randint(1, 30)):
            other[rng.randrange(len(other))] = rng.choice(chars)
        texts = ["".join(base), "".join(other)]
        a, b = (set(shingles([t])[0].tolist()) for t in texts)
        signatures, _ = minhash(texts)
        errors.append((signatures[0] == signatures[1]).mean() - len(a & b) / len(a | b))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.07


def call(*args: str):
    return subprocess.run([sys.executable, "data.py", *args], capture_output=True, text=True, timeout=60)


def test_commands(tmp_path):
    rows = [{"instruction": f"第{i}个问题,是什么?", "input": "", "output": f"这是第{i}个问题的回答,很好." + "内容" * (i % 7)} for i in range(300)]
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps([*rows, rows[0], {"instruction": "a"}], ensure_ascii=False), "utf-8")
    clean = str(tmp_path / "clean.parquet")
    done = call("clean", "--source", "alpaca", str(raw), "--out", clean, "--workers", "2")
    assert done.returncode == 0 and "301  kept" in done.stdout and "1  a field is missing" in done.stdout, done.stderr + done.stdout
    assert next(read_rows([clean])) == {"prompt": "第0个问题，是什么？", "response": "这是第0个问题的回答，很好。"}
    unique = str(tmp_path / "unique.parquet")
    done = call("dedup", clean, "--out", unique, "--workers", "1", "--threshold", "0.99")
    assert done.returncode == 0 and "300 of 301" in done.stdout, done.stderr + done.stdout
    done = call("split", unique, "--out", str(tmp_path / "s"), "--valid", "0.2")
    assert done.returncode == 0
    sides = [{r["prompt"] for r in read_rows([tmp_path / "s" / f"{s}.parquet"])} for s in ("train", "valid")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 300 and 30 < len(sides[1]) < 90
    done = call("stats", unique)
    assert done.returncode == 0 and "300 rows" in done.stdout
    done = call("demo", "--out", str(tmp_path / "demo"))
    assert done.returncode == 0
    assert pq.read_table(tmp_path / "demo" / "train.parquet").column_names == ["prompt", "response"]


@pytest.mark.parametrize("args", [["clean", "--source", "alpaca", "no.json", "--out", "x.parquet"], ["clean", "--source", "unknown", "a", "--out", "x"], ["stats", "nowhere"],
                                  ["dedup", "tests/requirements.txt", "--out", "x.parquet"], ["split", "tests/requirements.txt", "--out", "x", "--valid", "2"]], ids=str)
def test_bad_commands_end_with_one_line(args, tmp_path):
    done = call(*args)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(("source", "row", "expected"), [
    ("webtext2019zh", {"title": "标题", "content": "内容在这里", "star": 6}, ("标题", "内容在这里")), ("webtext2019zh", {"title": "标题", "content": "内容", "star": 4}, "fewer than 5 stars"),
    ("baike_qa2019", {"title": "怎么办", "desc": "怎么办怎么办", "answer": "这样办"}, ("怎么办", "这样办")), ("baike_qa2019", {"title": "怎么办", "desc": "头疼", "answer": "喝水"}, ("怎么办\n头疼", "喝水")),
    ("zhihu_kol", {"INSTRUCTION": "问", "RESPONSE": "答"}, ("问", "答")), ("belle", {"instruction": "翻译这句", "input": "a", "output": "b"}, "translation or table"),
    ("preference", {"prompt": "问", "chosen": "好", "reject": "坏"}, ("问", "好", "坏")),
    ("duie", {"text": "甲写了乙", "spo_list": [{"subject": "乙", "predicate": "作者", "object": {"@value": "甲"}}]}, ("请抽取出下面这句话中的所有三元组：甲写了乙", "[(乙,作者,甲)]"))], ids=str)
def test_sources(source, row, expected):
    assert data.SOURCES[source](row) == expected
