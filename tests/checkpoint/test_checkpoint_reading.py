"""What reading promises: the index decides, nothing is made up, followed or run because a file says so, and what is read whole is verified."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cairn
from cairn.checkpoint.format import read, trust
from cairn.checkpoint.format.descent import find
from cairn.errors import CairnError, DamagedError, InputError, MismatchError, NotFoundError, Notice
from tests.faults import flip


@pytest.fixture(scope="module")
def plain(small_run, tmp_path_factory) -> Path:
    """A plain directory, as transformers writes them, in two files with an index."""
    out = tmp_path_factory.mktemp("plain") / "model"
    cairn.export(small_run.newest(), out, shard_bytes=24 * 2**10)
    for name in ("manifest.json", "lineage.json"):
        (out / name).unlink()
    return out


@pytest.fixture
def model(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A family that only transformers builds."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("foreign") / "opt"
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = transformers.OPTConfig(vocab_size=64, bos_token_id=0, eos_token_id=0, pad_token_id=1, **sizes)
    transformers.OPTForCausalLM(config).save_pretrained(out)
    return out


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None takes a key away."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def numbered(model: Path) -> list[Path]:
    return sorted(model.glob("model-*.safetensors"))


# -- the index decides --------------------------------------------------------------------------------------------


def test_a_tensor_that_stands_in_two_files_is_taken_from_the_one_that_the_index_names(model):
    index = json.loads((model / "model.safetensors.index.json").read_text())
    name, home = next(iter(index["weight_map"].items()))
    fresh = load_file(model / home)[name]
    for other in numbered(model):
        if other.name != home:
            save_file(load_file(other) | {name: fresh + 1}, other, metadata={"format": "pt"})
    assert torch.equal(read.open(model).tensors[name].load(), fresh)


def test_what_the_index_names_and_nobody_holds_is_an_error(model):
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.extra.weight"] = numbered(model)[0].name
    index.write_text(json.dumps(document))
    with pytest.raises(DamagedError, match=r"model\.extra\.weight.*does not hold it"):
        _ = read.open(model).tensors
    document["weight_map"]["model.extra.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(DamagedError, match="outside its own directory"):
        _ = read.open(model).tensors


# -- nothing is made up -------------------------------------------------------------------------------------------


def without(folder: Path, name: str, out: Path) -> Path:
    """A copy of a model without one of its tensors, in one file."""
    shutil.copytree(folder, out)
    tensors = {key: tensor for path in sorted(out.glob("*.safetensors")) for key, tensor in load_file(path).items()}
    for path in (*out.glob("*.safetensors"), *out.glob("*.index.json")):
        path.unlink()
    del tensors[name]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_missing_weight_is_refused_by_name_in_every_family(plain, foreign, tmp_path):
    for folder, name in ((plain, "model.layers.1.mlp.down_proj.weight"), (foreign, "model.decoder.layers.1.fc1.weight")):
        assert read.open(folder).model() is not None
        with pytest.raises(MismatchError, match=name.replace(".", r"\.")):
            read.open(without(folder, name, tmp_path / folder.name)).model()


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "max_position_embeddings"])
@pytest.mark.parametrize("family", ["plain", "foreign"])
def test_a_config_that_the_tensors_cannot_be_is_refused_before_anything_is_built(family, key, request, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / family))
    edit(folder / "config.json", **{key: 10**8})
    monkeypatch.setattr(torch, "empty", lambda *unused, **more: pytest.fail("something was built"))
    with pytest.raises(MismatchError, match=r"config\.json says"):
        read.open(folder).model()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no-such-family"},
        {"model_type": None},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"ffn_dim": 24},
        {"model_type": "gpt_neox"},
    ],
)
def test_whatever_transformers_cannot_open_is_one_sentence(foreign, changes, tmp_path):
    folder = Path(shutil.copytree(foreign, tmp_path / "m"))
    edit(folder / "config.json", **changes)
    with pytest.raises(CairnError) as caught:
        read.open(folder).model()
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


# -- no code, no connection ---------------------------------------------------------------------------------------


def test_code_beside_a_model_never_runs_and_nobody_is_asked(foreign, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(foreign, tmp_path / "m"))
    (folder / "modeling_bad.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "elsewhere")}))
    edit(folder / "config.json", auto_map={"AutoConfig": "modeling_bad.Bad", "AutoModelForCausalLM": "modeling_bad.Bad"})
    monkeypatch.setattr("builtins.input", lambda *unused: pytest.fail("a question was asked"))
    assert read.open(folder).model() is not None
    edit(folder / "config.json", model_type="bad")
    with pytest.raises(InputError):
        read.open(folder).model()
    assert not (tmp_path / "ran").exists()


def test_nothing_connects_because_a_file_says_so(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *unused: pytest.fail("a connection was made"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("{}")
    (run / "checkpoints.url").write_text("http://127.0.0.1:9/x\n")
    for reads in (cairn.open, cairn.verify, read.list_checkpoints):
        with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/x.*--follow"):
            reads(run)
    checkpoint = small_run.newest()
    parent = checkpoint.lineage.parents[0] if checkpoint.lineage.parents else None
    hinted = (parent or checkpoint.lineage).model_copy(update={"path": "http://127.0.0.1:9/x", "digest": "0" * 64})
    assert find(hinted, checkpoint.path) is None


def test_a_url_is_opened_where_it_is_asked_for(small_run, tmp_path, monkeypatch):
    pytest.importorskip("upath")
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints.url").write_text(f"file://{small_run.path / 'checkpoints'}\n")
    with pytest.raises(InputError, match="--follow"):
        cairn.open(run)
    monkeypatch.setattr(trust, "_here", set())
    assert cairn.open(run, follow=True).digest == small_run.newest().digest


# -- verified as it is read ---------------------------------------------------------------------------------------


@pytest.fixture
def damaged(small_run, tmp_path) -> Path:
    """A run in whose newest checkpoint one byte of the weights is another."""
    run = Path(shutil.copytree(small_run.path, tmp_path / "run"))
    path = read.list_checkpoints(run)[-1] / "model.safetensors"
    flip(path, path.stat().st_size // 2)
    return run


def test_whatever_reads_the_weights_whole_notices_a_flipped_byte(damaged, tmp_path):
    older, newest = read.list_checkpoints(damaged)[-2:]
    reads = {
        "load": lambda: read.open(newest).tensors.load(),
        "model": lambda: read.open(newest).model(),
        "average": lambda: cairn.average([older, newest], tmp_path / "a"),
        "merge": lambda: cairn.merge("linear", [older, newest], tmp_path / "b"),
        "export": lambda: cairn.export(newest, tmp_path / "c"),
        "diff": lambda: cairn.diff(older, newest),
        "fork": lambda: cairn.fork(newest, tmp_path / "d"),
    }
    for name, act in reads.items():
        with pytest.raises(DamagedError, match="not what was written"):
            act()
            pytest.fail(f"{name} did not notice")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.json", "tokenizer.json", "lineage.json"])
def test_a_resume_refuses_damage_names_the_sound_checkpoint_and_goes_on_from_it(file, small_run, tmp_path):
    run = Path(shutil.copytree(small_run.path, tmp_path / "run"))
    older, newest = read.list_checkpoints(run)[-2:]
    flip(newest / file, (newest / file).stat().st_size // 2)
    with pytest.raises(CairnError, match=f"{older}.*is sound|damaged|not sound"):
        cairn.resume(run)
    with pytest.warns(Notice, match="set aside"):
        resumed = cairn.resume(older)
    assert resumed.newest().digest == small_run.newest().digest and read.list_checkpoints(run)[-1] == newest


def test_a_missing_file_or_manifest_names_what_to_do(small_run, tmp_path):
    run = Path(shutil.copytree(small_run.path, tmp_path / "run"))
    older, newest = read.list_checkpoints(run)[-2:]
    (newest / "config.json").unlink()
    with pytest.raises(DamagedError, match=f"config.json: is missing.*{older} is sound: `cairn resume {older}`"):
        cairn.open(run)
    (newest / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=f"has no manifest.json.*{older} is sound"):
        cairn.open(newest)
    with pytest.warns(Notice, match="set aside"):
        assert cairn.resume(run).newest().digest == small_run.newest().digest


# -- names, hints and places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step-1e5", "step-", "step-00000004-copy", "step-\u00b2", "step--1"])
def test_strange_names_are_passed_over_and_said(name, small_run, tmp_path):
    run = Path(shutil.copytree(small_run.path, tmp_path / "run"))
    shutil.copytree(read.list_checkpoints(run)[0], run / "checkpoints" / name)
    with pytest.warns(Notice, match="passed over"):
        assert len(read.list_checkpoints(run)) == 4


def test_not_to_see_is_not_to_have_none(small_run, monkeypatch):
    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(InputError, match="cannot be listed"):
        read.list_checkpoints(small_run.path)


def test_a_parent_that_moved_is_found_without_reading_what_it_cannot_be(plain, tmp_path, monkeypatch):
    base = Path(shutil.copytree(plain, tmp_path / "base"))
    cairn.average([base, base], tmp_path / "child")
    base.rename(tmp_path / "moved")
    (tmp_path / "a-large-one").mkdir()
    shutil.copyfile(plain / "config.json", tmp_path / "a-large-one" / "config.json")
    save_file({"x": torch.zeros(2**20)}, tmp_path / "a-large-one" / "model.safetensors")
    digested: list[Path] = []
    entry = read._entry
    monkeypatch.setattr(read, "_entry", lambda path: (digested.append(path), entry(path))[1])
    child = read.open(tmp_path / "child")
    found = find(child.lineage.parents[0], child.path)
    assert found is not None and found.path.name == "moved"
    assert digested and not any("a-large-one" in str(path) for path in digested)


# -- files of tensors ---------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda data: LFS, "git-lfs"),
        (lambda data: data[: len(data) // 2], "cut short"),
        (lambda data: data[:20], "cut short"),
        (lambda data: data.replace(b'"F32"', b'"F33"', 1), "type 'F33'"),
        (lambda data: (100_000).to_bytes(8, "little") + b"[" * 100_000, "nested"),
        (lambda data: b"", "not a safetensors file"),
        (lambda data: data.replace(b'"shape":[', b'"shape":[4000000000000000000,', 1)[: len(data)], "sound|has|bytes|JSON"),
    ],
)
def test_a_file_of_tensors_that_is_none_says_which_kind_it_is(make, words, small_run, tmp_path):
    folder = Path(shutil.copytree(small_run.newest().path, tmp_path / "m"))
    for name in ("manifest.json", "lineage.json", "trainer.json"):
        (folder / name).unlink()
    (folder / "optimizer.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(make((folder / "model.safetensors").read_bytes()))
    with pytest.raises(DamagedError, match=words):
        _ = read.open(folder).tensors


def test_redundant_tensors_are_left_out_and_a_head_that_is_another_is_refused(small_run, tmp_path):
    folder = tmp_path / "m"
    cairn.export(small_run.newest(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    edit(folder / "config.json", tie_word_embeddings=True)
    for name in ("manifest.json", "lineage.json"):
        (folder / name).unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="two different ones"):
        read.open(folder).model()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert read.open(folder).model() is not None


def test_there_is_nothing_at_a_path_with_a_zero_byte():
    with pytest.raises((InputError, NotFoundError)):
        read.open("a\0b")


def test_a_model_is_the_same_however_it_is_stored(plain, foreign, tmp_path):
    for number, folder in enumerate((plain, foreign)):
        source, made = read.open(folder), cairn.import_(folder, tmp_path / f"made-{number}")
        assert source.model_digest == made.model_digest and cairn.diff(source, made).same_model
    (tmp_path / "other").mkdir()
    for path in plain.iterdir():
        shutil.copyfile(path, tmp_path / "other" / path.name)
    document = json.loads((plain / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(document, indent=7))
    assert read.open(tmp_path / "other").model_digest == read.open(plain).model_digest
    edit(tmp_path / "other" / "config.json", rope_theta=77.0)
    assert read.open(tmp_path / "other").model_digest != read.open(plain).model_digest
