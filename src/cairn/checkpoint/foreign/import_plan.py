"""What an import will do, from headers alone.

A plan is the same joining and renaming that the import does (`checkpoint/importing.py`), on tensors that have shapes and no
values; what it refuses is refused before anything is written. What a layout knows is in `checkpoint/foreign/`, how tensors
were cut in `checkpoint/patterns.py`, and how a user says it in `checkpoint/spec.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cairn import catalog
from cairn.checkpoint.foreign import export
from cairn.checkpoint.foreign.layouts import WEIGHT, Layout, Opening, Slice, TensorSource, read_json
from cairn.checkpoint.foreign.patterns import Expert, Fused, Replicated, Rule, Shard, Unique, Unsupported
from cairn.checkpoint.foreign.spec import Rules, ShardSpec
from cairn.checkpoint.format.building import hold_against
from cairn.checkpoint.format.dtypes import CODES
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.redundant import EMBEDDINGS, is_computed, is_tied
from cairn.errors import InputError, MismatchError, NotFoundError
from cairn.options import configure

HEAD = "lm_head.weight"
STEMS = ("model", "optimizer")


@dataclass(frozen=True)
class TensorGroup:
    """All slices of one tensor there, how they are joined, and what it becomes here (`outputs` are specs by stem)."""

    name: str
    key: str
    slices: list[Slice]
    kind: str
    rule: Rule
    experts: Rule
    outputs: list[tuple[str, TensorSpec]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.slices)


@dataclass
class ImportPlan:
    """What an import will do: the source's grid, how each tensor is joined, what is written and what is left out."""

    folder: Path
    layout: str
    source: TensorSource
    rules: Rules
    groups: list[TensorGroup]
    config: dict[str, Any]
    tied: tuple[TensorGroup, TensorGroup] | None = None
    """A head and the embedding that the model ties it to; it is not stored again."""
    notes: list[str] = field(default_factory=list)

    def translated(self, group: TensorGroup, load: Callable[[Slice], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """What one tensor becomes here, by the names here."""
        scalar = group.key != WEIGHT and not group.slices[0].shape
        weight = next((other for other in self.groups if (other.name, other.key) == (group.name, WEIGHT)), None) if scalar else None
        return _translated(self.source, self.rules, group, weight, load)

    def refuse_untied(self) -> None:
        """Raise `MismatchError` if a head that is to be tied is not the embedding."""
        if self.tied is not None:
            values = [tensor for group in self.tied for _, tensor in self.translated(group, Slice.read)]
            Replicated("names of a tied tensor").union(self.tied[0].name, values)

    def specs(self, stem: str) -> list[TensorSpec]:
        """The tensors of one stem ('model' or 'optimizer')."""
        return [spec for group in self.groups for where, spec in group.outputs if where == stem]

    def plain(self) -> dict[str, Any]:
        """For a report."""
        sizes = {stem: sum(spec.nbytes for spec in self.specs(stem)) for stem in STEMS}
        rules: dict[str, int] = {}
        for group in self.groups:
            rules[group.kind] = rules.get(group.kind, 0) + 1
        return {
            "source": str(self.folder),
            "layout": self.layout,
            "grid": self.source.grid,
            "rules": rules,
            "tensors": [
                {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "from": group.name, "pieces": len(group.slices), "rule": group.kind}
                for group in self.groups
                for stem, spec in group.outputs
                if stem == "model"
            ],
            "optimizer": sorted({group.key for group in self.groups if group.key != WEIGHT}),
            "bytes": sizes,
            "largest": max((group.nbytes for group in self.groups), default=0),
            "facts": self.source.plain,
            "left_out": self.source.left_out,
            "notes": self.notes,
        }


def plan(
    source: str | Path,
    *,
    layout: str | None = None,
    spec: ShardSpec | str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    pickles: bool = False,
    dtype: str | None = None,
    own_tokenizer: bool = False,
) -> ImportPlan:
    """What `import_` would do, from headers alone. Raises `CairnError` for everything that the import would refuse but values."""
    folder = Path(source)
    if not folder.exists():
        raise NotFoundError(f"There is no file or folder {folder}; an import takes what the other program wrote.")
    if dtype is not None and dtype not in export.CODES:
        raise InputError(f"dtype is one of {', '.join(export.CODES)}, not '{dtype}'.")
    name = layout or detected(folder)
    chosen: Layout = configure(Layout, name)
    if folder.is_file() and not chosen.single_file:
        raise InputError(f"{folder} is a file; the layout '{name}' takes the folder that the other program wrote.")
    opened = chosen.open(Opening(folder, pickles, _config(config), own_tokenizer))
    if opened.config is None:
        raise InputError(f"{folder} does not say what model it is; give the model's config.json with --config.")
    asked = spec if isinstance(spec, ShardSpec) else ShardSpec.load(spec) if spec is not None else ShardSpec()
    return _Planner(folder, name, opened, Rules(asked, [opened.recorded]), dtype).plan()


def detected(folder: Path) -> str:
    """The one layout that recognises a folder or a file. Raises `InputError` if none or several do."""
    layouts = [entry for entry in catalog.entries("layout") if entry.implementation.single_file or not folder.is_file()]
    found = [entry.name for entry in layouts if entry.implementation.recognises(folder)]
    if len(found) != 1:
        several = f"could be of the layouts {' and '.join(found)}" if found else "is of no layout that is known"
        raise InputError(f"{folder} {several}; name it with --layout ({', '.join(catalog.names('layout'))}).")
    return found[0]


@dataclass
class _Planner:
    folder: Path
    layout: str
    source: TensorSource
    rules: Rules
    dtype: str | None

    def plan(self) -> ImportPlan:
        config = dict(self.source.config or {})
        self._refuse_codes(config)
        groups = [self._group(name, key, slices) for (name, key), slices in self._gathered().items()]
        for group in groups:
            if isinstance(group.rule, Unsupported):
                group.rule.union(group.name, [])
        weights = {group.name: group for group in groups if group.key == WEIGHT}
        groups = [replace(group, outputs=list(self._outputs(group, weights))) for group in groups]
        groups = [group for group in groups if group.outputs]
        self.rules.refuse_unused()
        groups, tied = _without_tied_head(groups, config)
        _refuse_twice(groups)
        _refuse_misfit(groups, config, self.folder)
        if self.dtype is not None:
            config |= {key: self.dtype for key in ("dtype", "torch_dtype") if key in config}
        return ImportPlan(self.folder, self.layout, self.source, self.rules, groups, config, tied)

    def _refuse_codes(self, config: Mapping[str, Any]) -> None:
        """Raise `MismatchError` where weights that are codes of a quantization would be cast as if they were numbers."""
        if self.dtype is None:
            return
        codes = next((piece for piece in self.source.slices if piece.key == WEIGHT and piece.dtype.is_floating_point and piece.dtype.itemsize == 1), None)
        if codes is not None or config.get("quantization_config") is not None:
            named = f"'{codes.name}' is stored as {str(codes.dtype).removeprefix('torch.')}" if codes is not None else "config.json has a quantization_config"
            raise MismatchError(
                f"{self.folder}: {named}, so its values mean nothing without their scales and cannot be cast to {self.dtype}. Leave --dtype out, or write "
                "the model as bfloat16 with the library that quantized it."
            )

    def _gathered(self) -> dict[tuple[str, str], list[Slice]]:
        """Slices by (name, key); what is only another name of a tied tensor stands there as a tensor of its own."""
        found: dict[tuple[str, str], list[Slice]] = {}
        for piece in self.source.slices:
            found.setdefault((piece.name, piece.key), []).append(piece)
        for alias, name in self.source.aliases.items():
            found |= {(alias, key): [replace(piece, name=alias) for piece in pieces] for (owner, key), pieces in list(found.items()) if owner == name}
        dropped = {name for name, _ in found if self.rules.dropped(name)}
        self.source.left_out.extend(f"{name} (dropped by the spec)" for name in sorted(dropped))
        computed = {name for (name, _), pieces in found.items() if name not in dropped and is_computed(name, pieces[0].shape)}
        self.source.left_out.extend(f"{name} (computed from config.json)" for name in sorted(computed))
        return {place: pieces for place, pieces in found.items() if place[0] not in dropped | computed}

    def _group(self, name: str, key: str, slices: list[Slice]) -> TensorGroup:
        kind, rule = self.rules.of(name)
        if key != WEIGHT and not slices[0].shape:
            kind, rule = "replicated", Replicated()
        experts: Rule = rule if isinstance(rule, Expert) else Replicated("expert ranks")
        if isinstance(rule, Expert):
            rule = rule.within
        elif len({piece.tensor for piece in slices}) == 1 and rule == Shard(0):
            kind, rule = "unique", Unique()
        stages = sorted({piece.stage for piece in slices})
        if len(stages) > 1 and not self.rules.over_stages(name):
            raise MismatchError(
                f"'{name}' is held by pipeline stages {stages[0]} and {stages[1]}; if it is tied over stages, list it under 'pipeline_replicated' in the spec."
            )
        return TensorGroup(name, key, self._all_ranks(name, key, slices, rule), kind, rule, experts)

    def _all_ranks(self, name: str, key: str, slices: list[Slice], rule: Rule) -> list[Slice]:
        """The slices in the order of ranks, an empty one for a rank that owns nothing. Raises `NotFoundError` for a rank that should."""
        ways, found = self.source.grid.get("tensor", 1), list[Slice]()
        cells = {(piece.stage, piece.expert, piece.tensor): piece for piece in slices}
        for stage, expert in sorted({(piece.stage, piece.expert) for piece in slices}):
            for rank in range(ways):
                piece = cells.get((stage, expert, rank))
                if piece is None and not _owns_nothing(rule, rank):
                    raise NotFoundError(f"{self.folder}: tensor rank {rank} holds no piece of '{name}'; its file is missing or of another save.")
                found.append(piece or _nothing(slices[0], rule, stage, expert, rank))
        return found

    def _outputs(self, group: TensorGroup, weights: Mapping[str, TensorGroup]) -> Iterator[tuple[str, TensorSpec]]:
        """What a tensor becomes here: dtype and shape by computing with tensors that have nothing else."""
        for name, tensor in _translated(self.source, self.rules, group, weights.get(group.name), Slice.meta):
            if group.key == WEIGHT:
                floating = self.dtype is not None and tensor.dtype.is_floating_point
                yield "model", TensorSpec(name, export.CODES[str(self.dtype)] if floating else CODES[tensor.dtype], tuple(tensor.shape))
            else:
                yield "optimizer", TensorSpec(f"{name}/{group.key}", CODES[tensor.dtype], tuple(tensor.shape))


def _joined(group: TensorGroup, load: Callable[[Slice], torch.Tensor]) -> torch.Tensor:
    """The whole tensor: over tensor ranks, over expert ranks, over pipeline stages."""
    stages: list[torch.Tensor] = []
    for stage in sorted({piece.stage for piece in group.slices}):
        experts = []
        for expert in sorted({piece.expert for piece in group.slices if piece.stage == stage}):
            experts.append(group.rule.union(group.name, [load(piece) for piece in group.slices if (piece.stage, piece.expert) == (stage, expert)]))
        stages.append(group.experts.union(group.name, experts))
    return Replicated("pipeline stages").union(group.name, stages)


def _translated(
    source: TensorSource, rules: Rules, group: TensorGroup, weight: TensorGroup | None, load: Callable[[Slice], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    whole, name = _joined(group, load), rules.renamed(group.name)
    if whole.dim() or group.key == WEIGHT:
        yield from source.translate(name, whole)
    elif weight is not None:
        # A count has no parts: every parameter that the weight becomes gets it.
        yield from ((new, whole) for new, _ in source.translate(name, _joined(weight, Slice.meta)))


def _without_tied_head(groups: list[TensorGroup], config: Mapping[str, Any]) -> tuple[list[TensorGroup], tuple[TensorGroup, TensorGroup] | None]:
    """Where the model ties its head to its embedding, the head is stored once, as the embedding."""
    heads = [group for group in groups if [spec.name for _, spec in group.outputs] == [HEAD]]
    embeddings = [group for group in groups if group.key == WEIGHT and any(spec.name.endswith(EMBEDDINGS) for _, spec in group.outputs)]
    if not heads or len(embeddings) != 1 or not is_tied(dict(config)):
        return groups, None
    name = heads[0].name
    return [group for group in groups if group.name != name], (heads[0], embeddings[0])


def _refuse_twice(groups: list[TensorGroup]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for group in groups:
        for stem, spec in group.outputs:
            if (stem, spec.name) in seen:
                raise MismatchError(f"'{seen[stem, spec.name]}' and '{group.name}' would both become '{spec.name}'; correct 'rename' in the spec.")
            seen[stem, spec.name] = group.name


def _refuse_misfit(groups: list[TensorGroup], config: Mapping[str, Any], folder: Path) -> None:
    """Where the family is one of ours, the tensors must be exactly those of the model that config.json describes."""
    family = str(config.get("model_type"))
    if not catalog.has("architecture", str(family)):
        return
    hold_against(config, (spec for group in groups for stem, spec in group.outputs if stem == "model"), folder)
    meta_model = catalog.get("architecture", family).implementation.from_hf(config).meta_model()
    wanted = {name: tuple(parameter.shape) for name, parameter in meta_model.named_parameters()}
    found = {spec.name: spec.shape for group in groups for stem, spec in group.outputs if stem == "model"}
    strange, missing = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
    if strange or missing:
        pair = [f"no '{name}'" for name in missing[:1]] + [f"an unknown '{name}'" for name in strange[:1]]
        raise MismatchError(
            f"The tensors of {folder} do not make the '{family}' model of config.json: there is {' and '.join(pair)}; 'rename' in a spec maps names."
        )
    wrong = next((name for name in wanted if wanted[name] != found[name]), None)
    if wrong is not None:
        raise MismatchError(
            f"'{wrong}' of {folder} becomes {found[wrong]} and config.json asks for {wanted[wrong]}; correct its rule in the spec (a padded vocabulary: vocab)."
        )


def _owns_nothing(rule: Rule, rank: int) -> bool:
    return isinstance(rule, Fused) and rule.widths is not None and rank < len(rule.widths[0]) and not any(sub[rank] for sub in rule.widths)


def _nothing(like: Slice, rule: Rule, stage: int, expert: int, rank: int) -> Slice:
    """The empty slice of a rank that owns nothing of a tensor."""
    assert isinstance(rule, Fused)
    shape = (*like.shape[: rule.dim], 0, *like.shape[rule.dim + 1 :])
    return Slice(like.name, like.key, shape, like.dtype, functools.partial(torch.empty, shape, dtype=like.dtype), stage, rank, expert)


def _config(given: str | Path | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None or isinstance(given, Mapping):
        return dict(given) if given is not None else None
    path = Path(given)
    found = read_json(path / "config.json") if path.is_dir() else read_json(path, named=True)
    if found is None:
        raise NotFoundError(f"There is no config.json at {path}.")
    return found
