"""Text: sequences of tokens from documents, in one global order; the default field, which needs no naming."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from blake3 import blake3
from pydantic import Field

from cairn.catalog import register
from cairn.checkpoint.operating.sameness import vocabulary_digest
from cairn.data.text.metadata import Metadata
from cairn.device import choose
from cairn.errors import InputError, NotExplained, Notice
from cairn.models.config import LanguageModelConfig
from cairn.options import Method
from cairn.training.fields import DataField, Source, answers
from cairn.training.objectives import Objective, Setting

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint
    from cairn.data.text.feed import TextFeed
    from cairn.data.text.tokenizer import Tokenizer
    from cairn.models.config import Network


PROMPT = "The first stone of the trail is"
"""What a model is asked where nobody says what."""


class TextSource(Source):
    """One source of documents in the mixture."""

    corpus: Any
    """A corpus: a catalog name (`python-docs`), a path (`books/*.jsonl`), or a mapping with `name` and its options."""


@register("field", "text")
class Text(DataField):
    """Token sequences from documents: what the model reads, and in what shape."""

    unit: ClassVar[Literal["tokens", "samples"]] = "tokens"
    gives: ClassVar[frozenset[str]] = frozenset({"tokens"})
    preprocessor_file: ClassVar[str] = "tokenizer.json"
    noun: ClassVar[str] = "sequences"
    source_key: ClassVar[str] = "corpus"
    measurement: ClassVar[str] = "held-out"

    sources: dict[str, TextSource]
    tokenizer: Any = "byte"
    """`byte`, `{bpe: 4096}` (trained on the sources), or the path of a tokenizer or checkpoint."""
    sequence_length: int = Field(256, ge=1)
    packing: Literal["joined", "whole", "complete"] = "joined"
    """`joined`: documents one after the other, cut at the window; `whole`: no document is cut where it fits; `complete`: in their
    order, what no longer fits a window is left out."""
    documents: Literal["attend", "mask"] = "attend"
    """Whether attention may cross from one document into the previous one in the same window."""
    filters: list[Annotated[Any, Method("filter")]] = []
    """Which sequences count in the loss: one that a filter does not keep is read and has weight 0."""
    metadata: Metadata | None = None
    """What stands in front of documents, and until when."""

    @property
    def sample_units(self) -> int:
        return self.sequence_length

    @property
    def size_key(self) -> str:
        return "data.sequence_length"

    def pinned(self, batch: int, total: int) -> Self:
        metadata = self.metadata.pinned(batch, total) if self.metadata is not None else None
        return super().pinned(batch, total).model_copy(update={"metadata": metadata})

    def counted_on(self, batch: int, units: int, length: int) -> Self:
        metadata = self.metadata
        if metadata is not None and metadata.until.unit == "%":
            metadata = metadata.pinned(batch, length)  # counted from where the stage's own data begin
        return super().counted_on(batch, units, length).model_copy(update={"metadata": metadata})

    def open(
        self, seed: int, preprocessor: Tokenizer | None = None, *, objective: Objective | None = None, progress: Callable[..., Any] | None = None
    ) -> tuple[Tokenizer, TextFeed]:
        """The tokenizer, with the special tokens of the objective added, and the sequences; token files are prepared, or taken from the cache."""
        from cairn.data.text.feed import SourceSpec, TextFeed
        from cairn.data.text.tokenizer import resolve_tokenizer
        from cairn.data.text.tokens import Selection, TokenStore, prepare_cached

        tokenizer = preprocessor or resolve_tokenizer(self.tokenizer, [source.corpus for source in self.sources.values()])
        tokenizer = tokenizer.extended(objective.special_tokens() if objective is not None else ())
        metadata, tail = self.metadata, (self.metadata.reserved or 0.0) if self.metadata is not None else 0.0

        def store(name: str, after: bool) -> TokenStore:
            """A source's documents; those of the cooldown are of their own and have no metadata."""
            selection = None
            if metadata is not None:
                selection = Selection(None if after else metadata, (("source", name),), (1 - tail, 1.0) if after else (0.0, 1 - tail))
            return prepare_cached(self.sources[name].corpus, tokenizer, held_out=self.held_out, progress=progress, selection=selection)

        specs = []
        for name, weight in self.first_weights.items():
            part = self.sources[name].subset
            specs.append(SourceSpec(name, store(name, False), weight, part and -(-part // self.sequence_length), store(name, True) if tail else None))
        switch = metadata.until.units(self.sequence_length) // self.sequence_length if metadata is not None and tail else None
        feed = TextFeed(specs, self.sequence_length, seed, packing=self.packing, documents=self.documents, filters=self.filters, switch=switch)
        if self.held_out > 0:
            self._warn_without_held_out(feed)
        return tokenizer, feed

    def _warn_without_held_out(self, feed: TextFeed) -> None:
        """Say at the start what would otherwise be found out when something is measured."""
        if any(len(source.store.held_out.tokens) > self.sequence_length for source in feed.sources):
            return
        stores = [source.store for source in feed.sources]
        documents = sum(len(split.starts) for store in stores for split in (store.train, store.held_out))
        warnings.warn(
            f"Nothing can be measured on held-out text: of {documents} documents a share of {self.held_out:g} gives less than one sequence. A larger "
            "data.held_out, a separator that cuts the files into more documents, or a smaller data.sequence_length helps; data.held_out=0 trains on all.",
            Notice,
            stacklevel=2,
        )

    def fill(self, model: Network, preprocessor: Tokenizer) -> dict[str, Any]:
        """The model's vocabulary, end-of-text id and positions."""
        assert isinstance(model, LanguageModelConfig)  # the recipe has looked
        given = model.model_fields_set
        found = {"vocab_size": preprocessor.vocab_size, **model.special_ids(preprocessor.eos_id)}
        found = {key: value for key, value in found.items() if key not in given}
        if (found.get("vocab_size") or model.vocab_size) < preprocessor.vocab_size:
            raise InputError(
                f"model.vocab_size ({model.vocab_size}) is smaller than the tokenizer's vocabulary ({preprocessor.vocab_size}); "
                "leave it out to take the tokenizer's, or leave room for the objective's special tokens when a model is begun."
            )
        longest: int | None = getattr(model, "max_position_embeddings", None)  # T5 has no such bound
        before = getattr(model, "positions_before", 0)
        if longest is not None and self.sequence_length > longest - before:
            if "max_position_embeddings" in given:
                behind = f" less the {before} before a text" if before else ""
                raise InputError(f"data.sequence_length ({self.sequence_length}) is longer than model.max_position_embeddings ({longest}){behind}.")
            found["max_position_embeddings"] = self.sequence_length + before
        return found

    def setting(self, model: Network, preprocessor: Tokenizer) -> Setting:
        return Setting(preprocessor, model, self.sequence_length, self.documents == "mask" or self.packing != "joined")

    @classmethod
    def load_preprocessor(cls, path: Path) -> Tokenizer:
        from cairn.data.text.tokenizer import Tokenizer

        return Tokenizer.load(path)

    def unit_flops(self, model: Network, objective: Objective) -> float:
        """As `LanguageModelConfig.flops_per_token`, attention over all pairs. Of an encoder-decoder the objective says how many of the tokens of a
        sequence are read and how many are said, padding included."""
        assert isinstance(model, LanguageModelConfig)
        if not model.encoder_decoder:
            return model.flops_per_token(self.sequence_length, causal=False)
        return 3 * model.pair_flops(*objective.sizes(self.sequence_length), causal=False) / self.sequence_length

    def training_memory(self, model: Network, units: int, precision: Literal["float32", "bfloat16"]) -> dict[str, int]:
        assert isinstance(model, LanguageModelConfig)
        return model.training_memory(units // self.sequence_length, self.sequence_length, precision=precision)

    @classmethod
    def sample_recipe(cls, folder: Path) -> dict[str, Any]:
        chooser, words = random.Random(0), f"{PROMPT.lower()} marks way walked before and can again who comes after rain".split()
        lines = ["\n".join(f"{' '.join(chooser.sample(words, chooser.randint(6, 12)))}." for _ in range(chooser.randint(2, 6))) for _ in range(300)]
        lines = [line.replace(" rain ", " (rain again) ").replace(" trail ", " [trail] ") for line in lines]
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        return {
            "model": {"name": "llama", **sizes},
            "data": {"tokenizer": "byte", "sources": {"texts": {"corpus": str(folder / "texts.jsonl")}}, "sequence_length": 32, "held_out": 0.1},
            "training": {"batch": 256},
        }

    @classmethod
    def signature(cls, checkpoint: Checkpoint) -> dict[str, list[dict[str, Any]]]:
        config = checkpoint.config
        if any("Classification" in str(name) for name in config.get("architectures") or []) and not config.get("id2label"):
            raise NotExplained(f"{checkpoint.path}: config.json has no id2label, so nobody knows which class an output is.", "outputs")
        if checkpoint.tokenizer is None:
            raise NotExplained(f"{checkpoint.path} has no tokenizer.json, so nobody knows which text an id is.", "tokenizer")
        tokenizer, width = checkpoint.tokenizer, int(config["vocab_size"])
        made_by = vocabulary_digest(checkpoint)
        longest = config.get("max_position_embeddings")
        ids = {
            **{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"], "longest_sequence": longest},
            **{"values": f"ids of tokens, 0 to {width - 1}", "made_by": f"tokenizer.json{f' {made_by[:12]}' if made_by else ''}"},
            "named_ids": tokenizer.vocab_size,
        }
        axes = ["one text of the batch", "position: scores for the token AFTER it", f"token: id 0 to {width - 1} in the tokenizer's vocabulary"]
        logits = {
            **{"name": "logits", "dtype": "float32", "shape": ["batch", "sequence", "vocabulary"], "axes": axes},
            "units": "natural logarithm of unnormalised probability; softmax over the last axis gives probabilities",
        }
        return {"inputs": [ids], "outputs": [logits]}

    @classmethod
    def example(cls, checkpoint: Checkpoint, prompt: str | None, device: Any = None) -> dict[str, Any]:
        import torch

        tokenizer, prompt = checkpoint.tokenizer, prompt or PROMPT
        ids = tokenizer.encode(prompt)
        if not ids:
            raise NotExplained(f"{checkpoint.path}: its tokenizer makes no token of {prompt!r}.", "tokenizer")
        place = choose(device)
        with torch.no_grad():
            scores = checkpoint.model(dtype=torch.float32, device=place)(torch.tensor([ids], device=place)).logits[0, -1]
        found = answers(scores, lambda number: str(tokenizer.decode([number])))
        return {"prompt": prompt, "input_ids": ids, "input_digest": blake3(repr(ids).encode()).hexdigest(), **found}
