"""What every study promises before it is run, and what every committed record must be: what its check makes of its runs."""

import json
import re
from pathlib import Path

import pytest

from cairn import catalog
from cairn.errors import DamagedError, InputError, NotFoundError
from cairn.studies import report, runner
from cairn.studies.conditions import above, judged, stated
from cairn.studies.record import StudyRecord
from cairn.studies.study import Study
from cairn.testing import check_method, checks

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
NAMES, RECORDS = catalog.names("study"), sorted(EVIDENCE.glob("*.json"))


def test_every_study_has_a_committed_record_and_every_record_a_study():
    assert len(NAMES) >= 29 and {StudyRecord.load(path).name for path in RECORDS} == set(NAMES)


CHECKS = [check for path in RECORDS for check in checks("study", StudyRecord.load(path).name, {"record": str(path)})]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_every_study_and_its_committed_record_keep_every_promise(check, tmp_path):
    """Conditions and verdict are computed again from the recorded figures: no figure in a record is typed by hand."""
    check(tmp_path)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_committed_record_says_how_it_was_made_and_holds_its_verdict(path):
    record, values = StudyRecord.load(path), json.loads(path.read_text())
    assert values["verdict"] == record.verdict and values["control_fails"] == record.control_fails
    assert catalog.get("study", record.name).papers[0].card is not None and record.made.commit and record.control.made.commit
    for found in (record.data or {}).values():
        assert re.fullmatch("[0-9a-f]{64}", found["digest"]) and found["origin"]


def test_pages_and_counts_are_those_of_the_records(tmp_path):
    for path in EVIDENCE.iterdir():
        if path.suffix in (".json", ".png"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    for page in report.write(tmp_path, tmp_path / "README.md"):
        assert page.read_text() == (EVIDENCE / page.name).read_text(), f"{page.name}: run `cairn study --report --front README.md`"
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert report.counted([StudyRecord.load(path) for path in RECORDS]) in (ROOT / "README.md").read_text()


class Coin(Study):
    """A study for these tests: honest figures show its claim, sabotaged ones do not, unless `stuck`."""

    minutes = 0.1
    published = "a coin that shows heads"
    protocol = "throw it"
    control = "the coin is turned over"
    stuck: bool = False

    def run(self, seed, work, *, sabotage, say):
        assert work.is_dir() and not any(work.iterdir())
        return {"heads": self.stuck or not sabotage, "weight": 1 + seed / 100}

    def check(self, runs):
        heads = all(run["heads"] for run in runs)
        return [stated("heads", "always", str(len(runs)), heads, main=True), judged("weight", [run["weight"] for run in runs], above(0.9))]

    def also(self, runs):
        return {"throws": str(len(runs))}


class StuckCoin(Coin):
    """The same, with a check that cannot fail."""

    stuck: bool = True


@pytest.fixture
def registered():
    """Registers a study for one test; what others register meanwhile stays."""
    added = []

    def add(study):
        name = study.__name__.lower()
        catalog.register("study", name, paper=catalog.Paper("A Paper", card=99))(study)
        added.append(("study", name))
        return name

    yield add
    for key in added:
        del catalog._entries[key]


def test_a_study_of_somebody_else_is_run_and_one_whose_check_cannot_fail_is_found_out(registered):
    lengthy = "it is thrown with the left hand onto a table of oak, and whoever stands by looks on which side it has come to lie at last"
    with pytest.MonkeyPatch.context() as patch:
        for key in ("protocol", "published", "control"):
            patch.setattr(Coin, key, lengthy)
        assert len(check_method("study", registered(Coin))) == 4
        with pytest.raises(AssertionError, match="the check proves nothing"):
            check_method("study", registered(StuckCoin))
        patch.setattr(Coin, "protocol", "throw it")
        with pytest.raises(AssertionError, match="its protocol is not told"):
            check_method("study", "coin")


@pytest.mark.parametrize(("study", "counts"), [(Coin, True), (StuckCoin, False)])
def test_a_check_that_cannot_fail_does_not_count(study, counts, tmp_path, registered):
    name, evidence = registered(study), tmp_path / "evidence"
    (record,) = runner.study(name, evidence=evidence, work=tmp_path / "work")
    assert record.counts is counts and record.verdict == "holds" and record.seeds == [0, 1, 2]
    kept = json.loads((evidence / f"99-{name}.json").read_text())
    assert len(kept["runs"]) == 3 and len(kept["control"]["runs"]) == 3 and kept["data"] == {}
    assert StudyRecord.load(evidence / f"99-{name}.json").plain() == record.plain()
    pages = runner.report(evidence)
    assert ("proves nothing" in pages[1].read_text()) is not counts and "| throws | 3 |" in pages[1].read_text()


def test_a_record_is_judged_again_without_a_run(tmp_path, registered):
    name, evidence = registered(Coin), tmp_path / "evidence"
    runner.study(name, evidence=evidence, work=tmp_path / "work")
    path = evidence / f"99-{name}.json"
    values = json.loads(path.read_text())
    values["runs"][0]["heads"] = False
    path.write_text(json.dumps(values))
    (record,) = runner.recompute(name, evidence=evidence)
    assert record.verdict == "not at this scale" and json.loads(path.read_text())["verdict"] == record.verdict
    del values["runs"][0]["weight"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="lack a figure"):
        runner.recompute(name, evidence=evidence)
    path.write_text("[1]")
    with pytest.raises(DamagedError, match="not the record of a study"):
        runner.recompute(name, evidence=evidence)
    path.unlink()
    with pytest.raises(NotFoundError):
        runner.recompute(name, evidence=evidence)


def test_a_control_is_run_beside_the_stored_runs_and_the_one_before_is_kept(tmp_path, registered, monkeypatch):
    name, evidence = registered(Coin), tmp_path / "evidence"
    (before,) = runner.study(name, evidence=evidence, work=tmp_path / "work")
    monkeypatch.setattr(Coin, "control", "the coin is melted")
    monkeypatch.setattr(Coin, "run", lambda self, seed, work, *, sabotage, say: {"heads": False, "weight": 0.0} if sabotage else pytest.fail("honest run"))
    (after,) = runner.control(name, evidence=evidence, work=tmp_path / "work")
    assert after.runs == before.runs and after.made == before.made
    assert after.control.takes_away == "the coin is melted" and after.control_fails == ["heads", "weight"]
    assert [(each.takes_away, each.runs) for each in after.earlier_controls] == [("the coin is turned over", before.control.runs)]
    runner.control(name, evidence=evidence, work=tmp_path / "work")
    assert len(StudyRecord.load(evidence / f"99-{name}.json").earlier_controls) == 1, "the same control run again replaces itself"


def test_a_rerun_says_which_data_are_not_those_of_the_record_before(tmp_path, registered, monkeypatch):
    from cairn.data import corpora, reading

    text = tmp_path / "a.txt"

    def run(self, seed, work, *, sabotage, say):
        corpora.resolve(str(text))  # the user's own files have no name that a record could give them
        reading.note("shelf", "a shelf", lambda: text.read_text())
        return {"heads": not sabotage, "weight": 1.0 + seed / 100}

    monkeypatch.setattr(Coin, "run", run)
    name, evidence = registered(Coin), tmp_path / "evidence"
    text.write_text("one")
    (first,) = runner.study(name, evidence=evidence, work=tmp_path / "work")
    (same,) = runner.study(name, evidence=evidence, work=tmp_path / "work")
    text.write_text("two")
    (other,) = runner.study(name, evidence=evidence, work=tmp_path / "work")
    assert first.data == {"shelf": {"origin": "a shelf", "digest": "one"}} and first.other_data == [] == same.other_data and other.other_data == ["shelf"]
    assert "shelf" in runner.told(other)
