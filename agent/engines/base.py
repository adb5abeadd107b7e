"""What an engine driver must do. Called by the runtime alone, never twice at once for the same VM.

Every `ensure_…`, `start`, `stop` and `destroy` is safe to repeat and to cut off at any instant: what it makes has a name
derived from the VM id, and `destroy` removes by those names whatever an interrupted step left.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from agent.machine import DiskKind, EngineState, Machine, Probe
from specs.names import Engine as EngineKind
from specs.names import VmId
from specs.wire import CreateVmReq

OnExit = Callable[[VmId], None]


class Engine(Protocol):
    """One way of running machines. Instances are made once per agent process, before the event loop serves requests."""

    kind: EngineKind
    needs_disk: bool
    """True if the runtime must make a disk with the storage driver before `prepare`."""
    disk_kind: DiskKind
    """Which kind of disk that is; without meaning where `needs_disk` is False."""
    on_exit: OnExit
    """Set by the runtime. The driver calls it on the event loop's thread as soon as a VM's process ends, for any reason."""

    async def probe(self) -> Probe:
        """Says whether this engine works here; really tries what it claims. Called at agent start, may take seconds."""
        ...

    async def images(self) -> tuple[str, ...]:
        """Names of the base images this engine can start on this host, sorted."""
        ...

    def check(self, request: CreateVmReq) -> tuple[str, ...]:
        """Refuses what this engine can never honour (raises Unsupported); returns warnings for what it only partly can."""
        ...

    async def prepare(self, machine: Machine) -> None:
        """Makes everything short of a running process: seed image, container. Raises AgentError, ImageMissing."""
        ...

    async def start(self, machine: Machine) -> None:
        """Boots the prepared VM, the same disk every time. Returns once its process runs; a running VM is left alone."""
        ...

    async def stop(self, machine: Machine, grace: timedelta) -> None:
        """Asks the guest to power down, ends the process after `grace`. Returns when the process is gone and memory free."""
        ...

    async def destroy(self, vm_id: VmId, folder: Path) -> None:
        """Ends and removes everything this engine has of the VM, without grace, also where `prepare` was cut off.

        The folder itself and the disk belong to the runtime and the storage driver. Returns when the process is gone.
        """
        ...

    async def state(self, vm_id: VmId, folder: Path) -> EngineState | None:
        """What is really there, asked of the process or daemon; None if this engine has nothing of it.

        A pid is believed only with its recorded start time. Also re-adopts: after the first call in a new agent process,
        `on_exit` fires for VMs that were started by an earlier one. Raises AgentError when it cannot be known.
        """
        ...

    async def console(self, vm_id: VmId, folder: Path, limit: int) -> bytes:
        """At most the last `limit` bytes the guest wrote on its console, as it wrote them; nothing kept is b"".

        Raises AgentError when it cannot be known, NoConsole where none is kept.
        """
        ...

    async def leftovers(self, known: frozenset[VmId]) -> tuple[str, ...]:
        """Removes what this engine has on the host for VM ids outside `known`, and says what it removed.

        Only names this agent's own runtime folder would give are touched: several agents may share a machine.
        """
        ...

    async def close(self) -> None:
        """Releases connections and watchers. VMs keep running."""
        ...
