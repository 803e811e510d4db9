"""The spec: regular expressions on parameter names say how each parameter was cut (`checkpoint/patterns.py`).

    replicated: ['.*norm.*']
    shard: [{pattern: '.*o_proj\\.weight', dim: 1}, {pattern: 'model\\.embed_tokens\\..*', vocab: 50257}]
    drop: ['.*rotary_emb\\.inv_freq', 'step$']
    fused: [{pattern: '.*gate_up\\.weight', parts: 2}, {pattern: '.*qkv\\.weight', widths: [[64, 64], [16, 16], [16, 16]]}]

A pattern is matched from the start of the full name. Kinds take precedence in a fixed order, two hits within one kind are
an error, and so is a pattern that hits nothing.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from cairn.checkpoint.foreign.patterns import AveragedCopies, Expert, Fused, Replicated, Rule, Shard, Unsupported
from cairn.errors import InputError, MismatchError, NotFoundError
from cairn.options import Options


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is not a regular expression: {error}.") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


class ShardOf(Options):
    """Rows or columns, cut over the ranks."""

    pattern: Pattern
    dim: Literal[0, 1] = 0
    uneven: Literal["ceil", "balanced"] | None = None
    vocab: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _vocabulary_is_rows(self) -> Self:
        if self.vocab is not None and self.dim != 0:
            raise ValueError("a vocabulary counts rows: vocab goes with dim 0.")
        return self

    @property
    def rule(self) -> Rule:
        return Shard(self.dim, self.uneven, self.vocab)


class FusedOf(Options):
    """Several matrices in one: `parts` equal ones, or `widths[sub-tensor][rank]`."""

    pattern: Pattern
    parts: int | None = Field(None, ge=2)
    widths: tuple[tuple[int, ...], ...] | None = None
    dim: Literal[0, 1] = 0

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.parts is None) == (self.widths is None):
            raise ValueError("a fused tensor is described by parts or by widths, one of the two.")
        if self.widths is not None and len({len(sub) for sub in self.widths}) != 1:
            raise ValueError("widths holds one list for each sub-tensor, all with one width for each rank.")
        return self

    @property
    def rule(self) -> Rule:
        return Fused(self.parts, self.widths, self.dim)


class ExpertOf(Options):
    """Dimension 0 counts experts; `dim` is the one along which tensor-parallel ranks cut each of them."""

    pattern: Pattern
    count: int = Field(ge=1)
    dim: Literal[1, 2] | None = None

    @property
    def rule(self) -> Rule:
        return Expert(self.count, self.dim)


class UnsupportedOf(Options):
    """What must not be imported, with the reason that is told."""

    pattern: Pattern
    reason: str

    @property
    def rule(self) -> Rule:
        return Unsupported(self.reason)


class Rename(Options):
    """A name as it is there and, with groups as in `re.sub`, as it is to be here."""

    pattern: Pattern
    to: str


PRECEDENCE = ("unsupported", "replicated", "average", "fused", "fused by widths", "expert", "shard")
"""Which kind of rule wins where several match one name; without any, `shard` along dimension 0."""


class ShardSpec(Options):
    """How the parameters of a foreign checkpoint were cut, and how they are called here."""

    replicated: list[Pattern] = []
    average: list[Pattern] = []
    shard: list[ShardOf] = []
    fused: list[FusedOf] = []
    expert: list[ExpertOf] = []
    unsupported: list[UnsupportedOf] = []
    pipeline_replicated: list[Pattern] = []
    """Tensors tied over pipeline stages: every stage that has one must have the same."""
    drop: list[Pattern] = []
    """Tensors that stay behind: redundant ones, counters, what belongs to no model. Wins over every other rule."""
    rename: list[Rename] = []
    strict: bool = True
    """Whether a pattern that hits nothing is an error."""

    @classmethod
    def load(cls, path: str | Path) -> ShardSpec:
        """From a YAML or TOML file. Raises `NotFoundError` or `InputError`."""
        path = Path(path)
        if not path.is_file():
            raise NotFoundError(f"There is no spec file {path}.")
        try:
            values: Any = tomllib.loads(path.read_text()) if path.suffix == ".toml" else yaml.safe_load(path.read_text())
        except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"Spec {path} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise InputError(f"Spec {path}: a spec is a mapping of kinds of rules to patterns.")
        return cls.parse(values, f"spec {path}")

    def lists(self) -> dict[str, list[tuple[str, Rule]]]:
        """The rules of each kind, in the order of precedence."""
        found: dict[str, list[tuple[str, Rule]]] = {kind: [] for kind in PRECEDENCE}
        found["replicated"] = [(pattern, Replicated()) for pattern in self.replicated]
        found["average"] = [(pattern, AveragedCopies()) for pattern in self.average]
        for kind, items in (("unsupported", self.unsupported), ("expert", self.expert), ("shard", self.shard)):
            found[kind] = [(item.pattern, item.rule) for item in items]  # type: ignore[attr-defined]
        for item in self.fused:
            found["fused" if item.parts else "fused by widths"].append((item.pattern, item.rule))
        return found


class Rules:
    """The rules in force for one import: the user's spec before what the layout says, with a memory of which patterns were of use."""

    def __init__(self, spec: ShardSpec, recorded: Sequence[ShardSpec] = ()) -> None:
        self.spec = spec
        self._levels = [level.lists() for level in (spec, *recorded)]
        self._stages = [pattern for level in (spec, *recorded) for pattern in level.pipeline_replicated]
        self._used: set[str] = set()

    def of(self, name: str) -> tuple[str, Rule]:
        """The kind and the rule of a parameter. Raises `InputError` where two patterns of one kind match it."""
        for level in self._levels:
            hits = {kind: self._hit(kind, rules, name) for kind, rules in level.items()}
            chosen = next(((kind, hit) for kind, hit in hits.items() if hit is not None), None)
            if chosen is not None:
                return chosen
        return "shard", Shard(0)

    def _hit(self, kind: str, rules: Iterable[tuple[str, Rule]], name: str) -> Rule | None:
        matching = [(pattern, rule) for pattern, rule in rules if re.match(pattern, name)]
        if len(matching) > 1:
            raise InputError(f"'{name}' is matched by two patterns of '{kind}', '{matching[0][0]}' and '{matching[1][0]}'; narrow one of them.")
        for pattern, rule in matching:
            self._used.add(f"{kind}: {pattern}")
            return rule
        return None

    def over_stages(self, name: str) -> bool:
        """Whether a tensor may be held by several pipeline stages. Raises `InputError` for a double hit."""
        hits = [pattern for pattern in self._stages if re.match(pattern, name)]
        if len(set(hits)) > 1:
            raise InputError(f"'{name}' is matched by two patterns of 'pipeline_replicated', '{hits[0]}' and '{hits[1]}'; narrow one of them.")
        self._used.update(f"pipeline_replicated: {pattern}" for pattern in hits)
        return bool(hits)

    def dropped(self, name: str) -> bool:
        """Whether the spec leaves a tensor behind."""
        hits = [pattern for pattern in self.spec.drop if re.match(pattern, name)]
        self._used.update(f"drop: {pattern}" for pattern in hits)
        return bool(hits)

    def renamed(self, name: str) -> str:
        """What the spec calls it here."""
        hits = [item for item in self.spec.rename if re.match(item.pattern, name)]
        if len(hits) > 1:
            raise InputError(f"'{name}' is matched by two patterns of 'rename', '{hits[0].pattern}' and '{hits[1].pattern}'; narrow one of them.")
        for item in hits:
            self._used.add(f"rename: {item.pattern}")
            return re.sub(item.pattern, item.to, name, count=1)
        return name

    def refuse_unused(self) -> None:
        """Raise `MismatchError` for a pattern of the user's that hit nothing, unless the spec says strict: false."""
        kinds = [(kind, pattern) for kind, rules in self.spec.lists().items() for pattern, _ in rules]
        kinds += [("pipeline_replicated", pattern) for pattern in self.spec.pipeline_replicated]
        kinds += [("drop", pattern) for pattern in self.spec.drop]
        kinds += [("rename", item.pattern) for item in self.spec.rename]
        unused = [(kind, pattern) for kind, pattern in kinds if f"{kind}: {pattern}" not in self._used]
        if unused and self.spec.strict:
            kind, pattern = unused[0]
            raise MismatchError(
                f"The pattern '{pattern}' of '{kind}' matches no tensor; patterns are matched from the start of the full name (strict: false allows it)."
            )


def recorded(values: dict[str, Any], where: str) -> ShardSpec:
    """A spec as files record it. Raises `InputError`."""
    try:
        return ShardSpec.model_validate(values | {"strict": False})
    except ValidationError as error:
        raise InputError(f"{where} records a layout that is not understood: {error.errors()[0]['msg'].lower()}.") from None
