"""Calibration sets: a few texts of equal length, as token ids, that show a model what it usually reads.

Documents are joined with the end of a text between them and cut into windows of the asked length; which windows are taken depends on the
seed alone. A set can be stored and given again: its digest says that it is the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cairn.data import corpora
from cairn.errors import DamagedError, InputError, MismatchError, NotFoundError
from cairn.randomness import seed_for

if TYPE_CHECKING:
    from cairn.data.text.tokenizer import Tokenizer

LONGEST = 2048
"""Tokens of a text where nothing else is asked, if the model has positions for so many."""
AMONG = 4
"""The windows that are taken are drawn among so many times as many, from the beginning of the corpus on."""
CHARACTERS = 16
"""No more characters of one document are read than this many for each token that is wanted."""
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


@dataclass(frozen=True)
class Calibration:
    """Token ids (texts, length), int64; `described` says where they come from."""

    ids: NDArray[np.int64]
    described: dict[str, Any]

    @property
    def digest(self) -> str:
        """Identity of the ids."""
        return blake3(f"{self.ids.shape}".encode() + self.ids.astype("<i8").tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Store the set as one `.safetensors` file, which `calibration=PATH` takes. Raises `InputError` if something is there."""
        from safetensors.numpy import save

        if Path(path).suffix != ".safetensors" or Path(path).exists():
            raise InputError(f"A calibration set is stored as a new file that ends in .safetensors, not as {path}.")
        Path(path).write_bytes(save({"ids": self.ids}, {"calibration": json.dumps(self.described)}))


class Reader(Protocol):
    """What must be known of a model: a checkpoint says it."""

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def path(self) -> Any: ...


def calibration(spec: Any, checkpoint: Reader, *, sequences: int = 128, length: int | None = None, seed: int = 0) -> Calibration:
    """The calibration set of a model.

    Parameters
    ----------
    spec
        A corpus as in a recipe (a name, a path, a mapping), or a stored set (`.safetensors`), of which the first texts are taken.
    checkpoint
        The model, whose tokenizer reads the texts.
    sequences
        How many texts.
    length
        Tokens of each; default 2048, or as many as the model has positions for.
    seed
        Of the choice of windows.

    Raises
    ------
    InputError, NotFoundError
        For a corpus that is not there or too short, and for ids or lengths that the model does not have.
    """
    positions = next((int(checkpoint.config[key]) for key in _POSITIONS if checkpoint.config.get(key)), None)
    wanted = length or min(LONGEST, positions or LONGEST)
    if positions is not None and wanted > positions:
        raise InputError(f"{checkpoint.path} has positions for {positions} tokens; texts of {wanted} are longer, give sequence_length={positions} or less.")
    if isinstance(spec, (str, Path)) and Path(spec).suffix == ".safetensors":
        found = _stored(Path(spec), sequences, length)
    else:
        if checkpoint.tokenizer is None:
            raise InputError(f"{checkpoint.path} carries no tokenizer.json, so texts cannot be read; give a stored calibration set.")
        found = Calibration(_windows(corpora.resolve(spec), checkpoint.tokenizer, sequences, wanted, seed, str(spec)), _described(spec, seed))
    rows = int(checkpoint.config.get("vocab_size") or 0)
    if rows and int(found.ids.max()) >= rows:
        raise MismatchError(
            f"The calibration set holds the id {int(found.ids.max())}, and {checkpoint.path} has {rows} rows: it was made with another tokenizer."
        )
    if positions is not None and found.ids.shape[1] > positions:
        raise InputError(f"The calibration set has texts of {found.ids.shape[1]} tokens, and {checkpoint.path} has positions for {positions}.")
    return found


def _described(spec: Any, seed: int) -> dict[str, Any]:
    return {"corpus": spec if isinstance(spec, (str, dict)) else str(spec), "seed": seed}


def _windows(corpus: corpora.Corpus, tokenizer: Tokenizer, sequences: int, length: int, seed: int, called: str) -> NDArray[np.int64]:
    ids: list[int] = []
    for document in corpus.documents():
        ids += tokenizer.encode(document.text[: CHARACTERS * AMONG * sequences * length])
        if tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
        if len(ids) >= AMONG * sequences * length:
            break
    count = len(ids) // length
    if count < sequences:
        raise InputError(f"{called} has {len(ids)} tokens, which make {count} texts of {length}; ask for sequences={count} or fewer, or shorter ones.")
    windows = np.asarray(ids[: count * length], dtype=np.int64).reshape(count, length)
    chosen = np.random.default_rng(seed_for(seed, "calibration")).permutation(count)[:sequences]
    return windows[np.sort(chosen)]


def _stored(path: Path, sequences: int, length: int | None) -> Calibration:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise NotFoundError(f"There is no calibration set {path}.")
    try:
        with safe_open(path, "numpy") as file:
            ids, described = file.get_tensor("ids"), json.loads((file.metadata() or {})["calibration"])
    except (SafetensorError, KeyError, ValueError):
        raise DamagedError(f"{path} is not a calibration set.") from None
    if ids.ndim != 2 or ids.dtype != np.int64 or not ids.size or ids.min() < 0:
        raise DamagedError(f"{path} holds no token ids (texts, length).")
    if len(ids) < sequences or (length is not None and ids.shape[1] < length):
        raise InputError(f"{path} holds {len(ids)} texts of {ids.shape[1]} tokens; ask for no more with sequences and sequence_length.")
    return Calibration(ids[:sequences, :length], described)
