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


def test_a_key_that_a_recipe_does_not_name_changes_nothing_and_any_that_it_names_does(small_recipe, monkeypatch):
    from cairn.training.recipe import Training

    before = bases.key_of(small_recipe)
    assert bases.key_of(small_recipe | {"training": small_recipe["training"] | {"clip": Training.model_fields["clip"].default}}) == before
    changed = [{"training": small_recipe["training"] | {"clip": 0.5}}, {"optimizer": {"name": "adamw", "lr": 1.5e-3}}, {"objective": "span-corruption"}]
    changed += [
        {"model": small_recipe["model"] | {"rope_theta": 5e5}},
        {"schedule": {"name": "constant"}},
        {"callbacks": [{"name": "sparse", "sparsity": 0.5}]},
    ]
    keys = [bases.key_of(small_recipe | change) for change in changed]
    assert len({before, *keys}) == 1 + len(keys)
    fields = {name: field for name, field in Training.model_fields.items() if name != "log_every"}
    monkeypatch.setattr(Training, "__pydantic_fields__", fields)  # a version of the package that did not have this key yet
    assert bases.key_of(small_recipe) == before


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
