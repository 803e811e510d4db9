"""The loop: loss, backward, clip, update, callbacks. It knows nothing of papers, of data formats or of storage.

Two rules make a run independent of how it is executed. The loss of an update is the SUM over its positions divided by
the weight of the whole GLOBAL batch, so micro-batches and ranks only change the order of additions. And every random
choice derives from (seed, purpose, step), so that no generator state has to be carried from one process to the next.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from cairn.data.order.feed import Feed, Prefetcher
from cairn.errors import DivergedError, InputError
from cairn.randomness import seed_for
from cairn.training import compiling
from cairn.training.callbacks import Handler
from cairn.training.context import Later, MicroBatch, Moment, Progress
from cairn.training.finite import FiniteGuard
from cairn.training.interrupts import Interrupts
from cairn.training.learned import Learned
from cairn.training.loggers import Logger
from cairn.training.parallel import World, clip_gradients
from cairn.training.recipe import Recipe
from cairn.training.reweighting import weighted_gradients
from cairn.training.teachers import Opened, Teachers
from cairn.training.trained import trained_by


def _parted(values: torch.Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The parts of a loss from all their numbers side by side, the loss itself left out: a number, or lists of them, for each."""
    pieces = values.split([shape.numel() for shape in shapes.values()])
    return {name: piece.view(shape).tolist() for (name, shape), piece in zip(shapes.items(), pieces, strict=True) if name != "loss"}


PRECISION = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""In what the weights are held; bfloat16 is autocast over float32 weights."""


class Trainer:
    """A run in memory: model, optimizer, feed, callbacks, and where it stands. `run` trains; `update` makes one step."""

    def __init__(self, recipe: Recipe, preprocessor: Any, feed: Feed, world: World, logger: Logger, teachers: Opened = MappingProxyType({})) -> None:
        """Build everything from a pinned `recipe`: weights are initialized from its seed, the optimizer is fresh."""
        self.recipe, self.preprocessor, self.feed, self.world, self.logger = recipe, preprocessor, feed, world, logger
        self.progress = Progress()
        self.carried: Mapping[str, bytes] = {}
        torch.use_deterministic_algorithms(recipe.training.deterministic, warn_only=True)
        meta_model = recipe.model.meta_model().to(PRECISION[recipe.training.precision])
        self.trained = trained_by(recipe)
        self.model = world.place(meta_model, self.trained.enter).to_empty(device=world.device)
        recipe.model.initialize(self.model, seed_for(recipe.seed, "weights"))
        self.trained.draw(seed_for(recipe.seed, "adapter"))
        self.optimizer = recipe.optimizer.build(self.model)
        self.handlers: list[Handler] = [callback.handler(self) for callback in recipe.callbacks]
        self.teachers = Teachers(self, teachers)
        objective = recipe.objective.meeting(self.model, self.teachers.models)
        self.recipe = recipe.model_copy(update={"objective": objective})
        self.learned = Learned(objective.learned(self.model, self.teachers.models, seed_for(recipe.seed, "objective")), self.optimizer, world)
        self.before_update: Callable[[], object] = lambda: None
        """Called when gradients are ready and before anything of the state changes: a save that still copies it is waited for here."""
        self._forward: torch.nn.Module | None = None
        self._checked = False
        self._finite = FiniteGuard(lambda: self.progress, self._leave_out)

    # -- one update ---------------------------------------------------------------------------------------------

    def micro_batches(self, position: int) -> list[MicroBatch]:
        """This rank's micro-batches of the update that begins at `position`, on the CPU. A pure function: any thread may ask."""
        recipe, length = self.recipe, self.recipe.data.sample_units
        begin, end = self.world.share(recipe.batch_samples)
        size = (recipe.training.micro_batch or (end - begin) * length) // length
        found = []
        for first in range(position + begin, position + end, size):
            samples = self.feed.samples(np.arange(first, first + size))
            arrays = recipe.objective.arrays(samples)
            if samples.kept is not None:  # what is left out has no weight, whatever the objective makes of it
                arrays["weights"] = arrays["weights"] * samples.kept[:, None]
            inputs = {name: self.world.staged(torch.from_numpy(np.ascontiguousarray(array))) for name, array in arrays.items()}
            found.append(MicroBatch(inputs, float(arrays["weights"].sum(dtype=np.float64)), samples.source, np.arange(first, first + size)))
        return found

    def gradients(self, micro_batches: list[MicroBatch]) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Accumulate the gradient of the global batch; returns its mean loss, a float64 scalar that stays on the device, and the objective's
        other means, which are asked of the device when they are read."""
        (weight,) = self.world.host_sums([sum(micro_batch.weight for micro_batch in micro_batches)])
        if not weight and self.feed.filtered:
            self.logger.message(f"step {self.progress.step + 1}: the filters leave nothing of the batch, nothing is learned from it")
            return torch.zeros((), dtype=torch.float64), {}
        if not weight:
            raise InputError(f"Step {self.progress.step + 1}: no position of the batch counts in the loss; check what the objective says should count.")
        if self.recipe.reweighting is not None:
            return weighted_gradients(self, micro_batches, self.recipe.reweighting)
        totals: dict[str, torch.Tensor] = {}
        for index, micro_batch in enumerate(micro_batches):
            with self.world.accumulating(self.forward, index == len(micro_batches) - 1), self.autocast():
                loss = self.recipe.objective.loss(self.forward, self.moved(micro_batch))
                (loss.total * (self.world.gradient_factor / weight)).backward()
            for name, part in {"loss": loss.total, **loss.parts}.items():
                value = part.detach().to(torch.float64)
                totals[name] = totals[name] + value if name in totals else value
        means = self.world.device_sums(torch.cat([total.flatten() for total in totals.values()])) / weight
        shapes = {name: total.shape for name, total in totals.items()}
        return means[0], Later(lambda: self.recipe.objective.figures(_parted(means.cpu(), shapes)))

    def update(self, micro_batches: list[MicroBatch]) -> Mapping[str, float]:
        """One step on prepared micro-batches: gradient, clipping, the non-finite policy, the optimizer. Returns its figures."""
        torch.manual_seed(seed_for(self.recipe.seed, "step", self.progress.step))
        batch, clip = self.recipe.training.batch, self.recipe.training.clip
        factor = self.recipe.schedule.factor(self.progress.units, batch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        loss, parts = self.gradients(micro_batches)
        self.learned.share()
        for handler in self.handlers:
            handler.before_clip()
        norm = clip_gradients(
            [*self.model.parameters(), *self.learned.parameters.values()], clip or math.inf, torch.float64 if self.world.float64_sums else None
        )
        self.before_update()
        self._finite.known()  # a GPU has come so far meanwhile
        self._finite.step(self.optimizer, loss, norm)
        self.teachers.follow()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.units += batch
        self.progress.position += self.recipe.batch_samples
        rate = self.recipe.optimizer.lr * factor
        return Later(lambda: {"loss": float(loss), "learning_rate": rate, "grad_norm": float(norm), **parts})

    def settle(self) -> None:
        """Know what has come of the last update: whether it was made or left out. Raises `DivergedError` by the recipe's policy."""
        self._finite.known()

    def _leave_out(self, step: int, loss: float, norm: float) -> None:
        """Apply the policy for a non-finite loss or gradient of the update `step`: the weights are still those of the step before."""
        training = self.recipe.training
        if training.non_finite == "stop" or self._finite.in_a_row > training.non_finite_limit:
            self.optimizer.zero_grad(set_to_none=True)
            raise DivergedError(f"Step {step}: loss {loss}, gradient norm {norm}; stopped before the update, the weights are those of step {step - 1}.")
        self.progress.skipped += 1
        self.logger.message(f"step {step}: loss {loss}, gradient norm {norm}: update left out")

    # -- the run ------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.progress.units >= self.recipe.total_units

    def decide_compiling(self, decision: bool) -> None:
        """Settle `compile: auto`; the decision is part of the recipe from now on, so that a resume computes the same bits."""
        self.recipe = self.recipe.changed({"training.compile": decision})
        self._forward = None

    @property
    def forward(self) -> torch.nn.Module:
        """The module that computes losses: the model, compiled and shared with other ranks as the recipe says."""
        if self._forward is None:
            module = self.world.wrap(self.model)
            self._forward = compiling.compiled(module) if self.recipe.training.compile is True else module
        return self._forward

    def check(self) -> None:
        """Let every callback look at the state with which the run begins, once. Raises what they refuse it with."""
        if not self._checked:
            self._checked = True
            for handler in self.handlers:
                handler.begin()

    def run(self, stop_at_step: int | None = None) -> Iterator[Moment]:
        """Train to the end (or to `stop_at_step`), yielding after every update so that the caller can save; measurements and samples follow when
        the state is handed over. Ctrl-C makes the current step the last: it is yielded with `interrupted` and `KeyboardInterrupt` follows."""
        recipe = self.recipe
        # Counted from here: a fork may have changed the size of a step.
        total = self.progress.step + max(0, -(-(recipe.total_units - self.progress.units) // recipe.training.batch))
        last_step = min(total, stop_at_step) if stop_at_step is not None else total
        began = time.perf_counter()
        self._plan_mixture()
        self.model.train()
        self.check()
        self._catch_up(total)
        self._settle_buckets()
        busy, since = 0.0, self.progress.step
        with Interrupts(self.world) as interrupts, contextlib.closing(self._batches(last_step)) as batches:
            for micro_batches in batches:
                before = time.perf_counter()
                figures = self.update(micro_batches)
                busy += time.perf_counter() - before
                moment = Moment(self.progress.step, self.progress.units, last=self.progress.step == total)
                extras: dict[str, Any] = {}
                for handler in self.handlers:
                    extras |= handler.after_update(moment) or {}
                watchers = [handler for handler in self.handlers if handler.observes(moment)]
                if extras or watchers or moment.last or moment.step % recipe.training.log_every == 0:
                    before = time.perf_counter()
                    measured = dict(figures)  # waits for the device, which nothing else in a step does
                    self.settle()
                    busy += time.perf_counter() - before
                    speed = recipe.training.batch * (moment.step - since) / busy
                    self.logger.row(self._row(measured, extras, speed, time.perf_counter() - began), awaits=bool(watchers))
                    busy, since = 0.0, moment.step
                moment.interrupted = interrupts.asked()
                yield moment
                if moment.interrupted:
                    raise KeyboardInterrupt
                self._observe(watchers, moment)

    def _observe(self, watchers: Sequence[Handler], moment: Moment) -> None:
        """Let callbacks look at a state that has been handed over for saving; their figures complete the step's row."""
        if watchers:
            figures: dict[str, Any] = {}
            for handler in watchers:
                figures |= handler.observe(moment) or {}
            self.logger.observed(moment.step, figures)

    def _catch_up(self, total: int) -> None:
        """What an earlier process has left unobserved when it was lost between a save and its callbacks."""
        moment = Moment(self.progress.step, self.progress.units, last=self.progress.step == total)
        if self.world.any(self.progress.step > 0 and self.logger.awaits(self.progress.step)):
            self._observe([handler for handler in self.handlers if handler.observes(moment)], moment)

    def change_mixture(self, weights: Mapping[str, float]) -> None:
        """Mix the sources by `weights` from the next update on, until the recipe's own next change; every rank must ask for the same.

        The change is in the checkpoints from here on. Raises `InputError` unless every source is named and one has a positive weight.
        """
        self.feed.change(self.progress.position, weights)

    def _plan_mixture(self) -> None:
        """Tell the feed of the changes of its mixture that the recipe has in store."""
        batch, planned = self.recipe.training.batch, []
        for change in self.recipe.data.mixture:
            ahead = change.at.units(batch) - self.progress.units
            if ahead > 0:
                planned.append((self.progress.position + -(-ahead // batch) * self.recipe.batch_samples, change.weights))
        self.feed.plan(self.progress.position, planned)

    def _batches(self, last_step: int) -> Generator[list[MicroBatch], None, None]:
        """The micro-batches of each update, prepared ahead. Once the mixture changes, what was prepared ahead is wrong and dropped."""
        size = self.recipe.batch_samples
        while (steps := last_step - self.progress.step) > 0:
            mixture, first = self.feed.mixture, self.progress.position
            with Prefetcher(range(first, first + steps * size, size), self.micro_batches) as prepared:
                for micro_batches in prepared:
                    yield micro_batches
                    if self.feed.mixture is not mixture:
                        break

    def _settle_buckets(self) -> None:
        """One backward pass that is thrown away. DistributedDataParallel lays out its buckets anew after its first one, and in another layout
        three or more processes add up gradients in another order: the first update of a resumed run would differ in its last bits."""
        if self.world.replicas > 1 and not self.world.sharded and not self.world.float64_sums and not self.finished:
            self.gradients(self.micro_batches(self.progress.position)[:1])
            self.optimizer.zero_grad(set_to_none=True)

    def _row(self, figures: Mapping[str, float], extras: Mapping[str, Any], speed: float, since_start: float) -> dict[str, Any]:
        rate = {f"{self.recipe.unit}_per_second": speed, "seconds": since_start}
        skipped = {"skipped": self.progress.skipped} if self.progress.skipped else {}
        return {"step": self.progress.step, self.recipe.unit: self.progress.units, **figures, **rate, **skipped, **extras}

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[dict[str, Any]]:
        """The model as a measurement sees it: no gradients, no training behaviour; restored afterwards."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield {"model": self.model, "preprocessor": self.preprocessor, "feed": self.feed}
        finally:
            self.model.train(was_training)

    def moved(self, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
        """The inputs of a micro-batch where the model computes, which is told whose turn it is: what it draws depends on that alone."""
        self.trained.samples(self.progress.step, micro_batch.samples, self.world.device)
        inputs = {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in micro_batch.inputs.items()}
        return inputs | self.teachers.said(inputs) | self.learned.inputs()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self.recipe.training.precision == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)
