"""TALL masks: N experts kept as one merged task vector and one bit per weight and expert.

    theta_i ~ theta_0 + m_i * tau_M

The bundle is a checkpoint that opens as the base; beside its weights lie `vector.safetensors` (tau_M in float32) and
`masks.safetensors` (`<expert>/<tensor>`, eight weights a byte). With 32-bit weights it holds (32 + 32 + N) P bits where N
checkpoints hold 32 N P. Masks fit the vector that they were built with: they are published together and never change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cairn.catalog import Paper, register
from cairn.checkpoint.format import documents, kinds, read
from cairn.checkpoint.format.folder import TensorFolder
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating import stream
from cairn.checkpoint.operating.values import FLOATS
from cairn.checkpoint.operating.walk import PIECE_ITEMS, TensorSlice, Walk, widened
from cairn.device import computes
from cairn.errors import InputError, NotFoundError, suggestion
from cairn.merging.arithmetic import task_vectors
from cairn.merging.localize import Localizing, pack, unpack
from cairn.merging.target import Bench, Measure
from cairn.statistics import first_largest

BUNDLE, VECTOR, MASKS = "bundle.json", "vector", "masks"
CANDIDATES = (0.2, 0.3, 0.4, 0.5, 0.6)
"""Thresholds among which validation chooses."""


class _Expert(kinds.File):
    """What bundle.json says of one expert."""

    name: str


class _Bundle(kinds.File):
    """bundle.json."""

    experts: list[_Expert]


@register("operation", "tall-masks", paper=Paper("Localizing Task Information for Improved Model Merging and Compression", "arXiv:2405.07813", card=26))
class TallMasks(Localizing):
    """Bundle experts as base, merged task vector and packed masks (section 4.1); `cairn merge reconstruct` gives any of them back."""

    names: list[str] | None = None
    """What the experts are called; default: their numbers from 0."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        super().check(parents)
        if self.weights is not None or self.scale != 1.0:
            raise InputError("tall-masks keeps the merged vector as it is: weights and scale have no place in it.")
        names = self.experts(len(parents) - 1)
        if len(names) != len(parents) - 1 or len(set(names)) != len(names) or not all(name and "/" not in name for name in names):
            raise InputError(f"names has {len(names)} values for {len(parents) - 1} experts; give one per expert, all different, without '/'.")

    def experts(self, count: int) -> list[str]:
        """The experts' names."""
        return self.names if self.names is not None else [str(number) for number in range(count)]

    def attachments(self, parents: Sequence[Checkpoint]) -> dict[str, list[TensorSpec]]:
        floats = [spec for spec in self.outputs(parents) if spec.dtype in FLOATS]
        vector = [TensorSpec(spec.name, "F32", spec.shape) for spec in floats]
        packed = [TensorSpec(f"{name}/{spec.name}", "U8", (-(-math.prod(spec.shape) // 8),)) for name in self.experts(len(parents) - 1) for spec in floats]
        return {VECTOR: vector, MASKS: packed}

    def documents(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        given = self.thresholds if isinstance(self.thresholds, list) else [self.thresholds] * (len(parents) - 1)
        experts = [
            {"name": name, "digest": parent.digest, "threshold": threshold}
            for name, parent, threshold in zip(self.experts(len(parents) - 1), parents[1:], given, strict=True)
        ]
        return {BUNDLE: {"format": 1, "base": parents[0].digest, "multi": self.multi, "experts": experts}}

    def parts(self, spec: TensorSpec, parents: Sequence[Checkpoint], known: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
        if spec.dtype not in FLOATS:
            yield from super().parts(spec, parents, known)
            return
        names = self.experts(len(parents) - 1)
        for piece in Walk(parents, [spec]).pieces():
            vectors = task_vectors(piece.inputs)
            merged = self.merged(vectors, known)
            yield stream.WEIGHTS, spec.name, piece.inputs[0]
            yield VECTOR, spec.name, merged
            for name, mask in zip(names, self.masks(vectors, merged), strict=True):
                yield MASKS, f"{name}/{spec.name}", pack(mask)

    def blend(self, piece: TensorSlice, known: Any) -> torch.Tensor:
        return piece.inputs[0]


class MaskedExperts(Localizing):
    """Base plus the merged vector where one expert's mask is on, made from the experts themselves: what a bundle would give back."""

    number: int
    """Which expert, from 0."""

    def blend(self, piece: TensorSlice, known: torch.Tensor | None) -> torch.Tensor:
        vectors = task_vectors(piece.inputs)
        merged = self.merged(vectors, known)
        return piece.inputs[0] + merged * self.masks(vectors, merged)[self.number]


def choose_thresholds(
    bench: Bench, measures: Sequence[Measure], candidates: Sequence[float] = CANDIDATES, *, lower: bool = False, **options: Any
) -> tuple[list[float], list[dict[float, float]]]:
    """For each expert the threshold at which its reconstruction measures best, the smallest of equals, and all values (section 4.1).

    `measures` are the experts' own, in their order, on data kept for choosing; `options` are those of the merged vector.
    """
    values = [
        {threshold: bench.score(MaskedExperts(number=number, thresholds=threshold, **options), measure).value for threshold in candidates}
        for number, measure in enumerate(measures)
    ]
    chosen = [first_largest([-value if lower else value for value in row.values()]) for row in values]
    for number, index in enumerate(chosen):
        if index is None:
            raise InputError(f"Expert {number + 1} measures as no finite number at some threshold, so none can be chosen; check its weights and data.")
    return [list(row)[index] for row, index in zip(values, chosen, strict=True) if index is not None], values


@computes
def bundle(
    base: str | Path | Checkpoint,
    experts: Mapping[str, str | Path | Checkpoint],
    out: str | Path,
    *,
    validate: Mapping[str, Measure] | None = None,
    candidates: Sequence[float] = CANDIDATES,
    lower: bool = False,
    device: Any = None,
    **options: Any,
) -> Checkpoint:
    """Bundle experts by name; with a measure for each in `validate` the thresholds are chosen by it, and lineage keeps the values.

    Raises `InputError` or `MismatchError` before anything is written.
    """
    parents = stream.opened_for(TallMasks(names=list(experts), **options), [base, *experts.values()])
    if validate is None:
        return stream.apply(TallMasks(names=list(experts), **options), parents, out)
    missing = next((name for name in experts if name not in validate), None)
    if missing is not None:
        raise InputError(f"validate has no measure for the expert '{missing}'; give one for each.")
    chosen, values = choose_thresholds(Bench(parents), [validate[name] for name in experts], candidates, lower=lower, **options)
    operation = TallMasks(names=list(experts), thresholds=chosen, **options)
    told = {"validation": {name: {str(key): value for key, value in row.items()} for name, row in zip(experts, values, strict=True)}}
    return stream.apply(operation, parents, out, also=told)


class Reconstruct(stream.Operation):
    """One expert of a bundle: base plus the merged vector where the expert's mask is on."""

    expert: str

    def check(self, parents: Sequence[Checkpoint]) -> None:
        entry(parents[0], self.expert)

    def prepare(self, parents: Sequence[Checkpoint], context: stream.Context) -> tuple[TensorFolder, TensorFolder]:
        return TensorFolder(parents[0].path, VECTOR), TensorFolder(parents[0].path, MASKS)

    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        yield parents[0].tensors[spec.name].load().reshape(-1)

    def parts(self, spec: TensorSpec, parents: Sequence[Checkpoint], known: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
        if spec.dtype not in FLOATS:
            yield from super().parts(spec, parents, known)
            return
        base, vector, mask = parents[0].tensors[spec.name], known[0][spec.name], known[1][f"{self.expert}/{spec.name}"]
        held = [torch.empty(PIECE_ITEMS, dtype=tensor.dtype) for tensor in (base, vector, mask)]
        for begin, end in stream.piecewise(spec):
            on = unpack(mask.flat(begin // 8, -(-end // 8), held[2]), end - begin).view(torch.uint8).to(torch.float32)
            yield (
                stream.WEIGHTS,
                spec.name,
                widened(base.flat(begin, end, held[0])) + vector.flat(begin, end, held[1]).mul_(on),
            )


def reconstruct(source: str | Path | Checkpoint, expert: str, out: str | Path, **progress: Any) -> Checkpoint:
    """Write one expert of a bundle as an ordinary checkpoint at `out`; lineage says of which bundle, and at which threshold.

    Raises `InputError` if `source` is no bundle and `NotFoundError` if it holds no such expert.
    """
    opened = source if isinstance(source, Checkpoint) else read.open(source)
    return stream.apply(Reconstruct(expert=expert), [opened], out, name="reconstruct", also={"bundle": entry(opened, expert)}, **progress)


def contents(source: Checkpoint) -> dict[str, Any]:
    """What bundle.json says. Raises `InputError` if the checkpoint is no bundle."""
    path, data = source.path / BUNDLE, source.read_file(BUNDLE)
    if data is None:
        raise InputError(f"{source.path} is not a bundle of experts; `cairn merge tall-masks` makes one.")
    document = documents.as_object(documents.parse(data, path), path)
    experts = documents.validated(_Bundle, document, path).experts
    return document | {"names": [expert.name for expert in experts]}


def entry(source: Checkpoint, expert: str) -> dict[str, Any]:
    """What a bundle says of one expert: name, digest, threshold."""
    document = contents(source)
    if expert not in document["names"]:
        raise NotFoundError(f"The bundle {source.path} holds no expert '{expert}'.{suggestion(expert, document['names'])}")
    return document["experts"][document["names"].index(expert)]


def report(source: str | Path | Checkpoint) -> dict[str, Any]:
    """Density of each expert's mask, the share of weights that serve 0, 1, ... N experts, and bytes against N checkpoints."""
    opened = source if isinstance(source, Checkpoint) else read.open(source)
    names, folder = contents(opened)["names"], TensorFolder(opened.path, MASKS)
    vector = TensorFolder(opened.path, VECTOR)
    on, active, items = torch.zeros(len(names)), torch.zeros(len(names) + 1), 0
    for tensor in vector.values():
        count = math.prod(tensor.shape)
        for begin, end in stream.piecewise(tensor.spec):
            rows = torch.stack([unpack(folder[f"{name}/{tensor.name}"].flat(begin // 8, -(-end // 8)), end - begin) for name in names])
            on += rows.sum(1)
            active += torch.bincount(rows.sum(0), minlength=len(names) + 1)
        items += count
    bundled = opened.tensors.nbytes + vector.nbytes + folder.nbytes
    return {
        "density": {name: float(share) for name, share in zip(names, on / items, strict=True)},
        "active": [float(share) for share in active / items],
        "bytes": bundled,
        "bytes_of_experts": opened.tensors.nbytes * len(names),
    }
