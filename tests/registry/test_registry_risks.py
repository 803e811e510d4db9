"""Risks: each planted fault is found and told in a sentence; a clean checkpoint raises no alarm."""

import json
import pickle
import shutil
import subprocess
import zipfile

import pytest

from cairn.checkpoint.format.manifest import Manifest, entry_of
from cairn.errors import InputError, NotFoundError
from cairn.registry import licenses, risks, signing
from cairn.registry.statements import claim, describe
from tests.faults import flip


@pytest.fixture
def tree(zoo, tmp_path):
    """A copy of the zoo, licensed throughout."""
    shutil.copytree(zoo, tmp_path / "zoo")
    for name in ("run", "branch"):
        describe(tmp_path / "zoo" / name, ["license=mit", "data_licenses={walks: cc0-1.0}"])
    for name in ("average", "mixed", "bf16"):
        describe(tmp_path / "zoo" / name, ["license=apache-2.0"])
    return tmp_path / "zoo"


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """Two SSH keys, and a file in which the first is allowed."""
    folder = tmp_path_factory.mktemp("keys")
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not on this machine")
    for name in ("ours", "theirs"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "allowed").write_text(f"stone@example.org {(folder / 'ours.pub').read_text()}")
    return folder


def alarms(path, **options):
    return [risk for risk in risks.audit(path, **options) if risk.level == "alarm"]


def test_a_clean_tree_raises_no_alarm(tree):
    found = risks.audit_all(tree, names=["llama-7b", "runner"])
    assert len(found) == 9 and [risk for each in found.values() for risk in each if risk.level != "note"] == []


def rewrite(folder, name, change):
    """Alter a file and forge the manifest to fit."""
    change(folder / name)
    files = {p.name: entry_of(p.read_bytes()) for p in folder.iterdir() if p.name != "manifest.json"}
    (folder / "manifest.json").write_bytes(Manifest.of(files).dump())


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"x")


def remote_code(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"A": "b.c"}}))


PLANTED = {
    "pickle": (lambda t: (t / "mixed/weights.dat").write_bytes(pickle.dumps({"a": 1})), "mixed", "a pickle"),
    "pickle in an archive": (lambda t: archive(t / "mixed/extra.dat"), "mixed", "archive with a pickle"),
    "pickle by name": (lambda t: (t / "mixed/pytorch_model.bin").write_bytes(b"abcd"), "mixed", "holds pickles"),
    "program": (lambda t: (t / "mixed/modeling.py").write_text("x = 1"), "mixed", "program"),
    "remote code": (lambda t: rewrite(t / "mixed", "config.json", remote_code), "mixed", "auto_map"),
    "edited weights": (lambda t: flip(t / "mixed/model.safetensors", 5000), "mixed", "not the bytes"),
    "edited parent": (lambda t: rewrite(t / "average", "model.safetensors", lambda p: flip(p, 5003)), "bf16", "another state now"),
    "conflicting license": (lambda t: describe(t / "run", ["license=cc-by-nc-4.0"]), "mixed", "forbids commercial use"),
    "conflicting data": (lambda t: describe(t / "run", ["data_licenses={walks: gpl-3.0}"]), "bf16", "stay under it"),
    "name": (lambda t: describe(t / "mixed", ["name=1lama-7b"]), "mixed", "may be taken for 'llama-7b'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(tree, fault):
    plant, where, words = PLANTED[fault]
    plant(tree)
    found = alarms(tree / where, names=["llama-7b"])
    assert any(words in risk.sentence for risk in found), found


def test_an_over_claimed_score_is_found(tree):
    import cairn

    checkpoint = tree / "run/checkpoints/step-00000020"
    task = {"name": "held-out", "sequences": 8}
    (row,) = [r for r in cairn.evaluate(checkpoint, [task]) if r.metric == "loss"]
    claim(checkpoint, "loss", row.value, stderr=row.stderr, task=task)
    assert alarms(checkpoint) == []
    claim(checkpoint, "loss", row.value - 5 * row.stderr, stderr=row.stderr, task=task)
    assert "is claimed" in alarms(checkpoint)[0].sentence == alarms(checkpoint, measure=True)[0].sentence and len(alarms(checkpoint)) == 1


def test_signatures_hold_for_these_bytes_and_these_signers(tree, keys):
    from cairn.checkpoint.format import read

    place = tree / "mixed"
    assert signing.check(read.open(place)).state == "none"
    signing.sign(place, keys / "ours")
    assert signing.check(read.open(place), keys / "allowed") == signing.Signature("good", "stone@example.org")
    assert signing.check(read.open(place)).state == "unknown"
    signing.sign(place, keys / "theirs")
    assert signing.check(read.open(place), keys / "allowed").state == "unknown"
    signing.sign(place, keys / "ours")
    rewrite(place, "model.safetensors", lambda p: flip(p, 5003))
    assert signing.check(read.open(place), keys / "allowed").state == "bad"
    assert any("after they were signed" in risk.sentence for risk in alarms(place))
    with pytest.raises(NotFoundError, match="ssh-keygen"):
        signing.sign(place, keys / "nobody")
    with pytest.raises(InputError, match="does not sign"):
        signing.sign(place, keys / "allowed")
    with pytest.raises(NotFoundError, match="allowed signers"):
        signing.check(read.open(place), keys / "nobody")


def test_any_changed_bit_of_any_file_changes_the_digest_of_the_manifest(zoo):
    """200 bits, drawn over all files."""
    import random

    draw = random.Random(0)
    files = {p.name: p.read_bytes() for p in (zoo / "mixed").iterdir() if p.name != "manifest.json"}
    whole = Manifest.of({name: entry_of(data) for name, data in files.items()})
    for _ in range(200):
        name = draw.choice(sorted(files))
        data = bytearray(files[name])
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        changed = Manifest.of(whole.files | {name: entry_of(bytes(data))})
        assert changed.files != whole.files and (changed.digest != whole.digest or name == "lineage.json")


@pytest.mark.parametrize(
    ("child", "parent", "answer"),
    [
        ("mit", "apache-2.0", "ok"),
        ("apache-2.0", "gpl-3.0", "conflict"),
        ("gpl-3.0", "GPL-3.0-or-later", "ok"),
        ("agpl-3.0", "gpl-3.0", "ok"),
        ("mit", "cc-by-nc-4.0", "conflict"),
        ("cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0", "ok"),
        ("cc-by-4.0", "cc-by-sa-4.0", "conflict"),
        ("apache-2.0", "bigscience-bloom-rail-1.0", "conflict"),
        ("openrail", "creativeml-openrail-m", "ok"),
        ("mit", "cc-by-nc-nd-4.0", "conflict"),
        ("cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0", "conflict"),
        ("mit", "our own terms", "review"),
        (None, "mit", "review"),
        ("mit", None, "review"),
    ],
)
def test_licenses(child, parent, answer):
    found = licenses.check(child, parent)
    assert found.answer == answer and len(found.rule) > 10


def test_what_is_unknown_is_never_fine():
    assert all(licenses.check("mit", other).answer == "review" for other in ("", "other", "unknown", "custom"))
    assert licenses.corpus_license("gsm8k") == "mit" and licenses.corpus_license("elements") == "cc-by-sa-3.0"
    assert licenses.corpus_license("tiny-shakespeare") == "public-domain" and licenses.corpus_license("my/books.txt") is None
    assert licenses.check("mit", licenses.corpus_license("python-docs")).answer == "review"


def test_no_directory_is_told(tmp_path):
    with pytest.raises(NotFoundError):
        risks.audit(tmp_path / "nothing")
    with pytest.raises(NotFoundError):
        risks.audit_all(tmp_path)
