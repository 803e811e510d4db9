"""Every command that reads a checkpoint reads one in a bucket; several processes train into it; what fails is one sentence."""

import math

import pytest
import torch
import yaml

from cairn.checkpoint.format import read
from cairn.checkpoint.format.place import place, sizes
from tests import faults

pytest.importorskip("upath")


@pytest.fixture(scope="module")
def bucket_run(s3, small_recipe, tmp_path_factory):
    """A run whose checkpoints lie in a bucket: two processes until step 10, one until step 20."""
    folder = tmp_path_factory.mktemp("bucket")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(small_recipe))
    settings = ["checkpoint.every=10 steps", f"checkpoint.store={s3}/run", "training.tokens=10 steps", "parallel.shard=2"]
    done = faults.cairn("train", str(folder / "recipe.yaml"), *settings, "--run", str(folder / "run"))
    assert done.returncode == 0, done.stderr
    return f"{s3}/run", folder / "run"


def test_commands_over_a_store(bucket_run, s3, cairn, tmp_path):
    url, run = bucket_run
    assert sum(name.startswith("fragment-") for name in sizes(place(f"{url}/checkpoints/step-00000010"))) == 2  # each process its own
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "checkpoints.url").write_text(f"{s3}/other/checkpoints\n")
    refused = cairn("resume", stranger, "training.tokens=20 steps")
    assert refused.status == 2 and f"{s3}/other/checkpoints" in refused.err and "--follow" in refused.err, "a file alone makes no connection"
    resumed = cairn("resume", run, "parallel.shard=1", "training.tokens=20 steps", "--json")  # one's own run needs no leave
    newest = read.open(url)
    assert resumed.status == 0 and newest.step == 20 and resumed.document["digest"] == newest.digest, resumed.err
    shown = cairn("show", url, "--json").document
    assert shown["step"] == 20 and shown["digest"] == newest.digest
    assert cairn("verify", url, "--json").document["sound"]
    assert [entry["here"] for entry in cairn("log", url, "--json").document] == [True, True]
    measured = cairn("evaluate", f"{url}/checkpoints/step-00000020", "--tasks", "held-out", "--json")
    assert measured.status == 0 and math.isfinite(measured.document[0]["value"]), measured.err
    assert [path.suffix for path in place(f"{url}/results").iterdir()] == [".json"]
    assert cairn("average", url, "--last", "2", "-o", f"{s3}/mean").status == 0
    assert read.open(f"{s3}/mean").lineage.parents[0].path == "run/checkpoints/step-00000010"
    assert cairn("generate", url, "--prompt", "the", "--new-tokens", "3").status == 0
    assert cairn("export", url, "-o", tmp_path / "plain", "--whole").status == 0
    assert read.open(tmp_path / "plain").digest == newest.digest and cairn("verify", tmp_path / "plain").status == 0
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(model.state_dict()["model.norm.weight"], newest.tensors["model.norm.weight"].load())


def test_what_a_store_refuses_is_one_sentence(s3, cairn, tmp_path):
    assert cairn("export", tmp_path, "-o", f"{s3}/x", "--whole", "--dtype", "bfloat16").status == 2
    for answer in (cairn("show", "s3://no-such-bucket/x"), cairn("show", f"{s3}/nothing"), cairn("verify", "nosuch://a/b"), cairn("show", f"{s3}/x", "--json")):
        assert answer.status == 2 and len(answer.err.strip().splitlines()) == 1 and answer.err.startswith("cairn: "), answer.err
    for command, words in (("show", "cannot be read"), ("verify", "Could not connect")):
        done = faults.cairn(command, f"{s3}/run", AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1")
        assert done.returncode == 2 and "Traceback" not in done.stderr and words in done.stderr, done.stderr
