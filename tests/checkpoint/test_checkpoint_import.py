"""Import: every layout comes back bit for bit, as a checkpoint that transformers opens and our operations take."""

import json
import shutil

import pytest
import torch

import cairn
from cairn.checkpoint.foreign.import_plan import plan
from cairn.checkpoint.foreign.importing import import_
from cairn.checkpoint.foreign.spec import ShardSpec
from cairn.checkpoint.format import verify
from cairn.errors import DamagedError, InputError, MismatchError, NotFoundError
from tests.checkpoint import foreign_files as files

CUTS = {
    "replicated": [r".*norm\.weight"],
    "shard": [{"pattern": r".*(o_proj|down_proj)\.weight", "dim": 1}, {"pattern": r"(model\.embed_tokens|lm_head)\.weight", "vocab": 257}],
}
"""A spec for LLaMA's names, cut as Megatron does."""


@pytest.fixture(scope="module")
def checkpoint(small_run):
    """A trained LLaMA of 2 layers, 4 heads over 2 key-value heads, with its AdamW state."""
    return small_run.newest()


@pytest.fixture(scope="module")
def state(checkpoint):
    return files.state_of(checkpoint)


@pytest.fixture
def config(checkpoint):
    return checkpoint.config


def agrees(result, state, *, moments):
    """Bit for bit, weights and (with `moments`) the optimizer's state."""
    assert verify.verify(result.path).sound and result.lineage.kind == "import"
    assert set(result.tensors) == set(state[""])
    assert all(torch.equal(result.tensors[name].load(), tensor) for name, tensor in state[""].items())
    assert (result.optimizer is not None) == moments
    if moments:
        assert set(result.optimizer) == {f"{name}/{key}" for name in state[""] for key in ("exp_avg", "exp_avg_sq", "step")}
        for key in ("exp_avg", "exp_avg_sq"):
            assert all(torch.equal(result.optimizer[f"{name}/{key}"].load(), tensor) for name, tensor in state[key].items())
        assert {float(lazy.load()) for name, lazy in result.optimizer.items() if name.endswith("/step")} == {files.STEP}


@pytest.mark.parametrize(("stage", "data", "tensors"), [(0, 1, 2), (1, 1, 1), (1, 3, 1), (2, 2, 2), (3, 2, 1), (3, 3, 2), (3, 4, 1)])
def test_deepspeed(stage, data, tensors, state, config, tmp_path):
    source = files.deepspeed(tmp_path / "ds", state, stage=stage, data=data, tensors=tensors)
    spec = ShardSpec.parse(CUTS) if tensors > 1 else None
    result = import_(source, tmp_path / "out", spec=spec, config=config, pickles=True)
    agrees(result, state, moments=stage > 0)
    assert result.lineage.options["layout"] == "deepspeed" and result.lineage.options["facts"]["global_steps"] == 20
    assert result.lineage.options["grid"] == {"pipeline": 1, "tensor": tensors, "data": data}


@pytest.mark.parametrize("tensors", [1, 2])
def test_deepspeed_over_pipeline_stages(tensors, state, config, tmp_path):
    source = files.deepspeed(tmp_path / "ds", state, stage=1, data=2, tensors=tensors, stages=2)
    result = import_(source, tmp_path / "out", spec=ShardSpec.parse(CUTS), config=config, pickles=True)
    agrees(result, state, moments=True)
    assert result.lineage.options["grid"] == {"pipeline": 2, "tensor": tensors, "data": 2}


def test_a_run_goes_on_with_imported_moments(state, config, checkpoint, small_recipe, tmp_path):
    """A fork keeps imported moments and their count; with a fresh optimizer it becomes another run."""
    from cairn.training.run import fork

    source = files.deepspeed(tmp_path / "ds", state, stage=3, data=2)
    result = import_(source, tmp_path / "imported", config=config, pickles=True, tokenizer=checkpoint.path)
    short = ["training.tokens=3 steps", "schedule=constant"]
    kept = fork(result.path, tmp_path / "kept", short, recipe=small_recipe).newest()
    fresh = fork(result.path, tmp_path / "fresh", short, recipe=small_recipe, fresh=["optimizer"]).newest()
    assert float(kept.optimizer["model.norm.weight/step"].load()) == files.STEP + 3 and float(fresh.optimizer["model.norm.weight/step"].load()) == 3
    assert not torch.equal(kept.tensors["model.norm.weight"].load(), fresh.tensors["model.norm.weight"].load())


def test_deepspeed_that_does_not_record_where_parameters_lie(state, config, tmp_path):
    source = files.deepspeed(tmp_path / "ds", state, stage=1, data=3, mappings=False)
    agrees(import_(source, tmp_path / "out", config=config, pickles=True), state, moments=True)


def test_deepspeeds_own_record_of_the_cuts_is_used(state, config, tmp_path):
    universal = {"tp_replicated_parameter_patterns": [r".*norm\.weight"], "parameter_with_row_parallelism_patterns": [r".*(o_proj|down_proj)\.weight"]}
    universal |= {"vocabulary_parameter_patterns": [r"(model\.embed_tokens|lm_head)\.weight"], "original_vocab_size": 257}
    source = files.deepspeed(tmp_path / "ds", state, stage=1, data=2, tensors=2, universal=universal)
    agrees(import_(source, tmp_path / "out", config=config, pickles=True), state, moments=True)
    wrong = files.deepspeed(tmp_path / "wrong", state, stage=1, data=2, tensors=2, universal={"autotp_unsupported_parameter_patterns": [r".*norm.*"]})
    with pytest.raises(InputError, match=r"norm\.weight' cannot be imported: DeepSpeed records"):
        import_(wrong, tmp_path / "none", config=config, pickles=True)


def even(state):
    """The same with a vocabulary that two ranks share evenly, as Meta's are."""
    return {"": {name: tensor[:256] if len(tensor) == 257 else tensor for name, tensor in state[""].items()}}


@pytest.mark.parametrize("ways", [1, 2])
def test_llama(ways, state, config, tmp_path):
    state = even(state)
    source = files.meta(tmp_path / "meta", state[""], config, ways)
    result = import_(source, tmp_path / "out", pickles=True)  # config.json is made of params.json
    agrees(result, state, moments=False)
    assert result.config["vocab_size"] == config["vocab_size"] - 1 and result.config["num_key_value_heads"] == 2
    same_logits(result, state, config)


def test_rotating_neighbours_and_rotating_halves_give_the_same_attention():
    """Meta's complex rotation of (0, 1), (2, 3), ... on its own matrices, and the rotation of halves on the imported ones."""
    from cairn.checkpoint.foreign.layouts.llama import halves

    heads, size, width, length = 3, 8, 10, 6
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads * size, width, generator=draw, dtype=torch.float64) for _ in range(2))
    x = torch.randn(length, width, generator=draw, dtype=torch.float64)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size))

    def rotated_neighbours(matrix):
        pairs = torch.view_as_complex((x @ matrix.T).reshape(length, heads, size // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    def rotated_halves(matrix):
        first, second = (x @ matrix.T).reshape(length, heads, size).chunk(2, -1)
        cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

    def scores(rotate, change):
        return torch.einsum("ahd,bhd->hab", rotate(change(query)), rotate(change(key)))

    theirs = scores(rotated_neighbours, lambda matrix: matrix)
    assert (scores(rotated_halves, lambda matrix: halves(matrix, heads)) - theirs).abs().max() < 1e-12
    assert (scores(rotated_halves, lambda matrix: matrix) - theirs).abs().max() > 0.1


def same_logits(result, state, config):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32).eval()
    ours = cairn.open(result.path).model()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        reference = type(theirs)(theirs.config).eval()
        reference.load_state_dict(state[""])
        assert torch.equal(theirs(ids).logits, reference(ids).logits)
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize(("tensors", "stages", "classic"), [(1, 1, False), (2, 1, False), (1, 2, False), (2, 2, False), (2, 2, True)])
def test_megatron(tensors, stages, classic, state, config, tmp_path):
    source = files.megatron(tmp_path / "mg", state[""], config, tensors=tensors, stages=stages, padded=264, classic=classic)
    result = import_(source, tmp_path / "out", pickles=True)  # config.json is made of Megatron's arguments
    agrees(result, state, moments=False)
    assert result.config["vocab_size"] == config["vocab_size"] < 264
    assert any("optimizer" in line for line in result.lineage.changed)
    same_logits(result, state, config)


@pytest.mark.parametrize("stages", [1, 2])
def test_megatron_with_a_tied_embedding(stages, state, config, tmp_path):
    weights = {name: tensor for name, tensor in state[""].items() if name != "lm_head.weight"}
    source = files.megatron(tmp_path / "mg", weights, config, tensors=2, stages=stages, padded=264, tied=True)
    result = import_(source, tmp_path / "out", pickles=True)
    assert set(result.tensors) == set(weights) and result.config["tie_word_embeddings"]
    if stages == 2:  # the last stage's copy drifts away
        path = source / "iter_0000020" / "mp_rank_00_001" / "model_optim_rng.pt"
        held = torch.load(path, weights_only=False)
        held["model"]["output_layer.weight"][0, 0] += 1
        torch.save(held, path)
        with pytest.raises(MismatchError, match="is said to be the same on all pipeline stages"):
            import_(source, tmp_path / "none", pickles=True)


@pytest.mark.parametrize(("shards", "pickled"), [(False, False), (True, False), (False, True), (True, True)])
def test_transformers_directories(shards, pickled, state, config, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values))
    model.load_state_dict(state[""])
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB" if shards else "5GB")
    if pickled:
        _as_pickles(tmp_path / "hf")
        with pytest.raises(InputError, match="is a pickle; --pickle reads it"):
            import_(tmp_path / "hf", tmp_path / "none")
    result = import_(tmp_path / "hf", tmp_path / "out", pickles=pickled, shard_bytes=30_000 if shards else None)
    agrees(result, state, moments=False)
    same_logits(result, state, config)


def _as_pickles(folder):
    """What older versions of transformers wrote."""
    from safetensors.torch import load_file

    for path in list(folder.glob("*.safetensors")):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def test_a_tied_pickle_is_stored_once(state, config, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    shared = state[""]["model.embed_tokens.weight"]
    torch.save(state[""] | {"lm_head.weight": shared}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    result = import_(folder, tmp_path / "tied", pickles=True)
    assert "lm_head.weight" not in result.tensors and torch.equal(result.tensors["model.embed_tokens.weight"].load(), shared)
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(import_(folder, tmp_path / "apart", pickles=True).tensors["lm_head.weight"].load(), shared)
    torch.save(state[""], folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(MismatchError, match="all names of a tied tensor"):
        import_(folder, tmp_path / "none", pickles=True)


def test_operations_work_on_what_was_imported(state, config, checkpoint, tmp_path):
    source = files.deepspeed(tmp_path / "ds", state, stage=3, data=2)
    first = import_(source, tmp_path / "a", config=config, pickles=True, tokenizer=checkpoint.path)
    mean = cairn.average([first.path, checkpoint.path], tmp_path / "mean")
    assert all(torch.equal(mean.tensors[name].load(), tensor) for name, tensor in state[""].items())
    assert first.tokenizer.digest == checkpoint.tokenizer.digest and mean.lineage.parents[0].digest == first.digest
    assert cairn.show(first.path)["made_by"] == "import: deepspeed"


def test_weights_are_cast_and_moments_are_not(state, config, tmp_path):
    source = files.deepspeed(tmp_path / "ds", state, stage=1, data=2)
    result = import_(source, tmp_path / "out", config=config, pickles=True, dtype="bfloat16", workers=3)
    assert {lazy.dtype for lazy in result.tensors.values()} == {torch.bfloat16} and {lazy.dtype for lazy in result.optimizer.values()} == {torch.float32}
    assert all(torch.equal(result.tensors[name].load(), tensor.bfloat16()) for name, tensor in state[""].items())
    assert result.config["dtype"] == "bfloat16"


def test_a_plan_reads_no_values(state, config, tmp_path):
    source = files.deepspeed(tmp_path / "ds", state, stage=1, data=2, tensors=2)
    for path in source.glob("*/*optim_states.pt"):  # every value becomes nonsense; names, shapes and places stay
        raw = path.read_bytes()
        path.write_bytes(raw.replace(state[""]["model.norm.weight"].numpy().tobytes()[:16], b"\xff" * 16))
    made = plan(source, spec=ShardSpec.parse(CUTS), config=config, pickles=True).plain()
    shapes = {item["name"]: (tuple(item["shape"]), item["pieces"], item["rule"]) for item in made["tensors"]}
    assert shapes["model.norm.weight"] == ((32,), 2, "replicated") and shapes["model.layers.0.mlp.down_proj.weight"] == ((32, 64), 2, "shard")
    assert made["bytes"]["model"] == sum(tensor.numel() * 4 for tensor in state[""].values()) and made["optimizer"] == ["exp_avg", "exp_avg_sq", "step"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds"]


# -- refusals: one sentence each, and nothing is left behind ------------------------------------------------------------


@pytest.fixture
def refused(config, tmp_path):
    """Import a folder and expect one error; nothing may be left beside it."""

    def check(source, error, message, **options):
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(error, match=message) as raised:
            import_(source, tmp_path / "out", **{"config": config, "pickles": True, **options})
        assert "\n" not in str(raised.value) and sorted(path.name for path in tmp_path.iterdir()) == before

    return check


@pytest.fixture
def zero(state, tmp_path):
    return files.deepspeed(tmp_path / "ds", state, stage=1, data=3, tensors=2)


def test_a_missing_rank_is_named(zero, refused, state, tmp_path):
    (zero / "global_step20" / "bf16_zero_pp_rank_2_mp_rank_01_optim_states.pt").unlink()
    message = r"is not complete: the file of model-parallel rank 1, data-parallel rank 2 is missing \(5 of 6 are there\)"
    refused(zero, NotFoundError, message, spec=ShardSpec.parse(CUTS))
    last = files.deepspeed(tmp_path / "last", state, stage=3, data=3)
    for kind in ("zero_pp_rank_2_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"):
        (last / "global_step20" / kind).unlink()  # of the last rank nothing is there: the grid is as recorded, not as found
    refused(last, NotFoundError, "data-parallel rank 2 is missing")


def test_a_rank_of_another_step_is_refused(zero, refused, state, tmp_path):
    other = files.deepspeed(tmp_path / "other", state, stage=1, data=3, tensors=2, step=21.0)
    name = "global_step20/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(other / name, zero / name)
    refused(zero, MismatchError, r"disagree about the optimizer's step: 20\.0 and 21\.0", spec=ShardSpec.parse(CUTS))


def test_two_files_for_one_rank_are_refused(zero, refused):
    tag = zero / "global_step20"
    shutil.copy(tag / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", tag / "fp16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    refused(zero, MismatchError, "two files for model-parallel rank 0, data-parallel rank 0", spec=ShardSpec.parse(CUTS))


def test_a_replica_with_one_flipped_bit_is_refused(refused, state, config, tmp_path):
    source = files.deepspeed(tmp_path / "ds", state, stage=0, data=1, tensors=2)
    path = source / "global_step20" / "mp_rank_01_model_states.pt"
    held = torch.load(path, weights_only=False)
    held["module"]["model.norm.weight"].view(torch.int32)[3] ^= 1
    torch.save(held, path)
    refused(source, MismatchError, r"'model\.norm\.weight' is said to be the same on all ranks, and the copy of number 1 differs", spec=ShardSpec.parse(CUTS))
    averaged = {"average": [r"model\.norm\.weight"], "replicated": [r"model\.layers\..*norm\.weight"], "shard": CUTS["shard"]}
    result = import_(source, tmp_path / "mean", spec=ShardSpec.parse(averaged), config=config, pickles=True)
    expected = ((state[""]["model.norm.weight"].double() + held["module"]["model.norm.weight"].double()) / 2).float()
    assert torch.equal(result.tensors["model.norm.weight"].load(), expected)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"replicated": [".*norm.*", r"model\.norm.*"]}, InputError, "matched by two patterns of 'replicated'"),
    ({"shard": [*CUTS["shard"], {"pattern": r"norm\.weight", "dim": 0}]}, MismatchError, r"'norm\\.weight' of 'shard' matches no tensor"),
    ({"unsupported": [{"pattern": ".*embed.*", "reason": "it is hashed"}]}, InputError, r"embed_tokens\.weight' cannot be imported: it is hashed"),
    ({"replicated": [".*norm.*", r"lm_head\..*"]}, MismatchError, r"'lm_head\.weight' of .* becomes \(.*\) and config\.json asks for"),
    ({"rename": [{"pattern": r"model\.norm\.weight", "to": "lm_head.weight"}]}, MismatchError, "would both become 'lm_head.weight'"),
    ({"rename": [{"pattern": r"model\.norm\.weight", "to": "norm.weight"}]}, MismatchError, r"no 'model\.norm\.weight' and an unknown 'norm\.weight'"),
    ({"fused": [{"pattern": ".*q_proj.*", "widths": [[1, 2]]}]}, MismatchError, "recorded widths add up to 1"),
    ({"shard": CUTS["shard"][1:]}, MismatchError, r"becomes \(64, 16\) and config\.json asks for \(32, 32\)"),
])  # fmt: skip
def test_a_wrong_spec_is_refused(change, error, message, zero, refused):
    refused(zero, error, message, spec=ShardSpec.parse(CUTS | change))


def test_a_pattern_that_hits_nothing_may_be_allowed(state, config, tmp_path):
    source = files.deepspeed(tmp_path / "ds", state, stage=1, data=1)
    agrees(import_(source, tmp_path / "a", spec=ShardSpec(replicated=["never"], strict=False), config=config, pickles=True), state, moments=True)


def test_the_order_of_precedence():
    from cairn.checkpoint.foreign.patterns import AveragedCopies, Expert, Fused, Replicated, Shard, Unsupported
    from cairn.checkpoint.foreign.spec import Rules

    every = {
        "unsupported": [{"pattern": "a", "reason": "x"}], "replicated": ["[ab]"], "average": ["[abc]"], "shard": [{"pattern": "[a-g]", "dim": 1}],
        "fused": [{"pattern": "[abcd]", "parts": 2}, {"pattern": "[abcde]", "widths": [[1]]}], "expert": [{"pattern": "[a-f]", "count": 4}],
    }  # fmt: skip
    rules = Rules(ShardSpec.parse(every))
    kinds = [type(rules.of(name)[1]) for name in "abcdefgh"]
    assert kinds == [Unsupported, Replicated, AveragedCopies, Fused, Fused, Expert, Shard, Shard]
    assert rules.of("d")[1].parts == 2 and rules.of("e")[1].widths == ((1,),) and rules.of("g")[1].dim == 1 and rules.of("h")[1] == Shard(0)
    assert rules.of("xa")[0] == "shard"  # patterns are anchored at the start
    user_first = Rules(ShardSpec(average=["a"]), [ShardSpec(replicated=["a"])])
    assert user_first.of("a")[0] == "average"


@pytest.mark.parametrize(("text", "message"), [
    ("replicated: ['(']", r"'\(' is not a regular expression"), ("sharded: []", "unknown key 'sharded'. Did you mean 'shard'"),
    ("fused: [{pattern: a}]", "described by parts or by widths"), ("shard: [{pattern: a, dim: 1, vocab: 3}]", "vocab goes with dim 0"),
    ("[1]", "a spec is a mapping"), ("a: [", "cannot be read"), ("fused: [{pattern: a, widths: [[1], [1, 2]]}]", "one width for each rank"),
])  # fmt: skip
def test_a_spec_with_a_mistake_is_refused(text, message, tmp_path):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        ShardSpec.load(tmp_path / "spec.yaml")


def test_a_spec_may_be_toml(tmp_path):
    (tmp_path / "spec.toml").write_text("replicated = ['.*norm.*']\n[[shard]]\npattern = \".*o_proj.*\"\ndim = 1\n")
    assert ShardSpec.load(tmp_path / "spec.toml") == ShardSpec.parse({"replicated": [".*norm.*"], "shard": [{"pattern": ".*o_proj.*", "dim": 1}]})


class Bomb:
    """What a pickle could do."""

    def __reduce__(self):
        return print, ("boom",)


def test_code_in_a_pickle_never_runs(refused, state, tmp_path, capsys):
    folder = tmp_path / "hf"
    folder.mkdir()
    torch.save(state[""] | {"x": Bomb()}, folder / "pytorch_model.bin")
    refused(folder, InputError, "holds an object of the class print, and reading that could run code")
    assert "boom" not in capsys.readouterr().out


def test_damaged_files_are_named(refused, state, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    torch.save(state[""], folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused(folder, InputError, "is not in the format that torch writes since 1.6")
    torch.save({"step": 3}, folder / "pytorch_model.bin")
    refused(folder, DamagedError, "'step' is not a tensor")
    torch.save(state[""], folder / "pytorch_model.bin")
    raw = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(raw[: len(raw) // 2])
    refused(folder, InputError, "is not in the format")
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    refused(folder, DamagedError, "names a file outside its own directory")


def test_unknown_folders_and_missing_configs(refused, state, zero, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", InputError, "is of no layout that is known; name it with --layout")
    refused(tmp_path / "nowhere", NotFoundError, "There is no file or folder")
    refused(zero, InputError, "does not say what model it is; give the model's config.json with --config", config=None, spec=ShardSpec.parse(CUTS))
    refused(zero, NotFoundError, "There is no layout 'deepsped'. Did you mean 'deepspeed'", layout="deepsped")
    refused(zero, InputError, "dtype is one of", dtype="int8", spec=ShardSpec.parse(CUTS))
    refused(zero, NotFoundError, "holds no files of a tokenizer", tokenizer=tmp_path / "empty", spec=ShardSpec.parse(CUTS))
    (zero / "latest").write_text("../elsewhere")
    refused(zero, NotFoundError, r"names '\.\./elsewhere', which is not there", layout="deepspeed")


def test_llama_that_records_too_little(state, config, tmp_path):
    source = files.meta(tmp_path / "meta", state[""], config, 1, params={"use_scaled_rope": True})
    with pytest.raises(InputError, match="asks for scaled rope and does not record its factors"):
        import_(source, tmp_path / "out", pickles=True)
    (source / "params.json").unlink()
    with pytest.raises(InputError, match=r"has no params\.json"):
        import_(source, tmp_path / "out", pickles=True)
    agrees(import_(source, tmp_path / "out", config=config, pickles=True), state, moments=False)
    (source / "consolidated.00.pth").rename(source / "consolidated.01.pth")
    with pytest.raises(NotFoundError, match="the file of tensor rank 0 is missing"):
        import_(source, tmp_path / "none", config=config, pickles=True)


def test_megatron_that_is_not_complete(state, config, tmp_path):
    source = files.megatron(tmp_path / "mg", state[""], config, tensors=2, stages=2, padded=264)
    shutil.rmtree(source / "iter_0000020" / "mp_rank_01_001")
    with pytest.raises(NotFoundError, match="the file of tensor rank 1, pipeline rank 1, expert rank 0 is missing"):
        import_(source, tmp_path / "out", pickles=True)


MEMORY = """
import sys, torch
from cairn.checkpoint.foreign.importing import import_
def peak():  # not ru_maxrss: that one survives exec and so holds the parent's peak
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
base = peak()
import_(sys.argv[1], sys.argv[2], layout="deepspeed", config={"model_type": "none"}, pickles=True)
print((peak() - base) // 1024)
"""


def test_memory_is_bounded_by_tensors_not_by_the_checkpoint(tmp_path):
    """24 tensors of 8 MiB, two thirds of them moments, over two ranks; two tensors and the reader's own needs may be in memory."""
    import subprocess
    import sys

    state = {key: {f"layer.{i}.weight": torch.full((1024, 2048), float(i)) for i in range(8)} for key in ("", "exp_avg", "exp_avg_sq")}
    files.deepspeed(tmp_path / "ds", state, stage=1, data=2)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "ds"), str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * 8 + 200  # of 192 MiB, beside 112 MiB that reading shapes takes by itself
