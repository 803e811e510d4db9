"""Every shipped recipe is valid, says what its source published, and can be costed without its data."""

import pytest

from cairn.errors import InputError
from cairn.models.config import Network
from cairn.models.families.llama import Llama
from cairn.models.families.t5 import T5
from cairn.training import recipe as recipes
from cairn.training.estimate import GPUS, estimate, flops_per_unit, matched
from cairn.training.stages import estimates


@pytest.mark.parametrize("name", recipes.shipped())
def test_a_shipped_recipe_is_valid_and_round_trips(name):
    recipe = recipes.load(name)
    assert isinstance(recipe.model, Network)
    assert recipes.Recipe.parse(recipe.plain()) == recipe
    pinned = recipe.pinned()
    assert recipes.load(pinned.plain()) == pinned
    assert estimate(recipe)["total_flops"] > 0


def test_these_recipes_ship():
    stages = {"olmo2-1b-two-stage", "olmo2-two-stage-demo"}
    pairs = {"ul2-small", "ul2-tiny", "t5-small-from-scratch", "t5-tiny", "bigscience-grid"}
    assert {"demo", "dmas-1.7b", "llama-124m", "olmo2-1b"} | stages | pairs <= set(recipes.shipped())


def llama_parameters(vocabulary, width, inner, layers, heads, key_value_heads, tied=False):
    """The count written out once more, independent of the library."""
    head = width // heads
    layer = 2 * width * width + 2 * width * key_value_heads * head + 3 * width * inner + 2 * width
    return layers * layer + (1 if tied else 2) * vocabulary * width + width


def test_dmas_has_the_published_figures():
    recipe = recipes.load("dmas-1.7b")
    assert recipe.model.parameter_count() == 1_716_144_128 == llama_parameters(50304, 2048, 5120, 36, 32, 8)
    assert recipe.training.batch == 524_288 and recipe.total_steps == 19_073
    batch = recipe.training.batch
    schedule = recipe.pinned().schedule
    rate = [recipe.optimizer.lr * schedule.factor(step * batch, batch) for step in (0, 714, 715, 19_073, 43_500)]
    assert rate == pytest.approx([6e-4 / 715, 6e-4, 6e-4, 6e-5, 6e-5], rel=1e-12)
    longer = recipes.load("dmas-1.7b", ["training.tokens=43500 steps"]).pinned().schedule
    assert all(longer.factor(step * batch, batch) == schedule.factor(step * batch, batch) for step in range(0, 19_073, 97))


def test_llama_124m():
    assert recipes.load("llama-124m").model.parameter_count() == llama_parameters(50304, 768, 2048, 12, 12, 12, tied=True) == 123_587_328


def test_olmo2_1b_has_the_published_size():
    recipe = recipes.load("olmo2-1b")
    assert recipe.model.parameter_count() == 1_484_916_736
    assert recipe.training.batch == 512 * 4096 and recipe.optimizer.lr == 4e-4


PUBLISHED = {
    "qwen3-0.6b": ("qwen3", 596_049_920, 28),
    "gemma3-270m": ("gemma3_text", 268_098_176, 18),
    "smollm2-135m": ("llama", 134_515_008, 30),
    "pythia-160m": ("gpt_neox", 162_322_944, 12),
    "olmoe-1b-7b": ("olmoe", 6_919_161_856, 16),
}
"""Family, parameters (a tied embedding once) and layers of published checkpoints."""


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models_have_their_size(name):
    family, parameters, layers = PUBLISHED[name]
    model = recipes.load(name).model
    assert (model.model_type, model.parameter_count(), model.num_hidden_layers) == (family, parameters, layers)
    assert sum(parameter.numel() for parameter in model.meta_model().parameters()) == parameters
    figures = estimate(recipes.load(name))
    assert figures["memory_gb"]["total"] > 16e-9 * parameters / recipes.load(name).parallel.shard


def test_a_mixture_of_experts_costs_what_is_chosen_for_a_token():
    model = recipes.load("olmoe-1b-7b").model
    idle = (64 - 8) * 3 * 2048 * 1024 * 16
    embedding = 50304 * 2048
    assert model.parameter_count() - idle == 1_282_017_280  # the 1.3B that compute a token, embeddings included
    # Two operations a weight and token; norms and the embedding that is looked up compute nothing.
    assert model.matmul_flops(1) - 4 * 2048 * 16 == 2 * (model.parameter_count() - idle - embedding - 16 * 4 * 2048 - 2048)


def anneals(*overrides):
    """The stages of the recipe that begin from the trunk, as a dry run tells them."""
    rows = estimates(recipes.load("olmo2-1b-two-stage", overrides))
    assert [row["stage"] for row in rows] == ["web", "anneal-42", "anneal-42069", "anneal-666", "soup"]
    assert [row.get("seed") for row in rows[1:4]] == [42, 42069, 666] and rows[4]["from"] == ["anneal-42", "anneal-42069", "anneal-666"]
    return rows[1:4]


def test_the_anneals_of_olmo2_1b_begin_at_the_published_rate_and_end_at_zero():
    for row in anneals():
        assert row["begins"] == 1_907_359 * 512 * 4096 and row["steps"] == 23_852 and row["tokens"] == pytest.approx(50e9, rel=1e-3)
        first, last = row["learning_rate"]
        assert round(first, 9) == 0.000074487 and last == pytest.approx(first / 23_852)
        assert sum(row["sources"].values()) == pytest.approx(51.5) and row["parameters"] == 1_484_916_736


@pytest.mark.parametrize(
    ("lr", "step", "rate"),
    [(3e-4, 928_000, 6.1499e-5), (3e-4, 928_646, 6.1351e-5), (9e-4, 600_000, 9.0e-5)],
    ids=["7B, rounded to thousands", "7B, the step that was loaded", "13B, after the end of its cosine"],
)
def test_and_so_do_those_of_7b_and_13b(lr, step, rate):
    """The sizes differ in peak, batch and length; the published start values follow from the same schedule."""
    batch = 1024 * 4096 if lr == 3e-4 else 2048 * 4096
    changes = [f"optimizer.lr={lr}", f"training.batch={batch}", f"training.tokens={step} steps"]
    assert {float(f"{row['learning_rate'][0]:.4e}") for row in anneals(*changes)} == {rate}


def test_olmo2_decays_all_but_the_embedding_and_starts_truncated():
    for name in ("olmo2-1b", "olmo2-1b-two-stage"):
        recipe = recipes.load(name)
        assert recipe.optimizer.decay == "not-embeddings" and recipe.model.initializer_cutoff == 3 and recipe.objective.z_loss == 1e-5
        assert (recipe.data.filters[0].longest, recipe.data.filters[0].times) == (13, 32)
        assert recipe.pinned().learning_rate(4000 * 2_097_152) == 4e-4, "the warm-up is over after 4000 steps"


@pytest.mark.parametrize("gpu", GPUS)
def test_hours_are_operations_over_rate(gpu):
    recipe = recipes.load("dmas-1.7b")
    one, four = estimate(recipe, gpu), estimate(recipe, gpu, gpus=4, utilisation=0.5)
    rate = GPUS[gpu].flops * one["assumed_utilisation"]
    assert one["estimated_hours"] == pytest.approx(one["flops_per_token"] * one["tokens"] / rate / 3600)
    assert four["estimated_hours"] == pytest.approx(one["estimated_hours"] * one["assumed_utilisation"] / 0.5 / 4)


def test_operations_by_the_usual_formula():
    """6 for each weight in a matrix product and token, 12 x layers x width x length for attention over all pairs ("PaLM", appendix B)."""
    recipe = recipes.load("dmas-1.7b")
    in_products = 1_716_144_128 - 50304 * 2048 - 36 * 2 * 2048 - 2048  # neither the embedding, which is looked up, nor the norms
    assert estimate(recipe)["flops_per_token"] == 6 * in_products + 12 * 36 * 2048 * 1024


def test_the_grid_has_the_published_sizes_and_tokens():
    decoder = recipes.load("bigscience-grid")
    # Rotary positions take the place of the paper's 32 x 64 biases by distance.
    assert decoder.model.parameter_count() + 32 * 64 == 4_762_310_656
    pair = {"name": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    other = recipes.load("bigscience-grid", [f"model={pair}", "objective=span-corruption"])
    assert other.model.parameter_count() == 11_003_736_064 and other.objective.sizes(626) == (512, 114)
    assert decoder.total_units == 131_072 * 2048 * 626 and abs(decoder.total_units / 1e9 - 168.0) < 0.05


def test_an_encoder_decoder_costs_what_its_objective_makes_it_read_and_say():
    spans = recipes.load("t5-small-from-scratch")
    assert flops_per_unit(spans) == 3 * spans.model.pair_flops(512, 114, causal=False) / 626
    prefix = recipes.load("t5-small-from-scratch", ["objective=prefix-lm"])
    assert flops_per_unit(prefix) == 3 * prefix.model.pair_flops(627, 626, causal=False) / 626


@pytest.mark.parametrize("width", [48, 256, 1024])
def test_an_encoder_decoder_is_matched_to_what_a_decoder_costs(width):
    decoder = Llama(hidden_size=width, intermediate_size=width * 5 // 2, num_hidden_layers=6, num_attention_heads=4, vocab_size=1000)
    wanted = decoder.matmul_flops(626, causal=False)
    pair = matched(T5(d_model=width, d_kv=width // 4, num_heads=4, num_layers=6, vocab_size=1000, feed_forward_proj="gated-gelu"), 512, 114, wanted)
    assert pair.pair_flops(512, 114, causal=False) == pytest.approx(wanted, rel=0.02) and pair.d_ff % 4 == 0
    with pytest.raises(InputError, match="make it narrower"):
        matched(T5(d_model=width, num_layers=40), 512, 114, wanted / 20)
