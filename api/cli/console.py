"""`muster console`: what a VM said last."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from api.cli.common import connection

if TYPE_CHECKING:
    from api.client import Client


@click.command()
@click.argument("name", metavar="ENV/VM")
@click.option("--tail", type=click.IntRange(1, 1000), default=100, show_default=True, help="So many of the last lines.")
@connection
def console(name: str, tail: int, connect: Callable[[], Client]) -> None:
    """Print the last lines a VM wrote on its console.

    \b
      muster console web/db --tail 20

    Control characters are shown and not obeyed: a guest must not steer your terminal.
    """
    from api.cli.describe import find_vm

    with connect() as client:
        said = client.console(find_vm(client.vms(), name).id, tail)
    shown = "".join(char if char in "\n\t" or char.isprintable() else repr(char)[1:-1] for char in said)
    click.echo(shown.removesuffix("\n"))
