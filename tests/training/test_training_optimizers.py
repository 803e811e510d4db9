"""What decays is decided by what a tensor is, not by its name."""

import pytest
import torch

from cairn.models.families.llama import Llama
from cairn.models.families.t5 import T5
from cairn.options import configure

TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "llama": (lambda: Llama(**TINY), {"model.embed_tokens.weight"}),
    "tied": (lambda: Llama(**TINY, tie_word_embeddings=True), {"model.embed_tokens.weight"}),
    "t5": (
        lambda: T5(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2),
        {"shared.weight", *(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder"))},
    ),
}


def decayed(model: torch.nn.Module, decay: str) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = configure("optimizer", {"name": "adamw", "decay": decay}).build(model).param_groups
    return {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_what_is_looked_up(name):
    make, tables = MODELS[name]
    model = make().build(0)
    everything, matrices = decayed(model, "all"), decayed(model, "matrices")
    assert everything == {name for name, _ in model.named_parameters()} and tables <= matrices
    assert matrices - decayed(model, "matrices-not-embeddings") == tables == everything - decayed(model, "not-embeddings")


def test_tables_of_positions_and_class_tokens_of_an_image_model_are_embeddings():
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    model = ViTForImageClassification(ViTConfig(**small))
    kept = decayed(model, "matrices") - decayed(model, "matrices-not-embeddings")
    assert kept == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    assert "vit.embeddings.patch_embeddings.projection.weight" in decayed(model, "matrices-not-embeddings")


def test_a_module_called_embedding_that_multiplies_decays():
    model = torch.nn.ModuleDict({"embed_projection": torch.nn.Linear(4, 4, bias=False), "table": torch.nn.Embedding(4, 4)})
    assert decayed(model, "matrices-not-embeddings") == {"embed_projection.weight"}
