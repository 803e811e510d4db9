"""Base checkpoints of studies: trained once, found by what they are."""

from cairn.studies import bases


def test_a_base_is_trained_once_and_anything_that_changes_it_makes_another(small_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path))
    said = []
    recipe = small_recipe | {"training": small_recipe["training"] | {"tokens": "4 steps"}}
    first = bases.trained(recipe, say=said.append)
    again = bases.trained(dict(recipe), say=said.append)
    assert len(said) == 1 and again.digest == first.digest and first.step == 4
    assert bases.key_of(recipe | {"seed": 8}) != bases.key_of(recipe) == bases.key_of(recipe, None) != bases.key_of(recipe, first)


def test_an_expert_begins_at_the_weights_of_its_parent_and_at_step_zero(small_recipe, tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path))
    recipe = small_recipe | {"training": small_recipe["training"] | {"tokens": "2 steps"}}
    still = recipe | {"optimizer": {"name": "adamw", "lr": 1e-12}, "seed": 3}
    base = bases.trained(recipe)
    expert = bases.trained(still, parent=base)
    assert expert.step == 2 and expert.lineage.name == "fork"
    assert all(torch.allclose(expert.tensors[name].load(), tensor.load(), atol=1e-8) for name, tensor in base.tensors.items())


def test_the_same_texts_are_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path))
    one, two, other = bases.text_file(["a", "b"]), bases.text_file(iter(["a", "b"])), bases.text_file(["b", "a"])
    assert one == two != other and one.read_text() == '{"text": "a"}\n{"text": "b"}\n'


def test_a_fork_is_made_once_and_settings_and_place_make_another(small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path))
    said, settings = [], ["training.tokens=16 steps", "optimizer.lr=1e-3"]
    first = bases.forked(small_run.checkpoints()[2], settings, say=said.append)
    assert first.newest().step == 16 and bases.forked(small_run.checkpoints()[2], settings, say=said.append).path == first.path and len(said) == 1
    assert bases.forked(small_run.checkpoints()[2], settings[:1], say=said.append).path != first.path and len(said) == 2
    assert first.newest().lineage.parents[0].step == 15
    assert bases.folder_for("a", 1) != bases.folder_for("a", 2) == bases.folder_for("a", 2)
