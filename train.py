"""Training: pre-training and fine-tuning (SFT) are one loop.

    python train.py                                  the demo: data, tokenizer, model, answers
    python train.py --data A.parquet --valid V.parquet --preset small --out_dir out
    python train.py --init_from out --data S.parquet --valid V.parquet --out_dir sft
    python train.py --out_dir out                    resume a run with its own settings
    torchrun --standalone --nproc_per_node=2 train.py ...           the same, in two processes

The model predicts the next token of a response, given the prompt and the tokens before it. The loss
is the mean of -log p(right token), in nats. Training repeats one step:

    loss      how wrong are the predictions on a group of pairs?
    backward  the gradient: how does the loss change with each weight?
    step      move every weight a little against its gradient

PairStream defines one sequence of batches. A step takes the next group of them, its micro-batches,
and shares them among the processes (ranks):

    sequence   b0 b1 b2 b3 | b4 b5 b6 b7 | ...       rank 0 of 2 takes b0 b2, rank 1 takes b1 b3
    gradient = sum of the gradients of all micro-batches / target tokens in the group

For example, micro-batches with 30 and 10 target tokens and loss sums of 90 and 50 nats: the loss is
(90 + 50) / 40 = 3.5 nats per token, on one rank or on two. So the result does not depend on the
number of ranks, nor on restarts: a checkpoint holds the weights, the optimizer's state and the
position in the sequence, and dropout is seeded by the step. A run that was killed continues with
exactly the same losses.

The learning rate rises during warmup and then falls (cosine):

    lr |   .--.
       |  /     '-.            warmup: the optimizer first has to learn the size of the gradients
       | /          '-.        decay: small steps at the end settle into a minimum
       +----------------- step

Read Trainer first. Try next: change --lr by a factor of 3 in both directions and compare log.jsonl;
stop a run with Ctrl-C, start it again and compare the losses with a run that was not stopped.
"""
import argparse
import contextlib
import copy
import ctypes
import datetime
import gc
import html
import importlib
import inspect
import json
import math
import os
import pickle
import re
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import sample
from chatlm import (
    ADAPTER_FILES,
    COUNTS_NEED,
    MODEL_FILES,
    PRESETS,
    ChatLM,
    ChatLMConfig,
    add_lora,
    find_linear,
    find_targets,
    fits_counts,
    init_bigrams,
    save_adapter,
)
from data import (
    PAIR,
    AgreedError,
    ArgumentParser,
    PairStream,
    hash_file,
    hash_files,
    memory_hint,
    note_once,
    number,
    run,
    write_errors,
    write_file,
)
from tokenizer import Tokenizer

TIMEOUT = datetime.timedelta(days=2)  # ranks wait while the first one trains a tokenizer
# the torchrun that started this process, the same after a restart; "" without torchrun
LAUNCHER = os.environ.get("TORCHELASTIC_RUN_ID", "")
LAUNCHER += f" {os.getppid()}" if LAUNCHER else ""
MAX_BAD_STEPS = 10  # in a row, then training stops
MUST_BE_SHARED = "must be on a file system that all machines share"
EXPORTED = (*MODEL_FILES, *ADAPTER_FILES, "generation_config.json", "tokenizer.json",
            "tokenizer_config.json", "special_tokens_map.json")
# dense, by NVIDIA's data sheets
BF16_TERAFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L40": 181,
                  "L4": 121, "A10G": 70, "A10": 125, "A5000": 111, "4090": 165, "3090": 71,
                  "4060 Ti": 44}
# limit oneDNN's per-shape kernel cache, which would fill gigabytes; padded rows need few kernels
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


# --- the loop -------------------------------------------------------------------------------------


class Objective:
    """The loss of a run, its validation and its final report: ResponseLoss here, Preference in
    dpo.py."""
    extra: tuple[str, ...] = ()  # names of the extra sums; their means are logged
    shown: tuple[str, ...] = ("loss",)  # in the progress line

    def __init__(self, settings: Any, ranks: "Ranks", model: ChatLM, tokenizer: Tokenizer,
                 init_hash: str | None):
        """settings: Settings, or a subclass. init_hash: see make_model. Raises ValueError if
        --valid has no usable row."""
        self.settings, self.ranks, self.model, self.tokenizer = settings, ranks, model, tokenizer
        self.init_hash = init_hash
        self.batches: list[dict] = []  # this rank's share of --valid
        if settings.valid:
            stream = make_stream(settings, ranks, tokenizer, settings.valid_files)
            self.batches = list(stream.one_epoch())
            if not any(ranks.all_gather(len(self.batches))):
                raise AgreedError(f"{settings.valid} has no usable row")

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.settings.dtype)
        return torch.autocast(self.ranks.device.type, dtype, enabled=dtype != torch.float32)

    def loss(self, batch: dict, part: str = "data") -> tuple[Tensor, ...]:
        """Loss sum, normalizer and extra sums, () each, of a batch from to_device. part: data or
        valid."""
        raise NotImplementedError

    def evaluate(self) -> dict:
        """Means over --valid: val_loss, and val_NAME of each extra sum."""
        sums = torch.zeros(2 + len(self.extra), dtype=torch.float64, device=self.ranks.device)
        for batch in self.batches:
            values = self.loss(to_device(batch, self.ranks.device), "valid")
            sums += torch.stack([x.double() for x in values])
        total, normalizer, *extra = self.ranks.all_reduce(sums).tolist()
        means = {f"val_{name}": x / normalizer for name, x in zip(self.extra, extra)}
        return {"val_loss": total / normalizer, **means}

    def score(self) -> dict:
        """Scores of answers to held-out prompts, on the first rank."""
        raise NotImplementedError

    def report_results(self, state: "State", report: "Report") -> None:
        """Print the results of a finished run, on the first rank."""

    def initialize(self, stream: PairStream) -> None:
        """Initialize the weights of a new run."""

    def export(self, folder: Path) -> None:
        """Write a model folder, or with LoRA an adapter folder. Files of the other kind, of an
        earlier run, are deleted."""
        if self.settings.lora_rank:
            save_adapter(self.model, folder, self.settings.init_from, self.init_hash or "")
            data.delete_files(folder, MODEL_FILES)
        else:
            self.model.save_pretrained(folder)
            data.delete_files(folder, ADAPTER_FILES)
        self.tokenizer.save_pretrained(folder)


class Trainer:
    """One training run. A step, which every rank takes together:

        for micro-batch in this rank's share of the next group:
            loss, normalizer = objective.loss(micro-batch)     # sums over the micro-batch
            gradient += d loss
        all-reduce gradient, loss and normalizer               # the only communication
        clip(gradient / normalizer); optimizer.step()

    The normalizer is the number of target tokens (SFT) or of pairs (DPO) of the whole group.
    """

    def __init__(self, objective: Objective, stream: PairStream, identity: dict):
        self.objective, self.stream, self.identity = objective, stream, identity
        self.settings, self.ranks, self.model = objective.settings, objective.ranks, objective.model
        self.out_dir, self.device = Path(self.settings.out_dir), self.ranks.device
        self.optimizers = make_optimizers(self.model, self.settings.optimizer, self.settings.lr,
                                          self.settings.weight_decay)
        self.state = State()
        self.bad_in_a_row = 0
        self.peak_flops = self.ranks.world_size * peak_flops(self.device)
        self.kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        if self.device.type == "cpu":  # where the backward pass of flash attention is slower
            self.kernels = [SDPBackend.MATH]

    def start(self, saved: dict | None) -> None:
        """Resume from the content of a checkpoint, or initialize a new run."""
        self.stop = Stop()
        self.is_new = not saved
        if saved:
            load_checkpoint(saved, self)
        else:
            self.objective.initialize(self.stream)
        self.ranks.barrier()
        # later steps are taken again, so their checkpoints must not stay the newest
        folder = self.out_dir / "checkpoint"
        checkpoints = list_checkpoints(folder) if self.ranks.is_main else []
        later = [path for path in checkpoints if step_of(path) > self.state.step]
        for path in later:
            path.unlink()
        if self.ranks.is_main and LAUNCHER:  # see find_checkpoint
            folder.mkdir(exist_ok=True)
            write_file(folder / "launcher", LAUNCHER)
        self.report = Report(self.out_dir, self.ranks.is_main, self.state.step)
        if later:
            self.report.say(f"deleted {len(later):,} checkpoints of later steps")
        if saved:
            self.report.say(f"resuming from {saved['path']}: step {self.state.step:,}, "
                            f"{self.state.tokens:,} tokens")
            saved.clear()
        keep_freed_memory()  # only now, so that the memory of initialization is returned first
        # one flat gradient (P,), of which every p.grad is a view: one all-reduce, one norm
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        sizes = [p.numel() for p in parameters]
        self.gradient = torch.zeros(sum(sizes), device=self.device)
        for p, part in zip(parameters, self.gradient.split(sizes)):
            p.grad = part.view_as(p)
        self.reducer = GradientReducer(parameters, self.gradient, self.ranks)

    def fit(self, saved: dict | None) -> None:
        """Train until a limit is reached. saved: see start. Exits with status 128 + N after
        signal N."""
        settings = self.settings
        self.start(saved)
        at_start = done = self.progress()
        if done >= 1 and self.ranks.is_main:  # it may have been killed before the export
            self.objective.export(self.out_dir)
            self.report.say("nothing is left to train")
        self.tick_s = time.perf_counter()
        stopping = False
        while done < 1 and not stopping:
            values, stopping = self.train_step(done)
            done = self.progress()
            if done >= 1 and (self.bad_in_a_row or not self.has_finite_weights()):
                self.fail()
            if not self.bad_in_a_row:
                share = min(1.0, (done - at_start) / (1 - at_start))
                self.report.show(values, self.objective.shown, self.stream.epoch, share)
            if settings.valid and (self.due(settings.eval_every) or done >= 1):
                self.evaluate()
            if settings.valid and self.due(settings.bleu_every) and done < 1:
                self.score()
            if self.due(settings.save_every) or done >= 1 or stopping:
                self.save(stopping)
        self.stream.close()
        self.report.close()
        self.stop.restore()
        if stopping:
            same = "the same command" + " without --resume" * (settings.resume != "auto")
            end = f" and saved; {same} resumes the run"
            if not self.has_finite_weights():
                end = f"; {same} goes on from the newest checkpoint, if there is one"
            self.report.say(f"stopped at step {self.state.step:,}{end}")
            self.ranks.leave()
            sys.exit(128 + (self.stop.signal or signal.SIGTERM))

    def due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def progress(self) -> float:
        """The share of the training that is done, 0 to 1 or a little more."""
        s = self.settings
        if s.max_steps:
            return self.state.step / s.max_steps
        if s.time_limit:
            return self.state.elapsed_s / s.time_limit
        return self.stream.epoch / s.epochs

    def train_step(self, done: float) -> tuple[dict, bool]:
        """Take one step. done: see progress. Returns the values that were logged, and whether any
        rank was asked to stop."""
        s, state, start_s = self.settings, self.state, time.perf_counter()
        min_lr = s.lr / 100 if s.min_lr is None else s.min_lr
        lr = learning_rate(s.schedule, done, state.step, s.lr, min_lr, s.warmup_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        # keep gradients within float16's range; the normalizer is known only after the all-reduce
        is_half = s.dtype == "float16"
        scale = (state.loss_scale if is_half else 1.0) / s.batch_tokens
        total = self.compute_gradient(scale)
        normalizer = max(1.0, total["normalizer"])
        finite, overflow = math.isfinite(total["loss"]), not math.isfinite(total["norm"])
        if finite and not overflow:
            for optimizer in self.optimizers:
                optimizer.step()
        if is_half and finite:
            self.adapt_loss_scale(overflow)
        tokens = int(total["source"] + total["target"])
        state.step += 1
        state.tokens += tokens
        state.elapsed_s += total["seconds"]
        state.stream = dict(self.stream.state)
        step_s = time.perf_counter() - start_s
        values = {"step": state.step, "loss": total["loss"] / normalizer, "lr": lr,
                  "tokens": state.tokens, "tok_per_s": tokens / step_s, "elapsed": state.elapsed_s,
                  **{name: total[name] / normalizer for name in self.objective.extra}}
        if self.peak_flops:
            flops = self.model.train_flops(total["source"], total["target"])
            values["mfu"] = flops / step_s / self.peak_flops
        self.report.log(values)
        can_lower_scale = is_half and state.loss_scale >= 1  # then an overflow is normal
        self.count_bad_steps(not finite or overflow and not can_lower_scale)
        return values, total["stops"] > 0

    def compute_gradient(self, scale: float) -> dict[str, float]:
        """Run this rank's micro-batches of the next group, and all-reduce. self.gradient becomes
        the clipped mean gradient. scale: of the loss in backward. Returns sums over the ranks by
        name, and the norm of the mean gradient before clipping."""
        self.model.train()
        self.gradient.zero_()
        sums = torch.zeros(2 + len(self.objective.extra), dtype=torch.float64, device=self.device)
        source = target = 0
        ranks, batches = self.ranks, list(self.stream.next_group())
        for i, batch in enumerate(batches):
            if i == len(batches) - 1:
                self.reducer.start()
            tensors = to_device(batch, self.device)
            source += int(batch["attention_mask"].sum())
            target += sum(len(x) for name, x in tensors.items() if name.endswith("targets"))
            place = ranks.rank + i * ranks.world_size  # in the group
            seed = f"{self.settings.seed} {self.state.step} {place}".encode()
            torch.manual_seed(xxhash.xxh3_64_intdigest(seed) >> 1)
            with sdpa_kernel(self.kernels):  # also for backward, which may recompute activations
                with self.objective.autocast():
                    loss, *others = self.objective.loss(tensors)
                (loss * scale).backward()
            sums += torch.stack([x.detach().double() for x in (loss, *others)])
        self.reducer.finish()
        now_s = time.perf_counter()
        seconds, self.tick_s = now_s - self.tick_s, now_s
        counts = torch.tensor([source, target, seconds if ranks.is_main else 0,
                               self.stop.signal > 0], dtype=torch.float64)
        sums = ranks.all_reduce(torch.cat([sums, counts.to(self.device, non_blocking=True)]))
        divisor = sums[1].clamp(min=1) * scale
        norm = clip_gradient(self.gradient, divisor, self.settings.grad_clip)
        values = torch.cat([sums, norm.double()[None]]).tolist()  # the only device sync
        return dict(zip(["loss", "normalizer", *self.objective.extra, "source", "target",
                         "seconds", "stops", "norm"], values))

    def adapt_loss_scale(self, overflow: bool) -> None:
        """float16: an overflow halves the loss scale, 1,000 steps without one double it."""
        state = self.state
        state.scaled_steps = 0 if overflow else state.scaled_steps + 1
        if overflow or state.scaled_steps % 1000 == 0:
            state.loss_scale *= 0.5 if overflow else 2.0

    def count_bad_steps(self, bad: bool) -> None:
        """Report a skipped step. Raises ValueError after MAX_BAD_STEPS in a row."""
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        self.state.bad_steps += bad
        if bad:
            self.report.say(f"step {self.state.step:,}: the loss or its gradient is not finite; "
                            "the step was skipped")
        if self.bad_in_a_row == MAX_BAD_STEPS:
            self.fail()

    def has_finite_weights(self) -> bool:
        sums = [p.detach().sum(dtype=torch.float32) for p in self.model.parameters()]
        return bool(torch.stack(sums).isfinite().all())

    def fail(self) -> None:
        """Raise ValueError: no finite loss, or no finite weights, any more."""
        last_step = self.state.step - self.bad_in_a_row  # it made these weights; later ones failed
        before = [path for path in list_checkpoints(self.out_dir / "checkpoint")
                  if step_of(path) < last_step]
        kept = ""
        if before:
            path = shlex.quote(str(before[0]))
            kept = f"; resume from an earlier checkpoint with --resume {path}"
        what = "the weights are not finite any more"
        if self.bad_in_a_row:
            what = f"no finite loss in {self.bad_in_a_row} steps in a row"
        raise ValueError(f"{what}: lower --lr or choose another --dtype{kept}")

    def evaluate(self) -> None:
        """Validate; export the model to best/ if its loss is the lowest so far."""
        self.model.eval()
        with torch.no_grad(), self.objective.autocast():
            values = self.objective.evaluate()
        best = values["val_loss"] < self.state.best_val
        self.report.log({"step": self.state.step, **values, "elapsed": self.state.elapsed_s})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.report.say(f"step {self.state.step:,}  {shown}" + "  (best)" * best)
        if best:
            self.state.best_val = values["val_loss"]
            if self.ranks.is_main:
                self.objective.export(self.out_dir / "best")

    def score(self) -> None:
        self.model.eval()
        if self.ranks.is_main:
            values = self.objective.score()
            self.report.log({"step": self.state.step, **values})
            shown = "  ".join(f"{name} {value:.2f}" for name, value in values.items())
            self.report.say(f"step {self.state.step:,}  {shown}")
        self.ranks.barrier()

    def save(self, stopping: bool) -> None:
        """Save a checkpoint, then export: a model without a checkpoint could not be resumed.

        After a bad step the weights may be broken. Then nothing is saved, unless the run stops:
        then a checkpoint is, nothing is exported, and older checkpoints stay."""
        is_bad = self.bad_in_a_row > 0
        if not self.has_finite_weights() or is_bad and not stopping:
            self.report.say("not saved, because the loss or the weights are not finite")
        elif self.ranks.is_main and is_bad:
            save_checkpoint(self, keep=sys.maxsize)
        elif self.ranks.is_main:
            save_checkpoint(self, self.settings.keep)
            self.objective.export(self.out_dir)
            if self.is_new and self.state.best_val == math.inf:
                best = self.out_dir / "best"  # of an earlier run
                data.delete_files(best, EXPORTED)
                with contextlib.suppress(OSError):  # there may be files of other programs
                    best.rmdir()
        self.ranks.barrier()


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch (see PairStream) on a device, with the flat positions of target tokens: "targets" for
    "labels", "chosen_targets" for "chosen_labels", ... They are found on the CPU, so there is no
    device sync. Copies from pinned memory overlap with computing."""
    targets = {name.replace("labels", "targets"): find_targets(x)
               for name, x in batch.items() if name.endswith("labels")}
    tensors = {**batch, **targets}
    if device.type == "cuda":
        tensors = {name: x.pin_memory() for name, x in tensors.items()}
    return {name: x.to(device, non_blocking=True) for name, x in tensors.items()}


class Stop:
    """The first Ctrl-C or SIGTERM asks for an end after the running step; the same one again ends
    at once. A launcher may send one of each, which is one request."""

    DEFAULTS: ClassVar[dict] = {signal.SIGINT: signal.default_int_handler,
                                signal.SIGTERM: signal.SIG_DFL}

    def __init__(self):
        self.signal = 0
        for n in self.DEFAULTS:
            signal.signal(n, self.ask)

    def ask(self, n: int, frame) -> None:
        self.signal = self.signal or n
        signal.signal(n, self.DEFAULTS[n])

    def restore(self) -> None:
        for n, handler in self.DEFAULTS.items():
            signal.signal(n, handler)


# --- ranks and devices ----------------------------------------------------------------------------


@dataclass
class Ranks:
    """This process's rank, the number of ranks, and its device."""
    rank: int
    world_size: int
    device: torch.device
    store: Any = None  # torchrun's, of small values for all ranks

    @classmethod
    def join(cls, device: str | None) -> "Ranks":
        """Join the processes that torchrun started. Raises ValueError for a missing device, or one
        GPU for several processes."""
        env = os.environ
        rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local, local_size = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and local_size > 1:  # a GPU for each
            if device != "cuda":
                raise ValueError(f"--device {device} is one GPU for {local_size} processes: leave "
                                 "it out, and each process takes a GPU")
            gpus = torch.cuda.device_count()
            if torch.cuda.is_available() and local_size > gpus:
                raise ValueError(f"{local_size} processes need as many GPUs, and this machine has "
                                 f"{gpus}: --nproc_per_node={gpus} at most")
            device = f"cuda:{local}"
        chosen = sample.pick_device(device)
        if local_size > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
        if world_size == 1 or dist.is_initialized():
            return cls(rank, world_size, chosen)
        if dist.is_torchelastic_launched():
            exit_with_launcher()
        # import this before init_process_group, or its default arguments capture the group
        importlib.import_module("torch.distributed.nn")
        store = next(dist.rendezvous("env://"))[0]
        if local_size == world_size:  # a restart must not read addresses of processes that died
            attempt = env.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"attempt {attempt}", store)
        is_gpu = chosen.type == "cuda"
        dist.init_process_group("nccl" if is_gpu else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=TIMEOUT,
                                device_id=chosen if is_gpu else None)
        is_torchruns = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # and outlives the ranks
        return cls(rank, world_size, chosen, store if is_torchruns else None)

    @property
    def is_main(self) -> bool:
        """The first rank writes files and prints."""
        return self.rank == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """x, summed in place over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, value) -> list:
        """Every rank's value (plain Python types), in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def check(self, ok: bool, error: str) -> None:
        """Raise AgreedError on every rank if any rank is not ok."""
        errors = [e for e in self.all_gather("" if ok else error) if e]
        if errors:
            raise AgreedError(errors[0] if ok else error)

    @contextlib.contextmanager
    def print_once(self) -> Iterator[None]:
        """Under torchrun, an error that this rank has like the first one, as for a missing file,
        becomes an AgreedError, which is printed once."""
        try:
            yield
        except AgreedError:
            raise
        except (ValueError, OSError) as e:
            key, text = "error of the first rank", str(e)
            if self.store and self.is_main:
                self.store.set(key, text)
            elif self.store:
                with contextlib.suppress(RuntimeError):  # it has no error, or has left
                    self.store.wait([key], datetime.timedelta(seconds=2))
                    if self.store.get(key).decode() == text:
                        raise AgreedError(text) from None
            raise

    def broadcast(self, x: Tensor) -> None:
        """Copy the first rank's tensor into that of every rank."""
        if self.world_size > 1:
            dist.broadcast(x.detach(), 0)

    def barrier(self) -> None:
        if self.world_size > 1:
            self.all_reduce(torch.zeros(1, device=self.device)).item()

    def leave(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()
            gc.collect()  # end gloo's threads: one that outlives the interpreter would abort it


class GradientReducer:
    """Sums the flat gradient over the ranks, in slices. A slice is sent while backward computes the
    next ones: backward reaches the last parameters first.

        gradient   [ slice 2 | slice 1 | slice 0 ]      slice 0 is ready first

    All ranks send the slices in the same order. A rank without a micro-batch sends zeros in finish;
    DistributedDataParallel would need one on every rank.
    """
    SLICE_BYTES = 1 << 26

    def __init__(self, parameters: list[nn.Parameter], gradient: Tensor, ranks: Ranks):
        """gradient: (P,), with the gradient of each parameter in turn as a view."""
        self.slices: list[Tensor] = []
        self.slice_of: dict[nn.Parameter, int] = {}
        self.remaining: Counter[int] = Counter()  # gradients to come, per slice
        self.handles: list = []  # of the slices that were sent
        end = begin = len(gradient)
        for p in reversed(parameters if ranks.world_size > 1 else []):
            begin -= p.numel()
            self.slice_of[p] = len(self.slices)
            p.register_post_accumulate_grad_hook(self.on_gradient)
            if (end - begin) * gradient.element_size() >= self.SLICE_BYTES or begin == 0:
                self.slices.append(gradient[begin:end])
                end = begin

    def start(self) -> None:
        """Call before the last backward pass of a step, which sends slices."""
        self.remaining = Counter(self.slice_of.values())

    def on_gradient(self, p: nn.Parameter) -> None:
        """Hook: the gradient of p is complete."""
        if self.remaining:  # in the last pass
            self.remaining[self.slice_of[p]] -= 1
            self.send()

    def send(self) -> None:
        """Send slices, in order, up to the first one that is not complete."""
        while len(self.handles) < len(self.slices) and not self.remaining[len(self.handles)]:
            part = self.slices[len(self.handles)]
            self.handles.append(dist.all_reduce(part, async_op=True))

    def finish(self) -> None:
        """Send the slices that are left, and wait for all."""
        self.remaining.clear()
        self.send()
        for handle in self.handles:
            handle.wait()
        self.handles = []


def exit_with_launcher() -> None:
    """Exit when torchrun, the parent process, ends, even by kill -9: otherwise the next run and
    this one would write to the same folder."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.2)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks (mallopt's M_MMAP_MAX and M_TRIM_THRESHOLD). Every step
    frees and allocates the same ones; by default they are returned to the system, and cost a page
    fault per 4 KB."""
    if sys.platform != "linux":
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-4, 0)
        mallopt(-1, -1)


def peak_flops(device: torch.device) -> float:
    """Peak dense bfloat16 FLOP/s of one device; 0 if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if "Laptop" in name:  # slower chips of the same name
        return 0.0
    return next((1e12 * tera for gpu, tera in BF16_TERAFLOPS.items() if gpu in name), 0.0)


def best_dtype(device: torch.device) -> str:
    if sample.has_bfloat16(device):
        return "bfloat16"
    return "float16" if device.type == "cuda" else "float32"


# --- optimizer and schedule -----------------------------------------------------------------------


def make_optimizers(model: nn.Module, name: str, lr: float,
                    weight_decay: float) -> list[torch.optim.Optimizer]:
    """adafactor, adamw, or muon for the hidden matrices with AdamW for the rest. Only the matrices
    of linear layers decay: no norms, embeddings or position biases."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for n, p in model.named_parameters():
        is_table = any(part in n for part in ("shared", "relative_attention_bias", "lm_head"))
        if p.requires_grad:
            (matrices if p.dim() == 2 and not is_table else rest).append(p)
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if name == "adafactor":
        return [Adafactor(groups, lr=lr)]
    optimizers: list[torch.optim.Optimizer] = []
    if name == "muon":
        if not matrices:
            raise ValueError("--optimizer muon needs hidden matrices to train, and --freeze leaves "
                             "none")
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
        groups = groups[1:]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True))
    return optimizers


class Adafactor(torch.optim.Adafactor):
    """A faster torch.optim.Adafactor (Shazeer and Stern 2018, arXiv:1804.04235). Parameters of one
    shape are updated together, by the same kernels; no number is read back from a GPU; a CPU reads
    and writes less memory.

    It divides the gradient G by the root of a running mean of its squares V. Of V (O, I), only the
    means of rows and columns are kept:

        V ~ row (O, 1) @ col (1, I) / mean(row)         update = G / sqrt(V), of RMS 1 at most

    The state is torch's, per parameter, so checkpoints fit both.
    """
    STACK_BYTES: ClassVar[dict[str, int]] = {"cuda": 1 << 28, "cpu": 1 << 20}  # of one stack
    # torch's decorators of these import its compiler: two seconds and 70 MB
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                n = max(1, self.STACK_BYTES[params[0].device.type] // (4 * shape.numel()))
                for i in range(0, len(params), n):
                    self.update(params[i:i + n], group)

    def update(self, params: list[Tensor], group: dict) -> None:
        """Update N parameters of one shape."""
        grads: list[Any] = [p.grad for p in params]
        grad = torch.stack(grads) if len(grads) > 1 else grads[0][None]  # (N, O, I) or (N, I)
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] = state["step"] + 1 if state else torch.tensor(1.0)  # on the CPU
        step, numbers = float(states[0]["step"]), params[0].numel()
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(torch.float32).eps if eps1 is None else eps1
        squares = self.mean_squares(states, grad, step ** group["beta2_decay"], eps1)
        update = squares.clamp_(min=eps1 * eps1).rsqrt_().mul_(grad)
        # the rate is relative: it is multiplied by each parameter's root mean square, (N,)
        size = torch.stack(list(torch._foreach_norm(params))) / numbers ** 0.5
        rate = size.clamp(min=eps2) * min(group["lr"], step ** -0.5)
        axes = tuple(range(1, grad.dim()))
        excess = torch.linalg.vector_norm(update, dim=axes) / (numbers ** 0.5 * group["d"])
        update.mul_((rate / excess.clamp(min=1)).view(-1, *[1] * len(axes)))
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(params, list(update.unbind()))

    def mean_squares(self, states: list[dict], grad: Tensor, fresh: float, eps: float) -> Tensor:
        """V, in the shape of grad. fresh: the share of the new squares in the running means."""
        squares = grad.square()
        if grad.dim() == 2:
            return self.average(states, "variance", squares, fresh)
        row = self.average(states, "row_var", squares.mean(2, keepdim=True), fresh)
        col = self.average(states, "col_var", squares.mean(1, keepdim=True), fresh)
        return torch.mul(row / row.mean(1, keepdim=True).clamp_(min=eps), col, out=squares)

    @staticmethod
    def average(states: list[dict], name: str, value: Tensor, fresh: float) -> Tensor:
        """Update a running mean of a stack of values (N, ...), and return it."""
        for state, first in zip(states, value):
            if name not in state:
                state[name] = torch.zeros_like(first)
        stored = [state[name] for state in states]
        mean = torch.stack(stored).lerp_(value, fresh)
        torch._foreach_copy_(stored, list(mean.unbind()))
        return mean


def clip_gradient(gradient: Tensor, divisor: Tensor | float, max_norm: float) -> Tensor:
    """Divide the flat gradient (P,) in place, then scale it down if its norm exceeds max_norm.
    Returns the norm before clipping, (), on the device: there is no sync here."""
    parts = gradient.split(1 << 22)  # one float32 sum over all numbers would lose precision
    norm = torch.stack([part.dot(part) for part in parts]).sum().sqrt() / divisor
    gradient.mul_((max_norm / norm).clamp(max=1) / divisor)  # one pass over memory
    return norm


def learning_rate(schedule: str, progress: float, step: int, lr: float, min_lr: float,
                  warmup_steps: int) -> float:
    """The rate of a step, counted from 0. progress: the share of the training that is done, 0 to 1.
    Warmup takes warmup_steps, or a tenth of the training if that is shorter."""
    def falling(x: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, x)))

    if schedule == "onecycle":  # up for the first 30 %, then down
        up = progress < 0.3
        share = falling(1 - progress / 0.3) if up else falling((progress - 0.3) / 0.7)
        return min_lr + (lr - min_lr) * share
    share = 1.0
    if schedule == "cosine":
        share = falling(progress)
    elif schedule == "wsd":  # warmup, stable, decay: linear over the last fifth
        share = min(1.0, max(0.0, 1 - progress) / 0.2)
    warmup = min(1.0, max((step + 1) / max(1, warmup_steps), progress / 0.1))
    return (min_lr + (lr - min_lr) * share) * warmup


# --- checkpoints ----------------------------------------------------------------------------------


@dataclass
class State:
    """The counters in a checkpoint."""
    step: int = 0
    tokens: int = 0  # non-padding tokens so far, both sides, all ranks
    elapsed_s: float = 0.0
    best_val: float = math.inf
    bad_steps: int = 0  # skipped, because the loss or the gradient was not finite
    loss_scale: float = 2.0 ** 16  # float16 only
    scaled_steps: int = 0  # since the loss scale last changed
    stream: dict = field(default_factory=dict)  # PairStream's


def save_checkpoint(trainer: Trainer, keep: int) -> None:
    """Write step-N-HASH.pt (HASH: of its bytes), and delete all but the newest `keep`. "identity"
    may not change when the run is resumed; "settings" may, by a flag."""
    folder = trainer.out_dir / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    saved = {"model": trained, "optimizers": [o.state_dict() for o in trainer.optimizers],
             "state": asdict(trainer.state), "identity": trainer.identity,
             "script": trainer.settings.script, "settings": trainer.settings.stored()}
    newest = folder / "newest"
    for stale in folder.glob("newest.*.tmp"):  # of killed processes: no other run writes here
        stale.unlink()
    with data.atomic_write(newest) as temporary, write_errors(newest, RuntimeError):  # a full disk
        torch.save(saved, temporary)
    newest.rename(folder / f"step-{trainer.state.step:08d}-{hash_file(newest)}.pt")
    for old in list_checkpoints(folder)[keep:]:
        old.unlink()


def load_checkpoint(saved: dict, trainer: Trainer) -> None:
    """The twin of save_checkpoint."""
    trainer.model.load_state_dict(saved["model"], strict=False)
    for optimizer, stored in zip(trainer.optimizers, saved["optimizers"]):
        own = optimizer.state_dict()  # its weight decay may have changed
        # copied: `saved` is mapped from the file
        optimizer.load_state_dict(own | {"state": copy.deepcopy(stored["state"])})
    trainer.state = State(**saved["state"])
    has_best = trainer.ranks.all_gather((trainer.out_dir / "best").is_dir())[0]
    if not has_best or saved["settings"].get("valid_hash") != trainer.settings.valid_hash:
        trainer.state.best_val = math.inf  # of another --valid, or in another --out_dir
    trainer.stream.state = dict(trainer.state.stream)


def check_identity(identity: dict, saved: dict | None, out_dir: str, ranks: Ranks) -> None:
    """Raise ValueError, naming the flag, if ranks disagree or a resumed run has changed."""
    main = ranks.all_gather(identity)[0]
    differs = next((flag for flag in identity if identity[flag] != main[flag]), "")
    ranks.check(not differs, f"{differs}: this process has other files or values than the first "
                f"(machines must share {out_dir} and the data, or have equal copies)")
    if not saved:
        return
    for flag, value in identity.items():
        before = saved["identity"].get(flag)
        if before == value:
            continue
        shown = f"then {before}, now {value}"
        if isinstance(before, dict):
            shown = ", ".join(f"{k} was {before.get(k)}, is {value[k]}"
                              for k in value if before.get(k) != value[k])
        raise AgreedError(f"{flag} differs from the run in {out_dir} ({shown}): give the old "
                          "value, another --out_dir, or --resume never to start anew")


def claim(folder: Path, ranks: Ranks) -> contextlib.AbstractContextManager:
    """A context that keeps other runs out of the folder. Raises ValueError if one uses it."""
    if not ranks.is_main:
        return contextlib.nullcontext()
    data.check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    message = f"another run uses {folder}: wait until it ends, or choose another --out_dir"
    return data.locked(folder, message, patience_s=5.0)  # a killed run takes a moment to end


CHECKPOINT_NAME = re.compile(r"step-[0-9]+-[0-9a-f]{16}\.pt")


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("step-*.pt") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.name), reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def newest_checkpoint(out_dir: Path, resume: str) -> Path | None:
    """The newest whole checkpoint that --resume means; damaged ones are reported and skipped.
    Raises FileNotFoundError or ValueError for a path that is no checkpoint, for one of another run,
    and if all are damaged."""
    own = found = list_checkpoints(out_dir / "checkpoint")
    if resume == "never":
        return None
    if resume != "auto":
        given = Path(resume)
        found = [given] if given.is_file() else list_checkpoints(given)
        found = found or list_checkpoints(given / "checkpoint")
        if not found:
            raise FileNotFoundError(f"--resume {resume}: no checkpoint there")
        if not CHECKPOINT_NAME.fullmatch(found[0].name):
            raise ValueError(f"--resume {resume}: a checkpoint's name is step-NUMBER-HASH.pt, and "
                             "must stay so")
        if own and found[0].name not in [path.name for path in own]:
            raise ValueError(f"--resume {resume} is not of the run in {out_dir}, which would be "
                             "lost: choose another --out_dir")
    for path in found:
        if is_whole(path):
            return path
        print(f"warning: {path} is damaged and skipped", file=sys.stderr)
    if found:
        raise ValueError(f"every checkpoint in {found[0].parent} is damaged; --resume never starts "
                         "anew")
    return None


def is_whole(path: Path) -> bool:
    return hash_file(path) == path.stem.rpartition("-")[2]


def find_checkpoint(out_dir: str, resume: str, ranks: Ranks) -> dict | None:
    """The content and "path" of the checkpoint to resume from, which the first rank chooses. None:
    a new run."""
    record = Path(out_dir) / "checkpoint" / "launcher"
    if ranks.is_main and LAUNCHER and record.is_file() and record.read_text("utf-8") == LAUNCHER:
        resume = "auto"  # torchrun started the processes again: the checkpoints are of this run
    newest = newest_checkpoint(Path(out_dir), resume) if ranks.is_main else None
    name, resume = ranks.all_gather((newest.name if newest else None, resume))[0]
    if name is None:
        return None
    given = Path(out_dir if resume == "auto" else resume)
    folder = given.parent if given.is_file() else given
    path = folder / name if (folder / name).is_file() else folder / "checkpoint" / name
    is_same = path.is_file() and (ranks.is_main or is_whole(path))
    ranks.check(is_same, f"{path.parent} has no {name}, from which the first process resumes: "
                f"--out_dir {MUST_BE_SHARED}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError):
        raise AgreedError(f"{path} is not a checkpoint") from None
    if not isinstance(saved, dict) or "settings" not in saved:
        raise AgreedError(f"{path} was written by an earlier version, whose runs cannot be "
                          "resumed: start anew from the model with --init_from "
                          f"{shlex.quote(out_dir)} and another --out_dir")
    return saved | {"path": path}


# --- reporting ------------------------------------------------------------------------------------


class Report:
    """The first rank's log.jsonl, its curve as loss.svg, TensorBoard's events if it is installed,
    and a line on the terminal."""

    def __init__(self, out_dir: Path, is_main: bool, step: int):
        """step: drop log entries newer than this checkpoint; those steps are rerun."""
        self.is_main, self.path = is_main, out_dir / "log.jsonl"
        self.means: dict[str, float] = {}
        self.progress = data.Progress()
        if not is_main:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        write_file(self.path, "".join(read_log(self.path, step)))
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board: Any = SummaryWriter(str(out_dir / "tensorboard"), purge_step=step + 1)
        except ImportError:
            self.board = None

    def log(self, values: dict) -> None:
        if not self.is_main:
            return
        values = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with write_errors(self.path), open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(values) + "\n")
        for name, value in values.items() if self.board else ():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Draw loss.svg, and end TensorBoard's file."""
        self.progress.clear()
        if self.is_main:
            log = [json.loads(line) for line in read_log(self.path, sys.maxsize)]
            name = self.path.resolve().parent.name
            write_file(self.path.with_name("loss.svg"), draw_curves({name: log}))
            if self.board:
                self.board.close()

    def say(self, text: str) -> None:
        if self.is_main:
            self.progress.clear()
            print(text, flush=True)

    def show(self, values: dict, names: Iterable[str], epoch: float, share: float) -> None:
        """Show running means, over about 20 steps, in the progress line. share: how much of this
        process's steps is done, 0 to 1."""
        if not self.is_main:
            return
        for name in (*names, "tok_per_s"):
            mean = self.means.get(name, values[name])
            self.means[name] = mean + (values[name] - mean) / 20
        means = "  ".join(f"{name} {self.means[name]:.4f}" for name in names)
        self.progress.show(f"step {values['step']:,}  epoch {epoch:.2f}  {means}  lr "
                           f"{values['lr']:.2e}  {self.means['tok_per_s']:,.0f} tokens/s", share)


def read_log(path: Path, last_step: int) -> list[str]:
    """The whole lines of log.jsonl up to a step; a power cut may leave half a line."""
    if not path.exists() or not last_step:
        return []
    lines = []
    for line in path.read_text("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["step"] <= last_step and ("loss" not in row or row["tokens"] >= 0):
                lines.append(line + "\n")
    return lines


def draw_curves(logs: dict[str, list[dict]]) -> str:
    """An SVG of the losses of runs over their tokens: lines are means over a fiftieth of the
    training steps, dots are validations. logs: the lines of log.jsonl by name."""
    colors = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf")
    trained = [row for log in logs.values() for row in log if row.get("loss")]
    top = max([1.0] + [row["loss"] for row in trained])
    last = max([1] + [row["tokens"] for row in trained])

    def place(tokens: float, loss: float) -> tuple[str, str]:  # x 50 to 710, y 290 to 10
        return (f"{50 + 660 * tokens / last:.1f}",
                f"{10 + 280 * (1 - min(loss, top) / top):.1f}")

    style = ("<style>svg { background: #fff; color: #222 } text { fill: currentColor } @media "
             "(prefers-color-scheme: dark) { svg { background: #111; color: #ddd } }</style>")
    shapes = [style]
    for tick in range(0, int(top) + 1, max(1, int(top) // 6)):
        _, y = place(0, tick)
        shapes.append(f'<path d="M50,{y}H710" stroke="#8884"/>'
                      f'<text x="44" y="{y}" text-anchor="end" dy="4">{tick}</text>')
    for i, (name, log) in enumerate(logs.items()):
        color = colors[i % len(colors)]
        rows = [row for row in log if row.get("loss")]
        size = max(1, len(rows) // 50)
        points = []
        for j in range(0, len(rows), size):
            part = rows[j:j + size]
            mean = sum(row["loss"] for row in part) / len(part)
            points.append(",".join(place(part[len(part) // 2]["tokens"], mean)))
        shapes.append(f'<polyline fill="none" stroke="{color}" points="{" ".join(points)}"/>')
        tokens_at = {row["step"]: row["tokens"] for row in rows}
        for row in log:
            if row.get("val_loss") and row["step"] in tokens_at:
                x, y = place(tokens_at[row["step"]], row["val_loss"])
                shapes.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>')
        shapes.append(f'<text x="60" y="{276 - 18 * i}" style="fill: {color}">'
                      f'{html.escape(name)}</text>')
    shapes.append(f'<text x="360" y="312" text-anchor="middle">tokens, 0 to {last:,}; nats per '
                  'token; dots: validation</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="720" height="320" '
            'font-family="sans-serif" font-size="12">\n' + "\n".join(shapes) + "\n</svg>\n")


# --- pre-training and SFT -------------------------------------------------------------------------


class ResponseLoss(Objective):
    """The mean nats per token of the responses; on --valid also perplexity and nats per character,
    which can be compared across tokenizers."""

    def __init__(self, *args):
        super().__init__(*args)
        rows = [row[row >= 0] for batch in self.batches for row in batch["labels"].numpy()]
        own = [sum(map(len, rows)), sum(len(self.tokenizer.decode(row)) for row in rows)]
        sums = torch.tensor(own, dtype=torch.float64, device=self.ranks.device)
        # of the responses of --valid
        self.tokens, self.chars = self.ranks.all_reduce(sums).clamp(min=1).tolist()

    def loss(self, batch: dict, part: str = "data") -> tuple[Tensor, Tensor]:
        loss = self.model.loss_sum(**batch)
        return loss, loss.new_full((), len(batch["targets"]))

    def evaluate(self) -> dict:
        loss = super().evaluate()["val_loss"]
        return {"val_loss": loss, "val_ppl": math.exp(min(loss, 700.0)),
                "val_nats_per_char": loss * self.tokens / self.chars}

    def score(self) -> dict:
        result, _ = self.score_answers(self.held_out())
        return {"bleu4": result["bleu4"]}

    def held_out(self) -> list[dict]:
        """The pairs of --valid on which answers are scored: all of the demo's, else about 200."""
        rows = [row for row in data.Rows(self.settings.valid_files)
                if row.get("prompt") and row.get("response")]
        step = 1 if self.settings.demo else max(1, math.ceil(len(rows) / 200))
        return rows[::step]

    def score_answers(self, rows: list[dict]) -> tuple[dict, list[str]]:
        """See sample.score."""
        max_len = self.settings.max_len
        with self.uncompiled():
            return sample.score(self.model, self.tokenizer, rows, max_len,
                                max_new_tokens=min(128, max_len))

    def uncompiled(self) -> contextlib.AbstractContextManager:
        """A context without --compile, which would take longer than it saves."""
        if not self.settings.compile:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    def report_results(self, state: "State", report: "Report") -> None:
        """Print scores on held-out pairs, and a few answers."""
        s, answers, references = self.settings, [], []
        parts: dict[str, list[dict]] = {}
        for row in self.held_out():
            name = "unseen sums" if data.is_sum(row["prompt"]) else "held-out facts"
            parts.setdefault(name if s.demo else "held-out pairs", []).append(row)
        self.model.eval()
        for name, part in sorted(parts.items()):
            result, texts = self.score_answers(part)
            answers += texts
            references += [row["response"] for row in part]
            print(f"\n{name}: {len(part):,}, exact match {100 * result['exact_match']:.1f} %, "
                  f"BLEU-4 {result['bleu4']:.1f}")
            for row, text in list(zip(part, texts))[::max(1, len(part) // 4)][:4]:
                mark = "✓ " if text.strip() == row["response"].strip() else "✗ "
                print(f"  {mark if s.demo else ''}{row['prompt']!r:.120} -> {text!r:.200}")
        last = "".join(read_log(report.path, state.step)[-1:])
        if answers and '"bleu4"' not in last:  # a run that is started again has it
            report.log({"step": state.step, "bleu4": sample.bleu4(answers, references)})
            report.close()
        asked = "法国的首都是哪里？" if s.demo else "你好"
        flag = "" if s.out_dir == "out" else f" --model {shlex.quote(s.out_dir)}"
        kind, then = "a model folder", "Talk to it"
        commands = f'  python sample.py{flag} --prompt "{asked}"\n  python sample.py{flag}'
        if s.lora_rank:
            kind, then, commands = "an adapter", "Merge it into its model", s.merge_command()
        print(f"\nfinished: {s.out_dir} is {kind} ({state.step:,} steps, {state.tokens:,} tokens, "
              f"{data.duration(state.elapsed_s)}); {s.out_dir}/loss.svg is its curve. {then}:\n"
              f"{commands}")

    def initialize(self, stream: PairStream) -> None:
        """Initialize a new model from counts of the first window, if that beats random weights on
        the first micro-batch: counts of few tokens mislead."""
        if self.settings.init_from or self.settings.freeze:
            return
        ids, offsets = stream.window(0, 0).columns[1]  # the responses
        before, after = np.roll(ids, 1).astype(np.int64), ids.astype(np.int64)
        before[offsets[:-1]] = data.PAD  # the decoder's start token
        if not fits_counts(self.model.config):
            if self.ranks.is_main:
                print(f"initialized at random: counts need {COUNTS_NEED}", flush=True)
        elif self.ranks.is_main and len(after):  # a window may hold no text at all
            random = {name: x.to("cpu", copy=True) for name, x in self.model.state_dict().items()}
            with self.uncompiled():
                random_loss = self.first_loss(stream)
                init_bigrams(self.model, torch.from_numpy(before), torch.from_numpy(after))
                counts_loss = self.first_loss(stream)
            if counts_loss < random_loss:
                print(f"initialized from counts of {len(after):,} token pairs", flush=True)
            else:
                self.model.load_state_dict(random)
                print(f"initialized at random: {len(after):,} tokens are too few to count (loss "
                      f"{counts_loss:.1f}, at random {random_loss:.1f})", flush=True)
        for p in self.model.parameters():
            self.ranks.broadcast(p)

    def first_loss(self, stream: PairStream) -> float:
        """Mean nats per target token of the first micro-batch, without dropout."""
        batch = to_device(next(stream.one_epoch()), self.ranks.device)
        self.model.eval()
        with torch.no_grad():
            nats, tokens = self.loss(batch)
        return float(nats / tokens)


# --- settings -------------------------------------------------------------------------------------

GPU_BATCH_TOKENS, CPU_BATCH_TOKENS = 65536, 1280  # of a step, by default
MIN_UPDATES = 1000  # see default_batch
BYTES_PER_TOKEN = 4.5  # of Chinese: 3 per character, 1.5 characters per token
LIMITS = ("max_steps", "epochs", "time_limit")
PATHS = ("data", "valid", "tokenizer", "init_from")  # may differ between machines
EARLY = ("out_dir", "resume")  # needed before settings are resolved
TOKENIZER_DIR = Path("checkpoint", "tokenizer")  # where a new tokenizer is saved
DEMO = {"preset": "demo", "micro_batch_tokens": 512, "max_len": 64, "vocab_size": 2048}
DEMO_STEPS, DEMO_BATCH_TOKENS = 1000, 1024


def flag(default: Any, help: str, group: str = "", fixed: bool = False, **how) -> Any:
    """A field of Settings that has a flag. group: a title in --help, for this field and those after
    it. fixed: a resumed run cannot change it. how: arguments of add_argument."""
    return field(default=default, metadata={"help": help, "group": group, "fixed": fixed,
                                            "how": how})


COUNT, RATE = number(int, 1), number(float, 0, 0.99)
POSITIVE, NOT_NEGATIVE = number(float, 0, above=True), number(float, 0)
OPTIMIZER: dict[str, Any] = {"help": "muon is for the hidden matrices, with AdamW for the rest",
                             "fixed": True, "choices": ["adamw", "adafactor", "muon"]}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run, and the flags of train.py and dpo.py. They are resolved once, when it
    starts, and kept in its checkpoints. 0, "", () and None mean off, or a default
    that choose_defaults sets."""
    given: frozenset[str] = frozenset()  # names of the flags in this call
    demo: bool = False
    data_files: tuple[str, ...] = ()
    valid_files: tuple[str, ...] = ()
    valid_hash: str = ""
    # S and T of a batch are padded to multiples of this, for compiled kernels
    round_to: int = field(default=0, metadata={"fixed": True})

    data: Sequence[str] = flag(
        (), "training pairs: Parquet files or folders of them (default: the demo, with --max_len "
        "64, --batch_tokens 1024, --micro_batch_tokens 512 and --max_steps 1000)", group="data",
        nargs="+", metavar="A.parquet")
    valid: str = flag(
        "", "held-out pairs to validate on (default: no validation)", metavar="V.parquet")
    tokenizer: str = flag(
        "", "folder of tokenizer.json (default: that of --init_from, else one is trained on "
        "--data)", metavar="DIR")
    vocab_size: int = flag(
        29298, "size of a tokenizer that is trained here (default: 29298; 2048 for the demo)",
        type=number(int, 264))
    max_len: int = flag(
        320, "tokens per side, longer ones are cut", fixed=True, type=number(int, 2, 1 << 20))
    workers: int = flag(1, "tokenizing processes per training process", type=number(int, 0))

    preset: str = flag(
        "", "model size (default: small; demo without --data)", group="model",
        choices=list(PRESETS))
    init_from: str = flag("", "model folder to start from", metavar="MODEL_DIR")
    freeze: str = flag(
        "", "parts that are not trained: shared, encoder, decoder", fixed=True,
        metavar="shared,encoder")
    dropout: float = flag(0.0, "dropout rate, wherever T5 has it (default: 0)", type=RATE)
    lora_rank: int = flag(
        0, "train low-rank additions to --lora_targets, and nothing else (default: train all "
        "weights)", fixed=True, type=COUNT)
    lora_alpha: float = flag(
        16.0, "the additions are scaled by alpha / rank", fixed=True, type=POSITIVE)
    lora_dropout: float = flag(0.0, "dropout on LoRA inputs (default: 0)", fixed=True, type=RATE)
    lora_targets: str = flag(
        "q,v", "linear layers that get LoRA, or all", fixed=True, metavar="q,k,v,o,wi,wo")

    max_steps: int = flag(
        0, "stop after N steps, including earlier runs (default: no limit)", group="length",
        type=COUNT)
    epochs: float = flag(0.0, "stop after N passes over the data (default: 1)", type=POSITIVE)
    time_limit: float = flag(
        0.0, "stop after N seconds of training, including earlier runs (default: no limit)",
        metavar="SECONDS", type=POSITIVE)

    lr: float = flag(
        0.0, "peak learning rate; Adafactor caps it at 1/sqrt(step) (default: 0.02, for 0.2b "
        "0.005, with --init_from 0.002; other optimizers 0.002, with --init_from 1e-4)",
        group="optimizer", type=POSITIVE)
    min_lr: float | None = flag(
        None, "learning rate at the end, and at the beginning of onecycle (default: --lr / 100)",
        type=NOT_NEGATIVE)
    schedule: str = flag(
        "cosine", "how the learning rate changes",
        choices=["cosine", "onecycle", "wsd", "constant"])
    warmup_steps: int = flag(
        100, "ramp the learning rate up over N steps, or a tenth of the training if that is "
        "shorter; use 0 if there are only a few steps",
        type=number(int, 0))
    optimizer: str = flag("adafactor", **OPTIMIZER)
    weight_decay: float = flag(
        0.01, "weight decay of matrices, not of norms and embeddings", type=NOT_NEGATIVE)
    grad_clip: float = flag(1.0, "largest norm of the gradient", type=POSITIVE)
    batch_tokens: int = flag(
        0, "prompt and response tokens per update, over all processes (default: 65536 on a GPU, "
        "fewer if the data has less than 1,000 such updates; on a CPU 1280, 2560 in dpo.py; "
        "rounded up to equal shares)", type=COUNT)

    micro_batch_tokens: int = flag(
        0, "padded tokens per forward pass, B * (S + T); lower it if memory runs out (default: up "
        "to --batch_tokens, as the GPU's memory allows; on a CPU 1280 over all processes)",
        group="memory", fixed=True, type=COUNT)
    checkpoint_activations: bool = flag(
        False, "recompute activations in backward: less memory, a quarter slower",
        action=argparse.BooleanOptionalAction)
    dtype: str = flag(
        "auto", "dtype of the matrix products; auto: bfloat16 if the device has it, else float16 "
        "on a GPU, float32 on a CPU",
        choices=["auto", "float32", "bfloat16", "float16"])
    compile: bool = flag(False, "torch.compile the model", action=argparse.BooleanOptionalAction)

    out_dir: str = flag(
        "out", "folder for the model, best/, checkpoint/ and log.jsonl", group="running")
    resume: str = flag(
        "auto", "auto: resume from the newest checkpoint of --out_dir, if there is one, with its "
        "settings; never: delete them and start anew", metavar="auto|never|CHECKPOINT")
    eval_every: int = flag(500, "validate every N steps", type=COUNT)
    bleu_every: int = flag(
        0, "score answers on --valid every N steps (default: at the end)", type=COUNT)
    save_every: int = flag(500, "save a checkpoint every N steps", type=COUNT)
    keep: int = flag(2, "checkpoints to keep", type=COUNT)
    seed: int = flag(
        0, "seed of the weights, the order of the data and dropout (default: 0)", fixed=True,
        type=number(int, 0, 2 ** 63 - 1))
    device: str = flag("", "cpu, cuda or cuda:N (default: a GPU if there is one)")

    columns: ClassVar[tuple[str, ...]] = PAIR
    no_flags: ClassVar[tuple[str, ...]] = ()  # fields that have no flag in this command
    cpu_batch_tokens: ClassVar[int] = CPU_BATCH_TOKENS
    script: ClassVar[str] = "train.py"

    @property
    def group(self) -> int:
        """Micro-batches of a step."""
        return max(1, round(self.batch_tokens / self.micro_batch_tokens))

    def stored(self) -> dict:
        """What a checkpoint keeps."""
        own = {"out_dir", "resume", "device", "given", "data_files", "valid_files"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}

    def check(self) -> None:
        """Raise ValueError for flags that exclude each other."""
        if self.demo and (self.init_from or "valid" in self.given):
            raise ValueError("--init_from and --valid need --data")
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if name in self.given and not self.lora_rank:
                raise ValueError(f"--{name} has no effect without --lora_rank")
        if self.lora_rank and self.freeze:
            raise ValueError("--freeze has no effect with --lora_rank, which trains nothing but "
                             "the additions: choose --lora_targets")
        if self.lora_rank and not self.init_from:
            raise ValueError("--lora_rank adds to a model: name it with --init_from")
        if "vocab_size" in self.given and (self.tokenizer or self.init_from):
            other = "tokenizer" if self.tokenizer else "init_from"
            raise ValueError(f"--vocab_size is for a tokenizer that is trained here; --{other} "
                             "brings its own")
        if self.init_from and self.preset:
            why = f"the run in {self.out_dir} was started with the other one"
            if {"init_from", "preset"} <= self.given:
                why = "--init_from brings its own shape"
            raise ValueError(f"--preset and --init_from exclude each other: {why}")
        if wrong := set(filter(None, self.freeze.split(","))) - {"shared", "encoder", "decoder"}:
            raise ValueError(f"--freeze {wrong.pop()!r}: only shared, encoder and decoder can be "
                             "frozen")

    def merge_command(self) -> str:
        """The command that merges the adapter that was trained."""
        base, adapter, out = map(shlex.quote, (self.init_from, self.out_dir,
                                               self.out_dir + "/merged"))
        return f"  python dpo.py merge --model {base} --adapter {adapter} --out {out}"

    def default_lr(self) -> float:
        if self.optimizer != "adafactor":
            return 1e-4 if self.init_from else 2e-3
        if self.init_from:
            return 2e-3
        return 5e-3 if self.preset == "0.2b" else 2e-2

    def find_files(self, paths: Sequence[str], ranks: Ranks) -> list[str]:
        """The Parquet files of --data or --valid."""
        return training_files(paths, self.out_dir)


def resolve(kind: type[Settings], args: argparse.Namespace, ranks: Ranks,
            saved: dict | None) -> Settings:
    """Decide every setting, the same on every rank: by its flag, else by the checkpoint that the
    run resumes from, else by default. Raises ValueError before anything is written, except
    for data (the demo's, or converted triples)."""
    stored = saved["settings"] if saved else {}
    names = {f.name for f in fields(kind)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    flags = frozenset(given) - set(EARLY)
    if flags & set(LIMITS):  # a new limit replaces the stored one
        stored = stored | dict.fromkeys(LIMITS, 0)
    values = {k: v for k, v in stored.items() if k in names} | given
    resumes_demo = stored.get("demo", False) and "data" not in flags
    demo = resumes_demo or not values.get("data")
    s = kind(**{**(DEMO if demo else {}), **values, "demo": demo, "given": flags})
    s.check()
    if s.init_from:
        ChatLMConfig.from_pretrained(s.init_from)  # fails early
    check_out_dir(s, resumes=saved is not None)
    if s.demo:
        s = make_demo_data(s, ranks)
    valid_files = s.find_files([s.valid] if s.valid else [], ranks)
    s = replace(s, data_files=tuple(s.find_files(s.data, ranks)), valid_files=tuple(valid_files),
                valid_hash=hash_files(valid_files))
    ranks.check(ranks.all_gather(s.valid_hash)[0] == s.valid_hash, "--valid: this process has "
                f"other files than the first (machines must share {s.valid}, or have equal copies)")
    s = choose_defaults(s, ranks)
    # machines may differ in what they are fast at: the first rank decides
    agreed = ranks.all_gather(s.stored())[0]
    s = replace(s, **{k: v for k, v in agreed.items() if k not in PATHS})
    if ranks.is_main:
        report_unused(s)
        if s.valid and (found := overlap(s.data_files, s.valid_files)):
            note_once(f"warning: {found:,} prompts of --valid are in --data too, so they "
                      "measure memorization (data.py split keeps them apart)")
    return s


def choose_defaults(s: Settings, ranks: Ranks) -> Settings:
    """Replace 0, "" and "auto" by defaults that depend on other settings and on the machine."""
    if not s.preset and not s.init_from:
        s = replace(s, preset="small")
    if not (s.max_steps or s.epochs or s.time_limit):
        s = replace(s, max_steps=DEMO_STEPS) if s.demo else replace(s, epochs=1.0)
    best = best_dtype(ranks.device)
    s = replace(s, lr=s.lr or s.default_lr(), dtype=best if s.dtype == "auto" else s.dtype)
    if s.optimizer == "muon" and best == "float32" and ranks.is_main:
        note_once("note: torch's Muon computes in bfloat16, for which this CPU has no "
                  "instructions: it will be slow")
    if not s.round_to:  # a resumed run keeps its own
        s = replace(s, round_to=8 if s.compile else 1)
    is_given = s.batch_tokens > 0
    tokens = tokens_per_pass(s) if "batch_tokens" in s.given and ranks.is_main else math.inf
    if s.batch_tokens > 2 * tokens:
        note_once(f"note: --batch_tokens {s.batch_tokens} is more than the data has, about "
                  f"{tokens:,.0f} tokens: each step takes several passes")
    s = replace(s, batch_tokens=s.batch_tokens or default_batch(s, ranks.device))
    if not s.micro_batch_tokens:
        fits = default_micro_batch(s, ranks.device, len(s.columns), ranks.world_size)
        s = replace(s, micro_batch_tokens=min(ranks.all_gather(fits)))
    if not is_given:
        group = data.round_up(s.group, ranks.world_size)  # equal shares
        s = replace(s, batch_tokens=group * s.micro_batch_tokens)
    return s


def default_batch(s: Settings, device: torch.device) -> int:
    """Tokens of a step. A GPU is fastest with large steps, but on little data they leave too few
    updates to learn from: then steps are smaller, for about MIN_UPDATES."""
    if s.demo:
        return DEMO_BATCH_TOKENS
    if device.type != "cuda":
        return s.cpu_batch_tokens
    tokens = (s.epochs or 1.0) * tokens_per_pass(s)
    return min(GPU_BATCH_TOKENS, max(s.cpu_batch_tokens, int(tokens / MIN_UPDATES)))


def tokens_per_pass(s: Settings) -> float:
    """Tokens of --data, estimated from the metadata of the files."""
    files = [data.open_parquet(path, s.columns) for path in s.data_files]
    size_bytes = sum(data.text_bytes(file, group, s.columns)
                     for file in files for group in range(file.num_row_groups))
    return size_bytes / BYTES_PER_TOKEN


def overwrites(out: Path, source: str) -> bool:
    """Whether an export to the folder `out` would write to a file of another folder, perhaps
    through a link."""
    files = {os.path.realpath(Path(source, name)) for name in EXPORTED}
    return any(os.path.realpath(out / name) in files for name in EXPORTED)


def check_out_dir(s: Settings, resumes: bool) -> None:
    """Raise ValueError if the run would overwrite a model that it does not resume."""
    out = Path(s.out_dir)
    for folder in (out / "best", out / "checkpoint"):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file where this run needs a folder: move it away, or "
                             "choose another --out_dir")
    if s.init_from and (overwrites(out, s.init_from) or overwrites(out / "best", s.init_from)):
        raise ValueError(f"--init_from {s.init_from} would be overwritten: choose another "
                         "--out_dir")
    log = out / "log.jsonl"
    if not resumes and log.is_file():
        with open(log, "rb") as f:
            if not b'{"step"'.startswith(f.read(7)):
                raise ValueError(f"{log} is not the log of a run: move it away, or choose another "
                                 "--out_dir")
    has_model = any((out / name).exists() for name in ("config.json", "adapter_config.json"))
    if s.resume == "auto" and not resumes and has_model:
        raise ValueError(f"{out} holds a model and no checkpoint to resume from: choose another "
                         "--out_dir, or --resume never to replace it")


def report_unused(s: Settings) -> None:
    """Print a line for every flag that has no effect."""
    is_group = s.batch_tokens >= s.micro_batch_tokens
    effective = {
        "eval_every": (s.valid, "without --valid"), "bleu_every": (s.valid, "without --valid"),
        "min_lr": (s.schedule != "constant", "with --schedule constant"),
        "weight_decay": (not {"encoder", "decoder"} <= set(s.freeze.split(",")),
                         "with --freeze encoder,decoder: nothing else decays"),
        "warmup_steps": (s.schedule != "onecycle", "with --schedule onecycle"),
        "batch_tokens": (is_group, "below --micro_batch_tokens: a step takes one micro-batch")}
    for name, (works, reason) in effective.items():
        if name in s.given and not works:
            note_once(f"note: --{name} has no effect {reason}")


def default_micro_batch(s: Settings, device: torch.device, columns: int, ranks: int = 1) -> int:
    """Padded tokens B * (S + T) for one forward pass: each rank's share of a step, divided evenly
    into as few parts as fit; at least one row of max_len tokens in every column. What fits: on a
    CPU 1,280 over all ranks, on a GPU by the free memory. Raises ValueError if that is too little.
    """
    one_row = columns * data.round_up(s.max_len, max(1, s.round_to))
    fits = max(1, CPU_BATCH_TOKENS // ranks)
    if device.type == "cuda":
        if s.init_from:
            config = ChatLMConfig.from_pretrained(s.init_from)
        else:
            config = ChatLMConfig.preset(s.preset, vocab_size=s.vocab_size)
        free_bytes = torch.cuda.mem_get_info(device)[0]
        room_bytes = 0.85 * free_bytes - state_bytes(config, s)
        fits = int(room_bytes / activation_bytes(config, s))
        if fits < one_row:
            raise ValueError(f"{free_bytes / 1e9:.1f} GB of GPU memory are free, too little for "
                             f"this model and rows of {columns} x {s.max_len} tokens: lower "
                             "--max_len, add --checkpoint_activations, or choose a smaller "
                             "--preset")
    share = -(-s.batch_tokens // ranks)
    parts = -(-share // fits)
    return max(one_row, -(-share // parts))


def state_bytes(config: ChatLMConfig, s: Settings) -> int:
    """Bytes besides activations: weights and gradients in float32, weights in the autocast dtype,
    the optimizer's state, and half a gigabyte for the loss and libraries."""
    with torch.device("meta"):
        parameters = ChatLM(config).num_parameters()
    trained = parameters // 50 if s.lora_rank else parameters
    optimizer = {"adafactor": 0, "muon": 4, "adamw": 8}[s.optimizer]
    return parameters * (4 + 2) + trained * (4 + optimizer) + (1 << 29)


def activation_bytes(config: ChatLMConfig, s: Settings) -> int:
    """Bytes that autograd saves per padded token (counted in tests/test_gpu.py), and a third more
    for what backward computes."""
    inner, size = config.num_heads * config.d_kv, 4 if s.dtype == "float32" else 2
    # tensors of d_ff numbers that a feed-forward layer saves
    feed = 4 if config.feed_forward_proj == "gated-gelu" else 2 if s.dropout else 1
    # the mean of an encoder's and a decoder's layer, which have 2.5 norms and 1.5 attentions
    layer = 2.5 * 4 * config.d_model  # the float32 input of the norms
    layer += size * (2.5 * config.d_model + 6 * inner + feed * config.d_ff)
    if s.dropout:
        layer += 2.5 * config.d_model + config.d_ff  # masks
    layers = max(config.num_layers, config.num_decoder_layers or 0)
    saved = layers * 4 * config.d_model + layer if s.checkpoint_activations else layers * layer
    saved += size * config.num_heads * s.max_len  # the encoder's bias and mask, for all layers
    return int(4 / 3 * saved)


# --- the parts of a run ---------------------------------------------------------------------------


def training_files(paths: Sequence[str], out_dir: str) -> list[str]:
    """Parquet files, and those in folders, in a fixed order. Raises ValueError for another file,
    naming the command that converts it, and for a missing column."""
    files = []
    for path in paths:
        convert = f"python data.py clean --source pairs {shlex.quote(path)} --out"
        found = data.input_files([path], [out_dir]) if Path(path).is_dir() else [Path(path)]
        # a missing file is reported by open_parquet
        shards = [str(f) for f in found if f.suffix.lower() == ".parquet" or not f.is_file()]
        if not shards and Path(path).is_file():
            target = shlex.quote(Path(path).name.partition(".")[0] + ".parquet")
            raise ValueError(f"{path} is not Parquet: convert it with  {convert} {target}")
        if not shards:
            raise ValueError(f"{path} has no Parquet files: convert what it has with  {convert} "
                             "data.parquet")
        if len(shards) < len(found):
            note_once(f"note: {len(found) - len(shards):,} files in {path} are not Parquet and "
                      "are skipped")
        files += shards
    for file in files:
        data.open_parquet(file, PAIR)
    return files


def make_demo_data(s: Settings, ranks: Ranks) -> Settings:
    """Write the demo's files into the out_dir, unless they are there."""
    folder = Path(s.out_dir) / "demo"
    train, valid = str(folder / "train.parquet"), str(folder / "valid.parquet")
    if ranks.is_main and not (Path(valid).is_file() and Path(train).is_file()):
        print("making demo data: questions about capitals, opposites, units, sums, ...", flush=True)
        data.write_demo(folder)
    ranks.barrier()
    return replace(s, data=[train], valid=valid)


def prompts(files: Iterable[str]) -> Iterator[pa.Array]:
    for path in files:
        for batch in data.open_parquet(path, ("prompt",)).iter_batches(columns=["prompt"]):
            yield batch["prompt"].cast("large_string")


def overlap(files: Iterable[str], valid_files: Iterable[str]) -> int:
    """The number of distinct prompts in both."""
    held, found = pa.chunked_array(prompts(valid_files), pa.large_string()), set()
    for part in prompts(files):
        found.update(part.filter(pc.is_in(part, held)).to_pylist())
    return len(found - {None, ""})


def find_tokenizer(s: Settings, ranks: Ranks, saved: dict | None) -> Tokenizer:
    """The tokenizer of --tokenizer or --init_from, else that of --out_dir, trained if need be."""
    if s.tokenizer or s.init_from:
        return Tokenizer.from_pretrained(s.tokenizer or s.init_from, append_eos=True)
    out = Path(s.out_dir)
    if saved:
        before = saved["path"].parent.parent
        folders = [out, out / TOKENIZER_DIR, before, before / TOKENIZER_DIR]
    else:
        folder = train_tokenizer(s, out) if ranks.is_main else None
        folders = [out / ranks.all_gather(folder)[0]]
    found = [f for f in folders if (f / "tokenizer.json").is_file()]
    if saved and not found:
        raise ValueError(f"the tokenizer of the run in {saved['path'].parent} is missing: name its "
                         "folder with --tokenizer")
    if not found:
        raise ValueError(f"{folders[0]} has no tokenizer.json, which the first process wrote: "
                         f"--out_dir {MUST_BE_SHARED}")
    for folder in found:  # out may hold the model of another run than the checkpoint's
        tokenizer = Tokenizer.from_pretrained(folder)
        if not saved or hash_tokenizer(tokenizer) == saved["identity"].get("--tokenizer"):
            return tokenizer
    return Tokenizer.from_pretrained(found[0])  # check_identity says what is wrong


def train_tokenizer(s: Settings, out: Path) -> Path:
    """Train a tokenizer, unless there is one of the same data and size, or one that the user has
    put into out. Returns its folder, relative to out: TOKENIZER_DIR, since out may still hold an
    older model with its own tokenizer. Every export copies it to out."""
    source = {"data": hash_files(s.data_files), "vocab_size": s.vocab_size}
    folder, record = out / TOKENIZER_DIR, out / TOKENIZER_DIR / "source.json"
    if record.is_file():
        if data.read_json(record) == source:
            return TOKENIZER_DIR
        print(f"the tokenizer in {folder} was trained on other data or for another --vocab_size",
              flush=True)
    elif (out / "tokenizer.json").is_file():
        if "vocab_size" in s.given:
            raise ValueError(f"--vocab_size has no effect: {out} has a tokenizer already; "
                             "delete its tokenizer.json, or choose another --out_dir")
        print(f"using the tokenizer in {out}", flush=True)
        return Path()
    print(f"training a tokenizer of up to {s.vocab_size:,} tokens on {', '.join(s.data)}",
          flush=True)
    tokenizer = Tokenizer.train(data.Texts(s.data_files), s.vocab_size, memory_bytes=4 * 10 ** 9,
                                progress=sys.stderr.isatty())
    record.unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    write_file(record, json.dumps(source))
    return TOKENIZER_DIR


def hash_tokenizer(tokenizer: Tokenizer) -> str:
    return xxhash.xxh3_64_hexdigest(tokenizer.to_json().encode())


def hash_weights(model: ChatLM) -> str:
    """A hash of all parameters."""
    digest = xxhash.xxh3_64()
    for name, p in model.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def make_model(s: Settings, ranks: Ranks, tokenizer: Tokenizer) -> tuple[ChatLM, str | None]:
    """The model to train, and a hash of the weights of --init_from (None: random weights)."""
    torch.manual_seed(s.seed)
    if s.init_from:
        model = ChatLM.from_pretrained(s.init_from, torch.float32, ranks.device)
        init_hash = hash_weights(model)
        check_vocabulary(s, ranks, tokenizer, model)
    else:
        model = ChatLM(ChatLMConfig.preset(s.preset, vocab_size=len(tokenizer))).to(ranks.device)
        init_hash = None
    model.config.dropout_rate = s.dropout
    for stack in (model.encoder, model.decoder):
        stack.checkpoint_activations = s.checkpoint_activations
    for part in filter(None, s.freeze.split(",")):
        getattr(model, part).requires_grad_(False)
    if s.lora_rank:
        targets = s.lora_targets.split(",")
        for target in targets:
            if target != "all" and not find_linear(model, [target]):
                raise ValueError(f"--lora_targets: the model has no linear layer {target}")
        try:
            add_lora(model, s.lora_rank, s.lora_alpha, targets, s.lora_dropout)
        except ValueError as e:
            raise ValueError(f"--lora_targets: {e}") from None
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"--freeze {s.freeze} leaves nothing to train")
    if s.compile:
        compile_blocks(model)
    known_turns = sample.known_turns(model)  # on every rank: it may fail
    if ranks.is_main:
        turns = max(count_turns(s.data_files), known_turns)
        if turns > 1:
            model.generation["turns"] = turns
        print(f"{model.num_parameters() / 1e6:.1f} million parameters, {len(tokenizer):,} tokens, "
              f"{ranks.world_size} x {ranks.device.type}, {s.dtype}, {s.batch_tokens:,} tokens per "
              "step", flush=True)
    return model, init_hash


def compile_blocks(model: ChatLM, backend: str = "inductor") -> None:
    """Compile each block. All blocks of a stack share one graph."""
    for block in (*model.encoder.block, *model.decoder.block):
        block.compile(dynamic=True, backend=backend)
    # some kernels have graphs of their own for lengths that are multiples of 16
    torch._dynamo.config.recompile_limit = 32


def count_turns(files: Iterable[str]) -> int:
    """The largest N for which one prompt in a thousand has N questions or more."""
    counts: Counter[int] = Counter()
    for part in prompts(files):
        # question [SEP] answer [SEP] question
        counts.update((n or 0) // 2 + 1 for n in pc.count_substring(part, data.SEP).to_pylist())
    reached = 0  # prompts of so many turns or more
    for turns in sorted(counts, reverse=True):
        reached += counts[turns]
        if reached >= counts.total() / 1000:
            return min(turns, sample.MAX_TURNS)
    return 1


def check_vocabulary(s: Settings, ranks: Ranks, tokenizer: Tokenizer, model: ChatLM) -> None:
    """Raise ValueError if the model of --init_from has too few tokens; warn if it had others."""
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer):,} tokens and the model in "
                         f"{s.init_from} only {model.config.vocab_size:,}")
    has_own = (Path(s.init_from) / "tokenizer.json").is_file()
    if s.tokenizer and has_own and ranks.is_main:
        own = Tokenizer.from_pretrained(s.init_from)
        if (own.vocab, own.merges) != (tokenizer.vocab, tokenizer.merges):
            note_once(f"warning: {s.tokenizer} has other tokens than {s.init_from} was trained "
                      "with: the model must learn them anew")


def run_identity(s: Settings, model: ChatLM, tokenizer: Tokenizer, init_hash: str | None) -> dict:
    """What may not change when a run is resumed, by flag."""
    shape = asdict(model.config)
    del shape["dropout_rate"]
    return {"--preset or --init_from (the model's shape)": shape,
            "--init_from (the model's weights)": init_hash,
            "--tokenizer": hash_tokenizer(tokenizer),
            "--data": hash_files(s.data_files),
            **{f"--{f.name}": getattr(s, f.name) for f in fields(s) if f.metadata.get("fixed")}}


def make_stream(s: Settings, ranks: Ranks, tokenizer: Tokenizer, files: Iterable[str],
                **options) -> PairStream:
    """options: seed, group and workers of PairStream."""
    return PairStream(files, tokenizer, s.micro_batch_tokens, s.max_len, rank=ranks.rank,
                      world_size=ranks.world_size, columns=s.columns, round_to=s.round_to,
                      **options)


def training_stream(s: Settings, ranks: Ranks, tokenizer: Tokenizer) -> PairStream:
    """The training batches."""
    stream = make_stream(s, ranks, tokenizer, s.data_files, seed=s.seed, group=s.group,
                         workers=s.workers)
    if ranks.is_main and s.group % ranks.world_size:
        even = data.round_up(s.group, ranks.world_size) * s.micro_batch_tokens
        idle = max(0, ranks.world_size - s.group)
        effect = f"of which {idle} have none: they wait" if idle else "which cannot share evenly"
        note_once(f"note: a step has {s.group} micro-batches for {ranks.world_size} processes, "
                  f"{effect}; --batch_tokens {even} or a smaller --micro_batch_tokens gives all "
                  "of them work")
    return stream


# --- the command ----------------------------------------------------------------------------------


def parser_for(kind: type[Settings], description: str, examples: str) -> ArgumentParser:
    """The flags of kind. A value without its flag is None (see resolve), but for EARLY."""
    parser = ArgumentParser(description=description, epilog=f"examples:\n{examples}")
    group: Any = parser
    for f in fields(kind):
        about = f.metadata
        if about.get("group"):
            group = parser.add_argument_group(about["group"])
            if about["group"] == "length":
                group = group.add_mutually_exclusive_group()
        if "help" in about and f.name not in kind.no_flags:
            help_text = about["help"]
            default = f.default if f.name in EARLY else None
            if f.default and not default and "(default:" not in help_text:
                help_text += f" (default: {f.default})"
            group.add_argument(f"--{f.name}", help=help_text, default=default, **about["how"])
    return parser


EXAMPLES = """\
  python train.py --data pairs/train.parquet --valid pairs/valid.parquet --out_dir out/pre
  torchrun --standalone --nproc_per_node=2 train.py --init_from out/pre --data sft.parquet \\
      --out_dir out/sft"""


def main() -> None:
    parser = parser_for(Settings, "Train a model on pairs of prompt and response: pre-training, or "
                        "fine-tuning with --init_from. Without --data: a demo.", EXAMPLES)
    run_training(parser.parse_args(), Settings, ResponseLoss)


@contextlib.contextmanager
def torch_hint(ranks: Ranks) -> Iterator[None]:
    """Turn torch's errors for a lost process and for --compile into a ValueError."""
    try:
        yield
    except RuntimeError as e:
        pattern = "connection (closed|reset|refused)|broken pipe|remote (process|worker)"
        if ranks.world_size > 1 and re.search(pattern, str(e), re.IGNORECASE):
            raise AgreedError("another process of this run has ended; its message says "
                              "why") from None
        compiler = sys.modules.get("torch._dynamo.exc")
        if compiler is None or not isinstance(e, compiler.TorchDynamoException):
            raise
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise ValueError(f"--compile: {reason:.200}: install a C++ compiler (on a GPU also "
                         "Triton), or leave out --compile") from None


def run_training(args: argparse.Namespace, kind: type[Settings],
                 objective_kind: type[Objective]) -> None:
    """Train, then report. The classes are those of train.py or of dpo.py."""
    ranks = Ranks.join(args.device)
    hint = "--micro_batch_tokens in a new run, or resume this one with --checkpoint_activations"
    with (ranks.print_once(), memory_hint(hint), torch_hint(ranks),
          claim(Path(args.out_dir), ranks)):
        saved = find_checkpoint(args.out_dir, args.resume, ranks)
        script = saved.get("script", kind.script) if saved else kind.script
        if script != kind.script:
            raise AgreedError(f"the run in {args.out_dir} is one of {script}: resume it with  "
                              f"python {script} --out_dir {shlex.quote(args.out_dir)}")
        settings = resolve(kind, args, ranks, saved)
        tokenizer = find_tokenizer(settings, ranks, saved)
        model, init_hash = make_model(settings, ranks, tokenizer)
        identity = run_identity(settings, model, tokenizer, init_hash)
        check_identity(identity, saved, settings.out_dir, ranks)
        stream = training_stream(settings, ranks, tokenizer)
        objective = objective_kind(settings, ranks, model, tokenizer, init_hash)
        trainer = Trainer(objective, stream, identity)
        trainer.fit(saved)
        ranks.leave()  # the others need not wait while the first one reports
        if ranks.is_main:
            objective.report_results(trainer.state, trainer.report)


if __name__ == "__main__":
    run(main)
