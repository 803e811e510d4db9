"""The field `words`: sentences of which each word has a tag (parts of speech, names), in one global order.

A sample is a sentence. Which one stands at a position depends on (seed, position) alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import Field

from cairn import catalog
from cairn.catalog import register
from cairn.data.order.feed import Feed
from cairn.device import choose
from cairn.errors import InputError, MismatchError, NotExplained, suggestion
from cairn.fields.words.families import WordNetwork
from cairn.fields.words.processor import EMPTY, FILE, HIDDEN, WordProcessor
from cairn.fields.words.sentence_sets import UNTAGGED, SentenceSet, open_sentences
from cairn.models.config import architecture
from cairn.randomness import bits, seed_for
from cairn.training.fields import DataField, Source, answers
from cairn.training.objectives import Setting

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint
    from cairn.models.config import Network
    from cairn.training.objectives import Objective

PROMPT = "The first stone of the trail is"
"""What a model is asked where nobody says what."""


class SentenceSource(Source):
    """One source of tagged sentences in the mixture."""

    sentences: str
    """A `.jsonl` file of `words` and `tags`, a `.conllu` treebank, or a named data set."""
    file: str | None = None
    """Which file of a named data set."""


@dataclass(frozen=True)
class SentenceSamples:
    """n sentences, padded to the longest of them: `inputs` of a model by name (`pieces`, (n, T, G): the numbers of each word's pieces, padded with 0;
    `lengths`, (n,)), `tags` (n, T), -1 where there is none; `source` and `index` (n,): where each comes from; `keys` (n,): a random number of each
    sentence's own, from (seed, position)."""

    inputs: dict[str, NDArray[np.int64]]
    tags: NDArray[np.int64]
    source: NDArray[np.int64]
    index: NDArray[np.int64]
    keys: NDArray[np.uint64]
    kept: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class OpenedSource:
    """A source that was opened: its sentences by number, the pieces of its words, and which sentences train and which are held out."""

    name: str
    weight: float
    subset: int | None
    found: SentenceSet
    pieces: tuple[NDArray[np.int64], NDArray[np.int64]]
    tags: NDArray[np.int64]
    """The number of each word's tag among those of all sources."""
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


class SentenceFeed(Feed):
    """Tagged sentences from several sources in one global order; `classes` are the tags of all of them."""

    noun: ClassVar[str] = "sentences"

    def __init__(self, sources: Sequence[OpenedSource], classes: Sequence[str], seed: int) -> None:
        """Raises `InputError` for a source without a sentence to train on, or with fewer than its subset."""
        super().__init__(sources, seed)
        self.classes = list(classes)
        for source in self.sources:
            if not len(source.train):
                raise InputError(f"The source '{source.name}' has no sentence to train on; lower data.held_out or add sentences.")
            if source.subset is not None and source.subset > len(source.train):
                raise InputError(f"The source '{source.name}' has {len(source.train)} sentences; a subset of {source.subset} is none.")

    @property
    def epoch_samples(self) -> dict[str, int]:
        return {source.name: source.subset or len(source.train) for source in self.sources}

    def samples(self, positions: NDArray[np.int64]) -> SentenceSamples:
        positions = np.asarray(positions, dtype=np.int64)
        which, draws = self.mixture.draws(positions)
        index = np.empty_like(draws)
        for number, source in enumerate(self.sources):
            mine = which == number
            index[mine] = source.train[self.numbers(source, source.name, len(source.train), draws[mine])]
        return self.gathered(which, index, self.keys(positions))

    def evenly(self, samples: int, split: Literal["train", "held_out"]) -> SentenceSamples:
        parts = [source.train if split == "train" else source.held_out for source in self.sources]
        which, places = self.spread([len(part) for part in parts], samples, split)
        index = np.array([parts[number][place] for number, place in zip(which, places, strict=True)], np.int64)
        return self.gathered(which, index, bits(seed_for(0, split), np.arange(len(which))))

    def digests(self) -> dict[str, str]:
        return {source.name: source.found.digest for source in self.sources}

    def gathered(self, which: NDArray[np.int64], index: NDArray[np.int64], keys: NDArray[np.uint64]) -> SentenceSamples:
        """The sentences of these numbers of these sources."""
        pairs = [(self.sources[number], place) for number, place in zip(which.tolist(), index.tolist(), strict=True)]
        ends = [(source.found.starts[number], source.found.starts[number + 1]) for source, number in pairs]
        lengths = np.array([end - begin for begin, end in ends], np.int64)
        words = [source.found.numbers[begin:end] for (source, _), (begin, end) in zip(pairs, ends, strict=True)]
        sizes = [source.pieces[1][row + 1] - source.pieces[1][row] for (source, _), row in zip(pairs, words, strict=True)]
        longest, widest = int(lengths.max(initial=1)), max((int(row.max()) for row in sizes), default=1)
        pieces = np.full((len(which), longest, widest), EMPTY, np.int64)
        tags = np.full((len(which), longest), UNTAGGED, np.int64)
        for place, (source, _) in enumerate(pairs):
            (begin, end), row, size = ends[place], words[place], sizes[place]
            there = np.arange(widest) < size[:, None]
            flat, starts = source.pieces
            pieces[place, : end - begin][there] = flat[(starts[row][:, None] + np.arange(widest))[there]]
            tags[place, : end - begin] = source.tags[begin:end]
        return SentenceSamples({"pieces": pieces, "lengths": lengths}, tags, which, index, keys)


@register("field", "words")
class Words(DataField):
    """Sentences of tagged words; progress counts samples, each a sentence, and the word processor travels in every checkpoint."""

    gives: ClassVar[frozenset[str]] = frozenset({"words", "tags"})
    preprocessor_file: ClassVar[str] = FILE
    noun: ClassVar[str] = "sentences"
    source_key: ClassVar[str] = "sentences"
    measurement: ClassVar[str] = "tag-accuracy"

    sources: dict[str, SentenceSource]
    held_out: float = Field(0.1, ge=0, lt=1)
    """Share of the sentences kept out of training, chosen by their content."""
    longest: int = Field(256, ge=1)
    """Words of a sentence that are read; what goes beyond is left out."""
    buckets: int = Field(2**14, ge=1, le=2**24)
    """Numbers into which pieces of words are hashed."""
    pieces: tuple[int, int] = (3, 5)
    """Letters of the shortest and of the longest piece of a word."""

    def open(
        self, seed: int, preprocessor: WordProcessor | None = None, *, objective: Objective | None = None, progress: Callable[..., Any] | None = None
    ) -> tuple[WordProcessor, SentenceFeed]:
        """The word processor and the sentences. With the processor of a checkpoint, tags have the numbers that they have there."""
        if not 1 <= self.pieces[0] <= self.pieces[1] <= 16:
            raise InputError(f"data.pieces={list(self.pieces)} has to give the shortest and the longest piece, of 1 to 16 letters.")
        opened = {name: open_sentences(source.sentences, source.file, self.longest) for name, source in self.sources.items()}
        processor = preprocessor or WordProcessor(self.buckets, self.pieces)
        classes = self._classes(opened, processor)
        if preprocessor is None:
            processor = processor.knowing(classes)
        return processor, SentenceFeed([self._source(name, found, classes, processor) for name, found in opened.items()], classes, seed)

    def _classes(self, opened: Mapping[str, SentenceSet], processor: WordProcessor) -> list[str]:
        """The tags of all sources in the order of the sources' names, or those that the processor's checkpoint knows."""
        found = sorted(dict.fromkeys(name for source in sorted(opened) for name in opened[source].classes))
        if not processor.classes:
            return found
        strange = [name for name in found if name not in processor.classes]
        if strange:
            raise MismatchError(
                f"The sentences have the tag '{strange[0]}', which the checkpoint does not know.{suggestion(strange[0], processor.classes)} "
                f"It has {len(processor.classes)} tags: {', '.join(processor.classes[:10])}{' ...' if len(processor.classes) > 10 else ''}."
            )
        return list(processor.classes)

    def _source(self, name: str, found: SentenceSet, classes: Sequence[str], processor: WordProcessor) -> OpenedSource:
        kept_out = found.keys < np.uint64(min(self.held_out * 2.0**64, 2.0**64 - 2048))
        places = {tag: number for number, tag in enumerate(classes)}
        numbers = np.array([*(places[tag] for tag in found.classes), UNTAGGED], np.int64)  # the last stands for none
        train, held_out = np.flatnonzero(~kept_out).astype(np.int64), np.flatnonzero(kept_out).astype(np.int64)
        return OpenedSource(
            name, self.first_weights[name], self.sources[name].subset, found, processor.table(found.vocabulary), numbers[found.tags], train, held_out
        )

    def fill(self, model: Network, preprocessor: WordProcessor) -> dict[str, Any]:
        """The model's numbers of pieces and its tags."""
        labels = {str(number): name for number, name in enumerate(preprocessor.classes)}
        data = {key: value for key, value in {"vocab_size": preprocessor.vocab_size, "id2label": labels}.items() if key in type(model).model_fields}
        for key in model.model_fields_set & set(data):
            if (given := getattr(model, key)) != data[key]:
                said = [f"{len(each)} tags ({', '.join(list(each.values())[:3])} ...)" if isinstance(each, dict) else each for each in (given, data[key])]
                raise InputError(f"model.{key} is {said[0]}, and the data have {said[1]}; leave it out to take the data's.")
        return {key: value for key, value in data.items() if key not in model.model_fields_set}

    def setting(self, model: Network, preprocessor: WordProcessor) -> Setting:
        return Setting(preprocessor, model)

    @classmethod
    def load_preprocessor(cls, path: Path) -> WordProcessor:
        return WordProcessor.load(path)

    @classmethod
    def sample_recipe(cls, folder: Path) -> dict[str, Any]:
        words, rows = PROMPT.lower().split(), []
        for number in range(160):
            tags = [("noun", "verb", None)[(number * 5 + place * (number + 1)) % 3] for place in range(1 + number % 9)]
            rows.append({"words": [f"{words[(number + place) % 7]}{tag or 'x'}" for place, tag in enumerate(tags)], "tags": tags})
        (folder / "tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {
            "model": {"name": "gru-tagger", "hidden_size": 8},
            "data": {"name": "words", "sources": {"tagged": {"sentences": str(folder / "tagged.jsonl")}}, "held_out": 0.2, "buckets": 256},
            "objective": "token-classification",
            "training": {"batch": 32, "micro_batch": 16},
        }

    @classmethod
    def signature(cls, checkpoint: Checkpoint) -> dict[str, list[dict[str, Any]]]:
        family, processor = _family(checkpoint), _processor(checkpoint)
        numbers = f"numbers of the pieces of each word, 0 to {processor.vocab_size - 1}; 0: nothing, {HIDDEN}: a word that is not to be seen"
        pieces = {"name": "pieces", "dtype": "int64", "shape": ["batch", "word", "piece"], "values": numbers, "made_by": FILE}
        lengths = {"name": "lengths", "dtype": "int64", "shape": ["batch"], "values": "words of each sentence"}
        return {"inputs": [pieces, lengths], "outputs": family.outputs()}

    @classmethod
    def example(cls, checkpoint: Checkpoint, prompt: str | None, device: Any = None) -> dict[str, Any]:
        """`prompt` is a sentence, its words parted by blanks; `top` are the tags of its last word, `tags` has the tag of each."""
        import torch

        family, processor, words = _family(checkpoint), _processor(checkpoint), (prompt or PROMPT).split()
        if not words:
            raise NotExplained(f"{checkpoint.path}: there is no word in {prompt!r}.", "model-understanding")
        rows = [processor(word) for word in words]
        pieces = torch.tensor([[row + [EMPTY] * (max(map(len, rows)) - len(row)) for row in rows]])
        place = choose(device)
        with torch.no_grad():
            logits = checkpoint.model(dtype=torch.float32, device=place)(pieces.to(place), torch.tensor([len(words)]))[0].cpu()
        if not bool(logits.isfinite().all()):
            raise InputError(f"{checkpoint.path}: its scores are not finite numbers, so it tags no word; check its weights.")
        tags = [family.classes[number] for number in logits.argmax(1).tolist()]
        digest = blake3(repr(rows).encode()).hexdigest()
        return {
            "prompt": prompt or PROMPT,
            "input_digest": digest,
            "tags": list(zip(words, tags, strict=True)),
            **answers(logits[-1], family.classes.__getitem__),
        }

    def unit_flops(self, model: Network, objective: Objective) -> float:
        """Of a sentence of `longest` words, which is the most that one costs: forward once, backward twice the forward."""
        return 3.0 * cast(WordNetwork, model).sentence_flops(self.longest)

    def training_memory(self, model: Network, units: int, precision: Literal["float32", "bfloat16"]) -> dict[str, int]:
        count = model.parameter_count()
        return {
            "weights": 4 * count,
            "gradients": 4 * count,
            "optimizer": 8 * count,
            "activations": cast(WordNetwork, model).activation_bytes(units, self.longest, precision),
        }


def _family(checkpoint: Checkpoint) -> Any:
    """What the config.json of a checkpoint describes. Raises `NotExplained` for a family that is not known here."""
    name = str(checkpoint.config.get("model_type"))
    known = catalog.get("architecture", name).implementation if catalog.has("architecture", name) else None
    if known is None or not issubclass(known, WordNetwork):
        raise NotExplained(f"{checkpoint.path} is a '{name}', whose inputs and outputs are not known here.", "model-understanding")
    if not checkpoint.config.get("id2label"):
        raise NotExplained(f"{checkpoint.path}: config.json has no id2label, so nobody knows which tag an output is.", "outputs")
    return architecture(checkpoint.config)


def _processor(checkpoint: Checkpoint) -> WordProcessor:
    found = Words.preprocessor_of(checkpoint)
    if found is None:
        raise NotExplained(f"{checkpoint.path} has no {FILE}, so nobody knows how a word becomes its input.", "model-understanding")
    return cast(WordProcessor, found)
