"""`muster events`: what happened, once or as it happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from api.cli.common import as_json, connection, note, output_option, write_data

if TYPE_CHECKING:
    from api.client import Client
    from specs.wire import Event


@click.command()
@click.option("--env", "env_id", metavar="NAME", help="Only events of this environment.")
@click.option("--host", "host_id", metavar="ID", help="Only events of this host.")
@click.option("--vm", "vm_id", metavar="ID|NAME", help="Only events of this VM.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The last N, 500 if not given.")
@click.option("-f", "--follow", is_flag=True, help="Go on with each new event, until Ctrl-C.")
@output_option()
@connection
def events(
    env_id: str | None,
    host_id: str | None,
    vm_id: str | None,
    limit: int | None,
    follow: bool,
    output: str,
    connect: Callable[[], Client],
) -> None:
    """Tell what happened to environments, VMs and hosts, oldest first."""
    if follow and output == "yaml":
        raise click.UsageError("--follow writes a table or JSON lines, not YAML")
    chosen = {"env": env_id, "host": host_id, "vm": vm_id}

    def ask(since: int | None = None) -> tuple[Event, ...]:
        with connect() as client:
            return client.events(since=since, limit=None if limit is None or since is not None else str(limit), **chosen)

    if follow:
        _follow(connect, ask, output)
        return
    found = ask()
    if output != "table":
        write_data(found, output)
    elif found:
        _write(found)
    else:
        note("nothing has happened")


def _write(found: tuple[Event, ...], sizes: list[int] | None = None) -> list[int]:
    from api.cli.words import EVENT_COLUMNS, event_row, widths, write_rows

    rows = [event_row(event) for event in found]
    if sizes is None:
        rows = [EVENT_COLUMNS, *rows]
        sizes = widths(EVENT_COLUMNS, rows)
    write_rows(rows, sizes)
    return sizes


def _follow(connect: Callable[[], Client], ask: Callable[[int | None], tuple[Event, ...]], output: str) -> None:
    """The stream only says that something happened; what is new is asked for, so that no event is missed or told twice."""
    from api.cli.feed import Feed, Lost
    from api.client import Change, Snapshot

    at: int | None = None
    sizes: list[int] | None = None
    with Feed(connect) as feed:
        for change in feed.events():
            if isinstance(change, Lost):
                note(f"{change.why}; trying again")
            is_event = isinstance(change, Change) and change.kind == "event" and change.object is not None
            if not isinstance(change, Snapshot) and not is_event:
                continue
            if at is not None and isinstance(change, Change) and int((change.object or {}).get("revision", 0)) <= at:
                continue
            found = ask(at)
            at = max((event.revision for event in found), default=at or 0)
            if output == "json":
                for event in found:
                    click.echo(json.dumps(as_json(event)))
            elif found or sizes is None:
                sizes = _write(found, sizes)
