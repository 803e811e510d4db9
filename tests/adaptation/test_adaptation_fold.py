"""Folding an adapter into its base: the same outputs, and everything that travels with a checkpoint."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import cairn
from cairn.adaptation.folding import adapter_summary, fold
from cairn.checkpoint.foreign.export import export
from cairn.checkpoint.format import read, verify
from cairn.errors import InputError, MismatchError, NotFoundError
from cairn.training.run import fork
from tests.fixtures import ADAPTER

IDS = torch.arange(36).reshape(3, 12)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_the_folded_model_has_the_outputs_of_the_adapter(adapter_run, tmp_path):
    adapter = adapter_run.newest()
    folded = cairn.fold(adapter_run.path, tmp_path / "out")
    assert (logits(folded.model()) - logits(adapter.model())).abs().max() < 1e-5
    assert (logits(folded.model()) - logits(adapter.base.model())).abs().max() > 1e-3
    assert verify.verify(folded.path).sound and [p.digest for p in folded.lineage.parents] == [adapter.base.digest, adapter.digest]
    assert folded.lineage.name == "fold" and folded.tokenizer.digest == adapter.base.tokenizer.digest
    changed = {name for name, tensor in folded.tensors.items() if not torch.equal(tensor.load(), adapter.base.tensors[name].load())}
    assert changed == {f"{row['matrix']}.weight" for row in adapter_summary(adapter)["matrices"]}
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folded.path, dtype=torch.float32).eval()
    assert (logits(theirs) - logits(adapter.model())).abs().max() < 1e-5


def test_at_the_start_folding_changes_no_bit_and_its_threads_change_none_either(small_run, adapter_run, tmp_path):
    base = small_run.checkpoints()[-1]
    start = fork(base, tmp_path / "run", [f"adapter={json.dumps(ADAPTER)}", "training.tokens=21 steps", "optimizer.lr=1e-30"])
    folded = fold(start.path, tmp_path / "out")
    assert folded.model_digest == read.open(base).model_digest
    assert fold(adapter_run.path, tmp_path / "a").digest == fold(adapter_run.path, tmp_path / "b", shard_bytes=10**9).digest


def test_dtype_ties_and_what_travels_are_those_of_the_base(small_recipe, tmp_path):
    from cairn.training.run import train

    run = train(small_recipe, tmp_path / "run", ["model.tie_word_embeddings=true", "training.tokens=5 steps"])
    base = export(run.path, tmp_path / "base", dtype="bfloat16").path
    (base / "manifest.json").unlink()  # as somebody else's directory, with files of its own
    (base / "lineage.json").unlink()
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.3}))
    adapted = fork(
        base, tmp_path / "adapted", [f"adapter={json.dumps(ADAPTER)}", "training.tokens=8 steps"], recipe={**small_recipe, "model": run.recipe.plain()["model"]}
    )
    folded = fold(adapted.path, tmp_path / "out")
    assert {tensor.dtype for tensor in folded.tensors.values()} == {torch.bfloat16} and "lm_head.weight" not in folded.tensors
    assert (folded.path / "chat_template.jinja").read_text() == "{{ messages }}" and folded.generation == {"temperature": 0.3}
    wide = fold(adapted.path, tmp_path / "wide", dtype="float32")
    assert (logits(wide.model()) - logits(adapted.newest().model(dtype=torch.float32))).abs().max() < 1e-5
    assert wide.config["dtype"] == "float32"


def test_an_adapter_that_peft_has_written_is_folded_into_a_named_base(small_run, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = small_run.checkpoints()[-1]
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.eval().save_pretrained(tmp_path / "peft")
    with pytest.raises(InputError, match="does not say on which model it was trained"):
        fold(tmp_path / "peft", tmp_path / "out")
    folded = fold(tmp_path / "peft", tmp_path / "out", base=base)
    assert (logits(folded.model()) - logits(theirs)).abs().max() < 1e-5
    assert read.open(tmp_path / "peft", base=base).tokenizer.digest == read.open(base).tokenizer.digest


def test_a_checkpoint_of_ours_opens_in_peft(adapter_run):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    adapter = adapter_run.newest()
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter.base.path), str(adapter.path)).eval()
    assert (logits(theirs) - logits(adapter.model())).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "gpt2", "phi"])
def test_other_families_are_folded_too(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from cairn.models.adapters.container import attach
    from cairn.models.adapters.lora import LoRA

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = attach(model, LoRA(rank=3))
    for parameter in adapted.named_parameters().values():
        torch.nn.init.normal_(parameter, std=0.2)
    (tmp_path / "adapter").mkdir()
    save_file(adapted.tensors(), tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapted.config()))
    folded = fold(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert (logits(folded.model()) - logits(model)).abs().max() < 1e-5
    assert (logits(read.open(tmp_path / "adapter", base=tmp_path / "base").model()) - logits(model)).abs().max() < 1e-6


def test_memory_is_bounded_by_a_few_tensors(tmp_path):
    """Forty matrices of 8 MB; one is changed by the adapter. The base is never held whole."""
    from cairn.checkpoint.format.lineage import Lineage
    from cairn.checkpoint.saving import write

    drawn = torch.randn(1000, 2000)
    write.save(tmp_path / "base", model={f"m.{i}.weight": drawn for i in range(40)}, config={}, lineage=Lineage(kind="run", name="train"))
    (tmp_path / "adapter").mkdir()
    factors = {"base_model.model.m.3.lora_A.weight": torch.ones(2, 2000), "base_model.model.m.3.lora_B.weight": torch.ones(1000, 2)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    code = """
import sys
from cairn.adaptation.folding import fold
import cairn.adaptation.methods.fold, torch
torch.zeros(10).add_(1)
private = lambda: 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
before, peak = private(), []
fold(sys.argv[1] + "/adapter", sys.argv[1] + "/out", base=sys.argv[1] + "/base", progress=lambda *_: peak.append(private()))
print(max(peak) - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 15 * drawn.nbytes
    assert torch.allclose(read.open(tmp_path / "out").tensors["m.3.weight"].load(), drawn + 2, atol=1e-5)


def test_bad_input_is_one_sentence_and_nothing_is_written(adapter_run, small_run, tmp_path):
    newest = adapter_run.newest()
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ("adapter_model.safetensors", "adapter_config.json", "config.json"):
        (broken / file).write_bytes((newest.path / file).read_bytes())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="is a whole model, not an adapter"):
        fold(small_run.path, tmp_path / "out")
    with pytest.raises(MismatchError, match="was trained on the model"):
        fold(newest, tmp_path / "out", base=small_run.checkpoints()[0])
    with pytest.raises(InputError, match="is itself an adapter"):
        fold(newest, tmp_path / "out", base=adapter_run.checkpoints()[0])
    with pytest.raises(InputError, match="dtype is one of"):
        fold(newest, tmp_path / "out", dtype="int8")
    with pytest.raises(NotFoundError):
        fold(tmp_path / "nowhere", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"r": 9}))
    with pytest.raises(MismatchError, match="does not fit its configuration"):
        fold(broken, tmp_path / "out", base=newest.base)
    (broken / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(broken / "adapter_model.safetensors")
    save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}, broken / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"belongs to another model: .* has no 'model\.layers\.7"):
        fold(broken, tmp_path / "out", base=newest.base)
    save_file(
        {name: torch.zeros(tensor.shape[0], tensor.shape[1] + ("lora_A" in name)) for name, tensor in tensors.items()}, broken / "adapter_model.safetensors"
    )
    with pytest.raises(MismatchError, match="belongs to another model"):
        fold(broken, tmp_path / "out", base=newest.base)
    assert not (tmp_path / "out").exists()


def test_the_summary_says_what_an_adapter_is(adapter_run):
    found = adapter_summary(adapter_run.path)
    assert found["adapter"] == {"name": "lora", "rank": 4, "alpha": 4.0, "dropout": 0.1, "rank_stabilized": False}
    assert len(found["matrices"]) == 10 and all(row["norm"] > 0 for row in found["matrices"])
    assert found["bytes"] == 4 * found["numbers"] and found["base"]["found"] == str(adapter_run.newest().base.path)
