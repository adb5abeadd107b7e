"""The endpoints of people who run the fleet: events, drains, VMs nobody recorded."""

from __future__ import annotations

import re
from typing import Any

from api.handlers import ApiHandler
from reconciler.core.events import select
from reconciler.events import KEPT
from specs.desired import AdoptReq
from specs.http import Failure
from specs.wire import UnknownVm

EVENTS_TOLD = 500  # unless `limit` says otherwise


class Events(ApiHandler):
    """/api/events"""

    async def on_get(self) -> None:
        """What happened, oldest first: `?env= &host= &vm= &since=<revision> &limit=`; `vm` is an id or a name.

        Without `since` the latest ones, with it the first after that revision.
        """
        found = select(
            self.controller.fleet.events,
            env=self.get_query_argument("env", ""),
            host=self.get_query_argument("host", ""),
            vm=self.get_query_argument("vm", ""),
            since=self._number("since", None),
            limit=self._number("limit", EVENTS_TOLD) or 0,
        )
        self.reply([self.views.event(event) for event in found])

    def _number(self, name: str, default: int | None) -> int | None:
        asked = self.get_query_argument(name, None)
        if asked is None:
            return default
        if not re.fullmatch(r"\d{1,18}", asked):
            what = "a revision" if name == "since" else f"a number, at most {KEPT} events are kept"
            raise Failure(400, "invalid", f"{name} must be {what}")
        return int(asked)


class HostDrain(ApiHandler):
    """/api/hosts/{id}/drain; …/uncordon takes it back"""

    async def on_post(self, host_id: str) -> None:
        """Records that the host's VMs are to be moved elsewhere; asked again, it changes nothing. Answers the host."""
        self.no_body()
        await self.controller.intents.drain(host_id)
        self.reply(self.views.host(self.controller.intents.host(host_id)))


class HostUnknown(ApiHandler):
    """/api/hosts/{id}/unknown"""

    async def on_get(self, host_id: str) -> None:
        """What the host has and nobody recorded, as it reported last."""
        found = self.controller.quarantine.unknown(host_id)
        self.reply([UnknownVm(**vm.model_dump(), obstacle=why) for vm, why in found])


class HostUnknownVm(ApiHandler):
    """/api/hosts/{id}/unknown/{vm_id}"""

    async def on_delete(self, host_id: str, vm_id: str) -> None:
        """Records that nothing of the VM may be left."""
        self.no_body()
        await self.controller.quarantine.destroy(host_id, vm_id)
        self.reply()


class HostUnknownAdopt(ApiHandler):
    """/api/hosts/{id}/unknown/{vm_id}/adopt"""

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
