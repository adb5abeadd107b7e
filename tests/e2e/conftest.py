"""One site of real hosts for all tests that want one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.site import Site, site


@pytest.fixture(scope="session")
def running_site() -> Iterator[Site]:
    """Four hosts and a controller, all up."""
    with site(4, small_disks=True) as built:
        built.start()
        yield built


@pytest.fixture
def fleet(running_site: Site) -> Iterator[Site]:
    """The site, at rest and empty before and after each test."""
    running_site.start()
    yield running_site
    running_site.mend()
    running_site.start()
    for env in running_site.data("/api/envs"):
        running_site.delete(env["id"])
    assert {name: (found.boxes, found.stray) for name, found in running_site.settled().items()} == {
        host.name: ((), ()) for host in running_site.hosts
    }
