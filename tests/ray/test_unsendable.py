"""What cannot be pickled while a job runs is an error of the operator that gave it, and its policy decides."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from sage import DeadLetter, FunctionError, RemoteEnvironment, Retry, SourceFunction
from sage.connectors.dead_letters import read_letters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]


class Awkward(Exception):
    """Can be pickled, but not be made again from its arguments."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


class Locked(Exception):
    """Cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def lock_for_2(number: int) -> Any:
    return threading.Lock() if number == 2 else number


def numbers(number: int) -> Iterator[int]:
    yield from range(number)


class Locks(SourceFunction):
    def execute(self) -> Any:
        return threading.Lock()


class Broken:
    """Cannot be made again elsewhere."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return int, ("not a number",)


@pytest.mark.parametrize(
    ("function", "kind"), [(lock_for_2, "lock"), (numbers, "generator"), (lambda _: Awkward("a", "b"), "Awkward")]
)
def test_a_record_that_cannot_be_sent_fails_the_job_by_its_operator(ray_address: str, function: Any, kind: str) -> None:
    """It is named with its type, whether or not the task that made it has ended by then."""
    env = RemoteEnvironment("unsendable", address=ray_address)
    arrived: list[Any] = []
    env.from_batch([1, 2, 3]).map(function, name="makes").keyby(str, name="by").sink(arrived.append)
    with pytest.raises(FunctionError, match=f'operator "makes" gave a record of type {kind}, .* that cannot be sent'):
        env.submit(autostop=True)
    assert arrived in ([], [1])


def test_a_source_is_named_too(ray_address: str) -> None:
    env = RemoteEnvironment("unsendable", address=ray_address)
    env.from_source(Locks, name="locks").sink([].append)
    with pytest.raises(FunctionError, match='operator "locks" gave a record of type lock'):
        env.submit(autostop=True)


def test_the_policy_of_the_operator_decides(ray_address: str) -> None:
    """Skipped, or a dead letter with the text of the record, also where a retry was asked for: it is made only once."""
    env = RemoteEnvironment("unsendable", address=ray_address)
    kept: list[Any] = []
    tried: list[Any] = []
    told: list[DeadLetter] = []
    letters = env.dead_letters()
    source = env.from_batch(range(5))
    source.map(lock_for_2, on_error="skip").sink(kept.append)
    source.map(lock_for_2, on_error=Retry(2, then=letters), name="tries").sink(tried.append)
    letters.sink(told.append)
    job = env.submit(autostop=True)
    assert kept == tried == [0, 1, 3, 4]
    (letter,) = told
    assert (letter.operator, letter.attempts) == ("tries", 1)
    assert "_thread.lock object" in letter.value
    assert isinstance(letter.error, FunctionError)
    assert job.report is not None
    assert sum(operator.failed for operator in job.report.operators) == 2


def test_letters_arrive_whatever_is_in_them(ray_address: str, tmp_path: Path) -> None:
    """With texts in place of records and errors that cannot be pickled, or not be made again."""
    env = RemoteEnvironment("letters", address=ray_address)
    told: list[DeadLetter] = []
    letters = env.dead_letters(store=tmp_path / "failed.jsonl")

    def fail(value: Any) -> Any:
        raise Locked("locked") if value == 1 else Awkward("one", "other")

    env.from_batch([1, 2, 3]).map(lambda x: threading.Lock() if x == 3 else x).map(fail, on_error=letters).sink(abs)
    letters.sink(told.append)
    env.submit(autostop=True)
    assert [letter.value for letter in told[:2]] == [1, 2]
    assert "_thread.lock object" in told[2].value
    assert [str(letter.error) for letter in told[:2]] == ["Locked: locked", "Awkward: one and other"]
    assert "The record was of type lock" in told[2].error.__notes__[-1]
    stored, _ = read_letters(str(tmp_path / "failed.jsonl"))
    assert [letter.values["record"] for letter in stored] == [letter.value for letter in told]


def test_what_cannot_be_made_again_elsewhere_fails_the_job(ray_address: str) -> None:
    env = RemoteEnvironment("broken", address=ray_address)
    arrived: list[Broken] = []
    env.from_batch([1]).map(lambda _: Broken(), name="makes").sink(arrived.append)
    match = 'operator "makes" gave records that the process of task "append" cannot take in: ValueError'
    with pytest.raises(FunctionError, match=match):
        env.submit(autostop=True)


def test_arguments_and_answers_of_services(ray_address: str) -> None:
    """Each is an error of the call, for the policy of the operator that makes it."""

    class Store:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def lend(self, _: Any) -> Any:
            return threading.Lock()

        def fail(self, _: Any) -> Any:
            raise Locked("locked")

    env = RemoteEnvironment("calls", address=ray_address)
    store = env.register_service("store", Store)
    told: list[DeadLetter] = []
    letters = env.dead_letters()
    calls: list[Any] = [store.lend, store.fail, lambda _: store.lend(threading.Lock()), lambda _: store.lock]
    for number, call in enumerate(calls):
        env.from_batch([number]).map(call, on_error=letters).sink(abs)
    letters.sink(told.append)
    env.submit(autostop=True)
    texts = [str(letter.error) for letter in sorted(told, key=lambda letter: int(letter.value))]
    assert [text.partition(":")[0] for text in texts] == [
        "an answer of type lock cannot be pickled",
        "Locked",
        'the arguments of "store".lend cannot be pickled',
        "an answer of type lock cannot be pickled",
    ]
