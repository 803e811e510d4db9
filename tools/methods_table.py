"""Write docs/methods.md: every method of the catalog with its paper."""

from __future__ import annotations

from pathlib import Path

from cairn import catalog


def page() -> str:
    """The page as Markdown."""
    lines = ["# Methods", "", "Generated from the catalog (`cairn catalog`).", ""]
    for group in dict.fromkeys(kind.group for kind in catalog.KINDS.values()):
        lines += [f"## {group.capitalize()}s", "", "| kind | name | what it does | paper |", "|---|---|---|---|"]
        for entry in catalog.entries(group):
            papers = "; ".join(f"{paper.title} {paper.reference}".strip() for paper in entry.papers) or "-"
            lines.append(f"| {entry.kind} | `{entry.name}` | {entry.summary} | {papers} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent.parent / "docs" / "methods.md").write_text(page())
