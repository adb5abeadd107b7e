"""What the agent keeps on disk: one folder a VM with vm.json in it, and the highest term of each cluster.

Called by the runtime, in threads where it matters: all functions block. Knows nothing of drivers, of what runs, or of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from agent.errors import AgentError, Conflict, DoesNotFit
from agent.machine import Disk, Lease
from specs.names import ClusterId, VmId, check_name
from specs.wire import CreateVmReq

RECORD = "vm.json"
# A VM may be named `terms.json`; no VM name starts with a dot.
TERMS = ".terms.json"
_TRASH = ".trash-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MAX_RECORD = 4 * 1024 * 1024  # bytes; a request is at most 1 MiB of JSON

Power = Literal["running", "stopped"]


class ReadyMark(BaseModel):
    """That a VM's process has answered its probe, and since when (Unix seconds): a new agent need not ask again."""

    model_config = ConfigDict(frozen=True)

    pid: int
    since: int


class VmRecord(BaseModel):
    """Everything the agent must remember of one VM; what is really there is asked of the drivers.

    `complete`: every step of the creation has been done once. `power`: what was last asked. `deleting`: removal has begun
    and goes on after a restart, whatever else the record says.
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    request: CreateVmReq
    cluster_id: str = ""
    created_at: int
    lease: Lease
    disk: Disk | None = None
    complete: bool = False
    power: Power = "running"
    deleting: bool = False
    ready: ReadyMark | None = None

    @property
    def id(self) -> VmId:
        """The VM's id."""
        return VmId(self.request.vm_id)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the runtime folder holds. `unreadable` maps a VM id to the sentence that says what is wrong with its record.

    `strangers` are names that no VM's folder can have: files, links, `lost+found`. They are nobody's and left alone.
    """

    records: dict[VmId, VmRecord] = field(default_factory=dict)
    unreadable: dict[VmId, str] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)


def write_durably(path: Path, data: bytes) -> None:
    """Replaces a file so that after a power cut it holds either the old or the new content, whole.

    Raises DoesNotFit when the filesystem is full, AgentError on any other failure.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise io_error(f"writing {path}", error) from error


def io_error(tried: str, error: OSError) -> AgentError:
    """The typed error for a failed file operation: a full disk is DoesNotFit, so that the controller looks elsewhere."""
    kind = DoesNotFit if error.errno in _FULL else AgentError
    return kind(f"{tried} failed: {error.strerror or error}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Records(Protocol):
    """Where the records of one host live: on disk, or for simulated hosts in memory."""

    root: Path
    """The runtime folder."""

    def folder(self, vm_id: VmId) -> Path:
        """Where the VM's files live or would live. Raises ValueError on an id that could point elsewhere."""
        ...

    async def open(self) -> tuple[Terms, Loaded]:
        """What earlier agents of this host have recorded. Raises AgentError if the terms cannot be understood."""
        ...

    async def save(self, record: VmRecord) -> None:
        """Returns once the record would survive a crash. Raises DoesNotFit, AgentError."""
        ...

    async def remove(self, vm_id: VmId) -> None:
        """Forgets the VM with its folder; nothing there is fine. Raises AgentError."""
        ...

    async def clear_trash(self) -> tuple[str, ...]:
        """Removes what an interrupted `remove` left; says what could not be removed."""
        ...


def _can_be_a_vm(folder: Path) -> bool:
    """A link that leads to a record, or nowhere, may be for a VM someone moved: it may run, so it must not be called absent."""
    try:
        check_name(folder.name)
        kind = folder.lstat().st_mode
        return stat.S_ISDIR(kind) or (stat.S_ISLNK(kind) and ((folder / RECORD).exists() or not folder.exists()))
    except ValueError:
        return False
    except OSError:  # it cannot be looked at, so it may well be one
        return True


class RecordStore:
    """The runtime folder: `<root>/<vm_id>/vm.json`. What starts with a dot is the agent's own.

    The async methods are those of `Records` and run the blocking ones in a thread.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    async def open(self) -> tuple[Terms, Loaded]:
        """Terms and records as the folder holds them."""
        return await asyncio.to_thread(lambda: (Terms(self.root / TERMS), self.load()))

    async def save(self, record: VmRecord) -> None:
        """`write`, waited for even when cancelled."""
        await _in_thread(lambda: self.write(record))

    async def remove(self, vm_id: VmId) -> None:
        """`discard`, waited for even when cancelled."""
        await _in_thread(lambda: self.discard(vm_id))

    async def clear_trash(self) -> tuple[str, ...]:
        """`empty_trash`."""
        return await asyncio.to_thread(self.empty_trash)

    def folder(self, vm_id: VmId) -> Path:
        """Where the VM's files live. Raises ValueError on an id that could point elsewhere."""
        return self.root / check_name(vm_id)

    def load(self) -> Loaded:
        """Reads every record. A folder that never got beyond its first moment is removed; nothing else is."""
        found = Loaded()
        for folder in sorted(self.root.iterdir()):
            if folder.name.startswith("."):
                continue
            vm_id = VmId(folder.name)
            if not _can_be_a_vm(folder):
                found.strangers.append(folder.name)
                continue
            try:
                if folder.is_symlink():
                    raise ValueError("its folder is a link; move the folder back to where the link is")
                if self._is_unborn(folder):
                    shutil.rmtree(folder)
                    continue
                found.records[vm_id] = self._read(folder)
            except (OSError, ValueError) as error:
                found.unreadable[vm_id] = f"{folder / RECORD}: {_first_line(error)}"
        return found

    def write(self, record: VmRecord) -> None:
        """Makes the record durable, with the VM's folder if need be. Raises DoesNotFit, AgentError."""
        folder = self.folder(record.id)
        try:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
                _sync_folder(self.root)
        except OSError as error:
            raise io_error(f"making {folder}", error) from error
        write_durably(folder / RECORD, record.model_dump_json(indent=1).encode())

    def discard(self, vm_id: VmId) -> None:
        """Removes the VM's folder: by one rename first, so that it is never seen half gone. Nothing there is fine."""
        trash = self.root / f"{_TRASH}{secrets.token_hex(4)}-{vm_id}"
        try:
            self.folder(vm_id).rename(trash)
            _sync_folder(self.root)
        except FileNotFoundError:
            return
        except OSError as error:
            raise io_error(f"removing {self.folder(vm_id)}", error) from error
        shutil.rmtree(trash, ignore_errors=True)

    def empty_trash(self) -> tuple[str, ...]:
        """Removes what an interrupted `discard` left; says what could not be removed."""
        stuck = []
        for folder in self.root.glob(f"{_TRASH}*"):
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                stuck.append(str(folder))
        return tuple(stuck)

    @staticmethod
    def _is_unborn(folder: Path) -> bool:
        """True if the agent died between making the folder and its record: no driver was called yet."""
        return all(entry.name.startswith(f".{RECORD}.") and entry.name.endswith(".tmp") for entry in folder.iterdir())

    @staticmethod
    def _read(folder: Path) -> VmRecord:
        descriptor = os.open(folder / RECORD, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(_MAX_RECORD + 1)
        if len(data) > _MAX_RECORD:
            raise ValueError("is far larger than any record")
        record = VmRecord.model_validate_json(data)
        if record.id != folder.name:
            raise ValueError(f"is the record of {record.id}")
        return record


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)


async def _in_thread(work: Callable[[], None]) -> None:
    """Runs blocking work; on cancellation still waits for its end, else a late write could bring a removed folder back."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise


class Terms:
    """The highest term seen of each cluster, durable before a call of it has any effect. Blocks; one call at a time."""

    def __init__(self, path: Path | None) -> None:
        """Reads the file. Raises AgentError if it cannot be understood: a forgotten term would let a deposed controller act.

        Without a path the terms live as long as this object: for simulated hosts, which end with their process.
        """
        self._path = path
        self._highest: dict[ClusterId, int] = {}
        if path is None:
            return
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise AgentError(f"{path} cannot be read ({error}); remove it only if no older controller is running") from error
        if not isinstance(content, dict) or not all(type(term) is int for term in content.values()):
            raise AgentError(f"{path} must be a JSON object of whole numbers; remove it only if no older controller is running")
        self._highest = {ClusterId(cluster): term for cluster, term in content.items()}

    def highest(self, cluster: ClusterId) -> int:
        """The highest term seen, -1 if none."""
        return self._highest.get(cluster, -1)

    def check(self, cluster: ClusterId, term: int) -> None:
        """Raises Conflict `stale_term` if a newer controller has called."""
        highest = self.highest(cluster)
        if term < highest:
            raise Conflict(
                f"term {term} of cluster {cluster} is over: a controller with term {highest} has called", "stale_term"
            )

    def admit(self, cluster: ClusterId, term: int) -> None:
        """Remembers the term durably if it is new. Raises Conflict `stale_term`, or AgentError if it cannot be kept."""
        self.check(cluster, term)
        if term == self.highest(cluster):
            return
        wanted = {**self._highest, cluster: term}
        if self._path is not None:
            write_durably(self._path, json.dumps(wanted, sort_keys=True).encode())
        self._highest = wanted
