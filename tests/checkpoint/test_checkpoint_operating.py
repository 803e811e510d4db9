"""What the frame of operations guards: sameness by meaning, ties by the config, finite values, quantized weights, what travels along."""

import json
import math
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file

from cairn import catalog
from cairn.checkpoint.foreign.export import export, export_dcp
from cairn.checkpoint.foreign.importing import import_
from cairn.checkpoint.format import read
from cairn.checkpoint.format.carried import carried
from cairn.checkpoint.format.redundant import redundant
from cairn.checkpoint.operating import sameness
from cairn.checkpoint.saving.disk import staging_beside
from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError, MismatchError
from cairn.growth.enlarge import grow
from cairn.merging.combine import average, merge
from cairn.options import configure
from tests import ready

SIZES = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def directory(path, seed=0, *, config=None, change=None, tied=True, dtype=torch.float32, **more):
    """A transformers directory of a tiny Llama, with tokenizer; `change` gets its tensors, `config` and `more` are keys of config.json."""
    architecture = configure("architecture", {"name": "llama", **SIZES, "tie_word_embeddings": tied})
    tensors = {name: p.detach().to(dtype) for name, p in architecture.build(seed).named_parameters()}
    path.mkdir()
    for name, data in byte_level().files().items():
        (path / name).write_bytes(data)
    (path / "config.json").write_text(json.dumps({**architecture.to_hf(), **(config or {}), **more}))
    save_file((change(tensors) or tensors) if change else tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def every_merge():
    """Each merging operation with the parents that it needs: whether the first is a base, and how many."""
    for entry in (catalog.get("operation", name) for name in catalog.names("operation")):
        yield entry.name, getattr(entry.implementation, "based", False), {"model-stock": 3}.get(entry.name, 2)


def applied(name, based, paths, out, **options):
    return merge(name, paths[1:] if based else paths, out, options, base=paths[0] if based else None)


# -- sameness by meaning ------------------------------------------------------------------------------------------


def test_a_checkpoint_that_transformers_saved_again_is_the_same_network(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first = directory(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(tmp_path / "b")
    AutoTokenizer.from_pretrained(first).save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_text() != (tmp_path / "b/config.json").read_text()
    result = average([first, tmp_path / "b"], tmp_path / "mean")
    assert torch.equal(result.tensors["model.norm.weight"].load(), read.open(first).tensors["model.norm.weight"].load())


def test_a_base_and_its_instruct_model_merge_and_the_generation_settings_of_the_first_are_said(tmp_path, capsys, monkeypatch):
    from cairn.cli.main import main

    base = directory(tmp_path / "base", eos_token_id=1)
    tuned = directory(tmp_path / "tuned", 1, eos_token_id=[1, 3], attention_dropout=0.1, vendor_recipe={"secret": 7}, _model_name_or_path="x")
    (tuned / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], "temperature": 0.6}))
    result = average([base, tuned], tmp_path / "mean")
    assert result.config["eos_token_id"] == 1 and "vendor_recipe" not in result.config
    assert any("eos_token_id: that of base, 1" in line for line in result.lineage.changed)
    assert any("generation settings: those of base" in line for line in result.lineage.changed)
    monkeypatch.setattr(sys, "argv", ["cairn", "average", str(base), str(tuned), "-o", str(tmp_path / "again")])
    with pytest.raises(SystemExit):
        main()
    assert "eos_token_id: that of base" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("rope_theta", 20.0), ("rms_norm_eps", 1e-2), ("tie_word_embeddings", False), ("num_attention_heads", 1)])
def test_what_changes_the_computation_is_refused_by_name(key, value, tmp_path):
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": value}, key: value} if key == "rope_theta" else {key: value, "head_dim": None}
    with pytest.raises(MismatchError, match=f"configured differently: {key}" if key != "num_attention_heads" else "configured differently"):
        average([directory(tmp_path / "a"), directory(tmp_path / "b", 1, config=config)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_spellings_of_one_network_are_equal_for_foreign_families_too():
    from transformers import PhiConfig

    written = PhiConfig(hidden_size=32, num_attention_heads=4).to_dict()
    short = {"model_type": "phi", "hidden_size": 32, "num_attention_heads": 4, "resid_pdrop": 0.3, "vendor": 1}
    assert sameness.network(written) == sameness.network(short)
    assert sameness.network(written) != sameness.network({**short, "layer_norm_eps": 1e-3})


def test_vocabularies_are_compared_by_tokens_and_merges_not_by_bytes(tmp_path):
    first, other = directory(tmp_path / "a"), directory(tmp_path / "b", 1)
    path = other / "tokenizer.json"
    document = json.loads(path.read_text())
    document["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    document["model"]["vocab"] = dict(reversed(document["model"]["vocab"].items()))
    path.write_text(json.dumps(document, indent=4))
    assert sameness.vocabulary_digest(read.open(first)) == sameness.vocabulary_digest(read.open(other))
    average([first, other], tmp_path / "mean")
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(document))
    with pytest.raises(MismatchError, match=r"different tokenizers .id 6"):
        average([first, other], tmp_path / "again")


# -- ties by the config -------------------------------------------------------------------------------------------


def with_head(tensors):
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


@pytest.mark.parametrize(("name", "based", "count"), list(every_merge()))
def test_a_head_that_the_config_ties_counts_once_in_every_merge(name, based, count, tmp_path):
    paths = [directory(tmp_path / str(i), i, change=with_head) for i in range(count)]
    plain = [directory(tmp_path / f"plain{i}", i) for i in range(count)]
    found, wanted = applied(name, based, paths, tmp_path / "out"), applied(name, based, plain, tmp_path / "wanted")
    assert set(found.tensors) == set(wanted.tensors) and "lm_head.weight" not in found.tensors
    assert all(torch.equal(tensor.load(), wanted.tensors[key].load()) for key, tensor in found.tensors.items())


def test_a_head_that_the_config_ties_counts_once_in_growth_export_and_import(tmp_path):
    path = directory(tmp_path / "a", change=with_head)
    assert set(redundant(read.open(path))) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    made = [grow("stack", path, tmp_path / "grown", {"factor": 2}), export(path, tmp_path / "exported"), import_(path, tmp_path / "imported")]
    assert all(not {"lm_head.weight"} & set(each.tensors) and not any("inv_freq" in key for key in each.tensors) for each in made)
    export_dcp(path, tmp_path / "dcp")


def test_a_head_that_the_config_does_not_tie_stays(tmp_path):
    paths = [directory(tmp_path / str(i), i, tied=False) for i in range(2)]
    assert "lm_head.weight" in average(paths, tmp_path / "mean").tensors


def test_an_adapter_is_refused_as_what_it_is_by_operations_on_whole_models(tmp_path):
    adapter, base = tmp_path / "adapter", directory(tmp_path / "base")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}))
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1, 16)}, adapter / "adapter_model.safetensors")
    out = tmp_path / "out"
    for act in (lambda: average([adapter, adapter], out), lambda: average([base, adapter], out), lambda: export(adapter, out)):
        with pytest.raises(InputError, match="is an adapter, not a whole model"):
            act()
    with pytest.raises(InputError, match="is an adapter, not a whole model"):
        grow("stack", adapter, tmp_path / "out", {"factor": 2})


# -- finite values ------------------------------------------------------------------------------------------------


def holding(value):
    def change(tensors):
        tensors["model.norm.weight"][3] = value

    return change


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "based", "count"), list(every_merge()))
def test_every_merge_refuses_values_that_are_not_finite_or_writes_them_when_asked(name, based, count, value, tmp_path):
    paths = [directory(tmp_path / str(i), i, change=holding(value) if i == 0 else None) for i in range(count)]
    with pytest.raises(InputError, match=r"not finite|model.norm.weight"):
        applied(name, based, paths, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(i) for i in range(count)]


def test_growth_export_and_import_refuse_values_that_are_not_finite_or_write_them_when_asked(tmp_path):
    path = directory(tmp_path / "a", change=holding(math.nan))
    acts = {
        "grown": lambda out, **more: grow("stack", path, out, {"factor": 2}, **more),
        "exported": lambda out, **more: export(path, out, **more),
        "dcp": lambda out, **more: export_dcp(path, out, **more),
        "imported": lambda out, **more: import_(path, out, **more),
    }
    for name, act in acts.items():
        with pytest.raises(InputError, match=r"'model.norm.weight' would hold nan \(item 3\).*--allow-non-finite"):
            act(tmp_path / name)
        assert [each.name for each in tmp_path.iterdir()] == ["a"], name
    for name, act in acts.items():
        act(tmp_path / name, allow_non_finite=True)
    assert read.open(tmp_path / "exported").tensors["model.norm.weight"].load().isnan().sum() == 1


def test_a_cast_that_overflows_is_refused_by_name_in_every_command_that_casts(tmp_path):
    path = directory(tmp_path / "a", change=holding(1e5))
    for act in (export, import_, export_dcp):
        with pytest.raises(InputError, match=r"'model.norm.weight' holds 100000 \(item 3\), which float16 cannot say; choose bfloat16"):
            act(path, tmp_path / "out", dtype="float16")
        assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert export(path, tmp_path / "out", dtype="bfloat16").tensors["model.norm.weight"].load()[3] > 9e4


def test_large_finite_sums_are_no_infinities(tmp_path):
    def change(tensors):
        tensors["model.norm.weight"][:] = 3e38

    export(directory(tmp_path / "a", change=change), tmp_path / "out")


# -- quantized weights --------------------------------------------------------------------------------------------


def stored_as(dtype):
    def change(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        return {**tensors, name: tensors[name].to(dtype)}

    return change


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("name", "based", "count"), list(every_merge()))
def test_codes_of_quantized_weights_are_refused_by_name_in_every_merge(name, based, count, place, dtype, tmp_path):
    paths = [directory(tmp_path / str(i), i, change=stored_as(dtype) if i == place else None) for i in range(count)]
    with pytest.raises(MismatchError, match=r"model.layers.1.mlp.up_proj.weight.*stored as.*library that quantized it"):
        applied(name, based, paths, tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == count


def test_codes_of_quantized_weights_are_refused_by_growth_and_by_casts_and_copied_by_copies(tmp_path):
    eight, whole = directory(tmp_path / "a", change=stored_as(torch.float8_e4m3fn)), directory(tmp_path / "b", change=stored_as(torch.int8))
    told = directory(tmp_path / "c", quantization_config={"quant_method": "gptq"})
    for path in (eight, whole, told):
        with pytest.raises(MismatchError, match=r"library that quantized|cannot be grown"):
            grow("stack", path, tmp_path / "out", {"factor": 2})
    for path in (eight, told):
        for act in (export, import_, export_dcp):
            with pytest.raises(MismatchError, match="library that quantized"):
                act(path, tmp_path / "out", dtype="bfloat16")
    assert export(eight, tmp_path / "copy").tensors["model.layers.1.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn


# -- what travels along -------------------------------------------------------------------------------------------

LUGGAGE = {
    "chat_template.jinja": b"{{ messages }}",
    "tokenizer.model": b"sentencepiece",
    "generation_config.json": b'{"eos_token_id": 256, "temperature": 0.5}',
    "special_tokens_map.json": b'{"eos_token": "<|endoftext|>"}',
    "added_tokens.json": b"{}",
    "preprocessor_config.json": b"{}",
}


def packed(path):
    for name, data in LUGGAGE.items():
        (path / name).write_bytes(data)
    return path


def arrived(path):
    return {name: (path / name).read_bytes() for name in LUGGAGE if (path / name).is_file()}


@pytest.mark.parametrize(("name", "based", "count"), list(every_merge()))
def test_what_people_take_away_survives_every_merge(name, based, count, tmp_path):
    paths = [packed(directory(tmp_path / str(i), i, dtype=torch.bfloat16)) for i in range(count)]
    result = applied(name, based, paths, tmp_path / "out")
    assert arrived(result.path) == LUGGAGE and {tensor.dtype for tensor in result.tensors.values()} == {torch.bfloat16}
    assert carried(result) == sorted([*LUGGAGE, "tokenizer.json", "tokenizer_config.json"])


def test_what_people_take_away_survives_growth_export_and_import(tmp_path):
    path = packed(directory(tmp_path / "a", dtype=torch.bfloat16))
    made = [grow(name, path, tmp_path / name, {"factor": 2}) for name in ("stack", "zero")]
    made += [export(path, tmp_path / "exported"), import_(path, tmp_path / "imported"), import_(tmp_path / "exported", tmp_path / "again")]
    export_dcp(path, tmp_path / "dcp")
    assert all(arrived(each.path) == LUGGAGE for each in made) and arrived(tmp_path / "dcp") == LUGGAGE
    assert all(tensor.dtype == torch.bfloat16 for each in made for tensor in each.tensors.values())


# -- leftovers ----------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from cairn.merging.combine import average
average(sys.argv[1:3], sys.argv[3], progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_what_a_killed_operation_left_is_swept_by_the_next_one_in_that_folder(tmp_path):
    paths = [directory(tmp_path / str(i), i) for i in range(2)]
    assert ready.code(KILLED, *map(str, paths), str(tmp_path / "out")).wait(120) == -signal.SIGKILL
    assert [path.name[:9] for path in tmp_path.iterdir() if path.name.startswith(".")] == [".writing-"]
    strange, living = tmp_path / ".writing-strange", staging_beside(tmp_path / "living")
    strange.mkdir()
    living.mkdir()
    (tmp_path / ".old-photographs").mkdir()
    average(paths, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "out", strange.name, living.name, ".old-photographs"}
