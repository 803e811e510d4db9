"""What every operation promises; a new one is held to it by being registered."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from cairn import catalog
from cairn.checkpoint.format import verify
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.operating import stream
from cairn.checkpoint.saving import write
from cairn.errors import MismatchError
from cairn.options import configure

NAMES = catalog.names("operation")
OPTIONS: dict[str, dict] = {}
"""Options for operations that cannot do without; by name."""


def operation(name):
    return configure("operation", {"name": name, **OPTIONS.get(name, {})})


@pytest.fixture(scope="module")
def parents(small_recipe, tmp_path_factory):
    """Two checkpoints of a tied model in bfloat16, with tokenizer."""
    from cairn.checkpoint.foreign.export import export
    from cairn.training.run import train

    folder = tmp_path_factory.mktemp("parents")
    run = train(small_recipe, folder / "run", ["model.tie_word_embeddings=true", "training.tokens=15 steps"])
    return [export(path, folder / path.name, dtype="bfloat16") for path in run.checkpoints()]


NUMBER = {"model-stock": 3}
"""How many checkpoints an operation needs, where two are not enough."""


@pytest.fixture
def given(name, parents):
    return parents[: NUMBER.get(name, 2)]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_inputs_give_the_same_checkpoint(name, given, tmp_path):
    first, second = (stream.apply(operation(name), given, tmp_path / each) for each in ("a", "b"))
    assert first.digest == second.digest and verify.verify(first.path).sound


@pytest.mark.parametrize("name", NAMES)
def test_names_dtypes_ties_and_tokenizer_are_kept_and_lineage_is_told(name, given, tmp_path):
    result = stream.apply(operation(name), given, tmp_path / "a")
    assert set(result.tensors) == set(given[0].tensors) and "lm_head.weight" not in result.tensors
    assert {tensor.dtype for tensor in result.tensors.values()} == {torch.bfloat16}
    assert result.tokenizer.digest == given[0].tokenizer.digest
    assert [parent.digest for parent in result.lineage.parents] == [parent.digest for parent in given]
    assert result.lineage.name == name and result.lineage.options == operation(name).model_dump(mode="json")
    model = result.model()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_threads_changes_no_bit_and_memory_gets_what_the_disk_gets(name, given, tmp_path):
    first, second = (stream.apply(operation(name), given, tmp_path / f"{count}", threads=count) for count in (1, 3))
    assert first.digest == second.digest
    into = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in first.tensors.items()}
    stream.results(operation(name), given, into)
    assert all(torch.equal(into[key], tensor.load()) for key, tensor in first.tensors.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_result_opens_in_transformers(name, given, tmp_path):
    from transformers import AutoModelForCausalLM

    result = stream.apply(operation(name), given, tmp_path / "a")
    theirs = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - result.model(dtype=torch.float32)(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_strangers_are_refused_before_anything_is_written(name, given, tmp_path):
    tensors = given[0].tensors.load()
    tensors["model.norm.weight"] = torch.ones(7)
    stranger = write.save(tmp_path / "s", model=tensors, config=given[0].config, lineage=Lineage(kind="run", name="train"))
    with pytest.raises(MismatchError, match=r"model\.norm\.weight"):
        stream.apply(operation(name), [*given[:-1], stranger], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


STREAMING = """
import ctypes, gc, json, shutil, sys
from cairn.checkpoint.operating import stream
from cairn.options import configure
every, folder = json.loads(sys.argv[1]), sys.argv[2]
# Anonymous pages alone: pages of libraries move between shared and private as other processes come and go.
private = lambda: 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
inputs = [f"{folder}/{each}" for each in "abc"]
stream.apply(configure("operation", {"name": "linear"}), inputs, f"{folder}/warm")
before = private()
for name, (options, number) in every.items():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the last one freed is not counted again
    peak = [before]
    result = stream.apply(configure("operation", {"name": name, **options}), inputs[:number], f"{folder}/out", progress=lambda *_: peak.append(private()))
    print(name, max(peak) - before, len(result.tensors))
    shutil.rmtree(result.path)
"""


SIZE = 1_000_000


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Three models of 40 tensors of 4 MB."""
    folder = tmp_path_factory.mktemp("big")
    for seed, each in enumerate("abc"):
        drawn = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        write.save(folder / each, model={f"w{i}": drawn * (i + 1) for i in range(40)}, config={}, lineage=Lineage(kind="run", name="train"))
    return folder


def test_memory_is_bounded_by_a_few_tensors_not_by_the_model(big):
    """An operation may hold eight tensors, and 64 MiB for reading, digesting and writing, where its inputs take 320 MB."""
    every = {name: (OPTIONS.get(name, {}), NUMBER.get(name, 2)) for name in NAMES}
    done = subprocess.run([sys.executable, "-c", STREAMING, json.dumps(every), str(big)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _, _ in rows] == list(NAMES) and {count for _, _, count in rows} == {"40"}
    peaks = {name: int(peak) for name, peak, _ in rows}
    assert max(peaks.values()) < 8 * 4 * SIZE + 64 * 2**20, peaks
    shutil.rmtree(big)
