"""Strategies and builders of the core's values."""

from __future__ import annotations

from itertools import count

from hypothesis import strategies as st

from reconciler.core.model import Absent, EnvIntent, Observation, Present, Retry, Unknown, VmIntent
from reconciler.core.place import HostRoom
from specs.desired import EnvSpec, VmSpec
from specs.names import ClusterId, EnvId, HostId, VmId

CLUSTER = ClusterId("here")


def vm_intent(desired: str = "running", host: str | None = "h1", **changes: object) -> VmIntent:
    """A recorded VM."""
    fields: dict[str, object] = {
        "id": VmId("vm-1"),
        "env_id": EnvId("web"),
        "name": "a",
        "spec": VmSpec(image="tiny"),
        "spec_hash": "x",
        "desired": desired,
        "host_id": HostId(host) if host else None,
        "created_at": 1,
    }
    return VmIntent(**(fields | changes))  # type: ignore[arg-type]


def env_intent(spec: EnvSpec, **changes: object) -> EnvIntent:
    """A recorded environment."""
    fields: dict[str, object] = {
        "id": EnvId(spec.id),
        "spec": spec,
        "power": "running",
        "generation": 1,
        "rolled": 0,
        "created_at": 1,
        "expires_at": 0,
    }
    return EnvIntent(**(fields | changes))  # type: ignore[arg-type]


def ids(prefix: str = "vm") -> object:
    """A source of new uids."""
    numbers = count()
    return lambda: VmId(f"{prefix}-{next(numbers)}")


desires = st.sampled_from(["running", "stopped", "absent"])
reasons = st.sampled_from(["", "create_failed", "start_failed", "crashed", "exited"])  # those a host can act on
states = st.sampled_from(["running", "stopped", "paused", "creating", "failed"])
presents = st.builds(Present, state=states, reason=reasons, message=st.sampled_from(["", "boom"]))
observations: st.SearchStrategy[Observation] = st.one_of(
    presents, st.just(Absent()), st.builds(Unknown, why=st.just("silent"), silent=st.booleans())
)
retries = st.builds(Retry, attempts=st.integers(0, 9), not_before=st.floats(0, 100), error=st.sampled_from(["", "refused"]))
intents = st.builds(
    vm_intent,
    desired=desires,
    host=st.sampled_from([None, "h1"]),
    spec=st.builds(VmSpec, image=st.just("tiny"), restart=st.sampled_from(["always", "on-failure", "never"])),
)

entries = st.builds(
    VmSpec,
    image=st.sampled_from(["tiny", "big"]),
    engine=st.sampled_from(["qemu", "docker"]),
    cpu=st.integers(1, 8),
    mem=st.integers(1, 64),
    disk=st.integers(1, 64),
    count=st.integers(1, 4),
    spread=st.sampled_from(["pack", "hosts"]),
    host_labels=st.dictionaries(st.just("zone"), st.sampled_from(["a", "b"]), max_size=1),
)
specs = st.builds(
    EnvSpec,
    id=st.just("web"),
    ssh_keys=st.just(()),
    vms=st.lists(entries, min_size=1, max_size=4).map(tuple),
)
rooms = st.builds(
    HostRoom,
    id=st.sampled_from([f"h{n}" for n in range(9)]).map(HostId),
    addr=st.just("10.0.0.1:9100"),
    online=st.booleans(),
    cordoned=st.booleans(),
    engines=st.sets(st.sampled_from(["qemu", "docker"])).map(frozenset),
    images=st.sampled_from([{None: frozenset({"tiny"})}, {"qemu": frozenset({"tiny", "big"})}, {}]),
    labels=st.dictionaries(st.just("zone"), st.sampled_from(["a", "b"])),
    cpu_total=st.integers(0, 16),
    cpu_used=st.integers(0, 16),
    mem_total=st.integers(0, 128),
    mem_used=st.integers(0, 128),
    disk_total=st.integers(0, 128),
    disk_used=st.integers(0, 128),
)
fleets = st.lists(rooms, max_size=6, unique_by=lambda room: room.id)
