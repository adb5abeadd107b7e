"""P1, P2, P4, P5, P6: how fast and how cheaply a fleet converges, reacts and rests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from ops.measure.result import Check, Plan, Result, percentile
from ops.measure.site import Site, env_body, running_site, until
from ops.measure.wire import Watch, Wire, spread, watching

EACH = 20  # VMs an environment, and a host on average
ROOM = ("--cpu-total", "22")  # nearly full at the end, so that placement cannot be lazy
ASYNC = "Prefer: respond-async\r\n"
SUBMITTERS = 8  # connections
AGENT_CONNECTIONS = 4  # of the floor to each host


def agent_body(vm_id: str, env_id: str) -> dict[str, Any]:
    """What a controller sends an agent for one VM of `env_body`."""
    entry = env_body(env_id, 1)["vms"][0]
    kept = {name: entry[name] for name in ("image", "cpu", "mem", "disk")}
    keys = env_body(env_id, 1)["ssh_keys"]
    return {"vm_id": vm_id, "env_id": env_id, "engine": "qemu", "ports": [22], "deny_outgoing": False, "ssh_keys": keys, **kept}


async def submit(site: Site, envs: int, each: int, prefix: str = "env") -> None:
    """Posts environments over a few connections."""
    work: list[Callable[[Wire], Any]] = [
        lambda wire, name=f"{prefix}-{number}": wire.json("POST", "/api/envs", env_body(name, each))  # type: ignore[misc]
        for number in range(envs)
    ]
    await spread(site.url, SUBMITTERS, work)


def all_ready(watch: Watch, envs: int) -> Callable[[], bool]:
    """Whether so many environments are there, each ready."""
    return lambda: len(watch.envs) == envs and set(watch.envs.values()) == {"ready"}


async def _floor_host(address: str, vms: int) -> None:
    """The same calls to one host, by the least client: creates, then one long poll until all run."""
    name = address.rpartition(":")[2]
    bodies = [agent_body(f"vm-{name}-{number}", "floor") for number in range(vms)]
    work: list[Callable[[Wire], Any]] = [
        lambda wire, body=body: wire.json("POST", "/api/vms", body, ASYNC)  # type: ignore[misc]
        for body in bodies
    ]
    poll = await Wire.to(address)
    creating = asyncio.create_task(spread(address, AGENT_CONNECTIONS, work))
    told: dict[str, Any] = await poll.json("GET", "/api/vms")
    while sum(vm["state"] == "running" for vm in told["data"]) < vms:
        told = await poll.json("GET", f"/api/vms?watch=10&after={told['boot_id']}:{told['seq']}")
    await creating
    poll.close()


async def _floor(plan: Plan, hosts: int) -> tuple[float, float]:
    """(seconds, processor seconds of the agents) for the same VMs without a controller."""
    site = Site(plan.fresh("floor"), hosts, *ROOM)
    try:
        site.start_agents()
        cpu, began = site.agents.cpu(), time.perf_counter()
        await asyncio.gather(*(_floor_host(address, EACH) for address in site.addresses))
        return time.perf_counter() - began, site.agents.cpu() - cpu
    finally:
        site.close()


async def _converge(plan: Plan, metric: str, hosts: int, least_rate: float) -> Result:
    vms = hosts * EACH
    floor, floor_cpu = await _floor(plan, hosts)
    with running_site(plan.fresh(metric), hosts, *ROOM) as site:
        memory = site.controller.memory()
        async with watching(site.url) as watch:
            cpu, agents_cpu, began = site.controller.cpu(), site.agents.cpu(), time.perf_counter()
            await submit(site, hosts, EACH)
            recorded = time.perf_counter() - began
            await watch.until(all_ready(watch, hosts), f"{hosts} environments are ready")
            took = time.perf_counter() - began
            cpu, agents_cpu = site.controller.cpu() - cpu, site.agents.cpu() - agents_cpu
            changes = watch.changes
        await asyncio.sleep(1)
        figures = {
            "vms": vms,
            "hosts": hosts,
            "seconds": took,
            "seconds_until_all_recorded": recorded,
            "vms_per_second": vms / took,
            "floor_seconds": floor,
            "controller_cpu_us_per_vm": 1e6 * cpu / vms,
            "agents_cpu_us_per_vm": 1e6 * agents_cpu / vms,
            "floor_agents_cpu_us_per_vm": 1e6 * floor_cpu / vms,
            "controller_bytes_per_vm": (site.controller.memory() - memory) / vms,
            "calls_per_vm": site.calls() / vms,
            "watch_changes_per_vm": changes / vms,
        }
    checks = (Check("× floor", took / floor, "<=", 5), Check("VMs/s", vms / took, ">=", least_rate))
    return Result(metric, f"converge {vms} VMs on {hosts} hosts", figures, checks if least_rate else checks[:1])


async def p1(plan: Plan) -> Result:
    """1,000 VMs on 50 hosts."""
    return await _converge(plan, "P1", plan.size(50), 3000)


async def p2(plan: Plan) -> Result:
    """10,000 VMs on 500 hosts."""
    return await _converge(plan, "P2", plan.size(500, 20), 0)


async def p4(plan: Plan) -> Result:
    """One VM more in a fleet of 1,000, from the request to `running` on the stream, less what the agent takes by itself."""
    hosts, times = plan.size(50), plan.size(100, 20)
    with running_site(plan.fresh("P4"), hosts) as site:
        async with watching(site.url) as watch:
            await submit(site, hosts, EACH)
            await watch.until(all_ready(watch, hosts), "the fleet is there")
            wire, agent = await Wire.to(site.url), await Wire.to(site.addresses[-1])  # the last one fills last
            seen, floor = [], []
            for number in range(times):
                began = time.perf_counter()
                told = await wire.json("POST", "/api/envs", env_body(f"one-{number}", 1))
                (vm_id,) = told["data"]["env"]["vm_ids"]
                await watch.until(lambda vm_id=vm_id: watch.vms.get(vm_id) == "running", "it runs")  # type: ignore[misc]
                seen.append(time.perf_counter() - began)
                await wire.json("DELETE", f"/api/envs/one-{number}")
                await watch.until(lambda vm_id=vm_id: vm_id not in watch.vms, "it is gone")  # type: ignore[misc]
                began = time.perf_counter()
                await agent.json("POST", "/api/vms", agent_body(f"floor-{number}", "floor"))
                floor.append(time.perf_counter() - began)
                await agent.json("DELETE", f"/api/vms/floor-{number}")
    own = percentile(floor, 0.5)
    p50, p99 = (1000 * (percentile(seen, share) - own) for share in (0.5, 0.99))
    figures = {"p50_ms": p50, "p99_ms": p99, "agent_alone_p50_ms": 1000 * own, "times": times}
    checks = (Check("p50 ms", p50, "<=", 3), Check("p99 ms", p99, "<=", 10))
    return Result("P4", f"one VM into a fleet of {hosts * EACH}, until seen running", figures, checks)


async def p5(plan: Plan) -> Result:
    """A VM vanishes at its agent: how long until the repairing call has arrived there."""
    hosts, times = plan.size(50), plan.size(100, 20)
    with running_site(plan.fresh("P5"), hosts) as site:
        async with watching(site.url) as watch:
            await submit(site, hosts, EACH)
            await watch.until(all_ready(watch, hosts), "the fleet is there")
            victims = [vm for vms in site.on_agents().values() for vm in vms][:times]
            by_host = {vm["host_id"]: address for address in site.addresses for vm in site.on_agents()[address][:1]}
            took, floor, term = [], [], site.term()
            for vm in victims:
                agent = await Wire.to(by_host[vm["host_id"]])
                path, headers = f"/api/vms/{vm['id']}", f"X-Muster-Cluster: {vm['cluster_id']}\r\nX-Muster-Term: {term}\r\n"
                began = time.perf_counter()
                await agent.call("GET", path)
                floor.append(time.perf_counter() - began)
                await agent.json("DELETE", path, headers=headers)
                began = time.perf_counter()
                while (await agent.call("GET", path))[0] != 200:
                    pass
                took.append(time.perf_counter() - began)
                await watch.until(all_ready(watch, hosts), "it is repaired")
                agent.close()
    p50, p99 = (1000 * percentile(took, share) for share in (0.5, 0.99))
    figures = {"p50_ms": p50, "p99_ms": p99, "one_look_p50_ms": 1000 * percentile(floor, 0.5), "times": len(took)}
    checks = (Check("p50 ms", p50, "<=", 2), Check("p99 ms", p99, "<=", 10))
    notes = ("the agent is asked without pause whether the VM is back, which it pays for too",)
    return Result("P5", "a VM vanishes until its new create has arrived", figures, checks, notes)


async def p6(plan: Plan) -> Result:
    """Converged and idle."""
    hosts, seconds = plan.size(50), plan.size(30, 8)
    with running_site(plan.fresh("P6"), hosts) as site:
        async with watching(site.url) as watch:
            await submit(site, hosts, EACH)
            await watch.until(all_ready(watch, hosts), "the fleet is there")
        await asyncio.sleep(3)
        calls, changes = site.calls(), json.dumps(site.positions())
        cpu, agents_cpu, began = site.controller.cpu(), site.agents.cpu(), time.perf_counter()
        await asyncio.sleep(seconds)
        passed = time.perf_counter() - began
        share, agents_share = (100 * (used / passed) for used in (site.controller.cpu() - cpu, site.agents.cpu() - agents_cpu))
        calls = site.calls() - calls
        is_quiet = json.dumps(site.positions()) == changes
    figures = {"controller_percent": share, "agents_percent": agents_share, "seconds": passed, "mutating_calls": calls}
    checks = (
        Check("% of a core", share, "<=", 0.1),
        Check("mutating calls", calls, "<=", 0),
        Check("changes at the agents", 0 if is_quiet else 1, "<=", 0),
    )
    return Result("P6", f"idle with {hosts * EACH} VMs on {hosts} hosts", figures, checks)


async def kill(plan: Plan) -> Result:
    """As P1, but the controller is killed (kill -9) when half of the VMs run; afterwards all is watched at rest."""
    hosts, seconds = plan.size(50), plan.size(20, 5)
    vms = hosts * EACH
    with running_site(plan.fresh("KILL"), hosts, *ROOM) as site:
        began = time.perf_counter()
        await submit(site, hosts, EACH)
        await asyncio.to_thread(until, lambda: _running(site) >= vms // 2, "half of the VMs run")
        site.controller.kill()
        killed_at = _running(site)
        await asyncio.to_thread(site.start_controller)
        async with watching(site.url) as watch:
            await watch.until(all_ready(watch, hosts), "every environment is ready")
        took = time.perf_counter() - began
        wanted = sorted(vm_id for env in site.data("/api/envs") for vm_id in env["vm_ids"])
        there = sorted(vm["id"] for on_host in site.on_agents().values() for vm in on_host if vm["state"] == "running")
        await asyncio.sleep(2)
        calls, changes = site.calls(), site.positions()
        await asyncio.sleep(seconds)
        calls, is_quiet = site.calls() - calls, site.positions() == changes
        memory = site.controller.memory()
    figures = {"vms": vms, "running_when_killed": killed_at, "seconds": took, "controller_megabytes": memory / 2**20}
    checks = (
        Check("VMs lost, doubled or foreign", len(set(wanted) ^ set(there)) + len(there) - len(set(there)), "<=", 0),
        Check(f"mutating calls in {seconds} s", calls, "<=", 0),
        Check("changes at the agents", 0 if is_quiet else 1, "<=", 0),
    )
    return Result("KILL", f"converge {vms} VMs on {hosts} hosts, controller killed half way", figures, checks)


def _running(site: Site) -> int:
    return sum(vm["state"] == "running" for on_host in site.on_agents().values() for vm in on_host)
