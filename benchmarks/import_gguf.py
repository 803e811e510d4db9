"""A GGUF file becomes a checkpoint: seconds and memory of `cairn import`, beside transformers, which reads the file and saves it again.

python benchmarks/import_gguf.py [FILE.gguf] [--rounds 3] [--only cairn]

Whole processes in turn. The peak is that of the process itself (what it maps included); the result is float32 in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import record

CODE = {
    "cairn": "import cairn; cairn.import_({file!r}, {out!r})",
    "transformers": (
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "options = dict(gguf_file={name!r}, local_files_only=True); "
        "AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32, **options).save_pretrained({out!r}); "
        "AutoTokenizer.from_pretrained({folder!r}, **options).save_pretrained({out!r})"
    ),
}
MEASURED = (
    "import json, resource, sys, time; began = time.perf_counter(); exec(sys.argv[1]); "
    "print(json.dumps([time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))"
)


def main() -> None:
    default = Path(os.environ.get("CAIRN_DATA", "")) / "smollm2-135m-gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", type=Path, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(CODE))
    asked = parser.parse_args()
    found: dict[str, list[list[float]]] = {name: [] for name in CODE if asked.only in (None, name)}
    written = 0.0
    for _ in range(asked.rounds):
        for name, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                code = CODE[name].format(file=str(asked.file), name=asked.file.name, folder=str(asked.file.parent), out=str(out))
                done = subprocess.run([sys.executable, "-c", MEASURED, code], check=True, capture_output=True, text=True)
                runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
                written = max(written, sum(path.stat().st_size for path in out.glob("*.safetensors")) / 2**20)
    rows = [(name, statistics.median(s for s, _ in runs), max(m for _, m in runs), max(m for _, m in runs) - written) for name, runs in found.items()]
    if asked.only is not None:
        print(json.dumps({"rows": rows, "result MiB": written}, indent=1))
        return
    words = f"{asked.file.name}, {asked.file.stat().st_size / 2**20:.0f} MiB, becomes {written:.0f} MiB of float32; {asked.rounds} rounds, whole processes."
    columns = ("", "median s", "peak MiB", "peak less the result, MiB")
    record.write("import_gguf", "Importing a GGUF file", f"python benchmarks/import_gguf.py --rounds {asked.rounds}", columns, rows, words, found)


if __name__ == "__main__":
    main()
