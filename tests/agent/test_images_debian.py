"""The image `debian`: what its disk holds, and that nothing of the machine that made it gets into it.

That the whole image boots and cloud-init does its work is shown by `ops/up --once --image debian`.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.images import build
from agent.images.debian import _borrow, _make_disk, _settle, master_boot_record
from agent.images.packages import fetch, unpack, with_dependencies
from agent.images.recipe import default_cache
from agent.run import run


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """What of an installed system matters here."""
    root = tmp_path / "work" / "root"
    for folder in (
        "etc/ssh",
        "etc/cloud/cloud.cfg.d",
        "etc/systemd/system",
        "boot",
        "var/log/apt",
        "var/lib/apt/lists",
        "usr/bin",
    ):
        (root / folder).mkdir(parents=True)
    for name in ("etc/ssh/ssh_host_ed25519_key", "etc/machine-id", "etc/hostname", "var/log/apt/history.log"):
        (root / name).write_text("of the making machine\n")
    (root / "boot/vmlinuz-6.1.0-1-cloud-amd64").write_bytes(b"kernel" * 1000)
    (root / "boot/initrd.img-6.1.0-1-cloud-amd64").write_bytes(b"initrd" * 1000)
    return root


def test_nothing_of_the_machine_that_made_it_or_of_one_guest_is_left(system: Path) -> None:
    _borrow(system)
    assert (system / "etc/resolv.conf").read_bytes() == Path("/etc/resolv.conf").read_bytes()
    _settle(system)
    assert not list((system / "etc/ssh").iterdir())
    assert not list((system / "var/log").iterdir())
    assert not (system / "etc/hostname").exists()
    assert (system / "etc/machine-id").read_text() == "uninitialized\n"
    assert (system / "etc/resolv.conf").is_symlink()
    assert (system / "etc/hosts").read_text().startswith("127.0.0.1 localhost\n")
    assert not any(
        (system / "etc/apt" / name).is_dir() and any((system / "etc/apt" / name).iterdir()) for name in ("apt.conf.d",)
    )
    sources = (system / "etc/apt/sources.list").read_text().splitlines()
    assert {line.split()[1].split("/")[2] for line in sources} == {"deb.debian.org", "security.debian.org"}
    hook = system / "etc/kernel/postinst.d/zz-muster"
    assert stat.S_IMODE(hook.stat().st_mode) == 0o755
    assert (system / "etc/systemd/system/apt-daily.timer").readlink() == Path("/dev/null")


@pytest.mark.real
async def test_the_disk_has_a_boot_partition_and_behind_it_a_root_that_can_grow(system: Path) -> None:
    work = system.parent
    (system / "usr/bin/hello").write_text("there\n")
    archives = await fetch(await with_dependencies(("mtools", "syslinux", "syslinux-common")), default_cache(), print)
    await unpack(archives, work / "tools")
    await _make_disk(work, system)
    disk = work / "disk.raw"
    table = json.loads(await run("/usr/sbin/sfdisk", "--json", disk))["partitiontable"]["partitions"]
    assert [(part["type"], part.get("bootable", False)) for part in table] == [("e", True), ("83", False)]
    root, offset = table[1], table[1]["start"] * 512
    assert root["start"] >= table[0]["start"] + table[0]["size"]
    assert root["start"] + root["size"] <= disk.stat().st_size // 512, "nothing lies behind it"
    files = await run(
        "mdir",
        "-ab",
        "-i",
        f"{disk}@@{table[0]['start'] * 512}",
        "::",
        env={"PATH": f"{work}/tools/usr/bin:{os.environ['PATH']}"},
    )
    assert {"::/vmlinuz", "::/initrd", "::/syslinux.cfg", "::/ldlinux.sys"} <= set(files.split())
    look = ("/usr/sbin/debugfs", "-R")
    assert await run(*look, "cat /usr/bin/hello", f"{disk}?offset={offset}") == "there\n"
    await run("/usr/sbin/e2fsck", "-fn", f"{disk}?offset={offset}")


def test_boot_code_that_is_too_long_is_refused() -> None:
    assert len(master_boot_record(b"code")) == 512
    with pytest.raises(AgentError, match="has room for 440"):
        master_boot_record(bytes(441))


async def test_who_is_not_root_is_told_so_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("agent.images.recipe.tool", lambda name: f"/bin/{name}")
    with pytest.raises(AgentError, match="takes root; run it with sudo"):
        await build("debian", tmp_path / "images", progress=print, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
