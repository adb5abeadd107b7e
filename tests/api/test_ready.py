"""Readiness from the request to conditions, waits and roll-outs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.readiness import Target
from tests.fleet_rig import FleetRig, env, vm

READY = {"http": {"port": 80, "path": "/up"}, "timeout": "1h"}


class Answers:
    """What the fleet's guests say, by address; every one answers unless it is in `mute`."""

    def __init__(self) -> None:
        self.mute = True

    async def probe(self, target: Target, limit: float) -> str:
        """As told."""
        await asyncio.sleep(0)
        return "connection refused" if self.mute else ""


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[tuple[FleetRig, Answers]]:
    answers = Answers()
    rig = FleetRig(tmp_path)
    for host in rig.hosts:
        host.probe = answers.probe
    async with rig:
        yield rig, answers


async def _detail(rig: FleetRig) -> dict[str, Any]:
    detail: dict[str, Any] = await rig.data("/api/envs/web")
    return detail


def _ready(shown: dict[str, Any]) -> dict[str, Any]:
    return next(one for one in shown["conditions"] if one["type"] == "Ready")


async def _until(told: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await told():  # noqa: ASYNC110 what is waited for is told over HTTP
            await asyncio.sleep(0.01)


async def test_a_vm_is_ready_and_a_wait_over_only_once_its_guest_answers(fleet: tuple[FleetRig, Answers]) -> None:
    rig, answers = fleet
    await rig.call("POST", "/api/envs?wait=1", env("web", vm(name="a", ready=READY, ports=[80])))

    async def is_probed() -> bool:
        return bool(_ready((await _detail(rig))["vms"][0])["reason"] == "Probing")

    await _until(is_probed)
    detail = await _detail(rig)
    shown = detail["vms"][0]
    assert (shown["state"], shown["phase"], _ready(shown)["status"]) == ("running", "progressing", False)
    assert detail["env"]["observed_generation"] == 0
    answers.mute = False
    answered = await rig.call("PUT", "/api/envs/web?wait=60", env("web", vm(name="a", ready=READY, ports=[80])))
    shown = answered.json()["data"]["vms"][0]
    assert (shown["phase"], _ready(shown)["status"], _ready(shown)["reason"]) == ("ready", True, "Answered")


async def test_a_guest_that_does_not_answer_in_time_makes_its_vm_degraded_with_the_reason(
    fleet: tuple[FleetRig, Answers],
) -> None:
    rig, _ = fleet
    await rig.call("POST", "/api/envs", env("web", vm(name="a", ready={"ssh-banner": 22, "timeout": 1})))

    async def is_degraded() -> bool:
        return bool((await _detail(rig))["env"]["phase"] == "degraded")

    await _until(is_degraded)
    detail = await _detail(rig)
    assert _ready(detail["vms"][0])["reason"] == "TimedOut"
    assert any("ssh on guest port 22 has not answered within 1 s of the boot" in line for line in detail["warnings"])


async def test_a_roll_out_stops_at_the_first_vm_that_does_not_answer(fleet: tuple[FleetRig, Answers]) -> None:
    rig, answers = fleet
    answers.mute = False
    await rig.call("POST", "/api/envs?wait=60", env("web", vm(name="a", count=3, ready=READY)))
    old = {shown["id"] for shown in (await _detail(rig))["vms"]}
    answers.mute = True
    await rig.call("PUT", "/api/envs/web", env("web", vm(name="a", count=3, cpu=2, ready=READY)))

    async def new() -> list[dict[str, Any]]:
        return [shown for shown in (await _detail(rig))["vms"] if shown["id"] not in old]

    async def is_probed() -> bool:
        return any(_ready(shown)["reason"] == "Probing" for shown in await new())

    async def is_through() -> bool:
        return len(await new()) == 3 and all(shown["phase"] == "ready" for shown in (await _detail(rig))["vms"])

    await _until(is_probed)
    for _ in range(50):
        assert len(await new()) == 1, "the others wait for it"
        await asyncio.sleep(0.01)
    answers.mute = False
    await _until(is_through)


@pytest.mark.parametrize(
    ("ready", "where", "why"),
    [
        ({}, "vms.0.ready", "exactly one of tcp, ssh-banner and http"),
        ({"tcp": 22, "ssh-banner": 22}, "vms.0.ready", "exactly one"),
        ({"tcp": 70000}, "vms.0.ready.tcp", "65535"),
        ({"tcp": 22, "timeout": "soon"}, "vms.0.ready.timeout", "90s"),
        ({"tcp": 22, "timeout": 0}, "vms.0.ready.timeout", "1"),
        ({"http": {"path": "/a b"}}, "vms.0.ready.http.path", "pattern"),
        ({"udp": 53}, "vms.0.ready.udp", ""),
    ],
)
async def test_a_probe_that_makes_no_sense_is_refused_by_name(
    fleet: tuple[FleetRig, Answers], ready: dict[str, Any], where: str, why: str
) -> None:
    rig, _ = fleet
    answer = await rig.call("POST", "/api/envs", env("web", vm(ready=ready)))
    assert answer.status_code == 422
    assert any(detail["loc"] == where and why in detail["msg"] for detail in answer.json()["details"]), answer.text
