"""cairn explain"""

from dataclasses import asdict
from typing import Annotated

import typer

from cairn.cli import console, places


def explain(
    checkpoint: Annotated[str, places.anywhere("A checkpoint, a run, or a transformers directory.")],
    prompt: Annotated[
        str | None, typer.Option(help="Show what follows this text, or what a picture (its path) or a sentence is told to be; nothing is stored.")
    ] = None,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Say what goes into a model and what comes out.

    Also runs its stored example, which must still hold.
    """
    from cairn.registry.explain import explain as run

    found = run(checkpoint, prompt=prompt, device=device)
    if json:
        console.emit(asdict(found))
    else:
        for side, entries in (("in ", found.inputs), ("out", found.outputs)):
            for entry in entries:
                print(f"{side}  {entry['name']}: {entry['dtype']} [{', '.join(entry['shape'])}]  {entry.get('values') or entry.get('units')}")
        print(f"after {found.example['prompt']!r}")
        for token in found.example["top"]:
            print(f"  {token['probability']:.4f}  {token['text']!r}  (id {token['id']})")
        for name, score in {} if found.example["top"] else found.example["scores"].items():
            print(f"  {score:9.4f}  {name}")
        print(f"{console.size(found.weight_bytes)} of weights, {found.seconds:.2f} s")
        words = {
            None: "nothing was stored before" if prompt is None else "not stored",
            True: "the stored example holds",
            False: "the stored example does NOT hold",
        }
        print(words[found.holds] + (f" (largest difference {found.difference:.1e})" if found.difference is not None else ""))
    if found.holds is False:
        raise typer.Exit(1)
