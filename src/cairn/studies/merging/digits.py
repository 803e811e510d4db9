"""Eight transforms of scikit-learn's digits and one expert for each, all from one small network (card 26, proof b).

The network 64-256-128-64 is pretrained on the digits as they are. The head of a task is a linear probe on the
pretrained features of its transformed digits; it is frozen, and the network alone is tuned to it and masked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cairn import randomness
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating import stream
from cairn.checkpoint.saving import write
from cairn.errors import InputError
from cairn.evaluation.answers import right_share
from cairn.fields.vision.processor import ImageProcessor
from cairn.merging.methods import tall_masks
from cairn.statistics import first_largest
from cairn.studies.merging import plain_masks
from cairn.studies.study import Figures, Say
from cairn.training.run import fork, train

WIDTHS = (64, 256, 128, 64)
CLASSES, BATCH = 10, 64
TRAIN, VALIDATE = 997, 400
"""Digits that train and that choose thresholds; the 400 others are reported."""

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Digits:
    """Images (N, 8, 8) with values from 0 to 1, and their classes (N,)."""

    images: Tensor
    classes: Tensor

    def through(self, transform: Transform) -> Digits:
        """The same digits, their images transformed."""
        return Digits(transform(self.images), self.classes)


@dataclass(frozen=True)
class Task:
    """One transform: its digits in three parts, and the frozen head."""

    train: Digits
    validate: Digits
    report: Digits
    head: nn.Linear


@dataclass(frozen=True)
class DigitExperts:
    """What one seed gives."""

    base: Checkpoint
    experts: dict[str, Checkpoint]
    tasks: dict[str, Task]


def transforms(seed: int) -> dict[str, Transform]:
    """The eight transforms of images (N, 8, 8); `permute` deals out the pixels by the seed."""
    order = torch.from_numpy(randomness.permutation(randomness.seed_for(seed, "pixels"), 64, np.arange(64)))
    return {
        "rotate": lambda images: images.rot90(1, (1, 2)),
        "mirror": lambda images: images.flip(2),
        "upside-down": lambda images: images.flip(1),
        "invert": lambda images: 1 - images,
        "roll": lambda images: images.roll((3, 3), (1, 2)),
        "transpose": lambda images: images.transpose(1, 2),
        "permute": lambda images: images.flatten(1)[:, order].view_as(images),
        "occlude": lambda images: torch.cat([images[:, :, :4], torch.zeros_like(images[:, :, 4:])], 2),
    }


def network() -> nn.Sequential:
    """Images to 64 features."""
    layers: list[nn.Module] = [nn.Flatten()]
    for wide, narrow in pairwise(WIDTHS):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def prepare(seed: int, work: Path) -> DigitExperts:
    """Pretrain, fit the heads, tune the experts; all are saved under `work`."""
    train_digits, validate, report = _parts(seed)
    whole = train(_recipe(train_digits, work / "digits.npz", seed, steps=600, lr=1e-3), work / "pretraining").newest()
    start, tasks, experts = _body(whole), dict[str, Task](), dict[str, Checkpoint]()
    net = network()
    for name, transform in transforms(seed).items():
        net.load_state_dict(start)
        own = train_digits.through(transform)
        task = Task(own, validate.through(transform), report.through(transform), probe(net, own))
        headed = _headed(whole, task.head, work / f"{name}-begin")
        recipe = _recipe(own, work / f"{name}.npz", randomness.seed_for(seed, name) % 2**31, steps=150, lr=5e-4, trainable=["layers.*"])
        tuned = fork(headed, work / f"{name}-tuning", recipe=recipe, fresh=["optimizer"]).newest()
        tasks[name], experts[name] = task, _save(_body(tuned), work / name)
    return DigitExperts(_save(start, work / "base"), experts, tasks)


@torch.no_grad()
def accuracy(net: nn.Module, head: nn.Linear, digits: Digits) -> float:
    """Share of digits that are told right."""
    return right_share(head(net(digits.images)), digits.classes)


@torch.no_grad()
def probe(net: nn.Module, digits: Digits) -> nn.Linear:
    """The linear classifier of a network's features, fitted to the digits and frozen."""
    fitted = _sklearn("linear_model").LogisticRegression(max_iter=5000).fit(net(digits.images).numpy(), digits.classes.numpy())
    head = nn.Linear(WIDTHS[-1], CLASSES).requires_grad_(False)
    head.weight.copy_(torch.from_numpy(fitted.coef_))
    head.bias.copy_(torch.from_numpy(fitted.intercept_))
    return head


def choose_thresholds(material: DigitExperts) -> list[float]:
    """For each expert the threshold at which its mask does best on its validation digits, the smallest of equals."""
    net, parents = network(), [material.base, *material.experts.values()]
    chosen = []
    for number, task in enumerate(material.tasks.values()):
        values = {}
        for threshold in tall_masks.CANDIDATES:
            stream.results(tall_masks.MaskedExperts(number=number, thresholds=threshold), parents, net.state_dict())
            values[threshold] = accuracy(net, task.head, task.validate)
        best = first_largest(list(values.values()))
        if best is None:
            raise InputError(f"Expert {number + 1} tells digits apart with numbers that are not finite, so no threshold can be chosen.")
        chosen.append(list(values)[best])
    return chosen


def figures(seed: int, work: Path, say: Say) -> Figures:
    """Shares of single-expert accuracy of every mask on the reported digits, and how many experts need each weight."""
    say(f"seed {seed}: eight transforms of the digits")
    material = prepare(seed, work)
    net = network()
    single = {name: _reported(net, expert, material.tasks[name]) for name, expert in material.experts.items()}
    thresholds = choose_thresholds(material)
    packed = tall_masks.bundle(material.base, material.experts, work / "bundle", thresholds=thresholds)
    shares = []
    for name, task in material.tasks.items():
        shares.append(_reported(net, tall_masks.reconstruct(packed, name, work / f"{name}-again"), task) / single[name])
    told = tall_masks.report(packed)

    def share(model: nn.Module, name: str) -> float:
        return accuracy(model, material.tasks[name].head, material.tasks[name].report) / single[name]

    return {
        "single": single,
        "base": float(np.mean([_reported(net, material.base, task) / single[name] for name, task in material.tasks.items()])),
        "thresholds": thresholds,
        "tall": float(np.mean(shares)),
        **plain_masks.measured(seed, material.base, material.experts, net, told["density"], share),
        "density": told["density"],
        "active": told["active"],
    }


def _reported(net: nn.Module, checkpoint: Checkpoint, task: Task) -> float:
    net.load_state_dict(checkpoint.tensors.load())
    return accuracy(net, task.head, task.report)


def _parts(seed: int) -> tuple[Digits, Digits, Digits]:
    """The 1797 digits dealt out by the seed: for training, for thresholds, for the report."""
    images, classes = _sklearn("datasets").load_digits(return_X_y=True)
    order = randomness.permutation(randomness.seed_for(seed, "digits"), len(classes), np.arange(len(classes)))
    wholes = torch.from_numpy(images[order]).float().view(-1, 8, 8) / 16, torch.from_numpy(classes[order])
    cuts = [slice(0, TRAIN), slice(TRAIN, TRAIN + VALIDATE), slice(TRAIN + VALIDATE, None)]
    train, validate, report = (Digits(wholes[0][cut], wholes[1][cut]) for cut in cuts)
    return train, validate, report


def _recipe(digits: Digits, file: Path, seed: int, *, steps: int, lr: float, trainable: Sequence[str] = ()) -> dict[str, Any]:
    """AdamW at a constant rate without weight decay on these digits, which are written as images with values from 0 to 16."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, images=np.rint(digits.images.numpy() * 16).astype(np.uint8), labels=digits.classes.numpy())
    return {
        "seed": seed,
        "model": {"name": "mlp", "hidden_sizes": list(WIDTHS[1:]), "initializer_gain": 3**-0.5},
        "data": {"name": "images", "sources": {"digits": {"images": str(file)}}, "held_out": 0, "mean": [0.0], "std": [16 / 255]},
        "objective": "classification",
        "optimizer": {"name": "adamw", "lr": lr, "betas": [0.9, 0.999], "weight_decay": 0.0},
        "schedule": "constant",
        "trainable": list(trainable),
        "training": {"samples": f"{steps} steps", "batch": BATCH, "clip": None, "compile": False, "log_every": steps},
        "checkpoint": {"every": "100%"},
    }


def _body(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of the network alone, under the names that `network` has for them."""
    layers = {f"{2 * layer + 1}.{part}": f"layers.{layer}.{part}" for layer in range(len(WIDTHS) - 1) for part in ("weight", "bias")}
    return {name: checkpoint.tensors[stored].load() for name, stored in layers.items()}


def _headed(whole: Checkpoint, head: nn.Linear, path: Path) -> Checkpoint:
    """The pretrained network under another head."""
    weights = whole.tensors.load() | {"classifier.weight": head.weight.detach().clone(), "classifier.bias": head.bias.detach().clone()}
    lineage = Lineage.record("operation", "head", parents=[whole], directory=path.parent)
    return write.save(path, model=weights, config=whole.config, lineage=lineage, tokenizer=ImageProcessor.load(whole.path))


def _save(weights: Mapping[str, Tensor], path: Path) -> Checkpoint:
    lineage = Lineage.record("run", "train", directory=path.parent)
    return write.save(path, model={name: tensor.clone() for name, tensor in weights.items()}, config={"model_type": "digits"}, lineage=lineage)


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise InputError("This study needs scikit-learn: pip install 'cairn-lm[science]'.") from None
