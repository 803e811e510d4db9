"""What people ask before they reuse a model: scores by hand, examples that must still hold, names, trends."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cairn
from cairn.checkpoint.format import read
from cairn.errors import InputError, NotExplained, NotFoundError
from cairn.registry import attributes, challenges, names, portability, trends
from cairn.registry.record import record
from cairn.registry.statements import describe, kept

A, B, C = attributes.FACTORS["provenance"], attributes.FACTORS["reproducibility"], attributes.FACTORS["portability"]
RECORDS = [
    ({}, (0, 0, 0)),
    ({A[0]: "measured"}, (1 / 4, 0, 0)),
    ({A[0]: "stated", A[1]: "derived"}, (1.5 / 4, 0, 0)),
    ({"hardware specification": "measured"}, (0, 1 / 5, 1 / 8)),
    ({"environment image": "stated", "hardware specification": "stated"}, (0, 1 / 5, 1 / 8)),
    ({factor: "measured" for factor in A}, (1, 0, 0)),
    ({factor: "stated" for factor in B}, (0, 1 / 2, 1 / 8)),
    ({factor: "derived" for factor in C}, (0, 2 / 5, 1)),
    ({factor: "measured" for factor in (*A, *B, *C)}, (1, 1, 1)),
    ({"license": "stated", "latency": "measured", "demos": None}, (0, 0, 1.5 / 8)),
]


@pytest.mark.parametrize(("evidence", "expected"), RECORDS)
def test_ten_records_counted_by_hand(evidence, expected):
    assert tuple(attributes.scores(evidence).values()) == pytest.approx(expected)
    assert len(attributes.missing(evidence, "portability")) == sum(evidence.get(factor) is None for factor in C)


def test_evidence_of_a_checkpoint(zoo, tmp_path):
    shutil.copytree(zoo / "run", tmp_path / "run")
    place = tmp_path / "run/checkpoints/step-00000020"
    before = attributes.evidence_of(record(read.open(place)), results=2, kept={})
    assert attributes.scores(before)["provenance"] == 1 and before["license"] is None and before["demos"] is None
    describe(tmp_path / "run", ["license=mit", "price_per_hour=2"])
    after = attributes.evidence_of(
        record(read.open(place)), results=0, kept={"example": {"a": 1}, "seconds": 3.0, "portability": {"parity": [{"passed": True}]}}
    )
    assert (after["license"], after["demos"], after["framework support"], after["cost estimation"]) == ("stated", "measured", "measured", "derived")
    assert after["performance table"] is None


def test_the_example_of_every_checkpoint_holds_until_the_weights_change(zoo, tmp_path):
    shutil.copytree(zoo, tmp_path / "zoo")
    for name in ("run", "branch", "average", "bf16", "mixed"):
        assert cairn.explain(tmp_path / "zoo" / name).holds is None
        again = cairn.explain(tmp_path / "zoo" / name)
        assert again.holds and again.difference <= 1e-5
    opened = read.open(tmp_path / "zoo/mixed")
    example = kept(opened, "example")
    token = next(iter(example["example"]["scores"]))
    example["example"]["scores"][token] += 2e-5
    from cairn.registry.statements import keep

    keep(opened, "example", example)
    assert cairn.explain(tmp_path / "zoo/mixed").holds is False


def test_an_explanation_agrees_with_transformers(zoo):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    found = cairn.explain(zoo / "mixed", prompt="the stone on")
    model = transformers.AutoModelForCausalLM.from_pretrained(zoo / "mixed")
    chances = model(torch.tensor([found.example["input_ids"]])).logits[0, -1].detach().double().softmax(-1)
    assert [token["id"] for token in found.example["top"]] == chances.topk(5).indices.tolist()
    assert found.example["top"][0]["probability"] == pytest.approx(float(chances.max()), rel=1e-5)
    assert found.outputs[0]["axes"][2].startswith("token: id 0 to 256")


@pytest.mark.parametrize(("missing", "category"), [("tokenizer", "tokenizer"), ("labels", "outputs")])
def test_without_tokenizer_or_labels_nothing_is_explained(zoo, tmp_path, missing, category):
    shutil.copytree(zoo / "mixed", tmp_path / "plain")
    for name in ("lineage.json", "manifest.json", *(["tokenizer.json"] if missing == "tokenizer" else [])):
        (tmp_path / "plain" / name).unlink()
    if missing == "labels":
        config = json.loads((tmp_path / "plain/config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
        (tmp_path / "plain/config.json").write_text(json.dumps(config))
    with pytest.raises(NotExplained, match=f"cairn doctor {category}") as caught:
        cairn.explain(tmp_path / "plain")
    assert challenges.category_of(caught.value) == category and challenges.get(category).answer


def test_seventeen_categories_and_every_error_has_one():
    assert len(challenges.known()) == 17
    assert {challenges.category_of(kind("x")) for kind in (InputError, NotFoundError, cairn.errors.DamagedError, cairn.errors.ResumeError)} <= set(
        challenges.known()
    )
    with pytest.raises(NotFoundError, match="tokenizer"):
        challenges.get("tokeniser")


def test_exports_give_the_same_scores(zoo, tmp_path):
    shutil.copytree(zoo / "mixed", tmp_path / "mixed")
    found = portability.portability(tmp_path / "mixed", memory=False)
    assert {each["format"]: each["passed"] for each in found["parity"]} == {"safetensors, by transformers": True, "torch.export": True}
    assert found["latency"]["p50"] <= found["latency"]["p95"] and found["hardware"]["cores"]
    assert kept(read.open(tmp_path / "mixed"), "portability")["weight_bytes"] == found["weight_bytes"]


def test_parity_is_denied_where_scores_differ_or_an_export_fails(zoo):
    import torch

    exact = torch.zeros(1, 2, 3, dtype=torch.float64)
    assert portability._parity("x", lambda: exact.float() + 0.9e-4, exact, 1e-4)["passed"] is True
    assert portability._parity("x", lambda: exact.float() + 2e-4, exact, 1e-4)["passed"] is False
    assert portability._parity("x", lambda: exact[:, :1], exact, 1e-4)["passed"] is False

    def fails():
        raise RuntimeError("no")

    assert portability._parity("x", fails, exact, 1e-4) == {"format": "x", "passed": False, "difference": None, "reason": "no"}


def test_a_time_that_does_not_repeat_is_unstable(monkeypatch):
    clock = iter(np.cumsum([0.0] + [1.0] * 200).tolist())
    monkeypatch.setattr(portability.time, "perf_counter", lambda: next(clock))
    assert portability.latency(lambda: None)["stable"] is True
    lengths = iter([length for call in range(35) for length in (0.0, 1.0 if call < 20 else 2.0)])
    now = [0.0]

    def jumpy():
        now[0] += next(lengths)
        return now[0]

    monkeypatch.setattr(portability.time, "perf_counter", jumpy)
    assert portability.latency(lambda: None)["stable"] is False


NAMES = [
    ("microsoft/deberta-v3-base", "deberta"), ("xlm-roberta-base", "xlm-roberta"), ("roberta-large", "roberta"),
    ("distilbert-base-uncased", "distilbert"),
    ("bert-base-uncased", "bert"), ("albert-base-v2", "albert"), ("camembert-base", "camembert"), ("distilgpt2", "gpt2"), ("gpt2-medium", "gpt2"),
    ("EleutherAI/gpt-neo-1.3B", "gpt-neo"), ("EleutherAI/gpt-neox-20b", "gpt-neox"), ("EleutherAI/gpt-j-6B", "gpt-j"), ("openai-gpt", "gpt"),
    ("t5-small", "t5"), ("google/mt5-base", "mt5"), ("google/byt5-small", "t5"), ("google/flan-t5-xl", "t5"), ("facebook/wav2vec2-base-960h", "wav2vec2"),
    ("facebook/hubert-large", "hubert"), ("openai/whisper-tiny", "whisper"), ("Helsinki-NLP/opus-mt-en-de", "marian"), ("facebook/mbart-large-50", "mbart"),
    ("facebook/bart-large-cnn", "bart"), ("google/pegasus-xsum", "pegasus"), ("google/electra-small-discriminator", "electra"), ("xlnet-base-cased", "xlnet"),
    ("xlm-mlm-en-2048", "xlm"), ("google/vit-base-patch16-224", "vit"), ("facebook/deit-tiny", "deit"), ("microsoft/swin-tiny", "swin"),
    ("openai/clip-vit-base-patch32", "clip"), ("meta/llama-7b", "llama"), ("bigscience/bloom-560m", "bloom"), ("facebook/opt-125m", "opt"),
    ("allenai/longformer-base-4096", "longformer"), ("google/bigbird-base", "bigbird"), ("microsoft/layoutlm-base", "layoutlm"),
    ("distilroberta-base", "roberta"), ("someone/activity-model", None), ("someone/adopted", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), NAMES)
def test_forty_names_say_their_type(name, kind):
    assert names.model_type(name) == kind


def plain_distance(a, b):
    """Restricted edit distance by its definition, slowly."""
    if not a or not b:
        return len(a) + len(b)
    best = min(plain_distance(a[1:], b) + 1, plain_distance(a, b[1:]) + 1, plain_distance(a[1:], b[1:]) + (a[0] != b[0]))
    if len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[1] == b[0]:
        best = min(best, plain_distance(a[2:], b[2:]) + 1)
    return best


@given(st.text("ab-", max_size=6), st.text("ab-", max_size=6), st.integers(0, 3))
def test_distance(a, b, limit):
    assert names.distance(a, b) == plain_distance(a, b)
    assert names.distance(a, b, limit) == min(plain_distance(a, b), limit + 1)


LOOKALIKES = {
    **{"bert-base-uncasd": "bert-base-uncased", "bert_base_uncased": "bert-base-uncased", "BERT-base-uncased": "bert-base-uncased"},
    **{"bret-base-uncased": "bert-base-uncased", "gqt2": "gpt2", "r0berta-base": "roberta-base"},
    # Two keystrokes, and an honest name: where both are known, neither is told to look like the other.
    **{"bert-base-cased": "bert-base-uncased", "gpt3": None, "roberta-large": None, "llama": None, "bert-base-uncased": None},
}


@pytest.mark.parametrize(("name", "taken_for"), LOOKALIKES.items())
def test_near_duplicates(name, taken_for):
    found = names.Known(["bert-base-uncased", "gpt2", "roberta-base"]).lookalike(name)
    assert (found.known if found else None) == taken_for


def test_slopes_and_ranks_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    for length in (4, 12, 24):
        for series in (draw.normal(size=length), draw.integers(0, 3, length).astype(float)):
            theirs, ours = stats.theilslopes(series, np.arange(length), method="joint"), trends.theil_sen(series)
            assert (ours.value, ours.low, ours.high) == pytest.approx((theirs.slope, theirs.low_slope, theirs.high_slope))


def test_planted_divergence_is_flagged_and_flat_series_are_not():
    draw = np.random.default_rng(1)
    months = np.arange(24)
    up, down = 400 * 1.03**months, 400 * 0.97**months
    planted = [trends.divergence({"a": draw.poisson(up)}, {"a": draw.poisson(down)}).types[0].flagged for _ in range(60)]
    flat = [trends.divergence({"a": draw.poisson(400, 24)}, {"a": draw.poisson(400, 24)}).types[0].flagged for _ in range(200)]
    assert np.mean(planted) >= 0.9 and np.mean(flat) <= 0.05


def test_a_table_of_months_becomes_trends(tmp_path):
    table = tmp_path / "t.csv"
    rows = [f"2022-{m:02d},{kind},{10 * m + (kind == 'bert') * 100},{130 - 10 * m}" for m in range(1, 13) for kind in ("bert", "gpt2")]
    table.write_text("month,type,uploads,discussions\n" + "\n".join(rows))
    found = trends.divergence(*trends.read_table(table))
    assert [(each.type, each.flagged) for each in found.types] == [("bert", True), ("gpt2", True)] and found.types[0].share > 0.6
    table.write_text("month,type,uploads\n")
    with pytest.raises(InputError, match="'discussions'"):
        trends.read_table(table)
    table.write_text("month,type,uploads,discussions\n2022-01,a,many,1\n")
    with pytest.raises(InputError, match="line 2"):
        trends.read_table(table)


def test_documentation_that_grows_and_documentation_that_does_not():
    months = np.repeat(np.arange(12), 20)
    noise = np.random.default_rng(2).normal(0, 0.1, len(months))
    assert trends.documentation(months, 0.3 + 0.03 * months + noise).low > 0
    assert trends.documentation(months, 0.3 - 0.01 * months + noise).low <= 0


def test_concentration():
    assert trends.gini([1, 1, 1, 1]) == pytest.approx(0) and trends.gini([0, 0, 0, 1]) == pytest.approx(0.75) and trends.top_share([5, 3, 1, 1], 2) == 0.8
