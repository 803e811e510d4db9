"""Every command line of the documentation: commands and options exist, recipes' keys do, and those of going on with a run are run."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from cairn.cli.main import app
from cairn.training.run import Run, recipe_to_fork, recipe_to_resume, train

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [*sorted((DOCS / "howto").glob("*.md")), *sorted((DOCS / "concepts").glob("*.md"))]


def lines(page: Path) -> list[str]:
    """The command lines of a page's console blocks, continued lines joined, comments gone."""
    blocks = re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    found = [line.removeprefix("$ ").partition(" | ")[0].partition(" && ")[0] for line in text.splitlines()]
    return [line for line in found if line.startswith("cairn ")]


ALL = [(page.name, line) for page in PAGES for line in lines(page)]


def words(line: str) -> list[str]:
    return shlex.split(re.sub(r"\$\([^)]*\)", "TOKEN", line), comments=True)[1:]


@pytest.mark.parametrize(("page", "line"), ALL)
def test_the_command_and_its_options_exist(page, line):
    command, arguments = typer.main.get_command(app), words(line)
    context = command.make_context("cairn", list(arguments), resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None, name
        context = command.make_context(name, list(arguments), parent=context)


def settings(arguments: list[str]) -> list[str]:
    """The `key=value` of a command line."""
    return [word for word in arguments if re.match(r"[a-z_][\w.-]*=", word)]


GO_ON = [(page, line) for page, line in ALL if line.startswith(("cairn resume ", "cairn fork ", "cairn train "))]


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, line in GO_ON if page not in ("stages.md", "audit.md", "adapters.md")])
def test_keys_of_recipes_exist(page, line, small_recipe, small_run):
    """Of a run whose sources have the names that the page gives them; values of the page stand as they are."""
    given = [word for word in settings(words(line)) if not word.startswith(("data.sources.", "data.mixture", "parallel.", "checkpoint.store", "--"))]
    if line.startswith("cairn resume "):
        recipe_to_resume(small_run.path, given)
    elif line.startswith("cairn fork "):
        recipe_to_fork(small_run.path, [word.replace("105M", "10k").replace("1100M", "10k") for word in given])
    else:
        from cairn.training import recipe as recipes

        recipes.load({**small_recipe, "callbacks": ["sample"]}, given)


AMOUNTS = {"200M": "24 steps", "105M": "30 steps", "500k": "30 steps", "step-00000500": "step-00000010", "--fresh optimizer schedule": "schedule"}


@pytest.mark.parametrize("page", ["howto/continue.md", "concepts/resume.md"])
def test_pages_about_going_on_with_a_run_work_as_they_stand(page, small_recipe, tmp_path, monkeypatch):
    """In their order, with the amounts of a tiny run, in a folder with the runs that the page speaks of."""
    from cairn.merging.combine import average

    monkeypatch.chdir(tmp_path)
    for name in ("a", "first"):
        train(small_recipe, tmp_path / "runs" / name)
    for name in ("other.yaml", "recipe.yaml"):
        (tmp_path / name).write_text(yaml.safe_dump(small_recipe))
    average([tmp_path / "runs" / "first"], tmp_path / "merged", last=2)
    done = []
    for line in lines(DOCS / page):
        if line.startswith(("cairn resume", "cairn fork")):
            for text, tiny in AMOUNTS.items():
                line = line.replace(f"={text}", f"='{tiny}'") if "steps" in tiny else line.replace(text, tiny)
            app(words(line), standalone_mode=False)
            done.append(line)
    assert len(done) >= (6 if "continue" in page else 1)
    annealed = [row["learning_rate"] for row in Run(tmp_path / "runs" / "annealed").metrics()]
    assert annealed == sorted(annealed, reverse=True) and annealed[-1] < annealed[0] / 5
