"""Preference tuning: DPO for an encoder-decoder, of all weights or of a LoRA adapter.

    python dpo.py reject --model sft --data train.parquet --out preferences.parquet
    python dpo.py --init_from sft --data preferences.parquet --valid held_out.parquet --out_dir out/dpo
    python dpo.py --init_from sft --data preferences.parquet --lora_rank 16 --out_dir out/lora
    python dpo.py merge --model sft --adapter out/lora --out out/merged

Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290). The loop is train.py's, with all that it
promises. The reference is the model that training starts from, so its log-probabilities are computed with that very
model before the first step and kept beside the checkpoint: no second copy is ever in memory.
"""
import argparse
import os
import shlex
import sys
from pathlib import Path

import pyarrow.compute as pc
import torch
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import data
import sample
import train
from chatlm import LOSS_CHUNK_BYTES, ChatLM, load_adapter, merge_lora
from data import PairStream
from tokenizer import ArgumentParser, Tokenizer, atomic_write, check_folder, memory_hint, number, run, write_errors

COLUMNS = data.PREFERENCE


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float,
             label_smoothing: float = 0.0, loss: str = "sigmoid") -> tuple[Tensor, Tensor, Tensor]:
    """The DPO loss of a batch, and the implicit rewards of both answers.

    Equation 7 of the paper, with y_w the chosen and y_l the rejected answer to x:

        L = -E log sigmoid(beta log pi(y_w|x) / pi_ref(y_w|x) - beta log pi(y_l|x) / pi_ref(y_l|x))

    The four inputs: (B,) summed log-probabilities of the answers, in nats. label_smoothing: the share of pairs that are
    taken to be labelled the wrong way round (cDPO). loss "ipo": (h - 1 / (2 beta))^2 with h the difference of the two
    log-ratios (Azar et al. 2023, arXiv:2310.12036, equation 17).
    Returns the mean loss (), and beta * log-ratio of the chosen and of the rejected answers, (B,) each, detached.
    """
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    h = chosen - rejected
    if loss == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    return losses.mean(), beta * chosen.detach(), beta * rejected.detach()


def sequence_logps(model: ChatLM, encoded: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Summed log-probabilities (B,) of the labels (B, T), -100 ignored; logits live a chunk at a time, also backward."""
    hidden = model.decode(model.shift_right(labels), encoded, mask)
    counted = labels != data.IGNORED
    weight = model.head_weight()

    def logps(h: Tensor, label: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(h, weight).float(), label, reduction="none")

    rows = max(1, LOSS_CHUNK_BYTES // (4 * len(weight)))
    parts = [checkpoint(logps, h, label, use_reentrant=False)
             for h, label in zip(hidden[counted].split(rows), labels[counted].split(rows))]
    owner = counted.nonzero()[:, 0]
    return torch.zeros(len(labels), device=labels.device).index_add(0, owner, torch.cat(parts))


def pair_logps(model: ChatLM, batch: dict) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B,) of the chosen and of the rejected answers; the prompts are encoded once."""
    encoded, mask = model.encode(batch["input_ids"], batch["attention_mask"])
    return sequence_logps(model, encoded, mask, batch["chosen_labels"]), sequence_logps(model, encoded, mask, batch["rejected_labels"])


def find_triples(paths: list[str], ranks: train.Ranks, folder: Path) -> list[str]:
    """Parquet files with the triples of files and folders of any kind; what is not Parquet is written anew, into folder.

    Raises ValueError, naming file and row, for a missing column, an empty prompt, or a chosen answer that is the rejected one.
    """
    found = []
    for i, path in enumerate(paths):
        target = path
        if Path(path).suffix.lower() != ".parquet" or Path(path).is_dir():
            target = str(folder / f"triples-{i}-{data.footprint(data.input_files([path], [folder.parent]))}.parquet")
            if ranks.first and not Path(target).is_file():
                data.refuse_nothing(data.write_pairs(target, data.whole_rows([path], COLUMNS, outputs=[folder.parent]), COLUMNS), [path], data.Problems())
            ranks.wait()
            ranks.check(None if Path(target).is_file() else
                        f"{target} is not on this machine: --out_dir must be on a file system that all machines share")
        row = 0
        for batch in data.open_parquet(target, COLUMNS).iter_batches(8192, columns=list(COLUMNS)):
            prompt, chosen, rejected = (data.text_column(batch[column]) for column in COLUMNS)
            for wrong, where in (("prompt is empty", pc.equal(prompt, "")), ("chosen and rejected are the same", pc.equal(chosen, rejected))):
                if (at := pc.index(where, True).as_py()) >= 0:
                    raise ValueError(f"{path}, row {row + at + 1:,}: {wrong} (data.py clean --source preference drops such rows)")
            row += len(batch)
        found.append(target)
    return found


def reference_logps(args: argparse.Namespace, ranks: train.Ranks, model: ChatLM, tokenizer: Tokenizer, files: list[str], name: str) -> Tensor:
    """(rows, 2) log-probabilities of chosen and rejected under the starting model, computed once and kept beside the
    checkpoints, with hashes of all that they depend on."""
    path = Path(args.out_dir) / "checkpoint" / f"reference_{name}.safetensors"
    identity = {"data": data.footprint(files), "weights": args.init_hash, "max_len": str(args.max_len), "dtype": args.dtype,
                "tokenizer": xxhash.xxh3_64_hexdigest(tokenizer.to_json().encode())}
    stream = PairStream(files, tokenizer, args.micro_batch_tokens, args.max_len, 0, ranks.rank, ranks.world_size, columns=COLUMNS)
    logps = torch.zeros(stream.rows, 2, device=ranks.device)
    kept = read_reference(path, identity) if ranks.first else None
    if ranks.all_gather(kept is not None)[0]:
        if ranks.first:
            logps.copy_(kept)
        ranks.share([logps])
        return logps
    if ranks.first:
        print(f"computing the reference's log-probabilities of {stream.rows:,} triples", flush=True)
    model.eval()
    dtype = getattr(torch, args.dtype)
    with torch.no_grad(), torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
        for batch in stream.one_epoch():
            batch = {k: v.to(ranks.device) for k, v in batch.items()}
            logps[batch["rows"]] = torch.stack(pair_logps(model, batch), 1)
    ranks.sum(logps)  # every row is one rank's, and zero on the others
    if ranks.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, write_errors(path, SafetensorError):
            save_file({"logps": logps.cpu()}, temporary, identity)
    ranks.wait()
    return logps


def read_reference(path: Path, identity: dict[str, str]) -> Tensor | None:
    """The log-probabilities in a file; None where there is none, or where it is damaged or of another identity, which is reported."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as f:
            if f.metadata() == identity:
                return f.get_tensor("logps")
    except SafetensorError:
        pass
    print(f"{path} is of other data, weights or settings, or damaged: it is computed anew", file=sys.stderr)
    return None


def preference(args: argparse.Namespace, ranks: train.Ranks, model: ChatLM, tokenizer: Tokenizer) -> train.Objective:
    names = ("margin", "accuracy", "chosen_logp", "rejected_logp", "kl")
    references = {"data": reference_logps(args, ranks, model, tokenizer, args.data_files, "data")}
    batches: list[dict] = []
    if args.valid:
        references["valid"] = reference_logps(args, ranks, model, tokenizer, args.valid_files, "valid")
        batches = list(PairStream(args.valid_files, tokenizer, args.micro_batch_tokens, args.max_len, 0, ranks.rank, ranks.world_size,
                                  columns=COLUMNS).one_epoch())

    def loss(batch: dict, source: str = "data") -> tuple[Tensor, ...]:
        chosen, rejected = pair_logps(model, batch)
        ref_chosen, ref_rejected = references[source][batch["rows"]].unbind(1)
        mean, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, args.beta, args.label_smoothing, args.loss)
        if args.sft_alpha:
            mean = mean - args.sft_alpha * (chosen / (batch["chosen_labels"] != data.IGNORED).sum(1)).mean()
        margins = chosen_rewards - rejected_rewards
        # chosen and rejected stand in for samples of the policy: the mean of their log-ratios estimates its KL to the reference
        kl = (chosen_rewards + rejected_rewards) / (2 * args.beta)
        return (mean * len(chosen), chosen.new_full((), len(chosen)), margins.sum(), (margins > 0).sum(),
                chosen.sum(), rejected.sum(), kl.sum())

    def evaluate() -> dict:
        sums = torch.zeros(2 + len(names), dtype=torch.float64, device=ranks.device)
        for batch in batches:
            sums += torch.stack([x.double() for x in loss({k: v.to(ranks.device) for k, v in batch.items()}, "valid")])
        total, pairs, *others = ranks.sum(sums).tolist()
        return {"val_loss": total / pairs, **{f"val_{name}": x / pairs for name, x in zip(names, others)}}

    return train.Objective(loss, evaluate, train.exporter(args, model, tokenizer), names)


DEFAULTS = {"optimizer": "adamw", "beta": 0.1, "loss": "sigmoid", "label_smoothing": 0.0, "sft_alpha": 0.0}


def tune(argv: list[str]) -> None:
    parser = train.parser_for("DPO on prompt, chosen, rejected. Also: dpo.py reject --help, dpo.py merge --help.", DEFAULTS)
    parser.add_argument("--beta", type=number(float, 0, above=True), help="higher stays closer to the starting model (default: 0.1)")
    parser.add_argument("--loss", choices=["sigmoid", "ipo"], help="sigmoid: the paper's (default: sigmoid)")
    parser.add_argument("--label_smoothing", type=number(float, 0, 0.5), help="share of pairs taken as mislabeled (default: 0)")
    parser.add_argument("--sft_alpha", type=number(float, 0), help="weight of an extra SFT loss on chosen answers (default: 0)")
    args = parser.parse_args(argv)
    args.preset = args.vocab_size = args.bleu_every = None
    ranks = train.Ranks.join(args.device)
    with memory_hint("--micro_batch_tokens in a new run, or resume this one with --checkpoint_activations"), train.claimed(Path(args.out_dir), ranks):
        saved = train.find_checkpoint(args.out_dir, args.resume, ranks)
        if not saved and not (args.data and args.init_from):
            parser.error("--init_from and --data are needed")
        resolve_tune(args, ranks, saved)
        tokenizer = train.find_tokenizer(args, ranks, saved)
        model = train.make_model(args, ranks, tokenizer)
        identity = train.run_identity(args, model, tokenizer, "beta", "loss", "label_smoothing", "sft_alpha")
        train.check_identity(identity, saved, args.out_dir, ranks)
        group = max(1, round(args.batch_tokens / args.micro_batch_tokens))
        train.report_shares(args, ranks, group)
        stream = PairStream(args.data_files, tokenizer, args.micro_batch_tokens, args.max_len, args.seed, ranks.rank, ranks.world_size,
                            group=group, columns=COLUMNS, workers=args.workers)
        objective = preference(args, ranks, model, tokenizer)
        state = train.Trainer(args, ranks, model, stream, objective, identity).fit(saved)
        ranks.leave()
        if ranks.first:
            print(f"finished: {args.out_dir} ({state.step:,} steps, {train.duration(state.elapsed_s)})" + (
                f"; python dpo.py merge --model {shlex.quote(args.init_from)} --adapter {shlex.quote(args.out_dir)} --out "
                f"{shlex.quote(args.out_dir + '/merged')}" if args.lora_rank else ""))


def resolve_tune(args: argparse.Namespace, ranks: train.Ranks, saved: dict | None) -> None:
    """train.resolve_args with the defaults of preference tuning, and what it rejects besides."""
    settings = saved["settings"] if saved else {}
    if args.label_smoothing and (args.loss or settings.get("loss")) == "ipo":
        raise ValueError("--label_smoothing has no effect with --loss ipo")
    lora = args.lora_rank or settings.get("lora_rank")

    def find_files(paths: list[str], columns: tuple[str, ...]) -> list[str]:
        return find_triples(paths, ranks, Path(args.out_dir) / "triples")

    train.resolve_args(args, ranks, saved, COLUMNS, {**DEFAULTS, "lr": 1e-4 if lora else 1e-5}, find_files)


def reject(argv: list[str]) -> None:
    parser = ArgumentParser(prog="dpo.py reject", description="The model's own answers become the rejected ones.")
    add = parser.add_argument
    add("--model", required=True, metavar="SFT_DIR", help="whose answers are rejected")
    add("--data", required=True, metavar="A.parquet", help="prompts and the responses to prefer; also .jsonl, .json, .csv")
    add("--out", required=True, metavar="P.parquet", help="prompt, chosen, rejected")
    add("--num_samples", type=number(int, 1, 100), default=1, help="1: the greedy answer; more: of so many sampled ones that which has the least BLEU")
    add("--temperature", type=number(float, 1e-3, 1e3), help="of the samples (default: 1)")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), help="of the samples (default: 0)")
    add("--batch_size", type=number(int, 1), default=32, help="prompts at a time")
    add("--max_new_tokens", type=number(int, 1), default=256, help="tokens of an answer")
    add("--max_len", type=number(int, 2), default=320, help="tokens of a prompt; what is longer is cut")
    add("--device", help="cpu, cuda or cuda:N; none: a GPU if there is one")
    args = parser.parse_args(argv)
    for name in ("temperature", "seed"):
        if getattr(args, name) is not None and args.num_samples == 1:
            print(f"note: --{name} has no effect without --num_samples", file=sys.stderr)
    args.temperature, args.seed = args.temperature or 1.0, args.seed or 0
    answers = f"{args.out}.answers.jsonl"  # continued when the command runs again
    rows = list(data.whole_rows([args.data], data.PAIR, outputs=[args.out, answers]))
    data.check_parquet_path(Path(args.out))
    with memory_hint("--batch_size"):
        model = sample.load(args.model, None, sample.pick_device(args.device))
        torch.manual_seed(args.seed)
        options = {"max_new_tokens": args.max_new_tokens}
        if args.num_samples > 1:
            options |= {"do_sample": True, "temperature": args.temperature, "num_return_sequences": args.num_samples}
        made_by = {"model": sample.model_hash(args.model), **options, "max_len": args.max_len, "seed": args.seed if args.num_samples > 1 else None}
        tokenizer = Tokenizer.from_pretrained(args.model, append_eos=True)
        sample.answer_file(model, tokenizer, args.data, answers, args.batch_size, args.max_len, options, made_by, [args.out])
    triples = []
    for row, said in zip(rows, data.read_rows([answers]), strict=True):
        others = [a for a in said.get("responses", [said.get("response")]) if a and a.strip() != row["response"].strip()]
        if others:
            rejected = min(others, key=lambda a: sample.bleu4([a], [row["response"]]))
            triples.append({"prompt": row["prompt"], "chosen": row["response"], "rejected": rejected})
    data.refuse_nothing(len(triples), [args.data], data.Problems())
    data.write_pairs(args.out, triples, COLUMNS)
    print(f"{args.out}: {len(triples):,} triples; {len(rows) - len(triples):,} dropped, where every answer was the chosen one or empty")
    os.unlink(answers)
    Path(answers).with_name(f".{Path(answers).name}.settings").unlink()


def merge(argv: list[str]) -> None:
    parser = ArgumentParser(prog="dpo.py merge", description="A model and its LoRA adapter become one plain model.")
    parser.add_argument("--model", required=True, metavar="SFT_DIR", help="what the adapter was trained on")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder of the adapter")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the merged model")
    args = parser.parse_args(argv)
    if Path(args.out).resolve() in (Path(args.model).resolve(), Path(args.adapter).resolve()):
        raise ValueError(f"--out {args.out} is --model or --adapter, which would be overwritten: choose another")
    check_folder(args.out)
    model = ChatLM.from_pretrained(args.model)
    load_adapter(model, Path(args.adapter))
    merge_lora(model)
    model.save_pretrained(args.out)
    Tokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(f"{args.out}: a plain model folder")


def main() -> None:
    commands = {"reject": reject, "merge": merge}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        commands[sys.argv[1]](sys.argv[2:])
    else:
        tune(sys.argv[1:])


if __name__ == "__main__":
    run(main)
