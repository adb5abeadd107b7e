"""`muster host`: registers the machines that run VMs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from api.cli.common import WaitingCommand, connection, each, note, output_option, say, wait_option, write_data

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


@host.command(cls=WaitingCommand)
@click.argument("name", metavar="ID|HOST:PORT")
@wait_option
@connection
def drain(name: str, wait: float | None, connect: Callable[[], Client]) -> None:
    """Make a host's VMs anew elsewhere, one of an environment at a time. Their disks are lost.

    `muster host uncordon` takes it back; once drained a host can be removed.
    """
    with connect() as client:
        told = client.drain_host(name.removeprefix("host/"))
        say(f"host/{told.id} is being drained of {told.drain.left if told.drain else 0} VMs")
    if wait is not None:
        _await_drained(connect, told.id, wait)


def _await_drained(connect: Callable[[], Client], host_id: str, seconds: float) -> None:
    import time

    from api.cli.common import Failure
    from api.cli.feed import Feed

    end = time.monotonic() + seconds
    said = ""
    with Feed(connect) as feed:
        for _ in feed.events():
            told = feed.fleet.hosts.get(host_id)
            if told is not None and told.drain is None:
                raise Failure(f"the drain of host {host_id} was taken back")
            drain = told.drain if told else None
            if drain is not None and drain.state == "drained":
                say(f"host/{host_id} is drained")
                return
            line = "; ".join(f"{item.env}/{item.name} is blocked: {item.why}" for item in drain.blocked) if drain else ""
            if line and line != said:
                said = line
                note(line)
            if time.monotonic() >= end:
                left = f"{drain.left} VMs are left" if drain else "the host is not listed"
                raise Failure(f"host {host_id} is not drained after {seconds:g} s: {left}{f'; {line}' if line else ''}")


@host.command()
@click.argument("name", metavar="ID|HOST:PORT")
@output_option()
@connection
def unknown(name: str, output: str, connect: Callable[[], Client]) -> None:
    """List VMs that a host has and the controller has no record of."""
    from api.cli.words import age, size, write_table

    with connect() as client:
        found = client.unknown_vms(name.removeprefix("host/"))
    if output != "table":
        write_data(found, output)
    elif found:
        columns = ("ID", "ENV", "STATE", "ENGINE", "IMAGE", "CPU", "MEM", "DISK", "AGE", "OBSTACLE")
        rows = [
            (
                *(vm.id, vm.env_id or "-", vm.state, str(vm.engine), vm.image or "-", str(vm.cpu), size(vm.mem), size(vm.disk)),
                *(age(vm.created_at), vm.obstacle or "-"),
            )
            for vm in found
        ]
        write_table(columns, rows)
    else:
        note("every VM of this host is recorded")


@host.command("destroy-unknown")
@click.argument("name", metavar="ID|HOST:PORT")
@click.argument("vm_ids", nargs=-1, required=True, metavar="VM_ID...")
@connection
def destroy_unknown(name: str, vm_ids: tuple[str, ...], connect: Callable[[], Client]) -> None:
    """Destroy VMs that the controller has no record of, with their disks."""
    with connect() as client:

        def destroy(vm_id: str) -> None:
            client.destroy_unknown(name.removeprefix("host/"), vm_id)
            say(f"vm/{vm_id} is being destroyed")

        each(vm_ids, destroy)


@click.command()
@click.argument("host_name", metavar="HOST")
@click.argument("vm_id", metavar="VM_ID")
@click.option("--env", "env_id", metavar="NAME", help="The environment to be part of; the one its agent names if left out.")
@click.option("--name", metavar="NAME", help="What to call the VM; what its agent calls it if left out.")
@connection
def adopt(host_name: str, vm_id: str, env_id: str | None, name: str | None, connect: Callable[[], Client]) -> None:
    """Make a VM that nobody recorded part of an environment, as it runs.

    `muster host unknown HOST` lists such VMs. A new environment never expires until its lifetime is set.
    """
    from pydantic import ValidationError

    from specs.desired import AdoptReq

    host_name = host_name.removeprefix("host/")
    with connect() as client:
        if env_id is None:
            env_id = next((vm.env_id for vm in client.unknown_vms(host_name) if vm.id == vm_id), "")
        try:
            wish = AdoptReq(env=env_id, name=name)
        except ValidationError as error:
            first = error.errors()[0]
            raise click.UsageError(f"--{first['loc'][0]} {str(first['msg']).removeprefix('Value error, ')}") from None
        client.adopt(host_name, vm_id, wish)
    say(f"vm/{vm_id} is part of env/{env_id}")
