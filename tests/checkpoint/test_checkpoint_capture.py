"""Saving in the background: what is saved is what was there when it was asked for, whatever training does meanwhile."""

import collections
import contextlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors import safe_open
from torch import nn

import cairn
from cairn.checkpoint.format import read, verify
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.saving import captured, disk, modules, write
from cairn.checkpoint.saving.capture import Background, _Pace
from cairn.checkpoint.saving.captured import NamedState
from cairn.errors import InputError, MismatchError


@pytest.fixture(autouse=True)
def late(monkeypatch):
    """Every tensor is large, and no piece of it is copied before somebody waits: whoever does not wait overtakes all copies."""
    monkeypatch.setattr(captured, "SMALL_BYTES", 0)
    monkeypatch.setattr(captured, "PIECE_BYTES", 1024)
    awaited = collections.defaultdict(threading.Event)
    fetch, wait = Background._fetch, captured.Capture.wait
    monkeypatch.setattr(Background, "_fetch", lambda self, save, piece: (awaited[save].wait(30), fetch(self, save, piece)))
    monkeypatch.setattr(captured.Capture, "wait", lambda save, storages: (awaited[save].set(), wait(save, storages))[1])


class Small(nn.Module):
    """Something of everything that has a window of its own: tied weights, running statistics, rows that are renormalised."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 24, max_norm=1.0)
        self.inner = nn.Linear(24, 24)
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 20, bias=False)
        self.again = self.head

    def forward(self, ids):
        return self.again(self.norm(self.inner(self.embed(ids))))


def update(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def snapshot(saver):
    """Everything that a checkpoint is to hold, copied at once."""
    found = {f"model:{name}": tensor.clone() for name, tensor in modules.module_tensors(saver.model).items()}
    moments = modules.optimizer_tensors(saver.model.named_parameters(), saver.optimizers)
    found |= {f"optimizer:{name}": tensor.clone() for name, tensor in moments.items()}
    return found | {f"ingredients:extra/{name}": tensor.clone() for name, tensor in saver.extra.items()}


def on_disk(path):
    checkpoint = read.open(path)
    stems = {"model": checkpoint.tensors, "optimizer": checkpoint.optimizer or {}, "ingredients": checkpoint.ingredients or {}}
    found = {f"{stem}:{name}": tensor.load() for stem, tensors in stems.items() for name, tensor in tensors.items()}
    del found["ingredients:torch/random"]
    return found


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw-single": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


def trained(folder, kind, *, steps=6, accumulate=1, hooked=True, **options):
    """Train `Small` with a save at every step; returns for each step what was there and what lies on disk (None: not saved)."""
    torch.manual_seed(0)
    model = Small()
    inside = kind == "in-backward"
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD([p], 0.1, momentum=0.9) for p in parameters] if inside else [OPTIMIZERS[kind](parameters)]
    if inside:
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda p, o=optimizer: update(o))
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = {}
    saver = cairn.Saver(folder, model, optimizers, extra=average, **options)
    if not hooked:
        for hook in saver._hooks:
            hook.remove()
    with saver:
        for step in range(1, steps + 1):
            for _ in range(1 if inside else accumulate):
                ids = torch.randint(20, (16,))
                (nn.functional.cross_entropy(model(ids), ids.roll(1)) / accumulate).backward()
            if not inside:
                optimizers[0].step()
                optimizers[0].zero_grad()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    average[name].lerp_(parameter, 0.1)
            saver.step({"position": step})
            wanted[step] = snapshot(saver)
    saved = {read.open(path).step: on_disk(path) for path in read.list_checkpoints(folder)}
    return wanted, saved, saver


def same(wanted, saved):
    return wanted.keys() == saved.keys() and all(
        wanted[step].keys() == saved[step].keys() and all(torch.equal(wanted[step][name], saved[step][name]) for name in wanted[step]) for step in wanted
    )


CASES = [*((kind, 1) for kind in OPTIMIZERS), ("adamw-fused", 4), ("in-backward", 1)]


@pytest.mark.parametrize(("kind", "accumulate"), CASES)
def test_what_is_saved_is_what_was_there(kind, accumulate, tmp_path):
    wanted, saved, saver = trained(tmp_path, kind, accumulate=accumulate, mode="lazy")
    assert same(wanted, saved)
    assert not any(figures.torn for figures in saver.background.figures)
    assert sum(figures.waiting for figures in saver.background.figures) > 0  # there was something to wait for


@pytest.mark.filterwarnings("ignore:.*this save was given up")
@pytest.mark.parametrize(("kind", "accumulate"), CASES)
def test_without_the_wait_before_the_update_it_is_not(kind, accumulate, tmp_path):
    """The control: the same check fails when nobody waits."""
    wanted, saved, _ = trained(tmp_path, kind, accumulate=accumulate, mode="lazy", hooked=False)
    assert not same(wanted, saved)


@pytest.mark.filterwarnings("ignore:.*this save was given up")
def test_a_tensor_that_changes_too_early_makes_the_save_void_and_training_goes_on(tmp_path):
    _, saved, saver = trained(tmp_path, "adamw-single", mode="lazy", hooked=False)
    torn = [figures.path for figures in saver.background.figures if figures.torn]
    assert torn and all(not path.exists() for path in torn)  # never something half old, half new
    assert len(torn) + len(saved) == 6
    assert not list((tmp_path / "checkpoints").glob(".writing-*"))


@pytest.mark.filterwarnings("ignore:.*this save was given up")
def test_comparing_blocks_notices_what_torch_does_not_count(tmp_path, monkeypatch):
    """Also when all is written before it is compared."""
    compare = captured.Capture.compare_blocks
    monkeypatch.setattr(captured.Capture, "compare_blocks", lambda save, storages: (time.sleep(0.3), compare(save, storages)))
    tensor = torch.zeros(4000)
    for guard, noticed in (("version", False), ("blocks", True)):
        with Background(mode="lazy", guard=guard) as saver:
            saver.save(tmp_path / guard, NamedState({"model": {"w": tensor}}, {"config.json": b"{}"}), lambda parent: Lineage(kind="run", name="train"))
            tensor.data.add_(1)
            saver.before_update()
        assert saver.figures[0].torn is noticed and (tmp_path / guard).exists() is not noticed


def test_the_state_may_go_as_soon_as_it_was_asked_for(tmp_path):
    """Strong references: a deleted model, and one whose weights do not lie in order."""
    model = nn.Linear(40, 40)
    model.weight = nn.Parameter(torch.randn(40, 40).t())
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    saver = cairn.Saver(tmp_path, model, mode="lazy")
    saver.step()
    saver.model = None
    del model
    torch.randn(200, 200)
    saver.close()
    saved = read.open(tmp_path).tensors
    assert all(torch.equal(saved[name].load(), tensor) for name, tensor in before.items())


def test_a_small_buffer_makes_updates_wait_and_loses_nothing(tmp_path):
    with pytest.warns(UserWarning, match="will wait for the disk"):
        wanted, saved, saver = trained(tmp_path, "adamw-fused", mode="lazy", buffer=2048)
    assert same(wanted, saved)
    assert saver.background._pace._fixed == "lazy" and max(figures.room for figures in saver.background.figures) > 0


def test_eager_copies_before_it_returns(tmp_path):
    wanted, saved, saver = trained(tmp_path, "adamw-fused", mode="eager", hooked=False)
    assert same(wanted, saved) and all(figures.waiting == 0 for figures in saver.background.figures)


def test_auto_keeps_the_mode_whose_steps_are_shorter():
    for fast, slow in (("lazy", "eager"), ("eager", "lazy")):
        pace = _Pace("auto")
        tried = []
        while pace._fixed is None:
            tried.append(mode := pace.choose())
            pace.took(mode, 1.0 if mode == fast else 1.2)
        assert pace.choose() == fast and {tried.count(fast), tried.count(slow)} <= {4, 5}


def test_plain_loops_go_on_bit_for_bit(tmp_path):
    """Model with running statistics, moments, torch's generator and the caller's own values."""
    whole, *_ = trained(tmp_path / "whole", "adamw-fused", steps=6)
    trained(tmp_path / "parts", "adamw-fused", steps=3)
    torch.manual_seed(99)
    model = Small()
    optimizer = OPTIMIZERS["adamw-fused"](model.parameters())
    optimizer.param_groups[0]["lr"] = 0.5
    average = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with cairn.Saver(tmp_path / "parts", model, optimizer, extra=average) as saver:
        assert saver.restore() == {"position": 3} and optimizer.param_groups[0]["lr"] == 0.01
        for _ in range(3):
            ids = torch.randint(20, (16,))
            nn.functional.cross_entropy(model(ids), ids.roll(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    average[name].lerp_(parameter, 0.1)
            saver.step()
        assert same({6: whole[6]}, {6: snapshot(saver)})
    newest = read.open(tmp_path / "parts")
    assert newest.step == 6 and newest.lineage.parents[0].step == 5 and verify.verify(newest.path).sound
    with safe_open(newest.path / "model.safetensors", "pt") as file:
        assert "head.weight" in file.keys() and "again.weight" not in file.keys()  # noqa: SIM118 (not a mapping)


def test_a_checkpoint_of_something_else_is_refused_before_anything_changes(tmp_path):
    trained(tmp_path, "sgd", steps=1)
    other = nn.Linear(3, 3)
    before = other.weight.detach().clone()
    with cairn.Saver(tmp_path, other) as saver, pytest.raises(MismatchError, match="do not fit this model"):
        saver.restore()
    assert torch.equal(other.weight, before)


def test_what_json_can_not_say_is_refused(tmp_path):
    with cairn.Saver(tmp_path, nn.Linear(2, 2)) as saver, pytest.raises(InputError, match="plain values"):
        saver.step({"position": object()})
    assert read.list_checkpoints(tmp_path) == []


def test_a_full_disk_is_said_at_the_next_call_and_nothing_hangs(tmp_path, monkeypatch):
    def full(file, begin, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.OpenFile, "write", full)
    saver = cairn.Saver(tmp_path, nn.Linear(64, 64), mode="lazy", buffer=4096)
    saver.step()
    with pytest.raises(InputError, match="disk is full"):
        saver.close()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_is_saved_in_the_background_is_not_read_back(monkeypatch, tmp_path):
    monkeypatch.setattr(captured, "SMALL_BYTES", 4096)
    monkeypatch.setattr(captured, "PIECE_BYTES", 2**20)
    model = nn.ModuleList(nn.Linear(200, 150 + 5 * number) for number in range(40))  # 8 MB: blocks, small tensors between large ones
    monkeypatch.setattr(disk, "block_digest", None)
    with cairn.Saver(tmp_path, model, mode="lazy") as saver:
        saver.step()
    monkeypatch.undo()
    assert verify.verify(saver.background.newest.path).sound


@pytest.mark.parametrize("failing", [False, True])
def test_no_thread_outlives_the_saver(monkeypatch, tmp_path, failing):
    for name in ("_copy_all", "_write_all"):
        body = getattr(Background, name)
        monkeypatch.setattr(Background, name, lambda saver, body=body: (body(saver), time.sleep(0.3)))
    saver = cairn.Saver(tmp_path, nn.Linear(8, 8), mode="lazy")
    if failing:
        monkeypatch.setattr(write.Writer, "publish", lambda *unused: 1 / 0)
    saver.step()
    with pytest.raises(ZeroDivisionError) if failing else contextlib.nullcontext():
        saver.close()
    assert not [thread for thread in threading.enumerate() if thread.name in ("cairn-copy", "cairn-save")]


PHASES = """
import os, signal, sys, time
import torch
from pathlib import Path
from cairn.checkpoint.saving import capture, captured, disk, modules, write
from cairn.checkpoint.saving.modules import Saver

folder, phases = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)

def die(*unused):
    os.kill(os.getpid(), signal.SIGKILL)

def arm(phase):
    if phase == "header":
        write.Writer.declare = die
    elif phase == "tensor":
        original = write.Writer.put_part
        def put(writer, stem, part, tensor, count=[0]):
            count[0] += 1
            original(writer, stem, part, tensor) if count[0] < 4 else die()
        write.Writer.put_part = put
    elif phase == "manifest":
        original = disk._write_whole
        disk._write_whole = lambda path, data: die() if path.name == "manifest.json" else original(path, data)
    elif phase == "rename":
        os.rename = die
    elif phase == "copy":
        capture.copy_on_host = die

for phase in phases:
    if os.fork() == 0:
        captured.SMALL_BYTES = 0
        torch.manual_seed(0)
        model = torch.nn.Linear(50, 50)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        saver = Saver(folder / phase, model, optimizer)
        for step in range(3):
            model(torch.randn(4, 50)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 2:
                saver.background.finish()
                arm(phase)
            saver.step()
        saver.close()
        os._exit(1)  # it should have died
    _, status = os.wait()
    print(phase, os.WIFSIGNALED(status) and os.WTERMSIG(status))
"""


def test_a_kill_at_any_phase_leaves_the_one_before_complete(tmp_path):
    phases = ["copy", "header", "tensor", "manifest", "rename"]
    done = subprocess.run([sys.executable, "-c", PHASES, str(tmp_path), *phases], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [word for phase in phases for word in (phase, str(int(signal.SIGKILL)))], done.stderr
    for phase in phases:
        newest = read.open(tmp_path / phase)
        assert newest.step == 2 and verify.verify(newest.path).sound, phase
        write.sweep(tmp_path / phase / "checkpoints")
        assert sorted(path.name for path in (tmp_path / phase / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_closing_waits_for_a_copying_thread_that_has_nothing_to_copy(tmp_path, monkeypatch):
    closing, copy = threading.Event(), Background._copy

    def late(self, capture):
        closing.wait(0.5)  # the save is published by then, and closing has begun
        copy(self, capture)

    monkeypatch.setattr(Background, "_copy", late)
    saver = Background(mode="lazy")
    saver.save(tmp_path / "saved", NamedState({}, {"note.json": b"{}"}), lambda parent: Lineage(kind="run", name="train")).wait()
    saver.close()
    assert not any(thread.is_alive() for thread in saver._threads)
    assert read.open(tmp_path / "saved").path.is_dir()
