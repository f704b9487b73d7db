"""Training: pre-training and fine-tuning (SFT) are one loop.

    python train.py                                              the demo: data, tokenizer, model, answers
    python train.py --data A.parquet --valid V.parquet --preset small --out_dir out
    python train.py --init_from out --data S.parquet --valid V.parquet --freeze shared,encoder --lr 1e-4 --out_dir sft
    torchrun --nproc_per_node=2 train.py ...                     the same on two GPUs, or two CPU processes

A step takes a fixed group of micro-batches from the one global sequence that PairStream defines, shares them among the
ranks, sums their gradients, divides by the number of target tokens in the whole group, and updates once. What a step
computes is a function of the checkpoint before it: dropout is seeded by (seed, step, micro-batch), so neither the
number of ranks nor a restart changes it, and a run that was killed goes on bit for bit.
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import gc
import importlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import sample
from chatlm import PRESETS, ChatLM, ChatLMConfig, add_lora, init_bigrams, save_adapter
from data import PairStream
from tokenizer import (AgreedError, ArgumentParser, Corpus, Tokenizer, memory_hint, number, run, write_errors,
                       write_file)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What a new run takes where no flag says otherwise; resolve_args chooses the other defaults, which depend on model and machine.
DEFAULTS = {"freeze": "", "max_len": 320, "schedule": "cosine", "warmup_steps": 100, "optimizer": "adafactor", "weight_decay": 0.01,
            "grad_clip": 1.0, "dropout": 0.0, "dtype": "auto", "compile": False, "checkpoint_activations": False, "eval_every": 500,
            "save_every": 500, "keep": 2, "seed": 0, "workers": 1, "lora_alpha": 16.0, "lora_dropout": 0.0, "lora_targets": "q,v"}
DEMO = {"preset": "demo", "max_steps": 1000, "batch_tokens": 1024, "micro_batch_tokens": 512, "max_len": 64, "vocab_size": 2048,
        "lr": 2e-2}
LIMITS = ("max_steps", "epochs", "time_limit")
PATHS = ("data", "valid", "tokenizer", "init_from")
TIMEOUT = datetime.timedelta(days=2)  # for which ranks wait while the first trains a tokenizer or scores answers; a rank that dies ends all at once
MAX_BAD_STEPS = 10  # in a row, then training stops
BF16_TERAFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121, "A10": 125,
                  "A5000": 111, "4090": 165, "3090": 71, "4060 Ti": 44}  # dense, by NVIDIA's data sheets
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # its kernels for a thousand shapes take gigabytes on a CPU


def parser_for(description: str, defaults: dict | None = None) -> ArgumentParser:
    """The flags that train.py and dpo.py share. They are None where they are not given: see resolve_args."""
    p = ArgumentParser(description=description)
    defaults = {**DEFAULTS, **(defaults or {})}

    def add(flag: str, help: str, **options) -> None:
        default = defaults.get(flag[2:])
        p.add_argument(flag, help=help + (f" (default: {default})" if default not in (None, False, "") else ""), **options)

    add("--data", nargs="+", metavar="A.parquet", help="training pairs: Parquet files, or folders of Parquet shards (default: the demo)")
    add("--valid", metavar="V.parquet", help="held-out pairs to validate on (default: no validation)")
    add("--tokenizer", metavar="DIR", help="folder with tokenizer.json (default: that of --init_from, else one is trained on --data)")
    add("--init_from", metavar="MODEL_DIR", help="model folder to start from")
    p.add_argument("--out_dir", default="out", help="folder for the model, best/, checkpoint/ and log.jsonl")
    add("--freeze", metavar="shared,encoder", help="parts that are not trained: shared, encoder, decoder")
    limit = p.add_mutually_exclusive_group()
    limit.add_argument("--max_steps", type=number(int, 1), help="stop after N steps, counting those of earlier runs")
    limit.add_argument("--epochs", type=number(float, 0, above=True), help="stop after N passes over the data (default: 1)")
    limit.add_argument("--time_limit", type=number(float, 0, above=True), metavar="SECONDS",
                       help="stop after N seconds of training, counting earlier runs")
    add("--batch_tokens", type=number(int, 1), help="prompt and response tokens per step, over all processes (default: 65536 on a GPU, "
        "2560 on a CPU, more where that leaves a process without work)")
    add("--micro_batch_tokens", type=number(int, 1), help="padded tokens per forward pass, B * (S + T); lower it if memory runs out "
        "(default: up to 16384, as the GPU's free memory allows; 1280 on a CPU)")
    add("--max_len", type=number(int, 2), help="tokens per side, longer ones are cut")
    add("--lr", type=number(float, 0, above=True), help="peak learning rate; Adafactor caps it at 1/sqrt(step) "
        + ("(default: 1e-5, with LoRA 1e-4)" if "beta" in defaults else
           "(default: 0.02, for 0.2b 0.005, with --init_from 0.002; other optimizers 0.002, with --init_from 1e-4)"))
    add("--min_lr", type=number(float, 0), help="learning rate at the end, and at the beginning of onecycle (default: --lr / 100)")
    add("--schedule", choices=["cosine", "onecycle", "wsd", "constant"], help="how the learning rate changes")
    add("--warmup_steps", type=number(int, 0), help="ramp the learning rate up over N steps, at most a tenth of the training")
    add("--optimizer", choices=["adamw", "adafactor", "muon"], help="muon is for the hidden matrices, with AdamW for the rest")
    add("--weight_decay", type=number(float, 0), help="weight decay of matrices, not of norms and embeddings")
    add("--grad_clip", type=number(float, 0, above=True), help="largest norm of the gradient")
    add("--dropout", type=number(float, 0, 1), help="dropout rate, wherever T5 has it")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="dtype of the matrix products; auto: what the device is fast at")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model")
    add("--checkpoint_activations", action=argparse.BooleanOptionalAction,
        help="recompute activations in backward: less memory, a quarter slower")
    add("--eval_every", type=number(int, 1), help="validate every N steps")
    add("--save_every", type=number(int, 1), help="save a checkpoint every N steps")
    add("--keep", type=number(int, 1), help="checkpoints to keep")
    p.add_argument("--resume", default="auto", metavar="auto|never|CHECKPOINT",
                   help="auto: resume from the newest checkpoint of --out_dir, if there is one, with its settings; never: start anew and "
                   "delete them")
    add("--seed", type=int, help="seed of the weights, the order of the data and dropout")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--workers", type=number(int, 0), help="tokenizing processes per training process")
    add("--lora_rank", type=number(int, 1), help="train low-rank additions to --lora_targets, and nothing else")
    add("--lora_alpha", type=number(float, 0, above=True), help="the additions are scaled by alpha / rank")
    add("--lora_dropout", type=number(float, 0, 1), help="dropout on LoRA inputs")
    add("--lora_targets", metavar="q,k,v,o,wi,wo", help="linear layers that get LoRA, or all")
    return p


# --- devices and ranks -------------------------------------------------------------------------------------------------------

@dataclass
class Ranks:
    """Who this process is among those that train together, and where it computes."""
    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def join(cls, device: str | None) -> "Ranks":
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        local, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and local_size > 1:
            if device != "cuda":
                raise ValueError(f"--device {device} is one GPU for {local_size} processes: leave it out, and each process takes a GPU")
            if torch.cuda.is_available() and local_size > torch.cuda.device_count():
                raise ValueError(f"{local_size} processes need as many GPUs, and this machine has {torch.cuda.device_count()}: "
                                 f"--nproc_per_node={torch.cuda.device_count()} at most")
            device = f"cuda:{local}"
        chosen = sample.pick_device(device)
        if local_size > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
        if world_size > 1 and not dist.is_initialized():
            if dist.is_torchelastic_launched():
                end_with_launcher()
            importlib.import_module("torch.distributed.nn")  # before init_process_group, or its default arguments capture the group
            store, rank, _ = next(dist.rendezvous("env://"))
            if local_size == world_size:  # after a restart gloo would find the addresses of the processes that died
                store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size,
                                    timeout=TIMEOUT, device_id=chosen if chosen.type == "cuda" else None)
        return cls(int(os.environ.get("RANK", 0)), world_size, chosen)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """x, summed in place over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, value) -> list:
        """Every rank's value (of plain Python types), in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def check(self, error: str | None) -> None:
        """Raise on every rank when one has an error: its own, else the first rank's that has one."""
        if found := [e for e in self.all_gather(error) if e]:
            raise AgreedError(error or found[0])

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Put the first rank's numbers into every rank's tensors."""
        for x in tensors if self.world_size > 1 else ():
            dist.broadcast(x.detach(), 0)

    def wait(self) -> None:
        if self.world_size > 1:
            self.sum(torch.zeros(1, device=self.device)).item()

    def leave(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()
            gc.collect()  # gloo's threads end with the last reference to it; one that outlives the interpreter would abort the process


def end_with_launcher() -> None:
    """In a rank: exit when torchrun, its parent, has gone, even by kill -9, or two runs would soon write to one folder."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.2)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def keep_freed_memory() -> None:
    """glibc hands large blocks back to the system as they are freed, and a new one costs a page fault every 4 KB: tell it to keep
    them (mallopt's M_MMAP_MAX and M_TRIM_THRESHOLD). A training step frees and takes the same few blocks again and again."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-4, 0)
        mallopt(-1, -1)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the device multiplies it natively, on a GPU without it float16, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


# --- optimizer and schedule -----------------------------------------------------------------------------------------------------

def make_optimizers(model: nn.Module, name: str, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Weight decay is for the matrices of linear layers: norms, embeddings and position biases are left alone."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def is_matrix(name: str, p: nn.Parameter) -> bool:
        return p.dim() == 2 and not any(part in name for part in ("shared", "relative_attention_bias", "lm_head"))

    matrices, rest = [p for n, p in named if is_matrix(n, p)], [p for n, p in named if not is_matrix(n, p)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if name == "muon":
        optimizers: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
        return [*optimizers, torch.optim.AdamW(groups[1:], lr=lr, betas=(0.9, 0.98), fused=True)] if rest else optimizers
    groups = [g for g in groups if g["params"]]
    return [torch.optim.Adafactor(groups, lr=lr) if name == "adafactor" else torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)]


def clip_gradient(gradient: Tensor, divisor: Tensor | float, max_norm: float) -> Tensor:
    """Divide the flat gradient (P,) in place, then scale it down to max_norm if its norm is larger. Returns the norm before,
    (), on the gradient's device: nothing here waits for a GPU."""
    gradient.div_(divisor)
    norm = torch.stack([part.dot(part) for part in gradient.split(1 << 22)]).sum().sqrt()  # in parts: float32 adds up rounding
    gradient.mul_((max_norm / norm).clamp(max=1))
    return norm


def learning_rate(schedule: str, progress: float, step: int, lr: float, min_lr: float, warmup_steps: int) -> float:
    """progress: 0 to 1, the share of the training that is behind; step: counted from 0. It rises from 0 for warmup_steps,
    or for a tenth of a training that is shorter than ten times that."""
    def falling(x: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, x)))

    if schedule == "onecycle":  # up for the first 30 %, then down
        share = falling(1 - progress / 0.3) if progress < 0.3 else falling((progress - 0.3) / 0.7)
        return min_lr + (lr - min_lr) * share
    share = 1.0
    if schedule == "cosine":
        share = falling(progress)
    elif schedule == "wsd":  # warmup, stable, decay: a straight line down over the last fifth
        share = min(1.0, max(0.0, 1 - progress) / 0.2)
    return (min_lr + (lr - min_lr) * share) * min(1.0, max((step + 1) / max(1, warmup_steps), progress / 0.1))


# --- checkpoints -------------------------------------------------------------------------------------------------------------------

@dataclass
class State:
    """All that changes in training besides weights and optimizers: with those, what a checkpoint holds."""
    step: int = 0
    tokens: int = 0  # non-padding ones seen so far, both sides, all ranks
    elapsed_s: float = 0.0
    best_val: float = math.inf
    bad_steps: int = 0  # skipped because the loss or the gradient was not finite
    loss_scale: float = 2.0 ** 16  # float16 only
    scaled_steps: int = 0  # since the loss scale last changed
    stream: dict = field(default_factory=lambda: {"epoch": 0, "window": 0, "batch": 0})


def save_checkpoint(folder: Path, keep: int, model: nn.Module, optimizers: list, state: State, identity: dict, settings: dict) -> None:
    """checkpoint/step-N-HASH.pt, the hash being that of its bytes; of the older ones keep - 1 stay. identity: what may not
    change when the run is resumed; settings: the flags that a resumed run takes from here."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    saved = {"model": trained, "optimizers": [o.state_dict() for o in optimizers], "state": dataclasses.asdict(state),
             "identity": identity, "settings": settings}
    temporary = folder / "writing.tmp"
    try:
        with write_errors(folder / "checkpoint", RuntimeError):  # torch.save raises RuntimeError on a full disk
            torch.save(saved, temporary)
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, folder / f"step-{state.step:08d}-{hash_file(temporary)}.pt")
    finally:
        temporary.unlink(missing_ok=True)
    for old in list_checkpoints(folder)[keep:]:
        old.unlink()


def load_checkpoint(saved: dict, model: nn.Module, optimizers: list) -> State:
    """The twin of save_checkpoint: put what it saved into model and optimizers."""
    model.load_state_dict(saved["model"], strict=False)
    for optimizer, s in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(copy.deepcopy(s))  # copied, as `saved` is mapped from the file
    return State(**saved["state"])


def check_identity(identity: dict, saved: dict | None, out_dir: str, ranks: Ranks) -> None:
    """Raises ValueError, naming the flag, where processes differ in what must be one, or a run in what it was before."""
    first = ranks.all_gather(identity)[0]
    differs = [flag for flag in identity if identity[flag] != first[flag]]
    ranks.check(f"{differs[0]}: this process has other files or values than the first (machines must share {out_dir} and the data, "
                "or have equal copies)" if differs else None)
    for flag, value in identity.items() if saved else ():
        if (before := saved["identity"].get(flag)) != value:
            shown = f"then {before}, now {value}"
            if isinstance(value, dict) and isinstance(before, dict):
                shown = ", ".join(f"{k} was {before.get(k)}, is {value.get(k)}" for k in value if before.get(k) != value.get(k))
            raise AgreedError(f"{flag} is not what it was in the run that {out_dir} continues ({shown}): give the old value, "
                              "another --out_dir, or --resume never to start anew")


@contextlib.contextmanager
def claimed(folder: Path, ranks: Ranks, patience_s: float = 5.0) -> Iterator[None]:
    """Keep other runs out of the folder meanwhile. Raises ValueError where another is at work there, and has not ended within
    patience_s: one that was killed takes a moment."""
    if fcntl is None or not ranks.first:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle, begin_s = os.open(folder, os.O_RDONLY), time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - begin_s > patience_s:
                    raise ValueError(f"another run is at work in {folder}: wait for its end, or choose another --out_dir") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)


def hash_file(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def newest_checkpoint(out_dir: Path, resume: str) -> Path | None:
    """The newest checkpoint whose bytes are what its name says; damaged ones are reported and skipped."""
    if resume == "never":
        return None
    if resume != "auto":
        candidates = [Path(resume)] if Path(resume).is_file() else list_checkpoints(Path(resume))
        if not candidates:
            raise FileNotFoundError(f"--resume {resume}: no checkpoint there")
    else:
        candidates = list_checkpoints(out_dir / "checkpoint")
    for path in candidates:
        if hash_file(path) == path.stem.rpartition("-")[2]:
            return path
        print(f"warning: {path} is damaged and skipped", file=sys.stderr)
    if candidates:
        raise ValueError(f"every checkpoint in {candidates[0].parent} is damaged; --resume never starts anew")
    return None


def find_checkpoint(out_dir: str, resume: str, ranks: Ranks) -> dict | None:
    """The content of the checkpoint to resume from, and its path, on every rank that which the first rank finds; None: a new run."""
    path = newest_checkpoint(Path(out_dir), resume) if ranks.first else None
    name = ranks.all_gather(path.name if path else None)[0]
    if name is None:
        return None
    if path is None:
        given = Path(resume)
        folder = Path(out_dir) / "checkpoint" if resume == "auto" else given if given.is_dir() else given.parent
        path = folder / name
    same = path.is_file() and (ranks.first or hash_file(path) == path.stem.rpartition("-")[2])
    ranks.check(None if same else f"{path.parent} has no {name}, from which the first process resumes: --out_dir must be on a file "
                                  "system that all machines share")
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if "settings" not in saved:
        raise AgreedError(f"{path} was written by an earlier version, whose runs cannot be resumed: start anew from the model with "
                          f"--init_from {out_dir} and another --out_dir")
    return saved | {"path": str(path)}


# --- the loop ------------------------------------------------------------------------------------------------------------------------

@dataclass
class Objective:
    """What is trained: train.py's is the loss of the responses, dpo.py's the preference between two."""
    # batch -> (quantity to minimise, summed over the batch; what to divide it by; the sums named in `extra`)
    loss: Callable[[dict], tuple[Tensor, ...]]
    evaluate: Callable[[], dict]  # the values to log at an evaluation, val_loss among them
    export: Callable[[Path], None]  # write a folder that can be used
    extra: tuple[str, ...] = ()  # other means to log
    answers: Callable[[], dict] | None = None  # bleu4 of answers to held-out prompts
    begin: Callable[[PairStream], None] | None = None  # what a new run does to its weights first


class Report:
    """One line that updates in a terminal, or a plain line now and then; log.jsonl always, TensorBoard's events where it is installed."""

    def __init__(self, out_dir: Path, first: bool, step: int):
        self.first, self.terminal, self.shown_s = first, sys.stdout.isatty(), 0.0
        if not first:
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        path = out_dir / "log.jsonl"
        kept = []
        if path.exists():  # what came after the checkpoint that we go on from will come again
            for line in path.read_text("utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step and step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a power cut left half written
        write_file(path, "".join(kept))
        self.path, self.file = path, open(path, "a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=step + 1)
        except ImportError:
            self.board = None

    def log(self, values: dict) -> None:
        if not self.first:
            return
        with write_errors(self.path):
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        for name, value in values.items() if self.board else ():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        if self.first:
            self.file.close()
            if self.board:
                self.board.close()

    def say(self, text: str) -> None:
        if self.first:
            print(("\r\x1b[K" if self.terminal else "") + text, flush=True)

    def show(self, values: dict, left_s: float, now: bool = False) -> None:
        if not self.first or time.monotonic() - self.shown_s < (0.2 if self.terminal else 10) and not now:
            return
        self.shown_s = time.monotonic()
        text = (f"step {values['step']:,}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['tok_per_s']:,.0f} tokens/s  "
                f"{duration(left_s)} left")
        print("\r\x1b[K" + text if self.terminal else text, end="" if self.terminal else "\n", flush=True)


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s"


class Stop:
    """Ctrl-C and SIGTERM ask for an end after the running step; a second one ends at once."""

    def __init__(self):
        self.signal = 0
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.ask)

    def ask(self, number: int, frame) -> None:
        self.signal = number
        self.leave()

    def leave(self) -> None:
        """Back to what signals do otherwise."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fit(args: argparse.Namespace, ranks: Ranks, model: ChatLM, stream: PairStream, objective: Objective, identity: dict,
        saved: dict | None) -> State:
    """Train until a limit is reached or someone asks for an end. Weights change in place; returns the final state.
    saved: the content of the checkpoint to resume from."""
    out_dir, device, stop = Path(args.out_dir), ranks.device, Stop()
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    min_lr = args.lr / 100 if args.min_lr is None else args.min_lr
    dtype = getattr(torch, args.dtype)
    state = State(stream=dict(stream.state))
    if saved:
        state = load_checkpoint(saved, model, optimizers)
        stream.state = dict(state.stream)
    settings = {name: value for name, value in vars(args).items() if name in args.stored}
    ranks.wait()
    if ranks.first:  # checkpoints newer than the one to resume from would be taken for the newest later
        for path in list_checkpoints(out_dir / "checkpoint"):
            if int(path.name.split("-")[1]) > state.step or not saved:
                path.unlink()
    report = Report(out_dir, ranks.first, state.step)
    if saved:
        report.say(f"resuming from {saved['path']}: step {state.step:,}, {state.tokens:,} tokens")
        saved.clear()
    elif objective.begin:
        objective.begin(stream)
    keep_freed_memory()  # only now, so that the memory of initialization is returned to the system first

    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.zeros(sum(p.numel() for p in parameters), device=device)  # one vector, of which p.grad are views
    for p, part in zip(parameters, gradient.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)
    kernels = [SDPBackend.MATH] if device.type == "cpu" else [  # on a CPU flash attention's backward is the slower one
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def progress() -> float:
        if args.max_steps:
            return state.step / args.max_steps
        return state.elapsed_s / args.time_limit if args.time_limit else stream.epoch / args.epochs

    def save() -> None:
        if ranks.first:
            save_checkpoint(out_dir / "checkpoint", args.keep, model, optimizers, state, identity, settings)
            objective.export(out_dir)  # after it: killed between the two, a model without a checkpoint could not go on
        ranks.wait()

    def evaluate() -> None:
        model.eval()
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            values = objective.evaluate()
        report.log({"step": state.step, **values, "elapsed": state.elapsed_s})
        better = values["val_loss"] < state.best_val
        report.say(f"step {state.step:,}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()) + ("  (best)" if better else ""))
        if better:
            state.best_val = values["val_loss"]
            if ranks.first:
                objective.export(out_dir / "best")

    def score() -> None:
        model.eval()
        if ranks.first:
            values = objective.answers()
            report.log({"step": state.step, **values})
            report.say(f"step {state.step:,}  " + "  ".join(f"{k} {v:.2f}" for k, v in values.items()))
        ranks.wait()

    names = ["loss", "units", *objective.extra, "source", "target", "seconds", "asked"]  # what is summed over the ranks
    peak_flops = ranks.world_size * next((1e12 * tera for name, tera in BF16_TERAFLOPS.items() if name in device_name(device)), 0)
    bad_in_a_row, asked, done = 0, False, progress()
    done_before, elapsed_before_s = done, state.elapsed_s
    if done >= 1 and ranks.first:  # killed after the last checkpoint, perhaps before its export
        objective.export(out_dir)
    tick_s = time.perf_counter()
    while done < 1 and not asked:
        model.train()
        step_s = time.perf_counter()
        lr = learning_rate(args.schedule, done, state.step, args.lr, min_lr, args.warmup_steps)
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr
        scale = (state.loss_scale if dtype == torch.float16 else 1.0) / args.batch_tokens
        sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        gradient.zero_()
        for j, batch in zip(itertools.count(ranks.rank, ranks.world_size), stream.next_group()):
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            torch.manual_seed(xxhash.xxh3_64_intdigest(f"{args.seed} {state.step} {j}".encode()) >> 1)
            with sdpa_kernel(kernels):  # for backward too, which may compute activations again
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, units, *extra = objective.loss(batch)
                (loss * scale).backward()
            targets = sum((v != data.IGNORED).sum() for k, v in batch.items() if k.endswith("labels"))
            sums[:-2] += torch.stack([x.detach().double() for x in (loss, units, *extra, batch["attention_mask"].sum(), targets)])
        if ranks.first:
            sums[-2] = time.perf_counter() - tick_s
            tick_s = time.perf_counter()
        sums[-1] = float(stop.signal > 0)
        ranks.sum(gradient)
        total = dict(zip(names, ranks.sum(sums).tolist()))
        units = max(1.0, total["units"])
        norm = float(clip_gradient(gradient, units * scale, args.grad_clip))
        finite, overflow = math.isfinite(total["loss"]), not math.isfinite(norm)
        if finite and not overflow:
            for optimizer in optimizers:
                optimizer.step()
        if dtype == torch.float16 and finite:  # an overflow halves the scale; 1,000 steps without one double it
            state.scaled_steps = 0 if overflow else state.scaled_steps + 1
            if overflow or state.scaled_steps % 1000 == 0:
                state.loss_scale *= 0.5 if overflow else 2.0
        state.step += 1
        tokens = int(total["source"] + total["target"])
        state.tokens += tokens
        state.elapsed_s += total["seconds"]
        state.stream = dict(stream.state)
        bad = not finite or overflow and (dtype != torch.float16 or state.loss_scale < 1)
        bad_in_a_row = bad_in_a_row + 1 if bad else 0
        state.bad_steps += bad
        values = {"step": state.step, "loss": total["loss"] / units if finite else None, "lr": lr, "tokens": state.tokens,
                  "tok_per_s": tokens / (time.perf_counter() - step_s), "elapsed": state.elapsed_s,
                  **{name: total[name] / units for name in objective.extra}}
        if peak_flops:
            values["mfu"] = model.train_flops(total["source"], total["target"]) / (time.perf_counter() - step_s) / peak_flops
        report.log(values)
        if bad:
            report.say(f"step {state.step:,}: the loss or its gradient is not finite; nothing was changed")
        if bad_in_a_row == MAX_BAD_STEPS:
            raise ValueError(f"no finite loss in {MAX_BAD_STEPS} steps in a row: lower --lr or choose another --dtype; "
                             f"the checkpoints in {out_dir / 'checkpoint'} are from before")
        done, asked = progress(), total["asked"] > 0
        if finite:
            report.show(values, (1 - done) * (state.elapsed_s - elapsed_before_s) / max(done - done_before, 1e-9))
        if args.valid and (state.step % args.eval_every == 0 or done >= 1):
            evaluate()
        if objective.answers and args.bleu_every and state.step % args.bleu_every == 0 and done < 1:
            score()
        if state.step % args.save_every == 0 or done >= 1 or asked:
            save()
    stream.close()
    report.close()
    stop.leave()
    if asked:
        report.say(f"stopped at step {state.step:,} and saved; the same command goes on from there")
        ranks.leave()
        sys.exit(128 + (stop.signal or signal.SIGTERM))
    return state


# --- pre-training and SFT ---------------------------------------------------------------------------------------------------------------

def response_loss(args: argparse.Namespace, ranks: Ranks, model: ChatLM, tokenizer: Tokenizer) -> Objective:
    """The mean nats of the responses' tokens, and on --valid also their perplexity and nats per character."""
    batches: list[dict] = []
    chars = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    if args.valid:
        batches = list(PairStream(args.valid_files, tokenizer, args.micro_batch_tokens, args.max_len, 0, ranks.rank, ranks.world_size).one_epoch())
        chars += sum(len(tokenizer.decode(row[row >= 0])) for batch in batches for row in batch["labels"].numpy())
        if not float(ranks.sum(chars)):
            raise AgreedError(f"{args.valid} has no row with a prompt and a response")

    def loss(batch: dict) -> tuple[Tensor, Tensor]:
        return model.loss_sum(**batch), (batch["labels"] != data.IGNORED).sum()

    def evaluate() -> dict:
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        for batch in batches:
            sums += torch.stack([x.double() for x in loss({k: v.to(ranks.device) for k, v in batch.items()})])
        nats, tokens = ranks.sum(sums).tolist()
        return {"val_loss": nats / tokens, "val_ppl": math.exp(min(700.0, nats / tokens)), "val_nats_per_char": nats / float(chars)}

    def first_loss(stream: PairStream) -> float:
        """Mean nats per target token of the first micro-batch, without dropout."""
        batch = {k: v.to(ranks.device) for k, v in next(stream.one_epoch()).items()}
        model.eval()
        with torch.no_grad():
            nats, tokens = loss(batch)
        return float(nats / tokens)

    def begin(stream: PairStream) -> None:
        before, after = stream.successions()
        if ranks.first and len(after):  # a window may hold no text at all
            random, random_loss = [p.detach().cpu().clone() for p in model.parameters()], first_loss(stream)
            init_bigrams(model, torch.from_numpy(before), torch.from_numpy(after))
            counts_loss = first_loss(stream)
            if counts_loss < random_loss:
                print(f"initialized from counts of {len(after):,} token pairs", flush=True)
            else:  # so few tokens that their counts mislead
                with torch.no_grad():
                    for p, r in zip(model.parameters(), random):
                        p.copy_(r)
                print(f"initialized at random: {len(after):,} tokens are too few to count (loss {counts_loss:.1f}, at random {random_loss:.1f})", flush=True)
        ranks.share(model.parameters())

    def answers() -> dict:
        rows = held_out(args)
        return {"bleu4": sample.score(model, tokenizer, rows, args.max_len, max_new_tokens=min(128, args.max_len))[0]["bleu4"]}

    return Objective(loss, evaluate, exporter(args, model, tokenizer), answers=answers if args.valid else None,
                     begin=None if args.init_from or args.freeze else begin)


def held_out(args: argparse.Namespace) -> list[dict]:
    """The pairs of --valid on which answers are scored: all of the demo's, else some 200 spread over the file."""
    rows = [r for r in data.read_rows(args.valid_files) if r.get("prompt") and r.get("response")]
    return rows if args.demo else rows[::-(-len(rows) // 200) or 1]


def exporter(args: argparse.Namespace, model: ChatLM, tokenizer: Tokenizer) -> Callable[[Path], None]:
    """What writes a model folder, or with LoRA an adapter folder."""
    def export(folder: Path) -> None:
        if args.lora_rank:
            save_adapter(model, folder, args.init_from, args.lora_rank, args.lora_alpha, args.lora_targets.split(","),
                         args.lora_dropout)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return export


def resolve_args(args: argparse.Namespace, ranks: Ranks, saved: dict | None, columns: tuple[str, ...] = ("prompt", "response"),
                 defaults: dict | None = None, find_files: Callable | None = None) -> None:
    """Decide every setting once, when a run starts: by its flag, else by the checkpoint that it resumes, else by default.

    Fills args in place, the same on every rank; args.stored names the settings that checkpoints keep. Raises ValueError for
    what cannot work, before anything is written.
    """
    args.given = {name for name, value in vars(args).items() if value is not None} - {"resume", "out_dir"}
    args.stored = {*vars(args), "demo"} - {"given", "stored", "resume", "out_dir", "device"}
    for name, value in (saved["settings"] if saved else {}).items():
        if getattr(args, name, None) is None and not (name in LIMITS and args.given & set(LIMITS)):
            setattr(args, name, value)
    args.demo = args.data is None or bool(getattr(args, "demo", False)) and "data" not in args.given
    if args.demo:
        if args.init_from or args.valid and "valid" in args.given:
            raise ValueError("--init_from and --valid need --data")
        make_demo_data(args, ranks)
        defaults = {**DEMO, **(defaults or {})}
        if args.epochs or args.time_limit:
            del defaults["max_steps"]
    check_given(args)
    if args.lora_rank and not args.init_from:
        raise ValueError("--lora_rank adds to a model: name it with --init_from")
    if args.init_from and args.preset:
        raise ValueError("--preset is for a new model; --init_from brings its own shape")
    defaults = {**DEFAULTS, "preset": "small", "vocab_size": 29298, **(defaults or {})}
    batch_tokens = defaults.pop("batch_tokens", 65536 if ranks.device.type == "cuda" else 2560)
    for name, value in defaults.items():
        if getattr(args, name, None) is None and not (name == "preset" and args.init_from):
            setattr(args, name, value)
    if not (args.max_steps or args.epochs or args.time_limit):
        args.epochs = 1.0
    args.lr = args.lr or default_lr(args)
    if args.dtype == "auto":
        args.dtype = str(pick_dtype("auto", ranks.device)).removeprefix("torch.")
    if args.optimizer == "muon" and pick_dtype("auto", ranks.device) == torch.float32 and ranks.first:
        print("note: torch's Muon computes in bfloat16, for which this CPU has no instructions: it will be slow", file=sys.stderr)
    if args.micro_batch_tokens is None:
        args.micro_batch_tokens = min(ranks.all_gather(default_micro_batch(args, ranks.device, len(columns))))
    if args.batch_tokens is None:
        group = max(1, round(batch_tokens / args.micro_batch_tokens))
        args.batch_tokens = -(-group // ranks.world_size) * ranks.world_size * args.micro_batch_tokens  # equal shares
    for name, value in ranks.all_gather({name: getattr(args, name) for name in args.stored - set(PATHS)})[0].items():
        setattr(args, name, value)  # machines may differ in what they are fast at: the first decides
    for part in filter(None, args.freeze.split(",")):
        if part not in ("shared", "encoder", "decoder"):
            raise ValueError(f"--freeze {part!r}: only shared, encoder and decoder can be frozen")
    find_files = find_files or training_files
    args.data_files, args.valid_files = find_files(args.data, columns), find_files([args.valid] if args.valid else [], columns)
    out = Path(args.out_dir)
    if args.resume == "auto" and not saved and (out / "config.json").exists():
        raise ValueError(f"{out} holds a model and no checkpoint to resume from: choose another --out_dir, or --resume never to replace it")
    for name in ("eval_every", "bleu_every"):
        if name in args.given and not args.valid and ranks.first:
            print(f"note: --{name} has no effect without --valid", file=sys.stderr)
    if args.valid and ranks.first and (found := overlap(args.data_files, args.valid_files)):
        print(f"warning: {found:,} prompts of --valid are in --data too, and measure memory (data.py split keeps them apart)", file=sys.stderr)


def check_given(args: argparse.Namespace) -> None:
    """Raises ValueError for a flag that has no effect next to the others, once all settings are resolved."""
    for name in ("lora_alpha", "lora_dropout", "lora_targets"):
        if name in args.given and not args.lora_rank:
            raise ValueError(f"--{name} has no effect without --lora_rank")
    if "vocab_size" in args.given and (args.tokenizer or args.init_from):
        raise ValueError(f"--vocab_size is for a tokenizer that is trained here; --{'tokenizer' if args.tokenizer else 'init_from'} brings its own")


def default_lr(args: argparse.Namespace) -> float:
    if args.optimizer != "adafactor":
        return 1e-4 if args.init_from else 2e-3
    if args.init_from:
        return 2e-3
    return 5e-3 if args.preset == "0.2b" else 2e-2


def default_micro_batch(args: argparse.Namespace, device: torch.device, columns: int) -> int:
    """B * (S + T) for one forward pass: a power of two that fits the GPU's free memory, 16,384 at most; 1,280 on a CPU; never
    less than one row of max_len tokens in every column. Raises ValueError if the model leaves no room for that."""
    one_row = columns * args.max_len
    if device.type != "cuda":
        return max(one_row, 1280)
    config = ChatLMConfig.from_pretrained(args.init_from) if args.init_from else ChatLMConfig.preset(args.preset, vocab_size=args.vocab_size)
    free_bytes = torch.cuda.mem_get_info(device)[0]
    room_bytes = 0.85 * free_bytes - state_bytes(config, args)
    fits = int(room_bytes / activation_bytes(config, args))
    if fits < one_row:
        raise ValueError(f"{free_bytes / 1e9:.1f} GB of GPU memory are free, too little for this model and rows of {columns} x {args.max_len} "
                         "tokens: lower --max_len, add --checkpoint_activations, or choose a smaller --preset")
    return max(one_row, min(16384, 1 << fits.bit_length() - 1))


def state_bytes(config: ChatLMConfig, args: argparse.Namespace) -> int:
    """Bytes on the device besides activations: weights and gradients in float32, their copies in the autocast dtype, the
    optimizer's state, and half a gigabyte for the loss and libraries."""
    with torch.device("meta"):
        parameters = ChatLM(config).num_parameters()
    trained = parameters // 50 if args.lora_rank else parameters
    optimizer = {"adafactor": 0, "muon": 4, "adamw": 8}[args.optimizer]
    return parameters * (4 + 2) + trained * (4 + optimizer) + (1 << 29)


def activation_bytes(config: ChatLMConfig, args: argparse.Namespace) -> int:
    """Bytes that autograd saves for each padded token, a tenth more than counted (tests/test_gpu.py); weights are in state_bytes."""
    inner, halves = config.num_heads * config.d_kv, 2 if args.dtype == "float32" else 1
    gated = 4 if config.feed_forward_proj == "gated-gelu" else 1
    layer = halves * (22 * config.d_model + 18 * inner + 2 * (1 + gated) * config.d_ff + 2 * config.num_heads * args.max_len)
    if args.dropout:  # the output of each dropout and its mask
        layer += 3 * config.d_model + (1 + 2 * halves) * config.d_ff
    layers = max(config.num_layers, config.num_decoder_layers or 0)
    return layers * 4 * config.d_model + layer if args.checkpoint_activations else layers * layer


def training_files(paths: list[str], columns: tuple[str, ...]) -> list[str]:
    """Parquet files, and those in folders, in a fixed order. Raises ValueError, naming the command that converts it, for any other file,
    and where a column is missing."""
    files = []
    for path in paths:
        if Path(path).is_file() and Path(path).suffix.lower() != ".parquet":
            source = "preference" if "chosen" in columns else "pairs"
            raise ValueError(f"{path} is not Parquet: convert it with  python data.py clean --source {source} {shlex.quote(path)} --out "
                             f"{shlex.quote(Path(path).name.partition('.')[0] + '.parquet')}")
        found = data.input_files([path]) if Path(path).is_dir() else [Path(path)]
        shards = [str(file) for file in found if file.suffix.lower() == ".parquet" or not Path(path).is_dir()]
        if not shards:
            raise ValueError(f"{path} has no Parquet files: convert what it has with  python data.py clean --source pairs "
                             f"{shlex.quote(path)} --out data.parquet")
        if len(shards) < len(found):
            print(f"note: {len(found) - len(shards):,} files in {path} are not Parquet and are skipped", file=sys.stderr)
        files += shards
    for file in files:
        data.open_parquet(file, columns)
    return files


def make_demo_data(args: argparse.Namespace, ranks: Ranks) -> None:
    """Point args at the demo's files in the out_dir; the first rank writes them if they are not there."""
    folder = Path(args.out_dir) / "demo"
    args.data, args.valid = [str(folder / "train.parquet")], str(folder / "valid.parquet")
    if ranks.first and not (Path(args.valid).is_file() and Path(args.data[0]).is_file()):
        print("making demo data: questions about capitals, opposites, units, sums, ...", flush=True)
        data.write_demo(folder)
    ranks.wait()


def overlap(files: list[str], valid_files: list[str]) -> int:
    """How many different prompts of the held-out files are prompts in files too."""
    def prompts(path: str) -> Iterator[pa.Array]:
        for batch in data.open_parquet(path, ("prompt",)).iter_batches(65536, columns=["prompt"]):
            yield data.text_column(batch["prompt"])

    held, found = pa.chunked_array((part for path in valid_files for part in prompts(path)), pa.large_string()), set()
    for path in files:
        for part in prompts(path):
            found.update(part.filter(pc.is_in(part, held)).to_pylist())
    return len(found - {None, ""})


def find_tokenizer(args: argparse.Namespace, ranks: Ranks) -> Tokenizer:
    """The one named, or the starting model's, or the one that this run, or a user, has put into the out_dir; else one is trained on the
    data and put there. checkpoint/tokenizer.json tells what it was trained from."""
    if args.tokenizer or args.init_from:
        return Tokenizer.from_pretrained(args.tokenizer or args.init_from, append_eos=True)
    out = Path(args.out_dir)
    if ranks.first:
        train_tokenizer(args, out)
    ranks.wait()
    if not (out / "tokenizer.json").is_file():
        raise ValueError(f"{out} has no tokenizer.json, which the first process wrote: --out_dir must be on a file system that all machines share")
    return Tokenizer.from_pretrained(out)


def train_tokenizer(args: argparse.Namespace, out: Path) -> None:
    """Train a tokenizer into out, unless it has one of the same data and size, or one that a user has put there."""
    source, record = {"data": data.footprint(args.data_files), "vocab_size": args.vocab_size}, out / "checkpoint" / "tokenizer.json"
    if (out / "tokenizer.json").is_file():
        if not record.is_file():
            if "vocab_size" in args.given:
                raise ValueError(f"--vocab_size has no effect: {out} has a tokenizer already; delete its tokenizer.json, or choose another --out_dir")
            print(f"using the tokenizer in {out}", flush=True)
            return
        if json.loads(record.read_text("utf-8")) == source:
            return
        print(f"the tokenizer in {out} was trained on other data or for another --vocab_size", flush=True)
    print(f"training a tokenizer of up to {args.vocab_size:,} tokens on {', '.join(args.data)}", flush=True)
    tokenizer = Tokenizer.train(Corpus(args.data_files), args.vocab_size, memory_bytes=4 * 10 ** 9, progress=sys.stderr.isatty())
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    tokenizer.save_pretrained(out)
    write_file(record, json.dumps(source))


def hash_weights(model: ChatLM) -> str:
    """A hash of all parameters."""
    digest = xxhash.xxh3_64()
    for name, p in model.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def make_model(args: argparse.Namespace, ranks: Ranks, tokenizer: Tokenizer) -> ChatLM:
    torch.manual_seed(args.seed)
    if args.init_from:
        model = ChatLM.from_pretrained(args.init_from, torch.float32, ranks.device)
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer):,} tokens and the model in {args.init_from} only {model.config.vocab_size:,}")
        if args.tokenizer and ranks.first and (Path(args.init_from) / "tokenizer.json").is_file():
            own = Tokenizer.from_pretrained(args.init_from)
            if (own.vocab, own.merges) != (tokenizer.vocab, tokenizer.merges):
                print(f"warning: {args.tokenizer} has other tokens than {args.init_from} was trained with: that model must learn them anew",
                      file=sys.stderr)
        args.init_hash = hash_weights(model)
    else:
        model = ChatLM(ChatLMConfig.preset(args.preset, vocab_size=len(tokenizer))).to(ranks.device)
        args.init_hash = None
    model.config.dropout_rate = args.dropout
    model.encoder.checkpoint_activations = model.decoder.checkpoint_activations = args.checkpoint_activations
    for part in filter(None, args.freeze.split(",")):
        getattr(model, part).requires_grad_(False)
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets.split(","), args.lora_dropout)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"--freeze {args.freeze} leaves nothing to train")
    if args.compile:
        model.encode, model.decode = torch.compile(model.encode, dynamic=True), torch.compile(model.decode, dynamic=True)
    return model


def run_identity(args: argparse.Namespace, model: ChatLM, tokenizer: Tokenizer, *names: str) -> dict:
    """What may not change when a run is resumed, by flag; names: more settings of that kind."""
    shape = dataclasses.asdict(model.config)
    del shape["dropout_rate"]
    fixed = ("micro_batch_tokens", "max_len", "seed", "optimizer", "freeze", "lora_rank", "lora_alpha", "lora_targets", "lora_dropout", *names)
    return {"--preset or --init_from (the model's shape)": shape, "--init_from (the model's weights)": args.init_hash,
            "--tokenizer": xxhash.xxh3_64_hexdigest(tokenizer.to_json().encode()), "--data": data.footprint(args.data_files),
            **{f"--{name}": getattr(args, name) for name in fixed}}


def closing(args: argparse.Namespace, model: ChatLM, tokenizer: Tokenizer, state: State) -> None:
    """What a finished run can say for itself: scores on held-out pairs, and a few answers."""
    model.eval()
    rows, said = held_out(args), []
    for name, part in ([("held-out facts", [r for r in rows if not data.is_sum(r["prompt"])]),
                        ("unseen sums", [r for r in rows if data.is_sum(r["prompt"])])] if args.demo else [("held-out pairs", rows)]):
        if part:
            result, answers = sample.score(model, tokenizer, part, args.max_len, max_new_tokens=min(128, args.max_len))
            said += [(answer, row["response"]) for row, answer in zip(part, answers)]
            print(f"\n{name}: {len(part):,}, exact match {100 * result['exact_match']:.1f} %, BLEU-4 {result['bleu4']:.1f}")
            for row, answer in list(zip(part, answers))[::max(1, len(part) // 4)][:4]:
                print(f"  {row['prompt']!r:.120} -> {answer!r:.200}")
    if said and '"bleu4"' not in (Path(args.out_dir) / "log.jsonl").read_text("utf-8").splitlines()[-1]:  # a finished run that is called again has it
        report = Report(Path(args.out_dir), True, state.step)
        report.log({"step": state.step, "bleu4": sample.bleu4(*zip(*said))})
        report.close()
    seconds = f"{state.step:,} steps, {state.tokens:,} tokens, {duration(state.elapsed_s)}"
    asked = "法国的首都是哪里？" if args.demo else "你好"
    command = "python sample.py" + ("" if args.out_dir == "out" else f" --model {shlex.quote(args.out_dir)}")
    print(f"\nfinished: {args.out_dir} is a model folder ({seconds}). Talk to it:\n  {command} --prompt \"{asked}\"\n  {command}")


def report_shares(args: argparse.Namespace, ranks: Ranks, group: int) -> None:
    """One line where processes have unequal shares of a step, or none."""
    if not ranks.first or group % ranks.world_size == 0:
        return
    even = -(-group // ranks.world_size) * ranks.world_size * args.micro_batch_tokens
    idle = max(0, ranks.world_size - group)
    print(f"note: a step has {group} micro-batches for {ranks.world_size} processes"
          + (f", of which {idle} have none: they wait" if idle else ", which cannot share them evenly")
          + f"; --batch_tokens {even} or a smaller --micro_batch_tokens gives all of them work", file=sys.stderr)


def main() -> None:
    parser = parser_for(__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="size of a new model (default: small; demo without --data)")
    parser.add_argument("--vocab_size", type=number(int, 264), help="size of a tokenizer that is trained here (default: 29298; 2048 for the demo)")
    parser.add_argument("--bleu_every", type=number(int, 1), metavar="STEPS", help="score answers on --valid every N steps (default: at the end)")
    args = parser.parse_args()
    with memory_hint("--micro_batch_tokens in a new run, or resume this one with --checkpoint_activations"):
        run_training(args)


def run_training(args: argparse.Namespace) -> None:
    """Train, then score and show answers."""
    ranks = Ranks.join(args.device)
    with claimed(Path(args.out_dir), ranks):
        saved = find_checkpoint(args.out_dir, args.resume, ranks)
        resolve_args(args, ranks, saved)
        tokenizer = find_tokenizer(args, ranks)
        model = make_model(args, ranks, tokenizer)
        group = max(1, round(args.batch_tokens / args.micro_batch_tokens))
        if ranks.first:
            print(f"{model.num_parameters() / 1e6:.1f} million parameters, {len(tokenizer):,} tokens, {ranks.world_size} x {ranks.device.type}, "
                  f"{args.dtype}", flush=True)
        report_shares(args, ranks, group)
        identity = run_identity(args, model, tokenizer)
        check_identity(identity, saved, args.out_dir, ranks)
        stream = PairStream(args.data_files, tokenizer, args.micro_batch_tokens, args.max_len, args.seed, ranks.rank, ranks.world_size,
                            group=group, workers=args.workers)
        state = fit(args, ranks, model, stream, response_loss(args, ranks, model, tokenizer), identity, saved)
        ranks.leave()  # the others need not wait while the first scores answers
        if ranks.first:
            closing(args, model, tokenizer, state)


if __name__ == "__main__":
    run(main)
