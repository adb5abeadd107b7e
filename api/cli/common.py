"""What every command shares: options of the connection, naming objects, writing results. Imports nothing heavy at the top."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pydantic import BaseModel

    from api.client import Client

F = TypeVar("F", bound=Callable[..., Any])

KINDS = {
    "env": "env", "envs": "env", "environment": "env", "environments": "env",
    "vm": "vm", "vms": "vm", "host": "host", "hosts": "host", "image": "image", "images": "image",
}  # fmt: skip
DEFAULT_WAIT = 300  # seconds


class Failure(click.ClickException):
    """Ends the command with one line on standard error and status 1."""


def say(text: str, *, err: bool = False) -> None:
    """Writes one line of our own words, free of control characters that came from elsewhere."""
    from specs.mistakes import printable

    click.echo(printable(text), err=err)


def note(text: str) -> None:
    """Writes a line for people to standard error, where it never mixes with results."""
    say(text, err=True)


def wants_colour() -> bool:
    """Colour and animation belong on terminals only (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def connection(command: F) -> F:
    """Adds `--url`, `--api-key-file` and `--api-key`, and calls the command with `connect`, which opens a client."""

    @functools.wraps(command)
    def wrapped(*args: Any, url: str | None, api_key: str | None, api_key_file: Path | None, **rest: Any) -> Any:
        return command(*args, connect=functools.partial(_open, url, api_key, api_key_file), **rest)

    for option in reversed(
        (
            click.option("--url", envvar="MUSTER_URL", metavar="URL", help="The controller's address [http://127.0.0.1:9200]."),
            click.option(
                "--api-key-file", envvar="MUSTER_API_KEY_FILE", type=click.Path(path_type=Path), help="File with the API key."
            ),
            click.option(
                "--api-key", envvar="MUSTER_API_KEY", metavar="KEY", help="The API key; a file or MUSTER_API_KEY is safer."
            ),
        )
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def _open(url: str | None, api_key: str | None, api_key_file: Path | None) -> Client:
    from api.client import DEFAULT_URL, Client

    try:
        return Client(url or DEFAULT_URL, read_api_key(api_key, api_key_file))
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def read_api_key(api_key: str | None, api_key_file: Path | None) -> str | None:
    """The key as given, or the only line of a file. Raises Failure when the file cannot be used."""
    if api_key or api_key_file is None:
        return api_key or None
    try:
        key = api_key_file.read_text().strip()
    except (OSError, ValueError) as error:
        raise Failure(f"the API key file {api_key_file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not key:
        raise Failure(f"the API key file {api_key_file} is empty")
    return key


def default_data_dir() -> Path:
    """Where a controller and an agent keep their state: the system's place for root, the user's own otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/muster")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "muster"


def targets(words: Sequence[str], *, default: str | None = None) -> tuple[str | None, tuple[str, ...]]:
    """The kind and the names that `env NAME…`, `env/NAME…` or, with a default kind, `NAME…` mean.

    A VM's name may hold a slash itself (`vm/ENV/NAME`). Raises UsageError on an unknown kind and on mixed kinds.
    """
    if not words:
        return default, ()
    prefix, slash, _ = words[0].partition("/")
    if slash and prefix in KINDS:
        split = [word.partition("/") for word in words]
        kinds = {KINDS.get(kind) for kind, _, _ in split}
        if len(kinds) > 1:
            raise click.UsageError("name objects of one kind at a time")
        return KINDS[prefix], tuple(name for _, _, name in split)
    if words[0] in KINDS and (default is None or len(words) > 1):
        return KINDS[words[0]], tuple(words[1:])
    if default is None:
        raise click.UsageError(f"{words[0]!r} is none of env, vm, host, image")
    return default, tuple(words)


def as_json(value: Any) -> Any:
    """Models, and lists of them, as plain JSON values, with the fields that the controller sent."""
    if hasattr(value, "model_dump"):
        model: BaseModel = value
        return model.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


def write_data(value: Any, output: str) -> None:
    """Writes models as indented JSON or as YAML to standard output, and nothing else."""
    data = as_json(value)
    if output == "json":
        click.echo(json.dumps(data, indent=2))
        return
    import io

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    yaml.dump(data, text)
    click.echo(text.getvalue(), nl=False)


def output_option(*extra: str) -> Callable[[F], F]:
    """`-o table|json|yaml` and what else the command can write."""
    choices = ("table", *extra, "json", "yaml")
    return click.option(
        "-o", "--output", type=click.Choice(choices), default="table", show_default=True, help="How to write it."
    )


class WaitingCommand(click.Command):
    """A command whose `--wait` may stand alone or carry seconds (`--wait=60`), and never takes the next word."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Completes a bare `--wait` before click reads it."""
        end = args.index("--") if "--" in args else len(args)
        full = [f"--wait={DEFAULT_WAIT}" if word == "--wait" else word for word in args[:end]]
        return super().parse_args(ctx, full + args[end:])


wait_option = click.option(
    "--wait",
    type=click.FloatRange(min=0),
    metavar="[=SECONDS]",
    help=f"Wait until that is so, {DEFAULT_WAIT} s if no time is given; fail when it is not.",
)


def each(names: Iterable[str], act: Callable[[str], None]) -> None:
    """Acts on every name, the rest too when one fails, and raises the failures as one at the end."""
    from api.client import ApiError

    failed: list[str] = []
    for name in names:
        try:
            act(name)
        except ApiError as error:
            if error.status in (0, 401):
                raise
            failed.append(f"{name}: {error}")
    if failed:
        raise Failure("; ".join(failed))
