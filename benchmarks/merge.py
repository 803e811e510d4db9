"""Merging experts beside mergekit with lazy loading, and beside plain streaming of the same bytes.

    python benchmarks/merge.py [--rounds 3] [--layers 16] [--width 1024] [--experts 2] [--name merge] [--folder DIR]

Every contestant runs in a process of its own, in a rotating order in each round, on the same directories that lie in the
page cache; each ends with its result flushed to disk. Peak memory is anonymous memory alone, taken ten times a second.
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
import threading
import time
from pathlib import Path
from typing import Any

import record
import torch

from cairn.checkpoint.format import read
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.operating import stream
from cairn.checkpoint.saving import write
from cairn.options import configure

VOCABULARY = 32_000
METHODS = {"linear": {}, "ties": {"density": 0.2}, "task-arithmetic": {"scale": 0.5}, "pcb": {"keep": 0.1}, "tall-masks": {}}


def build(folder: Path, layers: int, width: int, experts: int) -> list[Path]:
    """A base and experts as LLaMA directories with a tokenizer-free config that transformers and mergekit know."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, width), "lm_head.weight": (VOCABULARY, width), "model.norm.weight": (width,)}
    for i in range(layers):
        inner = int(width * 8 / 3) // 64 * 64
        parts = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width, width), "self_attn.v_proj": (width, width), "self_attn.o_proj": (width, width)}
        parts |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        parts |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": int(width * 8 / 3) // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    made = []
    for number in range(experts + 1):
        torch.manual_seed(number)
        model = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
        made.append(write.save(folder / f"model-{number}", model=model, config=config, lineage=Lineage.record("run", "train")).path)
    return made


def ours(method: str, models: list[Path], out: Path, threads: int | None) -> None:
    operation = configure("operation", {"name": method, **METHODS[method]})
    parents = models if getattr(operation, "based", False) else models[1:]
    stream.apply(operation, parents, out, threads=threads)


def theirs(method: str, models: list[Path], out: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    names = {"task-arithmetic": "task_arithmetic"}
    experts = [{"model": str(path), "parameters": {"weight": 1.0} | METHODS[method]} for path in models[1:]]
    config: dict[str, Any] = {"merge_method": names.get(method, method), "models": experts, "dtype": "float32"}
    if method != "linear":
        config["base_model"] = str(models[0])
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(lazy_unpickle=True, copy_tokenizer=False, trust_remote_code=False))
    for path in out.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


def plain(models: list[Path], out: Path, based: bool) -> None:
    """Read the bytes of every parent and write those of one, in 8 MiB pieces, nothing computed."""
    sources = [os.open(path / "model.safetensors", os.O_RDONLY) for path in (models if based else models[1:])]
    target, buffer, position = os.open(out, os.O_WRONLY | os.O_CREAT), memoryview(bytearray(8 * 2**20)), 0
    while count := max(os.preadv(fd, [buffer], position) for fd in sources):
        done = 0
        while done < count:
            done += os.pwrite(target, buffer[done:count], position + done)
        position += count
    os.fsync(target)
    for fd in [*sources, target]:
        os.close(fd)


def contest(what: str, method: str, models: list[Path], out: Path, threads: int | None) -> dict[str, float]:
    """In this process: seconds, and the peak of private memory above what it was before."""

    def private() -> int:
        return 1024 * int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")).split()[1])

    torch.zeros(10).add_(1)
    before, peak, over = private(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            peak.append(private() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    if what == "cairn":
        ours(method, models, out, threads)
    elif what == "mergekit":
        theirs(method, models, out)
    else:
        plain(models, out, method != "linear")
    seconds = time.perf_counter() - began
    over.set()
    watcher.join()
    return {"seconds": seconds, "peak": float(max(peak))}


def reconstruction(models: list[Path], folder: Path, threads: int | None) -> dict[str, float]:
    """Bytes of a bundle over the formula, and the speed of giving one expert back over that of copying a checkpoint."""
    from cairn.merging.methods import tall_masks

    packed = stream.apply(tall_masks.TallMasks(), models, folder / "bundle", threads=threads)
    told, items = tall_masks.report(packed), read.open(models[0]).tensors.nbytes // 4
    began = time.perf_counter()
    tall_masks.reconstruct(packed, "0", folder / "back", threads=threads)
    middle = time.perf_counter()
    plain(models[:2], folder / "copy", False)
    end = time.perf_counter()
    return {"bytes_over_formula": told["bytes"] / (items * (64 + len(models) - 1) / 8), "copy_over_reconstruction": (end - middle) / (middle - began)}


def child(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--name", default="merge", help="of the record")
    parser.add_argument("--methods", default="linear,ties,task-arithmetic,pcb")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--child", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if arguments.child:
        what, method, out, *models = arguments.child
        if what == "bundle":
            print(json.dumps(reconstruction([Path(model) for model in models], Path(out), None)))
        else:
            print(json.dumps(contest(what, method, [Path(model) for model in models], Path(out), None)))
        return
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    bundle: list[dict[str, float]] = []
    try:
        models = build(folder, arguments.layers, arguments.width, arguments.experts)
        size = read.open(models[0]).tensors.nbytes
        largest = max(tensor.nbytes for tensor in read.open(models[0]).tensors.values())
        for number in range(arguments.rounds):
            for method in arguments.methods.split(","):
                names = ["cairn", "plain", *(["mergekit"] if method in ("linear", "ties", "task-arithmetic") else [])]
                for what in names[number % len(names) :] + names[: number % len(names)]:
                    out = folder / "out"
                    found.setdefault(method, {}).setdefault(what, []).append(child(what, method, str(out), *map(str, models)))
                    shutil.rmtree(out) if out.is_dir() else out.unlink()
            bundle.append(child("bundle", "tall-masks", str(folder / "work"), *map(str, models)))
            shutil.rmtree(folder / "work")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(arguments, found, bundle, size, largest)


def report(arguments: Any, found: Any, bundle: Any, size: int, largest: int) -> None:
    rows = []
    for method, contestants in found.items():
        seconds = {what: [round_["seconds"] for round_ in rounds] for what, rounds in contestants.items()}
        peaks = {what: max(round_["peak"] for round_ in rounds) / 2**20 for what, rounds in contestants.items()}
        ratio = record.median_ratio(seconds["mergekit"], seconds["cairn"]) if "mergekit" in seconds else "-"
        row = (method, statistics.median(seconds["cairn"]), ratio, record.median_ratio(seconds["cairn"], seconds["plain"]), peaks["cairn"])
        rows.append((*row, peaks.get("mergekit", "-")))
    formula, speed = (statistics.median(round_[key] for round_ in bundle) for key in ("bytes_over_formula", "copy_over_reconstruction"))
    record.write(
        arguments.name,
        f"Merging {arguments.experts} checkpoints of {size / 1e9:.2f} GB",
        f"python benchmarks/merge.py --rounds {arguments.rounds} --layers {arguments.layers} --width {arguments.width} --experts {arguments.experts} "
        f"--methods {arguments.methods} --name {arguments.name}",
        ("method", "cairn, s", "mergekit / cairn", "cairn / plain streaming", "cairn's peak, MiB", "mergekit's peak, MiB"),
        rows,
        f"{arguments.experts} experts of {size / 1e9:.2f} GB in float32 (largest tensor {largest / 2**20:.0f} MiB), {arguments.rounds} rounds, each "
        "contestant in a process of its own; times are medians, ratios medians of the rounds' own ratios, peaks the largest of private memory. Ours "
        f"digests all blocks and flushes. A bundle of the experts takes {formula:.4f} of the bytes of the formula (64 + N) P / 8; one expert comes "
        f"back at {speed:.2f} of the speed of plain copying.",
        {"found": found, "bundle": bundle},
    )


if __name__ == "__main__":
    main()
