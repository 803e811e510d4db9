"""Options as people write them: strict models, quantities with units, dotted overrides.

Every configurable thing in cairn is a pydantic model derived from `Options`; a key that it does not know is an
error that names the nearest key. Quantities are written as they are said: `20B tokens`, `500 steps`, `10%`, `2 GiB`.
Numbers are finite, and a key that stands twice in a file is an error.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar, overload

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, PlainSerializer, ValidationError, model_validator
from pydantic_core import core_schema

from cairn.errors import InputError, suggestion

_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_NUMBER = r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*"


M = TypeVar("M")


class Options(BaseModel):
    """Base of every config: immutable, unknown keys and numbers that are not finite refused, defaults validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _default_methods(cls, values: Any) -> Any:
        """A mapping without `name` sets options of the method that is the default, so that `optimizer.lr=1e-3` needs no optimizer named."""
        if not isinstance(values, Mapping):
            return values
        named = {key: name for key, given in values.items() if isinstance(given, Mapping) and "name" not in given and (name := _default_method(cls, key))}
        return {**values, **{key: {"name": name, **values[key]} for key, name in named.items()}} if named else values

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "options") -> Self:
        """Build from plain values; `where` is named in the error. Raises `InputError` in one sentence."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(_sentence(cls, error, where)) from None


class _Inside(ValueError):
    """A validation error of a method's options, told as though they were written where the method stands."""

    def __init__(self, cls: type[BaseModel], error: ValidationError) -> None:
        super().__init__(str(error))
        self.cls, self.error = cls, error


def _default_method(cls: type[BaseModel], key: str) -> str | None:
    """The name of the method that a field holds by default, if it holds one."""
    field = cls.model_fields.get(key)
    if field is None or not any(isinstance(part, Method) for part in field.metadata):
        return None
    default = field.default
    return default if isinstance(default, str) else default.get("name") if isinstance(default, Mapping) else None


def _sentence(cls: type[BaseModel], error: ValidationError, where: str, outer: tuple[str, ...] = ()) -> str:
    # An unknown key may have been meant for one that is missing; and of a value that may be of several types, what is wrong with the number
    # says more than that it is no mapping.
    first = min(error.errors(), key=lambda found: ("extra_forbidden", "finite_number", found["type"]).index(found["type"]))
    path = [str(part) for part in first["loc"]]
    key = ".".join((*outer, *path))
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, _Inside):
        return _sentence(cause.cls, cause.error, where, (*outer, *path))
    if first["type"] == "finite_number":
        return f"{where}: {key}: {first['input']} is not a finite number."
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'.{suggestion(path[-1], _keys_at(cls, path[:-1]))}"
    if first["type"] == "missing":
        return f"{where}: '{key}' is missing and has no default."
    if isinstance(cause, ValueError):
        return f"{where}: {key}: {cause}" if key else f"{where}: {cause}"
    return f"{where}: {key}: {first['msg'].lower()} (got {first['input']!r})."


def _keys_at(cls: Any, path: Iterable[str]) -> list[str]:
    """The keys that the model reached from `cls` by `path` knows; looks through Optional, list and dict annotations."""
    models = [cls]
    for part in path:
        following: list[Any] = []
        for model in models:
            field = getattr(model, "model_fields", {}).get(part)
            following += _models_in(field.annotation) if field else [model]
        models = following
    return [field.alias or key for model in models for key, field in getattr(model, "model_fields", {}).items()]


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


UNITS = ("tokens", "samples")
"""In what fields count: text in tokens, anything else in samples."""


@dataclass(frozen=True)
class Amount:
    """A stretch of training: `value` in `unit`, which is 'tokens', 'samples', 'steps' or '%' (of the whole run); '' is the unit of the field."""

    value: float
    unit: str

    def units(self, batch: int, total: int | None = None) -> int:
        """As units of the field, given those of one step and, for '%', of the run. Steps and percents round to whole steps."""
        if self.unit == "steps":
            return round(self.value) * batch
        if self.unit != "%":
            return round(self.value)
        if total is None:
            raise InputError(f"'{self}' needs a run of known length; write it in tokens, samples or steps.")
        return round(self.value / 100 * total / batch) * batch

    def steps(self, batch: int, total: int | None = None) -> int:
        """As whole steps, rounded up."""
        return -(-self.units(batch, total) // batch)

    def __str__(self) -> str:
        number = f"{self.value:.12g}"
        if self.value == int(self.value):
            number = str(int(self.value))
        return f"{number}%" if self.unit == "%" else f"{number} {self.unit}".rstrip()

    @classmethod
    def parse(cls, text: Any) -> Amount:
        """From '20B tokens', '60k samples', '500 steps', '10%', or a bare number, which counts what the field counts."""
        if isinstance(text, Amount):
            return text
        strange = ValueError(f"'{text}' is not an amount; write for example '20B tokens', '500 steps' or '10%'.")
        if isinstance(text, bool) or text is None:
            raise strange
        if isinstance(text, (int, float)):
            if not math.isfinite(text):
                raise ValueError(f"an amount is a finite number, not {text}.")
            found = cls(float(text), "")
        else:
            match = re.fullmatch(_NUMBER + r"([kKmMbBtT]?)\s*(tokens?|samples?|steps?|%)?\s*", str(text))
            if not match:
                raise strange
            unit = match[3] or ""
            unit = f"{unit.removesuffix('s')}s" if unit not in ("", "%") else unit
            found = cls(float(re.sub("[_,]", "", match[1])) * _SCALE[match[2].lower()], unit)
        if not math.isfinite(found.value) or found.value < 0:
            raise strange
        if 0 < found.value < 1 and found.unit != "%":
            one = found.unit.removesuffix("s") or "token or sample"
            raise ValueError(f"'{text}' is less than one {one}; a share of the run is written in percent: '{found.value * 100:.4g}%'.")
        return found

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str))


def in_unit(value: Any, unit: str) -> Any:
    """The same options, lists and mappings with every amount that says no unit, and every 0, in `unit`.

    Raises `ValueError` for an amount in a unit that another field counts in.
    """
    if isinstance(value, Amount):
        if value.unit in (unit, "steps", "%"):
            return value
        if value.unit and value.value:
            raise ValueError(f"'{value}' is written in {value.unit}, and this field counts {unit}; write it in {unit}, steps or %.")
        return Amount(value.value, unit)
    if isinstance(value, BaseModel):
        parts = {name: getattr(value, name) for name in type(value).model_fields}
        changed = {name: new for name, part in parts.items() if (new := in_unit(part, unit)) is not part}
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, (list, dict)):
        items: list[Any] = [in_unit(item, unit) for item in (value.values() if isinstance(value, dict) else value)]
        if all(new is old for new, old in zip(items, value.values() if isinstance(value, dict) else value, strict=True)):
            return value
        return dict(zip(value, items, strict=True)) if isinstance(value, dict) else items
    return value


def _positive(amount: Amount) -> Amount:
    if not amount.value:
        raise ValueError(f"'{amount}' is nothing; write how much, for example '500 steps' or '10%'.")
    return amount


PositiveAmount = Annotated[Amount, AfterValidator(_positive)]
"""An amount that is more than nothing: how long a run is, how often something happens."""


def _count(text: Any) -> Any:
    match = re.fullmatch(_NUMBER + r"([kKmMbBtT]?)\s*(tokens?|samples?)?\s*", text) if isinstance(text, str) else None
    return round(float(re.sub("[_,]", "", match[1])) * _SCALE[match[2].lower()]) if match else text


def _size(text: Any) -> Any:
    match = re.fullmatch(_NUMBER + r"([kKmMgGtT]?)(i?)[bB]?\s*", text) if isinstance(text, str) else None
    if not match:
        return text
    scale = _BINARY[match[2].lower()] if match[3] else {"g": 10**9, "t": 10**12}.get(match[2].lower(), _SCALE.get(match[2].lower(), 1))
    return round(float(re.sub("[_,]", "", match[1])) * scale)


Count = Annotated[int, BeforeValidator(_count)]
"""A whole number that may be written `20B`, `4k` or `524_288 tokens`."""

Bytes = Annotated[int, BeforeValidator(_size), PlainSerializer(lambda n: n)]
"""A number of bytes that may be written `2 GiB` or `500MB`."""


class Method:
    """Annotation of an option that holds a method of a catalog kind: `schedule: Annotated[Any, Method('schedule')]`.

    Written as a name (`cosine`) or as a mapping with `name` and the method's own options; held as the method's
    validated config object; serialised as the mapping again.
    """

    def __init__(self, kind: str, *, optional: bool = False, default: str | None = None) -> None:
        """With `optional`, None stands for no method; a mapping without a name is of the method `default`, whose name is not written either."""
        self.kind, self.optional, self.default = kind, optional, default

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate, serialization=core_schema.plain_serializer_function_ser_schema(self._serialise))

    def _serialise(self, value: Any) -> Any:
        if value is None and self.optional:
            return None
        options = method_options(value)
        return {key: option for key, option in options.items() if key != "name"} if options["name"] == self.default else options

    def _validate(self, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if self.default is not None and isinstance(value, Mapping) and value.get("name", self.default) == self.default:
            from cairn import catalog

            implementation = catalog.get(self.kind, self.default).implementation
            try:
                return implementation.model_validate({key: option for key, option in value.items() if key != "name"})
            except ValidationError as error:
                raise _Inside(implementation, error) from None
        try:
            return configure(self.kind, value)
        except InputError as error:
            raise ValueError(str(error)) from None


@overload
def configure(kind: str, value: Any) -> Any: ...
@overload
def configure(kind: type[M], value: Any) -> M: ...
def configure(kind: Any, value: Any) -> Any:
    """The configured method that `value` describes: a name, a mapping with `name`, or one already configured.

    `kind` is the parent class of a kind, which the result is a child of, or the kind's name. Raises `InputError` in one sentence.
    """
    from cairn import catalog

    word = catalog.kind_name(kind)
    if isinstance(value, Options) and catalog.name_of(value) is not None:
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise InputError(f"a {word} is written as its name or as a mapping with 'name', not as {value!r}.")
    entry = catalog.get(word, value["name"])
    return entry.implementation.parse({k: v for k, v in value.items() if k != "name"}, f"{word} '{entry.name}'")


def method_options(method: Any) -> dict[str, Any]:
    """The mapping with `name` from which `configure` builds the same method again."""
    from cairn import catalog

    return {"name": catalog.name_of(method), **method.model_dump(mode="json")}


def override(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of nested `values` with each `dotted.key=value` applied; values are read as YAML. Raises `InputError`.

    Where a method stands as a bare name, `schedule.warmup=5` turns it into a mapping first; list items are
    reached by their index.
    """
    return assign(values, read_assignments(assignments))


def read_assignments(assignments: Iterable[str]) -> list[tuple[str, Any]]:
    """Each `dotted.key=value` as the key and the value that YAML reads. Raises `InputError`."""
    found = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise InputError(f"'{assignment}' is not an option; write key=value, for example optimizer.lr=3e-4.")
        try:
            value = read_yaml(text, f"'{assignment}'")
        except yaml.YAMLError:
            value = text
        found.append((key.strip(), value))
    return found


def assign(values: dict[str, Any], pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A copy of nested `values` with the plain value of each dotted key put in as it is. Raises `InputError`."""
    result = copy.deepcopy(values)
    for key, value in pairs:
        result = _assign(result, key.split("."), value, f"{key}={value}")
    return result


class _Loader(yaml.SafeLoader):
    """Plain YAML in which no key of a mapping stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name != "<<" and name in seen:
                raise _TwiceError(f"the key '{name}' stands twice (line {key.start_mark.line + 1}); keep one of them")
            seen.add(name)
        return super().construct_mapping(node, deep)


class _TwiceError(Exception):
    """A key stands twice."""


def read_yaml(text: str, where: str) -> Any:
    """The plain values of a YAML text. Raises `InputError` where a key stands twice; `yaml.YAMLError` for what is no YAML is the caller's to explain."""
    try:
        return yaml.load(text, _Loader)
    except _TwiceError as error:
        raise InputError(f"{where}: {error}.") from None
    except RecursionError:
        raise InputError(f"{where}: it is nested too deep.") from None


def _assign(node: Any, path: list[str], value: Any, assignment: str) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise InputError(f"'{assignment}': the list has items 0 to {len(node) - 1}, not '{head}'.")
        node[int(head)] = _assign(node[int(head)], rest, value, assignment)
        return node
    if isinstance(node, str):
        node = {"name": node}
    elif node is None:
        node = {}
    elif not isinstance(node, dict):
        raise InputError(f"'{assignment}': '{head}' cannot be set inside the plain value {node!r}.")
    if (dotted := ".".join(path)) in node:  # what a stage of a recipe sets is written with dotted keys
        node[dotted] = value
        return node
    node[head] = _assign(node.get(head), rest, value, assignment)
    return node
