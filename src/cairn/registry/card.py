"""The card of a checkpoint, filled from its lineage, its measurements and what people state; what nobody knows is said to be unknown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cairn import catalog
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import InputError
from cairn.evaluation import results
from cairn.evaluation.measure import ResultRow, stored_rows
from cairn.models.config import LanguageModelConfig, Network, architecture
from cairn.models.portrait import Portrait
from cairn.registry import modelcard, record, statements
from cairn.registry.compare import interval
from cairn.registry.record import CheckpointRecord
from cairn.registry.statements import Claim, Statement
from cairn.training import loggers


def card(source: str | Path | Checkpoint, *, where: str | None = None) -> str:
    """A model card in Markdown with front matter and `model-index`, as hubs read it. `where` is what the example opens (default: this path)."""
    checkpoint = source if isinstance(source, Checkpoint) else read.open(source)
    made, said = record.record(checkpoint), statements.load(checkpoint)
    rows = [row for row in stored_rows(str(checkpoint.path)) if row.digest == checkpoint.model_digest]
    name = said.name or made.title
    family = _family_of(checkpoint)
    portrait = family.portrait
    parts = [
        ("", _head(made, said, name)),
        ("Intended use", _use(made, said, portrait)),
        ("How to use", _example(where or str(made.path), portrait)),
        ("Training data", _data(made)),
        ("Training procedure", _procedure(made)),
        ("Hyperparameters", _hyperparameters(made)),
        ("Evaluation", _evaluation(rows, made)),
        ("Limitations and bias", _limitations(made, said, rows, family.bounds() if isinstance(family, Network) else _positions(made))),
        ("Hardware and energy", _hardware(made, said)),
        ("License", _license(made)),
        ("Citation", _citation(made, said, name)),
    ]
    protocols = stored_protocols(checkpoint)
    front = _front(made, said, name, rows, protocols, portrait)
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in parts)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}\n"


def measured_claims(rows: Sequence[ResultRow], protocols: Mapping[str, str] | None = None) -> list[Claim]:
    """Measurements as claims, with the protocol (by its digest, from `protocols`) by which anybody can measure them again."""
    return [
        Claim(
            metric=row.metric,
            value=row.value,
            dataset=row.task,
            n=row.n or None,
            stderr=row.stderr if row.stderr == row.stderr else None,
            revision=row.protocol[:16],
            task=_task((protocols or {}).get(row.protocol)),
            source="measured by cairn",
        )
        for row in rows
        if row.value == row.value and abs(row.value) != float("inf")
    ]


def stored_protocols(checkpoint: Checkpoint) -> dict[str, str]:
    """The protocols by which a checkpoint was measured, as JSON, by their digests."""
    return {kept.protocol_digest: json.dumps(kept.protocol) for kept in results.of(checkpoint)}


def _task(protocol: str | None) -> dict[str, Any] | None:
    """A stored protocol as a task that can be asked for."""
    values = json.loads(protocol) if protocol is not None else None
    return {key: value for key, value in values.items() if key not in ("format", "data")} if isinstance(values, dict) else None


def _front(made: CheckpointRecord, said: Statement, name: str, rows: Sequence[ResultRow], protocols: Mapping[str, str], portrait: Portrait) -> dict[str, Any]:
    front: dict[str, Any] = {"license": made.value("license") or "unknown", "library_name": portrait.library, "pipeline_tag": portrait.task}
    if said.language:
        front["language"] = list(said.language)
    front["tags"] = ["cairn", *([made.value("family")] if made.value("family") else [])]
    if made.value("data"):
        front["datasets"] = list(dict.fromkeys(made.value("data").values()))
    claims = [*measured_claims(rows, protocols), *said.claims]
    if claims:
        front["model-index"] = modelcard.model_index(name, claims, portrait.task)
    return front


def _head(made: CheckpointRecord, said: Statement, name: str) -> str:
    facts = [f"{_number(made.value('parameters'))} parameters", f"family {made.value('family')}"]
    if made.value("step") is not None:
        facts.append(f"step {made.value('step')}, {_progress(made)}")
    paper = f"\n\nPaper: {_safe(said.paper)}" if said.paper else ""
    return f"# {_safe(name)}\n\n{'; '.join(facts)}. Digest `{made.digest}`.\n\nThis card is made by `cairn card` from the checkpoint's own files.{paper}"


def _use(made: CheckpointRecord, said: Statement, portrait: Portrait) -> str:
    if said.intended_use:
        return _padded(said.intended_use, "This is what its makers state; nothing else was tried or measured beyond what the section on evaluation shows.")
    return f"Not stated. By its making it is a {made.value('family')} {portrait.use}"


def _family_of(checkpoint: Checkpoint) -> Network | type[Network]:
    """The family of a checkpoint: with its sizes where config.json is sound, and what any causal language model is where it is not known here."""
    name = str(checkpoint.config.get("model_type"))
    if not catalog.has("architecture", name):
        return LanguageModelConfig
    try:
        return architecture(checkpoint.config)
    except InputError:
        return catalog.get("architecture", name).implementation


def _progress(made: CheckpointRecord) -> str:
    """How far it was trained, in what its field counts."""
    samples = made.value("samples")
    return f"{_number(samples)} samples" if samples is not None else f"{_number(made.value('tokens'))} tokens"


def _example(where: str, portrait: Portrait) -> str:
    opens = "It opens in `transformers` as it lies:" if portrait.library == "transformers" else "transformers knows no such family; it opens with cairn:"
    code = "\n".join((opens, "", "```python", portrait.code.replace("{path}", repr(where)), "```"))
    return f"{code}\n\nor: {portrait.command}." if portrait.command else code


def _data(made: CheckpointRecord) -> str:
    data, held = made.value("data") or {}, made.value("data_licenses") or {}
    if not data:
        if made.parents:
            return (
                "Not known here. It was made from other checkpoints, whose lineage names their data: "
                "what those were trained on is said on their own cards, which `cairn log` leads to."
            )
        return "Unknown: no lineage says on what it was trained."
    recipe = made.value("recipe") or {}
    weights = {name: source.get("weight", 1) for name, source in recipe.get("data", {}).get("sources", {}).items() if isinstance(source, dict)}
    rows = [(name, corpus, weights.get(name, 1), held.get(name) or "unknown") for name, corpus in data.items()]
    parts = recipe.get("data", {})
    shape = f" in sequences of {parts['sequence_length']}" if parts.get("sequence_length") is not None else ""
    words = f"{_progress(made)} were read{shape}; a share of {parts.get('held_out')} of the {'documents' if shape else 'samples'} was kept out."
    return f"{_table(('source', 'corpus', 'weight', 'license'), rows)}\n\n{words}"


def _procedure(made: CheckpointRecord) -> str:
    if made.value("act") is None:
        return "Unknown: no lineage says how it was made, so it cannot be made again from here."
    changed = made.value("changed") or []
    parents = [f"`{digest[:16]}`" for digest, _, _ in made.parents]
    origin = f" from {', '.join(parents)}" if parents else ""
    words = f"Made by {made.value('act')}{origin}, {made.value('created') or 'at an unknown time'}."
    listed = "".join(f"\n- changed on purpose: {_safe(line)}" for line in changed)
    if isinstance(made.value("recipe"), dict):
        rest = "The order of the data and every random choice follow from the seed; the recipe that is stored with the checkpoint says the rest, and "
        rest += "`cairn replay` makes it again where its data and its parent are."
    elif str(made.value("act")).startswith("operation"):
        rest = "The options of the operation are stored with the checkpoint; `cairn replay` makes it again where its parents are."
    else:
        rest = "How its source was made is not known here."
    return f"{words}\n{listed}\n\n{rest}"


def _hyperparameters(made: CheckpointRecord) -> str:
    recipe = made.value("recipe")
    if not isinstance(recipe, dict):
        options = made.value("options") or {}
        rows = [(key, value) for key, value in options.items()]
        if not rows:
            return "Unknown: no lineage names any." if made.value("act") is None else "None: it was made without options."
        return _table(("option", "value"), rows)
    chosen = {"seed": recipe.get("seed"), "objective": recipe.get("objective")}
    for part in ("model", "optimizer", "schedule"):
        chosen |= {f"{part}.{key}": value for key, value in (recipe.get(part) or {}).items() if not isinstance(value, (dict, list))}
    chosen |= {f"training.{key}": (recipe.get("training") or {}).get(key) for key in ("tokens", "samples", "batch", "precision", "clip")}
    return _table(("key", "value"), list(chosen.items()))


def _evaluation(rows: Sequence[ResultRow], made: CheckpointRecord) -> str:
    if not rows:
        return "Not known: nothing has been measured. `cairn evaluate` does it."
    shown = []
    for row in rows:
        low, high = interval(row.value, row.stderr, row.n)
        shown.append((row.task, row.metric, f"{row.value:.4g}", f"{low:.4g} to {high:.4g}" if low is not None else "-", row.n, row.chance, row.protocol[:12]))
    return f"Measured, with 95 % intervals:\n\n{_table(('task', 'metric', 'value', 'interval', 'n', 'chance', 'protocol'), shown)}"


def _positions(made: CheckpointRecord) -> str:
    return f"it sees at most {made.value('max_position_embeddings') or 'an unknown number of'} positions at once"


def _limitations(made: CheckpointRecord, said: Statement, rows: Sequence[ResultRow], bounds: str) -> str:
    known = [
        f"{bounds[0].upper()}{bounds[1:]}",
        f"it has {_number(made.value('parameters'))} parameters",
        f"it was measured on {', '.join(sorted({row.task for row in rows})) or 'nothing'} alone",
    ]
    facts = f"{'; '.join(known)}. No audit of bias, of personal data in its training data, or of harmful output is recorded here."
    return f"{said.limitations}\n\n{facts}" if said.limitations else facts


def _hardware(made: CheckpointRecord, said: Statement) -> str:
    machine = made.value("hardware") or {}
    rows = [(key, value) for key, value in machine.items()]
    seconds = seconds_of(made.run)
    if seconds is not None:
        rows.append(("seconds of training (as logged)", f"{seconds:.0f}"))
        if said.watts:
            rows.append(("energy, kWh (seconds x stated watts)", f"{seconds * said.watts / 3.6e6:.3g}"))
        if said.price_per_hour:
            rows.append(("cost (hours x stated price)", f"{seconds / 3600 * said.price_per_hour:.3g}"))
    if not rows:
        return "Unknown: no lineage names the machine, and no log says how long it took."
    rows += [(f"version of {key}", value) for key, value in (made.value("versions") or {}).items()]
    return _table(("", ""), rows)


def _license(made: CheckpointRecord) -> str:
    fact = made.facts.get("license")
    return f"{_safe(fact.value)} ({fact.how})" if fact is not None else "Not stated."


def _citation(made: CheckpointRecord, said: Statement, name: str) -> str:
    if said.citation:
        return f"```bibtex\n{said.citation.replace('```', '')}\n```"
    year = str(made.value("created") or "")[:4]
    return (
        f"```bibtex\n@misc{{{made.digest[:12]},\n  title = {{{_safe(name)}}},\n  year = {{{year}}},\n  note = {{checkpoint with digest {made.digest}}}\n}}\n```"
    )


def seconds_of(run: Path | None) -> float | None:
    """Seconds that a run has computed, over all its interruptions: `seconds` begins anew with each process."""
    if run is None:
        return None
    total = last = 0.0
    for row in loggers.read_rows(run / loggers.METRICS):
        now = float(row.get("seconds") or 0.0)
        if now < last:
            total += last
        last = now
    return total + last if total + last > 0 else None


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(_safe(cell) for cell in row)} |" for row in rows)]
    return "\n".join(lines)


def _safe(value: Any) -> str:
    """A value that cannot break out of its cell or bring markup with it."""
    text = "-" if value is None else " ".join(str(value).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _padded(text: str, rest: str) -> str:
    return text if len(text.split()) >= modelcard.ENOUGH_WORDS else f"{text}\n\n{rest}"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "an unknown number of"
