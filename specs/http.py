"""The plumbing every HTTP endpoint shares: envelope, key and Host check, body cap, query and body validation.

Knows tornado and pydantic, nothing of agents or VMs. Every answer under `/api/` is `{"ok": true, …}` or
`{"ok": false, "error": sentence, "code": slug}`, whatever goes wrong.
"""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, cast
from weakref import WeakSet

import orjson
import structlog
from pydantic import BaseModel, ValidationError
from tornado.http1connection import HTTP1Connection
from tornado.web import Application, Finish, HTTPError, RequestHandler, stream_request_body

from specs import strict_json
from specs.failures import Explain, Failure, invalid
from specs.operations import BadParameter, Operation
from specs.serving import MAX_DRAIN, Access

log = structlog.get_logger(__name__)

Model = TypeVar("Model", bound=BaseModel)

MAX_BODY = 1024 * 1024  # bytes
_NOTHING = object()
_TAG = r'(?:W/)?"[^"]*"'


def application(routes: list[Any], *, access: Access, explain: Explain, **settings: Any) -> Application:
    """A tornado application whose unknown paths answer in the envelope too."""
    return Application(
        routes,
        default_handler_class=Unknown,
        access=access,
        explain=explain,
        busy=WeakSet(),
        log_function=_log_request,
        cross_origin_protection=True,
        **settings,
    )


def _log_request(handler: RequestHandler) -> None:
    status, request = handler.get_status(), handler.request
    level = "warning" if status >= 500 else "info" if request.method not in ("GET", "HEAD") else "debug"
    took = round(1000 * request.request_time(), 1)
    getattr(log, level)("request", method=request.method, path=request.path[:200], status=status, ms=took)


@stream_request_body
class Handler(RequestHandler):
    """Base of all endpoints. A subclass has `on_get`, `on_post`, …; what it lacks answers 405.

    The body is always read to its end before anything is answered, up to `MAX_DRAIN`: a connection that is closed with
    unread data resets, and the client would never see why it was refused.
    """

    needs_key: ClassVar[bool] = True
    tagged: ClassVar[bool] = False
    """Whether answers to GET have an entity tag."""
    max_body: int = MAX_BODY
    _METHODS: ClassVar[tuple[str, ...]] = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")

    def initialize(self) -> None:
        """Called by tornado for every request."""
        self._refusal: Failure | None = None
        self._received = 0
        self._tag: str | None = None
        self.asked: dict[str, Any] = {}
        self.settings["busy"].add(self)
        self.raw = bytearray()

    def on_finish(self) -> None:
        """Called by tornado once the answer is on its way."""
        self.settings["busy"].discard(self)

    def set_default_headers(self) -> None:
        """Nothing we answer is to be interpreted as anything else."""
        self.clear_header("Server")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")

    def prepare(self) -> None:
        """Decides on the headers alone whether to refuse; the answer follows when the body has been read."""
        access = cast(Access, self.settings["access"])
        try:
            access.check_host(self.request.host)
            if self.needs_key:
                access.check_key(self.request.headers.get("Authorization", ""))
            if self.request.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise Failure(415, "unsupported_media_type", "the body must not be compressed")
        except Failure as failure:
            self._refusal = failure
        # The connection's own limit would answer outside the envelope.
        cast(HTTP1Connection, self.request.connection).set_max_body_size(2**62)
        announced = self.request.headers.get("Content-Length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:19]) > self.max_body:
            self._refuse_size()
            waits = self.request.headers.get("Expect", "").lower() == "100-continue"
            if waits or int(announced[:19]) > MAX_DRAIN:
                raise cast(Failure, self._refusal)

    def data_received(self, chunk: bytes) -> None:
        """Collects the body, unless it is refused already."""
        self._received += len(chunk)
        if self._received > self.max_body:
            self._refuse_size()
        if self._refusal is None:
            self.raw += chunk
        elif self._received > MAX_DRAIN and not self._finished:
            self._answer_failure(self._refusal)

    def _refuse_size(self) -> None:
        self.raw.clear()
        if self._refusal is None or self._refusal.status != 401:
            self._refusal = Failure(413, "too_large", f"the body must be at most {self.max_body} bytes")

    async def _serve(self, **where: str) -> None:
        if self._finished:
            raise Finish
        if self._refusal is not None:
            raise self._refusal
        method = "get" if self.request.method == "HEAD" else (self.request.method or "").lower()
        action = getattr(self, f"on_{method}", None)
        if action is None:
            raise HTTPError(405)
        described: Operation | None = getattr(action, "operation", None)
        if described is not None:
            try:
                self.asked = described.read_query(self.request.query_arguments)
            except BadParameter as error:
                raise Failure(400, "bad_query", str(error)) from None
        if method == "get":
            # Before anything is read: a tag must never be newer than what it is sent with.
            self._tag = self.entity_tag(**where) if self.tagged else None
            if self._tag is not None and self._tag in re.findall(_TAG, self.request.headers.get("If-None-Match", "")):
                self.set_status(304)
                self.set_header("Etag", self._tag)
                await self.finish()
                return
        await action(**where)

    def entity_tag(self, **_where: str) -> str | None:
        """A weak entity tag (RFC 9110 §8.8.3) that differs whenever the answer to this GET would. Asked if `tagged`."""
        return None

    def compute_etag(self) -> str | None:
        """Called by tornado, which would make a digest of the whole answer."""
        return self._tag

    get = head = post = put = patch = delete = options = _serve

    def allowed(self) -> str:
        """The value of the Allow header."""
        has = {method for method in self._METHODS if hasattr(self, f"on_{method.lower()}")}
        return ", ".join(method for method in self._METHODS if method in has or (method == "HEAD" and "GET" in has))

    def json(self) -> Any:
        """The parsed body, {} if there is none. Raises Failure 400, 415."""
        if not self.raw:
            return {}
        kind = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Failure(415, "unsupported_media_type", "the body must be sent with Content-Type: application/json")
        try:
            return strict_json.loads(bytes(self.raw))
        except strict_json.BadJson as error:
            raise Failure(400, "malformed_json", f"the body is not valid JSON: {error}") from None

    def read(self, model: type[Model]) -> Model:
        """The body as a model. Raises Failure 400, 415, 422."""
        content = self.json()
        try:
            return model.model_validate(content)
        except ValidationError as error:
            raise invalid(error) from None

    def no_body(self) -> None:
        """Refuses fields where none are taken: nothing sent is silently ignored."""
        if self.json() != {}:
            raise Failure(422, "invalid", "this call takes no body")

    def reply(self, data: object = _NOTHING, *, status: int = 200, more: Mapping[str, object] | None = None) -> None:
        """Answers success; without `data` there is no such key, which strict clients rely on."""
        body: dict[str, object] = {"ok": True}
        if data is not _NOTHING:
            body["data"] = data
        self._write_json(status, {**body, **(more or {})})

    def prefers(self, preference: str) -> bool:
        """Whether a Prefer header (RFC 7240) lists the preference."""
        wishes = ",".join(self.request.headers.get_list("Prefer")).split(",")
        return any(wish.partition(";")[0].strip().lower() == preference for wish in wishes)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Called by tornado with whatever an endpoint raised; the trace goes to the log, never into the answer."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        self._answer_failure(self._failure_for(status_code, error))

    def _failure_for(self, status: int, error: BaseException | None) -> Failure:
        if isinstance(error, Failure):
            return error
        known = cast(Explain, self.settings["explain"])(error) if error else None
        if known:
            return known
        if status == 405:
            allowed = self.allowed()
            text = f"{self.request.method} is not possible here; allowed: {allowed or 'nothing'}"
            return Failure(405, "method_not_allowed", text, headers={"Allow": allowed})
        if isinstance(error, HTTPError) and status < 500:
            word = http.client.responses.get(status, "Error")
            return Failure(status, word.lower().replace(" ", "_"), _sentence(error) or word)
        return Failure(500, "internal", "something unexpected happened on this server; its log has the details")

    def _answer_failure(self, failure: Failure) -> None:
        for name, value in failure.headers.items():
            self.set_header(name, value)
        self._write_json(failure.status, failure.body())

    def _write_json(self, status: int, body: object) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.finish(orjson.dumps(body, default=_encode))

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        """Only what nobody foresaw is an error of ours."""
        if value is None or isinstance(value, Failure | HTTPError) or cast(Explain, self.settings["explain"])(value):
            return
        log.error("request_failed", method=self.request.method, path=self.request.path[:200], exc_info=value)


class Unknown(Handler):
    """Every path nobody serves."""

    def prepare(self) -> None:
        """A key first: without one nobody learns which paths exist. Outside /api/ there is nothing to protect."""
        super().prepare()
        if not self.request.path.startswith("/api/") and self._refusal and self._refusal.status == 401:
            self._refusal = None

    def allowed(self) -> str:
        """Nothing is here."""
        return ""

    async def _serve(self, **where: str) -> None:
        if self._refusal is not None:
            raise self._refusal
        raise Failure(404, "not_found", f"there is nothing at {self.request.path[:200]}")

    get = head = post = put = patch = delete = options = _serve


def _sentence(error: HTTPError) -> str:
    text = error.log_message or ""
    return (text % error.args if error.args else text)[:500]


def _encode(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    raise TypeError(f"{type(value).__name__} is no JSON")
