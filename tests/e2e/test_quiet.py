"""A converged fleet is left alone: no mutating call, next to no processor time."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.rig import machine, until
from tests.e2e.test_kill import spec
from tests.images_fixture import SshKey, ssh_key, tiny  # noqa: F401
from tests.netns import Lab, inside

pytestmark = [pytest.mark.real, pytest.mark.e2e]

OBSERVED = 33.0  # seconds; longer than the agent's resync and three heartbeats
MOST = 0.03  # of a core, on a machine that other tests may be loading; measured: see the printed figure


def test_a_converged_fleet_makes_no_mutating_call_and_rests(
    tiny: Path,  # noqa: F811
    ssh_key: SshKey,  # noqa: F811
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab = Lab()
    try:
        with machine(lab.namespace("q"), tiny) as host:
            host.start()
            assert host.call("POST", "/api/envs", spec("rest", ssh_key))[0] == 201
            detail = host.await_ready("rest")
            with inside(host.namespace):
                for vm in detail["vms"]:
                    until(lambda vm=vm: _greets(vm["port_map"]["22"]), f"{vm['name']} has booted")  # type: ignore[misc]
            pids = host.pids()
            calls = host.controller.words_logged("call made", "call failed")
            began, used = time.monotonic(), host.controller.cpu_seconds() + host.agent.cpu_seconds()
            time.sleep(OBSERVED)
            seconds, used = time.monotonic() - began, host.controller.cpu_seconds() + host.agent.cpu_seconds() - used
            share = used / seconds
            record_property("share_of_a_core", share)
            with capsys.disabled():
                sys.stdout.write(f"\ncontroller and agent used {share:.2%} of a core over {seconds:.0f} s\n")
            assert host.controller.words_logged("call made", "call failed") == calls == 4
            assert host.pids() == pids
            assert share < MOST
            host.delete("rest")
    finally:
        lab.close()


def _greets(port: int) -> bool:
    """Whether an ssh server answers behind a forwarded port of this namespace."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.settimeout(2)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
