"""The endpoints of people who run the fleet: events, drains, VMs nobody recorded."""

from __future__ import annotations

from typing import Any

from api.base import ApiHandler
from reconciler.core.events import select
from reconciler.events import KEPT
from specs.desired import AdoptReq
from specs.operations import Param, operation
from specs.wire import EnvDetail, Event, Host, UnknownVm

EVENTS_TOLD = 500  # unless `limit` says otherwise


class Events(ApiHandler):
    """/api/events"""

    @operation(
        gives=tuple[Event, ...],
        query=(
            Param("env", "Only of this environment."),
            Param("host", "Only of this host, by id or address as the event names it."),
            Param("vm", "Only of this VM, by id or name."),
            Param(
                "since", "The first ones after this revision; the latest ones if left out.", kind="integer", says="a revision"
            ),
            Param(
                "limit",
                f"At most so many, {EVENTS_TOLD} if left out.",
                kind="integer",
                says=f"a number, at most {KEPT} events are kept",
            ),
        ),
    )
    async def on_get(self) -> None:
        """What happened, oldest first."""
        asked = self.asked
        found = select(
            self.controller.fleet.events,
            env=asked.get("env", ""),
            host=asked.get("host", ""),
            vm=asked.get("vm", ""),
            since=asked.get("since"),
            limit=asked.get("limit", EVENTS_TOLD),
        )
        self.reply([self.views.event(event) for event in found])


class HostDrain(ApiHandler):
    """/api/hosts/{id}/drain; …/uncordon takes it back"""

    @operation(gives=Host, fails=(404, 422, 503))
    async def on_post(self, host_id: str) -> None:
        """Records that the host's VMs are to be moved elsewhere; asked again, it changes nothing. Answers the host."""
        self.no_body()
        await self.controller.intents.drain(host_id)
        self.reply(self.views.host(self.controller.intents.host(host_id)))


class HostUnknown(ApiHandler):
    """/api/hosts/{id}/unknown"""

    @operation(gives=tuple[UnknownVm, ...], fails=(404,))
    async def on_get(self, host_id: str) -> None:
        """What the host has and nobody recorded, as it reported last."""
        found = self.controller.quarantine.unknown(host_id)
        self.reply([UnknownVm(**vm.model_dump(), obstacle=why) for vm, why in found])


class HostUnknownVm(ApiHandler):
    """/api/hosts/{id}/unknown/{vm_id}"""

    @operation(fails=(404, 409, 422, 503))
    async def on_delete(self, host_id: str, vm_id: str) -> None:
        """Records that nothing of the VM may be left."""
        self.no_body()
        await self.controller.quarantine.destroy(host_id, vm_id)
        self.reply()


class HostUnknownAdopt(ApiHandler):
    """/api/hosts/{id}/unknown/{vm_id}/adopt"""

    @operation(takes=AdoptReq, gives=EnvDetail, fails=(404, 409, 422, 503))
    async def on_post(self, host_id: str, vm_id: str) -> None:
        """Records the VM as part of an environment. Answers the environment."""
        wish = self.read(AdoptReq)
        await self.controller.quarantine.adopt(host_id, vm_id, wish.env, wish.name)
        self.reply(self.env_detail(wish.env))


ROUTES: list[Any] = [
    (r"/api/hosts/(?P<host_id>[^/]+)/unknown", HostUnknown),
    (r"/api/hosts/(?P<host_id>[^/]+)/unknown/(?P<vm_id>[^/]+)", HostUnknownVm),
    (r"/api/hosts/(?P<host_id>[^/]+)/unknown/(?P<vm_id>[^/]+)/adopt", HostUnknownAdopt),
    (r"/api/hosts/(?P<host_id>[^/]+)/drain", HostDrain),
    (r"/api/events", Events),
]
