"""Prefix decoders and encoder-decoders continue a prompt as a forward pass without cache or neighbours would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.generation.sample import generate
from cairn.models import masks
from cairn.models.families.llama import Llama
from cairn.models.families.olmo2 import Olmo2
from cairn.models.families.t5 import T5
from cairn.models.families.umt5 import UMT5

SIZES = {"vocab_size": 47, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
PAIR = {
    "vocab_size": 47,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "eos_token_id": 46,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
PREFIX = {kind: kind(**SIZES, attention="prefix", num_key_value_heads=2).build(1).eval() for kind in (Llama, Olmo2)}
PAIRS = {kind: kind(**PAIR, initializer_factor=2.0).build(1).eval() for kind in (T5, UMT5)}
PROMPTS = st.lists(st.lists(st.integers(0, 45), min_size=1, max_size=9), min_size=1, max_size=4)


def by_hand(model, prompt: list[int], new: int) -> list[int]:
    """The most probable tokens, each from a pass over everything."""
    written: list[int] = []
    for _ in range(new):
        with torch.no_grad():
            if model.architecture.encoder_decoder:
                logits = model(torch.tensor([[*prompt, 46]]), decoder_input_ids=torch.tensor([[0, *written]])).logits
            else:
                logits = model(torch.tensor([prompt + written]), mask=masks.prefix(torch.tensor([len(prompt)]))).logits
        written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("model", [*PREFIX.values(), *PAIRS.values()], ids=lambda m: m.architecture.model_type)
@given(PROMPTS)
@settings(max_examples=12, deadline=None)
def test_cache_and_neighbours_change_nothing(model, prompts: list[list[int]]) -> None:
    assert generate(model, prompts, max_new_tokens=5, temperature=0) == [by_hand(model, prompt, 5) for prompt in prompts]


def test_the_whole_prompt_is_seen_by_all_of_it() -> None:
    model = PREFIX[Llama]
    causal = Llama(**SIZES, num_key_value_heads=2).build(1).eval()
    prompts = [[i, i + 1, i + 2, i] for i in range(30)]
    both = [generate(kind, prompts, max_new_tokens=3, temperature=0) for kind in (model, causal)]
    assert both[0] != both[1]  # the same weights read in one direction write something else


def test_rows_that_end_leave_the_others_as_they_are() -> None:
    model = PAIRS[T5]
    prompts = [[i] for i in range(20)]
    long = generate(model, prompts, max_new_tokens=6, temperature=0)
    end = long[3][2]
    cut = [row[: row.index(end)] if end in row else row for row in long]
    assert generate(model, prompts, max_new_tokens=6, temperature=0, end_ids=[end]) == cut


@pytest.mark.parametrize("family", [T5, UMT5])
def test_greedy_tokens_are_those_of_transformers(family) -> None:
    transformers = pytest.importorskip("transformers")
    ours = PAIRS[family]
    config = transformers.AutoConfig.for_model(**ours.architecture.to_hf())
    theirs = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for prompt in ([3, 1, 4], [15, 9, 2, 6, 5, 3, 5]):
        found = theirs.generate(torch.tensor([[*prompt, 46]]), max_new_tokens=6, do_sample=False, num_beams=1, eos_token_id=None)
        assert generate(ours, prompt, max_new_tokens=6, temperature=0) == found[0, 1:].tolist()
