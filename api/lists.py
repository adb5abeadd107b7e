"""Filters and pages of the lists of environments, VMs and hosts. Called by the handlers; knows no HTTP.

A list is in order of creation. A page ends with a token that names its last object, so objects that come and go between two
pages neither repeat nor hide others.
"""

from __future__ import annotations

import base64
import binascii
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import orjson

from api.bodies import Bodies
from reconciler.core.model import EnvIntent, VmIntent
from reconciler.fleet import Fleet, HostState
from specs.operations import BadParameter, Param
from specs.wire import Phase

MAX_PAGE = 10_000
FILTERS = ("owner", "phase", "host", "env")
_WHOSE = {"envs": "environments", "vms": "VMs of environments", "hosts": "hosts with VMs"}

Place = tuple[int, str]
"""Where an object stands in its list: when it was made, and its id."""


def list_params(what: str) -> tuple[Param, ...]:
    """The query parameters of the list of `envs`, `vms` or `hosts`."""
    within = {"envs": "environments with a VM on", "vms": "VMs on", "hosts": "only"}[what]
    return (
        Param("owner", f"Only {_WHOSE[what]} of this owner."),
        Param("phase", f"Only {'hosts with VMs' if what == 'hosts' else what} in this phase.", values=get_args(Phase)),
        Param("host", f"Only {within} this host, by id or address{'; empty for none' if what == 'vms' else ''}."),
        *((Param("env", "Only VMs of this environment."),) if what == "vms" else ()),
        Param("limit", "At most so many; all when left out.", kind="integer", least=1, most=MAX_PAGE),
        Param("continue", "Where the page before ended, as its `continue` told.", says="as an earlier answer told it"),
    )


class Lists:
    """Chooses among the objects of one fleet by what was asked."""

    def __init__(self, fleet: Fleet, bodies: Bodies) -> None:
        self._fleet = fleet
        self._bodies = bodies

    def envs(self, asked: Mapping[str, Any]) -> list[tuple[Place, EnvIntent]]:
        """Environments in order."""
        chosen = [env for env in self._fleet.envs.values() if self._has_env(env, asked)]
        return sorted((((env.created_at, env.id), env) for env in chosen), key=_place)

    def vms(self, asked: Mapping[str, Any]) -> list[tuple[Place, VmIntent]]:
        """VMs in order, those that are gone left out."""
        chosen = [vm for vm in self._fleet.vms.values() if not vm.gone_at and self._has_vm(vm, asked)]
        return sorted((((vm.created_at, vm.id), vm) for vm in chosen), key=_place)

    def hosts(self, asked: Mapping[str, Any]) -> list[tuple[Place, HostState]]:
        """Hosts in order."""
        chosen = [host for host in self._fleet.hosts.values() if self._has_host(host, asked)]
        return sorted((((host.intent.registered_at, host.intent.addr), host) for host in chosen), key=_place)

    def _host_id(self, asked: Mapping[str, Any]) -> str | None:
        if "host" not in asked:
            return None
        host = self._fleet.host(asked["host"])
        return host.shown_id if host else str(asked["host"])

    def _has_env(self, env: EnvIntent, asked: Mapping[str, Any]) -> bool:
        if asked.get("owner", env.spec.owner) != env.spec.owner:
            return False
        host_id = self._host_id(asked)
        if host_id is not None and all((vm.host_id or "") != host_id for vm in self._fleet.env_vms(env.id)):
            return False
        return "phase" not in asked or self._bodies.env(env).phase == asked["phase"]

    def _has_vm(self, vm: VmIntent, asked: Mapping[str, Any]) -> bool:
        if asked.get("env", vm.env_id) != vm.env_id:
            return False
        if "owner" in asked:
            env = self._fleet.envs.get(vm.env_id)
            if env is None or env.spec.owner != asked["owner"]:
                return False
        host_id = self._host_id(asked)
        if host_id is not None and (vm.host_id or "") != host_id:
            return False
        return "phase" not in asked or self._bodies.vm(vm).phase == asked["phase"]

    def _has_host(self, host: HostState, asked: Mapping[str, Any]) -> bool:
        if "host" in asked and self._host_id(asked) != host.shown_id:
            return False
        of_vms = {name: asked[name] for name in ("owner", "phase") if name in asked}
        placed = self._fleet.host_vms(host.intent.id) if of_vms and host.intent.id else []
        return not of_vms or any(self._has_vm(vm, of_vms) for vm in placed)


def page(rows: list[tuple[Place, Any]], what: str, asked: Mapping[str, Any]) -> tuple[Iterable[Any], str | None]:
    """The objects to answer with, and the token of the next page if there is one. Raises BadParameter."""
    mark = [what, *(asked.get(name) for name in FILTERS)]
    first = bisect_right(rows, _read_token(asked["continue"], mark), key=_place) if "continue" in asked else 0
    last = first + asked["limit"] if "limit" in asked else len(rows)
    token = _make_token(rows[last - 1][0], mark) if last < len(rows) else None
    return (thing for _, thing in rows[first:last]), token


def _place(row: tuple[Place, Any]) -> Place:
    return row[0]


def _make_token(place: Place, mark: list[Any]) -> str:
    return base64.urlsafe_b64encode(orjson.dumps([*place, mark])).decode().rstrip("=")


def _read_token(token: str, mark: list[Any]) -> Place:
    try:
        made, name, of = orjson.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError):
        raise BadParameter("continue must be what an earlier answer told") from None
    if not isinstance(made, int) or not isinstance(name, str):
        raise BadParameter("continue must be what an earlier answer told")
    if of != mark:
        raise BadParameter("continue belongs to another list or other filters; give those of the page before")
    return made, name
