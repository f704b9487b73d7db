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
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import data
import sample
import train
from chatlm import LOSS_CHUNK_BYTES, ChatLM
from data import PairStream
from tokenizer import ArgumentParser, Tokenizer, number, run

COLUMNS = ("prompt", "chosen", "rejected")


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


def reference_logps(args: argparse.Namespace, ranks: train.Ranks, model: ChatLM, tokenizer: Tokenizer, files: list[str], name: str) -> Tensor:
    """(rows, 2) log-probabilities of chosen and rejected under the starting model, read from the out_dir or computed there."""
    path = Path(args.out_dir) / "checkpoint" / f"reference_{name}.safetensors"
    weights = xxhash.xxh3_64()
    for n, p in model.named_parameters():
        if ".lora_" not in n:
            weights.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    identity = {"data": data.footprint(files), "weights": weights.hexdigest(), "max_len": str(args.max_len),
                "tokenizer": xxhash.xxh3_64_hexdigest(tokenizer.to_json().encode())}
    if path.is_file():
        with safe_open(path, "pt") as f:
            if f.metadata() == identity:
                return f.get_tensor("logps").to(ranks.device)
    stream = PairStream(files, tokenizer, args.micro_batch_tokens, args.max_len, 0, ranks.rank, ranks.world_size, columns=COLUMNS)
    out = torch.zeros(stream.rows, 2, dtype=torch.float32, device=ranks.device)
    dtype = train.pick_dtype(args.dtype, ranks.device)
    model.eval()
    with torch.no_grad(), torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
        for batch in stream.one_epoch():
            batch = {k: v.to(ranks.device) for k, v in batch.items()}
            out[batch["rows"]] = torch.stack(pair_logps(model, batch), 1)
    ranks.sum(out)
    if ranks.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": out.cpu()}, f"{path}.tmp", identity)
        os.replace(f"{path}.tmp", path)
    return out


def preference(args: argparse.Namespace, ranks: train.Ranks, model: ChatLM, tokenizer: Tokenizer) -> train.Objective:
    names = ("margin", "accuracy", "chosen_logp", "rejected_logp", "kl")
    references = {"data": reference_logps(args, ranks, model, tokenizer, args.data, "data")}
    batches: list[dict] = []
    if args.valid:
        references["valid"] = reference_logps(args, ranks, model, tokenizer, [args.valid], "valid")
        batches = list(PairStream(args.valid, tokenizer, args.micro_batch_tokens, args.max_len, 0, ranks.rank, ranks.world_size,
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
        return (mean * len(chosen), torch.tensor(len(chosen), device=chosen.device), margins.sum(), (margins > 0).sum(),
                chosen.sum(), rejected.sum(), kl.sum())

    def evaluate() -> dict:
        sums = torch.zeros(2 + len(names), dtype=torch.float64, device=ranks.device)
        for batch in batches:
            sums += torch.stack([x.double() for x in loss({k: v.to(ranks.device) for k, v in batch.items()}, "valid")])
        total, pairs, *others = ranks.sum(sums).tolist()
        return {"val_loss": total / pairs, **{f"val_{name}": x / pairs for name, x in zip(names, others)}}

    return train.Objective(loss, evaluate, train.exporter(args, model, tokenizer), names)


def tune(argv: list[str]) -> None:
    parser = train.parser_for("DPO on prompt, chosen, rejected. Also: dpo.py reject --help, dpo.py merge --help.")
    parser.add_argument("--beta", type=number(float, 0, above=True), default=0.1, help="how dear it is to leave the reference")
    parser.add_argument("--loss", choices=["sigmoid", "ipo"], default="sigmoid", help="sigmoid: the paper's")
    parser.add_argument("--label_smoothing", type=number(float, 0, 0.5), default=0.0, help="share of pairs taken as mislabelled")
    parser.add_argument("--sft_alpha", type=number(float, 0), default=0.0, help="weight of the chosen answers' mean nats a token")
    args = parser.parse_args(argv)
    if not args.data or not args.init_from:
        parser.error("--init_from and --data are needed")
    args.preset = args.vocab_size = None
    args.optimizer = args.optimizer or "adamw"
    args.lr = args.lr or (1e-4 if args.lora_rank else 1e-5)
    ranks = train.Ranks.join(args.device)
    train.settle(args, ranks, COLUMNS)
    tokenizer = train.find_tokenizer(args, ranks)
    model = train.make_model(args, ranks, tokenizer)
    stream = PairStream(args.data, tokenizer, args.micro_batch_tokens, args.max_len, args.seed, ranks.rank, ranks.world_size,
                        group=max(1, round(args.batch_tokens / args.micro_batch_tokens)), columns=COLUMNS, workers=args.workers)
    objective = preference(args, ranks, model, tokenizer)
    identity = {**train.run_identity(args, model, tokenizer), "--beta": args.beta, "--loss": args.loss}
    state = train.fit(args, ranks, model, stream, objective, identity)
    if ranks.first:
        print(f"finished: {args.out_dir} ({state.step:,} steps, {train.duration(state.elapsed_s)})" + (
            f"; python dpo.py merge --model {args.init_from} --adapter {args.out_dir} --out {args.out_dir}/merged" if args.lora_rank else ""))
    ranks.leave()


def reject(argv: list[str]) -> None:
    parser = ArgumentParser(prog="dpo.py reject", description="The model's own answers become the rejected ones.")
    parser.add_argument("--model", required=True, metavar="SFT_DIR", help="whose answers are rejected")
    parser.add_argument("--data", required=True, metavar="A.parquet", help="prompts and the responses to prefer")
    parser.add_argument("--out", required=True, metavar="P.parquet", help="prompt, chosen, rejected")
    parser.add_argument("--batch_size", type=number(int, 1), default=32, help="prompts at a time")
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=256, help="tokens of an answer")
    parser.add_argument("--max_len", type=number(int, 2), default=320, help="tokens of a prompt; what is longer is cut")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; none: a GPU if there is one")
    args = parser.parse_args(argv)
    data.open_parquet(args.data, ("prompt", "response"))
    model = ChatLM.from_pretrained(args.model, device=sample.pick_device(args.device))
    answers = f"{args.out}.answers.jsonl"  # continued when the command runs again
    sample.answer_file(model, Tokenizer.from_pretrained(args.model, append_eos=True), args.data, answers, args.batch_size, args.max_len,
                       {"max_new_tokens": args.max_new_tokens})
    rows = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": answer["response"]}
            for row, answer in zip(data.read_rows([args.data]), data.read_rows([answers]), strict=True)]
    kept = [row for row in rows if row["rejected"] and row["rejected"].strip() != row["chosen"].strip()]
    print(f"{args.out}: {data.write_pairs(args.out, kept, COLUMNS):,} triples; {len(rows) - len(kept):,} dropped, "
          "where the answer was the chosen one or empty")
    os.unlink(answers)


def merge(argv: list[str]) -> None:
    parser = ArgumentParser(prog="dpo.py merge", description="A model and its LoRA adapter become one plain model.")
    parser.add_argument("--model", required=True, metavar="SFT_DIR", help="what the adapter was trained on")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder of the adapter")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the merged model")
    args = parser.parse_args(argv)
    model = ChatLM.from_pretrained(args.model)
    train.load_adapter(model, Path(args.adapter))
    train.merge_lora(model)
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
