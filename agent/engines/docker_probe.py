"""Finds out what a docker daemon can really do, by running a container in it. Called by the docker engine's probe."""

from __future__ import annotations

import contextlib
import io
import json
import platform
import struct
import tarfile
from dataclasses import dataclass

from agent.engines.docker_cli import DockerCli
from agent.engines.docker_create import confinement_words
from agent.errors import AgentError

# exit(0) in machine code: x86-64 `mov $60,%eax; xor %edi,%edi; syscall`, arm64 `mov x8,#93; mov x0,#0; svc #0`;
# with ELF's e_machine.
_EXIT = {
    "x86_64": (62, bytes.fromhex("b83c00000031ff0f05")),
    "aarch64": (183, bytes.fromhex("a80b80d2000080d2010000d4")),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the daemon told and showed. `ran`: a container really ran; False only where we cannot make a program for it."""

    detail: str
    quota: bool
    quota_why: str
    ran: bool
    warnings: tuple[str, ...]


async def find_facts(cli: DockerCli, owner: str) -> Facts:
    """Asks the daemon, then runs an empty container with the limits a VM gets. Raises AgentError when that fails."""
    version = await cli.version()
    info = json.loads(await cli("info", "--format", "{{json .}}", limit=30))
    if version.podman:
        name, driver, backing = "podman " + ".".join(map(str, version.client)), "podman", ""
    else:
        if info.get("ServerErrors"):
            raise AgentError(f"docker info: {'; '.join(info['ServerErrors'])}")
        driver = str(info.get("Driver", ""))
        backing = dict(pair for pair in info.get("DriverStatus") or [] if len(pair) == 2).get("Backing Filesystem", "")
        name = f"docker {info.get('ServerVersion', '')}, {driver}" + (f" on {backing}" if backing else "")
    may_limit = driver in ("btrfs", "zfs") or (driver == "overlay2" and backing == "xfs")
    ran, quota = await _run_once(cli, f"muster-probe-{owner}", may_limit=may_limit)
    warnings = []
    if not version.can_set_mac:
        warnings.append(
            f"the docker client {'.'.join(map(str, version.client))} cannot give containers on a bridge their address through "
            f"this daemon's API {'.'.join(map(str, version.api))}: install the client that came with the daemon"
        )
    if info.get("MemoryLimit") is False:
        warnings.append("this kernel does not limit the memory of containers: boot it with cgroup_enable=memory")
    return Facts(name, quota, f"{driver} on {backing or 'its filesystem'} has no quotas", ran, tuple(warnings))


async def _run_once(cli: DockerCli, name: str, *, may_limit: bool) -> tuple[bool, bool]:
    """(a container ran, its disk could be limited). Leaves nothing behind."""
    program = _program()
    tag = f"{name}:latest"
    with contextlib.suppress(AgentError):
        await cli("rm", "--force", name)
    try:
        await cli("import", "--change", 'CMD ["/exit"]', "-", tag, stdin=_image(program or b"\x7fELF"))
        words = ("create", "--pull=never", f"--name={name}", "--network=none", *confinement_words(1, 64))
        quota = False
        if may_limit:
            with contextlib.suppress(AgentError):
                await cli(*words, "--storage-opt=size=64M", "--", tag)
                quota = True
        if not quota:
            await cli(*words, "--", tag)
        if program is None:
            return False, quota
        await cli("start", "--attach", name)
        return True, quota
    finally:
        for cleanup in (("rm", "--force", "--volumes", name), ("image", "rm", "--force", tag)):
            with contextlib.suppress(AgentError):
                await cli(*cleanup)


def _image(program: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        entry = tarfile.TarInfo("exit")
        entry.mode, entry.size = 0o755, len(program)
        tar.addfile(entry, io.BytesIO(program))
    return out.getvalue()


def _program() -> bytes | None:
    """The smallest static ELF64 executable (elf(5)) that ends with status 0, or None for an unknown processor."""
    known = _EXIT.get(platform.machine())
    if known is None:
        return None
    machine, code = known
    base, headers = 0x400000, 64 + 56
    size = headers + len(code)
    ident = b"\x7fELF" + bytes([2, 1, 1, 0]) + bytes(8)
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, machine, 1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000) + code
