"""`muster delete`, `stop`, `start` and `wait`: what people ask of environments that exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from api.cli.common import DEFAULT_WAIT, WaitingCommand, connection, each, output_option, say, targets, wait_option, write_data

if TYPE_CHECKING:
    from api.cli.progress import Goal
    from api.client import Client


def _env_names(what: tuple[str, ...]) -> tuple[str, ...]:
    kind, names = targets(what, default="env")
    if kind != "env":
        raise click.UsageError(f"this works on environments; {kind} {' '.join(names)} is none")
    return names


def _wait_for(
    connect: Callable[[], Client],
    names: tuple[str, ...],
    goal: Goal,
    seconds: float | None,
    least: dict[str, int],
    output: str,
) -> None:
    if seconds is not None:
        from api.cli.progress import await_goal

        await_goal(connect, {name: least.get(name, 0) for name in names}, goal, seconds, quiet=output != "table")
        if output == "table":
            for name in names:
                say(f"env/{name} is {goal}")


def _write_envs(connect: Callable[[], Client], names: tuple[str, ...], output: str) -> None:
    """The environments as they are now; one that is gone tells its name and that."""
    if output == "table":
        return
    from api.client import ApiError

    found: list[Any] = []
    with connect() as client:
        for name in names:
            try:
                found.append(client.env(name).env)
            except ApiError as error:
                if error.status != 404:
                    raise
                found.append({"id": name, "phase": "gone"})
    write_data(found, output)


@click.command(cls=WaitingCommand)
@click.argument("what", nargs=-1, required=True, metavar="env NAME...")
@wait_option
@output_option()
@connection
def delete(what: tuple[str, ...], wait: float | None, output: str, connect: Callable[[], Client]) -> None:
    """Destroy environments with their VMs and disks.

    An environment stays listed as terminating until its hosts confirmed that every VM is gone.
    """
    kind, names = targets(what)
    if kind not in ("env", "host") or not names:
        raise click.UsageError("name what to delete: env NAME... (or host NAME...)")
    with connect() as client:

        def destroy(name: str) -> None:
            (client.delete_env if kind == "env" else client.remove_host)(name)
            if output == "table":
                say(f"{kind}/{name} {'is being destroyed' if kind == 'env' else 'removed'}")

        each(names, destroy)
    if kind == "env":
        _wait_for(connect, names, "gone", wait, {}, output)
        _write_envs(connect, names, output)
    elif output != "table":
        write_data([{"id": name, "state": "removed"} for name in names], output)


@click.command(cls=WaitingCommand)
@click.argument("what", nargs=-1, required=True, metavar="[env] NAME...")
@wait_option
@output_option()
@connection
def stop(what: tuple[str, ...], wait: float | None, output: str, connect: Callable[[], Client]) -> None:
    """Stop every VM of environments; their disks stay."""
    _power(connect, _env_names(what), "stop", wait, output)


@click.command(cls=WaitingCommand)
@click.argument("what", nargs=-1, required=True, metavar="[env] NAME...")
@wait_option
@output_option()
@connection
def start(what: tuple[str, ...], wait: float | None, output: str, connect: Callable[[], Client]) -> None:
    """Start every VM of environments again."""
    _power(connect, _env_names(what), "start", wait, output)


def _power(connect: Callable[[], Client], names: tuple[str, ...], verb: str, seconds: float | None, output: str) -> None:
    least: dict[str, int] = {}
    with connect() as client:

        def change(name: str) -> None:
            (client.stop_env if verb == "stop" else client.start_env)(name)
            if output == "table":
                say(f"env/{name} is to {'stop' if verb == 'stop' else 'run'}")
            if seconds is not None:
                least[name] = client.env(name).env.generation

        each(names, change)
    _wait_for(connect, names, "stopped" if verb == "stop" else "ready", seconds, least, output)
    _write_envs(connect, names, output)


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="env NAME...")
@click.option(
    "--for",
    "goal",
    type=click.Choice(["ready", "stopped", "gone", "converged"]),
    default="converged",
    show_default=True,
    help="What to wait for; converged is ready or stopped, as asked.",
)
@click.option("--timeout", type=click.FloatRange(min=0), default=DEFAULT_WAIT, show_default=True, metavar="SECONDS")
@output_option()
@connection
def wait(what: tuple[str, ...], goal: Goal, timeout: float, output: str, connect: Callable[[], Client]) -> None:
    """Wait until environments are as asked.

    Exits with 0 once all are; with 1 when the time is up, when one does not exist, or when one is degraded and nothing more is
    tried; with 2 on a wrong command line. A degraded environment is never taken for converged.
    """
    names = _env_names(what)
    _wait_for(connect, names, goal, timeout, {}, output)
    _write_envs(connect, names, output)
