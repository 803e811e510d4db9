"""Growth operators against closed forms: which layer goes where, what stays equal, what a mask does."""

import re

import pytest
import torch

from cairn.checkpoint.format import read
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.saving import write
from cairn.errors import CairnError, InputError, MismatchError
from cairn.growth import layers
from cairn.growth.enlarge import difference, grow
from cairn.growth.methods.ligo import identity_on_top, mapped
from cairn.growth.methods.zero import norm_share
from cairn.growth.when import when
from cairn.training.run import fork, resume, train

PREFIX = "model.layers."


@pytest.mark.parametrize(
    ("order", "small", "deep", "expected"),
    [
        ("stack", 3, 7, [0, 1, 2, 0, 1, 2, 0]),
        ("interleave", 3, 6, [0, 0, 1, 1, 2, 2]),
        ("interleave", 3, 4, [0, 0, 1, 2]),
        ("solar", 4, 6, [0, 1, 2, 1, 2, 3]),
        ("short", 4, 6, [0, 1, 2, 3, 2, 3]),
    ],
)
def test_layers_come_from_where_the_order_says(order, small, deep, expected):
    assert layers.ORDERS[order](small, deep) == expected
    assert layers.ORDERS[order](small, small) == list(range(small))
    assert [expected[i] for i, new in enumerate(layers.added(expected)) if not new] == sorted(set(expected))


@pytest.mark.parametrize(("order", "deep"), [("solar", 7), ("solar", 10), ("short", 9)])
def test_a_depth_that_an_order_can_not_make_is_said(order, deep):
    with pytest.raises(InputError, match=f"order={order}"):
        layers.ORDERS[order](4, deep)


@pytest.mark.parametrize(("order", "count"), [("stack", 5), ("interleave", 5), ("solar", 4), ("short", 3)])
def test_a_stack_holds_copies_bit_for_bit_and_the_rest_as_it_was(order, count, small_run, tmp_path):
    small = small_run.newest()
    large = grow("stack", small, tmp_path / "large", {"order": order, "layers": count})
    expected = layers.ORDERS[order](2, count)
    for name, tensor in large.tensors.items():
        layer, _, rest = name.removeprefix(PREFIX).partition(".")
        source = f"{PREFIX}{expected[int(layer)]}.{rest}" if name.startswith(PREFIX) else name
        assert torch.equal(tensor.load(), small.tensors[source].load()), name
    per_layer = sum(t.load().numel() for n, t in small.tensors.items() if n.startswith(f"{PREFIX}0."))
    assert sum(t.load().numel() for t in large.tensors.values()) == sum(t.load().numel() for t in small.tensors.values()) + (count - 2) * per_layer


def test_the_default_is_four_times_the_layers(small_run, tmp_path):
    assert grow("stack", small_run.path, tmp_path / "large").config["num_hidden_layers"] == 8


@pytest.mark.parametrize(("parameters", "tokens", "expected"), [(8e9, 15e12, 6.58), (7e9, 2e12, 11.11), (13e9, 2e12, 15.84), (70e9, 2e12, 42.48)])
def test_the_guideline_gives_the_published_table(parameters, tokens, expected):
    found = when(parameters, tokens)
    assert round(found["growth_tokens"] / 1e9, 2) == pytest.approx(expected, abs=0.0051)
    assert found["small_flops"] + found["large_flops"] == found["budget_flops"] == 6 * parameters * tokens
    assert found["large_tokens"] == pytest.approx(tokens - found["growth_tokens"] / 4)


def test_a_guideline_without_room_is_refused():
    with pytest.raises(InputError, match="do not grow"):
        when(1e6, 1e6)


def test_maps_before_any_step_stack_and_a_width_map_keeps_what_is_there(small_run, tmp_path):
    stack = grow("stack", small_run.path, tmp_path / "stack", {"factor": 3})
    ligo = grow("ligo", small_run.path, tmp_path / "ligo", {"factor": 3, "steps": 0})
    assert all(torch.equal(tensor.load(), ligo.tensors[name].load()) for name, tensor in stack.tensors.items())
    wide = grow("ligo", small_run.path, tmp_path / "wide", {"width": 2, "steps": 0})
    name = f"{PREFIX}0.self_attn.q_proj.weight"
    assert torch.allclose(wide.tensors[name].load()[:32, :32], small_run.newest().tensors[name].load(), atol=1e-6)
    matrix = identity_on_top(2, 3, torch.tensor([[1.0, 2.0]]))
    assert torch.equal(mapped(torch.tensor([1.0, 2.0, 10.0, 20.0]), 0, matrix), torch.tensor([1.0, 2.0, 10.0, 20.0, 21 / 3**0.5, 42 / 3**0.5]))


def test_learned_maps_lower_the_loss_of_what_they_make(small_run, tmp_path):
    from cairn.evaluation.measure import evaluate

    losses = []
    for steps in (0, 40):
        made = grow("ligo", small_run.path, tmp_path / f"{steps}", {"factor": 2, "steps": steps, "lr": 3e-2})
        rows = evaluate(made, [{"name": "held-out", "corpus": str(small_run.recipe.data.sources["walks"].corpus), "sequence_length": 32}], store=False)
        losses.append(next(row.value for row in rows if row.metric == "loss"))
    assert losses[1] < losses[0] - 0.01


def test_a_mask_at_one_is_a_plain_large_model_and_in_between_it_is_in_between(small_run, tmp_path):
    whole, half, none = (grow("masked", small_run.path, tmp_path / str(m), {"factor": 2, "width": 2, "mask": m}) for m in (1, 0.5, 0))
    assert whole.ingredients is None and whole.lineage.options["recipe"]["callbacks"] == []
    down = f"{PREFIX}3.mlp.down_proj.weight"
    drawn = whole.tensors[down].load()
    assert drawn.std() == pytest.approx(0.02, rel=0.1) and not none.tensors[down].load().any()
    assert torch.allclose(half.tensors[down].load(), drawn / 2) and torch.equal(half.ingredients[f"unmask/{down}"].load(), drawn)
    norm = f"{PREFIX}0.input_layernorm.weight"
    small = small_run.newest().tensors[norm].load()
    assert torch.equal(whole.tensors[norm].load()[:32], small)
    assert torch.allclose(none.tensors[norm].load()[:32], small * 0.5**0.5)
    assert norm_share(4, 0.0) == 0.5 and norm_share(4, 1.0) == 1.0


def test_training_raises_the_mask_and_then_forgets_it(small_run, tmp_path):
    grown = grow("masked", small_run.path, tmp_path / "grown", {"factor": 2, "width": 2})
    settings = ["training.tokens=30 steps", "schedule.start=now", "callbacks.0.length=5 steps"]
    run = fork(grown, tmp_path / "run", settings, fresh=["optimizer"])
    masks = [row.get("unmask/mask") for row in run.metrics()]
    assert masks[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and masks[5:] == [None] * 5
    assert run.newest().ingredients is None
    cut = fork(grown, tmp_path / "cut", settings, fresh=["optimizer"], stop_at_step=23)
    name = f"{PREFIX}2.mlp.down_proj.weight"
    kept = cut.newest()
    assert torch.allclose(kept.tensors[name].load(), 0.6 * kept.ingredients[f"unmask/{name}"].load())
    assert resume(cut.path).newest().digest == run.newest().digest


def test_a_mask_without_a_grown_checkpoint_is_refused(small_recipe, small_run, tmp_path):
    with pytest.raises(InputError, match="belongs to a run that is forked"):
        train(small_recipe, tmp_path / "run", ["callbacks=[unmask]"])
    bare = write.save(tmp_path / "bare", model=small_run.newest().tensors.load(), config=small_run.newest().config, lineage=Lineage(kind="run", name="train"))
    with pytest.raises(InputError, match="no run can raise the mask"):
        grow("masked", bare, tmp_path / "out", {"factor": 2})


FAMILIES = ["mistral", "qwen2", "qwen3", "gemma2", "gpt2", "phi3", "gpt_neox", "mixtral"]


def foreign(family, folder, **more):
    """A checkpoint as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    marks = {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8}
    config = transformers.AutoConfig.for_model(family, **{**sizes, **marks, **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    model.save_pretrained(folder)
    return read.open(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers_grow_in_depth(family, tmp_path):
    small = foreign(family, tmp_path / "small")
    for order, count in (("stack", 4), ("interleave", 3)):
        large = grow("stack", small, tmp_path / order, {"order": order, "layers": count})
        assert len(large.tensors) - len(small.tensors) == (count - 2) * sum(
            re.search(r"\.(\d+)\.", f".{name}")[1] == "1" for name in small.tensors if re.search(r"\d", name)
        )
        assert difference(large, large) == 0  # opens, every tensor in its place
    if family == "mixtral":
        with pytest.raises(MismatchError, match="no single matrix"):
            grow("zero", small, tmp_path / "zero", {"factor": 2})
    else:
        assert difference(small, grow("zero", small, tmp_path / "zero", {"factor": 2})) < 1e-5


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "olmo2"])
@pytest.mark.parametrize("tied", [True, False])
def test_models_of_transformers_are_widened_without_a_change_of_their_function(family, tied, tmp_path):
    small = foreign(family, tmp_path / "small", tie_word_embeddings=tied)
    for name, options in (("split", {"width": 3}), ("zero", {"width": 2, "factor": 2}), ("masked", {"width": 2, "mask": 1})):
        large = grow(name, small, tmp_path / name, options)
        assert large.config["hidden_size"] == 32 * options["width"] and (difference(small, large) < 2e-5) == (name != "masked")


def test_what_can_not_be_widened_is_said(tmp_path):
    with pytest.raises(MismatchError, match="family 'gpt2'; widening is known for llama"):
        grow("split", foreign("gpt2", tmp_path / "small"), tmp_path / "out")


def test_copies_with_noise_differ_and_the_share_of_each_is_whole(small_run, tmp_path):
    plain, noisy = (grow("split", small_run.path, tmp_path / str(noise), {"noise": noise}) for noise in (0, 0.01))
    up = f"{PREFIX}0.mlp.up_proj.weight"
    values = plain.tensors[up].load()
    assert torch.equal(values[:64], values[64:]) and torch.equal(values[:, :32] * 2, small_run.newest().tensors[up].load().repeat(2, 1))
    other = noisy.tensors[up].load()
    assert torch.equal(other[:64], values[:64]) and 0 < float((other[64:] - values[64:]).std() / values.std()) < 0.02


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"factor": 2, "layers": 4}, "two ways"), ({"factor": 1.3}, "not a whole number"), ({"layers": 1}, "smaller"), ({"order": "stak"}, "order")],
)
def test_impossible_sizes_are_refused(options, sentence, small_run, tmp_path):
    with pytest.raises(CairnError, match=sentence):
        grow("stack", small_run.path, tmp_path / "out", options)
    assert not list(tmp_path.iterdir())
