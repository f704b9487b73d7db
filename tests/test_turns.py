"""A model that is trained on conversations answers what depends on an earlier turn; the chat, the server and transformers see the same prompts."""
import json
import random
import shutil
import sys
import threading
import urllib.request
from pathlib import Path

import openai
import pytest
from conftest import run_script
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import data
import sample
from chatlm import ChatLM
from data import Rows, write_pairs
from sample import (
    BadRequest,
    ChatServer,
    GenerationConfig,
    known_turns,
    read_messages,
    with_history,
)
from tokenizer import Tokenizer
from train import count_turns

THINGS = ["苹果", "香蕉", "西瓜", "葡萄", "足球", "篮球", "唱歌", "跳舞", "画画", "钓鱼", "爬山", "游泳", "下棋", "读书", "写字", "旅行"]


def talk(thing: str, rng: random.Random) -> list[str]:
    """Three turns; the last answer depends on the first question."""
    return [rng.choice([f"我最喜欢{thing}。", f"告诉你，我喜欢{thing}！", f"{thing}是我的爱好。"]), rng.choice(["好的，我记住了。", "知道了，谢谢你。"]),
            rng.choice(["我喜欢什么？", "你还记得我的爱好吗？", "我的爱好是什么？"]), f"你喜欢的是{thing}。"]


def conversation(texts: list[str]) -> dict:
    return {"id": "1", "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]}


def run(script: str, *args) -> str:
    done = run_script(script, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """A folder with a model that was trained on conversations of two turns."""
    folder, rng = tmp_path_factory.mktemp("taught"), random.Random(0)
    rows = [conversation(talk(rng.choice(THINGS), rng)) for _ in range(1500)]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    said = run("data.py", "clean", "--source", "sharegpt", "--turns", "2", folder / "talks.jsonl", "--out", folder / "pairs.parquet")
    assert "3,000  kept" in said, said
    run("train.py", "--data", folder / "pairs.parquet", "--out_dir", folder / "out", "--preset", "demo", "--vocab_size", "512", "--max_len", "48",
        "--max_steps", "130", "--batch_tokens", "768", "--micro_batch_tokens", "768", "--dtype", "float32", "--device", "cpu")
    return folder / "out"


def test_answers_depend_on_the_turn_before(taught):
    """At least nine in ten with the history; without it, no better than by chance, one in sixteen."""
    rng = random.Random(1)
    talks = [talk(rng.choice(THINGS), rng) for _ in range(100)]
    model, tokenizer = ChatLM.from_pretrained(taught), Tokenizer.from_pretrained(taught, append_eos=True)
    assert known_turns(model) == 2 and json.loads((taught / "generation_config.json").read_text())["turns"] == 2
    shares = []
    for turns in (2, 1):
        prompts = [with_history(tokenizer, texts[:3], turns, 64) for texts in talks]
        answers = sample.answer(model, tokenizer, prompts, max_new_tokens=16)
        shares.append(sum(answer == texts[3] for answer, texts in zip(answers, talks)) / len(talks))
    print(f"with the turn before: {shares[0]:.0%}, without: {shares[1]:.0%}")
    assert shares[0] >= 0.9 and shares[1] < 0.25, shares


def test_the_chat_remembers_until_it_is_told_to_forget(taught, monkeypatch, capsys):
    typed = iter(["我最喜欢钓鱼。", "我喜欢什么？", "告诉你，我喜欢下棋！", "我的爱好是什么？", "/new", "我喜欢什么？"])

    def say(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    asked = []
    monkeypatch.setattr("builtins.input", say)
    stream = sample.stream_answer
    monkeypatch.setattr(sample, "stream_answer", lambda model, tokenizer, prompt, *rest: asked.append(prompt) or stream(model, tokenizer, prompt, *rest))
    sample.chat(ChatLM.from_pretrained(taught), Tokenizer.from_pretrained(taught, append_eos=True), 64, vars(GenerationConfig(max_new_tokens=16)))
    said = capsys.readouterr().out
    assert "sees the last 2 questions" in said and "the conversation is forgotten" in said
    assert "你喜欢的是钓鱼。\n" in said and "你喜欢的是下棋。\n" in said
    assert [prompt.count("[SEP]") for prompt in asked] == [0, 2, 2, 2, 0] and asked[3].startswith("告诉你，我喜欢下棋！[SEP]")


def test_the_server_answers_by_the_turn_before(taught):
    model, tokenizer = ChatLM.from_pretrained(taught), Tokenizer.from_pretrained(taught, append_eos=True)
    server = ChatServer(("127.0.0.1", 0), model, tokenizer, "x", 64, vars(GenerationConfig(max_new_tokens=16)), None)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="any", max_retries=0)
    talk = [("user", "游泳是我的爱好。"), ("assistant", "知道了，谢谢你。"), ("user", "你还记得我的爱好吗？")]
    answered = client.chat.completions.create(model="x", messages=[{"role": role, "content": text} for role, text in talk])
    page = urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/").read().decode()
    server.shutdown()
    server.server_close()
    assert answered.choices[0].message.content == "你喜欢的是游泳。" and "最近 2 个问题" in page


def test_transformers_loads_the_folder_and_answers_the_same(taught):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(taught), AutoTokenizer.from_pretrained(taught)
    prompt = "我最喜欢游泳。[SEP]好的，我记住了。[SEP]我喜欢什么？"
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=16, do_sample=False)
    ours = sample.answer(ChatLM.from_pretrained(taught), Tokenizer.from_pretrained(taught), [prompt], max_new_tokens=16)
    assert [tokenizer.decode(ids[0], skip_special_tokens=True)] == ours == ["你喜欢的是游泳。"]


# --- conversations to pairs ----------------------------------------------------------------------------------------------------------


def cleaned(tmp_path: Path, rows: list[dict], *flags: str) -> list[tuple[str, str]]:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    run("data.py", "clean", "--source", "belle", path, "--out", tmp_path / "out.parquet", *flags)
    return [(row["prompt"], row["response"]) for row in Rows(tmp_path / "out.parquet")]


TEXTS = ["今天天气怎么样？", "今天天气很好，是晴天。", "那么明天呢？", "明天可能会下大雨。", "后天会怎么样？", "后天又是一个晴天。"]


def test_a_pair_for_every_answer(tmp_path):
    a, b, c, d, e, f = TEXTS
    assert cleaned(tmp_path, [conversation(TEXTS)], "--turns", "3") == [(a, b), (f"{a}[SEP]{b}[SEP]{c}", d), (f"{a}[SEP]{b}[SEP]{c}[SEP]{d}[SEP]{e}", f)]
    assert cleaned(tmp_path, [conversation(TEXTS)], "--turns", "2") == [(a, b), (f"{a}[SEP]{b}[SEP]{c}", d), (f"{c}[SEP]{d}[SEP]{e}", f)]
    assert cleaned(tmp_path, [conversation(TEXTS), conversation(TEXTS[:2])]) == [(a, b)]  # as the reference: one turn


def test_history_that_is_too_long_is_left_out_from_its_beginning_and_counted(tmp_path):
    pairs = cleaned(tmp_path, [conversation(TEXTS)], "--turns", "3", "--max_chars", "40")
    assert pairs[-1] == ("[SEP]".join(TEXTS[2:5]), TEXTS[5]) and all(len(prompt) <= 40 for prompt, _ in pairs)
    done = run_script("data.py", "clean", "--source", "belle", tmp_path / "talks.jsonl", "--out", tmp_path / "again.parquet", "--turns", "3", "--max_chars", "40")
    long = [*TEXTS[:2], "那么明天呢？" * 9, TEXTS[3]]  # dropped, so not counted as shortened
    (tmp_path / "long.jsonl").write_text(json.dumps(conversation(long)) + "\n", "utf-8")
    other = run_script("data.py", "clean", "--source", "belle", tmp_path / "long.jsonl", "--out", tmp_path / "again.parquet", "--turns", "3", "--max_chars", "40")
    assert "over 40 characters" in other.stdout and "earliest turns" not in other.stderr
    assert f"1 x prompt without its earliest turns, which do not fit in --max_chars (first in {tmp_path / 'talks.jsonl'}, row 1)" in done.stderr


def test_odd_conversations(tmp_path):
    """A last question without an answer, separators in a text, an answer that is dropped, turns that do not alternate."""
    a, b, c, d, e, _ = TEXTS
    assert cleaned(tmp_path, [conversation(TEXTS[:5])], "--turns", "9")[-1] == ("[SEP]".join(TEXTS[:3]), d)
    assert cleaned(tmp_path, [conversation([a + "[SEP]好", b, c, d])], "--turns", "2")[-1][0].count("[SEP]") == 2
    assert [r for _, r in cleaned(tmp_path, [conversation([a, b, c, "好", e, b])], "--turns", "2")] == [b, b]
    twice = {"conversations": [{"from": "human", "value": a}] * 2 + [{"from": "gpt", "value": b}] * 2}
    assert cleaned(tmp_path, [twice, conversation(TEXTS[:2])], "--turns", "2") == [(a, b)]


def test_history_is_cleaned_as_answers_are(tmp_path):
    """So that the model sees in a history what it learns to write."""
    raw = ["你好吗朋友!", "我很好,谢谢你![EOS]", "北京\u200b在哪里?", "北京在中国啊!", "\n" * 700 + "那么上海呢?", "上海也在中国。"]
    pairs = cleaned(tmp_path, [conversation(raw)], "--turns", "3", "--max_chars", "60")
    assert pairs[-1][0] == "你好吗朋友！[SEP]我很好，谢谢你！[SEP]北京在哪里？[SEP]北京在中国啊！[SEP]那么上海呢？"
    assert [response for _, response in pairs] == ["我很好，谢谢你！", "北京在中国啊！", "上海也在中国。"]


@pytest.mark.parametrize("missing", [None, "", 3, "\n", "x" * 10 ** 5])
@pytest.mark.parametrize("place", [2, 3])
def test_nothing_before_a_turn_without_text_is_history(tmp_path, missing, place):
    texts = [*TEXTS, "那么大后天呢？", "还是一个晴天。"]
    texts[place] = missing
    pairs = cleaned(tmp_path, [conversation(texts)], "--turns", "9", "--max_chars", "500")
    assert pairs == [(texts[0], texts[1]), (texts[4], texts[5]), ("[SEP]".join(texts[4:7]), texts[7])]


@pytest.mark.parametrize("who", [["human"], {"a": 1}, None, 3])
def test_roles_that_are_no_text_are_counted(tmp_path, who):
    odd = {"conversations": [{"from": who, "value": TEXTS[0]}, {"from": "gpt", "value": TEXTS[1]}]}
    for flags in ([], ["--turns", "2"]):
        assert cleaned(tmp_path, [odd, conversation(TEXTS[:2])], *flags) == [(TEXTS[0], TEXTS[1])]


def test_a_separator_in_a_text_is_no_turn(tmp_path):
    pairs = cleaned(tmp_path, [conversation(["[SEP]一个[SEP]问题", "回答[SEP]是这样的。", "第二个[SEP]问题", "第二个回答。"])], "--turns", "2")
    assert [prompt.count("[SEP]") for prompt, _ in pairs] == [0, 2] and "[SEP]" not in pairs[0][1]
    tokenizer = Tokenizer.train(TEXTS, 320)
    assert with_history(tokenizer, ["a[SEP]b", "c", "d[SEP]e"], 2, 99) == "a b[SEP]c[SEP]d e"
    assert with_history(tokenizer, ["a", "c", "d[SEP]e"], 1, 99) == "d[SEP]e"  # as typed, where it means no turn


def test_turns_go_with_an_adapter(taught, tmp_path):
    """They are in the adapter's folder, so that the merged model knows them."""
    base = tmp_path / "base"
    shutil.copytree(taught, base)
    settings = json.loads((base / "generation_config.json").read_text())
    del settings["turns"]
    (base / "generation_config.json").write_text(json.dumps(settings))
    run("train.py", "--init_from", base, "--data", taught.parent / "pairs.parquet", "--out_dir", tmp_path / "lora", "--lora_rank", "2", "--max_len", "48",
        "--max_steps", "1", "--batch_tokens", "768", "--micro_batch_tokens", "768", "--dtype", "float32", "--device", "cpu", "--workers", "0")
    run("dpo.py", "merge", "--model", base, "--adapter", tmp_path / "lora", "--out", tmp_path / "merged")
    assert known_turns(ChatLM.from_pretrained(base)) == 1 and known_turns(ChatLM.from_pretrained(tmp_path / "merged")) == 2
    (base / "generation_config.json").write_text(json.dumps(settings | {"turns": "3"}))
    done = run_script("train.py", "--init_from", base, "--data", taught.parent / "pairs.parquet", "--out_dir", tmp_path / "x", "--device", "cpu")
    assert done.returncode == 2 and "turns '3' is not a whole number" in done.stderr


def test_turns_of_a_source_without_conversations(tmp_path, monkeypatch, capsys):
    write_pairs(tmp_path / "x.parquet", [{"prompt": "问题", "response": "这是一个回答"}])
    monkeypatch.setattr(sys, "argv", ["data.py", "clean", "--source", "pairs", "--turns", "2", str(tmp_path / "x.parquet"), "--out", str(tmp_path / "y.parquet")])
    with pytest.raises(SystemExit):
        data.run(data.main)
    assert "--turns is for sources with conversations" in capsys.readouterr().err


@pytest.mark.parametrize("prompts, turns", [(["问"] * 10, 1), (["问[SEP]答[SEP]问"] * 3 + ["问"] * 10, 2), (["问[SEP]答"] * 5, 1), (["a[SEP]"] * 4 + [""], 1),
                                            (["问[SEP]答[SEP]问"] * 1 + ["问"] * 2000, 1), (["[SEP]".join("问答问答问")] * 3 + ["问"] * 2000, 3),
                                            (["[SEP]" * 5000] * 9, 1000)])
def test_turns_of_training_data(tmp_path, prompts, turns):
    write_pairs(tmp_path / "x.parquet", [{"prompt": prompt, "response": "答"} for prompt in prompts])
    assert count_turns([str(tmp_path / "x.parquet")]) == turns


# --- prompts of a chat ---------------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_as_many_turns_as_the_model_knows_and_as_fit():
    tokenizer = Tokenizer.train(TEXTS * 3, 320)
    texts = TEXTS[:5]
    for turns, first in ((1, 4), (2, 2), (3, 0), (9, 0)):
        assert with_history(tokenizer, texts, turns, 10 ** 6) == "[SEP]".join(texts[first:])
    for first in (0, 2, 4):
        limit = len(tokenizer.encode("[SEP]".join(texts[first:])))
        assert with_history(tokenizer, texts, 9, limit) == "[SEP]".join(texts[first:])
    assert with_history(tokenizer, texts, 9, 1) == texts[-1]


@pytest.mark.quick
def test_messages_become_turns():
    def messages(roles: str) -> list[dict]:
        return [{"role": {"u": "user", "a": "assistant", "s": "system"}[r], "content": f"{r}{i}"} for i, r in enumerate(roles)]

    for roles, texts in (("u", "u0"), ("su", "u1"), ("uau", "u0 a1 u2"), ("suauau", "u1 a2 u3 a4 u5"), ("uu", "u1"), ("auu", "u2"), ("uaau", "u3"), ("au", "u1"), ("sau", "u2")):
        assert read_messages(messages(roles)) == texts.split(), roles
    with pytest.raises(BadRequest, match="is an answer"):
        read_messages(messages("ua"))
    assert read_messages([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": None}]}]) == ["a"]
    assert read_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": "b"}]) == ["b"]


@pytest.mark.quick
@pytest.mark.parametrize("turns", [0, -1, "2", 2.0, True, None, 10 ** 9])
def test_turns_that_mean_nothing_are_refused(turns):
    model = ChatLM.__new__(ChatLM)
    object.__setattr__(model, "generation", {"turns": turns})
    with pytest.raises(ValueError, match="turns"):
        known_turns(model)
