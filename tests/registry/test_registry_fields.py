"""Cards, explanations and hub folders of every field: what is said fits what the model reads."""

import json
import math

import numpy as np
import pytest

import cairn
from cairn.checkpoint.format import read
from cairn.errors import InputError, NotExplained, NotFoundError
from cairn.registry import modelcard
from cairn.registry.hub import export_hub

RUNS = {
    "image_run": ("image-classification", "AutoModelForImageClassification", "transformers", "8 x 8", "pixel_values"),
    "drawing_run": ("unconditional-image-generation", "drawn(", "cairn", "8 x 8", "pixel_values"),
    "word_run": ("token-classification", "cairn.explain", "cairn", "one sentence", "pieces"),
    "small_run": ("text-generation", "AutoModelForCausalLM", "transformers", "positions at once", "input_ids"),
}


@pytest.fixture(params=RUNS)
def subject(request):
    return request.getfixturevalue(request.param).newest(), *RUNS[request.param]


def test_a_card_speaks_of_what_the_model_reads(subject):
    checkpoint, task, code, library, bounds, _ = subject
    text = cairn.card(checkpoint)
    front = modelcard.front_matter(text)
    assert front["pipeline_tag"] == task and front["library_name"] == library and code in text and bounds in text
    assert "None" not in front["datasets"] and ("language model" in text) == (task == "text-generation")


def test_a_folder_for_a_hub_holds_card_signature_and_preprocessor(subject, tmp_path):
    checkpoint, task, _, library, _, inputs = subject
    made = export_hub(checkpoint, tmp_path / "hub")
    assert {"README.md", "signature.json", "config.json", "model.safetensors"} <= set(made["files"]) and made["completeness"] >= 0.7
    carried = {"preprocessor_config.json", "word_processor_config.json", "tokenizer.json"} & set(made["files"])
    assert len(carried) == 1 and (tmp_path / "hub" / min(carried)).read_bytes() == (checkpoint.path / min(carried)).read_bytes()
    assert json.loads((tmp_path / "hub/signature.json").read_text())["inputs"][0]["name"] == inputs
    if library == "transformers" and task == "image-classification":
        transformers = pytest.importorskip("transformers")
        assert transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hub").config.id2label == {0: "0", 1: "1", 2: "2"}
        assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "hub").size["height"] == 8


def test_a_stored_example_holds_and_is_what_the_model_says(subject, tmp_path):
    checkpoint, *_, inputs = subject
    export = cairn.export(checkpoint, tmp_path / "m")
    first, again = cairn.explain(export), cairn.explain(export)
    assert first.holds is None and again.holds is True and again.difference == 0 and first.inputs[0]["name"] == inputs
    assert first.outputs[0]["shape"][0] == "batch" and all(map(math.isfinite, first.example["scores"].values()))
    if inputs == "pixel_values" and first.outputs[1:]:
        assert not first.example["top"] and set(first.example["scores"]) == {"latent 0", "latent 1", "latent 2"}
        return
    best, others = first.example["top"][0], first.example["scores"]
    assert others[str(best["id"])] == max(others.values()) and sum(answer["probability"] for answer in first.example["top"]) <= 1 + 1e-9


def test_a_picture_may_be_named(image_run, image_file, tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    images = np.load(image_file)
    image_module.fromarray(images["images"][4]).save(tmp_path / "bar.png")
    found = cairn.explain(image_run.newest(), prompt=str(tmp_path / "bar.png"))
    assert {answer["text"] for answer in found.example["top"]} == {"0", "1", "2"} and found.holds is None
    with pytest.raises(NotFoundError, match="no picture"):
        cairn.explain(image_run.newest(), prompt=str(tmp_path / "none.png"))


def test_a_sentence_may_be_given(word_run):
    found = cairn.explain(word_run.newest(), prompt="stonenn rainvv").example
    assert [word for word, _ in found["tags"]] == ["stonenn", "rainvv"] and {tag for _, tag in found["tags"]} <= {"noun", "verb", "name"}
    with pytest.raises(NotExplained, match="no word"):
        cairn.explain(word_run.newest(), prompt="  ")


@pytest.mark.parametrize(("run", "file"), [("image_run", "preprocessor_config.json"), ("word_run", "word_processor_config.json")])
def test_without_its_preprocessor_or_classes_nothing_is_explained(run, file, request, tmp_path):
    export = cairn.export(request.getfixturevalue(run).newest(), tmp_path / "m")
    for name in ("manifest.json", "lineage.json", file):
        (export.path / name).unlink()
    with pytest.raises(NotExplained, match=f"has no {file}"):
        cairn.explain(export.path)
    config = json.loads((export.path / "config.json").read_text())
    del config["id2label"]
    (export.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotExplained, match="no id2label"):
        cairn.explain(export.path)


def test_what_reads_no_text_writes_none(image_run, word_run):
    for run, reads in ((image_run, "images"), (word_run, "words")):
        with pytest.raises(InputError, match=f"which reads {reads} and writes no text"):
            cairn.generate(run.newest(), "x")


def test_a_config_of_another_family_is_one_sentence(image_run, tmp_path):
    export = cairn.export(image_run.newest(), tmp_path / "m")
    for name in ("manifest.json", "lineage.json"):
        (export.path / name).unlink()
    config = json.loads((export.path / "config.json").read_text())
    for change, words in (({"model_type": "resnet"}, "whose inputs and outputs are not known"), ({"model_type": "mlp"}, "lacks the tensor")):
        (export.path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=words):
            cairn.explain(read.open(export.path))
