"""Images from web servers that break off, lie or know no ranges; and images that VMs stand on."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.errors import AgentError, Conflict, ImageMissing, ImageRefused
from agent.images.pull import Wanted, pull, remove
from agent.run import run
from agent.storage.file import FileStorage
from specs.names import VmId


@dataclass
class Web:
    """A web server with one file. It breaks off after each of `cuts` bytes in turn."""

    data: bytes
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    status: int = 200
    asked: list[int] = field(default_factory=list)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"[Rr]ange: bytes=(\d+)-", head)
        start = int(found[1]) if found and self.ranges else 0
        self.asked.append(int(found[1]) if found else 0)
        body = self.data[start:]
        status = self.status if self.status != 200 else 416 if start and not body else 206 if start else 200
        part = f"bytes {start}-{len(self.data) - 1}/{len(self.data)}" if body else f"bytes */{len(self.data)}"
        if status not in (200, 206):
            body = b""
        lines = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\nContent-Range: {part}\r\nConnection: close\r\n\r\n"
        writer.write(lines.encode() + body[: self.cuts.pop(0) if self.cuts else None])
        await writer.drain()
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def serving(web: Web) -> AsyncIterator[Web]:
    """The server on loopback."""
    talks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.create_task(web.serve(reader, writer)))

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        web.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/disk.img"
        yield web
    if talks:
        await asyncio.wait(talks)
        await asyncio.gather(*talks, return_exceptions=True)


async def brought(web: Web, folder: Path, *, digest: str = "", name: str = "web", max_size: int = 2**30) -> Path:
    wanted = Wanted(name, web.url, digest or hashlib.sha256(web.data).hexdigest())
    return await pull(wanted, folder, print, max_size=max_size, pause=0.001, use_proxies=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".build.lock")


RAW = bytes(range(256)) * 4096  # 1 MiB


async def test_a_pull_goes_on_where_the_server_broke_off(tmp_path: Path) -> None:
    async with serving(Web(RAW, cuts=[300_000, 0, 500_000])) as web:
        path = await brought(web, tmp_path)
    assert path.read_bytes() == RAW
    assert names(tmp_path) == ["web.raw"]
    assert web.asked[0] == 0 and web.asked == sorted(web.asked) and web.asked[-1] > 300_000


async def test_an_interrupted_pull_is_taken_up_by_the_next_and_a_finished_one_not_repeated(tmp_path: Path) -> None:
    async with serving(Web(RAW, cuts=[400_000, *[0] * 20])) as web:
        with pytest.raises(AgentError, match="5 attempts in a row brought nothing"):
            await brought(web, tmp_path)
        (part,) = names(tmp_path)
        assert part.startswith(".web.") and part.endswith(".part")
        web.cuts.clear()
        web.asked.clear()
        await brought(web, tmp_path)
        assert web.asked == [400_000]
        await brought(web, tmp_path)
        assert web.asked == [400_000]


async def test_a_server_without_ranges_begins_again(tmp_path: Path) -> None:
    async with serving(Web(RAW, cuts=[300_000], ranges=False)) as web:
        assert (await brought(web, tmp_path)).read_bytes() == RAW


async def test_what_has_another_digest_is_not_kept(tmp_path: Path) -> None:
    async with serving(Web(RAW)) as web:
        with pytest.raises(ImageRefused, match=f"not {'0' * 64}; nothing of it was kept"):
            await brought(web, tmp_path, digest="0" * 64)
    assert names(tmp_path) == []


async def test_a_file_that_is_too_large_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    async with serving(Web(RAW)) as web:
        with pytest.raises(AgentError, match="more than the 1000 allowed"):
            await brought(web, tmp_path, max_size=1000)
    assert names(tmp_path) == []


async def test_a_refusal_of_the_server_is_told(tmp_path: Path) -> None:
    async with serving(Web(RAW, status=404)) as web:
        with pytest.raises(AgentError, match="HTTP status 404"):
            await brought(web, tmp_path)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (Wanted("../x", "http://h/x", "0" * 64), "NAME must"),
        (Wanted("x", "file:///etc/shadow", "0" * 64), "URL must begin with http"),
        (Wanted("x", "http://h/x", "abc"), "--sha256 must be 64"),
    ],
)
async def test_what_makes_no_sense_is_named(tmp_path: Path, wanted: Wanted, why: str) -> None:
    with pytest.raises(AgentError, match=why):
        await pull(wanted, tmp_path, print)


@pytest.mark.real
async def test_an_image_that_refers_to_another_file_is_not_kept_though_its_digest_is_right(tmp_path: Path) -> None:
    bad, images = tmp_path / "bad.qcow2", tmp_path / "images"
    (tmp_path / "secret").write_bytes(bytes(2**20))
    await run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "secret", bad)
    async with serving(Web(bad.read_bytes())) as web:
        with pytest.raises(ImageRefused, match="has a backing file"):
            await brought(web, images)
    assert names(images) == []


@pytest.mark.real
async def test_a_pulled_image_is_kept_while_a_disk_stands_on_it_and_is_never_replaced(tmp_path: Path) -> None:
    images, vm = tmp_path / "images", tmp_path / "vms" / "vm-a"
    vm.mkdir(parents=True)
    await run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "new.qcow2", "8M")
    async with serving(Web((tmp_path / "new.qcow2").read_bytes())) as web:
        assert (await brought(web, images)).name == "web.qcow2"
        storage = FileStorage(images, vm.parent)
        await storage.ensure_disk(VmId("vm-a"), vm, "web", 16)
        with pytest.raises(Conflict, match="1 disks of VMs stand on image web"):
            await remove("web", images)
        web.data = RAW
        with pytest.raises(Conflict, match="another image web is in"):
            await brought(web, images)
        await storage.remove_disk(VmId("vm-a"), vm)
        await remove("web", images)
    assert names(images) == []
    with pytest.raises(ImageMissing, match="there is no image web"):
        await remove("web", images)
