"""TensorBoard and Weights & Biases show the numbers of metrics.jsonl, also of a run that was interrupted; and decide nothing."""

import json
import struct
import time

import pytest

from cairn.errors import InputError
from cairn.training.run import resume, train

TRACKED = ["track=[tensorboard]", "training.tokens=8 steps", "checkpoint.every=4 steps"]


def shown(folder):
    """The scalars that TensorBoard would draw: {name: {step: value}}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: {callback.step: callback.value for callback in found.Scalars(name)} for name in found.Tags()["scalars"]}


def test_tensorboard_shows_the_rows_of_the_run(small_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    train(small_recipe, tmp_path / "run", TRACKED, stop_at_step=6)
    run = resume(tmp_path / "run")
    rows = {row["step"]: row for row in run.metrics()}
    curves = shown(tmp_path / "run/tensorboard")
    assert set(curves) == {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"} and set(rows) == set(range(1, 9))
    for name in ("loss", "learning_rate", "grad_norm"):
        assert curves[name] == pytest.approx({step: row[name] for step, row in rows.items()}, rel=1e-6)


def test_weights_and_biases_is_given_the_rows_of_the_run(small_recipe, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    logged, told = [], {}

    class Run:
        def log(self, values):
            logged.append(values)

        def define_metric(self, *names, **options):
            pass

        def finish(self):
            told["finished"] = True

    monkeypatch.setattr(wandb, "init", lambda **options: told.update(options) or Run())
    run = train(small_recipe, tmp_path / "run", ["track=[wandb]", "training.tokens=3 steps"])
    assert told["name"] == "run" and told["resume"] == "allow" and told["config"]["seed"] == 7 and told["finished"]
    rows = run.metrics()
    assert [values["step"] for values in logged] == [1, 2, 3] and [values["loss"] for values in logged] == [row["loss"] for row in rows]


def test_weights_and_biases_keeps_the_numbers_offline(small_recipe, tmp_path, monkeypatch):
    """In its own file of the run."""
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DISABLE_CODE": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    run = train(small_recipe, tmp_path / "run", ["track=[wandb]", "training.tokens=2 steps"])
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    losses, until = [row["loss"] for row in run.metrics()], time.monotonic() + 30
    while len(logged_in(file)) < len(losses) and time.monotonic() < until:  # a process of wandb's own writes it, and may still do so when the run is over
        time.sleep(0.1)
    assert [row["loss"] for row in logged_in(file)] == pytest.approx(losses)


def logged_in(file):
    """The rows of history in a file of Weights & Biases: records in blocks of 32 KiB, each with checksum, length and kind before it."""
    from wandb.proto import wandb_internal_pb2

    data, place, piece, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if place + 7 + length > len(data):  # still being written
            break
        piece += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, piece = wandb_internal_pb2.Record.FromString(piece), b""
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def test_who_watches_decides_no_bit(small_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    plain = train(small_recipe, tmp_path / "plain", ["training.tokens=8 steps", "checkpoint.every=4 steps"])
    watched = train(small_recipe, tmp_path / "watched", TRACKED)
    assert plain.newest().digest == watched.newest().digest
    with pytest.raises(InputError, match="track"):
        train(small_recipe, tmp_path / "other", ["track=[comet]"])
