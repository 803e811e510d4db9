"""Prompts of unequal length in few rows: what is saved, and that nothing else changes (card 76)."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.data import datasets
from cairn.data.corpora import resolve
from cairn.data.text.tokenizer import Tokenizer, train_bpe
from cairn.evaluation.engine import Engine
from cairn.generation import prepack
from cairn.generation.prefill import prefill
from cairn.generation.sample import generate
from cairn.models.families.llama import Llama
from cairn.randomness import seed_for, uniform
from cairn.studies import library
from cairn.studies.conditions import Bound, Condition, at_least, at_most, judged, stated
from cairn.studies.study import Figures, Say, Study

BATCH, BATCHES, REPEATS = 64, 5, 3
WAYS = ("pad", "sorted", "pack", "prepack")


@register(
    "study",
    "prepack",
    paper=Paper("Prepacking: A Simple Method for Fast Prefilling and Increased Throughput in Large Language Models", "arXiv:2404.09529", card=76),
)
class Prepack(Study):
    """Prepacked prompts are read in fewer tokens and less time than padded ones, with the same result."""

    minutes: ClassVar[float] = 8
    published: ClassVar[str] = (
        "MMLU, 1.3B model, batch 64: prefill .441 s per batch against 2.299 s padded and .658 s sorted by length; peak memory 4.6, 34.6 and 23.0 GB."
    )
    protocol: ClassVar[str] = (
        "A random LLaMA (4 layers, width 256, BPE of 2048 trained on python-docs); 5 batches of 64 prompts: three of four are GSM8K questions cut to 20-80 "
        "tokens, one of four is a documentation passage of 200-512; a low-spread set of 45-55 tokens; for each way to read them the tokens processed, padding "
        "included, the entries of the attention scores, and the median seconds of 3 rounds in turn. `sorted` pads batches cut from all 320 prompts in order "
        "of length; `pack` packs rows as wide as the longest prompt; `prepack` also reads common beginnings once. Then: log-probabilities of texts packed and "
        "alone, greedy continuations of every way, a prompt of one token, a change of the neighbours, and BLiMP (4 pairs of each paradigm) against scoring "
        "one by one. Three seeds. A first run asked for 1e-5 nats a token in float32 and found 6.2e-6, 1.14e-5 and 8.6e-6; one text alone in float32 is "
        "2e-5 away from float64 with these weights, so equality is now asked for in float64, and float32 may differ by no more than its own error."
    )
    control: ClassVar[str] = "Packed rows are read with a plain causal mask, so that prompts see their neighbours, and padding replaces packing in the count."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        documents = passages()
        tokenizer = train_bpe(documents[:600], 2048)
        model = Llama(
            vocab_size=tokenizer.vocab_size, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, initializer_range=0.1
        )
        network = model.build(seed).eval()
        with torch.inference_mode():
            sets = prompt_sets(tokenizer, documents, seed)
            figures: Figures = {name: counted(network, prompts, sabotage) for name, prompts in sets.items()}
            texts = [*sets["mixed"][:11], sets["mixed"][11][:1]]
            return figures | exactness(network, tokenizer, texts, sabotage) | precision(network, model.build(seed).eval().double(), texts, sabotage)

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def always(name: str, required: str, values: list[float], holds: Callable[[float], bool], main: bool = False) -> Condition:
            return stated(name, required, ", ".join(f"{value:.3g}" for value in values), all(map(holds, values)), main=main, always=True)

        def each(key: str) -> list[float]:
            return [run[key] for run in runs]

        def ratios(name: str, which: str, key: str, over: str, bound: Bound, main: bool = False) -> Condition:
            values = [run[which]["pack"][key] / run[which][over][key] for run in runs]
            return judged(name, values, bound, form=".3g", main=main)

        total = [run["mixed"]["pack"]["tokens"] / run["mixed"]["sum"] for run in runs]
        shared = [run["mixed"]["prepack"]["tokens"] / run["mixed"]["distinct"] for run in runs]
        own = [run["difference"] / run["own_error"] for run in runs]
        alone = "log-probabilities packed and alone, in float64, largest difference"
        return [
            always(alone, "<= 1e-9 a token", each("difference_float64"), lambda x: x <= 1e-9, main=True),
            always("the same in float32, of the error of float32 alone", "<= 1", own, lambda x: x <= 1, main=True),
            always("other tokens in the row change the logits of a text by", "<= 1e-6", each("neighbour"), lambda x: x <= 1e-6, main=True),
            always("greedy continuations equal for pad, pack, prepack and one", "12 of 12 prompts", each("equal"), lambda x: x == 12),
            always("BLiMP accuracy, engine minus one by one", "0", each("blimp_gap"), lambda x: x == 0),
            always("BLiMP tokens, engine to one by one", "< 1", each("blimp_tokens"), lambda x: x < 1),
            judged("mixed set: packed tokens to the sum of lengths", total, at_most(1.12), form=".3g", main=True),
            ratios("mixed set: packed to padded tokens", "mixed", "tokens", "pad", at_most(0.5), main=True),
            ratios("mixed set: median seconds, packed to padded", "mixed", "seconds", "pad", at_most(0.75), main=True),
            ratios("mixed set: packed tokens to those of sorted batches", "mixed", "tokens", "sorted", at_most(1.02), main=True),
            judged("mixed set: shared and packed tokens to distinct beginnings", shared, at_most(1.12), form=".3g"),
            ratios("low-spread set: packed to padded tokens (no gain)", "low-spread", "tokens", "pad", at_least(0.9)),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, 2, figsize=(9, 3.4))
        for axis, key in zip(axes, ("tokens", "seconds"), strict=True):
            for place, which in enumerate(("mixed", "low-spread")):
                values = [statistics.median(run[which][way][key] / run[which]["pad"][key] for run in runs) for way in WAYS]
                axis.bar([i + 0.4 * place for i in range(len(WAYS))], values, 0.4, label=which)
            axis.set(title=f"{key}, padded is 1", xticks=[i + 0.2 for i in range(len(WAYS))], xticklabels=WAYS)
            axis.legend()
        plotting.save(figure, path)


@functools.cache
def passages() -> list[str]:
    """The first documents of python-docs."""
    return [document.text for document in islice(resolve(library.docs("64 MiB")).documents(), 800)]


def prompt_sets(tokenizer: Tokenizer, documents: Sequence[str], seed: int) -> dict[str, list[list[int]]]:
    """The prompts of both sets, 320 each, in random order."""
    questions = tokenizer.encode_batch([row["question"] for row in islice(datasets.rows("gsm8k", "test.jsonl"), 1000)])
    long_ones = [ids for ids in tokenizer.encode_batch(documents) if len(ids) >= 512]
    draws = uniform(seed_for(seed, "prompts"), np.arange(4 * BATCH * BATCHES)).reshape(4, -1)
    mixed, low = [], []
    for kind, which, length, short in draws.T.tolist():
        long = kind < 0.25
        source = long_ones if long else [q for q in questions if len(q) >= 80] or questions
        mixed.append(source[int(which * len(source))][: 200 + int(length * 313) if long else 20 + int(length * 61)])
        low.append([*source[int(which * len(source))], *long_ones[0]][: 45 + int(short * 11)])
    return {"mixed": mixed, "low-spread": low}


def counted(model: Any, prompts: list[list[int]], sabotage: bool) -> dict[str, Any]:
    """Tokens, attention entries and median seconds of each way to read all batches, and what cannot be avoided."""
    order = sorted(prompts, key=len)
    batches = {way: [(order if way == "sorted" else prompts)[i * BATCH : (i + 1) * BATCH] for i in range(BATCHES)] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, Any] = {}
    for _ in range(1 if sabotage else REPEATS):
        for way in WAYS:
            begin, tokens, scores = time.perf_counter(), 0, 0
            for batch in batches[way]:
                filled = prefill(model, batch, 1, "pad" if way == "sorted" or sabotage else way)
                tokens, scores = tokens + filled.processed, scores + filled.scores
            seconds[way].append(time.perf_counter() - begin)
            found[way] = {"tokens": tokens, "scores": scores}
    for way in WAYS:
        found[way]["seconds"] = statistics.median(seconds[way])
    contents = [[prompt[:-1] for prompt in batch] for batch in batches["pad"]]
    return found | {"sum": sum(len(prompt) - 1 for prompt in prompts), "distinct": sum(map(prepack.distinct, contents))}


def exactness(model: Any, tokenizer: Tokenizer, prompts: list[list[int]], sabotage: bool) -> Figures:
    """Differences between texts read together and alone."""
    together = Engine(model, tokenizer)
    if sabotage:
        together.way = _deaf(together)
    answers = [generate(model, prompts, max_new_tokens=16, temperature=0, batching=way) for way in ("pad", "pack", "prepack", "one")]  # type: ignore[arg-type]
    pairs = [row for name in sorted(datasets.get("blimp").files) for row in list(datasets.rows("blimp", name))[:4]]
    asked = [("", row[key]) for row in pairs for key in ("sentence_good", "sentence_bad")]
    before = together.processed
    scores = np.array([s.logprob for s in together.loglikelihood(asked)])
    single = Engine(model, tokenizer, budget_tokens=1)
    ids, starts = single.encode(asked)
    one = np.array([single.token_scores([text], [start])[0].sum() for text, start in zip(ids, starts, strict=True)])
    return {
        "neighbour": neighbour(together, prompts),
        "equal": sum(len({tuple(answer[i]) for answer in answers}) == 1 for i in range(len(prompts))),
        "blimp_gap": float(((scores[0::2] > scores[1::2]).mean()) - (one[0::2] > one[1::2]).mean()),
        "blimp_tokens": (together.processed - before) / sum(len(text) - 1 for text in ids),
    }


def precision(single: Any, double: Any, prompts: list[list[int]], sabotage: bool) -> Figures:
    """Largest differences of log-probabilities of a token, in nats: packed and alone in float32 and in float64, and float32 from float64 alone."""

    def scores(model: Any, together: bool) -> list[Any]:
        engine = Engine(model)
        if together and sabotage:
            engine.way = _deaf(engine)
        return engine.token_scores(prompts) if together else [engine.token_scores([prompt])[0] for prompt in prompts]

    def largest(a: list[Any], b: list[Any]) -> float:
        return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True) if len(x))

    alone, exact = scores(single, False), scores(double, False)
    return {"difference": largest(alone, scores(single, True)), "difference_float64": largest(exact, scores(double, True)), "own_error": largest(alone, exact)}


def neighbour(engine: Engine, prompts: list[list[int]]) -> float:
    """Largest change of the logits of the first text when every other token of its row becomes another one."""
    (batch,) = prepack.batches(prepack.trees(prompts), 2**62)
    place = next((row, path) for text, row, path in batch.places if text == 0)
    other = (batch.tokens + 1) % engine.config.vocab_size
    other[place[0], place[1]] = batch.tokens[place[0], place[1]]
    chosen = torch.from_numpy(place[0] * batch.tokens.shape[1] + place[1])
    positions, ends = torch.from_numpy(batch.positions), torch.from_numpy(batch.ends)
    first, second = (engine.way.read(torch.from_numpy(tokens), positions, ends, chosen) for tokens in (batch.tokens, other))
    return float((first - second).abs().max())


def _deaf(engine: Engine) -> Any:
    """A way to read that lets every text see all that stands before it in its row."""
    from dataclasses import replace

    return replace(engine.way, read=lambda tokens, positions, ends, chosen: engine.model(tokens, positions=positions, logits=chosen).logits)
