"""Every example loads as it stands, given the key files it names."""

from __future__ import annotations

from pathlib import Path

import pytest

import specs
from specs.desired import EnvSpec, HostSpec
from specs.documents import Document, load, read_source
from specs.names import Engine

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBvXp0aHVzdGVyZXhhbXBsZWtleWZvcnRlc3RzMDA you@laptop"
EXAMPLES = Path(specs.__file__).parent / "examples"


def load_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Document, ...]:
    """Loads a copy of an example with both key files in place: the checkout's and the reader's own."""
    home, copy = tmp_path / "home", tmp_path / "checkout" / "specs" / "examples" / name
    for key in (home / ".ssh" / "id_ed25519.pub", tmp_path / "checkout" / ".state" / "id_ed25519.pub"):
        key.parent.mkdir(parents=True)
        key.write_text(KEY + "\n")
    copy.parent.mkdir(parents=True)
    copy.write_bytes((EXAMPLES / name).read_bytes())
    monkeypatch.setenv("HOME", str(home))
    return load(read_source(copy), str(copy), copy.parent)


def specs_of(documents: tuple[Document, ...]) -> tuple[EnvSpec | HostSpec, ...]:
    return tuple(document.spec for document in documents)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.iterdir()))
def test_every_example_loads_and_every_vm_can_be_entered(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = load_example(name, tmp_path, monkeypatch)
    assert documents
    assert all(spec.ssh_keys == (KEY,) for spec in specs_of(documents) if isinstance(spec, EnvSpec))


def test_hello_is_one_tiny_vm_and_one_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hello,) = specs_of(load_example("hello.yaml", tmp_path, monkeypatch))
    assert isinstance(hello, EnvSpec)
    assert hello.id == "hello"
    assert [(vm.image, vm.engine, vm.cpu, vm.mem, vm.disk, vm.ports) for vm in hello.vms] == [
        ("tiny", Engine.QEMU, 1, 256, 512, (80,)),
        ("muster/busybox", Engine.DOCKER, 1, 64, 128, (80,)),
    ]


def test_hosts_come_before_what_runs_on_them_and_the_large_runner_takes_the_small_ones_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = specs_of(load_example("hosts.yaml", tmp_path, monkeypatch))
    assert [spec.addr for spec in loaded if isinstance(spec, HostSpec)] == [
        "rack1.example.internal:9100",
        "rack2.example.internal:9100",
        "[fd00::3]:9100",
    ]
    ci = loaded[3]
    assert isinstance(ci, EnvSpec)
    assert [(vm.name, vm.image, vm.cpu, vm.mem, vm.disk) for vm in ci.vms] == [
        ("runner-small", "tiny", 1, 512, 2048),
        ("runner-large", "tiny", 4, 4096, 2048),
    ]
