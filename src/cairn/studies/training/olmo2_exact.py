"""What of OLMo 2's recipe can be said exactly: shapes, rates, groups, gradients, the filter, the average (card 06, proof a)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cairn.checkpoint.format.read import Checkpoint
from cairn.data.filters.repeats import repeated
from cairn.merging.combine import average
from cairn.models.families.olmo2 import Olmo2
from cairn.models.kernels.loss import linear_cross_entropy
from cairn.models.signals import signals
from cairn.options import configure

SIZES = {
    "1B": (1_484_916_736, {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16}),
    "7B": (7_298_617_344, {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "13B": (13_716_198_400, {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}),
}
RATES = {  # peak, tokens of a step, step; and the start of the second stage in the released configurations
    "1B": (4e-4, 512 * 4096, 1_907_359, 7.4487e-5),
    "7B, as rounded": (3e-4, 1024 * 4096, 928_000, 6.1499e-5),
    "7B, as loaded": (3e-4, 1024 * 4096, 928_646, 6.1351e-5),
    "13B": (9e-4, 2048 * 4096, 600_000, 9.0e-5),
}
SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}


def exact(seed: int) -> dict[str, Any]:
    """Every exact figure that needs no trained checkpoint."""
    return {
        "logit_gap": logit_gap(seed),
        "parameters": {name: Olmo2(vocab_size=100_352, **sizes).parameter_count() for name, (_, sizes) in SIZES.items()},
        "scaled_queries": scaled_queries(seed),
        "z_gradient_gap": z_gradient_gap(seed),
        "rates": {name: rate(*given[:3]) for name, given in RATES.items()},
        "largest_initial_weight": largest_initial_weight(seed),
        "plain_of_decay": plain_of_decay(),
        "filter_disagreements": filter_disagreements(seed),
    }


def logit_gap(seed: int) -> float:
    """Largest difference between our logits and those of transformers' Olmo2ForCausalLM with the same weights by the same names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = Olmo2(**SMALL)
    ours = shape.build(seed)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.to_hf())).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return float((theirs(ids).logits - ours(ids).logits).abs().max())


def scaled_queries(seed: int) -> float:
    """Relative change of the largest attention logit when the query matrices are made a hundred times larger."""
    model = Olmo2(**{**SMALL, "num_hidden_layers": 1, "rms_norm_eps": 1e-12}).build(seed)
    ids = torch.randint(97, (2, 41), generator=torch.Generator().manual_seed(seed))
    found = []
    for factor in (1.0, 100.0):
        with torch.no_grad():
            model.get_parameter("model.layers.0.self_attn.q_proj.weight").mul_(factor)
        found.append(signals(model, ids[:, :-1], ids[:, 1:]).largest_logit)
    return abs(found[1] / found[0] - 1)


def z_gradient_gap(seed: int) -> float:
    """Largest difference between the gradient by the logits and p - onehot + 2 c lse p, p being the softmax, in float64."""
    generator, c = torch.Generator().manual_seed(seed), 0.01
    logits = torch.randn(40, 97, generator=generator, dtype=torch.float64)
    targets = torch.randint(97, (40,), generator=generator)
    # An identity as the head makes the hidden states the logits.
    hidden = logits.clone().requires_grad_()
    linear_cross_entropy(hidden, torch.eye(97, dtype=torch.float64), targets, z_loss=c)[0].backward()
    p, lse = logits.softmax(-1), logits.logsumexp(-1, keepdim=True)
    wanted = p - torch.nn.functional.one_hot(targets, 97) + 2 * c * lse * p
    return float((hidden.grad - wanted).abs().max()) if hidden.grad is not None else math.inf


def rate(peak: float, batch: int, step: int) -> float:
    """The first stage's learning rate after `step` steps of `batch` tokens."""
    schedule = configure("schedule", {"name": "cosine", "warmup": "8388608000 tokens", "horizon": "5T tokens", "final": 0.1})
    return peak * schedule.pinned(batch, step * batch).factor(step * batch, batch)


def largest_initial_weight(seed: int) -> float:
    """Of a million fresh weights."""
    model = Olmo2(**{**SMALL, "vocab_size": 10_000}).build(seed)
    return max(float(parameter.detach().abs().max()) for parameter in model.parameters() if parameter.ndim == 2)


def plain_of_decay() -> list[str]:
    """The parameters without weight decay under OLMo 2's groups."""
    model = Olmo2(**SMALL, attention_bias=True).build()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = configure("optimizer", {"name": "adamw", "decay": "not-embeddings"}).build(model).param_groups
    return sorted(names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"])


def filter_disagreements(seed: int, rows: int = 500) -> int:
    """Rows with a planted pattern, repeated 3 to 40 times, about which the filter and a scan of every place differ."""
    generator, wrong = np.random.default_rng(seed), 0
    for _ in range(rows):
        row = generator.integers(0, 50, 200)
        pattern, copies = generator.integers(0, 50, generator.integers(1, 14)), generator.integers(3, 41)
        begin = generator.integers(0, 200)
        row = np.concatenate([row[:begin], np.tile(pattern, copies), row[begin:]])
        wrong += bool(repeated(row[None], 13, 32)[0]) != _scanned(row.tolist())
    return wrong


def _scanned(row: list[int]) -> bool:
    for period in range(1, 14):
        for begin in range(len(row) - 32 * period + 1):
            if row[begin : begin + 32 * period] == row[begin : begin + period] * 32:
                return True
    return False


def averages(checkpoints: list[Checkpoint], soup: Checkpoint, work: Path) -> dict[str, Any]:
    """Whether the average of two equal models is that model to the bit, and by how much, as a share of the largest weight of a
    tensor, the soup is not the arithmetic mean of its parents in float64."""
    same = average([checkpoints[0].path] * 2, work / "same")
    gap = 0.0
    for name, tensor in soup.tensors.items():
        parents = torch.stack([checkpoint.tensors[name].load().double() for checkpoint in checkpoints])
        gap = max(gap, float((tensor.load().double() - parents.mean(0)).abs().max() / parents.abs().max()))
    return {"average_of_equals": same.model_digest == checkpoints[0].model_digest, "linearity_gap": gap}
