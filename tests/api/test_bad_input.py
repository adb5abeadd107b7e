"""Everything wrong that can be sent, over real HTTP: a clear answer in the envelope, and nothing changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fleet_rig import KEY, FleetRig, env, vm

JSON = {"Content-Type": "application/json"}
STRANGE = [
    "",
    " ",
    ".",
    "..",
    "../../etc/passwd",
    ".hidden",
    "a..b",
    "a/b",
    "a\\b",
    "a b",
    "a,b",
    "a=b",
    "a\nb",
    "a\r\nb",
    "a\x00b",
    "a\x1bb",
    "'",
    '"',
    "`id`",
    "$(id)",
    ";reboot",
    "|cat",
    "&",
    "<script>alert(1)</script>",
    "ä",
    "名前",
    "\u202eabc",
    "\u2028",
    "😀",
    "%2e%2e",
    "a" * 129,
    "x" * 100_000,
    "{}",
    "null\t",
]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[FleetRig]:
    async with FleetRig(tmp_path, hosts=0) as rig:
        yield rig


def failed(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The envelope of a failure with this status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    body: dict[str, Any] = answer.json()
    assert body["ok"] is False and body["error"] and body["code"] and "data" not in body
    return body


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b'{"id": }',
        b"\xff\xfe",
        b'{"id": "a"',
        b"NaN",
        b'{"a":1}{"b":2}',
        b"'a'",
        b'{"id":"a","id":"b"}',
        b"\xef\xbb\xbf{}",
        b"[" * 9999,
        b'{"id":"\\ud800"}',
        b"[1e999]",
        b"9" * 9999,
    ],
)
async def test_malformed_json_is_400(rig: FleetRig, raw: bytes) -> None:
    assert failed(await rig.call("POST", "/api/envs", content=raw, headers=JSON), 400)["code"] == "malformed_json"


@pytest.mark.parametrize(
    ("body", "loc", "says"),
    [
        ([], "", "must be a JSON object"),
        ({"vms": [vm()], "ssh_keys": [KEY]}, "id", "is required"),
        (env("a", vm(cpu=0)), "vms.0.cpu", "greater than 0"),
        (env("a", vm(cpu="2")), "vms.0.cpu", "integer"),
        (env("a", vm(cpu=True)), "vms.0.cpu", "integer"),
        (env("a", vm(cpu=1.5)), "vms.0.cpu", "integer"),
        (env("a", vm(mem=-1)), "vms.0.mem", "greater than 0"),
        (env("a", vm(disk=2**32)), "vms.0.disk", "less than or equal"),
        (env("a", vm(ports=[70000])), "vms.0.ports.0", "65535"),
        (env("a", vm(ports=[0])), "vms.0.ports.0", "greater than or equal to 1"),
        (env("a", vm(ports=[80, 80])), "vms.0", "80 more than once"),
        (env("a", vm(ports="80")), "vms.0.ports", "must be a list"),
        (env("a", vm(deny_outgoing="no")), "vms.0.deny_outgoing", "boolean"),
        (env("a", vm(engine="vmware")), "vms.0.engine", "qemu"),
        (env("a", vm(imgae="tiny")), "vms.0.imgae", "unknown field"),
        (env("a", {"cpu": 1}), "vms.0.image", "is required"),
        (env("a", vm(restart="sometimes")), "vms.0.restart", "always"),
        (env("a", vm(name="x"), vm(name="x")), "", "x more than once"),
        (env("a", vm(count=0)), "vms.0.count", "greater than or equal to 1"),
        (env("a") | {"vms": []}, "vms", "at least one entry"),
        (env("a") | {"vms": None}, "vms", ""),
        (env("a", lifetime="soon"), "lifetime", "duration"),
        (env("a", lifetime=-5), "lifetime", "0 or more"),
        (env("a", lifetme=5), "lifetme", "unknown field"),
        (env("a", ssh_keys=[KEY + "\nssh-ed25519 AAAA other"]), "ssh_keys.0", "one line"),
        (env("a", ssh_keys=["hello"]), "ssh_keys.0", "OpenSSH public key"),
        (env("a", ssh_keys=[KEY + "\x00"]), "ssh_keys.0", "control characters"),
        (env("a", ssh_keys="x"), "ssh_keys", ""),
        ({"id": "a", "vms": [vm()]}, "", "ssh_keys is required"),
        (env("a", owner="a\nb"), "owner", "match"),
        (env("a", vm(engine="docker", user_data="#!/bin/sh")), "vms.0", "user_data cannot be honoured by engine docker"),
    ],
)
async def test_an_invalid_environment_is_422_and_names_the_field(rig: FleetRig, body: object, loc: str, says: str) -> None:
    answer = failed(await rig.call("POST", "/api/envs", body), 422)
    assert len(answer["details"]) == 1, "one mistake, one sentence"
    assert answer["details"][0]["loc"] == loc and says in answer["details"][0]["msg"], answer
    assert await rig.data("/api/envs") == []


@pytest.mark.parametrize("text", STRANGE)
async def test_a_strange_text_in_any_field_never_breaks_the_server(rig: FleetRig, text: str) -> None:
    bodies = [
        env(text),
        env("a", vm(image=text)),
        env("a", vm(image=text, engine="docker")),
        env("a", vm(engine=text)),
        env("a", vm(name=text)),
        env("a", vm(host_labels={text: "x"})),
        env("a", vm(host_labels={"x": text})),
        env("a", vm(user_data=text)),
        env("a", owner=text),
        env("a", ssh_keys=[text]),
        env("a", ssh_keys=[f"ssh-ed25519 AAAAC3Nz {text}"]),
        env("a", lifetime=text),
        env("a", on_host_loss=text),
        env("a") | {text: 1},
    ]
    for body in bodies:
        answer = await rig.call("POST", "/api/envs", body)
        assert answer.status_code in (201, 409, 422), (body, answer.text)
        assert answer.json()["ok"] is (answer.status_code == 201)
        if answer.status_code == 201:
            shown = answer.json()["data"]["env"]["id"]
            await rig.call("DELETE", f"/api/envs/{shown}?wait=10")
    host = await rig.call("POST", "/api/hosts", {"addr": text})
    failed(host, 400)
    for path in ("/api/envs/", "/api/hosts/", "/api/vms/"):
        try:
            answer = await rig.call("GET", path + text[:1000])
        except httpx.InvalidURL:
            continue
        assert answer.status_code in (200, 400, 404)


@pytest.mark.parametrize(
    "addr",
    [
        "10.0.0.2",
        ":9100",
        "10.0.0.2:0",
        "10.0.0.2:65536",
        "http://10.0.0.2:9100",
        "user@h:1",
        "h:1/path",
        "h:1?x",
        "h :1",
        "[::1:9100",
        "h:09100",
        "-h:1",
    ],
)
async def test_a_bad_address_is_400(rig: FleetRig, addr: str) -> None:
    answer = failed(await rig.call("POST", "/api/hosts", {"addr": addr}), 400)
    assert answer["details"][0]["loc"] == "addr"
    assert await rig.data("/api/hosts") == []


async def test_unknown_paths_and_methods_answer_in_the_envelope(rig: FleetRig) -> None:
    for path in ("/api/nothing", "/api/envs/none", "/api/hosts/none", "/api/vms/none", "/nothing", "/api/"):
        failed(await rig.call("GET", path), 404)
    for method, path in (("DELETE", "/api/envs/none"), ("POST", "/api/envs/none/stop"), ("DELETE", "/api/hosts/none")):
        failed(await rig.call(method, path), 404)
    for method, path, allow in (
        ("DELETE", "/api/envs", "GET, HEAD, POST"),
        ("PATCH", "/api/envs/a", "GET, HEAD, PUT, DELETE"),
        ("GET", "/api/envs/a/stop", "POST"),
        ("POST", "/api/status", "GET, HEAD"),
    ):
        answer = await rig.call(method, path)
        failed(answer, 405)
        assert answer.headers["Allow"] == allow


async def test_a_body_must_say_that_it_is_json(rig: FleetRig) -> None:
    raw = json.dumps(env("a")).encode()
    failed(await rig.call("POST", "/api/envs", content=raw, headers={"Content-Type": "text/plain"}), 415)
    failed(await rig.call("POST", "/api/envs", content=raw), 415)
    ok = await rig.call("POST", "/api/envs", content=raw, headers={"Content-Type": "application/json; charset=utf-8"})
    assert ok.status_code == 201


async def test_a_body_over_a_mebibyte_is_413(rig: FleetRig) -> None:
    body = json.dumps(env("a", vm(user_data="x" * 1024 * 1024))).encode()
    failed(await rig.call("POST", "/api/envs", content=body, headers=JSON), 413)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    failed(await rig.call("POST", "/api/envs", content=chunks(), headers=JSON), 413)
    assert (await rig.call("GET", "/api/envs")).status_code == 200


async def test_stop_and_start_take_no_body_and_need_no_content_type(rig: FleetRig) -> None:
    await rig.call("POST", "/api/envs", env("a"))
    for verb in ("stop", "start"):
        assert (await rig.call("POST", f"/api/envs/a/{verb}")).json() == {"ok": True}
        failed(await rig.call("POST", f"/api/envs/a/{verb}", {"force": True}), 422)


async def test_the_path_and_the_body_of_a_put_must_agree(rig: FleetRig) -> None:
    answer = failed(await rig.call("PUT", "/api/envs/a", env("b")), 422)
    assert answer["details"] == [{"loc": "id", "msg": "must be a, as in the path"}]
    body = env("a")
    del body["id"]
    assert (await rig.call("PUT", "/api/envs/a", body)).status_code == 201
    failed(await rig.call("PUT", "/api/envs/a", body, headers={"If-Match": "soon"}), 400)
    failed(await rig.call("PUT", "/api/envs/a?dry_run=maybe", body), 400)
    failed(await rig.call("POST", "/api/envs?wait=long", env("c")), 400)


async def test_an_environment_that_exists_differently_is_409_and_stays(rig: FleetRig) -> None:
    await rig.call("POST", "/api/envs", env("a"))
    before = await rig.data("/api/envs/a")
    failed(await rig.call("POST", "/api/envs", env("a", vm(mem=999))), 409)
    assert await rig.data("/api/envs/a") == before


async def test_keys_may_be_missing_for_containers_only(rig: FleetRig) -> None:
    body = {"id": "c", "vms": [{"image": "muster/busybox", "engine": "Podman"}]}
    answer = await rig.call("POST", "/api/envs", body)
    assert answer.status_code == 201 and answer.json()["data"]["vms"][0]["engine"] == "docker"


async def test_without_the_key_nothing_is_said(tmp_path: Path) -> None:
    async with FleetRig(tmp_path, hosts=0, key="correct-horse") as rig:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "correct-horse"},
            {"Authorization": "Basic x"},
        ):
            async with httpx.AsyncClient(base_url=rig.http.base_url, headers=headers, trust_env=False) as stranger:
                for method, path in (
                    ("GET", "/api/envs"),
                    ("POST", "/api/envs"),
                    ("GET", "/api/nothing"),
                    ("GET", "/api/watch"),
                ):
                    failed(await stranger.request(method, path), 401)
                for path in ("/", "/healthz", "/readyz"):
                    assert (await stranger.get(path)).status_code == 200
        assert await rig.data("/api/envs") == []


async def test_a_page_elsewhere_cannot_use_a_name_that_points_here(rig: FleetRig) -> None:
    failed(await rig.call("GET", "/api/envs", headers={"Host": "evil.example"}), 403)


async def test_a_slow_sender_does_not_hold_others_up(rig: FleetRig) -> None:
    host, port = str(rig.http.base_url.host), rig.http.base_url.port
    connections = [await asyncio.open_connection(host, port) for _ in range(50)]
    for _, writer in connections:
        writer.write(b"POST /api/envs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert (await rig.call("GET", "/api/status")).status_code == 200
    for _, writer in connections:
        writer.close()
