"""What every study promises before it is run: paper, protocol, seeds, a control; and that its check can fail."""

import json

import pytest

from cairn import catalog
from cairn.studies import runner
from cairn.studies.study import Criterion, Study, verdict

NAMES = catalog.names("study")


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is_about(name):
    entry = catalog.get("study", name)
    item = entry.implementation()
    assert entry.papers and entry.papers[0].card is not None
    assert len(item.protocol) > 100 and len(item.published) > 20 and len(item.control) > 20 and item.minutes > 0
    assert len(set(item.seeds)) >= 3


def committed():
    from pathlib import Path

    return sorted((Path(__file__).parents[2] / "docs" / "evidence").glob("*.json"))


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.stem)
def test_a_committed_record_is_what_the_check_makes_of_its_runs(path):
    """The criteria and the verdict are computed again from the recorded figures: no figure in a record is typed by hand."""
    record = runner.StudyRecord.load(path)
    item = catalog.get("study", record.name).implementation()
    assert item.check(record.runs) == record.criteria and verdict(record.criteria) == record.verdict
    assert item.also(record.runs) == record.also
    assert item.check(record.control_runs) == record.control_criteria and record.control_failed
    assert len(record.runs) == len(record.seeds) == len(item.seeds) and record.commit


def criterion(passed, exact=False):
    return Criterion("x", "", "", passed, exact)


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        ([criterion(True), criterion(True, True)], "holds"),
        ([criterion(True), criterion(False), criterion(True, True)], "partly"),
        ([criterion(False), criterion(True, True)], "not at this scale"),
        ([criterion(True), criterion(False, True)], "fails"),
    ],
)
def test_verdicts(criteria, expected):
    assert verdict(criteria) == expected


class Coin(Study):
    """A study for these tests: honest figures pass, sabotaged ones do not, unless `stuck`."""

    minutes = 0.1
    published = "a coin that shows heads"
    protocol = "throw it"
    control = "the coin is turned over"
    stuck: bool = False

    def run(self, seed, work, *, sabotage, say):
        assert work.is_dir() and not any(work.iterdir())
        return {"heads": self.stuck or not sabotage}

    def check(self, runs):
        return [Criterion("heads", "always", str(len(runs)), all(run["heads"] for run in runs))]

    def also(self, runs):
        return {"throws": str(len(runs))}


class StuckCoin(Coin):
    """The same, with a check that can not fail."""

    stuck: bool = True


@pytest.mark.parametrize(("study", "counts"), [(Coin, True), (StuckCoin, False)])
def test_a_check_that_can_not_fail_does_not_count(study, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "_entries", catalog._entries | {})
    catalog.register("study", study.__name__.lower(), paper=catalog.Paper("A Paper", card=99))(study)
    (record,) = runner.study(study.__name__.lower(), evidence=tmp_path / "evidence", work=tmp_path / "work")
    assert record.holds_up is counts and record.verdict == "holds" and record.seeds == [0, 1, 2]
    kept = json.loads((tmp_path / "evidence" / f"99-{study.__name__.lower()}.json").read_text())
    assert len(kept["runs"]) == 3 and len(kept["control_runs"]) == 3
    assert runner.StudyRecord.load(tmp_path / "evidence" / f"99-{study.__name__.lower()}.json").plain() == record.plain()
    pages = runner.report(tmp_path / "evidence")
    assert ("proves nothing" in pages[1].read_text()) is not counts and "| throws | 3 |" in pages[1].read_text()
