"""Requests per second of the engine against lm-evaluation-harness's own `hf` class, on the same exported model and the same requests.

Two sets: BLiMP sentences, and GSM8K questions with four results to choose from. Rounds alternate between both; the table gives medians of the
rounds' own ratios. `--small` checks in seconds that everything works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from cairn.data import datasets
from cairn.data.corpora import resolve
from cairn.data.text.tokenizer import Tokenizer, train_bpe
from cairn.evaluation.engine import Engine
from cairn.evaluation.harness import HarnessModel
from cairn.evaluation.measurements.gsm8k import Gsm8k
from cairn.generation.prepack import distinct
from cairn.models.families.llama import Llama


def model(folder: Path, tokenizer: Tokenizer, small: bool) -> Any:
    """An 8-layer LLaMA of width 256 with random weights, written as transformers opens it."""
    import json

    from safetensors.torch import save_file

    architecture = Llama(vocab_size=tokenizer.vocab_size, num_hidden_layers=2 if small else 8, eos_token_id=tokenizer.eos_id)
    network = architecture.build().eval()
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(architecture.to_hf()))
    tokenizer.save(folder)
    return network


def request_sets(small: bool) -> dict[str, list[tuple[str, str]]]:
    """Context and continuation of every request."""
    pairs = 2 if small else 60
    rows = [row for name in sorted(datasets.get("blimp").files) for row in list(datasets.rows("blimp", name))[:pairs]]
    items = Gsm8k(problems=8 if small else 400).questions(None)  # type: ignore[arg-type]
    return {
        "BLiMP": [("", row[key]) for row in rows for key in ("sentence_good", "sentence_bad")],
        "GSM8K, 4 options": [(item.context, choice) for item in items for choice in item.choices],
    }


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="check only that everything works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="batch size of the hf class")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    documents = resolve("python-docs").documents()
    tokenizer = train_bpe((document.text for document, _ in zip(documents, range(300 if options.small else 5000), strict=False)), 4096)
    with tempfile.TemporaryDirectory() as folder:
        network = model(Path(folder), tokenizer, options.small)
        theirs = HFLM(pretrained=folder, device="cpu", batch_size=options.batch, dtype="float32")
        rows, raw = [], {}
        for name, pairs in request_sets(options.small).items():
            asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
            times: dict[str, list[float]] = {"cairn": [], "hf": []}
            gap = 0.0
            for _ in range(1 if options.small else options.rounds):
                engine = Engine(network, tokenizer)  # a new one each round: nothing is remembered
                begin = time.perf_counter()
                ours = HarnessModel(engine).loglikelihood(asked, disable_tqdm=True)
                middle = time.perf_counter()
                other = theirs.loglikelihood(asked, disable_tqdm=True)
                times["cairn"].append(middle - begin)
                times["hf"].append(time.perf_counter() - middle)
                gap = max(abs(a - b) for (a, _), (b, _) in zip(ours, other, strict=True))
            least = distinct([(tokenizer.encode(context) or [tokenizer.eos_id or 0]) + tokenizer.encode(choice)[:-1] for context, choice in pairs])
            ratio = record.median_ratio(times["hf"], times["cairn"])
            rows.append([name, len(pairs), len(pairs) / min(times["cairn"]), len(pairs) / min(times["hf"]), ratio, engine.processed / least, gap])
            raw[name] = times
    if options.small:
        print(rows)
        return
    record.write(
        "score_requests",
        "Requests per second",
        f"python benchmarks/score_requests.py --rounds {options.rounds} --threads {options.threads}",
        (
            "requests",
            "number",
            "cairn, per second",
            "hf class, per second",
            "hf time / cairn time (median)",
            "tokens read / distinct",
            "largest difference, nats",
        ),
        rows,
        "Log-likelihood requests through lm-evaluation-harness: our request engine as its model against its own `hf` class, on one exported model of "
        "8 layers, width 256 and 4096 ids, in float32; nothing is remembered from round to round but how the requests are packed.",
        raw,
    )


if __name__ == "__main__":
    main()
