"""What holds for every command: found by walking over all of them, so that a new one is held to it without being named here."""

from __future__ import annotations

import ast
import inspect
import json
import pkgutil
import shutil
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import cairn as package
from cairn.cli import main as command_line
from tests.cli.commands import Parameter, commands, parameters

COMMANDS = commands()
PLAIN = {
    *("settings", "tokens", "warmup", "task", "tasks", "metric", "measure", "methods", "method", "ask", "drop", "data"),
    *(
        "kind",
        "name",
        "category",
        "old",
        "new",
        "prompt",
        "metadata",
        "query",
        "gpu",
        "dtype",
        "shard_size",
        "layout",
        "parameters",
        "host",
        "token",
        "device",
        "stop",
        "type",
        "message",
        "system",
    ),
}
"""Parameters that are words and no paths. Whoever adds one decides here, or takes `cairn.cli.places`."""
CALLED = {"catalog": "catalog.entries", "data generate": "generation.corpus.write_corpus", "adapt show": "adapt.adapter_summary"}
"""Commands whose function has another name: what would be both a room and a function, and two with a room of their own."""


# -- help ---------------------------------------------------------------------------------------------------------------


def test_help_has_groups_in_which_every_command_takes_one_line(cairn, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = cairn("--help").out
    lines = said.split("\n")
    groups = [line.split("─ ")[1].split(" ─")[0] for line in lines if line.startswith("╭─ ")]
    assert groups == ["Options", "Train", "Adapt", "Change", "Measure", "Data", "Keep track"]
    assert all(len(line) <= 80 for line in lines) and len(lines) < 80
    top = {words.split(" ")[0] for words in COMMANDS}
    named = [line.strip("│ ").split("  ")[0] for line in lines if line.startswith("│ ") and not line.startswith("│ -")]
    assert sorted(named) == sorted(top), "each command once, none on two lines"


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_says_what_it_does_in_one_short_line(words):
    doc = inspect.getdoc(COMMANDS[words]) or ""
    first = doc.split("\n\n")[0]
    assert first and "\n" not in first and (" " in words or len(first) <= 58), first


# -- functions ----------------------------------------------------------------------------------------------------------


def function_of(words: str):
    if words in CALLED:
        return pkgutil.resolve_name(f"cairn.{CALLED[words]}")
    found = package
    for word in words.replace("-", "_").split(" "):
        found = getattr(found, word if hasattr(found, word) else f"{word}_")
    return found


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_a_function_of_its_name_with_a_signature_and_a_docstring(words):
    function = function_of(words)
    assert inspect.isfunction(function) and len(inspect.getdoc(function) or "") > 20
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    assert all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values())


def test_every_public_function_is_a_command_and_no_name_is_a_room_and_a_function():
    named = {words.split(" ")[0].replace("-", "_") for words in COMMANDS}
    rooms = {path.stem for path in Path(package.__file__).parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    for name in package.__all__:
        thing = getattr(package, name)
        if inspect.isfunction(thing):
            assert name.rstrip("_") in named or name == "fold", name
            assert name not in rooms, f"{name} is a room and a function"


def test_importing_everything_shadows_no_builtin():
    code = "from cairn import *\nimport builtins\nassert open is builtins.open and not [n for n in dir() if hasattr(builtins, n) and n[0] != '_']"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- paths and URLs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", COMMANDS)
def test_every_path_is_read_by_one_rule(words):
    for parameter in parameters(COMMANDS[words]):
        if parameter.parser is None:
            assert "Path" not in str(parameter.type), f"{words}: {parameter.name} is a path; declare it by cairn.cli.places"
            assert "str" not in str(parameter.type) or parameter.name in PLAIN, f"{words}: is {parameter.name} a path or words?"


PATHS = [(words, parameter) for words, function in COMMANDS.items() for parameter in parameters(function) if parameter.parser is not None]


@pytest.mark.parametrize(("words", "parameter"), PATHS, ids=[f"{words}-{parameter.name}" for words, parameter in PATHS])
def test_a_url_never_becomes_a_folder_here(cairn, words, parameter, tmp_path, monkeypatch):
    """What takes no URL refuses it in one sentence; what takes one finds nothing under this one, and says so."""
    monkeypatch.chdir(tmp_path)
    url = "memory://nowhere/at/all"
    answer = cairn(*words.split(" "), *_arguments(words, parameter, url))
    assert list(tmp_path.iterdir()) == [], "a folder was made"
    assert answer.status == 2 and answer.err.startswith("cairn: ") and answer.err.count("\n") == 1, answer
    if parameter.parser != "_anywhere" and parameter.parser != "_mixed":
        assert answer.err == f"cairn: {url} is the URL of a store, and this has to be a path on this machine.\n"


def _arguments(words: str, asked: Parameter, url: str) -> list[str]:
    """The required arguments and options of a command, all of them wrong but well-formed, and the one that is asked for."""
    defaults = inspect.signature(COMMANDS[words]).parameters
    found: list[str] = []
    for parameter in parameters(COMMANDS[words]):
        if parameter.name != asked.name and defaults[parameter.name].default is not inspect.Parameter.empty:
            continue
        value = url if parameter.name == asked.name else _some(parameter)
        found += [parameter.options[0], value] if parameter.options else [value]
    return found


def _some(parameter: Parameter) -> str:
    if parameter.type in (int, float):
        return "1"
    options = typing.get_args(parameter.type)
    return str(options[0]) if options and isinstance(options[0], str) else "no-such-thing"


@pytest.mark.parametrize("act", ["merge linear A B", "average A B", "export A", "grow zero A depth=3"])
def test_a_checkpoint_is_written_into_a_store(cairn, small_run, tmp_path, monkeypatch, act):
    pytest.importorskip("upath")
    monkeypatch.chdir(tmp_path)
    places = {"A": small_run.checkpoints()[0], "B": small_run.checkpoints()[1]}
    url = f"memory://written/{tmp_path.name}"
    words = [str(places.get(word, word)) for word in act.split(" ")]
    if words[0] == "grow":
        words = [*words[:3], "layers=4"]
    answer = cairn(*words, "-o", url, "--json")
    assert answer.status == 0, answer.err
    assert answer.document["path"].rstrip("/") == url and package.open(url).digest == answer.document["digest"]
    assert list(tmp_path.iterdir()) == []


# -- JSON ---------------------------------------------------------------------------------------------------------------


@dataclass
class Empty:
    """What a costly function gives back here."""

    negative: float = 0.0

    def plain(self) -> dict:
        return {}


def noisy(result):
    """In the place of a costly function: says things on stdout, as libraries do, and is done."""

    def function(*_, **__):
        print("a library speaks")
        return result

    return function


WRITTEN = SimpleNamespace(path="p", digest="d", lineage=SimpleNamespace(parents=[], changed=[]))
COSTLY = {
    "demo": ("cairn.studies.demo.demo", {}, "-o D/demo"),
    "keeper status": ("cairn.checkpoint.memory.attend.status", {"keepers": [], "newest": None}, "RUN"),
    "keeper persist": ("cairn.checkpoint.memory.persist.persist", SimpleNamespace(path="p", step=1, digest="d"), "RUN"),
    "keeper stop": ("cairn.checkpoint.memory.attend.stop", {"stopped": 0}, "RUN"),
    "gap": ("cairn.evaluation.audits.gap.gap", {"runs": [], "pareto": []}, "RUN --old a --new b"),
    "generations": ("cairn.continual.generations.generations", [Empty()], "RECIPE --folder D/g"),
    "adapt fold": ("cairn.adaptation.folding.fold", WRITTEN, "RUN -o D/f"),
    "adapt show": ("cairn.adaptation.folding.adapter_summary", {"kind": "lora"}, "RUN"),
    "audit leakage": ("cairn.evaluation.audits.audit.leakage", [{}], "RUN --items TABLE"),
    "audit formats": ("cairn.evaluation.audits.audit.formats", {}, "RUN --items TABLE"),
    "audit flips": ("cairn.evaluation.audits.flips.flips", Empty(), "RUN RUN --task choice"),
    "audit stability": ("cairn.evaluation.audits.stability.stability", {"tasks": [], "chosen": None}, "RUN --items TABLE"),
    "audit portability": ("cairn.registry.portability.portability", {"parity": []}, "RUN"),
    "sparsity": ("cairn.training.sparsity.sparsity", {}, "RUN"),
    "data fetch": ("cairn.data.datasets.fetch", "p", "tiny-shakespeare"),
    "data generate": ("cairn.generation.corpus.write_corpus", "p", "RUN -o D/c"),
    "ablate": ("cairn.merging.ablate.ablate", Empty(), "RUN a=python-docs domain.b=python-docs --pool D/pool --steps 1"),
    "ablate-sources": ("cairn.selection.final_phase.ablate_sources", Empty(), "RUN a=1 --folder D/f"),
    "compress": (
        "cairn.compression.compress.compress",
        SimpleNamespace(path="p", digest="d", lineage=SimpleNamespace(parents=[], changed=[])),
        "wanda RUN -o D/small",
    ),
    "replay": ("cairn.registry.replay.replay", None, "RUN"),
    "sign": ("cairn.registry.signing.sign", "s", "RUN --key TABLE"),
    "serve": ("cairn.registry.web.server._run", None, "--index D/index.sqlite"),
}
"""Commands that train, serve or need what is not here: the function below them is replaced by one that speaks out of turn."""
CHEAP = {
    "train": "RECIPE --run D/new training.tokens='2 steps'",
    "resume": "RUN",
    "survival": "8",
    "stability": "RUN",
    "fork": "RUN --run D/fork training.tokens='21 steps'",
    "init": "RUN --data more=CORPUS -o D/recipe.yaml",
    "continue": "RUN --run D/more --data more=CORPUS --tokens '2 steps'",
    "anneal": "RUN --run D/low --tokens '2 steps'",
    "average": "RUN --last 2 -o D/mean",
    "merge": "linear RUN RUN -o D/merged",
    "grow": "when --params 7B --tokens 2T",
    "export": "RUN -o D/exported",
    "import": "EXPORT -o D/imported",
    "evaluate": "RUN --tasks held-out sequences=2",
    "generate": "RUN --prompt a --new-tokens 2",
    "tokenizer extend": "RUN stone -o D/more",
    "tokenizer trim": "RUN --corpus CORPUS -o D/less",
    "tokenizer transplant": "RUN RUN -o D/other",
    "tokenizer union": "RUN RUN -o D/alike",
    "chat": "RUN -m a --new-tokens 2 --template TABLE",
    "trajectory": "MEASURED",
    "audit claims": "RUN",
    "audit risks": "RUN",
    "explain": "RUN --prompt a",
    "study": "",
    "data list": "",
    "data prepare": "CORPUS -o D/store",
    "show": "RUN",
    "log": "RUN",
    "diff": "RUN RUN",
    "verify": "RUN",
    "index": "RUN --index D/index.sqlite",
    "search": "--index D/index.sqlite",
    "card": "RUN",
    "describe": "RUN license=mit",
    "claim": "RUN loss 3.0",
    "catalog": "",
    "doctor": "",
    "trends": "TABLE",
}


def test_every_command_is_asked_for_json_below():
    assert sorted([*COSTLY, *CHEAP]) == sorted(COMMANDS)
    assert all(any(p.options == ("--json",) for p in parameters(function)) for function in COMMANDS.values())


@pytest.fixture(scope="module")
def material(small_run, recipe_file, corpus_file, tmp_path_factory):
    """What stands for the words in capitals."""
    folder = tmp_path_factory.mktemp("json")
    shutil.copytree(small_run.path, folder / "run")
    package.export(small_run.newest(), folder / "export")
    table = folder / "table.csv"
    table.write_text("month,type,uploads,discussions\n" + "".join(f"2024-0{m},text,{m * 10},{m}\n" for m in range(1, 7)))
    package.evaluate(folder / "run", [{"name": "held-out", "sequences": 2}])
    named = {"RUN": folder / "run", "MEASURED": folder / "run", "EXPORT": folder / "export", "RECIPE": recipe_file, "CORPUS": corpus_file, "TABLE": table}
    return {key: str(value) for key, value in named.items()}


@pytest.mark.parametrize("words", [*COSTLY, *CHEAP])
def test_stdout_is_one_json_document(cairn, material, tmp_path, monkeypatch, words):
    import shlex

    line = CHEAP.get(words)
    if line is None:
        target, result, line = COSTLY[words]
        if words == "replay":
            from cairn.registry.replay import Replay

            result = _blank(Replay)
        if words == "data fetch":
            monkeypatch.setattr("cairn.data.datasets.check", lambda name: [])
        if words == "data generate":
            monkeypatch.setattr("cairn.data.corpora.generated.Generated.provenance", {}, raising=False)
        if words == "serve":
            monkeypatch.setattr(target, lambda *_, ready, **__: (print("a library speaks"), ready("http://localhost:1/")))
        else:
            monkeypatch.setattr(target, noisy(result))
    asked = [material.get(word, word.replace("D/", f"{tmp_path}/")) for word in shlex.split(line)]
    asked = [word.replace("more=CORPUS", f"more={material['CORPUS']}") for word in asked]
    answer = cairn(*words.split(" "), *asked, "--json")
    assert answer.status in (0, 1), answer.err
    assert json.loads(answer.out) is not None or words == "search"
    if words in COSTLY:
        assert "a library speaks" in answer.err


def _blank(cls):
    """A dataclass with something in every field."""
    import dataclasses

    return cls(**{field.name: True if field.name == "holds" else None for field in dataclasses.fields(cls) if field.init})


def test_what_a_library_or_a_child_process_prints_goes_to_stderr():
    """In a process of its own: through Python, past Python, and by a child."""
    code = (
        "import os, subprocess, sys\nfrom cairn import catalog\nreal = catalog.entries\n"
        "def noisy(kind=None):\n    print('by print'); os.write(1, b'past Python\\n'); subprocess.run(['echo', 'by a child']); return real(kind)\n"
        "catalog.entries = noisy\nsys.argv = ['cairn', 'catalog', 'optimizer', '--json']\nfrom cairn.cli.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [row["name"] for row in json.loads(done.stdout)] == ["adamw"]
    assert all(words in done.stderr for words in ("by print", "past Python", "by a child"))


def test_a_refusal_leaves_stdout_empty(cairn):
    answer = cairn("show", "no-such-run", "--json")
    assert answer.status == 2 and answer.out == ""


# -- where models compute -----------------------------------------------------------------------------------------------

NO_MODEL = {
    "demo": "shows the defaults of other commands",
    **dict.fromkeys(("keeper status", "keeper persist", "keeper stop", "survival", "doctor"), "looks after processes"),
    **dict.fromkeys(("adapt fold", "adapt show", "average", "export", "import", "sign"), "sees one tensor at a time"),
    **dict.fromkeys(("trajectory", "trends", "catalog", "sparsity", "card", "describe", "claim"), "reads figures and words"),
    **dict.fromkeys(("data list", "data fetch", "data prepare", "init"), "reads texts"),
    **dict.fromkeys(("show", "log", "diff", "verify", "index", "search"), "reads what is stored"),
}
"""Commands that run no model, and why. A new command stands here or takes --device."""
WHERE = {"grow": "zero RUN -o D/big layers=3", "study": "lazysave", "serve": "--index D/index.sqlite", "audit flips": "RUN RUN --task choice path=TABLE"}


def test_every_command_takes_a_device_or_runs_no_model():
    taking = {words for words, function in COMMANDS.items() if any(p.options == ("--device",) for p in parameters(function))}
    assert sorted([*taking, *NO_MODEL]) == sorted(COMMANDS)
    assert all("device" in inspect.signature(function_of(words)).parameters for words in taking)


@pytest.mark.parametrize("words", sorted(set(COMMANDS) - set(NO_MODEL)))
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(cairn, material, tmp_path, words):
    import shlex

    line = WHERE.get(words) or CHEAP.get(words) or COSTLY[words][2]
    asked = [material.get(word, word.replace("D/", f"{tmp_path}/")) for word in shlex.split(line)]
    asked = [word.replace("more=CORPUS", f"more={material['CORPUS']}") for word in asked]
    answer = cairn(*words.split(" "), *asked, "--device", "abacus")
    assert answer.status == 2 and answer.err.splitlines()[-1].startswith("cairn: 'abacus' is not a device; this machine has"), answer.err
    assert not list(tmp_path.iterdir())


def test_no_function_loads_a_model_without_saying_where():
    """`Checkpoint.model()` is on the processor where nothing is said; what follows the policy says `device=choose(...)`."""
    forgotten = []
    for file in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "model" and not node.args
            if called and {word.arg for word in node.keywords} <= {"dtype"} and not {"studies", "testing"} & set(file.parts):
                forgotten.append(f"{file.name}:{node.lineno}")
    assert not forgotten, "load it with device=cairn.device.choose(device)"


# -- Ctrl-C -------------------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_with_130_and_says_what_the_work_said(cairn, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt("Interrupted at step 7; `cairn resume run` goes on.")

    monkeypatch.setattr(command_line, "app", interrupted)
    answer = cairn("show", "x")
    assert (answer.status, answer.err) == (130, "cairn: Interrupted at step 7; `cairn resume run` goes on.\n")
