"""What the jail driver does beyond the contract: what is in its root, limits, user data, ZFS, what it refuses."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from agent.engines.jail import JailEngine
from agent.engines.jail_root import write_inside
from agent.errors import AgentError, ImageMissing, Unsupported
from agent.machine import Machine, Running, Stopped, Unusable, Usable
from tests.agent.runtime_rig import KEY
from tests.contract.engine_contract import until
from tests.contract.test_engine_jail import JailRig, write_userland
from tests.freebsd_fixture import FreeBsd, freebsd  # noqa: F401
from tests.standins import zfs

pytestmark = pytest.mark.real


@pytest.fixture
async def rig(freebsd: FreeBsd, tmp_path: Path) -> AsyncIterator[JailRig]:  # noqa: F811
    rig = JailRig(tmp_path / "runtime", freebsd)
    yield rig
    await rig.close()
    assert rig.nothing_is_left(), freebsd.state


async def asking(rig: JailRig, vm_id: str = "vm-a", **fields: object) -> Machine:
    """A machine whose request has these fields."""
    plain = await rig.make_machine(vm_id)
    machine = replace(plain, request=plain.request.model_copy(update=fields))
    rig.machines[-1] = machine
    return machine


async def test_keys_resolvers_address_limits_and_devices_are_those_asked_for(rig: JailRig) -> None:
    machine = await asking(rig, ssh_keys=(KEY,), cpu=2, mem=96, name="web.1")
    await rig.running(machine)
    root, found = machine.folder / "root", rig.host.state
    keys = root / "root" / ".ssh" / "authorized_keys"
    assert keys.read_text() == f"{KEY}\n"
    assert (keys.stat().st_mode & 0o777, keys.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert 'sshd_enable="YES"' in (root / "etc/rc.conf.d/sshd").read_text()
    assert (root / "etc/resolv.conf").read_text() == "nameserver 192.0.2.53\n"
    jail = found["jails"][rig.name(machine)]
    assert (jail["hostname"], jail["gateway"]) == ("web-1", str(machine.nic.gateway))
    assert found["interfaces"][machine.nic.link]["inet"] == [f"{machine.nic.lease.ip}/16"]
    limits = ("memoryuse:deny=100663296", "pcpu:deny=200", "maxproc:deny=4096")
    assert found["rctl"] == [f"jail:{rig.name(machine)}:{rule}" for rule in limits]
    assert found["mounts"] == {str(root / "dev"): 1}


async def test_user_data_runs_once_inside_and_its_output_is_on_the_console(rig: JailRig) -> None:
    machine = await asking(rig, user_data="#!/bin/sh\necho said-once\n")
    await rig.running(machine)
    await until(lambda: "said-once" in rig.console(machine))
    await rig.engine.stop(machine, timedelta(seconds=10))
    assert await rig.state(machine) == Stopped()
    await rig.engine.start(machine)
    await until(lambda: "guest: boot 2" in rig.console(machine))
    assert rig.console(machine).count("said-once") == 1


async def test_what_a_jail_cannot_keep_is_refused_or_warned_of(rig: JailRig) -> None:
    machine = await asking(rig)
    with pytest.raises(Unsupported, match="must be a script that starts with #!"):
        rig.engine.check(machine.request.model_copy(update={"user_data": "#cloud-config\n{}"}))
    rig.host.change(sysctl={"kern.racct.enable": "0"})
    assert isinstance(await rig.engine.probe(), Usable)
    limits, disk = rig.engine.check(machine.request)
    assert "kern.racct.enable=1" in limits
    assert "disk: 8 MiB is not enforced" in disk
    await rig.running(machine)
    assert rig.host.state["rctl"] == []


async def test_a_missing_image_is_named_with_those_that_are_there(rig: JailRig) -> None:
    machine = await asking(rig, image="absent")
    with pytest.raises(ImageMissing, match=r"absent.*base"):
        await rig.engine.prepare(machine)


async def test_an_archive_is_an_image_too(rig: JailRig) -> None:
    base = rig.image_dir / "base"
    subprocess.run(["tar", "-cJf", rig.image_dir / "release.txz", "-C", base, "."], check=True)  # noqa: ASYNC221
    assert await rig.engine.images() == ("base", "release")
    machine = await asking(rig, image="release")
    await rig.running(machine)
    assert await rig.boots(machine) == 1


async def test_a_link_in_an_image_does_not_lead_the_agent_out_of_the_root(rig: JailRig, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (rig.image_dir / "base" / "root").symlink_to(outside)
    machine = await asking(rig, ssh_keys=(KEY,))
    with pytest.raises(AgentError, match="cannot be written in the jail's root"):
        await rig.engine.prepare(machine)
    with pytest.raises(AgentError, match="cannot be written"):
        write_inside(rig.image_dir / "base", "root/x", b"", 0o600)
    assert list(outside.iterdir()) == []


async def test_jails_without_a_ruleset_for_devices_are_not_offered(rig: JailRig) -> None:
    rig.host.change(rulesets=[])
    probe = await rig.engine.probe()
    assert isinstance(probe, Unusable)
    assert "would see every device" in probe.why


async def test_on_zfs_a_root_is_a_clone_with_a_quota_and_goes_with_its_snapshot(
    freebsd: FreeBsd,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = tmp_path / "pool"
    monkeypatch.setenv(zfs.ROOT, str(pool))
    zfs.install(freebsd.bin)
    zfs.make_pool(pool, "tank")
    rig = JailRig(tmp_path / "zfs", freebsd)
    images = tmp_path / "z-images"
    for name, path in (("images", images), ("images/base", images / "base"), ("vms", rig.runtime_dir)):
        subprocess.run(["zfs", "create", "-o", f"mountpoint={path}", f"tank/{name}"], check=True)  # noqa: ASYNC221
    write_userland(images / "base")
    rig.engine = JailEngine(rig.runtime_dir, images)
    bare = datasets()
    machine = await asking(rig, disk=512)
    await rig.running(machine)
    assert isinstance(await rig.state(machine), Running)
    assert len(rig.engine.check(machine.request)) == 0
    name = rig.name(machine)
    assert datasets() - bare == {f"tank/vms/{name}", f"tank/images/base@{name}"}
    told = subprocess.run(["zfs", "get", "-H", "-o", "value", "refquota", f"tank/vms/{name}"], check=True, capture_output=True)  # noqa: ASYNC221
    assert told.stdout.split() in ([b"512M"], [b"536870912"])
    await rig.close()
    assert datasets() == bare
    assert rig.nothing_is_left()


def datasets() -> set[str]:
    """Everything in the pool."""
    listed = subprocess.run(
        ["zfs", "list", "-H", "-r", "-t", "filesystem,snapshot", "-o", "name", "tank"],
        check=True,
        capture_output=True,
        text=True,
    )
    return set(listed.stdout.split())
