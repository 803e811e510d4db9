"""Where a model computes: as asked, else on the accelerator if there is one; what is not there is refused in one sentence."""

import pytest
import torch

from cairn.device import asked, choose, computes, using
from cairn.errors import InputError
from cairn.evaluation.compute import Compute
from cairn.training import parallel


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


def test_a_function_that_computes_says_where_for_all_that_it_calls(machine):
    machine("cuda", 2)

    @computes
    def outer(*, device=None):
        return choose(), inner()

    @computes
    def inner(*, device=None):
        return choose()

    assert outer() == (torch.device("cuda"),) * 2
    assert outer(device="cpu") == (torch.device("cpu"),) * 2
    with using("cuda:1"):
        assert outer() == (torch.device("cuda:1"),) * 2 and outer(device="cpu")[1] == torch.device("cpu")
        assert choose("cpu") == torch.device("cpu") and choose() == torch.device("cuda:1")
    assert asked() is None


def test_a_device_that_is_not_there_is_refused_before_the_function_begins(machine):
    machine(None)
    begun = []

    @computes
    def function(*, device=None):
        begun.append(device)

    with pytest.raises(InputError, match="There is no device 'cuda'"):
        function(device="cuda")
    assert begun == []


def test_models_that_a_thread_reads_compute_where_the_caller_said(machine):
    machine("cuda", 1)
    with using("cpu"):
        assert Compute().device == "cpu" and Compute(device="cuda").device == "cuda"
    assert Compute().device is None
    with pytest.raises(InputError, match="abacus"):
        Compute(device="abacus")


@pytest.mark.parametrize(
    ("kind", "asked", "wanted"), [(None, None, "cpu"), ("cuda", None, "cuda:0"), ("cuda", "cuda:1", "cuda:1"), ("cuda", "cpu", "cpu"), ("mps", None, "cpu")]
)
def test_training_follows_the_same_rule(machine, kind, asked, wanted):
    machine(kind, 2)
    with using(asked):
        assert parallel._device() == torch.device(wanted)


def test_training_refuses_an_accelerator_without_float64_where_it_is_asked_for(machine):
    machine("mps", 1)
    with using("mps"), pytest.raises(InputError, match="adds up in float64"):
        parallel._device()
