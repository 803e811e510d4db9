"""Let the model write as it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from cairn.catalog import register
from cairn.training.callbacks import Handler, Moment, PeriodicEvent

if TYPE_CHECKING:
    from cairn.training.loop import Trainer


@register("event", "sample")
class Sample(PeriodicEvent):
    """Continue fixed prompts with a fixed seed; the texts go to samples.jsonl and to the terminal."""

    prompts: list[str] = ["The "]
    new_tokens: int = Field(48, ge=1)
    temperature: float = Field(0.8, ge=0)
    top_k: int | None = 50

    def handler(self, trainer: Trainer) -> Handler:
        return _Sampler(self, trainer)


class _Sampler(Handler):
    def __init__(self, event: Sample, trainer: Trainer) -> None:
        self.event, self.trainer = event, trainer

    def after_update(self, moment: Moment) -> dict[str, Any] | None:
        if not self.event.due(moment, self.trainer):
            return None
        from cairn.generation.sample import generate_text

        event = self.event
        with self.trainer.evaluating() as subject:
            for prompt in event.prompts:
                text = generate_text(
                    subject["model"],
                    subject["tokenizer"],
                    prompt,
                    max_new_tokens=event.new_tokens,
                    temperature=event.temperature,
                    top_k=event.top_k,
                    seed=self.trainer.recipe.seed,
                )
                self.trainer.sink.sample(moment.step, moment.tokens, prompt, text)
        return None
