"""How a recipe is written."""
