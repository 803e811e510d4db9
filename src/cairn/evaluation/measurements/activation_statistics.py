"""Activation statistics: how large and how uneven is what the matrices of a model read, and where outliers lie.

For the inputs X (tokens, channels) of every matrix in every block, over a calibration set:

    kurtosis = m4 / m2^2 - 3 over all entries, m the central moments       (0 for a normal distribution)
    outliers = share of entries with |x| > 6                               ("LLM.int8()", section 3.1)
    an outlier channel is one whose largest |x| is more than 20 times the median channel's

Outliers decide how well a model can be quantized. The model is taken block by block and never lies in memory whole; sums are kept, not
activations.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from blake3 import blake3
from pydantic import Field
from torch import Tensor, nn

from cairn import cache
from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.calibrated import Visit, walk
from cairn.checkpoint.operating.work import Work
from cairn.data import corpora
from cairn.data.text.calibration import calibration
from cairn.device import choose
from cairn.evaluation.measure import Measurement, Score
from cairn.models.anatomy import anatomy
from cairn.models.blockwise import Blockwise
from cairn.options import Bytes, Count, method_options

THRESHOLD = 6.0
"""Size from which an entry counts as an outlier."""
FACTOR = 20.0
"""How many times the median channel's largest entry makes a channel an outlier."""


@dataclass(frozen=True)
class Statistics:
    """Of the inputs of one matrix: sums over tokens, float64. `powers` (texts, 4) are sums of x, x^2, x^3, x^4 over all entries of each text,
    `above` (texts,) counts entries beyond the threshold, `largest` (texts,) is the largest |x|; `channel_max` and `channel_squares`
    (channels,) are the largest |x| and the mean of x^2 of each channel; `tokens` is how many tokens each text has."""

    powers: Tensor
    above: Tensor
    largest: Tensor
    channel_max: Tensor
    channel_squares: Tensor
    tokens: int

    @property
    def entries(self) -> int:
        """Entries of one text."""
        return self.tokens * len(self.channel_max)

    def kurtosis(self, text: int | None = None) -> float:
        """Excess kurtosis over all entries, of one text or of all."""
        powers = self.powers.sum(0) if text is None else self.powers[text]
        return kurtosis(powers / (self.entries * (len(self.powers) if text is None else 1)))

    def outlier_channels(self) -> list[int]:
        """The numbers of the channels that are outliers."""
        return [int(i) for i in (self.channel_max > FACTOR * self.channel_max.median()).nonzero().flatten()]


def kurtosis(moments: Tensor) -> float:
    """Excess kurtosis of the raw moments (4,): means of x, x^2, x^3, x^4; 0 where nothing varies.

    Examples
    --------
    >>> kurtosis(torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64))
    0.0
    """
    m1, m2, m3, m4 = moments.tolist()
    variance = m2 - m1**2
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return fourth / variance**2 - 3 if variance > 0 else 0.0


class Looking(Visit):
    """Sums over what each matrix of a block reads."""

    changes: ClassVar[bool] = False

    def __init__(self) -> None:
        self._found: dict[str, dict[str, list[Tensor]]] = {}

    def observe(self, weight: str, inputs: Tensor) -> None:
        wide = inputs.detach().double()
        size = wide.abs()
        rows = self._found.setdefault(weight, {"powers": [], "above": [], "largest": [], "channel_max": [], "channel_squares": []})
        rows["powers"].append(torch.stack([wide.pow(power).sum((1, 2)) for power in (1, 2, 3, 4)], 1).cpu())
        rows["above"].append((size > THRESHOLD).sum((1, 2)).double().cpu())
        rows["largest"].append(size.amax((1, 2)).cpu())
        rows["channel_max"].append(size.amax((0, 1))[None].cpu())
        rows["channel_squares"].append(wide.square().sum((0, 1))[None].cpu())
        self._tokens = inputs.shape[1]

    def decide(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {f"{weight}/{key}": values for weight, found in self.found().items() for key, values in vars(found).items() if isinstance(values, Tensor)}

    def found(self) -> dict[str, Statistics]:
        """The statistics by the name of the weight."""
        return {weight: self._of(rows) for weight, rows in self._found.items()}

    def _of(self, rows: Mapping[str, list[Tensor]]) -> Statistics:
        each = {key: torch.cat(values) for key, values in rows.items()}
        squares = each["channel_squares"].sum(0) / (self._tokens * len(each["above"]))
        return Statistics(each["powers"], each["above"], each["largest"], each["channel_max"].amax(0), squares, self._tokens)


def of_checkpoint(
    checkpoint: Checkpoint,
    ids: Tensor,
    folder: Path,
    *,
    micro_batch: int = 8,
    memory: int = 2**30,
    device: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Statistics]:
    """The statistics of every matrix of a checkpoint's blocks by the name of its weight, block by block.

    Parameters
    ----------
    checkpoint
        Any causal language model.
    ids
        Token ids (texts, length), int64.
    folder
        Where finished blocks are kept, so that a walk that was cut short goes on.
    micro_batch, memory
        Texts that pass at a time, and bytes of hidden states that may be held.
    device
        Where blocks are computed; default: the accelerator if there is one.
    progress
        Told (blocks done, blocks in all).
    """
    where = choose(device)
    key = blake3(json.dumps([checkpoint.model_digest, list(ids.shape), micro_batch, str(where), torch.__version__]).encode() + ids.numpy().tobytes())
    work = Work(folder, key.hexdigest())
    try:
        walk(Blockwise(checkpoint, device=where), ids, lambda _: Looking(), work, micro_batch=micro_batch, memory=memory, progress=progress)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, lazy in work.tensors.items():
            weight, _, key_of = name.rpartition("/")
            parts.setdefault(weight, {})[key_of] = lazy.load()
        work.remove()
    finally:
        work.close()
    return {weight: Statistics(**found, tokens=ids.shape[1]) for weight, found in parts.items()}


@register(
    "measurement",
    "activation-statistics",
    paper=(
        Paper("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", "arXiv:2208.07339"),
        Paper("Outliers and Calibration Sets have Diminishing Effect on Quantization of Modern LLMs", "arXiv:2405.20835", card=77),
    ),
)
class ActivationStatistics(Measurement):
    """Size, kurtosis and outliers of what the matrices of each block read, block by block."""

    by_block: ClassVar[bool] = True
    one_at_a_time: ClassVar[Mapping[str, Any]] = {"micro_batch": 1}

    calibration: Any = "python-docs"
    """The texts: a corpus, or a stored calibration set (`.safetensors`)."""
    sequences: int = Field(32, ge=1)
    """How many texts."""
    sequence_length: Count | None = Field(None, ge=1)
    """Tokens of each; default: 2048, or as many as the model has positions for."""
    seed: int = Field(0, ge=0)
    """Seed of the choice of texts."""
    micro_batch: int = Field(8, ge=1)
    """How many texts pass a block at a time."""
    memory: Bytes = Field(2**30, ge=0)
    """Bytes of hidden states that may be held in memory."""
    blocks: bool = False
    """Tell each block's figures too."""

    def data_digest(self, feed: Any = None) -> str:
        if isinstance(self.calibration, str) and self.calibration.endswith(".safetensors"):
            return blake3(Path(self.calibration).read_bytes()).hexdigest() if Path(self.calibration).is_file() else ""
        return corpora.resolve(self.calibration).fingerprint()

    def protocol(self, feed: Any = None) -> dict[str, Any]:
        values = {key: value for key, value in super().protocol(feed).items() if key not in ("micro_batch", "memory")}
        return values | {"name": method_options(self)["name"]}

    def of(self, model: nn.Module, preprocessor: Any, feed: Any = None) -> list[Score]:
        """Of a model that lies in memory whole, for callbacks and searches; the same figures."""
        ours = getattr(model, "architecture", None)
        config = ours.to_hf() if ours is not None else model.config.to_dict()  # type: ignore[operator, union-attr]
        texts = calibration(self.calibration, _InMemory(config, preprocessor), sequences=self.sequences, length=self.sequence_length, seed=self.seed)
        return self._scores(_of_model(model, torch.from_numpy(texts.ids), self.micro_batch))

    def of_checkpoint(self, checkpoint: Checkpoint, device: str | None = None) -> list[Score]:
        texts = calibration(self.calibration, checkpoint, sequences=self.sequences, length=self.sequence_length, seed=self.seed)
        # Processes that measure together each pass the whole model by themselves, in a folder of their own.
        rank = os.environ.get("RANK", "0")
        folder = cache.directory() / "walks" / f"{checkpoint.model_digest[:16]}-{texts.digest[:16]}-{rank}"
        found = of_checkpoint(checkpoint, torch.from_numpy(texts.ids), folder, micro_batch=self.micro_batch, memory=self.memory, device=device)
        return self._scores(found)

    def _scores(self, found: Mapping[str, Statistics]) -> list[Score]:
        scores = scored("activation-statistics", list(found.values()))
        if self.blocks:
            for number, names in _by_block(list(found)).items():
                scores += scored(f"activation-statistics block {number}", [found[name] for name in names])
        return scores


@dataclass(frozen=True)
class _InMemory:
    """What a calibration set must know of a model that lies in memory."""

    config: dict[str, Any]
    tokenizer: Any
    path: str = "the model"


@torch.no_grad()
def _of_model(model: nn.Module, ids: Tensor, micro_batch: int) -> dict[str, Statistics]:
    names = [matrix.weight for block in anatomy(model).blocks for matrix in block.matrices().values()]
    look, device = Looking(), next(model.parameters()).device
    readers = [(name, model.get_submodule(name.removesuffix(".weight"))) for name in names]
    handles = [reader.register_forward_pre_hook(lambda _, given, name=name: look.observe(name, given[0])) for name, reader in readers]
    try:
        for batch in ids.split(micro_batch):
            model(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return look.found()


def scored(task: str, found: Sequence[Statistics]) -> list[Score]:
    """The figures of several matrices together; errors are how much they vary from text to text. nan where an input is not finite."""
    if not all(bool(each.powers.isfinite().all()) for each in found):
        metrics = ("kurtosis", "mean_square", "largest", "outliers", "outlier_channels")
        return [Score(task, metric, math.nan, math.nan, len(found[0].above)) for metric in metrics]
    texts, entries = len(found[0].above), sum(each.entries for each in found)
    channels, outliers = sum(len(each.channel_max) for each in found), sum(len(each.outlier_channels()) for each in found)
    each_text = {
        "kurtosis": [sum(each.kurtosis(text) for each in found) / len(found) for text in range(texts)],
        "mean_square": [sum(float(each.powers[text, 1]) for each in found) / entries for text in range(texts)],
        "largest": [max(float(each.largest[text]) for each in found) for text in range(texts)],
        "outliers": [sum(float(each.above[text]) for each in found) / entries for text in range(texts)],
    }
    whole = {
        "kurtosis": sum(each.kurtosis() for each in found) / len(found),
        "mean_square": sum(each_text["mean_square"]) / texts,
        "largest": max(each_text["largest"]),
        "outliers": sum(each_text["outliers"]) / texts,
    }
    scores = [Score(task, metric, value, _error(each_text[metric]), texts) for metric, value in whole.items()]
    share = (outliers + 2) / (channels + 4)  # Agresti and Coull: no error of 0 where none was found
    return [*scores, Score(task, "outlier_channels", outliers / channels, math.sqrt(share * (1 - share) / (channels + 4)), channels)]


def _error(values: Sequence[float]) -> float:
    """Standard error of a mean; nan of one value."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _by_block(names: Sequence[str]) -> dict[int, list[str]]:
    """Names of weights by the first number in them."""
    found: dict[int, list[str]] = {}
    for name in names:
        number = next(int(part) for part in name.split(".") if part.isdigit())
        found.setdefault(number, []).append(name)
    return dict(sorted(found.items()))
