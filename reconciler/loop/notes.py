"""Events about changes of several VMs, in words. Called wherever such a change has been committed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from reconciler.core.expand import EnvChange
from reconciler.core.model import VmIntent
from reconciler.fleet import Fleet


def told(change: EnvChange) -> str:
    """`2 VMs to create, 1 to replace`; what stays as it is counts for nothing."""
    counts = Counter(line.action for line in change.plan if line.action != "keep")
    return ", ".join(f"{number} VM{'' if number == 1 else 's'} to {action}" for action, number in counts.items()) or "as it was"


def note_replaced(fleet: Fleet, rows: Iterable[VmIntent], why: str) -> None:
    """Notes every VM among the committed rows that is retired and has a successor of its name."""
    rows = tuple(rows)
    new = {(vm.env_id, vm.name): vm.id for vm in rows if vm.desired != "absent"}
    for vm in rows:
        successor = new.get((vm.env_id, vm.name))
        if vm.desired == "absent" and successor:
            place = f" on host {vm.host_id} and its disk are" if vm.host_id else " is"
            fleet.note("Replaced", f"VM {vm.id}{place} given up for {successor}: {why}", vm=vm)
