"""What is promised of ZFS volumes holds on real ZFS, of which this host's kernel knows nothing: in a guest (ops/lab/zfs)."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from tests.zfs.conftest import Guest


@pytest.mark.real
@pytest.mark.timeout(2700)  # the guest is built where it is not in the cache yet
def test_the_zvol_driver_and_agents_with_it_keep_their_promises_on_real_zfs(zfs_guest: Guest) -> None:
    status = zfs_guest.wait()
    said = zfs_guest.log.read_text(errors="replace")
    assert status == 0, said[-20_000:]
    suite = ET.parse(zfs_guest.results / "junit.xml").getroot()[0]
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": counts["tests"], "failures": 0, "errors": 0, "skipped": 0}
    assert counts["tests"] >= 40, counts
