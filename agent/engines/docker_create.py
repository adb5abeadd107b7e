"""What docker is asked for, as pure functions: a machine in, command words or bytes out. No I/O."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

from agent.engines.docker_cli import ENV_LABEL, OWNER_LABEL, VM_LABEL, container_name
from agent.errors import AgentError, Unsupported
from agent.machine import Machine, Nic

MIN_MEM_MIB = 6  # dockerd refuses a smaller --memory
_PIDS = 4096
_CPU_PERIOD = 100_000  # microseconds, the kernel's default for cpu.cfs_period_us

# What sshd (own user, chroot, audit record), web servers (low ports) and package managers (owners, modes) need.
# NET_RAW is not among them: with it a container could forge its neighbours' addresses.
_CAPABILITIES = (
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "NET_BIND_SERVICE",
    "SETGID",
    "SETUID",
    "SYS_CHROOT",
)


def network_name(bridge: str) -> str:
    """The docker network that stands for one of our bridges."""
    return f"muster-{bridge}"


def create_words(machine: Machine, owner: str, *, quota: bool) -> tuple[str, ...]:
    """`docker create …` for a machine; the same words suit podman. `quota`: the storage driver can limit the disk.

    Raises Unsupported for a deny_outgoing that nothing would enforce.
    """
    request = machine.request
    words = [
        "create",
        "--pull=never",
        f"--name={container_name(machine.id)}",
        f"--hostname={machine.hostname}",
        f"--label={VM_LABEL}={machine.id}",
        f"--label={ENV_LABEL}={request.env_id}",
        f"--label={OWNER_LABEL}={owner}",
        "--restart=no",
        *confinement_words(request.cpu, request.mem),
        # Without a limit a talkative container fills the host's disk.
        "--log-driver=json-file",
        "--log-opt=max-size=10m",
    ]
    if quota:
        words.append(f"--storage-opt=size={request.disk}M")
    words += _plug_words(machine.nic)
    return (*words, "--", request.image)


def confinement_words(cpu: int, mem_mib: int) -> tuple[str, ...]:
    """Limits and privileges, the same for a VM and for the probe's container.

    A quota rather than --cpus: dockerd refuses --cpus above the host's count, a quota above it is merely no limit.
    """
    return (
        f"--cpu-period={_CPU_PERIOD}",
        f"--cpu-quota={cpu * _CPU_PERIOD}",
        f"--memory={mem_mib}m",
        f"--memory-swap={mem_mib}m",
        f"--pids-limit={_PIDS}",
        "--security-opt=no-new-privileges",
        "--cap-drop=ALL",
        *(f"--cap-add={name}" for name in _CAPABILITIES),
    )


def _plug_words(nic: Nic) -> list[str]:
    lease = nic.lease
    if nic.kind == "bridge":
        words = [f"--network={network_name(nic.bridge)}", f"--ip={lease.ip}", f"--mac-address={lease.mac}"]
        return words + [f"--dns={server}" for server in _dns(nic)]
    if nic.kind == "user":
        if lease.deny_outgoing:
            raise Unsupported(
                "deny_outgoing cannot be enforced for containers on docker's own network; "
                "run the agent as root with --network bridge on this host"
            )
        forwards = sorted(lease.ports.items())
        published = [f"--publish={addr}:{host}:{guest}" for addr in nic.forward_addrs for guest, host in forwards]
        return published + [f"--dns={server}" for server in _dns(nic)]
    raise AgentError(f"the docker engine cannot plug a container into a {nic.kind} device; this is a fault of the agent")


def _dns(nic: Nic) -> tuple[str, ...]:
    # Docker's embedded resolver asks a loopback resolver of the host from the host's own namespace, past every rule of
    # ours. An address given by --dns is asked from the container's namespace, where 127.0.0.1 is the container itself.
    # The gateway answers for the environment's own names alone.
    return ("127.0.0.1",) if nic.lease.deny_outgoing and nic.dns != (str(nic.gateway),) else nic.dns


def network_words(nic: Nic, owner: str, *, podman: bool) -> tuple[str, ...]:
    """`docker network create …` for a network whose bridge is ours and stays ours.

    The daemon adopts an existing bridge, sets no address on it (inhibit_ipv4) and no masquerade; addresses and rules are
    the network driver's. podman: netavark's `unmanaged` mode (podman-network-create(1)) means the same.
    """
    common = ("--driver=bridge", f"--subnet={nic.subnet}", f"--gateway={nic.gateway}", f"--label={OWNER_LABEL}={owner}")
    if podman:
        own = (f"--interface-name={nic.bridge}", "--opt=mode=unmanaged", f"--opt=mtu={nic.mtu}", "--disable-dns")
    else:
        bridge = "--opt=com.docker.network.bridge"
        own = (
            f"{bridge}.name={nic.bridge}",
            f"{bridge}.enable_ip_masquerade=false",
            f"{bridge}.inhibit_ipv4=true",
            f"--opt=com.docker.network.driver.mtu={nic.mtu}",
        )
    return ("network", "create", *common, *own, network_name(nic.bridge))


def keys_archive(keys: Iterable[str]) -> bytes:
    """A tar to unpack at `/`: root's authorized_keys with the owner and modes that sshd and dropbear insist on."""
    content = "".join(f"{key}\n" for key in keys).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for folder in ("root", "root/.ssh"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o700
            tar.addfile(entry)
        entry = tarfile.TarInfo("root/.ssh/authorized_keys")
        entry.mode, entry.size = 0o600, len(content)
        tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()
