"""Environments, functions and services of the old import paths behave as they did in 2025."""

# mypy: disable-error-code="misc,import-not-found"
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sage.core.api.local_environment import LocalEnvironment
from sage.kernel.api.function import (
    BaseFunction,
    BatchFunction,
    FlatMapFunction,
    KeyByFunction,
    MapFunction,
    SinkFunction,
    SourceFunction,
)
from sage.kernel.api.remote_environment import RemoteEnvironment
from sage.kernel.api.service.base_service import BaseService
from sage.kernel.runtime.job_manager import JobManager

import sage
from sage._legacy import environment as old_environment
from sage._legacy.names import EQUIVALENTS

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old environments write logs to `.sage/logs` of the current folder, and warn once in a process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(old_environment, "_warned", set())


def results(env: Any, stream: Any) -> list[Any]:
    """Run the environment and return the records that arrive."""
    arrived: list[Any] = []
    stream.sink(arrived.append)
    env.submit(autostop=True)
    return arrived


# --- hooks and services ---


class Store(BaseService):
    """A service whose hooks all call the base class first."""

    log: list[str] = []  # noqa: RUF012

    def setup(self) -> None:
        super().setup()
        self.log.append("setup")

    def start(self) -> None:
        super().start()
        self.log.append("start")

    def stop(self) -> None:
        super().stop()
        self.log.append("stop")

    def cleanup(self) -> None:
        super().cleanup()
        self.log.append("cleanup")

    def get(self, key: int) -> str:
        return f"value {key} of {self.ctx.env_name}"


@pytest.mark.parametrize("parent", [BaseService, sage.BaseService])
def test_hooks_may_call_those_of_the_base_class(parent: type) -> None:
    Store.log = []
    kind = type("Store", (*Store.__mro__[:1], parent), {}) if parent is not BaseService else Store
    env = LocalEnvironment("shop")
    env.register_service("store", kind)
    assert results(env, env.from_batch([1]).map(lambda x: x)) == [1]
    assert Store.log == ["setup", "start", "stop", "cleanup"]


def test_a_service_without_hooks_has_none_in_the_report() -> None:
    class Quiet(sage.BaseService):
        def process(self, x: int) -> int:
            return x

    env = sage.LocalEnvironment("quiet")
    quiet = env.register_service("quiet", Quiet)
    env.from_batch([1]).map(quiet.process).sink(lambda x: None)
    report = env.submit(autostop=True).report
    assert report is not None
    assert [hook.hook for hook in report.services[0].hooks] == ["build", "drain"]


def test_start_running_and_terminate_stand_for_start_and_stop() -> None:
    ended: list[str] = []

    class Engine:
        is_on = False

        def start_running(self) -> None:
            self.is_on = True

        def terminate(self) -> None:
            ended.append("terminate")

        def process(self, x: int) -> Any:
            return x if self.is_on else "not running"

    env = LocalEnvironment("engine")
    env.register_service(service_name="engine", service_class=Engine)

    class Ask(MapFunction):
        def execute(self, data: int) -> Any:
            return self.call_service("engine", data)

    assert results(env, env.from_batch([1, 2]).map(Ask)) == [1, 2]
    assert ended == ["terminate"]


def test_a_service_is_looked_up_by_subscript() -> None:
    class Ask(MapFunction):
        def execute(self, data: int) -> Any:
            later = self.call_service_async["store"].get(data + 10)
            return [self.call_service["store"].get(data), later.result(), self.ctx.call_service["store"].get(0)]

    env = LocalEnvironment("shop")
    env.register_service("store", Store)
    assert results(env, env.from_batch([1]).map(Ask)) == [["value 1 of shop", "value 11 of shop", "value 0 of shop"]]


def test_a_second_service_of_a_name_replaces_the_first() -> None:
    env = LocalEnvironment("shop")
    env.register_service("number", lambda: None)

    class Seven:
        def process(self) -> int:
            return 7

    env.register_service("number", Seven)
    assert env.service_factories["number"].service_class is Seven
    assert env.service_factories["number"].create_service().process() == 7

    class Ask(MapFunction):
        def execute(self, data: int) -> Any:
            return self.call_service("number")

    assert results(env, env.from_batch([1]).map(Ask)) == [7]


# --- functions of any kind ---


class EvenOrNone(BaseFunction):
    def execute(self, x: int) -> int | None:
        return x if x % 2 == 0 else None


class PlainEvenOrNone:
    def execute(self, x: int) -> int | None:
        return x if x % 2 == 0 else None


@pytest.mark.parametrize("function", [EvenOrNone, PlainEvenOrNone, PlainEvenOrNone()])
@pytest.mark.parametrize("kind", [LocalEnvironment, sage.LocalEnvironment])
def test_a_function_class_drops_a_record_by_none(function: Any, kind: Any) -> None:
    """Also in environments that are not of an old path; a plain callable's None stays data."""
    env = kind("even")
    assert results(env, env.from_batch([1, 2, 3, 4]).map(function)) == [2, 4]
    env = kind("data")
    assert results(env, env.from_batch([1, 2]).map(EvenOrNone().execute)) == [None, 2]


class Tens(MapFunction):
    def execute(self, x: int) -> int:
        return x // 10 * 10


class Truth(FlatMapFunction):
    def execute(self, x: int) -> Any:
        return x > 15


class Keep(KeyByFunction):
    def execute(self, x: int) -> int:
        return x


seen: list[Any] = []


class Remember(MapFunction):
    def execute(self, x: Any) -> Any:
        seen.append((self.ctx.get_key(), x))


def test_any_operator_takes_a_function_class_of_any_kind() -> None:
    seen.clear()
    env = LocalEnvironment("kinds")
    env.from_batch([12, 17, 25]).filter(Truth).map(Keep).keyby(Tens).sink(Remember)
    env.submit(autostop=True)
    assert seen == [(10, 17), (20, 25)]
    strict = sage.LocalEnvironment("strict")
    with pytest.raises(sage.GraphError, match="Tens is a MapFunction"):
        strict.from_batch([1]).keyby(Tens)


class Words(FlatMapFunction):
    def execute(self, text: Any) -> Any:
        self.out.collect(f"<{text}>")
        self.collect("|")
        return text if text != "none" else None


def test_a_flat_map_may_return_one_value_and_collects_after_it() -> None:
    env = LocalEnvironment("flat")
    records = ["a b", 7, ["x", "y"], "none"]
    assert results(env, env.from_batch(records).flatmap(Words)) == [
        *("a b", "<a b>", "|"), *(7, "<7>", "|"), *("x", "y", "<['x', 'y']>", "|"), *("<none>", "|")
    ]  # fmt: skip
    env = LocalEnvironment("lambda")
    assert results(env, env.from_batch(["ab"]).flatmap(lambda x: x).map(str.upper)) == ["AB"]


def test_state_of_a_function_is_read_and_set() -> None:
    class Counter(MapFunction):
        __state_exclude__ = ["lock"]  # noqa: RUF012

        def __init__(self) -> None:
            self.count, self.lock = 3, object()

    class Named(Counter):
        __state_include__ = ["count"]  # noqa: RUF012

    assert Counter().get_state() == {"count": 3}
    assert Named().get_state() == {"count": 3}
    restored = Counter()
    restored.restore_state({"count": 9})
    assert restored.count == 9


def test_the_context_knows_the_environment() -> None:
    class Look(MapFunction):
        def execute(self, x: int) -> Any:
            self.ctx.logger.info("seen")
            return [self.ctx.env_name, Path(self.ctx.env_base_dir).name, self.ctx.name]

    env = LocalEnvironment("looked at")
    assert results(env, env.from_batch([1]).map(Look, name="look")) == [["looked at", "logs", "look"]]


# --- environments ---


class Print(SinkFunction):
    def execute(self, x: int) -> None:
        print(x)


def test_the_pipeline_lists_what_was_added() -> None:
    env = LocalEnvironment("listed", enable_monitoring=False)
    stream = env.from_batch([1, 2], name="numbers").map(Tens, parallelism=2).filter(lambda x: x)
    stream.sink(Print)
    assert len(env.pipeline) == 4
    assert [(t.basename, t.parallelism) for t in env.pipeline][:2] == [("numbers", 1), ("Tens", 2)]
    assert env.pipeline[1].function_class is Tens
    assert (env.pipeline[1].function_args, env.pipeline[1].function_kwargs) == ((), {})
    assert stream.transformation.basename == env.pipeline[2].basename
    assert (env.platform, env.console_log_level, env.service_factories) == ("local", "INFO", {})
    assert env.logger.name == "sage.user.listed"


def test_submit_returns_the_id_as_a_text() -> None:
    env = LocalEnvironment("text")
    env.from_batch([1]).sink(lambda x: None)
    uuid = env.submit(autostop=True)
    assert uuid == env.env_uuid == env.uuid
    assert json.loads(json.dumps({"id": uuid, "short": uuid[:8]})) == {"id": str(uuid), "short": str(uuid)[:8]}
    assert uuid.report.state == "completed"
    manager = JobManager()
    assert manager is env.jobmanager
    assert manager.get_job_status(uuid)["uuid"] == uuid
    assert manager.jobs[uuid].status == "completed"
    assert manager.jobs[uuid].dispatcher.is_running is False
    assert manager.continue_job(uuid)["status"] == "completed"
    assert uuid in [job["job_id"] for job in manager.get_server_info()["jobs"]]
    assert uuid in manager.jobs
    assert len(manager.jobs) == len(list(manager.jobs))


def test_a_job_manager_submits() -> None:
    env = LocalEnvironment("by the manager")
    env.from_batch([1]).sink(lambda x: None)
    uuid = JobManager().submit_job(env, autostop=True)
    assert JobManager().get_job_status(uuid)["status"] == "completed"


def test_logs_are_where_the_documents_say() -> None:
    env = LocalEnvironment("logged")
    env.from_batch([1]).sink(lambda x: None)
    env.submit(autostop=True)
    (session,) = Path(".sage/logs/jobmanager").glob("session_*")
    assert {path.name for path in session.iterdir()} >= {"Dispatcher.log"}
    assert not list(Path().glob("*.log"))
    assert sage.LocalEnvironment("new").log_dir is None


def test_the_output_folder_of_old_programs_holds_the_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_OUTPUT_DIR", str(tmp_path / "out"))
    assert LocalEnvironment("out").env_base_dir == str(tmp_path / "out" / "logs")


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: LocalEnvironment("e", scheduler="fifo"), "scheduler"),
        (lambda: LocalEnvironment("e", enable_monitoring=True), "enable_monitoring"),
        (lambda: RemoteEnvironment("e", host="10.0.0.1", port=19001), "host"),
        (lambda: RemoteEnvironment("e", port=7), "port"),
        (lambda: LocalEnvironment("e").from_batch([1], progress_log_interval=5), "progress_log_interval"),
        (lambda: LocalEnvironment("e").from_batch([1]).map(Tens, enable_profile=True), "enable_profile"),
        (lambda: LocalEnvironment("e").from_batch([1]).sink(Tens, batch_size=2), "batch_size"),
        (lambda: LocalEnvironment("e", {"fault_tolerance": {"strategy": "checkpoint"}}), "checkpoint"),
    ],
)
def test_an_argument_without_effect_is_accepted_with_one_warning(build: Any, name: str) -> None:
    with pytest.warns(UserWarning, match=f"^{name} has no effect here: ") as caught:
        build()
    assert len(caught) == 1
    build()


def test_an_argument_that_the_constructor_takes_is_the_constructors() -> None:
    class Profiled(MapFunction):
        def __init__(self, enable_profile: bool) -> None:
            self.enable_profile = enable_profile

        def execute(self, x: int) -> Any:
            return self.enable_profile

    env = LocalEnvironment("profiled")
    assert results(env, env.from_batch([1]).map(Profiled, enable_profile=True)) == [True]


def test_extra_paths_reach_the_processes_of_a_cluster() -> None:
    env = RemoteEnvironment("paths", extra_python_paths=["/somewhere"])
    assert env._remote["runtime_env"]["env_vars"]["PYTHONPATH"] == "/somewhere"
    assert env.platform == "remote"


def test_a_text_is_a_batch_of_characters() -> None:
    env = LocalEnvironment("characters")
    assert results(env, env.from_batch("abc", delay=0.0)) == ["a", "b", "c"]


def test_a_batch_source_of_any_class() -> None:
    class Two(BaseFunction):
        left = 2

        def execute(self) -> int | None:
            self.left -= 1
            return self.left if self.left >= 0 else None

    class Three(SourceFunction):
        left = 3

        def execute(self) -> Any:
            self.left -= 1
            return self.left if self.left >= 0 else sage.StopSignal()

    env = LocalEnvironment("two")
    assert results(env, env.from_batch(Two)) == [1, 0]
    env = LocalEnvironment("three")
    assert results(env, env.from_source(Three)) == [2, 1, 0]


def test_a_restart_strategy_is_a_retry() -> None:
    calls: list[int] = []

    class Shaky(BatchFunction):
        def execute(self) -> Any:
            calls.append(1)
            if len(calls) < 3:
                raise OSError("away")
            return len(calls) if len(calls) < 5 else None

    config = {
        "fault_tolerance": {"strategy": "restart", "restart_strategy": "fixed", "delay": 0.001, "max_attempts": 3}
    }
    env = LocalEnvironment("shaky", config)
    assert results(env, env.from_batch(Shaky)) == [3, 4]


def test_bad_arguments_raise_what_old_programs_catch() -> None:
    env = sage.LocalEnvironment("wrong")
    with pytest.raises(TypeError, match="42"):
        env.from_batch(42)  # type: ignore[call-overload]
    stream = env.from_batch([1])
    with pytest.raises(ValueError, match="future"):
        stream.fill_future(env.from_batch([2]))
    future = env.from_future("loop")
    stream.fill_future(future)
    with pytest.raises(RuntimeError, match="filled twice"):
        stream.fill_future(future)
    unfilled = sage.LocalEnvironment("unfilled")
    unfilled.from_future("nobody").sink(print)
    with pytest.raises(RuntimeError, match="never filled"):
        unfilled.submit(autostop=True)


@pytest.mark.parametrize("path", ["sage.core.api.local_environment", "sage"])
def test_a_program_may_end_with_submit(path: str) -> None:
    """Bounded sources finish at the exit of the interpreter."""
    program = (
        f"import time\nfrom {path} import LocalEnvironment\nenv = LocalEnvironment('last')\n"
        "env.from_batch([1, 2]).map(lambda x: time.sleep(0.2) or x).sink(print)\nenv.submit()"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert (done.stdout.split(), done.stderr, done.returncode) == (["1", "2"], "", 0)


def test_a_bounded_job_that_takes_too_long_is_stopped_at_exit() -> None:
    program = (
        "import time\nfrom sage import LocalEnvironment\nenv = LocalEnvironment('long', stop_timeout_s=1)\n"
        "env.from_batch(range(10**6)).map(lambda x: time.sleep(0.05)).sink(lambda x: None)\nenv.submit()"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "SAGE_STOP_TIMEOUT_S": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=50)
    assert 'job "long" still runs at exit and is stopped' in done.stderr


# --- names that are not offered, and those of others ---


@pytest.mark.parametrize("name", EQUIVALENTS)
def test_a_name_that_is_not_offered_says_what_to_use(name: str) -> None:
    with pytest.raises(ImportError, match=f"cannot import name '{name}' from 'sage.libs.rag': use ") as caught:
        exec(f"from sage.libs.rag import {name}")
    assert "From upstream SAGE" in caught.value.__notes__[0]


def test_old_packages_beside_ours_do_not_win(tmp_path: Path) -> None:
    """They install `sage/kernel/...` into the folder that holds our package too."""
    site = tmp_path / "site"
    api = site / "sage" / "kernel" / "api"
    api.mkdir(parents=True)
    for folder in (site / "sage" / "kernel", api):
        (folder / "__init__.py").write_text("")
    (api / "local_environment.py").write_text("class LocalEnvironment: original = True")
    for path in (SOURCE / "sage").iterdir():
        (site / "sage" / path.name).symlink_to(path)
    program = (
        "from sage.kernel.api.local_environment import LocalEnvironment as Old\n"
        "print(hasattr(Old, 'original'), Old.__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.stdout.split() == ["False", "sage._legacy.environment"], done.stderr


# --- operators that are configured by a dict ---


def test_the_first_lines_of_a_rag_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sage.common.utils.config.loader import load_config
    from sage.libs.io_utils.batch import JSONLBatch
    from sage.libs.io_utils.sink import FileSink, TerminalSink
    from sage.libs.rag.promptor import QAPromptor

    (tmp_path / "questions.jsonl").write_text('{"query": "What is it?", "results": ["It is a loom."]}\n\n')
    config_file = tmp_path / "config.json"
    config_file.write_text(
        json.dumps({"source": {"data_path": "questions.jsonl"}, "sink": {"file_path": "out/qa.txt"}})
    )
    config = load_config(str(config_file))
    env = LocalEnvironment("qa")
    asked = env.from_batch(JSONLBatch, config["source"]).map(QAPromptor, {})
    answers = asked.map(lambda pair: {**pair[0], "generated": pair[1][0]["content"].splitlines()[-1]})
    answers.sink(TerminalSink, {})
    answers.sink(FileSink, config["sink"])
    env.submit(autostop=True)
    assert capsys.readouterr().out == "[Q] Question :What is it?\n[A] Answer :It is a loom.\n"
    assert Path("out/qa.txt").read_text() == "[Q] Question: What is it?\n[A] Answer  : It is a loom.\n\n"


def test_text_is_loaded_and_split(tmp_path: Path) -> None:
    from sage.libs.rag.chunk import CharacterSplitter
    from sage.libs.rag.document_loaders import TextLoader

    (tmp_path / "a.txt").write_text("abcdefghij")
    env = LocalEnvironment("split")
    documents = env.from_batch(["a.txt"]).map(TextLoader)
    pieces = documents.map(CharacterSplitter, {"chunk_size": 4, "overlap": 1}).flatmap(lambda pieces: pieces)
    assert results(env, pieces) == ["abcd", "defg", "ghij"]
    with pytest.raises(sage.GraphError, match="overlap 5 does not fit into chunk_size 4"):
        CharacterSplitter({"chunk_size": 4, "overlap": 5})
    assert TextLoader(str(tmp_path / "a.txt")).load()["content"] == "abcdefghij"


def test_a_file_source_waits_for_more_lines(tmp_path: Path) -> None:
    from sage.libs.io.source import FileSource

    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    env = LocalEnvironment("lines")
    seen: list[str] = []

    def remember(line: str) -> None:
        seen.append(line)
        if line == "two":
            env.stop()

    env.from_source(FileSource, {"data_path": "lines.txt"}).sink(remember)
    env.submit().wait(30)
    assert seen == ["one", "two"]


def test_folders_of_old_programs() -> None:
    from sage.common.config.output_paths import get_sage_paths

    assert get_sage_paths("/project").logs_dir == Path("/project/.sage/logs")
    assert not Path(".sage").exists()


def test_the_page_has_the_table_of_names() -> None:
    page = (SOURCE.parent / "docs" / "upstream.md").read_text()
    assert [f"| `{name}` | {use} |" for name, use in sorted(EQUIVALENTS.items())] == [
        line for line in page.splitlines() if line.startswith("| `") and line.split("`")[1] in EQUIVALENTS
    ]
