"""`sage letters`: shows dead letters in a file, and takes them out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from sage._control.errors import said_to_a_person
from sage.connectors.dead_letters import read_letters, take_out
from sage.errors import ConnectorError, hint
from sage.report import printable, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sage.connectors.dead_letters import StoredLetter

FILE = click.Path(exists=True, dir_okay=False)
CELL_LENGTH_MAX = 60

operator_option = click.option("--operator", help="Only letters of this operator.")


@click.group()
def letters() -> None:
    """Look at dead letters that a job has stored, drop them, or put them back in.

    They are those of `env.dead_letters(store=FILE)`.
    """


@letters.command("list")
@click.argument("file", type=FILE)
@operator_option
def list_(file: str, operator: str | None) -> None:
    """List the dead letters in FILE, each with its number, the oldest first."""
    with said_to_a_person():
        chosen = choose(file, (), operator)
    rows = [
        (
            str(number),
            str(letter.values.get("at")),
            letter.values["operator"],
            str(letter.values.get("attempts")),
            _cell(str(letter.values.get("error"))),
            _cell(_record(letter)),
        )
        for number, letter in chosen
    ]
    header = ("number", "failed at", "operator", "attempts", "error", "record")
    click.echo("\n".join(table(header, rows)) or "no dead letters")


@letters.command()
@click.argument("file", type=FILE)
@click.argument("number", type=int)
def show(file: str, number: int) -> None:
    """Show the dead letter with this NUMBER in FILE, with the traceback of its error. Nothing is unpickled."""
    with said_to_a_person():
        ((_, letter),) = choose(file, (number,), None)
    values = letter.values
    for name in ("id", "at", "job", "operator", "attempts"):
        click.echo(printable(f"{name}: {values.get(name)}"))
    if "record" not in values:
        pickled = "it is also pickled" if "record_pickled" in values else "it could not be pickled"
        click.echo(f"record, which JSON does not have; {pickled}:")
    else:
        click.echo("record:")
    click.echo(printable(f"  {_record(letter)}"))
    for line in str(values.get("traceback")).splitlines():
        click.echo(printable(line))


@letters.command()
@click.argument("file", type=FILE)
@click.argument("numbers", metavar="[NUMBER]...", type=int, nargs=-1)
@operator_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop(file: str, numbers: tuple[int, ...], operator: str | None, yes: bool) -> None:
    """Take dead letters out of FILE: all, those of an operator, or those with these NUMBERs.

    The numbers are those of `list`; afterwards the others have new ones. Jobs may append letters meanwhile.
    """
    with said_to_a_person():
        chosen = choose(file, numbers, operator)
        count = counted(len(chosen))
        if chosen and not yes:
            click.confirm(f"Take {count} out of {file}?", abort=True)
        take_out(file, frozenset(letter.id for _, letter in chosen))
    click.echo(f"{count} taken out of {file}")


def choose(file: str, numbers: Sequence[int], operator: str | None) -> list[tuple[int, StoredLetter]]:
    """Return the letters with these numbers, or all, of one operator, or of all."""
    found, unread_count = read_letters(file)
    if unread_count:
        click.echo(f"{unread_count} lines of {file} are not dead letters and were left out", err=True)
    for number in numbers:
        if not 0 < number <= len(found):
            error = ConnectorError(f"{file} has no dead letter {number}", fault="user")
            raise hint(error, f"It has {counted(len(found))}; sage letters list {file} shows them.")
    return [
        (number, letter)
        for number, letter in enumerate(found, 1)
        if (not numbers or number in numbers) and operator in (None, letter.values["operator"])
    ]


def _record(letter: StoredLetter) -> str:
    if "record" in letter.values:
        return json.dumps(letter.values["record"], ensure_ascii=False)
    return str(letter.values.get("record_text"))


def _cell(text: str) -> str:
    return text if len(text) <= CELL_LENGTH_MAX else f"{text[: CELL_LENGTH_MAX - 3]}..."


def counted(count: int) -> str:
    return "1 dead letter" if count == 1 else f"{count:,} dead letters"
