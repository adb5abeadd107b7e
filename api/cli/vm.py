"""`muster vm`: moves the disk of a stopped VM out of a host and into another VM."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

import click

from api.cli.common import Failure, connection, note

if TYPE_CHECKING:
    from api.client import Client
    from api.disks import Moved

_agent_key = click.option(
    "--agent-key",
    envvar="MUSTER_AGENT_KEY",
    metavar="KEY",
    help="The agents' key [the controller's]; MUSTER_AGENT_KEY is safer.",
)


@click.group()
def vm() -> None:
    """Copy disks of stopped VMs from host to host."""


@vm.command("export")
@click.argument("name", metavar="ENV/VM")
@_agent_key
@connection
def export(name: str, agent_key: str | None, connect: Callable[[], Client]) -> None:
    """Write a stopped VM's disk to standard output.

    \b
      muster vm export web/db > db.disk

    It is a qcow2 file, or the stream of `zfs send` where the host keeps disks as ZFS volumes. This machine must reach the
    agent's address.
    """
    if sys.stdout.isatty():
        raise click.UsageError("a disk is nothing for a terminal; write it to a file: > FILE")
    from api.disks import AgentDisks

    vm_id, addr, key = _find(connect, name, agent_key)
    with AgentDisks(addr, key) as agent:
        moved = agent.export(vm_id, sys.stdout.buffer)
    sys.stdout.buffer.flush()
    _tell(f"vm/{name} exported", moved)


@vm.command("import")
@click.argument("name", metavar="ENV/VM")
@_agent_key
@connection
def import_(name: str, agent_key: str | None, connect: Callable[[], Client]) -> None:
    """Replace a stopped VM's disk by one that `export` wrote, read from standard input.

    \b
      muster vm import web/db < db.disk

    What was on the disk is lost. If anything goes wrong the old disk stays as it was.
    """
    if sys.stdin.isatty():
        raise click.UsageError("the disk is read from standard input: < FILE")
    from api.disks import AgentDisks

    vm_id, addr, key = _find(connect, name, agent_key)
    with _seekable(sys.stdin.buffer) as source, AgentDisks(addr, key) as agent:
        moved = agent.import_(vm_id, source)
    _tell(f"vm/{name} imported", moved)


def _find(connect: Callable[[], Client], name: str, agent_key: str | None) -> tuple[str, str, str | None]:
    """The VM's id, the address of its agent and the key for it. Raises Failure for a VM that is not stopped."""
    from api.cli.describe import find_vm

    with connect() as client:
        found = find_vm(client.vms(), name)
        if found.state != "stopped":
            raise Failure(f"vm {name} is {found.state}; stop its environment first: muster stop {found.env_id} --wait")
        if not found.host_id:
            raise Failure(f"vm {name} is on no host yet")
        return found.id, client.host(found.host_id).addr, agent_key or client.api_key


@contextlib.contextmanager
def _seekable(stream: BinaryIO) -> Iterator[BinaryIO]:
    """The stream itself, or for a pipe a temporary file with all of it: the digest goes before the contents."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as spool:
        shutil.copyfileobj(stream, spool, 256 * 1024)
        spool.seek(0)
        yield spool


def _tell(what: str, moved: Moved) -> None:
    note(f"{what}: {moved.size} bytes as {moved.format}, sha256 {moved.sha256}")
