"""`muster describe`: everything about one object, and how to enter it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from api.cli.common import Failure, connection, output_option, say, targets, write_data

if TYPE_CHECKING:
    from api.client import Client
    from specs.wire import Condition, EnvDetail, Event, Host, Vm

SHOWN_EVENTS = "10"


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="env|vm|host NAME")
@output_option()
@connection
def describe(what: tuple[str, ...], output: str, connect: Callable[[], Client]) -> None:
    """Show everything about an environment, a VM or a host.

    A VM is named by its id, by ENV/NAME, or by its name alone where only one has it.
    """
    kind, names = targets(what)
    if kind not in ("env", "vm", "host") or len(names) != 1:
        raise click.UsageError("name one object: env NAME, vm NAME or host NAME")
    with connect() as client:
        if kind == "env":
            detail = client.env(names[0])
            happened = client.events(env=names[0], limit=SHOWN_EVENTS)
            hosts = {host.id: host for host in client.hosts()}
            _env(detail, hosts, happened, output)
        elif kind == "host":
            told = client.host(names[0])
            happened = client.events(host=told.id, limit=SHOWN_EVENTS)
            _host(told, client.vms(), happened, output)
        else:
            vm = find_vm(client.vms(), names[0])
            happened = client.events(vm=vm.id, limit=SHOWN_EVENTS)
            _vm(vm, {host.id: host for host in client.hosts()}, happened, output)


def find_vm(vms: Sequence[Vm], name: str) -> Vm:
    """The VM an id, ENV/NAME or an unambiguous name means. Raises Failure."""
    for vm in vms:
        if name in (vm.id, f"{vm.env_id}/{vm.name}"):
            return vm
    found = [vm for vm in vms if vm.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise Failure(f"several VMs are called {name}: {', '.join(sorted(f'{vm.env_id}/{vm.name}' for vm in found))}")
    raise Failure(f"there is no vm {name}")


def _ssh(vms: Iterable[Vm], hosts: Mapping[str, Host]) -> dict[str, str]:
    from api.cli.words import ssh_command

    commands = {vm.name: ssh_command(vm, hosts) for vm in vms}
    return {name: command for name, command in commands.items() if command}


def _heading(text: str) -> None:
    say("")
    say(text)


def _fields(*pairs: tuple[str, str]) -> None:
    width = max(len(name) for name, _ in pairs) + 2
    for name, value in pairs:
        say(f"{name + ':':{width}}{value or '-'}")


def _env(detail: EnvDetail, hosts: Mapping[str, Host], happened: Sequence[Event], output: str) -> None:
    from api.cli.words import VM_COLUMNS, clock, vm_row, write_table

    env, vms = detail.env, sorted(detail.vms, key=lambda vm: (vm.name, vm.id))
    ssh = _ssh(vms, hosts)
    if output != "table":
        write_data({"env": env, "vms": vms, "warnings": detail.warnings, "ssh": ssh}, output)
        return
    _fields(
        ("Environment", env.id),
        ("Owner", env.owner),
        ("State", f"{env.state}, {env.phase}"),
        ("Generation", f"{env.generation}, observed {env.observed_generation}"),
        ("Created", clock(env.created_at)),
        ("Expires", clock(env.expires_at)),
    )
    _conditions(env.conditions)
    if detail.warnings:
        _heading("Warnings:")
        for warning in detail.warnings:
            say(f"  {warning}")
    if vms:
        _heading("VMs:")
        write_table(VM_COLUMNS[1:], [vm_row(vm)[1:] for vm in vms], indent="  ")
    for vm in vms:
        if vm.message or vm.next_attempt_at:
            say(f"  {vm.name}: {_trouble(vm)}")
    _events(happened)
    if ssh:
        _heading("Enter with:")
        width = max(map(len, ssh)) + 2
        for name, command in ssh.items():
            say(f"  {name:{width}}{command}")


def _vm(vm: Vm, hosts: Mapping[str, Host], happened: Sequence[Event], output: str) -> None:
    from api.cli.words import clock, ports, size, ssh_command

    ssh = ssh_command(vm, hosts)
    if output != "table":
        write_data({"vm": vm, "ssh": ssh}, output)
        return
    host = hosts.get(vm.host_id)
    _fields(
        ("VM", f"{vm.env_id}/{vm.name}"),
        ("Id", vm.id),
        ("State", f"{vm.state}, {vm.phase} (desired: {vm.desired})"),
        ("Engine", vm.engine),
        ("Image", vm.image),
        ("Size", f"{vm.cpu} vCPU, {size(vm.mem)} memory, {size(vm.disk)} disk"),
        ("Host", f"{vm.host_id} ({host.addr}, {host.state})" if host else vm.host_id),
        ("Address", vm.ip),
        ("Ports", ports(vm.port_map)),
        ("Created", clock(vm.created_at)),
        ("Generation", f"{vm.generation}, observed {vm.observed_generation}"),
        ("Attempts", str(vm.attempts)),
        ("Message", _trouble(vm)),
    )
    _conditions(vm.conditions)
    _events(happened)
    if ssh:
        _heading("Enter with:")
        say(f"  {ssh}")


def _host(host: Host, every: Iterable[Vm], happened: Sequence[Event], output: str) -> None:
    from api.cli.words import VM_COLUMNS, clock, size, span, vm_row, write_table

    vms = sorted((vm for vm in every if vm.host_id == host.id), key=lambda vm: (vm.env_id, vm.name))
    if output != "table":
        write_data({"host": host, "vms": vms}, output)
        return
    r = host.resource
    _fields(
        ("Host", host.id),
        ("Address", host.addr),
        ("State", host.state),
        ("Heartbeat", "-" if host.heartbeat_age is None else f"{span(host.heartbeat_age)} ago"),
        ("Message", host.message),
        ("Placement", _placement(host)),
        ("Engines", ", ".join(host.engines)),
        ("Storage", host.storage),
        ("CPU", f"{r.cpu_used} of {r.cpu_total} vCPU in use"),
        ("Memory", f"{size(r.mem_used)} of {size(r.mem_total)} in use"),
        ("Disk", f"{size(r.disk_used)} of {size(r.disk_total)} in use"),
        ("VMs", str(r.vm_count)),
        ("Registered", clock(host.registered_at)),
    )
    if vms:
        say("")
        write_table(VM_COLUMNS, [vm_row(vm) for vm in vms], indent="  ")
    _events(happened)


def _events(happened: Sequence[Event]) -> None:
    from api.cli.words import EVENT_COLUMNS, event_row, write_table

    if happened:
        _heading("Events:")
        write_table(EVENT_COLUMNS, [event_row(event) for event in happened], indent="  ")


def _placement(host: Host) -> str:
    if host.drain is None:
        return "cordoned: gets no new VMs" if host.cordoned else "open"
    drain = host.drain
    if drain.state == "drained":
        return "drained: it can be removed"
    blocked = "".join(f"; {item.env}/{item.name} is blocked: {item.why}" for item in drain.blocked)
    return f"draining: {drain.left} of {drain.total} VMs are left, {drain.moving} on their way{blocked}"


def _trouble(vm: Vm) -> str:
    again = ""
    if vm.next_attempt_at:
        left = vm.next_attempt_at - time.time()
        again = f"attempt {vm.attempts + 1} {f'in {left:.0f} s' if left >= 1 else 'now'}"
    return "; ".join(part for part in (vm.message, again) if part)


def _conditions(conditions: Iterable[Condition]) -> None:
    from api.cli.words import age, write_table

    rows = [(c.type, "yes" if c.status else "no", c.reason or "-", age(c.since), c.message or "-") for c in conditions]
    if rows:
        _heading("Conditions:")
        write_table(("TYPE", "STATUS", "REASON", "FOR", "MESSAGE"), rows, indent="  ")
