"""Small material that several rooms' tests share: documents, a recipe of seconds, a finished run."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest

ANNEAL = {"training.tokens": "8 steps", "optimizer.lr": "now", "schedule": {"name": "linear", "start": "now"}}
WORDS = ["the", "stone", "on", "trail", "marks", "way", "that", "was", "walked", "before", "and", "can", "again", "who", "comes", "after", "rain"]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is absent."""
    folder = os.environ.get("CAIRN_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CAIRN_DATA does not name a folder of data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def smollm(real_data, tmp_path_factory) -> Path:
    """The real open checkpoint SmolLM2-135M-Instruct, imported from its GGUF file in seconds; read only."""
    pytest.importorskip("gguf")
    from cairn.checkpoint.foreign.importing import import_

    source = real_data / "smollm2-135m-gguf"
    if not source.is_dir():
        pytest.skip("CAIRN_DATA has no smollm2-135m-gguf")
    return import_(source, tmp_path_factory.mktemp("open") / "smollm").path


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    """Three hundred small documents as JSON lines, always the same."""
    chooser = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "walks.jsonl"
    lines = ["\n".join(f"{' '.join(chooser.sample(WORDS, chooser.randint(6, 12)))}." for _ in range(chooser.randint(2, 6))) for _ in range(300)]
    lines = [line.replace(" rain ", " (rain again) ").replace(" trail ", " [trail] ") for line in lines]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def small_recipe(corpus_file) -> dict:
    """A recipe that trains in seconds: two layers, twenty steps, a checkpoint every five."""
    return {
        "seed": 7,
        "model": {"name": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"tokenizer": "byte", "sources": {"walks": {"corpus": str(corpus_file)}}, "sequence_length": 32, "held_out": 0.1},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "3 steps"},
        "training": {"tokens": "20 steps", "batch": 256, "compile": False},
        "checkpoint": {"every": "5 steps"},
    }


@pytest.fixture(scope="session")
def small_run(small_recipe, tmp_path_factory):
    """A finished run of `small_recipe` with four checkpoints; read only."""
    from cairn.training.run import train

    return train(small_recipe, tmp_path_factory.mktemp("runs") / "small")


ADAPTER = {"name": "lora", "rank": 4, "targets": ["attention", "down_proj"], "dropout": 0.1}


@pytest.fixture(scope="session")
def adapter_run(small_run, tmp_path_factory):
    """A fork of `small_run` that has trained an adapter for ten steps, a checkpoint every five; read only."""
    from cairn.training.run import fork

    return fork(small_run.checkpoints()[-1], tmp_path_factory.mktemp("adapters") / "run", [f"adapter={json.dumps(ADAPTER)}", "training.tokens=30 steps"])


@pytest.fixture(scope="session")
def image_file(tmp_path_factory) -> Path:
    """240 grey images of 8 x 8 in three classes, each with a bright bar in a place of its own, as an .npz file; always the same."""
    chooser = np.random.default_rng(0)
    labels = np.arange(240) % 3
    images = chooser.integers(0, 100, (240, 8, 8))
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 1 : 2 * label + 3] += 120
    path = tmp_path_factory.mktemp("images") / "bars.npz"
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return path


@pytest.fixture(scope="session")
def image_recipe(image_file) -> dict:
    """A vision transformer on `image_file` that trains in a second: one layer, twelve steps, a checkpoint every four."""
    return {
        "seed": 7,
        "model": {"name": "vit", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4},
        "data": {"name": "images", "sources": {"bars": {"images": str(image_file)}}, "held_out": 0.2, "augmentation": {"mirror": True, "shift": 1}},
        "objective": "classification",
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "3 steps"},
        "training": {"samples": "12 steps", "batch": 32, "micro_batch": 16, "compile": False},
        "checkpoint": {"every": "4 steps"},
    }


@pytest.fixture(scope="session")
def image_run(image_recipe, tmp_path_factory):
    """A finished run of `image_recipe` with three checkpoints; read only."""
    from cairn.training.run import train

    return train(image_recipe, tmp_path_factory.mktemp("runs") / "images")


@pytest.fixture(scope="session")
def drawing_recipe(image_recipe) -> dict:
    """A variational autoencoder on the images of `image_recipe`, for as many steps."""
    data = {key: value for key, value in image_recipe["data"].items() if key != "augmentation"} | {"mean": [0.0], "std": [1.0]}
    return {**image_recipe, "model": {"name": "vae", "hidden_sizes": [16], "latent_size": 3}, "data": data, "objective": "elbo"}


@pytest.fixture(scope="session")
def drawing_run(drawing_recipe, tmp_path_factory):
    """A finished run of `drawing_recipe` with three checkpoints; read only."""
    from cairn.training.run import train

    return train(drawing_recipe, tmp_path_factory.mktemp("runs") / "drawings")


@pytest.fixture(scope="session")
def sentence_file(tmp_path_factory) -> Path:
    """160 sentences whose words end in the letter of their tag, but for some that have no tag; always the same."""
    chooser = random.Random(0)
    path = tmp_path_factory.mktemp("sentences") / "tagged.jsonl"
    lines = []
    for _ in range(160):
        tags = [chooser.choice(["noun", "verb", "name", None]) for _ in range(chooser.randint(1, 9))]
        lines.append({"words": [f"{chooser.choice(WORDS)}{(tag or '?')[0] * 2}" for tag in tags], "tags": tags})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def word_recipe(sentence_file, image_recipe) -> dict:
    """A tagger on `sentence_file` that trains in a second: twelve steps, a checkpoint every four."""
    data = {"name": "words", "sources": {"tagged": {"sentences": str(sentence_file)}}, "held_out": 0.2, "buckets": 256}
    return {**image_recipe, "model": {"name": "gru-tagger", "hidden_size": 8}, "data": data, "objective": "token-classification"}


@pytest.fixture(scope="session")
def word_run(word_recipe, tmp_path_factory):
    """A finished run of `word_recipe` with three checkpoints; read only."""
    from cairn.training.run import train

    return train(word_recipe, tmp_path_factory.mktemp("runs") / "words")


@pytest.fixture(scope="session")
def staged(small_recipe) -> dict:
    """Twelve steps on a trunk whose cosine is cut short, two anneals of eight in other orders, their average."""
    return {
        **small_recipe,
        "schedule": {"name": "cosine", "warmup": "3 steps", "horizon": "20 steps"},
        "training": {**small_recipe["training"], "tokens": "12 steps"},
        "checkpoint": {"every": "50%"},
        "stages": [
            {"name": "web"},
            *({"name": f"anneal-{seed}", "from": "web", "set": {**ANNEAL, "seed": seed}} for seed in (42, 666)),
            {"name": "soup", "from": ["anneal-42", "anneal-666"], "operation": "average"},
        ],
    }


@pytest.fixture(scope="session")
def staged_run(staged, tmp_path_factory):
    """A finished run of `staged`; read only."""
    from cairn.training.run import train

    return train(staged, tmp_path_factory.mktemp("runs") / "staged")


@pytest.fixture(scope="session")
def s3():
    """A bucket of a server on the loopback that speaks S3; the environment says where it is."""
    pytest.importorskip("s3fs")
    from cairn.checkpoint.format.place import file_system, place

    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        file_system(place("s3://stones")).mkdir("stones")
        yield "s3://stones"
    server.stop()
