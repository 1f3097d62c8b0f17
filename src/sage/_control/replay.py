"""One failed record of an earlier job, run again alone with the answers that it got."""

from __future__ import annotations

import pdb
import sys
from contextlib import closing, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import click

from sage._cassette import Cassette, Said, Tape
from sage._control.explanation import explaining
from sage._control.program import EXIT_FAILED, is_own, text_of
from sage._plan.durability import STATEFUL
from sage._plan.logical import FunctionSpec, Kind, LogicalGraph, Node
from sage.connector import TransactionalSink
from sage.environment import LocalEnvironment
from sage.errors import ControlError, JobError, describe, hint, short
from sage.failure import FAIL
from sage.report import table
from sage.serving import PipelineService

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from sage._control.program import Program
    from sage._control.saved import Saved, SavedFailure, SavedJob
    from sage._plan.physical import PhysicalPlan


def failures_of(saved: Saved, report: Path) -> list[tuple[SavedJob, SavedFailure]]:
    """Return the records that failed, in the order of the file, by which they are numbered from 1.

    Raises:
        ControlError: no record failed, or none was kept.
    """
    found = [(job, failure) for job in saved.jobs for failure in job.failures]
    if found:
        return found
    reports = [job.report for job in saved.jobs if job.report is not None]
    if any(operator.failed for one in reports for operator in one.operators if operator.kind != Kind.SOURCE):
        error = ControlError(f"{report} tells of records that failed, but they were not kept")
        raise hint(error, "Run the program with both options: sage run FILE --report run.jsonl --record calls.db")
    raise ControlError(f"no record failed in {report}")


def listing(failures: list[tuple[SavedJob, SavedFailure]]) -> str:
    """Return a table of the records that failed, with their IDs."""
    rows = [
        (str(id_), job.name, failure.operator, failure.record, failure.error.partition("\n")[0])
        for id_, (job, failure) in enumerate(failures, 1)
    ]
    return "\n".join(table(("ID", "job", "operator", "record", "error"), rows))


def chosen(failures: list[tuple[SavedJob, SavedFailure]], id_: int, report: Path) -> tuple[SavedJob, SavedFailure]:
    """Return the failed record with an ID; ControlError if no record has it."""
    if id_ > len(failures):
        error = ControlError(f"{report} has no failed record {id_}")
        raise hint(error, f"It has {len(failures)}; `sage replay {report}` lists them with their IDs.")
    return failures[id_ - 1]


def program_of(job: SavedJob) -> Path:
    """Return the program that submitted a job; ControlError if the report does not name it, or it is not there."""
    if job.program is None:
        error = ControlError(f'the report does not name the program of job "{job.name}"')
    elif not Path(job.program).is_file():
        error = ControlError(f"the program {job.program} is missing")
    else:
        return Path(job.program)
    raise hint(error, "Give its path after the report: sage replay REPORT FILE --record ID")


def cassette_of(failure: SavedFailure) -> Path:
    """Return the cassette that has the answers of a failed record; ControlError if it is not there."""
    path = Path(failure.cassette)
    if not path.is_file():
        raise hint(ControlError(f"the cassette {path} is missing"), "If you have moved it, give --cassette FILE.")
    return path


class Replay:
    """Runs a program up to the job in which a record failed, and there only the operator that failed.

    Args:
        failure: the record.
        cassette: the file with the record and its answers.
        debugs: whether an error leads into the debugger.

    Attributes:
        exit_code: 0 if the record went through, 1 if it failed again, None if the program did not come to it.
    """

    def __init__(self, job: SavedJob, failure: SavedFailure, cassette: Path, *, debugs: bool) -> None:
        self.exit_code: int | None = None
        self._job = job
        self._failure = failure
        self._cassette = str(cassette.absolute())
        self._debugs = debugs
        self._output: TextIO = sys.stdout
        self._refusal: ControlError | None = None

    def run(self, program: Program) -> int:
        """Run the program and return the exit code.

        Raises:
            ControlError: the record cannot be replayed, or the program did not come to it.
        """
        self._output = sys.stdout
        with explaining(self._submitted), redirect_stdout(sys.stderr):
            program.run()
        if self._refusal is not None:
            raise self._refusal
        if self.exit_code is None:
            text = f'{program.file} submits no environment "{self._job.name}" with an operator'
            error = ControlError(f'{text} "{self._failure.operator}"')
            if ended := program.error_text().rstrip():
                hint(error, f"It ended before: {ended.splitlines()[-1]}")
            raise hint(error, "Jobs before it are not run, so results of theirs are missing.")
        return self.exit_code

    def _submitted(self, graph: LogicalGraph, plan: PhysicalPlan) -> None:
        """Replay the record if it is this job's, and end the program, which would go on without the job's results."""
        nodes = [node for node in graph.nodes.values() if node.name == self._failure.operator]
        if graph.name != self._job.name or not nodes or self.exit_code is not None:
            return
        try:
            self.exit_code = self._replay(graph, plan, nodes[0])
        except ControlError as error:
            self._refusal = error
        raise SystemExit(self.exit_code)

    def _replay(self, graph: LogicalGraph, plan: PhysicalPlan, node: Node) -> int:
        said = self._kept()
        _refuse(node, said)
        assert isinstance(said.value, tuple)
        value, keys, port, began_at = said.value
        cassette = Cassette(self._cassette, "replay", began_at)
        results: list[object] = []
        serving = frozenset() if node.id in plan.serving else plan.serving
        nodes = {id_: replace(graph.nodes[id_], on_error=FAIL) for id_ in sorted(serving)}
        nodes |= {one.id: one for one in _alone(node, value, keys, port, results, max(graph.nodes) + 1)}
        specs = [cassette.of(spec) for spec in graph.services if serving or spec.target is not PipelineService]
        alone = LogicalGraph(graph.name, nodes, services=tuple(specs))
        env = LocalEnvironment(graph.name)
        env._services = {spec.name: spec for spec in specs}
        job = env._prepare(alone, env._plan(alone), frozenset())
        try:
            job._run()
        except JobError as error:
            self._failed_again(error)
            return EXIT_FAILED
        given = "\n".join(f"  {short(result, 2_000)}" for result in results)
        given = f"gave\n{given}" if results else "gave nothing"
        click.echo(f'record {short(value)} went through operator "{node.name}", which {given}', file=self._output)
        return 0

    def _kept(self) -> Said:
        with closing(Tape(self._cassette, "", may_write=False)) as tape:
            said = tape.kept(self._job.id, self._failure.number)
        if said is None:
            error = ControlError(f"the cassette {self._cassette} does not have the record {self._failure.record}")
            raise hint(error, "A later run has written it anew, or it belongs to another report.")
        return said

    def _failed_again(self, error: JobError) -> None:
        click.echo(text_of(error), err=True, nl=False)
        cause = error.__cause__ or error
        with closing(Tape(self._cassette, "", may_write=False)) as tape:
            is_another = tape.hide(describe(cause)) != self._failure.error
        if is_another:
            click.echo(f"The record failed differently before: {self._failure.error}", err=True)
        if self._debugs:
            with redirect_stdout(self._output):
                pdb.post_mortem(_of_program(cause.__traceback__))


def _refuse(node: Node, said: Said) -> None:
    """Raise ControlError for a record that cannot be run alone."""
    about = f'operator "{node.name}" cannot be replayed'
    if said.form == "lost":
        error = ControlError(f"{about}: its record {said.value} cannot be pickled, so it was not kept")
        raise hint(error, "Let records be data.")
    has_states = node.function is not None and bool(node.function.states)
    if node.kind in STATEFUL or has_states:
        kind = f"{node.kind} with states" if has_states else node.kind
        raise ControlError(f"{about}: a {kind} works with earlier records too, which are not kept")
    if node.function is not None and isinstance(node.function.target, TransactionalSink):
        raise ControlError(f"{about}: a transactional sink gets records in batches, which are not kept")


def _alone(
    node: Node, value: object, keys: tuple[object, ...], port: int, results: list[object], first: int
) -> Iterator[Node]:
    """Yield the operators of a graph in which one record goes through one operator, with ids from `first` on."""
    inputs = []
    for input_ in range(max(1, len(node.inputs))):
        records = [value] if input_ == port else []
        name = f"{node.name} input {input_}"
        yield Node(first, Kind.SOURCE, name, function=FunctionSpec(records), settings={"bounded": True})
        first += 1
        if keys:
            key = FunctionSpec(lambda _: keys[0])
            yield Node(first, Kind.KEYBY, f"{name} key", (first - 1,), key)
            first += 1
        inputs.append(first - 1)
    yield replace(node, id=first, inputs=tuple(inputs), parallelism=1, on_error=FAIL, route=None)
    if node.kind is not Kind.SINK:
        yield Node(first + 1, Kind.SINK, f"{node.name} results", (first,), FunctionSpec(results.append))


def _of_program(traceback: TracebackType | None) -> TracebackType | None:
    """Return the entries of a traceback that are of the program, so that its last line is the debugger's."""
    entries: list[TracebackType] = []
    while traceback is not None:
        entries.append(traceback)
        traceback = traceback.tb_next
    own = [entry for entry in entries if not is_own(entry.tb_frame.f_code.co_filename)] or entries
    following: TracebackType | None = None
    for entry in reversed(own):
        following = TracebackType(following, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return following
