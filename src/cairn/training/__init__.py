"""Training: the recipe, one loop for every field, and the ingredients that go into it."""
