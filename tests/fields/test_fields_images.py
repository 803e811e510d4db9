"""Images through the one loop: exact resumes, forks, saves of every step, memory, measuring, operations, and transformers on the result."""

import json

import numpy as np
import pytest
import torch

from cairn.checkpoint.format import read, verify
from cairn.cli.main import app
from cairn.errors import InputError, MismatchError
from cairn.evaluation.measure import evaluate
from cairn.fields.vision.images import Augmentation, augment
from cairn.fields.vision.processor import FILE, ImageProcessor
from cairn.training.run import fork, resume, train
from cairn.training.sources import open_data


def losses(run):
    return [row["loss"] for row in run.metrics()]


def test_a_run_counts_samples_and_leaves_what_scripts_rely_on(image_run):
    last, newest = image_run.metrics()[-1], image_run.newest()
    assert last["samples"] == 12 * 32 and last["step"] == 12 and "tokens" not in last and {"accuracy", "samples_per_second"} <= set(last)
    assert newest.trainer["samples"] == newest.units == 384 and newest.unit == "samples" and newest.tokens is None
    assert last["loss"] < image_run.metrics()[0]["loss"]
    assert {FILE, "config.json", "model.safetensors"} <= {path.name for path in newest.files()} and not (newest.path / "tokenizer.json").exists()
    assert newest.config["id2label"] == {"0": "0", "1": "1", "2": "2"} and newest.config["image_size"] == 8
    assert "vocab_size" not in newest.config


@pytest.mark.parametrize("stop", [1, 7, 11])
def test_a_stop_and_a_resume_change_no_bit(stop, image_recipe, image_run, tmp_path):
    train(image_recipe, tmp_path / "cut", stop_at_step=stop)
    again = resume(tmp_path / "cut")
    assert losses(again) == losses(image_run) and again.newest().digest == image_run.newest().digest


def test_micro_batches_change_nothing_but_rounding(image_recipe, image_run, tmp_path):
    whole = train(image_recipe, tmp_path / "whole", ["training.micro_batch=32"])
    assert losses(whole) == pytest.approx(losses(image_run), abs=1e-5)


def test_every_step_may_be_saved(image_recipe, image_run, tmp_path):
    run = train(image_recipe, tmp_path / "all", ["checkpoint.every=1 steps", "training.samples=4 steps", "schedule.horizon=12 steps"])
    assert [path.name for path in run.checkpoints()] == [f"step-{step:08d}" for step in (1, 2, 3, 4)]
    assert run.newest().model_digest == read.open(image_run.checkpoints()[0]).model_digest
    assert all(not verify.verify(path).damage for path in run.checkpoints())


def test_a_fork_goes_on_with_the_weights_and_the_processor(image_run, tmp_path):
    branch = fork(image_run.checkpoints()[0], tmp_path / "b", ["optimizer.lr=1e-3", "training.samples=8 steps", "schedule.start=now"])
    assert branch.newest().units == 8 * 32 and (branch.newest().path / FILE).read_bytes() == (image_run.newest().path / FILE).read_bytes()
    assert branch.recipe.schedule.start.unit == "samples" and branch.recipe.schedule.start.value == 4 * 32


def test_stages_count_samples(image_recipe, tmp_path):
    stages = [{"name": "first"}, {"name": "second", "from": "first", "set": {"training.samples": "2 steps", "optimizer.lr": "now", "schedule": "constant"}}]
    run = train({**image_recipe, "training": {**image_recipe["training"], "samples": "4 steps"}, "stages": stages}, tmp_path / "r")
    assert run.newest().units == 6 * 32


def test_snapshots_in_memory_give_back_the_same_bits(image_recipe, image_run, tmp_path):
    from cairn.studies.nodes import Fault, NodeJob

    with NodeJob(tmp_path / "r", 1, ["fault_tolerance.memory.every=2"]) as job, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAIRN_NODE", "node-0")
        patch.setenv("CAIRN_MEMORY", str(job.memory(0)))
        job.start(image_recipe | {"checkpoint": {"every": "100 steps"}}, Fault(0, "update", 8), ())
        assert not job.finish()
        assert read.open(job.run).step == 0, "there is nothing on disk but the beginning"
        again = resume(job.run)
    assert losses(again) == losses(image_run) and again.newest().digest == image_run.newest().digest


def test_copies_of_the_model_compute_the_same(image_recipe, image_run, tmp_path):
    from tests.faults import torchrun

    script = tmp_path / "worker.py"
    script.write_text("import json, sys\nfrom cairn.training.run import train\ntrain(json.loads(sys.argv[1]), sys.argv[2], ['parallel.data=2'])\n")
    torchrun(2, script, json.dumps(image_recipe), str(tmp_path / "two"))
    from cairn.training.run import Run

    assert losses(Run(tmp_path / "two")) == pytest.approx(losses(image_run), abs=1e-5)


def test_it_is_measured_by_accuracy_with_an_interval(image_run):
    rows = evaluate(image_run.newest())
    found = {row.metric: row for row in rows}
    assert set(found) == {"accuracy", "loss"} and found["accuracy"].n > 20 and found["accuracy"].chance == pytest.approx(1 / 3)
    low, high = map(float, found["accuracy"].interval.split(" to "))
    assert 0 <= low < found["accuracy"].value < high <= 1 or found["accuracy"].value in (0, 1)
    assert found["accuracy"].samples == 384 and found["accuracy"].tokens is None


def test_one_broken_logit_leaves_no_figure(image_run, image_recipe):
    model, processor = image_run.newest().model(), ImageProcessor.load(image_run.newest().path)
    from cairn.evaluation.measurements.accuracy import Accuracy

    _, feed = open_data(image_run.recipe.data, 7, processor)
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    assert all(np.isnan(score.value) for score in Accuracy().of(model, processor, feed))


def test_merges_are_measured(image_run, tmp_path, capsys):
    from cairn.merging.target import Bench, objective

    checkpoints = [read.open(path) for path in image_run.checkpoints()]
    target = objective("accuracy", checkpoints[-1], select={}, report=None)
    bench = Bench(checkpoints)
    assert bench.alone(checkpoints[-1], target.select).value == evaluate(checkpoints[-1], store=False)[0].value


def test_other_data_may_be_named(image_run, image_file):
    data = {"name": "images", "sources": {"bars": {"images": str(image_file)}}, "held_out": 0}
    (accuracy, _) = evaluate(image_run.newest(), [{"name": "accuracy", "data": data, "split": "train"}], store=False)
    assert accuracy.n == 240


def test_transformers_opens_it_as_it_lies_and_says_the_same(image_run, image_file):
    transformers = pytest.importorskip("transformers")
    newest = image_run.newest()
    theirs = transformers.ViTForImageClassification.from_pretrained(newest.path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(newest.path)
    images = np.load(image_file)["images"][:16]
    inputs = processor([image[..., None] for image in images], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    ours = torch.from_numpy(ImageProcessor.load(newest.path)(images[..., None]))
    assert torch.allclose(inputs, ours, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(theirs(pixel_values=inputs).logits, newest.model()(ours), atol=1e-5)
    assert theirs.config.id2label == {0: "0", 1: "1", 2: "2"}


CASES = [
    {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 40, "image_size": 12, "patch_size": 4, "num_channels": 3},
    {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64, "image_size": 13, "patch_size": 5, "num_channels": 1},
    {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 3, "intermediate_size": 16, "image_size": 8, "patch_size": 8, "qkv_bias": False},
    {"hidden_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 50, "image_size": 9, "patch_size": 3, "hidden_act": "relu"},
]


@pytest.mark.parametrize("sizes", CASES)
def test_its_logits_are_those_of_transformers(sizes, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.ViTConfig(**sizes, num_labels=5, initializer_range=0.3)
    theirs = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") or "layernorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "m")
    opened = read.open(tmp_path / "m")
    ours, images = opened.model(), torch.randn(3, config.num_channels, config.image_size, config.image_size)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images).logits, atol=1e-5)
    described = ours.architecture
    assert described.parameter_count() == sum(parameter.numel() for parameter in ours.parameters())
    again = type(described).from_hf(json.loads(json.dumps(described.to_hf())))
    assert again == described


def test_a_model_of_transformers_goes_on_training_here(image_run, image_recipe, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTForImageClassification.from_pretrained(image_run.newest().path).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / FILE).write_bytes((image_run.newest().path / FILE).read_bytes())
    run = fork(tmp_path / "m", tmp_path / "r", recipe=image_recipe, fresh=["optimizer"])
    assert losses(run)[0] < losses(image_run)[0]


@pytest.mark.parametrize("command", ["average", "merge", "diff", "verify", "show", "log", "export", "card", "evaluate"])
def test_commands_work_on_it(command, image_run, tmp_path, capsys):
    first, last = str(image_run.checkpoints()[0]), str(image_run.checkpoints()[-1])
    out = str(tmp_path / "out")
    arguments = {
        "average": [str(image_run.path), "-o", out],
        "merge": ["linear", first, last, "-o", out],
        "diff": [first, last],
        "export": [last, "-o", out, "--dtype", "bfloat16"],
    }
    with pytest.raises(SystemExit) as ended:
        app([command, *arguments.get(command, [last])], standalone_mode=True)
    assert ended.value.code in (0, None), capsys.readouterr()
    if "-o" in arguments.get(command, []):
        made = read.open(out)
        assert (made.path / FILE).read_bytes() == (image_run.newest().path / FILE).read_bytes()
        assert not verify.verify(out).damage and evaluate(made, store=False)[0].n > 20
    if command == "card":
        told = capsys.readouterr().out
        assert "384 samples were read" in told and "AutoModelForImageClassification" in told and "image-classification" in told


def test_augmentation_is_a_function_of_seed_and_position(image_recipe):
    from cairn.training import recipe as recipes

    parsed = recipes.load(image_recipe)
    positions = np.array([5, 900, 3])
    one, two = (open_data(parsed.data, 7)[1].samples(positions) for _ in range(2))
    alone = open_data(parsed.data, 7)[1].samples(positions[1:2])
    assert (one.inputs["pixel_values"] == two.inputs["pixel_values"]).all() and (alone.inputs["pixel_values"][0] == one.inputs["pixel_values"][1]).all()
    assert (open_data(parsed.data, 8)[1].samples(positions).index != one.index).any()


def test_augmentation_moves_and_mirrors():
    images = np.zeros((64, 5, 5, 1), np.uint8)
    images[:, 2, 1] = 7
    keys = np.arange(64, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    found = augment(images, keys, Augmentation(mirror=True, shift=1))
    places = {tuple(map(int, np.argwhere(image[..., 0])[0])) for image in found if image.any()}
    assert places <= {(row, column) for row in (1, 2, 3) for column in (0, 1, 2, 3, 4)} and len(places) > 6
    assert augment(images, keys, Augmentation()) is images


def test_what_is_held_out_is_chosen_by_content_and_never_trained_on(image_recipe):
    from cairn.training import recipe as recipes

    feed = open_data(recipes.load(image_recipe).data, 7)[1]
    (source,) = feed.sources
    assert not set(source.train.tolist()) & set(source.held_out.tolist()) and len(source.train) + len(source.held_out) == 240
    assert 20 < len(source.held_out) < 80 and (feed.held_out(1000).index == source.held_out).all()
    seen = feed.samples(np.arange(len(source.train)))
    assert sorted(seen.index.tolist()) == source.train.tolist(), "one pass reads each image once"


def test_a_perceptron_trains_its_layers_alone(image_recipe, image_run, tmp_path):
    recipe = image_recipe | {"model": {"name": "mlp", "hidden_sizes": [16, 8]}}
    first = train(recipe, tmp_path / "first").newest()
    model = first.model()
    assert model.architecture.parameter_count() == sum(parameter.numel() for parameter in model.parameters())
    assert type(model.architecture).from_hf(first.config) == model.architecture
    second = fork(first, tmp_path / "second", ["trainable=[layers.*]", "training.samples=16 steps"], fresh=["optimizer"]).newest().model()
    assert torch.equal(second.classifier.weight, model.classifier.weight) and not torch.equal(second.layers[0].weight, model.layers[0].weight)


def test_a_branch_is_annealed_and_a_run_continued_on_other_images(image_run, image_file, tmp_path):
    from cairn.continual.pretrain import anneal, continue_

    branch = anneal(image_run.checkpoints()[1], tmp_path / "a", "2 steps")
    assert branch.newest().units == 10 * 32
    onward = continue_(image_run.newest(), tmp_path / "c", {"more": str(image_file)}, "64 samples", replay=0.5)
    assert onward.newest().units == 14 * 32 and set(onward.recipe.data.sources) == {"bars", "more"}
    with pytest.raises(InputError, match="written in samples or steps"):
        anneal(image_run.newest(), tmp_path / "b", "64 tokens")


def test_a_checkpoint_of_other_classes_is_refused(image_run, tmp_path):
    images = np.zeros((20, 8, 8), np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None]
    np.savez(tmp_path / "other.npz", images=images, labels=np.array(["cat", "dog"] * 10))
    with pytest.raises(MismatchError, match="class 'cat', which the checkpoint does not know"):
        fork(image_run.newest(), tmp_path / "r", [f"data.sources.bars.images={tmp_path / 'other.npz'}"])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objective=causal-lm", "the objective 'causal-lm' needs tokens, and the field 'images' gives images and labels"),
        ("model={name: llama}", "a 'llama' reads tokens, and the field 'images' gives images and labels"),
        ("callbacks=[{name: sample}]", "the callback 'sample' needs tokens, and the field 'images' gives images and labels"),
        ("callbacks=[{name: evaluate}]", "the callback 'evaluate' needs tokens"),
        ("callbacks=[{name: sparse}]", "the callback 'sparse' needs tokens"),
        ("callbacks=[{name: evaluate, measurements: [accuracy]}]", None),
        ("training.tokens=1M", "the field 'images' counts samples; write the length of the run as training.samples"),
        ("training.samples=1k tokens", "written in tokens, and this field counts samples"),
        ("schedule.warmup=1k tokens", "written in tokens, and this field counts samples"),
        ("checkpoint.every=20%", None),
        ("schedule.warmup=64", None),
    ],
)
def test_a_field_says_what_it_does_not_know(override, sentence, image_recipe):
    from cairn.training import recipe as recipes

    if sentence is None:
        assert recipes.load(image_recipe, [override])
        return
    with pytest.raises(InputError, match=sentence):
        recipes.load(image_recipe, [override])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objective=classification", "the objective 'classification' needs labels, and the field 'text' gives tokens"),
        ("model={name: vit}", "a 'vit' reads images, and the field 'text' gives tokens"),
        ("training.samples=1k", "the field 'text' counts tokens; write the length of the run as training.tokens"),
        ("data={name: pictures}", "There is no field 'pictures'"),
    ],
)
def test_text_does_not_know_what_images_know(override, sentence, small_recipe):
    from cairn.training import recipe as recipes

    with pytest.raises(InputError, match=sentence):
        recipes.load(small_recipe, [override])


def test_text_is_measured_as_text_and_images_as_images(image_run, small_run):
    with pytest.raises(InputError, match=r"carries no tokenizer\.json, so tokens cannot be given to its model"):
        evaluate(image_run.newest(), ["held-out"])
    with pytest.raises(InputError, match=r"carries no preprocessor_config\.json, so images cannot be given to its model"):
        evaluate(small_run.newest(), ["accuracy"])


def test_clothes_are_told_apart(real_data, image_recipe, tmp_path):
    data = {"name": "images", "sources": {"clothes": {"images": "fashion-mnist-10k", "subset": 2000}}}
    model = {"name": "vit", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7}
    run = train({**image_recipe, "data": data, "model": model}, tmp_path / "r", ["training.samples=150 steps", "training.batch=64", "training.micro_batch=64"])
    accuracy = evaluate(run.newest(), store=False)[0]
    assert run.newest().config["id2label"]["9"] == "Ankle boot" and accuracy.n > 900
    assert float(accuracy.interval.split(" to ")[0]) > 0.4, "four times as often as by guessing"
