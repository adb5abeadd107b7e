"""What happened to whom, as values: Kubernetes' events (https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Reason = Literal[
    "Recorded", "Expired", "Deleted", "Placed", "Unplaceable", "Creating", "Running", "Restarted", "Stopped", "Failed",
    "Replaced", "Refused", "HostRegistered", "HostRemoved", "HostOnline", "HostOffline", "HostLost", "Cordoned", "Uncordoned",
    "Draining", "DrainBlocked", "Drained", "UnknownVmFound", "UnknownVmDestroyed", "Adopted", "ClockJumped",
]  # fmt: skip
WARNINGS: frozenset[Reason] = frozenset(
    {"Unplaceable", "Failed", "Refused", "HostOffline", "HostLost", "DrainBlocked", "UnknownVmFound", "ClockJumped"}
)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened, `count` times. Times in Unix seconds; "" where there is no environment, VM or host.

    `revision` grows with every event and every repeat; `id` is the first revision it had.
    """

    id: int
    revision: int
    reason: Reason
    message: str
    env: str
    vm: str
    vm_name: str
    host: str
    count: int
    first_seen: int
    last_seen: int

    @property
    def subject(self) -> tuple[str, str, str, str]:
        """What makes two events of one kind: reason and everybody concerned."""
        return (self.reason, self.env, self.vm, self.host)

    @property
    def is_warning(self) -> bool:
        """Whether somebody should look at it."""
        return self.reason in WARNINGS

    def again(self, revision: int, now: int) -> Event:
        """The event after one more repeat."""
        return replace(self, revision=revision, count=self.count + 1, last_seen=max(now, self.last_seen))


def select(
    events: Iterable[Event], *, env: str = "", host: str = "", vm: str = "", since: int | None = None, limit: int
) -> list[Event]:
    """The events that concern all that is named, in the order given (`vm` is an id or a name).

    With `since` the first `limit` of a later revision, so that a reader can page; without it the last `limit`.
    """
    found = [
        event
        for event in events
        if (not env or event.env == env)
        and (not host or event.host == host)
        and (not vm or vm in (event.vm, event.vm_name))
        and (since is None or event.revision > since)
    ]
    return found[:limit] if since is not None else found[max(0, len(found) - limit) :]
