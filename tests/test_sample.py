"""Decoding gives transformers' tokens; scores are sacrebleu's; the command serves people."""
import argparse
import contextlib
import copy
import dataclasses
import gc
import io
import itertools
import json
import math
import random
import shutil
import sys
import weakref
from pathlib import Path
from unittest import mock

import pytest
import sacrebleu
import torch
from conftest import run_script
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration
from transformers.generation import logits_process

import sample
from chatlm import ChatLM, ChatLMConfig
from data import locked, run
from sample import (
    BFloat16Product,
    Decoder,
    GenerationConfig,
    bleu4,
    float32_product,
    generate,
    pack,
    triples,
)
from tokenizer import Tokenizer

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PENALTIES = [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 7},
             {"repetition_penalty": 1.7, "no_repeat_ngram_size": 3, "min_new_tokens": 4}]


def make_models(tmp_path, seed: int, **changes) -> tuple[T5ForConditionalGeneration, ChatLM]:
    torch.manual_seed(seed)
    config = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, **changes}
    theirs = T5ForConditionalGeneration(T5Config(**config)).eval()
    theirs.save_pretrained(tmp_path)
    return theirs, ChatLM.from_pretrained(tmp_path)


def make_prompts(rows: int = 6, width: int = 12, vocab_size: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (rows, width), generator=g)
    mask = torch.ones_like(ids)
    for i, length in enumerate([width, 5, 3, 9, 1, 7][:rows]):
        mask[i, length:] = 0
    return ids * mask, mask


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_greedy_is_transformers(tmp_path, seed, penalties):
    theirs, ours = make_models(tmp_path, seed, initializer_factor=1.0 + seed % 3, feed_forward_proj=["relu", "gated-gelu"][seed % 2],
                               tie_word_embeddings=seed < 2)
    ids, mask = make_prompts()
    assert torch.equal(generate(ours, ids, mask, max_new_tokens=24, **penalties),
                       theirs.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, num_beams=1, **penalties))


@pytest.mark.parametrize("num_beams", [2, 4, 5])
@pytest.mark.parametrize("penalties", PENALTIES[::2], ids=str)
def test_beam_search_is_transformers(tmp_path, num_beams, penalties):
    for seed in (0, 2) if num_beams == 2 else (2,):
        theirs, ours = make_models(tmp_path, seed, initializer_factor=1.0 + seed)
        ids, mask = make_prompts(4)
        for length_penalty, early_stopping, returned in [(1.0, False, 1), (1.0, True, num_beams), (2.0, "never", 1), (-2.0, True, 1), (0.0, "never", num_beams)]:
            options = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping,
                       "num_return_sequences": returned, "max_new_tokens": 12, **penalties}
            expected = theirs.generate(ids, attention_mask=mask, do_sample=False, **options)
            assert torch.equal(generate(ours, ids, mask, **options), expected), options


@pytest.mark.quick
def test_rows_of_a_batch_get_what_they_get_alone(tmp_path):
    _, ours = make_models(tmp_path, 1)
    ids, mask = make_prompts()
    for beams in (1, 3):
        together = generate(ours, ids, mask, max_new_tokens=20, num_beams=beams)
        for i, row in enumerate(together):
            alone = generate(ours, ids[i:i + 1, :mask[i].sum()], max_new_tokens=20, num_beams=beams)[0]
            assert row[:len(alone)].tolist() == alone.tolist()
            assert set(row[len(alone):].tolist()) <= {0 if beams == 1 else 1}


@pytest.mark.parametrize("feed_forward_proj", ["relu", "gated-gelu"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2e-3), (torch.bfloat16, 0.05), (torch.int8, 0.1)])
def test_packed_weights_decode_nearly_the_same(tmp_path, feed_forward_proj, dtype, most):
    _, ours = make_models(tmp_path, 0, d_model=64, d_kv=16, d_ff=128, feed_forward_proj=feed_forward_proj)
    packed = ChatLM.from_pretrained(tmp_path)
    pack(packed, dtype)
    ids, mask = make_prompts()
    decoders = Decoder(ours, ids, mask), Decoder(packed, ids, mask)
    for said in generate(ours, ids, mask, max_new_tokens=40, min_new_tokens=40).T[:-1]:  # over a growth of the room for keys
        exact, near = (decoder.step(said)[0].detach() for decoder in decoders)
        assert 0 < (near - exact).abs().max() < most * exact.abs().max()
    assert generate(packed, ids, mask, max_new_tokens=5, num_beams=3).shape[1] > 1
    with pytest.raises(ValueError, match="float32"):
        pack(ours.bfloat16(), dtype)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8], ids=str)
def test_a_packed_model_is_freed(tmp_path, dtype):
    _, ours = make_models(tmp_path, 0)
    pack(ours, dtype)
    generate(ours, *make_prompts(), max_new_tokens=3)
    copied = copy.deepcopy(ours)  # is not packed: it answers with its own weights
    for p in copied.parameters():
        p.data.normal_(std=0.3)
    plain = ChatLM(ours.config).eval()
    plain.load_state_dict(copied.state_dict())
    assert torch.equal(Decoder(copied, *make_prompts()).step(torch.zeros(6, dtype=torch.int64))[0],
                       Decoder(plain, *make_prompts()).step(torch.zeros(6, dtype=torch.int64))[0])
    kept = weakref.ref(ours)
    del ours
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_steps_that_are_all_alike_are_the_steps(tmp_path, device):
    """As a GPU takes them, there from a CUDA graph: over growths of the room, as beams change places, rows multiply and prompts leave."""
    _, ours = make_models(tmp_path, 1)
    ids, mask = make_prompts()
    device = sample.pick_device(device)
    there = ChatLM.from_pretrained(tmp_path, device=device)
    usual, alike = Decoder(ours, ids, mask, 2, static=False), Decoder(there, ids.to(device), mask.to(device), 2, static=True)
    g = torch.Generator().manual_seed(0)

    def select(rows: list[int], sources: list[int] | None = None) -> None:
        for decoder, at in ((usual, "cpu"), (alike, device)):
            decoder.select(torch.tensor(rows, device=at), None if sources is None else torch.tensor(sources, device=at))

    for step in range(400):
        said = torch.randint(0, 60, (usual.rows,), generator=g)
        for one, other in zip(usual.step(said), alike.step(said.to(device))):
            torch.testing.assert_close(one, other.cpu(), rtol=1e-4, atol=1e-4)
        if step % 5 == 4:
            n = usual.rows // len(usual.mask)
            select([row // n * n + i for row in range(0, usual.rows, n) for i in torch.randint(0, n, (n,), generator=g).tolist()])
        if step == 20:
            select([row for row in range(12) for _ in range(2)])
        if step == 340:
            select([0, 1, 2, 3, 12, 13, 14, 15], [0, 3])
    assert device.type == "cpu" or alike.graphs


@pytest.mark.quick
@pytest.mark.parametrize("static", [False, True])
def test_a_decoder_that_begins_anew_is_a_new_one(tmp_path, static):
    """After longer, shorter and more prompts, and after rows were dropped; graphs are forgotten only where they would be wrong."""
    _, model = make_models(tmp_path, 1)
    ids, mask = make_prompts()
    kept, g = Decoder(model, ids[:1], mask[:1], static=static), torch.Generator().manual_seed(0)
    for rows, width, steps, stays in ((1, 12, 5, True), (1, 3, 40, True), (1, 64, 3, True), (1, 65, 3, False), (1, 7, 70, True), (6, 12, 4, False), (1, 12, 33, False)):
        ids, mask = torch.randint(3, 60, (rows, width), generator=g), torch.ones(rows, width, dtype=torch.long)
        mask[:, width // 2 + 1:] = torch.arange(rows)[:, None] % 2
        graph = object()
        kept.graphs[1] = graph
        kept.begin(ids, mask)
        assert not static or (kept.graphs.get(1) is graph) == stays
        kept.graphs.clear()
        with torch.inference_mode():
            kept.cache.fill_(math.nan)  # as a float16 model may leave it
            kept.sources[..., width:, :] = math.nan
        kept.begin(ids, mask)
        new = Decoder(model, ids, mask, static=static)
        for step in range(steps):
            said = torch.randint(0, 60, (new.rows,), generator=g)
            for one, other in zip(kept.step(said), new.step(said), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            if rows > 1 and step == 2:
                for decoder in (kept, new):
                    decoder.select(torch.tensor([1, 4]), torch.tensor([1, 4]))


@pytest.mark.quick
def test_an_idle_decoder_is_used_and_put_back(folder):
    """Also after an answer that was stopped; its answers are those of a new one."""
    model, tokenizer = ChatLM.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    first, config = sample.Decoder(model, torch.tensor([[3, 4, 1]])), GenerationConfig(max_new_tokens=9, min_new_tokens=9)
    idle = [first]
    for prompt in ("你好", "今天天气怎么样？今天天气怎么样？", "世界"):
        said = "".join(sample.stream_answer(model, tokenizer, prompt, 64, config, idle))
        assert said == sample.answer(model, tokenizer, [prompt], 1, 64, **vars(config))[0]
        assert idle == [first]
    stopped = sample.steps(model, torch.tensor([[3, 4, 1]]), None, config, idle)
    next(stopped)
    assert not idle  # so that no other answer uses it
    stopped.close()
    assert idle == [first]


@pytest.mark.quick
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_a_model_decodes_as_it_computes(tmp_path, device, dtype):
    make_models(tmp_path, 0)
    device = sample.pick_device(device)
    model = ChatLM.from_pretrained(tmp_path, dtype, device)
    ids, mask = (x.to(device) for x in make_prompts())
    said = torch.randint(0, 60, (len(ids), 20), device=device)
    decoder = Decoder(model, ids, mask, static=True)
    steps = torch.stack([decoder.step(column)[0] for column in said.T], 1)
    assert decoder.mask.dtype == decoder.masked_bias.dtype == decoder.cache.dtype == dtype and decoder.masked_bias.stride(-1) == 1  # or a GPU's kernels refuse them
    with torch.no_grad():
        whole = torch.nn.functional.linear(model.decode(said, *model.encode(ids, mask)), model.head_weight()).float()
    torch.testing.assert_close(steps, whole, rtol=0.05, atol=0.05 * float(whole.abs().max()))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 129])
@pytest.mark.parametrize("columns", [7, 64, 90, 3 * 257])
def test_products_of_few_rows_are_the_product(rows, columns):
    """On Intel's CPUs and AMD's, with one packed weight for several numbers of rows, with threads that do not divide
    the weight evenly, and where torch has no oneDNN."""
    weight, x = torch.randn(columns, 33), torch.randn(33, rows).T
    expected = x @ weight.T
    for is_amd, has_onednn, threads in itertools.product((True, False), {False, torch.backends.mkldnn.is_available()}, (1, 2, 5)):
        with (mock.patch("sample.is_amd", mock.Mock(return_value=is_amd)),
              mock.patch("torch.get_num_threads", mock.Mock(return_value=threads)),
              mock.patch("torch.backends.mkldnn.is_available", mock.Mock(return_value=has_onednn))):
            product = float32_product(weight)
        for n in (rows, 1, rows):
            torch.testing.assert_close(product(x[:n]), expected[:n])
            assert product(x[:n]).is_contiguous()
    rounded = weight.bfloat16()
    for is_amd, has_bfloat16, threads in itertools.product((True, False), {False, sample.has_bfloat16(x.device)}, (1, 2, 3)):
        with (mock.patch("sample.is_amd", mock.Mock(return_value=is_amd)),
              mock.patch("sample.has_bfloat16", mock.Mock(return_value=has_bfloat16)),
              mock.patch("torch.get_num_threads", mock.Mock(return_value=threads))):
            product, few = BFloat16Product(weight), 8 if is_amd else 1
            for n in (1, rows, 1):
                y, packed = product(x[:n]), product.product
                if product.most_rows == few or not has_bfloat16:  # float16 rounds what is below 7.6e-6
                    torch.testing.assert_close(packed.weight().bfloat16(), rounded, rtol=0, atol=1e-7)
                is_rounded = isinstance(packed, sample.ColumnSum) or not isinstance(packed, sample.Float16Product)
                assert is_rounded == (has_bfloat16 if product.most_rows > few else not is_amd)
                exact = (x[:n].bfloat16() if is_rounded else x[:n]).double() @ rounded.double().T
                assert y.dtype == torch.float32 and y.shape == (n, columns)
                torch.testing.assert_close(y.double(), exact, rtol=1e-2 if is_rounded else 1e-4, atol=2e-3)
            stays = rows <= few and (has_bfloat16 or not is_amd)
            assert product.most_rows == (few if stays else sys.maxsize)


@pytest.mark.quick
def test_the_vendor_of_the_cpu_is_found():
    """On Linux in /proc/cpuinfo, elsewhere from Python."""
    is_amd = sample.is_amd.__wrapped__
    for text, expected in (("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False)):
        with mock.patch("builtins.open", mock.mock_open(read_data=text)):
            assert is_amd() == expected
    for name, expected in (("AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD", True), ("arm", False)):
        with mock.patch("builtins.open", side_effect=FileNotFoundError), mock.patch("platform.processor", return_value=name):
            assert is_amd() == expected


@pytest.mark.quick
def test_products_of_many_numbers_of_rows_need_few_kernels():
    """oneDNN keeps one for every number of rows, about a megabyte each; a batch loses rows one by one."""
    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.mkldnn._linear_pointwise.default:
                seen.add((args[0].shape, args[1].shape))
            return function(*args, **(kwargs or {}))

    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    weight, x = torch.randn(24, 33), torch.randn(160, 33)
    products = [(float32_product(weight), 16)]  # with the most rows that oneDNN computes
    if sample.has_bfloat16(x.device):
        products.append((sample.packed_product(weight.bfloat16()), 160))
    for product, most in products:
        seen = set[tuple]()
        with Shapes():
            for rows in range(1, 161):
                assert len(product(x[:rows])) == rows
        assert most in {shape[0] for shapes in seen for shape in shapes} and len(seen) <= 8 + 160 // 8, seen


@pytest.mark.quick
def test_ctranslate2_answers_the_same(folder, tmp_path):
    """Its converter takes the folder as transformers' own, and its greedy answers are ours."""
    from ctranslate2 import Translator
    from ctranslate2.converters import TransformersConverter
    TransformersConverter(str(folder)).convert(str(tmp_path / "ct2"))
    model, tokenizer = ChatLM.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    words = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words = {i: word for word, i in words["model"]["vocab"].items()} | {t["id"]: t["content"] for t in words["added_tokens"]}
    prompts = ["你好", "今天天气怎么样？", "世界"]
    done = Translator(str(tmp_path / "ct2"), intra_threads=1).translate_batch([[words[i] for i in tokenizer.encode(p)] for p in prompts],
                                                                              beam_size=1, max_decoding_length=12)
    for prompt, theirs in zip(prompts, done):
        ours = generate(model, torch.tensor([tokenizer.encode(prompt)]), max_new_tokens=12)[0, 1:]
        assert [words[i] for i in ours.tolist() if i != 1] == theirs.hypotheses[0]


@pytest.mark.quick
def test_transformers_answers_the_same_from_text(folder):
    """AutoTokenizer and AutoModelForSeq2SeqLM, what was pipeline("text2text-generation") before it left transformers."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = model.generate(**tokenizer("今天天气怎么样？", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == sample.answer(ChatLM.from_pretrained(folder), Tokenizer.from_pretrained(folder),
                                                                               ["今天天气怎么样？"], max_new_tokens=12)[0]


@pytest.mark.quick
def test_sampling_filters_as_transformers():
    g = torch.Generator().manual_seed(3)
    for temperature, top_k, top_p, beams in itertools.product((0.7, 1.0, 1.5), (0, 1, 5, 100), (0.0, 0.3, 0.9, 1.0), (1, 3)):
        scores = torch.randn(4, 50, generator=g) * 3
        least = 2 if beams > 1 else 1
        expected = logits_process.TemperatureLogitsWarper(temperature)(None, scores)
        if top_k:
            expected = logits_process.TopKLogitsWarper(top_k, min_tokens_to_keep=least)(None, expected)
        if top_p < 1:
            expected = logits_process.TopPLogitsWarper(top_p, min_tokens_to_keep=least)(None, expected)
        config = GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, num_beams=beams)
        assert torch.equal(config.process(scores, torch.zeros(4, 1, dtype=torch.int64), 1), expected)


def contrastive_by_definition(theirs, ids: torch.Tensor, top_k: int, alpha: float, new: int, penalty: float) -> list[int]:
    """Su et al.'s search for one prompt on transformers' model, everything computed again for every candidate."""
    said = [0]

    def look(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        out = theirs(input_ids=ids, decoder_input_ids=torch.tensor([tokens]), output_hidden_states=True)
        return out.logits[0, -1], out.decoder_hidden_states[-1][0]

    for _ in range(new):
        scores = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([said]), look(said)[0][None])
        p, tokens = scores[0].softmax(-1).topk(top_k)
        values = []
        for share, token in zip(p.tolist(), tokens.tolist()):
            h = look([*said, token])[1]
            values.append((1 - alpha) * share - alpha * float(torch.cosine_similarity(h[-1:], h[:-1]).max()))
        said.append(int(tokens[values.index(max(values))]))
        if said[-1] == 1:
            break
    return said


@pytest.mark.parametrize(("top_k", "alpha", "penalty"), [(4, 0.6, 1.0), (2, 0.3, 1.0), (5, 0.9, 1.5)])
def test_contrastive_search_is_its_definition(tmp_path, top_k, alpha, penalty):
    theirs, ours = make_models(tmp_path, 2, initializer_factor=2.0)
    ids, mask = make_prompts(5)
    got = generate(ours, ids, mask, max_new_tokens=12, top_k=top_k, penalty_alpha=alpha, repetition_penalty=penalty)
    with torch.no_grad():
        for i, row in enumerate(got.tolist()):
            expected = contrastive_by_definition(theirs, ids[i:i + 1, :mask[i].sum()], top_k, alpha, 12, penalty)
            assert row == expected + [0] * (len(row) - len(expected))
    assert not torch.equal(got[:, :8], generate(ours, ids, mask, max_new_tokens=12, repetition_penalty=penalty)[:, :8])


def test_seeded_sampling_is_reproducible_and_draws_from_the_distribution(tmp_path):
    _, ours = make_models(tmp_path, 0)
    ids, mask = make_prompts()

    def draw(**options) -> torch.Tensor:
        torch.manual_seed(5)
        return generate(ours, ids, mask, max_new_tokens=10, do_sample=True, **options)

    assert torch.equal(draw(), draw())
    assert torch.equal(draw(top_k=1), generate(ours, ids, mask, max_new_tokens=10))
    assert torch.equal(draw(num_beams=3), draw(num_beams=3))
    first = draw(num_return_sequences=500)[:500, 1]
    logits, _ = ours(ids[:1], mask[:1], decoder_input_ids=torch.zeros(1, 1, dtype=torch.int64))
    expected = logits[0, 0].softmax(-1)
    seen = torch.bincount(first, minlength=60) / 500
    assert (seen - expected).abs().max() < 0.1


@pytest.mark.parametrize("options", [{"num_beams": 0}, {"top_p": 1.5}, {"top_p": -0.1}, {"temperature": -1.0}, {"max_new_tokens": 0}, {"repetition_penalty": 0},
                                     {"num_return_sequences": 2}, {"early_stopping": "soon"}], ids=str)
def test_options_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GenerationConfig(**options)
    assert not GenerationConfig(do_sample=True, temperature=0).do_sample


@pytest.mark.quick
def test_bleu_is_sacrebleus():
    rng = random.Random(0)
    for trial in range(40):
        references = ["".join(rng.choice("你我他 好,a") for _ in range(rng.randint(1, 14))) for _ in range(5)]
        answers = ["".join(c if rng.random() < trial / 40 else "天" for c in r)[:rng.randint(1, 14)] for r in references]
        assert abs(bleu4(answers, references) - sacrebleu.corpus_bleu(answers, [references], tokenize="char").score) < 0.01


def test_triples_are_read():
    assert triples("[(甲,作者,乙),(甲(1),歌手, 丙)]") == {"甲,作者,乙", "甲(1),歌手,丙"}
    assert triples("没有") == set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder whose model has learnt nothing."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(["你好，世界。今天天气怎么样？"], 300)
    torch.manual_seed(0)
    ChatLM(ChatLMConfig.preset("demo", vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_streamed_answer_is_the_answer(folder):
    model, tokenizer = ChatLM.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    for seed in range(20):
        torch.manual_seed(seed)  # an untrained model writes bytes of broken characters, too
        parts = list(sample.stream_answer(model, tokenizer, "你好", 64, GenerationConfig(max_new_tokens=40, do_sample=True)))
        torch.manual_seed(seed)
        whole = sample.answer(model, tokenizer, ["你好"], 1, 64, max_new_tokens=40, do_sample=True)[0]
        assert "".join(parts) == whole


def call(*args: str, stdin: str = ""):
    return run_script("sample.py", *args, stdin=stdin)


def test_prompt_and_chat(folder):
    model = ["--model", str(folder), "--max_new_tokens", "8"]
    done = call("--prompt", "你好", *model)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert call("--prompt", "你好", *model).stdout == done.stdout
    chat = call(*model, stdin="你好\n/set temperature 0.5\n/set top_p 2\n/nothing\n/help\n\n/reset\n你好\n")
    assert chat.returncode == 0 and "top_p must be" in chat.stdout and "unknown command" in chat.stdout and chat.stderr == ""
    assert "temperature = 0.5 (no effect without do_sample)" in chat.stdout and "settings reset" in chat.stdout


@pytest.mark.quick
def test_settings_of_the_chat_are_checked(folder, monkeypatch, capsys):
    chat = call("--model", str(folder), stdin="/set do_sample on\n/set do_sample true\n/set early_stopping maybe\n/set top_k x\n")
    for line in ("do_sample takes true or false, not 'on'", "do_sample = True", "early_stopping takes true, false or never", "top_k takes a whole number"):
        assert line in chat.stdout

    def closed(text: str):
        raise RuntimeError("input(): lost sys.stdin")

    monkeypatch.setattr("builtins.input", closed)
    sample.chat(ChatLM.from_pretrained(folder), Tokenizer.from_pretrained(folder), 64, {})
    assert capsys.readouterr().err == ""


@pytest.mark.quick
def test_cut_prompts_and_files_without_prompts_are_told(folder, tmp_path):
    model = ["--model", str(folder), "--max_new_tokens", "2", "--max_len", "20"]
    (tmp_path / "long.txt").write_text("天气" * 100 + "\n", "utf-8")
    (tmp_path / "pair.jsonl").write_text(json.dumps({"prompt": "天气" * 100, "response": "好"}), "utf-8")
    for args in (["--prompt", "天气" * 100], ["--input", str(tmp_path / "long.txt"), "--output", str(tmp_path / "o.jsonl")], ["--score", str(tmp_path / "pair.jsonl")]):
        done = call(*args, *model)
        assert done.returncode == 0 and done.stderr.count("longer than --max_len 20 tokens are cut") == 1, done.stderr
    (tmp_path / "empty.jsonl").write_text("")
    done = call("--input", str(tmp_path / "empty.jsonl"), "--output", str(tmp_path / "e.jsonl"), *model)
    assert done.returncode == 2 and "has no prompts" in done.stderr and not (tmp_path / "e.jsonl").exists()
    done = call("--input", str(tmp_path / "long.txt"), "--output", str(tmp_path), *model)
    assert done.returncode == 2 and "is not a file" in done.stderr


def test_files_are_answered_in_order_and_continued(folder, tmp_path):
    model = ["--model", str(folder), "--max_new_tokens", "8"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"你好{i}"}) + "\n" for i in range(10)))
    out = tmp_path / "a.jsonl"
    done = call("--input", str(tmp_path / "p.jsonl"), "--output", str(out), *model)
    assert done.returncode == 0, done.stderr
    lines = out.read_text("utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [f"你好{i}" for i in range(10)]
    out.write_text("\n".join(lines[:4]) + "\n" + lines[4][:10], "utf-8")  # cut off: goes on from there
    assert call("--input", str(tmp_path / "p.jsonl"), "--output", str(out), *model).returncode == 0
    assert out.read_text("utf-8").splitlines() == lines
    odd = [{"prompt": "你\0好"}, {"prompt": "\ud800半个"}, {"prompt": ""}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    done = call("--input", str(tmp_path / "odd.jsonl"), "--output", str(tmp_path / "odd_out.jsonl"), *model, "--dtype", "int8")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["prompt"] for line in (tmp_path / "odd_out.jsonl").read_text("utf-8").splitlines()] == [row["prompt"] for row in odd]
    (tmp_path / "s.jsonl").write_text(json.dumps({"prompt": "抽取", "response": "[(a,b,c)]"}) + "\n")
    done = call("--score", str(tmp_path / "s.jsonl"), *model)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rows"] == 1 and result["f1"] == 0 and abs(math.exp(result["loss"]) - result["ppl"]) < 1e-6 * result["ppl"]


@pytest.mark.parametrize("args", [["--prompt", "你好", "--model", "nowhere"], ["--prompt", " "], ["--prompt", "a", "--num_beams", "0"], ["--prompt", "a", "--top_p", "1.5"],
                                  ["--input", "x.jsonl"], ["--prompt", "a", "--score", "b"], ["--prompt", "a", "--device", "tpu"]], ids=str)
def test_bad_commands_end_with_one_line(folder, monkeypatch, capsys, args):
    monkeypatch.setattr(sys, "argv", ["sample.py", *args, *([] if "--model" in args else ["--model", str(folder)])])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(sample.main)
    said = capsys.readouterr()
    assert end.value.code == 2
    assert len(said.err.splitlines()) == 1, said.err
    assert said.out == ""


def test_settings_come_from_flags_then_from_the_model(folder, tmp_path):
    import shutil
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "generation_config.json").write_text(json.dumps({"max_new_tokens": 5, "num_beams": 2, "early_stopping": "never", "eos_token_id": 1, "top_p": None}))
    model = ChatLM.from_pretrained(other)
    model.save_pretrained(other)
    assert json.loads((other / "generation_config.json").read_text())["early_stopping"] == "never"

    def options(*flags: str) -> GenerationConfig:
        args = argparse.Namespace(**{f.name: None for f in dataclasses.fields(GenerationConfig)}, reference_settings="--reference_settings" in flags,
                                  prompt=None, input=None, score=None, serve=None)
        for name, value in itertools.pairwise(flags):
            if name == "--num_beams":
                args.num_beams = int(value)
        return GenerationConfig(**sample.decoding_options(args, model))

    assert options() == GenerationConfig(max_new_tokens=5, num_beams=2, early_stopping="never")
    assert options("--num_beams", "3").num_beams == 3
    assert options("--reference_settings") == GenerationConfig(5, num_beams=5, do_sample=True, top_k=50, top_p=0.95, no_repeat_ngram_size=4, length_penalty=-2.0, early_stopping=True)
    done = call("--prompt", "你好", "--model", str(other), "--early_stopping", "never", "--num_beams", "2", "--temperature", "0.7")
    assert done.returncode == 0 and "--temperature has no effect without --do_sample" in done.stderr
    assert call("--prompt", "你好", "--model", str(other), "--early_stopping", "soon").returncode == 2


def test_no_model_says_what_to_run_first(folder):
    assert "train one first with  python train.py" in call("--prompt", "你好", "--model", "nowhere").stderr


def test_scoring_a_file_without_the_columns(folder, tmp_path):
    (tmp_path / "s.jsonl").write_text('{"question": "a"}\n')
    done = call("--score", str(tmp_path / "s.jsonl"), "--model", str(folder))
    assert done.returncode == 2 and "row 1 has no text in 'prompt'" in done.stderr


def test_damaged_weights_are_one_line(folder, tmp_path):
    model = ChatLM.from_pretrained(folder)
    with torch.no_grad():
        model.decoder.final_layer_norm.weight[0] = math.nan
    shutil.copytree(folder, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    for flags in ([], ["--do_sample"]):
        code, line = run_here(["--prompt", "你好", "--model", str(tmp_path / "model"), "--max_new_tokens", "4", *flags])
        assert code == 2 and "decoder.final_layer_norm.weight is not finite" in line
    with pytest.raises(ValueError, match="weights are damaged"):  # in memory, such as after an overflow
        generate(model, torch.tensor([[9, 8]]), do_sample=True, max_new_tokens=4)


@pytest.mark.quick
def test_ids_and_precision_of_the_caller(tmp_path):
    """int32 ids, an empty prompt, and autocast around generate."""
    _, ours = make_models(tmp_path, 0)
    ids, mask = make_prompts()
    expected = generate(ours, ids, mask, max_new_tokens=5, num_beams=2)
    assert torch.equal(generate(ours, ids.int(), mask.int(), max_new_tokens=5, num_beams=2), expected)
    assert generate(ours, ids[:, :0], max_new_tokens=3).shape == (len(ids), 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(ours, ids, mask, max_new_tokens=3, min_new_tokens=3).shape == (len(ids), 4)


def test_scores_are_of_one_answer_per_row(folder, tmp_path):
    """Also where the model's own settings ask for several."""
    shutil.copytree(folder, tmp_path / "model")
    own = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(own | {"num_return_sequences": 3, "num_beams": 3}))
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"prompt": f"你好{i}", "response": "世界"}) + "\n" for i in range(3)))
    scores = []
    for model, flags in ((folder, ["--num_beams", "3"]), (tmp_path / "model", [])):
        done = call("--score", str(tmp_path / "s.jsonl"), "--model", str(model), "--max_new_tokens", "5", *flags)
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout.splitlines()[-1]))
    assert scores[0] == scores[1]


def test_a_bad_prompt_is_named_by_its_own_file_and_row(folder, tmp_path):
    (tmp_path / "in").mkdir()
    for name, lines in (("a", ["p"] * 3), ("b", ["p", "q"])):
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(json.dumps({("prompt" if x == "p" else "other"): "你好"}) + "\n" for x in lines))
    done = call("--input", str(tmp_path / "in"), "--output", str(tmp_path / "out.jsonl"), "--model", str(folder))
    assert done.returncode == 2 and "b.jsonl, row 2 has no text in prompt" in done.stderr, done.stderr


@pytest.fixture
def answered(folder, tmp_path) -> tuple[list[str], Path]:
    """Arguments that answer a file of prompts, the output, already there."""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"你好{i}"}) + "\n" for i in range(6)))
    args = ["--input", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "a.jsonl"), "--model", str(folder), "--max_new_tokens", "6"]
    assert run_here(args)[0] == 0
    return args, tmp_path / "a.jsonl"


def run_here(args: list[str]) -> tuple[int, str]:
    """sample.py in this process: its exit status and the last line of stderr."""
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["sample.py", *args])
        try:
            run(sample.main)
        except SystemExit as end:
            return end.code, err.getvalue().splitlines()[-1]
    return 0, (err.getvalue().splitlines() or [""])[-1]


def replaced(args: list[str], flag: str, value: str) -> list[str]:
    i = args.index(flag)
    return [*args[:i + 1], value, *args[i + 2:]]


@pytest.mark.quick
def test_answers_of_others_are_never_mixed_in(answered, tmp_path):
    args, out = answered
    before = out.read_bytes()
    lines = before.decode().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text('{"prompt": "别的"}\n')
    (tmp_path / "fewer.jsonl").write_text("".join(json.dumps({"prompt": f"你好{i}"}) + "\n" for i in range(3)))
    torch.manual_seed(1)
    tokenizer = Tokenizer.from_pretrained(args[5])
    ChatLM(ChatLMConfig.preset("demo", vocab_size=len(tokenizer))).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    for wrong, message in ((replaced(args, "--input", str(tmp_path / "other.jsonl")), "line 1 answers another prompt"),
                           (replaced(args, "--input", str(tmp_path / "fewer.jsonl")), "line 4 answers another prompt"),
                           (replaced(args, "--model", str(tmp_path / "other")), "with another model"),
                           (replaced(args, "--max_new_tokens", "7"), "another max_new_tokens (6, now 7)"),
                           ([*args, "--dtype", "int8"], "another dtype"), ([*args, "--do_sample", "--seed", "1"], "another do_sample")):
        code, line = run_here(wrong)
        assert code == 2 and message in line, line
        assert out.read_bytes() == before
    out.write_bytes("".join(lines[:3]).encode() + lines[3].encode()[:9])  # cut off: the rest is answered
    assert run_here(args)[0] == 0 and out.read_bytes() == before


@pytest.mark.quick
@pytest.mark.parametrize("content", [b"my notes\n", b'{"prompt": "a"}\n', b"[1]\n", b'{"question": 1}\n', b"\0\0\0", b"half a line"], ids=repr)
def test_files_that_are_not_ours_stay_as_they_are(answered, content):
    args, out = answered
    record = out.with_name(f".{out.name}.settings")
    out.write_bytes(content)
    record.rename(record.with_suffix(".away"))
    code, line = run_here(args)
    assert code == 2 and "was not written by this command" in line and out.read_bytes() == content
    record.with_suffix(".away").rename(record)  # ours once, and since replaced
    if content.endswith(b"\n"):
        code, line = run_here(args)
        assert code == 2 and ("is not an answer" in line or "another prompt" in line) and out.read_bytes() == content


@pytest.mark.quick
def test_the_input_is_never_the_output(folder, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "你好"}\n{"prompt": "half')
    before = path.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "p.jsonl").write_text('{"prompt": "你好"}\n')
    model = ["--model", str(folder), "--max_new_tokens", "4"]
    for output in (path, tmp_path / "link.jsonl", tmp_path / "folder" / ".." / "p.jsonl"):
        code, line = run_here(["--input", str(path), "--output", str(output), *model])
        assert code == 2 and "both input and output" in line and path.read_bytes() == before
    for _ in range(2):  # in an input folder the answers are not read as prompts
        assert run_here(["--input", str(tmp_path / "folder"), "--output", str(tmp_path / "folder" / "a.jsonl"), *model])[0] == 0
        assert len((tmp_path / "folder" / "a.jsonl").read_text().splitlines()) == 1


@pytest.mark.quick
def test_blank_lines_are_no_prompts(folder, tmp_path):
    (tmp_path / "p.txt").write_text("\n你好\n\n   \n世界\n\n")
    assert run_here(["--input", str(tmp_path / "p.txt"), "--output", str(tmp_path / "a.jsonl"), "--model", str(folder), "--max_new_tokens", "4"])[0] == 0
    assert [json.loads(line)["prompt"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == ["你好", "世界"]


@pytest.mark.quick
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                                   RuntimeError("CUDA error: out of memory")], ids=repr)
def test_out_of_memory_names_the_flag_to_lower(answered, monkeypatch, tmp_path, error):
    args, out = answered
    before = out.read_bytes()
    out.write_bytes(before[:len(before) // 2])

    def fail(*_, **__):
        raise error
    monkeypatch.setattr(sample, "answer", fail)
    code, line = run_here(args)
    kind = "out of GPU memory" if "CU" in str(error) and "CPU" not in str(error) else "out of memory"
    assert code == 1 and kind in line and "--batch_size" in line and before.startswith(out.read_bytes())


def test_an_adapter_is_no_model(folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    code, line = run_here(["--prompt", "a", "--model", str(tmp_path)])
    assert code == 2 and "merge it first with  python dpo.py merge" in line


@pytest.mark.quick
def test_flags_without_effect_are_reported(folder):
    model = ["--prompt", "你好", "--model", str(folder), "--max_new_tokens", "2"]
    for flags in (["--top_k", "5"], ["--top_p", "0.5"], ["--temperature", "0.7"], ["--length_penalty", "2"], ["--early_stopping"], ["--seed", "3"]):
        assert f"note: {flags[0]} has no effect" in run_here([*model, *flags])[1]
        assert run_here([*model, *flags, "--do_sample", "--num_beams", "2"])[1] == ""
    for flags in (["--batch_size", "2"], ["--output", "x.jsonl"]):
        assert run_here([*model, *flags])[0] == 2


@pytest.mark.quick
def test_nats_per_character_count_the_characters_that_were_scored(folder):
    model, tokenizer = ChatLM.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    rows = [{"prompt": "你好", "response": "今天天气怎么样？" * 30}]
    result, _ = sample.score(model, tokenizer, rows, max_len=20, max_new_tokens=2)
    ids = tokenizer.encode(rows[0]["response"])[:19]
    assert math.isclose(result["nats_per_char"], result["loss"] * 20 / len(tokenizer.decode(ids)), rel_tol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize(("content", "message"), [
    ({"max_new_tokens": "8"}, "max_new_tokens must be a whole number"), ({"max_new_tokens": 8.0}, "max_new_tokens must be"), ({"top_k": 50.0}, "top_k must be"),
    ({"temperature": "x"}, "temperature must be a number"), ({"do_sample": "false"}, "do_sample must be true or false"), ({"length_penalty": "1"}, "length_penalty must be"),
    ({"penalty_alpha": "x"}, "penalty_alpha must be a number"), ({"num_beams": "2"}, "num_beams must be a whole number"), ({"top_p": -0.1}, "top_p must be"), ({"min_new_tokens": 300}, "min_new_tokens must be at most max_new_tokens"), ({"early_stopping": "soon"}, "early_stopping must be")], ids=str)
def test_settings_of_a_model_are_checked(folder, tmp_path, content, message):
    import shutil
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(content))
    code, line = run_here(["--prompt", "你好", "--model", str(tmp_path / "model")])
    assert code == 2 and f"model/generation_config.json: {message}" in line


@pytest.mark.quick
def test_settings_that_we_do_not_have_are_reported(folder, tmp_path):
    import shutil
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "min_p": 0.1, "suppress_tokens": [9], "num_beam_groups": 1, "max_length": None}))
    code, line = run_here(["--prompt", "你好", "--model", str(tmp_path / "model")])
    assert code == 0 and "note: min_p, suppress_tokens of the model's generation_config.json are not supported" in line


@pytest.mark.parametrize("flags", [["--num_beams", "2", "--length_penalty", "1e308"], ["--length_penalty", "nan"], ["--do_sample", "--temperature", "1e-42"],
                                   ["--do_sample", "--repetition_penalty", "1e-300"], ["--max_new_tokens", "99999999999999999999"], ["--device", "meta"], ["--seed", "-1"],
                                   ["--do_sample", "--seed", "99999999999999999999"], ["--do_sample", "--no_repeat_ngram_size", "1", "--min_new_tokens", "900", "--max_new_tokens", "900"],
                                   ["--no_repeat_ngram_size", "1", "--min_new_tokens", "900", "--max_new_tokens", "900"],
                                   ["--num_beams", "2", "--no_repeat_ngram_size", "1", "--min_new_tokens", "900", "--max_new_tokens", "900"]], ids=str)
def test_numbers_out_of_range_are_one_line(folder, flags):
    code, line = run_here(["--prompt", "你好", "--model", str(folder), *flags])
    assert code == 2 and "error: " in line
    assert run_here(["--prompt", "你好", "--model", str(folder), "--penalty_alpha", "0.6", "--top_k", "5000", "--max_new_tokens", "2"])[0] == 0


@pytest.mark.quick
@pytest.mark.parametrize(("flags", "why"), [([], "without --top_k of 2 or more"), (["--top_k", "4", "--do_sample"], "without greedy decoding"),
                                            (["--top_k", "4", "--num_beams", "2"], "without --num_beams 1")], ids=str)
def test_why_contrastive_search_is_off_is_told(folder, flags, why):
    code, line = run_here(["--prompt", "你好", "--model", str(folder), "--penalty_alpha", "0.6", "--max_new_tokens", "2", *flags])
    assert code == 0 and f"--penalty_alpha has no effect {why}" in line


@pytest.mark.quick
def test_an_output_that_is_no_file_or_in_use_is_refused(answered, tmp_path):
    args, out = answered
    for device in ("/dev/full", "/dev/null", str(tmp_path)):
        code, line = run_here(replaced(args, "--output", device))
        assert code == 2 and "is not a file" in line
    assert not Path("/dev/.null.settings").exists()
    before = out.read_bytes()
    out.write_bytes(before[:20])
    with locked(out, ""):
        code, line = run_here(args)
    assert code == 2 and "another process is writing" in line and out.read_bytes() == before[:20]


@pytest.mark.quick
def test_token_ids_of_the_generation_config_are_a_part_of_the_model(answered):
    args, out = answered
    before = out.read_bytes()
    path = Path(args[5]) / "generation_config.json"
    kept = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(kept), "eos_token_id": 9}))
        code, line = run_here(args)
    finally:
        path.write_text(kept)
    assert code == 2 and "another model" in line and out.read_bytes() == before


def test_samples_do_not_depend_on_where_a_run_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "WINDOW", 8)
    tokenizer = Tokenizer.train(["今天天气很好，明天也很好。"] * 20, 300)
    model = ChatLM(ChatLMConfig.preset("demo", vocab_size=len(tokenizer), tie_word_embeddings=False)).eval()
    (tmp_path / "p.txt").write_text("".join("今天" * (1 + i % 7) + "\n" for i in range(30)), "utf-8")
    options, made_by = {"do_sample": True, "max_new_tokens": 6, "temperature": 2.0}, {"seed": 7}

    def answers(name: str) -> str:
        sample.answer_file(model, tokenizer, str(tmp_path / "p.txt"), str(tmp_path / name), 4, 64, options, made_by)
        return (tmp_path / name).read_text("utf-8")
    whole = answers("a.jsonl")
    torch.manual_seed(3)
    assert answers("b.jsonl") == whole and len(whole.splitlines()) == 30
    for lines in (8, 11, 29):  # as a killed run leaves them
        (tmp_path / "b.jsonl").write_text("".join(whole.splitlines(keepends=True)[:lines]) + '{"pro', "utf-8")
        assert answers("b.jsonl") == whole


@pytest.mark.quick
def test_temperature_0_is_called_greedy(capsys):
    config = sample.GenerationConfig(do_sample=True)
    config = sample.chat_command(["/set", "temperature", "0"], config, {})
    assert not config.do_sample and "do_sample = False (temperature 0 is greedy decoding)" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize(("pad", "start"), [(3, 3), (0, 1), (2, 0), (1, 0)])
def test_beam_search_with_other_token_ids_is_transformers(tmp_path, pad, start):
    ids = torch.randint(4, 8, (4, 5), generator=torch.Generator().manual_seed(0))
    for seed in range(4):
        theirs, ours = make_models(tmp_path, seed, vocab_size=8, pad_token_id=pad, decoder_start_token_id=start)
        for options in ({"num_return_sequences": 2, "no_repeat_ngram_size": 2, "length_penalty": -1.0, "max_new_tokens": 12}, {"max_new_tokens": 1}, {"max_new_tokens": 9}):
            expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=3, **options)
            assert torch.equal(generate(ours, ids, num_beams=3, **options), expected), (seed, options)


@pytest.mark.quick
def test_the_greatest_length_penalty_has_an_answer(tmp_path):
    _, ours = make_models(tmp_path, 0)
    for penalty in (-20, 20):
        assert generate(ours, torch.ones(1, 3, dtype=torch.int64), num_beams=2, length_penalty=penalty, max_new_tokens=40, early_stopping="never").size(1) > 1


@pytest.mark.quick
def test_a_line_in_another_encoding_does_not_end_the_chat(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode("gb18030") + "你好\n".encode()), "utf-8"))
    sample.chat(ChatLM.from_pretrained(folder), Tokenizer.from_pretrained(folder), 64, vars(sample.GenerationConfig(max_new_tokens=4)))
    said = capsys.readouterr().out
    assert said.count("error: the input is not in this terminal's encoding") == 1 and said.count("> ") == 3


@pytest.mark.quick
def test_the_name_of_an_output_is_that_of_json_lines(folder, tmp_path):
    (tmp_path / "p.txt").write_text("你好\n")
    for name in ("a.parquet", "a.csv", "a.JSON", "a.jsonl.gz"):
        done = call("--model", str(folder), "--input", str(tmp_path / "p.txt"), "--output", str(tmp_path / name))
        assert done.returncode == 2 and "name it .jsonl" in done.stderr and not (tmp_path / name).exists()


@pytest.mark.quick
def test_choices_without_answers_are_recognized(folder, tmp_path):
    (tmp_path / "t.csv").write_text("id,question,A,B,C,D\n0,首都是____。,巴黎,伦敦,东京,柏林\n", "utf-8")
    done = call("--model", str(folder), "--score", str(tmp_path / "t.csv"))
    assert done.returncode == 2 and "row 1 has no answer (files named test may have none" in done.stderr


@pytest.mark.quick
def test_a_reference_without_triples_counts(folder, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "句子", "response": "[(a,b,c)]"}\n{"prompt": "另一句", "response": "[]"}\n', "utf-8")
    done = call("--model", str(folder), "--score", str(tmp_path / "t.jsonl"), "--max_new_tokens", "4")
    assert {"precision", "recall", "f1"} <= json.loads(done.stdout.splitlines()[-1]).keys()


@pytest.mark.quick
def test_notes_are_given_where_nothing_can_be_set_later(folder):
    flags = ["--model", str(folder), "--temperature", "0.5", "--seed", "3", "--length_penalty", "2"]
    assert call(*flags, "--prompt", "你好", "--max_new_tokens", "2").stderr.count("has no effect") == 3
    assert "has no effect" not in call(*flags, stdin="/quit\n").stderr  # /set do_sample true
