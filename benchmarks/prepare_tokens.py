"""Preparing a token store, beside `tokenizers` encoding the same documents in one call; and memory at two corpus sizes.

python benchmarks/prepare_tokens.py [--rounds 5] [--megabytes 24]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

from cairn.data import corpora
from cairn.data.text import tokenizer, tokens

CHILD = """
import sys
from cairn.data.text import tokenizer, tokens
tokens.prepare(sys.argv[1], tokenizer.Tokenizer.load(sys.argv[2]), sys.argv[3])
# Not ru_maxrss: that one survives exec and so holds the parent's peak.
print(int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024)
"""


def peak_mib(corpus: Path, tok: Path, out: Path) -> float:
    """Peak memory of a process that prepares the corpus."""
    return float(subprocess.run([sys.executable, "-c", CHILD, str(corpus), str(tok), str(out)], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=24)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        texts = [d.text for d in corpora.resolve({"name": "python-source", "max_bytes": arguments.megabytes * 2**20}).documents()]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        once, four = folder / "once.jsonl", folder / "four.jsonl"
        once.write_text("".join(lines))
        four.write_text("".join(lines) * 4)
        tok = tokenizer.train_bpe(texts[:400], 4096)
        tok.save(folder / "tok")
        size = sum(len(text.encode()) for text in texts)
        ours, theirs = [], []
        for number in range(arguments.rounds + 1):
            began = time.perf_counter()
            tok.backend.encode_batch(texts, add_special_tokens=False)
            middle = time.perf_counter()
            tokens.prepare(str(once), tok, folder / f"store-{number}")
            end = time.perf_counter()
            if number:
                theirs.append(middle - began)
                ours.append(end - middle)
        memory = [peak_mib(path, folder / "tok", folder / f"memory-{path.stem}") for path in (once, four)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rate = record.median_ratio(theirs, ours)
    rows = [
        ("cairn: read, encode, split, digest, write", size / statistics.median(ours) / 1e6, rate, memory[0], memory[1]),
        ("tokenizers encode_batch of texts in memory", size / statistics.median(theirs) / 1e6, 1.0, "-", "-"),
    ]
    record.write(
        "prepare_tokens",
        "Preparing tokens",
        f"python benchmarks/prepare_tokens.py --rounds {arguments.rounds} --megabytes {arguments.megabytes}",
        ("", "MB/s", "rate / encode_batch", f"peak MiB, {size / 1e6:.0f} MB", f"peak MiB, {4 * size / 1e6:.0f} MB"),
        rows,
        f"{len(texts)} documents, {size / 1e6:.1f} MB of Python source, a BPE of 4096 ids, {arguments.rounds} alternating rounds, {os.cpu_count()} cores. "
        "The peer's texts lie ready in memory and its ids are thrown away; ours reads JSON lines from disk and ends with a store on disk.",
        {"ours_seconds": ours, "theirs_seconds": theirs, "peak_mib": memory},
    )


if __name__ == "__main__":
    main()
