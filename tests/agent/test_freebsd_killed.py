"""An agent on FreeBSD that is killed between any two of its commands leaves nothing that the next one does not clean up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from datetime import timedelta
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from agent import run as commands
from agent.engines.base import Engine
from agent.engines.bhyve import BhyveEngine
from agent.engines.jail import JailEngine
from agent.inventory import Capacity
from agent.network.freebsd import PfNetwork
from agent.records import TERMS, RecordStore
from agent.runtime import Drivers, Runtime
from agent.storage.base import Storage
from agent.storage.file import FileStorage
from specs.names import Engine as EngineKind
from tests.agent.runtime_rig import NOBODY, request, until
from tests.contract.test_engine_jail import write_userland
from tests.freebsd_fixture import FreeBsd, freebsd  # noqa: F401

pytestmark = pytest.mark.real


class Killed(BaseException):
    """What the code of a dead agent gets instead of an answer."""


class Host:
    """FreeBSD with an image for each engine. `boot` starts an agent, `kill` ends it before its next command but `after`."""

    def __init__(self, folder: Path, freebsd: FreeBsd, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        self.freebsd = freebsd
        self.vms, self.images, self.firmware = folder / "vms", folder / "images", folder / "UEFI.fd"
        self.vms.mkdir()
        write_userland(self.images / "base")
        (self.images / "guest.raw").write_bytes(bytes(1024 * 1024))
        self.firmware.touch()
        self.left: int | None = None
        self.engines: tuple[Engine, ...] = ()
        self.agents: list[Runtime] = []
        real = commands._Child.run

        def counted(child: Any, *words: Any) -> bytes:
            if self.left is not None:
                if self.left <= 0:
                    raise Killed
                self.left -= 1
            return real(child, *words)

        monkeypatch.setattr(commands._Child, "run", counted)

    def storage(self) -> Storage:
        """How disks are kept."""
        return FileStorage(self.images, self.vms)

    async def boot(self) -> Runtime:
        """A new agent, which has adopted what it found."""
        self.left = None
        storage = self.storage()
        bhyve = BhyveEngine(self.vms, storage.images, firmware=self.firmware, vmm=self.freebsd.vmm)
        self.engines = (bhyve, JailEngine(self.vms, self.images))
        assert {type(await engine.probe()).__name__ for engine in self.engines} == {"Usable"}
        network = PfNetwork("mtt0", IPv4Network("10.91.0.0/24"))
        runtime = Runtime(
            host_id="host-1",
            store=RecordStore(self.vms),
            drivers=Drivers({each.kind: each for each in self.engines}, storage, network, {}),
            capacity=Capacity(cpu=100, mem=100_000, disk=100_000),
            stop_grace=timedelta(seconds=5),
            resync=timedelta(hours=1),
        )
        self.agents.append(runtime)
        await runtime.start()
        await until(lambda: runtime.complete, 60)
        return runtime

    async def kill(self) -> None:
        """Ends the agent without another command."""
        self.left = 0
        for runtime in self.agents:
            await runtime.close()
        for engine in self.engines:
            await engine.close()
        self.agents.clear()
        self.left = None

    async def cut(self, after: int, work: Coroutine[Any, Any, object]) -> None:
        """Begins something and kills the agent after so many commands of it."""
        self.left = after
        call = asyncio.ensure_future(work)
        await until(lambda: call.done() or self.left == 0, 60)
        await self.kill()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    def traces(self) -> dict[str, object]:
        """What is on the host of any VM."""
        state = self.freebsd.state
        return {
            "vmm": sorted(state["vmm"]) + sorted(path.name for path in self.freebsd.vmm.iterdir()),
            "jails": sorted(state["jails"]) + state["rctl"] + sorted(state["mounts"]),
            "links": sorted(self.freebsd.links() - {"mtt0"}),
            "rules": state["pf"]["anchors"],
            "folders": sorted(path.name for path in self.vms.iterdir() if path.name not in (".lock", TERMS)),
        }

    NOTHING = {"vmm": [], "jails": [], "links": [], "rules": {}, "folders": []}  # noqa: RUF012


@pytest.fixture
async def host(tmp_path: Path, freebsd: FreeBsd, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:  # noqa: F811
    host = Host(tmp_path, freebsd, monkeypatch)
    yield host
    await host.kill()


WANTED = {
    EngineKind.BHYVE: {"engine": "bhyve", "image": "guest"},
    EngineKind.JAIL: {"engine": "jail", "image": "base", "user_data": "#!/bin/sh\necho hello\n"},
}


@pytest.mark.parametrize("kind", WANTED)
async def test_killed_between_commands_of_a_creation_or_removal_nothing_leaks(host: Host, kind: EngineKind) -> None:
    for after in (2, 6):
        runtime = await host.boot()
        await host.cut(after, runtime.create(request(**WANTED[kind]), NOBODY, wait=True))
        runtime = await host.boot()
        await until(lambda agent=runtime: all(vm.state == "running" for vm in agent.list()), 60)
        await host.cut(after, runtime.delete("vm-a", NOBODY))
        runtime = await host.boot()
        await until(lambda agent=runtime: not agent.list(), 60)
        assert host.traces() == host.NOTHING, after
        await host.kill()
