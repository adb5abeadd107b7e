"""A machine of the fleet: what is on its disk and in its kernel, whether or not an agent runs on it.

Every effect on it goes through this class, so that the checks see reality itself and not what anybody says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import Literal, Protocol

from agent.machine import Lease
from agent.network.pool import allocate, first_address
from agent.records import Terms
from specs.names import ClusterId, VmId
from specs.wire import CreateVmReq

SUBNET = IPv4Network("10.77.0.0/24")
PORTS = range(20000, 20200)
EngineState = Literal["running", "exited", "crashed", "off"]


@dataclass(slots=True)
class Record:
    """vm.json."""

    request: CreateVmReq
    cluster: str
    created_at: int
    lease: Lease
    power: Literal["running", "stopped"] = "running"
    complete: bool = False
    deleting: bool = False


class HostTerms(Terms):
    """The production rule about terms over this machine's disk."""

    def __init__(self) -> None:
        self._highest = {}

    def admit(self, cluster: ClusterId, term: int) -> None:
        """As in production, without the file."""
        self.check(cluster, term)
        self._highest[cluster] = term


class Witness(Protocol):
    """Who is told what really happens on a host."""

    def booted(self, host: Host, vm_id: VmId) -> None:
        """A VM's process has begun."""

    def halted(self, host: Host, vm_id: VmId, why: str) -> None:
        """A VM's process has ended by `why`: stop, destroy, undo, fault."""

    def made(self, host: Host, vm_id: VmId) -> None:
        """A new VM is on record."""

    def removed(self, host: Host, vm_id: VmId, why: str) -> None:
        """Nothing of a VM is left, by `why`."""

    def acted(self, host: Host, cluster: str, term: int) -> None:
        """A controller's call takes effect."""

    def leased(self, host: Host, vm_id: VmId, lease: Lease) -> None:
        """An address and ports were given to a VM."""


@dataclass(eq=False)
class Host:
    """One machine. `images` maps a name to whether starting it works (False: poison)."""

    name: str
    addr: str
    cpu: int
    mem: int
    disk: int
    images: set[str]
    witness: Witness
    records: dict[VmId, Record] = field(default_factory=dict)
    disks: set[VmId] = field(default_factory=set)
    taps: set[VmId] = field(default_factory=set)
    engine: dict[VmId, EngineState] = field(default_factory=dict)
    terms: HostTerms = field(default_factory=HostTerms)
    powered: bool = True
    on_exit: Callable[[VmId], None] = lambda _: None

    def boot(self, vm_id: VmId) -> None:
        """Starts the VM's process."""
        self.engine[vm_id] = "running"
        self.witness.booted(self, vm_id)

    def halt(self, vm_id: VmId, state: EngineState, why: str) -> None:
        """Ends the VM's process, if it has one; what the engine keeps of it says `state`."""
        was = self.engine.get(vm_id)
        if was is None:
            return
        self.engine[vm_id] = state
        if was == "running":
            self.witness.halted(self, vm_id, why)
            if why == "fault":
                self.on_exit(vm_id)

    def record(self, vm_id: VmId, record: Record) -> None:
        """Writes vm.json."""
        is_new = vm_id not in self.records
        self.records[vm_id] = record
        if is_new:
            self.witness.made(self, vm_id)

    def discard(self, vm_id: VmId, why: str) -> None:
        """Removes vm.json; everything else is gone already."""
        if self.records.pop(vm_id, None) is not None:
            self.witness.removed(self, vm_id, why)

    def lose(self, vm_id: VmId) -> None:
        """A fault: somebody removed everything of the VM by hand."""
        self.halt(vm_id, "off", "fault")
        self.engine.pop(vm_id, None)
        self.disks.discard(vm_id)
        self.taps.discard(vm_id)
        self.discard(vm_id, "fault")

    def lease(self, request: CreateVmReq, taken: Collection[Lease], resting: Collection[int]) -> Lease:
        """An address and ports for a new VM, chosen by the production pool."""
        vm_id = VmId(request.vm_id)
        lease = allocate(
            taken,
            vm_id,
            {22, *request.ports},
            request.deny_outgoing,
            request.env_id,
            subnet=SUBNET,
            gateway=first_address(SUBNET),
            is_free=lambda _: True,
            port_range=PORTS,
            avoid_ports=resting,
        )
        self.witness.leased(self, vm_id, lease)
        return lease

    def lose_power(self) -> None:
        """The machine is off: every process ends."""
        self.powered = False
        for vm_id in tuple(self.engine):
            self.halt(vm_id, "crashed", "reboot")

    def leftovers(self) -> set[VmId]:
        """Parts that belong to no record."""
        return ({*self.disks} | {*self.taps} | {*self.engine}) - self.records.keys()
