"""The recipe on the page about stages is one that trains: every stage of it is planned as the words beside it say."""

from pathlib import Path

import pytest
import yaml

from cairn.training import recipe as recipes
from cairn.training.stages import plan

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "stages.md"


def test_the_recipe_on_the_page():
    written = yaml.safe_load(PAGE.read_text().split("```yaml\n")[1].split("```")[0])
    web, anneal, other, soup = plan(recipes.load(written))
    assert (web.ends, anneal.begins, anneal.ends) == (400 * 2048, 400 * 2048, 500 * 2048)
    assert anneal.recipe.learning_rate(anneal.begins) == pytest.approx(web.recipe.pinned().learning_rate(web.ends), rel=1e-12)
    assert anneal.recipe.learning_rate(anneal.ends) == 0 and (anneal.recipe.seed, other.recipe.seed) == (42, 666)
    assert anneal.recipe.data.sources["docs"].weight == 27 and soup.stage.operation == "average"
    assert recipes.load("olmo2-two-stage-demo").training == recipes.load(written).training.model_copy(update={"compile": False})
