"""G_learn (LiGO): the large weights are learned linear maps of the small ones.

W_i(large) = B_out (sum_j D_ij W_j(small)) B_in^T

One B for each space (residual stream, MLP, heads of queries, heads of keys), shared by all layers; one D for each kind of
tensor. Only the maps learn, for a few hundred steps with the small weights frozen; then the large weights are made from
them. B begins as the identity on top of rows from N(0, 1/large), D as stacked identities: without width that is `stack`.
Heads are mixed whole, so that rope still turns what it turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import Context, piecewise
from cairn.checkpoint.operating.walk import widened
from cairn.device import choose
from cairn.errors import InputError
from cairn.growth.body import AxisPosition, Body, body_of
from cairn.growth.frame import DeeperAndWider, Target, drawn
from cairn.growth.methods.stack import PAPER

Maps = dict[str, Tensor]


def identity_on_top(small: int, large: int, noise: Tensor) -> Tensor:
    """The map (large, small) whose first rows are the identity; `noise` (large - small, small) follows."""
    return torch.cat([torch.eye(small), noise / math.sqrt(large)])


def mapped(values: Tensor, dimension: int, matrix: Tensor) -> Tensor:
    """`matrix` (large, small) applied to a dimension of small * block items, whole blocks at a time."""
    blocks = values.movedim(dimension, 0).unflatten(0, (matrix.shape[1], -1))
    return torch.tensordot(matrix.to(values.dtype), blocks, dims=1).flatten(0, 1).movedim(0, dimension)


def first_maps(body: Body, order: Sequence[int], width: int, seed: int, rests: Sequence[str]) -> Maps:
    """The maps before any step."""
    maps = {f"depth/{rest}": torch.eye(body.layers)[list(order)] for rest in rests}
    if width > 1:
        sizes = {"hidden": body.config["hidden_size"], "inner": body.config["intermediate_size"], **body.heads}
        for space, size in sizes.items():
            maps[f"width/{space}"] = identity_on_top(size, width * size, drawn(((width - 1) * size, size), 1.0, seed, "ligo", space))
    return maps


def grown(place: AxisPosition, maps: Mapping[str, Tensor], small: Callable[[int | None], Tensor], layers: int) -> Tensor:
    """A tensor of the large model; `small(j)` is the small model's of layer j."""
    if place.layer is None:
        values = small(None)
    else:
        shares = maps[f"depth/{place.rest}"][place.layer]
        # A layer without a share is not even read, unless the share is to be learned.
        first, *others = [j for j in range(layers) if shares.requires_grad or shares[j] != 0] or [0]
        values = shares[first] * small(first)
        for j in others:
            values = values + shares[j] * small(j)
    for dimension, space in enumerate(place.spaces):
        if space is not None and f"width/{space}" in maps:
            values = mapped(values, dimension, maps[f"width/{space}"])
    return values


class _Large(nn.Module):
    """The large model as a function of the maps, called like the model itself."""

    def __init__(self, meta_model: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.meta_model, self.weights = [meta_model], weights  # in a list, so that its parameters are not taken for ours

    def forward(self, *args: Any, **options: Any) -> Any:
        return torch.func.functional_call(self.meta_model[0], self.weights, args, options)


@register("growth", "ligo", paper=(PAPER, Paper("Learning to Grow Pretrained Models for Efficient Transformer Training", "arXiv:2303.00980")))
class Ligo(DeeperAndWider):
    """Large weights as learned linear maps of the small ones, trained for some steps on the run's own data (section 3, G_learn)."""

    sample_options: ClassVar[dict[str, Any]] = {"factor": 2, "width": 2, "steps": 0}

    steps: int = Field(100, ge=0)
    """Updates of the maps, each on a batch that the small model has not read; 0 leaves the maps as they begin, and streams."""
    lr: float = Field(1e-3, gt=0)
    seed: int = Field(0, ge=0)

    def check(self, parents: Sequence[Checkpoint]) -> None:
        super().check(parents)
        if self.steps and (parents[0].trainer is None or self.recipe(parents) is None):
            raise InputError(f"{parents[0].path} was not trained here, so there are no data on which the maps could learn; give steps=0, or grow by stack.")

    def sequences_used(self, parent: Checkpoint) -> int:
        from cairn.training.recipe import load

        recipe = self.recipe([parent]) if self.steps else None
        return self.steps * load(recipe).batch_samples if recipe is not None else 0

    def prepare(self, parents: Sequence[Checkpoint], context: Context) -> Maps:
        body, parent = body_of(parents[0]), parents[0]
        rests = sorted({body.place(name).rest for name in parent.tensors if body.place(name).layer is not None})
        maps = first_maps(body, self.layer_map(body.layers), self.width, self.seed, rests)
        return self.learn(maps, parent, choose(context.device)) if self.steps else maps

    def learn(self, maps: Maps, parent: Checkpoint, device: torch.device) -> Maps:
        """The maps after `steps` updates by Adam; the small model and the large one are in memory meanwhile."""
        from cairn.training.recipe import load
        from cairn.training.sources import open_recorded

        recipe = load(self.recipe([parent]) or {})
        _, feed = open_recorded(recipe.data, recipe.seed, parent.tokenizer)
        plain = parent.trainer or {}
        feed.restore(plain["feed"])
        body, small = body_of(parent), {name: widened(tensor.load()).to(device) for name, tensor in parent.tensors.items()}
        names = [spec.name for spec in self.outputs([parent])]
        meta_model = recipe.model.meta_model().to_empty(device=device)
        learned = {name: matrix.to(device, copy=True).requires_grad_() for name, matrix in maps.items()}
        optimizer = torch.optim.Adam(learned.values(), lr=self.lr)
        position, count = plain["position"], recipe.batch_samples
        with torch.enable_grad():
            for step in range(self.steps):
                places = {name: body.place(name) for name in names}
                weights = {n: grown(p, learned, lambda j, p=p: small[body.name(j, p.rest)], body.layers) for n, p in places.items()}  # type: ignore[misc]
                arrays = recipe.objective.arrays(feed.samples(torch.arange(position + step * count, position + (step + 1) * count).numpy()))
                batch = {name: torch.from_numpy(array.copy()).to(device) for name, array in arrays.items()}
                (recipe.objective.loss(_Large(meta_model, weights), batch).total / float(arrays["weights"].sum())).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return {name: matrix.detach().cpu() for name, matrix in learned.items()}

    def values(self, target: Target, parent: Checkpoint, known: Maps | None) -> Iterator[Tensor]:
        body, place = body_of(parent), target.place
        maps = known if known is not None else self.prepare([parent], Context())
        if not any(f"width/{space}" in maps for space in place.spaces):
            for begin, end in piecewise(target.spec):
                yield grown(place, maps, lambda j, b=begin, e=end: widened(parent.tensors[body.name(j, place.rest)].flat(b, e)), body.layers)  # type: ignore[misc]
            return
        whole = grown(place, maps, lambda j: widened(parent.tensors[body.name(j, place.rest)].load()), body.layers).reshape(-1)
        for begin, end in piecewise(target.spec):
            yield whole[begin:end]
