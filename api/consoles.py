"""Asks a VM's host what the VM last said on its console."""

from __future__ import annotations

from reconciler.agents import AgentFailure, Refused
from reconciler.loop.controller import Controller
from reconciler.loop.intents import NoSuch
from specs.failures import Failure
from specs.names import VmId


async def read_console(controller: Controller, vm_id: str, tail: int) -> str:
    """The last `tail` lines. Raises NoSuch, or Failure: 409 not placed, 501 a host that keeps none, 503 a host that is away."""
    vm = controller.fleet.vms.get(VmId(vm_id))
    if vm is None or vm.gone_at:
        raise NoSuch(f"there is no VM {vm_id}")
    host = controller.fleet.host(vm.host_id or "")
    if host is None:
        raise Failure(409, "not_placed", f"VM {vm_id} is on no host yet, so it has no console")
    client = controller.watchers.client(host.intent.addr)
    if client is None or not host.online:
        raise Failure(503, "offline", f"host {host.shown_id} is away ({host.why}); its consoles can be read when it is back")
    try:
        return await client.console(vm.id, tail)
    except Refused as error:
        if error.status in (404, 405):
            if error.code == "not_found" and vm_id in str(error):
                raise Failure(409, "not_there", f"nothing of VM {vm_id} is on host {host.shown_id} yet") from error
            raise Failure(501, "no_console", f"the agent of host {host.shown_id} does not tell consoles") from error
        status = error.status if error.status in (409, 501) else 503
        raise Failure(status, error.code or "no_console", f"host {host.shown_id}: {error}") from error
    except AgentFailure as error:
        raise Failure(503, "offline", f"host {host.shown_id} does not tell the console of VM {vm_id}: {error}") from error
