"""Values in people's words, and tables. Called by the commands that show things; knows no API calls."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from api.cli.common import wants_colour

if TYPE_CHECKING:
    from specs.wire import Env, Event, Host, ImageInfo, Vm

Row = tuple[str, ...]

ENV_COLUMNS = ("NAME", "OWNER", "STATE", "PHASE", "VMS", "EXPIRES", "AGE")
VM_COLUMNS = ("ENV", "NAME", "STATE", "PHASE", "ENGINE", "HOST", "IP", "PORTS", "AGE")
VM_WIDE = ("ID", "DESIRED", "IMAGE", "CPU", "MEM", "DISK", "TRIES", "MESSAGE")
HOST_COLUMNS = ("ID", "ADDRESS", "STATE", "ENGINES", "STORAGE", "VMS", "CPU", "MEM", "DISK", "AGE")
EVENT_COLUMNS = ("AGE", "TYPE", "REASON", "OBJECT", "MESSAGE")
HOST_WIDE = ("HEARTBEAT", "MESSAGE")
ENV_WIDE = ("GENERATION", "OBSERVED", "MESSAGE")
_GOOD = ("ready", "running", "online")
_BAD = ("failed", "degraded", "offline")
_BUSY = ("creating", "pending", "progressing", "terminating")


def span(seconds: float) -> str:
    """A duration with its two largest units: `45s`, `3m20s`, `2h5m`, `4d`."""
    left = max(0, int(seconds))
    parts = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def age(since: int, now: float | None = None) -> str:
    """How long ago a Unix time was; `-` for none."""
    return span((now or time.time()) - since) if since else "-"


def until(moment: int, now: float | None = None) -> str:
    """How long until a Unix time, `never` for 0, `now` when it has passed."""
    if not moment:
        return "never"
    left = moment - (now or time.time())
    return span(left) if left >= 1 else "now"


def clock(moment: int) -> str:
    """A Unix time in the reader's own time zone, and how far off it is."""
    if not moment:
        return "never"
    local = datetime.fromtimestamp(moment, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f"{local} ({age(moment)} ago)" if moment <= time.time() else f"{local} (in {until(moment)})"


def size(mib: int) -> str:
    """MiB as `512M` or, from 10 GiB on or when it divides evenly, `20G`."""
    if mib and mib % 1024 == 0:
        return f"{mib // 1024}G"
    return f"{mib / 1024:.0f}G" if mib >= 10240 else f"{mib}M"


def ports(port_map: Mapping[str, int]) -> str:
    """`22→20100,80→20101`, guest to host, by guest port."""
    return ",".join(f"{guest}→{host}" for guest, host in sorted(port_map.items(), key=lambda item: int(item[0]))) or "-"


def ssh_command(vm: Vm, hosts: Mapping[str, Host]) -> str:
    """A command to paste that enters a VM through its host's forwarded port; "" while there is no such port or host."""
    port, host = vm.port_map.get("22"), hosts.get(vm.host_id)
    if not port or host is None:
        return ""
    return f"ssh -p {port} root@{host.addr.rpartition(':')[0].strip('[]')}"


def env_row(env: Env, *, wide: bool = False) -> Row:
    """One line of `get envs`."""
    row = (env.id, env.owner, env.state, env.phase, str(len(env.vm_ids)), until(env.expires_at), age(env.created_at))
    unmet = next((c.message for c in env.conditions if not c.status and c.message), "-")
    return (*row, str(env.generation), str(env.observed_generation), unmet) if wide else row


def vm_row(vm: Vm, *, wide: bool = False) -> Row:
    """One line of `get vms`."""
    where = (vm.host_id or "-", vm.ip or "-", ports(vm.port_map), age(vm.created_at))
    row = (vm.env_id, vm.name, vm.state, vm.phase, vm.engine, *where)
    sizes = (str(vm.cpu), size(vm.mem), size(vm.disk))
    return (*row, vm.id, vm.desired, vm.image, *sizes, str(vm.attempts), vm.message or "-") if wide else row


def host_row(host: Host, *, wide: bool = False) -> Row:
    """One line of `get hosts`; sizes as used/total."""
    r = host.resource
    used = (
        f"{r.cpu_used}/{r.cpu_total}",
        f"{size(r.mem_used)}/{size(r.mem_total)}",
        f"{size(r.disk_used)}/{size(r.disk_total)}",
    )
    what = (host.id, host.addr, host.state, ",".join(host.engines) or "-", host.storage, str(r.vm_count))
    row = (*what, *used, age(host.registered_at))
    beat = "-" if host.heartbeat_age is None else span(host.heartbeat_age)
    return (*row, beat, host.message or "-") if wide else row


def event_row(event: Event) -> Row:
    """One line of `events`."""
    times = f" ({event.count} times)" if event.count > 1 else ""
    vm = f"{event.env}/{event.vm_name}" if event.vm_name else event.vm
    what = vm or event.env or event.host or "-"
    return (age(event.last_seen), event.type, event.reason, what, f"{event.message}{times}")


def image_rows(images: Iterable[ImageInfo]) -> list[Row]:
    """Images by name, each with the hosts that have it."""
    hosts: dict[str, list[str]] = {}
    for image in images:
        hosts.setdefault(image.name, []).append(image.host_id)
    return [(name, str(len(having)), ",".join(sorted(having))) for name, having in sorted(hosts.items())]


def widths(columns: Sequence[str], rows: Iterable[Row]) -> list[int]:
    """How wide each column must be."""
    return [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]


def write_rows(rows: Iterable[Row], wide: Sequence[int], indent: str = "") -> None:
    """Writes rows in columns, two blanks apart, with the words of states coloured on a terminal."""
    from specs.mistakes import printable

    colour = wants_colour()
    for row in rows:
        clean = [printable(cell) for cell in row]
        last = len(clean) - 1
        padded = [cell if at == last else cell.ljust(wide[at]) for at, cell in enumerate(clean)]
        click.echo(indent + "  ".join(map(_coloured, padded) if colour else padded).rstrip())


def write_table(columns: Sequence[str], rows: Sequence[Row], indent: str = "") -> None:
    """Writes a heading and rows."""
    write_rows([tuple(columns), *rows], widths(columns, rows), indent)


def _coloured(cell: str) -> str:
    word = re.sub(r"\s+$", "", cell)
    for words, colour in ((_GOOD, "green"), (_BAD, "red"), (_BUSY, "yellow")):
        if word in words:
            return click.style(word, fg=colour) + cell[len(word) :]
    return cell
