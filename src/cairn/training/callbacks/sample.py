"""Let the model write as it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from cairn.catalog import register
from cairn.training.callbacks import Handler, PeriodicCallback

if TYPE_CHECKING:
    from cairn.training.context import Moment, TrainingContext


@register("callback", "sample")
class Sample(PeriodicCallback):
    """Continue fixed prompts with a fixed seed; the texts go to samples.jsonl and to the terminal."""

    prompts: list[str] = ["The "]
    new_tokens: int = Field(48, ge=1)
    temperature: float = Field(0.8, ge=0)
    top_k: int | None = 50

    def needs(self) -> frozenset[str]:
        return frozenset({"tokens"})

    def handler(self, trainer: TrainingContext) -> Handler:
        return _Sampler(self, trainer)


class _Sampler(Handler):
    def __init__(self, callback: Sample, trainer: TrainingContext) -> None:
        self.callback, self.trainer = callback, trainer

    def observes(self, moment: Moment) -> bool:
        return self.callback.due(moment, self.trainer)

    def observe(self, moment: Moment) -> dict[str, Any] | None:
        from cairn.generation.sample import generate_text

        callback = self.callback
        with self.trainer.evaluating() as subject:
            for prompt in callback.prompts:
                text = generate_text(
                    subject["model"],
                    subject["preprocessor"],
                    prompt,
                    max_new_tokens=callback.new_tokens,
                    temperature=callback.temperature,
                    top_k=callback.top_k,
                    seed=self.trainer.recipe.seed,
                )
                self.trainer.logger.sample(moment.step, moment.units, prompt, text)
        return None
