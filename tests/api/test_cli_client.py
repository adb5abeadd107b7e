"""The API client against answers no controller of ours gives: broken, foreign, hostile."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from api.client import ApiError, Change, Client, Snapshot, check_url
from specs.desired import EnvSpec

HOST = {"id": "h", "addr": "a:1", "resource": {}, "state": "online", "engines": [], "storage": "file", "registered_at": 1}


def answering(status: int, body: Any, **headers: str) -> Client:
    """A client whose every request is answered so."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Client(
        "http://c:1", transport=httpx.MockTransport(lambda _: httpx.Response(status, content=content, headers=headers))
    )


def failure(client: Client) -> tuple[str, int, str]:
    """What listing hosts fails with."""
    with client, pytest.raises(ApiError) as caught:
        client.hosts()
    return str(caught.value), caught.value.status, caught.value.code


def test_a_failure_is_the_controllers_sentence_with_the_details_it_lacks() -> None:
    details = [{"loc": "vms.0.cpu", "msg": "must be > 0"}, {"loc": "id", "msg": "too long"}, "odd"]
    body = {"ok": False, "error": "2 fields are wrong, id: too long", "code": "invalid", "details": details}
    assert failure(answering(422, body)) == ("2 fields are wrong, id: too long (vms.0.cpu: must be > 0)", 422, "invalid")
    assert failure(answering(500, {"ok": False})) == ("the controller answered 500", 500, "")


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>"), (302, b""), (200, []), (200, {"data": []}), (502, b"Bad Gateway"), (200, b"\xff"), (200, {"ok": "yes"})],
)
def test_what_no_controller_says_points_at_the_url(status: int, body: Any) -> None:
    sentence = f"http://c:1 answered {status} and nothing a muster controller would say; check --url"
    assert failure(answering(status, body, Location="http://elsewhere/")) == (sentence, status, "not_muster")


def test_an_answer_of_another_shape_names_the_first_field_that_is_odd() -> None:
    sentence, _, code = failure(answering(200, {"ok": True, "data": [HOST | {"state": "asleep"}]}))
    assert sentence.startswith("the controller's answer is not understood (0.state: ")
    assert code == "odd_answer"


def test_fields_of_a_newer_controller_are_ignored() -> None:
    with answering(200, {"ok": True, "data": [HOST | {"mood": "fine"}]}) as client:
        assert [host.id for host in client.hosts()] == ["h"]


def test_a_refused_connection_names_the_url_and_how_to_start_a_controller() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    assert failure(Client(url)) == (
        f"cannot reach a controller at {url} (connection refused); "
        "start it with `muster controller` or `muster up`, or name another with --url or MUSTER_URL",
        0,
        "unreachable",
    )


def test_silence_and_a_broken_connection_are_told_apart() -> None:
    def raising(error: Exception) -> Client:
        def handler(_: httpx.Request) -> httpx.Response:
            raise error

        return Client("http://c:1", transport=httpx.MockTransport(handler))

    assert failure(raising(httpx.ReadTimeout("x"))) == ("the controller at http://c:1 did not answer in time", 0, "timeout")
    assert failure(raising(httpx.ReadError("reset"))) == ("the connection to http://c:1 broke: reset", 0, "broken")


def test_requests_carry_the_key_and_a_body_only_where_there_is_one() -> None:
    seen: list[tuple[str, str, str, bytes]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append((request.method, request.url.raw_path.decode(), request.headers.get("content-type", ""), request.content))
        assert request.headers["authorization"] == "Bearer secret"
        return httpx.Response(200, json={"ok": True})

    spec = EnvSpec.model_validate({"id": "a", "vms": [{"image": "x", "engine": "docker"}], "lifetime": "never"})
    with Client("http://c:1/base/", "secret", transport=httpx.MockTransport(handler)) as client:
        client.stop_env("a")
        client.delete_env("a/../b?x#y")
        with pytest.raises(ApiError):
            client.put_env(spec)
    body = json.dumps({"id": "a", "vms": [{"image": "x", "engine": "docker"}], "lifetime": "never", "ssh_keys": []})
    assert [(*call[:3], json.loads(call[3]) if call[3] else None) for call in seen] == [
        ("POST", "/base/api/envs/a/stop", "", None),
        ("DELETE", "/base/api/envs/a%2F..%2Fb%3Fx%23y", "", None),
        ("PUT", "/base/api/envs/a", "application/json", json.loads(body)),
    ]


def test_names_that_address_something_else_are_refused() -> None:
    with answering(200, {"ok": True}) as client:
        for name in ("", ".", ".."):
            with pytest.raises(ApiError, match="is not a name"):
                client.delete_env(name)


def test_a_watch_reads_snapshots_and_changes_and_skips_what_it_does_not_know() -> None:
    frames = (
        ": keep-alive\n\n"
        f'id: 4\nevent: snapshot\ndata: {{"revision": 4,\ndata: "hosts": [{json.dumps(HOST)}]}}\n\n'
        "event: novelty\ndata: {}\n\n"
        'event: change\ndata: {"revision": 5, "kind": "host", "id": "h", "object": null}\n\n'
        "event: change\ndata: "
    )
    with answering(200, frames.encode(), **{"Content-Type": "text/event-stream"}) as client:
        first, second = client.watch()
    assert isinstance(first, Snapshot)
    assert (first.revision, [host.id for host in first.hosts]) == (4, ["h"])
    assert second == Change(revision=5, kind="host", id="h", object=None)


def test_a_revision_that_is_too_old_says_410() -> None:
    with (
        answering(410, {"ok": False, "error": "too old", "code": "revision_gone"}) as client,
        pytest.raises(ApiError) as caught,
    ):
        list(client.watch(since=3))
    assert caught.value.status == 410


def test_addresses_are_completed_and_odd_ones_refused() -> None:
    assert [check_url(url) for url in ("10.0.0.1:9200", "https://c/x/", "[::1]:9200")] == [
        "http://10.0.0.1:9200",
        "https://c/x",
        "http://[::1]:9200",
    ]
    for url in ("", "ftp://c", "http://", "http://user:pw@c", "http://c?x=1", "http://c:port", "http://c/#x"):
        with pytest.raises(ValueError, match="is not a URL"):
            check_url(url)
