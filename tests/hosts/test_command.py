"""External commands as services: started, watched and ended, and whatever goes wrong with that is told."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sage import (
    Cleanliness,
    CleanupTimeoutError,
    DuplicateNameError,
    GraphError,
    Http,
    JobError,
    JobErrorGroup,
    JobReport,
    Line,
    LocalEnvironment,
    Outcome,
    Port,
    RunningCommand,
    ServiceOptions,
    ServiceStartError,
    UnknownServiceError,
)
from sage._hosts.ports import choose_ports, release
from sage._processes import process
from sage._runtime.states import StopMode
from sage.command import Command

WAIT_S = 30.0
HTTP_SERVER = (sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1", "--directory", "{folder}")
SLEEPER = "import signal; signal.pause()"


def script(text: str, *words: str) -> list[str]:
    """Return a command; its braces are its own."""
    return [sys.executable, "-c", textwrap.dedent(text).replace("{", "{{").replace("}", "}}"), *words]


STAYS = script("""
    import signal
    print("up")
    signal.pause()
""")


def run(
    env: LocalEnvironment, function: Callable[[int], Any] = lambda x: x, **submit: Any
) -> tuple[list[Any], JobReport]:
    """Run one record through a function and return what came of it and the report."""
    results: list[Any] = []
    env.from_batch([1]).map(function).sink(results.append)
    return results, env.submit(autostop=True, **submit).wait()


def failure(env: LocalEnvironment, kind: type[JobError] = JobError) -> JobError:
    """Run a job that fails and return its first error."""
    with pytest.raises(kind) as caught:
        run(env)
    return caught.value


def first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def cause_notes(error: BaseException) -> str:
    assert error.__cause__ is not None
    return notes(error.__cause__)


def get(url: str) -> int:
    with urllib.request.urlopen(url, timeout=10) as answer:
        status: int = answer.status
        return status


def wait_for(condition: Callable[[], Any]) -> None:
    due = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < due
        time.sleep(0.01)


def gone(pid: int) -> bool:
    return process(pid) is None


@pytest.fixture
def env() -> Iterator[LocalEnvironment]:
    with LocalEnvironment("commands") as made:
        yield made


class TestAServer:
    def test_it_is_there_for_the_job_and_gone_after_it(
        self, env: LocalEnvironment, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Everything that was started is gone when submit returns."""
        caplog.set_level(logging.INFO, "sage.service.web")
        web: Any = env.register_command("web", HTTP_SERVER, ready=Http("/"))
        results, report = run(env, lambda _: (get(web.url), web.port, web.pid, web.folder, web.words[3]))
        ((status, port, pid, folder, word),) = results
        assert status == 200
        assert word == str(port)
        assert web._name == "web"
        assert gone(pid)
        assert not Path(folder).exists()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
        service = report.service("web")
        assert (service.state, service.host, service.pid) == ("stopped", "command", pid)
        assert service.exit_code == -signal.SIGTERM
        assert report.cleanliness is Cleanliness.CLEAN
        assert [hook.hook for hook in service.hooks] == ["build", "drain", "stop", "exit"] or [
            hook.hook for hook in service.hooks
        ] == ["build", "stop", "exit"]
        assert "Serving HTTP" in service.output[0]
        logged = [record.message for record in caplog.records if record.name == "sage.service.web"]
        assert tuple(logged) == service.output

    def test_ports_folder_variables_and_words_are_filled(self, env: LocalEnvironment, tmp_path: Path) -> None:
        show = script(
            """
            import json, os, signal, sys
            print(json.dumps([sys.argv[1:], os.environ["PLACE"], os.environ["HOME_OF_TEST"], os.getcwd()]))
            signal.pause()
            """,
            "{port}",
            "--admin={port:admin}",
            "{{not me}}",
            "a b",
        )
        command = env.register_command(
            "show",
            show,
            ready=Line(r"^\["),
            env={"PLACE": "{folder}/data:{port}", "HOME_OF_TEST": "x"},
            cwd=tmp_path,
            url="redis://127.0.0.1:{port}/0",
        )
        results, _ = run(env, lambda _: (command.ports, command.folder, command.url, command.output()))
        ((ports, folder, url, output),) = results
        words, place, variable, cwd = json.loads(output[0])
        assert words == [str(ports[""]), f"--admin={ports['admin']}", "{not me}", "a b"]
        assert ports[""] != ports["admin"]
        assert place == f"{folder}/data:{ports['']}"
        assert variable == "x"
        assert cwd == str(tmp_path)
        assert url == f"redis://127.0.0.1:{ports['']}/0"

    def test_a_command_depends_on_the_service_whose_value_it_takes(self, env: LocalEnvironment) -> None:
        web = env.register_command("web", HTTP_SERVER, ready=Port)
        show = script("import signal, sys; print('asks', sys.argv[1]); signal.pause()")
        asks = env.register_command("asks", [*show, web.url], ready=Line("asks http"))
        results, report = run(env, lambda _: (web.url, asks.output()))
        assert results[0][1] == (f"asks {results[0][0]}",)
        assert report.service("asks").state == "stopped"

    def test_without_a_port_there_is_no_url(self, env: LocalEnvironment) -> None:
        command = env.register_command("plain", STAYS)
        results, _ = run(env, lambda _: (command.url, command.port, command.folder))
        assert results == [(None, None, None)]

    def test_an_unknown_attribute_is_named(self, env: LocalEnvironment) -> None:
        command: Any = env.register_command("plain", STAYS)
        with pytest.raises(UnknownServiceError, match='uses "adress" of service "plain", which it lacks'):
            run(env, lambda _: command.adress)

    def test_one_that_is_kept_serves_the_next_job(self, env: LocalEnvironment) -> None:
        """A kept service is not started again."""
        web = env.register_command("web", HTTP_SERVER, ready=Http("/"))
        pids, report = run(env, lambda _: (get(web.url), web.pid)[1], keep_services=True)
        assert report.service("web").state == "kept"
        assert not gone(pids[0])
        again: list[Any] = []
        env.from_batch([1]).map(lambda _: (get(web.url), web.pid)[1]).sink(again.append)
        env.submit(autostop=True)
        assert set(again) == set(pids)
        env.close()
        assert gone(pids[0])

    def test_one_that_died_while_it_was_kept_fails_the_next_job(self, env: LocalEnvironment) -> None:
        command = env.register_command("plain", STAYS, ready=Line("up"))
        ((pid),), _ = run(env, lambda _: command.pid, keep_services=True)
        os.kill(pid, signal.SIGKILL)
        # A job without records could be over before the thread that waits for the process has heard of its end.
        wait_for(lambda: gone(pid) and f"sage-process-{pid}" not in {thread.name for thread in threading.enumerate()})
        error = first(failure(env))
        assert 'service "plain" ended by itself' in str(error)
        assert "was ended by SIGKILL" in str(error)

    @pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
    def test_redis(self, env: LocalEnvironment) -> None:
        redis = env.register_command(
            "redis",
            ["redis-server", "--port", "{port}", "--dir", "{folder}", "--save", "", "--appendonly", "no"],
            ready=Line("Ready to accept connections"),
            health=Port(),
            url="redis://127.0.0.1:{port}",
        )

        def ping(_: int) -> bytes:
            with socket.create_connection(("127.0.0.1", redis.port), 10) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(100)

        results, report = run(env, ping)
        assert results == [b"+PONG\r\n"]
        assert report.service("redis").exit_code == 0
        assert "Redis is now ready to exit" in report.service("redis").output[-1]


class TestReady:
    def test_another_status_than_the_wanted_one_is_not_ready(self, env: LocalEnvironment) -> None:
        serves = script(
            """
            import http.server, sys
            answers = [503, 302, 204]
            class Answer(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
                    self.end_headers()
            http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
            """,
            "{port}",
        )
        web = env.register_command("web", serves, ready=Http("http://127.0.0.1:{port}/health?deep=1"))
        results, _ = run(env, lambda _: get(web.url))
        assert results == [204]

    def test_a_line_counts_that_has_scrolled_away(self, env: LocalEnvironment) -> None:
        command = env.register_command(
            "chatty",
            script("""
                import signal
                print("ready at last")
                for number in range(200):
                    print("line", number)
                signal.pause()
            """),
            ready=Line("ready at"),
        )

        def output(_: int) -> tuple[str, ...]:
            wait_for(lambda: command.output()[-1] == "line 199")
            lines: tuple[str, ...] = command.output()
            return lines

        results, _ = run(env, output)
        assert results == [tuple(f"line {number}" for number in range(150, 200))]

    def test_lines_are_cut_decoded_and_read_to_the_end(self, env: LocalEnvironment) -> None:
        env.register_command(
            "odd",
            script(r"""
                import os
                os.write(1, b"caf\xc3\xa9 \xff\r\n\n 10%\r 50%\r 100%\n" + b"x" * 20_000 + b"\nthe last has no end")
                raise SystemExit(3)
            """),
            ready=Port("never"),
        )
        lines = notes(failure(env, ServiceStartError)).splitlines()
        assert [line.strip()[:20] for line in lines[1:]] == [
            "café \N{REPLACEMENT CHARACTER}",
            "100%",
            *["x" * 20] * 3,
            "the last has no end",
        ]

    @pytest.mark.parametrize("is_async", [False, True])
    def test_a_callable_is_asked_again_while_its_client_cannot_connect(
        self, env: LocalEnvironment, is_async: bool
    ) -> None:
        class NotYetError(Exception):
            pass

        asked: list[int] = []

        def answers(command: RunningCommand) -> bool:
            asked.append(command.pid)
            if len(asked) == 1:
                raise NotYetError("cannot connect")
            return len(asked) == 3

        async def answers_later(command: RunningCommand) -> bool:
            return answers(command)

        env.register_command("plain", STAYS, ready=answers_later if is_async else answers)
        _, report = run(env)
        assert asked == [report.service("plain").pid] * 3

    def test_a_callable_that_is_wrong_fails_the_start_at_once(self, env: LocalEnvironment) -> None:
        env.register_command("plain", STAYS, ready=lambda command: command.prot)  # type: ignore[attr-defined]
        error = failure(env, ServiceStartError)
        assert 'service "plain" failed to get ready: AttributeError' in str(error)
        assert "prot" in str(error)


class TestBadInput:
    @pytest.mark.parametrize(
        ("argv", "settings", "text"),
        [
            ("chroma run", {}, "a string and not a list of words"),
            ([], {}, 'the command of service "web" is empty'),
            (7, {}, "is 7, not a list of words"),
            (["serve", 8000], {}, "has the word 8000, which is of type int"),
            (["serve", "a\0b"], {}, "null byte"),
            (["serve", "{prot}"], {}, "the unknown placeholder {prot} in '{prot}'"),
            (["serve", '{"a": 1}'], {}, "has the unknown placeholder"),
            (["serve", "{"], {}, "a brace that stands alone"),
            (["serve"], {"port": "80"}, "port of service \"web\", command 'serve', is '80'"),
            (["serve"], {"port": 70_000}, "is 70000, not a number from 1 to 65535"),
            (["serve"], {"env": {"A": 1}}, "has 'A': 1; names and values are strings"),
            (["serve"], {"env": ["A=1"]}, "not a mapping"),
            (["serve"], {"env": {"A=": "1"}}, "has the name 'A='"),
            (["serve"], {"cwd": 3}, "cwd of service"),
            (["serve"], {"url": 3}, "url of service"),
            (["serve"], {"stop_signal": signal.SIGKILL}, "cannot ask for an end"),
            (["serve"], {"stop_signal": "TERM"}, "cannot ask for an end"),
            (["serve"], {"exit_codes": 1}, "not a list of numbers"),
            (["serve"], {"ready": "http://x"}, "ready of service \"web\", command 'serve', is 'http://x'"),
            (["serve"], {"ready": Http("localhost:80")}, "which is neither an http address nor a path"),
            (["serve"], {"ready": Line("(")}, "has the pattern '('"),
            (["serve"], {"health": Line("x")}, "is a line, which can be seen only once"),
            (["serve"], {"options": ServiceOptions(host="process")}, 'takes no host="process"'),
        ],
    )
    def test_it_is_refused_when_it_is_registered(
        self, env: LocalEnvironment, argv: Any, settings: dict[str, Any], text: str
    ) -> None:
        with pytest.raises(GraphError) as caught:
            env.register_command("web", argv, **settings)
        assert text in str(caught.value)
        assert '"web"' in str(caught.value)

    def test_an_unknown_keyword_and_a_name_that_is_taken_are_refused(self, env: LocalEnvironment) -> None:
        settings: dict[str, Any] = {"redy": Port()}
        with pytest.raises(TypeError, match=r"\"web\", \['serve'\].* has no keyword \"redy\"") as caught:
            env.register_command("web", ["serve"], **settings)
        assert "ready, health, env" in notes(caught.value)
        env.register_command("web", STAYS)
        with pytest.raises(DuplicateNameError, match='service "web" is registered twice'):
            env.register_command("web", STAYS)

    def test_what_this_machine_lacks_is_told_all_at_once_before_anything_starts(
        self, env: LocalEnvironment, tmp_path: Path
    ) -> None:
        (tmp_path / "plain.txt").write_text("no program")
        built: list[int] = []
        env.register_service("first", built.append, 1)
        env.register_command("a", ["no-such-program-of-ours"])
        env.register_command("b", [str(tmp_path / "plain.txt")])
        env.register_command("c", ["./absent"], cwd=tmp_path)
        env.register_command("d", STAYS, cwd=tmp_path / "nowhere")
        env.from_batch([1]).sink(print)
        assert "print" in env.explain()
        with pytest.raises(GraphError) as caught:
            env.submit(autostop=True)
        text = str(caught.value)
        assert "command 'no-such-program-of-ours' of service \"a\" does not exist" in text
        assert 'of service "b" is not executable' in text
        assert "command './absent' of service \"c\" does not exist" in text
        assert "nowhere" in text
        assert not built

    def test_a_program_that_the_system_cannot_load(self, env: LocalEnvironment, tmp_path: Path) -> None:
        (tmp_path / "odd").write_bytes(b"\x7fELF no program")
        (tmp_path / "odd").chmod(0o700)
        env.register_command("odd", [tmp_path / "odd"])
        error = failure(env, ServiceStartError)
        assert 'service "odd" failed to be built' in str(error)
        assert "cannot be started: [Errno 8] Exec format error" in str(error)

    def test_a_fixed_port_that_is_in_use(self, env: LocalEnvironment) -> None:
        """Everything that had started before is cleaned up."""
        other: Any = env.register_command("other", STAYS, ready=Line("up"))
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            command = [*HTTP_SERVER[:-2]]
            env.register_command(
                "web", [*command, "--directory", "."], port=port, options=ServiceOptions(depends_on=["other"])
            )
            error = failure(env, ServiceStartError)
        assert f"port {port} is in use, but command" in str(error)
        assert f"needs it; process {os.getpid()} (" in str(error)
        assert 'service "web" failed to be built' in str(error)
        assert other._calls is None

    def test_a_fixed_port_that_a_job_of_ours_has(self, env: LocalEnvironment) -> None:
        with LocalEnvironment("first") as first:
            web: Any = first.register_command("web", HTTP_SERVER, ready=Port())
            first.from_batch([1]).sink(print)
            first.submit(autostop=True, keep_services=True)
            env.register_command("web", HTTP_SERVER, port=web.port)
            error = failure(env, ServiceStartError)
            assert f"needs it; process {web.pid} (" in str(error)
        assert "A job of SAGE started that process: `sage gc` ends what dead jobs have left." in notes(
            error.__cause__ or error
        )

    def test_one_that_exits_at_once_fails_the_start_promptly(self, env: LocalEnvironment) -> None:
        env.register_command("short", script("print('no such option: --prt'); raise SystemExit(2)"), ready=Port("x"))
        began_at = time.monotonic()
        error = failure(env, ServiceStartError)
        assert time.monotonic() - began_at < 20.0  # its start might take 60 s
        assert 'service "short" failed to get ready' in str(error)
        assert "exited with code 2, its last line: no such option: --prt" in str(error)
        assert "The last lines of its output:\n    no such option: --prt" in notes(error)

    def test_one_that_goes_into_the_background_is_told_of(self, env: LocalEnvironment, tmp_path: Path) -> None:
        daemon = script(
            """
            import os, signal, sys
            if os.fork() == 0:
                os.setsid()
                pid = os.fork()
                if pid == 0:
                    signal.pause()
                with open(sys.argv[1], "w") as file:
                    file.write(str(pid))
                os._exit(0)
            os.wait()
            """,
            str(tmp_path / "pid"),
        )
        env.register_command("daemon", daemon, ready=Port("x"))
        error = failure(env, ServiceStartError)
        assert "exited with code 0" in str(error)
        assert "stays in the foreground" in notes(error.__cause__ or error)
        assert gone(int((tmp_path / "pid").read_text()))

    def test_one_that_never_gets_ready(self, env: LocalEnvironment) -> None:
        env.register_command("slow", STAYS, ready=Http("/"), options=ServiceOptions(start_timeout_s=2.0))
        error = failure(env, ServiceStartError)
        assert 'service "slow" did not get ready in time: GET http://127.0.0.1:' in str(error)
        assert "ConnectionRefusedError" in str(error)
        assert "The last lines of its output:\n    up" in notes(error)


class TestEnd:
    def test_the_stop_signal_is_its_own_and_reaches_a_stopped_process(self, env: LocalEnvironment) -> None:
        command = env.register_command(
            "polite",
            script("""
                import signal, sys
                def end(*_):
                    print("said goodbye")
                    sys.exit(0)
                signal.signal(signal.SIGINT, end)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                print("up")
                while True:
                    signal.pause()
            """),
            ready=Line("up"),
            stop_signal=signal.SIGINT,
        )
        _, report = run(env, lambda _: os.kill(command.pid, signal.SIGSTOP))
        service = report.service("polite")
        assert (service.state, service.exit_code, service.output) == ("stopped", 0, ("up", "said goodbye"))

    def test_one_that_does_not_end_is_killed(self, env: LocalEnvironment) -> None:
        pids: list[int] = []
        command = env.register_command(
            "stubborn",
            script("""
                import os, signal, subprocess, sys
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
                print("up", child.pid)
                while True:
                    signal.pause()
            """),
            ready=Line("up"),
            options=ServiceOptions(stop_timeout_s=0.5),
        )
        began_at: list[float] = []

        def note(_: int) -> None:
            pids.extend([command.pid, int(command.output()[0].split()[1])])
            began_at.append(time.monotonic())

        with pytest.raises(JobErrorGroup) as caught:
            run(env, note)
        assert time.monotonic() - began_at[0] < 9.0  # its stop alone would have 10 s by default
        assert isinstance(first(caught.value), CleanupTimeoutError)
        assert 'service "stubborn" did not end its stop in time and its process was ended' in str(first(caught.value))
        assert all(gone(pid) for pid in pids)

    def test_what_it_left_behind_is_ended_with_it(self, env: LocalEnvironment, tmp_path: Path) -> None:
        """One child left its session, one threw its environment away, one is stopped; all end by SIGTERM."""
        command = env.register_command(
            "family",
            script(
                """
                import os, signal, subprocess, sys
                sleeper = [sys.executable, "-c", sys.argv[1]]
                first = subprocess.Popen(sleeper, start_new_session=True)
                second = subprocess.Popen(sleeper, env={})
                third = subprocess.Popen(sleeper, start_new_session=True)
                os.kill(third.pid, signal.SIGSTOP)
                print("up", first.pid, second.pid, third.pid)
                signal.pause()
                """,
                SLEEPER,
            ),
            ready=Line("up"),
        )
        results, report = run(env, lambda _: command.output()[0].split()[1:])
        assert len(results[0]) == 3
        assert all(gone(int(pid)) for pid in results[0])
        assert (report.service("family").state, report.cleanliness) == ("stopped", Cleanliness.CLEAN)

    def test_what_had_to_be_killed_is_named(self, env: LocalEnvironment) -> None:
        command = env.register_command(
            "family",
            script("""
                import signal, subprocess, sys
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                sleeper = [sys.executable, "-c", "import signal; signal.pause()"]
                child = subprocess.Popen(sleeper, start_new_session=True)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                print("up", child.pid)
                signal.pause()
            """),
            ready=Line("up"),
            options=ServiceOptions(kill_grace_s=1.0),
        )
        pids: list[int] = []
        with pytest.raises(JobErrorGroup) as caught:
            run(env, lambda _: pids.append(int(command.output()[0].split()[1])))
        assert f"left behind what had to be killed: process {pids[0]}" in str(first(caught.value))
        assert gone(pids[0])

    def test_nothing_is_left_of_one_whose_start_is_given_up(self, env: LocalEnvironment) -> None:
        """The last Ctrl-C brings the kill forward, also while the process is only asked to end."""
        pids: list[int] = []

        def never(command: RunningCommand) -> bool:
            if command.output():
                pids.append(command.pid)
            return False

        stubborn = script("""
            import signal
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("up")
            while True:
                signal.pause()
        """)
        env.register_command("stubborn", stubborn, ready=never, options=ServiceOptions(kill_grace_s=25.0))
        env.from_batch([1]).sink(print)
        job = env.submit()
        wait_for(lambda: pids)
        job._request(StopMode.CANCEL, "enough")
        wait_for(lambda: any(event.name == "stubborn" and event.after == "cleaning" for event in job.events()))
        began_at = time.monotonic()
        job._request(StopMode.KILL, "at once")
        with pytest.raises(JobErrorGroup):
            job.wait()
        assert time.monotonic() - began_at < 9.0  # asking it to end would have 12.5 s
        assert job.report is not None
        assert job.report.service("stubborn").state == "killed"
        assert gone(pids[0])

    @pytest.mark.parametrize("codes", [[0], [0, 7]])
    def test_how_it_may_exit_is_said(self, env: LocalEnvironment, codes: list[int]) -> None:
        env.register_command(
            "seven",
            script("""
                import signal, sys
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
                print("up")
                signal.pause()
            """),
            ready=Line("up"),
            exit_codes=codes,
        )
        if 7 in codes:
            _, report = run(env)
            assert (report.service("seven").exit_code, report.cleanliness) == (7, Cleanliness.CLEAN)
            return
        error = first(failure(env, JobErrorGroup))
        assert 'service "seven" failed in stop' in str(error)
        assert "exited with code 7" in str(error)
        assert "exit_codes=[0, 7]" in notes(error.__cause__ or error)

    def test_one_that_dies_fails_the_job(self, env: LocalEnvironment) -> None:
        command = env.register_command("plain", STAYS, ready=Line("up"))
        signals = [signal.SIGKILL]
        env.from_source(lambda: os.kill(command.pid, signals.pop()) if signals else None).sink(print)
        with pytest.raises(JobErrorGroup) as caught:
            env.submit(autostop=True)
        error = first(caught.value)
        assert 'service "plain" ended by itself' in str(error)
        assert "was ended by SIGKILL, its last line: up" in str(error)

    def test_one_that_dies_is_restarted_on_the_same_port_with_the_same_folder(self, env: LocalEnvironment) -> None:
        counts = script(
            """
            import os, signal, sys
            open(os.path.join(sys.argv[2], str(os.getpid())), "w").close()
            print("up", len(os.listdir(sys.argv[2])))
            signal.pause()
            """,
            "{port}",
            "{folder}",
        )
        options = ServiceOptions(restart="on_failure", backoff_s=(0.01, 0.01))
        command = env.register_command("counts", counts, ready=Line("up"), options=options)

        def kill(_: int) -> Any:
            before, pid = command.port, command.pid
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: command.pid != pid)
            return before == command.port, command.output(), command.folder

        results, report = run(env, kill)
        ((is_same, output, folder),) = results
        assert is_same
        assert output == ("up 2",)
        assert report.service("counts").restarts == 1
        assert report.state is Outcome.COMPLETED
        assert not Path(folder).exists()

    def test_one_that_is_not_healthy_is_restarted(self, env: LocalEnvironment, tmp_path: Path) -> None:
        asked: list[int] = []

        def is_well(command: RunningCommand) -> bool:
            asked.append(command.pid)
            return command.pid != asked[0]

        options = ServiceOptions(restart="on_failure", backoff_s=(0.01, 0.01), health_interval_s=0.02)
        command: Any = env.register_command("ill", STAYS, ready=Line("up"), health=is_well, options=options)
        results, report = run(env, lambda _: wait_for(lambda: len(set(asked)) == 2))
        assert results == [None]
        assert report.service("ill").restarts == 1
        assert command._name == "ill"


BINDS_LATE = script("""
    import pathlib, select, signal, socket, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    port, sign, stays = int(sys.argv[1]), pathlib.Path(sys.argv[2] + sys.argv[1]), sys.argv[3] == "stays"
    while not sign.exists():
        select.select([], [], [], 0.005)
    try:
        server = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        print(error, flush=True)
        if not stays:
            sys.exit(1)
        signal.pause()
    while True:
        server.accept()[0].close()
""")


SOON = ServiceOptions(start_timeout_s=20.0)


class TestAPortThatIsTaken:
    """Between the choice of a port and its use by the command, any program of the machine may take it."""

    class Taker:
        """Takes the port of a command in the last moment, as often as it is told to."""

        def __init__(self, sign: Path, times: int) -> None:
            self.sign, self.times = str(sign), times
            self.answers = False
            self.taken: list[socket.socket] = []

        def is_ready(self, command: RunningCommand) -> bool:
            assert command.port is not None
            if len(self.taken) < self.times and command.port not in self.ports:
                self.taken.append(socket.create_server(("127.0.0.1", command.port)))
                Path(f"{self.sign}{command.port}").touch()
                return self.answers
            Path(f"{self.sign}{command.port}").touch()
            with socket.create_connection(("127.0.0.1", command.port), timeout=5):
                return self.answers or command.port not in self.ports

        @property
        def ports(self) -> list[int]:
            return [server.getsockname()[1] for server in self.taken]

    @pytest.fixture
    def taker(self, tmp_path: Path) -> Iterator[Callable[[int], Taker]]:
        made: list[TestAPortThatIsTaken.Taker] = []

        def make(times: int) -> TestAPortThatIsTaken.Taker:
            made.append(self.Taker(tmp_path / "sign", times))
            return made[-1]

        yield make
        for taker in made:
            for server in taker.taken:
                server.close()

    def test_the_command_is_started_with_another(
        self, env: LocalEnvironment, taker: Callable[[int], Taker], tmp_path: Path
    ) -> None:
        takes = taker(2)
        words = [*BINDS_LATE, "{port}", takes.sign, "ends"]
        command = env.register_command("late", words, ready=takes.is_ready, options=SOON)
        (found,), report = run(env, lambda _: (command.port, command.url, command.words[-3]))
        assert len(takes.ports) == 2
        assert found[0] not in takes.ports
        assert found == (found[0], f"http://127.0.0.1:{found[0]}", str(found[0]))
        assert (report.cleanliness, report.service("late").restarts) == (Cleanliness.CLEAN, 0)
        assert report.service("late").exit_code == 0

    def test_whoever_has_taken_it_does_not_answer_for_the_command(
        self, env: LocalEnvironment, taker: Callable[[int], Taker]
    ) -> None:
        takes = taker(1)
        takes.answers = True
        words = [*BINDS_LATE, "{port}", takes.sign, "ends"]
        command = env.register_command("late", words, ready=takes.is_ready, options=SOON)
        (port,), report = run(env, lambda _: command.port)
        assert port not in takes.ports
        assert (report.state, report.cleanliness) == (Outcome.COMPLETED, Cleanliness.CLEAN)

    def test_a_command_whose_port_another_program_opens_for_it_gets_ready(
        self, env: LocalEnvironment, taker: Callable[[int], Taker]
    ) -> None:
        """As for a container, whose port belongs to the container engine."""
        takes = taker(1)
        takes.answers = True
        words = [*BINDS_LATE, "{port}", takes.sign, "stays"]
        command = env.register_command("late", words, ready=takes.is_ready, options=SOON)
        (port,), report = run(env, lambda _: command.port)
        assert [port] == takes.ports
        assert (report.state, report.cleanliness) == (Outcome.COMPLETED, Cleanliness.CLEAN)

    def test_two_commands_of_one_program_never_choose_the_same(self) -> None:
        command = Command("any", ("any", "{port}"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        first = choose_ports("first", command, {"": port})
        second = choose_ports("second", command, {"": port})
        release(first)
        third = choose_ports("third", command, {"": port})
        release(second)
        release(third)
        assert first == third == {"": port}
        assert second[""] != port

    def test_it_is_not_tried_for_ever(self, env: LocalEnvironment, taker: Callable[[int], Taker]) -> None:
        takes = taker(100)
        env.register_command("late", [*BINDS_LATE, "{port}", takes.sign, "ends"], ready=takes.is_ready, options=SOON)
        error = failure(env, ServiceStartError)
        assert "exited with code 1" in str(error)
        assert f"Port {takes.ports[-1]}, which was free, was taken by another program before" in cause_notes(error)
        assert len(takes.ports) == 3

    def test_a_fixed_port_is_named_and_not_changed(self, env: LocalEnvironment, taker: Callable[[int], Taker]) -> None:
        takes = taker(100)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words = [*BINDS_LATE, "{port}", takes.sign, "ends"]
        env.register_command("late", words, ready=takes.is_ready, port=port, options=SOON)
        error = failure(env, ServiceStartError)
        assert f"Port {port}, which was free, was taken by another program before" in cause_notes(error)
        assert takes.ports == [port]

    def test_one_that_goes_on_without_its_port_is_told_so(
        self, env: LocalEnvironment, taker: Callable[[int], Taker]
    ) -> None:
        takes = taker(1)
        options = ServiceOptions(start_timeout_s=1.0)
        words = [*BINDS_LATE, "{port}", takes.sign, "stays"]
        env.register_command("late", words, ready=takes.is_ready, options=options)
        error = failure(env, ServiceStartError)
        assert f"port {takes.ports[0]} belongs to another program" in str(error)

    def test_a_command_that_ends_for_another_reason_is_not_started_again(
        self, env: LocalEnvironment, tmp_path: Path
    ) -> None:
        words = script("open(__import__('sys').argv[2], 'a').write('x'); raise SystemExit(1)", "{port}")
        env.register_command("ends", [*words, str(tmp_path / "starts")], ready=Port())
        assert "exited with code 1" in str(failure(env, ServiceStartError))
        assert (tmp_path / "starts").read_text() == "x"


DRIVER = """
    import signal, sys, threading
    from sage import Line, LocalEnvironment

    SERVES = '''
    import signal, subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
    def end(*_):
        open(sys.argv[1], "w").write("asked")
        sys.exit(0)
    signal.signal(signal.SIGINT, end)
    print("up", child.pid, flush=True)
    signal.pause()
    '''

    import textwrap
    code = textwrap.dedent(SERVES).replace("{", "{{").replace("}", "}}")
    env = LocalEnvironment("nightly")
    command = env.register_command(
        "serves", [sys.executable, "-c", code, sys.argv[1] + "/mark", "{folder}"],
        ready=Line("up"), stop_signal=signal.SIGINT,
    )

    def tell(_):
        print("up", command.pid, command.output()[0].split()[1], command.folder, flush=True)
        threading.Event().wait()

    env.from_batch([1]).sink(tell)
    env.submit(autostop=True)
"""


def test_the_guardian_ends_a_command_whose_driver_was_killed(tmp_path: Path) -> None:
    """By its own stop signal, with its children and its folder, and the report says so."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "program.py").write_text(textwrap.dedent(DRIVER))
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "TMPDIR": str(tmp_path / "temporary"),
        "SAGE_STATE_DIR": str(tmp_path / "state"),
    }
    words = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        up, pid, child, folder = program.stdout.readline().split()
        assert up == "up"
        program.kill()
    reports = tmp_path / "state" / "reports"
    wait_for(
        lambda: reports.exists() and list(reports.iterdir()) and not list((tmp_path / "temporary").glob("sage-*/*"))
    )
    assert gone(int(pid))
    assert gone(int(child))
    assert not Path(folder).exists()
    assert (tmp_path / "mark").read_text() == "asked"
    (path,) = reports.iterdir()
    report = json.loads(path.read_text())
    assert report["state"] == "lost"
    assert [(service["name"], service["state"]) for service in report["services"]] == [("serves", "stopped")]
