"""Training starts from nothing, loses no step whatever happens, and refuses what cannot work."""
import dataclasses
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, Script, run_ranks, run_script, start_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import data
import train
from chatlm import ChatLM, ChatLMConfig
from data import make_demo
from sample import generate
from tokenizer import Tokenizer
from train import learning_rate, list_checkpoints

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    """Flags of a small training on a part of the demo data, with a tokenizer, two micro-batches a step."""
    folder = tmp_path_factory.mktemp("base")
    train_pairs, valid_pairs = make_demo()[0][:3000], make_demo()[1][:60]
    for name, pairs in (("train", train_pairs), ("valid", valid_pairs)):
        pq.write_table(pa.table({"prompt": [p for p, _ in pairs], "response": [r for _, r in pairs]}), folder / f"{name}.parquet", row_group_size=500)
    Tokenizer.train([t for pair in train_pairs for t in pair], 1400).save_pretrained(folder / "tok")
    return ["--data", str(folder / "train.parquet"), "--valid", str(folder / "valid.parquet"), "--tokenizer", str(folder / "tok"), "--preset", "demo", "--max_len", "40",
            "--batch_tokens", "512", "--micro_batch_tokens", "256", "--dropout", "0.1", "--workers", "0", "--device", "cpu", "--dtype", "float32", "--warmup_steps", "5"]


def command(*args: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *args]


def start_torchrun(*args: str, restarts: int = 0) -> Script:
    """Two processes of train.py on this machine."""
    return Script("torchrun", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}", ROOT / "train.py", *args)


def call(*args: str, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    if options:
        return subprocess.run(command(*args), capture_output=True, text=True, timeout=120, env=ENV, **options, check=False)
    return run_ranks("train.py", *args, ranks=ranks) if ranks > 1 else run_script("train.py", *args)


def call_each(*flags: list[str]) -> None:
    """Several runs that must end well."""
    for args in flags:
        done = call(*args)
        assert done.returncode == 0, done.stderr


def refused(*args: str) -> str:
    """The one line with which train.py ends, status 2."""
    done = call(*args)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.splitlines()[0]


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


def curve(out: Path) -> list[tuple]:
    """What must come again exactly."""
    return [tuple(row.get(k) for k in ("step", "loss", "lr", "tokens", "val_loss", "val_ppl", "val_nats_per_char", "bleu4")) for row in log(out)]


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory) -> Path:
    """A run of 24 steps that nothing interrupts."""
    out = tmp_path_factory.mktemp("straight") / "out"
    done = call(*base, "--out_dir", str(out), "--max_steps", "24", "--eval_every", "10", "--save_every", "4")
    assert done.returncode == 0, done.stderr
    return out


def test_out_dir_holds_what_is_promised(straight):
    names = {p.name for p in straight.iterdir()}
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert model | {"best", "checkpoint", "log.jsonl", "loss.svg", "tensorboard"} == names  # the last because TensorBoard is installed
    assert {p.name for p in (straight / "best").iterdir()} == model
    assert len(list_checkpoints(straight / "checkpoint")) == 2
    rows = log(straight)
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 25))
    assert all(r.keys() == {"step", "loss", "lr", "tokens", "tok_per_s", "elapsed"} for r in steps)
    assert steps[0]["loss"] < 0.7 * math.log(1400)  # it begins with what counts know
    assert steps[-1]["loss"] < min(0.6 * math.log(1400), steps[0]["loss"] - 0.5)
    evaluations = [r for r in rows if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [10, 20, 24]
    assert all(r.keys() == {"step", "val_loss", "val_ppl", "val_nats_per_char", "elapsed"} for r in evaluations)
    assert rows[-1].keys() == {"step", "bleu4"} and rows[-1]["step"] == 24


@pytest.mark.quick
def test_tensorboard_has_what_the_log_has(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(straight / "tensorboard"))
    events.Reload()
    for name in ("loss", "val_loss", "bleu4"):
        logged = [(r["step"], r[name]) for r in log(straight) if name in r]
        assert [e.step for e in events.Scalars(name)] == [step for step, _ in logged]
        assert all(math.isclose(e.value, value, rel_tol=1e-6) for e, (_, value) in zip(events.Scalars(name), logged))


@pytest.mark.quick
def test_export_is_transformers_model(straight):
    theirs, auto = AutoModelForSeq2SeqLM.from_pretrained(straight).eval(), AutoTokenizer.from_pretrained(straight)
    ours, tokenizer = ChatLM.from_pretrained(straight), Tokenizer.from_pretrained(straight)
    for prompt in ("法国的首都是哪里？", "大的反义词是什么？"):
        ids = auto(prompt, return_tensors="pt").input_ids
        assert ids[0].tolist() == tokenizer.encode(prompt)
        expected = theirs.generate(ids, max_new_tokens=20, do_sample=False)
        got = generate(ours, ids, max_new_tokens=20)
        assert torch.equal(got, expected)
        assert tokenizer.decode(got[0].tolist()) == auto.decode(expected[0], skip_special_tokens=True)


@pytest.mark.quick
def test_validation_loss_is_transformers(straight, base):
    theirs, auto = AutoModelForSeq2SeqLM.from_pretrained(straight).eval(), AutoTokenizer.from_pretrained(straight)
    nats = tokens = chars = 0
    for row in pq.read_table(base[3]).to_pylist():
        labels = auto(row["response"], return_tensors="pt").input_ids
        with torch.no_grad():
            nats += float(theirs(**auto(row["prompt"], return_tensors="pt"), labels=labels).loss) * labels.numel()
        tokens, chars = tokens + labels.numel(), chars + len(row["response"])
    last = [r for r in log(straight) if "val_loss" in r][-1]
    assert math.isclose(last["val_loss"], nats / tokens, rel_tol=1e-4)
    assert math.isclose(last["val_ppl"], math.exp(nats / tokens), rel_tol=1e-3)
    assert math.isclose(last["val_nats_per_char"], nats / chars, rel_tol=1e-4)


def run_and_kill(args: list[str], out: Path, step: int, how: int, ranks: int = 1) -> int:
    """Start, and send a signal once log.jsonl has reached a step, at some moment within the next one."""
    process = Script("train.py", *args) if ranks == 1 else start_torchrun(*args)  # which passes the signal on
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s and process.poll() is None:
        if (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count('"loss"') >= step:
            break
        time.sleep(0.005)
    time.sleep(random.random() * 0.05)
    os.kill(process.pid, how)
    return process.wait(60)


def test_resume_is_exact_after_kills(base, straight, tmp_path):
    out = tmp_path / "out"
    args = [*base, "--out_dir", str(out), "--max_steps", "24", "--eval_every", "10", "--save_every", "4"]
    for step, how in ((7, signal.SIGKILL), (13, signal.SIGINT), (18, signal.SIGKILL)):
        code = run_and_kill(args, out, step, how)
        assert code == (-signal.SIGKILL if how == signal.SIGKILL else 128 + how)
    done = call(*args)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr
    assert curve(out) == curve(straight)
    for name in ("model.safetensors", "best/model.safetensors"):
        assert (out / name).read_bytes() == (straight / name).read_bytes()


def test_two_runs_do_not_share_a_folder(base, tmp_path):
    out = tmp_path / "out"
    args = [*base, "--out_dir", str(out), "--max_steps", "100000"]
    first = Script("train.py", *args)
    try:
        while not (out / "log.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = call(*args)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2 and second.stderr.splitlines()[-1].endswith(
        f"error: another run uses {out}: wait until it ends, or choose another --out_dir"), second.stderr
    third = call(*args[:-1], "3", "--resume", "never")
    assert third.returncode == 0, third.stderr


def test_two_processes_take_the_same_steps_and_may_change(base, straight, tmp_path):
    out = tmp_path / "out"
    args = [*base, "--out_dir", str(out), "--eval_every", "10", "--save_every", "4"]
    run_and_kill([*args, "--max_steps", "24"], out, 6, signal.SIGTERM, ranks=2)
    run_and_kill([*args, "--max_steps", "24"], out, 12, signal.SIGKILL)
    done = call(*args, "--max_steps", "24", ranks=2)
    assert done.returncode == 0, done.stderr
    ours, expected = curve(out), curve(straight)
    assert [(r[0], r[3]) for r in ours] == [(r[0], r[3]) for r in expected]
    for a, b in zip(ours, expected, strict=True):
        for x, y in zip(a[1:], b[1:], strict=True):
            assert x == y or math.isclose(x, y, rel_tol=2e-3), (a, b)


def test_resume_is_exact_when_killed_while_a_checkpoint_is_written(base, straight, tmp_path):
    out = tmp_path / "out"
    args = [*base, "--out_dir", str(out), "--max_steps", "24", "--eval_every", "10", "--save_every", "1"]
    hit = 0
    for _ in range(3):
        process = Script("train.py", *args)
        saved = len(list_checkpoints(out / "checkpoint"))
        while process.poll() is None and not (saved and list((out / "checkpoint").glob("newest.*.tmp"))):
            saved = saved or len(list_checkpoints(out / "checkpoint"))
        process.kill()
        hit += process.wait() == -signal.SIGKILL
        shutil.rmtree(out / "best", ignore_errors=True)  # what a kill may leave half made is made again
    assert hit
    done = call(*args)
    assert done.returncode == 0, done.stderr
    assert curve(out) == curve(straight) and not list((out / "checkpoint").glob("newest*"))


def ranks_below(pid: int) -> list[int]:
    """The processes that torchrun, or an agent of it, has started."""
    return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]


def test_a_killed_rank_is_started_again(base, straight, tmp_path):
    out = tmp_path / "out"
    args = [*base, "--out_dir", str(out), "--max_steps", "24", "--eval_every", "10", "--save_every", "4"]
    process = start_torchrun(*args, restarts=3)
    end_s = time.monotonic() + 50
    while time.monotonic() < end_s and process.poll() is None and not ((out / "log.jsonl").exists() and len(log_lines(out)) >= 9):
        time.sleep(0.01)
    os.kill(ranks_below(process.pid)[-1], signal.SIGKILL)
    done = process.completed()
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr
    assert [r[0] for r in curve(out)] == [r[0] for r in curve(straight)]
    for a, b in zip(curve(out), curve(straight), strict=True):
        assert a[1] is None or math.isclose(a[1], b[1], rel_tol=2e-3)


def log_lines(out: Path) -> list[str]:
    return (out / "log.jsonl").read_text("utf-8").splitlines()


def test_two_machines_take_the_same_steps(base, straight, tmp_path):
    """Two agents of torchrun, as on two machines, that meet at a port."""
    out = tmp_path / "out"
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    agents = [Script("torchrun", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}",
                     ROOT / "train.py", *base, "--out_dir", out, "--max_steps", "8", "--schedule", "constant") for _ in range(2)]
    ends = [agent.completed() for agent in agents]
    assert [end.returncode for end in ends] == [0, 0], ends
    done = call(*base, "--out_dir", str(tmp_path / "one"), "--max_steps", "8", "--schedule", "constant")
    assert done.returncode == 0, done.stderr
    for a, b in zip(curve(out), curve(tmp_path / "one"), strict=True):
        assert a[0] == b[0] and (a[1] is None or math.isclose(a[1], b[1], rel_tol=1e-4))


def test_gradient_does_not_depend_on_the_split(base, tmp_path, monkeypatch):
    """1 process x 4 micro-batches = 2 x 2 = 1 x 1: one step of plain descent with rate 1 moves the weights by the gradient."""
    tokenizer = Tokenizer.from_pretrained(base[5])
    fitting = ((p, r) for p, r in make_demo()[0] if len(tokenizer.encode(p)) == 8 and len(tokenizer.encode(r)) in (5, 6))
    rows = list(itertools.islice(fitting, 32))
    assert len(rows) == 32
    pq.write_table(pa.table({"prompt": [p for p, _ in rows], "response": [r for _, r in rows]}), tmp_path / "rows.parquet")
    script = tmp_path / "plain.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch, train\n"
                      "train.make_optimizers = lambda model, *_: [torch.optim.SGD(model.parameters(), lr=1.0)]\ntrain.main()\n")
    moved, cases, cells = {}, ((1, 1), (1, 4), (2, 1)), 8 * (8 + 6)
    monkeypatch.setattr(train, "make_optimizers", lambda model, *_: [torch.optim.SGD(model.parameters(), lr=1.0)])

    def descend(ranks: int, micro: int) -> subprocess.CompletedProcess:
        flags = ["--data", str(tmp_path / "rows.parquet"), "--tokenizer", base[5], "--preset", "demo", "--max_len", "20", "--device", "cpu", "--dtype", "float32", "--workers", "0", "--max_steps", "1", "--lr", "1",
                 "--schedule", "constant", "--warmup_steps", "0", "--grad_clip", "1e9", "--micro_batch_tokens", str(cells * micro), "--batch_tokens", str(4 * cells)]
        flags += ["--out_dir", str(tmp_path / f"{ranks}x{micro}")]
        if ranks == 1:
            return call(*flags)
        return run_ranks(script, *flags, ranks=ranks)

    for ranks, micro in cases:
        done = descend(ranks, micro)
        assert done.returncode == 0, done.stderr
        out = tmp_path / f"{ranks}x{micro}"
        moved[ranks, micro] = load_file(out / "model.safetensors")
        (line,) = [r for r in log(out) if "loss" in r]
        assert line["tokens"] == sum(len(tokenizer.encode(t)) for row in rows for t in row)
    torch.manual_seed(0)
    start = ChatLM(ChatLM.from_pretrained(tmp_path / "1x1").config).state_dict()
    expected = {name: start[name] - w for name, w in moved[1, 4].items()}
    assert max(float(g.abs().max()) for g in expected.values()) > 0.01
    for case in ((1, 1), (2, 1)):
        for name, g in expected.items():
            torch.testing.assert_close(start[name] - moved[case][name], g, rtol=1e-3, atol=2e-6 + 1e-6 * float(start[name].abs().max()))


def test_checkpointed_activations_change_nothing(base, straight, tmp_path):
    """With dropout and without, which attend by different kernels."""
    call_each(*([*base, "--out_dir", str(tmp_path / name), *flags] for name, flags in (
        ("dropout", ["--max_steps", "24", "--eval_every", "10", "--checkpoint_activations"]), ("kept", ["--max_steps", "4", "--dropout", "0"]),
        ("again", ["--max_steps", "4", "--dropout", "0", "--checkpoint_activations"]))))
    assert curve(tmp_path / "dropout") == curve(straight)
    assert curve(tmp_path / "again") == curve(tmp_path / "kept")


def test_float16_trains_to_the_loss_of_float32(base, tmp_path):
    call_each(*([*base[:-4], "--dtype", dtype, "--dropout", "0", "--lr", "2e-2", "--max_steps", "30", "--eval_every", "5", "--out_dir", str(tmp_path / dtype)]
                for dtype in ("float32", "float16")))
    ends = {}
    for dtype in ("float32", "float16"):
        begins, *_, ends[dtype] = [r["val_loss"] for r in log(tmp_path / dtype) if "val_loss" in r]
        assert ends[dtype] < begins - 1.5, (begins, ends)
    assert math.isclose(ends["float16"], ends["float32"], rel_tol=0.02), ends


def test_overlap_with_validation_is_counted(base, tmp_path):
    pq.write_table(pa.table({"prompt": ["你好", "你好", "再见", "没有"], "response": ["一", "二", "三", "四"]}), tmp_path / "v.parquet")
    pq.write_table(pa.table({"prompt": pa.array(["你好", "再见", "再见", None], pa.large_string()), "response": ["五", "六", "七", "八"]}), tmp_path / "t.parquet")
    assert train.overlap([str(tmp_path / "t.parquet"), base[1]], [str(tmp_path / "v.parquet")]) == 2
    assert train.overlap([base[1]], [base[3]]) == 0
    done = call(*base[:2], "--valid", base[1], *base[4:], "--out_dir", str(tmp_path / "out"), "--max_steps", "1")
    prompts = set(pq.read_table(base[1])["prompt"].to_pylist())
    assert f"warning: {len(prompts):,} prompts of --valid are in --data too" in done.stderr


def test_answers_are_scored_when_asked(base, tmp_path):
    done = call(*base, "--out_dir", str(tmp_path / "out"), "--max_steps", "4", "--bleu_every", "2")
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in log(tmp_path / "out") if "bleu4" in r] == [2, 4]


@pytest.mark.quick
def test_finished_run_says_so_and_can_be_prolonged(base, straight):
    before = (straight / "log.jsonl").read_bytes()
    done = call(*base, "--out_dir", str(straight), "--max_steps", "24", "--eval_every", "10", "--save_every", "4")
    assert done.returncode == 0 and "finished: " in done.stdout and "sample.py" in done.stdout
    assert (straight / "log.jsonl").read_bytes() == before


def test_damaged_checkpoint_is_passed_over(base, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    newest, older = list_checkpoints(out / "checkpoint")
    newest.write_bytes(newest.read_bytes()[:-1000])
    args = [*base, "--out_dir", str(out), "--max_steps", "24", "--eval_every", "10", "--save_every", "4"]
    done = call(*args)
    assert done.returncode == 0 and "is damaged and skipped" in done.stderr and older.name in done.stdout
    assert curve(out) == curve(straight)
    for path in list_checkpoints(out / "checkpoint"):
        path.write_bytes(b"x")
    done = call(*args)
    assert done.returncode == 2 and "every checkpoint" in done.stderr


def test_beginning_anew_leaves_nothing_of_the_old_run(base, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    done = call(*base, "--out_dir", str(out), "--max_steps", "3", "--resume", "never")
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in log(out) if "loss" in r] == [1, 2, 3]
    assert [int(p.name.split("-")[1]) for p in list_checkpoints(out / "checkpoint")] == [3]


def test_full_disk_loses_nothing(base, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    kept = {p.name: p.read_bytes() for p in list_checkpoints(out / "checkpoint")}
    model = (out / "model.safetensors").read_bytes()
    done = call(*base, "--out_dir", str(out), "--max_steps", "28", "--save_every", "2",
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(model) // 2,) * 2))
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr.splitlines()[-1]
    assert {p.name: p.read_bytes() for p in list_checkpoints(out / "checkpoint")} == kept
    assert (out / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize(("change", "flag"), [(["--seed", "1"], "--seed"), (["--max_len", "39"], "--max_len"), (["--micro_batch_tokens", "128"], "--micro_batch_tokens"),
                                              (["--preset", "small"], "shape"), (["--optimizer", "adamw"], "--optimizer"), (["--freeze", "encoder"], "--freeze")], ids=str)
def test_what_cannot_change_is_named(base, straight, change, flag):
    before = {p: p.read_bytes() for p in straight.rglob("*") if p.is_file()}
    line = refused(*base, "--out_dir", str(straight), "--max_steps", "30", *change)
    assert flag in line and "differs from the run in" in line
    assert {p: p.read_bytes() for p in straight.rglob("*") if p.is_file()} == before


@pytest.mark.quick
def test_bad_input_ends_with_one_line(base, straight, tmp_path):
    pq.write_table(pa.table({"a": ["b"]}), tmp_path / "no_columns.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "response": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "no_tokenizer").mkdir()
    (tmp_path / "no_tokenizer" / "config.json").write_text('{"model_type": "t5"}')
    new = ["--out_dir", str(tmp_path / "new"), "--max_steps", "2"]
    big = tmp_path / "big"
    Tokenizer.train([chr(0x4e00 + i) for i in range(3000)], 4000).save_pretrained(big)
    cases = [(["--data", "none.parquet", *new], "none.parquet"), (["--data", str(tmp_path / "no_columns.parquet"), *new], "no column 'prompt'"),
             (["--data", str(tmp_path / "empty.parquet"), *new], "no text"), (["--data", str(tmp_path / "empty.parquet"), "--tokenizer", base[5], *new], "no rows"), (["--max_steps", "-1"], "--max_steps"), (["--lr", "0"], "--lr"), (["--lr", "-1"], "--lr"),
             (["--max_steps", "3", "--epochs", "1"], "not allowed with"), (["--data", base[1], "--init_from", str(tmp_path / "no_tokenizer"), *new], "tokenizer.json"),
             (["--data", base[1], "--init_from", str(tmp_path / "model"), "--tokenizer", base[5], *new], "'bert'"),
             (["--data", base[1], "--init_from", str(straight), "--tokenizer", str(big), *new], "the tokenizer has"), (["--data", base[1], "--out_dir", str(straight / "best"), "--max_steps", "2"], "no checkpoint"),
             (["--data", base[1], "--freeze", "head", *new], "--freeze 'head'"), (["--data", base[1], "--tokenizer", base[5], "--resume", "nowhere", *new], "no checkpoint there"), (["--device", "tpu"], "--device tpu")]
    for args, message in cases:
        assert message in refused(*args), args
    assert not (tmp_path / "new" / "log.jsonl").exists()


def test_fine_tuning_leaves_frozen_parts_alone(base, straight, tmp_path):
    out = tmp_path / "sft"
    i = base.index("--preset")
    args = base[:i] + base[i + 2:]
    done = call(*args, "--init_from", str(straight), "--freeze", "shared,encoder", "--max_steps", "3", "--out_dir", str(out), "--lr", "1e-3", "--optimizer", "adafactor")
    assert done.returncode == 0, done.stderr
    before, after = ChatLM.from_pretrained(straight).state_dict(), ChatLM.from_pretrained(out).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)


def test_infinite_gradients_change_nothing_and_end_the_run(base, straight, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(straight / "best", model)
    weights = load_file(model / "model.safetensors")
    weights["decoder.final_layer_norm.weight"][0] = 3e38  # finite, but not times the embedding
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    i = base.index("--preset")
    done = call(*base[:i], *base[i + 2:], "--init_from", str(model), "--max_steps", "30", "--out_dir", str(tmp_path / "out"))
    assert done.returncode == 2 and "no finite loss in 10 steps" in done.stderr.splitlines()[-1], done.stderr
    assert [r["loss"] for r in log(tmp_path / "out")] == [None] * 10
    done = call(*base[:i], *base[i + 2:], "--init_from", str(model), "--max_steps", "3", "--out_dir", str(tmp_path / "short"))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("no finite loss in 3 steps in a row: lower --lr or choose another --dtype")
    assert not (tmp_path / "short" / "model.safetensors").exists()


@pytest.mark.parametrize("flags", [["--optimizer", "muon", "--schedule", "onecycle", "--epochs", "0.05"], ["--dtype", "bfloat16", "--time_limit", "2"]], ids=str)
def test_other_ways_to_train_work(base, tmp_path, flags):
    done = call(*base, "--lr", "5e-3", "--out_dir", str(tmp_path / "out"), *flags)
    assert done.returncode == 0, done.stderr
    losses = [r["loss"] for r in log(tmp_path / "out") if "loss" in r]
    assert len(losses) >= 2 and min(losses[1:]) < losses[0]


def test_no_data_is_the_demo(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--max_steps", "3", "--eval_every", "3"], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for text in ("making demo data", "training a tokenizer", "held-out facts: 7", "unseen sums", 'python sample.py --prompt "'):
        assert text in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_schedules():
    def at(kind, x, step=1000):
        return learning_rate(kind, x, step, 1.0, 0.1, 100)
    assert [round(at("cosine", x), 6) for x in (0, 0.5, 1)] == [1, 0.55, 0.1]
    assert [round(at("onecycle", x), 6) for x in (0, 0.15, 0.3, 0.65, 1)] == [0.1, 0.55, 1, 0.55, 0.1]
    assert [round(at("wsd", x), 6) for x in (0, 0.5, 0.8, 0.9, 1)] == [1, 1, 1, 0.55, 0.1]
    assert at("constant", 1) == 1 and math.isclose(at("cosine", 0, step=49), 0.5)


def test_state_is_plain_numbers():
    assert json.loads(json.dumps({k: v for k, v in dataclasses.asdict(train.State()).items() if k != "best_val"}))


# --- any number of processes ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(base, tmp_path_factory) -> tuple[list[str], Path]:
    """Flags of a run of two epochs and a bit over few pairs, three micro-batches a step, with one validation batch; and its out_dir."""
    folder = tmp_path_factory.mktemp("small")
    table = pq.read_table(base[1])
    pq.write_table(table.slice(0, 150), folder / "train.parquet")
    pq.write_table(table.slice(200, 6), folder / "valid.parquet")
    args = [*base, "--data", str(folder / "train.parquet"), "--valid", str(folder / "valid.parquet"), "--batch_tokens", "768",
            "--max_steps", "16", "--eval_every", "5", "--save_every", "4"]
    done = call(*args, "--out_dir", str(folder / "one"))
    assert done.returncode == 0, done.stderr
    return args, folder / "one"


def assert_close(out: Path, expected: Path, rel: float = 2e-3) -> None:
    """The same steps, tokens and learning rates, and losses within rounding."""
    ours, theirs = curve(out), curve(expected)
    for a, b in zip(ours, theirs, strict=True):
        assert (a[0], a[2], a[3]) == (b[0], b[2], b[3])
        assert all(x == y or math.isclose(x, y, rel_tol=rel) for x, y in zip(a[1:], b[1:], strict=True)), (a, b)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_any_number_of_processes_takes_the_same_steps(small, tmp_path, ranks):
    """Uneven shares with 2, none for some with 4 and 5; ends of epochs; fewer validation batches than processes."""
    args, one = small
    done = call(*args, "--out_dir", str(tmp_path / "out"), ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "out", one)
    notes = [line for line in done.stderr.splitlines() if line.startswith("train.py: note: a step has 3 micro-batches")]
    if ranks == 3:
        assert notes == []
    else:
        assert len(notes) == 1 and f"--batch_tokens {256 * (4 if ranks == 2 else ranks)}" in notes[0]
        assert (f"{ranks - 3} have none" in notes[0]) == (ranks > 3)


def test_a_run_is_resumed_with_other_numbers_of_processes_and_its_own_settings(small, tmp_path):
    args = [*small[0], "--schedule", "constant", "--warmup_steps", "0"]  # which do not depend on how many steps there are
    for steps, ranks in (("6", 1), ("12", 3), ("16", 2)):
        done = call(*(args if ranks == 1 else ["--device", "cpu"]), "--max_steps", steps, "--out_dir", str(tmp_path / "out"), ranks=ranks)
        assert done.returncode == 0, done.stderr
    done = call(*args, "--out_dir", str(tmp_path / "one"))
    ours, expected = ([row for row in curve(folder) if row[1]] for folder in (tmp_path / "out", tmp_path / "one"))
    assert [row[0] for row in ours] == list(range(1, 17))
    for a, b in zip(ours, expected, strict=True):
        assert a[2:4] == b[2:4] and math.isclose(a[1], b[1], rel_tol=2e-3)


def test_a_resumed_run_takes_what_no_flag_says_from_its_checkpoint(base, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    for path in list_checkpoints(out / "checkpoint")[:1]:
        path.unlink()  # from step 20 again
    done = call("--out_dir", str(out), "--device", "cpu")
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr
    assert curve(out) == curve(straight)
    done = call("--out_dir", str(out), "--max_steps", "25", "--lr", "1e-5", "--eval_every", "100", "--schedule", "constant")
    assert done.returncode == 0 and log(out)[-3]["step"] == 25 and log(out)[-3]["lr"] == 1e-5


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("flags", [[], ["--data", "x"], ["--data", "x", "--micro_batch_tokens", "4000"]], ids=str)
def test_every_process_gets_work_by_default(base, monkeypatch, tmp_path, world_size, flags):
    class Several(train.Ranks):
        def all_gather(self, value):
            return [value] * self.world_size

        def barrier(self):
            pass

    flags = [base[1] if flag == "x" else flag for flag in flags]
    args = train.parser_for(train.Settings, "", "").parse_args([*flags, "--out_dir", str(tmp_path)])
    args = train.resolve(train.Settings, args, Several(0, world_size, torch.device("cpu")), None)
    group = round(args.batch_tokens / args.micro_batch_tokens)
    assert group >= world_size and group % world_size == 0 and args.batch_tokens == group * args.micro_batch_tokens


def launch_ranks(*args_of_ranks: list[str]) -> list[tuple[int, str]]:
    """The exit status and stderr of every rank of one run."""
    return [(end.returncode, end.stderr) for end in (script.completed() for script in start_ranks("train.py", *args_of_ranks))]


def test_a_machine_without_the_checkpoint_is_told_so(base, straight, tmp_path):
    """Each process as on a machine of its own, with an out_dir that the other does not see."""
    shutil.copytree(straight, tmp_path / "a")
    shutil.copytree(straight, tmp_path / "stale")
    list_checkpoints(tmp_path / "stale" / "checkpoint")[0].unlink()
    newest = list_checkpoints(straight / "checkpoint")[0].name
    for other in ("empty", "stale"):
        before = sorted((tmp_path / other).rglob("*"))
        (_, first), (code, second) = launch_ranks(*([*base, "--out_dir", str(tmp_path / folder), "--max_steps", "26"] for folder in ("a", other)))
        assert code == 2 and len(second.splitlines()) == 1, second
        assert f"{tmp_path / other}/checkpoint has no {newest}" in second and "--out_dir must be on a file system that all machines share" in second
        assert "must be on a file system" in first.splitlines()[-1]
        assert sorted((tmp_path / other).rglob("*")) == before


def test_machines_with_other_data_are_told_so(base, tmp_path):
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(base[1]).slice(1), other)
    ends = launch_ranks(*([*base, "--data", data, "--out_dir", str(tmp_path / "out"), "--max_steps", "2"] for data in (base[1], str(other))))
    assert [code for code, _ in ends] == [2, 2] and all("--data: this process has other files" in said for _, said in ends), ends


def test_another_launcher_than_torchrun_may_go(base, tmp_path):
    """Ranks that a shell starts in the background, and whose parent is then process 1, go on to the end."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    lines = [f"RANK={rank} WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT={port} " + shlex.join(command(*base, "--out_dir", str(tmp_path / "out"), "--max_steps", "3"))
             + f" > {tmp_path}/{rank}.txt 2>&1 &" for rank in range(2)]
    (tmp_path / "0.txt").touch()  # the shell ends before its background processes have begun
    subprocess.run(["sh", "-c", "\n".join(lines)], env=ENV, check=True)
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s and "finished:" not in (tmp_path / "0.txt").read_text():
        time.sleep(0.1)
    assert "finished:" in (tmp_path / "0.txt").read_text(), (tmp_path / "0.txt").read_text() + (tmp_path / "1.txt").read_text()
    assert [r["step"] for r in log(tmp_path / "out") if "loss" in r] == [1, 2, 3]


def test_a_killed_loader_process_is_one_line(small, tmp_path):
    """It is noticed when the next window is needed; an epoch of few pairs is one."""
    out = tmp_path / "out"
    args = [*small[0], "--batch_tokens", "256", "--workers", "1", "--out_dir", str(out), "--max_steps", "100000", "--save_every", "5"]
    process = subprocess.Popen(command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)
    while process.poll() is None and not list_checkpoints(out / "checkpoint"):
        time.sleep(0.02)
    (worker,) = [child for child in ranks_below(process.pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(worker, signal.SIGKILL)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 2 and "a background process was killed" in said[-1] and not any("Traceback" in line for line in said), said
    assert all(train.hash_file(path) == path.stem.rpartition("-")[2] for path in list_checkpoints(out / "checkpoint"))


def test_a_sigterm_to_all_processes_saves(small, tmp_path):
    """As `timeout` and job schedulers send it: the background processes end, too."""
    out = tmp_path / "out"
    args = [*small[0], "--batch_tokens", "256", "--workers", "2", "--out_dir", str(out), "--max_steps", "100000", "--save_every", "5"]
    process = subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, start_new_session=True)
    while process.poll() is None and not list_checkpoints(out / "checkpoint"):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "and saved" in said and "error" not in errors, errors


def test_ctrl_c_saves_although_the_reader_of_the_output_has_left(base, tmp_path):
    """As with `train.py | tee log`, where Ctrl-C ends tee at once."""
    out = tmp_path / "out"
    process = subprocess.Popen(command(*base, "--out_dir", str(out), "--max_steps", "100000", "--eval_every", "1"), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=ENV)
    while "step 3" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert list_checkpoints(out / "checkpoint")


# --- memory -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()], ids=repr)
def test_out_of_memory_is_one_line_and_touches_no_checkpoint(base, straight, tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    kept = {p: p.read_bytes() for p in [*list_checkpoints(out / "checkpoint"), out / "model.safetensors"]}
    calls, whole = [], ChatLM.loss_sum

    def fail(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise error
        return whole(self, *args, **kwargs)
    monkeypatch.setattr(ChatLM, "loss_sum", fail)
    done = call("--out_dir", str(out), "--max_steps", "40")
    assert done.returncode == 1 and len(calls) == 4 and "--micro_batch_tokens" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert all(p.read_bytes() == content for p, content in kept.items())


def gpu_args(**changes) -> train.Settings:
    return train.Settings(out_dir="out", **{"preset": "0.2b", "dtype": "bfloat16", "batch_tokens": 65536, **changes})


def test_the_micro_batch_fits_the_free_memory(monkeypatch):
    def chosen(free_gb: float, columns: int = 2, **changes) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gb * 1e9), int(free_gb * 1e9)))
        return train.default_micro_batch(gpu_args(**changes), torch.device("cuda"), columns)

    sizes = [chosen(gb) for gb in (4, 6, 8, 12, 24, 80)]
    assert sizes == sorted(sizes) and sizes[0] >= 640 and sizes[2] < 16384 and sizes[-1] == 65536, sizes
    assert chosen(8, checkpoint_activations=True) > chosen(8) > chosen(8, dtype="float32") and chosen(8, preset="small") > 16384
    assert train.default_micro_batch(gpu_args(), torch.device("cuda"), 2, ranks=3) <= -(-65536 // 3)  # a step is shared
    for gb, tokens, ranks in itertools.product((6, 24, 80, 141), (48000, 96000, 100000), (1, 2)):  # the step is what was asked for
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, gb=gb: (int(gb * 1e9), int(gb * 1e9)))
        micro = train.default_micro_batch(gpu_args(batch_tokens=tokens), torch.device("cuda"), 2, ranks)
        group = round(tokens / micro)
        assert group % ranks == 0 and abs(group * micro / tokens - 1) < 0.001
    config, args = ChatLMConfig.preset("0.2b"), gpu_args()
    assert train.state_bytes(config, args) + 640 * train.activation_bytes(config, args) < 4e9  # --micro_batch_tokens 640
    with pytest.raises(ValueError, match=r"2\.5 GB of GPU memory are free, too little .* --checkpoint_activations"):
        chosen(2.5)
    assert [chosen(80, batch_tokens=tokens) for tokens in (3000, 900, 100)] == [3000, 900, 640]  # no more than a step, no less than a row
    cpu = torch.device("cpu")
    assert [train.default_micro_batch(gpu_args(preset=preset, batch_tokens=5120), cpu, 2, ranks) for preset in ("0.2b", "small") for ranks in (1, 2)] == [1280, 640] * 2
    assert [train.default_micro_batch(gpu_args(batch_tokens=tokens), cpu, 2) for tokens in (800, 2000)] == [800, 1000]


@pytest.mark.quick
def test_a_step_on_a_gpu_is_small_for_little_data(tmp_path):
    """So that a run has about a thousand updates; 65,536 tokens where the data has as many of them."""
    texts = ["".join(random.Random(i).choices("今天气很好北京首都法国", k=300)) for i in range(3000)]  # 900,000 characters
    data.write_pairs(tmp_path / "x.parquet", [{"prompt": t[:100], "response": t[100:]} for t in texts])

    def chosen(device: str = "cuda", files: int = 1, **changes) -> int:
        settings = gpu_args(data_files=(str(tmp_path / "x.parquet"),) * files, **changes)
        return train.default_batch(settings, torch.device(device))

    assert 1280 == chosen() < chosen(epochs=4.0) < chosen(epochs=8.0) == chosen(files=8) < chosen(epochs=16.0) < 65536
    assert 0.8 < chosen(epochs=8.0) * train.MIN_UPDATES / (8 * 900_000 / 1.5) < 1.3
    assert chosen(epochs=1000.0) == 65536 and chosen("cpu", epochs=8.0) == 1280
    assert chosen(demo=True) == chosen("cpu", demo=True) == 1024


@pytest.mark.quick
def test_clipping_is_torchs():
    for scale in (1e-3, 10.0):
        parameter = torch.nn.Parameter(torch.zeros(5_000_000))
        parameter.grad = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0)) * scale
        gradient = parameter.grad * 4
        norm = float(parameter.grad.double().norm())
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        assert math.isclose(train.clip_gradient(gradient, 4.0, 1.0), norm, rel_tol=3e-4)
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-9)
    assert not train.clip_gradient(torch.tensor([1.0, math.inf]), 1.0, 1.0).isfinite() and train.clip_gradient(torch.zeros(3), 1.0, 1.0) == 0


# --- stale files, and files of others -----------------------------------------------------------------------------------------

def test_a_new_run_trains_a_new_tokenizer_where_it_must(base, tmp_path):
    out = tmp_path / "out"
    common = ["--preset", "demo", "--max_len", "40", "--max_steps", "1", "--workers", "0", "--device", "cpu", "--dtype", "float32", "--resume", "never", "--out_dir", str(out)]
    assert call("--data", base[1], "--vocab_size", "1100", *common).returncode == 0
    first = (out / "tokenizer.json").read_bytes()
    done = call("--data", base[1], "--vocab_size", "1100", *common)
    assert done.returncode == 0 and "training a tokenizer" not in done.stdout and (out / "tokenizer.json").read_bytes() == first
    for change in (["--data", base[1], "--vocab_size", "1200"], ["--data", base[3], "--vocab_size", "1200"]):
        done = call(*change, *common)
        assert done.returncode == 0 and "was trained on other data or for another --vocab_size" in done.stdout, done.stderr
        assert len(Tokenizer.from_pretrained(out)) == ChatLM.from_pretrained(out).config.vocab_size
    assert (out / "tokenizer.json").read_bytes() != first


def test_a_tokenizer_that_a_user_put_there_is_used(base, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(base[5], out)
    flags = ["--data", base[1], "--preset", "demo", "--max_len", "40", "--max_steps", "1", "--workers", "0", "--device", "cpu", "--out_dir", str(out)]
    assert "--vocab_size has no effect" in refused(*flags, "--vocab_size", "1000")
    done = call(*flags)
    assert done.returncode == 0 and f"using the tokenizer in {out}" in done.stdout


@pytest.mark.quick
def test_flags_without_effect_are_refused(base, straight, tmp_path):
    new = ["--data", base[1], "--out_dir", str(tmp_path / "new"), "--max_steps", "1"]
    for flags, message in ((["--tokenizer", base[5], "--vocab_size", "300"], "--tokenizer brings its own"), (["--init_from", str(straight), "--vocab_size", "300"], "--init_from brings its own"),
                           (["--lora_alpha", "3"], "--lora_alpha has no effect without --lora_rank"), (["--lora_targets", "q"], "without --lora_rank"), (["--init_from", str(straight), "--lora_rank", "2", "--lora_targets", "q,qq"], "no linear layer qq")):
        assert message in refused(*new, *flags)
    assert not (tmp_path / "new" / "log.jsonl").exists()


@pytest.mark.quick
def test_flags_without_effect_are_reported(base, tmp_path):
    done = call("--data", base[1], *base[4:], "--out_dir", str(tmp_path), "--max_steps", "1", "--eval_every", "3")
    assert done.returncode == 0 and done.stderr.splitlines() == ["train.py: note: --eval_every has no effect without --valid"]


def test_another_tokenizer_than_the_models_is_warned_of(base, straight, tmp_path):
    Tokenizer.train([t for pair in make_demo()[0][:500] for t in pair], 1000).save_pretrained(tmp_path / "tok")
    flags = ["--data", base[1], "--init_from", str(straight), "--max_len", "40", "--max_steps", "1", "--workers", "0", "--device", "cpu"]
    for tokenizer, warned in ((tmp_path / "tok", True), (base[5], False)):
        done = call(*flags, "--tokenizer", str(tokenizer), "--out_dir", str(tmp_path / str(warned)))
        assert done.returncode == 0 and ("has other tokens than" in done.stderr) == warned, done.stderr


@pytest.mark.parametrize("flags", [[], ["--freeze", "shared,encoder"], ["--lora_rank", "2"]], ids=str)
def test_another_starting_model_is_refused(base, straight, tmp_path, flags):
    model = tmp_path / "model"
    shutil.copytree(straight / "best", model)
    i = base.index("--preset")
    args = [*base[:i], *base[i + 2:], *flags, "--out_dir", str(tmp_path / "out"), "--init_from"]
    assert call(*args, str(model), "--max_steps", "2").returncode == 0
    own = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(own | {"num_beams": 2}))  # no weights
    assert call(*args, str(model), "--max_steps", "3").returncode == 0
    weights = load_file(model / "model.safetensors")
    weights["encoder.block.0.layer.0.SelfAttention.q.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "--init_from (the model's weights) differs from the run in" in refused(*args, str(model), "--max_steps", "4")
    assert "(the model's weights) differs from the run in" in refused("--out_dir", str(tmp_path / "out"), "--max_steps", "4")
    assert call(*args, str(straight / "best"), "--max_steps", "4").returncode == 0


@pytest.mark.quick
def test_data_that_changed_in_its_middle_is_refused(base, straight, tmp_path):
    """Of the same size, with the same footer."""
    path = tmp_path / "train.parquet"
    content = bytearray(Path(base[1]).read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert "--data differs from the run in" in refused(*base, "--data", str(path), "--out_dir", str(straight), "--max_steps", "30")


def test_training_reads_folders_and_names_the_command_that_converts(base, tmp_path):
    (tmp_path / "shards" / "more").mkdir(parents=True)
    table = pq.read_table(base[1])
    pq.write_table(table.slice(0, 1500), tmp_path / "shards" / "a.parquet")
    pq.write_table(table.slice(1500), tmp_path / "shards" / "more" / "b.parquet")
    (tmp_path / "shards" / "notes.md").write_text("x")
    for name, source in (("shards", tmp_path / "shards"), ("file", base[1])):
        done = call(*base, "--data", str(source), "--max_steps", "1", "--out_dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    ours, expected = (log(tmp_path / name)[0] for name in ("shards", "file"))
    assert ours["loss"] != expected["loss"] and math.isclose(ours["loss"], expected["loss"], rel_tol=0.5)  # other row groups, other batches
    (tmp_path / "my data.jsonl").write_text("{}")
    new = ["--out_dir", str(tmp_path / "new")]
    line = refused("--data", str(tmp_path / "my data.jsonl"), *new)
    assert f"python data.py clean --source pairs '{tmp_path}/my data.jsonl' --out 'my data.parquet'" in line
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "x.jsonl").write_text("{}")
    assert "has no Parquet files: convert" in refused("--data", str(tmp_path / "lines"), *new)


# --- beginnings ---------------------------------------------------------------------------------------------------------------

@pytest.mark.quick
def test_few_rows_begin_at_random(base, tmp_path):
    for rows in (3, 20):
        pq.write_table(pq.read_table(base[1]).slice(0, rows), tmp_path / f"{rows}.parquet")
        done = call("--data", str(tmp_path / f"{rows}.parquet"), "--tokenizer", base[5], "--preset", "demo", "--max_len", "40", "--max_steps", "2", "--warmup_steps", "100", "--lr", "1e-6",
                         "--workers", "0", "--device", "cpu", "--dtype", "float32", "--out_dir", str(tmp_path / str(rows)))
        assert done.returncode == 0 and "initialized" in done.stdout, done.stderr
        assert log(tmp_path / str(rows))[0]["loss"] < 1.3 * math.log(1400), done.stdout


@pytest.mark.quick
@pytest.mark.parametrize("other", [{"feed_forward_proj": "gated-gelu"}, {"d_ff": 64}], ids=str)
def test_a_model_that_counts_do_not_fit_starts_at_random(base, tmp_path, monkeypatch, other):
    monkeypatch.setitem(train.PRESETS, "demo", train.PRESETS["demo"] | other)
    done = call(*base, "--max_steps", "1", "--out_dir", str(tmp_path / "out"))
    assert done.returncode == 0 and "initialized at random: counts need" in done.stdout, done.stderr


def test_the_schedules_clock_starts_after_the_beginning(base, tmp_path, monkeypatch):
    counted = train.init_bigrams

    def slow(*args):
        time.sleep(3)
        counted(*args)
    monkeypatch.setattr(train, "init_bigrams", slow)
    done = call(*base, "--time_limit", "3", "--schedule", "cosine", "--warmup_steps", "10000", "--out_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    steps = [r for r in log(tmp_path / "out") if "loss" in r]
    assert steps[0]["elapsed"] < 2.5 and steps[1]["lr"] < 0.02 / 0.1 * (steps[0]["elapsed"] + 0.5) / 3 and len(steps) > 5


def test_a_refused_resume_changes_nothing(base, tmp_path):
    """Also not the tokenizer that the run trained."""
    out, half = tmp_path / "out", tmp_path / "half.parquet"
    pq.write_table(pq.read_table(base[1]).slice(0, 1500), half)
    common = ["--preset", "demo", "--max_len", "40", "--workers", "0", "--device", "cpu", "--dtype", "float32", "--vocab_size", "1100", "--out_dir", str(out)]
    assert call("--data", base[1], "--max_steps", "2", *common).returncode == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    done = call("--data", str(half), "--max_steps", "4", *common)
    assert done.returncode == 2 and "--data differs from the run in" in done.stderr
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_another_run_does_not_replace_a_run(base, straight, tmp_path):
    newest = list_checkpoints(straight / "checkpoint")[0]
    assert call(*base, "--max_steps", "2", "--seed", "5", "--out_dir", str(tmp_path / "other")).returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "other").rglob("*") if p.is_file()}
    assert "is not of the run in" in refused("--resume", str(newest), "--out_dir", str(tmp_path / "other"), "--max_steps", "26")
    assert {p: p.read_bytes() for p in (tmp_path / "other").rglob("*") if p.is_file()} == before
    done = call("--resume", str(straight), "--out_dir", str(tmp_path / "copy"), "--max_steps", "25")  # its folder; to a new place
    assert done.returncode == 0 and [r["step"] for r in log(tmp_path / "copy") if "loss" in r] == [25], done.stderr
    shutil.copy(newest, tmp_path / "backup.pt")
    assert "must stay so" in refused("--resume", str(tmp_path / "backup.pt"), "--out_dir", str(tmp_path / "new"), "--max_steps", "26")
    junk = tmp_path / "step-00000001-.pt"
    junk.write_bytes(b"junk")
    junk = junk.rename(tmp_path / f"step-00000001-{train.hash_file(junk)}.pt")
    assert "is not a checkpoint" in refused("--resume", str(junk), "--out_dir", str(tmp_path / "new"), "--max_steps", "26")


@pytest.mark.quick
def test_the_starting_model_is_not_overwritten(base, straight, tmp_path):
    shutil.copytree(straight / "best", tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    line = refused("--data", base[1], "--init_from", str(tmp_path / "model"), "--out_dir", str(tmp_path / "model"), "--resume", "never", "--max_steps", "1")
    assert f"--init_from {tmp_path / 'model'} would be overwritten" in line and (tmp_path / "model" / "model.safetensors").read_bytes() == before
    shutil.copytree(straight, tmp_path / "run")  # best/ is overwritten, too
    line = refused("--data", base[1], "--init_from", str(tmp_path / "run" / "best"), "--out_dir", str(tmp_path / "run"), "--resume", "never", "--max_steps", "1")
    assert "best would be overwritten" in line


def test_a_run_that_fails_early_leaves_the_model_of_an_earlier_one(base, tmp_path, monkeypatch):
    out, common = tmp_path / "out", ["--preset", "demo", "--max_len", "40", "--workers", "0", "--device", "cpu", "--dtype", "float32"]
    common += ["--out_dir", str(out)]
    assert call("--data", base[1], "--vocab_size", "1100", "--max_steps", "2", *common).returncode == 0
    kept = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    again = ["--data", base[3], "--vocab_size", "900", "--resume", "never", "--max_steps", "2", *common]
    done = call(*again, "--freeze", "shared,encoder,decoder")
    assert done.returncode == 2 and "leaves nothing to train" in done.stderr
    assert all(p.read_bytes() == content for p, content in kept.items())
    done = call("--out_dir", str(out), "--max_steps", "3")  # the earlier run goes on, with its tokenizer
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr
    done = call(*again)
    assert done.returncode == 0 and "training a tokenizer" not in done.stdout, done.stderr  # it is there already
    assert len(Tokenizer.from_pretrained(out)) == ChatLM.from_pretrained(out).config.vocab_size <= 900


def test_a_new_run_has_no_best_of_an_earlier_one(base, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    i = base.index("--valid")
    assert call(*base[:i], *base[i + 2:], "--resume", "never", "--max_steps", "1", "--out_dir", str(out)).returncode == 0
    assert not (out / "best").exists()


def test_copies_of_checkpoints_and_odd_logs_are_not_in_the_way(base, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    newest = list_checkpoints(out / "checkpoint")[0]
    shutil.copy(newest, newest.with_name("step-copy.pt"))
    with open(out / "log.jsonl", "ab") as f:
        f.write(b'{"step": 5, "loss": 1.0}\n\xff\n[]\n')
    done = call("--out_dir", str(out), "--max_steps", "25")
    assert done.returncode == 0 and f"resuming from {newest}" in done.stdout, done.stderr
    (out / "log.jsonl").write_bytes(bytes(8) + (out / "log.jsonl").read_bytes()[8:])  # after a power cut
    done = call("--out_dir", str(out), "--max_steps", "26")
    assert done.returncode == 0 and [row["step"] for row in log(out) if "loss" in row] == list(range(2, 27)), done.stderr
    (out / "log.jsonl").unlink()
    done = call("--out_dir", str(out))
    assert done.returncode == 0 and "nothing is left to train" in done.stdout, done.stderr


def test_a_step_of_several_passes_is_told(base, tmp_path):
    pq.write_table(pq.read_table(base[1]).slice(0, 20), tmp_path / "x.parquet")
    for tokens, is_told in ((4000, True), (400, False)):
        done = call("--data", str(tmp_path / "x.parquet"), *base[2:], "--batch_tokens", str(tokens), "--max_steps", "1", "--out_dir", str(tmp_path / f"{tokens}"))
        assert done.returncode == 0 and ("--batch_tokens 4000 is more than the data has" in done.stderr) == is_told, done.stderr


def test_a_model_that_cannot_be_compiled_is_one_line(base, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch._dynamo.exc.BackendCompilerFailed(fail, RuntimeError("no working C++ compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    line = call(*base, "--compile", "--max_steps", "1", "--out_dir", str(tmp_path / "out")).stderr.splitlines()[-1]
    assert "error: --compile: " in line and "leave out --compile" in line


def test_answers_and_first_losses_are_not_compiled(base, tmp_path, monkeypatch):
    """They would take graphs of their own; what is compiled runs as plain code in them."""
    counted, stances = [], []

    def fake(function, **options):
        def compiled(*args, **kwargs):
            counted.append(torch.is_grad_enabled())
            stances.append(torch._dynamo.eval_frame._stance.stance)
            return function(*args, **kwargs)
        return compiled

    monkeypatch.setattr(torch, "compile", fake)
    done = call(*base, "--compile", "--max_steps", "1", "--out_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert {stance for stance, trains in zip(stances, counted) if trains} == {"default"}
    assert stances[0] == stances[-1] == "force_eager" and "default" in stances  # the first loss, and the answers


def test_weight_decay_and_validation_may_change(base, tmp_path):
    out = tmp_path / "out"
    args = [*base, "--optimizer", "adamw", "--lr", "1e-3", "--save_every", "2", "--out_dir", str(out)]
    assert call(*args, "--max_steps", "2").returncode == 0
    pq.write_table(pq.read_table(base[1]).slice(0, 20), tmp_path / "v.parquet")
    best = (out / "best" / "model.safetensors").read_bytes()
    done = call(*args, "--valid", str(tmp_path / "v.parquet"), "--max_steps", "3", "--weight_decay", "0.5")
    assert done.returncode == 0 and (out / "best" / "model.safetensors").read_bytes() != best  # the best on the new file
    saved = torch.load(list_checkpoints(out / "checkpoint")[0], weights_only=True)
    assert [group["weight_decay"] for group in saved["optimizers"][0]["param_groups"]] == [0.5, 0.0]


@pytest.mark.parametrize("flags", [["--lr", "inf"], ["--lr", "nan"], ["--weight_decay", "inf"], ["--seed", "-1"], ["--max_len", "1000000000000000000"], ["--init_from", ""], ["--valid", ""],
                                   ["--out_dir", ""], ["--data", ""], ["--device", "meta"], ["--lora_rank", "2", "--freeze", "encoder", "--init_from", "x"]], ids=str)
def test_nonsense_is_one_line(base, tmp_path, flags):
    refused("--data", base[1], "--out_dir", str(tmp_path / "new"), "--max_steps", "1", *flags)
    assert not (tmp_path / "new" / "log.jsonl").exists()


def test_adafactor_is_torchs_and_takes_over_its_state():
    torch.manual_seed(0)
    shapes = [(8, 5)] * 4 + [(3,)] * 3 + [(40, 8)] * 2 + [(1, 7), (7, 1)]
    ours, theirs = ([torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
                     for i, shape in enumerate(shapes)] for _ in range(2))
    a = train.Adafactor(ours, lr=0.02, weight_decay=0.1)
    b = torch.optim.Adafactor(theirs, lr=0.02, weight_decay=0.1)
    a.STACK_BYTES = {"cpu": 4 * 40 * 3}  # three matrices of (8, 5) at a time
    for step in range(20):
        if step == 10:  # as when a run moves from a GPU to a CPU, or back
            state, other = a.state_dict(), b.state_dict()
            a = torch.optim.Adafactor(ours, lr=1.0)
            b = train.Adafactor(theirs, lr=1.0)
            a.load_state_dict(state)
            b.load_state_dict(other)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape) * 10 ** torch.randn(1)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    ours_state, theirs_state = (o.state_dict()["state"] for o in (a, b))
    assert all({k: v.shape for k, v in ours_state[i].items()} == {k: v.shape for k, v in theirs_state[i].items()} for i in range(len(shapes)))


def test_adafactor_keeps_exact_means_of_large_matrices():
    p = torch.nn.Parameter(torch.randn(30000, 16))
    p.grad = torch.randn_like(p)
    optimizer = train.Adafactor([p])
    optimizer.step()
    for name, axis in (("row_var", 1), ("col_var", 0)):
        torch.testing.assert_close(optimizer.state[p][name].double(), p.grad.double().square().mean(axis, keepdim=True), rtol=1e-6, atol=0)


def test_compiled_training_has_few_graphs_and_no_breaks(base, tmp_path):
    """Batches of many shapes, and two blocks per stack, with and without recomputed activations: few graphs, and no break."""
    tokenizer = Tokenizer.from_pretrained(base[base.index("--tokenizer") + 1])
    rng = random.Random(0)
    texts = ["".join(rng.choices("今天气很好北京首都", k=rng.choice([3, 9, 20, 60]))) for _ in range(800)]
    data.write_pairs(tmp_path / "x.parquet", [{"prompt": rng.choice(texts), "response": t} for t in texts])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = ChatLM(ChatLMConfig.preset("demo", vocab_size=len(tokenizer), d_model=32, d_ff=64)).train()
    train.compile_blocks(model, "aot_eager")
    shapes = set()
    for i, batch in enumerate(itertools.islice(data.PairStream(tmp_path / "x.parquet", tokenizer, 1024, 64, round_to=8).one_epoch(), 40)):
        model.encoder.checkpoint_activations = model.decoder.checkpoint_activations = i % 2 == 1
        assert batch["input_ids"].size(1) % 8 == batch["labels"].size(1) % 8 == 0
        shapes.add((*batch["input_ids"].shape, batch["labels"].shape[1]))
        with torch.autocast("cpu", torch.bfloat16):
            model.loss_sum(**train.to_device(batch, torch.device("cpu"))).backward()
    counters = torch._dynamo.utils.counters
    assert len(shapes) > 10 and not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 8


REDUCE = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import train
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
ranks = train.Ranks(rank, 2, torch.device("cpu"))
layers = torch.nn.Sequential(*[torch.nn.Linear(200, 200, bias=False) for _ in range(6)])
torch.manual_seed(0)
for p in layers.parameters():
    p.data.normal_()
parameters = list(layers.parameters())
flat = torch.zeros(sum(p.numel() for p in parameters))
for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
    p.grad = part.view_as(p)
train.GradientReducer.SLICE_BYTES = 4 * 200 * 200
reducer = train.GradientReducer(parameters, flat, ranks)
sent = []  # slices that were sent before backward had ended
for step in range(3):
    flat.zero_()
    if rank == 0 or step == 1:  # the other rank has no micro-batch in steps 0 and 2
        for micro in range(2):
            if micro == 1:
                reducer.start()
            layers(torch.full((4, 200), 0.01 * (1 + step))).sum().backward()
        sent.append(len(reducer.handles))
    reducer.finish()
    expected = torch.zeros_like(flat)
    layers.zero_grad(set_to_none=True)
    for p, part in zip(parameters, expected.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)
    reducer.counting = False
    for _ in range(4 if step == 1 else 2):
        layers(torch.full((4, 200), 0.01 * (1 + step))).sum().backward()
    torch.testing.assert_close(flat, expected)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)
assert len(reducer.slices) == 6 and sent == [6] * len(sent), sent
print("ok", len(sent))
"""


def test_gradients_are_sent_while_backward_computes(tmp_path):
    """Every slice is on its way when backward returns, also while the other rank has no work."""
    (tmp_path / "reduce.py").write_text(REDUCE.format(root=str(ROOT)), "utf-8")
    done = run_ranks(tmp_path / "reduce.py", ranks=2)
    assert done.returncode == 0 and sorted(done.stdout.split()) == ["1", "3", "ok", "ok"], done.stderr[-2000:]


# --- advice that works, and nothing lost ---------------------------------------------------------------------------------------------

def test_the_command_that_resumes_is_named(base, tmp_path, monkeypatch):
    out = tmp_path / "out"
    asked = itertools.chain([False] * 6, itertools.repeat(True))
    monkeypatch.setattr(train.Stop, "signal", property(lambda self: next(asked) * signal.SIGINT, lambda self, value: None), raising=False)
    done = call(*base, "--out_dir", str(out), "--resume", "never", "--max_steps", "20")
    assert done.returncode == 130 and "and saved; the same command without --resume resumes the run" in done.stdout, done.stderr
    monkeypatch.undo()
    assert "resuming from" in call(*base, "--out_dir", str(out), "--max_steps", "20").stdout
    monkeypatch.setattr(train, "LAUNCHER", "a 1")
    never = [*base, "--out_dir", str(out), "--resume", "never"]
    assert "resuming from" not in call(*never, "--max_steps", "3").stdout  # the checkpoints were of another run
    again = call(*never, "--max_steps", "5").stdout  # as torchrun starts the same command again
    assert "resuming from" in again and "step 3" in again
    monkeypatch.setattr(train, "LAUNCHER", "b 2")
    assert "resuming from" not in call(*never, "--max_steps", "2").stdout


def test_an_older_checkpoint_says_what_it_deletes(base, tmp_path):
    out = tmp_path / "out"
    args = [*base, "--out_dir", str(out), "--save_every", "2", "--keep", "9"]
    call(*args, "--max_steps", "6")
    older = list_checkpoints(out / "checkpoint")[-1]
    assert "deleted 2 checkpoints of later steps" in call(*args, "--max_steps", "4", "--resume", str(older)).stdout


def test_an_adapter_ends_with_the_command_that_merges_it(base, straight, tmp_path):
    flags = [x for x in base if x not in ("--preset", "demo")]
    flags = [*flags[:flags.index("--tokenizer")], *flags[flags.index("--tokenizer") + 2:], "--init_from", str(straight), "--max_steps", "2"]
    out = tmp_path / "out"
    done = call(*flags, "--lora_rank", "2", "--out_dir", str(out))
    assert "is an adapter" in done.stdout and f"python dpo.py merge --model {straight} --adapter {out} --out {out}/merged" in done.stdout
    assert "sample.py" not in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "dpo.py merge" in line]
    assert run_script(*shlex.split(line)[1:]).returncode == 0 and ChatLM.from_pretrained(out / "merged")
    # one kind of model in a folder: the older one goes
    assert call(*flags, "--out_dir", str(out), "--resume", "never").returncode == 0
    assert not list(out.glob("adapter_*")) and (out / "config.json").exists()
    assert call(*flags, "--lora_rank", "2", "--out_dir", str(out), "--resume", "never").returncode == 0
    assert {p.name for p in out.iterdir() if p.suffix == ".safetensors"} == {"adapter_model.safetensors"} and not (out / "config.json").exists()
    # another starting model of the same shape is told
    other = tmp_path / "other"
    shutil.copytree(straight, other, ignore=shutil.ignore_patterns("checkpoint", "best", "tensorboard"))
    model = ChatLM.from_pretrained(other)
    with torch.no_grad():
        model.shared.weight[5] += 1
    model.save_pretrained(other)
    for base_model, told in ((straight, False), (other, True)):
        done = run_script("dpo.py", "merge", "--model", base_model, "--adapter", out, "--out", tmp_path / "merged")
        assert done.returncode == 0 and ("was trained on other weights" in done.stderr) == told
    # a model in two dtypes is hashed as training loads it
    weights = {name: x if "wo" in name else x.half() for name, x in load_file(straight / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert call(*flags[:-3], str(other), *flags[-2:], "--lora_rank", "2", "--out_dir", str(tmp_path / "mixed")).returncode == 0
    done = run_script("dpo.py", "merge", "--model", other, "--adapter", tmp_path / "mixed", "--out", tmp_path / "merged")
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_broken_weights_never_replace_good_checkpoints(base, tmp_path):
    out = tmp_path / "out"
    args = [*base, "--out_dir", str(out), "--save_every", "1", "--keep", "2", "--optimizer", "adamw", "--warmup_steps", "0", "--grad_clip", "1e30"]
    assert call(*args, "--lr", "1e-3", "--max_steps", "3").returncode == 0
    done = call(*args, "--lr", "1e30", "--max_steps", "40")
    assert done.returncode == 2 and "not saved, because the loss or the weights are not finite" in done.stdout
    newest, good = list_checkpoints(out / "checkpoint")
    assert (train.step_of(newest), train.step_of(good)) == (4, 3)  # step 4 made the weights large, but finite
    assert all(w.isfinite().all() for w in load_file(out / "model.safetensors").values())
    advice = done.stderr.splitlines()[-1].partition("resume from an earlier checkpoint with ")[2].split()
    assert advice == ["--resume", str(good)]
    assert call(*args, *advice, "--lr", "1e-3", "--max_steps", "5").returncode == 0


@pytest.mark.quick
def test_a_second_kind_of_signal_does_not_interrupt_the_end():
    stop = train.Stop()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # what torchrun sends
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        stop.restore()


def test_a_stop_in_a_bad_step_saves_and_keeps_older_checkpoints(base, tmp_path, monkeypatch):
    out, loss_sum, calls = tmp_path / "out", ChatLM.loss_sum, itertools.count()
    assert call(*base, "--out_dir", str(out), "--max_steps", "6", "--save_every", "3", "--keep", "2").returncode == 0
    asked = itertools.chain([False] * 3, itertools.repeat(True))
    monkeypatch.setattr(train.Stop, "signal", property(lambda self: next(asked) * signal.SIGINT, lambda self, value: None), raising=False)
    monkeypatch.setattr(ChatLM, "loss_sum", lambda self, **batch: loss_sum(self, **batch) * (math.nan if next(calls) > 2 else 1))
    done = call(*base, "--out_dir", str(out), "--max_steps", "20", "--save_every", "100", "--keep", "2", "--eval_every", "100")
    assert done.returncode == 130 and "and saved; the same command resumes the run" in done.stdout, done.stdout
    steps = [train.step_of(path) for path in list_checkpoints(out / "checkpoint")]
    assert len(steps) == 3 and steps[1:] == [6, 3]


@pytest.mark.quick
def test_the_script_of_a_run_is_named(base, straight):
    done = run_script("dpo.py", "--out_dir", straight, "--init_from", straight / "best", "--data", base[1])
    assert done.returncode == 2 and f"is one of train.py: resume it with  python train.py --out_dir {straight}" in done.stderr


@pytest.mark.quick
def test_a_name_with_a_space_is_quoted_in_the_command_that_is_printed(base, straight, tmp_path):
    out = tmp_path / "a b"
    shutil.copytree(straight, out)
    done = run_script("dpo.py", "--out_dir", out, "--init_from", straight / "best", "--data", base[1])
    assert done.returncode == 2 and done.stderr.endswith(f"python train.py --out_dir '{out}'\n")


def test_other_validation_files_on_a_rank_are_refused(base, tmp_path):
    other = tmp_path / "valid.parquet"
    pq.write_table(pq.read_table(base[3])[:30], other)
    args = [[*base[:3], valid, *base[4:], "--out_dir", str(tmp_path / "out"), "--max_steps", "2"] for valid in (base[3], str(other))]
    ends = [script.completed() for script in start_ranks("train.py", *args)]
    assert [end.returncode for end in ends] == [2, 2]
    assert all("--valid: this process has other files than the first" in end.stderr for end in ends)


def test_a_lost_process_is_one_line(base, tmp_path):
    """The file of --data is missing for the second process only."""
    args = [[*base, "--out_dir", str(tmp_path / "out"), "--max_steps", "2"], [base[0], str(tmp_path / "none.parquet"), *base[2:], "--out_dir", str(tmp_path / "out"), "--max_steps", "2"]]
    ends = [script.completed() for script in start_ranks("train.py", *args)]
    assert "no such file" in ends[1].stderr
    assert ends[0].returncode == 2 and ends[0].stderr.splitlines()[-1] == "train.py: error: another process of this run has ended; its message says why"
    assert "Traceback" not in ends[0].stderr


@pytest.mark.quick
def test_files_of_others_in_out_dir_stay(base, tmp_path):
    out = tmp_path / "out"
    (out / "best").mkdir(parents=True)
    (out / "best" / "notes.txt").write_text("precious")
    (out / "best" / "config.json").write_text("{}")
    flags = [*base[:2], *base[4:], "--out_dir", str(out), "--max_steps", "1"]
    assert call(*flags).returncode == 0
    assert [p.name for p in (out / "best").iterdir()] == ["notes.txt"]
    for name in ("best", "checkpoint"):
        other = tmp_path / name
        other.mkdir()
        (other / name).write_text("a file")
        assert f"{other / name} is a file" in refused(*flags[:-4], "--out_dir", str(other), "--max_steps", "1")
    other = tmp_path / "other"
    other.mkdir()
    for content in ('{"event": "precious"}\n', "precious", "\n"):
        (other / "log.jsonl").write_text(content)
        for resume in ("auto", "never"):
            assert "is not the log of a run" in refused(*flags[:-4], "--out_dir", str(other), "--max_steps", "1", "--resume", resume)
        assert (other / "log.jsonl").read_text() == content
    for content in ("", '{"st'):  # empty, or half a line of a run that was killed
        (other / "log.jsonl").write_text(content)
        assert call(*flags[:-4], "--out_dir", str(other), "--max_steps", "1", "--resume", "never").returncode == 0


def test_the_best_model_is_kept_in_a_new_out_dir(base, straight, tmp_path):
    checkpoint = list_checkpoints(straight / "checkpoint")[0]
    out = tmp_path / "out"
    assert call(*base, "--out_dir", str(out), "--resume", str(checkpoint), "--max_steps", "26", "--lr", "1").returncode == 0
    assert (out / "best" / "model.safetensors").exists()


@pytest.mark.quick
def test_a_run_does_not_write_through_links_to_its_starting_model(base, straight, tmp_path):
    shutil.copytree(straight / "best", tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    for folder in (tmp_path / "out", tmp_path / "other" / "best"):
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).symlink_to(tmp_path / "model" / name)
    i = base.index("--preset")
    for out in ("out", "other"):
        line = refused(*base[:i], *base[i + 2:], "--init_from", str(tmp_path / "model"), "--max_steps", "1", "--resume", "never", "--out_dir", str(tmp_path / out))
        assert "would be overwritten" in line
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_an_error_that_all_processes_have_is_printed_once(base, tmp_path):
    done = run_ranks("train.py", *base, "--schedule", "foo", ranks=3)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "invalid choice: 'foo'" in done.stderr, done.stderr
    done = start_torchrun(*base, "--data", "nope.parquet", "--out_dir", str(tmp_path / "out")).completed()
    assert done.returncode and re.findall("train.py: error: .*", done.stderr) == ["train.py: error: no such file: nope.parquet"], done.stderr


@pytest.mark.quick
def test_a_checkpoint_without_its_tokenizer_says_what_is_missing(base, tmp_path):
    i = base.index("--tokenizer")
    args = [*base[:i], *base[i + 2:], "--max_steps", "1", "--vocab_size", "1400"]
    assert call(*args, "--out_dir", str(tmp_path / "run")).returncode == 0
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoint")
    (tmp_path / "lone").mkdir()
    shutil.copy(checkpoint, tmp_path / "lone")
    assert "is missing: name its folder with --tokenizer" in refused("--resume", str(tmp_path / "lone"), "--out_dir", str(tmp_path / "out"))


@pytest.mark.quick
def test_weight_decay_without_matrices_and_full_dropout_are_reported(base, tmp_path):
    done = call(*base, "--freeze", "encoder,decoder", "--weight_decay", "0.5", "--max_steps", "1", "--out_dir", str(tmp_path / "out"))
    assert done.returncode == 0 and "--weight_decay has no effect with --freeze encoder,decoder" in done.stderr
    assert "--lora_dropout: 1 is out of range" in refused(*base, "--lora_dropout", "1")
