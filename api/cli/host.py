"""`muster host`: registers the machines that run VMs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from api.cli.common import connection, each, note, output_option, say, write_data

if TYPE_CHECKING:
    from api.client import Client


@click.group()
def host() -> None:
    """Register, list and remove hosts."""


@host.command()
@click.argument("addresses", nargs=-1, required=True, metavar="HOST:PORT...")
@output_option()
@connection
def add(addresses: tuple[str, ...], output: str, connect: Callable[[], Client]) -> None:
    """Register hosts by the addresses of their agents.

    One that does not answer yet is recorded and joins by itself later.
    """
    from pydantic import ValidationError

    from specs.desired import HostSpec

    try:
        specs = {address: HostSpec(addr=address) for address in addresses}
    except ValidationError as error:
        raise click.UsageError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None
    added: list[Any] = []
    with connect() as client:

        def register(address: str) -> None:
            told = client.add_host(specs[address])
            added.append(told)
            if output == "table":
                say(f"host/{told.id} registered, {told.state}")

        try:
            each(addresses, register)
        finally:
            if output != "table":
                write_data(added, output)


@host.command("list")
@output_option("wide")
@connection
def list_(output: str, connect: Callable[[], Client]) -> None:
    """List the registered hosts."""
    from api.cli.words import HOST_COLUMNS, HOST_WIDE, host_row, write_table

    with connect() as client:
        hosts = sorted(client.hosts(), key=lambda item: item.id)
    wide = output == "wide"
    if output in ("json", "yaml"):
        write_data(hosts, output)
    elif hosts:
        write_table(HOST_COLUMNS + (HOST_WIDE if wide else ()), [host_row(item, wide=wide) for item in hosts])
    else:
        note("there are no hosts; register one with `muster host add HOST:PORT`")


@host.command()
@click.argument("names", nargs=-1, required=True, metavar="ID|HOST:PORT...")
@output_option()
@connection
def remove(names: tuple[str, ...], output: str, connect: Callable[[], Client]) -> None:
    """Remove hosts that hold no VM any more."""
    removed: list[Any] = []
    with connect() as client:

        def forget(name: str) -> None:
            client.remove_host(name.removeprefix("host/"))
            removed.append({"id": name.removeprefix("host/"), "state": "removed"})
            if output == "table":
                say(f"{name} removed")

        try:
            each(names, forget)
        finally:
            if output != "table":
                write_data(removed, output)


@host.command()
@click.argument("names", nargs=-1, required=True, metavar="ID|HOST:PORT...")
@output_option()
@connection
def cordon(names: tuple[str, ...], output: str, connect: Callable[[], Client]) -> None:
    """Place no new VM on hosts; those there stay."""
    _cordon(names, output, connect, cordoned=True)


@host.command()
@click.argument("names", nargs=-1, required=True, metavar="ID|HOST:PORT...")
@output_option()
@connection
def uncordon(names: tuple[str, ...], output: str, connect: Callable[[], Client]) -> None:
    """Let new VMs be placed on hosts again; a drain under way ends."""
    _cordon(names, output, connect, cordoned=False)


def _cordon(names: tuple[str, ...], output: str, connect: Callable[[], Client], *, cordoned: bool) -> None:
    changed: list[Any] = []
    with connect() as client:

        def change(name: str) -> None:
            told = client.set_cordon(name.removeprefix("host/"), cordoned)
            changed.append(told)
            if output == "table":
                say(f"host/{told.id} is {'cordoned' if cordoned else 'open to new VMs'}")

        try:
            each(names, change)
        finally:
            if output != "table":
                write_data(changed, output)
