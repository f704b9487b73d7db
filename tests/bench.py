"""Side by side with its peers: every claim of speed and memory, measured in one run on one machine.

    python tests/bench.py tokenizer_train  --data pairs.parquet poems.parquet --megabytes 20 180
    python tests/bench.py tokenizer_encode --data pairs.parquet
    python tests/bench.py dedup            --data pairs.parquet
    python tests/bench.py loader           --data pairs.parquet
    python tests/bench.py train            --data pairs.parquet
    python tests/bench.py time_to_loss     --data pairs.parquet --valid valid.parquet
    python tests/bench.py generate
    python tests/bench.py dpo              --data pairs.parquet
    python tests/bench.py all --quick                                  all of them in under ten minutes, not to be quoted
    python tests/bench.py faults --runs 100                            training stopped at all moments loses nothing
    python tests/bench.py curves --logs out/log.jsonl --out loss.svg   the loss over the steps, drawn

Every contender runs in a process of its own, in turn, so that what slows the machine slows all of them; the median of
--runs is shown. Memory is the greatest resident memory of a contender's whole process tree, its imports included. Without
--data the demo's questions and answers are used. Prints a Markdown table, and a line of JSON with versions and machine.
"""
import argparse
import itertools
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Texts, make_demo, to_codepoints, write_demo
from tokenizer import BYTE_TOKENS, SPECIAL_TOKENS, Tokenizer, piece_starts

ROOT = Path(__file__).parent.parent
PIECE_MARK = "\x01"  # between the pieces that sentencepiece is given


# --- measuring -------------------------------------------------------------------------------------------------------------------

def rss_bytes(pid: int) -> int:
    """Resident memory of a process and all that descend from it (Linux)."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = [c for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return 0
    return own + sum(rss_bytes(int(c)) for c in children)


def gpu_bytes() -> int:
    """Memory of the GPU that is in use, by any process; 0 without a GPU."""
    import torch
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(command: list[str], env: dict[str, str] | None = None, gpu: bool = False) -> tuple[float, int, str]:
    """Seconds from start to end, greatest resident bytes, and what was printed. gpu: for a command that uses the GPU if there is one,
    the bytes are those that it takes there. Raises RuntimeError if it fails."""
    before = gpu_bytes() if gpu else 0
    with tempfile.TemporaryFile("w+") as out:
        begin_s, peak = time.perf_counter(), 0
        running = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **(env or {})}, cwd=ROOT)
        while running.poll() is None:
            peak = max(peak, gpu_bytes() - before if before else rss_bytes(running.pid))
            time.sleep(0.01)
        wall_s = time.perf_counter() - begin_s
        out.seek(0)
        if running.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {running.returncode}: {out.read()[-2000:]}")
        return wall_s, peak, out.read()


def child(task: str, *args: str) -> list[str]:
    """The command that runs one of this file's child_ functions."""
    return [sys.executable, __file__, "child", task, *args]


def machine() -> dict:
    models = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    packages = ("torch", "numpy", "pyarrow", "tokenizers", "sentencepiece", "transformers", "ctranslate2", "datasets", "rensa", "datasketch", "gigabpe", "fastsketchlsh")
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"date": time.strftime("%Y-%m-%d"), "cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(),
            "python": platform.python_version(), **versions}


def show(title: str, columns: list[str], rows: list[list[str]], figures: dict) -> None:
    """A Markdown table for people, and the same as JSON for programs."""
    print(f"\n**{title}**\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print("\n" + json.dumps({"bench": title, **figures, "machine": machine()}, ensure_ascii=False), flush=True)


# --- corpora ---------------------------------------------------------------------------------------------------------------------

def load_texts(paths: list[str]) -> list[str]:
    return list(Texts(paths)) if paths else [text for pair in make_demo()[0] for text in pair]


def endless(texts: list[str], rng: random.Random) -> Iterator[str]:
    """The texts in random order, once; then texts of some ten clauses each, of which seven in ten are the beginning of one
    real clause and the end of another, so that new pieces keep coming as they do in a real corpus."""
    yield from rng.sample(texts, len(texts))
    clauses = re.findall(r"[^，。！？；：、\n]+[，。！？；：、\n]?", "\n".join(texts))
    while True:
        made = rng.choices(clauses, k=10_000)
        for i, other in enumerate(rng.choices(clauses, k=7_000)):
            share = rng.random()
            made[i] = made[i][:int(share * len(made[i]))].rstrip("，。！？；：、\n") + other[int(share * len(other)):]
        rng.shuffle(made)
        for i in range(0, len(made), 10):
            yield "".join(made[i:i + 10])


def write_corpus(texts: list[str], path: Path, megabytes: float) -> int:
    """A text file, a text a line, of so many megabytes; its characters."""
    size = chars = 0
    with open(path, "w", encoding="utf-8") as f:
        for text in endless(texts, random.Random(0)):
            line = text.replace("\n", " ") + "\n"
            f.write(line)
            size, chars = size + len(line.encode()), chars + len(line)
            if size >= megabytes * 1e6:
                return chars


# --- tokenizer_train ---------------------------------------------------------------------------------------------------------------

def our_pieces(text: str) -> list[str]:
    starts = np.flatnonzero(piece_starts(to_codepoints(text), np.zeros(1, np.int64))).tolist()
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]


def child_tokenizers(corpus: str, out: str, vocab_size: str) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="never")])
    tokenizer.train([corpus], trainers.BpeTrainer(
        vocab_size=int(vocab_size), min_frequency=2, special_tokens=SPECIAL_TOKENS + BYTE_TOKENS, show_progress=False))
    tokenizer.save(out)


def child_gigabpe(corpus: str, out: str, vocab_size: str) -> None:
    """In Rust, with the merges of tokenizers; pieces are runs of letters and digits, or of marks."""
    import gigabpe
    gigabpe.train_tokenizer([corpus], int(vocab_size), out, min_frequency=2, special_tokens=SPECIAL_TOKENS + BYTE_TOKENS,
                            pretokenizer="whitespace")


def child_sentencepiece(corpus: str, out: str, vocab_size: str, coverage: str = "") -> None:
    """By its own rules or, with a coverage, on pieces with a mark between them."""
    import sentencepiece
    rules = {"split_digits": True}
    if coverage:
        rules = {"pretokenization_delimiter": PIECE_MARK, "split_by_unicode_script": False, "split_by_number": False}
    sentencepiece.SentencePieceTrainer.train(
        input=corpus, model_prefix=out, model_type="bpe", vocab_size=int(vocab_size), character_coverage=float(coverage or 0.9999), byte_fallback=True,
        num_threads=os.cpu_count(), max_sentence_length=1 << 20, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, minloglevel=2, **rules)


def chars_per_token(kind: str, model: str, texts: list[str]) -> float:
    if kind == "ours":
        tokenizer = Tokenizer.from_pretrained(model)
        tokens = len(tokenizer.encode_arrays(texts)[0]) - len(texts)  # without the [EOS] of each
    elif kind in ("tokenizers", "gigabpe"):
        import tokenizers
        tokens = sum(len(e.ids) for e in tokenizers.Tokenizer.from_file(model).encode_batch(texts))
    else:
        import sentencepiece
        spm = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")
        parts = [piece for text in texts for piece in our_pieces(text)] if kind.endswith("our pieces") else texts
        tokens = sum(map(len, spm.encode(parts)))
    return sum(map(len, texts)) / tokens


def tokenizer_train(args: argparse.Namespace) -> None:
    """Time, memory and compression of learning a tokenizer: this project, tokenizers, gigabpe, sentencepiece."""
    texts = load_texts(args.data)
    held_out, texts = texts[::50], [text for i, text in enumerate(texts) if i % 50]
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as scratch:
            corpus, marked, size = Path(scratch) / "corpus.txt", Path(scratch) / "marked.txt", str(args.vocab_size)
            chars = write_corpus(texts, corpus, megabytes)
            models = {name: f"{scratch}/{name}" for name in ("ours", "tokenizers", "gigabpe", "sentencepiece", "sentencepiece, our pieces")}
            commands = {
                "ours": [sys.executable, "tokenizer.py", "train", str(corpus), "--out", models["ours"], "--vocab_size", size],
                "tokenizers": child("tokenizers", str(corpus), models["tokenizers"], size),
                "gigabpe": child("gigabpe", str(corpus), models["gigabpe"], size),
                "sentencepiece": child("sentencepiece", str(corpus), models["sentencepiece"], size)}
            if args.same_pieces:
                marks = 0
                with open(corpus, encoding="utf-8") as f, open(marked, "w", encoding="utf-8") as g:
                    for line in f:
                        pieces = our_pieces(line[:-1])
                        g.write(PIECE_MARK.join(pieces) + "\n")
                        marks += max(0, len(pieces) - 1)
                coverage = 1 - 1e-4 * chars / (chars + marks)  # so that the alphabet is the same: marks count as characters there
                commands["sentencepiece, our pieces"] = child(
                    "sentencepiece", str(marked), models["sentencepiece, our pieces"], size, str(coverage))
            chosen = [] if args.only_ours else args.peers or commands
            commands = {name: command for name, command in commands.items() if name == "ours" or name in chosen}
            times, peaks = {name: [] for name in commands}, dict.fromkeys(commands, 0)
            for _ in range(args.runs):
                for name, command in commands.items():
                    wall_s, peak, said = measure(command)
                    if share := re.search(r"a sample of ([\d.]+ %)(?!.*a sample of)", said, re.DOTALL):
                        print(f"{name} learnt from {share[1]} of the texts")
                    times[name].append(wall_s)
                    peaks[name] = max(peaks[name], peak)
            median = {name: statistics.median(t) for name, t in times.items()}
            packed = {name: chars_per_token(name, models[name], held_out) for name in commands}
            show(f"tokenizer_train, {megabytes:g} MB ({chars:,} characters), {args.vocab_size:,} tokens",
                 ["", "seconds", "ours / it", "peak MB", "ours / it", "characters a token, held out"],
                 [[name, f"{median[name]:.1f}", f"{median['ours'] / median[name]:.2f}", f"{peaks[name] / 1e6:,.0f}",
                   f"{peaks['ours'] / peaks[name]:.2f}", f"{packed[name]:.4f}"] for name in commands],
                 {"seconds": times, "peak_bytes": peaks, "chars_per_token": packed})


# --- tokenizer_encode --------------------------------------------------------------------------------------------------------------

def child_encode(kind: str, folder: str, runs: str, *data: str) -> None:
    """Prints seconds for all texts, a run each after a warm-up."""
    if data[0] == "run of":  # one text of so many characters without a mark in it
        clauses = [c for text in load_texts(list(data[2:])) for c in our_pieces(text) if len(c) > 1 and c.isalpha()]
        texts = ["".join(random.Random(0).choices(clauses, k=int(data[1])))[:int(data[1])]]
    else:
        texts = load_texts(list(data[1:]))
    if kind == "ours":
        tokenizer = Tokenizer.from_pretrained(folder)
        encode = tokenizer.encode_batch
    elif kind == "ours, arrays":
        encode = Tokenizer.from_pretrained(folder).encode_arrays
    else:
        import tokenizers
        encode = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json").encode_batch
    times = []
    for _ in range(1 + int(runs)):
        begin_s = time.perf_counter()
        encode(texts)
        times.append(time.perf_counter() - begin_s)
    print(json.dumps({"chars": sum(map(len, texts)), "seconds": times[1:]}))


def tokenizer_encode(args: argparse.Namespace) -> None:
    """Characters a second: this project in one process, tokenizers on one thread and on all."""
    cores = os.cpu_count()
    contenders = {"ours, one process": ("ours", 1), "ours, one process, arrays": ("ours, arrays", 1), "tokenizers, one thread": ("tokenizers", 1),
                  f"tokenizers, {cores} threads": ("tokenizers", cores)}
    with tempfile.TemporaryDirectory() as folder:
        texts = load_texts(args.data)
        Tokenizer.train(texts, args.vocab_size).save_pretrained(folder)
        for title, what in (("real texts", ["texts"]), ("one text of 100,000 characters, no mark in it", ["run of", "100000"]),
                            ("one text of 1,000,000 characters, no mark in it", ["run of", "1000000"])):
            speeds, peaks = {name: [] for name in contenders}, dict.fromkeys(contenders, 0)
            for _ in range(args.runs):
                for name, (kind, threads) in contenders.items():
                    _, peak, said = measure(child("encode", kind, folder, "3", *what, *args.data),
                                            {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": str(threads > 1).lower()})
                    result = json.loads(said.splitlines()[-1])
                    speeds[name] += [result["chars"] / s for s in result["seconds"]]
                    peaks[name] = max(peaks[name], peak)
            median = {name: statistics.median(s) for name, s in speeds.items()}
            show(f"tokenizer_encode, {title} ({result['chars']:,} characters)", ["", "million characters/s", "ours / it", "peak MB"],
                 [[name, f"{s / 1e6:.2f}", f"{median['ours, one process'] / s:.2f}", f"{peaks[name] / 1e6:,.0f}"] for name, s in median.items()],
                 {"chars_per_s": speeds, "peak_bytes": peaks})


# --- dedup -------------------------------------------------------------------------------------------------------------------------

def load_pairs(paths: list[str]) -> list[tuple[str, str]]:
    import data as ours
    return [(row["prompt"], row["response"]) for row in ours.Rows(paths, ours.PAIR)] if paths else make_demo()[0]


def kept_chars(text: str) -> str:
    """Without punctuation and spaces, as the peers' 5-grams are made."""
    return re.sub(r"[\W_]", "", text)


def child_dedup(kind: str, runs: str, times: str, *data: str) -> None:
    """Prints documents a second, from texts to the indices to drop, a run each; how many are dropped."""
    texts = [f"{p}\n{r}" for p, r in load_pairs(list(data))]
    # more documents: the same with characters of their own, so that they are no duplicates
    texts += [f"第{k}篇" + re.sub("(.{3})", r"\1" + chr(0x4e00 + k), text) for k in range(1, int(times)) for text in texts]

    def grams(text: str) -> list[str]:
        kept = kept_chars(text)
        return [kept[i:i + 5] for i in range(max(1, len(kept) - 4))]

    def one_by_one(lsh, sketch_of) -> int:
        dropped = 0
        for i, text in enumerate(texts):
            sketch = sketch_of(text)
            if lsh.query(sketch):
                dropped += 1
            else:
                lsh.insert(i, sketch)
        return dropped

    def find() -> int:
        if kind.startswith("ours"):
            from data import dedup_indices
            return len(dedup_indices(texts, 0.85, workers=1 if kind == "ours, one thread" else None))
        if kind == "datasketch":
            import datasketch

            def sketch_of(text: str):
                sketch = datasketch.MinHash(num_perm=128)
                sketch.update_batch([gram.encode() for gram in grams(text)])
                return sketch
            return one_by_one(datasketch.MinHashLSH(threshold=0.85, num_perm=128), sketch_of)
        import rensa
        if kind == "rensa, one by one":
            def sketch_of(text: str):
                sketch = rensa.RMinHash(128, 42)
                sketch.update(grams(text))
                return sketch
            return one_by_one(rensa.RMinHashLSH(0.85, 128, 16), sketch_of)
        if kind.startswith("fastsketchlsh"):
            from FastSketchLSH import LSH, FastSimilaritySketch
            sketcher = FastSimilaritySketch(size=128, seed=42)
            if kind.endswith("our hashes"):
                from data import shingles
                hashes, counts = shingles(texts)
                ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
                sketches = sketcher.batch_csr(hashes, ends, prehashed=True)
            else:
                sketches = sketcher.batch([grams(text) for text in texts])
            return int(np.sum(LSH(128, 16).insert_and_query_duplicates(np.asarray(sketches))))
        if kind == "rensa, in bulk":
            matrix = rensa.RMinHash.digest_matrix_from_token_sets([grams(text) for text in texts], 128, 42)
        else:  # on this project's hashes of 5-grams
            from data import shingles
            hashes, counts = shingles(texts)
            matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64), 128, 42)
        return sum(rensa.RMinHashLSH(0.85, 128, 16).query_duplicate_flags_matrix_one_shot(matrix))

    speeds = []
    for _ in range(int(runs)):
        begin_s = time.perf_counter()
        dropped = find()
        speeds.append(len(texts) / (time.perf_counter() - begin_s))
    print(json.dumps({"docs": len(texts), "chars": sum(map(len, texts)), "dropped": dropped, "docs_per_s": speeds}))


def planted(texts: list[str]) -> tuple[list[str], list[str], np.ndarray]:
    """Texts, edited copies of them, and their exact similarities."""
    rng = random.Random(0)
    chars = [c for c in "".join(rng.sample(texts, min(2000, len(texts)))) if c.isalpha()]
    originals = list({kept_chars(text): text for text in texts if len(kept_chars(text)) >= 20}.values())
    originals = rng.sample(originals, min(20_000, len(originals)))
    copies, exact = [], []
    for text in originals:
        out = list(text)
        for _ in range(round(rng.random() * 0.06 * len(out))):
            out[rng.randrange(len(out))] = rng.choice(chars)
        copies.append("".join(out))
        a, b = ({kept[i:i + 5] for i in range(len(kept) - 4)} for kept in map(kept_chars, (text, copies[-1])))
        exact.append(len(a & b) / len(a | b))
    return originals, copies, np.array(exact)


def dedup(args: argparse.Namespace) -> None:
    """Documents a second, end to end, with recall and precision on edited copies: this project, rensa, datasketch."""
    from data import dedup_indices
    contenders = ["ours", "ours, one thread"]
    if not args.only_ours:
        contenders += ["fastsketchlsh", "fastsketchlsh, on our hashes", "rensa, one by one", "rensa, in bulk", "rensa, in bulk, on our hashes", "datasketch"]
    speeds, peaks, results = {name: [] for name in contenders}, dict.fromkeys(contenders, 0), {}
    for _ in range(args.runs):
        for name in contenders:
            _, peak, said = measure(child("dedup", name, "1" if name == "datasketch" else "3", str(args.times), *args.data))
            results[name] = json.loads(said.splitlines()[-1])
            speeds[name] += results[name]["docs_per_s"]
            peaks[name] = max(peaks[name], peak)
    median = {name: statistics.median(s) for name, s in speeds.items()}
    docs, chars = results["ours"]["docs"], results["ours"]["chars"]
    show(f"dedup, {docs:,} documents of {chars / docs:.0f} characters", ["", "documents/s", "ours / it", "peak MB", "dropped"],
         [[name, f"{s:,.0f}", f"{median['ours'] / s:.1f}", f"{peaks[name] / 1e6:,.0f}", f"{results[name]['dropped']:,}"] for name, s in median.items()],
         {"docs_per_s": speeds, "peak_bytes": peaks})
    originals, copies, exact = planted([f"{p}\n{r}" for p, r in load_pairs(args.data)])
    clean = sorted(set(range(len(originals))) - set(dedup_indices(originals, 0.5).tolist()))  # so that all that is near is planted
    dropped = set(dedup_indices([originals[i] for i in clean] + [copies[i] for i in clean], 0.85).tolist())
    exact, found = exact[clean], np.array([len(clean) + i in dropped for i in range(len(clean))])
    right = exact >= 0.9
    show(f"dedup, {len(clean):,} documents and edited copies, threshold 0.85", ["", "share"],
         [["recall of copies with J >= 0.90", f"{found[right].mean():.4f} of {right.sum():,}"],
          ["recall of copies with 0.85 <= J < 0.90", f"{found[(exact >= 0.85) & ~right].mean():.4f} of {((exact >= 0.85) & ~right).sum():,}"],
          ["precision: dropped copies with J >= 0.80", f"{(exact[found] >= 0.80).mean():.4f} of {found.sum():,}"]],
         {"recall": float(found[right].mean()), "precision": float((exact[found] >= 0.8).mean())})


# --- loader ------------------------------------------------------------------------------------------------------------------------

def child_loader(kind: str, workers: str, folder: str, seconds: str, *data: str) -> None:
    """Prints rows and useful tokens a second, the padding, and how much memory grew."""
    import torch  # noqa: F401  what both need in any case
    files, budget = list(data), 8192
    from transformers import AutoTokenizer

    from data import PairStream
    if kind != "ours":
        import datasets
        from torch.utils.data import DataLoader
    bare = rss_bytes(os.getpid())
    if kind == "ours":
        batches = iter(PairStream(files, Tokenizer.from_pretrained(folder), budget, 320, workers=int(workers)))
    else:  # datasets' streaming and shuffle buffer, AutoTokenizer, batches of 32 padded to their longest
        tokenizer = AutoTokenizer.from_pretrained(folder)
        stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True).shuffle(0, buffer_size=10_000)

        def collate(rows: list[dict]) -> dict:
            made = tokenizer([r["prompt"] for r in rows], max_length=320, truncation=True, padding=True, return_tensors="pt")
            labels = tokenizer([r["response"] for r in rows], max_length=320, truncation=True, padding=True, return_tensors="pt")
            made["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
            return made

        def endless() -> Iterator:
            while True:
                yield from DataLoader(stream, 32, collate_fn=collate, num_workers=int(workers))
        batches = endless()
    begin_s, first_s, grown = time.perf_counter(), 0.0, 0
    rows = useful = cells = n = 0
    for batch in batches:
        first_s = first_s or time.perf_counter() - begin_s
        rows, n = rows + len(batch["labels"]), n + 1
        useful += int(batch["attention_mask"].sum() + (batch["labels"] >= 0).sum())
        cells += batch["input_ids"].numel() + batch["labels"].numel()
        if n % 50 == 1:
            grown = max(grown, rss_bytes(os.getpid()) - bare)
        if time.perf_counter() - begin_s > float(seconds):
            break
    spent_s = time.perf_counter() - begin_s
    print(json.dumps({"rows_per_s": rows / spent_s, "tokens_per_s": useful / spent_s, "padding": 1 - useful / cells, "grown_bytes": grown,
                      "first_batch_s": first_s}), flush=True)
    batches.close()  # ends the DataLoader's processes; what datasets leaves running in threads would keep this one alive
    os._exit(0)


def loader(args: argparse.Namespace) -> None:
    """Rows and useful tokens a second of what feeds training: PairStream, and datasets with AutoTokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        files = args.data
        if not files:
            files = list(write_demo(folder))[:1]
        Tokenizer.train([text for pair in load_pairs(files[:1]) for text in pair], args.vocab_size).save_pretrained(folder)
        contenders = [(kind, workers) for workers in ("0", "1", "2") for kind in (["ours"] if args.only_ours else ["ours", "datasets"])]
        results: dict[tuple, list[dict]] = {c: [] for c in contenders}
        for _ in range(args.runs):
            for kind, workers in contenders:
                _, _, said = measure(child("loader", kind, workers, folder, str(args.seconds), *files), {"TOKENIZERS_PARALLELISM": "false"})
                results[kind, workers].append(json.loads(said.splitlines()[-1]))

        def middle(who: tuple, what: str) -> float:
            return statistics.median(r[what] for r in results[who])
        names = {"0": "in the training process", "1": "one process beside it", "2": "two processes beside it"}
        show("loader", ["", "rows/s", "useful tokens/s", "ours / it", "padding", "first batch, s", "memory grew, MB"],
             [[f"{kind}, {names[workers]}", f"{middle((kind, workers), 'rows_per_s'):,.0f}", f"{middle((kind, workers), 'tokens_per_s'):,.0f}",
               f"{middle(('ours', workers), 'tokens_per_s') / middle((kind, workers), 'tokens_per_s'):.1f}", f"{100 * middle((kind, workers), 'padding'):.1f} %",
               f"{middle((kind, workers), 'first_batch_s'):.1f}", f"{middle((kind, workers), 'grown_bytes') / 1e6:,.0f}"] for kind, workers in contenders],
             {f"{kind}, {workers}": r for (kind, workers), r in results.items()})


# --- train and time_to_loss ----------------------------------------------------------------------------------------------------------

# What a user would run instead: T5ForConditionalGeneration of the same size in a plain loop. rows: a batch is so many in random order, or
# 0: of similar lengths. "usual" is how the reference project trains; "best" what this peer does best.
GROUPED = {"rows": 0, "optimizer": "adamw", "schedule": "cosine", "lr": 2e-3, "min_lr": 2e-5, "dropout": 0.1}
PEERS = {
    "usual": {"rows": 16, "optimizer": "adafactor", "schedule": "onecycle", "lr": 5e-3, "min_lr": 1e-4, "dropout": 0.1},
    "grouped": GROUPED, "best": {**GROUPED, "dropout": 0.0}, "compiled": {**GROUPED, "dropout": 0.0},
    "padded": {**GROUPED, "dropout": 0.0, "multiple": 8},  # lengths rounded up: fewer shapes for oneDNN to compile
}
MAX_LEN = 320


def child_train(kind: str, folder: str, preset: str, dtype: str, seconds: str, data: str, valid: str = "") -> None:
    """A peer's training for so many seconds after warming up; prints useful tokens a second, and on `valid` nats per character."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from chatlm import ChatLMConfig
    from train import learning_rate
    choice, tokenizer = PEERS[kind], Tokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = json.loads(ChatLMConfig.preset(preset, vocab_size=len(tokenizer)).to_json())
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**{**config, "dropout_rate": choice["dropout"]})).to(device)
    forward = torch.compile(model, dynamic=True) if kind == "compiled" else model
    make = torch.optim.Adafactor if choice["optimizer"] == "adafactor" else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=choice["lr"], **({"fused": True} if make is torch.optim.AdamW else {}))

    def encoded(path: str) -> list[tuple[list[int], list[int]]]:
        sides = [[row[:MAX_LEN - 1] + row[-1:] if len(row) > MAX_LEN else row for row in tokenizer.encode_batch(texts)]
                 for texts in zip(*load_pairs([path]))]
        return list(zip(*sides))

    def batches(rows: list) -> Iterator[list]:
        """One pass over the rows: of similar lengths, in random order."""
        most = 16384 if device == "cuda" else 800
        made, batch, width = [], [], (0, 0)
        for row in sorted(rows, key=lambda r: (len(r[1]), len(r[0]))):
            wider = max(width[0], len(row[0])), max(width[1], len(row[1]))
            if batch and (len(batch) + 1) * sum(wider) > most:
                made.append(batch)
                batch, wider = [], (len(row[0]), len(row[1]))
            batch, width = [*batch, row], wider
        made.append(batch)
        return iter(random.sample(made, len(made)))

    def endless_batches(rows: list) -> Iterator[list]:
        while True:
            if choice["rows"]:
                order = random.sample(rows, len(rows))
                yield from (order[i:i + choice["rows"]] for i in range(0, len(order), choice["rows"]))
            else:
                yield from batches(rows)

    def loss_of(model, batch: list) -> torch.Tensor:
        ids, labels = (torch.nn.utils.rnn.pad_sequence([torch.tensor(r[side]) for r in batch], True, padding).to(device)
                       for side, padding in ((0, 0), (1, -100)))
        if multiple := choice.get("multiple"):
            ids = torch.nn.functional.pad(ids, (0, -ids.size(1) % multiple), value=0)
            labels = torch.nn.functional.pad(labels, (0, -labels.size(1) % multiple), value=-100)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss

    random.seed(0)
    source, limit_s = endless_batches(encoded(data)), float(seconds)
    warm_s, begin_s, tokens, steps = 60.0 if kind == "compiled" else 3.0 if not valid else 0.0, time.perf_counter(), 0, 0
    model.train()
    while (now_s := time.perf_counter() - begin_s) < warm_s + limit_s:
        if now_s < warm_s or not steps:
            tokens, counted_s = 0, time.perf_counter()
        batch = next(source)
        for group in optimizer.param_groups:
            progress = max(0.0, now_s - warm_s) / limit_s
            group["lr"] = learning_rate(choice["schedule"], progress, steps, choice["lr"], choice["min_lr"], 0)
        loss_of(forward, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens, steps = tokens + sum(len(x) for row in batch for x in row), steps + 1
    if device == "cuda":
        torch.cuda.synchronize()
    result = {"tok_per_s": tokens / (time.perf_counter() - counted_s), "steps": steps}
    if valid:
        model.eval()
        nats = chars = 0.0
        with torch.no_grad():
            for batch in batches(encoded(valid)):
                nats += float(loss_of(model, batch)) * sum(len(r[1]) for r in batch)
                chars += sum(len(tokenizer.decode(r[1])) for r in batch)
        result["nats_per_char"] = nats / chars
    print(json.dumps(result))


def run_ours(folder: str, preset: str, dtype: str, seconds: float, data: str, valid: str = "") -> tuple[dict, int]:
    """train.py as a user runs it, its defaults and all, for so many seconds; what it logged, and its peak memory."""
    out = Path(folder) / "ours"
    more = ["--valid", valid, "--eval_every", "1000000"] if valid else []
    if gpu_bytes() and not valid:  # the speed on data that is large enough for such steps
        more = ["--batch_tokens", "65536"]
    _, peak, _ = measure([sys.executable, "train.py", "--data", data, "--tokenizer", folder, "--preset", preset, "--dtype", dtype,
                          "--time_limit", str(seconds), "--out_dir", str(out), "--resume", "never", *more], gpu=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "tok_per_s" in line]
    early = next(line for line in steps if line["elapsed"] > min(3.0, seconds / 2))
    early = {"tokens": 0, "elapsed": 0.0} if early is steps[-1] else early
    result = {"tok_per_s": (steps[-1]["tokens"] - early["tokens"]) / (steps[-1]["elapsed"] - early["elapsed"]), "steps": len(steps)}
    return {**result, **({"nats_per_char": [line for line in log if "val_loss" in line][-1]["val_nats_per_char"]} if valid else {})}, peak


def train(args: argparse.Namespace) -> None:
    """Useful tokens a second in training: train.py, and transformers' T5 as the reference trains it and at its best."""
    data = args.data[0] if args.data else ""
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train(load_texts(args.data), args.vocab_size).save_pretrained(folder)
        data = data or next(iter(write_demo(folder)))
        for dtype in args.dtypes:
            rates: dict[str, list[float]] = {kind: [] for kind in ("ours", *args.peers)}
            peaks = dict.fromkeys(rates, 0)
            for _ in range(args.runs):
                for kind, found in rates.items():
                    if kind == "ours":
                        result, peak = run_ours(folder, args.preset, dtype, args.seconds, data)
                    else:
                        _, peak, said = measure(child("train", kind, folder, args.preset, dtype, str(args.seconds), data), gpu=True)
                        result = json.loads(said.splitlines()[-1])
                    found.append(result["tok_per_s"])
                    peaks[kind] = max(peaks[kind], peak)
            median = {kind: statistics.median(r) for kind, r in rates.items()}
            show(f"train, {args.preset}, {dtype}", ["", "useful tokens/s", "ours / it", "peak MB"],
                 [["ours" if kind == "ours" else f"transformers, {kind}", f"{median[kind]:,.0f}",
                   "" if kind == "ours" else f"{median['ours'] / median[kind]:.2f}", f"{peaks[kind] / 1e6:,.0f}"] for kind in rates],
                 {"tok_per_s": rates, "peak_bytes": peaks})


def time_to_loss(args: argparse.Namespace) -> None:
    """Nats per character on held-out pairs: the peer after --seconds, ours after a tenth of them and after as many."""
    if bool(args.data) != bool(args.valid):
        raise SystemExit("bench.py: error: --data and --valid go together")
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train(load_texts(args.data), args.vocab_size).save_pretrained(folder)
        data, valid = (args.data[0], args.valid) if args.data else write_demo(folder)
        rows, figures = [], {}
        for _ in range(args.runs):
            for name, share in [("ours", 0.1), ("ours", 1.0), *((kind, 1.0) for kind in args.peers)]:
                seconds = share * args.seconds
                result = run_ours(folder, args.preset, args.dtype, seconds, data, valid)[0] if name == "ours" else json.loads(measure(
                    child("train", name, folder, args.preset, args.dtype, str(seconds), data, valid))[2].splitlines()[-1])
                figures.setdefault(f"{name}, {seconds:g} s", []).append(result["nats_per_char"])
                print(f"{name}, {seconds:g} s: {result}", file=sys.stderr, flush=True)
        for name, values in figures.items():
            rows.append([name if name.startswith("ours") else f"transformers, {name}", f"{statistics.median(values):.3f}"])
        show(f"time_to_loss, {args.preset}, {args.dtype}", ["", "nats per character"], rows, {"nats_per_char": figures})


# --- initialization: the first steps from counts, and from random weights -------------------------------------------------------------

STARTS = {"counts": "from counts", "random": "T5's random weights", "small": "the same, embeddings with std 0.05"}


def child_initialization(start: str, *flags: str) -> None:
    """train.py with another beginning."""
    import torch

    import train as script
    from data import run

    def initialize(self, stream) -> None:
        if start == "small":
            with torch.no_grad():
                self.model.shared.weight.normal_(std=0.05)

    if start != "counts":
        script.ResponseLoss.initialize = initialize
    sys.argv = ["train.py", *flags]
    run(script.main)


def initialization(args: argparse.Namespace) -> None:
    """Held-out nats per character in the first steps: from counts and from random weights, by optimizer and seed."""
    if bool(args.data) != bool(args.valid):
        raise SystemExit("bench.py: error: --data and --valid go together")
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train(load_texts(args.data), args.vocab_size).save_pretrained(folder)
        data, valid = (args.data[0], args.valid) if args.data else write_demo(folder)
        rows, logs = [], {}
        for start, optimizer, seed in itertools.product(args.starts, args.optimizers, range(args.runs)):
            out = Path(folder) / f"{start}, {optimizer}, seed {seed}"
            measure(child("initialization", start, "--data", data, "--valid", valid, "--tokenizer", folder, "--preset", args.preset, "--dtype", args.dtype,
                          "--optimizer", optimizer, "--seed", str(seed), "--max_steps", str(args.steps), "--eval_every", str(args.steps // 4),
                          "--out_dir", str(out), *args.more))
            logs[out.name] = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            values = [line["val_nats_per_char"] for line in logs[out.name] if "val_loss" in line]
            rows.append([STARTS[start], optimizer, str(seed), *(f"{value:.3f}" for value in values)])
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
        steps = [line["step"] for line in next(iter(logs.values())) if "val_loss" in line]
        show(f"initialization, {args.preset}, {args.dtype}", ["beginning", "optimizer", "seed", *(f"{step:,} steps" for step in steps)], rows, {"rows": rows})
        if args.out:
            from train import draw_curves
            Path(args.out).write_text(draw_curves(logs), "utf-8")


# --- generate ----------------------------------------------------------------------------------------------------------------------

def child_generate(kind: str, folder: str, dtype: str, batch: str, beams: str, new: str, seconds: str) -> None:
    """Prints tokens a second of answers of exactly `new` tokens to prompts of 32, a whole batch at a time."""
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng, size, length = random.Random(0), int(batch), int(new)
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    prompts = [[rng.randrange(300, vocabulary) for _ in range(31)] + [1] for _ in range(size)]
    ids, options = torch.tensor(prompts, device=device), {"max_new_tokens": length, "min_new_tokens": length, "num_beams": int(beams)}
    if kind == "ours":
        from sample import generate as ours
        from sample import load, pick_device
        model = load(folder, dtype, pick_device(device))

        def run() -> int:
            return ours(model, ids, **options).numel() - size
    elif kind == "transformers":
        from transformers import AutoModelForSeq2SeqLM
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()

        def run() -> int:
            with torch.inference_mode():
                return model.generate(ids, do_sample=False, **options).numel() - size
    else:
        import ctranslate2
        translator = ctranslate2.Translator(f"{folder}/ct2", device=device, compute_type=dtype, intra_threads=torch.get_num_threads())
        pieces = json.loads((Path(folder) / "tokenizer.json").read_text())
        words = {i: word for word, i in pieces["model"]["vocab"].items()} | {t["id"]: t["content"] for t in pieces["added_tokens"]}
        sources = [[words[i] for i in row] for row in prompts]

        def run() -> int:
            done = translator.translate_batch(sources, beam_size=int(beams), max_decoding_length=length, min_decoding_length=length, max_batch_size=size)
            return sum(len(d.hypotheses[0]) for d in done)
    run()
    rates, begin_s = [], time.perf_counter()
    while len(rates) < 2 or time.perf_counter() - begin_s < float(seconds):
        start_s = time.perf_counter()
        rates.append(run() / (time.perf_counter() - start_s))
    print(json.dumps({"tok_per_s": statistics.median(rates)}))


def generate(args: argparse.Namespace) -> None:
    """Answer tokens a second: this project, transformers, and CTranslate2 where it is installed; greedy, the same weights."""
    import torch

    from chatlm import ChatLM, ChatLMConfig
    from train import best_dtype
    on_gpu = torch.cuda.is_available()
    halves = ["bfloat16"] if best_dtype(torch.device("cuda" if on_gpu else "cpu")) == "bfloat16" else []  # where it is native
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.train(load_texts(args.data), args.vocab_size)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        model = ChatLM(ChatLMConfig.preset(args.preset, vocab_size=len(tokenizer)))
        model.save_pretrained(folder)
        per_token = model.train_flops(0, 1) / 6  # weights that are read for a token of one row
        x = torch.ones(1 << 28, device="cuda" if on_gpu else "cpu")
        for _ in range(2):  # the first is slower
            begin_s = time.perf_counter()
            float(x.sum())  # which waits for a GPU
            bandwidth = 4 * x.numel() / (time.perf_counter() - begin_s)
        del x
        torch.cuda.empty_cache()
        dtypes = args.dtypes or ["float32", *halves, "float16", *([] if on_gpu else ["int8"])]
        contenders = [("ours", d) for d in dtypes] + [("transformers", d) for d in ["float32", *halves, *(["float16"] if on_gpu else [])]]
        try:
            import ctranslate2  # noqa: F401
            subprocess.run([sys.executable, "-c", ("from ctranslate2.converters import TransformersConverter as C\n"
                            f"C({folder!r}).convert({folder + '/ct2'!r})")], check=True, capture_output=True)
            contenders += [("ctranslate2", d) for d in (("float16", "int8_float16") if on_gpu else ("float32", "int8"))]
        except ImportError:
            print("CTranslate2 is not installed and left out", file=sys.stderr)
        for batch in args.batches:
            rates: dict[tuple, list[float]] = {c: [] for c in contenders}
            peaks = dict.fromkeys(rates, 0)
            for _ in range(args.runs):
                for kind, dtype in contenders:
                    _, peak, said = measure(child("generate", kind, folder, dtype, str(batch), str(args.num_beams), str(args.new_tokens), str(args.seconds)), gpu=True)
                    rates[kind, dtype].append(json.loads(said.splitlines()[-1])["tok_per_s"])
                    peaks[kind, dtype] = max(peaks[kind, dtype], peak)
            median = {c: statistics.median(r) for c, r in rates.items()}
            size = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int8_float16": 1}
            show(f"generate, {args.preset}, batch {batch}, beams {args.num_beams}", ["", "tokens/s", "of the memory's limit", "peak MB", *(f"ours, {d} / it" for d in dtypes)],
                 [[f"{kind}, {dtype}", f"{median[kind, dtype]:.1f}", f"{100 * median[kind, dtype] / batch * per_token * size[dtype] / bandwidth:.0f} %",
                   f"{peaks[kind, dtype] / 1e6:,.0f}", *(f"{median['ours', d] / median[kind, dtype]:.2f}" for d in dtypes)] for kind, dtype in contenders],
                 {"tok_per_s": {f"{k}, {d}": r for (k, d), r in rates.items()}, "bandwidth_gb_per_s": bandwidth / 1e9})


# --- dpo ---------------------------------------------------------------------------------------------------------------------------

def write_triples(data: list[str], folder: Path, rows: int) -> None:
    """prompt, chosen, rejected: a row's response, and another row's."""
    import data as ours
    pairs = load_pairs(data)
    pairs = random.Random(0).sample(pairs, min(rows, len(pairs) - 1) + 1)
    ours.write_pairs(folder / "triples.parquet", ({"prompt": p, "chosen": c, "rejected": r} for (p, c), (_, r) in itertools.pairwise(pairs) if c != r),
                     ours.PREFERENCE)


def child_dpo(kind: str, folder: str, dtype: str, seconds: str) -> None:
    """Prints triples a second: of training, and of computing the reference's log-probabilities beforehand (ours only)."""
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, columns = Tokenizer.from_pretrained(folder), ("prompt", "chosen", "rejected")

    def timed(step, limit_s: float) -> float:
        for _ in range(2):
            step()
        begin_s, triples = time.perf_counter(), 0
        while time.perf_counter() - begin_s < limit_s:
            triples += step()
        if device == "cuda":
            torch.cuda.synchronize()
        return triples / (time.perf_counter() - begin_s)

    result = {}
    if kind == "ours":
        from chatlm import ChatLM
        from data import PairStream
        from dpo import dpo_loss, pair_logps
        from sample import pick_device
        from train import to_device
        model = ChatLM.from_pretrained(folder, torch.float32, pick_device(device))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
        batches = (to_device(batch, torch.device(device)) for batch in PairStream(f"{folder}/triples.parquet", tokenizer, 3200, 320, columns=columns))

        def logps(batch: dict) -> tuple:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                return pair_logps(model, batch)

        def reference() -> int:
            with torch.no_grad():
                return len(logps(next(batches))[0])

        def step() -> int:
            batch = next(batches)
            zeros = torch.zeros(len(batch["rows"]), device=device)  # stands for what was computed beforehand
            dpo_loss(*logps(batch), zeros, zeros, 0.1)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            return len(zeros)

        result["reference"] = timed(reference, float(seconds) / 3)
    else:  # as the reference project ran it: two models, prompts encoded for each answer, batches padded to the longest
        import pyarrow.parquet as pq
        from transformers import AutoModelForSeq2SeqLM
        policy, frozen = (AutoModelForSeq2SeqLM.from_pretrained(folder).to(device) for _ in range(2))
        optimizer = torch.optim.AdamW(policy.parameters(), 1e-5, fused=True)
        rows = pq.read_table(f"{folder}/triples.parquet").to_pylist()
        rng = random.Random(0)

        def padded(texts: list[str], padding: int) -> torch.Tensor:
            ids = [torch.tensor(row[:319] + row[-1:] if len(row) > 320 else row) for row in tokenizer.encode_batch(texts)]
            return torch.nn.utils.rnn.pad_sequence(ids, True, padding).to(device)

        def logps(model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=ids, attention_mask=ids != 0, labels=labels).logits.float()
            return (logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(1)

        def step() -> int:
            batch = rng.sample(rows, 16)
            ids = padded([row["prompt"] for row in batch], 0)
            labels = [padded([row[c] for row in batch], -100) for c in columns[1:]]
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                with torch.no_grad():
                    ref = [logps(frozen, ids, x) for x in labels]
                own = [logps(policy, ids, x) for x in labels]
            loss = -torch.nn.functional.logsigmoid(0.1 * (own[0] - ref[0] - own[1] + ref[1])).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return len(batch)
    result["training"] = timed(step, float(seconds))
    print(json.dumps(result))


def dpo(args: argparse.Namespace) -> None:
    """Triples a second of DPO on all weights: this project, and a plain implementation on transformers."""
    from chatlm import ChatLM, ChatLMConfig
    with tempfile.TemporaryDirectory() as folder:
        write_triples(args.data, Path(folder), 2000)
        tokenizer = Tokenizer.train(load_texts(args.data), args.vocab_size)
        tokenizer.save_pretrained(folder)
        ChatLM(ChatLMConfig.preset(args.preset, vocab_size=len(tokenizer))).save_pretrained(folder)
        for dtype in args.dtypes:
            rates: dict[str, list[float]] = {"ours": [], "plain": []}
            peaks, reference = dict.fromkeys(rates, 0), []
            for _ in range(args.runs):
                for kind, found in rates.items():
                    _, peak, said = measure(child("dpo", kind, folder, dtype, str(args.seconds)), gpu=True)
                    result = json.loads(said.splitlines()[-1])
                    found.append(result["training"])
                    peaks[kind] = max(peaks[kind], peak)
                    reference += [result["reference"]] if kind == "ours" else []
            median = {kind: statistics.median(r) for kind, r in rates.items()}
            ours = 1 / (1 / median["ours"] + 1 / (2 * statistics.median(reference)))
            show(f"dpo, {args.preset}, {dtype}", ["", "triples/s", "ours / it", "peak MB", "ours / it"],
                 [["ours, training", f"{median['ours']:.2f}", "", f"{peaks['ours'] / 1e6:,.0f}", ""],
                  ["ours, two epochs with the reference computed first", f"{ours:.2f}", "", "", ""],
                  ["plain: two models, transformers", f"{median['plain']:.2f}", f"{ours / median['plain']:.2f}", f"{peaks['plain'] / 1e6:,.0f}",
                   f"{peaks['ours'] / peaks['plain']:.2f}"]],
                 {"triples_per_s": rates, "reference_triples_per_s": reference, "peak_bytes": peaks})


# --- faults ---------------------------------------------------------------------------------------------------------------------

def faults(args: argparse.Namespace) -> None:
    """Stop training --runs times, by a signal at a moment in one or two processes, go on each time, and compare every loss with a run
    that nothing stopped."""
    steps, rng, seen, wrong = 40, random.Random(), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        write_demo(folder)
        Tokenizer.train(load_texts([]), 1400).save_pretrained(folder)
        command = ["train.py", "--data", f"{folder}/train.parquet", "--tokenizer", folder, "--preset", "demo", "--max_len", "40", "--batch_tokens", "512", "--workers", "0",
                   "--micro_batch_tokens", "256", "--dropout", "0.1", "--dtype", "float32", "--device", "cpu", "--max_steps", str(steps), "--save_every", "4"]
        launchers = {1: [sys.executable], 2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]}

        def start(ranks: int, out: str) -> subprocess.Popen:
            return subprocess.Popen([*launchers[ranks], *command, "--out_dir", out], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def losses(out: str) -> list[tuple]:
            path = Path(out) / "log.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
            return [(row["step"], row["loss"], row["lr"], row["tokens"]) for row in rows if "loss" in row]

        def differing(ranks: int, out: str) -> int:
            return sum(a != b for a, b in zip(losses(out), expected[ranks])) + abs(len(losses(out)) - steps)

        expected, attempt = {}, dict.fromkeys(launchers, 0)
        for ranks in launchers:
            assert start(ranks, f"{folder}/straight{ranks}").wait() == 0
            expected[ranks] = losses(f"{folder}/straight{ranks}")
        for i in range(args.runs):
            ranks = 1 + i % 2
            out = f"{folder}/{ranks}-{attempt[ranks]}"
            name, moment = rng.choice(["SIGINT", "SIGTERM", "SIGKILL"]), rng.choice(["starting", "training", "saving"])
            running, goal, wait_s = start(ranks, out), len(losses(out)) + rng.randint(1, 12), rng.random() * 4
            begin_s = time.perf_counter()
            while running.poll() is None and not (time.perf_counter() - begin_s > wait_s if moment == "starting" else len(losses(out)) >= goal if moment == "training"
                                                  else list((Path(out) / "checkpoint").glob("newest.*.tmp"))):
                time.sleep(0.002)
            if running.poll() is None:
                running.send_signal(getattr(signal, name))
                seen[name, moment, ranks] = seen.get((name, moment, ranks), 0) + 1
            status = running.wait()
            assert status in (0, 1, 128 + signal.SIGINT, 128 + signal.SIGTERM) or status < 0, (i, status, name, moment, ranks)  # 1: torchrun's
            if status == 0:  # it came to its end: another run
                wrong += differing(ranks, out)
                attempt[ranks] += 1
            print(f"{i + 1} of {args.runs}: {name} while {moment}, {ranks} processes, {len(losses(out))} steps logged, {wrong} losses wrong", file=sys.stderr, flush=True)
        for ranks in launchers:
            out = f"{folder}/{ranks}-{attempt[ranks]}"
            assert start(ranks, out).wait() == 0
            wrong += differing(ranks, out)
            attempt[ranks] += 1
        show(f"faults, {sum(seen.values())} stops of {sum(attempt.values())} runs of {steps} steps: {wrong} losses differ", ["signal", "while", "processes", "times"],
             [[*map(str, what), str(n)] for what, n in sorted(seen.items())], {"runs": sum(attempt.values()), "wrong": wrong})


# --- curves, and all -----------------------------------------------------------------------------------------------------------------

def curves(args: argparse.Namespace) -> None:
    """Draw the loss curves of log.jsonl files, each named by its folder, as an SVG."""
    logs = {Path(path).parent.name: [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()] for path in args.logs}
    from train import draw_curves
    Path(args.out).write_text(draw_curves(logs), "utf-8")


QUICK = {"tokenizer_train": "--megabytes 5 --vocab_size 8000 --runs 1", "tokenizer_encode": "--runs 1", "dedup": "--runs 1", "loader": "--runs 1 --seconds 4",
         "train": "--dtypes float32 --runs 1 --seconds 10", "time_to_loss": "--preset demo --dtype float32 --runs 1 --seconds 30",
         "generate": "--preset small --runs 1 --seconds 2", "dpo": "--dtypes float32 --runs 1 --seconds 8"}


def everything(args: argparse.Namespace) -> None:
    """All of them in turn; --quick: one short run each, to see that they work, not to be quoted."""
    for what, flags in QUICK.items():
        more = ["--data", *args.data, *(["--valid", args.valid] if what == "time_to_loss" else [])] if args.data else []
        chosen = parser().parse_args([what, *more, *(flags.split() if args.quick else [])])
        chosen.task(chosen)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    draw = commands.add_parser("curves", help=curves.__doc__)
    draw.set_defaults(task=curves)
    draw.add_argument("--logs", nargs="+", required=True, metavar="log.jsonl", help="of runs")
    draw.add_argument("--out", required=True, metavar="F.svg", help="where the picture goes")
    stops = commands.add_parser("faults", help=faults.__doc__)
    stops.set_defaults(task=faults)
    stops.add_argument("--runs", type=int, default=100, help="stops")
    whole = commands.add_parser("all", help=everything.__doc__)
    whole.set_defaults(task=everything)
    whole.add_argument("--data", nargs="+", default=[], metavar="FILE", help="pairs; none: the demo's")
    whole.add_argument("--valid", metavar="FILE", help="held-out pairs, where --data is given")
    whole.add_argument("--quick", action="store_true", help="short runs, under 10 minutes on two cores")
    for task in (tokenizer_train, tokenizer_encode, dedup, loader, train, time_to_loss, initialization, generate, dpo):
        sub = commands.add_parser(task.__name__, help=task.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(task=task)
        sub.add_argument("--data", nargs="+", default=[], metavar="FILE", help="texts or pairs; none: the demo's")
        sub.add_argument("--vocab_size", type=int, default=29298, help="tokens")
        sub.add_argument("--runs", type=int, default=3, help="of every contender")
        if task is tokenizer_train:
            sub.add_argument("--megabytes", type=float, nargs="+", default=[20, 180], help="sizes of the corpora made of the data")
            sub.add_argument("--same_pieces", action="store_true", help="sentencepiece also on our pieces, to compare compression")
            sub.add_argument("--peers", nargs="+", choices=["tokenizers", "gigabpe", "sentencepiece"], help="only these")
        if task is dedup:
            sub.add_argument("--times", type=int, default=1, help="so many times the documents, each time changed")
        if task in (tokenizer_train, dedup, loader):
            sub.add_argument("--only_ours", action="store_true", help="no peers: for sizes that they cannot hold")
        if task is loader:
            sub.add_argument("--seconds", type=float, default=15, help="of reading, each")
        if task is initialization:
            sub.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS, help="beginnings")
            sub.add_argument("--optimizers", nargs="+", default=["adafactor"], help="adafactor, adamw, muon")
            sub.add_argument("--steps", type=int, default=200, help="of each run; its schedule ends there")
            sub.add_argument("--preset", default="small", help="the model's shape")
            sub.add_argument("--out", metavar="F.svg", help="a picture of the losses")
            sub.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="more flags of train.py, at the end")
        if task in (train, time_to_loss, generate, dpo):
            sub.add_argument("--preset", default="0.2b" if task is generate else "small", help="the model's shape")
            sub.add_argument("--seconds", type=float, default={time_to_loss: 240, generate: 10}.get(task, 30), help="of each contender")
        if task in (train, generate, dpo):
            sub.add_argument("--dtypes", nargs="+", default=None if task is generate else ["float32", "bfloat16"],
                             help="of the weights; none: those that are quick here" if task is generate else "of the matrix products")
        if task is generate:
            sub.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="prompts at a time")
            sub.add_argument("--new_tokens", type=int, default=128, help="of an answer")
            sub.add_argument("--num_beams", type=int, default=1, help="1: greedy")
        if task in (train, time_to_loss):
            sub.add_argument("--peers", nargs="+", default=["usual", "best"], choices=PEERS, help="ways to train transformers' T5")
        if task in (time_to_loss, initialization):
            sub.add_argument("--valid", metavar="FILE", help="held-out pairs")
            sub.add_argument("--dtype", default="bfloat16", help="of the matrix products")
    return parser


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        globals()[f"child_{sys.argv[2]}"](*sys.argv[3:])
        return
    args = parser().parse_args()
    args.task(args)


if __name__ == "__main__":
    main()
