"""Cards as other people write them, and what a card says of a checkpoint of which nothing is known."""

import codecs
import json

import pytest
import torch

import cairn
from cairn.checkpoint.format import read
from cairn.registry import modelcard, portability, record
from cairn.registry.tree import verify_all

FRONT = "license: apache-2.0\nlanguage: [en, de]\ndate: 2024-02-30\n"


@pytest.fixture
def foreign(zoo, tmp_path):
    """A plain transformers directory, without lineage, with a card of somebody else."""
    import shutil

    folder = tmp_path / "foreign"
    shutil.copytree(zoo / "bf16", folder)
    for name in ("manifest.json", "lineage.json"):
        (folder / name).unlink()
    return folder


CARDS = {
    "plain": f"---\n{FRONT}---\n# A\n".encode(),
    "a byte-order mark": codecs.BOM_UTF8 + f"---\n{FRONT}---\n# A\n".encode(),
    "blank lines first": f"\n  \n---\n{FRONT}---\n# A\n".encode(),
    "line ends of another system": f"---\n{FRONT}---\n# A\n".replace("\n", "\r\n").encode(),
    "two bytes a letter": f"---\n{FRONT}---\n# A\n".encode("utf-16"),
    "dots at the end": f"---\n{FRONT}...\n# A\n".encode(),
}


@pytest.mark.parametrize("name", CARDS)
def test_licence_and_languages_survive(foreign, name):
    (foreign / "README.md").write_bytes(CARDS[name])
    facts = record.record(read.open(foreign)).facts
    assert facts["license"].value == "apache-2.0" and facts["language"].value == ["en", "de"]
    assert modelcard.front_matter(foreign / "README.md")["date"] == "2024-02-30" and "# A" in modelcard.split(modelcard.text_of(foreign / "README.md"))[1]


@pytest.mark.parametrize(("front", "field", "value"), [
    ("language: no", "language", ["no"]), ("language: en", "language", ["en"]), ("language: [en, 3, null]", "language", ["en"]),
    ("license: [mit, apache-2.0]", "license", "mit, apache-2.0"), ("license: 3", "license", None), ("language: {}", "language", None),
])  # fmt: skip
def test_words_and_lists_of_words_are_read_and_other_things_left_out(foreign, front, field, value):
    (foreign / "README.md").write_text(f"---\n{front}\n---\n")
    fact = record.record(read.open(foreign)).facts.get(field)
    assert (fact.value if fact else None) == value


def test_a_card_without_lineage_says_what_is_unknown_and_is_scored_by_it(foreign):
    text = cairn.card(foreign)
    assert "cairn replay" not in text and text.count("Unknown:") >= 4 and "Not stated." in text
    found = modelcard.score(text)
    assert {"intended use", "training data", "procedure", "hyperparameters", "evaluation", "hardware and energy", "license"} <= set(found.missing)
    assert found.completeness <= 0.4


def test_a_card_with_lineage_says_what_is_known(zoo):
    text = cairn.card(zoo / "run")
    assert "`cairn replay` makes it again where its data and its parent are." in text
    assert {"training data", "procedure", "hyperparameters", "evaluation", "hardware and energy"} <= set(modelcard.score(text).present)


def test_an_export_is_judged_against_float64_whatever_the_size_of_its_scores(foreign, monkeypatch):
    """Scores near 1,000: differences of 1e-4 in float32 are rounding there, and a thousandth of them is not."""
    from safetensors.torch import load_file, save_file

    file = foreign / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 3000
    save_file(tensors, file, metadata={"format": "pt"})
    monkeypatch.setattr(portability, "latency", lambda call: {})
    monkeypatch.setattr(portability, "_rate", lambda *_: 0.0)
    opened = read.open(foreign)
    monkeypatch.setattr(portability, "EXPORTS", {"the same": lambda c, model, ids: model(ids).logits, "off": lambda c, model, ids: model(ids).logits * 1.001})
    found = portability.portability(opened, memory=False, store=False)
    largest = float(opened.model(dtype=torch.float64)(torch.zeros(1, 4, dtype=torch.long)).logits.abs().max())
    same, off = found["parity"]
    assert largest > 50 and same["passed"] and not off["passed"] and "is rounding" in off["reason"], found
    json.dumps(found["parity"])


def test_the_memory_of_a_child_is_its_own_next_to_a_large_parent(zoo):
    held = torch.zeros(60 * 2**20)  # 240 MB
    assert held.sum() == 0
    opened = read.open(zoo / "run")
    peak = portability._peak(opened, 8)
    assert peak is not None and peak > opened.tensors.nbytes


def test_what_a_killed_writer_left_behind_is_named_and_a_living_ones_is_not(zoo, tmp_path):
    import subprocess
    import sys

    from cairn.checkpoint.saving.disk import staging_beside

    cairn.export(zoo / "average", tmp_path / "kept")
    load = "from pathlib import Path; from cairn.checkpoint.saving.disk import staging_beside"
    code = f"{load}; p = staging_beside(Path({str(tmp_path / 'gone')!r})); p.mkdir(); print(p)"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    living = staging_beside(tmp_path / "coming")
    living.mkdir()
    assert [str(path) for path in verify_all(tmp_path).left_behind] == [dead]
    cairn.export(zoo / "average", tmp_path / "next")
    assert living.exists() and verify_all(tmp_path).left_behind == [], "swept by the next writer in that folder"
