"""`cairn import` and `cairn export --format dcp` as typed."""

import json

import pytest
import torch
import yaml

from tests.checkpoint import foreign_files as files

CUTS = {
    "replicated": [".*norm.*"],
    "shard": [{"pattern": r".*(o_proj|down_proj)\.weight", "dim": 1}, {"pattern": r"(model\.embed_tokens|lm_head)\.weight", "vocab": 257}],
}


@pytest.fixture
def folder(small_run, tmp_path):
    """A ZeRO-1 folder over 2 x 2 ranks, with config.json and a spec beside."""
    checkpoint = small_run.newest()
    source = files.deepspeed(tmp_path / "zero", files.state_of(checkpoint), stage=1, data=2, tensors=2)
    (source / "config.json").write_text(json.dumps(checkpoint.config))
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(CUTS))
    return source


def test_a_dry_run_tells_and_an_import_does(cairn, folder, small_run, tmp_path):
    spec = ("--spec", tmp_path / "spec.yaml")
    plan = cairn("import", folder, "--pickle", *spec, "--dry-run", "--json").document
    assert plan["layout"] == "deepspeed" and plan["grid"] == {"pipeline": 1, "tensor": 2, "data": 2} and len(plan["tensors"]) == 21
    told = cairn("import", folder, "--pickle", *spec, "--dry-run")
    assert told.status == 0 and "model.norm.weight" in told.out and "replicated" in told.out and "exp_avg" in told.out
    made = cairn("import", folder, "--pickle", *spec, "--tokenizer", small_run.newest().path, "-o", tmp_path / "new", "--json").document
    assert cairn("verify", made["path"]).status == 0
    found = cairn("diff", made["path"], small_run.newest().path, "--json").document
    assert "import: deepspeed" in cairn("show", made["path"]).out and found
    assert cairn("generate", made["path"], "--prompt", "the", "--json").status == 0
    assert cairn("catalog", "layout").out.count("layout") >= 6


def test_refusals_are_one_sentence(cairn, folder, tmp_path):
    for arguments, fragments in [
        ((folder, "--pickle", "-o", tmp_path / "new"), ["same", "rule"]),
        ((folder, "-o", tmp_path / "new"), ["--pickle"]),
        ((folder, "--pickle"), ["-o", "--dry-run"]),
        ((folder, "--layout", "megatrn", "-o", tmp_path / "new"), ["megatron"]),
        ((folder, "--pickle", "--spec", tmp_path / "none.yaml", "-o", tmp_path / "new"), ["none.yaml"]),
    ]:
        answer = cairn("import", *arguments)
        lines = answer.err.strip().splitlines()
        assert answer.status == 2 and len(lines) == 1 and lines[0].startswith("cairn: "), answer.err
        assert any(fragment in lines[0] for fragment in fragments), lines[0]
    assert not (tmp_path / "new").exists()


def test_export_to_torch_and_back(cairn, small_run, tmp_path):
    written = cairn("export", small_run.path, "--format", "dcp", "--optimizer", "-o", tmp_path / "dcp", "--json").document
    assert written["tensors"] == len(small_run.newest().tensors)
    back = cairn("import", tmp_path / "dcp", "--pickle", "-o", tmp_path / "back", "--json").document
    from cairn.checkpoint.format import read

    ours, theirs = small_run.newest(), read.open(back["path"])
    assert ours.model_digest == theirs.model_digest
    assert all(torch.equal(lazy.load(), theirs.optimizer[name].load()) for name, lazy in ours.optimizer.items())
