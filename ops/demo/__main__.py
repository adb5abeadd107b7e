"""`python -m ops.demo`: everything of `ops/up` after its installation."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

from ops.demo import guests, parts
from ops.demo.report import Report
from ops.demo.site import ROOT, Site, Trouble, alone, choose, forget, make_key, state_folder
from ops.demo.tour import ENV, Tour, nothing_left

_EXAMPLE = ROOT / "specs" / "examples" / "hello.yaml"
_CONVERGE = 600  # seconds; a whole Debian boots slowly where QEMU has to emulate the processor


def main() -> int:
    """Runs the demo and returns its exit status: 0 done, 1 failed, 130 interrupted before it was up."""
    words = argparse.ArgumentParser(prog="ops/up")
    words.add_argument("--once", action="store_true")
    words.add_argument("--without-docker", action="store_true")
    words.add_argument("--image", choices=("tiny", "debian"), default="tiny", help="what the VM runs")
    given = words.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell starts background jobs deaf to SIGINT
        signal.signal(number, signal.default_int_handler)
    began_docker = os.geteuid() == 0 and not given.without_docker
    try:
        state = state_folder()
        with alone(state):
            site, told = choose(state, docker=began_docker)
            for line in told:
                print(f"    {line}")
            _run(site, image=given.image, once=given.once)
    except Trouble as error:
        print(f"ops/up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ops/up: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(site: Site, *, image: str, once: bool) -> None:
    report = Report.begun_by_shell()
    tour = Tour(site, report, image)
    servers = parts.Servers(site)
    if not site.docker:
        print("    without containers: QEMU alone" + ("" if os.geteuid() == 0 else " (not root: QEMU's own user network)"))
    with _ended(site, report, tour, servers):
        make_key(site)
        if site.docker:
            with report.step("docker daemon") as step:
                step.outcome = parts.start_docker(site)
        for name in (image, "busybox") if site.docker else (image,):
            with report.step(f"image {name}"):
                parts.muster(site, "image", "build", name, "--image-dir", str(site.images))
        with report.step("controller and agent") as step:
            servers.start()
            step.outcome = f"{site.url}, {site.agent_url}"
        with _emptied(site):
            _show(site, report, tour, image=image, once=once)
    if once:
        print(f"\n{report.table()}")


def _show(site: Site, report: Report, tour: Tour, *, image: str, once: bool) -> None:
    parts.destroy_all(site)  # of a run that was cut off
    with report.step(f"converge {_EXAMPLE.relative_to(ROOT)}") as step:
        parts.muster(site, "apply", "-f", str(_spec(site, image)), f"--wait={_CONVERGE}")
        step.outcome = ", ".join(f"{vm.name} {vm.phase}" for vm in guests.detail(site, ENV).vms)
    if once:
        tour.run()
        return
    detail = guests.detail(site, ENV)
    tour.vm_ids |= {vm.id for vm in detail.vms}
    print(f"\n    dashboard    {site.url}/")
    print(f"    enter VM     {guests.ssh_line(site, guests.vm_of(detail, 'qemu'))}")
    for vm in detail.vms:
        if vm.image == "debian":
            continue  # it has no web server
        print(f"    page of {vm.name:4} http://127.0.0.1:{vm.port_map['80']}/")
    print(f"    command line MUSTER_URL={site.url} {os.path.relpath(parts.MUSTER)} get vms")
    print("\n    Ctrl-C removes everything.\n", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    print()


@contextlib.contextmanager
def _emptied(site: Site) -> Iterator[None]:
    """Whatever happens, no environment outlives this; further signals must not cut that off."""
    try:
        yield
    finally:
        with _deaf():
            number = parts.destroy_all(site)
            if number:
                print(f"    destroyed {number} environment{'' if number == 1 else 's'}")


@contextlib.contextmanager
def _ended(site: Site, report: Report, tour: Tour, servers: parts.Servers) -> Iterator[None]:
    """Ends servers and docker daemon, looks at what is left, and forgets the run if that is nothing."""
    try:
        yield
    except BaseException:
        with _deaf():
            _end(site, tour, servers)
        raise
    with _deaf(), report.step("end controller, agent and what else was started") as step:
        step.outcome = _end(site, tour, servers)


def _end(site: Site, tour: Tour, servers: parts.Servers) -> str:
    servers.stop()
    if site.docker:
        # Asked while the daemon can still tell of its containers; of the daemon itself afterwards.
        nothing_left(site, tour.vm_ids, tour.seen, parts_too=False)
        print(f"    {parts.stop_docker(site)}")
    without = Site(**{**site.__dict__, "docker": False})
    outcome = nothing_left(without, tour.vm_ids, tour.seen, parts_too=True)
    forget(site)
    return outcome


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _spec(site: Site, image: str) -> Path:
    """The example itself; a copy beside the key where the key is elsewhere, the image another or containers are left out."""
    if site.docker and site.state == ROOT / ".state" and image == "tiny":
        return _EXAMPLE
    yaml = YAML()
    document = yaml.load(_EXAMPLE)
    document["ssh_keys"] = [f"@{site.key}.pub"]
    document["vms"] = [vm for vm in document["vms"] if site.docker or vm.get("engine", "qemu") == "qemu"]
    if image == "debian":
        document["vms"][0].update(guests.DEBIAN)
    copy = site.state / _EXAMPLE.name
    yaml.dump(document, copy)
    return copy


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.TimeoutExpired as error:
        sys.exit(f"ops/up: {error}")
