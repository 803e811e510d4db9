"""Forks: what the recipe leaves open, the checkpoint decides; overrides come first; `now` is a value, not a text."""

import itertools
import json
import shutil

import pytest
import torch

from cairn.checkpoint.format import read
from cairn.errors import DamagedError, InputError, MismatchError
from cairn.training import recipe as recipes
from cairn.training.forking import differences
from cairn.training.run import fork, recipe_to_fork
from tests.faults import flip

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 257}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A directory as transformers writes it, with a rope and an epsilon that no recipe has by default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("foreign") / "llama"
    config = LlamaConfig(**TINY, rope_theta=20.0, rms_norm_eps=1e-6, tie_word_embeddings=True, eos_token_id=[0, 3], bos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def bare(small_recipe):
    """A recipe that says nothing of the model but its family."""
    return {**small_recipe, "model": {"name": "llama"}, "training": {**small_recipe["training"], "tokens": "2 steps"}}


def test_a_fork_of_a_foreign_checkpoint_trains_its_network(foreign, bare, tmp_path):
    """The loss of the first update is that of the network as it was made, not of another rope."""
    run = fork(foreign, tmp_path / "r", recipe=bare, fresh=["optimizer"])
    model, config = run.recipe.model, json.loads((run.newest().path / "config.json").read_text())
    assert (model.rope_theta, model.rms_norm_eps, model.tie_word_embeddings, model.num_key_value_heads) == (20.0, 1e-6, True, 1)
    assert config["rope_theta"] == 20.0 and config["eos_token_id"] == [0, 3]
    assert not [line for line in run.newest().lineage.changed if line.startswith("model.")]
    assert differences(run.recipe, read.open(foreign)) == {}


def test_what_the_recipe_says_otherwise_is_recorded(foreign, bare):
    source = read.open(foreign)
    asked = recipe_to_fork(source, ["model.rope_theta=500"], recipe=bare)
    changed = differences(asked, source)
    assert changed["model.rope_theta"] == (20.0, 500.0) and "model.rms_norm_eps" not in changed


@pytest.mark.parametrize("model", [None, "llama", {"name": "llama"}, {"hidden_size": 32}])
def test_the_model_may_be_left_out_in_any_measure(foreign, bare, model):
    recipe = {key: value for key, value in bare.items() if key != "model"} | ({"model": model} if model else {})
    assert recipe_to_fork(foreign, recipe=recipe).model.rope_theta == 20.0


def test_overrides_complete_a_recipe_before_it_is_validated(foreign, bare, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({key: value for key, value in bare.items() if key not in ("model", "data")}))
    asked = recipe_to_fork(foreign, ["model.name=llama", f"data={json.dumps(bare['data'])}"], recipe=str(file))
    assert asked.model.hidden_size == 32
    assert recipes.load({"data": bare["data"]}, ["model.name=llama"]).model.hidden_size == 256


def test_another_family_is_refused(foreign, bare):
    with pytest.raises(MismatchError, match=r"is a 'llama', and the recipe's model a 'olmo2'"):
        recipe_to_fork(foreign, ["model.name=olmo2"], recipe=bare)


def test_a_fork_of_our_own_run_changes_nothing_unsaid(small_run):
    before = small_run.recipe
    assert recipe_to_fork(small_run.path).plain() == before.plain()


def test_a_recipe_beside_our_own_checkpoint_leaves_its_model_alone(small_run, bare):
    assert recipe_to_fork(small_run.path, recipe=bare).model == small_run.recipe.model


def test_now_is_a_moment_where_a_moment_stands_and_a_word_elsewhere(small_run):
    source = small_run.checkpoints()[1]
    sources = "{now: {corpus: nowhere.jsonl}, other: {corpus: now}}"
    asked = recipe_to_fork(source, [f"data.sources={sources}", "schedule={name: linear, start: now}", "optimizer={name: adamw, lr: now}"])
    assert [each.corpus for each in asked.data.sources.values()] == ["nowhere.jsonl", "now"]
    assert str(asked.schedule.start) == "2560 tokens"
    assert asked.optimizer.lr == pytest.approx(small_run.metrics()[10]["learning_rate"])


def test_another_tokenizer_is_refused_and_the_same_one_is_not(small_run):
    with pytest.raises(InputError, match="has a tokenizer of its own"):
        recipe_to_fork(small_run.path, ["data.tokenizer={bpe: 512}"])
    assert recipe_to_fork(small_run.path, ["data.tokenizer=byte"]).data.tokenizer == "byte"
    checkpoint = str(small_run.newest().path)
    assert recipe_to_fork(small_run.path, [f"data.tokenizer={checkpoint}"]).data.tokenizer == checkpoint


@pytest.mark.parametrize(
    "words", [["schedule={name: linear, start: now}"], ["schedule.name=linear", "schedule.start=now", "schedule.final=0", "schedule.warmup=0"]]
)
def test_a_schedule_that_begins_anew_ends_with_the_new_run(small_run, words):
    """The parent's horizon is not kept: the rate falls from here to nothing at the end."""
    asked = recipe_to_fork(small_run.checkpoints()[1], [*words, "optimizer.lr=now", "training.tokens=30 steps"]).pinned()
    rates = [asked.learning_rate(step * 256) for step in range(10, 31)]
    assert rates[0] == pytest.approx(small_run.metrics()[10]["learning_rate"]) and rates[-1] == pytest.approx(0, abs=1e-12)
    assert all(after < before for before, after in itertools.pairwise(rates))


def test_a_value_with_a_line_break_comes_through_whole(small_recipe):
    prompt = "first line\nsecond: [line]"
    recipe = recipes.load(small_recipe).changed({"callbacks": [{"name": "sample", "prompts": [prompt]}]})
    assert recipe.callbacks[0].prompts == [prompt]


def test_a_default_is_overridden_without_naming_it(small_recipe):
    bare = {key: value for key, value in small_recipe.items() if key not in ("optimizer", "schedule")}
    asked = recipes.load(bare, ["optimizer.lr=1e-3", "schedule.warmup=5 steps", "objective.z_loss=0.1"])
    assert asked.optimizer.lr == 1e-3 and str(asked.schedule.warmup) == "5 steps" and asked.objective.z_loss == 0.1


@pytest.mark.parametrize("text", ["model: {name: llama}\ntraining: {tokens: 5 steps}\ntraining: {batch: 512}\n", "model: {name: llama, name: olmo2}\n"])
def test_a_key_that_stands_twice_is_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match="stands twice"):
        recipes.load(tmp_path / "r.yaml")


@pytest.mark.parametrize("word", ["checkpoint.every=0.5", "schedule.warmup=0.05", "training.tokens=0.5", "training.tokens=0", "checkpoint.every=0 steps"])
def test_an_amount_that_is_none_is_refused(small_recipe, word):
    with pytest.raises(InputError, match="in percent: '5" if "0." in word else "is nothing"):
        recipes.load(small_recipe, [word])


@pytest.mark.parametrize("word", ["optimizer.lr=.inf", "optimizer.lr=.nan", "training.clip=.inf", "training.micro_batch=0"])
def test_a_number_that_cannot_be_is_refused(small_recipe, word):
    with pytest.raises(InputError, match=rf"{word.partition('=')[0].rpartition('.')[2]}: "):
        recipes.load(small_recipe, [word])


def test_several_processes_do_not_go_on_from_damaged_weights(small_run, tmp_path, monkeypatch):
    """Each would read its own parts, which nothing verifies on the way."""
    damaged = tmp_path / "run" / "checkpoints" / "step-00000020"
    shutil.copytree(small_run.checkpoints()[-1], damaged)
    flip(damaged / "model.safetensors", 9000)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        fork(damaged, tmp_path / "fork", ["training.tokens=22 steps", "parallel.shard=2"])
    assert not (tmp_path / "fork").exists()
