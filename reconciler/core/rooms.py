"""The hosts' rooms in an order in which a place is found without looking at every host. Called by the fleet; a pure structure.

Hosts that differ in nothing but what is used of them are of one kind, and those of a kind that use the same form a level. What
a VM needs besides room is asked of a kind once, and room of a level once: a fleet has few of both, however many hosts it has.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from reconciler.core.place import HostRoom, Placement, rank, refusal
from specs.desired import VmSpec
from specs.names import HostId

_Used = tuple[int, int, int]


@dataclass(slots=True)
class _Kind:
    """`empty` is one of its hosts with nothing used; `levels` are ordered by what is free, the fullest first."""

    empty: HostRoom
    levels: list[tuple[float, _Used]] = field(default_factory=list)
    hosts: dict[_Used, list[HostId]] = field(default_factory=dict)

    def add(self, room: HostRoom) -> None:
        used = (room.cpu_used, room.mem_used, room.disk_used)
        if used not in self.hosts:
            self.hosts[used] = []
            insort(self.levels, (self._free(used), used))
        insort(self.hosts[used], room.id)

    def remove(self, room: HostRoom) -> None:
        used = (room.cpu_used, room.mem_used, room.disk_used)
        ids = self.hosts[used]
        del ids[bisect_left(ids, room.id)]
        if not ids:
            del self.hosts[used]
            level = (self._free(used), used)
            del self.levels[bisect_left(self.levels, level)]

    def _free(self, used: _Used) -> float:
        cpu, mem, disk = used
        empty = self.empty
        return -(cpu / max(empty.cpu_total, 1) + mem / max(empty.mem_total, 1) + disk / max(empty.disk_total, 1))

    def fullest(self, vm: VmSpec, without: Mapping[HostId, int]) -> HostRoom | None:
        """The fullest host with room for the VM that is not in `without`."""
        empty = self.empty
        cpu, mem, disk = empty.cpu_total - vm.cpu, empty.mem_total - vm.mem, empty.disk_total - vm.disk
        for _, used in self.levels:
            if used[0] <= cpu and used[1] <= mem and used[2] <= disk:
                for host_id in self.hosts[used]:
                    if host_id not in without:
                        return replace(empty, id=host_id, cpu_used=used[0], mem_used=used[1], disk_used=used[2])
        return None


class Rooms:
    """Rooms by address. `put` and `remove` keep them in step with the fleet, `choose` is `place` over all of them."""

    def __init__(self) -> None:
        self._rooms: dict[str, HostRoom] = {}
        self._addr: dict[HostId, str] = {}
        self._kinds: dict[tuple[object, ...], _Kind] = {}

    def __iter__(self) -> Iterator[HostRoom]:
        return iter(self._rooms.values())

    def put(self, room: HostRoom) -> None:
        """Takes over a room, new or changed."""
        self.remove(room.addr)
        self._rooms[room.addr] = room
        self._addr[room.id] = room.addr
        key = _kind(room)
        if key not in self._kinds:
            self._kinds[key] = _Kind(replace(room, cpu_used=0, mem_used=0, disk_used=0, env_vms={}))
        self._kinds[key].add(room)

    def remove(self, addr: str) -> None:
        """Forgets a room; an unknown one is fine."""
        room = self._rooms.pop(addr, None)
        if room is None:
            return
        if self._addr.get(room.id) == addr:
            del self._addr[room.id]
        key = _kind(room)
        self._kinds[key].remove(room)
        if not self._kinds[key].hosts:
            del self._kinds[key]

    def choose(self, vm: VmSpec, siblings: Mapping[HostId, int]) -> Placement | None:
        """As `place`, up to the rounding of shares; None if no host can take it. `siblings`: VMs of its environment by host."""
        apart = siblings if vm.spread == "hosts" else {}
        # Too little room anywhere is no reason of a kind: an empty host that is too small refuses as well.
        kinds = [kind for kind in self._kinds.values() if not refusal(vm, kind.empty)]
        found = [room for kind in kinds if (room := kind.fullest(vm, apart)) is not None]
        if not found:
            among = [self._rooms[self._addr[host_id]] for host_id in apart if host_id in self._addr]
            found = [room for room in among if not refusal(vm, room)]
        best = min(found, key=lambda room: rank(vm, room, apart.get(room.id, 0)), default=None)
        return Placement(best.id) if best else None


def _kind(room: HostRoom) -> tuple[object, ...]:
    return (
        room.online, room.cordoned, room.why_offline, room.engines, frozenset(room.images.items()),
        frozenset(room.labels.items()), room.cpu_total, room.mem_total, room.disk_total,
    )  # fmt: skip
