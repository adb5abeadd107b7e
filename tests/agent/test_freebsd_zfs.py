"""FreeBSD hosts with their VMs on ZFS, the usual way there: bhyve's disks are volumes, jails' roots are clones."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.storage.base import Storage
from agent.storage.zvol import ZvolStorage
from specs.names import Engine as EngineKind
from tests.agent.runtime_rig import NOBODY, request, until
from tests.agent.test_freebsd_killed import WANTED, Host
from tests.freebsd_fixture import FreeBsd, freebsd  # noqa: F401
from tests.standins import zfs

pytestmark = pytest.mark.real


class ZfsHost(Host):
    """Image folder, jail image and runtime folder are filesystems of the pool `tank`."""

    def __init__(self, folder: Path, freebsd: FreeBsd, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        super().__init__(folder, freebsd, monkeypatch)
        self.pool = folder / "pool"
        monkeypatch.setenv(zfs.ROOT, str(self.pool))
        zfs.install(freebsd.bin)
        zfs.make_pool(self.pool, "tank")
        for name, path in (("images", self.images), ("images/base", self.images / "base"), ("vms", self.vms)):
            subprocess.run(["zfs", "create", "-o", f"mountpoint={path}", f"tank/{name}"], check=True)
        self.bare = self.datasets()

    def storage(self) -> Storage:
        """Volumes of the pool."""
        return ZvolStorage(self.images, "tank/images", "tank/vms", devices=self.pool / "dev")

    def datasets(self) -> set[str]:
        """Everything in the pool, snapshots too."""
        told = subprocess.run(["zfs", "list", "-Hr", "-t", "all", "-o", "name", "tank"], check=True, capture_output=True)
        return set(told.stdout.decode().split())

    def added(self) -> set[str]:
        """What is in the pool since the host was made, the image that VMs' volumes are clones of left out."""
        return self.datasets() - self.bare - {"tank/images/guest", "tank/images/guest@base"}


@pytest.fixture
async def host(tmp_path: Path, freebsd: FreeBsd, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ZfsHost]:  # noqa: F811
    host = ZfsHost(tmp_path, freebsd, monkeypatch)
    yield host
    await host.kill()


async def test_a_bhyve_vm_boots_from_its_volume_and_finds_it_as_it_left_it(host: ZfsHost) -> None:
    runtime = await host.boot()
    vm, _ = await runtime.create(request(engine="bhyve", image="guest", disk=64), NOBODY, wait=True)
    assert (vm.state, vm.message) == ("running", "")
    assert host.added() == {"tank/vms/vm-a"}
    volume = host.pool / "dev" / "tank" / "vms" / "vm-a"
    assert volume.stat().st_size == 64 * 1024 * 1024
    await until(lambda: volume.read_bytes()[0] == 1, 60)
    await runtime.set_power("vm-a", "stopped", NOBODY, wait=True)
    await runtime.set_power("vm-a", "running", NOBODY, wait=True)
    await until(lambda: volume.read_bytes()[0] == 2, 60)
    assert (host.pool / "dev/tank/images/guest").read_bytes()[0] == 0
    await runtime.delete("vm-a", NOBODY)
    assert (host.added(), host.traces()) == (set(), host.NOTHING)


@pytest.mark.parametrize(("kind", "steps"), [(EngineKind.BHYVE, (9,)), (EngineKind.JAIL, (4,))])
async def test_killed_while_a_vm_on_zfs_is_made_or_removed_no_dataset_or_snapshot_is_left(
    host: ZfsHost, kind: EngineKind, steps: tuple[int, ...]
) -> None:
    for after in steps:
        runtime = await host.boot()
        await host.cut(after, runtime.create(request(**WANTED[kind]), NOBODY, wait=True))
        runtime = await host.boot()
        await until(lambda agent=runtime: all(vm.state == "running" for vm in agent.list()), 60)
        await host.cut(after // 2, runtime.delete("vm-a", NOBODY))
        runtime = await host.boot()
        await until(lambda agent=runtime: not agent.list(), 60)
        assert (after, host.added(), host.traces()) == (after, set(), host.NOTHING)
        await host.kill()
