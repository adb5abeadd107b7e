"""What the agent finds out about its machine, and what its settings accept."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from agent import detect
from agent.errors import AgentError
from agent.inventory import Capacity
from agent.settings import AgentSettings
from specs.names import check_name


def test_an_id_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "web 1.example.org")
    first = detect.host_id(tmp_path / "host-id")
    assert check_name(first).startswith("web-1-")
    monkeypatch.setattr("socket.gethostname", lambda: "renamed")
    assert detect.host_id(tmp_path / "host-id") == first
    assert detect.host_id(tmp_path / "other") != first


@pytest.mark.parametrize("name", ["", "...", "ünï", "-" * 70, "a" * 300, "..x"])
def test_any_host_name_leads_to_a_valid_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: name)
    check_name(detect.host_id(tmp_path / "host-id"))


@pytest.mark.parametrize("content", ["", "a b", "../x", "a\nb"])
def test_a_damaged_id_is_refused_instead_of_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "host-id").write_text(content)
    with pytest.raises(AgentError, match="restore it, or give --host-id"):
        detect.host_id(tmp_path / "host-id")
    assert (tmp_path / "host-id").read_text() == content


def test_what_is_not_set_is_found_and_a_little_memory_stays_with_the_host() -> None:
    total = psutil.virtual_memory().total // 2**20
    found = detect.capacity(cpu=0, mem=0, disk=0, disk_found=1234)
    assert found == Capacity(cpu=detect.cpus(), mem=total - min(512, total // 8), disk=1234)
    assert detect.capacity(cpu=3, mem=4, disk=5, disk_found=1234) == Capacity(3, 4, 5)
    assert detect.cpus() >= 1


def test_settings_take_the_spellings_of_the_command_line(tmp_path: Path) -> None:
    settings = AgentSettings.model_validate(
        {
            "data_dir": tmp_path,
            "engines": "KVM, podman",
            "storage": "RAW",
            "docker": "podman --remote",
            "port_range": "30000-30099",
            "subnet": "10.1.0.0/24",
            "forward_addrs": "127.0.0.1,10.0.0.2",
        }
    )
    assert settings.engines == ("qemu", "docker")
    assert settings.storage == "file"
    assert settings.docker == ("podman", "--remote")
    assert settings.ports == range(30000, 30100)
    assert settings.forward_addrs == ("127.0.0.1", "10.0.0.2")
    assert (settings.images_at, settings.runtime_at) == (tmp_path / "images", tmp_path / "vms")
    assert AgentSettings.model_validate({"engines": "auto"}).engines == AgentSettings().engines == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"listen": "nowhere"},
        {"engines": "xen"},
        {"storage": "tape"},
        {"network": "wifi"},
        {"accel": "warp"},
        {"cpu_total": -1},
        {"port_range": "9-1"},
        {"port_range": "0-70000"},
        {"port_range": "x"},
        {"subnet": "10.0.0.0/30"},
        {"subnet": "10.0.0.1/24"},
        {"bridge": "a-name-that-is-too-long"},
        {"bridge": "../x"},
        {"docker": ""},
        {"host_id": "a b"},
        {"typo": 1},
        {"api_key": "x" * 20, "api_key_file": "key"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AgentSettings.model_validate(wrong)


def test_the_key_comes_from_its_file_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("a-long-enough-key\n")
    assert AgentSettings(api_key_file=file).key() == b"a-long-enough-key"
    assert AgentSettings().key() is None
    direct = AgentSettings(api_key="another-long-key")
    assert direct.key() == b"another-long-key"
    assert "another-long-key" not in repr(direct)
    for bad in (AgentSettings(api_key_file=tmp_path / "none"), AgentSettings(api_key="short"), AgentSettings(api_key="")):
        with pytest.raises(AgentError, match="API key"):
            bad.key()
