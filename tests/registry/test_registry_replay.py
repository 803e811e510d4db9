"""Replay: what lineage says is followed once more. Bitwise where nothing was changed; a changed seed, order or moment is seen."""

import json
import shutil

import pytest

from cairn.checkpoint.format import read
from cairn.checkpoint.saving.write import save
from cairn.errors import InputError, NotFoundError
from cairn.registry.replay import replay
from cairn.registry.statements import kept


@pytest.mark.parametrize(
    "name",
    [
        "run/checkpoints/step-00000005",
        "run/checkpoints/step-00000015",
        "branch/checkpoints/step-00000015",
        "branch/checkpoints/step-00000020",
        "average",
        "bf16",
        "mixed",
    ],
)
def test_every_act_is_replayed_bit_for_bit(zoo, name):
    found = replay(zoo / name, store=False)
    assert (found.outcome, found.distance, found.differing) == ("bitwise", 0.0, []) and found.replayed_digest == found.digest


def forged(source, target, *, recipe=None, optimizer=None, model=None, parents=None):
    """The same checkpoint as if it had been made otherwise."""
    opened = read.open(source)
    lineage = opened.lineage
    options = dict(lineage.options)
    if recipe:
        options["recipe"] = json.loads(json.dumps(options["recipe"]))
        recipe(options["recipe"])
    lineage = lineage.model_copy(update={"options": options, **({"parents": parents} if parents else {})})
    weights, moments = opened.tensors.load(), opened.optimizer.load()
    for change, tensors in ((optimizer, moments), (model, weights)):
        if change:
            change(tensors)
    save(target, model=weights, optimizer=moments, config=opened.config, lineage=lineage, tokenizer=opened.tokenizer, trainer=opened.trainer)


@pytest.fixture
def copied(zoo, tmp_path):
    """The run with its last checkpoint taken out."""
    shutil.copytree(zoo / "run/checkpoints", tmp_path / "run/checkpoints")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000020")
    return tmp_path / "run/checkpoints"


def moment(tensors):
    next(value for name, value in tensors.items() if name.endswith("exp_avg")).mul_(1.5)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": lambda r: r.update(seed=8)},
        {"recipe": lambda r: r["optimizer"].update(lr=1e-4)},
        {"recipe": lambda r: r["data"].update(packing="whole")},
        {"optimizer": moment},
        {"model": lambda t: next(iter(t.values())).add_(1e-3)},
    ],
    ids=["seed", "rate", "order", "moments", "weights"],
)
def test_what_was_made_otherwise_is_seen(zoo, copied, change):
    target = copied / "step-00000020"
    forged(zoo / "run/checkpoints/step-00000020", target, **change)
    found = replay(target)
    assert not found.holds and found.distance > 1e-3
    # No run goes on with another seed or order: a lineage that tells so is refuted without computing.
    assert found.differing or "cannot change" in found.remarks[0]
    assert kept(read.open(target), "replay")["outcome"] == "none"


def test_rounding_is_of_class_tolerance(zoo, copied):
    def rounded(tensors):
        for tensor in tensors.values():
            tensor.mul_(1 + 2**-23)

    forged(zoo / "run/checkpoints/step-00000020", copied / "step-00000020", model=rounded)
    found = replay(copied / "step-00000020", store=False)
    assert found.outcome == "tolerance" and 0 < found.distance < 1e-3
    assert replay(copied / "step-00000020", tolerance=0, store=False).outcome == "none"


def test_what_can_not_be_replayed_is_told(zoo, tmp_path):
    shutil.copytree(zoo / "bf16", tmp_path / "bf16")
    with pytest.raises(NotFoundError, match="--parent"):
        replay(tmp_path / "bf16")
    assert replay(tmp_path / "bf16", parents=[zoo / "average"]).outcome == "bitwise"
    shutil.copytree(zoo / "bf16", tmp_path / "plain")
    for name in ("lineage.json", "manifest.json"):
        (tmp_path / "plain" / name).unlink()
    with pytest.raises(InputError, match="no lineage"):
        replay(tmp_path / "plain")
