"""Checkpoints that studies start from, trained once on a machine and found again by what they are.

    base = trained(recipe, say=say)                          # from scratch
    expert = trained(recipe, parent=base, say=say)           # from the weights of another, with a fresh optimizer

The key is the digest of the resolved recipe, of the data that it reads, of the parent, and of the version of torch: two studies that start from
the same small model share it, whichever runs first, and one that changes anything gets its own. A study writes the
digests of what it started from into its figures. Safe to delete at any time (`studies/` in the cache).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3
from pydantic import BaseModel

from cairn import cache, catalog
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.data import corpora
from cairn.data.corpora import FileCorpus
from cairn.studies.study import Say
from cairn.training import recipe as recipes
from cairn.training.run import Run, fork, train

FORMAT = 1
"""Raised when the same recipe comes to mean another training."""


def trained(recipe: Mapping[str, Any], *, parent: Checkpoint | None = None, say: Say = lambda text: None) -> Checkpoint:
    """The last checkpoint of a run of `recipe`, from scratch or from the weights of `parent`; trained now if it never was."""
    return run_of(recipe, parent=parent, say=say).newest()


def run_of(recipe: Mapping[str, Any], *, parent: Checkpoint | None = None, say: Say = lambda text: None) -> Run:
    """The whole run, where a study needs more than its last checkpoint."""
    key = key_of(recipe, parent)
    return _kept(key, lambda folder: _train(recipe, parent, folder), lambda: say(f"training {recipe['training']['tokens']} for {key}"))


def stage_of(recipe: Mapping[str, Any], start: str | Path, *, say: Say = lambda text: None) -> Run:
    """The run of `recipe` as a stage after the checkpoint `start`: its full length on a schedule of its own, with a fresh optimizer,
    its tokens counted on from there."""
    parent, parsed = read.open(start), recipes.load(recipe)
    tokens, length = parent.tokens or 0, parsed.total_units
    changes = ["schedule.start=now", f"schedule.horizon={length} tokens", f"training.tokens={length + tokens} tokens"]
    return _kept(
        f"{key_of(recipe, parent)}-after-{tokens}",
        lambda folder: fork(parent, folder / "run", changes, recipe=recipe, fresh=["optimizer"]),
        lambda: say(f"training a stage of {parsed.training.tokens}"),
    )


def forked(start: str | Path | Checkpoint, settings: Sequence[str], *, fresh: Iterable[Literal["optimizer"]] = (), say: Say = lambda text: None) -> Run:
    """The run that a fork of the checkpoint `start` with these settings makes; its lineage says where it came from."""
    parent = start if isinstance(start, Checkpoint) else read.open(start)
    parts = [FORMAT, parent.digest, list(settings), sorted(fresh), metadata.version("torch")]
    key = f"fork-{blake3(json.dumps(parts, default=str).encode()).hexdigest()[:20]}"
    return _kept(key, lambda folder: fork(parent, folder / "run", settings, fresh=fresh), lambda: say(f"fork {key}"))


def folder_for(*parts: Any) -> Path:
    """A folder for what finds its own parts again, under the digest of plain values."""
    return _folder() / "more" / blake3(json.dumps([FORMAT, *parts, metadata.version("torch")], sort_keys=True, default=str).encode()).hexdigest()[:20]


def _kept(key: str, fill: Callable[[Path], object], before: Callable[[], object]) -> Run:
    """The run under a key, made by `fill` if it is not there."""
    path = _folder() / key
    with _alone(path):
        if not (path / "run").is_dir():
            before()
            cache.publish(path, fill)
    return Run(path / "run")


def key_of(recipe: Mapping[str, Any], parent: Checkpoint | None = None) -> str:
    """What decides the weights, in 20 letters."""
    resolved = recipes.load(recipe)
    values = _differing(resolved)
    values.pop("track", None)  # who watches decides no weight
    values["data"]["sources"] = {name: [source.weight, _contents(source.corpus)] for name, source in resolved.data.sources.items()}
    parts = [FORMAT, values, parent.model_digest if parent is not None else None, metadata.version("torch")]
    return blake3(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _differing(value: Any) -> Any:
    """Options as plain values, those left out that have their defaults: a key that recipes get later changes no recipe that does not name it."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields.items()
        chosen = {name: getattr(value, name) for name, field in fields if getattr(value, name) != field.get_default(call_default_factory=True)}
        return {"": catalog.name_of(value)} | {name: _differing(each) for name, each in chosen.items()}
    if isinstance(value, Mapping):
        return {str(name): _differing(each) for name, each in value.items()}
    return [_differing(each) for each in value] if isinstance(value, list | tuple) else value


def _contents(spec: Any) -> Any:
    """What identifies the documents of a corpus, wherever its files lie."""
    corpus = corpora.resolve(spec)
    if not isinstance(corpus, FileCorpus):
        return corpus.fingerprint()
    return [catalog.name_of(corpus), corpus.digest()]


def text_file(texts: Iterable[str | Mapping[str, str]]) -> Path:
    """A JSON-lines file with these documents (texts, or rows with further fields), kept under the digest of its contents: the same texts are
    the same corpus."""
    data = "".join(json.dumps({"text": text} if isinstance(text, str) else dict(text)) + "\n" for text in texts).encode()
    folder = _folder() / "texts" / blake3(data).hexdigest()[:20]
    with _alone(folder):
        if not folder.is_dir():
            cache.publish(folder, lambda hidden: (hidden / "texts.jsonl").write_bytes(data))
    return folder / "texts.jsonl"


def _train(recipe: Mapping[str, Any], parent: Checkpoint | None, folder: Path) -> None:
    if parent is None:
        train(recipe, folder / "run")
        return
    from cairn.checkpoint.foreign.export import export

    # Without training state a fork begins at step 0, on a schedule of its own.
    start = parent if parent.trainer is None else export(parent, folder / "start")
    fork(start.path, folder / "run", recipe=recipe, fresh=["optimizer"])


def _folder() -> Path:
    return cache.directory() / "studies"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for another process that is making the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digests(checkpoints: Mapping[str, Checkpoint | str | Path]) -> dict[str, str]:
    """What a study started from, for its figures."""
    return {name: (item if isinstance(item, Checkpoint) else read.open(item)).model_digest[:16] for name, item in checkpoints.items()}
