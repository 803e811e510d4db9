"""Where a model computes: as asked, else on the accelerator if there is one; what is not there is refused in one sentence."""

import pytest
import torch

from cairn.device import choose
from cairn.errors import InputError


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many accelerators of a kind."""

    def with_accelerators(kind: str | None, count: int = 0) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind) if kind else None)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return with_accelerators


def test_without_an_accelerator_it_is_the_processor(machine):
    machine(None)
    assert choose() == choose("cpu") == choose(torch.device("cpu")) == torch.device("cpu")


def test_the_accelerator_is_the_default_and_the_processor_can_be_asked_for(machine):
    machine("cuda", 1)
    assert choose() == choose("cuda") == torch.device("cuda")
    assert choose("cuda:0") == torch.device("cuda:0")
    assert choose("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("rank", "wanted"), [("0", "cuda:0"), ("1", "cuda:1"), ("3", "cuda:1")])
def test_each_process_of_a_launch_takes_its_own(machine, monkeypatch, rank, wanted):
    machine("cuda", 2)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert choose() == choose("cuda") == torch.device(wanted)
    assert choose("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("kind", "count", "asked"),
    [(None, 0, "cuda"), (None, 0, "gpu"), (None, 0, ""), (None, 0, "meta"), ("cuda", 2, "cuda:2"), ("cuda", 2, "mps"), ("mps", 1, "cuda"), ("cuda", 1, "meta")],
)
def test_what_is_not_there_is_refused(machine, kind, count, asked):
    machine(kind, count)
    with pytest.raises(InputError, match=r"this machine has cpu") as refused:
        choose(asked)
    assert f"'{asked}'" in str(refused.value) and str(refused.value).count(".") == 1
