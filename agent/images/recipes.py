"""What `muster image build` can make. Knows the list and when an image is up to date; each recipe has a file of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agent.errors import AgentError
from agent.images import busybox, debian, fc_tiny, tiny
from agent.images.files import locked, sweep
from agent.images.packages import Progress
from agent.images.recipe import BuiltImage, Recipe, default_cache

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (tiny.RECIPE, busybox.RECIPE, fc_tiny.RECIPE, debian.RECIPE)}

__all__ = ["RECIPES", "BuiltImage", "Recipe", "build"]


async def build(
    name: str,
    image_dir: Path,
    *,
    progress: Progress,
    cache_dir: Path | None = None,
    docker: Sequence[str] = ("docker",),
    force: bool = False,
) -> BuiltImage:
    """Makes the image `name` in `image_dir`, or finds it up to date; `progress` gets a line for each step.

    Packages are kept in `cache_dir` ($MUSTER_CACHE, else ~/.cache/muster). `docker` is the command a container image goes to.
    An interrupted build leaves no image; two builds at once wait for each other. Raises AgentError: no such recipe, or
    what to install.
    """
    if name not in RECIPES:
        raise AgentError(f"there is no recipe {name}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    async with locked(image_dir / ".build.lock"):
        if not force and (built := await recipe.current(image_dir, docker)):
            progress(f"{name} is up to date")
            return built
        if missing := recipe.missing(docker):
            raise AgentError(f"cannot build {name}: {missing}")
        sweep(image_dir, recipe.file)
        return await recipe.make(image_dir, cache_dir or default_cache(), docker, progress)
