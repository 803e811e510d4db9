"""What every operation promises: the same bits each time, everything kept that people take away, strangers refused before anything is written."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cairn import catalog
from cairn.errors import CairnError
from cairn.options import configure
from cairn.testing.suites import Check, choices, demand, options_round_trip, suite

LUGGAGE = {"chat_template.jinja": b"{{ messages }}", "generation_config.json": b'{"eos_token_id": 256}', "tokenizer.model": b"pieces"}
_SIZES = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@suite("operation", "growth", "compression", "adaptation")
def _operations(kind: str, name: str, options: Mapping[str, Any]) -> Iterator[Check]:
    tried = (_TriedOnAdapters if kind == "adaptation" else _Tried)(kind, name, dict(options))
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
        options_round_trip(self.kind, self.name, self.options)

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


class _TriedOnAdapters(_Tried):
    """One that takes a base and an adapter of it."""

    def parents(self, folder: Path, *, whole: bool = False, change: Callable[[int, dict[str, Any]], Any] | None = None) -> list[Path]:
        base = _checkpoint(folder / "base", 0, whole=whole, change=change)
        return [base, _adapter(folder / "adapter", base)]

    def strangers(self, folder: Path) -> None:
        """An adapter of another base, one that changes a matrix of another shape, two bases, two adapters, one that is not there."""
        parents = self.parents(folder)
        other = _checkpoint(folder / "other", 1, whole=False, change=None)
        misfit = _adapter(folder / "misfit", parents[0], rows=7)
        self._refused(folder, [other, parents[1]], "was trained on the model", "an adapter of another base")
        self._refused(folder, [parents[0], misfit], "shape|another model|is \\(", "an adapter of other shapes")
        self._refused(folder, [parents[0], other], "a base and an adapter", "two whole models")
        self._refused(folder, [parents[1], parents[1]], "a base and an adapter", "two adapters")
        self._refused(folder, [parents[0], folder / "nowhere"], "nowhere", "an adapter that is not there")

    def refusals(self, folder: Path) -> None:
        super().refusals(folder)
        parents = self.parents(folder)
        broken = _adapter(folder / "broken", parents[0], value=float("nan"))
        self._refused(folder, [parents[0], broken], "finite|_proj", "an adapter that holds nan")


def _adapter(path: Path, base: Path, *, rows: int | None = None, value: float | None = None) -> Path:
    """An adapter checkpoint of a base, with changes that are not zero; `rows` and `value` spoil one of its tensors."""
    import torch

    from cairn.checkpoint.format import adapter as adapters
    from cairn.checkpoint.format import read
    from cairn.checkpoint.format.lineage import Lineage
    from cairn.checkpoint.saving.write import Writer, spec_of
    from cairn.models.adapters.container import attach

    opened = read.open(base)
    config = {**opened.config, "dtype": "float32"}
    model = catalog.get("architecture", str(config["model_type"])).implementation.from_hf(config).build(0)
    adapted = attach(model, configure("adapter", {"name": "lora", "rank": 2, "targets": ["attention", "down"]}), seed=0)
    tensors = {name: torch.full_like(tensor, 0.02) + tensor for name, tensor in adapted.tensors().items()}
    first = next(iter(tensors))
    if rows is not None:
        tensors[first] = torch.ones(tensors[first].shape[0], rows)
    if value is not None:
        tensors[first][0, 0] = value
    with Writer(path) as writer:
        for name, document in {"config.json": opened.config, adapters.CONFIG: adapted.config(), adapters.BASE: adapters.base_document(opened)}.items():
            writer.put_json(name, document)
        writer.declare(adapters.STEM, [spec_of(name, tensor) for name, tensor in tensors.items()], None)
        writer.put_all({adapters.STEM: tensors})
        writer.publish(Lineage(kind="run", name="train"))
    return path


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
