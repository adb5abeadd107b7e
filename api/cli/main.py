"""The console script `muster`. Finds the command, and turns failures into one line and an exit status."""

from __future__ import annotations

import os
import sys

import click

from api.cli.apply import apply
from api.cli.change import delete, start, stop, wait
from api.cli.common import Failure, output_option, write_data
from api.cli.console import console
from api.cli.describe import describe
from api.cli.events import events
from api.cli.get import get
from api.cli.host import adopt, host
from api.cli.image import image
from api.cli.serve import agent, controller, up
from api.cli.vm import vm

_USAGE = 2
_INTERRUPTED = 130


class _Sections(click.Group):
    """Lists commands by what people want to do."""

    SECTIONS = (
        ("Ask for machines", (apply, delete, stop, start, vm)),
        ("See what there is", (get, describe, events, console, wait)),
        ("Run the cloud", (up, controller, agent, host, adopt, image)),
    )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one section after the other; what is in none comes last."""
        listed = {command.name for _, commands in self.SECTIONS for command in commands}
        others = tuple(command for command in self.commands.values() if command.name not in listed)
        for title, commands in (*self.SECTIONS, ("Other", others)):
            with formatter.section(title):
                formatter.write_dl([(str(command.name), command.get_short_help_str(100)) for command in commands])


@click.group(cls=_Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="muster", message="%(version)s")
def cli() -> None:
    """A private cloud: say which VMs and containers you want, and watch them come true.

    \b
      muster up                                    # a controller and an agent on this machine
      muster apply -f env.yaml --wait              # what you want
      muster describe env NAME                     # and how to enter it
    """


for _, _commands in _Sections.SECTIONS:
    for _command in _commands:
        cli.add_command(_command)


@cli.command()
@output_option()
def version(output: str) -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    if output == "table":
        click.echo(f"muster {installed('muster')}")
    else:
        write_data({"version": installed("muster")}, output)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands.

    \b
      bash:  muster completion bash >> ~/.bashrc
      zsh:   muster completion zsh >> ~/.zshrc
      fish:  muster completion fish > ~/.config/fish/completions/muster.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise Failure(f"there is no completion for {shell}")
    click.echo(found(cli, {}, "muster", "_MUSTER_COMPLETE").source())


def main(arguments: list[str] | None = None) -> None:
    """Runs a command line (default: this process's) and exits: 0 done, 1 failed, 2 misused, 130 interrupted."""
    sys.exit(run_command(arguments))


def run_command(arguments: list[str] | None) -> int:
    """Runs a command line and returns its exit status."""
    try:
        result = cli.main(arguments, prog_name="muster", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return _USAGE
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "muster"
        return _fail(f"{error.format_message()} (see `{where} --help`)", _USAGE)
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe left, such as `head`: Python would complain again while it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _expected(error)
    return result if isinstance(result, int) else 0


def _expected(error: Exception) -> int:
    """Failures that are answers, not defects; anything else goes on as a traceback."""
    from api.client import ApiError
    from specs.documents import SpecErrors

    if isinstance(error, SpecErrors):
        click.echo(str(error), err=True)
        number = len(error.errors)
        return _fail(f"{number} mistake{'' if number == 1 else 's'}; nothing was sent")
    agent_errors = sys.modules.get("agent.errors")
    if isinstance(error, ApiError) or (agent_errors and isinstance(error, agent_errors.AgentError)):
        return _fail(str(error))
    raise error


def _fail(message: str, status: int = 1) -> int:
    from specs.mistakes import printable

    click.echo(f"muster: {printable(message)}", err=True)
    return status


if __name__ == "__main__":
    main()
