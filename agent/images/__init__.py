"""Base images: recipes that make them, and the catalogue of what lies in an image directory."""

from agent.images.recipes import RECIPES, BuiltImage, Recipe, build

__all__ = ["RECIPES", "BuiltImage", "Recipe", "build"]
