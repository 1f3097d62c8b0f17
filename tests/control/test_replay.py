"""`sage replay`: one failed record of an earlier job, alone and with the answers that it got."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SAGE_")}

PROGRAM = """
    import itertools, sys
    from dataclasses import dataclass
    from sage import LocalEnvironment, MapFunction, ServiceOptions

    print("the program runs", sys.argv[1:])

    @dataclass
    class Question:
        text: str

    class Model:
        numbers = itertools.count(1)

        def __init__(self):
            print("a model is built")

        def ask(self, text):
            return "no number" if text == "bad" else str(next(self.numbers))

    def parse(question):
        print("asked", question.text)
        answer = model.ask(question.text)
        again = model.ask(question.text)
        return 100 // (int(answer) % 3) + int(again)

    env = LocalEnvironment("batch")
    model = env.register_service("model", Model, options=ServiceOptions(host=HOST))
    refused = env.dead_letters("refused")
    questions = [Question(text) for text in ("same", "same", "bad", "other")]
    env.from_batch(questions).map(lambda one: one).map(parse, on_error=refused).sink(lambda number: None)
    refused.sink(lambda letter: None)
    env.run()
    print("the end")
"""


def sage(
    folder: Path, *words: str, code: int = 0, typed: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [sys.executable, "-m", "sage", *words],
        cwd=folder,
        env=ENVIRONMENT | variables,
        input=typed,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended


def write(folder: Path, program: str, name: str = "program.py") -> str:
    (folder / name).write_text(textwrap.dedent(program), encoding="utf-8")
    return name


def recorded(folder: Path, program: str, *, code: int = 0) -> None:
    sage(folder, "run", write(folder, program), "--report", "run.jsonl", "--record", "calls.db", code=code)


OF_KEYS = """

    class Parse(MapFunction):
        def execute(self, data):
            return parse(data)

    env = """


@pytest.mark.parametrize("host", ["None", '"process"'])
@pytest.mark.parametrize("has_keys", [False, True])
def test_a_record_fails_again_with_its_own_answers(tmp_path: Path, host: str, has_keys: bool) -> None:
    """Only the second "same" was answered 3; the first one went through with 1."""
    program = PROGRAM.replace("HOST", host)
    if has_keys:
        program = program.replace("\n    env = ", OF_KEYS)
        program = program.replace(".map(lambda one: one).map(parse", '.keyby(lambda one: 0).map(Parse, name="parse"')
    recorded(tmp_path, program)
    before = (tmp_path / "calls.db").read_bytes(), (tmp_path / "run.jsonl").read_bytes()
    listed = sage(tmp_path, "replay", "run.jsonl").stdout.splitlines()
    assert [line.split()[:3] for line in listed] == [
        ["ID", "job", "operator"],
        ["1", "batch", "parse"],
        ["2", "batch", "parse"],
    ]
    assert "Question(text='same')  ZeroDivisionError: integer division or modulo by zero" in listed[1]
    assert "Question(text='bad')   ValueError: invalid literal for int() with base 10: 'no number'" in listed[2]
    for id_, text, error in (("1", "same", "ZeroDivisionError: "), ("2", "bad", "ValueError: invalid literal")):
        ended = sage(tmp_path, "replay", "run.jsonl", "--record", id_, code=1)
        assert ended.stdout == ""
        assert f"operator \"parse\" failed on record Question(text='{text}'): {error}" in ended.stderr
        assert 'program.py", line 25, in parse\n    return 100' in ended.stderr
        assert ended.stderr.count("asked") == 1
        assert "a model is built" not in ended.stderr
        assert "the end" not in ended.stderr
        assert "differently" not in ended.stderr
    assert before == ((tmp_path / "calls.db").read_bytes(), (tmp_path / "run.jsonl").read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".sage", "calls.db", "program.py", "run.jsonl"]


def test_a_record_goes_through_once_the_program_is_mended(tmp_path: Path) -> None:
    program = PROGRAM.replace("HOST", "None")
    recorded(tmp_path, program)
    write(tmp_path, program.replace("int(answer) % 3", "(int(answer) % 3 or 50)"), "mended.py")
    ended = sage(tmp_path, "replay", "run.jsonl", "mended.py", "--record", "1", "--verbose")
    assert ended.stdout == "record Question(text='same') went through operator \"parse\", which gave\n  6\n"
    assert "the program runs ['--verbose']" in ended.stderr
    write(tmp_path, program.replace("return 100", "return 1 / 0"))
    ended = sage(tmp_path, "replay", "run.jsonl", "--record", "2", code=1)
    assert "The record failed differently before: ValueError: invalid literal" in ended.stderr


def test_the_debugger_stands_at_the_line_of_the_program(tmp_path: Path) -> None:
    recorded(tmp_path, PROGRAM.replace("HOST", "None"))
    typed = "p 'the answer is ' + answer\np question\nq\n"
    ended = sage(tmp_path, "replay", "run.jsonl", "--record", "2", "--pdb", code=1, typed=typed)
    assert "-> return 100 // (int(answer) % 3) + int(again)" in ended.stdout
    assert "'the answer is no number'" in ended.stdout
    assert "Question(text='bad')" in ended.stdout


CALLS = """
    import asyncio, itertools
    from sage import LocalEnvironment, MapFunction, Retry, ValueState

    class Model:
        numbers = itertools.count(1)

        async def ask(self, text):
            if text == "raise":
                raise LookupError(f"attempt {next(self.numbers)}")
            return text

    async def ask(record):
        return await model.ask(record)

    class Kept(MapFunction):
        count = ValueState(0)

        def execute(self, data):
            raise ArithmeticError("no state")

    class OfKey(MapFunction):
        def execute(self, data):
            return 1 / len(self.ctx.get_key())

    env = LocalEnvironment("calls")
    model = env.register_service("model", Model)
    retry = Retry(attempts_max=2, backoff_s=(0.001, 0.001), then="skip")
    asked = env.from_batch(["ok", "raise"]).map_async(ask, on_error=retry)
    asked.keyby(lambda text: "", name="key").map(OfKey, on_error="skip").sink(print)

    def pair(record, key, tag):
        raise KeyError("no pair")

    def total(total, number):
        raise ArithmeticError("no total")

    numbers = env.from_batch([1, 2]).map(lambda one: one, name="same")
    numbers.connect(env.from_batch([3])).comap([str, lambda number: number // 0], name="both").sink(print)
    numbers.keyby(lambda one: 0, name="all").reduce(total, name="total", on_error="skip").sink(print)
    numbers.keyby(lambda one: 0, name="each").stateful_map(total, 0, name="running", on_error="skip").sink(print)
    numbers.keyby(lambda one: 0, name="own").map(Kept, name="kept", on_error="skip").sink(print)
    env.from_batch([print]).map(lambda function: function.missing, name="odd", on_error="skip").sink(print)
    env.from_batch([lambda: 1]).sink(lambda function: 1 / 0, name="lost", on_error="skip")
    try:
        env.run()
    except Exception:
        print("caught")
"""


def test_operators_of_each_kind(tmp_path: Path) -> None:
    """Coroutines with the answers of the last attempt, keys, the second of two inputs, and those that are refused."""
    recorded(tmp_path, CALLS.replace("lambda number: number // 0]", "lambda number: number // 0], on_error='skip'"))
    listed = sage(tmp_path, "replay", "run.jsonl").stdout.splitlines()[1:]
    ids = {line.split()[2]: line.split()[0] for line in listed}
    assert sorted(ids) == ["OfKey", "ask", "both", "kept", "lost", "odd", "running", "total"]
    for operator, error in {
        "ask": "LookupError: attempt 2",
        "OfKey": "ZeroDivisionError: division by zero",
        "both": "ZeroDivisionError: integer division or modulo by zero",
        "odd": "AttributeError: 'builtin_function_or_method' object has no attribute 'missing'",
    }.items():
        ended = sage(tmp_path, "replay", "run.jsonl", "--record", ids[operator], code=1)
        assert f'FunctionError: operator "{operator}" failed on record' in ended.stderr
        assert error in ended.stderr
        assert "differently" not in ended.stderr
        assert "caught" not in ended.stderr
    for operator, kind in {"total": "reduce", "running": "stateful_map", "kept": "map with states"}.items():
        ended = sage(tmp_path, "replay", "run.jsonl", "--record", ids[operator], code=2)
        assert f'operator "{operator}" cannot be replayed: a {kind} works with earlier records too' in ended.stderr
    ended = sage(tmp_path, "replay", "run.jsonl", "--record", ids["lost"], code=2)
    assert 'operator "lost" cannot be replayed: its record' in ended.stderr
    assert "cannot be pickled, so it was not kept" in ended.stderr


SERVED = """
    from sage import LocalEnvironment

    class Model:
        def ask(self, text):
            return text * 2

    env = LocalEnvironment("served")
    model = env.register_service("model", Model)
    answers = env.serve("answers", lambda requests: requests.map(model.ask))
    env.from_batch(["1"]).map(lambda text: int(answers(text)) // 0, name="divide").sink(print)
    env.run()
"""


def test_a_served_pipeline_answers_in_a_replay(tmp_path: Path) -> None:
    """A job that failed at its first record is replayed like one with dead letters."""
    recorded(tmp_path, SERVED, code=1)
    ended = sage(tmp_path, "replay", "run.jsonl", "--record", "1", code=1)
    assert "ZeroDivisionError: integer division or modulo by zero" in ended.stderr
    assert "differently" not in ended.stderr


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    program = write(tmp_path, PROGRAM.replace("HOST", "None"))
    sage(tmp_path, "run", program, "--report", "run.jsonl")
    ended = sage(tmp_path, "replay", "run.jsonl", code=2)
    assert "run.jsonl tells of records that failed, but they were not kept" in ended.stderr
    assert "--report run.jsonl --record calls.db" in ended.stderr
    good = write(
        tmp_path, "from sage import LocalEnvironment\nLocalEnvironment('g').from_batch([1]).collect()", "good.py"
    )
    sage(tmp_path, "run", good, "--report", "good.jsonl", "--record", "good.db")
    assert "no record failed in good.jsonl" in sage(tmp_path, "replay", "good.jsonl", code=2).stderr
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl does not contain a job" in sage(tmp_path, "replay", "empty.jsonl", code=2).stderr

    recorded(tmp_path, PROGRAM.replace("HOST", "None"))
    first = ("replay", "run.jsonl", "--record", "1")
    ended = sage(tmp_path, "replay", "run.jsonl", "--record", "3", code=2)
    assert "run.jsonl has no failed record 3\nIt has 2; `sage replay run.jsonl` lists them" in ended.stderr
    ended = sage(tmp_path, "replay", "run.jsonl", "good.py", "--record", "1", code=2)
    assert 'good.py submits no environment "batch" with an operator "parse"' in ended.stderr
    (tmp_path / "broken.py").write_text("raise OSError('no input')")
    ended = sage(tmp_path, "replay", "run.jsonl", "broken.py", "--record", "1", code=2)
    assert "It ended before: OSError: no input" in ended.stderr
    ended = sage(tmp_path, *first, "--cassette", "good.db", code=2)
    assert "good.db does not have the record Question(text='same')" in ended.stderr
    (tmp_path / "calls.db").rename(tmp_path / "moved.db")
    ended = sage(tmp_path, *first, code=2)
    assert (
        f"the cassette {tmp_path / 'calls.db'} is missing\nIf you have moved it, give --cassette FILE." in ended.stderr
    )
    assert "ZeroDivisionError" in sage(tmp_path, *first, "--cassette", "moved.db", code=1).stderr
    (tmp_path / "program.py").unlink()
    ended = sage(tmp_path, *first, "--cassette", "moved.db", code=2)
    assert f"the program {tmp_path / 'program.py'} is missing" in ended.stderr


def test_a_replay_writes_nothing(tmp_path: Path) -> None:
    """Neither does a program that records and reports by itself, and whose job is durable."""
    program = """
        from sage import LocalEnvironment

        env = LocalEnvironment("own", report_file="own.jsonl", durable="state")
        env.record_calls("own.db")
        env.from_batch([1, 0]).map(lambda number: 1 // number, name="divide", on_error="skip").sink(print)
        env.run()
    """
    sage(tmp_path, "run", write(tmp_path, program))
    lines = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines if line["type"] == "failed"] == ["0"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and ".sage" not in str(path)}
    ended = sage(tmp_path, "replay", "own.jsonl", "--record", "1", code=1)
    assert "ZeroDivisionError: integer division or modulo by zero" in ended.stderr
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and ".sage" not in str(path)}
    assert after == before


def test_no_secret_of_a_record_is_kept(tmp_path: Path) -> None:
    program = """
        import os
        from sage import LocalEnvironment

        env = LocalEnvironment("secret")
        env.from_batch([os.environ["MODEL_API_KEY"]]).map(int, name="number", on_error="skip").sink(print)
        env.run()
    """
    words = ("run", write(tmp_path, program), "--report", "run.jsonl", "--record", "calls.db")
    sage(tmp_path, *words, MODEL_API_KEY="sk-not-for-anyone")
    assert b"sk-not-for-anyone" not in (tmp_path / "calls.db").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert "sk-not" not in str([line for line in lines if line["type"] == "failed"])
    ended = sage(tmp_path, "replay", "run.jsonl", "--record", "1", MODEL_API_KEY="sk-not-for-anyone", code=1)
    assert "ValueError: invalid literal for int() with base 10: '*****" in ended.stderr
    assert "differently" not in ended.stderr
