"""`sage state`: shows, verifies and changes the contents of a durable job's folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import pprint
import sys
import time
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from sage._control.errors import said_to_a_person
from sage._operators.keyed_state import KeyedState, each_pickle
from sage._plan.logical import Kind
from sage._runtime.checkpoint_store import CheckpointReader, CheckpointStore, check_is_private, no_state
from sage.connectors.json_lines import as_json
from sage.errors import CheckpointError, describe, hint, short
from sage.report import printable, table
from sage.state import Dated

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sage._runtime.checkpoint_store import Checkpoint, Part, StoredCheckpoint
    from sage._runtime.checkpoints import Row

    Keyed = dict[object, object]
    """Values by key."""

FOLDER = click.Path(exists=True, file_okay=False)
KEYS_SHOWN = 20
ONE_STATE = frozenset({Kind.REDUCE, Kind.STATEFUL_MAP})
"""The kinds with one state for each key; a function of any other kind may have several, by name."""

VALUE_LENGTH_MAX = 200

UNITS_OF_TIME = (("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
UNITS_OF_SIZE = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("B", 1))

DROPPED = {
    Kind.SOURCE: "It will be read from its beginning.",
    Kind.SINK: "Records that it has not committed yet are lost.",
}


@click.group()
def state() -> None:
    """Look into the folder of a durable job: its checkpoints, and the states in them."""


@state.command("list")
@click.argument("folder", type=FOLDER)
def list_(folder: str) -> None:
    """List the checkpoints in FOLDER, and the operators with a state in the last one that is whole.

    You can do this while the job runs. Nothing is changed, and no code of the program runs.
    """
    with said_to_a_person(), closing(CheckpointReader(folder)) as reader:
        stored = reader.survey()
    if not stored:
        click.echo(f"{folder} has no checkpoint yet")
        return
    click.echo("\n".join(_lines(stored, time.time())))


@state.command()
@click.argument("folder", type=FOLDER)
def check(folder: str) -> None:
    """Verify all checkpoints in FOLDER; exit with 1 if one is damaged.

    You can do this while the job runs. Nothing is changed, and no code of the program runs.
    """
    with said_to_a_person(), closing(CheckpointReader(folder)) as reader:
        stored = reader.survey()
    for one in stored:
        mark = click.style("DAMAGED", fg="red") if one.problem else click.style("whole", fg="green")
        click.echo(f"checkpoint {one.number}: {mark}{one.problem and ', '}{one.problem}")
    if not stored:
        click.echo(f"{folder} has no checkpoint yet")
    sys.exit(1 if any(one.problem for one in stored) else 0)


@state.command()
@click.argument("folder", type=FOLDER)
@click.argument("operator")
@click.option("--key", help="Show the values of this key: its text, or its Python form, such as 7 or ('a', 1).")
def show(folder: str, operator: str, key: str | None) -> None:
    """Show the state of OPERATOR in the last checkpoint in FOLDER that is whole.

    This unpickles the state, which can run code. Do it only if you trust the folder as you trust your program. Modules
    are found in the current folder, too. You can do this while the job runs.
    """
    with said_to_a_person():
        checkpoint = _loaded(folder)
        rows = _rows_of(checkpoint, operator)
        if key is not None:
            lines = _values_of(key, operator, checkpoint.graph[operator][0], rows)
        else:
            kind = checkpoint.graph[operator][0]
            lines = [line for row, keyed in rows for line in _contents(row, kind, keyed)]
    click.echo("\n".join(map(printable, lines)))


@state.command()
@click.argument("folder", type=FOLDER)
@click.argument("operator", required=False)
def export(folder: str, operator: str | None) -> None:
    """Write the values by key of OPERATOR, or of all operators, to standard output as JSON Lines.

    A key or value that JSON does not have is written twice: as "key_text" or "value_text" for a person, and pickled in
    base64 as "key_pickled" or "value_pickled".

    This unpickles the state, which can run code. Do it only if you trust the folder as you trust your program. Modules
    are found in the current folder, too. You can do this while the job runs.
    """
    with said_to_a_person():
        checkpoint = _loaded(folder)
        names = [operator] if operator is not None else dict.fromkeys(row.operator for row in checkpoint.rows)
        for name in names:
            rows = _rows_of(checkpoint, name)
            if operator is not None and not any(row.keys is not None for row, _ in rows):
                raise CheckpointError(f'operator "{operator}" keeps nothing by key', fault="user")
            for _, keyed in rows:
                for about, key, value in _named(checkpoint.graph[name][0], keyed):
                    line = {"operator": name, **about, **as_json("key", key), **as_json("value", value)}
                    click.echo(f"{json.dumps(line, ensure_ascii=False)}\n".encode(), nl=False)


@state.command()
@click.argument("folder", type=FOLDER)
@click.argument("operator")
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop(folder: str, operator: str, yes: bool) -> None:
    """Take the state of OPERATOR out of the last checkpoint in FOLDER that is whole.

    The job must not be running. In its next run, the operator begins anew, and a source is read from its beginning. You
    cannot undo this. `submit(drop_state=[...])` does the same for one run.
    """
    with said_to_a_person():
        CheckpointReader(folder).close()  # the store would make a folder that has none into one
        with closing(CheckpointStore(folder)) as store:
            checkpoint = store.load()
            if checkpoint is None or not any(row.operator == operator for row in checkpoint.rows):
                raise no_state(operator, checkpoint)
            kind = checkpoint.graph[operator][0]
            if not yes:
                loss = DROPPED.get(Kind(kind), "It will begin anew.")
                click.confirm(
                    f'Drop the state of {kind} "{operator}" from checkpoint {checkpoint.number}? {loss}', abort=True
                )
            store.drop(operator)
    click.echo(f'checkpoint {checkpoint.number} has no state of "{operator}" any more')


def _lines(stored: Sequence[StoredCheckpoint], now: float) -> Iterator[str]:
    yield from table(
        ("checkpoint", "made", "age", "records done", "size", "whole"),
        [
            (
                str(one.number),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.made_at)),
                _in_units(max(0.0, now - one.made_at), UNITS_OF_TIME),
                f"{max(0, sum(part.records for part in one.parts)):,}",
                _in_units(sum(part.size_bytes for part in one.parts), UNITS_OF_SIZE),
                "DAMAGED" if one.problem else "yes",
            )
            for one in stored
        ],
    )
    last = next((one for one in reversed(stored) if not one.problem), None)
    if last is None:
        yield "no checkpoint is whole"
        return
    yield f"\nstates in checkpoint {last.number}"
    names = dict.fromkeys(part.operator for part in last.parts)
    yield from table(
        ("operator", "kind", "tasks", "records", "keys", "size", "position"),
        [_of_operator(name, last, stored) for name in names],
    )


def _of_operator(name: str, last: StoredCheckpoint, stored: Sequence[StoredCheckpoint]) -> tuple[str, ...]:
    parts = [part for part in last.parts if part.operator == name]
    needed = [
        earlier
        for part in parts
        for one in stored
        if one.number == last.number or (part.since is not None and part.since <= one.number < last.number)
        for earlier in one.parts
        if (earlier.operator, earlier.index) == (name, part.index)
    ]
    records = sum(part.records for part in parts)
    keys = [part.keys for part in parts if part.keys is not None]
    return (
        name,
        last.graph[name][0],
        str(len(parts)),
        f"{records:,}" if records >= 0 else f"{-records:,} wait",
        f"{sum(keys):,}" if keys else "",
        _in_units(sum(part.size_bytes for part in needed), UNITS_OF_SIZE),
        "; ".join(_position(part) for part in parts if part.position),
    )


def _in_units(value: float, units: Sequence[tuple[str, int]]) -> str:
    name, size = next((unit for unit in units if value >= unit[1]), units[-1])
    return f"{value / size:.1f} {name}" if size > 1 else f"{value:.0f} {name}"


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every class and function, so that nothing runs."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"it has a {module}.{name}")


def _position(part: Part) -> str:
    try:
        (count, position), _, _ = _PlainUnpickler(io.BytesIO(part.position)).load()
    except (pickle.UnpicklingError, TypeError, ValueError) as error:
        return f"not plain data: {error}"
    return short(position) if position is not None else f"after {count:,} records"


class _Unpickler(pickle.Unpickler):
    """Unpickles objects of the program's own file, which is not loaded, as stand-ins that show their contents."""

    def find_class(self, module: str, name: str) -> object:
        if module == "__main__":
            return type(name, (_StandIn,), {})
        return super().find_class(module, name)


class _StandIn:
    """Shows the arguments and attributes of an object whose class is not there."""

    _arguments: tuple[object, ...]

    def __new__(cls, *args: object) -> _StandIn:
        made = super().__new__(cls)
        made._arguments = args
        return made

    def __setstate__(self, state: object) -> None:
        for attributes in state if isinstance(state, tuple) else (state,):  # of the object, and of its slots
            self.__dict__.update(attributes if isinstance(attributes, dict) else {"state": attributes})

    def __repr__(self) -> str:
        attributes = (f"{name}={value!r}" for name, value in vars(self).items() if name != "_arguments")
        return f"{type(self).__name__}({', '.join([*map(repr, self._arguments), *attributes])})"

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


def _unpickled(operator: str, body: bytes) -> list[Any]:
    try:
        return each_pickle(body, lambda file: _Unpickler(file).load())
    except Exception as error:
        failed = CheckpointError(f'state of operator "{operator}" cannot be unpickled: {describe(error)}')
        raise hint(failed, "Run the command in the folder of the program, with its packages installed.") from error


def _loaded(folder: str) -> Checkpoint:
    check_is_private(folder)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with closing(CheckpointReader(folder)) as reader:
        checkpoint = reader.load()
    if checkpoint is None:
        raise CheckpointError(f'folder "{folder}" has no checkpoint yet', fault="user")
    for number in reader.skipped:
        click.echo(f"checkpoint {number} is damaged and was left out", err=True)
    return checkpoint


def _rows_of(checkpoint: Checkpoint, operator: str) -> list[tuple[Row, Keyed | None]]:
    """Return the rows of an operator, each with its values by key."""
    rows = [row for row in checkpoint.rows if row.operator == operator]
    if not rows:
        raise no_state(operator, checkpoint)
    return [(row, _keyed(row, checkpoint)) for row in rows]


def _keyed(row: Row, checkpoint: Checkpoint) -> Keyed | None:
    if row.since is None:
        return None
    bodies = checkpoint.changes[row.operator, row.index]
    return KeyedState(row.since, [one for body in bodies for one in _unpickled(row.operator, body)]).old


def _contents(row: Row, kind: str, keyed: Keyed | None) -> Iterator[str]:
    """Yield lines about one row."""
    state, left, function = _unpickled(row.operator, row.body)[0]
    yield f"task {row.index}"
    if kind == Kind.SOURCE:
        yield f"  records read: {state[0]:,}"
        yield from _value("position", state[1])
    else:
        yield from _value("state", state)
    yield from _value("function", function)
    for _, batch in left:
        yield from _value("waiting for the next run", batch)
    if keyed is not None:
        yield f"  keys: {len(keyed):,}"
        for about, key, value in islice(_named(kind, keyed), KEYS_SHOWN):
            name = "".join(f"{state} of " for state in about.values())
            yield f"    {name}{short(key, VALUE_LENGTH_MAX)}: {short(value, VALUE_LENGTH_MAX)}"
        if len(keyed) > KEYS_SHOWN:
            yield f"    and {len(keyed) - KEYS_SHOWN:,} more; sage state export writes all of them"


def _value(name: str, value: object) -> list[str]:
    if value is None:
        return []
    first, *others = pprint.pformat(value, width=100, compact=True).splitlines()
    return [f"  {name}: {first}", *(f"    {line}" for line in others)]


def _named(kind: str, keyed: Keyed | None) -> Iterator[tuple[dict[str, str], object, object]]:
    """Yield the name of the state, if its function may have several, and the key and the value."""
    for key, value in (keyed or {}).items():
        if kind in ONE_STATE:
            yield {}, key, value
        else:
            assert isinstance(key, tuple)  # of the name and the key
            yield {"state": key[0]}, key[1], value.value if isinstance(value, Dated) else value


def _values_of(key: str, operator: str, kind: str, rows: list[tuple[Row, Keyed | None]]) -> list[str]:
    """Return lines with the values of a key that was given as a word of the command line."""
    found = [
        line
        for _, keyed in rows
        for about, one, value in _named(kind, keyed)
        if key in (str(one), repr(one))
        for line in _value("".join([*(f"{state} of " for state in about.values()), repr(one)]), value)
    ]
    if not found:
        raise CheckpointError(f'operator "{operator}" has no key {key}', fault="user")
    return found
