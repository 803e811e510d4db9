"""The graph of descent as text and as a picture's layout; trees verified whole."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cairn
from cairn.checkpoint.format import read
from cairn.errors import NotFoundError
from cairn.registry import descent
from cairn.registry.compare import diff
from cairn.registry.tree import verify_all
from tests.faults import flip
from tests.registry.conftest import edit_json

dags = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=30).map(
    lambda edges: [(f"{max(e):02d}", f"{min(e):02d}") for e in edges if e[0] != e[1]]
)


@given(dags)
def test_a_graph_without_circles_is_ordered_and_laid_out(edges):
    nodes = sorted({node for edge in edges for node in edge})
    assert descent.in_circles(edges) == []
    order = descent.ordered(nodes, edges)
    assert sorted(order) == nodes and all(order.index(child) < order.index(parent) for child, parent in edges)
    spots = {spot.digest: spot for spot in descent.layout(nodes, edges)}
    assert len({(s.column, s.row) for s in spots.values()}) == len(nodes)
    assert all(spots[child].column > spots[parent].column for child, parent in edges)


@given(dags, st.data())
def test_exactly_the_nodes_of_a_circle_are_found(edges, data):
    parents = descent.neighbours(edges)
    below = [(child, node) for child in parents for node in descent.reachable(parents, child, first=False)]
    if not below:
        return
    child, ancestor = data.draw(st.sampled_from(sorted(below)))
    found = descent.in_circles([*edges, (ancestor, child)])
    down = descent.neighbours((b, a) for a, b in edges)
    between = set(descent.reachable(parents, child)) & set(descent.reachable(down, ancestor))
    assert set(found) == between


def test_the_drawing_tells_of_forks_merges_and_other_hardware():
    def entry(digest, parents, created, act="run: train", changed=(), cores=2, here=True):
        return {"generation": 0, "digest": digest * 12, "parents": [p * 12 for p in parents], "step": 5, "path": f"p/{digest}", "here": here, "act": act,
                "changed": list(changed), "created": created, "hardware": {"cores": cores}}  # fmt: skip

    lines = descent.draw(
        [
            entry("m", "ab", "5", "operation: slerp"),
            entry("a", "r", "4", "run: resume", cores=8),
            entry("b", "r", "3", "run: fork", ["optimizer.lr: 1 -> 2"]),
            entry("r", "", "1", here=False),
        ]
    )
    assert [line.split("  ")[0] for line in lines if "*" in line] == ["* mmmmmmmmmmmm", "* | aaaaaaaaaaaa", "| * bbbbbbbbbbbb", "* rrrrrrrrrrrr"]
    text = "\n".join(lines)
    assert "made from aaaaaaaaaaaa, bbbbbbbbbbbb" in text and "on other hardware: cores 2 -> 8" in text and "changed optimizer.lr: 1 -> 2" in text
    assert "(not here)" in lines[-1]


def test_log_draws_the_whole_descent(zoo):
    entries = cairn.log(zoo / "mixed")
    lines = descent.draw(entries)
    acts = [entry["act"] for entry in entries]
    assert acts[0] == "operation: slerp" and {"run: train", "run: resume", "run: fork"} < set(acts)
    # Mixed from two lines that meet at step 10: each checkpoint stands once.
    assert sum("*" in line.split("  ")[0] for line in lines) == len(entries) == 7
    assert sum("made from" in line for line in lines) == 1 and sum("below" in line for line in lines) == 1


def test_diff_says_recipe_data_code_machine_weights_and_results(zoo):
    run, branch = zoo / "run/checkpoints/step-00000015", zoo / "run/checkpoints/step-00000020"
    found = diff(run, branch)
    (loss,) = [row for row in found.results if row["metric"] == "loss"]
    assert loss["difference"] == pytest.approx(loss["second"] - loss["first"]) and loss["low"] < loss["difference"] < loss["high"]
    assert found.distances["model.layers.0"] > 0 and found.versions == {} and found.relation == "the first is an ancestor of the second, 1 back"
    forked = diff(run, zoo / "branch")
    assert forked.recipe["seed"] == (7, 9) and forked.results == []


def test_code_and_machine_are_compared(zoo, tmp_path):
    shutil.copytree(zoo / "average", tmp_path / "other")

    def elsewhere(document):
        document["versions"]["torch"], document["hardware"]["cores"] = "1.0", 512

    edit_json(tmp_path / "other/lineage.json", elsewhere)
    (tmp_path / "other/manifest.json").write_bytes(_again(tmp_path / "other"))
    found = diff(zoo / "average", tmp_path / "other")
    assert found.versions["torch"][1] == "1.0" and found.hardware["cores"][1] == 512 and found.same_state


def _again(folder):
    from cairn.checkpoint.format.manifest import Manifest, entry_of

    return Manifest.of({p.name: entry_of(p.read_bytes()) for p in folder.iterdir() if p.name != "manifest.json"}).dump()


def test_a_tree_is_verified_whole(zoo, tmp_path):
    shutil.copytree(zoo, tmp_path / "zoo")
    clean = verify_all(tmp_path / "zoo")
    assert clean.sound and len(clean.reports) == 9 and clean.absent == {}
    shutil.rmtree(tmp_path / "zoo/average")
    damaged = tmp_path / "zoo/run/checkpoints/step-00000010"
    flip(damaged / "model.safetensors", 4000)
    found = verify_all(tmp_path / "zoo")
    assert not found.sound and [r.path for r in found.reports if not r.sound] == [damaged]
    assert found.absent == {tmp_path / "zoo/bf16": [read.open(zoo / "average").digest]}
    with pytest.raises(NotFoundError):
        verify_all(tmp_path / "nowhere")
