"""`muster image`: makes base images on this machine. The only commands beside `agent` that load the agent's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from api.cli.common import Failure, default_data_dir, note, output_option, say, write_data

_image_dir = click.option(
    "--image-dir",
    envvar="MUSTER_IMAGE_DIR",
    type=click.Path(path_type=Path),
    help="Folder of base images [/var/lib/muster/images for root].",
)
_docker = click.option(
    "--docker", envvar="MUSTER_DOCKER", default="docker", show_default=True, metavar="COMMAND", help="docker, podman."
)


@click.group()
def image() -> None:
    """Make base images, and list those of this machine."""


@image.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_image_dir
@_docker
@click.option("--force", is_flag=True, help="Make it anew even if it is up to date.")
@output_option()
def build(names: tuple[str, ...], image_dir: Path | None, docker: str, force: bool, output: str) -> None:
    """Make images from Debian packages; `muster image list` names them."""
    import asyncio
    import shlex

    from agent.images import RECIPES
    from agent.images import build as build_image

    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise click.UsageError(f"there is no recipe {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    folder = (image_dir or default_data_dir() / "images").absolute()
    built = []
    for name in names:
        # Steps go to standard error: standard output tells what was made.
        one = asyncio.run(build_image(name, folder, progress=note, docker=shlex.split(docker), force=force))
        built.append(_record(one))
        if output == "table":
            say(f"image {one.reference} is ready{f' in {one.path}' if one.path else ''}, {one.size / 2**20:.1f} MiB")
    if output != "table":
        write_data(built, output)


def _record(built: Any) -> dict[str, Any]:
    names = ("name", "reference", "format", "version", "digest", "size", "built_at")
    return {**{name: getattr(built, name) for name in names}, "path": str(built.path) if built.path else None}


@image.command()
@click.argument("name")
@click.argument("url")
@click.option("--sha256", required=True, metavar="HEX", help="What `sha256sum` says of the file.")
@click.option("--max-size", type=click.IntRange(min=1), default=65536, show_default=True, metavar="MIB", help="Refuse more.")
@_image_dir
def pull(name: str, url: str, sha256: str, max_size: int, image_dir: Path | None) -> None:
    """Fetch a qcow2 or raw image; one that was broken off is gone on from where it stopped."""
    import asyncio

    from agent.errors import AgentError
    from agent.images.pull import Wanted
    from agent.images.pull import pull as pull_image

    folder = (image_dir or default_data_dir() / "images").absolute()
    try:
        path = asyncio.run(pull_image(Wanted(name, url, sha256), folder, note, max_size=max_size * 2**20))
    except AgentError as error:
        raise Failure(error.message) from None
    say(f"image {name} is ready in {path}, {path.stat().st_size / 2**20:.1f} MiB")


@image.command()
@click.argument("name")
@_image_dir
def remove(name: str, image_dir: Path | None) -> None:
    """Remove an image from this machine; one that disks of VMs stand on stays."""
    import asyncio

    from agent.errors import AgentError
    from agent.images.pull import remove as remove_image

    try:
        gone = asyncio.run(remove_image(name, (image_dir or default_data_dir() / "images").absolute()))
    except AgentError as error:
        raise Failure(error.message) from None
    say(f"image {name} is removed, {gone.size / 2**20:.1f} MiB")


@image.command("list")
@_image_dir
@output_option()
def list_(image_dir: Path | None, output: str) -> None:
    """List what can be made, and what lies in this machine's image folder.

    `muster get images` lists the images of the whole fleet.
    """
    from agent.images import RECIPES
    from agent.images.catalogue import list_images
    from api.cli.words import write_table

    folder = (image_dir or default_data_dir() / "images").absolute()
    try:
        files = list_images(folder) if folder.is_dir() else ()
    except OSError as error:
        raise Failure(f"{folder} cannot be read: {error.strerror}") from None
    if output != "table":
        recipes = [{"name": recipe.name, "summary": recipe.summary} for recipe in RECIPES.values()]
        found = [{"name": f.name, "format": f.format, "size": f.size, "path": str(f.path)} for f in files]
        write_data({"recipes": recipes, "images": found}, output)
        return
    say("Recipes (muster image build NAME):")
    write_table(("NAME", "WHAT IT IS"), [(recipe.name, recipe.summary) for recipe in RECIPES.values()], indent="  ")
    say("")
    say(f"In {folder}:")
    if files:
        write_table(("NAME", "FORMAT", "SIZE"), [(f.name, f.format, f"{f.size / 2**20:.1f}M") for f in files], indent="  ")
    else:
        say("  nothing yet")
