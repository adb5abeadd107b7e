"""Looks at the machine itself for what VMs leave: processes, links, rules, containers, folders. Asks nothing of our servers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import psutil

from ops.demo.site import Site


def left_of(site: Site, vm_ids: Iterable[str], seen: Iterable[psutil.Process], *, parts: bool) -> list[str]:
    """Everything found, in words; empty when nothing is left.

    `vm_ids` and `seen` are VMs and processes of the run. With `parts`, controller, agent, bridge and the daemon that was
    started for the run must be gone too.
    """
    found = [*_processes(site, seen, parts=parts), *_folders(site)]
    if os.geteuid() == 0:
        found += [*_links(site, parts=parts), *_rules(site, set(vm_ids), parts=parts)]
    if site.docker:
        found += _containers(site, set(vm_ids))
    return found


def _processes(site: Site, seen: Iterable[psutil.Process], *, parts: bool) -> list[str]:
    """Those that were seen and still live, those that work in a VM's folder, with `parts` those that name our state."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    alive = {process.pid for process in seen if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}
    found = []
    for process in psutil.process_iter(("pid", "cmdline", "cwd")):
        words = " ".join(process.info["cmdline"] or ())
        in_folder = Path(process.info["cwd"] or "/").is_relative_to(site.vms)
        if process.pid not in own and (in_folder or process.pid in alive or (parts and str(site.state) in words)):
            found.append(f"process {process.pid}: {words[:120]}")
    return found


def _folders(site: Site) -> list[str]:
    entries = site.vms.iterdir() if site.vms.is_dir() else ()
    # The agent's lock and its record of controllers' terms belong to no VM.
    return [f"folder {entry}" for entry in sorted(entries) if not (entry.is_file() and entry.name.startswith("."))]


def _links(site: Site, *, parts: bool) -> list[str]:
    links = json.loads(_output("ip", "-json", "link", "show") or "[]")
    ports = [link["ifname"] for link in links if link.get("master") == site.bridge]
    bridges = [link["ifname"] for link in links if link["ifname"] == site.bridge and parts]
    return [f"link {name}" for name in (*ports, *bridges)]


def _rules(site: Site, vm_ids: set[str], *, parts: bool) -> list[str]:
    """Rules that name the bridge go with the last of the parts; rules that forward to a VM must be gone before."""
    prefix = site.subnet.rpartition(".")[0].rpartition(".")[0] + "."
    lines = [line.strip() for line in _output("nft", "list", "ruleset").splitlines()]
    forwards = [line for line in lines if f": {prefix}" in line or any(vm_id in line for vm_id in vm_ids)]
    named = [line for line in lines if site.bridge in line] if parts else []
    return [f"rule {line[:120]}" for line in dict.fromkeys((*forwards, *named))]


def _containers(site: Site, vm_ids: set[str]) -> list[str]:
    names = _output("docker", "ps", "--all", "--format", "{{.Names}}").split()
    networks = _output("docker", "network", "ls", "--format", "{{.Name}}").split()
    found = [f"container {name}" for name in names if name.removeprefix("muster-") in vm_ids]
    return found + [f"docker network {name}" for name in networks if name == f"muster-{site.bridge}"]


def _output(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
