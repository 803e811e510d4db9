"""Search, comparison, soups, averages with heads, selection protocols: what is chosen, on what, and what is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cairn.checkpoint.format import read
from cairn.errors import InputError, MismatchError, NotFoundError
from cairn.evaluation.measure import Score, evaluate
from cairn.merging import compare as comparing
from cairn.merging.combine import average, merge
from cairn.merging.methods.average import Average
from cairn.merging.methods.ema import decay_weights
from cairn.merging.methods.soup import greedy_order, greedy_soup, uniform_soup
from cairn.merging.protocols import evaluate_selection
from cairn.merging.search import minimise, search, spread
from cairn.merging.target import Bench, MergeTarget, objective
from tests.merging.merge_drawing import drawn, saved, whole


@given(st.integers(1, 4), st.integers(0, 5))
def test_spread_points_lie_more_evenly_than_random_ones(dimensions, seed):
    points = spread(1024, dimensions, seed)
    assert points.shape == (1024, dimensions) and points.min() >= 0 and points.max() < 1
    assert (np.abs((points < 0.5).mean(0) - 0.5) < 0.5 / 1024**0.5).all()  # one standard deviation of random ones
    # On a line the recurrence is that of the golden ratio: 32 points leave no gap beyond its sixth power.
    line = np.sort(spread(32, 1, seed)[:, 0])
    assert np.diff([*line, line[0] + 1]).max() < 0.056


def test_a_search_finds_a_bowl_better_than_spread_points_alone_and_keeps_to_its_budget():
    target, calls = np.array([0.3, 0.8]), []

    def bowl(point):
        calls.append(point)
        return float(((point - target) ** 2).sum())

    best = minimise(bowl, 2, 60, seed=1)
    assert len(calls) == 60 and bowl(best) < 2e-3 < min(bowl(point) for point in spread(10, 2, 1))
    assert np.array_equal(best, minimise(bowl, 2, 60, seed=1))


def towards(goal, lower=True):
    """Distance of a model's final norm to a goal: what the merges below are tuned for."""

    def measure(model, tokenizer):
        value = float((model.model.norm.weight.detach() - goal).norm())
        return Score("goal", "distance", value if lower else -value, 0.01, 100)

    return measure


@pytest.fixture(scope="module")
def checkpoints(small_run):
    return [read.open(path) for path in small_run.checkpoints()]


@pytest.fixture
def goal(checkpoints):
    norms = [checkpoint.tensors["model.norm.weight"].load() for checkpoint in checkpoints]
    return norms[0] + 0.4 * sum(norm - norms[0] for norm in norms[1:])


def test_search_beats_the_defaults_repeats_itself_and_leaves_given_options_alone(checkpoints, goal):
    aim = MergeTarget(towards(goal), None, True, {})
    bench = Bench(checkpoints)
    found = search("task-arithmetic", bench, aim, 16)
    assert len(found.trials) == 16 and found.trials[0]["options"] == {} and found.value == min(trial["value"] for trial in found.trials)
    assert found.options["scale"] == pytest.approx(0.4, abs=0.06) and found == search("task-arithmetic", bench, aim, 16)
    fixed = search("ties", bench, aim, 4, {"scale": 0.7})
    assert all(trial["options"]["scale"] == 0.7 for trial in fixed.trials) and len({trial["options"].get("density") for trial in fixed.trials}) == 4
    assert len(search("linear", bench, aim, 3).trials[1]["options"]["weights"]) == 4
    assert search("ties", bench, aim, 0, {"scale": 0.7}).trials == []
    with pytest.raises(InputError, match="budget of -1"):
        search("ties", bench, aim, -1)


def test_a_merge_with_an_objective_writes_the_best_and_lineage_keeps_every_trial(checkpoints, goal, tmp_path):
    aim = MergeTarget(towards(goal), None, True, {"task": "goal"})
    tuned = merge("task-arithmetic", checkpoints[1:], tmp_path / "t", base=checkpoints[0], objective=aim, budget=8)
    told = tuned.lineage.options["search"]
    assert (
        len(told["trials"]) == 8
        and told["objective"] == {"task": "goal"}
        and tuned.lineage.options["scale"] in [t["options"].get("scale") for t in told["trials"]]
    )
    plain = merge("task-arithmetic", checkpoints[1:], tmp_path / "p", {"scale": tuned.lineage.options["scale"]}, base=checkpoints[0])
    assert all(torch.equal(tuned.tensors[name].load(), plain.tensors[name].load()) for name in plain.tensors)
    untouched = merge("task-arithmetic", checkpoints[1:], tmp_path / "0", {"scale": 0.3}, base=checkpoints[0], objective=aim, budget=0)
    assert untouched.lineage.options["scale"] == 0.3


def test_a_comparison_gives_every_method_the_same_budget_and_judges_the_gate(checkpoints, goal):
    aim = MergeTarget(towards(goal), towards(goal), True, {})
    table = comparing.compare(checkpoints[1:], checkpoints[0], aim, ["ties", "average", "model-stock"], budget=6)
    lines = {line.what: line for line in table.lines}
    assert [line.what for line in table.lines[:1]] == ["base"] and {"task-arithmetic", "ties", "average", "model-stock"} <= set(lines)
    assert lines["ties"].trials == lines["task-arithmetic"].trials == 6 and lines["average"].trials == 1
    assert table.demonstrable and lines["task-arithmetic"].value < lines["base"].value
    assert lines["base"].high - lines["base"].low == pytest.approx(2 * 1.959964 * 0.01, abs=1e-6)
    nowhere = MergeTarget(towards(checkpoints[0].tensors["model.norm.weight"].load()), towards(checkpoints[0].tensors["model.norm.weight"].load()), True, {})
    failed = comparing.compare(checkpoints[1:], checkpoints[0], nowhere, ["task-arithmetic"], budget=3)
    assert not failed.demonstrable and "not demonstrable here" in failed.verdict


def test_choosing_and_reporting_on_the_same_data_is_refused(checkpoints, tmp_path):
    (tmp_path / "a.txt").write_text("the stone on the trail " * 40)
    (tmp_path / "b.txt").write_text("rain comes after the walk " * 40)
    a, b = ({"corpus": str(tmp_path / name), "sequence_length": 32} for name in ("a.txt", "b.txt"))
    with pytest.raises(InputError, match="same data"):
        objective("held-out", checkpoints[0], select=a, report=a)
    with pytest.raises(InputError, match="Did you mean 'loss'"):
        aim = objective("held-out", checkpoints[0], select=a, report=b, metric="los")
        Bench(checkpoints).alone(checkpoints[0], aim.select)
    with pytest.raises(InputError, match="reports on another"):
        comparing.compare(checkpoints[1:], checkpoints[0], objective("held-out", checkpoints[0], select=a, report=None))


def test_a_greedy_soup_is_never_worse_than_its_best_and_takes_what_helps():
    values = [3.0, 1.0, 2.0]
    taken, history = greedy_order(values, lambda chosen: {(1, 2): 0.5, (1, 2, 0): 0.9}[tuple(chosen)], lambda a, b: a < b)
    assert taken == [1, 2] and history == [1.0, 0.5, 0.9]
    taken, _ = greedy_order(values, lambda chosen: 9.0, lambda a, b: a > b)
    assert taken == [0, 2, 1]


def test_soups_are_averages_with_a_lineage(checkpoints, small_run, tmp_path):
    last = checkpoints[-1].tensors["model.norm.weight"].load()
    aim = MergeTarget(towards(last), None, True, {"task": "goal"})
    soup = greedy_soup(checkpoints, tmp_path / "soup", aim)
    assert soup.lineage.options["greedy"]["taken"] == [3] and torch.equal(soup.tensors["model.norm.weight"].load(), last)
    uniform = uniform_soup([small_run.path, small_run.path], tmp_path / "u", last=2)
    assert len(uniform.lineage.parents) == 4 and uniform.lineage.name == "uniform-soup"


def test_an_exponential_average_is_the_recursion_and_torchs_own(small_run, tmp_path):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    result = average([small_run.path], tmp_path / "ema", last=4, method="ema", options={"beta": 0.7})
    models = [read.open(path).model() for path in small_run.checkpoints()]
    reference = AveragedModel(models[0], multi_avg_fn=get_ema_multi_avg_fn(0.7))
    for model in models:
        reference.update_parameters(model)
    for name, parameter in reference.module.named_parameters():
        assert torch.allclose(result.tensors[name].load(), parameter, atol=1e-6)
    assert sum(decay_weights(7, 0.9)) == pytest.approx(1)


def test_for_a_linear_model_the_average_computes_the_ensembles_mean(tmp_path):
    members = [{"w": torch.randn(4, 6, generator=torch.Generator().manual_seed(k), dtype=torch.float64)} for k in range(5)]
    result = average([saved(tmp_path / str(k), tensors) for k, tensors in enumerate(members)], tmp_path / "mean")
    x = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ensemble = sum(tensors["w"] @ x for tensors in members) / 5
    assert (result.tensors["w"].load() @ x - ensemble).abs().max() < 1e-12


def test_the_order_of_checkpoints_is_at_most_rounding(tmp_path):
    members = [saved(tmp_path / str(k), drawn(k)) for k in range(5)]
    forward, backward = average(members, tmp_path / "f"), average(members[::-1], tmp_path / "b")
    # Two units in the last place of the largest partial sum.
    assert (whole(forward) - whole(backward)).abs().max() <= 2 * torch.finfo(torch.float32).eps * max(whole(m).abs().max() for m in members)


def test_heads_are_averaged_shared_or_taken_from_the_first(tmp_path):
    a, b = (saved(tmp_path / name, drawn(seed)) for name, seed in (("a", 0), ("b", 1)))
    shared = saved(tmp_path / "s", drawn(1) | {"lm_head.weight": a.tensors["lm_head.weight"].load()})
    with pytest.raises(MismatchError, match="average them with heads=first"):
        average([a, b], tmp_path / "x", options={"heads": "shared"})
    first = average([a, b], tmp_path / "first", options={"heads": "first"})
    both = average([a, shared], tmp_path / "shared", options={"heads": "shared"})
    for result in (first, both):
        assert torch.equal(result.tensors["lm_head.weight"].load(), a.tensors["lm_head.weight"].load())
        mean = (a.tensors["model.a.weight"].load() + b.tensors["model.a.weight"].load()) / 2
        assert torch.allclose(result.tensors["model.a.weight"].load(), mean)
    with pytest.raises(InputError, match="no tensor is named like a head"):
        average([a, b], tmp_path / "x", options={"heads": "first", "head": ["out.*"]})


def test_counters_may_be_the_last_checkpoints(tmp_path):
    a, b = (saved(tmp_path / str(k), {"w": torch.ones(2) * k, "seen": torch.tensor(k)}) for k in (3, 5))
    assert int(merge("average", [a, b], tmp_path / "m", {"integers": "last"}).tensors["seen"].load()) == 5
    with pytest.raises(MismatchError, match="'seen'"):
        merge("average", [a, b], tmp_path / "x")


def test_protocols_choose_without_the_target_and_mark_the_oracle(tmp_path):
    runs = [[saved(tmp_path / f"{r}-{k}", {"w": torch.tensor([float(r + k)])}) for k in range(4)] for r in range(2)]
    seen = []

    def score(checkpoint, language):
        value = float(checkpoint.tensors["w"].load())
        seen.append((language, value))
        return {"en": -abs(value - 1), "it": value}[language]

    def table(protocols, **options):
        return evaluate_selection(runs, score, "en", ["it"], tmp_path / "work" / str(len(protocols)), protocols=protocols, **options)

    found = {(choice.protocol, choice.run): choice for choice in table(("last", "src-dev", "ca", "ca+ra", "trg-dev"), oracle=True)}
    assert found["last", 0].mean == 3 and found["src-dev", 1].mean == 1 and found["ca", 0].mean == 1.5 and found["ca+ra", None].mean == 2.0
    assert found["trg-dev", 1].oracle and found["trg-dev", 1].mean == 4 and not found["ca", 1].oracle
    with pytest.raises(InputError, match="oracle=True"):
        table(("last", "trg-dev"))
    with pytest.raises(InputError, match="Did you mean 'src-dev'"):
        table(("src_dev",))
    with pytest.raises(InputError, match="source and target"):
        evaluate_selection(runs, score, "it", ["it"], tmp_path)
    seen.clear()
    table(("src-dev",))
    assert [value for language, value in seen if language == "it"] == [1.0, 1.0]


def test_the_command_line_compares_tunes_bundles_and_explains(tmp_path, small_run, monkeypatch, capsys):
    from cairn.cli.main import main

    def cairn(*arguments):
        monkeypatch.setattr("sys.argv", ["cairn", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err

    base, *experts = small_run.checkpoints()[:3]
    (tmp_path / "a.txt").write_text("the stone on the trail marks the way " * 40)
    (tmp_path / "b.txt").write_text("rain comes after the walk and before the stone " * 40)
    data = [f"select.corpus={tmp_path / 'a.txt'}", f"report.corpus={tmp_path / 'b.txt'}", "select.sequence_length=32", "report.sequence_length=32"]
    common = ["--base", base, "--measure", "held-out", "--budget", 2, "--json"]
    code, out, _ = cairn("merge", "compare", *experts, *data, *common, "--methods", "ties,average", "-o", tmp_path / "best")
    document = json.loads(out)
    assert code == 0 and document["lines"][0]["what"] == "base" and read.open(tmp_path / "best").lineage.options["search"]["budget"] == 2
    code, out, _ = cairn("merge", "pcb", *experts, *data, *common, "keep=0.5", "-o", tmp_path / "pcb")
    assert code == 0 and read.open(json.loads(out)["path"]).lineage.options["keep"] == 0.5
    assert cairn("merge", "tall-masks", *experts, "--base", base, "names=[x,y]", "-o", tmp_path / "bundle")[0] == 0
    assert cairn("merge", "reconstruct", tmp_path / "bundle", "expert=y", "-o", tmp_path / "y")[0] == 0
    assert cairn("merge", "greedy-soup", *experts, *data[::2], "--measure", "held-out", "-o", tmp_path / "soup")[0] == 0
    german = ["source.corpus=" + str(tmp_path / "a.txt"), "target.de.corpus=" + str(tmp_path / "b.txt"), "source.sequence_length=32"]
    german.append("target.de.sequence_length=32")
    code, out, _ = cairn("merge", "protocols", base.parent.parent, *german, "--measure", "held-out", "oracle=true", "--json", "-o", tmp_path / "averages")
    chosen = {line["protocol"]: line for line in json.loads(out)}
    assert code == 0 and set(chosen) == {"last", "src-dev", "ca", "trg-dev"} and (tmp_path / "averages" / "ca-0").is_dir()
    aims = {name: {"name": "held-out", "corpus": str(tmp_path / f"{file}.txt"), "sequence_length": 32} for name, file in (("en", "a"), ("de", "b"))}
    losses = {name: [next(r.value for r in evaluate(path, [aim]) if r.metric == "loss") for path in small_run.checkpoints()] for name, aim in aims.items()}
    assert chosen["trg-dev"]["oracle"] and chosen["trg-dev"]["mean"] == min(losses["de"]) and chosen["last"]["scores"] == {"de": losses["de"][-1]}
    assert chosen["src-dev"]["mean"] == losses["de"][losses["en"].index(min(losses["en"]))]
    for arguments, sentence in (
        (["merge", "protocols", base, *german, "-o", tmp_path / "x"], "name it with --measure"),
        (["merge", "protocols", base.parent.parent, *german[::2], "--measure", "held-out", "-o", tmp_path / "x"], "nothing to report on"),
        (["merge", "protocols", base.parent.parent, "source.corpus=x", "target.a.corpus=x", "--measure", "held-out", "-o", tmp_path / "x"], "must not be"),
        (["merge", "protocols", base, *german, "lst=3", "--measure", "held-out", "-o", tmp_path / "x"], "knows no option 'lst'"),
        (["merge", "ties", *experts, "-o", tmp_path / "x"], "name that with --base"),
        (["merge", "linear", *experts], "say where with -o"),
        (["merge", "compare", *experts, "--measure", "held-out"], "--base"),
        (["merge", "compare", *experts, "--base", base], "--measure"),
        (["merge", "linear", *experts, "select.corpus=x", "-o", tmp_path / "x"], "name one with --measure"),
        (["merge", "reconstruct", tmp_path / "bundle", "-o", tmp_path / "x"], "expert=NAME"),
        (["merge", "compare", *experts, *data, *common, "--methods", "tis"], "Did you mean 'ties'"),
        (["ablate", base, "a", "--pool", tmp_path / "p", "--steps", 1], "is not NAME=CORPUS"),
    ):
        code, _, err = cairn(*arguments)
        assert code == 2 and sentence in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()
    parts = [f"a={tmp_path / 'a.txt'}", f"b={tmp_path / 'b.txt'}", f"domain.a={tmp_path / 'b.txt'}", "train.data.held_out=0"]
    code, out, _ = cairn("ablate", base, *parts, "--pool", tmp_path / "pool", "--steps", 1, "--size", 1, "--sequences", 4, "--json")
    assert code == 0 and len(json.loads(out)["ranking"]) == 2 and json.loads(out)["trainings"] == 2


def test_an_average_checks_its_method_like_any_other(small_run, tmp_path):
    with pytest.raises(NotFoundError, match="Did you mean 'average'"):
        average([small_run.path], tmp_path / "x", method="averag")
    assert Average().heads == "averaged"
