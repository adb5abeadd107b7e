"""The unattended tour of `ops/up --once`: uses the environment, breaks it, stops, starts and deletes it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal

import psutil

from api.client import Client
from ops.demo import guests, parts, traces
from ops.demo.report import Report
from ops.demo.site import Site, Trouble
from specs.wire import EnvDetail, Vm

ENV = "hello"


class Tour:
    """One tour over a converged environment. `vm_ids` and `seen` collect what must be gone in the end."""

    def __init__(self, site: Site, report: Report, image: str = "tiny") -> None:
        self._site = site
        self._report = report
        self._image = image
        self._note = secrets.token_hex(8)
        self.vm_ids: set[str] = set()
        self.seen: set[psutil.Process] = set()

    def run(self) -> None:
        """Every step in order. Raises Trouble at the first that does not do what it should."""
        self._enter()
        if self._image == "debian":
            self._ask_debian()
        if self._site.docker:
            self._fetch()
        self._kill()
        self._stop()
        self._start()
        self._delete()

    def _look(self) -> EnvDetail:
        detail = guests.detail(self._site, ENV)
        self.vm_ids |= {vm.id for vm in detail.vms}
        for pid in filter(None, (guests.pid_of(self._site, vm) for vm in detail.vms)):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.seen.add(psutil.Process(pid))
        return detail

    def _enter(self) -> None:
        with self._report.step("run a command in the VM over ssh") as step:
            vm = guests.vm_of(self._look(), "qemu")
            # What is written here must outlive a kill, a stop and a start.
            step.outcome = guests.in_guest(self._site, vm, f"echo {self._note} >/root/note && sync && uname -nr")

    def _ask_debian(self) -> None:
        """That cloud-init has applied all that was asked for; the key let us in."""
        with self._report.step("ask the Debian guest what cloud-init has made of it") as step:
            vm = guests.vm_of(self._look(), "qemu")

            def is_told() -> str | None:
                told = guests.in_guest(self._site, vm, "cloud-init status")
                return told if "running" not in told and "not run" not in told else None

            status = guests.patiently(is_told, f"cloud-init of {vm.name} did not end")
            name = guests.in_guest(self._site, vm, "hostname")
            addresses = guests.in_guest(self._site, vm, "hostname -I").split()
            told = guests.in_guest(self._site, vm, "cat /root/told")
            size = int(guests.in_guest(self._site, vm, "lsblk -bnro SIZE,MOUNTPOINT | sed -n 's| /$||p'")) // 2**20
            room = int(guests.in_guest(self._site, vm, "df --output=size -m / | tail -n 1"))
            found = (status, name, vm.ip in addresses, told, size >= vm.disk - 128, room >= vm.disk * 0.95)
            if found != ("status: done", vm.name, True, "by user_data", True, True):
                raise Trouble(f"cloud-init left {found}: {addresses}, partition {size} MiB, filesystem {room} MiB")
            step.outcome = f"{name}, {vm.ip}, user_data applied, a root filesystem of {room} MiB on a disk of {vm.disk} MiB"

    def _fetch(self) -> None:
        with self._report.step("fetch a page from the container through its forwarded port") as step:
            box = guests.vm_of(self._look(), "docker")
            text = guests.page(box)
            if "<h1>" not in text:
                raise Trouble(f"the container's page is not its own: {text[:200]!r}")
            step.outcome = f"port {box.port_map['80']} serves {text.partition('<h1>')[2].partition('<')[0]!r}"

    def _kill(self) -> None:
        with self._report.step("kill -9 the VM's QEMU and see it come back") as step:
            vm = guests.vm_of(self._look(), "qemu")
            old = guests.pid_of(self._site, vm)
            os.kill(old, signal.SIGKILL)

            def is_back() -> str | None:
                pid = guests.pid_of(self._site, vm)
                return str(pid) if pid not in (0, old) else None

            new = guests.patiently(is_back, f"{vm.name} was not started again")
            self._expect_note(vm)
            step.outcome = f"pid {old} killed, pid {new} runs, ssh works, its disk is the same"

    def _stop(self) -> None:
        with self._report.step("stop the environment") as step:
            self._look()
            parts.muster(self._site, "stop", "env", ENV, "--wait=120")
            alive = [process.pid for process in self.seen if process.is_running()]
            if alive:
                raise Trouble(f"processes {alive} still run after the stop")
            step.outcome = "no process of it runs"

    def _start(self) -> None:
        with self._report.step("start it again") as step:
            parts.muster(self._site, "start", "env", ENV, "--wait=600")
            self._expect_note(guests.vm_of(self._look(), "qemu"))
            if self._site.docker:
                guests.page(guests.vm_of(self._look(), "docker"))
            step.outcome = "what was written to its disk is there"

    def _delete(self) -> None:
        with self._report.step("delete it") as step:
            self._look()
            parts.muster(self._site, "delete", "env", ENV, "--wait=120")
            with Client(self._site.url) as client:
                if client.envs():
                    raise Trouble("the controller still lists an environment")
            step.outcome = nothing_left(self._site, self.vm_ids, self.seen, parts_too=False)

    def _expect_note(self, vm: Vm) -> None:
        found = guests.in_guest(self._site, vm, "cat /root/note")
        if found != self._note:
            raise Trouble(f"the disk of {vm.name} lost what was written to it: {found!r}")


def nothing_left(site: Site, vm_ids: set[str], seen: set[psutil.Process], *, parts_too: bool) -> str:
    """Looks at the machine itself; what was looked for, in words. Raises Trouble naming everything found."""
    found = traces.left_of(site, vm_ids, seen, parts=parts_too)
    if found:
        raise Trouble("left behind:\n  " + "\n  ".join(found))
    looked = ["process", "disk", "record"]
    looked += ["link", "rule"] if os.geteuid() == 0 else []
    looked += ["container"] if site.docker else []
    return f"no {', '.join(looked[:-1])} or {looked[-1]} is left"
