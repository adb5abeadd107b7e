"""Typed failures of the agent. Raised by drivers, turned into HTTP answers by the handlers alone."""

from __future__ import annotations


class AgentError(Exception):
    """A failure with an HTTP status, a slug and one readable sentence (what was tried, on what, what to do)."""

    status = 500
    code = "engine_failed"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class NotFound(AgentError):
    """The VM is not on this host."""

    status, code = 404, "not_found"


class Conflict(AgentError):
    """The call contradicts what is there: same id with another spec, a VM still being created, a foreign VM."""

    status, code = 409, "conflict"

    def __init__(self, message: str, code: str = "conflict") -> None:
        super().__init__(message)
        self.code = code


class Unsupported(AgentError):
    """This host cannot honour the request whatever is retried: an engine it lacks, a field its engine cannot keep."""

    status, code = 422, "unsupported"


class ImageMissing(AgentError):
    """The base image is not on this host (yet)."""

    status, code = 422, "image_missing"


class ImageRefused(AgentError):
    """The base image is unsafe or broken: a backing file, an external data file, not the format its name says."""

    status, code = 422, "image_refused"


class NoConsole(AgentError):
    """Nobody keeps what this VM says on its console."""

    status, code = 501, "no_console"


class DoesNotFit(AgentError):
    """No room: memory, disk, addresses or host ports have run out."""

    status, code = 507, "does_not_fit"


class CommandFailed(AgentError):
    """An external command ended with another status than 0, could not be started, or ran out of time."""

    code = "command_failed"

    def __init__(self, argv: tuple[str, ...], *, status: int | None, stderr: str, why: str = "") -> None:
        shown = " ".join(argv)
        tail = stderr.strip()[-2000:]
        outcome = why or f"exited with {status}"
        super().__init__(f"`{shown[:500]}` {outcome}" + (f": {tail}" if tail else ""))
        self.argv = argv
        self.exit_status = status
        self.stderr = stderr
