"""Commands as services: the registration, the probes, and the attributes that callers see."""

from __future__ import annotations

import os
import re
import shutil
import signal
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sage.errors import GraphError, ServiceError, hint, short
from sage.service import ServiceHandle, ServiceMethod

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sage.service import ServiceOptions

ADDRESS = "127.0.0.1"
PORT_MAX = 65_535

Word = str | os.PathLike[str] | ServiceMethod


@dataclass(frozen=True, slots=True)
class Http:
    """Ready when a GET is answered well. Redirects are not followed, and proxies are not asked.

    Attributes:
        url: may hold placeholders; one that begins with "/" is a path on the command's own port.
        status: the status that is good; None stands for every 2xx.
        timeout_s: bound of each part of one try, in seconds.
    """

    url: str
    status: int | None = None
    timeout_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Port:
    """Ready when the port takes connections; `name` is that of a `{port:name}`."""

    name: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """Ready when a line of the output matches: `pattern` is a regular expression that is searched in each."""

    pattern: str


class RunningCommand:
    """A running command, as callers and the callables that probe it see it.

    Attributes:
        name: the service's name.
        words: the command as it was started.
        host: the address of `{host}`; 127.0.0.1 if nothing asked for one.
        port: the port of `{port}`, or None if nothing asked for one.
        ports: the ports by name; that of `{port}` is under "".
        url: where it can be reached, or None if it has no port.
        pid: its process.
        folder: its private folder, or None if nothing asked for one.
    """

    def __init__(
        self,
        name: str,
        ports: Mapping[str, int],
        folder: str | None,
        output: Callable[[], tuple[str, ...]],
        host: str = ADDRESS,
    ) -> None:
        self.name = name
        self.host = host
        self.words: tuple[str, ...] = ()
        self.port: int | Any = ports.get("")  # hardly any program asks for neither, and has to expect None
        self.ports = dict(ports)
        self.url: str | Any = None
        self.pid = 0
        self.folder = folder
        self._output = output

    def output(self) -> tuple[str, ...]:
        """Return the last lines that it wrote, to standard output and standard error."""
        return self._output()

    def __repr__(self) -> str:
        return f"<RunningCommand {self.name!r} pid={self.pid} url={self.url}>"


Probe = Http | Port | Line
if TYPE_CHECKING:
    Ready = Probe | type[Port] | Callable[[RunningCommand], object]


@dataclass(frozen=True, slots=True)
class Command:
    """A command as it was registered; see `Environment.register_command`."""

    name: str
    words: tuple[Word, ...]
    ready: Ready | None = None
    health: Ready | None = None
    environment: tuple[tuple[str, Word], ...] = ()
    cwd: str | None = None
    port: int | None = None
    url: str | None = None
    stop_signal: int = signal.SIGTERM
    exit_codes: frozenset[int] = frozenset({0})

    @property
    def handles(self) -> tuple[ServiceMethod, ...]:
        """The values it takes from other services, on which it therefore depends."""
        words = (*self.words, *(value for _, value in self.environment))
        return tuple(word for word in words if isinstance(word, ServiceMethod))

    @property
    def label(self) -> str:
        """The program, for messages."""
        word = self.words[0]
        return short(word if isinstance(word, ServiceMethod) else os.fspath(word))

    @property
    def ports(self) -> tuple[str, ...]:
        """The names of the ports that it asks for; "" is that of `{port}`."""
        found = {spec: None for field, spec in self._placeholders() if field == "port"}
        if self.port is not None:
            found[""] = None
        for probe in (self.ready, self.health):
            if isinstance(probe, Http) and probe.url.startswith("/"):
                found[""] = None
        return tuple(found)

    def wants(self, placeholder: str) -> bool:
        """Return whether it asks for its private "folder", or for the "host" that it is to listen at."""
        return any(field == placeholder for field, _ in self._placeholders())

    def problem(self) -> GraphError | None:
        """Return why this machine cannot start it, or None; words with a placeholder are checked at the start."""
        word = self.words[0]
        if self.cwd is not None and not _has_placeholder(self.cwd) and not os.path.isdir(self.cwd):
            return GraphError(
                f'the folder {self.cwd!r} that command {self.label} of service "{self.name}" runs in is not there'
            )
        if isinstance(word, ServiceMethod) or _has_placeholder(str(word)) or _has_placeholder(self.cwd or ""):
            return None
        program = unescaped(str(word))
        if os.sep in program:
            path = os.path.join(self.cwd or os.curdir, program)
            if os.path.isfile(path) and not os.access(path, os.X_OK):
                error = GraphError(f'command {self.label} of service "{self.name}" is not executable')
                return hint(error, f"Call chmod +x {program}, or name the program that runs it first.")
            if os.path.isfile(path):
                return None
        elif shutil.which(program, path=str(dict(self.environment).get("PATH", os.environ.get("PATH", os.defpath)))):
            return None
        error = GraphError(f'command {self.label} of service "{self.name}" does not exist')
        return hint(error, "Install it, or give its full path." if os.sep not in program else "Its path is wrong.")

    def _placeholders(self) -> Iterator[tuple[str, str]]:
        for text in self._texts():
            yield from placeholders(text)

    def _texts(self) -> Iterator[str]:
        for word in (*self.words, *(value for _, value in self.environment), self.cwd, self.url):
            if word is not None and not isinstance(word, ServiceMethod):
                yield os.fspath(word)
        for probe in (self.ready, self.health):
            if isinstance(probe, Http):
                yield probe.url
            elif isinstance(probe, Port):
                yield f"{{port:{probe.name}}}"


def placeholders(text: str) -> Iterator[tuple[str, str]]:
    """Yield the placeholders of a text, each with the text after its colon.

    Raises:
        ValueError: a brace stands alone.
    """
    for _, field, spec, conversion in string.Formatter().parse(text):
        if field is not None:
            yield field + (f"!{conversion}" if conversion else ""), spec or ""


def filled(text: str, ports: Mapping[str, int], folder: str | None, host: str = ADDRESS) -> str:
    """Return a text with its placeholders filled."""
    parts = []
    for literal, field, spec, _ in string.Formatter().parse(text):
        parts.append(literal)
        if field == "port":
            parts.append(str(ports[spec or ""]))
        elif field == "folder":
            parts.append(folder or "")
        elif field == "host":
            parts.append(host)
    return "".join(parts)


def unescaped(text: str) -> str:
    """Return a text without placeholders as it is meant: a doubled brace is one."""
    return filled(text, {}, None)


def command_of(
    name: str,
    argv: Sequence[Word],
    ready: Ready | None,
    health: Ready | None,
    environment: Mapping[str, Word] | None,
    cwd: str | os.PathLike[str] | None,
    port: int | None,
    url: str | None,
    stop_signal: int,
    exit_codes: Iterable[int],
    options: ServiceOptions,
) -> Command:
    """Return the arguments of `Environment.register_command` as a value.

    Raises:
        GraphError: something in it can never work; the service and the command are named.
    """
    command = Command(
        name,
        _words_of(name, argv),
        Port() if ready is Port else ready,
        Port() if health is Port else health,
        _environment_of(name, environment),
        os.fspath(cwd) if isinstance(cwd, os.PathLike) else cwd,
        port,
        url,
        stop_signal,
        _exit_codes_of(name, exit_codes),
    )
    for problem in (_wrong_words, _wrong_settings, _wrong_placeholders, _wrong_probes):
        error = problem(command)
        if error is not None:
            raise error
    if options.host == "process":
        error = GraphError(f'service "{name}" is command {command.label}, and takes no host="process"')
        raise hint(error, "A command has a process of its own anyway; leave host out.")
    return command


def unknown_keyword(name: object, argv: object, unknown: Iterable[str], known: Iterable[str]) -> TypeError:
    """Return the error for keywords that are unknown."""
    words = ", ".join(f'"{key}"' for key in unknown)
    error = TypeError(f'register_command("{name}", {short(argv)}) has no keyword {words}')
    return hint(error, f"It has {', '.join(known)}.")


def own_value(word: Word) -> str:
    """Return a word as text, asking the service that it is taken of.

    Raises:
        ServiceError: the attribute of that service cannot be a word of a command.
    """
    if not isinstance(word, ServiceMethod):
        return os.fspath(word)
    value: object = word.resolve()
    if value is None or callable(value):
        raise ServiceError(f'"{word.__name__}" of service "{word.handle._name}" is {short(value)}, which is not a word')
    return str(value)


def _words_of(name: str, argv: Sequence[Word]) -> tuple[Word, ...]:
    if isinstance(argv, str | bytes):
        error = GraphError(f'the command of service "{name}" is {short(argv)}, a string and not a list of words')
        raise hint(error, f"Write {short(str(argv).split())}; no shell reads it.")
    try:
        words = tuple(argv)
    except TypeError:
        raise GraphError(f'the command of service "{name}" is {short(argv)}, not a list of words') from None
    if not words or words[0] == "":
        raise GraphError(f'the command of service "{name}" is empty')
    return words


def _environment_of(name: str, environment: object) -> tuple[tuple[str, Word], ...]:
    if environment is None:
        return ()
    if not hasattr(environment, "items"):
        raise GraphError(f'env of service "{name}" is {short(environment)}, not a mapping of names to strings')
    return tuple(environment.items())


def _exit_codes_of(name: str, codes: object) -> frozenset[int]:
    if isinstance(codes, str) or not hasattr(codes, "__iter__"):
        raise GraphError(f'exit_codes of service "{name}" is {short(codes)}, not a list of numbers')
    found = frozenset(codes)
    if not all(isinstance(code, int) for code in found):
        raise GraphError(f'exit_codes of service "{name}" is {short(codes)}, not a list of numbers')
    return found


def _wrong_words(command: Command) -> GraphError | None:
    for word in command.words:
        if not isinstance(word, str | os.PathLike | ServiceMethod):
            hinted = " Write handle.url, or another attribute." if isinstance(word, ServiceHandle) else ""
            error = GraphError(
                f'command {command.label} of service "{command.name}" has the word {short(word)}, '
                f"which is of type {type(word).__name__}"
            )
            return hint(error, f"Words are strings or paths.{hinted}")
        if not isinstance(word, ServiceMethod) and "\0" in os.fspath(word):
            return GraphError(f'command {command.label} of service "{command.name}" has a word with a null byte')
    variables: tuple[tuple[object, object], ...] = command.environment
    for key, value in variables:
        if not isinstance(key, str) or not isinstance(value, str | os.PathLike | ServiceMethod):
            return GraphError(
                f'env of service "{command.name}", command {command.label}, has {short(key)}: {short(value)}; '
                "names and values are strings"
            )
        if not key or "=" in key or "\0" in key:
            return GraphError(f'env of service "{command.name}", command {command.label}, has the name {key!r}')
    return None


def _wrong_settings(command: Command) -> GraphError | None:
    where = f'of service "{command.name}", command {command.label},'
    if command.cwd is not None and not isinstance(command.cwd, str):
        return GraphError(f"cwd {where} is {short(command.cwd)}, not a path")
    if command.url is not None and not isinstance(command.url, str):
        return GraphError(f"url {where} is {short(command.url)}, not a string")
    port: object = command.port
    if port is not None and (type(port) is not int or not 0 < port <= PORT_MAX):
        return GraphError(f"port {where} is {short(port)}, not a number from 1 to {PORT_MAX}")
    try:
        number = command.stop_signal
        stops = not isinstance(number, bool) and signal.Signals(number) not in (signal.SIGKILL, signal.SIGSTOP)
    except ValueError:
        stops = False
    if not stops:
        error = GraphError(f"stop_signal {where} is {short(command.stop_signal)}, which cannot ask for an end")
        return hint(error, "It is one like signal.SIGTERM or signal.SIGINT.")
    return None


def _wrong_placeholders(command: Command) -> GraphError | None:
    for text in command._texts():
        try:
            unknown = [
                field
                for field, spec in placeholders(text)
                if field not in ("port", "folder", "host") or (field != "port" and spec) or _has_placeholder(spec)
            ]
        except ValueError:
            unknown = [""]
        if unknown:
            what = f"the unknown placeholder {{{unknown[0]}}}" if unknown[0] else "a brace that stands alone"
            error = GraphError(f'command {command.label} of service "{command.name}" has {what} in {short(text)}')
            return hint(error, "They are {port}, {port:name}, {host} and {folder}; write {{ and }} for braces.")
    return None


def _wrong_probes(command: Command) -> GraphError | None:
    probes: dict[str, object] = {"ready": command.ready, "health": command.health}
    for key, probe in probes.items():
        where = f'{key} of service "{command.name}", command {command.label},'
        match probe:
            case None:
                pass
            case Http():
                url = filled(probe.url, dict.fromkeys(command.ports, 1), "")
                parts = urlsplit(url)
                if not url.startswith("/") and (parts.scheme not in ("http", "https") or not parts.hostname):
                    return GraphError(f"{where} asks {probe.url!r}, which is neither an http address nor a path")
            case Port():
                pass
            case Line() if key == "health":
                error = GraphError(f"{where} is a line, which can be seen only once")
                return hint(error, "Use Http, Port or a callable.")
            case Line():
                try:
                    re.compile(probe.pattern)
                except (re.error, TypeError) as wrong:
                    return GraphError(f"{where} has the pattern {short(probe.pattern)}: {wrong}")
            case _ if not callable(probe) or isinstance(probe, type):
                error = GraphError(f"{where} is {short(probe)}")
                return hint(error, "It is Http(url), Port(), Line(pattern) or a callable that takes the command.")
    return None


def _has_placeholder(text: str) -> bool:
    return any(True for _ in placeholders(text))


def refuse(name: str, commands: Iterable[Command]) -> None:
    """Refuse commands that this machine cannot start, with all that is missing in one error.

    Raises:
        GraphError: `name` is the environment that has them.
    """
    found = tuple(problem for command in commands if (problem := command.problem()) is not None)
    if len(found) == 1:
        raise found[0]
    if found:
        lines = "".join(f"\n  - {problem}" for problem in found)
        error = GraphError(f'{len(found)} problems in "{name}":{lines}', found)
        for note in (note for problem in found for note in getattr(problem, "__notes__", ())):
            hint(error, note)
        raise error
