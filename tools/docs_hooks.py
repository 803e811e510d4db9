"""Pages of the site that are made from the code: the table of methods, the list of commands, the options of each method."""

from __future__ import annotations

from typing import Any

METHODS, COMMANDS = "<!-- methods -->", "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page: puts the made parts in the place of their marks."""
    if METHODS in markdown:
        markdown = markdown.replace(METHODS, methods())
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    return markdown


def methods() -> str:
    """Every method of the catalog by kind: what it does, its options with their defaults, its paper."""
    from cairn import catalog

    parts = []
    for kind in catalog.KINDS.values():
        entries = catalog.entries(kind.name)
        if kind.name in catalog.KINDS and entries:
            parts += [
                f"## {kind.name}",
                "",
                f"{kind.summary[0].upper()}{kind.summary[1:]}." + (f" A kind of {kind.group}." if kind.group != kind.name else ""),
                "",
            ]
            parts += ["| name | what it does | options | paper |", "|---|---|---|---|"]
            parts += [f"| `{e.name}` | {_cell(e.summary)} | {_options(e.implementation)} | {'; '.join(map(_paper, e.papers)) or '–'} |" for e in entries]
            parts.append("")
    return "\n".join(parts)


def commands() -> str:
    """Every command with its arguments and options, from the same definitions that parse them."""
    import typer

    from cairn.cli.main import app

    group = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():
        for shown, each in [(f"{name} {inner}", c) for inner, c in getattr(command, "commands", {}).items()] or [(name, command)]:
            parts += [f"## cairn {shown}", "", f"{each.help}", "", "| | |", "|---|---|"]
            parts += [f"| {_parameter(parameter)} | {_cell(getattr(parameter, 'help', '') or '')} |" for parameter in each.params]
            parts.append("")
    return "\n".join(parts)


def _parameter(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name.upper())}`"
    return ", ".join(f"`{name}`" for name in parameter.opts)


def _options(implementation: Any) -> str:
    fields = getattr(implementation, "model_fields", {})
    shown = [f"`{name}`" if field.is_required() else f"`{name}={_value(field.get_default(call_default_factory=True))}`" for name, field in fields.items()]
    return _cell(" ".join(shown)) or "–"


def _value(default: Any) -> str:
    return {None: "none", True: "true", False: "false"}.get(default, str(default)) if isinstance(default, (bool, type(None))) else str(default)


def _paper(paper: Any) -> str:
    title = _cell(paper.title)
    if paper.reference.startswith("arXiv:"):
        return f"[{title}](https://arxiv.org/abs/{paper.reference.removeprefix('arXiv:')})"
    return f"{title} {paper.reference}".strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
