"""Tasks of lm-evaluation-harness, its own and the user's."""

from __future__ import annotations

import math
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from pydantic import Field

from cairn.catalog import register
from cairn.data.corpora import digest_of
from cairn.errors import InputError, NotFoundError, suggestion
from cairn.evaluation.engine import engine_of
from cairn.evaluation.measure import Measurement, Score

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer


@register("measurement", "harness")
class Harness(Measurement):
    """Tasks of lm-evaluation-harness with the harness's own metrics, by our engine."""

    tasks: list[str] = Field(min_length=1)
    """Names of tasks, e.g. `[blimp_passive_1, gsm8k]`."""
    include: Path | None = None
    """Folder with task files of your own, in the harness's format; data files that they name by a relative path lie from here."""
    shots: int | None = Field(None, ge=0)
    """Solved examples in front; default: what each task says."""
    limit: int | None = Field(None, ge=1)
    """Items of each task, the first ones; default: all."""
    seed: int = 1234
    """Decides the examples in front."""

    def data_digest(self, feed: Feed | None = None) -> str:
        files = sorted(path for path in self.include.rglob("*") if path.is_file()) if self.include is not None and self.include.is_dir() else []
        mine = {path.name: blake3(path.read_bytes()).hexdigest() for path in files}
        return digest_of({"lm-eval": _version(), **mine})

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        described = super().protocol(feed)
        del described["include"]
        return described

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        _version()
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from cairn.evaluation.harness import HarnessModel

        if self.include is not None and not self.include.is_dir():
            raise NotFoundError(f"There is no folder {self.include} of task files.")
        # Looking through the harness's own thousands of task files takes long; it is done only for tasks that are not the user's.
        manager = TaskManager(include_path=str(self.include), include_defaults=False) if self.include is not None else None
        if manager is None or not set(self.tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=str(self.include) if self.include is not None else None)
        for task in self.tasks:
            if task not in manager.all_tasks:
                raise NotFoundError(f"lm-evaluation-harness has no task '{task}'.{suggestion(task, manager.all_tasks)}")
        found = simple_evaluate(
            HarnessModel(engine_of(model, tokenizer)),
            tasks=list(self.tasks),
            num_fewshot=self.shots,
            limit=self.limit,
            fewshot_random_seed=self.seed,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
        return [score for task, figures in found["results"].items() for score in scores(task, figures, found["n-samples"].get(task, {}).get("effective", 0))]


def scores(task: str, figures: dict[str, Any], n: int = 0) -> list[Score]:
    """What the harness says of one task, `metric,filter` and `metric_stderr,filter`, as scores."""
    found = []
    for name, value in figures.items():
        metric, _, which = name.partition(",")
        if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, (int, float)) or not which:
            continue
        error = figures.get(f"{metric}_stderr,{which}")
        error = float(error) if isinstance(error, (int, float)) else math.nan
        found.append(Score(task, metric if which == "none" else f"{metric} ({which})", float(value), error, n))
    return found


def _version() -> str:
    try:
        return metadata.version("lm-eval")
    except metadata.PackageNotFoundError:
        raise InputError("Tasks of lm-evaluation-harness need it: pip install 'cairn-lm[harness]'.") from None
