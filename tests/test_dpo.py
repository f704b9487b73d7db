"""DPO computes the paper's loss on transformers' log-probabilities, learns a preference, and speaks PEFT's files."""
import json
import math
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM

import train
from chatlm import ChatLM, ChatLMConfig
from data import make_demo, read_rows
from dpo import dpo_loss, pair_logps
from tokenizer import Tokenizer
from train import add_lora, load_adapter, merge_lora, save_adapter


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


def test_log_probabilities_and_gradients_are_transformers(folder, monkeypatch):
    monkeypatch.setattr("dpo.LOSS_CHUNK_BYTES", 4 * 1300 * 3)  # three rows at a time
    ours, theirs = ChatLM.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    batch = make_triples(len(Tokenizer.from_pretrained(folder)))
    reference = torch.randn(2, 5)
    chosen, rejected = pair_logps(ours, batch)
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
    save_adapter(model, tmp_path / "ours", str(folder), 4, 8.0, targets)
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


def test_an_adapter_for_another_model_is_refused(folder, tmp_path):
    other = ChatLM(ChatLMConfig.preset("demo", vocab_size=1300, num_layers=3))
    add_lora(other, 4, 8.0, ["q"])
    save_adapter(other, tmp_path, "other", 4, 8.0, ["q"])
    with pytest.raises(ValueError, match="for another model"):
        load_adapter(ChatLM.from_pretrained(folder), tmp_path)
    with pytest.raises(FileNotFoundError, match="not an adapter"):
        load_adapter(ChatLM.from_pretrained(folder), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no linear layer x"):
        add_lora(ChatLM.from_pretrained(folder), 4, 8.0, ["x"])


def call(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "dpo.py", *args], capture_output=True, text=True, timeout=120)


def test_the_commands_from_reject_to_merge(folder, tmp_path):
    pairs = make_demo()[0][:300]
    pq.write_table(pa.table({"prompt": [p for p, _ in pairs], "response": [r for _, r in pairs]}), tmp_path / "pairs.parquet")
    triples = str(tmp_path / "triples.parquet")
    done = call("reject", "--model", str(folder), "--data", str(tmp_path / "pairs.parquet"), "--out", triples, "--max_new_tokens", "6")
    assert done.returncode == 0, done.stderr
    rows = list(read_rows([triples]))
    assert rows and rows[0].keys() == {"prompt", "chosen", "rejected"} and all(r["chosen"] != r["rejected"] for r in rows)
    flags = ["--init_from", str(folder), "--data", triples, "--valid", triples, "--max_len", "40", "--batch_tokens", "1200", "--micro_batch_tokens", "600",
             "--max_steps", "12", "--workers", "0", "--warmup_steps", "2", "--dtype", "float32"]
    for name, more in (("full", ["--lr", "1e-3"]), ("lora", ["--lr", "1e-2", "--lora_rank", "4"])):
        done = call(*flags, *more, "--out_dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert math.isclose(log[0]["loss"], math.log(2), rel_tol=1e-5) and abs(log[0]["margin"]) < 1e-4  # policy and reference are one at first
        assert log[-1]["val_loss"] < 0.6 and log[-1]["val_accuracy"] > 0.8 and log[-1]["val_margin"] > 0
        again = call(*flags, *more, "--out_dir", str(tmp_path / name))
        assert again.returncode == 0 and "going on from" in again.stdout, again.stderr
    before = ChatLM.from_pretrained(folder).state_dict()
    assert any(not torch.equal(w, before[n]) for n, w in ChatLM.from_pretrained(tmp_path / "full").state_dict().items())
    done = call("merge", "--model", str(folder), "--adapter", str(tmp_path / "lora"), "--out", str(tmp_path / "merged"))
    assert done.returncode == 0, done.stderr
    merged, adapted = ChatLM.from_pretrained(tmp_path / "merged"), ChatLM.from_pretrained(folder)
    load_adapter(adapted, tmp_path / "lora")
    batch = make_triples(1200)
    assert (merged(batch["input_ids"], labels=batch["chosen_labels"])[0] - adapted(batch["input_ids"], labels=batch["chosen_labels"])[0]).abs().max() < 1e-4


def test_bad_input_ends_with_one_line(folder, tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"]}), tmp_path / "x.parquet")
    for args, message in ((["--init_from", str(folder), "--data", str(tmp_path / "x.parquet")], "no column 'rejected'"), (["--data", "x"], "--init_from"),
                          (["merge", "--model", str(folder), "--adapter", "nowhere", "--out", "x"], "not an adapter"), (["reject", "--model", "nowhere", "--data", str(tmp_path / "x.parquet"), "--out", "y"], "no text in 'response'")):
        done = call(*args)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_lora_is_for_a_model_that_exists():
    assert train.parser_for("").parse_args(["--lora_rank", "4"]).lora_alpha == 16
