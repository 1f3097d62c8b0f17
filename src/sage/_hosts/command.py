"""External commands as services: a process of their own, which is started, watched and ended."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from sage._hosts.child_process import ChildProcess
from sage._hosts.gated import GatedHost
from sage._hosts.output import Output
from sage._hosts.ports import choose_ports, held_by_others, in_use, release
from sage._hosts.probe import why_not
from sage._logs import log_of
from sage._processes import Process, in_session, is_alive, is_ending, process, send
from sage._runtime.backend import HostFacts
from sage._runtime.lifecycle import Exit
from sage.command import ADDRESS, Line, RunningCommand, filled, own_value
from sage.errors import ServiceError, UnknownServiceError, hint, short
from sage.service import ServiceMethod

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sage._plan.logical import ServiceSpec
    from sage._runtime.backend import HostSurroundings
    from sage.command import Command, Word
    from sage.service import ServiceContext

log = log_of("sage.dispatcher")

LINES_KEPT_MAX = 50

CATCH_UP_BOUND_S = 2.0
"""How long it may take to read a command's last output; a log handler may be slow."""

ANSWER_SHARE = 0.9
"""The largest share of its time for one try of `Http` or `Port`, so that it can still name the reason."""

STARTS_MAX = 3
"""How often a command is started in all, if another program takes its port each time before it can."""

DOUBTS_MAX = 20
"""How often a probe is made again while another program has the command's port, before that is taken to be meant so."""

SIGNALLED = 128
"""Added by a shell to the number of the signal that ended a program."""


class CommandHost(GatedHost):
    """Runs one command."""

    def __init__(self, spec: ServiceSpec, context: ServiceContext, surroundings: HostSurroundings) -> None:
        super().__init__(spec, context, surroundings)
        assert spec.command is not None
        self._command: Command = spec.command
        self._running: RunningCommand | None = None
        self._child: CommandProcess | None = None
        self._folder: str | None = None
        self._lock = threading.Lock()
        self._is_kept = False
        self._given_up = 0  # the last incarnation that must not be started any more
        self._unready = ""
        self._ports_lost = 0
        self._doubts_count = 0
        self._chosen: dict[str, int] = {}
        self._address = surroundings.address if self._command.wants("host") else ADDRESS

    @property
    def hooks(self) -> frozenset[str]:
        polled = {"ready": self._command.ready, "health": self._command.health}
        return frozenset({"stop", "exit", *(hook for hook, probe in polled.items() if probe is not None)})

    @property
    def own_hooks(self) -> frozenset[str]:
        """The names of the hooks that every command has."""
        return frozenset({"exit"})

    @property
    def local_hooks(self) -> frozenset[str]:
        """The probes that run in this process; one that hangs is not ended with the command."""
        return frozenset({"ready", "health"})

    def facts(self) -> HostFacts:
        child = self._child
        if child is None:
            return HostFacts("command")
        return HostFacts("command", child.own.pid, child.own.exit_code, child.lines(), self._unready)

    def adopt(self, context: ServiceContext, surroundings: HostSurroundings) -> None:
        super().adopt(context, surroundings)
        with self._lock:
            self._is_kept = False
            self._given_up = 0
            child = self._child
            assert child is not None
            child.incarnation = 1
            is_dead = child.is_over
        if is_dead:
            surroundings.on_died(1, self._how_it_ended(child))

    def release(self) -> None:
        """Free the thread of a command that is kept; its process goes on, and its output is still read."""
        with self._lock:
            self._is_kept = True
        super().release()

    def close(self) -> None:
        """Free the threads, and remove the private folder, which outlives a restart."""
        super().close()
        if self._folder is not None:
            try:
                shutil.rmtree(self._folder)
            except OSError as error:
                log.error("folder cannot be removed service=%r folder=%s error=%s", self.spec.name, self._folder, error)

    def hurry(self, due: float) -> None:
        if self._child is not None:
            self._child.own.hurry(self._left(due))

    @property
    def _is_there(self) -> bool:
        return self._running is not None

    def _attribute(self, name: str) -> object:
        try:
            return getattr(self._running, name)
        except AttributeError:
            error = UnknownServiceError(f'service "{self.spec.name}" is a command and has no "{name}"')
            raise hint(error, "A command has url, port, ports, pid, folder, words and output().") from None

    # --- start ---

    def _build(self) -> frozenset[str]:
        self._unready = ""
        self._ports_lost = 0
        earlier = self._running.ports if self._running is not None else {}
        self._launch(choose_ports(self.spec.name, self._command, earlier, self._address))
        return self.hooks

    def _launch(self, ports: dict[str, int]) -> None:
        incarnation = self._incarnation
        self._chosen = ports
        self._doubts_count = 0
        cookie = self._around.process_guard.announce(self.spec.name, incarnation, "command", self.spec.requires)
        self._make_folder()
        child = CommandProcess(self.spec.name, self._command, incarnation, cookie)
        running = RunningCommand(self.spec.name, ports, self._folder, child.lines, self._address)
        running.words = tuple(self._filled(word, running) for word in self._command.words)
        running.url = self._url(running)
        environment = {name: self._filled(value, running) for name, value in self._command.environment}
        cwd = None if self._command.cwd is None else filled(self._command.cwd, ports, self._folder, self._address)
        with self._lock:
            if incarnation <= self._given_up:
                raise ServiceError(f'service "{self.spec.name}" was given up before command {self._label} was started')
            child.start(running.words, environment, cwd, self._on_end)
            self._child = child
        running.pid = child.own.pid
        self._running = running
        stop_signal = int(self._command.stop_signal)
        self._around.process_guard.started(self.spec.name, incarnation, running.pid, stop_signal=stop_signal)
        log.info("command started service=%r pid=%d words=%s", self.spec.name, running.pid, short(running.words))
        if self._command.ready is None:
            self._is_up(child)

    def _launch_again(self, child: CommandProcess) -> None:
        """Start a command that has ended before it was ready once more, if another program has taken its port.

        Raises:
            ServiceError: there is another reason, or it has happened too often.
        """
        assert self._running is not None
        lost = in_use(self._address, self._running.ports.values())
        if not lost or self._left_of(child):
            self._is_up(child)
        self._ports_lost += 1
        if self._ports_lost == STARTS_MAX or self._command.port in lost:
            error = ServiceError(self._how_it_ended(child), service=self.spec.name, fault="external")
            text = f"Port {lost[0]}, which was free, was taken by another program before the command could use it"
            raise hint(error, f"{text}, {STARTS_MAX} times." if self._ports_lost == STARTS_MAX else f"{text}.")
        log.warning("port of command was taken, starting it again service=%r port=%d", self.spec.name, lost[0])
        child.output.close()
        release(self._chosen)
        self._launch(choose_ports(self.spec.name, self._command, {}, self._address))

    def _make_folder(self) -> None:
        if self._folder is not None or not self._command.wants("folder"):
            return
        name = re.sub(r"\W+", "-", self.spec.name)[:32]
        folder = os.path.join(self._around.process_guard.folder, f"{name}-{secrets.token_hex(4)}")
        os.mkdir(folder, 0o700)
        self._folder = folder

    def _filled(self, word: Word, running: RunningCommand) -> str:
        text = own_value(word)
        return text if isinstance(word, ServiceMethod) else filled(text, running.ports, running.folder, running.host)

    def _url(self, running: RunningCommand) -> str | None:
        if self._command.url is not None:
            return filled(self._command.url, running.ports, running.folder, running.host)
        return None if running.port is None else f"http://{running.host}:{running.port}"

    def _is_up(self, child: CommandProcess) -> None:
        """Take a command as ready; from here on its end is a death.

        Raises:
            ServiceError: it has ended before.
        """
        with self._lock:
            if not child.is_over:
                child.is_up = True
                release(self._chosen)
                return
        error = ServiceError(self._how_it_ended(child), service=self.spec.name)
        if child.own.exit_code == 0:
            hint(error, "A service stays in the foreground; this command may have put itself into the background.")
        raise error

    # --- hooks ---

    def _run_hook(self, hook: str, due: float | None) -> object:
        child = self._child
        match hook:
            case "exit":
                return self._exit(due)
            case "stop":
                assert child is not None
                self._stop(child)
            case "ready":
                assert child is not None
                self._unready = ""  # nobody knows why, until this try has an answer
                if not child.is_over:
                    self._unready = self._why_not(self._command.ready, child, due) or ""
                if child.is_over:  # whoever has taken its port may answer in its place
                    self._launch_again(child)
                    return False
                if not self._unready and not self._is_doubtful(child):
                    self._is_up(child)
                    return True
                return False
            case "health":
                assert child is not None
                why = self._why_not(self._command.health, child, due)
                if why is None:
                    return True
                if is_ending(child.process):
                    child.own.wait_ended()  # until its death was told, which is the better reason
                raise ServiceError(why, service=self.spec.name)
        return None

    def _is_doubtful(self, child: CommandProcess) -> bool:
        """Return whether another program may have answered; a command that has lost its port to it gets time to end."""
        assert self._running is not None
        ports = self._running.ports.values()
        if self._doubts_count == DOUBTS_MAX or not ports or not held_by_others(ports, self._left_of(child)):
            return False
        self._doubts_count += 1
        return True

    def _why_not(self, probe: object, child: CommandProcess, due: float | None) -> str | None:
        assert self._running is not None
        timeout_s = self._left(due) * ANSWER_SHARE
        return why_not(probe, self._running, child.has_line, timeout_s, self._around.loop.run)

    def _stop(self, child: CommandProcess) -> None:
        """Ask the command to end and wait for that; whoever gives it up has the process killed."""
        if is_ending(child.process):  # by itself; clients with a connection to it may have noticed first
            child.own.wait_ended()  # until its death was reported, which is the real cause
        with self._lock:
            child.is_ending = child.was_told = True
        self._tell(child)
        child.over.wait()
        code, number = child.own.exit_code, int(self._command.stop_signal)
        if code is None:
            raise ServiceError(self._how_it_ended(child), service=self.spec.name, fault="external")
        if code not in self._command.exit_codes | {-number, SIGNALLED + number}:
            error = ServiceError(self._how_it_ended(child, " when it was told to stop"), service=self.spec.name)
            raise hint(error, f"If this exit code is fine, list it: exit_codes=[0, {code}].")

    def _exit(self, due: float | None) -> Exit | None:
        with self._lock:
            self._given_up = self._incarnation
            release(self._chosen)
            child = self._child
            if child is None or child.incarnation != self._incarnation:
                return None  # it could not be started
            child.is_ending = True
            was_told, child.was_told = child.was_told, True
        if self._unready and self._running is not None:
            for port in held_by_others(self._running.ports.values(), self._left_of(child)):
                self._unready += f"; port {port} belongs to another program"
        try:
            # A command that was asked before has had its time, and so have its leftovers.
            left_s = 0.0 if was_told and not child.is_over else self._left(due)
            end = child.own.end(lambda: self._tell(child), lambda _, known: self._left_of(child, known), left_s)
            return replace(end, unknown="") if was_told else end  # its stop has said so
        finally:
            child.output.close()
            self._around.process_guard.ended(self.spec.name, child.incarnation)

    def _tell(self, child: CommandProcess) -> None:
        send(child.process, self._command.stop_signal, signal.SIGCONT)

    def _left_of(self, child: CommandProcess, known: Iterable[Process] = ()) -> set[Process]:
        """Return its running processes, including those that discarded their environment but stayed in its session."""
        found = self._around.process_guard.left_of(child.cookie, known) | in_session(child.process)
        return found | ({child.process} if is_alive(child.process) else set())

    def _clean_late(self) -> None:
        """Do nothing: "exit" has seen to the process, or has kept it from being started."""

    # --- behind it ---

    def _on_end(self, child: CommandProcess) -> None:
        """Take in that the process has ended; the thread that waits for it calls this."""
        child.output.catch_up(CATCH_UP_BOUND_S)
        with self._lock:
            child.over.set()
            died = child.is_up and not child.is_ending and not self._is_kept
            tell, incarnation = self._around.on_died, child.incarnation
        if died:
            self.hold()  # until the lifecycle has decided about the service
            tell(incarnation, self._how_it_ended(child))

    def _how_it_ended(self, child: CommandProcess, when: str = "") -> str:
        last = child.lines()[-1:]
        how = f"command {self._label}: {child.own.how_it_ended()}{when}"
        return f"{how}, its last line: {last[0]}" if last else how

    @property
    def _label(self) -> str:
        return self._command.label


class CommandProcess:
    """The process of one incarnation, and the facts about it.

    Attributes:
        incarnation: which one.
        cookie: by which it and its descendants are found.
        own: the process with everything that comes from it.
        process: the process itself.
        output: reads its output.
        over: set when it has ended and its output was read.
        has_line: whether the line was seen that shows that it is ready.
        is_up: whether it was ready, so that its end is a death.
        is_ending: whether it is being ended.
        was_told: whether it was asked to end.
    """

    own: ChildProcess
    process: Process
    output: Output

    def __init__(self, name: str, command: Command, incarnation: int, cookie: str) -> None:
        self.incarnation = incarnation
        self.cookie = cookie
        self.over = threading.Event()
        self.has_line = False
        self.is_up = False
        self.is_ending = False
        self.was_told = False
        self._name = name
        self._label = command.label
        self._pattern = re.compile(command.ready.pattern) if isinstance(command.ready, Line) else None
        self._lines: deque[str] = deque(maxlen=LINES_KEPT_MAX)
        self._lock = threading.Lock()
        self._log = logging.getLogger(f"sage.service.{name}")

    @property
    def is_over(self) -> bool:
        """Whether it has ended and its output was read."""
        return self.over.is_set()

    def start(
        self,
        words: tuple[str, ...],
        environment: dict[str, str],
        cwd: str | None,
        on_end: Callable[[CommandProcess], None],
    ) -> None:
        """Start the process.

        Raises:
            ServiceError: the system refuses to.
        """
        # A Python program would keep its lines until its buffer is full.
        environment = {"PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1"), **environment}
        try:
            self._start(words, lambda: on_end(self), environment, cwd)
        except (OSError, ValueError) as error:
            text = f"command {self._label} cannot be started: {error}"
            raise ServiceError(text, service=self._name, fault="external") from error
        # Nobody waits for it yet, so that the pid is its own even if it has ended already.
        self.process = process(self.own.pid) or Process(self.own.pid, 0)
        self.own.watch()

    def _start(
        self, words: tuple[str, ...], on_end: Callable[[], None], environment: dict[str, str], cwd: str | None
    ) -> None:
        """Start the process behind whoever reads its output, as there may be no thread for that afterwards."""
        read_end, write_end = os.pipe()
        pipes: dict[str, object] = {"stdin": subprocess.DEVNULL, "stdout": write_end, "stderr": subprocess.STDOUT}
        try:
            self.output = Output(read_end, f"sage-output-{self._name}", self._take)
            try:
                self.own = ChildProcess(words, self.cookie, on_end, environment, cwd=cwd, **pipes)
            except BaseException:
                self.output.close()
                raise
        finally:
            os.close(write_end)

    def lines(self) -> tuple[str, ...]:
        """Return the last lines of its output."""
        with self._lock:
            return tuple(self._lines)

    def _take(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)
        if self._pattern is not None and not self.has_line and self._pattern.search(line):
            self.has_line = True
        self._log.info("%s", line)
