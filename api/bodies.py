"""Objects as JSON, encoded once a change: a list of 5,000 VMs then costs little more than putting parts together.

Told of changes by the hub; read by the handlers. Hosts are not kept, since the age of their heartbeat always changes.
"""

from __future__ import annotations

from typing import NamedTuple

from api.views import Views
from reconciler.core.model import EnvIntent, VmIntent
from reconciler.fleet import Kind
from specs.wire import Phase


class Body(NamedTuple):
    """An object as it is answered, and the phase it is in."""

    phase: Phase
    json: bytes


class Bodies:
    """The environments and VMs of one fleet."""

    def __init__(self, views: Views) -> None:
        self._views = views
        self._kept: dict[tuple[Kind, str], Body] = {}

    def forget(self, kind: Kind, key: str) -> None:
        """What is visible of the object may differ from now on."""
        self._kept.pop((kind, key), None)

    def env(self, env: EnvIntent) -> Body:
        """An environment."""
        body = self._kept.get(("env", env.id))
        if body is None:
            shown = self._views.env(env)
            body = self._kept["env", env.id] = Body(shown.phase, shown.model_dump_json(exclude_none=True).encode())
        return body

    def vm(self, vm: VmIntent) -> Body:
        """A VM that is not gone."""
        body = self._kept.get(("vm", vm.id))
        if body is None:
            shown = self._views.vm(vm)
            body = self._kept["vm", vm.id] = Body(shown.phase, shown.model_dump_json(exclude_none=True).encode())
        return body
