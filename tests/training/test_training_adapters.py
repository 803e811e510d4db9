"""Training an adapter or a part of a model: what checkpoints hold, that a resume changes no bit, and that wrong bases are refused."""

import json
import shutil
import sys

import pytest
import torch

from cairn.checkpoint.format import read, verify
from cairn.cli.main import main
from cairn.errors import DamagedError, InputError, MismatchError, NotFoundError, ResumeError
from cairn.training.directory import Run
from cairn.training.run import fork, resume, train
from tests.faults import kill_when, python
from tests.fixtures import ADAPTER
from tests.training.test_training_parallel import layout, work

WITH = [f"adapter={json.dumps(ADAPTER)}", "training.tokens=30 steps"]


@pytest.fixture(scope="module")
def base(small_run):
    return read.open(small_run.checkpoints()[-1])


def test_a_checkpoint_holds_the_adapter_alone_and_names_its_base(adapter_run, base):
    newest = adapter_run.newest()
    assert newest.is_adapter and verify.verify(newest.path).sound
    files = {path.name for path in newest.files()}
    assert {"adapter_model.safetensors", "adapter_config.json", "adapter_base.json", "optimizer.safetensors", "tokenizer.json"} <= files
    assert "model.safetensors" not in files and newest.config == base.config
    numbers = sum(4 * (a + b) for a, b in [(32, 32), (32, 16), (32, 16), (32, 32), (64, 32)]) * 2
    assert newest.stored.nbytes == 4 * numbers and newest.optimizer.nbytes == 8 * numbers + 4 * len(newest.stored)
    assert newest.base.digest == base.digest and newest.lineage.options["base"]["digest"] == base.digest
    first = read.open(adapter_run.checkpoints()[0])
    assert [parent.digest for parent in first.lineage.parents] == [base.digest] and "optimizer state: kept -> fresh" in first.lineage.changed
    rows = adapter_run.metrics()
    assert [row["step"] for row in rows] == list(range(21, 31))


def test_the_first_step_begins_where_the_base_stands_and_the_base_does_not_change(adapter_run, small_run, base, tmp_path):
    whole = fork(base, tmp_path / "whole", ["training.tokens=30 steps"], fresh=["optimizer"])
    assert whole.metrics()[0]["loss"] == pytest.approx(adapter_run.metrics()[0]["loss"], rel=1e-6)
    assert whole.metrics()[0]["grad_norm"] != pytest.approx(adapter_run.metrics()[0]["grad_norm"], rel=1e-2)
    adapted, plain = dict(adapter_run.newest().model().named_parameters()), dict(base.model().named_parameters())
    assert all(torch.equal(adapted[name], parameter) for name, parameter in plain.items())


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(adapter_run, base, tmp_path):
    code = f"import sys; from cairn.training.run import fork; fork(sys.argv[1], sys.argv[2], {[*WITH, 'checkpoint.every=2 steps']!r})"
    process = python(code, str(base.path), str(tmp_path / "run"))
    assert kill_when(process, lambda: len(read.list_checkpoints(tmp_path / "run")) >= 2), process.communicate()
    assert resume(tmp_path / "run").newest().digest == adapter_run.newest().digest


def test_snapshots_in_memory_keep_an_adapter(adapter_run, base, tmp_path):
    memory = ["fault_tolerance.memory.every=1"]
    assert fork(base, tmp_path / "run", [*WITH, *memory], stop_at_step=27).newest().step == 27
    assert resume(tmp_path / "run").newest().digest == adapter_run.newest().digest


def test_an_adapter_is_forked_and_goes_on_with_its_moments(adapter_run, base, tmp_path):
    early = adapter_run.checkpoints()[0]
    assert fork(early, tmp_path / "same").newest().model_digest == adapter_run.newest().model_digest
    other = fork(early, tmp_path / "other", ["optimizer.lr=1e-4"])
    assert other.newest().is_adapter and other.newest().base.digest == base.digest
    with pytest.raises(MismatchError, match="do not fit this model"):
        fork(early, tmp_path / "rank", ["adapter.rank=2"])


def test_the_base_is_found_beside_or_named_and_the_digest_decides(adapter_run, small_run, base, tmp_path):
    shutil.copytree(adapter_run.path, tmp_path / "far" / "run")
    alone = read.open(tmp_path / "far" / "run")
    with pytest.raises(NotFoundError, match=r"name it with --base DIR"):
        alone.model()
    wrong = small_run.checkpoints()[0]
    with pytest.raises(MismatchError, match=f"was trained on the model {base.model_digest[:12]}"):
        read.open(alone.path, base=wrong).model()
    with pytest.raises(MismatchError, match="was trained on the model"):
        resume(tmp_path / "far" / "run", ["training.tokens=31 steps"], base=wrong)
    assert read.open(alone.path, base=base.path).base.digest == base.digest
    shutil.copytree(base.path, tmp_path / "far" / "beside")
    assert read.open(alone.path).base.path.name == "beside"
    assert resume(tmp_path / "far" / "run", ["training.tokens=31 steps"]).newest().step == 31


def test_bad_input_is_one_sentence_and_nothing_is_written(adapter_run, small_recipe, base, tmp_path):
    with pytest.raises(InputError, match="needs a checkpoint to stand beside: cairn fork"):
        train(small_recipe, tmp_path / "a", ["adapter=lora"])
    with pytest.raises(InputError, match=r"is an adapter and the recipe has none; fold it first"):
        fork(adapter_run.newest(), tmp_path / "b", ["adapter=null", "training.tokens=40 steps"])
    with pytest.raises(InputError, match="leave out either adapter or trainable"):
        fork(base, tmp_path / "c", [*WITH, "trainable=[norm]"])
    with pytest.raises(InputError, match=r"'wat' matches no matrix"):
        fork(base, tmp_path / "d", ["adapter={name: lora, targets: wat}", "training.tokens=30 steps"])
    with pytest.raises(ResumeError, match=r"can ?not change adapter\.rank"):
        resume(adapter_run.path, ["adapter.rank=8"])
    with pytest.raises(ResumeError, match=r"can ?not change adapter"):
        resume(adapter_run.path, ["trainable=[norm]", "adapter=null"])
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(adapter_run.newest().path, tmp_path / "holed")
    (tmp_path / "holed" / "adapter_config.json").unlink()
    with pytest.raises(DamagedError, match=r"adapter_config\.json"):
        read.open(tmp_path / "holed").model()


def test_commands_take_an_adapter_or_refuse_it_in_one_sentence(adapter_run, base, tmp_path, monkeypatch, capsys):
    path = str(adapter_run.path)
    for arguments, status in [
        (("show", path), 0),
        (("adapt", "show", path), 0),
        (("verify", path), 0),
        (("log", path), 0),
        (("diff", path, str(base.path)), 0),
        (("generate", path, "--prompt", "the ", "--new-tokens", "3"), 0),
        (("export", path, "-o", str(tmp_path / "copy"), "--whole"), 0),
        (("merge", "linear", path, str(base.path), "-o", str(tmp_path / "out")), 2),
        (("average", path, str(base.path), "-o", str(tmp_path / "out")), 2),
        (("grow", "stack", path, "-o", str(tmp_path / "out")), 2),
        (("export", path, "-o", str(tmp_path / "out")), 2),
    ]:
        monkeypatch.setattr(sys, "argv", ["cairn", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        assert left.value.code == status, (arguments, said.err)
        assert status == 0 or "fold it into its base first: cairn adapt fold" in said.err
    assert read.open(tmp_path / "copy").digest == adapter_run.newest().digest and not (tmp_path / "out").exists()


def test_measurements_of_an_adapter_are_of_the_adapter(adapter_run, base):
    from cairn.evaluation.measure import evaluate

    rows = {row.metric: row.value for row in evaluate(adapter_run.newest(), ["held-out"], store=False)}
    before = {row.metric: row.value for row in evaluate(base, ["held-out"], store=False)}
    assert rows["loss"] < before["loss"] and adapter_run.newest().model_digest != base.model_digest


def test_only_what_is_trainable_changes_and_has_moments(base, tmp_path):
    settings = ["trainable=[norm, '*layernorm', lm_head]", "training.tokens=26 steps"]
    run = fork(base, tmp_path / "part", settings, fresh=["optimizer"])
    newest = run.newest()
    chosen = {name for name in base.tensors if "norm" in name or "lm_head" in name}
    changed = {name for name, tensor in newest.tensors.items() if not torch.equal(tensor.load(), base.tensors[name].load())}
    assert changed == chosen and {name.rpartition("/")[0] for name in newest.optimizer} == chosen
    assert set(newest.tensors) == set(base.tensors), "a checkpoint of a partly trained model is whole"
    fork(base, tmp_path / "cut", settings, fresh=["optimizer"], stop_at_step=23)
    assert resume(tmp_path / "cut").newest().digest == newest.digest
    # With moments of all parameters at hand, those of the trained ones go on.
    kept = fork(base, tmp_path / "kept", settings).newest()
    assert {name.rpartition("/")[0] for name in kept.optimizer} == chosen and kept.model_digest != newest.model_digest
    with pytest.raises(InputError, match=r"trainable: 'nrm' matches no parameter"):
        fork(base, tmp_path / "typo", ["trainable=[nrm]", "training.tokens=26 steps"])


@pytest.mark.parametrize(("processes", "layouts"), [(2, ["2x1x1", "1x1x2"]), (4, ["1x2x2"])])
def test_every_layout_trains_the_same_adapter(processes, layouts, base, tmp_path):
    """In float64 the layouts differ by rounding alone; dropout draws the same masks however the batch is cut."""
    settings = [*WITH, "training.precision=float64", "training.tokens=23 steps", "checkpoint.every=100%"]
    alone = fork(base, tmp_path / "alone", settings)
    work(tmp_path, processes, *(["fork", str(base.path), [*layout(each), *settings], {"run": str(tmp_path / each)}] for each in layouts))
    for each in layouts:
        ours, wanted = Run(tmp_path / each).newest(), alone.newest()
        assert {n: (t.shape, t.dtype) for n, t in ours.stored.items()} == {n: (t.shape, t.dtype) for n, t in wanted.stored.items()}
        assert [row["loss"] for row in Run(tmp_path / each).metrics()] == pytest.approx([row["loss"] for row in alone.metrics()], rel=1e-9), each
        for stem in ("stored", "optimizer"):
            pairs = [(t.load(), getattr(wanted, stem)[n].load()) for n, t in getattr(ours, stem).items()]
            assert all(torch.allclose(a, b, rtol=0, atol=1e-8) for a, b in pairs), (each, stem)
