"""`sage estimate`: a sample of a program, and the prediction for all of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sage._control.estimate import prediction

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SAGE_")}

PROGRAM = """
    import sys, threading
    from sage import BaseService, LocalEnvironment, ServiceOptions

    class Model(BaseService):
        asked = 0

        def ask(self, text):
            Model.asked += 1
            self.ctx.used(prompt_tokens=100, completion_tokens=10 + 2 * (Model.asked % 2))
            return text

    class Words(BaseService):
        def look_up(self, text):
            return text

    running, most = 0, 0

    async def ask(text):
        global running, most
        running += 1
        most = max(most, running)
        answer = model.ask(text)
        await __import__("asyncio").sleep(0)
        running -= 1
        return answer

    env = LocalEnvironment("batch")
    model = env.register_service("model", Model, options=ServiceOptions(concurrency=None))
    words = env.register_service("words", Words)
    LIMIT
    texts = TEXTS
    asked = env.from_batch(texts).flatmap(lambda text: [text, text]).map_async(ask, concurrency=4)
    asked.map(words.look_up).sink(lambda text: print("wrote", text))
    env.run()
    print(Model.asked, "calls,", most, "at once")
"""


def sage(folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [sys.executable, "-m", "sage", *words],
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended


def write(folder: Path, program: str = PROGRAM, *, texts: str = "range(100_000)", limit: str = "pass") -> str:
    text = textwrap.dedent(program).replace("TEXTS", texts).replace("LIMIT", limit)
    (folder / "program.py").write_text(text, encoding="utf-8")
    return "program.py"


def rows(output: str) -> dict[str, list[str]]:
    """Return the cells of each row of the table by its name."""
    cells = [re.split(r" {2,}", line.strip()) for line in output.splitlines() if line.startswith("  ")]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize(("sample", "ran"), [("50", 50), ("7", 7), ("2", 2)])
def test_a_sample_predicts_the_whole(tmp_path: Path, sample: str, ran: int) -> None:
    ended = sage(tmp_path, "estimate", write(tmp_path), "--sample", sample, "--price", "3", "15")
    assert f"{2 * ran} calls," in ended.stderr
    assert ended.stderr.count("wrote") == 2 * ran
    assert "wrote" not in ended.stdout
    assert f'job "batch": a sample of {ran} records in {min(ran, 5)} groups, of 100,000' in ended.stdout
    found = rows(ended.stdout)
    assert found['calls of "model"'] == ["200,000", "200,000", "200,000"]
    assert found['calls of "words"'] == ["200,000", "200,000", "200,000"]
    assert found["prompt tokens"] == ["20,000,000"] * 3
    assert found["completion tokens"] == ["2,200,000"] * 3
    assert found["cost"] == ["93.00"] * 3
    assert len(found["time, at most"]) == 3
    assert 'sinks ran, and the results of the sample are where they write: "sink"' in ended.stdout


def test_a_group_runs_as_the_program_would(tmp_path: Path) -> None:
    """Several records are in flight, but never those of two groups."""
    ended = sage(tmp_path, "estimate", write(tmp_path), "--sample", "50")
    assert "4 at once" in ended.stderr
    assert "may work on" not in ended.stdout
    ended = sage(tmp_path, "estimate", write(tmp_path), "--sample", "5")
    assert "2 at once" in ended.stderr
    assert 'operator "ask" may work on 4 records at once, and a group has 1' in ended.stdout
    assert "--sample 20 comes nearer" in ended.stdout


def test_the_number_of_records_may_be_unknown(tmp_path: Path) -> None:
    """No record beyond the sample is read, and prices may be those of the budget."""
    texts = "(print('read', number) or number for number in range(100_000))"
    name = write(tmp_path, texts=texts, limit="env.limit(cost=(3, 15, 20))")
    ended = sage(tmp_path, "estimate", name, "--sample", "10")
    assert ended.stderr.count("read") == 10
    assert "a sample of 10 records in 5 groups, of an unknown number" in ended.stdout
    assert "for 1,000 records" in ended.stdout
    assert rows(ended.stdout)["cost"] == ["0.93"] * 3
    ended = sage(tmp_path, "estimate", name, "--sample", "10", "--records", "2000")
    assert rows(ended.stdout)["cost"] == ["1.86"] * 3


def test_a_source_may_end_within_the_sample(tmp_path: Path) -> None:
    ended = sage(tmp_path, "estimate", write(tmp_path, texts="range(12)"), "--sample", "50")
    assert "24 calls," in ended.stderr
    assert "a sample of 12 records in 2 groups, of 12\n" in ended.stdout
    assert rows(ended.stdout)['calls of "model"'] == ["24", "24", "24"]


def test_sources_have_their_shares_in_the_sample(tmp_path: Path) -> None:
    """One of them calls a served pipeline, which does not count as a source; the other one calls nothing."""
    program = """
        from sage import LocalEnvironment

        class Model:
            def ask(self, text):
                return text

        env = LocalEnvironment("both")
        model = env.register_service("model", Model)
        answers = env.serve("answers", lambda requests: requests.map(model.ask))
        env.from_batch(range(20), parallelism=2).map(answers).print()
        env.from_batch(list(range(80))).map_batches(lambda batch: batch, max_records=100).print()
        env.run()
    """
    ended = sage(tmp_path, "estimate", write(tmp_path, program), "--sample", "20")
    assert "a sample of 25 records in 5 groups, of 100\n" in ended.stdout
    assert rows(ended.stdout)['calls of "model"'][0] == "20"
    assert 'operator "map_batches" may work on 100 records at once, and a group has' in ended.stdout


@pytest.mark.parametrize(
    ("limit", "code", "text"),
    [
        ("env.limit(calls={'model': 20})", 3, "a sample of 8 records in 2 groups, of 100,000"),
        ("env.limit(calls={'model': 5})", 3, "the sample did not get through"),
        ("env.limit(calls={'model': 5})", 3, "STOPPED and CLEAN"),
        ("env.from_batch([1]).map(lambda one: 1 / 0).sink(print)", 1, "ZeroDivisionError"),
        ("sys.exit(7)", 7, ""),
        ("model = 1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_a_sample_may_end_early(tmp_path: Path, limit: str, code: int, text: str) -> None:
    ended = sage(tmp_path, "estimate", write(tmp_path, limit=limit), "--sample", "20", code=code)
    assert text in ended.stdout + ended.stderr


def test_what_would_stay_is_refused_or_left_alone(tmp_path: Path) -> None:
    program = """
        import sys
        from sage import LocalEnvironment
        from sage.connectors import JsonLines, JsonLinesFiles

        env = LocalEnvironment("durable", durable="state")
        sink = JsonLinesFiles("out") if "write" in sys.argv else print
        env.from_batch(list(range(1_000)), parallelism=2).sink(sink, name="results")
        env.run()
    """
    name = write(tmp_path, program)
    ended = sage(tmp_path, "estimate", name, "--sample", "10")
    assert "of 1,000" in ended.stdout
    assert not (tmp_path / "state").exists()
    ended = sage(tmp_path, "estimate", name, "--", "write", code=1)
    assert 'sink "results" is transactional, and would keep the results of the sample' in ended.stderr
    assert not (tmp_path / "out").exists()


def test_the_interval_is_that_of_the_ratio() -> None:
    """Against values that were computed by hand."""
    found = prediction([10, 10, 10, 10, 10], [20, 22, 18, 21, 19])
    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(2.776 * (10 / 20) ** 0.5 / 10)
    assert prediction([3, 1], [6, 2]) == (2.0, 0.0)
    assert prediction([4], [8]) == (2.0, None)


PAGES = """
    from sage import LocalEnvironment, Source

    class Pages(Source):
        def open(self):
            self.left = 20

        def read(self, records_max):
            self.left -= 1
            return [self.left] * 100 if self.left else None

    env = LocalEnvironment("pages")
    env.from_source(Pages, name="pages").sink(lambda record: print("wrote", record), name="out")
    env.run()
"""


def test_a_source_that_gives_more_than_it_should_does_not_enlarge_the_sample(tmp_path: Path) -> None:
    ended = sage(tmp_path, "estimate", write(tmp_path, PAGES), "--sample", "10")
    assert ended.stderr.count("wrote") == 10
    assert "a sample of 10 records in 5 groups" in ended.stdout
