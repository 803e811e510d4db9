"""Our request engine as a model of lm-evaluation-harness, so that its tasks run on our checkpoints with its own scores.

Texts become ids exactly as in the harness's `hf` class, which is what makes the scores equal. Imports lm_eval: import this module
only where the harness is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from cairn.errors import InputError
from cairn.evaluation.answers import finite
from cairn.evaluation.engine import Engine

NEW_TOKENS = 256
"""Tokens of an answer where a task does not say; the harness's own default."""


class HarnessModel(TemplateLM):
    """A model as the harness sees it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine, self.words = engine, engine.tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self.words.eos_id if self.words.eos_id is not None else self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        if self.words.begin_id is None:
            raise InputError("The tokenizer has neither a token that begins a text nor one that ends it, which the tasks of lm-evaluation-harness need.")
        return int(self.words.begin_id)

    @property
    def max_length(self) -> int:
        return self.engine.longest or 2048

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        begun = string.startswith(self.words.backend.id_to_token(self.prefix_token_id))
        special = add_special_tokens if add_special_tokens is not None else not begun
        return list(self.words.encode_whole(string) if special else self.words.encode(string))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **unused: Any) -> list[tuple[float, bool]]:
        asked = [(context + continuation, len(context)) for _, context, continuation in requests]
        found = self.engine.score([ids for ids, _ in asked], [start for _, start in asked])
        finite([scored.logprob for scored in found], "requests")  # the harness would take nan for the largest
        return [(scored.logprob, scored.greedy) for scored in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]
        found = [scored.logprob for scored in self.engine.score_rolling(texts)]
        finite(found, "texts")
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        for options, numbers in _alike([request.args[1] for request in requests]):
            asked = dict(normalize_gen_kwargs(options, NEW_TOKENS))
            stop = handle_stop_sequences(asked.get("until"), eos=None)
            sampling = {
                "temperature": asked.get("temperature", 0.0) if asked.get("do_sample") else 0.0,
                "top_k": asked.get("top_k"),
                "top_p": asked.get("top_p"),
            }
            prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in numbers]
            for i, text in zip(numbers, self.engine.continued(prompts, max_new_tokens=asked["max_gen_toks"], stop=stop, **sampling), strict=True):
                answers[i] = text
        return answers


def _alike(options: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[int]]]:
    """Requests that are to be answered under the same options."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for number, each in enumerate(options):
        groups.setdefault(repr(sorted(each.items())), (each, []))[1].append(number)
    return list(groups.values())
