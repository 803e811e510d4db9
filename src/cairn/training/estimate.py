"""What a run will cost, before it is started: parameters, memory, operations, hours on a named GPU. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cairn import catalog
from cairn.checkpoint.format import read
from cairn.errors import InputError, NotFoundError, suggestion
from cairn.models.families.t5 import T5
from cairn.training import sparsity
from cairn.training.recipe import Recipe


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU: dense bfloat16 operations per second (no sparsity) and memory in bytes."""

    flops: float
    memory: float


GPUS = {
    "h200": Gpu(989e12, 141e9),
    "h100": Gpu(989e12, 80e9),
    "a100": Gpu(312e12, 80e9),
    "l40s": Gpu(362e12, 48e9),
    "rtxa6000": Gpu(154.8e12, 48e9),
    "rtx4090": Gpu(165.2e12, 24e9),
    "rtx3090": Gpu(71e12, 24e9),
}
"""Peak figures from the makers' data sheets."""

UTILISATION = 0.4
"""Share of the peak that a dense model of this size commonly reaches in training; an assumption, printed with the estimate."""


def flops_per_unit(recipe: Recipe) -> float:
    """Operations to train on one token, or one sample, of a recipe; matrix products alone count."""
    return float(recipe.data.unit_flops(recipe.model, recipe.objective))


def matched(model: T5, inputs: int, targets: int, flops: float, multiple: int = 4) -> T5:
    """The encoder-decoder with the `d_ff`, a multiple of `multiple`, at which a forward pass that reads `inputs` tokens and says `targets`
    costs nearest to `flops`, attention over all pairs: what a decoder costs on both together, for example. Raises `InputError` if none does."""
    one, two = (model.model_copy(update={"d_ff": size}).pair_flops(inputs, targets, causal=False) for size in (1, 2))
    size = round((1 + (flops - one) / (two - one)) / multiple) * multiple
    if size < multiple:
        raise InputError(f"Even without an MLP this encoder-decoder costs more than {flops:.3g} operations; make it narrower or give it fewer layers.")
    return model.model_copy(update={"d_ff": size})


def estimate(recipe: Recipe, gpu: str = "h100", gpus: int = 1, utilisation: float = UTILISATION) -> dict[str, Any]:
    """Parameters, tokens, steps, FLOPs, memory of the training state, and hours on `gpus` of `gpu` at a utilisation.

    FLOPs count matrix products only (6 per weight and token, attention over all pairs: "PaLM", appendix B).
    """
    if gpu not in GPUS:
        raise NotFoundError(f"There is no GPU '{gpu}' in the table.{suggestion(gpu, GPUS)}")
    model, unit, units = recipe.model, recipe.unit, recipe.total_units
    parameters = model.parameter_count()
    per_unit = flops_per_unit(recipe)
    memory = memory_of(recipe)
    sparse = next((callback for callback in recipe.callbacks if catalog.name_of(callback) == sparsity.CALLBACK), None)
    seconds = units * per_unit / (GPUS[gpu].flops * utilisation * gpus)
    return {
        "family": model.model_type,
        "parameters": parameters,
        **({"trained_parameters": trained_numbers(recipe)[0]} if in_part(recipe) else {}),
        unit: units,
        f"{unit}_per_parameter": units / parameters,
        "steps": recipe.total_steps,
        f"batch_{unit}": recipe.training.batch,
        f"flops_per_{unit[:-1]}": per_unit,
        "total_flops": units * per_unit,
        **(_saved(recipe, sparse, per_unit) if sparse is not None else {}),
        "memory_gb": {name: round(count / 1e9, 2) for name, count in (memory | {"total": sum(memory.values())}).items()},
        "checkpoint_gb": round(_checkpoint_bytes(recipe) / 1e9, 2),
        "gpu": f"{gpus} x {gpu} ({GPUS[gpu].flops / 1e12:.0f} dense bfloat16 TFLOP/s, {GPUS[gpu].memory / 1e9:.0f} GB)",
        "assumed_utilisation": utilisation,
        "estimated_hours": seconds / 3600,
        "fits_in_memory": sum(memory.values()) <= GPUS[gpu].memory,
    }


def in_part(recipe: Recipe) -> bool:
    """Whether only part of a model trains."""
    return bool(recipe.trainable) or recipe.adapter is not None


def trained_numbers(recipe: Recipe) -> tuple[int, int]:
    """How many numbers train, and how many of these an adapter adds to the model. Raises `InputError` for a pattern that matches nothing."""
    from cairn.training.trained import trained_by  # loads torch, which looking at a run does without

    model = recipe.model.meta_model()
    before = sum(parameter.numel() for parameter in model.parameters())
    if not in_part(recipe):
        return before, 0
    trained_by(recipe).enter(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in model.parameters()) - before


def memory_of(recipe: Recipe) -> dict[str, int]:
    """Estimated bytes of one process, by use. Gradients and moments are those of what trains alone, activations are counted as though all did.
    Teachers have the weights that their files hold, and where they follow the student its own once more. Raises `NotFoundError` for a teacher
    that is not there."""
    micro_batch = recipe.training.micro_batch or recipe.training.batch // recipe.parallel.replicas
    memory = recipe.data.training_memory(recipe.model, micro_batch, "bfloat16" if recipe.training.precision == "bfloat16" else "float32")
    if in_part(recipe):
        trained, added = trained_numbers(recipe)
        memory |= {"weights": memory["weights"] + 4 * added, "gradients": 4 * trained, "optimizer": 8 * trained}
    found = per_process(recipe, memory, micro_batch)
    named = recipe.teacher.values()
    frozen = sum(read.open(teacher.checkpoint).tensors.nbytes for teacher in named if teacher.ema is None and teacher.checkpoint is not None)
    teachers = frozen + sum(found["weights"] for teacher in named if teacher.ema is not None)
    return found | ({"teachers": teachers} if teachers else {})


def _checkpoint_bytes(recipe: Recipe) -> int:
    """Weights and moments as a checkpoint holds them: of an adapter those alone, of a model that trains in part all of its weights. Beside weights
    of a lower precision lie the float32 ones from which they are rounded."""
    each, count = 6 if recipe.checkpoint.dtype in ("bfloat16", "float16") else 4, recipe.model.parameter_count()
    if not in_part(recipe):
        return (8 + each) * count
    trained, _ = trained_numbers(recipe)
    return 8 * trained + each * (trained if recipe.adapter is not None else count)


def per_process(recipe: Recipe, memory: dict[str, int], units: int) -> dict[str, int]:
    """What one process holds of the memory of a whole model: shards divide weights, gradients and moments, tensor parallelism the matrices of
    the blocks and what is inside them; copies divide nothing but the batch, which is in `units` already."""
    parallel, model = recipe.parallel, recipe.model
    count, whole = model.parameter_count(), model.uncut_parameters() if parallel.tensor > 1 else 0
    share = ((count - whole) / parallel.tensor + whole) / count / parallel.shard
    kept = {name: size if name == "activations" else round(size * share) for name, size in memory.items()}
    if parallel.tensor > 1:
        inside = model.inner_activations(units, 2 if recipe.training.precision == "bfloat16" else 4)
        kept["activations"] -= round(inside * (1 - 1 / parallel.tensor))
    return kept


def _saved(recipe: Recipe, sparse: Any, dense: float) -> dict[str, float]:
    """What masks save, where a machine makes use of zeros; hours are those of dense products, which no common GPU avoids."""
    counts = sparsity.kept(sparsity.masked_shapes(recipe.model), sparse.sparsity, sparse.distribution)
    whole, left = sparsity.flops_per_token(recipe.model, recipe.data.sequence_length, counts)
    per_token = dense - (whole - left)
    return {"sparse_flops_per_token": per_token, "sparse_total_flops": recipe.total_units * per_token, "sparse_reduction": dense / per_token}
