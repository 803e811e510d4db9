"""What every operation promises; a new one is held to it by being registered."""

import resource
import subprocess
import sys

import pytest
import torch

from cairn import catalog
from cairn.checkpoint import read, stream, verify, write
from cairn.checkpoint.lineage import Lineage
from cairn.errors import MismatchError
from cairn.options import configure

NAMES = catalog.names("operation")
OPTIONS: dict[str, dict] = {}
"""Options for operations that can not do without; by name."""


def operation(name):
    return configure("operation", {"name": name, **OPTIONS.get(name, {})})


@pytest.fixture(scope="module")
def parents(small_recipe, tmp_path_factory):
    """Two checkpoints of a tied model in bfloat16, with tokenizer."""
    from cairn.checkpoint.export import export
    from cairn.train.run import train

    folder = tmp_path_factory.mktemp("parents")
    run = train(small_recipe, folder / "run", ["model.tie_word_embeddings=true", "training.tokens=10 steps"])
    return [export(path, folder / path.name, dtype="bfloat16") for path in run.checkpoints()]


def test_at_least_two_operations_stand_here():
    assert len(NAMES) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_same_inputs_give_the_same_checkpoint(name, parents, tmp_path):
    first, second = (stream.apply(operation(name), parents, tmp_path / each) for each in ("a", "b"))
    assert first.digest == second.digest and verify.verify(first.path).sound


@pytest.mark.parametrize("name", NAMES)
def test_names_dtypes_ties_and_tokenizer_are_kept_and_lineage_is_told(name, parents, tmp_path):
    result = stream.apply(operation(name), parents, tmp_path / "a")
    assert set(result.tensors) == set(parents[0].tensors) and "lm_head.weight" not in result.tensors
    assert {tensor.dtype for tensor in result.tensors.values()} == {torch.bfloat16}
    assert result.tokenizer.digest == parents[0].tokenizer.digest
    assert [parent.digest for parent in result.lineage.parents] == [parent.digest for parent in parents]
    assert result.lineage.name == name and result.lineage.options == operation(name).model_dump(mode="json")
    model = result.model()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", NAMES)
def test_the_result_opens_in_transformers(name, parents, tmp_path):
    from transformers import AutoModelForCausalLM

    result = stream.apply(operation(name), parents, tmp_path / "a")
    theirs = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - result.model(dtype=torch.float32)(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_strangers_are_refused_before_anything_is_written(name, parents, tmp_path):
    tensors = parents[0].tensors.load()
    tensors["model.norm.weight"] = torch.ones(7)
    stranger = write.save(tmp_path / "s", model=tensors, config=parents[0].config, lineage=Lineage(kind="run", name="train"))
    with pytest.raises(MismatchError, match=r"model\.norm\.weight"):
        stream.apply(operation(name), [parents[0], stranger], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


STREAMING = """
import json, resource, sys
from cairn.checkpoint import stream
from cairn.options import configure
options, folder = json.loads(sys.argv[1]), sys.argv[2]
import torch
torch.zeros(10).add_(1)
# Anonymous pages alone: pages of libraries move between shared and private as other processes come and go.
private = lambda: 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
before = private()
peak = [before]
stream.apply(configure("operation", options), [f"{folder}/a", f"{folder}/b"], f"{folder}/out-{options['name']}", progress=lambda *_: peak.append(private()))
print(max(peak) - before)
"""


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_bounded_by_a_few_tensors_not_by_the_model(name, tmp_path_factory):
    """The model is 40 tensors of 8 MB; an operation may hold a few of them, and the frame's buffers for reading, digesting and writing."""
    import json

    folder = tmp_path_factory.mktemp(f"big-{name}")
    size = 2_000_000
    for each, value in (("a", 1.0), ("b", 3.0)):
        write.save(folder / each, model={f"w{i}": torch.full((size,), value) for i in range(40)}, config={}, lineage=Lineage(kind="run", name="train"))
    options = json.dumps({"name": name, **OPTIONS.get(name, {})})
    done = subprocess.run([sys.executable, "-c", STREAMING, options, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 15 * 4 * size
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0
    assert len(read.open(folder / f"out-{name}").tensors) == 40
