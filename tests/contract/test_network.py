"""The network contract on every driver: in memory, user mode, the Linux bridge in a namespace, FreeBSD's on stand-ins."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from agent.network.base import Network
from agent.network.fake import FakeHost, FakeNetwork
from agent.network.freebsd import PfNetwork
from agent.network.linux import BridgeNetwork
from agent.network.user import UserNetwork
from specs.names import Engine
from tests.contract.network_contract import NetworkContract, NetworkRig, in_set
from tests.freebsd_fixture import FreeBsd, freebsd  # noqa: F401
from tests.netns import Lab, command, inside

SUBNET = IPv4Network("10.91.0.0/24")


class FakeRig:
    def __init__(self) -> None:
        self.host = FakeHost()
        self.network: Network = FakeNetwork(self.host)

    def restarted(self) -> Network:
        return FakeNetwork(self.host)

    def left(self) -> frozenset[str]:
        return frozenset(self.host.links | set(self.host.rules) | ({"bridge"} if self.host.bridge else set()))

    def busy(self, port: int) -> contextlib.AbstractContextManager[None]:
        return in_set(self.host.busy_ports, port)


class HostRig:
    """A rig of the namespace the test runs in."""

    def __init__(self, network: Network, other: Network) -> None:
        self.network = network
        self._other = other

    def restarted(self) -> Network:
        return self._other

    def left(self) -> frozenset[str]:
        links = {line.split(":")[0].strip() for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]}
        return frozenset(links | set(command("nft", "list", "tables").splitlines()))

    @contextlib.contextmanager
    def busy(self, port: int) -> Iterator[None]:
        with socket.socket() as service:
            service.bind(("127.0.0.1", port))
            service.listen()
            yield


@pytest.fixture
def own_namespace() -> Iterator[None]:
    lab = Lab()
    try:
        with inside(lab.namespace("h")):
            yield
    finally:
        lab.close()


class TestFakeNetwork(NetworkContract):
    @pytest.fixture
    def rig(self) -> NetworkRig:
        return FakeRig()


@pytest.mark.real
class TestUserNetwork(NetworkContract):
    @pytest.fixture
    def rig(self, own_namespace: None) -> NetworkRig:
        return HostRig(UserNetwork(SUBNET), UserNetwork(SUBNET))


@pytest.mark.real
class TestBridgeNetwork(NetworkContract):
    @pytest.fixture
    def rig(self, own_namespace: None) -> NetworkRig:
        return HostRig(BridgeNetwork("mtt0", SUBNET), BridgeNetwork("mtt0", SUBNET))


class FreeBsdRig(HostRig):
    """A rig of stand-ins."""

    def __init__(self, host: FreeBsd) -> None:
        super().__init__(PfNetwork("mtt0", SUBNET), PfNetwork("mtt0", SUBNET))
        self.host = host

    def left(self) -> frozenset[str]:
        return frozenset(self.host.links() | set(self.host.state["pf"]["anchors"]))


class TestPfNetwork(NetworkContract):
    engines = (Engine.QEMU, Engine.BHYVE, Engine.JAIL)

    @pytest.fixture
    def rig(self, freebsd: FreeBsd) -> NetworkRig:  # noqa: F811
        return FreeBsdRig(freebsd)
