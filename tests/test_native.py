"""Kernels are compiled once for a processor, and where they cannot be had torch's own serve, with the same results."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cairn import native

SOURCE = "long cairn_seven(void) { return 7; }\n"
LOSS = """
import torch
from cairn.checkpoint.format.lineage import hardware
from cairn.models.families.llama import Llama
torch.set_num_threads(1)
model = Llama(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256).build(0)
ids = torch.arange(80).remainder(61).view(2, 40)
loss = model(ids, targets=ids).loss
loss.backward()
print(loss.item(), model.get_parameter("model.layers.0.self_attn.k_proj.weight").grad.norm().item(), hardware()["native"])
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CAIRN_NATIVE", raising=False)
    path = tmp_path / "seven.c"
    path.write_text(SOURCE)
    native.library.cache_clear()
    yield path
    native.library.cache_clear()


def folders(source: Path) -> list[Path]:
    return sorted((source.parent / "cache" / "native").glob("*"))


def test_compiled_once(source: Path) -> None:
    if native._compiler() is None:
        pytest.skip("no C compiler")
    assert native.library(source).cairn_seven() == 7 and "seven" in native.loaded()
    (folder,) = folders(source)
    before = (folder / "seven.so").stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library(source).cairn_seven() == 7
    assert [folder] == folders(source) and (folder / "seven.so").stat().st_mtime_ns == before
    source.write_text(SOURCE.replace("7", "8"))
    native.library.cache_clear()
    assert native.library(source).cairn_seven() == 8 and len(folders(source)) == 2


def test_a_compiler_that_fails_is_warned_of_and_leaves_nothing(source: Path) -> None:
    if native._compiler() is None:
        pytest.skip("no C compiler")
    source.write_text("long cairn_seven(void) { return seven; }\n")
    with pytest.warns(UserWarning, match=r"seven\.c could not be compiled, torch's own kernels serve instead: .*seven"):
        assert native.library(source) is None
    assert folders(source) == []


@pytest.mark.parametrize("name, value", [("CC", "no-such-compiler"), ("CAIRN_NATIVE", "0")])
def test_none_to_be_had(source: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library(source) is None
    assert folders(source) == []


def test_a_model_computes_the_same_without() -> None:
    def run(**environment: str) -> tuple[list[float], str]:
        done = subprocess.run([sys.executable, "-c", LOSS], env=os.environ | environment, capture_output=True, text=True, check=True)
        loss, norm, loaded = done.stdout.split(" ", 2)
        return [float(loss), float(norm)], loaded.strip()

    (with_it, loaded), (without, none) = run(), run(CAIRN_NATIVE="0")
    assert none == "[]"
    if native._compiler() is not None:
        assert loaded == "['attention', 'loss']"
    assert with_it == pytest.approx(without, rel=1e-5)
