"""Text from a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.saving import write
from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError
from cairn.generation.sample import generate_text
from cairn.generation.text import generate
from cairn.models.families.llama import Llama


def test_a_checkpoint_writes_what_the_model_in_memory_writes(tmp_path: Path) -> None:
    tokenizer = byte_level()
    a = Llama(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, initializer_range=0.2)
    model = a.build(0)
    parts = {"model": model.state_dict(), "config": a.to_hf(), "lineage": Lineage.record("run", "test")}
    write.save(tmp_path / "with", tokenizer=tokenizer, **parts)
    write.save(tmp_path / "without", **parts)
    wanted = generate_text(model, tokenizer, "The ", max_new_tokens=12, temperature=0.8, seed=3)
    assert generate(tmp_path / "with", "The ", new_tokens=12, seed=3) == wanted
    with pytest.raises(InputError, match="no tokenizer"):
        generate(tmp_path / "without", "The ")
