"""Saving at every step without stalling: lazy capture beside torch's own ways to save (card 12, proofs a.1 and b)."""

from __future__ import annotations

import contextlib
import functools
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format import read
from cairn.checkpoint.saving.capture import Background
from cairn.checkpoint.saving.modules import Saver, module_tensors, optimizer_tensors
from cairn.data import corpora, datasets
from cairn.models.families.llama import Llama
from cairn.studies import library
from cairn.studies.conditions import Condition, at_most, judged, stated
from cairn.studies.study import Figures, Say, Study

STEPS = 40
SEQUENCES, LENGTH = 8, 128
SIZES = {"vocab_size": 256, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 8}
"""A LLaMA of 10 million parameters: 120 MB of weights and moments."""


def batches(seed: int, steps: int) -> Iterator[torch.Tensor]:
    """Windows of tiny-shakespeare (the library's documentation where that is absent) as bytes, (SEQUENCES, LENGTH + 1)."""
    corpus = "tiny-shakespeare" if datasets.locate("tiny-shakespeare") else library.docs("1 MiB")
    text = b"".join(document.text.encode() for document in corpora.resolve(corpus).documents())
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(data) - LENGTH - 1, (SEQUENCES,), generator=generator)
        yield torch.stack([data[start : start + LENGTH + 1] for start in starts.tolist()])


@dataclass
class Loop:
    """A plain training loop and what it took: seconds in all and, for each step, seconds for which a saver held it up."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    stalls: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def begin(cls, seed: int, sizes: Mapping[str, int] = SIZES) -> Loop:
        model = Llama(**sizes, max_position_embeddings=LENGTH).build(seed)
        return cls(model, torch.optim.AdamW(model.parameters(), 3e-4, fused=True))

    def run(self, seed: int, steps: int, before: Callable[[], object], after: Callable[[int], object]) -> None:
        """`before` is called when gradients are ready, `after` when the update is done; both are timed as stalls."""
        began = time.perf_counter()
        for step, ids in enumerate(batches(seed, steps), 1):
            loss = self.model(ids[:, :-1], targets=ids[:, 1:]).loss / ids[:, 1:].numel()
            loss.backward()
            waited = _timed(before)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.stalls.append(waited + _timed(functools.partial(after, step)))
        self.seconds = time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


# -- the contestants: each gives what to do before an update and after it, as a context that ends when all is written -------


@contextlib.contextmanager
def no_saving(loop: Loop, folder: Path) -> Iterator[tuple[Callable[[], object], Callable[[int], object]]]:
    yield (lambda: None), (lambda step: None)


@contextlib.contextmanager
def blocking(loop: Loop, folder: Path) -> Iterator[tuple[Callable[[], object], Callable[[int], object]]]:
    """torch.save of everything."""
    yield (lambda: None), (lambda step: torch.save(loop.state(), folder / f"{step}.pt"))


@contextlib.contextmanager
def dcp(loop: Loop, folder: Path, *, staged: bool) -> Iterator[tuple[Callable[[], object], Callable[[int], object]]]:
    """torch.distributed.checkpoint's async_save: as it comes, or with its stager copying in a thread of its own."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    staging: list[Future[Any]] = []
    uploads: list[Future[Any]] = []
    stager = DefaultStager(StagingOptions(use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False))

    def before() -> None:
        while staging:
            staging.pop().result()

    def after(step: int) -> None:
        while uploads:  # the stager has one copy of each tensor: the save before must be on disk first
            uploads.pop().result()
        response: Any = checkpoint.async_save(loop.state(), checkpoint_id=folder / str(step), async_stager=stager if staged else None)
        if staged:
            staging.append(response.staging_completion)
            uploads.append(response.upload_completion)
        else:
            uploads.append(response)

    ours = not dist.is_initialized()
    with tempfile.NamedTemporaryFile() as meeting:
        if ours:
            dist.init_process_group("gloo", init_method=f"file://{meeting.name}-group", rank=0, world_size=1)
        try:
            yield before, after
            before()
            for upload in uploads:
                upload.result()
        finally:
            stager.close()
            if ours:
                dist.destroy_process_group()


@contextlib.contextmanager
def lazily(loop: Loop, folder: Path) -> Iterator[tuple[Callable[[], object], Callable[[int], object]]]:
    """Ours; the wait inside the optimizer's step is done, and timed, just before it."""
    with Saver(folder, loop.model, loop.optimizer, mode="lazy") as saver:
        yield saver.background.before_update, lambda step: saver.step()


Contestant = Callable[[Loop, Path], Any]
CONTESTANTS: dict[str, Contestant] = {
    "no saving": no_saving,
    "torch.save": blocking,
    "async_save": lambda loop, folder: dcp(loop, folder, staged=False),
    "async_save, staged in a thread": lambda loop, folder: dcp(loop, folder, staged=True),
    "lazy": lazily,
}


def rotated(contestants: Mapping[str, Contestant], turn: int) -> dict[str, Contestant]:
    """The same contestants, beginning with another one."""
    turn %= len(contestants)
    return dict([*contestants.items()][turn:] + [*contestants.items()][:turn])


def race(seed: int, folder: Path, steps: int = STEPS, contestants: Mapping[str, Contestant] = CONTESTANTS) -> dict[str, dict[str, float]]:
    """Every contestant trains the same steps and saves each of them: median stall, seconds of the loop and to the last byte on disk."""
    found = {}
    for name, contestant in contestants.items():
        place = folder / name.replace(" ", "-").replace(",", "")
        place.mkdir(parents=True)
        loop = Loop.begin(seed)
        began = time.perf_counter()
        with contestant(loop, place) as (before, after):
            loop.run(seed, steps, before, after)
        # The first saves also pay for memory that is touched for the first time.
        found[name] = {"stall": statistics.median(loop.stalls[3:]), "seconds": loop.seconds, "to_disk": time.perf_counter() - began}
        shutil.rmtree(place)
    return found


def copy_seconds(loop: Loop) -> float:
    """The price of the memory traffic: one plain copy of all weights and moments, into memory that is there."""
    tensors = [*module_tensors(loop.model).values(), *optimizer_tensors(loop.model.named_parameters(), [loop.optimizer]).values()]
    copies = [tensor.clone() for tensor in tensors]
    return statistics.median(_timed(lambda: [copy.copy_(tensor) for copy, tensor in zip(copies, tensors, strict=True)]) for _ in range(5))


class _Late(Background):
    """Copies nothing before somebody waits for it, so that a step that does not wait overtakes every copy."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._awaited = threading.Event()
        super().__init__(*arguments, **options)

    def before_update(self, tensors: Iterable[torch.Tensor] | None = None) -> float:
        self._awaited.set()
        try:
            return super().before_update(tensors)
        finally:
            self._awaited.clear()

    def _fetch(self, capture: Any, piece: Any) -> None:
        self._awaited.wait()
        super()._fetch(capture, piece)


class _LateSaver(Saver):
    engine = _Late


def consistency(seed: int, folder: Path, *, waits: bool, steps: int = 5) -> dict[str, int]:
    """How many of `steps` saves are, to the bit, what a blocking copy was; how many were given up as torn."""
    loop, wanted = Loop.begin(seed), {}
    with _LateSaver(folder, loop.model, loop.optimizer, mode="lazy") as saver:
        if not waits:
            for hook in saver._hooks:
                hook.remove()

        def after(step: int) -> None:
            saver.step()
            named = module_tensors(loop.model) | optimizer_tensors(loop.model.named_parameters(), [loop.optimizer])
            wanted[step] = {name: tensor.clone() for name, tensor in named.items()}

        loop.run(seed, steps, lambda: None, after)
    equal = 0
    for path in read.list_checkpoints(folder):
        checkpoint = read.open(path)
        stored = {**checkpoint.tensors, **(checkpoint.optimizer or {})}
        equal += all(torch.equal(stored[name].load(), tensor) for name, tensor in wanted[checkpoint.step or 0].items())
    return {"equal": equal, "steps": steps, "torn": sum(figures.torn for figures in saver.background.figures)}


@register("study", "lazysave", paper=Paper("DataStates-LLM: Lazy Asynchronous Checkpointing for Large Language Models", "arXiv:2406.10707", card=12))
class LazySave(Study):
    """A checkpoint at every step costs training almost nothing, and holds exactly what was there."""

    minutes: ClassVar[float] = 12
    published: ClassVar[str] = "Up to 48x faster checkpointing and 2.2x faster training than the best asynchronous savers, on up to 180 GPUs."
    protocol: ClassVar[str] = (
        "A LLaMA of 10M parameters (120 MB with its moments) trains 40 steps of 1024 bytes of tiny-shakespeare in a plain loop and saves every "
        "step: not at all, by torch.save, by torch.distributed.checkpoint's async_save as it comes and with its stager in a thread, and lazily; "
        "three repeats, each in another order. A stall is what a saver holds the loop up, after an update and before the next one; the median "
        "over the steps counts. Apart from that, with copies that begin only when they are waited for, so that an update that does not wait "
        "overtakes them, five saves are compared bit for bit with blocking copies."
    )
    control: ClassVar[str] = "The wait before the optimizer's step is removed; everything else is as it was."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        found: Figures = {"consistency": consistency(seed, work / "late", waits=not sabotage)}
        shutil.rmtree(work / "late")
        found["race"] = race(seed, work / "race", STEPS if not sabotage else 8, rotated(CONTESTANTS, seed))
        loop = Loop.begin(seed)
        loop.run(seed, 1, lambda: None, lambda step: None)
        found["copy_seconds"], found["steps"] = copy_seconds(loop), STEPS if not sabotage else 8
        return found

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def stall(peer: str) -> list[float]:
            return [100 * run["race"]["lazy"]["stall"] / run["race"][peer]["stall"] for run in runs]

        def whole(run: Figures) -> float:
            """Time of the loop that saves over the one that does not and the price of the copies."""
            return float(run["race"]["lazy"]["seconds"] / (run["race"]["no saving"]["seconds"] + run["steps"] * run["copy_seconds"]))

        exact = [run["consistency"] for run in runs]
        staged = stall("async_save, staged in a thread")
        return [
            stated(
                "late copies equal blocking ones",
                "all, none torn",
                ", ".join(f"{e['equal']} of {e['steps']}, {e['torn']} torn" for e in exact),
                all(e["equal"] == e["steps"] and not e["torn"] for e in exact),
                main=True,
                always=True,
            ),
            judged("stall per save, of async_save with staging in a thread", staged, at_most(25), rule="mean", unit="%", form=".1f", main=True),
            judged("stall per save, of torch.save", stall("torch.save"), at_most(5), rule="mean", unit="%", form=".1f", main=True),
            judged("the whole loop, of the one without saving and the copies", [*map(whole, runs)], at_most(1.05), rule="mean", main=True),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, 2, figsize=(10, 3.4))
        names = [name for name in CONTESTANTS if name != "no saving"]
        axes[0].barh(names, [1000 * statistics.median(run["race"][name]["stall"] for run in runs) for name in names])
        axes[0].set(xlabel="stall per save, ms", xscale="log")
        axes[1].barh(list(CONTESTANTS), [statistics.median(run["race"][name]["seconds"] for run in runs) for name in CONTESTANTS])
        axes[1].set(xlabel=f"{STEPS} steps, s")
        plotting.save(figure, path)
