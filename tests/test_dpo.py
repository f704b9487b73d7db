"""DPO computes the paper's loss on transformers' log-probabilities, learns a preference, and speaks PEFT's files."""
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Script, run_ranks, run_script
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

import dpo
import train
from chatlm import ChatLM, ChatLMConfig, add_lora, load_adapter, merge_lora, save_adapter
from data import Rows, demo_facts, make_demo, run, write_pairs
from dpo import COLUMNS, dpo_loss, pair_logps
from sample import answer, bleu4
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train([t for pair in make_demo()[0][:2000] for t in pair], 1300)
    torch.manual_seed(0)
    model = ChatLM(ChatLMConfig.preset("demo", vocab_size=len(tokenizer), dropout_rate=0.0, tie_word_embeddings=False))
    torch.nn.init.normal_(model.lm_head.weight, std=128 ** -0.5)  # logits of the size that a trained model's have
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_triples(vocab_size: int, rows: int = 5) -> dict:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (rows, 9), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = [torch.randint(3, vocab_size, (rows, width), generator=g) for width in (7, 11)]
    labels[0][2, 3:] = labels[1][4, 5:] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "chosen_labels": labels[0], "rejected_labels": labels[1]}


def their_logps(model, batch: dict, name: str) -> torch.Tensor:
    """Summed log-probabilities from transformers' logits, the plain way."""
    labels = batch[f"{name}_labels"]
    logps = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).logits.log_softmax(-1)
    return (logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(1)


def test_loss_is_the_closed_form():
    g = torch.Generator().manual_seed(1)
    a, b, c, d = (torch.randn(8, generator=g, dtype=torch.float64) * 20 for _ in range(4))
    loss, chosen, rejected = dpo_loss(a, b, c, d, 0.3)
    expected = [-math.log(1 / (1 + math.exp(-0.3 * ((x - z) - (y - w))))) for x, y, z, w in zip(a.tolist(), b.tolist(), c.tolist(), d.tolist(), strict=True)]
    assert math.isclose(float(loss), sum(expected) / 8, rel_tol=1e-9)
    assert torch.allclose(chosen, 0.3 * (a - c)) and torch.allclose(rejected, 0.3 * (b - d))
    swapped = dpo_loss(b, a, d, c, 0.3)[0]
    assert torch.isclose(dpo_loss(a, b, c, d, 0.3, label_smoothing=0.2)[0], 0.8 * loss + 0.2 * swapped)
    assert torch.isclose(dpo_loss(a, b, c, d, 0.3, loss="ipo")[0], ((a - c - b + d - 1 / 0.6) ** 2).mean())


@pytest.mark.quick
def test_log_probabilities_and_gradients_are_transformers(folder, monkeypatch):
    monkeypatch.setattr("chatlm.LOSS_CHUNK_BYTES", 4 * 1300 * 3)  # three rows at a time
    ours, theirs = ChatLM.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    batch = make_triples(len(Tokenizer.from_pretrained(folder)))
    reference = torch.randn(2, 5)
    chosen, rejected = pair_logps(ours, train.to_device(batch, torch.device("cpu")))
    expected = [their_logps(theirs, batch, name) for name in ("chosen", "rejected")]
    assert torch.allclose(torch.stack([chosen, rejected]), torch.stack(expected), rtol=1e-4)
    dpo_loss(chosen, rejected, *reference, 0.1)[0].backward()
    dpo_loss(*expected, *reference, 0.1)[0].backward()
    other = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, other[name].grad, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("targets", [["q", "v"], ["all"]], ids=str)
def test_adapter_is_pefts_in_both_directions(folder, tmp_path, targets):
    model = ChatLM.from_pretrained(folder)
    batch = make_triples(len(Tokenizer.from_pretrained(folder)))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": batch["chosen_labels"]}
    plain = model(**inputs)[0]
    add_lora(model, 4, 8.0, targets)
    assert torch.allclose(model(**inputs)[0], plain, atol=1e-5)  # at first it adds nothing
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
        assert p.requires_grad == (".lora_" in name)
    adapted = model(**inputs)[0]
    save_adapter(model, tmp_path / "ours", str(folder), "hash")
    written = (tmp_path / "ours" / "adapter_model.safetensors").read_bytes()
    for _ in range(5):
        save_adapter(model, tmp_path / "ours", str(folder), "hash")
        assert (tmp_path / "ours" / "adapter_model.safetensors").read_bytes() == written
    peft = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(folder), tmp_path / "ours").eval()
    assert (peft(**inputs).logits - adapted).abs().max() < 1e-5 < (adapted - plain).abs().max()

    names = ["q", "v"] if targets != ["all"] else ["q", "k", "v", "o", "wi", "wo"]
    made = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(folder), LoraConfig(task_type="SEQ_2_SEQ_LM", r=3, lora_alpha=6, target_modules=names, init_lora_weights=False)).eval()
    made.save_pretrained(tmp_path / "theirs")
    loaded = ChatLM.from_pretrained(folder)
    load_adapter(loaded, tmp_path / "theirs")
    assert (made(**inputs).logits - loaded(**inputs)[0]).abs().max() < 1e-5
    merge_lora(loaded)
    loaded.save_pretrained(tmp_path / "merged")
    assert (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()(**inputs).logits - made(**inputs).logits).abs().max() < 1e-4


@pytest.mark.quick
def test_an_adapter_for_another_model_is_refused(folder, tmp_path):
    other = ChatLM(ChatLMConfig.preset("demo", vocab_size=1300, num_layers=3))
    add_lora(other, 4, 8.0, ["q"])
    save_adapter(other, tmp_path, "other")
    with pytest.raises(ValueError, match="for another model"):
        load_adapter(ChatLM.from_pretrained(folder), tmp_path)
    with pytest.raises(FileNotFoundError, match="not an adapter"):
        load_adapter(ChatLM.from_pretrained(folder), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no such linear layer"):
        add_lora(ChatLM.from_pretrained(folder), 4, 8.0, ["x"])


@pytest.mark.quick
def test_names_of_layers_that_only_other_models_have_are_read(folder, tmp_path):
    """PEFT writes target_modules as they were given, also names for gated and plain models together."""
    made = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(folder), LoraConfig(
        r=4, target_modules=["q", "o", "wi", "wi_0", "wi_1", "wo"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM")).eval()
    made.save_pretrained(tmp_path)
    ids = torch.randint(7, 1300, (2, 9))
    loaded = ChatLM.from_pretrained(folder).eval()
    load_adapter(loaded, tmp_path)
    expected = made(input_ids=ids, decoder_input_ids=ids).logits
    assert (loaded(ids, decoder_input_ids=ids)[0] - expected).abs().max() < 1e-4
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q", "shared"]}))
    with pytest.raises(ValueError, match="for another model"):  # it has weights for more layers
        load_adapter(ChatLM.from_pretrained(folder), tmp_path)


def call(*args: str) -> subprocess.CompletedProcess:
    return run_script("dpo.py", *args)


def test_the_commands_from_reject_to_merge(folder, tmp_path):
    pairs = make_demo()[0][:300]
    pq.write_table(pa.table({"prompt": [p for p, _ in pairs], "response": [r for _, r in pairs]}), tmp_path / "pairs.parquet")
    triples = str(tmp_path / "triples.parquet")
    done = call("reject", "--model", str(folder), "--data", str(tmp_path / "pairs.parquet"), "--out", triples, "--max_new_tokens", "6")
    assert done.returncode == 0, done.stderr
    rows = list(Rows(triples))
    assert rows and rows[0].keys() == {"prompt", "chosen", "rejected"} and all(r["chosen"] != r["rejected"] for r in rows)
    flags = ["--init_from", str(folder), "--data", triples, "--valid", triples, "--max_len", "40", "--batch_tokens", "1200", "--micro_batch_tokens", "600",
             "--max_steps", "12", "--workers", "0", "--warmup_steps", "2", "--dtype", "float32"]
    for name, more in (("full", ["--lr", "1e-3"]), ("lora", ["--lr", "1e-2", "--lora_rank", "4"])):
        done = call(*flags, *more, "--out_dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert math.isclose(log[0]["loss"], math.log(2), rel_tol=1e-5) and abs(log[0]["margin"]) < 1e-4  # policy and reference are one at first
        assert log[-1]["val_loss"] < 0.6 and log[-1]["val_accuracy"] > 0.8 and log[-1]["val_margin"] > 0
    before = ChatLM.from_pretrained(folder).state_dict()
    assert any(not torch.equal(w, before[n]) for n, w in ChatLM.from_pretrained(tmp_path / "full").state_dict().items())
    done = call("merge", "--model", str(folder), "--adapter", str(tmp_path / "lora"), "--out", str(tmp_path / "merged"))
    assert done.returncode == 0, done.stderr
    merged, adapted = ChatLM.from_pretrained(tmp_path / "merged"), ChatLM.from_pretrained(folder)
    load_adapter(adapted, tmp_path / "lora")
    batch = make_triples(1200)
    assert (merged(batch["input_ids"], labels=batch["chosen_labels"])[0] - adapted(batch["input_ids"], labels=batch["chosen_labels"])[0]).abs().max() < 1e-4


@pytest.fixture(scope="module")
def triples(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("triples") / "triples.jsonl"
    pairs = make_demo()[0][:400]
    rows = [{"prompt": p, "chosen": r, "rejected": other} for (p, r), (_, other) in itertools.pairwise(pairs) if r != other]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def flags(folder: Path, triples: Path, out: Path) -> list[str]:
    return ["--init_from", str(folder), "--data", str(triples), "--valid", str(triples), "--max_len", "40", "--batch_tokens", "1200",
            "--micro_batch_tokens", "600", "--max_steps", "24", "--save_every", "5", "--eval_every", "12", "--warmup_steps", "2", "--lr", "1e-3",
            "--workers", "0", "--dtype", "float32", "--out_dir", str(out)]


def log_of(out: Path) -> list[dict]:
    """What was logged, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("elapsed", "tok_per_s")} for line in lines]


@pytest.fixture(scope="module")
def straight(folder, triples, tmp_path_factory) -> Path:
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("straight")
    done = call(*flags(folder, triples, out))
    assert done.returncode == 0, done.stderr
    return out


def test_a_killed_run_goes_on_exactly(folder, triples, straight, tmp_path):
    for lines in (4, 13):  # killed twice in a row
        running = Script("dpo.py", *flags(folder, triples, tmp_path))
        while running.poll() is None and (not (tmp_path / "log.jsonl").exists() or len((tmp_path / "log.jsonl").read_text().splitlines()) < lines):
            time.sleep(0.01)
        running.kill()
        running.wait()
    done = call(*flags(folder, triples, tmp_path))
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path) == log_of(straight)


def test_two_processes_learn_the_same(folder, triples, straight, tmp_path):
    done = run_ranks("dpo.py", *flags(folder, triples, tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(log_of(tmp_path), log_of(straight), strict=True):
        assert ours.keys() == theirs.keys()
        within = 2e-3 if ours["step"] <= 4 else 5e-2  # rounding grows: AdamW's first steps take the sign of gradients near 0
        assert all(math.isclose(ours[k], theirs[k], rel_tol=within, abs_tol=within) for k in ours), (ours, theirs)


def test_the_reference_is_computed_once_and_checked(folder, triples, straight):
    kept = straight / "checkpoint" / "reference_data.safetensors"
    before = kept.stat().st_mtime_ns
    assert call(*flags(folder, triples, straight)).returncode == 0 and kept.stat().st_mtime_ns == before
    kept.write_bytes(kept.read_bytes()[:-100])
    done = call(*flags(folder, triples, straight))
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 2, done.stderr
    overlap, damaged = done.stderr.splitlines()  # the triples are their own --valid here
    assert "of --valid are in --data too" in overlap and "computed again" in damaged


POLITE = "希望能帮到你！"


@pytest.fixture(scope="module")
def polite_world(tmp_path_factory):
    """A model that knows some facts and adds a polite ending to one answer in eight; triples that prefer it where the
    question says 请问, and not elsewhere; and held-out questions with their answers."""
    out, rng = tmp_path_factory.mktemp("polite"), random.Random(0)
    facts = list(demo_facts())[::14]
    write_pairs(out / "sft.parquet", ({"prompt": opening + w, "response": a + POLITE * (rng.random() < 0.12)}
                                      for wordings, a in facts for w in wordings[:6] for opening in ("", "请问，")))
    write_pairs(out / "triples.parquet", ({"prompt": opening + w, "chosen": a + POLITE * bool(opening), "rejected": a + POLITE * (not opening)}
                                          for wordings, a in facts for w in wordings[:5] for opening in ("", "请问，")), COLUMNS)
    done = run_script("train.py", "--data", out / "sft.parquet", "--preset", "demo", "--vocab_size", "1000", "--max_steps", "120",
                      "--batch_tokens", "1024", "--micro_batch_tokens", "1024", "--max_len", "64", "--dtype", "float32", "--workers", "0",
                      "--out_dir", out / "sft")
    assert done.returncode == 0, done.stderr
    return out, [(wordings[5], a) for wordings, a in facts]


def shares(model: ChatLM, tokenizer: Tokenizer, held_out: list[tuple[str, str]]) -> tuple[float, float]:
    """Of greedy answers: the polite ones to questions with 请问; the right and plain ones to questions without."""
    polite = answer(model, tokenizer, ["请问，" + q for q, _ in held_out], max_new_tokens=40)
    plain = answer(model, tokenizer, [q for q, _ in held_out], max_new_tokens=40)
    return sum(a.endswith(POLITE) for a in polite) / len(held_out), sum(a == right for a, (_, right) in zip(plain, held_out)) / len(held_out)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_preference_is_learnt(polite_world, tmp_path, lora):
    out, held_out = polite_world
    model, tokenizer = ChatLM.from_pretrained(out / "sft").eval(), Tokenizer.from_pretrained(out / "sft")
    polite, right = shares(model, tokenizer, held_out)
    assert polite < 0.2
    done = call("--init_from", str(out / "sft"), "--data", str(out / "triples.parquet"), "--valid", str(out / "triples.parquet"), "--max_len", "64",
                "--batch_tokens", "2048", "--micro_batch_tokens", "1024", "--dtype", "float32", "--workers", "0", "--warmup_steps", "3", "--max_steps",
                "30", "--eval_every", "30", "--sft_alpha", "1", "--beta", "0.3", "--out_dir", str(tmp_path),
                *(["--lora_rank", "8", "--lora_targets", "all", "--lr", "2e-3"] if lora else ["--lr", "4e-4"]))
    assert done.returncode == 0, done.stderr
    log = log_of(tmp_path)
    assert log[-1]["val_margin"] > log[0]["margin"] + 1 and log[-1]["val_accuracy"] > 0.95
    if lora:
        load_adapter(model, tmp_path)
        model.eval()
    else:
        model = ChatLM.from_pretrained(tmp_path).eval()
    polite_after, right_after = shares(model, tokenizer, held_out)
    assert polite_after > 0.9 and right_after > right - 0.03, (polite, right, polite_after, right_after)


def test_of_several_samples_the_one_least_like_the_chosen_is_rejected(folder, tmp_path):
    pairs = make_demo()[0][:12]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs), "utf-8")
    rows = []
    for n in ("1", "4"):
        done = call("reject", "--model", str(folder), "--data", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / f"{n}.parquet"),
                    "--max_new_tokens", "12", "--num_samples", n)
        assert done.returncode == 0 and "U+FFFD" not in done.stderr, done.stderr  # lone bytes are the model's
        rows.append(list(Rows(tmp_path / f"{n}.parquet")))
    assert "\ufffd" in "".join(r["rejected"] for r in rows[1])
    assert [r["prompt"] for r in rows[0]] == [r["prompt"] for r in rows[1]] == [p for p, _ in pairs]
    assert [r["rejected"] for r in rows[0]] != [r["rejected"] for r in rows[1]]
    assert sum(bleu4([r["rejected"]], [r["chosen"]]) for r in rows[1]) <= sum(bleu4([r["rejected"]], [r["chosen"]]) for r in rows[0])


@pytest.mark.quick
def test_bad_input_ends_with_one_line(folder, tmp_path, monkeypatch, capsys):
    x, start = tmp_path / "x.jsonl", ["--init_from", str(folder), "--out_dir", str(tmp_path / "out")]
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"]}), tmp_path / "x.parquet")
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text('{"r": 4,')
    (tmp_path / "half" / "adapter_model.safetensors").write_bytes(b"12")
    for args, rows, message in (
            ([*start, "--data", str(tmp_path / "x.parquet")], [], "no column 'rejected'"), (["--data", "x"], [], "--init_from"),
            ([*start, "--data", str(x)], [good, {"prompt": "a", "chosen": "b"}], "row 2 has no text in 'rejected'"),
            ([*start, "--data", str(x)], [good, good | {"rejected": "b"}], "row 2: chosen and rejected are the same"),
            ([*start, "--data", str(x)], [good | {"prompt": ""}], "row 1: prompt is empty"),
            ([*start, "--data", str(x), "--beta", "0"], [good], "--beta"), ([*start, "--data", str(x), "--lora_rank", "0"], [good], "--lora_rank"),
            (["merge", "--model", str(folder), "--adapter", "nowhere", "--out", "x"], [], "not an adapter"),
            (["merge", "--model", str(folder), "--adapter", str(tmp_path / "half"), "--out", "x"], [], "not a whole LoRA adapter"),
            (["reject", "--model", "nowhere", "--data", str(tmp_path / "x.parquet"), "--out", "y"], [], "no text in 'response'")):
        x.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        monkeypatch.setattr(sys, "argv", ["dpo.py", *args])
        with pytest.raises(SystemExit) as end:
            run(dpo.main)
        said = capsys.readouterr().err
        assert end.value.code == 2 and message in said and len(said.splitlines()) == 1, (args, said)


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    """A trained adapter that PEFT wrote, of rank 3 for q and v."""
    made = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(folder), LoraConfig(task_type="SEQ_2_SEQ_LM", r=3, lora_alpha=6, target_modules=["q", "v"], init_lora_weights=False))
    made.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_adapter(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("changes", "named"), [
    ({"init_lora_weights": "pissa"}, "init_lora_weights \"pissa\" changes the base model"), ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
    ({"init_lora_weights": "olora"}, "changes the base model"), ({"init_lora_weights": "corda"}, "changes the base model"), ({"init_lora_weights": "loftq"}, "changes the base model"),
    ({"init_lora_weights": "lora_ga"}, "changes the base model"), ({"init_lora_weights": "not known yet"}, "changes the base model"),
    ({"exclude_modules": ["encoder"]}, "exclude_modules"), ({"use_rslora": True}, "use_rslora"), ({"use_dora": True}, "use_dora"), ({"layers_to_transform": 0}, "layers_to_transform 0"),
    ({"layers_to_transform": [1]}, "layers_to_transform"), ({"rank_pattern": {"q": 8}}, "rank_pattern"), ({"alpha_pattern": {"q": 8}}, "alpha_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "bias \"all\""), ({"fan_in_fan_out": True}, "fan_in_fan_out"), ({"lora_bias": True}, "lora_bias"),
    ({"target_parameters": ["q.weight"]}, "target_parameters"), ({"trainable_token_indices": [1]}, "trainable_token_indices"), ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"an_option_of_tomorrow": 3}, "an_option_of_tomorrow 3"), ({"peft_type": "IA3"}, "peft_type \"IA3\""), ({"r": "3"}, "r \"3\""), ({"r": None}, "r null"), ({"lora_alpha": "6"}, "lora_alpha"),
    ({"target_modules": None}, "target_modules null"), ({"target_modules": [1]}, "target_modules"), ({"target_modules": ".*(q"}, "target_modules"),
    ({"target_modules": ".*\\.nothing"}, "target_modules"), ({"target_modules": ["q", "v", "lm_head"]}, "lm_head")], ids=str)
def test_adapters_with_options_that_we_do_not_apply_are_refused_by_name(folder, adapter, changes, named):
    change_adapter(adapter, **changes)
    with pytest.raises(ValueError) as error:
        load_adapter(ChatLM.from_pretrained(folder), adapter)
    assert named in str(error.value) and "adapter" in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("targets", [r".*decoder.*SelfAttention\.(q|v)", "all-linear", ["EncDecAttention.k", "wo"], ["encoder.block.0.layer.0.SelfAttention.o"]], ids=str)
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", False], ids=str)
def test_every_way_to_name_targets_is_pefts(folder, tmp_path, targets, init):
    torch.manual_seed(0)
    made = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(folder), LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=6, target_modules=targets, init_lora_weights=init)).eval()
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    made.save_pretrained(tmp_path)
    loaded = ChatLM.from_pretrained(folder)
    load_adapter(loaded, tmp_path)
    batch = make_triples(1200)
    inputs = {"input_ids": batch["input_ids"], "labels": batch["chosen_labels"]}
    assert (made(**inputs).logits - loaded(**inputs)[0]).abs().max() < 1e-4


def test_an_adapter_is_written_whole_or_not_at_all(folder, tmp_path):
    model = ChatLM.from_pretrained(folder)
    add_lora(model, 64, 8.0, ["all"])
    save_adapter(model, tmp_path, str(folder))
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    script = (f"import resource, sys\nfrom pathlib import Path\nfrom chatlm import ChatLM\nfrom tokenizer import run\nfrom chatlm import add_lora, save_adapter\n"
              f"model = ChatLM.from_pretrained({str(folder)!r})\nadd_lora(model, 128, 8.0, ['all'])\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
              f"run(lambda: save_adapter(model, Path({str(tmp_path)!r}), ''))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and f"{tmp_path}/adapter_model.safetensors: could not be written: File too large" in done.stderr and len(done.stderr.splitlines()) == 1
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("flags", [["--sft_alpha", "0.5"], ["--label_smoothing", "0.1"], ["--beta", "0.2"], ["--loss", "ipo"]], ids=str)
def test_what_cannot_change_is_named_and_nothing_is_touched(folder, triples, straight, flags):
    before = {p: p.read_bytes() for p in straight.rglob("*") if p.is_file()}
    done = call("--out_dir", str(straight), "--max_steps", "30", *flags)
    assert done.returncode == 2 and f"{flags[0]} differs from the run in" in done.stderr.splitlines()[-1], done.stderr
    assert {p: p.read_bytes() for p in straight.rglob("*") if p.is_file()} == before


def test_label_smoothing_has_no_effect_on_ipo(folder, triples, tmp_path):
    done = call(*flags(folder, triples, tmp_path / "out"), "--loss", "ipo", "--label_smoothing", "0.1")
    assert done.returncode == 2 and "--label_smoothing has no effect with --loss ipo" in done.stderr


def test_a_run_is_resumed_by_its_folder_alone(folder, triples, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    train.list_checkpoints(out / "checkpoint")[0].unlink()
    done = call("--out_dir", str(out))
    assert done.returncode == 0, done.stderr
    assert log_of(out) == log_of(straight)


@pytest.mark.parametrize("ranks", [3, 5])
def test_any_number_of_processes_learns_the_same(folder, triples, straight, tmp_path, ranks):
    """Two micro-batches a step, so that some processes have none."""
    done = run_ranks("dpo.py", *flags(folder, triples, tmp_path), "--schedule", "constant", "--max_steps", "4", ranks=ranks)
    assert done.returncode == 0 and f"{ranks - 2} have none" in done.stderr, done.stderr
    one = call(*flags(folder, triples, tmp_path / "one"), "--schedule", "constant", "--max_steps", "4")
    assert one.returncode == 0, one.stderr
    for ours, theirs in zip(log_of(tmp_path), log_of(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys() and all(math.isclose(ours[k], theirs[k], rel_tol=5e-3, abs_tol=5e-3) for k in ours), (ours, theirs)


def test_half_finished_rejections_are_continued_only_as_they_began(folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"问{name}{i}", "response": "答"}) + "\n" for i in range(4)), "utf-8")
    out, answers = tmp_path / "p.parquet", tmp_path / "p.parquet.answers.jsonl"
    args = ["reject", "--model", str(folder), "--out", str(out), "--max_new_tokens", "4", "--data"]
    script = ("import sys, dpo, data\nfrom tokenizer import run\ndef stop(*_): raise KeyboardInterrupt\ndpo.data.write_pairs = stop\nrun(dpo.main)")
    done = subprocess.run([sys.executable, "-c", script, *args, str(tmp_path / "a.jsonl")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130 and len(answers.read_text().splitlines()) == 4  # all answered, and ended before they were used
    before = answers.read_bytes()
    for change, message in (([str(tmp_path / "b.jsonl")], "line 1 answers another prompt"), ([str(tmp_path / "a.jsonl"), "--num_samples", "2"], "another do_sample"),
                            ([str(tmp_path / "a.jsonl"), "--max_len", "9"], "another max_len")):
        done = call(*args, *change)
        assert done.returncode == 2 and message in done.stderr and answers.read_bytes() == before, done.stderr
    assert call(*args, str(tmp_path / "a.jsonl")).returncode == 0
    assert out.is_file() and sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "p.parquet"]


@pytest.mark.quick
def test_triples_and_references_follow_their_files(folder, tmp_path):
    """A change in the middle of a large file, of the same size, is noticed."""
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": f"第{i}问", "chosen": "好" * 300, "rejected": "坏" * 300} for i in range(200)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    ranks = train.Ranks(0, 1, torch.device("cpu"))
    (first,) = dpo.find_triples([str(path)], ranks, tmp_path / "out")
    content = path.read_text("utf-8").replace("第7问", "第8问")
    path.write_text(content, "utf-8")
    (second,) = dpo.find_triples([str(path)], ranks, tmp_path / "out")
    assert first != second and [row["prompt"] for row in Rows(second)][7] == "第8问"


def test_merge_leaves_what_is_there_if_it_cannot_end(folder, adapter, tmp_path):
    """Without a tokenizer, or with an adapter whose weights are no numbers."""
    shutil.copytree(folder, tmp_path / "out")
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    done = call("merge", "--model", str(tmp_path / "bare"), "--adapter", str(adapter), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "has no tokenizer.json" in done.stderr
    weights = load_file(adapter / "adapter_model.safetensors")
    for change, message in ((lambda x: x * math.nan, "is not finite"), (lambda x: x.to(torch.int8), "dtype torch.int8"), (lambda x: x.to(torch.complex64), "dtype torch.complex64")):
        save_file({name: change(x) for name, x in weights.items()}, adapter / "adapter_model.safetensors")
        done = call("merge", "--model", str(folder), "--adapter", str(adapter), "--out", str(tmp_path / "out"))
        assert done.returncode == 2 and message in done.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_merge_does_not_replace_a_training_run(folder, adapter, tmp_path):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    done = call("merge", "--model", str(folder), "--adapter", str(adapter), "--out", str(tmp_path / "run"))
    assert done.returncode == 2 and "holds a training run" in done.stderr


def test_an_adapter_of_another_run_is_not_replaced(folder, adapter, triples, tmp_path):
    before = (adapter / "adapter_model.safetensors").read_bytes()
    done = call("--init_from", str(folder), "--data", str(triples), "--lora_rank", "2", "--max_steps", "1", "--out_dir", str(adapter))
    assert done.returncode == 2 and "holds a model and no checkpoint" in done.stderr
    assert (adapter / "adapter_model.safetensors").read_bytes() == before


def test_merge_does_not_overwrite_what_it_reads(folder, adapter, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    for out in (tmp_path / "base", adapter, tmp_path / "adapter" / ".." / "base"):
        done = call("merge", "--model", str(tmp_path / "base"), "--adapter", str(adapter), "--out", str(out))
        assert done.returncode == 2 and "would be overwritten" in done.stderr
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before and not (adapter / "config.json").exists()


def test_a_run_inside_its_data_folder_is_resumed(folder, triples, tmp_path):
    (tmp_path / "prefs").mkdir()
    shutil.copy(triples, tmp_path / "prefs")
    args = [*flags(folder, tmp_path / "prefs", tmp_path / "prefs" / "run"), "--lora_rank", "2"]
    i = args.index("--valid")
    for steps in ("2", "4"):
        done = call(*args[:i], *args[i + 2:], "--max_steps", steps)
        assert done.returncode == 0, done.stderr
    assert [line["step"] for line in log_of(tmp_path / "prefs" / "run")] == [1, 2, 3, 4]


def test_nothing_to_reject_writes_nothing(folder, tmp_path):
    prompts = [p for p, _ in make_demo()[0][:3]]
    answers = answer(ChatLM.from_pretrained(folder), Tokenizer.from_pretrained(folder, append_eos=True), prompts, max_new_tokens=4)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"prompt": p, "response": a or "空"}) + "\n" for p, a in zip(prompts, answers)), "utf-8")
    write_pairs(tmp_path / "p.parquet", [{"prompt": "a", "chosen": "b", "rejected": "c"}], COLUMNS)
    before = (tmp_path / "p.parquet").read_bytes()
    done = call("reject", "--model", str(folder), "--data", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "p.parquet"), "--max_new_tokens", "4")
    assert done.returncode == 2 and "no answer that differs" in done.stderr and (tmp_path / "p.parquet").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl", "p.parquet"}


def test_reject_writes_only_rows_that_dpo_takes(folder, tmp_path):
    rows = [{"prompt": "你好", "response": "好"}, {"prompt": " ", "response": "空"}, {"prompt": "问", "response": ""}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    done = run_script("dpo.py", "reject", "--model", folder, "--data", tmp_path / "a.jsonl", "--out", tmp_path / "t.parquet", "--max_new_tokens", "4")
    assert "1 triples; 2 rows dropped" in done.stdout, done.stderr
    dpo.check_triples(str(tmp_path / "t.parquet"), "t")


@pytest.mark.quick
def test_answers_that_are_equal_where_they_are_cut_are_counted(folder, tmp_path):
    rows = [{"prompt": "你好", "chosen": "好的" * 100, "rejected": "好的" * 100 + "吗"}, {"prompt": "你好", "chosen": "好的", "rejected": "好的好的"}]
    write_pairs(tmp_path / "x.parquet", rows, COLUMNS)
    done = call("--init_from", str(folder), "--data", str(tmp_path / "x.parquet"), "--max_len", "32", "--max_steps", "1", "--workers", "0", "--out_dir", str(tmp_path / "out"))
    assert done.returncode == 0 and "in 1 rows, the first 32 tokens of chosen and rejected are the same" in done.stderr


@pytest.mark.quick
def test_an_empty_file_of_triples_is_refused_again(folder, tmp_path):
    (tmp_path / "x.jsonl").write_text("\n")
    for _ in range(2):
        done = call("--init_from", str(folder), "--data", str(tmp_path / "x.jsonl"), "--max_steps", "1", "--out_dir", str(tmp_path / "out"))
        assert done.returncode == 2 and "no row can be used" in done.stderr, done.stderr


@pytest.mark.quick
def test_merge_does_not_write_through_links_to_the_model(folder, adapter, tmp_path):
    (tmp_path / "out").mkdir()
    before = (folder / "model.safetensors").read_bytes()
    (tmp_path / "out" / "model.safetensors").symlink_to(folder / "model.safetensors")
    done = call("merge", "--model", str(folder), "--adapter", str(adapter), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "would be overwritten" in done.stderr and (folder / "model.safetensors").read_bytes() == before
