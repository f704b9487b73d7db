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
import ctypes
import dataclasses
import errno
import gc
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import sample
from chatlm import PRESETS, ChatLM, ChatLMConfig
from data import PairStream
from tokenizer import ArgumentParser, Corpus, Tokenizer, number, run, write_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DEMO = {"preset": "demo", "max_steps": 1000, "batch_tokens": 1024, "micro_batch_tokens": 512, "max_len": 64, "vocab_size": 2048,
        "lr": 2e-2}
MAX_BAD_STEPS = 10  # in a row, then training stops
BF16_TERAFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121, "A10": 125, "4090": 165, "3090": 71}  # dense, by NVIDIA's data sheets
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # its kernels for a thousand shapes take gigabytes on a CPU


def parser_for(description: str) -> ArgumentParser:
    """The flags that train.py and dpo.py share."""
    p = ArgumentParser(description=description)
    add = p.add_argument
    add("--data", nargs="+", metavar="A.parquet", help="what to train on; none: the demo")
    add("--valid", metavar="V.parquet", help="what to measure on; none: no measuring")
    add("--tokenizer", metavar="DIR", help="folder with tokenizer.json; none: that of --init_from or of --out_dir, else trained on --data")
    add("--init_from", metavar="MODEL_DIR", help="a model folder to start from")
    add("--out_dir", default="out", help="where the model, best/, checkpoint/ and log.jsonl go")
    add("--freeze", default="", metavar="shared,encoder", help="parts that are not trained: shared, encoder, decoder")
    limit = p.add_mutually_exclusive_group()
    limit.add_argument("--max_steps", type=number(int, 1), help="steps in all")
    limit.add_argument("--epochs", type=number(float, 0, above=True), help="passes over the data in all; the default is 1")
    limit.add_argument("--time_limit", type=number(float, 0, above=True), metavar="SECONDS", help="of training in all")
    add("--batch_tokens", type=number(int, 1), help="tokens of a step, both sides, over all ranks; none: 65536 on a GPU, 2560 on a CPU")
    add("--micro_batch_tokens", type=number(int, 1), help="bound on B * (S + T) of one forward pass on one device; none: 16384 on a GPU, 1280 on a CPU")
    add("--max_len", type=number(int, 2), help="tokens a side, longer ones are cut; none: 320")
    add("--lr", type=number(float, 0, above=True),
        help="highest learning rate; none: 0.02 (0.2b 0.005, from a model 0.002), with other optimizers than adafactor 0.002 (1e-4)")
    add("--min_lr", type=number(float, 0), help="where the schedule ends (and one-cycle begins); none: a hundredth of --lr")
    add("--schedule", choices=["cosine", "onecycle", "wsd", "constant"], default="cosine", help="how the learning rate moves")
    add("--warmup_steps", type=number(int, 0), default=100, help="steps in which it rises from 0; a tenth of the training at most")
    add("--optimizer", choices=["adamw", "adafactor", "muon"], help="none: adafactor; muon is for the hidden matrices, with AdamW for the rest")
    add("--weight_decay", type=number(float, 0), default=0.01, help="of matrices, not of norms and embeddings")
    add("--grad_clip", type=number(float, 0, above=True), default=1.0, help="largest norm of the gradient")
    add("--dropout", type=number(float, 0, 1), default=0.0, help="rate, wherever T5 has it")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of the matrix products; auto: what the device is fast at")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--checkpoint_activations", action="store_true", help="keep little for backward and compute it again: less memory, a quarter slower")
    add("--eval_every", type=number(int, 1), default=500, help="steps")
    add("--save_every", type=number(int, 1), default=500, help="steps")
    add("--keep", type=number(int, 1), default=2, help="checkpoints that are kept")
    add("--resume", default="auto", metavar="auto|never|CHECKPOINT",
        help="auto: go on from the newest checkpoint of --out_dir, if there is one; never: begin anew and drop them")
    add("--seed", type=int, default=0, help="of the weights, the order of the data and dropout")
    add("--device", help="cpu, cuda or cuda:N; none: a GPU if there is one")
    add("--workers", type=number(int, 0), default=1, help="background processes a rank that tokenise")
    add("--lora_rank", type=number(int, 1), help="train low-rank additions to --lora_targets, and nothing else")
    add("--lora_alpha", type=number(float, 0, above=True), default=16.0, help="the additions are scaled by alpha / rank")
    add("--lora_dropout", type=number(float, 0, 1), default=0.0, help="rate, of what the additions see")
    add("--lora_targets", default="q,v", metavar="q,k,v,o,wi,wo", help="the linear layers that have them, or all")
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
        if device == "cuda":
            device = f"cuda:{local}"
        chosen = sample.pick_device(device)
        if local_size > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
        if world_size > 1 and not dist.is_initialized():
            end_with_launcher()
            importlib.import_module("torch.distributed.nn")  # imported after the group is made, it would hold it for ever, as a default
            store, rank, _ = next(dist.rendezvous("env://"))
            if local_size == world_size:  # after a restart gloo would find the addresses of the processes that died
                store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size)
        return cls(int(os.environ.get("RANK", 0)), world_size, chosen)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """x, summed in place over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        """Every rank's array, (N,) each with N of its own."""
        if self.world_size == 1:
            return [array]
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = array.nbytes
        sizes = self.sum(sizes).tolist()
        mine = torch.zeros(max(1, *sizes), dtype=torch.uint8, device=self.device)
        mine[:array.nbytes] = torch.from_numpy(array.view(np.uint8))
        every = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(every, mine)
        return [part[:size].cpu().numpy().view(array.dtype) for part, size in zip(every, sizes)]

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
    """In a rank: end when torchrun has gone, even by kill -9, or two runs would soon write to one folder."""
    launcher = os.getppid()
    if launcher == 1 and Path("/proc/1/cmdline").is_file() and b"torch" not in Path("/proc/1/cmdline").read_bytes():
        os._exit(1)  # it had gone before we came here

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


# --- LoRA: Hu et al. 2021 (arXiv:2106.09685), in PEFT's files ------------------------------------------------------------------

class LoRALinear(nn.Linear):
    """W x + (alpha / rank) B A dropout(x), with W frozen, A (rank, in) random and B (out, rank) zero at first."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.scale, self.dropout = alpha / rank, dropout
        make = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, **make)
        self.lora_B = nn.Linear(rank, base.out_features, **make)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(F.dropout(x, self.dropout, self.training))) * self.scale


def add_lora(model: ChatLM, rank: int, alpha: float, targets: Iterable[str], dropout: float = 0.0) -> None:
    """Put LoRALinear in place of the linear layers so named ("all": of every one), and freeze all else."""
    targets = {"q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"} if "all" in targets else set(targets)
    model.requires_grad_(False)
    places = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
              if name in targets and isinstance(child, nn.Linear)]
    if missing := targets - {name for _, name, _ in places} - {"wi", "wi_0", "wi_1"}:
        raise ValueError(f"--lora_targets: the model has no linear layer {', '.join(sorted(missing))}")
    for parent, name, child in places:
        setattr(parent, name, LoRALinear(child, rank, alpha, dropout))


def save_adapter(model: ChatLM, folder: Path, base: str, rank: int, alpha: float, targets: list[str], dropout: float = 0.0) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"base_model.model.{n}": p.detach().contiguous() for n, p in model.named_parameters() if ".lora_" in n}
    save_file(weights, folder / "adapter_model.safetensors.tmp", {"format": "pt"})
    os.replace(folder / "adapter_model.safetensors.tmp", folder / "adapter_model.safetensors")
    if "all" in targets:
        targets = sorted({n.split(".")[-3] for n in weights})
    write_file(folder / "adapter_config.json", json.dumps({
        "peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": alpha,
        "lora_dropout": dropout, "target_modules": targets, "bias": "none", "fan_in_fan_out": False, "inference_mode": True}, indent=2) + "\n")


def load_adapter(model: ChatLM, folder: Path) -> None:
    """The twin of save_adapter, also for folders that PEFT wrote. Raises ValueError where it does not fit the model."""
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} is not an adapter: it needs adapter_config.json and adapter_model.safetensors")
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        rank, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]
        weights = {n.removeprefix("base_model.model."): w for n, w in load_file(folder / "adapter_model.safetensors").items()}
    except (ValueError, KeyError, TypeError, SafetensorError) as e:
        raise ValueError(f"{folder} is not a whole LoRA adapter: {type(e).__name__}: {e}") from None
    for option in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "lora_bias"):
        if config.get(option):
            raise ValueError(f"{folder}: {option} is not supported")
    add_lora(model, rank, alpha, [targets] if isinstance(targets, str) else targets)
    own = {n: p.shape for n, p in model.named_parameters() if ".lora_" in n}
    if own != {n: w.shape for n, w in weights.items()}:
        raise ValueError(f"{folder}: the adapter is for another model, or of another rank than its configuration says")
    model.load_state_dict(weights, strict=False)


def merge_lora(model: ChatLM) -> None:
    """Add every addition to its weight, and put plain linear layers back."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                plain = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                added = child.scale * (child.lora_B.weight.float() @ child.lora_A.weight.float())
                plain.weight = nn.Parameter((child.weight + added).to(child.weight.dtype).detach())
                setattr(parent, name, plain)


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


def save_checkpoint(folder: Path, keep: int, model: nn.Module, optimizers: list, state: State, identity: dict) -> None:
    """checkpoint/step-N-HASH.pt, the hash being that of its bytes; of the older ones keep - 1 stay."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "writing.tmp"
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    try:
        torch.save({"model": trained, "optimizers": [o.state_dict() for o in optimizers], "state": dataclasses.asdict(state),
                    "identity": identity}, beside)
    except RuntimeError as e:  # the disk is full, or fails
        beside.unlink(missing_ok=True)
        raise OSError(errno.EIO, f"a checkpoint could not be written to {folder}: {e}; those before it are whole") from None
    with open(beside, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(beside, folder / f"step-{state.step:08d}-{hash_file(beside)}.pt")
    for old in list_checkpoints(folder)[keep:]:
        old.unlink()


def load_checkpoint(path: Path, model: nn.Module, optimizers: list, identity: dict) -> State:
    """The twin of save_checkpoint. Raises ValueError if the run that it belongs to had another identity."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for flag, value in identity.items():
        if saved["identity"].get(flag) != value:
            raise ValueError(f"{flag} is not what it was in the run that {path.parent} continues (then {saved['identity'].get(flag)}, now "
                             f"{value}): give the old value, another --out_dir, or --resume never to begin anew")
    model.load_state_dict(saved["model"], strict=False)
    for optimizer, s in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(s)
    return State(**saved["state"])


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


def find_checkpoint(folder: Path, resume: str, say: Callable) -> Path | None:
    """The newest checkpoint whose bytes are what its name says; damaged ones are reported and passed over."""
    if resume == "never":
        return None
    if resume != "auto":
        candidates = [Path(resume)] if Path(resume).is_file() else list_checkpoints(Path(resume))
        if not candidates:
            raise FileNotFoundError(f"--resume {resume}: no checkpoint there")
    else:
        candidates = list_checkpoints(folder)
    for path in candidates:
        if hash_file(path) == path.stem.rpartition("-")[2]:
            return path
        say(f"warning: {path} is damaged and passed over")
    if candidates:
        raise ValueError(f"every checkpoint in {candidates[0].parent} is damaged; --resume never begins anew")
    return None


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
        self.file = open(path, "a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=step + 1)
        except ImportError:
            self.board = None

    def log(self, values: dict) -> None:
        if not self.first:
            return
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


def fit(args: argparse.Namespace, ranks: Ranks, model: ChatLM, stream: PairStream, objective: Objective, identity: dict) -> State:
    """Train until a limit is reached or someone asks for an end. Weights change in place; returns the final state."""
    out_dir, device, stop = Path(args.out_dir), ranks.device, Stop()
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    min_lr = args.lr / 100 if args.min_lr is None else args.min_lr
    dtype = pick_dtype(args.dtype, device)
    state = State(stream=dict(stream.state))
    checkpoint = find_checkpoint(out_dir / "checkpoint", args.resume, lambda text: print(text, file=sys.stderr) if ranks.first else None)
    if checkpoint:
        state = load_checkpoint(checkpoint, model, optimizers, identity)
        stream.state = dict(state.stream)
    ranks.wait()
    if ranks.first:  # what came after the checkpoint that we go on from would be taken for newer
        for path in list_checkpoints(out_dir / "checkpoint"):
            if int(path.name.split("-")[1]) > state.step or not checkpoint:
                path.unlink()
    report = Report(out_dir, ranks.first, state.step)
    tick_s = time.perf_counter()
    if checkpoint:
        report.say(f"going on from {checkpoint}: step {state.step:,}, {state.tokens:,} tokens")
    elif objective.begin:
        objective.begin(stream)
    keep_freed_memory()  # from here on: what beginning took goes back

    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.zeros(sum(p.numel() for p in parameters), device=device)  # one vector, of which p.grad are views
    for p, part in zip(parameters, gradient.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)
    batches = iter(stream)
    kernels = [SDPBackend.MATH] if device.type == "cpu" else [  # on a CPU flash attention's backward is the slower one
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def progress() -> float:
        if args.max_steps:
            return state.step / args.max_steps
        return state.elapsed_s / args.time_limit if args.time_limit else stream.epoch / args.epochs

    def save() -> None:
        if ranks.first:
            save_checkpoint(out_dir / "checkpoint", args.keep, model, optimizers, state, identity)
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
    while done < 1 and not asked:
        model.train()
        step_s = time.perf_counter()
        lr = learning_rate(args.schedule, done, state.step, args.lr, min_lr, args.warmup_steps)
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr
        scale = (state.loss_scale if dtype == torch.float16 else 1.0) / args.batch_tokens
        sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        gradient.zero_()
        for j in stream.own:
            batch = {k: v.to(device, non_blocking=True) for k, v in next(batches).items()}
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
        gradient.mul_(1 / (units * scale))
        norm = float(gradient.dot(gradient).sqrt())
        finite, overflow = math.isfinite(total["loss"]), not math.isfinite(norm)
        if finite and not overflow:
            if norm > args.grad_clip:
                gradient.mul_(args.grad_clip / norm)
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
        batches = list(PairStream(args.valid, tokenizer, args.micro_batch_tokens, args.max_len, 0, ranks.rank, ranks.world_size,
                                  gather=ranks.gather).one_epoch())
        chars += sum(len(tokenizer.decode(row[row >= 0])) for batch in batches for row in batch["labels"].numpy())
        if not float(ranks.sum(chars)):
            raise ValueError(f"{args.valid} has no row with a prompt and a response")

    def loss(batch: dict) -> tuple[Tensor, Tensor]:
        return model.loss_sum(**batch), (batch["labels"] != data.IGNORED).sum()

    def evaluate() -> dict:
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        for batch in batches:
            sums += torch.stack([x.double() for x in loss({k: v.to(ranks.device) for k, v in batch.items()})])
        nats, tokens = ranks.sum(sums).tolist()
        return {"val_loss": nats / tokens, "val_ppl": math.exp(min(700.0, nats / tokens)), "val_nats_per_char": nats / float(chars)}

    def begin(stream: PairStream) -> None:
        before, after = stream.successions()
        if ranks.first and len(after):  # a window may hold no text at all
            print(f"a new model begins with what follows what among {len(after):,} tokens", flush=True)
            model.init_bigrams(torch.from_numpy(before), torch.from_numpy(after))
        ranks.share(model.parameters())

    def answers() -> dict:
        rows = held_out(args)
        return {"bleu4": sample.score(model, tokenizer, rows, args.max_len, max_new_tokens=min(128, args.max_len))[0]["bleu4"]}

    return Objective(loss, evaluate, exporter(args, model, tokenizer), answers=answers if args.valid else None,
                     begin=None if args.init_from or args.freeze else begin)


def held_out(args: argparse.Namespace) -> list[dict]:
    """The pairs of --valid on which answers are scored: all of the demo's, else some 200 spread over the file."""
    rows = [r for r in data.read_rows([args.valid]) if r.get("prompt") and r.get("response")] if args.valid else []
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


def settle(args: argparse.Namespace, ranks: Ranks, columns: tuple[str, ...] = ("prompt", "response")) -> None:
    """Fill in what was left to us, and refuse what cannot work before anything is written."""
    args.demo = args.data is None
    if args.demo:
        if args.init_from or args.valid:
            raise ValueError("--init_from and --valid need --data")
        for name, value in DEMO.items():
            if getattr(args, name) is None and not (name == "max_steps" and (args.epochs or args.time_limit)):
                setattr(args, name, value)
        folder = Path(args.out_dir) / "demo"
        args.data, args.valid = [str(folder / "train.parquet")], str(folder / "valid.parquet")
        if ranks.first and not (Path(args.valid).is_file() and Path(args.data[0]).is_file()):
            print("making demo data: questions about capitals, opposites, units, sums, ...", flush=True)
            data.write_demo(folder)
        ranks.wait()
    if args.lora_rank and not args.init_from:
        raise ValueError("--lora_rank adds to a model: name it with --init_from")
    if args.init_from and args.preset:
        raise ValueError("--preset is for a new model; --init_from brings its own shape")
    args.preset, args.vocab_size = args.preset or "small", args.vocab_size or 29298
    on_gpu = ranks.device.type == "cuda"
    args.optimizer = args.optimizer or "adafactor"
    args.lr = args.lr or (1e-4 if args.optimizer != "adafactor" and args.init_from else 2e-3 if args.optimizer != "adafactor" or args.init_from
                          else 5e-3 if args.preset == "0.2b" else 2e-2)
    if args.optimizer == "muon" and pick_dtype("auto", ranks.device) == torch.float32 and ranks.first:
        print("note: torch's Muon computes in bfloat16, for which this CPU has no instructions: it will be slow", file=sys.stderr)
    args.max_len = args.max_len or 320
    args.batch_tokens = args.batch_tokens or (65536 if on_gpu else 2560)
    args.micro_batch_tokens = args.micro_batch_tokens or max(len(columns) * args.max_len, 16384 if on_gpu else 1280)
    if not (args.max_steps or args.epochs or args.time_limit):
        args.epochs = 1.0
    for part in filter(None, args.freeze.split(",")):
        if part not in ("shared", "encoder", "decoder"):
            raise ValueError(f"--freeze {part!r}: only shared, encoder and decoder can be frozen")
    for path in [*args.data, *filter(None, [args.valid])]:
        data.open_parquet(path, columns)
    if args.valid and ranks.first and (found := overlap(args.data, args.valid)):
        print(f"warning: {found:,} prompts of --valid are in --data too, and measure memory (data.py split keeps them apart)", file=sys.stderr)
    out = Path(args.out_dir)
    if args.resume == "auto" and (out / "config.json").exists() and not list_checkpoints(out / "checkpoint"):
        raise ValueError(f"{out} holds a model and no checkpoint to go on from: choose another --out_dir, or --resume never to replace it")


def overlap(files: list[str], valid: str) -> int:
    """How many different prompts of valid are prompts in files too."""
    def prompts(path: str) -> Iterator[pa.Array]:
        for batch in data.open_parquet(path, ("prompt",)).iter_batches(65536, columns=["prompt"]):
            yield batch["prompt"].cast(pa.large_string())

    held, found = pa.chunked_array(prompts(valid), pa.large_string()), set()
    for path in files:
        for part in prompts(path):
            found.update(part.filter(pc.is_in(part, held)).to_pylist())
    return len(found - {None, ""})


def find_tokenizer(args: argparse.Namespace, ranks: Ranks) -> Tokenizer:
    """The one named, or the starting model's, or the one in the out_dir; else one is trained on the data and put there."""
    named = args.tokenizer or args.init_from
    if named:
        return Tokenizer.from_pretrained(named, append_eos=True)
    out = Path(args.out_dir)
    if ranks.first and not (out / "tokenizer.json").exists():
        print(f"training a tokenizer of up to {args.vocab_size:,} tokens on {', '.join(args.data)}", flush=True)
        Tokenizer.train(Corpus(args.data), args.vocab_size, memory_bytes=4 * 10 ** 9, progress=sys.stderr.isatty()).save_pretrained(out)
    ranks.wait()
    return Tokenizer.from_pretrained(out)


def make_model(args: argparse.Namespace, ranks: Ranks, tokenizer: Tokenizer) -> ChatLM:
    torch.manual_seed(args.seed)
    if args.init_from:
        model = ChatLM.from_pretrained(args.init_from, torch.float32, ranks.device)
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer):,} tokens and the model in {args.init_from} only {model.config.vocab_size:,}")
    else:
        model = ChatLM(ChatLMConfig.preset(args.preset, vocab_size=len(tokenizer))).to(ranks.device)
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


def run_identity(args: argparse.Namespace, model: ChatLM, tokenizer: Tokenizer) -> dict:
    """What may not change when a run goes on, by flag."""
    shape = dataclasses.asdict(model.config)
    del shape["dropout_rate"]
    return {"--preset or --init_from (the model's shape)": shape,
            "--tokenizer": xxhash.xxh3_64_hexdigest(tokenizer.to_json().encode()), "--data": data.footprint(args.data),
            "--micro_batch_tokens": args.micro_batch_tokens, "--max_len": args.max_len, "--seed": args.seed,
            "--optimizer": args.optimizer, "--freeze": args.freeze, "--lora_rank": args.lora_rank, "--lora_alpha": args.lora_alpha,
            "--lora_targets": args.lora_targets, "--lora_dropout": args.lora_dropout}


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
    print(f"\nfinished: {args.out_dir} is a model folder ({seconds}). Talk to it:\n"
          f"  python sample.py{'' if args.out_dir == 'out' else ' --model ' + args.out_dir} --prompt \"{asked}\"\n"
          f"  python sample.py{'' if args.out_dir == 'out' else ' --model ' + args.out_dir}")


def main() -> None:
    parser = parser_for(__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="shape of a new model; none: small, for the demo demo")
    parser.add_argument("--vocab_size", type=number(int, 264), help="of a tokenizer that is trained here; none: 29298, for the demo 2048")
    parser.add_argument("--bleu_every", type=number(int, 1), metavar="STEPS", help="score answers on --valid so often; none: at the end")
    args = parser.parse_args()
    ranks = Ranks.join(args.device)
    settle(args, ranks)
    with claimed(Path(args.out_dir), ranks):
        tokenizer = find_tokenizer(args, ranks)
        model = make_model(args, ranks, tokenizer)
        group = max(1, round(args.batch_tokens / args.micro_batch_tokens))
        if ranks.first:
            print(f"{model.num_parameters() / 1e6:.1f} million parameters, {len(tokenizer):,} tokens, {ranks.world_size} x {ranks.device.type}, "
                  f"{pick_dtype(args.dtype, ranks.device)}".replace("torch.", ""), flush=True)
            if group % ranks.world_size:
                print(f"note: a step is {group} micro-batches, which {ranks.world_size} processes cannot share evenly", file=sys.stderr)
        stream = PairStream(args.data, tokenizer, args.micro_batch_tokens, args.max_len, args.seed, ranks.rank, ranks.world_size,
                            group=group, workers=args.workers, gather=ranks.gather)
        state = fit(args, ranks, model, stream, response_loss(args, ranks, model, tokenizer), run_identity(args, model, tokenizer))
        if ranks.first:
            closing(args, model, tokenizer, state)
    ranks.leave()


if __name__ == "__main__":
    run(main)
