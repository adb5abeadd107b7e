"""The endpoints of hosts, VMs and the fleet as a whole: read the request, record the intent or read the views, answer."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydantic import ValidationError

from api.base import CONTINUE, ApiHandler
from api.consoles import read_console
from api.lists import list_params, page
from reconciler.loop.intents import NoSuch
from specs.desired import HostSpec
from specs.failures import invalid
from specs.operations import TAIL, TAIL_LINES, operation
from specs.wire import Console, FleetStatus, Host, ImageInfo, Vm
from specs.wire import Version as VersionInfo


class Hosts(ApiHandler):
    """/api/hosts"""

    @operation(gives=tuple[Host, ...], query=list_params("hosts"), also=CONTINUE)
    async def on_get(self) -> None:
        """Lists hosts."""
        hosts, token = page(self.lists.hosts(self.asked), "hosts", self.asked)
        self.reply([self.views.host(host) for host in hosts], more={"continue": token} if token else None)

    @operation(takes=HostSpec, gives=Host, ok=(200, 201), fails=(400, 409, 422, 503))
    async def on_post(self) -> None:
        """Registers a host."""
        content = self.json()
        try:
            spec = HostSpec.model_validate(content)
        except ValidationError as error:
            failure = invalid(error)
            if any(item["loc"] == "addr" for item in failure.details):
                failure.status = 400
            raise failure from None
        host, created = await self.controller.add_host(spec.addr)
        self.reply(self.views.host(host), status=201 if created else 200)


class HostItem(ApiHandler):
    """/api/hosts/{id}; the address is accepted for the id."""

    @operation(gives=Host, fails=(404,))
    async def on_get(self, host_id: str) -> None:
        """One host."""
        self.reply(self.views.host(self.controller.intents.host(host_id)))

    @operation(fails=(404, 409, 422, 503))
    async def on_delete(self, host_id: str) -> None:
        """Unregisters a host."""
        await self.controller.remove_host(host_id)
        self.reply()


class HostCordon(ApiHandler):
    """/api/hosts/{id}/cordon and …/uncordon"""

    @operation(fails=(404, 422, 503))
    async def on_post(self, host_id: str, verb: str) -> None:
        """Records whether new VMs may be placed there."""
        self.no_body()
        await self.controller.intents.set_cordon(host_id, verb == "cordon")
        self.reply()


class VmItem(ApiHandler):
    """/api/vms/{id}"""

    @operation(gives=Vm, fails=(404,))
    async def on_get(self, vm_id: str) -> None:
        """One VM."""
        vm = self.views.find_vm(vm_id)
        if vm is None:
            raise NoSuch(f"there is no VM {vm_id}")
        self.reply(vm)


class VmConsole(ApiHandler):
    """/api/vms/{id}/console"""

    tagged = False  # a guest speaks while nothing else changes

    @operation(gives=Console, fails=(404, 409, 501, 503), query=(TAIL,))
    async def on_get(self, vm_id: str) -> None:
        """The last lines the guest wrote on its console, at most 64 KiB, asked of its host's agent."""
        text = await read_console(self.controller, vm_id, int(self.asked.get("tail", TAIL_LINES)))
        self.reply(Console(text=text))


class Vms(ApiHandler):
    """/api/vms"""

    @operation(gives=tuple[Vm, ...], query=list_params("vms"), also=CONTINUE)
    async def on_get(self) -> None:
        """Every VM of every environment."""
        vms, token = page(self.lists.vms(self.asked), "vms", self.asked)
        self.reply_json((self.hub.bodies.vm(vm).json for vm in vms), token)


class Images(ApiHandler):
    """/api/images"""

    @operation(gives=tuple[ImageInfo, ...])
    async def on_get(self) -> None:
        """Images of all online hosts."""
        self.reply(self.views.images())


class Status(ApiHandler):
    """/api/status"""

    @operation(gives=FleetStatus)
    async def on_get(self) -> None:
        """Sums over the fleet."""
        self.reply(self.views.fleet_status())


class Version(ApiHandler):
    """/api/version"""

    @operation(gives=VersionInfo)
    async def on_get(self) -> None:
        """What runs here."""
        fleet = self.controller.fleet
        self.reply({"version": version("muster"), "cluster_id": fleet.cluster, "term": self.controller.term})


ROUTES: list[Any] = [
    (r"/api/hosts", Hosts),
    (r"/api/hosts/(?P<host_id>[^/]+)", HostItem),
    (r"/api/hosts/(?P<host_id>[^/]+)/(?P<verb>cordon|uncordon)", HostCordon),
    (r"/api/vms", Vms),
    (r"/api/vms/(?P<vm_id>[^/]+)", VmItem),
    (r"/api/vms/(?P<vm_id>[^/]+)/console", VmConsole),
    (r"/api/images", Images),
    (r"/api/status", Status),
    (r"/api/version", Version),
]
