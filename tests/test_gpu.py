"""What only a GPU can show; skipped without one: python -m pytest tests/test_gpu.py tests/test_sample.py"""
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from chatlm import ChatLM, ChatLMConfig
from data import make_demo
from sample import generate
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A folder with train.parquet and a tokenizer of it."""
    folder = tmp_path_factory.mktemp("gpu")
    prompts, responses = zip(*make_demo()[0][:4000])
    pq.write_table(pa.table({"prompt": prompts, "response": responses}), folder / "train.parquet")
    Tokenizer.train([*prompts, *responses], 1400).save_pretrained(folder)
    return folder


def reserved_by(script: str, *args: str) -> int:
    """Run a script: the most bytes that it reserved on the GPU."""
    code = ("import runpy, sys, torch\nsys.argv = sys.argv[1:]\nsys.path.insert(0, '.')\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally:\n    print('reserved', torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0)")
    ran = subprocess.run([sys.executable, "-c", code, script, *args], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.splitlines()[-1].split()[1])


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"num_beams": 3, "no_repeat_ngram_size": 2}, {"top_k": 4, "penalty_alpha": 0.6}], ids=str)
def test_a_gpu_gives_the_tokens_of_a_cpu(options):
    torch.manual_seed(0)
    model = ChatLM(ChatLMConfig.preset("demo", vocab_size=300, initializer_factor=2.0)).eval()
    ids, mask = torch.randint(7, 300, (5, 12)), torch.ones(5, 12, dtype=torch.int64)
    mask[1, 4:] = mask[3, 9:] = 0
    expected = generate(model, ids, mask, max_new_tokens=40, **options)
    assert torch.equal(generate(model.to(GPU), ids.to(GPU), mask.to(GPU), max_new_tokens=40, **options).cpu(), expected)


def test_float16_answers_within_512_mb(pairs):
    model = ChatLM(ChatLMConfig.preset("0.2b"))
    model.save_pretrained(pairs)
    reserved = reserved_by("sample.py", "--model", str(pairs), "--prompt", "今天天气怎么样？" * 8, "--dtype", "float16", "--device", GPU,
                           "--min_new_tokens", "128", "--max_new_tokens", "128")
    assert 2 * model.num_parameters() < reserved < 512 << 20


def train_losses(pairs: Path, out: Path, *flags: str) -> tuple[list[float], int]:
    reserved = reserved_by("train.py", "--data", str(pairs / "train.parquet"), "--tokenizer", str(pairs), "--out_dir", str(out), "--workers", "0", *flags)
    return [line["loss"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line], reserved


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-3), ("bfloat16", 2e-2), ("float16", 2e-2)])
@pytest.mark.parametrize("flags", [[], ["--compile"], ["--checkpoint_activations"]], ids=str)
def test_a_gpu_trains_as_a_cpu_does(pairs, tmp_path, dtype, close, flags):
    common = ["--preset", "demo", "--max_steps", "30", "--batch_tokens", "2048", "--micro_batch_tokens", "1024", "--max_len", "40", "--seed", "3"]
    expected, _ = train_losses(pairs, tmp_path / "cpu", *common, "--device", "cpu", "--dtype", "float32")
    losses, _ = train_losses(pairs, tmp_path / "gpu", *common, "--device", GPU, "--dtype", dtype, *flags)
    assert len(losses) == 30 and losses[:5] == pytest.approx(expected[:5], rel=close)
    assert sum(losses[-10:]) == pytest.approx(sum(expected[-10:]), rel=5 * close)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_large_model_trains_within_4_gb(pairs, tmp_path, dtype):
    tokenizer = Tokenizer.from_pretrained(pairs)
    Tokenizer(tokenizer.vocab + [f"<{i}>" for i in range(len(tokenizer), 29298)], tokenizer.merges).save_pretrained(tmp_path)
    _, reserved = train_losses(pairs, tmp_path / "large", "--preset", "0.2b", "--tokenizer", str(tmp_path), "--micro_batch_tokens", "640", "--batch_tokens", "640", "--max_len", "320",
                               "--max_steps", "4", "--device", GPU, "--dtype", dtype, "--optimizer", "adafactor")
    assert reserved < 4e9
