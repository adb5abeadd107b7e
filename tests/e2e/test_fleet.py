"""Fleets of simulated hosts, as processes: two hundred VMs converge though the controller is killed, and then all is quiet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from ops.measure.site import Site, env_body, free_ports, running_site, until

pytestmark = [pytest.mark.e2e]

HOSTS, ENVS, EACH = 10, 10, 20
QUIET = 4.0  # seconds observed


def running(site: Site) -> int:
    """VMs that run, as the hosts say."""
    return sum(vm["state"] == "running" for vms in site.on_agents().values() for vm in vms)


def test_two_hundred_vms_converge_though_the_controller_is_killed_half_way_and_then_rest(tmp_path: Path) -> None:
    with running_site(tmp_path, HOSTS, "--latency", "5ms", "--cpu-total", "24") as site:
        for number in range(ENVS):
            assert site.http.post("/api/envs", json=env_body(f"env-{number}", EACH)).status_code == 201
        until(lambda: running(site) >= ENVS * EACH // 4, "a quarter runs", pause=0.005)
        site.controller.kill()
        half_way = {vm["id"]: vm["created_at"] for vms in site.on_agents().values() for vm in vms}
        site.start_controller()
        site.await_ready(ENVS)

        wanted = {vm_id for env in site.data("/api/envs") for vm_id in env["vm_ids"]}
        there = [vm for vms in site.on_agents().values() for vm in vms]
        assert len(wanted) == ENVS * EACH
        assert Counter(vm["id"] for vm in there) == Counter(wanted)
        assert {vm["state"] for vm in there} == {"running"}
        assert half_way.items() <= {vm["id"]: vm["created_at"] for vm in there}.items()
        assert max(len(vms) for vms in site.on_agents().values()) <= 24

        calls, changes = site.calls(), site.positions()
        time.sleep(QUIET)
        assert (site.calls(), site.positions()) == (calls, changes)


def test_muster_up_brings_a_simulated_fleet_with_it(tmp_path: Path) -> None:
    base = free_ports(4)
    url, first = f"http://127.0.0.1:{base + 3}", f"127.0.0.1:{base}"
    words = ["up", "--simulate", "3", "--zones", "3", "--listen", url.removeprefix("http://"), "--agent-listen", first]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "api.cli.main", *words, "--data-dir", str(tmp_path / "data")],
            stdout=log,
            stderr=log,
            env={name: value for name, value in os.environ.items() if not name.startswith("MUSTER_")},
        )
    try:
        until(lambda: b"3 simulated" in (tmp_path / "log").read_bytes(), "all hosts are registered")
        hosts = httpx.get(f"{url}/api/hosts", trust_env=False).json()["data"]
        assert [(host["id"], host["state"]) for host in hosts] == [(f"sim-{base + n}", "online") for n in range(3)]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
