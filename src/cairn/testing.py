"""Conformance: what every registered method promises, as checks that anybody can run on a method of their own.

    from cairn.testing import check_method
    check_method("operation", "away")

Each kind of method has one suite. A suite makes its own small material, tries the method with its default options and with every choice of
every option, and raises `AssertionError` with a sentence for the first promise that is broken. `checks` gives the same one by one, for a
test runner: `@pytest.mark.parametrize("check", checks("operation", "away"), ids=str)`.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from cairn import catalog
from cairn.errors import CairnError, InputError, NotFoundError
from cairn.options import configure, method_options


@dataclass(frozen=True)
class Check:
    """One promise of one method: call it with an empty folder. `str` of it names it."""

    method: str
    promise: str
    run: Callable[[Path], None]

    def __call__(self, folder: str | Path) -> None:
        """Raise `AssertionError` if the promise is broken."""
        self.run(Path(folder))

    def __str__(self) -> str:
        return f"{self.method}: {self.promise}"


Suite = Callable[[str, str, Mapping[str, Any]], Iterator[Check]]
"""From kind, name and options to the checks of a method."""

_suites: dict[str, Suite] = {}


def suite(*kinds: str) -> Callable[[Suite], Suite]:
    """Decorator: this function gives the checks of the methods of these kinds."""

    def enter(function: Suite) -> Suite:
        _suites.update(dict.fromkeys(kinds, function))
        return function

    return enter


def kinds() -> list[str]:
    """The kinds that have a suite here."""
    return sorted(_suites)


def checks(kind: str, name: str, options: Mapping[str, Any] | None = None) -> list[Check]:
    """The conformance checks of a registered method.

    Parameters
    ----------
    kind
        A kind of the catalog, such as `operation`.
    name
        The name under which the method is registered.
    options
        Options without which the method cannot be tried; by default those that its class states as `sample_options`.

    Raises
    ------
    NotFoundError
        For a kind without a suite, or a name that is not registered.
    """
    if kind not in _suites:
        raise NotFoundError(f"There is no conformance suite for the kind '{kind}'; there is one for {', '.join(kinds())}.")
    implementation = catalog.get(kind, name).implementation
    given = getattr(implementation, "sample_options", {}) if options is None else options
    return list(_suites[kind](kind, name, given))


def check_method(kind: str, name: str, options: Mapping[str, Any] | None = None) -> list[str]:
    """Run the conformance suite of a kind on one registered method.

    Parameters
    ----------
    kind, name, options
        As in `checks`.

    Returns
    -------
    The promises that were checked.

    Raises
    ------
    AssertionError
        With a sentence that names the promise that is broken and how.

    Examples
    --------
    >>> check_method("operation", "linear")[0]
    'options come back from plain values, and a typo is an error that names the nearest'
    """
    found = []
    for check in checks(kind, name, options):
        with tempfile.TemporaryDirectory(prefix="cairn-check-") as folder:
            check(folder)
        found.append(check.promise)
    return found


def choices(implementation: Any) -> Iterator[dict[str, Any]]:
    """Every choice of every option that has choices, one at a time: literals, switches, and lists of literals of one item each."""
    for key, field in implementation.model_fields.items():
        for value in _values(field.annotation):
            yield {key: value}


def _values(annotation: Any) -> list[Any]:
    if annotation is bool:
        return [False, True]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) is list:
        return [[value] for inner in get_args(annotation) for value in _values(inner)]
    return [value for inner in get_args(annotation) for value in _values(inner)]


def demand(condition: object, sentence: str) -> None:
    """Raise `AssertionError` with a sentence unless a condition holds; unlike `assert` it is never compiled away."""
    if not condition:
        raise AssertionError(sentence)


# -- operations ---------------------------------------------------------------------------------------------------

LUGGAGE = {"chat_template.jinja": b"{{ messages }}", "generation_config.json": b'{"eos_token_id": 256}', "tokenizer.model": b"pieces"}
_SIZES = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@suite("operation", "growth", "compression")
def _operations(kind: str, name: str, options: Mapping[str, Any]) -> Iterator[Check]:
    tried = _Tried(kind, name, dict(options))
    promises = [
        ("options come back from plain values, and a typo is an error that names the nearest", tried.options_round_trip),
        ("default options: the same inputs give the same bits, whatever the number of threads, on disk and in memory", tried.deterministic),
        ("default options: names, dtypes, ties, tokenizer and what travels along are kept, and lineage tells", tried.kept),
        ("default options: the result opens in transformers with the same logits", tried.opens),
        ("what does not belong together is refused before anything is written", tried.strangers),
        ("values that are not finite and codes of quantized weights are refused by name, and nothing is written", tried.refusals),
    ]
    yield from (Check(f"{kind} {name}", promise, run) for promise, run in promises)
    for choice in choices(catalog.get(kind, name).implementation):
        yield Check(f"{kind} {name}", f"{choice}: all of this holds for some input, and others are refused cleanly", functools.partial(tried.chosen, choice))


@dataclass(frozen=True)
class _Tried:
    """An operation on trial."""

    kind: str
    name: str
    options: dict[str, Any]

    @property
    def implementation(self) -> Any:
        return catalog.get(self.kind, self.name).implementation

    def method(self, choice: Mapping[str, Any] | None = None) -> Any:
        return configure(self.kind, {"name": self.name, **self.options, **(choice or {})})

    def parents(self, folder: Path, *, whole: bool = False, change: Callable[[int, dict[str, Any]], Any] | None = None) -> list[Path]:
        """Small checkpoints that the operation takes: tied and bfloat16; or, `whole`, untied, float32, with moments and one head for all."""
        return [_checkpoint(folder / f"parent-{i}", i, whole=whole, change=change) for i in range(self.implementation.sample_parents)]

    def made(self, folder: Path, parents: Sequence[Path], out: str, choice: Mapping[str, Any] | None = None, threads: int = 2) -> Any:
        from cairn.checkpoint.operating import stream

        return stream.apply(self.method(choice), parents, folder / out, threads=threads, device="cpu")

    def options_round_trip(self, folder: Path) -> None:
        method = self.method()
        demand(configure(self.kind, method_options(method)) == method, f"{self.name}: its options do not come back from what method_options says of them.")
        known = next(iter(self.implementation.model_fields), None)
        if known is not None:
            try:
                configure(self.kind, {"name": self.name, **self.options, f"{known}x": 1})
            except InputError as error:
                demand(known in str(error), f"{self.name}: the error for '{known}x' does not name '{known}'.")
            else:
                raise AssertionError(f"{self.name} takes an option '{known}x' that it does not have.")

    def deterministic(self, folder: Path, choice: Mapping[str, Any] | None = None, *, whole: bool = False) -> None:
        import torch

        from cairn.checkpoint.format import verify
        from cairn.checkpoint.operating import stream

        parents = self.parents(folder, whole=whole)
        one, other = (self.made(folder, parents, f"threads-{count}", choice, threads=count) for count in (1, 3))
        demand(one.digest == other.digest, f"{self.name}: two runs on the same inputs give different checkpoints.")
        demand(verify.verify(one.path).sound, f"{self.name}: its result is not sound.")
        into = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in one.tensors.items()}
        stream.results(self.method(choice), parents, into)
        differing = next((key for key, tensor in one.tensors.items() if not torch.equal(into[key], tensor.load())), None)
        demand(differing is None, f"{self.name}: '{differing}' is another tensor in memory than on disk.")
        hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        demand(not hidden, f"{self.name} leaves {hidden} behind.")

    def kept(self, folder: Path, choice: Mapping[str, Any] | None = None, *, whole: bool = False) -> None:
        from cairn.checkpoint.format import read

        parents = self.parents(folder, whole=whole)
        result, first = self.made(folder, parents, "out", choice), read.open(parents[0])
        if self.kind != "growth":
            demand(set(result.tensors) == set(first.tensors), f"{self.name}: the result does not have the tensors of the first parent.")
        demand(("lm_head.weight" in result.tensors) == whole, f"{self.name}: a head is stored although the config ties it, or lost where it does not.")
        dtypes = {tensor.dtype for tensor in first.tensors.values()}
        demand({tensor.dtype for tensor in result.tensors.values()} == dtypes, f"{self.name}: the dtypes are not those of the first parent.")
        demand(result.tokenizer.digest == first.tokenizer.digest, f"{self.name}: the tokenizer is another one.")
        for filename, data in LUGGAGE.items():
            there = (result.path / filename).is_file() and (result.path / filename).read_bytes() == data
            demand(there, f"{self.name} loses or changes {filename}.")
        demand(
            [parent.digest for parent in result.lineage.parents] == [read.open(path).digest for path in parents], f"{self.name}: lineage names other parents."
        )
        demand(result.lineage.name == self.name, f"{self.name}: lineage calls it '{result.lineage.name}'.")
        said = self.method(choice).model_dump(mode="json")
        demand(said.items() <= result.lineage.options.items(), f"{self.name}: lineage does not hold its options.")
        model = result.model()
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        demand(tied != whole, f"{self.name}: the model of the result is {'not ' if whole else 'no longer '}tied as its config says.")

    def opens(self, folder: Path, choice: Mapping[str, Any] | None = None, *, whole: bool = False) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            return
        import torch

        result = self.made(folder, self.parents(folder, whole=whole), "out", choice)
        theirs = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32, local_files_only=True).eval()
        ids = torch.arange(10)[None]
        with torch.no_grad():
            apart = float((theirs(ids).logits - result.model(dtype=torch.float32)(ids).logits).abs().max())
        demand(apart < 1e-5, f"{self.name}: transformers computes logits that are {apart:.1e} apart.")

    def strangers(self, folder: Path) -> None:
        import torch

        def other_shape(number: int, tensors: dict[str, Any]) -> None:
            if number == self.implementation.sample_parents - 1:
                tensors["model.norm.weight"] = torch.ones(7)

        if self.implementation.sample_parents > 1:
            self._refused(folder, self.parents(folder, change=other_shape), "model.norm.weight", "a parent of another shape")
        for path in [*folder.iterdir()]:
            shutil.rmtree(path)
        parents = self.parents(folder)
        self._refused(folder, [*parents[:-1], folder / "nowhere"], "nowhere", "a parent that is not there")

    def refusals(self, folder: Path) -> None:
        import torch

        def with_nan(number: int, tensors: dict[str, Any]) -> None:
            tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")

        def as_codes(number: int, tensors: dict[str, Any]) -> None:
            tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)

        for change, words, what in ((with_nan, "finite|up_proj|block", "a parent that holds nan"), (as_codes, "up_proj", "a parent in float8")):
            self._refused(folder, self.parents(folder, change=change), words, what)
            for path in [*folder.iterdir()]:
                shutil.rmtree(path)

    def chosen(self, choice: Mapping[str, Any], folder: Path) -> None:
        accepted = 0
        for whole in (False, True):
            inside = folder / ("whole" if whole else "plain")
            inside.mkdir()
            parents = self.parents(inside, whole=whole)
            before = {path.name for path in inside.iterdir()}
            try:
                self.made(inside, parents, "out", choice)
            except CairnError:
                demand({path.name for path in inside.iterdir()} == before, f"{self.name} with {choice} refuses its inputs and leaves something behind.")
                continue
            accepted += 1
            for promise in (self.deterministic, self.kept):
                place = folder / f"{promise.__name__}-{whole}"
                place.mkdir()
                promise(place, choice, whole=whole)
        demand(accepted, f"{self.name} with {choice} takes none of the inputs that the suite has.")

    def _refused(self, folder: Path, parents: Sequence[Path], words: str, what: str) -> None:
        import re

        before = {path.name for path in folder.iterdir()}
        try:
            self.made(folder, parents, "out")
        except CairnError as error:
            demand(re.search(words, str(error)), f"{self.name} refuses {what} with '{error}', which does not name what is wrong.")
        except Exception as error:  # anything else is the broken promise itself
            raise AssertionError(f"{self.name} fails on {what} with {type(error).__name__} instead of refusing it in a sentence.") from error
        else:
            raise AssertionError(f"{self.name} takes {what}.")
        demand({path.name for path in folder.iterdir()} == before, f"{self.name} refuses {what} and leaves something behind.")


def _checkpoint(path: Path, seed: int, *, whole: bool, change: Callable[[int, dict[str, Any]], Any] | None) -> Path:
    """A small checkpoint: a tied bfloat16 one, or a whole training state in float32 with a head that all seeds share."""
    import torch

    from cairn.checkpoint.format.lineage import Lineage
    from cairn.checkpoint.saving import write
    from cairn.data.text.tokenizer import byte_level

    architecture = configure("architecture", {"name": "llama", **_SIZES, "tie_word_embeddings": not whole})
    tensors = {name: p.detach().to(torch.float32 if whole else torch.bfloat16) for name, p in architecture.build(seed).named_parameters()}
    if whole:
        tensors["lm_head.weight"] = architecture.build(0).state_dict()["lm_head.weight"]
    if change is not None:
        change(seed, tensors)
    moments = {f"{name}/{key}": tensor.abs() for name, tensor in tensors.items() for key in ("exp_avg", "exp_avg_sq")} if whole else None
    writer_options = {"config": architecture.to_hf(), "lineage": Lineage(kind="run", name="train"), "tokenizer": _Packed(byte_level()), "optimizer": moments}
    write.save(path, model=tensors, **writer_options)
    return path


@dataclass(frozen=True)
class _Packed:
    """A tokenizer with everything that travels beside it."""

    tokenizer: Any

    def files(self) -> dict[str, bytes]:
        return {**self.tokenizer.files(), **LUGGAGE}
