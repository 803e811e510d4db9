"""The public conformance suites: every registered operation passes, and what breaks a promise fails by name."""

from typing import Any, ClassVar, Literal

import pytest
import torch

from cairn import catalog
from cairn.checkpoint.operating import stream
from cairn.checkpoint.operating.stream import Tensorwise
from cairn.errors import NotFoundError
from cairn.testing import check_method, checks, choices, kinds

OPERATIONS = ("operation", "growth", "compression", "adaptation")
CHECKS = [check for kind in OPERATIONS for name in catalog.names(kind) for check in checks(kind, name)]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_every_operation_keeps_every_promise_with_every_choice_of_every_option(check, tmp_path):
    check(tmp_path)


def test_every_kind_of_operation_has_members_and_every_choice_is_tried():
    tried = {str(check) for check in CHECKS}
    for kind in OPERATIONS:
        assert catalog.names(kind)
        for name in catalog.names(kind):
            for choice in choices(catalog.get(kind, name).implementation):
                assert any(f"{kind} {name}: {choice}" in each for each in tried)
    assert sum("average" in each for each in tried) > 10 and any("'pattern'" in each or "targets" in each for each in tried)


class Fair(Tensorwise):
    """The mean."""

    elementwise: ClassVar[bool] = True

    def combine(self, name: str, inputs: Any) -> torch.Tensor:
        return (inputs[0] + inputs[1]) / 2


class Random(Fair):
    def combine(self, name: str, inputs: Any) -> torch.Tensor:
        return torch.rand_like(inputs[0])


class Greedy(Fair):
    def outputs(self, parents: Any) -> Any:
        return super().outputs(parents)[:-1]


class Careless(Fair):
    def check(self, parents: Any) -> None:
        """Everything fits."""


class Untyped(Fair):
    def config(self, parents: Any) -> Any:
        return {**parents[0].config, "tie_word_embeddings": False}


class Mute(Fair):
    def changes(self, parents: Any) -> Any:
        (parents[0].path.parent / ".left-behind").write_text("x")
        return []


class Choosy(Fair):
    mode: Literal["mean", "noise"] = "mean"

    def combine(self, name: str, inputs: Any) -> torch.Tensor:
        return super().combine(name, inputs) if self.mode == "mean" else torch.rand_like(inputs[0])


@pytest.fixture
def registered():
    """Register a class for one test, and take it out again."""
    entered = []

    def enter(implementation: type) -> None:
        catalog.register("operation", "on-trial")(implementation)
        entered.append(implementation)

    yield enter
    for implementation in entered:
        del catalog._entries["operation", "on-trial"], catalog._classes["operation", "on-trial"], catalog._names[implementation]


def test_a_fair_operation_of_somebody_else_passes(registered):
    registered(Fair)
    assert len(check_method("operation", "on-trial")) == 6


@pytest.mark.parametrize(
    ("implementation", "words"),
    [
        (Random, "different checkpoints"),
        (Greedy, "does not have the tensors|is not there|weights do not fit|another tensor"),
        (Careless, "fails on a parent of another shape with RuntimeError instead of refusing"),
        (Untyped, "tied|weights|head"),
        (Mute, "behind"),
        (Choosy, "different checkpoints"),
    ],
)
def test_what_breaks_a_promise_fails(implementation, words, registered):
    registered(implementation)
    with pytest.raises(Exception, match=words):
        check_method("operation", "on-trial")


def test_an_unknown_kind_or_method_is_said(registered):
    assert {kind.name for kind in catalog.KINDS.values() if kind.group != "part"} == set(kinds()) and stream.Operation.sample_parents == 2
    with pytest.raises(NotFoundError, match="no conformance suite for the kind 'corpus'"):
        check_method("corpus", "text")
    with pytest.raises(NotFoundError, match="Did you mean 'average'"):
        check_method("operation", "averag")
