"""`muster get`: lists what there is, once or as it changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import click

from api.cli.common import Failure, as_json, connection, note, output_option, targets, write_data

if TYPE_CHECKING:
    from api.cli.words import Row
    from api.client import Client, Snapshot
    from specs.wire import Env, Host, Vm

PHASES = ("pending", "progressing", "ready", "degraded", "stopped", "terminating")


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="envs|vms|hosts|images [NAME]...")
@click.option("--env", "env_id", metavar="NAME", help="Only VMs of this environment.")
@click.option("--host", "host_id", metavar="ID|HOST:PORT", help="Only VMs on this host, and environments with one there.")
@click.option("--phase", type=click.Choice(PHASES), help="Only environments or VMs in this phase.")
@click.option("--owner", help="Only environments of this owner, and their VMs.")
@click.option("-w", "--watch", is_flag=True, help="Go on with a line for each change, until Ctrl-C.")
@output_option("wide")
@connection
def get(
    what: tuple[str, ...],
    env_id: str | None,
    host_id: str | None,
    phase: str | None,
    owner: str | None,
    watch: bool,
    output: str,
    connect: Callable[[], Client],
) -> None:
    """List environments, VMs, hosts or images.

    NAME picks some of them: an environment's name, a VM's id or ENV/NAME, a host's id or address, an image's name.
    """
    kind, names = targets(what)
    if kind == "image":
        if watch:
            raise click.UsageError("images cannot be watched")
        _images(connect, names, output)
        return
    if kind == "host" and any((env_id, host_id, phase, owner)):
        raise click.UsageError("hosts are chosen by name; --env, --host, --owner and --phase are for environments and VMs")
    if watch:
        if kind == "env" and host_id is not None:
            raise click.UsageError("environments cannot be watched by host; watch its VMs")
        _follow(connect, _Chosen(str(kind), names, env_id=env_id, host_id=host_id, owner=owner, phase=phase), output)
        return
    asked = {"owner": owner, "phase": phase, "host": host_id} | ({"env": env_id} if kind == "vm" else {})
    chosen = _Chosen(str(kind), names, env_id=env_id if kind == "env" else None)
    with connect() as client:
        things = chosen.of(_looked_up(client, str(kind), {name: text for name, text in asked.items() if text is not None}))
    missing = [name for name in names if not any(chosen.is_named(thing, name) for thing in things)]
    if output in ("json", "yaml"):
        if not missing:
            write_data(things[0] if len(names) == 1 and len(things) == 1 else things, output)
    else:
        _table(things, str(kind), wide=output == "wide", but_missing=bool(missing))
    if missing:
        raise Failure(f"there is no {kind} {', '.join(missing)}")


def _looked_up(client: Client, kind: str, asked: dict[str, str]) -> Snapshot:
    from api.client import Snapshot

    return Snapshot(
        revision=0,
        hosts=client.hosts() if kind == "host" else (),
        envs=client.envs(**asked) if kind == "env" else (),
        vms=client.vms(**asked) if kind == "vm" else (),
    )


class _Chosen:
    """Which objects were asked for."""

    def __init__(
        self,
        kind: str,
        names: tuple[str, ...],
        *,
        env_id: str | None = None,
        host_id: str | None = None,
        owner: str | None = None,
        phase: str | None = None,
    ) -> None:
        self.kind, self.names, self._env, self._host, self._owner = kind, names, env_id, host_id, owner
        self._phase = phase

    def of(self, fleet: Snapshot) -> list[Any]:
        """The chosen objects in the order of their names."""
        tables: dict[str, tuple[Any, ...]] = {"env": fleet.envs, "vm": fleet.vms, "host": fleet.hosts}
        owners = {env.id: env.owner for env in fleet.envs}
        return sorted((thing for thing in tables[self.kind] if self.has(thing, owners)), key=_order)

    def has(self, thing: Any, owners: dict[str, str]) -> bool:
        """Whether an object is among the chosen."""
        if self.names and not any(self.is_named(thing, name) for name in self.names):
            return False
        if self._phase not in (None, getattr(thing, "phase", None)):
            return False
        if self.kind == "vm":
            vm: Vm = thing
            right_place = self._env in (None, vm.env_id) and self._host in (None, vm.host_id)
            return right_place and self._owner in (None, owners.get(vm.env_id))
        return self.kind != "env" or (self._owner in (None, thing.owner) and self._env in (None, thing.id))

    def is_named(self, thing: Any, name: str) -> bool:
        """Whether `name` means this object."""
        if self.kind == "vm":
            return name in (thing.id, f"{thing.env_id}/{thing.name}")
        return name == thing.id or (self.kind == "host" and name == thing.addr)


def _order(thing: Any) -> tuple[str, ...]:
    return (thing.env_id, thing.name, thing.id) if hasattr(thing, "env_id") else (thing.id,)


def _columns(kind: str, *, wide: bool) -> tuple[str, ...]:
    from api.cli import words

    narrow, extra = {
        "env": (words.ENV_COLUMNS, words.ENV_WIDE),
        "vm": (words.VM_COLUMNS, words.VM_WIDE),
        "host": (words.HOST_COLUMNS, words.HOST_WIDE),
    }[kind]
    return narrow + extra if wide else narrow


def _row(thing: Env | Vm | Host, kind: str, *, wide: bool) -> Row:
    from api.cli import words

    make: dict[str, Callable[..., Row]] = {"env": words.env_row, "vm": words.vm_row, "host": words.host_row}
    return make[kind](thing, wide=wide)


def _table(things: list[Any], kind: str, *, wide: bool, but_missing: bool = False) -> None:
    from api.cli.words import write_table

    if things:
        write_table(_columns(kind, wide=wide), [_row(thing, kind, wide=wide) for thing in things])
    elif not but_missing:
        note(f"there are no {kind}s")


def _images(connect: Callable[[], Client], names: tuple[str, ...], output: str) -> None:
    from api.cli.words import image_rows, write_table

    with connect() as client:
        images = [image for image in client.images() if not names or image.name in names]
    missing = sorted(set(names) - {image.name for image in images})
    if missing:
        raise Failure(f"no host has the image {', '.join(missing)}")
    if output in ("json", "yaml"):
        write_data(images, output)
    elif images:
        write_table(("NAME", "HOSTS", "ON"), image_rows(images))
    else:
        note("no host has an image; make one with `muster image build tiny` on a host")


def _follow(connect: Callable[[], Client], chosen: _Chosen, output: str) -> None:
    from api.cli.feed import Feed, Lost
    from api.cli.words import widths, write_rows
    from api.client import Change, Snapshot

    if output == "yaml":
        raise click.UsageError("--watch writes a table or JSON lines, not YAML")
    wide = output == "wide"
    columns = _columns(chosen.kind, wide=wide)
    sizes: list[int] = []
    with Feed(connect) as feed:
        for event in feed.events():
            if isinstance(event, Lost):
                note(f"{event.why}; trying again")
            if not isinstance(event, Snapshot | Change):
                continue
            if isinstance(event, Change):
                thing = cast("Env | Vm | Host | None", event.parsed()) if event.kind == chosen.kind else None
                owners = {env.id: env.owner for env in feed.fleet.envs.values()}
                things = [thing] if thing and chosen.has(thing, owners) else []
                if event.kind == chosen.kind and event.object is None and not chosen.names and output != "json":
                    note(f"{chosen.kind} {event.id} is gone")
                if event.kind == chosen.kind and event.object is None and output == "json":
                    click.echo(json.dumps({"kind": chosen.kind, "id": event.id, "object": None}))
            else:
                things = chosen.of(event)
            if output == "json":
                for each in things:
                    click.echo(json.dumps({"kind": chosen.kind, "id": each.id, "object": as_json(each)}))
                continue
            rows = [_row(each, chosen.kind, wide=wide) for each in things]
            if not sizes:
                sizes = widths(columns, rows)
                write_rows([columns], sizes)
            write_rows(rows, sizes)
