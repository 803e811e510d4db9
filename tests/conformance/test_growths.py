"""What every growth promises; a new one is held to it by being registered."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from cairn import catalog
from cairn.checkpoint.format import verify
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.saving import write
from cairn.errors import InputError, NotFoundError
from cairn.growth.enlarge import difference, grow
from cairn.options import configure, method_options
from cairn.training.run import fork, train

NAMES = catalog.names("growth")
OPTIONS: dict[str, dict] = {"zero": {"factor": 2, "width": 2}, "masked": {"factor": 2, "width": 2}, "ligo": {"factor": 2, "width": 2, "steps": 2}}
KEEP = {"split", "zero", "masked"}
"""Growths that keep the function."""


@pytest.fixture(scope="module", params=["llama", "olmo2"])
def parent(request, small_recipe, tmp_path_factory):
    """A trained model with tied embeddings and grouped heads."""
    run = tmp_path_factory.mktemp("parent") / request.param
    return train({**small_recipe, "model": {**small_recipe["model"], "name": request.param}}, run, ["model.tie_word_embeddings=true"]).newest()


@pytest.mark.parametrize("name", NAMES)
def test_names_dtypes_ties_and_tokenizer_are_kept_and_lineage_is_told(name, parent, tmp_path):
    from transformers import AutoModelForCausalLM

    large, again = (grow(name, parent, tmp_path / each, OPTIONS.get(name)) for each in "ab")
    assert large.digest == again.digest and verify.verify(large.path).sound
    assert sum(t.spec.nbytes for t in large.tensors.values()) > sum(t.spec.nbytes for t in parent.tensors.values())
    assert "lm_head.weight" not in large.tensors and {t.dtype for t in large.tensors.values()} == {torch.float32}
    assert large.tokenizer.digest == parent.tokenizer.digest and large.optimizer is None
    assert [p.digest for p in large.lineage.parents] == [parent.digest] and large.lineage.name == name
    assert any(line.startswith("model.") and " -> " in line for line in large.lineage.changed)
    assert configure("growth", method_options(configure("growth", {"name": name, **OPTIONS.get(name, {})})))
    theirs = AutoModelForCausalLM.from_pretrained(large.path, dtype=torch.float32).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - large.model()(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays_where_it_is_said_to(name, parent, tmp_path):
    found = difference(parent, grow(name, parent, tmp_path / "large", OPTIONS.get(name)))
    assert (found < 1e-5) == (name in KEEP), found


@pytest.mark.parametrize("name", NAMES)
def test_the_large_model_trains_on_where_the_small_one_stopped_reading(name, parent, tmp_path):
    large = grow(name, parent, tmp_path / "large", OPTIONS.get(name))
    with pytest.raises(Exception, match="fresh optimizer by name"):
        fork(large, tmp_path / "asked", ["training.tokens=22 steps"])
    run = fork(large, tmp_path / "run", ["training.tokens=22 steps", "schedule.start=now"], fresh=["optimizer"])
    read_before = parent.trainer["position"] + (16 if name == "ligo" else 0)  # two steps of eight sequences
    assert run.newest().trainer["position"] == read_before + 16 and run.newest().step == 22
    assert run.newest().lineage.options["recipe"]["model"]["num_hidden_layers"] == large.config["num_hidden_layers"]
    grown, trained = large.tensors.load(), run.newest().tensors.load()
    layers = [trained[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(large.config["num_hidden_layers"])]
    assert all(not torch.equal(a, b) for i, a in enumerate(layers) for b in layers[:i])  # copies are no shared memory
    assert all(not torch.equal(grown[key], trained[key]) for key in grown)


@pytest.mark.parametrize("name", NAMES)
def test_what_can_not_grow_is_refused_before_anything_is_written(name, parent, tmp_path):
    options = {"width": 1} if name == "split" else {"layers": 2}
    with pytest.raises(InputError, match="Nothing would grow"):
        grow(name, parent, tmp_path / "out", options)
    with pytest.raises(NotFoundError):
        grow(name, tmp_path / "nowhere", tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


STREAMING = """
import json, sys
from cairn.growth.enlarge import grow
small, every = sys.argv[1], json.loads(sys.argv[2])
private = lambda: 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
grow("stack", small, small + "-warm", {"factor": 2})
for name, options in every.items():
    peak = [private()]
    grow(name, small, f"{small}-{name}", options, progress=lambda *_: peak.append(private()))
    print(name, max(peak) - peak[0])
"""


def test_memory_is_bounded_by_a_few_tensors_not_by_the_model(tmp_path):
    """A model of eight layers and 52 MB, its largest tensor 2 MB; what comes out has 104 MB or, with width, 400 MB."""
    sizes = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}
    architecture = configure("architecture", {"name": "llama", **sizes})
    tensors = {name: torch.randn(p.shape) for name, p in architecture.meta_model().named_parameters()}
    write.save(tmp_path / "small", model=tensors, config=architecture.to_hf(), lineage=Lineage(kind="run", name="train"))
    every = {name: OPTIONS.get(name, {}) for name in NAMES}
    every |= {"masked": {"factor": 2, "mask": 1}, "ligo": {"factor": 2, "steps": 0}}
    done = subprocess.run([sys.executable, "-c", STREAMING, str(tmp_path / "small"), json.dumps(every)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert set(peaks) == set(NAMES) and max(peaks.values()) < 48 * 2**20, peaks
    shutil.rmtree(tmp_path)
