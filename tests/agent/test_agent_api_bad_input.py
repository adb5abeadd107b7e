"""What clients may get wrong, over real HTTP: always the envelope, the documented status, and nothing changed."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from agent.main import Agent
from specs.failures import Failure
from specs.http import MAX_BODY
from specs.serving import Access, Listen
from tests.agent.runtime_rig import KEY, Rig, request, until
from tests.agent.test_agent_api import BODY, Served, settings

SECRET = "correct horse battery staple"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    rig = Rig(tmp_path / "vms")
    agent = Agent(settings(tmp_path, api_key=SECRET, host_id="host-1"), drivers=rig.drivers())
    await agent.start()
    headers = {"Authorization": f"Bearer {SECRET}"}
    async with httpx.AsyncClient(base_url=agent.url, trust_env=False, timeout=20, headers=headers) as client:
        await until(lambda: agent.runtime.complete)
        yield Served(rig, agent, client)
        assert agent.runtime.list() == []
        assert rig.traces() == Rig.NOTHING
        await agent.stop()


def failure(status: int, body: Any) -> tuple[int, str]:
    """(status, code) after checking the envelope."""
    assert body["ok"] is False
    assert set(body) <= {"ok", "error", "code", "details"}
    assert isinstance(body["error"], str)
    assert 0 < len(body["error"]) < 2000
    return status, body["code"]


@pytest.mark.parametrize(
    ("changes", "loc", "msg"),
    [
        ({"cpu": 0}, "cpu", "must be greater than 0"),
        ({"cpu": -1}, "cpu", "must be greater than 0"),
        ({"cpu": "2"}, "cpu", "must be a valid integer"),
        ({"cpu": 1.5}, "cpu", "must be a valid integer"),
        ({"cpu": True}, "cpu", "must be a valid integer"),
        ({"cpu": None}, "cpu", "must be a valid integer"),
        ({"mem": 2**32}, "mem", "must be less than or equal to 4294967295"),
        ({"disk": 0}, "disk", "must be greater than 0"),
        ({"ports": [0]}, "ports.0", "must be greater than or equal to 1"),
        ({"ports": [80, 70000]}, "ports.1", "must be less than or equal to 65535"),
        ({"ports": ["80"]}, "ports.0", "must be a valid integer"),
        ({"ports": [80, 80]}, "ports", "lists 80 more than once"),
        ({"ports": 80}, "ports", "must be a list"),
        ({"engine": "xen"}, "engine", "must be 'qemu', 'firecracker', 'docker', 'bhyve' or 'jail'"),
        ({"engine": 7}, "engine", "must be 'qemu', 'firecracker', 'docker', 'bhyve' or 'jail'"),
        ({"vm_id": ""}, "vm_id", "must be 1-128 of"),
        ({"vm_id": "../etc"}, "vm_id", "must be 1-128 of"),
        ({"vm_id": "a" * 129}, "vm_id", "must be 1-128 of"),
        ({"env_id": ".hidden"}, "env_id", "must be 1-128 of"),
        ({"image": "a/b"}, "", "image must be 1-128 of"),
        ({"ssh_keys": [f"{KEY}\nssh-rsa AAAA"]}, "ssh_keys.0", "must be one line without control characters"),
        ({"ssh_keys": ["nonsense"]}, "ssh_keys.0", "must be an OpenSSH public key"),
        ({"sshkeys": []}, "sshkeys", "unknown field"),
        ({"deny_outgoing": "perhaps"}, "deny_outgoing", "must be a valid boolean"),
    ],
)
async def test_a_wrong_value_is_a_422_that_names_its_place(served: Served, changes: dict[str, Any], loc: str, msg: str) -> None:
    status, body = await served.call("POST", "/api/vms", json={**BODY, **changes})
    assert failure(status, body) == (422, "invalid")
    assert len(body["details"]) == 1
    assert body["details"][0]["loc"] == loc
    assert body["details"][0]["msg"].startswith(msg)
    assert body["error"].startswith(f"{loc}: {msg}" if loc else msg)


async def test_every_mistake_is_told_at_once(served: Served) -> None:
    status, body = await served.call("POST", "/api/vms", json={"vm_id": "..", "cpu": 0, "typo": 1})
    assert failure(status, body) == (422, "invalid")
    told = {detail["loc"]: detail["msg"] for detail in body["details"]}
    assert set(told) == {"vm_id", "env_id", "image", "engine", "cpu", "mem", "disk", "typo"}
    assert (told["image"], told["typo"]) == ("is required", "unknown field")
    assert "(and 7 more)" in body["error"]


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"{]",
        b"nul",
        b"\xff\xfe",
        b"NaN",
        b'{"a":1,}',
        b"[" * 100_000,
        b'{"cpu": 1e999}',
        b"\x00",
        b'"\\ud800"',
        b"{} {}",
        b'{"cpu": 1, "cpu": 2}',
    ],
)
async def test_malformed_json_is_a_400(served: Served, raw: bytes) -> None:
    assert failure(*await served.call("POST", "/api/vms", content=raw, headers=JSON)) == (400, "malformed_json")


@pytest.mark.parametrize("raw", [b"[]", b"1", b'"x"', b"null", b"true", b"[{}]"])
async def test_a_body_that_is_no_object_is_a_422(served: Served, raw: bytes) -> None:
    status, body = await served.call("POST", "/api/vms", content=raw, headers=JSON)
    assert failure(status, body) == (422, "invalid")
    assert body["error"] == "must be a JSON object"


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json"]
)
async def test_a_body_of_another_content_type_is_a_415(served: Served, kind: str) -> None:
    content = json.dumps(BODY).encode()
    answer = await served.call("POST", "/api/vms", content=content, headers={"Content-Type": kind})
    assert failure(*answer) == (415, "unsupported_media_type")


async def test_a_compressed_body_is_a_415(served: Served) -> None:
    answer = await served.call("POST", "/api/vms", content=b"x", headers={**JSON, "Content-Encoding": "gzip"})
    assert failure(*answer) == (415, "unsupported_media_type")


async def test_calls_without_a_body_refuse_one(served: Served) -> None:
    for method, path in (("POST", "/api/vms/x/stop"), ("POST", "/api/vms/x/start"), ("DELETE", "/api/vms/x")):
        answer = await served.call(method, path, content=b'{"force": true}', headers=JSON)
        assert failure(*answer) == (422, "invalid")
    assert (await served.call("DELETE", "/api/vms/x", content=b"{}", headers=JSON))[0] == 200


@pytest.mark.parametrize("size", [MAX_BODY + 1, 3 * MAX_BODY, 12 * MAX_BODY])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_cap_is_a_413(served: Served, size: int, chunked: bool) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(0, size, 65536):
            yield b" " * 65536

    content: Any = parts() if chunked else b" " * size
    reader, writer = await asyncio.open_connection(*served.agent.url.removeprefix("http://").split(":"))
    size_line = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    head = f"POST /api/vms HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {SECRET}\r\n{size_line}\r\n\r\n"
    writer.write(head.encode())
    try:
        if chunked:
            async for part in content:
                writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        else:
            writer.write(content)
        await writer.drain()
    except ConnectionError:
        assert size > 8 * MAX_BODY  # only far too much is cut off while it is still being sent
    if size <= 8 * MAX_BODY:
        answer = await reader.readuntil(b"}")
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b'"code":"too_large"' in answer
        assert b"Connection: close" not in answer
    writer.close()
    assert (await served.call("GET", "/api/vms"))[0] == 200


async def test_a_client_that_asks_first_is_told_413_before_it_sends(served: Served) -> None:
    reader, writer = await asyncio.open_connection(*served.agent.url.removeprefix("http://").split(":"))
    head = f"POST /api/vms HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {SECRET}\r\n"
    writer.write(f"{head}Content-Length: 2000000\r\nExpect: 100-continue\r\n\r\n".encode())
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"100 (Continue)" not in answer
    writer.close()


async def test_a_body_just_under_the_cap_is_read(served: Served) -> None:
    padded = json.dumps({**BODY, "cpu": 0}).encode()
    answer = await served.call("POST", "/api/vms", content=padded + b" " * (MAX_BODY - len(padded)), headers=JSON)
    assert failure(*answer) == (422, "invalid")


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {SECRET}x",
        f"Bearer {SECRET[:-1]}",
        f"Basic {SECRET}",
        SECRET,
        "Bearer \xe9",
    ],
)
async def test_a_missing_or_wrong_key_is_a_401_that_says_nothing_else(served: Served, authorization: str) -> None:
    headers = {"Authorization": authorization.encode("latin-1")}
    for method, path in (
        ("GET", "/api/info"),
        ("POST", "/api/vms"),
        ("DELETE", "/api/vms/x"),
        ("GET", "/api/none"),
        ("PATCH", "/api/vms"),
    ):
        answer = await served.http.request(method, path, headers=headers)
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert failure(answer.status_code, answer.json()) == (401, "unauthorized")


async def test_the_key_may_hold_other_than_ascii_and_its_scheme_any_case(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "vms")
    agent = Agent(settings(tmp_path, api_key="schlüssel-blume"), drivers=rig.drivers())
    await agent.start()
    async with httpx.AsyncClient(base_url=agent.url, trust_env=False) as client:
        headers = {"Authorization": "bearer schlüssel-blume".encode()}
        assert (await client.get("/api/vms", headers=headers)).status_code == 200
    await agent.stop()


@pytest.mark.parametrize(
    "path", ["/api", "/api/", "/api/none", "/api/vms/", "/api/vms/a/b", "/api/vms/a/restart", "/api//vms", "/x", "/"]
)
async def test_an_unknown_path_is_a_404(served: Served, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert failure(*await served.call(method, path)) == (404, "not_found")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/api/info", "GET, HEAD"),
        ("/api/images", "GET, HEAD"),
        ("/api/vms", "GET, HEAD, POST"),
        ("/api/vms/a", "GET, HEAD, DELETE"),
        ("/api/vms/a/stop", "POST"),
        ("/healthz", "GET, HEAD"),
    ],
)
async def test_another_method_is_a_405_that_lists_the_allowed_ones(served: Served, path: str, allowed: str) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"} - set(allowed.split(", ")):
        answer = await served.http.request(method, path)
        assert failure(answer.status_code, answer.json()) == (405, "method_not_allowed")
        assert answer.headers["Allow"] == allowed


async def test_head_answers_as_get_without_a_body(served: Served) -> None:
    answer = await served.http.head("/api/vms")
    assert (answer.status_code, answer.content, int(answer.headers["Content-Length"]) > 20) == (200, b"", True)


async def test_on_loopback_only_local_host_names_are_answered(served: Served) -> None:
    for host in ("localhost", "localhost:9100", "LOCALHOST:1", "127.0.0.1:80", "[::1]:9100"):
        assert (await served.call("GET", "/api/vms", headers={"Host": host}))[0] == 200
    for host in ("evil.example", "evil.example:9100", "127.0.0.1.evil.example", "localhost.evil.example", "[::2]", "0.0.0.0"):
        answer = await served.call("GET", "/api/vms", headers={"Host": host})
        assert failure(*answer) == (403, "host_not_allowed")


async def test_a_web_page_of_another_origin_cannot_change_anything(served: Served) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        for method, path in (("POST", "/api/vms/a/stop"), ("DELETE", "/api/vms/a")):
            answer = await served.call(method, path, headers=headers)
            assert failure(*answer) == (403, "forbidden")
    assert "Access-Control-Allow-Origin" not in (await served.http.get("/api/vms")).headers


PAYLOADS = [
    "a,b",
    "a\nb",
    "..",
    "../../etc/passwd",
    "a\x00b",
    "-rf",
    "--help",
    "'",
    '"',
    "`id`",
    "$(id)",
    "${HOME}",
    "a;b",
    "a|b",
    "a b",
    "\t",
    "\r\n",
    "\x1b[31m",
    "\u202e",
    "\u2028",
    "é",
    "😀",
    "%2e%2e",
    "%n%s",
    "{{7*7}}",
    "<script>",
    "C:\\x",
    "//x",
    "file:///etc",
    "a" * 5000,
    "",
    " ",
    ".",
    "null",
]
TEXT_FIELDS = ["vm_id", "env_id", "image", "engine", "name", "user_data", "spec_hash", "ssh_keys"]


@pytest.mark.parametrize("field", TEXT_FIELDS)
async def test_no_text_in_any_field_breaks_the_agent(served: Served, field: str) -> None:
    for payload in PAYLOADS:
        value: Any = [payload] if field == "ssh_keys" else payload
        status, body = await served.call("POST", "/api/vms", json={**BODY, field: value})
        assert status in (201, 422), (field, payload, body)
        if status == 201:
            vm = body["data"]["vm"]
            assert (served.rig.folder / vm["id"]).is_dir()
            assert (await served.call("DELETE", f"/api/vms/{vm['id']}"))[0] == 200
    assert sorted(path.name for path in served.rig.folder.parent.iterdir()) == ["images", "vms"]


async def test_no_text_in_a_path_breaks_the_agent(served: Served) -> None:
    for payload, verb in itertools.product(PAYLOADS, ("", "/stop", "/start")):
        path = f"/api/vms/{quote(payload, safe='').replace('.', '%2E')}{verb}"
        status, body = await served.call("POST" if verb else "GET", path)
        assert failure(status, body)[0] in (404, 405)
    assert (await served.call("GET", "/api/vms/%ff"))[0] in (400, 404)
    assert (await served.call("DELETE", "/api/vms/..%2f..%2fetc")) == (200, {"ok": True})


async def test_slow_clients_are_dropped_and_hold_nobody_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    address = served.agent.url.removeprefix("http://").split(":")
    slow = [await asyncio.open_connection(*address) for _ in range(50)]
    for _, writer in slow:
        writer.write(b"POST /api/vms HTTP/1.1\r\nHost: localhost\r\n")
    assert (await served.call("GET", "/api/vms"))[0] == 200
    for _, writer in slow:
        writer.close()


def test_listen_addresses_are_understood_or_refused() -> None:
    assert Listen.parse("127.0.0.1:9100") == Listen("127.0.0.1", 9100)
    assert Listen.parse("[::1]:9100") == Listen("::1", 9100)
    assert Listen.parse(":9100") == Listen("0.0.0.0", 9100)
    loopback = {text: Listen.parse(f"{text}:1").is_loopback for text in ("127.0.0.1", "127.9.9.9", "[::1]", "localhost")}
    assert set(loopback.values()) == {True}
    other = {text: Listen.parse(f"{text}:1").is_loopback for text in ("0.0.0.0", "[::]", "10.0.0.2", "localhost.evil", "")}
    assert set(other.values()) == {False}
    for wrong in ("", "9100", "host", "host:", "host:70000", "a:b:1", "[::1]", "host:1x", "http://x:1"):
        with pytest.raises(ValueError, match="must be host:port"):
            Listen.parse(wrong)


def test_a_key_is_compared_whole() -> None:
    access = Access(key=b"abc")
    access.check_key("Bearer abc")
    for wrong in ("Bearer ab", "Bearer abcd", "abc", "Token abc", ""):
        with pytest.raises(Failure):
            access.check_key(wrong)
    Access().check_key("")


def test_the_body_of_these_tests_is_a_valid_request() -> None:
    assert request().wire() == BODY
