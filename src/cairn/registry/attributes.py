"""How far a checkpoint answers what people ask before they reuse one: provenance, reproducibility, portability.

The factors are those of table I of "An Empirical Study of Pre-Trained Model Reuse in the Hugging Face Deep Learning Model Registry"
(card 42, B). A factor counts 1 when it is measured or follows from the lineage, 0.5 when somebody merely says so, 0 when it is missing. What is
published is the vector: a mean hides what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cairn.registry.record import CheckpointRecord, How

FACTORS: dict[str, tuple[str, ...]] = {
    "provenance": ("dataset details", "performance table", "architecture details", "training logs"),
    "reproducibility": ("hardware specification", "training configuration", "demos", "documentation", "environment image"),
    "portability": (
        *("hardware specification", "latency", "quantized model", "environment image", "framework support"),
        *("fine-tuning instructions", "license", "cost estimation"),
    ),
}
WORTH: dict[How | None, float] = {"measured": 1.0, "derived": 1.0, "stated": 0.5, None: 0.0}


def vector(evidence: Mapping[str, How | None]) -> dict[str, dict[str, float]]:
    """The worth of each factor of each attribute; factors that `evidence` does not name are missing."""
    return {attribute: {factor: WORTH[evidence.get(factor)] for factor in factors} for attribute, factors in FACTORS.items()}


def scores(evidence: Mapping[str, How | None]) -> dict[str, float]:
    """The mean of each attribute's factors, all weighing the same."""
    return {attribute: sum(worth.values()) / len(worth) for attribute, worth in vector(evidence).items()}


def missing(evidence: Mapping[str, How | None], attribute: str) -> list[str]:
    """The factors of an attribute that nobody has given."""
    return [factor for factor in FACTORS[attribute] if evidence.get(factor) is None]


def evidence_of(record: CheckpointRecord, *, results: int, kept: Mapping[str, Any], quantized: bool = False) -> dict[str, How | None]:
    """How each factor is known of a checkpoint. `results` counts measurements, `kept` are documents beside it (example, portability)."""

    def fact(name: str) -> How | None:
        found = record.facts.get(name)
        return found.how if found is not None and found.value not in (None, {}, []) else None

    speed = kept.get("portability") or {}
    log: Path | None = record.run / "metrics.jsonl" if record.run is not None else None
    seconds = kept.get("seconds")
    return {
        "dataset details": fact("data"),
        "performance table": "measured" if results else "stated" if record.claims else None,
        "architecture details": fact("family"),
        "training logs": "derived" if log is not None and log.is_file() else None,
        "hardware specification": fact("hardware"),
        "training configuration": fact("recipe") or fact("options"),
        "demos": "measured" if kept.get("example") else None,
        "documentation": "stated" if fact("intended_use") and fact("limitations") else None,
        "environment image": fact("versions"),
        "latency": "measured" if speed.get("latency") else None,
        "quantized model": "derived" if quantized else None,
        "framework support": "measured" if any(isinstance(each, dict) and each.get("passed") is True for each in speed.get("parity") or []) else None,
        "fine-tuning instructions": "derived" if fact("resumable") and record.value("resumable") else fact("fine_tuning"),
        "license": fact("license"),
        "cost estimation": "derived" if seconds and fact("price_per_hour") else None,
    }
