"""Waiting for environments, shown live on a terminal and as plain lines elsewhere. Called by apply, delete and wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from api.cli.common import Failure, note, say, wants_colour
from api.cli.feed import Feed, Fleet, Lost
from specs.wire import Env, Vm

if TYPE_CHECKING:
    from rich.table import Table

    from api.client import Client

Goal = Literal["ready", "stopped", "converged", "gone"]
_MARKS = {"ready": "✔", "stopped": "■", "degraded": "✘", "terminating": "…"}
_COLOURS = {"ready": "green", "stopped": "cyan", "degraded": "red"}
_SHOWN = 8  # VMs named in a failure


def reached(env: Env | None, goal: Goal, generation: int = 0) -> bool:
    """Whether an environment is where `goal` says; `generation` is the least that counts, so that older state does not."""
    if env is None:
        return goal == "gone"
    if env.generation < generation or env.observed_generation < env.generation:
        return False
    phases = {"ready": ("ready",), "stopped": ("stopped",), "converged": ("ready", "stopped"), "gone": ()}
    return env.phase in phases[goal]


def await_goal(
    connect: Callable[[], Client], generations: Mapping[str, int], goal: Goal, seconds: float, *, quiet: bool = False
) -> None:
    """Returns once every environment named reached the goal.

    `generations` gives for each the least generation that counts. Raises Failure after `seconds`, with what each laggard says,
    and at once when an environment that should be there is not. `quiet` shows nothing meanwhile.
    """
    deadline = time.monotonic() + seconds
    with Feed(connect) as feed, _display(feed.fleet, tuple(generations), quiet=quiet) as display:
        known = False
        for event in feed.events():
            if isinstance(event, Lost):
                display.lost(event.why)
            elif event is not None:
                known = True
                display.update()
            envs = {name: feed.fleet.envs.get(name) for name in generations}
            if known and all(reached(env, goal, generations[name]) for name, env in envs.items()):
                return
            spoilt = [name for name, env in envs.items() if known and goal != "gone" and _is_spoilt(env, generations[name])]
            if spoilt:
                raise Failure(_told(feed.fleet, spoilt, f"not {goal} but degraded, and nothing more is tried"))
            missing = [name for name, env in envs.items() if env is None]
            if known and missing and goal != "gone":
                raise Failure(f"environment {', '.join(missing)} does not exist")
            if time.monotonic() >= deadline:
                raise Failure(_late(feed.fleet, envs, goal, generations, seconds))


def _is_spoilt(env: Env | None, generation: int) -> bool:
    """Whether an environment is degraded for good: a VM ended in failure, and is not to be started again."""
    seen = env is not None and env.observed_generation >= max(env.generation, generation)
    return seen and env is not None and env.phase == "degraded"


def _late(fleet: Fleet, envs: Mapping[str, Env | None], goal: Goal, generations: Mapping[str, int], seconds: float) -> str:
    behind = [name for name, env in envs.items() if not reached(env, goal, generations[name])]
    return _told(fleet, behind, f"not {goal} after {seconds:g} s", every=goal == "gone")


def _told(fleet: Fleet, behind: Sequence[str], what: str, *, every: bool = False) -> str:
    told = []
    for name in behind:
        slow = [vm for vm in fleet.vms_of(name) if every or vm.phase not in ("ready", "stopped")]
        told += [f"{name}/{vm.name} is {vm.phase}{f': {vm.message}' if vm.message else ''}" for vm in slow]
    more = f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    detail = "; ".join(told[:_SHOWN]) + more
    return f"{', '.join(behind)} {what}{f' ({detail})' if detail else ''}"


class _Display(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
    def update(self) -> None:
        """Shows what changed."""

    def lost(self, why: str) -> None:
        """Says that the picture is stale."""


def _display(fleet: Fleet, names: Sequence[str], *, quiet: bool) -> _Display:
    if quiet:
        return _Silent()
    return _Live(fleet, names) if wants_colour() else _Lines(fleet, names)


class _Silent:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def update(self) -> None:
        return None

    def lost(self, why: str) -> None:
        note(f"{why}; trying again")


class _Lines(_Silent):
    """A line whenever a VM or an environment says something new."""

    def __init__(self, fleet: Fleet, names: Sequence[str]) -> None:
        self._fleet, self._names = fleet, names
        self._told: dict[str, str] = {}

    def update(self) -> None:
        now = dict(_lines(self._fleet, self._names))
        for key, line in now.items():
            if self._told.get(key) != line:
                say(line)
        for key in self._told.keys() - now.keys():
            say(f"{key.split()[0]} gone")
        self._told = now


def _lines(fleet: Fleet, names: Sequence[str]) -> list[tuple[str, str]]:
    out = []
    for name in names:
        vms = fleet.vms_of(name)
        # The id keeps a VM and its replacement of the same name apart.
        out += [(f"{name}/{vm.name} {vm.id}", f"{name}/{vm.name} {_words(vm)}") for vm in vms]
        if env := fleet.envs.get(name):
            as_asked = sum(_is_settled(vm) for vm in vms)
            out.append((name, f"{name} {env.phase} ({as_asked} of {len(vms)} as desired)"))
    return out


def _words(vm: Vm) -> str:
    where = f" on {vm.host_id}" if vm.host_id else ""
    return f"{vm.phase}, {vm.state}{where}{f': {vm.message}' if vm.message else ''}"


def _is_settled(vm: Vm) -> bool:
    return vm.phase in ("ready", "stopped")


class _Live(_Silent):
    """A table that redraws itself."""

    def __init__(self, fleet: Fleet, names: Sequence[str]) -> None:
        from rich.live import Live

        self._fleet, self._names = fleet, names
        self._began = time.monotonic()
        self._stale = ""
        self._live = Live(get_renderable=self._table, refresh_per_second=8, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def update(self) -> None:
        self._stale = ""

    def lost(self, why: str) -> None:
        self._stale = why

    def _table(self) -> Table:
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        from specs.mistakes import printable

        vms = [vm for name in self._names for vm in self._fleet.vms_of(name)]
        done = sum(_is_settled(vm) for vm in vms)
        figure = f"{done} of {len(vms)} as desired" if vms else "no VM left"
        title = f"{figure}, {time.monotonic() - self._began:.1f} s"
        table = Table(box=None, pad_edge=False, show_header=bool(vms), title=title, title_justify="left", title_style="bold")
        for column in ("", "VM", "STATE", "HOST", "MESSAGE"):
            table.add_column(column, overflow="fold")
        for vm in vms:
            style = _COLOURS.get(vm.phase, "yellow")
            mark: Any = Text(_MARKS[vm.phase], style) if vm.phase in _MARKS else Spinner("dots", style=style)
            said = [printable(part) for part in (f"{vm.env_id}/{vm.name}", f"{vm.phase}, {vm.state}", vm.host_id, vm.message)]
            table.add_row(mark, Text(said[0]), Text(said[1], style), Text(said[2]), Text(said[3]))
        if self._stale:
            table.caption = Text(f"{printable(self._stale)}; trying again", "red")
        return table
