"""Preference tuning: DPO for an encoder-decoder, of all weights or of a LoRA adapter.

    python dpo.py reject --model sft --data train.parquet --out preferences.parquet
    python dpo.py --init_from sft --data preferences.parquet --valid held_out.parquet --out_dir dpo
    python dpo.py --init_from sft --data preferences.parquet --lora_rank 16 --out_dir lora
    python dpo.py merge --model sft --adapter lora --out merged

SFT shows the model good answers. DPO shows it two answers to a prompt x, a chosen one y_w and a
rejected one y_l, and makes the first more likely and the second less likely than they were under
the model that training starts from, the reference:

    L = -log sigmoid(beta * h)      h = log pi(y_w|x) / ref(y_w|x) - log pi(y_l|x) / ref(y_l|x)

log pi(y|x) is the sum of the answer's token log-probabilities. At the start the model is the
reference, so h = 0 and L = log 2 = 0.693. For example, with beta 0.1, when y_w has become e^3 times
as likely and y_l e^-2 times: h = 3 + 2 = 5, sigmoid(0.5) = 0.62 and L = 0.47. The gradient,
beta * sigmoid(-beta * h), gets smaller as h grows: well separated pairs matter less. With a higher
beta it vanishes at a smaller h, so the model stays closer to the reference.

    prompt ---- encoder ---- encoded -+- decoder(chosen)   -> log pi(y_w|x) -+
                             (once)   |                                      +- h -> loss
                                      +- decoder(rejected) -> log pi(y_l|x) -+

The loop is train.py's, with another objective. The reference's log-probabilities do not change, so
they are computed once, before the first step, and stored: no second model is ever in memory.

The log shows the margin (the mean of beta * h), the accuracy (the share of pairs with h > 0) and
log_ratio (the mean of log pi(y|x) / ref(y|x); far below 0, both answers have become unlikely).

Try next: plot chosen_logp and rejected_logp. Only their difference is trained, so both may fall;
--sft_alpha 1 keeps the chosen answers likely.

Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290), equation 7.
"""
import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

import data
import sample
import train
from chatlm import (
    ADAPTER_FILES,
    ChatLM,
    adapter_base_hash,
    load_adapter,
    merge_lora,
    write_tensors,
)
from data import (
    ArgumentParser,
    PairStream,
    Rows,
    hash_files,
    memory_hint,
    note_once,
    number,
    run,
)
from tokenizer import Tokenizer

COLUMNS = data.PREFERENCE  # prompt, chosen, rejected
METRICS = ("margin", "accuracy", "chosen_logp", "rejected_logp", "log_ratio")


# --- the loss -------------------------------------------------------------------------------------


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor,
             ref_rejected: Tensor, beta: float, label_smoothing: float = 0.0,
             loss: str = "sigmoid") -> tuple[Tensor, Tensor, Tensor]:
    """The DPO loss of a batch, and the implicit rewards of both answers.

    The four inputs: (B,) summed log-probabilities of the answers, in nats. label_smoothing: the
    share of pairs assumed to be labeled the wrong way round (cDPO). loss "ipo":
    (h - 1 / (2 beta))^2 instead (Azar et al. 2023, arXiv:2310.12036, equation 17).
    Returns the mean loss (), and beta * log-ratio of the chosen and of the rejected answers,
    (B,) each, detached.
    """
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected  # log-ratios
    h = chosen - rejected
    if loss == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    return losses.mean(), beta * chosen.detach(), beta * rejected.detach()


def pair_logps(model: ChatLM, batch: dict) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B,) of chosen and rejected answers. batch: from train.to_device."""
    encoded, mask = model.encode(batch["input_ids"], batch["attention_mask"])
    chosen, rejected = (model.sequence_logps(encoded, mask, batch[f"{name}_labels"],
                                             batch[f"{name}_targets"])
                        for name in ("chosen", "rejected"))
    return chosen, rejected


@dataclass(frozen=True, kw_only=True)
class Settings(train.Settings):
    """train.py's settings, with those of DPO."""
    optimizer: str = train.flag("adamw", **train.OPTIMIZER)
    data: Sequence[str] = train.flag(
        (), "triples (prompt, chosen, rejected): files or folders", group="data", nargs="+",
        metavar="A.parquet")
    valid: str = train.flag(
        "", "held-out triples to validate on (default: no validation)", metavar="V.parquet")
    tokenizer: str = train.flag(
        "", "folder of tokenizer.json (default: that of --init_from)", metavar="DIR")
    init_from: str = train.flag(
        "", "model folder to start from (needed for a new run)", metavar="MODEL_DIR")
    lr: float = train.flag(
        0.0, "peak learning rate; Adafactor caps it at 1/sqrt(step) (default: 1e-5, with LoRA "
        "1e-4)", group="optimizer", type=train.POSITIVE)

    beta: float = train.flag(
        0.1, "higher stays closer to the starting model", group="only in dpo.py", fixed=True,
        type=train.POSITIVE)
    loss: str = train.flag(
        "sigmoid", "sigmoid is the paper's", fixed=True, choices=["sigmoid", "ipo"])
    label_smoothing: float = train.flag(
        0.0, "share of pairs assumed to be labeled the wrong way round (default: 0)", fixed=True,
        type=number(float, 0, 0.5))
    sft_alpha: float = train.flag(
        0.0, "weight of an extra SFT loss on chosen answers (default: 0)", fixed=True,
        type=train.NOT_NEGATIVE)

    script: ClassVar[str] = "dpo.py"
    columns: ClassVar[tuple[str, ...]] = COLUMNS
    no_flags: ClassVar[tuple[str, ...]] = ("preset", "vocab_size", "bleu_every")
    cpu_batch_tokens: ClassVar[int] = 2 * train.CPU_BATCH_TOKENS  # a row has two answers

    def default_lr(self) -> float:
        return 1e-4 if self.lora_rank else 1e-5

    def find_files(self, paths: Sequence[str], ranks: train.Ranks) -> list[str]:
        return find_triples(paths, ranks, Path(self.out_dir))

    def check(self) -> None:
        if self.demo or not self.init_from:
            raise ValueError("--init_from and --data are needed (see --help)")
        if "label_smoothing" in self.given and self.label_smoothing and self.loss == "ipo":
            raise ValueError("--label_smoothing has no effect with --loss ipo")
        super().check()


class Preference(train.Objective):
    """The DPO loss, against stored log-probabilities of the reference."""
    extra, shown = METRICS, ("loss", "margin", "accuracy")

    def __init__(self, *args):
        super().__init__(*args)
        files = {"data": self.settings.data_files, "valid": self.settings.valid_files}
        self.references = {name: self.reference(name, paths)
                           for name, paths in files.items() if paths}

    def reference(self, name: str, files: tuple[str, ...]) -> Tensor:
        """Log-probabilities (rows, 2) of chosen and rejected under the starting model. They are
        read from checkpoint/, or the ranks share the work, and the first one writes them."""
        s, ranks = self.settings, self.ranks
        path = Path(s.out_dir) / "checkpoint" / f"reference_{name}.safetensors"
        identity = {"data": hash_files(files), "weights": str(self.init_hash),
                    "max_len": str(s.max_len), "dtype": s.dtype,
                    "tokenizer": train.hash_tokenizer(self.tokenizer)}
        stream = train.make_stream(s, ranks, self.tokenizer, files)
        logps = torch.zeros(stream.rows, 2, device=ranks.device)
        is_stored = ranks.is_main and read_reference(path, identity, logps)
        if not ranks.all_gather(is_stored)[0]:
            self.compute_reference(stream, logps)
        ranks.all_reduce(logps)  # each row was filled by one rank, and is 0 on the others
        if ranks.is_main and not is_stored:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors({"logps": logps.cpu()}, path, identity)
        return logps

    @torch.no_grad()
    def compute_reference(self, stream: PairStream, logps: Tensor) -> None:
        """Fill this rank's rows of logps, (rows, 2)."""
        progress = data.Progress("reference log-probabilities", total=stream.rows)
        equal = torch.zeros((), dtype=torch.int64, device=self.ranks.device)
        self.model.eval()
        for batch in stream.one_epoch():
            batch = train.to_device(batch, self.ranks.device)
            with self.autocast():
                logps[batch["rows"]] = torch.stack(pair_logps(self.model, batch), 1)
            equal += equal_answers(batch)
            if self.ranks.is_main:
                progress.add(len(batch["rows"]) * self.ranks.world_size)
        progress.clear()
        if (n := int(self.ranks.all_reduce(equal))) and self.ranks.is_main:
            note_once(f"warning: in {n:,} rows, the first {self.settings.max_len} tokens of chosen "
                      "and rejected are the same: they teach nothing (raise --max_len)")

    def loss(self, batch: dict, part: str = "data") -> tuple[Tensor, ...]:
        """Loss sum, number of pairs, and the sums of METRICS; () each."""
        s = self.settings
        chosen, rejected = pair_logps(self.model, batch)
        ref_chosen, ref_rejected = self.references[part][batch["rows"]].unbind(1)
        mean, chosen_rewards, rejected_rewards = dpo_loss(
            chosen, rejected, ref_chosen, ref_rejected, s.beta, s.label_smoothing, s.loss)
        if s.sft_alpha:
            tokens = (batch["chosen_labels"] != data.IGNORED).sum(1)
            mean = mean - s.sft_alpha * (chosen / tokens).mean()
        margins = chosen_rewards - rejected_rewards
        log_ratio = (chosen_rewards + rejected_rewards) / (2 * s.beta)
        pairs = chosen.new_full((), len(chosen))
        return (mean * pairs, pairs, margins.sum(), (margins > 0).sum(), chosen.sum(),
                rejected.sum(), log_ratio.sum())

    def report_results(self, state: train.State, report: train.Report) -> None:
        s = self.settings
        print(f"finished: {s.out_dir} ({state.step:,} steps, {data.duration(state.elapsed_s)}); "
              "loss.svg in it is the curve")
        if s.lora_rank:
            print(s.merge_command())


def equal_answers(batch: dict) -> Tensor:
    """The number of rows, (), whose answers are the same, perhaps because they are cut."""
    chosen, rejected = batch["chosen_labels"], batch["rejected_labels"]
    width = max(chosen.size(1), rejected.size(1))
    chosen, rejected = (F.pad(x, (0, width - x.size(1)), value=data.IGNORED)
                        for x in (chosen, rejected))
    return (chosen == rejected).all(1).sum()


def read_reference(path: Path, identity: dict[str, str], logps: Tensor) -> bool:
    """Read logps from a file, if it is whole and has this identity. Returns whether it is."""
    if not path.is_file():
        return False
    with contextlib.suppress(SafetensorError), safe_open(path, "pt") as f:
        if f.metadata() == identity:
            logps.copy_(f.get_tensor("logps"))
            return True
    note_once(f"note: {path} is of other data, weights or settings, or damaged: it is computed "
              "again")
    return False


# --- the commands ---------------------------------------------------------------------------------


def find_triples(paths: Sequence[str], ranks: train.Ranks, out_dir: Path) -> list[str]:
    """Parquet files of triples. Other files and folders are converted into out_dir/triples. Raises
    ValueError, naming file and row, for a missing column, an empty prompt, or two equal answers."""
    found = []
    for i, path in enumerate(paths):
        target = path
        if Path(path).suffix.lower() != ".parquet" or Path(path).is_dir():
            content = hash_files(data.input_files([path], [out_dir]))
            target = str(out_dir / "triples" / f"triples-{i}-{content}.parquet")
            if ranks.is_main and not Path(target).is_file():
                rows = Rows(path, COLUMNS, outputs=[out_dir])
                written = data.write_pairs(target, rows, COLUMNS)
                if not written:
                    Path(target).unlink()  # or the next run would take it
                data.refuse_empty(written, [path])
            ranks.barrier()
            ranks.check(Path(target).is_file(), f"{target} is not on this machine: --out_dir "
                        f"{train.MUST_BE_SHARED}")
        check_triples(target, path)
        found.append(target)
    return found


def check_triples(file: str, shown: str) -> None:
    """Raise ValueError for the first row of a Parquet file that teaches nothing."""
    row = 0
    for batch in data.open_parquet(file, COLUMNS).iter_batches(8192, columns=list(COLUMNS)):
        prompt, chosen, rejected = (batch[column].cast("large_string") for column in COLUMNS)
        wrong = {"prompt is empty": pc.equal(prompt, ""),
                 "chosen and rejected are the same": pc.equal(chosen, rejected)}
        for problem, rows in wrong.items():
            if (i := pc.index(rows, True).as_py()) >= 0:
                raise ValueError(f"{shown}, row {row + i + 1:,}: {problem} (data.py clean --source "
                                 "preference drops such rows)")
        row += len(batch)


EXAMPLES = """\
  python dpo.py --init_from out/sft --data preferences.parquet --lora_rank 16 --out_dir out/lora
  python dpo.py reject --help; python dpo.py merge --help"""


def reject(argv: list[str]) -> None:
    parser = ArgumentParser(prog="dpo.py reject", description="Let a model answer prompts. Its "
                            "answers become the rejected ones, the given responses the chosen.")
    add = parser.add_argument
    add("--model", required=True, metavar="SFT_DIR", help="model folder")
    add("--data", required=True, metavar="A.parquet",
        help="prompts and the responses to prefer; also .jsonl, .json, .csv")
    add("--out", required=True, metavar="P.parquet", help="prompt, chosen, rejected")
    add("--num_samples", type=number(int, 1, 100), default=1,
        help="sample N answers, reject the one least similar to the chosen answer; 1: greedy")
    add("--temperature", type=number(float, 1e-3, 1e3), help="of the samples (default: 1)")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), help="of the samples (default: 0)")
    add("--batch_size", type=number(int, 1), default=32, help="prompts at a time")
    add("--max_new_tokens", type=number(int, 1, 1 << 20), default=256, help="tokens per answer")
    add("--max_len", type=number(int, 2, 1 << 20), default=320, help="tokens per prompt; longer "
        "ones are cut")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    for name in ("temperature", "seed"):
        if getattr(args, name) is not None and args.num_samples == 1:
            note_once(f"note: --{name} has no effect without --num_samples")
    answers = Path(f"{args.out}.answers.jsonl")  # continued when the command runs again
    rows = list(Rows(args.data, data.PAIR, outputs=[args.out, answers]))
    data.check_parquet_path(Path(args.out))
    with memory_hint("--batch_size"):
        answer_prompts(args, answers)
    with open(answers, encoding="utf-8") as f:
        answered = [json.loads(line) for line in f]
    triples = []
    for row, found in zip(rows, answered, strict=True):
        candidates = found.get("responses", [found.get("response")])
        candidates = [a for a in candidates if a and a.strip() != row["response"].strip()]
        if candidates and row["prompt"].strip() and row["response"].strip():
            worst = min(candidates, key=lambda a: sample.bleu4([a], [row["response"]]))
            triples.append({"prompt": row["prompt"], "chosen": row["response"], "rejected": worst})
    if triples:
        data.write_pairs(args.out, triples, COLUMNS)
    os.unlink(answers)
    answers.with_name(f".{answers.name}.settings").unlink()
    if not triples:
        raise ValueError(f"{args.data}: nothing was written, because every row has an empty prompt "
                         "or response, or no answer that differs from the response")
    print(f"{args.out}: {len(triples):,} triples; {len(rows) - len(triples):,} rows dropped, "
          "because of an empty prompt or response, or no answer that differs from the response")


def answer_prompts(args: argparse.Namespace, answers: Path) -> None:
    model = sample.load(args.model, None, sample.pick_device(args.device))
    tokenizer = Tokenizer.from_pretrained(args.model, append_eos=True)
    options, seed = {"max_new_tokens": args.max_new_tokens}, None
    if args.num_samples > 1:
        seed = args.seed or 0
        options |= {"do_sample": True, "temperature": args.temperature or 1.0,
                    "num_return_sequences": args.num_samples}
        torch.manual_seed(seed)
    made_by = {"model": sample.model_hash(args.model), **options, "max_len": args.max_len,
               "seed": seed}
    sample.answer_file(model, tokenizer, args.data, str(answers), args.batch_size, args.max_len,
                       options, made_by, [args.out])


def merge(argv: list[str]) -> None:
    parser = ArgumentParser(prog="dpo.py merge", description="Merge a LoRA adapter into its model.")
    add = parser.add_argument
    add("--model", required=True, metavar="SFT_DIR", help="model that the adapter was trained on")
    add("--adapter", required=True, metavar="DIR", help="folder of the adapter")
    add("--out", required=True, metavar="DIR", help="folder of the merged model")
    args = parser.parse_args(argv)
    if any(train.overwrites(Path(args.out), source) for source in (args.model, args.adapter)):
        raise ValueError(f"--out {args.out} is --model or --adapter, which would be overwritten: "
                         "choose another")
    if (Path(args.out) / "checkpoint").is_dir():
        raise ValueError(f"--out {args.out} holds a training run, which would be overwritten: "
                         "choose another")
    data.check_folder(args.out)
    tokenizer = Tokenizer.from_pretrained(args.model)
    model = ChatLM.from_pretrained(args.model)
    load_adapter(model, Path(args.adapter))
    base_hash = adapter_base_hash(Path(args.adapter))
    if base_hash and base_hash != train.hash_weights(
            ChatLM.from_pretrained(args.model, torch.float32)):  # as training loads it
        note_once(f"warning: {args.adapter} was trained on other weights than those of "
                  f"{args.model}: the merged model may answer badly")
    merge_lora(model)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    data.delete_files(args.out, ADAPTER_FILES)  # of an earlier run
    print(f"{args.out}: a plain model folder")


def main() -> None:
    commands = {"reject": reject, "merge": merge}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in commands:
        commands[name](sys.argv[2:])
    else:
        parser = train.parser_for(Settings, "DPO on prompt, chosen, rejected: of all weights, or "
                                  "of a LoRA adapter.", EXAMPLES)
        train.run_training(parser.parse_args(), Settings, Preference)


if __name__ == "__main__":
    run(main)
