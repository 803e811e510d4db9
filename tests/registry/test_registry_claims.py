"""Claims: the published re-measurements come out as they must, true claims are rarely doubted, and a protocol is followed."""

import math
import shutil

import numpy as np
import pytest

from cairn.randomness import uniform
from cairn.registry import claims
from cairn.registry.query import find
from cairn.registry.statements import Claim, claim

N = 50_000
MODELS = [
    ("tiny", 0.722, 0.6646, -19.7, "over-claimed"),
    ("small", 0.799, 0.7706, -10.9, "over-claimed"),
    ("small, another script", 0.755, 0.7706, 5.8, "under-claimed"),
    ("base", 0.818, 0.8012, -6.8, "over-claimed"),
    ("small distilled", 0.812, 0.8101, -0.8, "confirmed"),
]


@pytest.mark.parametrize(("name", "claimed", "measured", "z", "verdict"), MODELS, ids=[row[0] for row in MODELS])
def test_published_claims_measured_again(name, claimed, measured, z, verdict):
    found = claims.against(Claim(metric="accuracy", value=claimed, n=N), measured, math.sqrt(measured * (1 - measured) / N), N)
    assert found.verdict == verdict and found.z == pytest.approx(z, abs=0.06)
    assert found.low < found.difference < found.high and found.difference == pytest.approx(measured - claimed)


def test_of_true_claims_about_one_in_twenty_is_doubted():
    draws, n, p = 2000, 500, 0.7
    hits = (uniform(1, np.arange(draws * 2 * n)).reshape(2, draws, n) < p).sum(-1) / n
    doubted = [claims.against(Claim(metric="accuracy", value=a, n=n), b, math.sqrt(b * (1 - b) / n), n).verdict != "confirmed" for a, b in hits.T.tolist()]
    assert 0.03 <= np.mean(doubted) <= 0.07


def test_of_a_loss_the_smaller_number_is_the_bolder():
    said = Claim(metric="loss", value=2.0, stderr=0.01)
    assert claims.against(said, 2.5, 0.01).verdict == "over-claimed" and claims.against(said, 1.5, 0.01).verdict == "under-claimed"


@pytest.mark.parametrize(
    ("said", "measured", "stderr", "reason"),
    [
        (Claim(metric="accuracy", value=0.5), 0.5, 0.1, "neither n nor"),
        (Claim(metric="loss", value=2.5, n=100), 2.5, 0.1, "neither n nor"),
        (Claim(metric="accuracy", value=0.5, n=10), 0.5, None, "no standard error"),
        (Claim(metric="accuracy", value=0.5, n=10), 0.5, math.nan, "no standard error"),
    ],
)
def test_what_can_not_be_judged_is_unverifiable_and_not_false(said, measured, stderr, reason):
    found = claims.against(said, measured, stderr)
    assert found.verdict == "unverifiable" and reason in found.reason


def test_ten_of_ten_has_an_error_too():
    sure = Claim(metric="accuracy", value=1.0, n=10)
    same = claims.against(sure, 1.0, 0.0, 10)
    assert same.z == 0 and same.low < 0 < same.high and sure.error() > 0
    assert claims.against(sure, 0.9, 0.095, 10).verdict == "confirmed" and claims.against(sure, 0.5, 0.05, 100).verdict == "over-claimed"
    assert claims.against(sure, 0.9, 0.0).verdict == "unverifiable", "nothing says on how many items"


def test_a_claim_is_measured_again_by_its_own_protocol(zoo, tmp_path):
    import cairn

    shutil.copytree(zoo / "run", tmp_path / "run")
    task = {"name": "held-out", "sequences": 8}
    (row,) = [r for r in cairn.evaluate(tmp_path / "run/checkpoints/step-00000020", [task]) if r.metric == "loss"]
    checkpoint = tmp_path / "run/checkpoints/step-00000020"
    for shift in (0.0, -10.0, 10.0):
        claim(checkpoint, "loss", row.value + shift * row.stderr, stderr=row.stderr, task=task)
    claim(checkpoint, "loss", 1.0, stderr=0.1)
    claim(checkpoint, "accuracy", 0.5, n=10, task=task)
    claim(checkpoint, "loss", 1.0, stderr=0.1, task={"name": "no-such-measurement"})
    found = claims.audit(checkpoint)
    assert [each.verdict for each in found] == ["confirmed", "over-claimed", "under-claimed", *["unverifiable"] * 3]
    assert [each.reason[:14] for each in found[3:]] == ["no protocol is", "the protocol m", "There is no me"]
    assert found[0].n == row.n and found[0].protocol == row.protocol
    # The same from what is stored, measuring nothing.
    from cairn.registry.index import Index

    with Index(tmp_path / "i.sqlite") as index:
        index.add(tmp_path / "run")
        key = find(index, "step=20").rows[0]["key"]
        stored = claims.against_results(index.claims(key), index.results(key))
    assert [each.verdict for each in stored] == [each.verdict for each in found]
