"""A folder as the reference publishes its model runs as it is, with transformers' answers."""
import json
from pathlib import Path

import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from chatlm import ChatLM, ChatLMConfig, load_adapter
from data import Rows, make_demo, open_parquet, write_pairs
from dpo import COLUMNS
from tokenizer import Tokenizer as ChatTokenizer

SPECIAL = ["[PAD]", "[EOS]", "[SEP]", "[BOS]", "[CLS]", "[MASK]", "[UNK]"]
PAIRS = make_demo()[0][:2000]
ANSWERS = ["法国的首都是巴黎。", "12加3等于15。", "我叫小明，是一个小模型。"]
PROMPTS = ["法国的首都是哪里？", "你好，ＡＢ 12加 3等于多少？\t第二行", "介绍一下你自己"]


def train_tokenizer(folder: Path) -> int:
    """Write the tokenizer's files as transformers 4.36 does; the number of its tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator((text for pair in PAIRS for text in pair), trainers.BpeTrainer(
        vocab_size=1500, min_frequency=2, special_tokens=SPECIAL, show_progress=False))
    tokenizer.add_tokens(["\t", "\n"])
    names = {f"{word}_token": f"[{word.upper()}]" for word in ("pad", "eos", "sep", "bos", "cls", "mask", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    form = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True, "prepend_scheme": "always"}  # tokenizers 0.15
    form["pre_tokenizer"]["pretokenizers"][2], form["decoder"] = old, old
    form["model"]["merges"] = [" ".join(pair) for pair in form["model"]["merges"]]
    form["model"].pop("ignore_merges", None)
    (folder / "tokenizer.json").write_text(json.dumps(form, ensure_ascii=False, indent=2), "utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    added = {token["id"]: {key: value for key, value in token.items() if key != "id"} for token in form["added_tokens"]}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added, "clean_up_tokenization_spaces": True}
    settings.pop("backend", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=2), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2), "utf-8")
    return tokenizer.get_vocab_size()


def learn(model: T5ForConditionalGeneration, tokenizer, steps: int) -> None:
    """Teach a model a few pairs, so that its answers do not hang on rounding errors."""
    pairs = [*zip(PROMPTS, ANSWERS), *PAIRS[:5]]
    batch = tokenizer([p + "[EOS]" for p, _ in pairs], return_tensors="pt", padding=True)
    labels = tokenizer([r + "[EOS]" for _, r in pairs], return_tensors="pt", padding=True).input_ids
    labels[labels == 0] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def publish(folder: Path, steps: int = 150, **sizes) -> None:
    """Write a model in the form of the hub's charent/ChatLM-mini-Chinese, of any size."""
    shape = {"d_ff": 96, "d_kv": 16, "d_model": 64, "num_decoder_layers": 2, "num_heads": 4, "num_layers": 2, **sizes}
    shape["vocab_size"] = max(train_tokenizer(folder), sizes.get("vocab_size", 0))
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**shape, feed_forward_proj="relu", decoder_start_token_id=0))
    if steps:
        learn(model, AutoTokenizer.from_pretrained(folder), steps)
    model.save_pretrained(folder)
    ids = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = {
        "_name_or_path": "./model_save", "architectures": ["TextToTextModel"],
        "auto_map": {"AutoConfig": "chat_model_config.TextToTextModelConfig", "AutoModel": "chat_model.TextToTextModel",
                     "AutoModelForSeq2SeqLM": "chat_model.TextToTextModel"},
        "classifier_dropout": 0.0, "dense_act_fn": "relu", "dropout_rate": 0.1, "feed_forward_proj": "relu", "initializer_factor": 1.0,
        "is_encoder_decoder": True, "is_gated_act": False, "layer_norm_epsilon": 1e-6, "model_type": "t5", "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32, "torch_dtype": "float32", "transformers_version": "4.36.2", "use_cache": True, **ids, **shape}
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **ids, "transformers_version": "4.36.2"}), "utf-8")
    for name in ("chat_model.py", "chat_model_config.py"):  # code that must never run
        (folder / name).write_text("raise SystemExit('code of a model folder was executed')\n", "utf-8")
    assert set(load_file(folder / "model.safetensors")) & {"shared.weight", "lm_head.weight"} == {"shared.weight"}  # tied, stored once


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "ChatLM-mini-Chinese"
    folder.mkdir()
    publish(folder)
    write_pairs(folder.parent / "pairs.parquet", [{"prompt": p, "response": r} for p, r in PAIRS[:60]])
    write_pairs(folder.parent / "triples.parquet", [{"prompt": p, "chosen": r, "rejected": "不知道。"} for p, r in PAIRS[:20]], COLUMNS)
    return folder


def call(script: str, *args: str) -> str:
    """Run a script, which must succeed; what it printed."""
    done = run_script(script, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers(folder: Path, *flags: str) -> list[str]:
    """What sample.py answers to PROMPTS."""
    asked, output = folder.parent / "asked.jsonl", folder.parent / "answers.jsonl"
    asked.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), "utf-8")
    output.unlink(missing_ok=True)
    call("sample.py", "--model", str(folder), "--input", str(asked), "--output", str(output), "--max_new_tokens", "24", *flags)
    return [row["response"] for row in Rows([output])]


def their_answers(folder: Path, **options) -> list[str]:
    """What transformers answers; as in the reference, [EOS] ends each prompt."""
    model, tokenizer = T5ForConditionalGeneration.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(prompt + "[EOS]", return_tensors="pt").input_ids for prompt in PROMPTS]
    out = [model.generate(row, max_new_tokens=24, **{"do_sample": False, **options})[0] for row in ids]
    assert len({tuple(row.tolist()) for row in out}) == len(out) and all(len(set(row.tolist())) > 2 for row in out)  # not one answer to all
    return [tokenizer.decode(row, skip_special_tokens=True) for row in out]


def test_answers_are_transformers(published):
    assert answers(published) == their_answers(published)
    settings = {"num_beams": 5, "no_repeat_ngram_size": 4, "length_penalty": -2.0, "early_stopping": True}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value).lower())]
    assert answers(published, *flags) == their_answers(published, **settings)


def test_settings_of_the_reference_and_int8(published):
    flags = ["--reference_settings", "--seed", "1"]
    assert answers(published, *flags) == answers(published, *flags)
    theirs = their_answers(published)
    assert answers(published, "--dtype", "int8") == theirs
    assert call("sample.py", "--model", str(published), "--prompt", PROMPTS[0], "--dtype", "int8").strip() == theirs[0].strip()


def test_scores_are_transformers(published):
    said = json.loads(call("sample.py", "--model", str(published), "--score", str(published.parent / "pairs.parquet"),
                           "--max_new_tokens", "8").splitlines()[-1])
    model, tokenizer = T5ForConditionalGeneration.from_pretrained(published).eval(), AutoTokenizer.from_pretrained(published)
    total, count = 0.0, 0
    for row in Rows([published.parent / "pairs.parquet"]):
        labels = tokenizer(row["response"] + "[EOS]", return_tensors="pt").input_ids
        total += float(model(tokenizer(row["prompt"] + "[EOS]", return_tensors="pt").input_ids, labels=labels).loss.detach()) * labels.numel()
        count += labels.numel()
    assert abs(said["loss"] - total / count) < 1e-4 * said["loss"]


def test_it_trains_further(published, tmp_path):
    """Fine-tuning, then DPO with LoRA on the result, which transformers and AutoTokenizer still load."""
    flags = ["--max_steps", "3", "--batch_tokens", "1024", "--micro_batch_tokens", "512", "--max_len", "64", "--workers", "0",
             "--dtype", "float32", "--device", "cpu"]
    call("train.py", "--init_from", str(published), "--data", str(published.parent / "pairs.parquet"), "--out_dir", str(tmp_path / "sft"), *flags)
    call("dpo.py", "--init_from", str(published), "--data", str(published.parent / "triples.parquet"), "--out_dir", str(tmp_path / "dpo"), *flags)
    for run in ("sft", "dpo"):
        rows = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text("utf-8").splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
        theirs, old = AutoTokenizer.from_pretrained(tmp_path / run), AutoTokenizer.from_pretrained(published)
        assert [theirs.convert_tokens_to_ids(theirs.tokenize(p)) for p in PROMPTS] == [old.convert_tokens_to_ids(old.tokenize(p)) for p in PROMPTS]
        T5ForConditionalGeneration.from_pretrained(tmp_path / run)


def test_code_in_the_folder_is_never_executed(published):
    before = {path.name: path.stat().st_mtime_ns for path in published.iterdir()}
    call("sample.py", "--model", str(published), "--prompt", "你好", "--max_new_tokens", "2")
    assert {path.name: path.stat().st_mtime_ns for path in published.iterdir()} == before  # no __pycache__ either


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "adapter_model.safetensors", "pairs.parquet", "pairs.jsonl", "training.parquet"])
def test_pointers_of_git_lfs_are_named(tmp_path, name):
    """A clone without Git LFS has three lines in place of each large file."""
    ChatLM(ChatLMConfig.preset("demo", vocab_size=300)).save_pretrained(tmp_path)
    tokenizer = ChatTokenizer.train([PROMPTS[0]], 300)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 750794624\n")
    read = {"tokenizer.json": lambda: ChatTokenizer.from_pretrained(tmp_path), "model.safetensors": lambda: ChatLM.from_pretrained(tmp_path),
            "training.parquet": lambda: open_parquet(tmp_path / name, ("prompt",)),
            "adapter_model.safetensors": lambda: load_adapter(ChatLM.from_pretrained(tmp_path), tmp_path)}
    with pytest.raises(ValueError, match=f"{name}.*Git LFS pointer.*git lfs pull" if "adapter" not in name else "Git LFS pointer.*git lfs pull"):
        read.get(name, lambda: list(Rows([tmp_path / name])))()
