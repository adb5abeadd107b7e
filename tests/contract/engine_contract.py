"""What every engine driver must do: the same tests for the fake and the real ones.

A driver's test module makes a subclass of `EngineRig`, and a subclass of `EngineContract` with fixtures `rig` and `neighbour`
(the rig of a second agent on the same machine); it closes both at the end.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from agent.engines.base import Engine
from agent.errors import AgentError
from agent.identity import identify
from agent.machine import EngineState, Lease, Machine, Nic, Running, Stopped, Usable, mac_of
from specs.names import VmId
from specs.wire import CreateVmReq

GRACE = timedelta(seconds=20)
LIMIT = 30.0  # seconds, for whatever must happen; far beyond what it takes


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what another process will bring about."""
    async with asyncio.timeout(LIMIT):
        while not condition():  # noqa: ASYNC110 nothing in this process could set an event
            await asyncio.sleep(0.01)


class EngineRig(abc.ABC):
    """One agent's engine on this host, with the means to disturb what it runs."""

    image: str

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir
        self.exits: asyncio.Queue[VmId] = asyncio.Queue()
        self.machines: list[Machine] = []
        self.engine = self._attach()

    def _attach(self) -> Engine:
        engine = self.new_engine()
        engine.on_exit = self.exits.put_nowait
        return engine

    @abc.abstractmethod
    def new_engine(self) -> Engine:
        """Another instance over the same host and runtime folder, as a new agent process would make it."""

    @abc.abstractmethod
    async def make_machine(self, vm_id: str) -> Machine:
        """A machine with its folder, and its disk if the engine needs one; nothing of the engine's own yet."""

    @abc.abstractmethod
    async def crash(self, machine: Machine, pid: int) -> None:
        """Ends the VM's process from outside, as `kill -9` does."""

    @abc.abstractmethod
    async def power_off(self, machine: Machine) -> None:
        """Makes the guest end by itself with success, behind the engine's back."""

    @abc.abstractmethod
    async def boots(self, machine: Machine) -> int:
        """How often this very disk has booted, as the running guest tells; waits until it has told."""

    async def say(self, machine: Machine) -> None:  # noqa: B027 most guests speak as they boot
        """Has a running guest that may have been silent so far say something on its console."""

    def half_made(self) -> dict[str, Callable[[Machine], Awaitable[None]]]:
        """States in which a killed agent may leave a VM, each with what makes it. Drivers add their own."""

        async def nothing(machine: Machine) -> None:
            """Not even prepared."""

        async def prepared(machine: Machine) -> None:
            await self.engine.prepare(machine)

        async def running(machine: Machine) -> None:
            await self.engine.prepare(machine)
            await self.engine.start(machine)

        async def crashed(machine: Machine) -> None:
            await running(machine)
            state = await self.state(machine)
            assert isinstance(state, Running)
            await self.crash(machine, state.pid)
            await self.next_exit()

        return {"nothing": nothing, "prepared": prepared, "running": running, "crashed": crashed}

    def is_alive(self, pid: int) -> bool:
        """Whether the process of a VM runs."""
        return identify(pid) is not None

    def remains(self, machine: Machine) -> list[str]:
        """Whatever of the engine's own still stands in the VM's folder."""
        kept = {machine.disk.path.name, "base.qcow2", "base.raw"} if machine.disk else set()
        return sorted(path.name for path in machine.folder.iterdir() if path.name not in kept)

    def machine(self, vm_id: str, folder: Path, *, engine: str) -> Machine:
        """A machine on the user network without forwards, small, without a disk."""
        request = CreateVmReq(vm_id=vm_id, env_id="env", image=self.image, engine=engine, cpu=1, mem=64, disk=8)
        lease = Lease(IPv4Address("10.77.0.2"), mac_of(VmId(vm_id)), {}, deny_outgoing=True, env_id="env")
        nic = Nic("user", lease, IPv4Network("10.77.0.0/16"), IPv4Address("10.77.0.1"), forward_addrs=("127.0.0.1",))
        return Machine(VmId(vm_id), folder, request, nic)

    async def restart_agent(self) -> None:
        """The agent ends without a word to its VMs, and another one starts."""
        await self.engine.close()
        self.engine = self._attach()

    async def started(self, vm_id: str) -> tuple[Machine, int]:
        """A running machine and its pid."""
        machine = await self.make_machine(vm_id)
        await self.engine.prepare(machine)
        await self.engine.start(machine)
        return machine, await self.pid(machine)

    async def pid(self, machine: Machine) -> int:
        """The pid of a machine that must be running."""
        state = await self.state(machine)
        assert isinstance(state, Running), state
        return state.pid

    async def state(self, machine: Machine) -> EngineState | None:
        """What the engine says."""
        return await self.engine.state(machine.id, machine.folder)

    async def next_exit(self) -> VmId:
        """The VM whose end the engine tells next."""
        async with asyncio.timeout(LIMIT):
            return await self.exits.get()

    async def close(self) -> None:
        """Destroys everything the rig has made."""
        for machine in self.machines:
            await self.engine.destroy(machine.id, machine.folder)
        await self.engine.close()


class EngineContract:
    """The promises of agent/engines/base.py."""

    async def test_an_engine_that_works_here_says_so_and_names_its_images(self, rig: EngineRig) -> None:
        assert isinstance(await rig.engine.probe(), Usable)
        names = await rig.engine.images()
        assert rig.image in names
        assert list(names) == sorted(names)

    async def test_a_vm_never_seen_is_unknown_to_the_engine(self, rig: EngineRig) -> None:
        machine = await rig.make_machine("vm-a")
        assert await rig.state(machine) is None

    async def test_a_prepared_vm_is_stopped_without_a_reason(self, rig: EngineRig) -> None:
        machine = await rig.make_machine("vm-a")
        await rig.engine.prepare(machine)
        await rig.engine.prepare(machine)
        assert await rig.state(machine) == Stopped()

    async def test_a_vm_that_was_not_prepared_does_not_start(self, rig: EngineRig) -> None:
        machine = await rig.make_machine("vm-a")
        with pytest.raises(AgentError):
            await rig.engine.start(machine)
        assert await rig.state(machine) is None

    async def test_the_end_of_the_console_is_told_and_bounded(self, rig: EngineRig) -> None:
        unknown = await rig.make_machine("vm-a")
        assert await rig.engine.console(unknown.id, unknown.folder, 1000) == b""
        machine, _ = await rig.started("vm-b")
        assert await rig.boots(machine) == 1
        await rig.say(machine)
        async with asyncio.timeout(LIMIT):
            while len(await rig.engine.console(machine.id, machine.folder, 64 * 1024)) < 5:  # noqa: ASYNC110 as in `until`
                await asyncio.sleep(0.05)
        assert len(await rig.engine.console(machine.id, machine.folder, 5)) == 5

    async def test_starting_a_running_vm_leaves_its_process_alone(self, rig: EngineRig) -> None:
        machine, pid = await rig.started("vm-a")
        await rig.engine.prepare(machine)
        await rig.engine.start(machine)
        assert await rig.pid(machine) == pid
        assert rig.is_alive(pid)

    async def test_a_stopped_vm_has_no_process_and_stopping_it_again_changes_nothing(self, rig: EngineRig) -> None:
        machine, pid = await rig.started("vm-a")
        await rig.boots(machine)
        await rig.engine.stop(machine, GRACE)
        assert not rig.is_alive(pid)
        assert await rig.state(machine) == Stopped()
        await rig.engine.stop(machine, GRACE)
        assert await rig.state(machine) == Stopped()

    async def test_stopping_without_grace_ends_the_process_too(self, rig: EngineRig) -> None:
        machine, pid = await rig.started("vm-a")
        await rig.engine.stop(machine, timedelta(0))
        assert not rig.is_alive(pid)
        assert await rig.state(machine) == Stopped()

    async def test_stopping_a_vm_that_never_ran_is_fine(self, rig: EngineRig) -> None:
        machine = await rig.make_machine("vm-a")
        await rig.engine.prepare(machine)
        await rig.engine.stop(machine, GRACE)
        assert await rig.state(machine) == Stopped()

    async def test_start_after_stop_boots_the_same_disk(self, rig: EngineRig) -> None:
        machine, first = await rig.started("vm-a")
        assert await rig.boots(machine) == 1
        await rig.engine.stop(machine, GRACE)
        await rig.engine.prepare(machine)
        await rig.engine.start(machine)
        assert await rig.pid(machine) != first
        assert await rig.boots(machine) == 2

    async def test_a_killed_process_is_told_at_once_and_called_crashed(self, rig: EngineRig) -> None:
        machine, pid = await rig.started("vm-a")
        await rig.crash(machine, pid)
        assert await rig.next_exit() == machine.id
        state = await rig.state(machine)
        assert isinstance(state, Stopped)
        assert state.reason == "crashed"
        assert state.message

    async def test_a_crashed_vm_starts_again_and_forgets_the_crash(self, rig: EngineRig) -> None:
        machine, pid = await rig.started("vm-a")
        await rig.crash(machine, pid)
        await rig.next_exit()
        await rig.engine.start(machine)
        assert await rig.pid(machine) != pid
        await rig.engine.stop(machine, GRACE)
        assert await rig.state(machine) == Stopped()

    async def test_stopping_a_crashed_vm_makes_it_stopped_as_asked(self, rig: EngineRig) -> None:
        machine, pid = await rig.started("vm-a")
        await rig.crash(machine, pid)
        await rig.next_exit()
        await rig.engine.stop(machine, GRACE)
        assert await rig.state(machine) == Stopped()

    async def test_a_guest_that_powers_itself_off_has_exited(self, rig: EngineRig) -> None:
        machine, _ = await rig.started("vm-a")
        await rig.boots(machine)
        await rig.power_off(machine)
        assert await rig.next_exit() == machine.id
        state = await rig.state(machine)
        assert isinstance(state, Stopped)
        assert state.reason == "exited"

    async def test_vms_outlive_their_agent_and_the_next_one_watches_them(self, rig: EngineRig) -> None:
        machine, pid = await rig.started("vm-a")
        await rig.restart_agent()
        assert await rig.pid(machine) == pid
        await rig.crash(machine, pid)
        assert await rig.next_exit() == machine.id
        state = await rig.state(machine)
        assert isinstance(state, Stopped)
        assert state.reason == "crashed"

    async def test_an_adopted_vm_is_stopped_like_any_other(self, rig: EngineRig) -> None:
        machine, pid = await rig.started("vm-a")
        await rig.boots(machine)
        await rig.restart_agent()
        await rig.engine.stop(machine, GRACE)
        assert not rig.is_alive(pid)
        assert await rig.state(machine) == Stopped()

    async def test_a_crash_that_no_agent_saw_is_a_crash(self, rig: EngineRig) -> None:
        machine, pid = await rig.started("vm-a")
        await rig.engine.close()
        await rig.crash(machine, pid)
        await rig.restart_agent()
        state = await rig.state(machine)
        assert isinstance(state, Stopped)
        assert state.reason == "crashed"

    async def test_a_power_off_that_no_agent_saw_is_no_crash(self, rig: EngineRig) -> None:
        machine, pid = await rig.started("vm-a")
        await rig.boots(machine)
        await rig.engine.close()
        await rig.power_off(machine)
        await until(lambda: not rig.is_alive(pid))
        await rig.restart_agent()
        state = await rig.state(machine)
        assert isinstance(state, Stopped)
        assert state.reason == "exited"

    async def test_the_next_agent_knows_that_a_stop_was_asked_for(self, rig: EngineRig) -> None:
        machine, _ = await rig.started("vm-a")
        await rig.engine.stop(machine, timedelta(0))
        await rig.restart_agent()
        assert await rig.state(machine) == Stopped()

    async def test_destroy_leaves_nothing_of_any_half_made_state(self, rig: EngineRig) -> None:
        for number, (name, make) in enumerate(rig.half_made().items()):
            machine = await rig.make_machine(f"vm-{number}")
            await make(machine)
            state = await rig.state(machine)
            await rig.restart_agent()
            await rig.engine.destroy(machine.id, machine.folder)
            await rig.engine.destroy(machine.id, machine.folder)
            assert await rig.state(machine) is None, name
            assert rig.remains(machine) == [], name
            assert not (isinstance(state, Running) and rig.is_alive(state.pid)), name

    async def test_every_half_made_state_can_be_carried_on(self, rig: EngineRig) -> None:
        for number, (name, make) in enumerate(rig.half_made().items()):
            machine = await rig.make_machine(f"vm-{number}")
            await make(machine)
            before = await rig.state(machine)
            await rig.restart_agent()
            await rig.engine.prepare(machine)
            await rig.engine.start(machine)
            after = await rig.state(machine)
            assert isinstance(after, Running), name
            assert not isinstance(before, Running) or after == before, name
            await rig.engine.destroy(machine.id, machine.folder)

    async def test_a_start_cut_off_at_any_moment_can_be_repeated_and_never_runs_twice(self, rig: EngineRig) -> None:
        for number, delay in enumerate((0, 0.002, 0.01, 0.03, 0.1)):
            machine = await rig.make_machine(f"vm-{number}")
            await rig.engine.prepare(machine)
            starting = asyncio.ensure_future(rig.engine.start(machine))
            await asyncio.sleep(delay)
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            before = await rig.state(machine)
            await rig.restart_agent()
            await rig.engine.start(machine)
            after = await rig.state(machine)
            assert isinstance(after, Running)
            assert not isinstance(before, Running) or after == before
            await rig.engine.destroy(machine.id, machine.folder)
            assert not rig.is_alive(after.pid)

    async def test_vms_do_not_disturb_each_other(self, rig: EngineRig) -> None:
        machines = [await rig.make_machine(f"vm-{number}") for number in range(3)]
        await asyncio.gather(*(rig.engine.prepare(machine) for machine in machines))
        await asyncio.gather(*(rig.engine.start(machine) for machine in machines))
        pids = [await rig.pid(machine) for machine in machines]
        assert len(set(pids)) == 3
        await rig.crash(machines[0], pids[0])
        assert await rig.next_exit() == machines[0].id
        await rig.engine.destroy(machines[1].id, machines[1].folder)
        assert await rig.pid(machines[2]) == pids[2]

    async def test_leftovers_are_what_no_record_knows_and_nothing_else(self, rig: EngineRig, neighbour: EngineRig) -> None:
        known, known_pid = await rig.started("vm-known")
        unknown, unknown_pid = await rig.started("vm-unknown")
        others, others_pid = await neighbour.started("vm-others")
        await rig.restart_agent()
        removed = await rig.engine.leftovers(frozenset({known.id}))
        assert len(removed) == 1
        assert "vm-unknown" in removed[0]
        assert not rig.is_alive(unknown_pid)
        assert await rig.state(unknown) is None
        assert await rig.pid(known) == known_pid
        assert await neighbour.pid(others) == others_pid
        assert neighbour.is_alive(others_pid)
        assert await rig.engine.leftovers(frozenset({known.id})) == ()
