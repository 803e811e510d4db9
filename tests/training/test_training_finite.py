"""Updates that are not finite are left out, also where the answer is read one step later, and no bit of the others changes."""

import math

import pytest
import torch

from cairn.training.context import Later, Progress
from cairn.training.finite import FiniteGuard


def trained(later: bool, losses: list[float]) -> tuple[torch.Tensor, dict, list[int]]:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    progress, left = Progress(), []
    guard = FiniteGuard(lambda: progress, lambda step, loss, norm: left.append(step))
    for number, loss in enumerate(losses):
        weight.grad = torch.full_like(weight, 0.1 * (number + 1)) if math.isfinite(loss) else torch.full_like(weight, math.nan)
        guard.known()
        guard.step(optimizer, torch.tensor(loss, dtype=torch.float64), weight.grad.norm(), later=later)
        progress.step += 1
    guard.known()
    return weight.detach(), optimizer.state[weight], left


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0], [1.0, math.nan, 3.0], [math.inf, 2.0, math.nan, 4.0]])
def test_asking_later_changes_no_bit(losses):
    now, then = trained(False, losses), trained(True, losses)
    assert torch.equal(now[0], then[0]) and now[2] == then[2] == [n + 1 for n, loss in enumerate(losses) if not math.isfinite(loss)]
    assert all(torch.equal(now[1][key], then[1][key]) for key in now[1]) and now[1]["step"] == sum(map(math.isfinite, losses))


def test_figures_are_asked_for_once_and_only_when_read():
    asked = []
    figures = Later(lambda: asked.append(1) or {"loss": 2.0})
    assert not asked
    assert dict(figures) == {"loss": 2.0} and figures["loss"] == 2.0 and len(figures) == 1 and asked == [1]


def test_a_step_between_log_steps_asks_the_device_nothing(small_recipe, monkeypatch):
    """On a device that is asked later, `update` reads no number of a tensor: `item`, `tolist` and `float` are not called."""
    from tests.training.test_training_run import trainer

    each = trainer(small_recipe)
    batches = each.micro_batches(0)
    each.update(batches)
    honest, asked = FiniteGuard.step, []
    monkeypatch.setattr(FiniteGuard, "step", lambda self, *arguments, **_: honest(self, *arguments, later=True))
    for name in ("item", "tolist", "__float__", "__bool__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *rest, method=method, name=name: asked.append(name) or method(self, *rest))
    figures = each.update(batches)
    assert asked == []
    assert figures["loss"] > 0 and asked
