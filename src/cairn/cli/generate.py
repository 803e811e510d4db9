"""cairn generate"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli import console, places


def generate(
    checkpoint: Annotated[str, places.anywhere("A checkpoint, a run, or a transformers directory.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue; default: what standard input says.")] = None,
    file: Annotated[Path | None, places.local("A file with the text to continue, or a .jsonl file with many.", "--file")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is what a user says: use the checkpoint's chat template.")] = False,
    template: Annotated[Path | None, places.local("With --chat, a file with another chat template.", "--template")] = None,
    new_tokens: Annotated[int, typer.Option(help="How many tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the most probable tokens of this total probability.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    metadata: Annotated[str | None, typer.Option(help="What the text comes from, for a model trained with metadata: a host, say.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the continuation; may be given several times.")] = None,
    device: console.Device = None,
    dtype: Annotated[console.Precision | None, typer.Option(help="What the model computes in; default: as its weights are stored.")] = None,
    json: console.Json = False,
) -> None:
    """Continue a text."""
    from cairn.generation.text import generate as write

    prompts = _prompts(prompt, file)
    options: dict[str, Any] = {"new_tokens": new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    options |= {
        "metadata": metadata,
        "stop": stop or (),
        "chat": chat,
        "template": template,
        "device": device,
        "dtype": dtype.value if dtype is not None else None,
    }
    if len(prompts) == 1 and not json:
        shown = ["" if chat else prompts[0]]  # once there is an answer: a refusal prints nothing

        def tell(piece: str) -> None:
            console.tell(shown.pop() + piece if shown else piece)

        write(checkpoint, prompts[0], told=tell, **options)
        print(*shown)
        return
    texts = write(checkpoint, prompts, **options)
    found = [{"prompt": said, "text": text} for said, text in zip(prompts, texts, strict=True)]
    if json:
        console.emit(found[0] if len(found) == 1 else found)
        return
    print("\n\n".join(item["text"] if chat else item["prompt"] + item["text"] for item in found))


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    from cairn.errors import InputError
    from cairn.generation.text import prompts_of

    if prompt is not None and file is not None:
        raise InputError("Give --prompt or --file, not both.")
    if file is not None:
        return prompts_of(file)
    if prompt is None or prompt == "-":
        if prompt is None and sys.stdin.isatty():
            raise InputError("Say with --prompt or --file what to continue, or write it to standard input.")
        return [sys.stdin.read().removesuffix("\n")]
    return [prompt]
