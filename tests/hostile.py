"""Hostile files: altered copies of checkpoints and runs, and a watch over what reading them does.

`Arena` is a folder with a run, a merge, a sharded export, a hub cache and a foreign family; `Arena.attack(number)` alters one thing in it
(always the same for the same number), runs one command in this process and says what came of it. The watch is an audit hook: it
sees every file that is opened, every connection, every process that is started and every piece of code that is run.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RECIPE = {
    "seed": 3,
    "model": {"name": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "data": {"tokenizer": "byte", "sequence_length": 16, "held_out": 0.2},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "schedule": {"name": "cosine", "warmup": "1 steps"},
    "training": {"tokens": "6 steps", "batch": 64, "compile": False},
    "checkpoint": {"every": "2 steps"},
}
SECONDS, WAITING = 5.0, 20.0
"""What computes longer, or waits longer, is a hang. A machine with other work may make a command wait that does not hang."""
URL = "http://127.0.0.1:9/x"
CODE = "import os, pathlib\npathlib.Path(os.environ['CAIRN_HOSTILE_MARK']).write_text('ran')\n"


@dataclass
class Outcome:
    """What came of one input."""

    number: int
    command: str
    file: str
    change: str
    status: int | str = 0
    problem: str | None = None
    """traceback, hang, outside, connection or code."""
    detail: str = ""


class Hang(BaseException):
    """The command took too long."""


# -- what is watched ----------------------------------------------------------------------------------------------


class Watch:
    """An audit hook, on while a command runs. It can be installed once for a process and never be taken away."""

    def __init__(self, root: Path) -> None:
        self.on, self.seen = False, list[tuple[str, str]]()
        allowed = [
            root / "arena",
            root / "corpus.jsonl",
            root / "out",
            root / "cache",
            root / "tmp",
            Path(sys.prefix),
            Path(sys.base_prefix),
            Path(__file__).parent.parent / "src",
        ]
        allowed += [Path(path) for path in ("/proc", "/sys", "/dev/null", "/dev/urandom", "/usr/lib", "/usr/share", "/lib", "/lib64", "/etc/localtime")]
        allowed += [Path(path) for path in ("/etc/mime.types", "/etc/ssl", "/etc/ld.so.cache", "/usr/local/lib", "/etc/apache2", "/etc/httpd")]
        self._allowed = tuple({str(path) for path in allowed} | {os.path.realpath(path) for path in allowed})
        self._own = os.path.realpath(root / "arena")
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self._allowed):
                self.seen.append(("outside", path))
        elif event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
            target = arguments[1] if event == "socket.connect" else arguments[0]
            if event != "socket.connect" or arguments[0].family != socket.AF_UNIX:
                self.seen.append(("connection", repr(target)))
        elif event == "subprocess.Popen" and list(arguments[1] or []) == ["/sbin/ldconfig", "-p"]:
            return  # ctypes.util.find_library, of a package (trio) that looks for the C library when it is first imported
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pickle.find_class"):
            callers = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(traceback.extract_stack()[:-1][-30:]))
            self.seen.append(("code", f"{event} {arguments!r}"[:200] + f" by {callers}"))
        elif event == "compile" and isinstance(arguments[1], (str, bytes)) and os.path.realpath(os.fsdecode(arguments[1])).startswith(self._own):
            self.seen.append(("code", f"compile {arguments[1]!r}"))
        elif event == "exec" and os.path.realpath(getattr(arguments[0], "co_filename", "")).startswith(self._own):
            self.seen.append(("code", f"exec {arguments[0].co_filename}"))
        elif event == "import" and isinstance(arguments[1], str) and arguments[1].startswith(self._own):
            self.seen.append(("code", f"import {arguments[1]}"))

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[tuple[str, str]]]:
        self.seen = []
        self.on = True
        try:
            yield self.seen
        finally:
            self.on = False


# -- what is attacked ---------------------------------------------------------------------------------------------


def build(folder: Path) -> None:
    """Everything that is attacked, made once: `run`, `soup`, `shards`, `models--someone--thing` and `foreign`."""
    import cairn
    from cairn.checkpoint.format import read
    from cairn.registry.statements import describe

    folder.mkdir(parents=True)
    texts = "".join(json.dumps({"text": f"the stone {n} marks the way {n * 7 % 13} again and again"}) + "\n" for n in range(80))
    corpus = folder.parent / "corpus.jsonl"  # the user's own, which nobody alters
    corpus.write_text(texts)
    recipe = RECIPE | {"data": {**RECIPE["data"], "sources": {"walks": {"corpus": str(corpus)}}}}  # type: ignore[dict-item]
    run = cairn.train(recipe, folder / "run")
    first, second, last = run.checkpoints()
    cairn.evaluate(last, ["held-out"])
    describe(folder / "run", ["license=apache-2.0", "intended_use=testing"])
    cairn.average([second, last], folder / "soup")
    cairn.export(last, folder / "shards", shard_bytes=8 * 2**10)
    (folder / "soup" / "README.md").write_text("---\nlicense: mit\nmodel-index:\n- name: a\n  results: []\n---\n# Card\n\nWords.\n")
    shutil.rmtree(first)
    hub = folder / "models--someone--thing"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "abc").mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")):
        shutil.copyfile(last / name, hub / "blobs" / str(number))
        (hub / "snapshots" / "abc" / name).symlink_to(f"../../blobs/{number}")
    _foreign(folder / "foreign", read.open(last).path)


def _foreign(folder: Path, tokenizer: Path) -> None:
    """A family that only transformers builds."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    OPTForCausalLM(OPTConfig(vocab_size=257, bos_token_id=256, eos_token_id=256, pad_token_id=256, **sizes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)


@dataclass(frozen=True)
class Command:
    """One way to read: the arguments of `cairn` for the thing attacked, what it costs (about, in milliseconds), and what it is for."""

    name: str
    arguments: Callable[[Path, Path], list[str]]
    cost: float
    things: tuple[str, ...] = ("run", "soup", "shards", "hub", "foreign")


def _arena_of(thing: Path) -> Path:
    return next(folder for folder in thing.parents if folder.name == "arena")


def _options(*words: str) -> Callable[[Path, Path], list[str]]:
    return lambda thing, out: [word.format(thing=thing, out=out / "made", other=_arena_of(thing) / "soup") for word in words]


COMMANDS = (
    Command("show", _options("show", "{thing}"), 5),
    Command("show --json", _options("show", "{thing}", "--tensors", "--json"), 5),
    Command("log", _options("log", "{thing}"), 8),
    Command("verify", _options("verify", "{thing}"), 5),
    Command("verify --all", _options("verify", "{thing}", "--all"), 6),
    Command("diff", _options("diff", "{thing}", "{other}"), 12),
    Command("sparsity", _options("sparsity", "{thing}"), 5),
    Command("describe", _options("describe", "{thing}"), 6),
    Command("card", _options("card", "{thing}"), 10),
    Command("card --score", _options("card", "{thing}", "--score"), 10),
    Command("generate", _options("generate", "{thing}", "--prompt", "the", "--new-tokens", "3"), 17),
    Command("evaluate", _options("evaluate", "{thing}", "--json"), 35, ("run", "soup")),
    Command("stability", _options("stability", "{thing}"), 8, ("run",)),
    Command("trajectory", _options("trajectory", "{thing}"), 10, ("run",)),
    Command("average", _options("average", "{thing}", "{other}", "-o", "{out}"), 22),
    Command("merge", _options("merge", "linear", "{other}", "{thing}", "-o", "{out}"), 22),
    Command("export", _options("export", "{thing}", "-o", "{out}"), 20),
    Command("import", _options("import", "{thing}", "-o", "{out}"), 20, ("shards", "hub", "foreign")),
    Command("grow", _options("grow", "stack", "{thing}", "-o", "{out}"), 25, ("run", "soup", "shards", "hub")),
    Command("explain", _options("explain", "{thing}"), 25),
    Command("audit risks", _options("audit", "risks", "{thing}"), 20),
    Command("audit claims", _options("audit", "claims", "{thing}"), 30, ("run", "soup")),
    Command("fork", _options("fork", "{thing}", "training.tokens=7 steps", "--run", "{out}"), 60, ("run",)),
    Command("replay", _options("replay", "{thing}"), 40, ("soup",)),
    Command("resume", _options("resume", "{thing}", "training.tokens=7 steps"), 60, ("run",)),
    Command("page", _options("page", "{thing}"), 100, ("run", "soup", "foreign")),
)
"""`page` is no command: it stands for indexing the folder and asking for the pages of what was found."""


# -- how it is altered --------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.5, 10**7, 10**9, 4 * 10**18, 10**30, float("inf"), float("nan"), "", "x", "\u0000", "\u202e", "\U0001f600" * 50,
    "a" * 5000, [], {}, [[]], [1, "a", None], {"a": {"b": []}}, URL, "s3://bucket/x", "../../bait", "/etc/hostname", "/dev/zero", "${HOME}", "2024-02-30",
    "\ud800", "llama", "gpt2", "bert", "t5", ["llama"], {"": 0}, "__class__", "null", "1e5", "0 steps", -0.0, 1e-320,
)  # fmt: skip


ALIASES = b"a: &a [x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 8)) for n in range(9))
"""YAML of a few lines that stands for a billion words."""


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    found: list[tuple[Any, Any]] = []
    todo = [document]
    while todo:
        node = todo.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            found.append((node, key))
            todo.append(value)
        if len(found) > 4000:
            break
    return found


def _alter_document(document: Any, chooser: random.Random) -> tuple[Any, str]:
    """One or two values of a document replaced, dropped, doubled or added."""
    said = []
    for _ in range(chooser.choice((1, 1, 1, 2))):
        places = _places(document)
        if not places or chooser.random() < 0.03:
            document = chooser.choice(VALUES)
            said.append(f"all -> {document!r}"[:40])
            continue
        # The first keys of the outer levels are as likely as the thousandth entry of a vocabulary.
        node, key = places[min(int(len(places) * chooser.random() ** 3), len(places) - 1)]
        act = chooser.random()
        if act < 0.6:
            node[key] = chooser.choice(VALUES)
            said.append(f"{key} -> {node[key]!r}"[:60])
        elif act < 0.8:
            del node[key]
            said.append(f"without {key}"[:40])
        elif isinstance(node, dict):
            name = chooser.choice(("auto_map", "quantization_config", "base_model_name_or_path", "_name_or_path", "path", "store", "x" * 300, "\udc80", "step"))
            value = {"AutoModelForCausalLM": "modeling_bad.Bad", "AutoConfig": "modeling_bad.Bad"} if name == "auto_map" else chooser.choice(VALUES)
            node[name] = value
            said.append(f"with {name[:20]!r}: {value!r}"[:60])
        else:
            node.append(chooser.choice(VALUES))
            said.append("one more item")
    return document, ", ".join(said)


def _alter_bytes(data: bytes, chooser: random.Random) -> tuple[bytes, str]:
    at = chooser.randrange(len(data) + 1)
    choices: list[tuple[str, Callable[[], bytes]]] = [
        ("a bit", lambda: data[:at] + bytes([data[at] ^ (1 << chooser.randrange(8))]) + data[at + 1 :] if at < len(data) else data + b"x"),
        ("cut", lambda: data[:at]),
        ("bytes inserted", lambda: data[:at] + chooser.randbytes(chooser.choice((1, 4, 64))) + data[at:]),
        ("bytes removed", lambda: data[:at] + data[at + chooser.choice((1, 8, 100)) :]),
        ("empty", lambda: b""),
        ("zeros", lambda: bytes(len(data))),
        ("noise", lambda: chooser.randbytes(len(data) or 8)),
        ("a byte order mark", lambda: b"\xef\xbb\xbf" + data),
        ("UTF-16", lambda: data.decode("utf-8", "replace").encode("utf-16")),
        ("nested deep", lambda: chooser.choice((b"[", b'{"a":')) * 100_000),
        ("nested deep inside", lambda: data.rstrip()[:-1] + b', "deep": ' + b"[" * 3000 + b"]" * 3000 + b"}"),
        ("nested a little", lambda: b"[" * 900 + b"]" * 900),
        ("twice", lambda: data + data),
        ("git-lfs", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"),
        (
            "aliases",
            lambda: b"a: &a [x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 8)) for n in range(9)),
        ),
        ("a pickle", lambda: b"\x80\x04cos\nsystem\n(S'touch ran'\ntR."),
    ]
    name, make = choices[chooser.randrange(len(choices))]
    return make(), name


def _alter_header(data: bytes, chooser: random.Random) -> tuple[bytes, str]:
    """A safetensors file with an altered header, or altered values."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    act = chooser.random()
    if act < 0.6:
        document, said = _alter_document(json.loads(header), chooser)
        text = json.dumps(document).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + body, f"header: {said}"
    if act < 0.7:
        length = chooser.choice((0, 1, size - 1, size + 1, size * 2, 2**31, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + data[8:], f"header of {length} bytes"
    if act < 0.8:
        text, said = _alter_bytes(header, chooser)
        return struct.pack("<Q", len(text)) + text + body, f"header: {said}"
    if act < 0.9:
        return data[: 8 + size] + b"\xff" * len(body), "values of nan"
    return _alter_bytes(data, chooser)


def _alter_rows(data: bytes, chooser: random.Random) -> tuple[bytes, str]:
    lines = data.split(b"\n")
    at = chooser.randrange(len(lines))
    if chooser.random() < 0.5 and lines[at].strip():
        document, said = _alter_document(json.loads(lines[at]), chooser)
        lines[at] = json.dumps(document).encode("utf-8", "surrogatepass")
    else:
        lines[at], said = _alter_bytes(lines[at], chooser)
    return b"\n".join(lines), f"line {at + 1}: {said}"


def _replace_by(path: Path, bait: Path, chooser: random.Random) -> str:
    """A file replaced by something that is none, or by a link."""
    path.unlink()
    kind = chooser.choice(("zero", "bait", "fifo", "folder", "nothing", "loop", "socket", "huge", "dangling", "hostname", "beside", "folder of the system"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, contextlib.suppress(OSError):
            made.bind(str(path))
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**36)
    elif kind != "nothing":
        targets = {"zero": "/dev/zero", "bait": bait / "secret.json", "loop": path.name, "dangling": "not-there", "hostname": "/etc/hostname"}
        path.symlink_to(targets.get(kind, bait if kind != "beside" else "config.json"))
    return f"replaced by {kind}"


def _add_something(folder: Path, chooser: random.Random) -> str:
    """A name that does not belong where it is put."""
    kind = chooser.choice(("url", "code", "step", "adapter", "bin", "keeper", "hidden", "results"))
    if kind == "url":
        (folder / "checkpoints.url").write_text(chooser.choice((URL, "s3://127.0.0.1/x", "file:///etc", "/etc", "http://[", "\x00", "ftp://127.0.0.1/x")))
    elif kind == "code":
        for name in ("modeling_bad.py", "configuration_bad.py", "tokenization_bad.py", "sitecustomize.py", "conftest.py"):
            (folder / name).write_text(CODE)
    elif kind == "step":
        home = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
        (home / chooser.choice(("step-1e5", "step-", "step-00000004-copy", "step--1", "step-\u00b2", "step-9999999999999999999999", "stages", "1-web"))).mkdir()
    elif kind == "adapter":
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": chooser.choice((URL, "../bait", "/etc")), "peft_type": "LORA"}))
    elif kind == "bin":
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    elif kind == "keeper":
        (folder / "keepers").mkdir()
        home = {"name": "a", "node": "b", "folder": "/etc", "pid": 1, "host": "127.0.0.1", "port": 9, "secret": "x"}
        (folder / "keepers" / "a.json").write_text(json.dumps(home))
    elif kind == "hidden":
        (folder / ".writing-x").mkdir()
    else:
        (folder / "results").mkdir(exist_ok=True)
        (folder / "results" / f"{'a' * 16}-{'b' * 16}.json").write_text(json.dumps({"scores": chooser.choice(VALUES)}))
    return f"added: {kind}"


def _seal(folder: Path) -> None:
    """Make the manifest say what the files now hold, as whoever altered them would."""
    from cairn.checkpoint.format.manifest import MANIFEST, Manifest, entry_of

    listed = json.loads((folder / MANIFEST).read_bytes())["files"]
    names = [name for name in listed if (folder / name).is_file() and not (folder / name).is_symlink() and (folder / name).stat().st_size < 2**24]
    (folder / MANIFEST).write_bytes(Manifest.of({name: entry_of((folder / name).read_bytes()) for name in names}).dump())


# -- the arena ----------------------------------------------------------------------------------------------------


@dataclass
class Arena:
    """A folder in which things are altered and read; it is put back after each attack."""

    root: Path
    things: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home, self.bait, self.out = self.root / "arena", self.root / "bait", self.root / "out"
        for name in ("out", "cache", "tmp", "bait"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        os.environ["CAIRN_CACHE"], os.environ["CAIRN_HOSTILE_MARK"] = str(self.root / "cache"), str(self.root / "mark")
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.root / "tmp")
        (self.bait / "secret.json").write_text(json.dumps({"model_type": "SECRET", "canary": "CANARY"}))
        if not self.home.exists():
            shutil.rmtree(self.root / "building", ignore_errors=True)
            build(self.root / "building")
            (self.root / "building").rename(self.home)
        os.chdir(self.out)  # what is opened by a relative name is opened here
        self.things = {
            "run": self.home / "run",
            "soup": self.home / "soup",
            "shards": self.home / "shards",
            "hub": self.home / "models--someone--thing" / "snapshots" / "abc",
            "foreign": self.home / "foreign",
        }
        self._kept = {path: _kept(path) for path in self._all()}
        self._files = {name: sorted(path for path in self._kept if path.is_relative_to(thing) and path.is_file()) for name, thing in self.things.items()}
        self._watch: Watch | None = None

    def _all(self) -> list[Path]:
        return [Path(folder) / name for folder, folders, files in os.walk(self.home) for name in (*files, *folders)]

    def watch(self) -> Watch:
        """The audit hook, installed when first asked for, after everything that commands load has been loaded."""
        if self._watch is None:
            for command in COMMANDS:
                status, _, said = self._call(command, self.things[command.things[0]], timed=False)
                self.restore()
                if status != 0 and command.name != "sparsity":  # nothing here was trained sparsely
                    raise AssertionError(f"{command.name} refuses what nobody altered: {said}")
            self._watch = Watch(self.root)
        return self._watch

    def restore(self) -> None:
        """Put everything back as it was."""
        for path in sorted(self._all(), key=lambda path: -len(path.parts)):
            if path not in self._kept or _kept(path, quick=True) != _brief(self._kept[path]):
                _remove(path)
        for path, kept in sorted(self._kept.items(), key=lambda item: len(item[0].parts)):
            if not os.path.lexists(path):
                _put_back(path, kept)
        for path in (*self.out.iterdir(), *(self.root / "tmp").iterdir()):
            _remove(path)

    def attack(self, number: int) -> Outcome:
        """One input: the same for the same number."""
        chooser = random.Random(f"hostile {number}")
        command = chooser.choices(COMMANDS, [1 / (each.cost + 4) for each in COMMANDS])[0]
        # A model of transformers takes ten times as long to load as ours.
        name = chooser.choices(command.things, [0.15 if thing == "foreign" and command.cost > 15 else 1 for thing in command.things])[0]
        file, change = self._alter(name, chooser)
        outcome = Outcome(number, command.name, file, change)
        watch = self.watch()
        try:
            with watch.watching() as seen:
                outcome.status, outcome.problem, outcome.detail = self._call(command, self.things[name])
            if outcome.problem is None and seen:
                outcome.problem, outcome.detail = seen[0]
            if (self.root / "mark").exists():
                (self.root / "mark").unlink()
                outcome.problem, outcome.detail = "code", "a file of the checkpoint ran"
        finally:
            self.restore()
        return outcome

    def _alter(self, name: str, chooser: random.Random) -> tuple[str, str]:
        thing = self.things[name]
        if chooser.random() < 0.08:
            folder = chooser.choice([thing, *(path for path in self._kept if path.is_relative_to(thing) and path.name.startswith("step-"))])
            return str(folder.relative_to(self.home)), _add_something(folder, chooser)
        files = self._files[name]
        newest = [path for path in files if "step-00000004" not in path.parts]  # what a run means is its newest checkpoint
        path = chooser.choice(newest if chooser.random() < 0.85 else files)
        data = path.read_bytes()
        if chooser.random() < 0.1:
            change = _replace_by(path, self.bait, chooser)
        else:
            altered, change = _altered(path, data, chooser)
            path.unlink()
            path.write_bytes(altered)
        if (path.parent / "manifest.json").is_file() and path.name != "manifest.json" and chooser.random() < 0.6:
            with contextlib.suppress(Exception):  # a manifest of what cannot be read is left as it was
                _seal(path.parent)
                change += ", sealed"
        return str(path.relative_to(self.home)), change

    def _call(self, command: Command, thing: Path, timed: bool = True) -> tuple[int | str, str | None, str]:
        out, said = io.StringIO(), io.StringIO()

        began, computed = time.monotonic(), time.process_time()

        def too_long(*_: object) -> None:
            if time.process_time() - computed >= SECONDS or time.monotonic() - began >= WAITING:
                raise Hang

        before = signal.signal(signal.SIGALRM, too_long)
        signal.setitimer(signal.ITIMER_REAL, SECONDS if timed else 0, 1.0)  # again and again, should somebody catch the first
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                status = self._pages() if command.name == "page" else _main(command.arguments(thing, self.out))
        except Hang:
            return "hang", "hang", "".join(traceback.format_exc().splitlines(True)[-6:])
        except BaseException as error:
            return type(error).__name__, "traceback", "".join(traceback.format_exception(error)[-6:])[-1500:]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if "CANARY" in out.getvalue() or "CANARY" in said.getvalue():
            return status, "outside", "the contents of a file outside were shown"
        if "Traceback (most recent call last)" in said.getvalue():
            return status, "traceback", said.getvalue()[-1500:]
        return status, None if status in (0, 1, 2) else "traceback", said.getvalue()[-500:]

    def _pages(self) -> int:
        """Index the folder and ask for the pages of what was found. 0: every page answered; 500: one broke."""
        from cairn.registry.index import Index
        from cairn.registry.web.app import create_app

        place = self.out / "index.sqlite"
        with Index(place) as index:
            index.add(self.home)
            checkpoints = [row["key"] for row in index.rows("SELECT key FROM checkpoints ORDER BY path")]
            runs = [row["key"] for row in index.rows("SELECT key FROM runs")]
        app = create_app(place)
        paths = ["/", "/runs", "/checkpoints", *(f"/run/{key}" for key in runs)]
        for key in random.Random(len(checkpoints)).sample(checkpoints, min(2, len(checkpoints))):
            paths += [f"/checkpoint/{key}", f"/checkpoint/{key}/card", f"/checkpoint/{key}/risks", f"/lineage/{key}"]
        return max((status for status in (_get(app, path) for path in paths) if status >= 500), default=0)


def _altered(path: Path, data: bytes, chooser: random.Random) -> tuple[bytes, str]:
    if path.suffix == ".safetensors":
        return _alter_header(data, chooser)
    if path.suffix == ".jsonl":
        return _alter_rows(data, chooser)
    if path.suffix in (".json", ".yaml") and chooser.random() < 0.7:
        import yaml

        document = json.loads(data) if path.suffix == ".json" else yaml.safe_load(data)
        document, said = _alter_document(document, chooser)
        return json.dumps(document).encode("utf-8", "surrogatepass"), said
    return _alter_bytes(data, chooser)


def _main(arguments: list[str]) -> int:
    import typer.main

    from cairn.cli import main

    if isinstance(main.app, typer.Typer):  # built anew by every call, which would take longer than most commands do
        main.app = typer.main.get_command(main.app)  # type: ignore[assignment]
    before = sys.argv
    sys.argv = ["cairn", *arguments]
    try:
        main.main()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    finally:
        sys.argv = before
    return 0


def _get(app: Any, path: str) -> int:
    """The status of a page, asked for without a server."""
    status = [500]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            status[0] = message["status"]

    scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"root_path": "", "headers": [(b"host", b"127.0.0.1")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}
    asyncio.run(app(scope, receive, send))
    return status[0]


Kept = tuple[str, Any, Any]


def _kept(path: Path, quick: bool = False) -> Any:
    """What lies at a path: enough to put it back, or, `quick`, to see that it was touched."""
    if path.is_symlink():
        kept: Kept = ("link", os.readlink(path), None)
    elif path.is_dir():
        kept = ("folder", None, None)
    elif path.is_file():
        stat = path.stat()
        kept = ("file", (stat.st_ino, stat.st_size, stat.st_mtime_ns), None if quick else path.read_bytes())
    else:
        kept = ("other", None, None)
    return _brief(kept) if quick else list(kept)


def _brief(kept: Any) -> tuple[Any, Any]:
    return kept[0], kept[1]


def _put_back(path: Path, kept: Any) -> None:
    if kept[0] == "link":
        path.symlink_to(kept[1])
    elif kept[0] == "folder":
        path.mkdir()
    else:
        path.write_bytes(kept[2])
        stat = path.stat()
        kept[1] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def plain(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a row of JSON."""
    return asdict(outcome)
