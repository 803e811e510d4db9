"""The image processor: how pixels become a model's inputs, in the file that transformers' `AutoImageProcessor` reads.

x = (pixel / 255 - mean) / std        per channel, after an image was brought to `size` where it had another
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cairn.checkpoint.format import documents
from cairn.checkpoint.format.place import place
from cairn.errors import MismatchError, NotFoundError
from cairn.training.fields import class_names

FILE = "preprocessor_config.json"
BILINEAR = 2
"""How Pillow, and with it transformers, numbers the way in which images are resized."""


@dataclass(frozen=True)
class ImageProcessor:
    """Images of whole numbers from 0 to 255 to a model's inputs; `mean` and `std` have one number for each channel."""

    file: ClassVar[str] = FILE

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    """Names of the classes by number, where the processor lies beside a classifier; config.json has them."""

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def digest(self) -> str:
        """Identity of what it does to images."""
        return blake3(self.files()[FILE]).hexdigest()

    @functools.cached_property
    def _table(self) -> NDArray[np.float32]:
        """What each of the 256 values becomes in each channel: (C, 256)."""
        values = np.arange(256) / 255
        return np.stack([(values - mean) / std for mean, std in zip(self.mean, self.std, strict=True)]).astype(np.float32)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images (n, H, W, C) to pixel values (n, C, H, W)."""
        if images.shape[1:] != (self.height, self.width, self.channels):
            asked = f"{self.height} x {self.width} with {self.channels} channel(s)"
            raise MismatchError(f"The images are {' x '.join(map(str, images.shape[1:]))} (height, width, channels), and the processor makes {asked}.")
        found = np.empty((len(images), self.channels, self.height, self.width), np.float32)
        for channel in range(self.channels):
            found[:, channel] = self._table[channel][images[..., channel]]
        return found

    def knowing(self, classes: Sequence[str]) -> ImageProcessor:
        """The same for a classifier of these classes."""
        return replace(self, classes=tuple(classes))

    def files(self) -> dict[str, bytes]:
        """preprocessor_config.json, as transformers writes it."""
        values = {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.mean),
            "image_processor_type": "ViTImageProcessor",
            "image_std": list(self.std),
            "resample": BILINEAR,
            "rescale_factor": 1 / 255,
            "size": {"height": self.height, "width": self.width},
        }
        return {FILE: (json.dumps(values, indent=2) + "\n").encode()}

    @classmethod
    def load(cls, path: str | Path) -> ImageProcessor:
        """From the preprocessor_config.json of a directory. Raises `NotFoundError` if there is none, `DamagedError` or `MismatchError` for one
        that does something else to images."""
        file = place(path) / FILE
        if not file.exists():
            raise NotFoundError(f"There is no image processor at {path}: {FILE} is missing.")
        return cls._from(documents.read_object(file), file).knowing(class_names(place(path)))

    @classmethod
    def _from(cls, values: Mapping[str, Any], file: Path) -> ImageProcessor:
        size = values.get("size")
        size = {"height": size, "width": size} if isinstance(size, int) else size
        if not isinstance(size, Mapping) or not all(_whole(size.get(side)) for side in ("height", "width")):
            raise MismatchError(f"{file}: size={values.get('size')!r} is not understood; it has to give a height and a width.")
        for key in ("do_center_crop", "do_pad"):
            if values.get(key):
                raise MismatchError(f"{file}: {key} is not supported.")
        if values.get("do_rescale", True) is not True or abs(_number(values.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-6:
            raise MismatchError(f"{file}: pixels have to be divided by 255 (do_rescale, rescale_factor).")
        normal = values.get("do_normalize", True)
        mean, std = (_row(values.get(key, [0.5, 0.5, 0.5]), key, file) if normal else None for key in ("image_mean", "image_std"))
        if mean is None or std is None:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if len(mean) != len(std) or min(std) <= 0:
            raise MismatchError(f"{file}: image_mean and image_std need one number for each channel, and image_std positive ones.")
        return cls(size["height"], size["width"], mean, std)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30 else float("inf")


def _row(value: Any, key: str, file: Path) -> tuple[float, ...]:
    row: Sequence[Any] = value if isinstance(value, list) else [value]
    if not row or not all(np.isfinite(_number(item)) for item in row):
        raise MismatchError(f"{file}: {key}={value!r} is not a list of finite numbers.")
    return tuple(float(item) for item in row)
