"""Columns of a stored matrix: the same with our kernel and without, wherever they begin and however wide they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cairn.checkpoint.format import lazy, read
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.parts import Part
from cairn.checkpoint.saving import write

DTYPES = {"wide": torch.float32, "half": torch.bfloat16, "bytes": torch.uint8}
SHAPE = (37, 701)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> read.Checkpoint:
    generator = torch.Generator().manual_seed(0)
    model = {name: torch.randint(0, 250, SHAPE, generator=generator).to(dtype) for name, dtype in DTYPES.items()}
    path = tmp_path_factory.mktemp("columns") / "saved"
    return write.save(path, model={"odd": torch.zeros(3, dtype=torch.uint8)} | model, config={}, lineage=Lineage(kind="run", name="train"))


@pytest.mark.parametrize("kernel", [True, False])
@given(
    name=st.sampled_from([*DTYPES]),
    row=st.integers(0, 36),
    rows=st.integers(1, 37),
    column=st.integers(0, 700),
    columns=st.integers(1, 700),
    early=st.integers(0, 63),
)
def test_any_columns(stored: read.Checkpoint, kernel: bool, name: str, row: int, rows: int, column: int, columns: int, early: int) -> None:
    if kernel and lazy._rows_library() is None:
        pytest.skip("no C compiler, so no kernel")
    part = Part(name, (row, column), (min(rows, SHAPE[0] - row), min(columns, SHAPE[1] - column)))
    # The target begins anywhere in a line of the cache, and what lies around it must stay.
    room = torch.full((early + part.count + 64,), 7, dtype=DTYPES[name])
    out = room[early : early + part.count].view(part.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "FEWEST_BYTES", 0 if kernel else 2**60)
        stored.tensors[name].read_part(part, out)
    assert torch.equal(out, stored.tensors[name].load()[part.slices])
    assert (room[:early] == 7).all() and (room[early + part.count :] == 7).all()


def test_few_bytes_need_no_kernel(stored: read.Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(lazy, "_rows_library", lambda: asked.append(True))
    part = Part("wide", (0, 10), (37, 20))
    assert torch.equal(stored.tensors["wide"].read_part(part), stored.tensors["wide"].load()[part.slices]) and not asked
    monkeypatch.setattr(lazy, "FEWEST_BYTES", 37 * 20 * 4)
    assert torch.equal(stored.tensors["wide"].read_part(part), stored.tensors["wide"].load()[part.slices]) and asked == [True]


def test_what_lies_in_a_store_is_not_mapped(stored: read.Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lazy, "FEWEST_BYTES", 0)
    mapped = stored.tensors["wide"]
    whole = lazy.LazyTensor(mapped.spec, lazy.StoreObject(mapped._file.path), mapped._begin)
    monkeypatch.setattr(lazy.StoreObject, "read_into", lambda self, target, position: mapped._file.read_into(target, position))
    part = Part("wide", (1, 10), (20, 33))
    assert torch.equal(whole.read_part(part), mapped.load()[part.slices])
