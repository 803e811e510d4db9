"""Cards: parsed and never believed; scored by what stands under their headings; made from what is known, saying what is not."""

import shutil

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import cairn
from cairn.errors import InputError
from cairn.registry import modelcard
from cairn.registry.hub import export_hub
from cairn.registry.modelcard import SECTIONS, claims_in, model_index, score, sections
from cairn.registry.statements import Claim

WORDS = "word " * 20


def test_twelve_cards_counted_by_hand():
    """(card, sections that a person finds in it)"""
    cards = [
        ("", 0),
        ("# Name\n\nA model.", 0),
        (f"# Name\n## Intended use\n{WORDS}", 1),
        ("# Name\n## Intended use\nfor fun", 0),
        (f"# Name\n## Intended uses & limitations\n{WORDS}", 2),
        ("# Name\n## Evaluation results\n\n| a | b |\n|---|---|\n| 1 | 2 |\n", 1),
        ("# Name\n## Evaluation results\n\n| a | b |\n|---|---|\n", 0),
        ("# Name\n## How to use\n```python\nprint(1)\n```", 1),
        ("---\nlicense: mit\n---\n# Name", 1),
        ("---\nlicense: unknown\n---\n# Name\n## License\nMore information needed", 0),
        (f"# Name\n## Training\n### Training data\n{WORDS}\n### Hyperparameters\n{WORDS}", 3),
        ("# Name\n```\n## Citation\n" + WORDS + "\n```\n## Licence\nApache-2.0", 1),
    ]
    assert [round(score(text).completeness * len(SECTIONS)) for text, _ in cards] == [count for _, count in cards]


def test_a_deeper_heading_counts_for_those_around_it():
    parts = {part.title: part.words for part in sections("# A\none\n## B\ntwo three\n### C\nfour\n## D\nfive")}
    assert parts == {"A": 5, "B": 3, "C": 1, "D": 1}


@given(st.sampled_from([heading for headings in SECTIONS.values() for heading in headings]), st.integers(1, 6), st.booleans())
def test_an_empty_heading_never_raises_the_score(heading, level, early):
    text = f"# Name\n\n## Evaluation\n\n{WORDS}\n"
    more = f"{'#' * level} {heading}\n\n"
    assert score(more + text if early and level > 1 else text + more).completeness <= score(text).completeness + (level < 2) * 0


def test_one_broken_block_among_five():
    blocks = "\n".join(f"```python\n{code}\n```" for code in ("x = 1", "import json", "print(2)", "1 / 0", "assert True"))
    assert score(f"# Name\n## Usage\n{blocks}\n```bash\nfalse\n```", run=True).executable == 0.8
    assert score("# Name\n## Usage\n```bash\nfalse\n```", run=True).executable is None and score(blocks).executable is None


claims = st.builds(
    Claim,
    metric=st.sampled_from(["accuracy", "loss"]),
    value=st.floats(-1e6, 1e6, allow_nan=False),
    dataset=st.none() | st.text("abc -:#", min_size=1).filter(str.strip),
    split=st.none() | st.just("test"),
    n=st.none() | st.integers(1, 10**6),
    stderr=st.none() | st.floats(0, 1),
    task=st.none() | st.just({"name": "choice", "items": 3}),
)


@given(st.lists(claims, max_size=4))
def test_model_index_round_trips(listed):
    front = yaml.safe_dump({"model-index": model_index("a", listed)})
    back = claims_in(f"---\n{front}---\n")
    expected = [c.model_copy(update={"source": "model card"}) for c in listed]
    # A claim without a data set gets the placeholder that hubs ask for.
    assert [b.model_copy(update={"dataset": e.dataset}) for b, e in zip(back, expected, strict=True)] == expected


@pytest.mark.parametrize(
    "front",
    [
        "model-index: 5",
        "model-index: [{results: [{metrics: [{value: high}, {value: .nan}, {value: true}, 3]}, 4]}, 5]",
        "license: 2026-99-99\nmodel-index: []",
        "a: &a [x]\nb: [*a, *a]",
        "{",
        "- a list",
    ],
)
def test_hostile_front_matter_says_nothing(front):
    assert claims_in(f"---\n{front}\n---\n# Name") == []
    assert score(f"---\n{front}\n---\n# Name").has_card


def test_card_of_every_checkpoint_of_the_zoo_is_filled_and_scored(zoo):
    from cairn.checkpoint.format import read

    places = [*read.list_checkpoints(zoo / "run"), *read.list_checkpoints(zoo / "branch"), zoo / "average", zoo / "bf16", zoo / "mixed"]
    found = {place: score(cairn.card(place)) for place in places}
    assert all({"how to use", "limitations and bias", "procedure", "citation", "hardware and energy"} <= set(each.present) for each in found.values())
    assert found[read.list_checkpoints(zoo / "run")[-1]].completeness == 0.8, "all but the intended use and the license, which nobody has stated"
    # What nobody said and nobody measured does not count.
    assert "license" in found[zoo / "mixed"].missing and "evaluation" in found[zoo / "mixed"].missing
    assert "evaluation" in found[read.list_checkpoints(zoo / "run")[-1]].present


def test_front_matter_is_what_hubs_read(zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "cache"))  # where a test of read-only folders keeps results of the same model
    hub = pytest.importorskip("huggingface_hub")
    run = shutil.copytree(zoo / "run", tmp_path / "run", ignore=shutil.ignore_patterns("results"))  # measured by this test alone
    rows = {row.metric: row.value for row in cairn.evaluate(run, [{"name": "held-out", "sequences": 8}]) if row.step == 20}
    card = hub.ModelCard(cairn.card(run))
    losses = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert losses == rows and card.data.library_name == "transformers"


def test_hostile_metadata_does_not_break_out_of_the_card(zoo, tmp_path):
    import shutil

    from cairn.registry.statements import describe

    shutil.copytree(zoo / "mixed", tmp_path / "mixed")
    describe(tmp_path / "mixed", ["name='x | y <script>alert(1)</script> `z`'"])
    body = modelcard.split(cairn.card(tmp_path / "mixed"))[1]
    assert "<script>" not in body and "x \\| y" in body


def test_a_folder_for_a_hub_is_whole_and_opens(zoo, tmp_path, monkeypatch):
    made = export_hub(zoo / "run", tmp_path / "pebble")
    assert {"README.md", "config.json", "model.safetensors", "signature.json", "tokenizer.json"} <= set(made["files"])
    text = (tmp_path / "pebble/README.md").read_text()
    assert made["completeness"] == score(text).completeness == 0.8 and score(text).missing == ("intended use", "license")
    monkeypatch.chdir(tmp_path)
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained("pebble")
    assert transformers.AutoModelForCausalLM.from_pretrained("pebble")(tokenizer("a stone", return_tensors="pt").input_ids).logits.shape[-1] == 257
    with pytest.raises(InputError, match="exists"):
        export_hub(zoo / "run", tmp_path / "pebble")
    assert [p.name for p in tmp_path.iterdir()] == ["pebble"]
