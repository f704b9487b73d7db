"""The whole road, from raw files to answers, by the commands that the README prints; and what it says of triples."""
import gzip
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Script, run_script
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import data
import dpo
import sample
from chatlm import ChatLM, ChatLMConfig, add_lora, save_adapter
from data import Rows, is_sum, make_demo, run, write_pairs
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TINY = "--preset demo --batch_tokens 1024 --micro_batch_tokens 512 --max_len 64 --eval_every 10000 --dtype float32 --device cpu --workers 0"
PROCESSES = "torchrun --standalone --nproc_per_node=2 train.py"
ELSEWHERE = (  # what other tests try, or what has no place in one
    "pip install", "python -m pytest",  # .ci/run, and test_no_data_is_the_demo
    "python sample.py --prompt",  # test_prompt_and_chat
    "python sample.py --serve",  # test_server.py
    "python sample.py --model ChatLM-mini-Chinese",  # test_published.py
    "torchrun --standalone --nproc_per_node=2 --max-restarts=3 train.py",  # test_a_killed_rank_is_started_again
    "torchrun --nnodes=2")  # test_two_machines_take_the_same_steps


def printed() -> list[str]:
    """Every command of the README, of COUNTS.md and of BENCHMARKS.md, from their blocks, tables and sentences."""
    text = "".join((ROOT / name).read_text("utf-8") for name in ("README.md", "tests/COUNTS.md", "tests/BENCHMARKS.md"))
    text = re.sub(r"```\w+\n.*?```", "", text, flags=re.DOTALL)  # blocks of Python
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)]
    lines = [" ".join(line.partition(" #")[0].split()) for block in blocks for line in block.splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]
    return [c for c in lines + spans if re.match(r"(python|pip|torchrun) ", c) and not c.endswith("...")]


def words(start: str) -> list[str]:
    """The one printed command that starts so."""
    found = {c for c in printed() if c.startswith(start)}
    assert len(found) == 1, (start, found)
    return shlex.split(found.pop())


# --- raw files ---------------------------------------------------------------------------------------------------------------------

SURNAMES, GIVEN, PLACES = "赵钱孙李周吴郑王冯陈", "明华丽强芳军杰敏静磊洋艳勇娟涛", ["北京", "上海", "广州", "成都", "西安", "南京"]
WORDS = ["春天", "大海", "故乡", "星空", "红楼", "长路", "远山", "夜雨", "青年", "岁月", "梦想", "江湖"]


def make_facts(rows: int, seed: int) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Sentences on books, songs and companies that do not exist, each with its triples."""
    rng = random.Random(seed)

    def name() -> str:
        return rng.choice(SURNAMES) + "".join(rng.choice(GIVEN) for _ in range(rng.choice([1, 2])))

    made = []
    for _ in range(rows):
        title, a, b, place = "".join(rng.sample(WORDS, 2)), name(), name(), rng.choice(PLACES)
        firm = title + "公司"
        made.append(rng.choice([
            (rng.choice([f"《{title}》是{a}写的一本书。", f"{a}的小说《{title}》很有名。", f"《{title}》的作者是{a}。"]), [(title, "作者", a)]),
            (rng.choice([f"《{title}》由{a}演唱，{b}作曲。", f"{a}唱的《{title}》是{b}写的曲。"]), [(title, "歌手", a), (title, "作曲", b)]),
            (rng.choice([f"{firm}由{a}创立，总部在{place}。", f"{a}在{place}办了{firm}。"]), [(firm, "创始人", a), (firm, "总部地点", place)])]))
    return made


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def write_raw(folder: Path) -> dict[str, Path]:
    """Small samples of the sources in the formats in which they are published: source -> file."""
    pairs, rng = [pair for pair in make_demo()[0] if not is_sum(pair[0])], random.Random(0)
    rng.shuffle(pairs)
    read = []
    for text, triples in make_facts(6000, 5):
        subject, predicate, obj = rng.choice(triples)
        read.append((text, f"{subject}的{predicate}是{'哪里' if predicate == '总部地点' else '谁'}？", f"{subject}的{predicate}是{obj}。"))
    files = {source: folder / name for source, name in (
        ("alpaca", "raw.json"), ("webtext2019zh", "web_text_zh_train.json"), ("baike_qa2019", "baike_qa_train.json"), ("chinese_medical", "内科.csv"),
        ("zhihu_kol", "zhihu.parquet"), ("belle", "Belle_open_source_1M.json"), ("wiki", "wiki_00"), ("duie", "duie_train.json"))}
    files["alpaca"].write_text(json.dumps([{"instruction": p, "input": "", "output": r} for p, r in pairs[:-1200]], ensure_ascii=False), "utf-8")
    write_lines(files["webtext2019zh"], [{"qid": i, "title": p, "desc": "", "topic": "常识", "star": 3 + i % 4, "content": r, "answer_id": i, "answerer_tags": ""}
                                         for i, (p, r) in enumerate(pairs[-1200:-800])])
    write_lines(files["baike_qa2019"], [{"qid": f"qid_{i}", "category": "文化", "title": text, "desc": question, "answer": answer}
                                        for i, (text, question, answer) in enumerate(read)])
    files["chinese_medical"].write_bytes("department,title,ask,answer\r\n".encode("gb18030") + b"".join(
        f"内科,{p},,{r}\r\n".encode("gb18030") for p, r in pairs[-800:-600]))
    pq.write_table(pa.table({"INSTRUCTION": [p for p, _ in pairs[-600:-400]], "RESPONSE": [r for _, r in pairs[-600:-400]], "SOURCE": ["知乎"] * 200}), files["zhihu_kol"])
    write_lines(files["belle"], [{"instruction": p, "input": "", "output": r} for p, r in pairs[-400:-200]])
    files["wiki"].write_text("".join(f'<doc id="{i}" url="https://zh.wikipedia.org/wiki?curid={i}" title="{p[:8]}">\n{p[:8]}\n\n{r}这是一条百科。\n\n</doc>\n'
                                     for i, (p, r) in enumerate(pairs[-200:])), "utf-8")
    write_lines(files["duie"], [{"text": text, "spo_list": [{"subject": s, "predicate": p, "object": {"@value": o}} for s, p, o in triples]}
                                for text, triples in make_facts(4000, 0)])
    return files


# --- the road ------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    """A folder with the six scripts and the raw files, in which the README's commands run; a test begins where the one before it ended."""
    folder = tmp_path_factory.mktemp("road")
    for script in ROOT.glob("*.py"):
        (folder / script.name).symlink_to(script)
    return folder


def go(folder: Path, start: str | list[str], more: str = "") -> str:
    """Run the README's command that starts so, with more flags; what it printed."""
    start = words(start) if isinstance(start, str) else start
    start = start[start[0] == "python":]
    if start[0] in ("torchrun", "train.py", "dpo.py", "sample.py"):  # which take seconds to load torch
        done = Script(*start, *more.split(), cwd=folder).completed()
    else:
        done = subprocess.run([sys.executable, *start, *more.split()], cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, (start, more, done.stderr)
    return done.stdout


def go_each(folder: Path, *commands: tuple[list[str], str]) -> list[str]:
    """Several, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: go(folder, *command), commands))


def test_every_source_becomes_clean_pairs(road):
    clean = words("python data.py clean --source alpaca")
    for source, path in write_raw(road).items():
        if source != "duie":
            changed = {"alpaca": source, "raw.json": path.name, "clean.parquet": f"sources/{source}.parquet"}
            said = go(road, [changed.get(w, w) for w in clean])
            assert re.search(r"[\d,]+  kept", said), said
            if source == "webtext2019zh":
                assert "200  fewer than 5 stars" in said
    write_pairs(road / "chat.parquet", list(Rows(road / "sources"))[::5])


def test_from_raw_files_to_a_tokenizer(road):
    go(road, "python data.py demo --out raw")
    clean = words("python data.py clean --source pairs raw/train.parquet")
    go(road, ["sources" if word == "raw/train.parquet" else word for word in clean])  # which have the demo's facts, and more
    said = go(road, "python data.py dedup clean.parquet")
    go(road, "python data.py split unique.parquet")
    assert "rows" in go(road, "python data.py stats pairs/train.parquet")
    go(road, "python tokenizer.py train")
    rows = list(Rows(road / "unique.parquet"))
    assert 5000 < len(rows) < len(list(Rows(road / "clean.parquet"))), said
    parts = [{(r["prompt"], r["response"]) for r in Rows(road / "pairs" / f"{side}.parquet")} for side in ("train", "valid")]
    assert parts[0] and parts[1] and not parts[0] & parts[1] and len(parts[0] | parts[1]) == len({(r["prompt"], r["response"]) for r in rows})


def test_pretraining_in_two_processes_survives_a_kill(road):
    pretrain = [*shlex.split(PROCESSES), *words("python train.py --data pairs/train.parquet")[2:]]
    assert PROCESSES in printed()
    more, log = f"{TINY} --max_steps 270 --save_every 40 --lr 2e-2", road / "out" / "pre" / "log.jsonl"
    pretrain = pretrain[:pretrain.index("--epochs")] + pretrain[pretrain.index("--epochs") + 2:]
    running = Script(*pretrain, *more.split(), cwd=road)
    while running.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 45):
        time.sleep(0.1)
    running.kill()  # the launcher; its two processes notice
    running.wait()
    assert "resuming from" in go(road, pretrain, more)
    assert "finished: out/pre" in go(road, "python train.py --out_dir out/pre")  # with the settings of its checkpoint
    steps = [row for row in map(json.loads, log.read_text("utf-8").splitlines()) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 271))
    assert steps[-1]["loss"] < 1.5 and steps[0]["loss"] > 3


def test_from_fine_tuning_to_answers(road):
    (names,) = re.findall(r"cat > name.jsonl <<END\n(.*?)END\n", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (road / "name.jsonl").write_text(names, "utf-8")
    go(road, "python data.py clean --source pairs name.jsonl")
    go(road, "python train.py --init_from out/pre --data sft.parquet")
    name = json.loads(names.splitlines()[0])
    assert go(road, ["python", "sample.py", "--model", "out/sft", "--prompt", name["prompt"]]).startswith(name["response"][:4])
    go(road, "python dpo.py reject", "--max_new_tokens 12")
    go(road, "python dpo.py --init_from out/sft", "--epochs 2")
    go(road, "python dpo.py merge")
    scores = json.loads(go(road, "python sample.py --model out/chat --score", "--max_new_tokens 24").splitlines()[-1])
    assert scores["bleu4"] > 30 and scores["loss"] < 1.5
    go(road, "python sample.py --model out/chat --input", "--max_new_tokens 24")
    answers = list(Rows(road / "answers.jsonl"))[:5]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(road / "out" / "chat"), AutoTokenizer.from_pretrained(road / "out" / "chat")
    for row in answers:
        ids = model.generate(**tokenizer(row["prompt"], return_tensors="pt"), max_new_tokens=24, do_sample=False)
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == row["response"]


def test_triples_are_learnt_better_by_a_model_that_can_chat_and_still_can(road):
    go(road, "python data.py clean --source duie")
    go(road, "python data.py split triples.parquet")
    tune, more = words("python train.py --init_from out/pre --data triples/train.parquet"), f"{TINY.replace('--preset demo', '')} --max_steps 150 --lr 5e-3"
    i, out = tune.index("--init_from"), tune.index("--out_dir")
    go_each(road, (tune, more), ([*tune[:i], *tune[i + 2:out + 1], "out/nothing"], f"--preset demo --tokenizer tok {more}"))
    score, chat = words("python sample.py --model out/triples --score"), words("python sample.py --model out/chat --score")
    told, untold, after, before = (json.loads(said.splitlines()[-1]) for said in go_each(
        road, *(([model if w == "out/triples" else w for w in score], "--max_new_tokens 48") for model in ("out/triples", "out/nothing")),
        *(([model if w == "out/chat" else w for w in chat], "--max_new_tokens 24") for model in ("out/triples", "out/pre"))))
    assert told["f1"] > 0.1 and told["f1"] > 3 * untold["f1"] and told["loss"] < 0.6 * untold["loss"], (told, untold)
    print(f"triples, taught: {told}\nfrom nothing: {untold}\nchat, before: {before}\nafter: {after}")
    assert after["loss"] < min(0.95, 1.2 * before["loss"]) and after["exact_match"] > 0.6 * before["exact_match"] > 0.05, (before, after)


# --- damage --------------------------------------------------------------------------------------------------------------------------

def damaged(content: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    b = min(b, a + 40)
    return rng.choice([content[:a], content[:a] + content[b:], content[:b] + content[a:], content[:a] + bytes(b - a) + content[b:],
                       content[:a] + rng.randbytes(b - a) + content[b:], content[:a] + b"\xff" + content[a + 1:], b""])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A file of every format, an untrained model and an adapter for it."""
    folder, rows = tmp_path_factory.mktemp("whole"), [{"prompt": f"问题{i}，你好", "response": f"回答{i}。"} for i in range(30)]
    write_pairs(folder / "x.parquet", rows)
    write_lines(folder / "x.jsonl", rows)
    (folder / "x.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")
    (folder / "x.csv").write_text("prompt,response\n" + "".join(f'"{r["prompt"]}",{r["response"]}\n' for r in rows), "utf-8")
    (folder / "x.txt").write_text("".join(r["prompt"] + "\n" for r in rows), "utf-8")
    (folder / "x.jsonl.gz").write_bytes(gzip.compress((folder / "x.jsonl").read_bytes()))
    tokenizer = Tokenizer.train([r["prompt"] for r in rows], 300)
    model = ChatLM(ChatLMConfig.preset("demo", vocab_size=len(tokenizer), d_model=16, d_ff=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    add_lora(model, 2, 4, ["q"])
    save_adapter(model, folder / "adapter", str(folder))
    return folder


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.json", "x.csv", "x.txt", "x.jsonl.gz", "config.json", "generation_config.json", "model.safetensors",
                                  "tokenizer.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"])
def test_a_damaged_file_ends_with_one_line(whole, tmp_path, monkeypatch, capsys, name):
    """25 times each: a command that reads it does its work, or says in one line what is wrong; any other exception fails the test."""
    rng, folder, refused = random.Random(name), tmp_path / "copy", 0
    shutil.copytree(whole, folder)
    main, argv = ((data.main, ["data.py", "stats", str(folder / name)]) if name.startswith("x.") else
                  (dpo.main, ["dpo.py", "merge", "--model", str(folder), "--adapter", str(folder / "adapter"), "--out", str(tmp_path / "merged")])
                  if name.startswith("adapter") else
                  (sample.main, ["sample.py", "--model", str(folder), "--prompt", "你好", "--max_new_tokens", "2", "--device", "cpu"]))
    monkeypatch.setattr(sys, "argv", argv)
    for _ in range(25):
        (folder / name).unlink()  # what is mapped into memory stays as it is
        (folder / name).write_bytes(damaged((whole / name).read_bytes(), rng))
        capsys.readouterr()
        try:
            run(main)
        except SystemExit as end:
            lines = capsys.readouterr().err.splitlines()
            lines = [line for line in lines if "warning:" not in line]  # such as of lines that were passed over
            assert end.code in (1, 2) and len(lines) == 1 and "error:" in lines[0], lines
            refused += 1
    assert refused or name in ("x.txt", "x.jsonl")


def test_every_command_of_the_readme_is_tried():
    here = tuple(re.findall(r'(?:go\(road, |words\()"(python [^"]+)"', Path(__file__).read_text("utf-8")))
    for command in printed():
        if command.startswith("python tests/bench.py"):
            bench.parser().parse_args(shlex.split(command)[2:])  # it would take hours: its flags are right
        else:
            chats = ("python sample.py", "python sample.py --model out/chat")
            assert command in (PROCESSES, *chats) or command.startswith(here + ELSEWHERE), command


def test_help_states_each_default_once():
    """Every flag of every command names at most one default, and no Python object."""
    commands = ("train.py", "dpo.py", "dpo.py reject", "dpo.py merge", "sample.py", "tokenizer.py train", "data.py demo", "data.py clean",
                "data.py dedup", "data.py split", "data.py stats")
    for command in commands:
        script, *rest = command.split()
        said = run_script(script, *rest, "--help").stdout
        assert said.startswith(f"usage: {script}") and "object at 0x" not in said
        for flag in re.split(r"\n  (?=-)", said)[1:]:
            assert flag.count("(default") <= 1, (command, flag)
