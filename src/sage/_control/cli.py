"""The command `sage`."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sage._control import doctor as health
from sage._control import timeline
from sage._control.clusters import Facts, facts, start_warm_ray
from sage._control.explanation import explaining
from sage._control.program import Program
from sage._control.projects import make_project
from sage._control.saved import read
from sage._hosts.guard import runs_folder
from sage._hosts.guardian import reap_folder, stale_folders
from sage._hosts.warm_ray import WARM, end_warm_ray, warm_ray
from sage.environment import Environment
from sage.errors import GraphError, SageError
from sage.observability import append_to
from sage.report import Cleanliness, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage._plan.physical import PhysicalPlan
    from sage.report import JobReport

DRAWINGS_PER_S = 5
DEFAULT_LOG_DIR = ".sage/logs"

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)

log_dir_option = click.option(
    "--log-dir",
    type=FOLDER,
    default=DEFAULT_LOG_DIR,
    envvar="SAGE_LOG_DIR",
    show_default=True,
    help="Where log files go; SAGE_LOG_DIR says the same.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run and look at dataflow pipelines."""


@main.command()
@click.argument("file", type=FILE)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@log_dir_option
@click.option("--progress/--no-progress", default=None, help="Show progress; by default on a terminal only.")
@click.option(
    "--report",
    type=NEW_FILE,
    help="Write events and reports there, as JSON Lines while they come; SAGE_REPORT_FILE says it without emptying it.",
)
def run(file: Path, args: tuple[str, ...], log_dir: Path, progress: bool | None, report: Path | None) -> None:
    """Run FILE as Python would, show how far its jobs are, and print their reports.

    Arguments of the program follow after --. Jobs that the program leaves running are waited for.

    Exit codes: 0 for success, 1 if the program or a job failed, 2 if the jobs completed but something could not be
    cleaned up or written to the report file, 130 after Ctrl-C, 143 after SIGTERM; another one if the program chose it.
    """
    os.environ["SAGE_LOG_DIR"] = str(log_dir)
    if report is not None:
        _empty(report)
        os.environ["SAGE_REPORT_FILE"] = str(report.absolute())
    program = Program(file, args)
    with _live(program) if progress or (progress is None and sys.stderr.isatty()) else nullcontext():
        program.run()
    for ended in program.reports:
        click.secho(str(ended), err=True, fg=_colour(ended))
    click.echo(program.error_text(), err=True, nl=False)
    sys.exit(program.exit_code)


@main.command()
@click.argument("file", type=FILE)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.option("--format", "form", type=click.Choice(["text", "mermaid"]), default="text", show_default=True)
def explain(file: Path, args: tuple[str, ...], form: str) -> None:
    """Print the plan of every environment of FILE; its jobs are not run.

    The program itself runs: each submit shows a plan and returns a job that has completed without a record. What the
    program prints goes to standard error.
    """
    output, count = sys.stdout, 0

    def show(plan: PhysicalPlan) -> None:
        nonlocal count
        count += 1
        click.echo(plan.text() if form == "text" else plan.mermaid(), file=output)

    program = Program(file, args)
    with explaining(show) as shown, redirect_stdout(sys.stderr):
        program.run()
    # What was built on the top level of the file, but not submitted, is shown too.
    for value in program.names.values():
        if isinstance(value, Environment) and value not in shown:
            shown.add(value)
            try:
                click.echo(value.explain(form))
            except GraphError as error:
                program.error = error
                break
            count += 1
    sys.exit(_explained(program, count))


@main.command()
@click.argument("file", type=FILE)
@click.option("--html", type=NEW_FILE, help="Write the tables and timelines there, as one page.")
@click.option("--svg", type=NEW_FILE, help="Write the timelines there, as a drawing.")
def report(file: Path, html: Path | None, svg: Path | None) -> None:
    """Print the reports in FILE, which `sage run --report FILE` or SAGE_REPORT_FILE wrote.

    A file whose program was killed shows what had happened until then.
    """
    try:
        saved = read(file)
    except OSError as error:
        raise click.ClickException(f"{file} cannot be read: {error.strerror or error}") from error
    if not saved.jobs:
        raise click.ClickException(f"{file} tells of no job")
    if html is not None:
        _write(html, timeline.page(saved))
    if svg is not None:
        _write(svg, timeline.svg(saved.jobs))
    if html is None and svg is None:
        for job in saved.jobs:
            click.secho(job.text(), fg=_colour(job.report))
    if saved.unread_count:
        lines = "1 line was" if saved.unread_count == 1 else f"{saved.unread_count} lines were"
        click.echo(f"{lines} not readable and left out", err=True)


@main.group()
def new() -> None:
    """Make a new project: a folder with a pipeline, a config and tests that pass."""


@new.command()
@click.argument("folder", metavar="NAME", type=FOLDER)
def rag(folder: Path) -> None:
    """Make the project NAME, which answers questions from documents and names the passages.

    NAME is a new folder here, or a path to one.
    """
    with _said_to_a_person():
        files = make_project("rag", folder)
    for file in files:
        click.echo(str(file))
    click.echo(f"\nNext: cd {folder}, python pipeline.py, python -m pytest")


@main.command()
def version() -> None:
    """Print the versions of SAGE and Python."""
    own = metadata.version("sage-dataflow")
    click.echo(f"sage-dataflow {own}, Python {platform.python_version()}, {platform.system()}")


@main.command()
@log_dir_option
def doctor(log_dir: Path) -> None:
    """Look whether this machine has what SAGE needs; exit with 1 if something is wrong."""
    all_good = True
    for check in health.checks(log_dir):
        all_good &= check.is_good
        mark = click.style("ok   ", fg="green") if check.is_good else click.style("WRONG", fg="red")
        click.echo(f"{mark}  {check.name}: {check.detail}")
    sys.exit(0 if all_good else 1)


@main.command()
def gc() -> None:
    """End what killed programs left on this machine: processes, files, and what their services declared.

    That is the matter of a program's guardian; this finds what is left where both were killed.
    """
    with _said_to_a_person():
        folders = stale_folders(runs_folder())
    found = [reap_folder(folder, lambda text: click.echo(text, err=True)) for folder in folders]
    for reports in found:
        for report in reports or ():
            ends = ", ".join(f"{service['name']} {service['state']}" for service in report["services"])
            click.echo(f'job "{report["name"]}": LOST and {report["cleanliness"].upper()}; {ends or "no services"}')
    runs_count = sum(reports is not None for reports in found)
    click.echo(f"{runs_count} runs were left" if runs_count else "nothing is left")


@main.group()
def cluster() -> None:
    """Keep a Ray on this machine for programs that ask for it by address="warm"."""


@cluster.command()
def up() -> None:
    """Start a Ray that stays until `sage cluster down`, and print its address.

    If one is kept already, its address is printed.
    """
    with _said_to_a_person():
        warm = warm_ray()
        address = warm.address if warm is not None else start_warm_ray()
    click.echo(address)
    click.echo(f'RemoteEnvironment(address="{WARM}") uses it, and so does this address.', err=True)


@cluster.command()
def down() -> None:
    """End the Ray that is kept, with everything that runs on it."""
    with _said_to_a_person():
        warm = end_warm_ray()
    click.echo("no cluster is kept" if warm is None else f"{warm.address} has ended")


@cluster.command()
def status() -> None:
    """Say what Ray is kept, and what it has; exit with 1 if there is none."""
    with _said_to_a_person():
        found: Facts | None = facts()
    if found is None:
        click.echo("no cluster is kept")
        sys.exit(1)
    for name, text in found.lines():
        click.echo(f"{name:<8}  {text}")


@contextmanager
def _said_to_a_person() -> Iterator[None]:
    """Let an error of ours end the command with its text and its notes instead of a traceback."""
    try:
        yield
    except (SageError, PermissionError) as error:
        raise click.ClickException("\n".join([str(error), *getattr(error, "__notes__", ())])) from error


def _live(program: Program) -> AbstractContextManager[object]:
    # rich takes longer to import than all the rest, and only a terminal needs it.
    from rich.console import Console
    from rich.live import Live

    from sage._control.progress import Progress

    progress = Progress(lambda: program.jobs)
    return Live(
        get_renderable=progress.table,
        console=Console(stderr=True),
        refresh_per_second=DRAWINGS_PER_S,
        transient=True,
        # Live writes to its console, standard error: output that goes to a file must not be led there.
        redirect_stdout=sys.stdout.isatty(),
    )


def _empty(report: Path) -> None:
    """Begin a report file anew, or say before anything runs why it cannot be written."""
    try:
        os.close(append_to(report))
        if report.is_file():
            os.truncate(report, 0)
    except OSError as error:
        text = f"{report} cannot be written: {error.strerror or error}"
        raise click.BadParameter(text, param_hint="--report") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror or error}") from error


def _colour(report: JobReport | None) -> str | None:
    if report is None or report.state in (Outcome.FAILED, Outcome.LOST):
        return "red"
    return "yellow" if report.cleanliness is Cleanliness.DIRTY else None


def _explained(program: Program, count: int) -> int:
    """Return the exit code of `explain`, after saying what went wrong."""
    text = program.error_text()
    if isinstance(program.error, SystemExit) and count:
        return 0
    if program.error is not None and count and not isinstance(program.error, GraphError | KeyboardInterrupt):
        last_line = text.rstrip().splitlines()[-1]
        click.echo(f"The program ended after its submit, which gave it no results: {last_line}", err=True)
        return 0
    click.echo(text, err=True, nl=False)
    if program.error is None and not count:
        click.echo(f"{program.file} submits no environment and has none on its top level", err=True)
        return 1
    return program.exit_code
