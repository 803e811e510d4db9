"""What could go wrong when somebody reuses a checkpoint, in the terms of STRIDE on one boundary: what its author controls and what we can check.

An `alarm` is something found, a `review` something that a person must look at, a `note` something that is not there ("An Empirical
Study of Pre-Trained Model Reuse", card 42, D). Nothing that is looked at is ever loaded or executed.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cairn.checkpoint.format import descent, documents, lineage, read, verify
from cairn.checkpoint.format.manifest import MANIFEST
from cairn.checkpoint.format.place import follow, place
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import CairnError, DamagedError, NotFoundError
from cairn.registry import claims, licenses, record, scan, signing
from cairn.registry.names import Known

Level = Literal["alarm", "review", "note"]
LEVELS: tuple[Level, ...] = ("alarm", "review", "note")

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".h5", ".keras", ".msgpack")
EXECUTABLE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe", ".js", ".jar")


@dataclass(frozen=True)
class Risk:
    """One thing found: how grave, what kind in STRIDE's words, where, and a plain sentence."""

    level: Level
    kind: str
    where: str
    sentence: str


def audit(
    source: str | Path,
    *,
    names: Sequence[str] = (),
    signers: str | Path | None = None,
    contents: bool = True,
    measure: bool = False,
) -> list[Risk]:
    """The risks of one checkpoint directory, gravest first.

    `names` are those that others must not be taken for, `signers` the file of allowed signers. With `contents` every byte is compared
    with the manifest; with `measure` claims are measured again instead of being judged by stored results. Raises `NotFoundError`.
    """
    path = place(source)
    if read.is_run(path):
        path = read.open(path).path
    if not path.is_dir():
        raise NotFoundError(f"There is no checkpoint at {path}.")
    found = [*_elevation(path)]
    try:
        checkpoint = read.open(path)
        made = record.record(checkpoint)
    except CairnError as error:
        return _sorted([*found, Risk("alarm", "tampering", str(path), str(error))])
    title = made.title
    found += _spoofing(title, names)
    found += _tampering(checkpoint, signers, contents)
    found += _licenses(checkpoint, made)
    found += _claims(checkpoint, made, measure)
    return _sorted(found)


def audit_all(folder: str | Path, **options: Any) -> dict[Path, list[Risk]]:
    """The risks of every checkpoint under a folder. Raises `NotFoundError` if there is none."""
    root = place(folder)
    places = [item.path for item in scan.places(root) if item.kind != "run"] if root.is_dir() else []
    if not places:
        raise NotFoundError(f"There is no checkpoint under {folder}.")
    return {path: audit(path, **options) for path in places}


def _sorted(risks: Sequence[Risk]) -> list[Risk]:
    return sorted(risks, key=lambda risk: LEVELS.index(risk.level))


def _elevation(path: Path) -> Iterator[Risk]:
    """Files that run code when somebody opens them, and settings that fetch code."""
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not (Path(folder) / name).is_symlink())
        for name in sorted(files):
            file = Path(folder) / name
            shown = str(file.relative_to(path))
            kind = pickled(file)
            if kind is not None:
                yield Risk("alarm", "elevation of privilege", shown, f"{shown} is {kind}: opening it may run code; keep the safetensors file alone.")
            elif file.suffix.lower() in EXECUTABLE:
                yield Risk("alarm", "elevation of privilege", shown, f"{shown} is a program; a checkpoint needs none.")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        try:
            document = documents.read_object(path / name)
        except (OSError, CairnError):
            continue
        for key in ("auto_map", "custom_pipelines"):
            if document.get(key):
                yield Risk("alarm", "elevation of privilege", name, f"{name} asks for code of its own ({key}), which runs where remote code is trusted.")


def pickled(file: Path) -> str | None:
    """Whether a file holds a pickle, by its first bytes and, where they say nothing, by its name; in words, or None."""
    try:
        with os.fdopen(documents.open_file(file), "rb") as opened:
            start = opened.read(4)
        if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            return "a pickle"
        if start == b"PK\x03\x04" and any(name.endswith((".pkl", ".pickle")) for name in zipfile.ZipFile(file).namelist()):
            return "an archive with a pickle in it"
    except (OSError, zipfile.BadZipFile, DamagedError):
        return "unreadable"
    return "of a kind that holds pickles" if file.suffix.lower() in PICKLED else None


def _spoofing(title: str, names: Sequence[str]) -> Iterator[Risk]:
    known = Known([name for name in names if name != title])
    for part in dict.fromkeys([title, title.split("/")[0], title.split("/")[-1]]):
        alike = known.lookalike(part) if part not in names else None
        if alike is not None:
            yield Risk("alarm", "spoofing", part, f"'{part}' may be taken for '{alike.known}': {alike.reason}.")
            return


def _tampering(checkpoint: Checkpoint, signers: str | Path | None, contents: bool) -> Iterator[Risk]:
    path = checkpoint.path
    if not checkpoint.is_ours:
        yield Risk("note", "tampering", MANIFEST, "nothing says which bytes were meant: there is no manifest and no lineage.")
        return
    if contents:
        for damage in verify.verify(path).damage:
            yield Risk("alarm", "tampering", damage.file, f"{damage}: these are not the bytes that were written.")
    origin = checkpoint.lineage
    for parent in origin.parents if origin is not None else []:
        yield from _parent(checkpoint, parent)
    signature = signing.check(checkpoint, signers)
    if signature.state == "bad":
        yield Risk("alarm", "spoofing", MANIFEST, "the signature is not over these bytes: they were changed after they were signed.")
    elif signature.state == "unknown":
        yield Risk("review", "spoofing", MANIFEST, "the signature is sound, but not by anybody in the file of allowed signers.")
    elif signature.state == "none":
        yield Risk("note", "spoofing", MANIFEST, "nobody has signed it (cairn sign).")


def _parent(checkpoint: Checkpoint, parent: lineage.Parent) -> Iterator[Risk]:
    """The chain of digests: what lies where a parent lay must be that parent, unless it was only moved."""
    if descent.find(parent, checkpoint.path) is not None:
        return
    there = follow(checkpoint.path.resolve().parent, parent.path) if parent.path else None
    if there is not None and there.is_dir():
        try:
            other = read.open(there).digest
        except CairnError as error:
            yield Risk("alarm", "tampering", str(parent.path), f"its parent {parent.digest[:12]} cannot be read: {error}")
            return
        words = f"where its parent {parent.digest[:12]} lay there is another state now, {other[:12]}."
        yield Risk("alarm", "tampering", str(parent.path), words)
    else:
        yield Risk("note", "tampering", str(parent.path), f"its parent {parent.digest[:12]} is not here, so the chain cannot be followed further.")


def _licenses(checkpoint: Checkpoint, made: record.CheckpointRecord) -> Iterator[Risk]:
    """License against those of all ancestors and of the data that they and it were trained on."""
    from cairn.registry import statements

    mine = made.value("license")
    works: dict[str, str | None] = {f"data '{name}'": license for name, license in (made.value("data_licenses") or {}).items()}
    for _, parent, found in descent.ancestors(checkpoint):
        if found is not None:
            said = statements.load(found)
            works[f"{found.path.name} ({parent.digest[:12]})"] = said.license
            for name, license in said.data_licenses.items():
                works[f"data '{name}'"] = license
    if mine is None:
        yield Risk("review", "license", "license", "no license is stated (cairn describe CKPT license=...), so nobody may reuse it.")
        return
    reviews = []
    for name, finding in licenses.along(str(mine), works).items():
        if finding.answer == "conflict":
            yield Risk("alarm", "license", name, f"{name}: {finding.rule}.")
        elif finding.answer == "review":
            reviews.append(f"{name}: {finding.rule}")
    if not licenses.known(str(mine)):
        yield Risk("review", "license", "license", f"'{mine}' is not in the table of licenses.")
    elif reviews:
        yield Risk("review", "license", "license", f"{len(reviews)} to look at; {reviews[0]}.")


def _claims(checkpoint: Checkpoint, made: record.CheckpointRecord, measure: bool) -> Iterator[Risk]:
    from cairn.evaluation import results

    if not made.claims:
        yield Risk("note", "repudiation", "claims", "nobody claims anything of it that could be measured again.")
        return
    if measure:
        audits = claims.audit(checkpoint)
    else:
        columns = ("model", "task", "metric", "value", "stderr", "n", "chance", "protocol")
        stored = [dict(zip(columns, row, strict=True)) for row in scan.results_in(results.folder(checkpoint))[0]]
        audits = claims.against_results(made.claims, [row for row in stored if row["model"] == checkpoint.model_digest])
    for each in audits:
        what = f"{each.claim.metric} {each.claim.value:g}"
        if each.verdict == "over-claimed":
            yield Risk("alarm", "repudiation", each.claim.metric, f"{what} is claimed, {each.measured:.4g} is measured (z = {each.z:.1f}).")
        elif each.verdict == "unverifiable":
            yield Risk("review", "repudiation", each.claim.metric, f"{what} is claimed and cannot be verified: {each.reason}.")
