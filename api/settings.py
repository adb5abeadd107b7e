"""What a controller can be told. Values come from the command line, which also reads the environment."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

MIN_KEY = 8  # characters; agents refuse shorter ones too


class SettingsError(Exception):
    """A setting that cannot be used; the message names it and says what to do."""


def default_data_dir() -> Path:
    """/var/lib/muster for root, the user's own data folder otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/muster")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "muster"


@dataclass(frozen=True)
class ControllerSettings:
    """Settings of `muster controller`."""

    listen: str = "127.0.0.1:9200"
    data_dir: Path = field(default_factory=default_data_dir)
    api_key: str | None = None
    api_key_file: Path | None = None
    """Read if it exists, else made with a new random key, readable by its owner alone."""
    agent_key: str | None = None
    """The key agents want; the controller's own when left out."""
    insecure_no_auth: bool = False
    heartbeat: float = 10.0
    """Seconds between an agent's signs of life; after three missed ones it is offline."""
    host_loss_grace: float = 300.0
    """Seconds a host must be offline before VMs with `on_host_loss: recreate` are made anew elsewhere."""

    def key(self) -> str | None:
        """The API key, from the setting or the file. Raises SettingsError."""
        if self.api_key is not None and self.api_key_file is not None:
            raise SettingsError("give api_key or api_key_file, not both: they may differ")
        key = self.api_key.strip() if self.api_key is not None else None
        if key is None and self.api_key_file:
            key = read_or_make_key(self.api_key_file)
        if key is not None and len(key) < MIN_KEY:
            raise SettingsError(f"the API key is shorter than {MIN_KEY} characters; make one with `openssl rand -hex 32`")
        return key


def read_or_make_key(path: Path) -> str:
    """The key in a file; a missing file is made with a fresh key, mode 0600. Raises SettingsError."""
    try:
        key = path.read_text().strip()
    except FileNotFoundError:
        return _make_key(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the API key file {path} cannot be read: {error}") from None
    if not key or len(key.split()) != 1:
        raise SettingsError(f"the API key file {path} must hold one line with the key")
    return key


def _make_key(path: Path) -> str:
    key = secrets.token_urlsafe(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(key + "\n")
    except OSError as error:
        raise SettingsError(f"the API key file {path} cannot be made: {error}") from None
    return key
