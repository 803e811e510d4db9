"""What the studies of merging are made of: digits and their masks, parted texts, and checks that can fail."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import nn

from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.saving import write
from cairn.evaluation.measure import Score
from cairn.merging.methods import tall_masks
from cairn.studies.merging import digits, domains, plain_masks
from cairn.studies.merging.competition import Competition
from cairn.studies.merging.localized import Localized


def saved(path, weights):
    return write.save(path, model=weights, config={"model_type": "digits"}, lineage=Lineage.record("run", "train", directory=path.parent))


@pytest.fixture
def tuned(tmp_path):
    """A network, and three experts whose changes are of very different sizes, with two hundred digits each that the experts tell right."""
    torch.manual_seed(0)
    net, tasks, experts = digits.network(), {}, {}
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, size in (("small", 0.02), ("middle", 0.05), ("large", 0.1)):
        weights = {key: tensor + size * torch.randn_like(tensor) * (torch.rand_like(tensor) < 0.5) for key, tensor in base.items()}
        net.load_state_dict(weights)
        head, images = nn.Linear(64, 10), torch.rand(200, 8, 8)
        some_digits = digits.Digits(images, head(net(images)).argmax(-1).detach())
        tasks[name], experts[name] = digits.Task(some_digits, some_digits, some_digits, head), saved(tmp_path / name, weights)
    return digits.DigitExperts(saved(tmp_path / "base", base), experts, tasks)


def test_thresholds_are_those_whose_bundles_do_best_when_taken_back_from_disk(tuned, tmp_path):
    net, best = digits.network(), []
    for name, task in tuned.tasks.items():
        right = {}
        for threshold in tall_masks.CANDIDATES:
            packed = tall_masks.bundle(tuned.base, tuned.experts, tmp_path / f"{name}-{threshold}", thresholds=threshold)
            net.load_state_dict(tall_masks.reconstruct(packed, name, tmp_path / f"{name}-{threshold}-again").tensors.load())
            right[threshold] = digits.accuracy(net, task.head, task.validate)
        best.append(max(right, key=right.get))
    assert digits.choose_thresholds(tuned) == best and len(set(best)) > 1


def test_plain_masks_keep_their_density_and_none_keeps_all(tuned):
    start, net = plain_masks.flat(tuned.base), digits.network()
    merged = sum(plain_masks.flat(expert) - start for expert in tuned.experts.values())
    densities = {"small": 0.3, "middle": 0.2, "large": 0.1}

    def share(model, name):
        weights = torch.cat([model.state_dict()[key].reshape(-1) for key in sorted(model.state_dict())])
        changed = weights != start
        assert torch.equal(weights[changed], (start + merged)[changed])
        kept = plain_masks.largest(plain_masks.flat(tuned.experts[name]) - start, densities[name])
        assert abs(float(kept.float().mean()) - densities[name]) < 1e-4
        return float((changed & kept).sum() / kept.sum())

    found = plain_masks.measured(0, tuned.base, tuned.experts, net, densities, share)
    assert found["sum"] == pytest.approx(1, abs=1e-4) and found["magnitude"] == pytest.approx(1, abs=1e-4)
    assert found["random"] == pytest.approx(0.2, abs=0.02)


@given(some.lists(some.integers(-9, 9), min_size=1, max_size=40), some.floats(0, 1))
def test_the_largest_are_those_that_sorting_puts_last(values, density):
    vector = torch.tensor(values, dtype=torch.float32)
    bound = np.sort(np.abs(values))[min(len(values) - 1, round((1 - density) * len(values)))]
    assert plain_masks.largest(vector, density).tolist() == [abs(value) >= bound for value in values]


def test_transforms_are_eight_and_do_what_they_are_called():
    images = torch.rand(3, 8, 8)
    made = {name: transform(images) for name, transform in digits.transforms(0).items()}
    assert len(made) == 8 and all(not torch.equal(one, images) and one.shape == images.shape for one in made.values())
    assert len({tuple(one.flatten().tolist()) for one in made.values()}) == 8
    for name in ("rotate", "mirror", "upside-down", "roll", "transpose", "permute"):
        assert torch.equal(made[name].flatten(1).sort().values, images.flatten(1).sort().values), name
    assert torch.equal(made["transpose"].flip(1), made["rotate"]) and torch.equal(made["invert"] + images, torch.ones_like(images))
    assert torch.equal(made["permute"], digits.transforms(0)["permute"](images)) and not torch.equal(made["permute"], digits.transforms(1)["permute"](images))


def test_a_probe_tells_what_the_features_separate_and_is_frozen():
    pytest.importorskip("sklearn")
    classes = torch.arange(100) % 10
    images = torch.zeros(100, 64)
    images[torch.arange(100), classes] = 10.0
    separate = digits.Digits(images.view(-1, 8, 8), classes)
    head = digits.probe(nn.Flatten(), separate)
    assert digits.accuracy(nn.Flatten(), head, separate) == 1 and not head.weight.requires_grad


@given(some.lists(some.text(max_size=9), max_size=30), some.lists(some.integers(1, 30), max_size=4))
def test_parting_keeps_order_and_ends_a_part_where_its_size_is_reached(texts, sizes):
    *parts, rest = domains.parted(texts, sizes)
    assert [text for part in [*parts, rest] for text in part] == texts
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        later = [*parts[number + 1 :], rest]
        assert sum(map(len, part)) >= size or not any(later)
        assert sum(map(len, part[:-1])) < size


def test_the_drop_of_a_mean_loss_is_a_share_of_the_base():
    class Fixed:
        def __init__(self, loss):
            self.loss = loss

        def of(self, model, tokenizer):
            return [Score("held-out", "loss", self.loss, 0.0, 1), Score("held-out", "bits_per_byte", 9.0, 0.0, 1)]

    assert domains.drop([Fixed(2.0), Fixed(4.0)], 4.0)(None, None).value == pytest.approx(0.25)
    assert domains.drop([Fixed(3.0)], 3.0)(None, None).value == 0


def test_the_check_of_competition_holds_each_setting_apart_and_fails_where_scores_are_shuffled():
    good = {name: {"value": value} for name, value in {"base": 0.2, "task-arithmetic": 0.5, "ties": 0.5, "pcb": 0.52, "shuffled": 0.4}.items()}
    weak = good | {"task-arithmetic": {"value": 0.22}}
    shuffled = good | {"pcb": good["shuffled"]}

    def passed(**settings):
        return {condition.name: condition.shown for condition in Competition().check([{"seed": seed, **settings} for seed in range(3)])}

    assert len(passed(facts=good, domains=good)) == 8 and all(passed(facts=good, domains=good).values())
    assert [name for name, holds in passed(facts=good, domains=weak).items() if not holds] == ["domains: gate, tuned task arithmetic minus base"]
    assert all(name.startswith("facts: PCB") for name, holds in passed(facts=shuffled, domains=good).items() if not holds)
    assert sum(passed(facts=shuffled, domains=shuffled).values()) == 2


def test_the_check_of_masks_fails_for_digits_alone_where_their_masks_are_drawn_at_random():
    merging = {"base": 0.3, "task-arithmetic": {"value": 0.5}, "consensus": {"value": 0.52}}
    run = {"tall": 0.99, "random": 0.4, "magnitude": 0.8, "bytes_over_formula": 1.0, "merging": merging}
    digits_of = {"tall": 0.97, "random": 0.75, "magnitude": 0.7, "sum": 0.3}

    def failed(**changed):
        return [condition.name for condition in Localized().check([run | {"digits": digits_of | changed}] * 3) if not condition.shown]

    assert failed() == [] and failed(tall=digits_of["random"]) == ["digits: TALL reconstruction, share of single-task accuracy"]
    assert failed(random=0.85, magnitude=0.85, sum=0.5) == [
        "digits: random mask of the same density",
        "digits: magnitude mask of the same density",
        "digits: unmasked sum at scale 1",
    ]


@pytest.mark.parametrize("more", [["data.tokenizer={bpe: 300}"], ["objective=mlm", "model.attention=prefix"]], ids=["own words", "special tokens"])
def test_experts_and_tunings_go_on_with_the_tokenizer_of_their_base(more, small_recipe, tmp_path, monkeypatch):
    """A base may have words of its own, or special tokens of its objective; a fork that asks for other ones is refused."""
    from cairn.checkpoint.foreign.export import export
    from cairn.studies.merging import facts
    from cairn.studies.training import architecture_objective
    from cairn.training.forking import recipe_to_fork
    from cairn.training.run import train

    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "cache"))
    base = export(train(small_recipe, tmp_path / "base", [*more, "training.tokens=1 steps"]).newest(), tmp_path / "start")
    tuning = architecture_objective.tuning(0, "ND:MLM", facts.bases.text_file(["one", "two"]))
    for recipe in (facts._expert_recipe(0, [facts.FactPair("A stone marks", "the way")]), domains._expert_recipe(0, ["some text"]), tuning):
        assert "tokenizer" not in recipe["data"] and recipe_to_fork(base, recipe=recipe).data.tokenizer == str(base.path)
