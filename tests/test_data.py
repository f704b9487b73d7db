"""Pairs are made, cleaned, deduplicated and split as promised, and PairStream gives the same batches to everyone."""
import copy
import csv
import functools
import gzip
import importlib
import io
import itertools
import json
import operator
import os
import random
import re
import resource
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import (
    ArgumentParser,
    PairStream,
    Rows,
    Texts,
    clean_pair,
    clean_text,
    dedup_indices,
    input_files,
    make_demo,
    minhash,
    number,
    ordered_map,
    plan_batches,
    read_csv,
    shingles,
    write_pairs,
)
from tokenizer import Tokenizer
from train import overlap


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
        stream.state = stream.locate(**stream.state)._asdict()


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


@pytest.mark.quick
def test_workers_import_the_main_program_only_for_its_own_functions(monkeypatch):
    def own():
        pass
    own.__module__ = "__main__"
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", "program.py", raising=False)
    for function, hidden in ((own, False), (functools.partial(own), False), (data.read_window, True), (functools.partial(data.read_window), True)):
        with data.starting_workers(function):
            assert (main.__file__ is None) == hidden
        assert main.__file__ == "program.py"


def test_a_worker_does_not_run_the_program_again(demo, tmp_path, monkeypatch):
    """So one without `if __name__ == "__main__"` may have workers, and they do not wait for its imports."""
    path, tokenizer = demo
    tokenizer.save_pretrained(tmp_path)
    program = tmp_path / "program.py"
    program.write_text(f"""if True:
        print("begins", __name__)
        import itertools, data, tokenizer
        data.WINDOW_ROWS = 1000
        stream = data.PairStream({str(path)!r}, tokenizer.Tokenizer.from_pretrained({str(tmp_path)!r}), 2000, 64, workers=2)
        print(sum(len(batch["labels"]) for batch in itertools.islice(stream, 60)), __file__)
        stream.close()
    """)
    ran = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parent)}, check=False)
    monkeypatch.setattr(data, "WINDOW_ROWS", 1000)
    rows = sum(len(batch["labels"]) for batch in take(PairStream(path, tokenizer, 2000, 64), 60))
    assert ran.stderr == "" and ran.stdout.splitlines() == ["begins __main__", f"{rows} {program}"]


@pytest.mark.quick
def test_the_epoch_is_counted_in_rows(demo, monkeypatch):
    path, tokenizer = demo
    monkeypatch.setattr(data, "WINDOW_ROWS", 2000)  # of 3,001: the second window is smaller
    stream, rows = PairStream(path, tokenizer, 2000, 64), 0
    for batch in itertools.islice(stream, len(epoch_of(PairStream(path, tokenizer, 2000, 64))) - 1):
        rows += len(batch["labels"])
        assert abs(stream.epoch - rows / 3001) < 0.05


@pytest.mark.quick
def test_the_seed_and_the_epoch_change_the_order(demo):
    path, tokenizer = demo
    n = len(epoch_of(PairStream(path, tokenizer, 2000, 64)))
    first = take(PairStream(path, tokenizer, 2000, 64), 2 * n)
    assert not same(first[:n], first[n:])
    assert not same(first[:n], take(PairStream(path, tokenizer, 2000, 64, seed=1), n))


@pytest.mark.quick
def test_a_rank_without_batches_moves_on_with_the_others(demo, monkeypatch):
    path, tokenizer = demo
    monkeypatch.setattr(data, "WINDOW_ROWS", 1000)
    first, idle = (PairStream(path, tokenizer, 2000, 64, rank=rank, world_size=3, group=2) for rank in (0, 2))
    for _ in range(60):  # over the ends of windows and of an epoch
        assert len(list(first.next_group())) == 1 and list(idle.next_group()) == []
        assert idle.state == first.state and idle.epoch == first.epoch
    assert first.state["epoch"] == 1
    with pytest.raises(ValueError, match="no batches"):
        next(iter(idle))


@pytest.mark.quick
def test_a_killed_worker_is_one_line(demo, monkeypatch):
    path, tokenizer = demo
    monkeypatch.setattr(data, "WINDOW_ROWS", 500)
    stream = PairStream(path, tokenizer, 2000, 64, workers=1)
    next(iter(stream))
    for process in stream.pool.pool._processes.values():
        process.kill()
    with pytest.raises(ChildProcessError, match="was killed .*--workers"):
        take(stream, 100)


def test_terminated_workers_leave_the_same_batches(demo, monkeypatch, capsys):
    """SIGTERM to all processes of a run asks the first one to save, for which it may need a window."""
    path, tokenizer = demo
    monkeypatch.setattr(data, "WINDOW_ROWS", 500)
    expected = take(PairStream(path, tokenizer, 2000, 64), 100)
    stream = PairStream(path, tokenizer, 2000, 64, workers=2)
    batches = [next(iter(stream))]
    for process in stream.pool.pool._processes.values():
        process.terminate()
    batches += take(stream, 99)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(batches, expected, strict=True) for name in a)
    assert "tokenizes alone" in capsys.readouterr().err


def test_a_very_large_row_group_is_several_windows(demo, monkeypatch, tmp_path):
    path, tokenizer = demo
    table = pq.read_table(path)
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=len(table))
    monkeypatch.setattr(data, "WINDOW_ROWS", 1000)
    monkeypatch.setattr(data, "SLICE_ROWS", 100)
    stream = PairStream(tmp_path / "one.parquet", tokenizer, 2000, 64)
    assert len(stream.plan(0)) == 4
    whole = epoch_of(stream)
    seen = sorted(tokenizer.decode(ids) for batch in whole for ids in batch["input_ids"].tolist())
    assert seen == sorted(table["prompt"].to_pylist())
    for n in (5, len(whole) - 3):  # the second needs the last window, of which the first rows are passed over
        stream = PairStream(tmp_path / "one.parquet", tokenizer, 2000, 64)
        take(stream, n)
        again = PairStream(tmp_path / "one.parquet", tokenizer, 2000, 64, state=stream.state)
        assert same(take(again, 3), whole[n:n + 3])


def test_memory_does_not_grow_with_the_file(demo, tmp_path):
    """A file of 60 MB of text in one row group: far less than that is held."""
    _, tokenizer = demo
    tokenizer.save_pretrained(tmp_path)
    table = pa.table({"prompt": [f"第{i}问" for i in range(120_000)], "response": [f"{i}的回答：" + "北京的反义词是上海。" * 16 for i in range(120_000)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=120_000, use_dictionary=False, compression=None)
    assert (tmp_path / "x.parquet").stat().st_size > 55e6
    script = f"""
import resource, torch
from data import PairStream
from train import overlap
from tokenizer import Tokenizer
stream = PairStream({str(tmp_path / "x.parquet")!r}, Tokenizer.from_pretrained({str(tmp_path)!r}), 8192, 320)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for batch in stream:
    if stream.state["epoch"] == 1:
        break
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert float(done.stdout) < 250, done.stdout + done.stderr


@pytest.mark.quick
def test_shapes_are_few_when_asked(demo):
    path, tokenizer = demo
    batches = epoch_of(PairStream(path, tokenizer, 2000, 64, round_to=16))
    shapes = {(b["input_ids"].shape[1], b["labels"].shape[1]) for b in batches}
    assert all(s % 16 == 0 == t % 16 for s, t in shapes) and len(shapes) <= 16
    assert all(len(b["labels"]) * (b["input_ids"].shape[1] + b["labels"].shape[1]) <= 2000 for b in batches)
    assert sum(len(b["labels"]) for b in batches) == 3001


@pytest.mark.quick
def test_absurdly_long_rows_are_cut(demo, tmp_path):
    _, tokenizer = demo
    pq.write_table(pa.table({"prompt": ["北京，" * 1_000_000, "问"], "response": ["答", "北" * 3_000_000]}), tmp_path / "x.parquet")
    for batch in epoch_of(PairStream(tmp_path / "x.parquet", tokenizer, 640, 320)):
        assert batch["input_ids"].shape[1] + batch["labels"].shape[1] <= 640
        assert (batch["input_ids"] == 1).sum(1).eq(1).all() and (batch["labels"] == 1).sum(1).eq(1).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=200), st.integers(100, 1000), st.integers(0, 5))
def test_plans_hold_every_row_once_within_the_budget(lengths, budget, seed):
    lengths = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    plan = plan_batches(lengths, budget, np.random.default_rng(seed))
    assert sorted(i for rows in plan for i in rows) == list(range(len(lengths)))
    assert all(len(rows) * lengths[rows].max(0).sum() <= budget for rows in plan)


@pytest.mark.quick
def test_little_is_padding(demo):
    path, tokenizer = demo
    cells = real = 0
    for b in epoch_of(PairStream(path, tokenizer, 1000, 128)):
        cells += b["input_ids"].numel() + b["labels"].numel()
        real += int(b["attention_mask"].sum() + (b["labels"] >= 0).sum())
    assert real / cells > 0.92


@pytest.mark.quick
def test_rows_without_text_are_passed_over(demo, tmp_path, capsys):
    _, tokenizer = demo
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["问", None, "", "北"], "response": ["答", "答", "答", None]}), path)
    batches = epoch_of(PairStream(path, tokenizer, 100, 20))
    assert len(batches) == 1 and batches[0]["labels"].shape[0] == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    pq.write_table(pa.table({"prompt": pa.array([None, ""], pa.string()), "response": ["答", "答"]}), path)
    with pytest.raises(ValueError, match="no row has text"):
        next(iter(PairStream(path, tokenizer, 100, 20)))
    assert f"(first: {path}, row group 0, row 1)" in capsys.readouterr().err


@pytest.mark.quick
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


@pytest.mark.quick
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


@pytest.mark.quick
@pytest.mark.parametrize(("raw", "clean"), [
    ("你好,世界!真的吗?", "你好，世界！真的吗？"), ("圆周率是3.14,约等于3。", "圆周率是3.14,约等于3。"), ("好。。。。", "好。"), ("等等……好——", "等等……好——"),
    ("a\r\nb\x00\u200bc", "a\nbc"), ("多   个　 空格", "多 个 空格"), ("第一\n\n\n\n第二", "第一\n\n第二"), ("完.", "完。"), ("见v1.2.3版.", "见v1.2.3版。"),
    ("def f(x):\n    return {1: x, 2: y}", "def f(x):\n    return {1: x, 2: y}"), ("1. 一\n2. 二", "1. 一\n2. 二"), ("时间:12:30", "时间:12:30")])
def test_cleaning_rules(raw, clean):
    assert clean_text(raw) == clean


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="你好，,.。!！?? \n\t ab12：:()…—~;{}=\x0c”", max_size=60))
def test_cleaning_is_idempotent(text):
    once = clean_text(text)
    assert clean_text(once) == once
    trimmed = data.trim_unfinished(once, 10)
    assert data.trim_unfinished(trimmed, 10) == trimmed and once.startswith(trimmed) and "\n" not in once[len(trimmed):]


@pytest.mark.parametrize("text", ["for (;;) { }", "case $x in a) echo 1;; esac", "a,,b,1", "~~~python\nx\n~~~", "SELECT 姓名,年龄 FROM 学生 WHERE a = 1", "对象.方法()",
                                  "https://x.com/搜索?关键词=1", "a\tb\tc", "    def f():\n        return 1", "| 列,一 | 列  二 |\n| --- | --- |"])
def test_code_and_tables_are_left_alone(text):
    assert clean_text(text) == text


def test_only_what_breaks_off_is_trimmed():
    prose = "这是一段话。" * 40
    for whole in ("\n".join(f"{i}. 第{i}个很好的建议和一些说明文字" for i in range(1, 16)), prose + "所以答案是42", prose + '他说:"很好。"', prose + "看 https://x.cn/a",
                  "int main() {\n" + "\n".join(f"    int x{i} = {i};" for i in range(20)) + "\n}", prose + "\n结束了", prose + "\n- 一。二"):
        assert data.trim_unfinished(whole) == whole
    assert data.trim_unfinished(prose + "他说：“好。”然后他") == prose + "他说：“好。”"


def test_a_name_is_taken_off_an_entry_only_where_it_is_a_line():
    assert data.from_wiki({"title": "北京", "text": "北京是中国的首都。"})[1] == "北京是中国的首都。"
    assert data.from_wiki({"title": "北京", "text": "北京\n\n北京是中国的首都。"})[1] == "北京是中国的首都。"


def test_triples_are_kept_to_the_letter(tmp_path):
    row = {"text": "周杰伦,唱了《你是谁?》。", "spo_list": [{"subject": "你是谁?", "predicate": "歌手", "object": {"@value": "周杰伦"}}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n" + json.dumps({"spo_list": []}) + "\n", "utf-8")
    rows, done = cleaned(tmp_path, "duie", tmp_path / "x.jsonl")
    assert [r["response"] for r in rows] == ["[(你是谁?,歌手,周杰伦)]"] and "1  a field is missing or not text" in done.stdout


def test_what_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "问题", "response": "这是一个回答"}\n', "utf-8")
    (tmp_path / "folder.parquet").mkdir()
    for out in ("x.jsonl", "folder.parquet", ""):
        done = call("dedup", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / out))
        assert done.returncode == 2 and "ends with .parquet" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "empty.jsonl").write_text("", "utf-8")
    (tmp_path / "old.parquet").write_bytes(b"old")
    for command in (["dedup"], ["clean", "--source", "pairs"]):
        done = call(*command, str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "old.parquet"))
        assert done.returncode == 2 and "nothing was written" in done.stderr and (tmp_path / "old.parquet").read_bytes() == b"old"
    done = call("dedup", str(tmp_path / "x.jsonl"), "--against", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "old.parquet"))
    assert done.returncode == 2 and "empty.jsonl: no row can be used" in done.stderr


def test_a_split_that_leaves_an_older_side_behind_says_so(tmp_path):
    write_pairs(tmp_path / "x.parquet", [{"prompt": f"{i}", "response": "a"} for i in range(100)])
    assert call("split", str(tmp_path / "x.parquet"), "--out", str(tmp_path / "s"), "--valid", "0.2").returncode == 0
    done = call("split", str(tmp_path / "x.parquet"), "--out", str(tmp_path / "s"), "--valid", "0")
    assert done.returncode == 0 and "valid.parquet is of an earlier split" in done.stderr


def test_a_side_of_a_split_is_split_anew_by_another_seed(tmp_path):
    """By the same hash all of its rows stay together."""
    write_pairs(tmp_path / "x.parquet", [{"prompt": f"{i}", "response": "a"} for i in range(2000)])
    once, again = tmp_path / "once", tmp_path / "again"
    assert call("split", str(tmp_path / "x.parquet"), "--out", str(once), "--valid", "0.3").returncode == 0
    done = call("split", str(once / "train.parquet"), "--out", str(again), "--valid", "0", "--test", "0.3")
    assert done.returncode == 0 and "test.parquet has no rows" in done.stderr and "choose another --seed" in done.stderr
    for path in again.iterdir():
        path.unlink()
    done = call("split", str(once / "valid.parquet"), "--out", str(again), "--valid", "0.3")
    assert done.returncode == 2 and "train.parquet would have no rows" in done.stderr and not list(again.iterdir())
    for side in ("train", "valid"):
        assert call("split", str(once / f"{side}.parquet"), "--out", str(again), "--valid", "0.3", "--seed", "1").returncode == 0
        rows = [pq.read_metadata(again / f"{part}.parquet").num_rows for part in ("train", "valid")]
        assert 0.2 < rows[1] / sum(rows) < 0.4 and sum(rows) == pq.read_metadata(once / f"{side}.parquet").num_rows


@pytest.mark.quick
def test_the_rows_that_the_readme_shows_are_kept(tmp_path):
    shown = re.findall(r"^(\{.*\}) +([a-z0-9, ]+)$", (Path(__file__).parents[1] / "README.md").read_text("utf-8"), re.MULTILINE)
    assert len(shown) == 4
    for row, sources in shown:
        (tmp_path / "row.jsonl").write_text(row + "\n", "utf-8")
        for source in sources.split(", "):
            done = call("clean", "--source", source, str(tmp_path / "row.jsonl"), "--out", str(tmp_path / "o.parquet"), "--workers", "1")
            assert done.returncode == 0 and pq.read_metadata(tmp_path / "o.parquet").num_rows == 1, (source, done.stdout + done.stderr)


@pytest.mark.quick
def test_kinds_of_string_columns_may_be_mixed(demo, tmp_path):
    _, tokenizer = demo
    table = pa.table({"response": ["北京", "上海"], "prompt": ["问", "答"]})
    files = []
    for i, kind in enumerate((pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()))):
        files.append(tmp_path / f"{i}.parquet")
        pq.write_table(table.cast(pa.schema([("response", kind), ("prompt", kind)])), files[-1])
    batches = epoch_of(PairStream(files, tokenizer, 100, 20))
    assert sorted(tokenizer.decode(ids) for b in batches for ids in b["input_ids"].tolist()) == ["答"] * 5 + ["问"] * 5
    assert [row["prompt"] for row in Rows(files)] == ["问", "答"] * 5
    assert overlap(files, files[:1]) == 2


@pytest.mark.quick
def test_a_tokenizer_without_eos_is_given_one(demo, tmp_path):
    _, tokenizer = demo
    other = copy.copy(tokenizer)
    other.append_eos = False
    pq.write_table(pa.table({"prompt": ["北京"], "response": ["上海"]}), tmp_path / "x.parquet")
    assert same(epoch_of(PairStream(tmp_path / "x.parquet", other, 100, 20)), epoch_of(PairStream(tmp_path / "x.parquet", tokenizer, 100, 20)))
    assert other.append_eos is False


@pytest.mark.quick
def test_rows_of_equal_lengths_are_planned_at_once():
    lengths = np.full((20_000, 2), 32)
    plan = plan_batches(lengths, 640, np.random.default_rng(0))
    assert sorted(np.concatenate(plan).tolist()) == list(range(20_000)) and len(plan) <= 1.3 * 2000


def test_pairs_are_dropped_for_a_reason():
    assert clean_pair("问题", "这是一个回答", 1, 100) == ("问题", "这是一个回答")
    for prompt, response, reason in [("", "答案在这里", "empty"), ("一样", "一样", "response repeats the prompt"), (None, "答", "a field is missing or not text"), ("问", "短", "response under 2 characters"),
                                     ("问" * 200, "这是回答", "over 100 characters"), ("what", "this is English only", "mostly not Chinese")]:
        assert clean_pair(prompt, response, 2, 100) == reason
    long = "这是一句话。" * 40 + "这一句没有说"
    assert clean_pair("问题", long, 1, 1000)[1] == "这是一句话。" * 40


def five_grams(text: str) -> set[str]:
    """The plain definition of shingles: the 5-grams of what is left without punctuation and spaces."""
    kept = "".join(c for c in text if not unicodedata.category(c).startswith(("P", "Z", "Cc", "Cf")))
    return {kept[i:i + 5] for i in range(max(1, len(kept) - 4))} - {""}


def similarity(a: str, b: str) -> float:
    x, y = five_grams(a), five_grams(b)
    return len(x & y) / len(x | y) if x | y else 0.0


@pytest.mark.quick
@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet="一二三四五，。 a\n😀", max_size=14), max_size=12))
def test_shingles_are_the_5_grams(texts):
    hashes, counts = shingles(texts)
    ends = np.cumsum(counts)
    names: dict[int, str] = {}
    for text, end, count in zip(texts, ends, counts, strict=True):
        kept = "".join(c for c in text if c not in "，。 \n")
        grams = [kept[i:i + 5] for i in range(max(1, len(kept) - 4))] if kept else []
        assert len(grams) == count
        for gram, value in zip(grams, hashes[end - count:end].tolist(), strict=True):
            assert names.setdefault(value, gram) == gram
    assert len(set(names.values())) == len(names)


def edited(text: str, rng: random.Random, edits: int, chars: list[str]) -> str:
    out = list(text)
    for _ in range(edits):
        out[rng.randrange(len(out))] = rng.choice(chars)
    return "".join(out)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.85, 0.95])
def test_near_duplicates_are_found_and_nothing_else(threshold):
    rng = random.Random(0)
    chars = [chr(c) for c in range(0x4e00, 0x4e00 + 500)]
    texts = ["".join(rng.choices(chars, k=rng.randint(20, 300))) for _ in range(600)]
    others = [edited(text, rng, rng.choice([0, 1, 2, 5, 10, 20]), chars) for text in texts]
    dropped = set(dedup_indices(texts + others, threshold).tolist())
    assert all(i >= 600 for i in dropped)
    expected = np.array([similarity(a, b) for a, b in zip(texts, others, strict=True)])
    found = np.array([600 + i in dropped for i in range(600)])
    assert (expected[found] >= threshold).all()
    high = found[(expected >= min(1.0, threshold + 0.05))]
    assert len(high) > 100 and high.mean() >= 0.95


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_of_each_group_stays(workers):
    assert dedup_indices(["，。", "", "！", "短", "短。", "短文"], workers=workers).tolist() == [4]
    assert dedup_indices(["一二三四五六七八", "别的句子在这里"], against=["一二三四五，六七八！"], workers=workers).tolist() == [0]
    assert dedup_indices([], workers=workers).tolist() == [] and dedup_indices(iter(["a", "a"]), workers=workers).tolist() == [1]
    rng, chars = random.Random(0), [chr(c) for c in range(0x4e00, 0x4e00 + 500)]
    base = ["".join(rng.choices(chars, k=100)) for _ in range(30)]
    many = [edited(rng.choice(base), rng, rng.choice([0, 0, 1, 1, 2]), chars) for _ in range(700)]
    sets, naive = [five_grams(text) for text in many], []  # the plain definition: every text against all that stay
    for i, own in enumerate(sets):
        if not any(len(own & sets[j]) >= 0.85 * len(own | sets[j]) for j in naive):
            naive.append(i)
    kept = sorted(set(range(700)) - set(dedup_indices(many, workers=workers).tolist()))
    assert len(set(kept) ^ set(naive)) <= 0.02 * len(naive) + 2 and 30 < len(naive) < 350


@pytest.mark.parametrize("lengths", [(6, 15), (20, 60), (60, 800)])
def test_signatures_estimate_jaccard(lengths):
    rng = random.Random(1)
    chars = [chr(c) for c in range(0x4e00, 0x4e00 + 3000)]
    errors = []
    for _ in range(300):
        base = "".join(rng.choices(chars, k=rng.randint(*lengths)))
        other = edited(base, rng, rng.randint(1, max(1, len(base) // 10)), chars)
        signatures, counts = minhash([base, other])
        assert counts.tolist() == [len(base) - 4, len(base) - 4]
        errors.append((signatures[0] == signatures[1]).mean() - similarity(base, other))
    sd = np.sqrt(0.25 / min(lengths[0] - 4, data.BINS))  # of so many independent draws, at the most uncertain J
    assert abs(np.mean(errors)) < 3 * sd / 300 ** 0.5 and np.std(errors) < sd


def call(*args: str) -> subprocess.CompletedProcess:
    return run_script("data.py", *args)


def test_commands(tmp_path):
    rows = [{"instruction": f"第{i}个问题,是什么?", "input": "", "output": f"这是第{i}个问题的回答,很好." + "内容" * (i % 7)} for i in range(300)]
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps([*rows, rows[0], {"instruction": "a"}], ensure_ascii=False), "utf-8")
    clean = str(tmp_path / "clean.parquet")
    done = call("clean", "--source", "alpaca", str(raw), "--out", clean, "--workers", "2")
    assert done.returncode == 0 and "301  kept" in done.stdout and "1  a field is missing" in done.stdout, done.stderr + done.stdout
    assert next(iter(Rows(clean))) == {"prompt": "第0个问题，是什么？", "response": "这是第0个问题的回答，很好。"}
    unique = str(tmp_path / "unique.parquet")
    done = call("dedup", clean, "--out", unique, "--workers", "1", "--threshold", "0.99")
    assert done.returncode == 0 and "300  kept" in done.stdout and "1  equal to an earlier one" in done.stdout, done.stderr + done.stdout
    done = call("split", unique, "--out", str(tmp_path / "s"), "--valid", "0.2")
    assert done.returncode == 0
    sides = [{r["prompt"] for r in Rows(tmp_path / "s" / f"{s}.parquet")} for s in ("train", "valid")]
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
    assert data.SOURCES[source].convert(row) == expected


def cleaned(tmp_path, source: str, *files, extra: tuple[str, ...] = ()):
    done = call("clean", "--source", source, *map(str, files), "--out", str(tmp_path / "clean.parquet"), "--workers", "1", *extra)
    assert done.returncode == 0, done.stderr
    return list(Rows(tmp_path / "clean.parquet")), done


def test_wiki_entries_become_questions(tmp_path):
    (tmp_path / "AA").mkdir()
    long = "这是一个很长的句子，说的是很多的事情。" * 60
    (tmp_path / "AA" / "wiki_00").write_text(
        '<doc id="1" url="https://zh.wikipedia.org/wiki?curid=1" title="数学">\n数学\n\n数学是研究数量的学科。它很古老。\n\n</doc>\n'
        f'<doc id="2" url="x" title="A&amp;B &quot;C&quot;">\nA&B "C"\n\n{long}\n</doc>\n<doc id="3" url="x" title="空">\n空\n\n</doc>\n'
        '<doc id="4" url="x" title="断">\n断\n\n没有说完', "utf-8")
    (tmp_path / "AA" / "wiki_01").write_text(json.dumps(
        {"id": "5", "url": "x", "title": "物理", "text": "物理\n\n物理学研究物质。\n\n它是自然科学。"}, ensure_ascii=False) + "\n{\n", "utf-8")
    rows, done = cleaned(tmp_path, "wiki", tmp_path / "AA")
    assert [r["response"] for r in rows] == ["数学是研究数量的学科。它很古老。", long[:19 * 26], "物理学研究物质。\n\n它是自然科学。"]
    assert "数学" in rows[0]["prompt"] and 'A&B "C"' in rows[1]["prompt"] and len(rows[1]["response"]) <= 512
    assert "1  empty" in done.stdout and f"1  line is not JSON  (first: {tmp_path}/AA/wiki_01, line 2)" in done.stdout and "1  entry without an end" in done.stdout
    assert len(data.WIKI_PROMPTS) >= 20 and all(p.count("%s") == 1 for p in data.WIKI_PROMPTS)


@pytest.mark.parametrize("encoding", ["gb18030", "utf-8"])
def test_broken_medical_records_are_repaired(tmp_path, encoding):
    text = ("department,title,ask,answer\r\n"
            "心血管科,高血压怎么办,我头晕,应该少吃盐，多运动\r\n"
            "心血管科,心慌,最近总是心慌，\r\n睡不好,注意休息，按时吃药\r\n"  # broken inside ask
            "消化科,胃疼,饭后胃疼,少吃辣,多喝水,看医生\r\n"  # commas in answer, not quoted
            '消化科,"腹胀",问,"第一，忌口\r\n第二，散步"\r\n'  # quoted, over two lines
            '消化科,口苦,说"苦,喝点水再看看\r\n'  # a quote that is never closed
            "消化科,只有标题\r\n")
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode(encoding))
    rows, done = cleaned(tmp_path, "chinese_medical", path)
    assert [(r["prompt"], r["response"]) for r in rows] == [
        ("高血压怎么办\n我头晕", "应该少吃盐，多运动"), ("心慌\n最近总是心慌，\n睡不好", "注意休息，按时吃药"), ("胃疼\n饭后胃疼", "少吃辣，多喝水，看医生"),
        ("腹胀\n问", "第一，忌口\n第二，散步"), ('口苦\n说"苦', "喝点水再看看")]
    assert f"1  record with fewer than four fields  (first: {path}, line 9)" in done.stdout


def test_dropped_rows_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    good = {"prompt": "问题是什么", "response": "这是一个好的回答"}
    rows = [good, {"prompt": None, "response": "答"}, {"prompt": "问", "response": 3}, {}, good | {"response": "坏的\ufffd回答在此"}, good | {"response": "\ud800好的回答在这里"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n[1]\n", "utf-8")
    kept, done = cleaned(tmp_path, "pairs", path)
    assert kept == [good, good | {"response": "好的回答在这里"}]
    for line in ("2  kept", f"3  a field is missing or not text  (first: {path}, row 2)", f"2  line is not JSON  (first: {path}, line 7)",
                 f"1  has characters that could not be read  (first: {path}, row 5)", "8  all"):
        assert line in done.stdout, done.stdout
    done = call("clean", "--source", "pairs", str(path), "--out", str(tmp_path / "no.parquet"), "--prompt_field", "question")
    assert done.returncode == 2 and "x.jsonl: pairs needs question and response; found prompt, response (name" in done.stderr and not (tmp_path / "no.parquet").exists()


def test_dedup_and_split_pass_over_rows_without_text(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": f"第{i}问", "chosen": f"好的{i}", "rejected": f"坏的{i}"} for i in range(20)] + [{"prompt": "问", "chosen": None, "rejected": "a"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3]]), "utf-8")
    done = call("dedup", str(path), "--out", str(tmp_path / "u.parquet"))
    assert done.returncode == 0 and "20  kept" in done.stdout and f"1 x row without text in 'chosen', skipped (first in {path}, row 21)" in done.stderr
    assert list(Rows(tmp_path / "u.parquet")) == rows[:20]  # triples stay triples
    done = call("split", str(path), "--out", str(tmp_path / "s"), "--valid", "0.3", "--test", "0.2")
    sides = [list(Rows(tmp_path / "s" / f"{side}.parquet")) for side in ("train", "valid", "test")]
    assert done.returncode == 0 and sorted(map(str, functools.reduce(operator.iadd, sides, []))) == sorted(map(str, [*rows[:20], rows[3]]))
    done = call("split", str(tmp_path / "u.parquet"), "--out", str(tmp_path / "more"), "--valid", "0.3", "--test", "0.2")
    for side, before in zip(("train", "valid", "test"), sides, strict=True):  # with less or more data a row keeps its side
        assert {str(r) for r in Rows(tmp_path / "more" / f"{side}.parquet")} == {str(r) for r in before}


def test_nothing_half_written_stays(tmp_path):
    (tmp_path / "out.parquet").write_bytes(b"before")
    (tmp_path / "x.json").write_text('[{"prompt": "a", "response": "这是一个回答"}, {"prompt": "b"', "utf-8")
    for command in (["clean", "--source", "pairs"], ["dedup"]):
        done = call(*command, str(tmp_path / "x.json"), "--out", str(tmp_path / "out.parquet"))
        assert done.returncode == 2 and "x.json cannot be read" in done.stderr and len(done.stderr.splitlines()) == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out.parquet", "x.json"] and (tmp_path / "out.parquet").read_bytes() == b"before"


@pytest.mark.quick
def test_a_row_group_that_is_damaged_is_named(demo, tmp_path):
    path, tokenizer = demo
    raw = bytearray(path.read_bytes())
    raw[4000:9000] = b"\0" * 5000
    (tmp_path / "x.parquet").write_bytes(raw)
    with pytest.raises(ValueError, match=r"x\.parquet: row group 0 cannot be read"):
        epoch_of(PairStream(tmp_path / "x.parquet", tokenizer, 2000, 64))


def rows_of(name: str, content: bytes | str, tmp_path: Path) -> tuple[list[dict], dict[str, str]]:
    """The rows of a file with this content, and what was wrong in it: reason -> where first."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = Rows(path, skip=True)
    return list(rows), {reason: where.removeprefix(f"{path}, ") for reason, where in rows.problems.first.items()}


def test_csv_records_that_do_not_fit_are_reported_and_the_rest_is_read(tmp_path):
    text = ("prompt,response\n" "一,甲\n" "二,乙,多\n" '三,"丙"丁\n' '四,"两行\n的回答"\n' "\n" "五\n" '六,"没有结束\n' "七,庚\n" '八,"辛"\n')
    rows, wrong = rows_of("x.csv", text, tmp_path)
    assert [tuple(row.values()) for row in rows] == [("一", "甲"), ("四", "两行\n的回答"), ("五", None), ("七", "庚"), ("八", "辛")]
    assert wrong == {"record with more fields than the header, skipped": "line 3", "bad quote in a CSV file, line skipped": "line 4"}
    with pytest.raises(ValueError, match=r"x\.csv cannot be read: line 3: 3 fields"):
        list(Rows(tmp_path / "x.csv"))


@pytest.mark.quick
@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.text(alphabet='a,"\n\r 好', max_size=6), min_size=2, max_size=2), max_size=8))
def test_csv_that_is_well_formed_is_read_as_written(records):
    file = io.StringIO()
    csv.writer(file).writerows([["x", "y"], *records])
    file.seek(0)
    expected = [dict(zip("xy", record)) for record in records]
    assert list(read_csv(io.StringIO(file.getvalue(), newline=""), lambda *bad: pytest.fail(str(bad)))) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt", "x.txt.gz"])
def test_byte_order_marks_are_understood(tmp_path, encoding, name):
    text = {"x.jsonl": '{"text": "你好"}\n', "x.json": '[{"text": "你好"}]', "x.csv": "text\n你好\n"}.get(name, "你好\n")
    content = text.encode(encoding)
    assert rows_of(name, gzip.compress(content) if name.endswith(".gz") else content, tmp_path) == ([{"text": "你好"}], {})


@pytest.mark.quick
def test_json_lists_are_read_by_any_name_and_their_errors_have_the_true_line(tmp_path):
    rows = [{"text": f"第{i}"} for i in range(500)]
    for name in ("x.json", "x.jsonl", "x.jsonl.gz"):
        content = json.dumps(rows, indent=1).encode()
        assert rows_of(name, gzip.compress(content) if name.endswith(".gz") else content, tmp_path) == (rows, {})
    lines = json.dumps(rows, indent=1).split("\n")
    lines[1201] = ' {"text": oops}'
    with pytest.raises(ValueError, match="line 1202 "):
        rows_of("x.jsonl", "\n".join(lines), tmp_path)
    with pytest.raises(ValueError, match="item 2 .* not an object"):
        rows_of("x.json", '[{"a": 1}, 3]', tmp_path)


def test_folders_give_their_data_and_say_what_they_skip(tmp_path, capsys):
    row = '{"text": "a"}\n'
    for name in ("a.jsonl", "sub/b.jsonl", ".ipynb_checkpoints/a.jsonl", "__MACOSX/a.jsonl", ".DS_Store", "dataset_infos.json", "sub/state.json",
                 "notes.md", "config.json"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(row)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.jsonl").write_text(row)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    files = [str(path.relative_to(tmp_path / "in")) for path in input_files([tmp_path / "in"])]
    assert files == ["a.jsonl", "linked/c.jsonl", "sub/b.jsonl"]
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    for text in ("3 hidden", "3 of a model or data set description", "1 broken links", "1 of unknown type (notes.md)"):
        assert text in said
    input_files([tmp_path / "in"])
    assert capsys.readouterr().err == ""  # once is enough


def test_commands_do_not_read_what_they_write(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"prompt": f"第{i}问", "response": f"这是回答{i}"}) + "\n" for i in range(90)), "utf-8")
    for _ in range(3):
        assert "90  all" in call("split", str(folder), "--out", str(folder), "--valid", "0.2").stdout
    (folder / "test.parquet").unlink(missing_ok=True)
    assert "90  kept" in call("dedup", str(folder / "a.jsonl"), "--out", str(folder / "u.parquet")).stdout
    done = call("clean", "--source", "pairs", str(folder / "a.jsonl"), str(folder / "u.parquet"), "--out", str(folder / "u.parquet"))
    assert done.returncode == 2 and "both input and output" in done.stderr


@pytest.mark.quick
def test_files_of_others_in_an_input_folder_are_not_overwritten(tmp_path):
    write_pairs(tmp_path / "ours.parquet", [{"prompt": "a", "response": "b"}])
    theirs = tmp_path / "train.parquet"
    pq.write_table(pq.read_table(tmp_path / "ours.parquet").replace_schema_metadata(None), theirs)
    before = theirs.read_bytes()
    done = call("split", str(tmp_path), "--out", str(tmp_path), "--valid", "0")
    assert done.returncode == 2 and "would be overwritten" in done.stderr and theirs.read_bytes() == before


@pytest.mark.quick
def test_only_the_command_that_made_a_file_may_replace_it(tmp_path):
    """In a folder that it reads: there, it would not read the file."""
    raw, folder = tmp_path / "raw.jsonl", tmp_path / "pairs"
    raw.write_text("".join(json.dumps({"prompt": f"{i}号问题是什么", "response": f"这是第{i}个回答"}, ensure_ascii=False) + "\n" for i in range(50)), "utf-8")
    assert call("clean", "--source", "pairs", str(raw), "--out", str(folder / "a.parquet")).returncode == 0
    for _ in range(2):
        assert call("split", str(folder), "--out", str(folder)).returncode == 0
    before = (folder / "train.parquet").read_bytes()
    for command in (["dedup", str(folder), "--out", str(folder / "train.parquet")], ["split", str(folder), str(raw), "--out", str(folder)],
                    ["clean", "--source", "pairs", str(folder), "--out", str(folder / "train.parquet")]):
        done = call(*command)
        assert done.returncode == 2 and "would be overwritten" in done.stderr and (folder / "train.parquet").read_bytes() == before


# --- output ------------------------------------------------------------------------------------------------------------------------

def shell(line: str, **env: str) -> subprocess.CompletedProcess:
    """A line of bash in which DATA stands for `python data.py`."""
    line = line.replace("DATA", f"{shlex.quote(sys.executable)} {shlex.quote(data.__file__)}")
    return subprocess.run(["bash", "-c", line], capture_output=True, env=os.environ | env, timeout=60, check=False)


@pytest.mark.quick
@pytest.mark.parametrize("line", ["(DATA dedup in.parquet --out o.parquet; echo $? > status) 2>&1 | true", "DATA dedup in.parquet --out o.parquet 2>&-; echo $? > status",
                                  "DATA dedup in.parquet --out o.parquet >&-; echo $? > status", "DATA dedup in.parquet --out o.parquet >&- 2>&-; echo $? > status"])
def test_a_command_finishes_without_a_reader(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    write_pairs("in.parquet", [{"prompt": f"{i}号问题是什么", "response": f"这是第{i}个回答"} for i in range(300)])
    shell(line)
    assert Path("status").read_text() == "0\n" and pq.read_table("o.parquet").num_rows > 0


@pytest.mark.quick
@pytest.mark.parametrize("encoding", ["gbk", "ascii", "latin-1", "utf-8"])
def test_output_in_any_encoding(tmp_path, monkeypatch, encoding):
    monkeypatch.chdir(tmp_path)
    write_pairs("in.parquet", [{"prompt": "a", "response": "b" * n} for n in range(1, 9)])
    done = shell("DATA stats in.parquet; DATA stats 不存在✗", PYTHONIOENCODING=encoding)
    assert done.returncode == 2 and b"8" in done.stdout and b"no such file or folder" in done.stderr and b"codec" not in done.stderr


@pytest.mark.quick
def test_an_empty_world_size_is_none(tmp_path):
    done = shell("DATA stats nothing", WORLD_SIZE="")
    assert done.returncode == 2 and done.stderr.splitlines() == [b"data.py: error: no such file or folder: nothing"]


@pytest.mark.quick
def test_names_that_are_not_utf8(tmp_path):
    for name, args in (("data.py", ["demo", "--out", "d\udcff"]), ("train.py", ["--out_dir", "d\udcff"]), ("sample.py", ["--model", "d\udcff"]),
                       ("dpo.py", ["merge", "--model", "m", "--adapter", "a", "--out", "d\udcff"])):
        done = run_script(name, *args[:-1], str(tmp_path / args[-1]))
        assert done.returncode == 2 and ("is not UTF-8" in done.stderr or "no model in" in done.stderr) and not list(tmp_path.iterdir()), name


@pytest.mark.quick
@pytest.mark.parametrize("first", ["prompt;response", "prompt\tresponse", "sep=,", "sep=;"])
def test_csv_with_other_separators(tmp_path, first):
    (tmp_path / "a.csv").write_text(f"{first}\n你好吗;我很好谢谢你\n", "utf-8")
    done = call("clean", "--source", "pairs", str(tmp_path / "a.csv"), "--out", str(tmp_path / "o.parquet"))
    assert done.returncode == 2 and "separated by commas" in done.stderr


@pytest.mark.quick
def test_a_parquet_column_that_is_there_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array(["你好吗"])] * 3, names=["prompt", "response", "response"])
    pq.write_table(table, tmp_path / "a.parquet")
    for command in (["stats"], ["dedup", "--out", str(tmp_path / "o.parquet")]):
        done = call(command[0], str(tmp_path / "a.parquet"), *command[1:])
        assert done.returncode == 2 and "the column 'response' twice" in done.stderr


@pytest.mark.quick
@pytest.mark.parametrize(("source", "row", "flags", "note"), [
    ("duie", {"text": "甲是乙", "spo_list": [{"subject": "甲", "predicate": "是", "object": "乙"}]}, ["--min_chars", "500"], "--min_chars has no effect"),
    ("belle", {"instruction": "你好吗朋友", "output": "我很好谢谢你"}, ["--turns", "3"], "--turns has no effect")])
def test_flags_of_clean_without_effect_are_told(tmp_path, source, row, flags, note):
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    done = call("clean", "--source", source, str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o.parquet"), *flags)
    assert done.returncode == 0 and note in done.stderr


@pytest.mark.parametrize(("row", "expected"), [
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "assistant", "value": "答"}]}, ("问", "答")),
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}, ("问", "答")),
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "assistant", "value": "答"}] * 2}, "conversation of several turns (see --turns)"),
    ({"conversations": []}, "conversations is not a list of from and value, or of role and content"), ({"conversations": "问"}, "conversations is not a list of from and value, or of role and content"),
    ({"conversations": None}, ("", None)), ({"conversations": [{"from": "human"}, {}]}, "conversations is not a list of from and value, or of role and content"),
    ({"conversations": [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}]}, "conversation in which human and assistant do not take turns"),
    ({"conversations": [{"from": "system", "value": "a"}, {"from": "Human", "value": "问"}, {"from": "chatgpt", "value": "答"}]}, ("问", "答")),
    ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, ("问", "答")),
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "tool", "value": "答"}]}, "conversation with the unknown role 'tool'"),
    ({"input": "问", "target": "答"}, ("问", "答")), ({"input": "翻译：问", "target": "答"}, "translation or table")], ids=str)
def test_belle_in_its_three_forms(row, expected):
    assert data.SOURCES["belle"].convert(row) == expected


def test_wiki_text_with_titles(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text("不属于任何词条\n\n数学:\n数学是研究数量的学科。例如:\n它很古老。\n\n物理：\n物理学研究物质。\n\n它是自然科学。\n\n空:\n\n", "utf-8")
    rows, done = cleaned(tmp_path, "wiki", path)
    assert [row["response"] for row in rows] == ["数学是研究数量的学科。例如：\n它很古老。", "物理学研究物质。\n\n它是自然科学。"]
    assert "数学" in rows[0]["prompt"] and "1  empty" in done.stdout and f"1  line outside an entry  (first: {path}, line 1)" in done.stdout


def test_what_pandas_and_the_reference_leave_in_files_is_removed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"instruction": "写一句话。", "input": NaN, "output": "这是一句话。[EOS]"}\n{"instruction": "写 [EOS] 的意思", "input": null, "output": "它是结束的标记。"}\n', "utf-8")
    rows, _ = cleaned(tmp_path, "alpaca", path)
    assert rows == [{"prompt": "写一句话。", "response": "这是一句话。"}, {"prompt": "写 [EOS] 的意思", "response": "它是结束的标记。"}]
    path.write_text(json.dumps({"prompt": "列出两点[EOS]", "chosen": "第一点在这里\\n第二点在这里", "rejected": "没有什么可列的"}) + "\n", "utf-8")
    rows, _ = cleaned(tmp_path, "preference", path)
    assert rows == [{"prompt": "列出两点", "chosen": "第一点在这里\n第二点在这里", "rejected": "没有什么可列的"}]


def test_traditional_characters_are_converted_when_asked(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "什麼是數學？", "response": "數學是研究數量的學科。"}) + "\n", "utf-8")
    assert cleaned(tmp_path, "pairs", path)[0][0]["response"] == "數學是研究數量的學科。"
    rows, _ = cleaned(tmp_path, "pairs", path, extra=("--to_simplified", "--workers", "2"))
    assert rows == [{"prompt": "什么是数学？", "response": "数学是研究数量的学科。"}]


def test_without_opencc_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opencc", None)  # as if it were not installed
    data.opencc.cache_clear()
    with pytest.raises(ValueError, match="pip install opencc"):
        data.clean(["tests/requirements.txt"], "pairs", str(tmp_path / "o.parquet"), [], 1, 9, 1, to_simplified=True)
    data.opencc.cache_clear()


def test_the_temporary_file_of_a_killed_writer_is_deleted_by_the_next_one(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True).stdout.strip()
    names = {f"x.json.{gone}.tmp": False, f"x.json.{os.getppid()}.tmp": True, f"y.json.{gone}.tmp": True, "x.json.old.tmp": True, f"x[.json.{gone}.tmp": True}
    for name in names:
        (tmp_path / name).write_text("half")
    data.write_file(tmp_path / "x.json", "whole")
    assert {name: (tmp_path / name).exists() for name in names} == names
    data.write_file(tmp_path / "x[.json", "whole")
    assert not (tmp_path / f"x[.json.{gone}.tmp").exists()


def test_a_full_disk_is_named_and_nothing_changes(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"prompt": f"第{i}个问题是什么？", "response": f"这是它的一个回答，很长，也不重复：{i * 7919}"}) + "\n" for i in range(20000)), "utf-8")
    (tmp_path / "o.parquet").write_bytes(b"before")
    done = subprocess.run([sys.executable, "data.py", "clean", "--source", "pairs", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "o.parquet"), "--workers", "1"],
                          capture_output=True, text=True, timeout=60, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)), check=False)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and f"{tmp_path}/o.parquet: could not be written: File too large" in line, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.parquet", "x.jsonl"] and (tmp_path / "o.parquet").read_bytes() == b"before"


def test_medical_tables_are_read_by_their_header(tmp_path):
    (tmp_path / "x.csv").write_text(",department,title,ask,answer\n0,心血管科,高血压怎么办,我头晕,应该少吃盐，多运动\n", "utf-8")
    (tmp_path / "y.csv").write_text("title,ask,answer,department\n心慌怎么办,睡不好,注意休息按时吃药,心血管科\n", "utf-8")
    rows, _ = cleaned(tmp_path, "chinese_medical", tmp_path / "x.csv", tmp_path / "y.csv")
    assert rows == [{"prompt": "高血压怎么办\n我头晕", "response": "应该少吃盐，多运动"}, {"prompt": "心慌怎么办\n睡不好", "response": "注意休息按时吃药"}]


def test_only_line_breaks_are_unescaped():
    for text, expected in (("第一\\n第二", "第一\n第二"), ("1. 一\\n\\n2. 二", "1. 一\n\n2. 二"), ("$a \\neq b$，其中 \\nu 是频率", "$a \\neq b$，其中 \\nu 是频率"),
                           ("真\n的 \\n 换行", "真\n的 \\n 换行"), (None, None)):
        assert data.unescaped(text) == expected


def test_oddities_of_tables_are_named(tmp_path, capsys):
    assert rows_of("x.csv", "\n\nprompt,response\n一,甲\n", tmp_path) == ([{"prompt": "一", "response": "甲"}], {})
    with pytest.raises(ValueError, match="the column 'prompt' twice"):
        rows_of("x.csv", "prompt,response,prompt\n一,甲,乙\n", tmp_path)
    with pytest.raises(ValueError, match="it is empty"):
        rows_of("x.csv", "", tmp_path)
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["prompt", "prompt", "response"]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="has the column 'prompt' twice"):
        data.open_parquet(tmp_path / "x.parquet", data.PAIR)
    assert data.from_webtext({"star": "5.0", "title": "a", "content": "b"}) == ("a", "b") and data.from_wiki({"title": " ", "text": "b"}) == "entry without a title"
    write_pairs(tmp_path / "y.parquet", [{"prompt": "a", "response": "b", "system": "c"}], ("prompt", "response", "system"))
    done = call("dedup", str(tmp_path / "y.parquet"), "--out", str(tmp_path / "z.parquet"))
    assert done.returncode == 0 and "only prompt, response are kept, not system" in done.stderr


@pytest.mark.parametrize("args", [["stats", ""], ["clean", "--source", "alpaca", "x", "--out", ""], ["clean", "--source", "alpaca", "x", "--out", "y", "--prompt_field", "q"]], ids=str)
def test_empty_and_useless_flags_are_refused(args):
    done = call(*args)
    assert done.returncode == 2 and ("is empty" in done.stderr or "are for --source pairs" in done.stderr) and len(done.stderr.splitlines()) == 1


def test_rows_are_read_from_every_kind_of_file(tmp_path):
    row = {"prompt": "问，\"题\"", "response": "答\n案"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row), "utf-8")
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps([row, row]), "utf-8")
    (tmp_path / "c.json").write_text(json.dumps(row) + "\n", "utf-8")
    (tmp_path / "d.csv").write_text('prompt,response\n"问，""题""","答\n案"\n', "utf-8")
    with gzip.open(tmp_path / "e.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    assert list(Rows(tmp_path)) == [row] * 7
    (tmp_path / "f.txt").write_text("一\n二", "utf-8")
    assert list(Rows(tmp_path / "f.txt")) == [{"text": "一"}, {"text": "二"}]


@pytest.mark.quick
def test_bad_rows_are_noted_and_passed_over(tmp_path):
    good = json.dumps({"text": "你好"})
    (tmp_path / "a.jsonl").write_bytes(f"{good}\n[1]\n{{\n\n{good}\n".encode() + b'{"text": "\xe4\xbd"}\n')
    rows = Rows(tmp_path, skip=True)
    assert [row["text"] for row in rows] == ["你好", "你好", "\ufffd"]
    assert dict(rows.problems) == {"line is not JSON": 2, "character U+FFFD: bytes that are not utf-8, or lost before": 1}
    assert rows.problems.first["line is not JSON"].endswith("a.jsonl, line 2")
    with pytest.raises(ValueError, match="line 2: not an object"):
        list(Rows(tmp_path))
    whole = json.dumps([{"text": "你" * n} for n in (1, 70_000, 200_000, 0)], indent=1)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.json").write_text(whole, "utf-8")
    assert [len(row["text"]) for row in Rows(tmp_path, skip=True)] == [1, 70_000, 200_000, 0]
    for damaged in (whole[:-300_000], whole.replace("{", "", 1), whole.replace("},", "}", 1), whole + " x", "[1, 2]", "[" * 5000):
        (tmp_path / "b.json").write_text(damaged, "utf-8")
        with pytest.raises(ValueError, match=r"b\.json cannot be read"):
            list(Rows(tmp_path, skip=True))
    with gzip.open(tmp_path / "b.json", "wt") as f:
        f.write(whole)
    (tmp_path / "b.jsonl.gz").write_bytes((tmp_path / "b.json").read_bytes()[:-20])
    (tmp_path / "b.json").unlink()
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz cannot be read"):
        list(Rows(tmp_path, skip=True))


def test_jobs_come_back_in_order_and_a_killed_process_is_told(tmp_path, monkeypatch):
    (tmp_path / "jobs.py").write_text("import os, signal\n\ndef cut_or_die(n):\n    if n == 3:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
                                      "    if n == 4:\n        raise ValueError('four')\n    return n * n\n")  # processes import it sooner than this file
    monkeypatch.syspath_prepend(tmp_path)
    cut_or_die = importlib.import_module("jobs").cut_or_die
    for workers in (1, 2, 3):
        assert list(ordered_map(cut_or_die, [0, 1, 2, 5, 6, 7], workers)) == [0, 1, 4, 25, 36, 49]
        with pytest.raises(ValueError, match="four"):
            list(ordered_map(cut_or_die, [0, 4, 1], workers))
    with pytest.raises(ChildProcessError, match="was killed"):
        list(ordered_map(cut_or_die, range(9), 2))


def test_number_types(capsys):
    parser = ArgumentParser(prog="x")
    parser.add_argument("--n", type=number(float, 0, 1, above=True))
    assert parser.parse_args(["--n=1"]).n == 1
    for bad in ("0", "1.5", "nan", "a"):
        with pytest.raises(SystemExit) as e:
            parser.parse_args(["--n", bad])
        assert e.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_conversations_are_text(tmp_path):
    rows = [{"id": f"identity_{i}", "conversations": [{"from": "human", "value": "今天天气怎么样"}, {"from": "assistant", "value": "今天天气很好"}]} for i in range(20)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    assert list(Texts(tmp_path / "x.jsonl"))[:2] == ["今天天气怎么样", "今天天气很好"] and len(list(Texts(tmp_path / "x.jsonl"))) == 40


def test_the_wrong_source_names_what_it_needs(tmp_path):
    rows = [{"prompt": "问题", "response": "这是一个回答"}] * 3
    (tmp_path / "x.json").write_text(json.dumps(rows), "utf-8")
    out = str(tmp_path / "y.parquet")
    for source, needs in (("alpaca", "instruction and output"), ("duie", "text and spo_list"), ("webtext2019zh", "title, content and star"),
                          ("belle", "instruction and output, or input and output, or input and target, or conversations, or messages"), ("sharegpt", "conversations, or messages")):
        done = call("clean", "--source", source, str(tmp_path / "x.json"), "--out", out)
        assert done.returncode == 2 and f"{source} needs {needs}; found prompt, response" in done.stderr and len(done.stderr.splitlines()) == 1
    rows[1] = {"instruction": "问题", "output": "这是一个回答"}  # one row that fits is enough: the others are dropped and counted
    (tmp_path / "x.json").write_text(json.dumps(rows), "utf-8")
    assert call("clean", "--source", "alpaca", str(tmp_path / "x.json"), "--out", out).returncode == 0


def test_bytes_that_cannot_be_decoded_are_reported_where_nothing_collects_problems(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\xe4\xbda"}\n')
    assert [row["prompt"] for row in Rows(tmp_path / "x.jsonl")] == ["\ufffda"]
    assert f"1 x character U+FFFD: bytes that are not utf-8, or lost before (first in {tmp_path / 'x.jsonl'})" in capsys.readouterr().err


def test_utf_8_with_replacement_characters_is_not_taken_for_gb18030(tmp_path):
    text = "Hello world\nodd \ufffd\ufffd chars café\n今天\n"
    (tmp_path / "x.txt").write_text(text, "utf-8")
    assert [row["text"] for row in Rows(tmp_path / "x.txt", skip=True)] == text.splitlines()
    (tmp_path / "y.txt").write_text("今天天气很好\n", "gb18030")
    assert [row["text"] for row in Rows(tmp_path / "y.txt", skip=True)] == ["今天天气很好"]


def test_pairs_and_preferences_are_not_compared(tmp_path):
    write_pairs(tmp_path / "a.parquet", [{"prompt": "问", "response": "答"}])
    write_pairs(tmp_path / "b.parquet", [{"prompt": "问", "chosen": "答", "rejected": "不"}], data.PREFERENCE)
    done = call("dedup", str(tmp_path / "a.parquet"), "--against", str(tmp_path / "b.parquet"), "--out", str(tmp_path / "c.parquet"))
    assert done.returncode == 2 and "cannot be compared" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.quick
def test_wiki_entities_and_titles_with_spaces():
    question, answer = data.from_wiki({"title": "AT&amp;T ", "text": "AT&amp;T\n\nAT&amp;T是公司，&lt;电信&gt;。"})
    assert "AT&T" in question and " " not in question and answer == "AT&T是公司，<电信>。"


def test_two_streams_of_other_columns_share_a_process(demo, tmp_path, monkeypatch):
    _, tokenizer = demo
    monkeypatch.setattr(data, "WINDOW_ROWS", 1024)
    table = pa.table({c: [f"{c}第{i}问" for i in range(4000)] for c in ("prompt", "response", "chosen", "rejected")})
    pq.write_table(table, tmp_path / "x.parquet")
    PairStream(tmp_path / "x.parquet", tokenizer, 500, 20).window(0, 0)
    window = PairStream(tmp_path / "x.parquet", tokenizer, 500, 20, columns=data.PREFERENCE).window(0, 1)
    assert len(window.columns) == 3 and len(window.numbers) == 1024


# --- progress ----------------------------------------------------------------------------------------------------------------------


def shown(monkeypatch, capsys, work) -> list[str]:
    """The lines of progress of some work, on a clock on which every look takes a minute."""
    clock = itertools.count(0, 60)
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
    work()
    monkeypatch.undo()
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv", "a.txt", "a.json"])
def test_share_of_files_that_was_read(tmp_path, name):
    """It grows from 0 to 1 over two files of different sizes, and starts again with every pass."""
    paths = [tmp_path / "x" / name, tmp_path / "y" / name]
    texts = [str(random.Random(i).random()) for i in range(9000)]
    for path, part in zip(paths, (texts[:3000], texts[3000:])):
        path.parent.mkdir()
        rows = [{"prompt": text, "response": text} for text in part]
        lines = ["".join(json.dumps(row) + "\n" for row in rows), "prompt,response\n" + "".join(f"{t},{t}\n" for t in part), "\n".join(part)]
        if name.endswith(".parquet"):
            write_pairs(path, rows)
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(lines[0].encode()))
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows))
        else:
            path.write_text(lines[[".jsonl", ".csv", ".txt"].index(path.suffix)])
    rows = data.Rows(paths, skip=True)
    for _ in range(2):
        shares = [rows.share() for _ in rows]
        assert len(shares) == 9000 and shares == sorted(shares) and rows.share() == 1
        assert shares[0] < 0.2 and abs(shares[3000] - 1 / 3) < 0.12 and shares[8990] > 0.9  # it reads ahead
        next(iter(rows))
        assert rows.share() < 0.4  # an abandoned pass leaves no closed file to be asked


def test_progress_of_each_command(tmp_path, monkeypatch, capsys):
    """clean, dedup, split and stats show the share done and the time left."""
    write_pairs(tmp_path / "a.parquet", [{"prompt": f"第{i}个问题是什么？", "response": f"第{i * 7}个回答是这个。"} for i in range(5000)])
    a, out = str(tmp_path / "a.parquet"), str(tmp_path / "out.parquet")
    commands = {"clean": lambda: data.clean([a], "pairs", out, ("prompt", "response"), 1, 500, 1), "dedup": lambda: data.dedup([a], out, 0.85, None, 1),
                "split": lambda: data.split([a], str(tmp_path / "parts"), 0.1, 0.1), "stats": lambda: data.stats([a])}
    for name, command in commands.items():
        lines = [line for line in shown(monkeypatch, capsys, command) if "left" in line]
        shares = [int(re.fullmatch(r"[\d,]+ rows, (\d+) %, \d+[hm]\d+[ms] left", line)[1]) for line in lines]
        assert len(shares) > 1 and shares == sorted(shares) and shares[-1] > 90 and (name == "clean" or shares[0] < 60), (name, lines)


def test_progress_with_a_total(monkeypatch, capsys):
    progress = data.Progress("prompts answered", total=40)
    monkeypatch.setattr(data.time, "monotonic", lambda: progress.begin_s + 30)
    progress.add(10)
    assert capsys.readouterr().err == "10 of 40 prompts answered, 25 %, 1m30s left\n"
    progress.is_terminal = True
    monkeypatch.setattr(data.time, "monotonic", lambda: progress.begin_s + 60)
    progress.add(20)
    progress.clear()
    assert capsys.readouterr().err == "\r\x1b[K30 of 40 prompts answered, 75 %, 0m20s left\r\x1b[K"


@pytest.mark.quick
def test_columns_of_dates_are_reported(tmp_path, capsys):
    table = pa.table({"prompt": ["问题"], "response": ["回答"], "day": pa.array([1], pa.date32()), "at": pa.array([1], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "x.parquet")
    rows = Rows(tmp_path / "x.parquet", skip=True)
    assert list(rows) == [{"prompt": "问题", "response": "回答"}]
    assert dict(rows.problems) == {"column of dates or times, not read": 2} and rows.problems.first["column of dates or times, not read"].endswith("x.parquet, day")
    data.note_once.cache_clear()
    list(Rows(tmp_path / "x.parquet"))
    assert "2 x column of dates or times, not read" in capsys.readouterr().err
    table = pa.table({"prompt": ["如何学习？"] * 3, "response": ["多读书，多思考，多练习。"] * 3, "day": pa.array([1] * 3, pa.date32())})
    pq.write_table(table, tmp_path / "x.parquet")
    data.clean([str(tmp_path / "x.parquet")], "pairs", str(tmp_path / "y.parquet"), ("prompt", "response"), 1, 99, 1)
    captured = capsys.readouterr()
    assert "3  all" in captured.out and "1 x column of dates or times" in captured.err  # the column is no row


@pytest.mark.quick
def test_outputs_that_cannot_be_written_are_named_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    write_pairs(tmp_path / "x.parquet", [{"prompt": "问题", "response": "回答"}])
    for command in (["dedup", str(tmp_path / "x.parquet"), "--out", str(tmp_path / "file" / "d.parquet")],
                    ["split", str(tmp_path / "x.parquet"), "--out", str(tmp_path / "file")]):
        done = run_script("data.py", *command)
        assert done.returncode == 2 and "file: not a folder" in done.stderr and not done.stdout, done.stderr


# --- files that others wrote ---------------------------------------------------------------------------------------------------------

def pairs_file(path: Path, n: int = 30) -> Path:
    rows = [{"prompt": f"第{i}个问题是什么呢？", "response": f"这是第{i}个问题的回答。"} for i in range(n)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.quick
def test_columns_with_any_name_can_be_used(tmp_path):
    (tmp_path / "x.csv").write_text("user input, bot output,,\n问题是什么呢？,这是问题的回答。,,\n", "utf-8")
    out = tmp_path / "o.parquet"
    done = call("clean", "--source", "pairs", "--prompt_field", "user input", "--response_field", "bot output", str(tmp_path / "x.csv"), "--out", str(out))
    assert done.returncode == 0 and list(Rows(out)) == [{"prompt": "问题是什么呢？", "response": "这是问题的回答。"}]
    pq.write_table(pa.table({"a\nb ": ["x"], "y" * 100: ["z"]}), tmp_path / "y.parquet")
    said = call("clean", "--source", "pairs", str(tmp_path / "y.parquet"), "--out", str(out)).stderr
    assert f"found 'a\\nb ', {'y' * 40} (name them" in said


@pytest.mark.quick
@pytest.mark.parametrize(("name", "content", "cause"), [
    ("a.jsonl", gzip.compress(b'{"prompt": "a"}'), "it is gzip: its name needs .gz"), ("a.csv", b"PK\x03\x04" + b"\0" * 99, "a zip or Excel file"),
    ("a.jsonl", b"PAR1\x15" + b"\0" * 40, "Parquet: its name needs .parquet"), ("a.json", b"\n<!DOCTYPE html><html>", "an HTML page"), ("a.txt", b"BZh91AY&SY", "bzip2"),
    ("a.jsonl.gz", gzip.compress(gzip.compress(b"{}")), "it is gzip"), ("a.jsonl", json.dumps([{"prompt": "问题"}]).encode("utf-16-le"), "not text in UTF-8"),
    ("a.jsonl", json.dumps({"prompt": "问", "response": "答"}, indent=1).encode(), "put each object on a line of its own"),
    ("a.jsonl", b'["q", "a"]\n["q", "a"]\n', "it begins with [, but is not one JSON list"), ("a.jsonl", b'{"a": 1},\n{"a": 2},\n', "no line of it is a JSON object (line 1: Extra data"),
    ("a.jsonl", b"", "has no rows"), ("a.json", b"[]", "has no rows")], ids=range(12))
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, name, content, cause):
    (tmp_path / name).write_bytes(content)
    done = call("clean", "--source", "pairs", str(tmp_path / name), "--out", str(tmp_path / "o.parquet"))
    assert done.returncode == 2 and cause in done.stderr.splitlines()[-1], done.stderr
    assert name in done.stderr and "of the source" not in done.stderr and not (tmp_path / "o.parquet").exists()


@pytest.mark.quick
def test_json_in_gb18030_is_read_and_said(tmp_path):
    path = pairs_file(tmp_path / "a.jsonl")
    rows = list(Rows(path))
    path.write_bytes(path.read_text("utf-8").encode("gb18030"))
    done = call("clean", "--source", "pairs", str(path), "--out", str(tmp_path / "o.parquet"))
    assert "is not UTF-8, and is read as GB18030" in done.stderr and list(Rows(tmp_path / "o.parquet")) == rows


@pytest.mark.quick
def test_what_is_left_out_of_conversations_is_counted(tmp_path):
    turns = [("system", "你是助手。"), ("human", "第一个问题是什么？"), ("gpt", "这是第一个回答。"), ("human", "没有回答的问题？")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    for more in ([], ["--turns", "2"]):
        done = call("clean", "--source", "sharegpt", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o.parquet"), *more)
        assert "1 x system turn, left out" in done.stderr and "1  last question has no answer" in done.stdout
        assert list(Rows(tmp_path / "o.parquet")) == [{"prompt": "第一个问题是什么？", "response": "这是第一个回答。"}]


@pytest.mark.quick
@pytest.mark.parametrize("turns", ["messages", "conversations"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_texts_of_conversations_are_read_and_lists_are_told(tmp_path, turns, kind):
    rows = [{"id": "conv-1", turns: [{"role": "user", "content": "问题"}, {"role": "assistant", "content": "回答"}]}, {"tags": ["甲"]}]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows, pa.schema([("id", pa.string()), (turns, pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
                                                             ("tags", pa.list_(pa.string()))])), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text("".join(map(json.dumps, rows)).replace("}{", "}\n{"), "utf-8")
    texts = data.Texts(tmp_path / f"a.{kind}")
    assert list(texts) == ["问题", "回答"]
    assert texts.rows.problems["row without text"] == 1 and texts.rows.problems["value that is a list or an object, not read"] >= 1


@pytest.mark.quick
def test_binary_text_is_read_and_nested_times_are_left_out(tmp_path):
    times = pa.array([{"t": 0}], pa.struct([("t", pa.timestamp("ns"))]))
    table = pa.table({"prompt": pa.array(["问"], pa.binary()), "image": pa.array([b"\xff\xd8"]), "when": times, "whens": pa.array([[0]], pa.list_(pa.duration("ns")))})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = Rows(tmp_path / "a.parquet", skip=True)
    assert list(rows) == [{"prompt": "问", "image": b"\xff\xd8"}] and rows.problems["column of dates or times, not read"] == 2
    values = ["问".encode()] * 2000
    values[5] = b"\xff\xfe"
    pq.write_table(pa.table({"text": pa.array(values, pa.binary())}), tmp_path / "b.parquet")
    rows = Rows(tmp_path / "b.parquet", ("text",), skip=True)
    assert len(list(rows)) == 1999 and rows.problems.total() == 1


@pytest.mark.quick
def test_conversations_of_a_merged_schema_and_folders_with_other_json_are_read(tmp_path):
    turns = [{"from": None, "value": None, "role": "user", "content": "第一个问题是什么？"}, {"from": None, "value": None, "role": "assistant", "content": "这是第一个回答。"}]
    rows = [{"conversations": None, "messages": turns}, {"conversations": turns, "messages": None}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in" / "meta.json").write_text('{"a": 1,\n"b": 2}')
    done = call("clean", "--source", "sharegpt", str(tmp_path / "in"), "--out", str(tmp_path / "o.parquet"))
    assert len(list(Rows(tmp_path / "o.parquet"))) == 2 and "2  line is not JSON" in done.stdout, done.stderr
    (tmp_path / "par.txt").write_text("PAR1 is a magic number\n")
    assert list(Rows(tmp_path / "par.txt")) == [{"text": "PAR1 is a magic number"}]


@pytest.mark.quick
def test_a_file_is_read_once_however_often_a_folder_links_to_it(tmp_path, capsys):
    path = pairs_file(tmp_path / "in.jsonl")
    (tmp_path / "in" / "_temporary").mkdir(parents=True)
    for name in ("a.jsonl", "_temporary/b.jsonl"):
        (tmp_path / "in" / name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "b.jsonl").symlink_to(tmp_path / "in" / "a.jsonl")
    (tmp_path / "in" / "c.jsonl").hardlink_to(tmp_path / "in" / "a.jsonl")
    assert [file.name for file in input_files([tmp_path / "in"])] == ["a.jsonl"]
    assert "1 hidden (_temporary), 2 links to files already read (b.jsonl, ...)" in capsys.readouterr().err
    assert len(input_files([path, path])) == 2
    assert f"1 files are given more than once ({path}), and their rows are read again" in capsys.readouterr().err
    assert len(input_files([tmp_path / "in", tmp_path / "in" / "c.jsonl"])) == 2  # by another name
    assert f"1 files are given more than once ({tmp_path / 'in' / 'c.jsonl'})" in capsys.readouterr().err


@pytest.mark.quick
def test_a_link_is_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "o.parquet").symlink_to(tmp_path / "disk" / "real.parquet")
    call("clean", "--source", "pairs", str(pairs_file(tmp_path / "a.jsonl")), "--out", str(tmp_path / "o.parquet"))
    assert (tmp_path / "o.parquet").is_symlink() and len(list(Rows(tmp_path / "disk" / "real.parquet"))) == 30
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real.parquet"]


@pytest.mark.quick
def test_half_characters_are_counted_where_they_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "問題是什麼？\ud83d", "response": "這是回答，希望滿意。"}) + "\n")
    done = call("dedup", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o.parquet"))
    assert "1 lone surrogates" in done.stderr and next(iter(Rows(tmp_path / "o.parquet")))["prompt"] == "問題是什麼？\ufffd"


@pytest.mark.quick
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path, rows = pairs_file(tmp_path / "a.jsonl"), None
    for change in ("between", "during"):
        rows = Rows(path)
        reading = iter(rows)
        next(reading)
        if change == "between":
            list(reading)
            reading = iter(rows)
        pairs_file(path, 31 + len(change))
        with pytest.raises(ValueError, match="changed while it was being read"):
            list(reading)


@pytest.mark.quick
def test_large_columns_do_not_fill_the_jobs():
    rows = [{"prompt": "问", "image": "x" * 160_000}] * 40
    assert max(len(batch) for batch in data.batches(rows, data.CLEAN_CHARS, data.row_chars)) <= 4


@pytest.mark.quick
def test_a_loop_of_links_and_a_pipe_are_one_line(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "p.jsonl")
    for name, cause in (("a.jsonl", "no such file"), ("p.jsonl", "is a pipe or device")):
        done = call("clean", "--source", "pairs", str(tmp_path / name), "--out", str(tmp_path / "o.parquet"))
        assert done.returncode == 2 and cause in done.stderr and len(done.stderr.splitlines()) == 1
    name = "名" * 80
    done = call("clean", "--source", "pairs", str(pairs_file(tmp_path / "c.jsonl")), "--out", str(tmp_path / f"{name}.parquet"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.quick
@pytest.mark.parametrize("header", ['"title","ask","answer","department"', "title, ask, answer, department"])
def test_the_header_of_the_medical_source_may_be_quoted(tmp_path, header):
    rows = "".join(f'"问题{i}是什么呢？","我想问问题{i}","这是第{i}个回答。","内科"\n' for i in range(3))
    (tmp_path / "a.csv").write_text(f"{header}\n{rows}", "utf-8")
    call("clean", "--source", "chinese_medical", str(tmp_path / "a.csv"), "--out", str(tmp_path / "o.parquet"))
    assert [row["response"] for row in Rows(tmp_path / "o.parquet")] == [f"这是第{i}个回答。" for i in range(3)]


def test_workers_that_are_starting_do_not_see_ctrl_c(tmp_path):
    script = f"""
import os, signal, sys, time
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
import data
if __name__ == "__main__":
    def main():
        jobs = data.ordered_map(data.row_chars, [{{}}] * 100, 2)
        os.killpg(0, signal.SIGINT)
        time.sleep(20)
    data.run(main)
"""
    (tmp_path / "main.py").write_text(script)
    running = subprocess.run([sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=60, start_new_session=True, check=False)
    assert running.returncode == 130 and running.stderr.splitlines() == ["main.py: interrupted"]


@pytest.mark.quick
def test_every_medical_record_of_a_correct_file_is_read(tmp_path):
    rng = random.Random(0)
    words = ["高血压", "能吃什么，", "发烧", "\n", "他说\"好\"", ", ", "多喝水。", "怎么办？"]
    rows = [[department, *("第" + "".join(rng.choices(words, k=rng.randint(1, 6))) + "问" for _ in range(3))]
            for department in rng.choices(["心血管科", "内科", "外科"], k=300)]
    with open(tmp_path / "x.csv", "w", encoding="utf-8", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([data.MEDICAL, *rows])
    with data.open_text(tmp_path / "x.csv", data.Problems()) as f:
        found = list(data.read_medical(f, lambda *why: pytest.fail(str(why))))
    assert [list(row.values()) for row in found] == rows
    for quote in ("", '"'):  # the first record is broken, quoted or not
        (tmp_path / "y.csv").write_text(f"department,title,ask,answer\n外科,怎么办,{quote}第一行\n第二行{quote},涂药膏\n内科,一,二,三\n", "utf-8")
        with data.open_text(tmp_path / "y.csv", data.Problems()) as f:
            found = list(data.read_medical(f, lambda *why: pytest.fail(str(why))))
        assert [row["answer"] for row in found] == ["涂药膏", "三"] and found[0]["ask"] == "第一行\n第二行"


@pytest.mark.quick
def test_rows_that_are_all_in_against_are_reported_as_such(tmp_path):
    path = str(pairs_file(tmp_path / "a.jsonl"))
    done = call("dedup", path, "--against", path, "--out", str(tmp_path / "o.parquet"))
    assert done.returncode == 2 and f"every row is in --against {path}" in done.stderr and "equal to an earlier one" in done.stdout
    assert not (tmp_path / "o.parquet").exists()


@pytest.mark.quick
def test_columns_that_are_left_out_are_reported(tmp_path):
    row = {"instruction": "你叫什么名字", "input": "", "output": "我叫小明，很高兴。", "system": "你是海盗", "history": [["你好", "你好"]]}
    (tmp_path / "a.jsonl").write_text(json.dumps({**row, "system": "", "history": []}) + "\n" + json.dumps(row) + "\n")
    done = call("clean", "--source", "alpaca", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o.parquet"))
    assert done.returncode == 0 and "1 x column system, left out" in done.stderr and "1 x column history, left out" in done.stderr
    done = call("stats", str(tmp_path / "a.jsonl"))
    assert "are counted, not instruction, input, output, system, history" in done.stderr
    (tmp_path / "b.jsonl").write_text('{"prompt": "甲怎么样", "response": "很好"}\n{"prompt": "乙怎么样", "response": "不好", "topic": "x"}\n')
    for command in (("dedup", "--out", str(tmp_path / "o.parquet")), ("split", "--out", str(tmp_path / "split"))):
        assert "only prompt, response are kept, not topic" in call(command[0], str(tmp_path / "b.jsonl"), *command[1:]).stderr


@pytest.mark.quick
def test_an_encoding_shows_late_and_in_few_bytes(tmp_path):
    english = "".join(f'{{"prompt": "question {i}", "response": "this is the answer"}}\n' for i in range(2000))
    chinese = '{"prompt": "你叫什么", "response": "我叫小明"}\n'
    for text in (english + chinese, chinese):
        for encoding in ("gb18030", "utf-8"):
            (tmp_path / "x.jsonl").write_bytes(text.encode(encoding))
            assert list(Rows(tmp_path / "x.jsonl"))[-1] == json.loads(chinese)
    (tmp_path / "x.jsonl").write_bytes(chinese.encode().replace("我".encode(), b"\xff"))  # one damaged character stays one
    assert list(Rows(tmp_path / "x.jsonl"))[-1]["response"] == "\ufffd叫小明"


@pytest.mark.quick
def test_texts_that_are_bytes_in_any_type_of_column(tmp_path):
    texts = ["今天天气怎么样".encode()] * 2
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())):
        column = pa.array(texts, pa.binary()).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts, kind)
        pq.write_table(pa.table({"prompt": column, "response": column}), tmp_path / "x.parquet")
        assert list(Rows(tmp_path / "x.parquet", ("prompt", "response"))) == [dict.fromkeys(("prompt", "response"), texts[0].decode())] * 2
    pq.write_table(pa.table({"conversations": [[{"from": b"human", "value": texts[0]}, {"from": b"gpt", "value": texts[1]}]]}), tmp_path / "x.parquet")
    assert list(Texts(tmp_path / "x.parquet")) == [texts[0].decode()] * 2


@pytest.mark.quick
def test_preferences_may_be_lists_of_messages(tmp_path):
    def said(*texts: str) -> list[dict]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    good = {"prompt": "今天天气怎么样？", "chosen": "今天天气很好。", "rejected": "不知道不知道"}
    rows = [{"prompt": good["prompt"], "chosen": said(good["prompt"], good["chosen"]), "rejected": said(good["prompt"], good["rejected"])},
            {"prompt": said(good["prompt"]), "chosen": [said("", good["chosen"])[1]], "rejected": None, "reject": good["rejected"]},
            {"prompt": good["prompt"], "chosen": said("一", "二", "三", "四"), "rejected": "不知道不知道"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    done = call("clean", "--source", "preference", str(tmp_path / "x.json"), "--out", str(tmp_path / "o.parquet"))
    assert "1  chosen is a conversation of several turns" in done.stdout, done.stderr
    assert pq.read_table(tmp_path / "o.parquet").to_pylist() == [good] * 2


@pytest.mark.quick
def test_lengths_that_exclude_each_other_are_refused(tmp_path):
    done = call("clean", "--source", "pairs", str(pairs_file(tmp_path / "a.jsonl")), "--min_chars", "50", "--max_chars", "10", "--out", str(tmp_path / "o.parquet"))
    assert done.returncode == 2 and "--min_chars 50 is above --max_chars 10" in done.stderr
