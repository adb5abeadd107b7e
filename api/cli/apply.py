"""`muster apply`: hands the documents of YAML files to the controller."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from api.cli.common import Failure, WaitingCommand, connection, note, output_option, say, wait_option, write_data

if TYPE_CHECKING:
    from api.client import Client
    from specs.desired import EnvSpec
    from specs.documents import Document
    from specs.wire import PlanLine

_SUFFIXES = (".yaml", ".yml")


@click.command(cls=WaitingCommand)
@click.option(
    "-f", "--file", "files", multiple=True, metavar="FILE|DIR|-", help="YAML file, folder of them, or - for standard input."
)
@click.argument("more", nargs=-1, metavar="[FILE|DIR]...")
@click.option("--dry-run", is_flag=True, help="Show what would happen to each VM and change nothing.")
@wait_option
@output_option()
@connection
def apply(
    files: tuple[str, ...], more: tuple[str, ...], dry_run: bool, wait: float | None, output: str, connect: Callable[[], Client]
) -> None:
    """Make environments and hosts as YAML files describe them.

    Every file is checked before anything is sent. Applying the same file again changes nothing.
    """
    if not (files or more):
        raise click.UsageError("name at least one file: -f FILE, or -f - for standard input")
    documents = load_files((*files, *more))
    table = output == "table"
    failed, results, generations = [], list[Any](), dict[str, int]()
    with connect() as client:
        for document in documents:
            try:
                results.append(
                    _plan(client, document, show=table) if dry_run else _send(client, document, generations, show=table)
                )
            except Exception as error:
                if getattr(error, "status", 0) in (0, 401):
                    raise
                failed.append(f"{document.source}:{document.line}: {document.identity}: {error}")
    if wait is not None and generations:
        from api.cli.progress import await_goal

        await_goal(connect, generations, "converged", wait, quiet=not table)
        with connect() as client:
            results = [client.env(r.env.id) if getattr(r, "env", None) else r for r in results]
    if not table:
        write_data(results, output)
    for line in failed:
        note(line)
    if failed:
        raise Failure(f"{len(failed)} of {len(documents)} documents refused")


def load_files(names: Sequence[str]) -> tuple[Document, ...]:
    """The documents of files, of folders' `*.yaml` and `*.yml` by name, and of standard input. Raises SpecErrors."""
    from specs.documents import SpecError, SpecErrors, load_all, read_source

    texts: list[tuple[str, str, Path | None]] = []
    errors: list[SpecError] = []
    for name in names:
        if name == "-":
            texts.append((sys.stdin.read(), "<stdin>", Path()))
            continue
        path = Path(name)
        found = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.is_file()) if path.is_dir() else [path]
        if not found:
            raise Failure(f"{path} holds no .yaml or .yml file")
        for file in found:
            try:
                texts.append((read_source(file), str(file), file.parent))
            except SpecErrors as error:
                errors += error.errors
    try:
        documents = load_all(texts)
    except SpecErrors as error:
        errors += error.errors
    if errors:
        raise SpecErrors(errors)
    return documents


def _send(client: Client, document: Document, generations: dict[str, int], *, show: bool) -> Any:
    from specs.desired import EnvSpec

    spec = document.spec
    if not isinstance(spec, EnvSpec):
        host = client.add_host(spec)
        if show:
            say(f"host/{host.id} registered, {host.state}")
        return host
    detail = client.put_env(spec)
    generations[spec.id] = detail.env.generation
    if show:
        say(f"env/{spec.id} recorded, {_count(len(detail.env.vm_ids), 'VM')}, {detail.env.phase}")
        for warning in detail.warnings:
            say(f"  warning: {warning}")
    return detail


def _plan(client: Client, document: Document, *, show: bool) -> Any:
    from specs.desired import EnvSpec

    spec = document.spec
    if not isinstance(spec, EnvSpec):
        if show:
            say(f"{document.identity} would be registered")
        return {"host": spec.addr}
    plan = client.plan_env(spec)
    if show:
        say(f"env/{spec.id} would change as follows:" if _changes(plan.plan) else f"env/{spec.id} is as described already")
        for line in plan.plan:
            say(f"  {_plan_line(line, spec)}")
        for warning in plan.warnings:
            say(f"  warning: {warning}")
    return {"env": spec.id, "plan": plan.plan, "warnings": plan.warnings}


def _changes(plan: Sequence[PlanLine]) -> bool:
    return any(line.action != "keep" for line in plan)


def _plan_line(line: PlanLine, spec: EnvSpec) -> str:
    parts = []
    if line.fields:
        parts.append(f"{', '.join(line.fields)} {'differs' if len(line.fields) == 1 else 'differ'}")
    if line.action in ("replace", "destroy"):
        parts.append("its disk is lost")
    if line.message:
        parts.append(line.message)
    where = f" on {line.host}" if line.host else ""
    detail = f" ({'; '.join(parts)})" if parts else ""
    return f"{line.action:8} {spec.id}/{line.name}{where}{detail}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
