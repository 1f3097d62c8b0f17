"""What programs of 2025 import is found at its old places, and does what it did."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import sage
from sage._legacy import metronome as _legacy
from sage._legacy.functions import wrap_lambda
from sage._legacy.jobs import JobManagerClient
from sage._legacy.loggers import CustomLogger
from sage._legacy.names import NAMES, WORDS
from sage._legacy.pipeline_service import PipelineServiceSink, PipelineServiceSource
from sage.serving import PipelineBridge, PipelineService

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sage._runtime.backend import Backend

SOURCE = Path(__file__).resolve().parents[2] / "src"

FUNCTIONS = {
    "batch": "BatchFunction",
    "source": "SourceFunction",
    "map": "MapFunction",
    "filter": "FilterFunction",
    "flatmap": "FlatMapFunction",
    "sink": "SinkFunction",
    "keyby": "KeyByFunction",
    "comap": "BaseCoMapFunction",
    "join": "BaseJoinFunction",
    "future": "FutureFunction",
}
EVERY_FUNCTION = (*FUNCTIONS.values(), "StopSignal", "wrap_lambda")
PLACES_OF_FUNCTIONS = ("sage.core.api.function", "sage.kernel.api.function", "sage.common.core.functions")

NAMES_AT = {
    "sage.core.api.local_environment": ("LocalEnvironment",),
    "sage.kernel.api.local_environment": ("LocalEnvironment",),
    "sage.runtime": ("LocalEnvironment",),
    "sage.core.api.remote_environment": ("RemoteEnvironment",),
    "sage.kernel.api.remote_environment": ("RemoteEnvironment",),
    "sage.core.api.service.base_service": ("BaseService",),
    "sage.kernel.api.service.base_service": ("BaseService",),
    "sage.kernel.api.service": ("BaseService",),
    "sage.platform.service": ("BaseService",),
    "sage.common.service": ("BaseService",),
    **{
        f"{place}.{kind}_function": (name, "StopSignal", "wrap_lambda")
        for place in PLACES_OF_FUNCTIONS
        for kind, name in FUNCTIONS.items()
    },
    **{f"{place}.base_function": ("BaseFunction",) for place in PLACES_OF_FUNCTIONS},
    **{f"{place}.lambda_function": ("wrap_lambda",) for place in PLACES_OF_FUNCTIONS},
    "sage.common.core.functions": EVERY_FUNCTION,
    "sage.common.core": EVERY_FUNCTION,
    "sage.foundation": EVERY_FUNCTION,
    "sage.core.api.datastream": ("DataStream",),
    "sage.kernel.api.datastream": ("DataStream",),
    "sage.stream": ("DataStream", "ConnectedStreams"),
    "sage.core.api.connected_streams": ("ConnectedStreams",),
    "sage.kernel.api.connected_streams": ("ConnectedStreams",),
    "sage.kernel.runtime.communication.packet": ("StopSignal",),
    "sage.kernel.runtime.communication.router.packet": ("StopSignal",),
    "sage.core.communication.metronome": ("Metronome", "create_metronome", "get_global_metronome"),
    "sage.kernel.runtime.communication.metronome": ("Metronome", "create_metronome", "get_global_metronome"),
    "sage.common.utils.logging.custom_logger": ("CustomLogger",),
    "sage.kernel.api.service.pipeline_service": (
        "PipelineBridge",
        "PipelineRequest",
        "PipelineService",
        "PipelineServiceSink",
        "PipelineServiceSource",
    ),
    "sage.kernel": ("JobManagerClient",),
    "sage.kernel.runtime.job_manager": ("JobManager",),
    "sage.kernel.runtime.jobmanager_client": ("JobManagerClient",),
    "sage.kernel.runtime.dispatcher": ("Dispatcher",),
}


def python(program: str) -> str:
    """Run a program in an interpreter of its own and return what it prints."""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", NAMES_AT)
def test_every_old_module_has_its_names(path: str) -> None:
    module = importlib.import_module(path)
    for name in NAMES_AT[path]:
        found, ours = getattr(module, name), getattr(sage, name, None)
        assert ours is None or (isinstance(found, type) and issubclass(found, ours))


@pytest.mark.parametrize("name", ["LocalEnvironment", "MapFunction", "StopSignal", "load_config", "TerminalSink"])
def test_a_name_is_found_one_level_higher_or_lower(name: str) -> None:
    """It moved between modules several times."""
    for path in ("sage.kernel.api", "sage.core.api", "sage.libs.foundation.io.sink", "sage.utils.config_loader"):
        assert getattr(importlib.import_module(path), name) is NAMES[name]


def test_the_paths_are_made_of_words_that_modules_have() -> None:
    assert all(word.isidentifier() and word.islower() for word in WORDS)
    assert all(len(path.split(".")) > 1 for path in NAMES_AT)


def test_each_old_module_can_be_the_first_import() -> None:
    paths = ["sage.core.api.local_environment", "sage.kernel.api.service.pipeline_service", "sage.foundation"]
    for path in paths:
        assert python(f"import sys, {path}; print({path!r} in sys.modules)") == "True"


def test_importing_sage_makes_no_old_module() -> None:
    program = "import sys, sage; print([name for name in sys.modules if name.startswith(('sage.core', 'sage.kernel'))])"
    assert python(program) == "[]"


def test_an_old_module_is_found_without_importing_it() -> None:
    spec = importlib.util.find_spec("sage.core.communication.metronome")
    assert spec is not None
    assert spec.loader is not None
    assert spec.loader.create_module(spec) is None


def test_what_was_never_there_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"sage\.core\.api\.nowhere"):
        importlib.import_module("sage.core.api.nowhere")
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec("from sage.core.api.local_environment import Nothing")


# --- wrap_lambda ---


def test_wrapped_callables_are_function_classes(backend: Callable[[], Backend]) -> None:
    seen: list[int] = []
    numbers = iter([1, 2, 3, 4])
    env = sage.LocalEnvironment(backend=backend)
    stream = env.from_batch(wrap_lambda(lambda: next(numbers, None), "batch"))
    stream = stream.map(wrap_lambda(lambda x: x * 10)).filter(wrap_lambda(lambda x: x != 20, "filter"))
    stream = stream.flatmap(wrap_lambda(lambda x: [x, x + 1], "flatmap"))
    stream.keyby(wrap_lambda(lambda x: x % 2, "keyby")).sink(wrap_lambda(seen.append, "sink"))
    env.submit(autostop=True)
    assert seen == [10, 11, 30, 31, 40, 41]
    assert issubclass(wrap_lambda(len, "map"), sage.MapFunction)


def test_a_wrapped_map_drops_what_it_returns_none_for(backend: Callable[[], Backend]) -> None:
    seen: list[int] = []
    env = sage.LocalEnvironment(backend=backend)
    env.from_batch([1, 2, 3]).map(wrap_lambda(lambda x: None if x == 2 else x, "map")).sink(seen.append)
    env.submit(autostop=True)
    assert seen == [1, 3]


@pytest.mark.parametrize("kind", ["process", "comap", ""])
def test_an_unknown_kind_is_refused_with_the_known_ones(kind: str) -> None:
    with pytest.raises(sage.GraphError, match=f"wrap_lambda: kind is '{kind}'") as caught:
        wrap_lambda(len, kind)
    assert caught.value.__notes__ == [
        'It is one of "batch", "source", "map", "filter", "flatmap", "sink", "keyby", "join".'
    ]


# --- the metronome ---


def test_a_release_lets_one_wait_pass() -> None:
    metronome = _legacy.create_metronome("pace")
    assert metronome.name == "pace"
    assert not metronome.wait_for_release(timeout=0)
    metronome.release_once()
    metronome.release_once()
    assert metronome.wait_for_release()
    assert not metronome.wait_for_release(timeout=0)


def test_a_forced_release_lasts_until_reset() -> None:
    metronome = _legacy.create_metronome("pace")
    metronome.force_release()
    assert metronome.wait_for_release()
    assert metronome.wait_for_release()
    metronome.reset()
    assert not metronome.wait_for_release(timeout=0)


def test_two_threads_keep_pace_by_metronomes() -> None:
    ping, pong = _legacy.create_metronome("ping"), _legacy.create_metronome("pong")
    events: list[str] = []

    def answer() -> None:
        for number in range(3):
            assert ping.wait_for_release(timeout=20)
            events.append(f"pong {number}")
            pong.release_once()

    thread = threading.Thread(target=answer)
    thread.start()
    for number in range(3):
        events.append(f"ping {number}")
        ping.release_once()
        assert pong.wait_for_release(timeout=20)
    thread.join()
    assert events == [f"{what} {number}" for number in range(3) for what in ("ping", "pong")]


def test_there_is_one_global_metronome() -> None:
    assert _legacy.get_global_metronome() is _legacy.get_global_metronome()
    assert _legacy.get_global_metronome() is not _legacy.create_metronome("global")


# --- the logger ---


@pytest.fixture
def forget_outputs() -> Iterator[None]:
    """Close what loggers of these tests write to."""
    yield
    CustomLogger.enable_global_console_debug()
    for name in ("on console", "in file"):
        logger = logging.getLogger(f"sage.user.{name}")
        for handler in tuple(logger.handlers):
            logger.removeHandler(handler)
            handler.close()


@pytest.mark.usefixtures("forget_outputs")
def test_the_console_can_be_switched_off_and_on(capsys: pytest.CaptureFixture[str]) -> None:
    logger = CustomLogger([("console", "INFO")], name="on console")
    logger.debug("not shown")
    logger.info("number %d", 1)
    CustomLogger.disable_global_console_debug()
    logger.error("not shown either")
    CustomLogger.enable_global_console_debug()
    CustomLogger(name="on console").warning("number 2")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("sage.user.on console ")[1] for line in lines] == ["number 1", "number 2"]


@pytest.mark.usefixtures("forget_outputs")
def test_a_file_takes_lines_from_its_level_on(tmp_path: Path) -> None:
    logger = CustomLogger([("logs/all.log", "DEBUG"), ("errors.log", logging.ERROR)], "in file", tmp_path)
    logger.debug("one")
    logger.critical("two")
    try:
        raise KeyError("three")
    except KeyError:
        logger.exception("failed")
    everything = (tmp_path / "logs" / "all.log").read_text()
    assert "DEBUG sage.user.in file one" in everything
    assert "KeyError: 'three'" in everything
    assert [line for line in (tmp_path / "errors.log").read_text().splitlines() if "sage.user" in line] == [
        line for line in everything.splitlines() if "sage.user" in line and "DEBUG" not in line
    ]


# --- pipelines that answer calls ---


def test_a_bridge_hands_requests_on_until_it_is_closed() -> None:
    bridge = PipelineBridge()
    source, sink = PipelineServiceSource(bridge, poll_interval=0), PipelineServiceSink()
    assert source.execute() is None
    asked = {"number": 1}
    request = bridge.submit(asked)
    record = source.execute()
    assert record == {"number": 1, "_response_queue": request.response_queue}
    sink.execute({**record, "number": 2})
    assert request.response_queue.get(timeout=0) == {"number": 2}
    assert asked == {"number": 1}
    assert not bridge.is_closed
    bridge.close()
    assert bridge.is_closed
    assert isinstance(source.execute(), sage.StopSignal)
    with pytest.raises(sage.ServiceUnavailableError, match="the pipeline behind this service has ended"):
        bridge.submit(asked)


def served(asked: list[Any], answer: Callable[[Any], Any]) -> list[Any]:
    """Return what a served pipeline, which maps its records by `answer`, replies to each of `asked`.

    A caller waits inside its step for the steps of another task, which only threads can do.
    """
    bridge = PipelineBridge()
    env = sage.LocalEnvironment()
    handle = env.register_service("pipeline", PipelineService, bridge)
    env.from_source(PipelineServiceSource, bridge, poll_interval=0).map(answer).sink(PipelineServiceSink)
    replies: list[Any] = []
    env.from_batch(asked).map(handle.process).sink(replies.append)
    env.submit(autostop=True)
    return replies


def test_a_payload_that_is_no_dict_travels_as_data() -> None:
    assert served([7, "x"], lambda record: record) == [{"data": 7}, {"data": "x"}]


def test_a_record_that_lost_its_queue_answers_none() -> None:
    """Nobody waits for an answer that cannot come."""
    assert served([{"a": 1}], lambda record: {"a": 2}) == [None]


# --- the job manager ---


def test_a_client_of_the_default_address_speaks_to_this_process(backend: Callable[[], Backend]) -> None:
    env = sage.LocalEnvironment("asked for", backend=backend)
    env.from_batch([1, 2]).sink(lambda x: None)
    job = env.submit(autostop=True)
    client = JobManagerClient()
    assert client.get_job_status(job)["status"] == "completed"
    assert {"job_id": job.id, "name": "asked for", "status": "completed"} in client.list_jobs()
    assert client.health_check()["status"] == "healthy"
    with pytest.raises(sage.JobNotFoundError, match='job "nobody" is not known here'):
        client.get_job_status("nobody")


def test_a_client_stops_jobs() -> None:
    client = JobManagerClient("localhost")
    for stop in (client.pause_job, client.delete_job, lambda job: client.delete_job(job, force=True)):
        env = sage.LocalEnvironment()
        env.from_source(lambda: None).sink(lambda x: None)
        job = env.submit()
        assert stop(job)["status"] in ("stopped", "cancelled")
    env.submit()
    assert client.cleanup_all_jobs()[-1]["status"] == "stopped"


def test_another_address_is_unreachable() -> None:
    client = JobManagerClient(host="10.1.2.3", port=7, timeout=1)
    assert (client.host, client.port, client.timeout) == ("10.1.2.3", 7, 1)
    with pytest.raises(sage.ServerUnreachableError, match=r"no job manager answers at 10\.1\.2\.3:7") as caught:
        client.list_jobs()
    assert caught.value.__notes__ == ["Leave out host and port to speak to the job manager of this process."]


def test_the_time_out_of_a_client_bounds_its_waits() -> None:
    """A job that takes longer to end goes on ending."""
    is_open, may_close = threading.Event(), threading.Event()

    class Slow(sage.SinkFunction):
        def open(self) -> None:
            is_open.set()

        def execute(self, data: Any) -> None:
            pass

        def close(self) -> None:
            may_close.wait(30)

    env = sage.LocalEnvironment("slow to end")
    env.from_source(lambda: None).sink(Slow)
    job = env.submit()
    assert is_open.wait(30)
    client = JobManagerClient(timeout=0.05)
    with pytest.raises(TimeoutError, match=r'job "slow to end" is not over after 0\.05 s'):
        client.pause_job(job)
    with pytest.raises(TimeoutError, match="slow to end"):
        client.delete_job(job, force=True)
    with pytest.raises(TimeoutError, match="slow to end"):
        client.cleanup_all_jobs()
    assert client.get_job_status(job)["status"] == "cancelling"
    may_close.set()
    assert JobManagerClient().pause_job(job)["status"] == "cancelled"


class Configured(sage.MapFunction):
    """A function of 2025: it hands its configuration up."""

    def __init__(self, config: dict[str, int], **kwargs: Any) -> None:
        super().__init__(config, **kwargs)  # type: ignore[call-arg]
        self.plus = config["plus"]

    def execute(self, data: int) -> int:
        return int(data + self.plus + self.service("store").plus())


class Store(sage.BaseService):
    """A service of 2025."""

    def __init__(self, config: dict[str, int], *, kind: str = "none") -> None:
        super().__init__(config, kind)  # type: ignore[call-arg]
        assert self.name == "store", "the context comes before the constructor, and stays"
        self._config = config

    def plus(self) -> int:
        return self._config["plus"]


def test_a_constructor_may_hand_anything_up(backend: Callable[[], Backend]) -> None:
    arrived: list[int] = []
    env = sage.LocalEnvironment("test", backend=backend)
    env.register_service("store", Store, {"plus": 100}, kind="any")
    env.from_batch([1, 2]).map(Configured, {"plus": 10}, verbose=True).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [111, 112]


class Twice(sage.MapFunction):
    def execute(self, data: int) -> int:
        return data * 2


def test_arguments_of_a_class_without_a_constructor_are_refused() -> None:
    """They would have no effect."""
    env = sage.LocalEnvironment("test")
    with pytest.raises(TypeError, match="the constructor of Twice: too many positional arguments"):
        env.from_batch([1]).map(Twice, {"plus": 1})  # type: ignore[call-overload]
    with pytest.raises(TypeError, match='service "s": BaseService: got an unexpected keyword argument'):
        env.register_service("s", sage.BaseService, plus=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"Twice\(\) takes no arguments"):
        Twice(1)  # type: ignore[call-arg]


class Plus:
    def __init__(self, plus: int) -> None:
        self.plus = plus


class Mixed(sage.MapFunction, Plus):
    def execute(self, data: int) -> int:
        return data + self.plus


def test_a_second_parent_is_built_as_ever() -> None:
    env = sage.LocalEnvironment("test")
    arrived: list[int] = []
    with pytest.raises(TypeError, match="the constructor of Mixed: missing a required argument: 'plus'"):
        env.from_batch([1]).map(Mixed)
    env.from_batch([1]).map(Mixed, 5).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [6]
