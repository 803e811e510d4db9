"""Eight transforms of scikit-learn's digits and one expert for each, all from one small network (card 26, proof b).

The network 64-256-128-64 is pretrained on the digits as they are. The head of a task is a linear probe on the
pretrained features of its transformed digits; it is frozen, and the network alone is tuned to it and masked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn import randomness
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating import stream
from cairn.checkpoint.saving import write
from cairn.errors import InputError
from cairn.merging.methods import tall_masks
from cairn.studies.merging import plain_masks
from cairn.studies.study import Figures, Say

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
    train, validate, report = _parts(seed)
    torch.manual_seed(randomness.seed_for(seed, "network"))
    net, first_head = network(), nn.Linear(WIDTHS[-1], CLASSES)
    _tune(net, first_head, [*net.parameters(), *first_head.parameters()], train, seed, steps=600, lr=1e-3)
    start, tasks, experts = {name: tensor.clone() for name, tensor in net.state_dict().items()}, dict[str, Task](), dict[str, Checkpoint]()
    for name, transform in transforms(seed).items():
        net.load_state_dict(start)
        own = train.through(transform)
        task = Task(own, validate.through(transform), report.through(transform), probe(net, own))
        _tune(net, task.head, net.parameters(), own, randomness.seed_for(seed, name), steps=150, lr=5e-4)
        tasks[name], experts[name] = task, _save(net.state_dict(), work / name)
    return DigitExperts(_save(start, work / "base"), experts, tasks)


@torch.no_grad()
def accuracy(net: nn.Module, head: nn.Linear, digits: Digits) -> float:
    """Share of digits that are told right."""
    return float((head(net(digits.images)).argmax(-1) == digits.classes).float().mean())


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
        chosen.append(max(values, key=lambda threshold: values[threshold]))
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


def _tune(net: nn.Module, head: nn.Linear, weights: Any, digits: Digits, seed: int, *, steps: int, lr: float) -> None:
    """AdamW without weight decay on batches in an order that the seed decides."""
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    count = len(digits.classes) // BATCH
    for step in range(steps):
        places = np.arange(BATCH) + BATCH * (step % count)
        batch = torch.from_numpy(randomness.permutation(randomness.seed_for(seed, "order", step // count), len(digits.classes), places))
        loss = F.cross_entropy(head(net(digits.images[batch])), digits.classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _save(weights: Mapping[str, Tensor], path: Path) -> Checkpoint:
    lineage = Lineage.record("run", "train", directory=path.parent)
    return write.save(path, model={name: tensor.clone() for name, tensor in weights.items()}, config={"model_type": "digits"}, lineage=lineage)


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise InputError("This study needs scikit-learn: pip install 'cairn-lm[science]'.") from None
