"""A family that only transformers builds is trained through its own module: names stay, losses are its own, a resume changes no bit."""

import pytest
import torch

from cairn.checkpoint.format import read
from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError, MismatchError
from cairn.models.families.transformers import Transformers
from cairn.training.directory import Run
from cairn.training.run import fork, resume, train
from tests.training.test_training_parallel import layout, work

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Phi of random weights, as transformers saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("phi") / "model"
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("phi", **SIZES)).save_pretrained(folder)
    byte_level().save(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(small_recipe):
    training = {**small_recipe["training"], "tokens": "8 steps"}
    return {**small_recipe, "model": "transformers", "training": training, "checkpoint": {"every": "4 steps"}}


@pytest.mark.parametrize("more", [[], ["adapter={name: lora, rank: 4}"], ["data.documents=mask"], ["trainable=[final_layernorm]"]], ids=str)
def test_it_is_trained_and_resumed_and_opens_in_transformers(more, directory, recipe, tmp_path):
    whole = fork(directory, tmp_path / "whole", more, recipe=recipe, fresh=["optimizer"])
    fork(directory, tmp_path / "cut", more, recipe=recipe, fresh=["optimizer"], stop_at_step=3)
    assert resume(tmp_path / "cut").newest().digest == whole.newest().digest
    rows = whole.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"]
    newest = whole.newest()
    config, before = ({key: value for key, value in each.config.items() if "dtype" not in key} for each in (newest, read.open(directory)))
    assert config == before
    if not newest.is_adapter:
        assert set(newest.tensors) == set(read.open(directory).tensors)
        assert type(transformers.AutoModelForCausalLM.from_pretrained(newest.path)).__name__ == "PhiForCausalLM"
    assert type(newest.model()).__name__ == "PhiForCausalLM"


def test_it_answers_like_ours_and_its_own_calls_work_as_before(directory):
    config = read.open(directory).config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    family = Transformers.from_hf(config)
    ours = family.meta_model().to_empty(device="cpu")
    family.initialize(ours, 0)
    ours.load_state_dict(theirs.state_dict())
    ours.eval()
    ids = torch.arange(24).reshape(2, 12)
    weights = torch.rand(2, 11, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(ids).logits
        assert torch.allclose(ours(input_ids=ids, use_cache=False).logits, logits, atol=1e-6) and torch.allclose(ours(ids, mask=None).logits, logits, atol=1e-6)
        said = ours(ids[:, :-1], mask=None, targets=ids[:, 1:], weights=weights)
        each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert torch.allclose(said.token_loss, each, atol=1e-5) and torch.allclose(said.loss, (each * weights).sum(), atol=1e-4)


def test_two_processes_have_the_loss_curve_of_one(directory, recipe, tmp_path):
    settings = ["training.precision=float64", "training.tokens=3 steps", "checkpoint.every=100%"]
    alone = fork(directory, tmp_path / "alone", settings, recipe=recipe, fresh=["optimizer"])
    layouts = ["2x1x1", "1x2x1"]
    options = {"recipe": recipe, "fresh": ["optimizer"]}
    work(tmp_path, 2, *(["fork", str(directory), [*layout(each), *settings], {"run": str(tmp_path / each), **options}] for each in layouts))
    for each in layouts:
        assert [row["loss"] for row in Run(tmp_path / each).metrics()] == pytest.approx([row["loss"] for row in alone.metrics()], rel=1e-6), each


def test_what_it_cannot_do_is_said(directory, recipe, small_recipe, tmp_path):
    with pytest.raises(InputError, match="goes on from a checkpoint"):
        train(recipe, tmp_path / "a")
    with pytest.raises(MismatchError, match="is a 'transformers'"):
        fork(directory, tmp_path / "b", recipe=small_recipe, fresh=["optimizer"])
    assert list(tmp_path.iterdir()) == []
