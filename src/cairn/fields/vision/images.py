"""The field `images`: labelled pictures from named data sets, `.npz` files and folders, in one global order.

Which image stands at a position, and how it is moved and mirrored there, depends on (seed, position) alone.
"""

from __future__ import annotations

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
from cairn.fields.vision.families import ImageNetwork
from cairn.fields.vision.image_sets import ImageSet, Shape, open_images, read_picture
from cairn.fields.vision.processor import FILE, ImageProcessor
from cairn.models.config import architecture
from cairn.options import Options
from cairn.randomness import bits, seed_for
from cairn.training.fields import DataField, Source, answers
from cairn.training.objectives import Setting

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint
    from cairn.models.config import Network
    from cairn.training.objectives import Objective

NOISE = "a picture of noise, always the same"
"""What a model is asked where nobody names a picture."""


class ImageSource(Source):
    """One source of labelled images in the mixture."""

    images: str
    """A named data set (`fashion-mnist-10k`), an `.npz` file, or a folder with one folder of pictures for each class."""
    arrays: tuple[str, str] | None = None
    """Names of the arrays of images and of labels in an `.npz` file; None: the usual ones."""


class Augmentation(Options):
    """How training images are changed, anew at each position, as a pure function of (seed, position)."""

    mirror: bool = False
    """Left and right exchanged, for half of the images."""
    shift: int = Field(0, ge=0)
    """Moved by up to so many pixels in each direction; what comes in from outside is 0."""


@dataclass(frozen=True)
class ImageSamples:
    """n labelled images: `inputs` of a model by name (`pixel_values`, (n, C, H, W) float32), `labels` (n,), `source` and `index` (n,): where
    each comes from; `keys` (n,): a random number of each image's own, from (seed, position)."""

    inputs: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    source: NDArray[np.int64]
    index: NDArray[np.int64]
    keys: NDArray[np.uint64]
    kept: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class OpenedSource:
    """A source that was opened: its images by number, and which of them train and which are held out."""

    name: str
    weight: float
    subset: int | None
    images: ImageSet
    numbers: NDArray[np.int64]
    """The numbers of its classes among those of all sources."""
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


class ImageFeed(Feed):
    """Labelled images from several sources in one global order; `classes` are those of all of them."""

    noun: ClassVar[str] = "images"

    def __init__(
        self, sources: Sequence[OpenedSource], classes: Sequence[str], seed: int, processor: ImageProcessor, augmentation: Augmentation | None = None
    ) -> None:
        """Raises `InputError` for a source without an image to train on, or with fewer than its subset."""
        super().__init__(sources, seed)
        self.classes, self._processor, self._augmentation = list(classes), processor, augmentation or Augmentation()
        for source in self.sources:
            if not len(source.train):
                raise InputError(f"The source '{source.name}' has no image to train on; lower data.held_out or add images.")
            if source.subset is not None and source.subset > len(source.train):
                raise InputError(f"The source '{source.name}' has {len(source.train)} images; a subset of {source.subset} is none.")

    @property
    def epoch_samples(self) -> dict[str, int]:
        return {source.name: source.subset or len(source.train) for source in self.sources}

    def samples(self, positions: NDArray[np.int64]) -> ImageSamples:
        positions = np.asarray(positions, dtype=np.int64)
        which, draws = self.mixture.draws(positions)
        index = np.empty_like(draws)
        for number, source in enumerate(self.sources):
            mine = which == number
            index[mine] = source.train[self.numbers(source, source.name, len(source.train), draws[mine])]
        keys = self.keys(positions)
        return self._gather(which, index, keys, augmented=True)

    def evenly(self, samples: int, split: Literal["train", "held_out"]) -> ImageSamples:
        parts = [source.train if split == "train" else source.held_out for source in self.sources]
        which, places = self.spread([len(part) for part in parts], samples, split)
        index = np.array([parts[number][place] for number, place in zip(which, places, strict=True)], np.int64)
        return self._gather(which, index, bits(seed_for(0, split), np.arange(len(which))), augmented=False)

    def digests(self) -> dict[str, str]:
        return {source.name: source.images.digest for source in self.sources}

    def _gather(self, which: NDArray[np.int64], index: NDArray[np.int64], keys: NDArray[np.uint64], *, augmented: bool) -> ImageSamples:
        pixels = np.empty((len(which), self._processor.height, self._processor.width, self._processor.channels), np.uint8)
        labels = np.empty(len(which), np.int64)
        for number, source in enumerate(self.sources):
            mine = which == number
            pixels[mine] = source.images.images[index[mine]]
            labels[mine] = source.numbers[source.images.labels[index[mine]]]
        if augmented:
            pixels = augment(pixels, keys, self._augmentation)
        return ImageSamples({"pixel_values": self._processor(pixels)}, labels, which, index, keys)


def augment(images: NDArray[np.uint8], keys: NDArray[np.uint64], how: Augmentation) -> NDArray[np.uint8]:
    """Images (n, H, W, C), each mirrored and moved as its key (n,) says."""
    if not how.mirror and not how.shift:
        return images
    found, wide = np.zeros_like(images), 2 * how.shift + 1
    height, width = images.shape[1:3]
    for number, key in enumerate(keys.tolist()):
        down, right = (key >> 1) % wide - how.shift, (key >> 32) % wide - how.shift
        image = images[number, :, ::-1] if how.mirror and key & 1 else images[number]
        rows, columns = _overlap(down, height), _overlap(right, width)
        found[number][rows[0], columns[0]] = image[rows[1], columns[1]]
    return found


def _overlap(shift: int, size: int) -> tuple[slice, slice]:
    """Where what is moved by `shift` arrives, and what of it does."""
    shift = max(-size, min(size, shift))
    return slice(max(0, shift), size + min(0, shift)), slice(max(0, -shift), size - max(0, shift))


@register("field", "images")
class Images(DataField):
    """Labelled images; progress counts samples, and the image processor travels in every checkpoint."""

    gives: ClassVar[frozenset[str]] = frozenset({"images", "labels"})
    preprocessor_file: ClassVar[str] = FILE
    noun: ClassVar[str] = "images"
    source_key: ClassVar[str] = "images"
    measurement: ClassVar[str] = "accuracy"

    sources: dict[str, ImageSource]
    held_out: float = Field(0.1, ge=0, lt=1)
    """Share of the images kept out of training, chosen by their content."""
    size: int | None = Field(None, ge=1)
    """Side in pixels of the square that images are brought to; None: as they are."""
    channels: Literal[1, 3] | None = None
    """1: grey, 3: colours; None: as they are."""
    mean: list[float] = [0.5]
    """What is taken off each channel (of values from 0 to 1); one number stands for all channels."""
    std: list[float] = [0.5]
    """What each channel is divided by afterwards."""
    augmentation: Augmentation = Augmentation()

    def open(
        self, seed: int, preprocessor: ImageProcessor | None = None, *, objective: Objective | None = None, progress: Callable[..., Any] | None = None
    ) -> tuple[ImageProcessor, ImageFeed]:
        """The image processor and the images; those of files are read once and kept in the cache. With the processor of a checkpoint, images
        are brought to its size and channels, and classes have the numbers that they have there."""
        shape = Shape(self.size, self.channels)
        if preprocessor is not None:
            shape = Shape(self.size or preprocessor.height, self.channels or (1 if preprocessor.channels == 1 else 3))
        opened = {name: open_images(source.images, shape, source.arrays) for name, source in self.sources.items()}
        sides = {found.images.shape[1:] for found in opened.values()}
        if len(sides) > 1:
            raise InputError(f"The sources have images of different shapes ({_shapes(sides)}); set data.size and data.channels.")
        side, _, channels = next(iter(sides))
        processor = preprocessor or ImageProcessor(side, side, self._per_channel(self.mean, "mean", channels), self._per_channel(self.std, "std", channels))
        if (processor.height, processor.width, processor.channels) != (side, side, channels):
            given = f"{processor.height} x {processor.width} x {processor.channels}"
            raise MismatchError(f"The images are {side} x {side} x {channels}, and the checkpoint's image processor makes {given}; leave data.size open.")
        classes = self._classes(opened, processor)
        if preprocessor is None:
            processor = processor.knowing(classes)
        return processor, ImageFeed([self._source(name, found, classes) for name, found in opened.items()], classes, seed, processor, self.augmentation)

    def _per_channel(self, values: Sequence[float], key: str, channels: int) -> tuple[float, ...]:
        if len(values) not in (1, channels) or (key == "std" and min(values) <= 0):
            raise InputError(f"data.{key} needs one number, or one for each of the {channels} channels{', positive ones' if key == 'std' else ''}.")
        return tuple(values) * (channels if len(values) == 1 else 1)

    def _classes(self, opened: Mapping[str, ImageSet], processor: ImageProcessor) -> list[str]:
        """The classes of all sources in the order of the sources' names, or those that the processor's checkpoint knows."""
        found = list(dict.fromkeys(name for source in sorted(opened) for name in opened[source].classes))
        if not processor.classes:
            return found
        strange = [name for name in found if name not in processor.classes]
        if strange:
            raise MismatchError(
                f"The images have the class '{strange[0]}', which the checkpoint does not know.{suggestion(strange[0], processor.classes)} "
                f"It has {len(processor.classes)} classes: {', '.join(processor.classes[:10])}{' ...' if len(processor.classes) > 10 else ''}."
            )
        return list(processor.classes)

    def _source(self, name: str, found: ImageSet, classes: Sequence[str]) -> OpenedSource:
        kept_out = np.asarray(found.keys) < np.uint64(min(self.held_out * 2.0**64, 2.0**64 - 2048))
        source = self.sources[name]
        numbers = np.array([list(classes).index(each) for each in found.classes], np.int64)
        return OpenedSource(
            name, self.first_weights[name], source.subset, found, numbers, np.flatnonzero(~kept_out).astype(np.int64), np.flatnonzero(kept_out).astype(np.int64)
        )

    def fill(self, model: Network, preprocessor: ImageProcessor) -> dict[str, Any]:
        """The model's image size, channels and classes."""
        labels = {str(number): name for number, name in enumerate(preprocessor.classes)}
        data = {"image_size": preprocessor.height, "num_channels": preprocessor.channels, "id2label": labels}
        data = {key: value for key, value in data.items() if key in type(model).model_fields}
        for key in model.model_fields_set & set(data):
            if (given := getattr(model, key)) != data[key]:
                said = [f"{len(each)} classes ({', '.join(list(each.values())[:3])} ...)" if isinstance(each, dict) else each for each in (given, data[key])]
                raise InputError(f"model.{key} is {said[0]}, and the images have {said[1]}; leave it out to take the data's.")
        return {key: value for key, value in data.items() if key not in model.model_fields_set}

    def setting(self, model: Network, preprocessor: ImageProcessor) -> Setting:
        return Setting(preprocessor, model)

    @classmethod
    def load_preprocessor(cls, path: Path) -> ImageProcessor:
        return ImageProcessor.load(path)

    @classmethod
    def sample_recipe(cls, folder: Path) -> dict[str, Any]:
        labels = np.arange(240) % 3
        images = (bits(seed_for(0, "sample"), np.arange(240 * 64)) % np.uint64(100)).astype(np.uint8).reshape(240, 8, 8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 1 : 2 * label + 3] += 120
        np.savez(folder / "bars.npz", images=images, labels=labels)
        return {
            "model": {"name": "vit", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4},
            "data": {"name": "images", "sources": {"bars": {"images": str(folder / "bars.npz")}}, "held_out": 0.2},
            "objective": "classification",
            "training": {"batch": 32, "micro_batch": 16},
        }

    @classmethod
    def signature(cls, checkpoint: Checkpoint) -> dict[str, list[dict[str, Any]]]:
        family, processor = _family(checkpoint), _processor(checkpoint)
        side = f"{processor.height} x {processor.width}"
        pixels = {
            **{"name": "pixel_values", "dtype": "float32", "shape": ["batch", "channels", "height", "width"]},
            **{"values": f"pictures of {side} with {processor.channels} channel(s), (pixel / 255 - mean) / std", "made_by": FILE},
            **{"mean": list(processor.mean), "std": list(processor.std)},
        }
        return {"inputs": [pixels], "outputs": family.outputs()}

    @classmethod
    def example(cls, checkpoint: Checkpoint, prompt: str | None, device: Any = None) -> dict[str, Any]:
        """`prompt` is the path of a picture; without one, a picture of noise that is always the same."""
        import torch

        family, processor = _family(checkpoint), _processor(checkpoint)
        shape = (1, processor.height, processor.width, processor.channels)
        if prompt in (None, NOISE):
            picture = (bits(seed_for(0, "example"), np.arange(int(np.prod(shape)))) >> np.uint64(56)).astype(np.uint8).reshape(shape)
        else:
            picture = read_picture(Path(str(prompt)), Shape(processor.height, 1 if processor.channels == 1 else 3)).reshape(shape)
        place = choose(device)
        with torch.no_grad():
            scores, names = family.scores(checkpoint.model(dtype=torch.float32, device=place), torch.from_numpy(processor(picture)).to(place))
        if hasattr(family, "classes"):
            found = answers(scores, names.__getitem__)
        else:  # what is no class is not probable
            found = {"top": [], "scores": dict(zip(names, scores.double().tolist(), strict=True))}
        return {"prompt": prompt or NOISE, "input_digest": blake3(picture.tobytes()).hexdigest(), **found}

    def unit_flops(self, model: Network, objective: Objective) -> float:
        """Forward once, backward twice the forward."""
        return 3.0 * cast(ImageNetwork, model).image_flops()

    def training_memory(self, model: Network, units: int, precision: Literal["float32", "bfloat16"]) -> dict[str, int]:
        count = model.parameter_count()
        return {
            "weights": 4 * count,
            "gradients": 4 * count,
            "optimizer": 8 * count,
            "activations": cast(ImageNetwork, model).activation_bytes(units, precision),
        }


def _family(checkpoint: Checkpoint) -> ImageNetwork:
    """What the config.json of a checkpoint describes. Raises `NotExplained` for a family that is not known here."""
    name = str(checkpoint.config.get("model_type"))
    known = catalog.get("architecture", name).implementation if catalog.has("architecture", name) else None
    if known is None or not issubclass(known, ImageNetwork):
        raise NotExplained(f"{checkpoint.path} is a '{name}', whose inputs and outputs are not known here.", "model-understanding")
    if "id2label" in known.model_fields and not checkpoint.config.get("id2label"):
        raise NotExplained(f"{checkpoint.path}: config.json has no id2label, so nobody knows which class an output is.", "outputs")
    return cast(ImageNetwork, architecture(checkpoint.config))


def _processor(checkpoint: Checkpoint) -> ImageProcessor:
    found = Images.preprocessor_of(checkpoint)
    if found is None:
        raise NotExplained(f"{checkpoint.path} has no {FILE}, so nobody knows how a picture becomes its input.", "model-understanding")
    return cast(ImageProcessor, found)


def _shapes(sides: set[tuple[int, ...]]) -> str:
    return " and ".join(" x ".join(map(str, side)) for side in sorted(sides))
