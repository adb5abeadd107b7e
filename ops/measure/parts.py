"""P7, P9, P12, P14, P16: what single parts cost, reads, writes, one agent, the store and placement."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from api.main import ControllerApp
from api.settings import ControllerSettings
from ops.measure.fleets import ASYNC, ROOM, agent_body, all_ready, submit
from ops.measure.result import Check, Plan, Result
from ops.measure.site import Site, env_body, free_ports, until
from ops.measure.wire import Wire, spread, watching
from reconciler.core.model import Change, HostIntent
from reconciler.core.place import HostRoom
from reconciler.core.rooms import Rooms
from reconciler.store.database import Database
from specs.desired import EnvSpec
from specs.names import HostId

READERS = 32
WRITERS = 64


@asynccontextmanager
async def _bare(folder: Path, content: bytes) -> AsyncIterator[str]:
    """The address of a bare server that answers these bytes to everything."""
    (folder / "content").write_bytes(content)
    port = free_ports(1)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ops.measure.bare", str(port), str(folder / "content")), stdin=subprocess.DEVNULL
    )

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    try:
        await asyncio.to_thread(until, answers, "the bare server answers")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def _rate(address: str, connections: int, times: int, piece: Callable[[Wire, int], Any]) -> float:
    """Requests a second."""
    work: list[Callable[[Wire], Any]] = [lambda wire, number=number: piece(wire, number) for number in range(times)]  # type: ignore[misc]
    began = time.perf_counter()
    await spread(address, connections, work)
    return times / (time.perf_counter() - began)


async def p7(plan: Plan) -> Result:
    """Reads over 32 connections, against a bare tornado handler that answers the same bytes."""
    envs, times = plan.size(1000), plan.size(2000)
    figures: dict[str, float] = {"envs": envs}
    checks = []
    folder = plan.fresh("P7")
    site = Site(folder, 1)
    try:
        site.start_controller()
        await submit(site, envs, 1)
        for name, path in (("status", "/api/status"), ("envs", "/api/envs"), ("env", "/api/envs/env-1")):
            reads = times if name != "envs" else times // 10
            wire = await Wire.to(site.url)
            _, content = await wire.call("GET", path)
            wire.close()
            async with _bare(folder, content) as floor_address:
                ours: list[float] = []
                floors: list[float] = []
                for _ in range(3):  # in turn: the machine's other work falls on both
                    for address, rates in ((site.url, ours), (floor_address, floors)):
                        rates.append(await _rate(address, READERS, reads, lambda wire, _, path=path: wire.json("GET", path)))  # type: ignore[misc]
            rate, floor = statistics.median(ours), statistics.median(floors)
            figures |= {f"{name}_per_second": rate, f"{name}_floor_per_second": floor, f"{name}_bytes": len(content)}
            checks.append(Check(f"{name} × floor", rate / floor, ">=", 0.8))
    finally:
        site.close()
    return Result("P7", "reads at 32 connections", figures, tuple(checks))


async def p9(plan: Plan) -> Result:
    """1,000 environments over 64 connections, each answered once durable; then a host comes and none is forgotten."""
    envs = plan.size(1000)
    folder = plan.fresh("P9")
    site = Site(folder, 1, "--cpu-total", str(envs), "--mem-total", str(1024 * envs))
    try:
        site.start_controller()
        rate = await _rate(site.url, WRITERS, envs, lambda wire, n: wire.json("POST", "/api/envs", env_body(f"env-{n}", 1)))
        recorded = len(site.phases())
        async with _bare(folder, b'{"ok":true}') as address:
            floor = await _rate(address, WRITERS, envs, lambda wire, n: wire.json("POST", "/x", env_body(f"env-{n}", 1)))
        site.start_agents()
        site.register()
        async with watching(site.url) as watch:
            began = time.perf_counter()
            await watch.until(all_ready(watch, envs), "every environment is ready")
            took = time.perf_counter() - began
    finally:
        site.close()
    figures = {"posts_per_second": rate, "floor_posts_per_second": floor, "recorded": recorded, "seconds_on_one_host": took}
    checks = (Check("× floor", rate / floor, ">=", 0.5), Check("recorded", recorded, ">=", envs))
    notes = ("posted while no host is registered; afterwards one host takes them all",)
    return Result("P9", f"submit {envs} environments at {WRITERS} connections", figures, checks, notes)


async def _times_ms(times: int, work: Callable[[int], Any]) -> float:
    """The median."""
    took = []
    for number in range(times):
        began = time.perf_counter()
        await work(number)
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


async def p12(plan: Plan) -> Result:
    """An agent with 600 VMs against one with 10: creating one more, and a complete report."""
    few, many, times = 10, plan.size(600), plan.size(60, 20)
    figures: dict[str, float] = {}
    site = Site(plan.fresh("P12"), 1, "--cpu-total", "10000", "--mem-total", "10000000")
    try:
        site.start_agents()
        wire = await Wire.to(site.addresses[0])
        there = 0
        for size in (few, many):
            for number in range(there, size):
                await wire.json("POST", "/api/vms", agent_body(f"vm-{number}", "env"), ASYNC)
            there = size

            async def one_more(number: int) -> None:
                await wire.json("POST", "/api/vms", agent_body(f"more-{number}", "env"))

            async def one_less(number: int) -> None:
                await wire.json("DELETE", f"/api/vms/more-{number}")

            figures[f"create_ms_at_{size}"] = await _times_ms(times, one_more)
            figures[f"destroy_ms_at_{size}"] = await _times_ms(times, one_less)
            figures[f"report_ms_at_{size}"] = await _times_ms(times, lambda _: wire.call("GET", "/api/vms"))
            figures[f"info_ms_at_{size}"] = await _times_ms(times, lambda _: wire.call("GET", "/api/info"))
        wire.close()
    finally:
        site.close()
    checks = tuple(
        Check(f"{what} at {many} × at {few}", figures[f"{what}_ms_at_{many}"] / figures[f"{what}_ms_at_{few}"], "<=", 1.5)
        for what in ("create", "destroy", "report", "info")
    )
    return Result("P12", f"one agent with {many} VMs", figures, checks)


async def p14(plan: Plan) -> Result:
    """Transactions for a burst of 1,000 VMs, and durable writes a second."""
    hosts = plan.size(50)
    folder = plan.fresh("P14")
    site = Site(folder, hosts, *ROOM)
    (folder / "controller").mkdir()
    app = ControllerApp(ControllerSettings(listen=site.url.removeprefix("http://"), data_dir=folder / "controller"))
    try:
        await asyncio.to_thread(site.start_agents)
        await app.start()
        await asyncio.to_thread(site.register)
        async with watching(site.url) as watch:
            before = app.controller.store.commits
            await submit(site, hosts, 20)
            await watch.until(all_ready(watch, hosts), "every environment is ready")
        commits = app.controller.store.commits - before
    finally:
        await app.stop()
        site.close()
    store = Database.at(folder / "writes.db")
    store.open()
    writes, lanes = plan.size(20000), 256

    async def lane(number: int) -> None:
        for turn in range(writes // lanes):
            await store.commit(Change(hosts=(HostIntent(f"127.0.0.{number}:{turn % 50 + 1}", None, turn),)))

    began = time.perf_counter()
    await asyncio.gather(*(lane(number) for number in range(lanes)))
    rate = writes / (time.perf_counter() - began)
    began = time.perf_counter()
    alone = plan.size(300)
    for turn in range(alone):
        await store.commit(Change(hosts=(HostIntent("127.0.0.1:9100", None, turn),)))
    alone_rate = alone / (time.perf_counter() - began)
    store.close()
    figures = {
        "vms": 20 * hosts,
        "commits": commits,
        "commits_per_vm": commits / (20 * hosts),
        f"durable_writes_per_second_{lanes}": rate,
        "durable_writes_per_second_1": alone_rate,
    }
    return Result("P14", "the store", figures, (Check("commits per VM", commits / (20 * hosts), "<=", 0.02),))


def _rooms(hosts: int) -> list[HostRoom]:
    return [
        HostRoom(
            id=HostId(f"host-{number:05}"),
            addr=f"10.0.{number // 250}.{number % 250}:9100",
            online=True,
            cordoned=False,
            engines=frozenset({"qemu", "docker"}),
            images={"qemu": frozenset({"tiny"}), "docker": frozenset({"muster/busybox"})},
            labels={},
            cpu_total=64,
            cpu_used=number % 64,
            mem_total=262144,
            mem_used=128 * (number % 64),
            disk_total=4194304,
            disk_used=256 * (number % 64),
        )
        for number in range(hosts)
    ]


async def p16(plan: Plan) -> Result:
    """Placement decisions a second, each counted for the next."""
    vm = EnvSpec.model_validate(env_body("env", 1)).vms[0]
    figures: dict[str, float] = {}
    for hosts in (50, 500, 5000):
        kept = Rooms()
        for room in _rooms(hosts):
            kept.put(room)
        rooms = {room.id: room for room in kept}
        times = plan.size(max(2000, 100_000 // hosts))
        began = time.perf_counter()
        for _ in range(times):
            chosen = kept.choose(vm, {})
            if chosen is not None:
                room = rooms[chosen.host_id]
                rooms[room.id] = replace(room, cpu_used=room.cpu_used + vm.cpu, mem_used=room.mem_used + vm.mem)
                kept.put(rooms[room.id])
        figures[f"decisions_per_second_at_{hosts}"] = times / (time.perf_counter() - began)
    growth = figures["decisions_per_second_at_50"] / figures["decisions_per_second_at_5000"]
    checks = (Check("time of a decision at 5000 × at 50", growth, "<=", 1.5),)
    return Result("P16", "placement decisions", figures, checks)
