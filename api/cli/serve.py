"""`muster controller`, `muster agent` and `muster up`: starts the product's processes. Loads their code only when run."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from api.cli.common import Failure, default_data_dir, note, read_api_key

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)
_SIZE = click.IntRange(min=0)

Option = Callable[[F], F]


def _options(*options: Callable[..., Any]) -> Callable[[F], F]:
    def add(command: F) -> F:
        return functools.reduce(lambda inner, option: option(inner), reversed(options), command)

    return add


def _flag(name: str, help_: str, **settings: Any) -> Callable[[Any], Any]:
    """A flag that `MUSTER_<NAME>` sets too."""
    variable = "MUSTER_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, envvar=variable, help=help_, **settings)


_server_options = _options(
    _flag("--data-dir", "Folder of its state [/var/lib/muster for root, else ~/.local/share/muster].", type=_PATH),
    _flag("--api-key-file", "File with the API key; the controller makes it when it is missing.", type=_PATH),
    _flag("--api-key", "The API key; a file or MUSTER_API_KEY is safer.", metavar="KEY"),
    _flag("--insecure-no-auth", "Allow an address others can reach without a key.", is_flag=True),
)

_agent_options = _options(
    _flag("--image-dir", "Folder of base images [DATA-DIR/images].", type=_PATH),
    _flag("--runtime-dir", "Folder with one folder a VM [DATA-DIR/vms].", type=_PATH),
    _flag("--storage", "How disks are kept: file (or raw), zvol (or zfs).", metavar="KIND"),
    _flag("--zfs-images", "Dataset of images for zvol [the one mounted at the image folder].", metavar="DATASET"),
    _flag("--zfs-runtime", "Dataset of VMs' disks for zvol [the one mounted at the runtime folder].", metavar="DATASET"),
    _flag("--host-id", "Name of this host [made from its host name, then kept].", metavar="NAME"),
    _flag("--labels", "Labels that VMs may ask for by host_labels, such as zone=a,disk=ssd.", metavar="KEY=VALUE,…"),
    _flag("--engines", "Engines that must work, such as qemu,docker [all that do].", metavar="LIST"),
    _flag("--network", "bridge needs root, user does not.", type=click.Choice(["auto", "bridge", "user"])),
    _flag("--accel", "How QEMU runs guests; auto proves KVM first.", type=click.Choice(["auto", "kvm", "tcg"])),
    _flag("--cpu-total", "vCPUs to give away; 0 detects.", type=_SIZE, metavar="N"),
    _flag("--mem-total", "Memory to give away in MiB; 0 detects.", type=_SIZE, metavar="MIB"),
    _flag("--disk-total", "Disk to give away in MiB; 0 detects.", type=_SIZE, metavar="MIB"),
    _flag("--firecracker-bin", "The firecracker binary, its jailer beside it [firecracker].", metavar="PATH"),
    _flag("--docker", "The container command: docker, podman, or with arguments.", metavar="COMMAND"),
    _flag("--bridge", "Name of the bridge [muster0].", metavar="NAME"),
    _flag("--subnet", "Addresses of VMs on the bridge, such as 10.213.0.0/16.", metavar="CIDR"),
    _flag("--port-range", "Host ports for forwards, such as 20000-32767.", metavar="FIRST-LAST"),
    _flag("--forward-addrs", "Addresses that forwards listen on in the user network.", metavar="LIST"),
)

_simulation_options = _options(
    _flag(
        "--simulate", "Pretend to be N hosts, on consecutive ports from --listen on.", type=click.IntRange(1, 5000), metavar="N"
    ),
    _flag("--seed", "Of what is drawn for simulated hosts [1].", type=int, metavar="N"),
    _flag("--latency", "How long a simulated machine takes to start or stop, such as 50ms or 10ms-2s.", metavar="TIME"),
    _flag("--fail-rate", "Share of simulated starts, stops and removals that fail, such as 0.05.", metavar="SHARE"),
    _flag("--crash-rate", "How often a simulated machine crashes, such as 2/h.", metavar="RATE"),
    _flag("--zones", "Give simulated hosts the labels zone=zone-1 to zone=zone-N in turn.", type=_SIZE, metavar="N"),
    _flag("--images", "Base images of simulated hosts [tiny,debian,alpine-cloud].", metavar="LIST"),
)
_SIMULATION = ("simulate", "seed", "latency", "fail_rate", "crash_rate", "zones", "images")
_REAL_ONLY = ("image_dir", "runtime_dir", "network", "accel", "docker", "bridge", "forward_addrs")


@click.command()
@_flag("--listen", "Address of the API and the dashboard.", metavar="HOST:PORT", default="127.0.0.1:9200", show_default=True)
@_server_options
@_flag("--agent-key", "The key of the agents [the controller's own]; MUSTER_AGENT_KEY is safer.", metavar="KEY")
@_flag(
    "--heartbeat",
    "Seconds between an agent's signs of life; after three missed ones a host is offline [10].",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
)
@_flag(
    "--host-loss-grace",
    "Seconds a host must be offline before VMs with on_host_loss: recreate are made elsewhere [300].",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
)
def controller(data_dir: Path | None, **given: Any) -> None:
    """Run the controller: the REST API, the dashboard and the reconcile loop."""
    from api.main import serve
    from api.settings import ControllerSettings, SettingsError
    from reconciler.store.database import StoreCorrupt, StoreUnavailable

    given = _one_key(given)
    try:
        settings = ControllerSettings(data_dir=data_dir or default_data_dir(), **_given(given))
        asyncio.run(serve(settings, ready=_announce))
    except (SettingsError, StoreCorrupt, StoreUnavailable) as error:
        raise Failure(str(error)) from None
    except OSError as error:
        raise Failure(f"the controller cannot run: {error.strerror or error}") from None


@click.command()
@_flag("--listen", "Address of the agent's API.", metavar="HOST:PORT", default="127.0.0.1:9100", show_default=True)
@_server_options
@_agent_options
@_simulation_options
def agent(data_dir: Path | None, **given: Any) -> None:
    """Run the agent of this host: it makes, stops, starts and removes VMs and containers.

    VMs keep running when it ends, and are found again when it starts.

    With --simulate it pretends to be many hosts instead: the same API, but machines, disks and networks exist in memory
    alone. Records are kept in memory too unless --data-dir is given.
    """
    from pydantic import ValidationError

    from agent.errors import AgentError
    from agent.main import serve
    from agent.settings import AgentSettings
    from agent.simulate import Simulation
    from agent.simulate import serve as serve_simulated

    given = _one_key(given)
    simulated, given = _split_simulation(given)
    try:
        settings = AgentSettings.model_validate({"data_dir": data_dir or default_data_dir(), **_given(given)})
        simulation = Simulation.model_validate(simulated) if simulated else None
    except ValidationError as error:
        raise click.UsageError(_flags_at_fault(error.errors())) from None
    try:
        if simulation:
            asyncio.run(serve_simulated(settings, simulation, data_dir=data_dir, ready=_announce))
        else:
            asyncio.run(serve(settings, ready=_announce))
    except AgentError as error:
        raise Failure(error.message) from None
    except OSError as error:
        raise Failure(f"the agent cannot run: {error.strerror or error}") from None


@click.command()
@click.option(
    "--listen",
    envvar="MUSTER_LISTEN",
    metavar="HOST:PORT",
    default="127.0.0.1:9200",
    show_default=True,
    help="Of the controller.",
)
@click.option(
    "--agent-listen",
    envvar="MUSTER_AGENT_LISTEN",
    metavar="HOST:PORT",
    default="127.0.0.1:9100",
    show_default=True,
    help="Of the agent.",
)
@click.option("--destroy-on-exit", is_flag=True, help="Destroy every environment before ending, so that nothing keeps running.")
@_server_options
@_agent_options
@_simulation_options
def up(
    listen: str,
    agent_listen: str,
    destroy_on_exit: bool,
    data_dir: Path | None,
    api_key: str | None,
    api_key_file: Path | None,
    insecure_no_auth: bool,
    **of_agent: Any,
) -> None:
    """Run a controller and an agent on this machine, until Ctrl-C.

    Each runs in a process of its own and is started again should it end. VMs keep running afterwards, and are found again
    by the next `muster up`. With --simulate N the agent pretends to be N hosts, and all of them are registered.
    """
    from api.cli.up import Part, run
    from specs.desired import check_addr

    for address in (listen, agent_listen):
        try:
            check_addr(address)
        except ValueError:
            raise click.UsageError(f"{address!r} is not HOST:PORT, such as 127.0.0.1:9200") from None
    key = _one_key({"api_key": api_key, "api_key_file": api_key_file})
    api_key, api_key_file = key.get("api_key"), key.get("api_key_file")
    simulated, _ = _split_simulation(of_agent)
    data = ["--data-dir", str((data_dir or default_data_dir()).absolute())]
    shared = []
    if api_key_file and not api_key:
        shared += ["--api-key-file", str(api_key_file.absolute())]
    if insecure_no_auth:
        shared.append("--insecure-no-auth")
    own = [word for name, value in _given(of_agent).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    # A key goes through the environment: arguments of a process can be read by every user of the machine.
    secret = {"MUSTER_API_KEY": api_key, "MUSTER_API_KEY_FILE": ""} if api_key else {}
    run(
        Part("controller", listen, ["controller", "--listen", listen, *data, *shared], secret),
        Part("agent", agent_listen, ["agent", "--listen", agent_listen, *([] if simulated else data), *shared, *own], secret),
        hosts=simulated.get("simulate", 1),
        key=lambda: read_api_key(api_key, api_key_file),
        destroy_on_exit=destroy_on_exit,
    )


def _one_key(given: dict[str, Any]) -> dict[str, Any]:
    """The settings with one source of the API key: the command line goes before the environment. Raises UsageError on two."""
    if not (given.get("api_key") and given.get("api_key_file")):
        return given
    context = click.get_current_context()
    typed = [name for name in ("api_key", "api_key_file") if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if len(typed) != 1:
        where = ("--api-key and --api-key-file", "MUSTER_API_KEY and MUSTER_API_KEY_FILE")[not typed]
        raise click.UsageError(f"{where} are both given, and may differ; give one of them")
    return {name: value for name, value in given.items() if name not in ("api_key", "api_key_file") or name in typed}


def _announce(url: str) -> None:
    note(f"listening at {url}")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value is not False}


def _split_simulation(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what concerns simulated hosts, the rest). Raises UsageError on options of one kind of host given to the other."""
    simulated = _given({name: values[name] for name in _SIMULATION})
    rest = {name: value for name, value in values.items() if name not in _SIMULATION}
    wrong = [name for name in _REAL_ONLY if "simulate" in simulated and rest.get(name) is not None]
    if wrong:
        raise click.UsageError(f"--{wrong[0].replace('_', '-')} means nothing to simulated hosts; leave it out")
    if simulated and "simulate" not in simulated:
        raise click.UsageError(f"--{next(iter(simulated)).replace('_', '-')} needs --simulate N: it concerns simulated hosts")
    return simulated, rest


def _flags_at_fault(errors: Any) -> str:
    told = []
    for error in errors:
        flag = f"--{str(error['loc'][0]).replace('_', '-')}: " if error["loc"] else ""
        told.append(flag + str(error["msg"]).removeprefix("Value error, "))
    return "; ".join(told)
