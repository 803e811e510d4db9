"""`cairn export --format gguf` and `cairn import FILE.gguf` as typed."""

import pytest

from cairn.checkpoint.format import read

pytest.importorskip("gguf")


def test_there_and_back(cairn, small_run, tmp_path):
    made = cairn("export", small_run.path, "--format", "gguf", "--type", "Q8_0", "-o", tmp_path / "m.gguf", "--json").document
    assert made["types"] == {"F32": 5, "Q8_0": 16}
    plan = cairn("import", tmp_path / "m.gguf", "--dry-run", "--json").document
    assert plan["layout"] == "gguf" and len(plan["tensors"]) == 21 and not (tmp_path / "back").exists()
    assert cairn("import", tmp_path / "m.gguf", "-o", tmp_path / "back", "--dtype", "bfloat16").status == 0
    back = read.open(tmp_path / "back")
    assert back.config["dtype"] == "bfloat16" and back.tokenizer.encode("the stone") == small_run.newest().tokenizer.encode("the stone")
    for arguments, said in (
        (("export", small_run.path, "--type", "Q8_0", "-o", tmp_path / "none"), "--type belongs to"),
        (("export", small_run.path, "--format", "gguf", "--dtype", "float16", "-o", tmp_path / "none"), "leave --dtype"),
        (("import", tmp_path / "none.gguf", "-o", tmp_path / "none"), "no file or folder"),
    ):
        refused = cairn(*arguments)
        assert refused.status == 2 and said in refused.err and refused.err.count("\n") == 1
    assert not (tmp_path / "none").exists()
