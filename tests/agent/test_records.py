"""Records and terms on disk: whole or not at all, and nothing outside the runtime folder is ever touched."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import AgentError, Conflict, DoesNotFit
from agent.machine import Disk, Lease
from agent.records import RECORD, RecordStore, Terms, VmRecord, io_error, write_durably
from specs.names import ClusterId, VmId
from tests.agent.runtime_rig import request

A = VmId("vm-a")
PROD = ClusterId("prod")


def record(vm_id: str = "vm-a", **changes: object) -> VmRecord:
    """A complete record."""
    lease = Lease(IPv4Address("10.77.0.2"), "52:54:00:00:00:01", {22: 20000, 80: 20001}, True, "env")
    fields = {"request": request(vm_id), "created_at": 1_700_000_000, "lease": lease, "cluster_id": "prod"}
    return VmRecord.model_validate(fields | changes)


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    wanted = record(disk=Disk(tmp_path / "disk.qcow2", "qcow2"), complete=True, power="stopped")
    store.write(record())
    store.write(wanted)
    loaded = store.load()
    assert (loaded.records, loaded.unreadable) == ({A: wanted}, {})
    assert sorted(path.name for path in (tmp_path / A).iterdir()) == [RECORD]
    assert (tmp_path / A).stat().st_mode & 0o777 == 0o700
    assert (tmp_path / A / RECORD).stat().st_mode & 0o777 == 0o600


@settings(deadline=None)  # the machine's disk is no part of what is tested
@given(user_data=st.text(max_size=200), keys=st.integers(0, 3))
def test_any_text_of_a_request_survives_being_recorded(user_data: str, keys: int) -> None:
    wanted = record(request=request(user_data=user_data, ssh_keys=request().ssh_keys * keys))
    try:
        text = wanted.model_dump_json()
    except ValueError:
        assert any(0xD800 <= ord(char) < 0xE000 for char in user_data)  # JSON from the wire cannot hold lone surrogates
        return
    assert VmRecord.model_validate_json(text) == wanted


def test_a_write_that_fails_leaves_the_old_record_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RecordStore(tmp_path)
    store.write(record())

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", broken)
        with pytest.raises(AgentError, match="Input/output error"):
            store.write(record(power="stopped"))
    assert store.load().records == {A: record()}
    assert sorted(path.name for path in (tmp_path / A).iterdir()) == [RECORD]


def test_a_full_disk_is_told_from_other_trouble() -> None:
    assert isinstance(io_error("writing", OSError(28, "No space left on device")), DoesNotFit)
    assert not isinstance(io_error("writing", OSError(13, "Permission denied")), DoesNotFit)


def test_discarding_moves_the_folder_away_in_one_step_and_can_be_repeated(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.write(record())
    (tmp_path / A / "disk.qcow2").write_bytes(b"x")
    store.discard(A)
    store.discard(A)
    assert list(tmp_path.iterdir()) == []


def test_links_inside_a_vm_folder_are_removed_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    store = RecordStore(tmp_path / "vms")
    store.root.mkdir()
    store.write(record())
    (store.folder(A) / "link").symlink_to(outside)
    store.discard(A)
    assert (outside / "precious").exists()
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("vm_id", ["..", ".", "", "a/b", "/etc", ".hidden", "a" * 129, "a\x00", "a..b"])
def test_no_id_leads_out_of_the_runtime_folder(tmp_path: Path, vm_id: str) -> None:
    store = RecordStore(tmp_path)
    with pytest.raises(ValueError, match="must be 1-128"):
        store.folder(VmId(vm_id))


def test_the_longest_id_can_be_recorded_and_discarded(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    vm_id = "a" * 128
    store.write(record(vm_id))
    assert list(store.load().records) == [vm_id]
    store.discard(VmId(vm_id))
    assert list(tmp_path.iterdir()) == []


def test_a_vm_may_be_named_like_the_agents_own_files(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for vm_id in ("terms.json", RECORD, "lock"):
        store.write(record(vm_id))
    Terms(tmp_path / ".terms.json").admit(PROD, 1)
    assert sorted(store.load().records) == ["lock", "terms.json", RECORD]


def test_trash_of_an_interrupted_removal_is_emptied(tmp_path: Path) -> None:
    (tmp_path / ".trash-00-vm-a" / "deep").mkdir(parents=True)
    assert RecordStore(tmp_path).empty_trash() == ()
    assert list(tmp_path.iterdir()) == []


def test_a_file_among_the_folders_is_reported_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "stray").write_text("x")
    (tmp_path / "bad name").mkdir()
    (tmp_path / "bad name" / "file").touch()
    loaded = RecordStore(tmp_path).load()
    assert (loaded.records, loaded.unreadable, loaded.strangers) == ({}, {}, ["bad name", "stray"])
    assert (tmp_path / "stray").exists()


def test_a_durable_write_does_not_go_through_a_planted_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    (tmp_path / "file").symlink_to(target)
    write_durably(tmp_path / "file", b"new")
    assert target.read_text() == "old"
    assert not (tmp_path / "file").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "target"]


@settings(deadline=None)  # the machine's disk is no part of what is tested
@given(terms=st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 2**63 - 1)), max_size=12))
def test_a_term_is_admitted_only_if_none_higher_came_before(
    tmp_path_factory: pytest.TempPathFactory, terms: list[tuple[str, int]]
) -> None:
    path = tmp_path_factory.mktemp("terms") / ".terms.json"
    highest: dict[str, int] = {}
    for cluster, term in terms:
        known = Terms(path)  # every call after a restart
        if term < highest.get(cluster, -1):
            with pytest.raises(Conflict) as refused:
                known.admit(ClusterId(cluster), term)
            assert refused.value.code == "stale_term"
        else:
            known.admit(ClusterId(cluster), term)
            highest[cluster] = term
        assert {name: Terms(path).highest(ClusterId(name)) for name in highest} == highest


def test_a_term_that_cannot_be_kept_is_not_admitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = Terms(tmp_path / ".terms.json")
    terms.admit(PROD, 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(DoesNotFit):
            terms.admit(PROD, 2)
    assert (terms.highest(PROD), Terms(tmp_path / ".terms.json").highest(PROD)) == (1, 1)
