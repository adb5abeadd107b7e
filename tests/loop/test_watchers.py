"""When a host counts as online."""

from __future__ import annotations

import asyncio
from typing import Any

from reconciler.core.model import Change, HostIntent
from reconciler.fleet import Fleet
from reconciler.loop.clock import Clock
from reconciler.loop.watchers import Watchers, WatchSettings
from specs.names import ClusterId, HostId
from specs.wire import AgentInfo


class SilentClient:
    """Says who it is, and then nothing more: its packets are lost, its connection stays."""

    async def info(self) -> AgentInfo:
        told = {"host_id": "silent", "resource": {}, "engines": ["docker"], "storage": "file", "images": []}
        return AgentInfo.model_validate(told)

    async def list_vms(self, **_: object) -> Any:
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Nothing is open."""


async def test_a_host_that_falls_silent_is_offline_with_its_third_missed_heartbeat_however_long_calls_may_take() -> None:
    fleet = Fleet(ClusterId("test"))
    fleet.apply(Change(hosts=(HostIntent("10.0.0.2:9100", HostId("silent"), 0),)))
    host = fleet.hosts["10.0.0.2:9100"]
    settings = WatchSettings(heartbeat=0.1)
    watchers = Watchers(fleet, None, lambda _: SilentClient(), Clock(), settings)  # type: ignore[arg-type]
    watchers.add("10.0.0.2:9100")
    async with asyncio.timeout(20):
        await host.answered.wait()
        while host.online or host.offline_since is None:  # noqa: ASYNC110 told by nobody
            await asyncio.sleep(0.01)
    await watchers.close()
    assert host.why == "no answer within 0.3 s"
