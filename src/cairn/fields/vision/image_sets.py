"""Labelled images of one source, prepared once as memory-mapped arrays and then read by number.

A source is a named data set, an `.npz` file with an array of images and one of labels, or a folder with one folder of pictures
for each class. A store is an immutable directory:

    meta.json       classes, shape, digest
    images.npy      (n, H, W, C) uint8
    labels.npy      (n,) int32: numbers of the classes
    keys.npy        (n,) uint64: from each image's content, by which it falls into the training or the held-out part
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cairn import cache
from cairn.data import datasets
from cairn.data.corpora import digest_of
from cairn.errors import DamagedError, InputError, NotFoundError, suggestion

FORMAT = 1
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".pgm", ".ppm")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGITS = tuple("0123456789")
UNLABELLED = "unlabelled"
"""The one class of images without labels."""

IDX_SETS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "fashion-mnist-10k": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", FASHION),
    "mnist-10k": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", DIGITS),
}
"""Named data sets of images: the file of the images, that of the labels, and the classes in the order of their numbers."""


@dataclass(frozen=True)
class Shape:
    """What pictures are made into: a side in pixels and a number of channels; None takes them as they are."""

    size: int | None = None
    channels: int | None = None


AS_THEY_ARE = Shape()


@dataclass(frozen=True)
class ImageSet:
    """The images (n, H, W, C) of one source, the numbers of their classes (n,), and the names of the classes."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]
    keys: NDArray[np.uint64]
    classes: list[str]
    digest: str


def open_images(spec: str, shape: Shape = AS_THEY_ARE, arrays: tuple[str, str] | None = None) -> ImageSet:
    """The images of a source from the user's cache, prepared there first if need be.

    `spec` is a named data set, an `.npz` file or a folder of one folder for each class; `arrays` names the two arrays of an `.npz` file.
    Raises `NotFoundError` if there is nothing of the kind, `InputError` for images that cannot be trained on.
    """
    source = _resolve(spec, arrays)
    key = digest_of(FORMAT, source.fingerprint, shape.size, shape.channels)[:24]
    path = cache.directory() / "images" / key
    if not path.exists():
        cache.publish(path, lambda folder: _fill(folder, source, shape, spec))
    return _opened(path)


@dataclass(frozen=True)
class _Source:
    """Where images come from: what changes when they do, and a function that gives them."""

    fingerprint: str
    read: Callable[[Shape], tuple[NDArray[Any], NDArray[Any], list[str] | None]]


def _resolve(spec: str, arrays: tuple[str, str] | None) -> _Source:
    path = Path(spec)
    if spec in IDX_SETS:
        files = datasets.get(spec).files
        datasets.find(spec)
        return _Source(digest_of(spec, files), lambda shape: _from_idx(spec))
    if path.suffix == ".npz":
        if not path.is_file():
            raise NotFoundError(f"There is no file {path}.")
        return _Source(_stamp([path], arrays), lambda shape: _from_npz(path, arrays))
    if path.is_dir():
        files_by_class = _folders(path)
        stamp = _stamp([file for files in files_by_class.values() for file in files], sorted(files_by_class))
        return _Source(stamp, lambda shape: _from_folders(files_by_class, shape))
    known = sorted(IDX_SETS)
    if spec in datasets.names():
        raise InputError(
            f"The data set '{spec}' is not one of labelled images that cairn opens by name; there is {', '.join(known)}. A folder or .npz works too."
        )
    raise NotFoundError(f"There are no images at '{spec}'.{suggestion(spec, known)} Name a data set ({', '.join(known)}), an .npz file or a folder.")


def _stamp(files: list[Path], more: Any) -> str:
    return digest_of([(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files], more)


def _from_idx(name: str) -> tuple[NDArray[Any], NDArray[Any], list[str]]:
    images, labels, classes = IDX_SETS[name]
    return datasets.array(name, images), datasets.array(name, labels), list(classes)


def _from_npz(path: Path, arrays: tuple[str, str] | None) -> tuple[NDArray[Any], NDArray[Any], list[str] | None]:
    """No pickle is ever read: an array of objects is refused. Images alone are all of one class."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if arrays is None and list(archive.files) == ["images"]:
                return archive["images"], np.zeros(len(archive["images"]), np.int64), [UNLABELLED]
            images, labels = arrays or _guessed(list(archive.files), path)
            for name in (images, labels):
                if name not in archive.files:
                    raise InputError(f"{path} has no array '{name}'.{suggestion(name, archive.files)} It has {', '.join(archive.files) or 'none'}.")
            return archive[images], archive[labels], None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DamagedError(f"{path} is not an .npz file of plain arrays: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def _guessed(names: list[str], path: Path) -> tuple[str, str]:
    for pair in (("images", "labels"), ("train_images", "train_labels"), ("x_train", "y_train"), ("x", "y")):
        if set(pair) <= set(names):
            return pair
    raise InputError(f"{path} has the arrays {', '.join(names) or 'none'}; say which are the images and the labels: arrays: [IMAGES, LABELS].")


def _folders(path: Path) -> dict[str, list[Path]]:
    """The pictures of each class, by the names of the folders; hidden names are passed over."""
    found: dict[str, list[Path]] = {}
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        files = [
            file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if files:
            found[folder.name] = sorted(files)
    if not found:
        raise InputError(f"{path} holds no pictures: a folder of images has one folder for each class, with {', '.join(SUFFIXES)} files in it.")
    return found


def _from_folders(files: dict[str, list[Path]], shape: Shape) -> tuple[NDArray[Any], NDArray[Any], list[str]]:
    classes = list(files)
    labels = np.repeat(np.arange(len(classes)), [len(files[name]) for name in classes])
    pictures = [read_picture(file, shape) for name in classes for file in files[name]]
    sizes = {picture.shape for picture in pictures}
    if len(sizes) > 1:
        first, second = sorted(sizes)[:2]
        raise InputError(
            f"The pictures are of different shapes ({' x '.join(map(str, first))} and {' x '.join(map(str, second))}); "
            "set data.size to the side that all are brought to, and data.channels to 1 or 3."
        )
    return np.stack(pictures), labels, classes


def read_picture(file: Path, shape: Shape) -> NDArray[np.uint8]:
    """A picture as an array (H, W) or (H, W, C) of that shape. Raises `NotFoundError` without one and `DamagedError` for what is no picture."""
    if not file.is_file():
        raise NotFoundError(f"There is no picture {file}.")
    image_module = pillow()
    try:
        with image_module.open(file) as picture:
            picture = picture.convert("L" if (shape.channels or (1 if picture.mode in ("1", "L", "I;16") else 3)) == 1 else "RGB")
            return np.asarray(_resized(picture, shape.size))
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise DamagedError(f"{file} is not a picture that can be read: {error}") from None


def _resized(picture: Any, size: int | None) -> Any:
    return picture if size is None or picture.size == (size, size) else picture.resize((size, size), pillow().Resampling.BILINEAR)


def pillow() -> Any:
    """Pillow's `Image` module. Raises `InputError` where it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("Pictures are read and resized with Pillow: pip install 'cairn-lm[vision]'.") from None
    return Image


def _fill(folder: Path, source: _Source, shape: Shape, spec: str) -> None:
    images, labels, classes = source.read(shape)
    found = _shaped(checked_images(images, spec), shape)
    numbers, names = _numbered(labels, len(found), classes, spec)
    keys = np.array([int.from_bytes(blake3(image.tobytes()).digest(8), "little") for image in found], np.uint64)
    digest = blake3(np.ascontiguousarray(found).tobytes())
    digest.update(json.dumps([list(found.shape), numbers.tolist(), names]).encode())
    for name, array in (("images", found), ("labels", numbers), ("keys", keys)):
        np.save(folder / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
    (folder / "meta.json").write_text(json.dumps({"format": FORMAT, "classes": names, "digest": digest.hexdigest(), "source": spec}, indent=1) + "\n")


def checked_images(images: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Images (n, H, W) or (n, H, W, C) as (n, H, W, C) whole numbers from 0 to 255; shares from 0 to 1 become 0 to 255.

    Raises `InputError` for no images, for values that are not finite or out of range, and for arrays that are no images.
    """
    if images.ndim not in (3, 4) or images.dtype.kind not in "biuf" or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        shape = " x ".join(map(str, images.shape)) or "one number"
        raise InputError(f"{where}: an array of {shape} {images.dtype} is no set of images; it has to be n x height x width, or that x 1 or 3 channels.")
    if not images.size:
        raise InputError(f"{where} holds no images.")
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype.kind == "f":
        bad = ~np.isfinite(images).reshape(len(images), -1).all(1)
        if bad.any():
            raise InputError(
                f"{where}: image {int(bad.argmax())} ({int(bad.sum())} in all) has values that are not finite numbers (NaN or infinite); leave it out."
            )
        if images.min() < 0 or images.max() > 1:
            raise InputError(f"{where}: fractional pixels have to be shares from 0 to 1, and these reach from {images.min():g} to {images.max():g}.")
        return np.rint(images * 255).astype(np.uint8)
    if images.dtype.kind == "b":
        return images.astype(np.uint8) * np.uint8(255)
    if images.min() < 0 or images.max() > 255:
        raise InputError(f"{where}: pixels have to be whole numbers from 0 to 255, and these reach from {images.min()} to {images.max()}.")
    return images.astype(np.uint8)


def _numbered(labels: NDArray[Any], count: int, classes: list[str] | None, where: str) -> tuple[NDArray[np.int32], list[str]]:
    """Labels as numbers of classes, and the classes' names: the sorted labels themselves where nothing names them."""
    labels = labels.reshape(-1) if labels.size == len(labels.reshape(-1)) and labels.ndim <= 2 else labels
    if labels.shape != (count,):
        raise InputError(f"{where} has {count} images and labels of shape {' x '.join(map(str, labels.shape))}; there has to be one label for each image.")
    if labels.dtype.kind not in "iubU":
        raise InputError(f"{where}: labels have to be whole numbers or words, not {labels.dtype}.")
    if classes is not None:
        if labels.min() < 0 or labels.max() >= len(classes):
            raise DamagedError(f"{where}: a label is {labels.max()}, and there are {len(classes)} classes.")
        return labels.astype(np.int32), classes
    values, numbers = np.unique(labels, return_inverse=True)
    return numbers.reshape(-1).astype(np.int32), [str(value) for value in values]


def _shaped(images: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """The images with so many channels and of such a side."""
    size, channels = shape.size or images.shape[1], shape.channels or images.shape[3]
    if shape.size is None and images.shape[1] != images.shape[2]:
        raise InputError(f"The images are {images.shape[1]} x {images.shape[2]}; set data.size to the side of the square that they are brought to.")
    if images.shape[1:] == (size, size, channels):
        return images
    module = pillow()
    found = np.empty((len(images), size, size, channels), np.uint8)
    for number, image in enumerate(images):
        picture = module.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("L" if channels == 1 else "RGB")
        found[number] = np.asarray(_resized(picture, size)).reshape(size, size, channels)
    return found


def _opened(path: Path) -> ImageSet:
    try:
        meta = json.loads((path / "meta.json").read_bytes())
        images, labels, keys = (np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("images", "labels", "keys"))
        return ImageSet(images, labels, keys, list(meta["classes"]), str(meta["digest"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        raise DamagedError(f"{path} is not whole; delete it, and it is prepared again.") from None
