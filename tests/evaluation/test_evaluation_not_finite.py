"""A number that is not finite never becomes an answer: it is nan in the table, null in what is kept, and one sentence where no table is made."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cairn import catalog, statistics
from cairn.checkpoint.format import read
from cairn.cli.main import app
from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError
from cairn.evaluation import harness_results, measure, results
from cairn.evaluation.answers import right_share
from cairn.evaluation.audits.flips import flips
from cairn.evaluation.audits.gap import stability_gap, transition
from cairn.evaluation.audits.stability import stability
from cairn.evaluation.choices import Item, judged
from cairn.evaluation.engine import Engine
from cairn.merging.ablate import AblationRow, agreement
from cairn.merging.methods.tall_masks import choose_thresholds
from cairn.merging.protocols import evaluate_selection
from cairn.models.families.llama import Llama
from cairn.options import configure
from tests.conformance.test_measurements import NAMES, task

NAN, INF = math.nan, math.inf
SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def broken(small_run, tmp_path_factory):
    """The newest checkpoint of the small run as a plain directory, one weight of its last norm not a number."""
    folder = tmp_path_factory.mktemp("broken") / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_run.newest().path / name, folder / name)
    weights = load_file(small_run.newest().path / "model.safetensors")
    weights["model.norm.weight"][0] = NAN
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


# -- every measurement ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if configure("measurement", task(name)).reads == "tokens"])
def test_a_model_whose_numbers_are_none_gets_no_figure(name, small_run, monkeypatch, request):
    if any(part in name for part in ("blimp", "gsm8k", "instruction")):
        request.getfixturevalue("real_data")
    measurement = configure("measurement", task(name))
    model = small_run.newest().model(dtype=torch.float32)
    model.model.layers[0].input_layernorm.weight.data[0] = NAN
    subject = measure._Subject(small_run.newest(), False, {}, measure.Compute())
    try:
        scores = measurement.of(model, small_run.newest().tokenizer, subject._feed_for(measurement))
    except InputError as refused:
        assert "not finite" in str(refused) or "no finite" in str(refused)
        return
    wrong = [score for score in scores if math.isfinite(score.value)]
    assert not wrong, f"{name} answers {wrong}"


def test_it_is_kept_as_null_read_back_as_nan_and_said(broken):
    said: list[str] = []
    tasks = [task("choice")]
    first = measure.evaluate(broken, tasks, progress=said.append)
    assert all(math.isnan(row.value) and math.isnan(row.stderr) for row in first)
    assert any("not finite" in line and "choice accuracy" in line for line in said)
    kept = next(results.folder(read.open(broken)).glob(f"*{first[0].protocol[:16]}.json"))
    assert json.loads(kept.read_text(), parse_constant=pytest.fail)["scores"][0]["value"] is None
    again = measure.evaluate(broken, tasks)
    assert all(math.isnan(row.value) for row in again) and all(math.isnan(row.value) for row in measure.stored_rows(broken))
    done = CliRunner().invoke(app, ["evaluate", str(broken), "--tasks", "choice", f"path={tasks[0]['path']}", "shots=1", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout, parse_constant=pytest.fail)[0]["value"] is None


def test_audits_of_single_items_refuse_it(broken, small_run):
    with pytest.raises(InputError, match="not finite"):
        flips(small_run.newest(), broken, task("choice"), store=False)
    with pytest.raises(InputError, match="not finite"):
        flips(broken, broken, {**task("exact-answer")}, store=False)


# -- one request of several -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("budget", [None, 1])
def test_a_request_that_is_none_leaves_its_neighbours_alone(attention, budget):
    """The embedding of one token is nan: texts that hold it get nan, all others what they get from a sound model."""
    sound, broken = (Llama(**SIZES, attention=attention).build(seed=1).eval() for _ in range(2))
    for bad in (7, 0):  # 0 is also what fills rows up
        broken.load_state_dict(sound.state_dict())
        broken.model.embed_tokens.weight.data[bad] = NAN
        texts = [[5, 6, bad, 9, 4], [5, 6, 8, 9], [5, 6, 8], [1, 2, 3, 4, 5, 6], [9, bad, 1], [3, 2, 1]]
        wanted, found = (Engine(model, budget_tokens=budget).score(texts, [2] * 6) for model in (sound, broken))
        for text, one, two in zip(texts, wanted, found, strict=True):
            if bad in text[:-1]:
                assert math.isnan(two.logprob) and not two.greedy
            else:
                assert two.logprob == pytest.approx(one.logprob, abs=1e-5) and two.greedy == one.greedy


# -- ties -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_tied_tokens_only_the_first_is_the_greedy_one(dtype):
    """A head of zeros: all tokens are equally probable, and decoding takes the first."""
    model = Llama(**SIZES).build(seed=1).eval().to(dtype)
    model.lm_head.weight.data.zero_()
    found = Engine(model).score([[5, 0], [5, 1], [5, 259], [5, 0, 0]])
    assert [scored.greedy for scored in found] == [True, False, False, True]
    assert found[0].logprob == pytest.approx(-math.log(260), abs=1e-4) and found[0].logprob == found[1].logprob


# -- choices --------------------------------------------------------------------------------------------------------


def test_a_choice_that_is_none_makes_the_share_none_and_minus_infinity_is_a_probability():
    items = [Item("a", ("b", "c"), 0), Item("a", ("b", "c"), 1)]
    assert [score.value for score in judged("t", items, np.array([-1.0, -INF, -2.0, -1.0]))][:2] == [1.0, 1.0]
    for wrong in ([NAN, -1.0, -2.0, -1.0], [-INF, -INF, -2.0, -1.0], [INF, -1.0, -2.0, -1.0]):
        scores = judged("t", items, np.array(wrong))
        assert all(math.isnan(score.value) and math.isnan(score.stderr) for score in scores[:2])


def test_a_right_answer_in_which_nothing_is_found_is_refused(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "2 + 3 =", "answer": "five"}\n')
    model, tokenizer = Llama(**SIZES).build(seed=1).eval(), byte_level()
    with pytest.raises(InputError, match=r"line 1: extract='\[0-9\]\+' finds nothing"):
        configure("measurement", {"name": "generation", "path": str(path), "extract": "[0-9]+"}).of(model, tokenizer)
    path.write_text('{"prompt": "2 + 3 =", "answer": "5"}\n')
    wordy = configure("measurement", {"name": "generation", "path": str(path), "extract": "[0-9]{9}|^5$", "new_tokens": 2})
    assert [score.value for score in wordy.of(model, tokenizer)] == [0.0]


# -- results of others, statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_result_file_with_a_figure_that_is_none_is_refused_by_name(tmp_path, value):
    path = tmp_path / "pythia-70m_step1.json"
    path.write_text(f'{{"results": {{"piqa": {{"acc": {value}, "acc_stderr": 0.01}}}}, "config": {{}}}}')
    with pytest.raises(InputError, match=r"pythia-70m_step1.json"):
        harness_results.load(path)


def test_statistics_of_what_is_none_are_none():
    hole = [1.0, NAN, 3.0]
    assert statistics.first_largest(hole) is None and statistics.first_largest([]) is None and statistics.first_largest([2.0, 5.0, 5.0]) == 1
    assert np.isnan(statistics.ranks(hole)).all() and math.isnan(statistics.spearman(hole, [1, 2, 3]))
    assert math.isnan(statistics.kendall(hole, [1, 2, 3])) and math.isnan(statistics.pearson(hole, [1, 2, 3]))
    assert np.isnan(statistics.calibrated([NAN, 1.0], [0.0, 2.0])).tolist() == [True, False]
    assert np.isnan(statistics.calibrated([1.0], [0.0, NAN])).all()
    assert all(map(math.isnan, statistics.rank_sum(hole, [1.0, 2.0])))
    assert math.isnan(statistics.mean_error(hole)) and math.isnan(statistics.ratio(hole, [1, 1, 1])[0])


def test_stability_refuses_a_run_with_a_broken_checkpoint(small_run, tmp_path, monkeypatch):
    """A checkpoint in the middle of a run whose numbers are none is named by the error, not taken for one that answers nothing right."""
    run = tmp_path / "run"
    shutil.copytree(small_run.path, run)
    loaded = measure.Compute.model

    def broken(self, checkpoint):
        model = loaded(self, checkpoint)
        model.model.norm.weight.data[0] = NAN
        return model

    monkeypatch.setattr(measure.Compute, "model", broken)
    with pytest.raises(InputError, match="not finite"):
        stability(run, [task("choice")], store=False)


# -- what is chosen -----------------------------------------------------------------------------------------------------


def test_a_gap_is_not_read_from_a_curve_with_a_hole():
    with pytest.raises(InputError, match=r"The curve is nan at 20 \(1 of 3 points"):
        stability_gap([10, 20, 30], [1.0, float("nan"), 0.9])
    with pytest.raises(InputError, match="The curve is inf at 30"):
        transition("a", [10, 20, 30], [1.0, 1.1, 1.0], [2.0, 1.5, float("inf")])


@pytest.mark.parametrize(("protocol", "where"), [("src-dev", "the source"), ("trg-dev", "the targets")])
def test_no_protocol_chooses_a_checkpoint_that_has_no_score(small_run, tmp_path, protocol, where):
    run = [read.open(path) for path in small_run.checkpoints()]
    values = dict(zip([item.path for item in run], [0.1, float("nan"), 0.4, 0.3], strict=True))
    with pytest.raises(InputError, match=f"{run[1].path.name} has no finite score on {where}"):
        evaluate_selection([run], lambda item, language: values[item.path], "en", ["de"], tmp_path, protocols=[protocol], oracle=True)


def test_no_threshold_is_chosen_by_a_score_that_is_none():
    class Lost:
        def score(self, operation, measure, parents=None):
            return SimpleNamespace(value=float("nan") if operation.thresholds == 0.4 else 0.5)

    with pytest.raises(InputError, match="Expert 1 measures as no finite number"):
        choose_thresholds(Lost(), [None])


def test_a_mixture_without_a_loss_is_ranked_last_and_never_picked():
    nan = float("nan")
    rows = [AblationRow((name,), "d", merge, merge, merge, truth) for name, merge, truth in (("a", nan, 1.0), ("b", 2.0, 2.0), ("c", 3.0, 3.0))]
    assert math.isnan(agreement(rows)["regret"])


def test_a_share_of_answers_that_are_no_numbers_is_none():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert right_share(logits, torch.tensor([1, 1])) == 0.5
    assert math.isnan(right_share(logits.log(), torch.tensor([1, 0])))


GUARDED = {
    **dict.fromkeys(
        ("generation/sample.py", "evaluation/engine.py", "evaluation/answers.py", "evaluation/measurements/accuracy.py"), "asks whether all are finite"
    ),
    **dict.fromkeys(("evaluation/measurements/formats.py", "evaluation/curves.py"), "asks whether all are finite before"),
    **dict.fromkeys(("studies/merging/facts.py", "studies/continual/images.py"), "asks whether all are finite before"),
    **dict.fromkeys(("evaluation/audits/spread.py", "evaluation/audits/stability.py"), "of counts of right answers, or of steps"),
    **dict.fromkeys(
        ("training/objectives/classification.py", "training/objectives/compatible.py"), "a loss that is not finite ends the run or leaves the update out"
    ),
    **dict.fromkeys(("data/order/mixture.py", "fields/vision/image_sets.py"), "of counts and of truth values"),
    "merging/search.py": "what is no number counts as infinitely bad",
    "statistics.py": "`first_largest` itself",
    "models/portrait.py": "an example that people read",
    **dict.fromkeys(("fields/words/measurements/tag_accuracy.py", "fields/words/words.py"), "asks whether all are finite"),
    "fields/words/objectives/token_classification.py": "a loss that is not finite ends the run or leaves the update out",
}
"""Where an argmax or argmin may stand, and why it never makes an answer of nan. Elsewhere: `cairn.statistics.first_largest`."""


def test_no_plain_argmax_becomes_an_answer():
    home = Path(catalog.__file__).parent
    found = {str(file.relative_to(home)) for file in home.rglob("*.py") if re.search(r"arg(max|min)\(", file.read_text())}
    assert found == set(GUARDED)
