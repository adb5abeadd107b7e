"""What a storage driver must do. Called by the runtime alone, never twice at once for the same VM."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from agent.machine import Disk, DiskKind, Probe, StreamFormat
from specs.names import Storage as StorageKind
from specs.names import VmId


class Storage(Protocol):
    """Where disks live. Base images are immutable; a VM's disk is a clone grown to the size asked for."""

    kind: StorageKind

    async def probe(self) -> Probe:
        """Says whether this storage works here (tools present, folder or pool writable)."""
        ...

    async def images(self, kind: DiskKind = "any") -> tuple[str, ...]:
        """Names of the base images that a disk of this kind can be cloned from, sorted. Half-written ones are not among them.

        `rootfs` disks come from kernel-and-rootfs images, the other kinds from disk images; no image is both.
        """
        ...

    async def ensure_disk(
        self, vm_id: VmId, folder: Path, image: str, size_mib: int, kind: DiskKind = "any", *, cluster: str = ""
    ) -> Disk:
        """Clones `image` and grows it to `size_mib`; an existing disk of this VM is kept with its contents.

        A disk of kind `raw` or `rootfs` has the format `raw`: a file or a block device. The filesystem of a `rootfs` disk fills
        it (agent/storage/rootfs.py grows it); what is inside the disks of other kinds is the guest's business.
        `cluster` is noted beside the disk where the storage has a place for it.

        An image larger than `size_mib` is refused. Raises ImageMissing, ImageRefused, DoesNotFit, AgentError. Safe to repeat
        after a cut-off: a half-made clone is never taken for a disk.
        """
        ...

    async def export_disk(self, vm_id: VmId, folder: Path, disk: Disk, target: Path) -> StreamFormat:
        """Writes the contents of a disk that nobody uses to the new file `target`, complete in itself, and says in what format.

        A `qcow2` file has no backing file; a `zfs` one is the stream of zfs-send(8). Raises DoesNotFit, AgentError.
        """
        ...

    async def import_disk(
        self, vm_id: VmId, folder: Path, disk: Disk, size_mib: int, source: Path, format_: StreamFormat
    ) -> None:
        """Replaces the contents of a disk that nobody uses by what `export_disk` of any agent wrote, grown to `size_mib`.

        It happens whole or not at all. Raises ImageRefused for a file that is not of its format, opens other files, is larger
        than `size_mib` or of a format this storage cannot read; DoesNotFit; AgentError.
        """
        ...

    async def restore_disk(self, vm_id: VmId, folder: Path) -> None:
        """Puts right what an `import_disk` that was cut off left. Called before a boot that finds no disk."""
        ...

    async def remove_disk(self, vm_id: VmId, folder: Path) -> None:
        """Removes the VM's disk and what an interrupted clone left; nothing there is fine."""
        ...

    async def capacity_mib(self) -> tuple[int, int]:
        """(total, free) of where disks live."""
        ...
