"""Every ingredient keeps what the public suite asks of it, and what breaks a promise fails by name."""

from typing import Any

import pytest

from cairn import catalog
from cairn.testing import check_method, checks
from cairn.training.callbacks import Callback, Handler

KINDS = ("field", "adapter", "objective", "optimizer", "schedule", "reweighting", "filter", "callback")
MEMBERS = [(kind, name) for kind in KINDS for name in catalog.names(kind)]
OPTIONS: dict[tuple[str, str], dict] = {
    ("objective", "compatible"): {"marker": [220], "end": [13]},
    ("objective", "hidden-distillation"): {"projection": "learned", "layers": [[0, 1]]},
    ("objective", "token-classification"): {"hidden": 0.3},
    ("field", "images"): {"augmentation": {"shift": 2, "mirror": True}},
    ("field", "text"): {"packing": "whole", "documents": "mask"},
    ("adapter", "lora"): {"rank": 2, "dropout": 0.1},
    ("filter", "repeats"): {"longest": 7, "times": 2},
    ("callback", "evaluate"): {"every": "6 steps", "measurements": [{"name": "held-out", "sequences": 4}]},
    ("callback", "sample"): {"every": "6 steps", "new_tokens": 4},
    ("callback", "repeats"): {"every": "6 steps", "limit": 0.05},
}
CHECKS = [check for kind, name in MEMBERS for check in checks(kind, name, OPTIONS.get((kind, name)))]


def test_every_kind_of_ingredient_has_members_and_every_option_that_is_given_is_one_of_a_member():
    assert {kind for kind, _ in MEMBERS} == set(KINDS) == {kind.name for kind in catalog.KINDS.values() if kind.group == "ingredient"}
    assert set(OPTIONS) <= set(MEMBERS) and len(CHECKS) == 2 * len(MEMBERS)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_every_ingredient_keeps_every_promise(check, tmp_path):
    check(tmp_path)


class _Counting(Handler):
    """Writes into every row how often it was called, and forgets it."""

    def __init__(self, trainer: Any) -> None:
        self.called = 0

    def after_update(self, moment: Any) -> dict[str, Any]:
        self.called += 1
        return {"called": self.called}


class Forgetful(Callback):
    """A callback whose state is in no checkpoint."""

    def handler(self, trainer: Any) -> Handler:
        return _Counting(trainer)


class _Nudging(_Counting):
    """Changes the weights by how often it was called."""

    def before_clip(self) -> None:
        for parameter in self.trainer.model.parameters():
            parameter.grad.add_(self.called * 1e-3)

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.trainer = trainer

    def after_update(self, moment: Any) -> dict[str, Any]:
        super().after_update(moment)
        return {}


class Nudging(Callback):
    """A callback whose state decides the weights and is in no checkpoint."""

    def handler(self, trainer: Any) -> Handler:
        return _Nudging(trainer)


@pytest.mark.parametrize(("implementation", "words"), [(Forgetful, "has other figures, first in step 2"), (Nudging, "has other figures|other bits")])
def test_an_ingredient_that_forgets_is_found_out(implementation, words):
    catalog.register("callback", "on-trial")(implementation)
    try:
        with pytest.raises(AssertionError, match=words):
            check_method("callback", "on-trial")
    finally:
        del catalog._entries["callback", "on-trial"], catalog._classes["callback", "on-trial"], catalog._names[implementation]
