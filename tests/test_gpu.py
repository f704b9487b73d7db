"""The code on a GPU: any machine checks it on a fake device, a machine with a GPU also runs it.

    python -m pytest tests/test_gpu.py

The fake device is torch's FakeTensorMode: tensors on "cuda" have a shape, a dtype and a device, but
no data. What a GPU refuses raises an error, such as mixed devices, mixed dtypes in a matrix product
or a wrong attention mask. A device sync, where the CPU waits for the GPU, raises DeviceSync.

Shapes: B batch, S source length, T target length, D d_model, V vocabulary.
"""
import argparse
import collections
import contextlib
import ctypes
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import chatlm
import dpo
import sample
import train
from chatlm import ChatLM, ChatLMConfig, LinearCrossEntropy
from data import make_demo
from sample import Decoder, GenerationConfig, generate
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
GPU = "cuda"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
B, S, T, D, V = 4, 9, 7, 128, 300
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# --- the fake device ------------------------------------------------------------------------------


class DeviceSync(RuntimeError):
    """The CPU would wait for the GPU. source: the tensor that is read or copied."""

    def __init__(self, operation, source: Tensor):
        super().__init__(f"{operation} of {tuple(source.shape)} {source.dtype} is a device sync")
        self.source = source


class CheckedOperations(TorchDispatchMode):
    """Raise DeviceSync for a device sync, TypeError for mixed dtypes that a GPU refuses."""

    one_dtype = frozenset(("linear", "matmul", "mm", "bmm", "addmm", "addmm_", "baddbmm", "index_put", "index_put_"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        dtypes = {x.dtype for x in tensors if x.is_floating_point()}
        if name in self.one_dtype and len(dtypes) > 1:
            raise TypeError(f"{func} of {dtypes}")
        if name in ("to", "_to_copy", "copy", "copy_", "lift_fresh"):
            devices = {x.device.type for x in tensors}
            devices |= {x.type for x in leaves if isinstance(x, torch.device)}
            # torch.tensor(data, device="cuda") may copy the data before lift_fresh
            syncs = len(devices) > 1 or name == "lift_fresh" and tensors[0].is_cuda
        else:  # a CPU scalar goes to the GPU with the kernel's arguments
            syncs = len({x.device.type for x in tensors if x.dim()}) > 1
        if syncs:
            raise DeviceSync(func, tensors[0])
        try:
            return func(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise DeviceSync(func, tensors[0]) from None


class CheckedAttention(TorchFunctionMode):
    """Run attention as the memory-efficient kernel. Raise for a mask that it cannot read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.tolist:
            raise DeviceSync(func, args[0])
        if func is F.scaled_dot_product_attention:
            func = self.attention
        return func(*args, **(kwargs or {}))

    def attention(self, q, k, v, attn_mask, scale, dropout_p=0.0) -> Tensor:
        """q (B, H, T, K), k and v (B, H, S, K), mask (B or 1, H or 1, T or 1, S) -> like q."""
        for x in (q, k, v, attn_mask):
            if x.dtype != q.dtype:
                raise TypeError(f"attention of {q.dtype} queries with {x.dtype}")
            if x.stride(-1) != 1:
                raise ValueError(f"last dimension is not contiguous: {x.shape}, {x.stride()}")
        mask = attn_mask.expand(*q.shape[:3], k.size(2))
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, mask, torch.is_grad_enabled(), dropout_p, scale=scale)[0]


@pytest.fixture
def fake_gpu(monkeypatch) -> Iterator[None]:
    """A fake CUDA device with all checks. torch is restored at the end."""
    cuda, meta, guards = 1, 14, [None] * 15  # indices are values of c10::DeviceType
    if not torch.backends.cuda.is_built():  # a build with CUDA has its own device guard
        try:
            guards = (ctypes.c_void_p * 15).in_dll(
                ctypes.CDLL(torch._C.__file__), "_ZN3c104impl26device_guard_impl_registryE")
        except (OSError, ValueError):
            pytest.skip("cannot find the device guards of this torch")
    monkeypatch.setattr(chatlm.compiled_gradient, "is_usable", False)  # it would compile kernels
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    before, guards[cuda] = guards[cuda], guards[meta]  # the guard of "meta" does nothing
    try:
        with FakeTensorMode(), CheckedOperations(), CheckedAttention():
            yield
    finally:
        guards[cuda] = before


class Kernels(TorchDispatchMode):
    """Counts the kernels that a GPU would launch, and the bytes that they read and write. An
    operation that returns one of its inputs, or a view, launches none."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = collections.Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)]
                      for tree in ((args, kwargs), result))
        stored = {x.untyped_storage()._cdata for x in read}
        is_view = all(x.untyped_storage()._cdata in stored for x in made)
        is_written = name.endswith("_") or "out" in (kwargs or {})
        on_gpu = any(x.is_cuda for x in read + made)
        if on_gpu and (is_written or not is_view) and not name.startswith(("empty", "new_empty")):
            self.names[name] += 1
            whole = [x for x in read if x.numel() <= 1 or 0 not in x.stride()]  # not expanded
            new = [x for x in made if not any(x is y for y in read)]
            self.bytes += sum(x.numel() * x.element_size() for x in whole + new)
        return result

    @property
    def total(self) -> int:
        return self.names.total()


class OneKernelNorm(torch.autograd.Function):
    """Stands in for F.rms_norm, which is one kernel on a GPU and several elsewhere: the same number
    of kernels, 1 and 2, on tensors of the same shapes. It needs one dtype, as there."""

    @staticmethod
    def forward(ctx, x, weight):
        assert x.dtype == weight.dtype
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, _ = ctx.saved_tensors
        product = grad * x
        return product, product.sum(tuple(range(x.dim() - 1)))


@pytest.fixture
def counting_gpu(monkeypatch, fake_gpu) -> Iterator[list]:
    """The fake device with F.rms_norm as one kernel. Yields a list of attention masks that the
    kernel would have to copy, because their rows do not begin at multiples of 8."""
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: OneKernelNorm.apply(x, weight))
    attention, copied = CheckedAttention.attention, []

    def checked(self, q, k, v, attn_mask, scale, dropout_p=0.0):
        strides = [n for size, n in zip(attn_mask.shape, attn_mask.stride()[:-1]) if size > 1]
        if any(n % 8 for n in strides):
            copied.append(attn_mask.shape)
        return attention(self, q, k, v, attn_mask, scale, dropout_p)

    monkeypatch.setattr(CheckedAttention, "attention", checked)
    yield copied


def make_model(dtype: torch.dtype = torch.float32, config: ChatLMConfig | None = None) -> ChatLM:
    with torch.device(GPU):
        model = ChatLM(config or ChatLMConfig.preset("demo", vocab_size=V)).eval()
    for module in model.modules():  # Module.to cannot replace fake parameters
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(p.detach().to(dtype)))
    return model


def ones(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=GPU)


@torch.no_grad()
def run_backward(loss: Tensor) -> None:
    """Compute gradients as loss.backward() does, without torch's engine: it needs a CUDA driver.

    The latest operation runs first. Each gradient is reduced to the shape and cast to the dtype of
    its tensor, and gradients of the same tensor are summed.
    """
    grads = {loss.grad_fn: [torch.ones_like(loss)]}  # node -> gradient of each output, or None
    while grads:
        node = max(grads, key=lambda node: node._sequence_nr())
        results = getattr(node, "apply", node)(*grads.pop(node))
        results = results if isinstance(results, tuple) else (results,)
        for (parent, i), grad in zip(node.next_functions, results):
            if parent is None or grad is None:
                continue
            leaf = getattr(parent, "variable", None)
            like = parent._input_metadata[i] if leaf is None else leaf
            assert grad.device == like.device
            grad = grad.sum_to_size(tuple(like.shape)).to(like.dtype)
            if leaf is not None:
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad
                continue
            sums = grads.setdefault(parent, [None] * len(parent._input_metadata))
            sums[i] = grad if sums[i] is None else sums[i] + grad


# --- the checks can fail --------------------------------------------------------------------------


def attend(mask: Tensor) -> Tensor:
    q = ones(B, 2, 8, 16, dtype=torch.float16)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, scale=1.0)


SYNCS = {
    "item": lambda x: x.sum().item(), "if": lambda x: 1 if x.all() else 0, "tolist": Tensor.tolist,
    "nonzero": Tensor.nonzero, "mask": lambda x: x[x > 0], "scalar index": lambda x: x[x.argmax()],
    "list index": lambda x: x[[0, 2]], "repeat": lambda x: x.repeat_interleave(x),
    "cpu": Tensor.cpu, "to": lambda x: torch.arange(3).to(GPU),
    "copy": lambda x: torch.arange(3).copy_(x), "new_tensor": lambda x: x.new_tensor(1),
    "tensor": lambda x: torch.tensor([1], device=GPU),
    "assignment": lambda x: x.__setitem__(0, 1),  # to one element; to more of them it is a kernel
}
REFUSED = {
    "devices": (RuntimeError, lambda x: x + torch.arange(3)),
    "ids on the CPU": (RuntimeError, lambda x: make_model().shared(torch.arange(3))),
    "matrix product": (TypeError, lambda x: x[None].float() @ x[:, None].half()),
    "float32 mask": (TypeError, lambda x: attend(ones(8, 8, dtype=torch.float32))),
    "boolean mask": (TypeError, lambda x: attend(ones(8, 8, dtype=torch.bool))),
    "transposed mask": (ValueError, lambda x: attend(ones(8, 8, dtype=torch.float16).T)),
}


@pytest.mark.quick
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("case", [*SYNCS, *REFUSED])
def test_the_fake_device_raises(fake_gpu, case, inference):
    error, call = REFUSED.get(case) or (DeviceSync, SYNCS[case])
    with torch.inference_mode(inference), pytest.raises(error):
        call(ones(3))


@pytest.mark.quick
def test_a_sync_inside_the_decoder_raises(fake_gpu):
    model = make_model()
    decoder = Decoder(model, ones(B, S))
    model.shared.register_forward_hook(lambda module, args, x: x[0, 0].item())
    with pytest.raises(DeviceSync):
        decoder.step(ones(B))
    with pytest.raises(DeviceSync):
        decoder.select(ones(B) > 0)


# --- on the fake device ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "autocast"), [*((dtype, False) for dtype in DTYPES),
                                                 (torch.float32, True)], ids=str)
def test_encode_and_decode(fake_gpu, dtype, autocast):
    model = make_model(dtype)
    for mask in (ones(B, S), None):
        with torch.autocast(GPU, torch.bfloat16, enabled=autocast), torch.inference_mode():
            encoded, mask = model.encode(ones(B, S), mask)
            hidden = model.decode(model.shift_right(ones(B, T)), encoded, mask)
        assert encoded.shape == (B, S, D) and mask.shape == (B, 1, 1, S)
        assert hidden.shape == (B, T, D) and hidden.is_cuda
        assert autocast or encoded.dtype == mask.dtype == hidden.dtype == dtype


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_its_backward(fake_gpu, autocast):
    model = make_model().train()
    with torch.autocast(GPU, autocast, enabled=autocast is not None):
        hidden = model.decode(model.shift_right(ones(B, T)), *model.encode(ones(B, S)))
        # not loss_sum, which selects labels with a boolean mask: a device sync
        loss = LinearCrossEntropy.apply(hidden.flatten(0, 1), model.head_weight(), ones(B * T))
    run_backward(loss * 0.5)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.is_cuda
    for p in model.parameters():
        assert p.grad.shape == p.shape and p.grad.dtype == p.dtype and p.grad.is_cuda


def saved_bytes(model: ChatLM, rows: int, source: int, target: int, dtype: torch.dtype) -> int:
    """Bytes of the activations that autograd saves in a forward pass in this dtype."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    found = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage()._cdata] = x.untyped_storage()  # kept, so that no two share an id
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast(
            GPU, torch.bfloat16, enabled=dtype == torch.bfloat16):
        model.decode(ones(rows, target), *model.encode(ones(rows, source), ones(rows, source)))
    return sum(storage.nbytes() for i, storage in found.items() if i not in weights)


@pytest.mark.parametrize("length", [32, 320])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("change", [{}, {"feed_forward_proj": "gated-gelu"}], ids=str)
@pytest.mark.parametrize("preset", ["small", "0.2b"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_memory_of_a_micro_batch_is_estimated(counting_gpu, dtype, preset, change, dropout, length):
    """train.activation_bytes covers what is saved, and is no more than 1.4 times as much."""
    config = ChatLMConfig.preset(preset, vocab_size=V, dropout_rate=dropout, **change)
    args = argparse.Namespace(dtype=dtype, max_len=length, dropout=dropout,
                              checkpoint_activations=False)
    model, rows = make_model(config=config).train(), 2560 // length
    saved = saved_bytes(model, rows, length, length, getattr(torch, dtype))
    if dtype == "bfloat16":
        saved -= 2 * model.num_parameters()  # weights, cast
    estimate = rows * 2 * length * train.activation_bytes(config, args)
    assert saved < estimate < 1.4 * saved


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_loss_and_its_backward(fake_gpu, kind):
    logps = [ones(B, dtype=torch.float32).requires_grad_() for _ in range(4)]
    loss, *rewards = dpo.dpo_loss(*logps, beta=0.1, label_smoothing=0.1, loss=kind)
    run_backward(loss)
    assert loss.shape == () and [x.shape for x in rewards] == [(B,), (B,)]
    assert all(x.grad.is_cuda for x in logps)


@pytest.mark.quick
def test_validation_compiles_no_loss(fake_gpu, monkeypatch):
    """For a file of scores, compiling would take longer than it saves."""
    def fail(*args):
        raise AssertionError("compiled")

    monkeypatch.setattr(chatlm.compiled_gradient, "is_usable", True)
    monkeypatch.setattr(chatlm.CompiledFunction, "__call__", fail)
    model, ids = make_model(), ones(B, T)
    with torch.no_grad():
        assert model.loss_sum(ones(B, S), ones(B, S), ids, ones(5)).shape == ()
    with pytest.raises(AssertionError, match="compiled"):
        model.loss_sum(ones(B, S), ones(B, S), ids, ones(5))


@pytest.mark.quick
def test_clip_gradient_does_not_sync(fake_gpu):
    gradient = ones(50, dtype=torch.float32)
    for divisor in (2.0, ones(dtype=torch.float32), ones(dtype=torch.float64)):
        norm = train.clip_gradient(gradient, divisor, 1.0)
        assert norm.shape == () and norm.is_cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows_per_source", [1, 3])
def test_decoder_does_not_sync(fake_gpu, dtype, rows_per_source):
    decoder = Decoder(make_model(dtype), ones(B, S), ones(B, S), rows_per_source)
    decoder.step(ones(B * rows_per_source))
    # keep all rows, then two sources, then repeat rows; a ninth equal step captures a CUDA graph
    for rows, sources in ((B, None), (B, None), (2, ones(2)), (10, None)):
        decoder.select(ones(rows * rows_per_source), sources)
        logits, hidden = decoder.step(ones(rows * rows_per_source))
        assert logits.shape == (rows * rows_per_source, V) and logits.dtype == torch.float32
        assert hidden.shape == (rows * rows_per_source, D) and hidden.dtype == dtype


@pytest.mark.quick
@pytest.mark.parametrize("options", [
    {"repetition_penalty": 1.3}, {"min_new_tokens": 9}, {"do_sample": True, "temperature": 0.7},
    {"do_sample": True, "top_k": 5}, {"do_sample": True, "top_p": 0.9, "num_beams": 3}], ids=str)
def test_process_does_not_sync(fake_gpu, options):
    scores = ones(B, V, dtype=torch.float32)
    scores = GenerationConfig(**options).process(scores, ones(B, T), 1)
    assert scores.shape == (B, V) and scores.dtype == torch.float32 and scores.is_cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("options", "rows"), [
    ({}, [B]), ({"do_sample": True, "top_k": 5, "top_p": 0.9}, [B]), ({"num_beams": 3}, [3 * B]),
    ({"num_beams": 3, "do_sample": True, "early_stopping": True}, [3 * B]),
    ({"top_k": 4, "penalty_alpha": 0.6}, [B, 4 * B])], ids=str)
def test_generate_first_syncs_to_see_which_rows_have_finished(fake_gpu, monkeypatch, dtype,
                                                              options, rows):
    """rows: the batch sizes of Decoder.step up to the first token. The sync reads booleans."""
    step, steps = Decoder.step, []
    monkeypatch.setattr(Decoder, "step", lambda decoder, ids: (steps.append(len(ids)),
                                                               step(decoder, ids))[1])
    with pytest.raises(DeviceSync) as sync:
        generate(make_model(dtype), ones(B, S), ones(B, S), **options)
    assert steps == rows
    assert sync.value.source.dtype == torch.bool and sync.value.source.shape in ((B,), ())


@pytest.mark.quick
def test_no_repeat_ngram_size_is_the_only_known_sync(fake_gpu):
    with pytest.raises(DeviceSync):  # it looks for repeated n-grams with nonzero
        GenerationConfig(no_repeat_ngram_size=2).process(
            ones(B, V, dtype=torch.float32), ones(B, T), 1)


# --- budgets: 0.2b, as many tokens as its default micro-batch has ---------------------------------

LARGE = ChatLMConfig.preset("0.2b", dropout_rate=0.0)
ROWS, LENGTH = 128, 64  # 8,192 source and 8,192 target tokens


def test_the_budget_of_a_micro_batch(counting_gpu):
    """Without the loss, which LinearCrossEntropy's own test covers."""
    model = make_model(config=LARGE).train()
    with Kernels() as kernels, torch.autocast(GPU, torch.bfloat16):
        mask = ones(ROWS, LENGTH)
        encoded, mask = model.encode(mask, mask)
        hidden = model.decode(model.shift_right(ones(ROWS, LENGTH)), encoded, mask)
    assert encoded.dtype == hidden.dtype == mask.dtype == torch.bfloat16
    loss = hidden.sum()
    with kernels:
        run_backward(loss)
    assert kernels.total <= 1700 and kernels.bytes <= 55e9 and counting_gpu == []


@pytest.mark.quick
def test_mask_rows_are_aligned_for_every_length(counting_gpu):
    model = make_model(torch.float16)
    for source, target in ((1, 1), (9, 7), (16, 8), (33, 63)):
        encoded, mask = model.encode(ones(B, source))
        assert encoded.shape == (B, source, D) and mask.shape == (B, 1, 1, source)
        assert model.decode(ones(B, target), encoded, mask).shape == (B, target, D)
    assert counting_gpu == []


def test_the_loss_does_not_sync_and_its_budget(counting_gpu):
    model, n = make_model(config=LARGE).train(), ROWS * LENGTH
    batch = {"input_ids": ones(ROWS, 8), "attention_mask": ones(ROWS, 8),
             "labels": ones(ROWS, LENGTH), "targets": ones(n)}
    with torch.autocast(GPU, torch.bfloat16):
        model.loss_sum(**batch)
    hidden = ones(n, LARGE.d_model, dtype=torch.bfloat16).requires_grad_()
    with Kernels() as kernels, torch.autocast(GPU, torch.bfloat16):
        LinearCrossEntropy.apply(hidden, model.head_weight(), ones(n))
    chunks = -(-n // (chatlm.LOSS_CHUNK_BYTES // (2 * LARGE.vocab_size)))
    assert kernels.total <= 21 * chunks + 10, (kernels.total, chunks)
    frozen = model.head_weight().detach()
    with Kernels() as fewer, torch.autocast(GPU, torch.bfloat16):
        LinearCrossEntropy.apply(hidden, frozen, ones(n))
    assert fewer.names["mm"] == 2 * chunks  # no gradient of a frozen head


@pytest.mark.quick
def test_the_compiled_loss_is_the_plain_one_and_can_fail(capsys):
    torch.manual_seed(0)
    logits, labels = 5 * torch.randn(40, 300), torch.randint(0, 300, (40,))
    expected, found = logits.clone(), logits.clone()
    loss = chatlm.logits_to_gradient(expected, labels)
    compiled = chatlm.CompiledFunction(chatlm.plain_gradient, backend="aot_eager")
    assert compiled.is_usable and float(compiled(found, labels)) == pytest.approx(float(loss))
    assert torch.allclose(found, expected, atol=1e-6)

    def broken(graph, inputs):
        raise RuntimeError("no C compiler")

    broken = chatlm.CompiledFunction(chatlm.plain_gradient, backend=broken)
    assert float(broken(logits, labels)) == pytest.approx(float(loss)) and not broken.is_usable
    assert torch.allclose(logits, expected, atol=1e-6) and "not compiled" in capsys.readouterr().err


def test_the_budget_of_a_dpo_micro_batch(counting_gpu):
    """Prompts, chosen and rejected answers in one pass each; the encoder runs once."""
    model = make_model(config=LARGE).train()
    names = ("input_ids", "attention_mask", "chosen_labels", "rejected_labels")
    batch = {name: ones(ROWS, LENGTH) for name in names}
    batch |= {f"{name}_targets": ones(ROWS * LENGTH) for name in ("chosen", "rejected")}
    with Kernels() as kernels, torch.autocast(GPU, torch.bfloat16):
        chosen, rejected = dpo.pair_logps(model, batch)
    loss = dpo.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0]
    with kernels:
        run_backward(loss)
    assert kernels.total <= 3600 and kernels.bytes <= 135e9, (kernels.total, kernels.bytes)


@pytest.mark.parametrize(("name", "most"), [("adafactor", 250), ("adamw", 20)])
def test_the_budget_of_an_optimizer_step(fake_gpu, name, most):
    model = make_model(config=LARGE)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in train.make_optimizers(model, name, 1e-3, 0.01):
        optimizer.step()  # allocates its state
        with Kernels() as kernels:
            optimizer.step()
    assert 0 < kernels.total <= most, kernels.names


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 190), (torch.bfloat16, 160)], ids=str)
def test_the_budget_of_a_decoding_step(counting_gpu, dtype, most):
    decoder, ids = Decoder(make_model(dtype, LARGE), ones(16, 61), ones(16, 61)), ones(10)
    for _ in range(3):
        decoder.step(ones(16))
    decoder.select(ids, ids)
    with Kernels() as kernels:
        decoder.step(ids)
    assert 0 < kernels.total <= most and counting_gpu == [], kernels.names


def test_float16_answers_fit_in_512_mb(fake_gpu):
    """Weights and cache leave 85 MB of 512: 45 for kernels, graphs and workspaces (an estimate), and a margin of 40."""
    model = make_model(torch.float16, LARGE).requires_grad_(False)
    sample.pack(model)
    decoder = Decoder(model, ones(1, 200), ones(1, 200))
    for _ in range(3):
        decoder.step(ones(1))
    kept = [*model.parameters(), decoder.cache, decoder.mask, decoder.masked_bias, decoder.sources]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
    assert len(storages) == len(kept) - 2 * len(model.decoder.block)  # q, k and v are parts of one tensor
    assert 375e6 < sum(storages.values()) < 472e6 - 45e6


def test_a_decoder_leaves_frozen_weights_as_they_are(fake_gpu):
    """Only a model that was loaded to answer keeps one copy: training goes on after answers are scored."""
    model = make_model()
    model.decoder.requires_grad_(False)
    before = [(p.untyped_storage()._cdata, p.is_inference()) for p in model.parameters()]
    Decoder(model, ones(1, 7), ones(1, 7)).step(ones(1))
    assert [(p.untyped_storage()._cdata, p.is_inference()) for p in model.parameters()] == before


# --- the choice of a device -----------------------------------------------------------------------


def fake_driver(monkeypatch, count: int) -> list:
    """torch.cuda reports count GPUs. Returns the arguments of set_device and enable_cudnn_sdp."""
    calls = []
    monkeypatch.setattr(sample.os, "environ", dict(sample.os.environ))
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    for name, value in (("is_available", lambda: count > 0), ("device_count", lambda: count),
                        ("current_device", lambda: 0), ("set_device", calls.append)):
        monkeypatch.setattr(torch.cuda, name, value)
    return calls


@pytest.mark.quick
def test_segments_of_gpu_memory_may_grow(monkeypatch):
    fake_driver(monkeypatch, 1)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        sample.os.environ.pop(name, None)
    sample.pick_device(None)
    assert sample.os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    sample.os.environ["PYTORCH_ALLOC_CONF"] = "max_split_size_mb:64"
    sample.pick_device(None)
    assert sample.os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"


def join_as_rank_1(monkeypatch, device: str | None, gpus: int = 2) -> dict:
    """Ranks.join in the second of two processes. Returns the arguments of init_process_group."""
    fake_driver(monkeypatch, gpus)
    given = {}
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"),
                        ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setitem(sample.os.environ, name, value)
    monkeypatch.setattr(train.dist, "rendezvous", lambda url: iter([(None, 1, 2)]))
    monkeypatch.setattr(train.dist, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(train.dist, "init_process_group",
                        lambda backend, **options: given.update(backend=backend, **options))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    ranks = train.Ranks.join(device)
    return {**given, "device": ranks.device}


@pytest.mark.quick
def test_nccl_waits_for_hours_and_knows_its_device(monkeypatch):
    given = join_as_rank_1(monkeypatch, None)
    assert given["backend"] == "nccl" and given["timeout"].total_seconds() >= 12 * 3600
    assert given["device"] == given["device_id"] == torch.device("cuda", 1)
    assert join_as_rank_1(monkeypatch, "cpu")["device_id"] is None


@pytest.mark.quick
@pytest.mark.parametrize(("device", "gpus", "message"), [
    ("cuda:0", 2, "--device cuda:0 is one GPU for 2 processes"),
    (None, 1, "2 processes need as many GPUs, and this machine has 1: --nproc_per_node=1"),
    ("cuda", 1, "this machine has 1")])
def test_every_process_needs_a_gpu_of_its_own(monkeypatch, device, gpus, message):
    with pytest.raises(ValueError, match=message):
        join_as_rank_1(monkeypatch, device, gpus)


def decoder_with_graphs(monkeypatch, graph) -> tuple[Decoder, Tensor]:
    """A decoder on the CPU that can replay, with `graph` in place of torch.cuda.graph; and ids."""
    for name, value in (
            ("graph", graph), ("device", lambda device: contextlib.nullcontext()),
            ("stream", lambda stream: contextlib.nullcontext()), ("Stream", lambda device: object()),
            ("current_stream", lambda device: None),
            ("CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))):
        monkeypatch.setattr(torch.cuda, name, value)
    model, ids = ChatLM(ChatLMConfig.preset("demo", vocab_size=V)).eval(), torch.ones(B, S, dtype=torch.int64)
    decoder = Decoder(model, ids, static=True)
    decoder.step(ids[:, 0])
    return decoder, ids[:, 0]


@pytest.mark.quick
def test_graphs_are_captured_while_other_threads_use_the_gpu(monkeypatch):
    """A thread that pins memory or reads TensorBoard's scalars must not end the capture. The graphs
    of one decoder share a stream, those of two do not."""
    options = []

    @contextlib.contextmanager
    def graph(*args, **kwargs):
        options.append(kwargs)
        yield

    for _ in range(2):
        decoder, ids = decoder_with_graphs(monkeypatch, graph)
        with torch.inference_mode():
            assert torch.equal(decoder.replay(ids)[0], decoder.graphs[B].logits)
            decoder.select(torch.arange(2), torch.arange(2))
            decoder.replay(ids[:2])
    assert [o["capture_error_mode"] for o in options] == ["thread_local"] * 4
    a, b, c, d = (o["stream"] for o in options)
    assert a is b and c is d and a is not c


@pytest.mark.quick
@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing"), torch.OutOfMemoryError("full")])
def test_decoding_goes_on_without_a_graph_that_cannot_be_captured(monkeypatch, capsys, error):
    @contextlib.contextmanager
    def graph(*args, **kwargs):
        yield
        raise error

    decoder, ids = decoder_with_graphs(monkeypatch, graph)
    with torch.inference_mode():
        expected = decoder.forward(ids, decoder.masked_bias)
        if isinstance(error, torch.OutOfMemoryError):  # a smaller batch helps
            with pytest.raises(torch.OutOfMemoryError):
                decoder.replay(ids)
            return
        for one, other in zip(decoder.replay(ids), expected):
            assert torch.equal(one, other)
    assert not decoder.can_capture and not decoder.graphs
    assert "without a CUDA graph" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(("name", "index"), [(None, 0), ("cuda", 0), ("cuda:1", 1)])
def test_pick_device_selects_a_gpu_by_index(monkeypatch, name, index):
    calls = fake_driver(monkeypatch, 2)
    assert sample.pick_device(name) == torch.device("cuda", index)
    assert calls == [torch.device("cuda", index), False]


@pytest.mark.quick
@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_pick_device_names_the_flag_of_a_missing_gpu(monkeypatch, name, count):
    fake_driver(monkeypatch, count)
    with pytest.raises(ValueError, match=f"--device {name}"):
        sample.pick_device(name)


@pytest.mark.quick
def test_without_a_gpu_pick_device_takes_the_cpu(monkeypatch):
    calls = fake_driver(monkeypatch, 0)
    assert sample.pick_device(None) == torch.device("cpu") and not calls


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return sample.pick_device(GPU)  # as the scripts do: it also turns cuDNN attention off


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A folder with train.parquet and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("gpu")
    prompts, responses = zip(*make_demo()[0][:4000])
    pq.write_table(pa.table({"prompt": prompts, "response": responses}), folder / "train.parquet")
    Tokenizer.train([*prompts, *responses], 1400).save_pretrained(folder)
    return folder


MEASURE = """
import runpy, sys, torch
sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("reserved", torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0)
"""


def reserved_by(script: str, *args: str) -> int:
    """Run a script. Returns the largest number of bytes that it reserves on the GPU."""
    ran = subprocess.run([sys.executable, "-c", MEASURE, script, *args], capture_output=True,
                         text=True, timeout=300, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.splitlines()[-1].split()[1])


@needs_gpu
@pytest.mark.parametrize("options", [
    {}, {"num_beams": 4}, {"num_beams": 3, "no_repeat_ngram_size": 2},
    {"top_k": 4, "penalty_alpha": 0.6}], ids=str)
def test_a_gpu_gives_the_tokens_of_a_cpu(gpu, options):
    torch.manual_seed(0)
    config = ChatLMConfig.preset("demo", vocab_size=300, initializer_factor=2.0)
    model = ChatLM(config).eval()
    ids, mask = torch.randint(7, 300, (5, 12)), torch.ones(5, 12, dtype=torch.int64)
    mask[1, 4:] = mask[3, 9:] = 0
    expected = generate(model, ids, mask, max_new_tokens=40, **options)
    tokens = generate(model.to(gpu), ids.to(gpu), mask.to(gpu), max_new_tokens=40, **options)
    assert torch.equal(tokens.cpu(), expected)


@needs_gpu
def test_float16_answers_within_512_mb(pairs):
    model = ChatLM(ChatLMConfig.preset("0.2b"))
    model.save_pretrained(pairs)
    reserved = reserved_by(
        "sample.py", "--model", str(pairs), "--prompt", "今天天气怎么样？" * 8, "--device", GPU,
        "--dtype", "float16", "--min_new_tokens", "128", "--max_new_tokens", "128")
    assert 2 * model.num_parameters() < reserved < 512 << 20


def train_losses(pairs: Path, out: Path, *flags: str) -> tuple[list[float], int]:
    """Train on pairs. Returns the loss of every step and the bytes reserved on the GPU."""
    reserved = reserved_by("train.py", "--data", str(pairs / "train.parquet"), "--tokenizer",
                           str(pairs), "--out_dir", str(out), "--workers", "0", *flags)
    log = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in log if "loss" in line], reserved


@needs_gpu
@pytest.mark.parametrize(("dtype", "close"),
                         [("float32", 1e-3), ("bfloat16", 2e-2), ("float16", 2e-2)])
@pytest.mark.parametrize("flags", [[], ["--compile"], ["--checkpoint_activations"]], ids=str)
def test_a_gpu_trains_as_a_cpu_does(pairs, tmp_path, dtype, close, flags):
    common = ["--preset", "demo", "--max_steps", "30", "--batch_tokens", "2048",
              "--micro_batch_tokens", "1024", "--max_len", "40", "--seed", "3"]
    expected, _ = train_losses(pairs, tmp_path / "cpu", *common, "--device", "cpu",
                               "--dtype", "float32")
    losses, _ = train_losses(pairs, tmp_path / "gpu", *common, "--device", GPU,
                             "--dtype", dtype, *flags)
    assert len(losses) == 30 and losses[:5] == pytest.approx(expected[:5], rel=close)
    assert sum(losses[-10:]) == pytest.approx(sum(expected[-10:]), rel=5 * close)


@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_large_model_trains_within_4_gb(pairs, tmp_path, dtype):
    tokenizer = Tokenizer.from_pretrained(pairs)
    vocab = tokenizer.vocab + [f"<{i}>" for i in range(len(tokenizer), 29298)]
    Tokenizer(vocab, tokenizer.merges).save_pretrained(tmp_path)
    _, reserved = train_losses(
        pairs, tmp_path / "large", "--preset", "0.2b", "--tokenizer", str(tmp_path),
        "--micro_batch_tokens", "640", "--batch_tokens", "640", "--max_len", "320",
        "--max_steps", "4", "--device", GPU, "--dtype", dtype, "--optimizer", "adafactor")
    assert reserved < 4e9
