"""Sources of images: what is read from files, and one plain sentence for what cannot be trained on. Nothing is written before that."""

import json
import shutil

import numpy as np
import pytest

from cairn.checkpoint.format import read
from cairn.errors import CairnError, DamagedError, InputError, MismatchError, NotFoundError
from cairn.fields.vision.image_sets import Shape, open_images
from cairn.fields.vision.processor import FILE, ImageProcessor
from cairn.training.run import train


def grey(count=6, side=4):
    return np.arange(count * side * side).reshape(count, side, side).astype(np.uint8)


def saved(path, images, labels=None, **names):
    np.savez(path, **{"images": images, "labels": np.arange(len(images)) % 2 if labels is None else labels, **names})
    return str(path)


def test_an_npz_file_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    from cairn.fields.vision import image_sets

    path = saved(tmp_path / "a.npz", grey())
    first = open_images(path)
    assert first.images.shape == (6, 4, 4, 1) and first.classes == ["0", "1"] and first.labels.tolist() == [0, 1] * 3
    monkeypatch.setattr(image_sets, "_fill", lambda *_: pytest.fail("read again"))
    assert open_images(path).digest == first.digest
    monkeypatch.undo()
    saved(tmp_path / "a.npz", grey(8))
    assert len(open_images(path).images) == 8 and open_images(path).digest != first.digest


def test_shares_become_pixels_and_words_are_classes(tmp_path):
    images = np.array([0, 0.5, 1, 0.2]).reshape(1, 2, 2).repeat(2, 0)
    found = open_images(saved(tmp_path / "a.npz", images, np.array(["stone", "cairn"])))
    assert found.images[0].reshape(-1).tolist() == [0, 128, 255, 51] and found.classes == ["cairn", "stone"] and found.labels.tolist() == [1, 0]


def test_folders_of_pictures_are_classes(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    for name, value in (("cat", 10), ("dog", 200)):
        (tmp_path / name).mkdir()
        for number in range(3):
            image_module.fromarray(np.full((5, 7), value + number, np.uint8)).save(tmp_path / name / f"{number}.png")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.png").write_bytes(b"no picture")
    found = open_images(str(tmp_path), Shape(size=4))
    assert found.images.shape == (6, 4, 4, 1) and found.classes == ["cat", "dog"] and found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.images[:, 0, 0, 0].tolist() == [10, 11, 12, 200, 201, 202]
    assert open_images(str(tmp_path), Shape(4, 3)).images.shape == (6, 4, 4, 3)
    with pytest.raises(InputError, match=r"5 x 7; set data\.size"):
        open_images(str(tmp_path))


def not_finite(images):
    images = images.astype(np.float32) / 255
    images[4, 1, 2] = np.nan
    return images


HOSTILE = {
    "nan": (lambda path: saved(path, not_finite(grey())), InputError, r"image 4 \(1 in all\) has values that are not finite numbers"),
    "infinite": (lambda path: saved(path, np.where(np.isnan(not_finite(grey())), np.inf, 0.5)), InputError, "not finite numbers"),
    "zero images": (lambda path: saved(path, np.zeros((0, 4, 4), np.uint8), np.zeros(0, np.int64)), InputError, "holds no images"),
    "not images": (lambda path: saved(path, np.zeros((6, 4), np.uint8)), InputError, "an array of 6 x 4 uint8 is no set of images"),
    "five channels": (lambda path: saved(path, np.zeros((6, 4, 4, 5), np.uint8)), InputError, "is no set of images"),
    "too bright": (lambda path: saved(path, grey().astype(np.int64) * 9), InputError, "whole numbers from 0 to 255"),
    "too large shares": (lambda path: saved(path, grey() / 1.0), InputError, "shares from 0 to 1"),
    "a label too few": (lambda path: saved(path, grey(), np.zeros(5, np.int64)), InputError, "one label for each image"),
    "labels that are fractions": (lambda path: saved(path, grey(), np.linspace(0, 1, 6)), InputError, "whole numbers or words"),
    "pickled": (lambda path: saved(path, np.array([object()] * 6, object)), DamagedError, "not an .npz file of plain arrays"),
    "cut short": (lambda path: path.write_bytes(b"PK\3\4 nothing"), DamagedError, "not an .npz file of plain arrays"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_trained_on_is_refused_in_one_sentence(case, tmp_path, image_recipe):
    make, kind, sentence = HOSTILE[case]
    path = tmp_path / "hostile.npz"
    make(path)
    recipe = image_recipe | {"data": {"name": "images", "sources": {"a": {"images": str(path)}}}}
    with pytest.raises(kind, match=sentence) as raised:
        train(recipe, tmp_path / "run")
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_arrays_of_other_names_have_to_be_named(tmp_path):
    np.savez(tmp_path / "a.npz", pictures=grey(), kinds=np.arange(6) % 2)
    path = str(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"has the arrays pictures, kinds; say which are the images and the labels: arrays: \[IMAGES, LABELS\]"):
        open_images(path)
    assert len(open_images(path, arrays=("pictures", "kinds")).images) == 6
    with pytest.raises(InputError, match=r"no array 'picture'\. Did you mean 'pictures'"):
        open_images(path, arrays=("picture", "kinds"))


def test_one_class_only_is_nothing_to_learn(tmp_path, image_recipe):
    path = saved(tmp_path / "a.npz", grey(40, 8), np.full(40, 5))
    with pytest.raises(InputError, match=r"All samples are of one class \('5'\); a classifier needs at least two"):
        train(image_recipe | {"data": {"name": "images", "sources": {"a": {"images": path}}}}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spec", "kind", "sentence"),
    [
        ("nowhere.npz", NotFoundError, "There is no file nowhere.npz"),
        ("fashion-mnist-10", NotFoundError, "Did you mean 'fashion-mnist-10k'"),
        ("gsm8k", InputError, "not one of labelled images"),
        ("EMPTY", InputError, "holds no pictures: a folder of images has one folder for each class"),
    ],
)
def test_what_is_not_there_is_named(spec, kind, sentence, tmp_path):
    with pytest.raises(kind, match=sentence):
        open_images(str(tmp_path) if spec == "EMPTY" else spec)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    pytest.importorskip("PIL")
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"no picture")
    with pytest.raises(DamagedError, match=r"cat/1\.png is not a picture that can be read"):
        open_images(str(tmp_path), Shape(4))


def test_a_directory_without_the_processor_and_one_that_does_something_else(image_run, tmp_path):
    with pytest.raises(NotFoundError, match=f"{FILE} is missing"):
        ImageProcessor.load(tmp_path)
    for text, kind in (('{"size": 3, "do_center_crop": true}', MismatchError), ('{"size": "big"}', MismatchError), ("[1]", DamagedError), ("{", DamagedError)):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(kind):
            ImageProcessor.load(tmp_path)
    (tmp_path / FILE).write_bytes((image_run.newest().path / FILE).read_bytes())
    assert ImageProcessor.load(tmp_path).files() == ImageProcessor.load(image_run.newest().path).files()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"architectures": ["ViTModel"]}, "is not an image classifier"),
        ({"image_size": [8, 12]}, "is not square"),
        ({"id2label": {"0": "a", "2": "b"}}, "numbered from 0 without a gap"),
        ({"num_attention_heads": 3}, "not a multiple of num_attention_heads"),
        ({"patch_size": 16}, "is larger than the images"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        ({"model_type": "llama"}, "hidden_act=.gelu. is not supported for .llama."),
    ],
)
def test_a_config_of_something_else_is_refused(config, sentence, image_run, tmp_path):
    shutil.copytree(image_run.newest().path, tmp_path / "m", ignore=shutil.ignore_patterns("manifest.json", "lineage.json", "trainer.json"))
    described = json.loads((tmp_path / "m/config.json").read_text()) | config
    (tmp_path / "m/config.json").write_text(json.dumps(described))
    with pytest.raises(CairnError, match=sentence) as raised:
        read.open(tmp_path / "m").model()
    assert "\n" not in str(raised.value)
