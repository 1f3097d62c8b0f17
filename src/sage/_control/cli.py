"""The command `sage`."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sage._control import doctor as health
from sage._control import plan_drawing, timeline
from sage._control.clusters import Facts, facts, start_kept_cluster
from sage._control.durable_state import state
from sage._control.errors import said_to_a_person
from sage._control.explanation import changing_graphs, explaining
from sage._control.letters import choose, letters
from sage._control.missing import missing_text
from sage._control.program import Program
from sage._control.projects import make_project
from sage._control.saved import known_jobs
from sage._guardian.lease import runs_folder
from sage._guardian.run_folder import reap_folder, stale_folders
from sage._ray.kept_cluster import WARM, end_kept_cluster, kept_cluster
from sage._standard_streams import CUT_OFF_CODE, is_cut_off, let_go
from sage.durable import RESUME_VARIABLE
from sage.environment import Environment
from sage.errors import GraphError
from sage.observability import append_to
from sage.report import Cleanliness, Outcome

if TYPE_CHECKING:
    from sage._plan.logical import LogicalGraph
    from sage._plan.physical import PhysicalPlan
    from sage.report import JobReport

DISTRIBUTION = "sage-dataflow"
MACHINE = f"Python {platform.python_version()}, {platform.system()}"

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
    help="Folder for log files; you can also set SAGE_LOG_DIR.",
)


class Commands(click.Group):
    """Ends quietly, as a tool does that SIGPIPE ends, when the reader of the command's output has gone."""

    def invoke(self, ctx: click.Context) -> object:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            if not (is_cut_off(sys.stdout) or is_cut_off(sys.stderr)):
                raise
            let_go()
            ctx.exit(CUT_OFF_CODE)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=DISTRIBUTION, message=f"%(package)s %(version)s, {MACHINE}")
def main() -> None:
    """Run and inspect dataflow pipelines."""


main.add_command(state)
main.add_command(letters)


class OfProgram(click.Command):
    """A command whose unknown options, and a request for help behind the file, are meant for the program."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words of the command line."""
        place = next((place for place, word in enumerate(args) if word.endswith(".py")), len(args))
        if not {"-h", "--help"}.isdisjoint(args[place:]) and "--" not in args:
            args.insert(place + 1, "--")
        return super().parse_args(ctx, args)


PASSED_ON = {"ignore_unknown_options": True}


@main.command(cls=OfProgram, context_settings=PASSED_ON)
@click.argument("file", type=FILE)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@log_dir_option
@click.option("--progress/--no-progress", default=None, help="Show progress; by default only on a terminal.")
@click.option(
    "--report",
    type=NEW_FILE,
    help="Write events and reports to FILE as JSON Lines; SAGE_REPORT_FILE appends to a file instead.",
)
@click.option(
    "--record", type=NEW_FILE, help="Write the calls of all services, and their answers, to the cassette FILE."
)
@click.option("--replay", type=FILE, help="Answer the calls of all services from the cassette FILE, and start none.")
@click.option("--fresh", is_flag=True, help="Begin durable jobs anew: delete their checkpoints.")
def run(
    file: Path,
    args: tuple[str, ...],
    log_dir: Path,
    progress: bool | None,
    report: Path | None,
    record: Path | None,
    replay: Path | None,
    fresh: bool,
) -> None:
    """Run FILE as Python would, show how far its jobs are, and print their reports.

    Options that are not listed below, and everything after --, are passed to your program. If the program leaves jobs
    running, the command waits for them.

    Exit codes: 0 for success, 1 if the program or a job failed, 2 if the jobs completed but something could not be
    cleaned up or written to the report file, 3 if a job ended because its budget was used up, 130 after Ctrl-C, 141 if
    the reader of the output has gone, 143 after SIGTERM; otherwise the program's own.
    """
    os.environ["SAGE_LOG_DIR"] = str(log_dir)
    if report is not None:
        _empty(report, "--report")
        os.environ["SAGE_REPORT_FILE"] = str(report.absolute())
    if record is not None and replay is not None:
        raise click.UsageError("--record and --replay exclude each other.")
    if record is not None:
        _empty(record, "--record")
        os.environ["SAGE_RECORD_FILE"] = str(record.absolute())
    if replay is not None:
        os.environ["SAGE_REPLAY_FILE"] = str(replay.absolute())
    if fresh:
        os.environ[RESUME_VARIABLE] = "never"
    program = Program(file, args)
    with _live(program) if progress or (progress is None and sys.stderr.isatty()) else nullcontext():
        program.run()
    _tell(program)
    sys.exit(program.exit_code)


@letters.command("replay", cls=OfProgram, context_settings=PASSED_ON)
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("program", type=FILE)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.option("--operator", help="Only letters of this operator.")
@click.option("--number", "numbers", type=int, multiple=True, help="Only the letter with this number; give it again.")
def replay_letters(
    file: str, program: Path, args: tuple[str, ...], operator: str | None, numbers: tuple[int, ...]
) -> None:
    """Run PROGRAM with the dead letters in FILE as its only records, each put in at the operator that it failed in.

    All sources are empty, services and sinks work as always, and a durable job makes no checkpoints. When the job has
    completed, the letters are taken out of FILE; those that failed again stand there anew. If it fails, they stay, and
    no transactional sink has a record of it. An operator that keeps a state cannot be replayed, nor can one before it.

    Records that JSON does not have are unpickled, which can run code. Do it only if you trust FILE as you trust your
    program. Options that are not listed below, and everything after --, are passed to the program.

    Exit codes: as those of `sage run`; 1 if letters stay because no job took them.
    """
    from sage._control.letter_replay import LetterReplay

    with said_to_a_person():
        replay = LetterReplay(file, [letter for _, letter in choose(file, numbers, operator)])
    if not replay.left:
        click.echo("no dead letters")
        return
    run_program = Program(program, args)
    with changing_graphs(replay.changed):
        run_program.run()
    _tell(run_program)
    with said_to_a_person():
        outcome = replay.finish(run_program.reports)
    click.echo(outcome)
    sys.exit(run_program.exit_code or (1 if replay.left else 0))


def _tell(program: Program) -> None:
    """Print the reports and the error of a program that has ended."""
    if program.exit_code == CUT_OFF_CODE:
        sys.exit(CUT_OFF_CODE)  # whoever read has had enough
    for ended in program.reports:
        click.secho(str(ended), err=True, fg=_colour(ended))
    click.echo(program.error_text(), err=True, nl=False)


@main.command("exec", options_metavar="[--]")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(command: tuple[str, ...]) -> None:
    """Run COMMAND, and end everything that it leaves behind.

    No process that COMMAND started stays behind, even if you kill `sage exec` itself. Each gets SIGTERM, and two
    seconds later SIGKILL. Signals, the terminal and the exit code pass through. Standard error lists the processes that
    were left. As the first process of a container, `sage exec` also reaps orphans.

    Exit codes: the command's own, or 128 plus the number of the signal that ended it; 125 without a guardian, 126
    if the command cannot be run, 127 if it is not found.
    """
    from sage._control.supervisor import run

    sys.exit(run(command))


@main.command(cls=OfProgram, context_settings=PASSED_ON)
@click.argument("file", type=FILE)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.option("--format", "form", type=click.Choice(["text", "mermaid"]), default="text", show_default=True)
@click.option("--svg", type=NEW_FILE, help="Draw the plans to FILE instead of printing them.")
def explain(file: Path, args: tuple[str, ...], form: str, svg: Path | None) -> None:
    """Print the plan of every environment in FILE without running its jobs.

    Your program itself runs, but each submit only prints a plan and returns a job that has completed without records.
    The program's own output goes to standard error.
    """
    from sage._plan.explanation import explanation

    output = sys.stdout
    plans: list[tuple[LogicalGraph, PhysicalPlan]] = []

    def show(graph: LogicalGraph, plan: PhysicalPlan) -> None:
        plans.append((graph, plan))
        if svg is None:
            click.echo(explanation(graph, plan, form), file=output)

    program = Program(file, args)
    with explaining(show) as shown, redirect_stdout(sys.stderr):
        program.run()
    # Environments that the file builds but does not submit are shown too.
    for value in program.names.values():
        if isinstance(value, Environment) and value not in shown:
            shown.add(value)
            try:
                graph = value._graph()
                show(graph, value._plan(graph))
            except GraphError as error:
                program.error = error
                break
    if svg is not None and plans:
        _write(svg, plan_drawing.svg(plans))
    count = len(plans)
    sys.exit(_explained(program, count))


@main.command(cls=OfProgram, context_settings=PASSED_ON)
@click.argument("file", type=FILE)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--sample",
    type=click.IntRange(min=2),
    default=50,
    show_default=True,
    help="How many records of the longest source are run; of the others, as many in proportion.",
)
@click.option(
    "--records",
    type=click.IntRange(min=1),
    help="How many records all sources of a job have; by default the length of its lists and ranges.",
)
@click.option(
    "--price",
    type=(click.FloatRange(min=0), click.FloatRange(min=0)),
    metavar="PROMPT COMPLETION",
    help="The prices of a million tokens; by default those of env.limit(cost=...).",
)
def estimate(
    file: Path, args: tuple[str, ...], sample: int, records: int | None, price: tuple[float, float] | None
) -> None:
    """Run the first records of each source in FILE, and predict time, calls, tokens and cost of all of them.

    The sample is real: services are started and called, which may cost money, and sinks write their results. A job with
    a transactional sink is refused, and a durable job neither reads nor writes checkpoints. No record beyond the sample
    is read. Each prediction has a 95 % interval. If the number of records is not known, predictions are for 1,000.

    The program's own output goes to standard error. Exit codes are those of `sage run`.
    """
    from sage._control.estimate import sampling

    output = sys.stdout
    program = Program(file, args)
    with sampling(sample) as jobs, redirect_stdout(sys.stderr):
        program.run()
    for job in jobs:
        click.echo(job.text(records, price), file=output)
    for ended in program.reports:
        if ended.state is not Outcome.COMPLETED:
            click.secho(str(ended), err=True, fg=_colour(ended))
    click.echo(program.error_text(), err=True, nl=False)
    if not jobs and program.error is None:
        click.echo(f"{file} submits no environment", err=True)
        sys.exit(1)
    sys.exit(program.exit_code)


@main.command()
@click.argument("file", type=FILE)
@click.option("--html", type=NEW_FILE, help="Write the tables and timelines to FILE as one page.")
@click.option("--svg", type=NEW_FILE, help="Draw the timelines to FILE.")
@click.option("--missing", is_flag=True, help="Print the records that did not arrive instead, and why.")
def report(file: Path, html: Path | None, svg: Path | None, missing: bool) -> None:
    """Print the reports in FILE, which `sage run --report FILE` or SAGE_REPORT_FILE wrote.

    If the program was killed, you see everything up to that moment. With --missing, you see for each operator how many
    records failed, were dropped by its function, were in flight at the end or wait for the next run, and the first 20
    that failed in each task with their errors.
    """
    with said_to_a_person():
        saved = known_jobs(file)
    if html is not None:
        _write(html, timeline.page(saved))
    if svg is not None:
        _write(svg, timeline.svg(saved.jobs))
    if html is None and svg is None:
        for job in saved.jobs:
            text = job.text() if job.report is None or not missing else missing_text(job.report)
            click.secho(text, fg=_colour(job.report))
    if saved.unread_count:
        lines = "1 line was" if saved.unread_count == 1 else f"{saved.unread_count} lines were"
        click.echo(f"{lines} not readable and left out", err=True)


@main.command(cls=OfProgram, context_settings=PASSED_ON)
@click.argument("report", type=FILE)
@click.argument("file", type=FILE, required=False)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.option("--record", "id_", metavar="ID", type=click.IntRange(min=1), help="The failed record to run.")
@click.option("--pdb", "debugs", is_flag=True, help="Enter the debugger at the line that fails.")
@click.option("--cassette", type=FILE, help="The cassette, if it is not where the job wrote it.")
def replay(
    report: Path, file: Path | None, args: tuple[str, ...], id_: int | None, debugs: bool, cassette: Path | None
) -> None:
    """Run one failed record of an earlier job alone, with the answers that it got, or list the failed records.

    REPORT and the cassette are files of `sage run FILE --report REPORT --record CASSETTE`. Your program runs up to the
    submit of that job; give FILE if it has moved, and its arguments if it takes any. Then only the operator that failed
    runs, on the record as it came to it, and each call of a service is answered from the cassette. No service and no
    other job is started. What the operator does without a service, such as writing to a file, is done again. Without
    --record, the failed records are listed with their IDs.

    Exit codes: 0 if the record goes through, 1 if it fails again, 2 if it cannot be replayed.
    """
    from sage._control import replay

    with said_to_a_person(exit_code=2):
        failures = replay.failures_of(known_jobs(report), report)
        if id_ is None:
            click.echo(replay.listing(failures))
            return
        job, failure = replay.chosen(failures, id_, report)
        calls = replay.cassette_of(failure) if cassette is None else cassette
        program = Program(replay.program_of(job) if file is None else file, args)
        for name in ("SAGE_RECORD_FILE", "SAGE_REPLAY_FILE", "SAGE_REPORT_FILE", "SAGE_LOG_DIR"):
            os.environ.pop(name, None)  # an earlier report or cassette must stay as it is
        sys.exit(replay.Replay(job, failure, calls, debugs=debugs).run(program))


@main.group()
def new() -> None:
    """Make a new project: a folder with a program, a config and tests that pass."""


@new.command()
@click.argument("folder", metavar="NAME", type=FOLDER)
def rag(folder: Path) -> None:
    """Make the project NAME, which answers questions from documents and cites its sources.

    NAME is a new folder, or a path to one.
    """
    _make("rag", folder, "pipeline.py")
    click.echo('It runs as it is. PDF and office files: pip install "sage-dataflow[rag]"; models: see config.toml')


@new.command()
@click.argument("folder", metavar="NAME", type=FOLDER)
def agent(folder: Path) -> None:
    """Make the project NAME, in which a model answers questions in steps, with tools.

    NAME is a new folder, or a path to one.
    """
    _make("agent", folder, "agent.py")


def _make(template: str, folder: Path, program: str) -> None:
    with said_to_a_person():
        files = make_project(template, folder)
    for file in files:
        click.echo(str(file))
    click.echo(f"\nNext: cd {folder}, python {program}, python -m pytest")


@main.command()
def version() -> None:
    """Print the versions of SAGE and Python, as --version does."""
    click.echo(f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}, {MACHINE}")


@main.command()
@log_dir_option
def doctor(log_dir: Path) -> None:
    """Check whether SAGE can run on this machine; exit with 1 if something is wrong."""
    all_good = True
    for check in health.checks(log_dir):
        all_good &= check.is_good
        mark = click.style("ok   ", fg="green") if check.is_good else click.style("WRONG", fg="red")
        click.echo(f"{mark}  {check.name}: {check.detail}")
    sys.exit(0 if all_good else 1)


@main.command()
def gc() -> None:
    """Clean up after killed programs on this machine: processes, files, and things that their services declared.

    Normally a program's guardian does that. Use this command if both were killed.
    """
    with said_to_a_person():
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
    """Keep a Ray warm on this machine, for programs with address="warm"."""


@cluster.command()
def up() -> None:
    """Start a Ray that runs until `sage cluster down`, and print its address.

    If one is running already, you get its address.
    """
    with said_to_a_person():
        warm = kept_cluster()
        address = warm.address if warm is not None else start_kept_cluster()
    click.echo(address)
    click.echo(f'RemoteEnvironment(address="{WARM}") uses it, and so does this address.', err=True)


@cluster.command()
def down() -> None:
    """End the warm Ray, with everything that runs on it."""
    with said_to_a_person():
        warm = end_kept_cluster()
    click.echo("no cluster is kept" if warm is None else f"{warm.address} has ended")


@cluster.command()
def status() -> None:
    """Show the warm Ray and its resources; exit with 1 if there is not one."""
    with said_to_a_person():
        found: Facts | None = facts()
    if found is None:
        click.echo("no cluster is kept")
        sys.exit(1)
    for name, text in found.lines():
        click.echo(f"{name:<8}  {text}")


def _live(program: Program) -> AbstractContextManager[object]:
    # rich takes longer to import than all the rest, and only a terminal needs it.
    from rich.console import Console
    from rich.live import Live

    from sage._control.progress import Progress
    from sage._progress import ProgressLine

    ProgressLine.is_muted = True
    progress = Progress(lambda: program.jobs)
    return Live(
        get_renderable=progress.table,
        console=Console(stderr=True),
        refresh_per_second=DRAWINGS_PER_S,
        transient=True,
        # Live writes to its console, standard error: output that goes to a file must not be led there.
        redirect_stdout=sys.stdout.isatty(),
    )


def _empty(file: Path, option: str) -> None:
    """Begin a file of an option anew, or say before anything runs why it cannot be written."""
    try:
        os.close(append_to(file))
        if file.is_file():
            os.truncate(file, 0)
    except OSError as error:
        text = f"{file} cannot be written: {error.strerror or error}"
        raise click.BadParameter(text, param_hint=option) from error


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
    """Return the exit code of `explain`, after printing the error."""
    if isinstance(program.error, BrokenPipeError):
        raise program.error  # nobody reads the plans any more
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
