"""cairn diff"""

from dataclasses import asdict
from typing import Annotated

from cairn.cli import console, places


def diff(
    a: Annotated[str, places.anywhere("A checkpoint or a run.")],
    b: Annotated[str, places.anywhere("Another one.")],
    json: console.Json = False,
) -> None:
    """Say what differs between two checkpoints.

    Recipe, data, code, machine, weights block by block, results.
    """
    from cairn.checkpoint.format.compare import keys_that_differ
    from cairn.registry.compare import diff as compare

    found = compare(a, b)
    if json:
        console.emit(asdict(found))
        return
    model = "the same" if found.same_model else f"{found.changed_tensors} tensors differ"
    console.values({"relation": found.relation, "steps": f"{found.steps[0]} -> {found.steps[1]}", "model": model, "same tokenizer": found.same_tokenizer})
    for title, keys in (("config", found.config), ("recipe", found.recipe), ("code", found.versions), ("machine", found.hardware)):
        one_sided = [side for side, index in ((a, 1), (b, 0)) if keys and all(pair[index] is None for pair in keys.values())]
        if one_sided:
            print(f"{title}  only in {one_sided[0]}")
            continue
        for key, (old, new) in keys.items():
            print(f"{title}  {key}: {old} -> {new}")
    for name, (old, new) in keys_that_differ(*found.mixture).items():
        print(f"mixture  {name}: {old or 0:.4g} -> {new or 0:.4g}")
    for side, names in zip((a, b), found.only_in, strict=True):
        for name in names:
            print(f"only in {side}: {name}")
    for name, (old, new) in found.shapes.items():
        print(f"shape  {name}: {old} -> {new}")
    if found.distances:
        console.table(("part", "relative distance"), found.distances.items())
    if found.results:
        columns = ("task", "metric", "first", "second", "difference", "low", "high")
        console.table(columns, [[row[column] for column in columns] for row in found.results])
