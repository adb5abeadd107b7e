"""A store that was lost is never taken for a new cluster; a store that cannot be written is told by readiness."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from api.main import ControllerApp
from api.settings import ControllerSettings, SettingsError
from reconciler.store.database import StoreCorrupt
from tests.fleet_rig import FleetRig, env


async def test_a_store_cut_to_nothing_or_removed_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    async with FleetRig(tmp_path) as rig:
        await rig.call("POST", "/api/envs?wait=30", env())
        running = rig.hosts[0].running()
        folder = tmp_path / "controller"
        store = folder / "muster.db"
        await rig.stop_controller()
        kept = store.read_bytes()
        for lose in (lambda: store.write_bytes(b""), store.unlink):
            lose()
            before = sorted(path.name for path in folder.iterdir())
            with pytest.raises(StoreCorrupt, match=r"muster\.db is (empty|missing), but .* restore muster\.db from a backup"):
                ControllerApp(ControllerSettings(listen="127.0.0.1:0", data_dir=folder))
            assert sorted(path.name for path in folder.iterdir()) == before
        store.write_bytes(kept)
        await rig.start_controller()
        assert [one["id"] for one in await rig.data("/api/envs")] == ["web"]
        assert rig.hosts[0].running() == running


async def test_readiness_ends_while_the_store_cannot_be_written_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconciler.store.database.BUSY_SECONDS", 0.2)
    async with FleetRig(tmp_path, hosts=0) as rig:
        assert (await rig.call("GET", "/readyz")).status_code == 200
        other = sqlite3.connect(tmp_path / "controller" / "muster.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        answer = await rig.call("GET", "/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert (await rig.call("GET", "/api/envs")).status_code == 200, "reads go on"
        assert (await rig.call("GET", "/healthz")).status_code == 200
        other.execute("ROLLBACK")
        other.close()
        assert (await rig.call("GET", "/readyz")).status_code == 200


def test_a_controller_with_two_sources_of_its_key_is_refused(tmp_path: Path) -> None:
    settings = ControllerSettings(data_dir=tmp_path, api_key="long enough a key", api_key_file=tmp_path / "key")
    with pytest.raises(SettingsError, match="not both"):
        settings.key()
