"""Wanda against an independent computation with transformers' own model and hooks; kills, resumes, memory, refusals."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cairn
from cairn.checkpoint.format import read
from cairn.checkpoint.operating.work import Work
from cairn.compression.methods.wanda import pruned_by_group, pruned_by_row, scores
from cairn.data.text.calibration import Calibration, calibration
from cairn.data.text.tokenizer import byte_level
from cairn.errors import DamagedError, InputError, MismatchError, NotFoundError
from tests import ready

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}


def families():
    """Configurations of transformers of every shape of block: separate, fused and transposed projections, with and without gates and biases."""
    from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig, Olmo2Config, Qwen2Config

    gated = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
    return {
        "llama": LlamaConfig(**gated),
        "olmo2": Olmo2Config(**gated),
        "qwen2": Qwen2Config(**gated, tie_word_embeddings=True),
        "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
        "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "gemma2": Gemma2Config(**gated, head_dim=8, sliding_window=8),
    }


def model_of(family, path, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(families()[family]).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    for name, data in byte_level().files().items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "set.safetensors"
    Calibration(np.random.default_rng(0).integers(0, 97, (10, 20)), {"corpus": "drawn"}).save(path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return lambda family, dtype=torch.float32: made if (made := folder / f"{family}-{dtype}").exists() else model_of(family, made, dtype)


def straightforward(path, ids, sparsity, pattern=None):
    """The whole model in memory; block after block: hooks, all inputs kept, one loop over rows. Nothing shared with the library."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    blocks = next(m for _, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    for block in blocks:
        readers = [m for m in block.modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 2]
        seen = {id(m): [] for m in readers}
        hooks = [m.register_forward_hook(lambda m, given, _, seen=seen: seen[id(m)].append(given[0].reshape(-1, given[0].shape[-1]))) for m in readers]
        with torch.no_grad():
            model(ids)
        for hook in hooks:
            hook.remove()
        for reader in readers:
            transposed = type(reader).__name__ == "Conv1D"
            weight = reader.weight.data.T.clone() if transposed else reader.weight.data
            norms = torch.cat(seen[id(reader)]).double().pow(2).sum(0).sqrt().float()
            for row in weight:
                score = row.abs() * norms
                group = len(row) if pattern is None else pattern[1]
                gone = int(len(row) * sparsity) if pattern is None else pattern[1] - pattern[0]
                for begin in range(0, len(row), group):
                    order = sorted(range(begin, begin + group), key=lambda j: (float(score[j]), j))
                    row[order[:gone]] = 0.0
            if transposed:
                reader.weight.data = weight.T.contiguous()
    return model.state_dict()


def agreeing(found, wanted):
    """Share of weights whose zeros agree; scores that are equal but for rounding may fall either way."""
    same = [((found[name].load() == 0) == (wanted[name] == 0)).float().mean() for name in found]
    return min(float(each) for each in same)


@pytest.mark.parametrize(("family", "pattern"), [("llama", None), ("gpt_neox", None), ("qwen2", None), ("gpt2", None), ("gemma2", None), ("llama", (2, 4))])
def test_wanda_is_what_a_straightforward_computation_gives(family, pattern, models, texts, tmp_path):
    path, ids = models(family), torch.from_numpy(calibration(str(texts), read.open(models(family)), sequences=10).ids)
    options = {"calibration": str(texts), "sequences": 10, "micro_batch": 4, "sparsity": 0.3}
    found = cairn.compress("wanda", path, tmp_path / "out", options | ({"pattern": "2:4"} if pattern else {}))
    wanted = straightforward(path, ids, 0.3, pattern)
    assert agreeing(found.tensors, {**wanted, "embed_out.weight": wanted.get("lm_head.weight")}) > 0.999
    for name, tensor in found.tensors.items():
        zeros = float((tensor.load() == 0).float().mean())
        if "mlp" in name and name.endswith("weight") and len(tensor.shape) == 2:
            rows = tensor.shape[0] if family == "gpt2" else tensor.shape[1]
            assert zeros == pytest.approx(0.5 if pattern else int(rows * 0.3) / rows)
        elif "mlp" not in name and "attn" not in name and "attention" not in name:
            assert torch.equal(tensor.load(), read.open(path).tensors[name].load())
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]
    assert found.lineage.options["calibration_set"]["digest"] and found.lineage.options["calibration_set"]["corpus"] == "drawn"


def test_the_mathematics():
    weight, squares = torch.tensor([[1.0, -2.0, 3.0, 0.5], [4.0, 4.0, 4.0, 4.0]]), torch.tensor([16.0, 1.0, 1.0, 16.0])
    assert scores(weight, squares).tolist() == [[4.0, 2.0, 3.0, 2.0], [16.0, 4.0, 4.0, 16.0]]
    assert pruned_by_row(scores(weight, squares), 0.5).tolist() == [[False, True, False, True], [False, True, True, False]]
    assert pruned_by_group(scores(weight, squares), 1, 2).tolist() == [[False, True, False, True], [False, True, True, False]]
    assert not pruned_by_row(weight, 0.2).any()


def test_weights_alone_would_prune_others(models, texts, tmp_path):
    found = cairn.compress("wanda", models("llama"), tmp_path / "out", {"calibration": str(texts), "sequences": 10})
    name = "model.layers.1.mlp.down_proj.weight"
    by_size = pruned_by_row(read.open(models("llama")).tensors[name].load().abs(), 0.5)
    assert 0.5 < ((found.tensors[name].load() == 0) == by_size).float().mean() < 0.99


@pytest.mark.parametrize("memory", [0, 2**30])
def test_batches_and_places_of_hidden_states_change_no_bit(memory, models, texts, tmp_path):
    options = {"calibration": str(texts), "sequences": 10, "micro_batch": 4}
    one = cairn.compress("wanda", models("llama"), tmp_path / "a", options)
    other = cairn.compress("wanda", models("llama"), tmp_path / "b", {**options, "memory": memory})
    assert load_file(one.path / "model.safetensors").keys() == load_file(other.path / "model.safetensors").keys()
    assert all(torch.equal(tensor.load(), other.tensors[key].load()) for key, tensor in one.tensors.items())


KILLED = """
import json, os, signal, sys
import cairn
path, out, options, at = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
told = []
def say(line):
    told.append(line)
    if line.startswith(f"block {at} of"):
        os.kill(os.getpid(), signal.SIGKILL)
cairn.compress("wanda", path, out, options, say=say, device="cpu", progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL) if at == "end" else None)
"""


@pytest.mark.parametrize(("family", "at", "memory"), [("llama", "1", 0), ("llama", "2", 2**30), ("gpt_neox", "2", 0), ("llama", "end", 0)])
def test_after_a_kill_the_same_command_goes_on_at_its_block_and_gives_the_same_bits(family, at, memory, models, texts, tmp_path):
    options = {"calibration": str(texts), "sequences": 10, "micro_batch": 4, "memory": memory}
    wanted = cairn.compress("wanda", models(family, torch.bfloat16), tmp_path / "wanted", options, device="cpu")
    arguments = [str(models(family, torch.bfloat16)), str(tmp_path / "out"), json.dumps(options), at]
    killed = ready.code(KILLED, *arguments)
    assert killed.wait(120) == -signal.SIGKILL, killed.communicate()
    assert not (tmp_path / "out").exists() and (tmp_path / ".working-out").is_dir()
    told = []
    found = cairn.compress("wanda", models(family, torch.bfloat16), tmp_path / "out", options, device="cpu", say=told.append)
    first = {"1": 2, "2": 3, "end": None}[at]
    if memory == 0 or first is None:
        assert told[:1] == ([f"block {first} of 3"] if first else [])  # with states on disk nothing is computed again
    assert all(torch.equal(tensor.load(), found.tensors[key].load()) for key, tensor in wanted.tensors.items())
    assert {each.name for each in tmp_path.iterdir()} == {"wanted", "out"}


def test_what_another_command_left_is_not_gone_on_with(models, texts, tmp_path):
    options = {"calibration": str(texts), "sequences": 10}
    assert ready.code(KILLED, str(models("llama")), str(tmp_path / "out"), json.dumps(options), "2").wait(120) == -signal.SIGKILL
    told = []
    cairn.compress("wanda", models("llama"), tmp_path / "out", {**options, "sparsity": 0.25}, say=told.append)
    assert told[0] == "block 1 of 3"


def test_a_folder_has_one_worker(tmp_path):
    work = Work(tmp_path / "work", "key")
    with pytest.raises(InputError, match="Another process is working"):
        Work(tmp_path / "work", "key")
    work.close()
    Work(tmp_path / "work", "key").close()


PEAK = """
import json, sys
import cairn
private = lambda: 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
options = {"calibration": sys.argv[1], "sequences": 4, "sequence_length": 16, "memory": 0, "micro_batch": 2}
for path in sys.argv[2:]:
    peak = [private()]
    tell = lambda *_: peak.append(private())
    cairn.compress("wanda", path, path + "-out", options, device="cpu", say=tell, progress=tell)
    print(max(peak))
"""


def test_memory_does_not_grow_with_the_number_of_blocks(texts, tmp_path):
    """Blocks of 8 MB in float32: three of them, and twelve."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 384, "intermediate_size": 1280, "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 64}
    paths = [tmp_path / str(layers) for layers in (3, 12)]
    for path in paths:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=int(path.name), **sizes)).save_pretrained(path)
    done = subprocess.run([sys.executable, "-c", PEAK, str(texts), *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert read.open(paths[1]).tensors.nbytes - read.open(paths[0]).tensors.nbytes > 70e6 and many - few < 12e6, (few, many)


def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(models, texts, tmp_path):
    from transformers import AutoModelForCausalLM, MixtralConfig

    path = models("llama")
    mixture = MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=2)
    AutoModelForCausalLM.from_config(mixture).save_pretrained(tmp_path / "mixture")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    (tmp_path / "short.txt").write_text("few words")
    before = {each.name for each in tmp_path.iterdir()}
    given = {"calibration": str(texts), "sequences": 10}
    for options, error, words in (
        ({"calibration": "nowhere"}, NotFoundError, "no corpus 'nowhere'"),
        ({"calibration": str(tmp_path / "gone.safetensors")}, NotFoundError, "no calibration set"),
        ({"calibration": str(tmp_path / "bad.safetensors")}, DamagedError, "not a calibration set"),
        ({"calibration": str(tmp_path / "short.txt")}, InputError, "ask for sequences=0"),
        ({"calibration": str(texts), "sequences": 11}, InputError, "holds 10 texts"),
        ({**given, "sequence_length": 65}, InputError, "positions for 64 tokens"),
        ({**given, "pattern": "4:2"}, InputError, "n smaller than m"),
        ({**given, "pattern": "3:5"}, MismatchError, "does not divide"),
        ({**given, "sparsity": float("nan")}, InputError, "not a finite number"),
        ({**given, "targets": []}, InputError, "nothing would be pruned"),
        ({**given, "sparsitty": 0.5}, InputError, "Did you mean 'sparsity'"),
        ({}, InputError, "'calibration' is missing"),
    ):
        with pytest.raises(error, match=words):
            cairn.compress("wanda", path, tmp_path / "out", options)
    with pytest.raises((MismatchError, DamagedError), match="mixture"):
        cairn.compress("wanda", tmp_path / "mixture", tmp_path / "out", given)
    assert {each.name for each in tmp_path.iterdir()} == before


def test_texts_of_a_corpus_are_windows_that_depend_on_the_seed_alone(models, tmp_path, corpus_file):
    opened = read.open(models("llama", torch.bfloat16))
    first, again, other = (calibration(str(corpus_file), _wide(opened), sequences=6, length=24, seed=seed) for seed in (0, 0, 1))
    assert first.ids.shape == (6, 24) and first.digest == again.digest != other.digest
    first.save(tmp_path / "set.safetensors")
    assert calibration(str(tmp_path / "set.safetensors"), _wide(opened), sequences=6).digest == first.digest


def _wide(checkpoint):
    """The checkpoint as if it had rows for every byte."""
    checkpoint.config["vocab_size"] = 257
    return checkpoint
