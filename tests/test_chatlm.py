"""The model is transformers' T5: the same logits, loss and text from the same folder, in both directions."""
import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from chatlm import (
    ROW_BLOCK,
    ChatLM,
    ChatLMConfig,
    LinearCrossEntropy,
    LinearLogProbs,
    add_lora,
    init_bigrams,
    relative_position_bucket,
)
from sample import generate

TINY = {"vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}


def make_batch(vocab_size: int = 300, rows: int = 5, source: int = 150, target: int = 140):
    """Random ids with padding on the right, longer than the farthest position bucket."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (rows, source), generator=g)
    mask = torch.ones_like(ids)
    labels = torch.randint(1, vocab_size, (rows, target), generator=g)
    for i in range(1, rows):
        mask[i, source - 30 * i:] = 0
        labels[i, target - 25 * i:] = -100
    return ids * mask, mask, labels


@pytest.fixture(params=itertools.product(["relu", "gated-gelu"], ["tied", "untied", "separate"]), ids="-".join)
def theirs(request, tmp_path):
    """A random model that transformers made and saved. separate: the head has weights of its own in the file."""
    feed_forward, head = request.param
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**TINY, feed_forward_proj=feed_forward, tie_word_embeddings=head == "tied",
                                                decoder_start_token_id=0)).eval()
    model.save_pretrained(tmp_path)
    if head == "separate":
        weights = load_file(tmp_path / "model.safetensors")
        weights["lm_head.weight"] = torch.randn(300, 64)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    return model, tmp_path


def test_logits_and_loss_are_transformers(theirs):
    model, folder = theirs
    ids, mask, labels = make_batch()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, labels=labels)
        ours = ChatLM.from_pretrained(folder)
        logits, loss = ours(ids, mask, labels=labels)
        summed = ours.loss_sum(ids, mask, labels)
    assert (logits - expected.logits).abs().max() < 1e-4
    assert abs(loss - expected.loss) < 1e-5 * max(1, expected.loss)
    assert abs(summed / (labels != -100).sum() - expected.loss) < 1e-5 * max(1, expected.loss)


def test_gradients_are_transformers(theirs):
    model, folder = theirs
    ours = ChatLM.from_pretrained(folder)
    ids, mask, labels = make_batch()
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    (ours.loss_sum(ids, mask, labels) / (labels != -100).sum()).backward()
    expected = dict(model.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, expected[name].grad, rtol=1e-4, atol=1e-6), name


def test_export_loads_in_transformers(theirs, tmp_path):
    _model, folder = theirs
    ours = ChatLM.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "ours")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    ids, mask, labels = make_batch()
    with torch.no_grad():
        assert (again(input_ids=ids, attention_mask=mask, labels=labels).logits - ours(ids, mask, labels=labels)[0]).abs().max() < 1e-4
    assert (tmp_path / "ours" / "generation_config.json").exists()
    assert not list((tmp_path / "ours").glob("*.tmp"))


@pytest.mark.quick
def test_new_model_has_t5s_initialisation(tmp_path):
    torch.manual_seed(0)
    theirs = dict(T5ForConditionalGeneration(T5Config(**TINY, feed_forward_proj="gated-gelu")).named_parameters())
    ours = dict(ChatLM(ChatLMConfig(**TINY, feed_forward_proj="gated-gelu")).named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert p.shape == theirs[name].shape
        assert abs(p.std() - theirs[name].std()) <= 0.15 * theirs[name].std() + 1e-9, name


@pytest.mark.quick
def test_presets_have_their_size():
    with torch.device("meta"):
        model = ChatLM(ChatLMConfig.preset("0.2b"))
    assert model.num_parameters() == 187_692_288
    assert model.num_parameters() + model.shared.weight.numel() == 210_193_152  # the shared matrix twice


@pytest.mark.quick
def test_sharded_weights_load(theirs, tmp_path):
    _, folder = theirs
    whole = load_file(folder / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_text((folder / "config.json").read_text())
    names, weight_map = sorted(whole), {}
    for i in range(2):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({n: whole[n] for n in names[i::2]}, sharded / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    a, b = ChatLM.from_pretrained(folder).state_dict(), ChatLM.from_pretrained(sharded).state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        ChatLM.from_pretrained(sharded)


@pytest.mark.quick
def test_folders_that_are_not_t5_are_refused(theirs, tmp_path):
    _, folder = theirs
    with pytest.raises(FileNotFoundError, match="no config.json"):
        ChatLM.from_pretrained(tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text())
    cases = [({**config, "model_type": "bert"}, "'bert'"), ({**config, "feed_forward_proj": "gated-silu"}, "not supported"),
             ({**config, "d_model": 128}, "do not fit"), ({**config, "num_layers": 4, "num_decoder_layers": 2}, "do not fit")]
    for changed, message in cases:
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            ChatLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config)[:50])
    with pytest.raises(ValueError, match="damaged"):
        ChatLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="missing or damaged"):
        ChatLM.from_pretrained(folder)


@pytest.mark.quick
def test_chunked_loss_is_cross_entropy(monkeypatch):
    monkeypatch.setattr("chatlm.LOSS_CHUNK_BYTES", 4 * 50 * 7)  # seven rows at a time
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(33, 16, generator=g, requires_grad=True)
    weight = torch.randn(50, 16, generator=g, requires_grad=True)
    labels = torch.randint(0, 50, (33,), generator=g)
    for extreme in (1, 40):  # the second: logits in the hundreds
        expected = torch.nn.functional.cross_entropy(extreme * hidden @ weight.T, labels, reduction="sum")
        expected_grads = torch.autograd.grad(3 * expected, (hidden, weight))
        loss = LinearCrossEntropy.apply(extreme * hidden, weight, labels)
        assert torch.allclose(loss, expected, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(3 * loss, (hidden, weight)), expected_grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_chunked_loss_with_nothing_to_predict():
    model = ChatLM(ChatLMConfig(**TINY))
    ids, mask, labels = make_batch()
    loss = model.loss_sum(ids, mask, torch.full_like(labels, -100))
    assert loss == 0
    loss.backward()


def test_position_buckets():
    d = torch.tensor([-1000, -129, -128, -20, -8, -7, -1, 0, 1, 7, 8, 20, 127, 1000])
    assert relative_position_bucket(d, True, 32, 128).tolist() == [15, 15, 15, 10, 8, 7, 1, 0, 17, 23, 24, 26, 31, 31]
    assert relative_position_bucket(d, False, 32, 128).tolist() == [31, 31, 31, 17, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.quick
def test_train_flops_are_torchs_without_attention():
    from torch.utils.flop_counter import FlopCounterMode
    model = ChatLM(ChatLMConfig.preset("demo", vocab_size=500))
    ids, labels = torch.randint(7, 500, (3, 9)), torch.randint(7, 500, (3, 12))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=labels)[1].backward()
    counted = sum(n for operation, n in counter.get_flop_counts()["Global"].items() if str(operation) in ("aten.mm", "aten.addmm"))
    assert model.train_flops(27, 36) == counted


def test_counts_begin_a_model_that_predicts_as_they_do():
    """Against bigram probabilities by textbook formulas, with numpy's singular value decomposition of the whole table."""
    rng, V, width = np.random.default_rng(0), 400, 63
    kinds, kind = rng.dirichlet(np.full(20, 0.1), 20), [0]  # a text that goes from kind to kind, of 20 tokens each
    for _ in range(40000):
        kind.append(rng.choice(20, p=kinds[kind[-1]]))
    text = 20 * np.array(kind) + np.minimum(rng.geometric(0.3, len(kind)), 19)  # number 0 of each kind is never seen
    before, after = text[:-1], text[1:]

    table = np.zeros((V, V))
    np.add.at(table, (before, after), 1)
    p_before, p_after = ((table.sum(axis) + 0.3) / (len(after) + 0.3 * V) for axis in (1, 0))
    weight = np.sqrt(np.outer(p_before, p_after))
    with np.errstate(divide="ignore"):
        likelier = np.maximum(0, np.log(np.maximum(0, table - 0.5) / len(before) / np.outer(p_before, p_after)))
    left, values, right = np.linalg.svd(likelier * weight)  # (V, V), (V,), (V, V)
    logits = np.log(p_after) + left[:, :width] * values[:width] @ right[:width] / weight
    expected = torch.log_softmax(torch.tensor(logits), -1)

    seen = torch.tensor(table.sum(1))

    def divergence(log_p: torch.Tensor) -> float:
        return float(seen @ (expected.exp() * (expected - log_p)).sum(-1) / seen.sum())

    torch.manual_seed(0)
    model = ChatLM(ChatLMConfig.preset("demo", vocab_size=V)).eval()

    def made() -> float:
        """With a row for each token, as the only one that the decoder reads."""
        with torch.no_grad():
            logits = model(torch.full((V, 3), 7), decoder_input_ids=torch.arange(V)[:, None])[0][:, 0]
        return divergence(torch.log_softmax(logits.double(), -1))

    at_random = made()
    init_bigrams(model, torch.tensor(before), torch.tensor(after))
    whole = made()
    with torch.no_grad():  # without the layers that are still random
        for name, p in model.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")) and p is not model.decoder.block[-1].layer[-1].DenseReluDense.wo.weight:
                p.zero_()
    assert made() < 0.15 * divergence(torch.tensor(np.log(p_after))) and whole < 0.3 * at_random
    assert len(torch.unique(model.shared.weight[::20], dim=0)) == 20  # what was not counted stays different
    with pytest.raises(ValueError, match="ReLU"):
        init_bigrams(ChatLM(ChatLMConfig.preset("demo", vocab_size=V, feed_forward_proj="gated-gelu")), torch.tensor(before), torch.tensor(after))


@pytest.mark.quick
@pytest.mark.parametrize("text", [[7, 1], [0, 9, 9, 9, 9, 9, 9], [0, 5, 6] * 3000, list(range(300))], ids=["one pair", "one token", "a circle", "each once"])
def test_little_to_count_does_no_harm(text):
    model = ChatLM(ChatLMConfig.preset("demo", vocab_size=300)).eval()
    init_bigrams(model, torch.tensor(text[:-1]), torch.tensor(text[1:]))
    ids, mask, labels = make_batch()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(ids, mask, labels=labels)[1] < 30


@pytest.mark.quick
@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_load_under_any_of_their_names(tmp_path, kept):
    config = T5Config(**TINY, decoder_start_token_id=0)
    theirs = T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[kept] = weights.pop("shared.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.randint(0, 300, (2, 7))
    assert (ChatLM.from_pretrained(tmp_path)(ids, labels=ids)[0] - theirs(input_ids=ids, labels=ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(("change", "message"), [
    ({"d_model": "32"}, "d_model must be a whole number from 1 to 2147483647, not '32'"), ({"d_ff": None}, "d_ff must be"), ({"num_layers": 10 ** 9}, "num_layers must be a whole number from 1 to 1000"), ({"num_heads": 2.0}, "num_heads must be"),
    ({"num_layers": 0}, "num_layers must be"), ({"num_layers": True}, "num_layers must be"), ({"vocab_size": [90]}, "vocab_size must be"),
    ({"dropout_rate": None}, "dropout_rate must be a number"), ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon must be"), ({"d_kv": -8}, "d_kv must be"),
    ({"eos_token_id": [1, 2]}, r"eos_token_id must be a whole number from 0 to 2147483647, not \[1, 2\]"), ({"eos_token_id": "1"}, "eos_token_id must be"),
    ({"decoder_start_token_id": None}, "decoder_start_token_id must be"), ({"pad_token_id": 300}, "pad_token_id is 300, and the vocabulary has only 300"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false")], ids=str)
def test_values_without_a_meaning_are_one_line(tmp_path, change, message):
    fields = {**T5Config(**TINY).to_dict(), **change}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as error:
        ChatLMConfig.from_pretrained(tmp_path)
    assert "config.json" in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.quick
def test_token_ids_mean_what_they_mean_in_transformers(tmp_path):
    """One [EOS] in a list; a start token that only generation_config.json has; fields that the file leaves out."""
    torch.manual_seed(0)
    theirs = T5ForConditionalGeneration(T5Config(**TINY)).eval()
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "decoder_start_token_id": None, "eos_token_id": [1]}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 5, "eos_token_id": [7], "pad_token_id": 0}))
    config = ChatLMConfig.from_pretrained(tmp_path)
    assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (5, 7, 0)
    ids = torch.randint(8, 90, (4, 7))
    expected = T5ForConditionalGeneration.from_pretrained(tmp_path).generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(generate(ChatLM.from_pretrained(tmp_path), ids, max_new_tokens=20), expected)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "generation_config.json").unlink()
    ours, default = ChatLMConfig.from_pretrained(tmp_path), T5Config()
    for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "dropout_rate", "layer_norm_epsilon"):
        assert getattr(ours, name) == getattr(default, name), name


@pytest.mark.quick
def test_a_loss_without_gradients_is_one_product():
    """With no_grad the gradient of the head would be computed for nothing."""
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
            return func(*args, **(kwargs or {}))

    model = ChatLM(ChatLMConfig.preset("demo", vocab_size=300))
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 5, dtype=torch.int64), "labels": torch.ones(2, 4, dtype=torch.int64)}
    with torch.no_grad():
        hidden = model.decode(model.shift_right(inputs["labels"]), *model.encode(inputs["input_ids"], inputs["attention_mask"]))
        with Products() as whole:
            model.loss_sum(**inputs)
        with Products() as layers:
            model.decode(model.shift_right(inputs["labels"]), *model.encode(inputs["input_ids"], inputs["attention_mask"]))
    assert whole.count - layers.count == 1 and hidden.shape == (2, 4, 128)
    with Products() as trained:
        model.loss_sum(**inputs)
    assert trained.count - layers.count == 3


@pytest.mark.quick
def test_padding_of_the_logits_never_reaches_a_gradient(monkeypatch):
    """bfloat16 products on CPUs read the padding of rows too: it must be finite."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **options: empty(self, *size, **options).fill_(math.nan))
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 128, requires_grad=True), torch.randn(794, 128, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            LinearCrossEntropy.apply(hidden, weight, torch.arange(40)).backward()
        assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_on_cpus_have_few_shapes(dtype):
    """oneDNN compiles 16-bit products for every number of rows: with any lengths, it is a multiple of ROW_BLOCK, or a width of the model."""
    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
                seen.update(args[0].shape + args[1].shape)
            return function(*args, **(kwargs or {}))

    model = ChatLM(ChatLMConfig.preset("demo", vocab_size=300))
    for lora in (False, True):
        if lora:
            add_lora(model, 8, 16.0, ["all"])
        seen: set[int] = set()
        for rows, source, target in ((3, 7, 5), (1, 1, 1), (9, 31, 17), (16, 8, 8)):
            ids, mask, labels = make_batch(300, rows, 300, 250)
            with Shapes(), torch.autocast("cpu", dtype):
                model.loss_sum(ids[:, :source], mask[:, :source], labels[:, :target]).backward()
        with torch.autocast("cpu", dtype):
            shapes = [model.encoder.block[0].layer[-1].DenseReluDense.wi(torch.randn(*shape, 128)).shape for shape in ((0, 3), (2, 0), (), (5,))]
        assert shapes == [(0, 3, 512), (2, 0, 512), (512,), (5, 512)]
        widths = {128, 512, 300} | ({8} if lora else set())
        assert all(size in widths or size % ROW_BLOCK == 0 for size in seen) and len(seen) > len(widths), seen


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130, 500])
@pytest.mark.parametrize("function", [LinearCrossEntropy, LinearLogProbs])
def test_padded_chunks_of_the_loss_are_the_loss(function, rows, monkeypatch):
    """In bfloat16 on a CPU, where rows are padded, against float64: in one chunk and in several."""
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, 96).bfloat16().float(), torch.randn(210, 96).bfloat16().float()
    labels, scale = torch.randint(0, 210, (rows,)), torch.randn(rows)
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logps = (exact_hidden @ exact_weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    total = -logps.sum() if function is LinearCrossEntropy else (logps * scale).sum()
    total.backward()
    for chunk_bytes in (1 << 26, 2 * 210 * 100, 1):
        monkeypatch.setattr("chatlm.LOSS_CHUNK_BYTES", chunk_bytes)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            result = function.apply(h, w, labels)
        (result if function is LinearCrossEntropy else (result * scale).sum()).backward()
        if function is LinearLogProbs:
            torch.testing.assert_close(result.double(), logps, rtol=0.02, atol=0.2)
        for ours, exact in ((h.grad, exact_hidden.grad), (w.grad, exact_weight.grad)):
            assert (ours - exact).norm() < 0.02 * exact.norm()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_that_transformers_saved_load_and_answer(tmp_path, dtype):
    """It keeps some weights of a float16 T5 in float32."""
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**TINY, decoder_start_token_id=0)).save_pretrained(tmp_path / "full")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "full", dtype=dtype).eval()
    theirs.save_pretrained(tmp_path / "half")
    ours = ChatLM.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in ours.parameters()} == {dtype}
    ids = torch.randint(3, 300, (2, 7))
    expected = theirs(input_ids=ids, labels=ids).logits.float()
    assert (ours(ids, labels=ids)[0].float() - expected).abs().max() < 0.05 * expected.abs().max()
    weights = load_file(tmp_path / "full" / "model.safetensors")
    weights["encoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    save_file(weights, tmp_path / "full" / "model.safetensors", {"format": "pt"})
    for wanted in (None, torch.float32):
        with pytest.raises(ValueError, match="quantized weights are not read"):
            ChatLM.from_pretrained(tmp_path / "full", wanted)


@pytest.mark.parametrize(("change", "message"), [
    ({"dense_act_fn": "gelu"}, "dense_act_fn 'gelu' is not supported"), ({"is_gated_act": True}, "is_gated_act True is not supported"),
    ({"relative_attention_max_distance": 8}, "relative_attention_max_distance 8 needs"), ({"relative_attention_num_buckets": 2}, "relative_attention_max_distance"),
    ({"vocab_size": 10 ** 30}, "vocab_size must be"), ({"decoder_start_token_id": 3}, "different values of decoder_start_token_id")], ids=str)
def test_configs_with_another_meaning_are_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({**T5Config(**TINY).to_dict(), "decoder_start_token_id": 0, **change}))
    (tmp_path / "generation_config.json").write_text('{"decoder_start_token_id": 0}')
    with pytest.raises(ValueError, match=message):
        ChatLMConfig.from_pretrained(tmp_path)


@pytest.mark.quick
def test_t5s_other_field_names_and_null_scale_mean_the_same(tmp_path):
    torch.manual_seed(0)
    theirs = T5ForConditionalGeneration(T5Config(**TINY, decoder_start_token_id=0)).eval()
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for name, alias in (("d_model", "hidden_size"), ("num_heads", "num_attention_heads"), ("num_layers", "num_hidden_layers")):
        fields[alias] = fields.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ids = torch.randint(3, 300, (2, 7))
    assert (ChatLM.from_pretrained(tmp_path)(ids, labels=ids)[0] - theirs(input_ids=ids, labels=ids).logits).abs().max() < 1e-4


@pytest.mark.quick
def test_an_index_without_a_map_is_one_line(theirs, tmp_path):
    _, folder = theirs
    (folder / "model.safetensors").unlink()
    for content in ("{}", "[]", "{", '{"weight_map": []}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": "nowhere.safetensors"}}'):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match="damaged"):
            ChatLM.from_pretrained(folder)


@pytest.mark.quick
def test_all_files_of_a_model_have_the_permissions_of_new_files(tmp_path):
    ChatLM(ChatLMConfig.preset("demo", vocab_size=300, d_model=16, d_ff=16)).save_pretrained(tmp_path / "model")
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in (tmp_path / "model").iterdir()} == {(tmp_path / "new").stat().st_mode}
