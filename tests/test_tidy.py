"""Read the source tree and fail on what breaks the rules of the house."""

import ast
import functools
import io
import re
import subprocess
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SAGE = ROOT / "src" / "sage"
SOURCES = sorted(SAGE.rglob("*.py"))
FOLDERS = ("tests", "examples", "benchmarks")
PROGRAMS = SOURCES + [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]

FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 600

# The tables of exceptions, each with its reason. A place is a file or a folder under src/sage.
BROAD_HANDLERS = {
    "_logs.py": "a log handler raised: it is told on standard error, and the others get their records",
    "_cassette.py": "what cannot be pickled is left out, and the end of pieces is an exception as well",
    "_sizes.py": "a class of the user's that fails when it is looked at has a size all the same",
    "connectors/json_lines.py": "a value that cannot be pickled raises whatever its own code does",
    "_control/program.py": "the top of the command line: what a program raised decides about the exit code",
    "_operators/asynchronous.py": "a user's coroutine raised: the policy of the operator decides",
    "_operators/awaited.py": "a source that awaits raised: the records before it go on first",
    "_operators/batched.py": "a user's function raised: the policy of the operator decides",
    "_operators/fused.py": "a user's function raised: the operator that called it decides",
    "_operators/operator.py": "a user's function raised: the policy of the operator decides",
    "_operators/sources.py": "a source raised: the records before it go on first",
    "_runtime/durable_task.py": "a record that cannot be pickled raises whatever its own code does",
    "_backends/threads.py": "a bug in the supervision must not leave anyone waiting",
    "testing.py": "a bug that a stand-in meets is raised where the job is waited for",
    "_remote/process.py": "without a driver, only the guardian hears what hooks raise",
    "_remote/rpc.py": "whoever asked over a link owns what was raised for it",
    "_hosts/process.py": "whatever cannot be pickled is told by its name",
    "_hosts/call_threads.py": "the caller of a service owns what its call raised, through the future",
    "_hosts/gated.py": "the lifecycle of a service owns what its hooks raise",
    "_hosts/instance.py": "a cleanup that raised does not keep what was deferred from being called",
    "_hosts/inline.py": "a constructor that returned too late is cleaned up, and the log is the only place for errors",
    "_hosts/probe.py": "what a callable raises while its command is not ready is its answer",
    "_hosts/shared.py": "values that cannot be compared are not the same",
    "_guardian/after_driver_death.py": "whatever goes wrong with asking for an end, the killing comes after it",
    "_ray/driver.py": "a job that could not be started has ended, with what was raised as its error",
    "_ray/parcels.py": "a record that cannot be pickled raises whatever its own code does",
    "_remote/errors.py": "an error that cannot be pickled, or rebuilt, goes as its text",
    "_ray/hosts.py": "the lifecycle of a service owns what its hooks raise",
    "_ray/links.py": "whoever had several things done side by side gets all of their errors",
    "_ray/shipping.py": "whatever cannot be pickled is told by its name",
    "_ray/site.py": "without a master, only the log hears what hooks raise",
    "_ray/streams.py": "the job fails by what another process could not take in",
    "_runtime/job.py": "a handler of the program raised, after which the job ends first; or whoever awaits it owns it",
    "_runtime/manager.py": "what is left to do at the interpreter's exit is done, whatever the rest of it raised",
    "_runtime/partition.py": "a key raised when it was asked for its hash: the error names who gave it",
    "_runtime/task.py": "a task owns whatever its operators raise",
    "services/models/endpoint.py": "a client that cannot be made because of a proxy is told without its password",
    "services/models/tools.py": "a model that asked for a tool hears of the tool's error in the place of a result",
    "service.py": "a deferred callback that raised does not keep the others from being called",
    "environment.py": "the error that ended a with block must not be hidden by the end of the job",
    "errors.py": "a value whose repr or str raises must not hide the error that names it",
}
LONG_FILES = {
    "stream.py": "one signature of each method for each form that a function may have, for type checkers",
    "environment.py": "the same for its sources",
}
PRINTING = {
    "_compositions.py": "the print sink",
    "_legacy/operators.py": "a sink for terminals",
    "_control/supervisor.py": "a command that begins without what the others need",
}
OLD_WORDS = {
    "BaseCoMapFunction": "SAGE programs import it",
    "BaseFunction": "SAGE programs import it",
    "BaseJoinFunction": "SAGE programs import it",
    "BaseService": "SAGE programs import it",
    "Message": "the protocol of every model server calls it so",
    "items": "the protocol of mappings",
    "register_service_factory": "SAGE programs call it",
}
OLD_WORD_MODULES = {"_legacy": "the import paths of SAGE programs"}

FORBIDDEN_WORD = re.compile(
    "(?:packet|message|item|transformation|vertex|executor|engine|wrapper|handler|helper|util|info"
    "|factory|impl|base|common|misc)s?"
)
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
REGISTRY = re.compile(r"\b(?:pypi|pythonhosted|npmjs|yarnpkg)\.(?:com|io|org)\b|--(extra-)?index-url\b")
# A checkout right under the root has a name, such as /build, that can mean something else.
HERE = rf"|{re.escape(str(ROOT))}\b" if len(ROOT.parts) > 2 else ""
MACHINE_PATH = re.compile(rf"(?<![\w.$}}])(?:/(?:home|root|mnt|Users)/\w{HERE})")
PRAGMA = re.compile(r"!|(?:noqa|type:|pragma:|fmt:|ruff:|mypy:)")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def nodes(paths: Iterable[Path]) -> Iterator[tuple[Path, ast.AST]]:
    return ((path, node) for path in paths for node in ast.walk(parse(path)))


def inside(path: Path, places: Iterable[str]) -> bool:
    name = path.relative_to(SAGE).as_posix()
    return any(name == place or name.startswith(f"{place}/") for place in places)


def complaint(path: Path, at: ast.AST | int, text: str) -> str:
    line = at if isinstance(at, int) else getattr(at, "lineno", 1)
    return f"{path.relative_to(ROOT).as_posix()}:{line}: {text}"


def last_name(node: ast.expr) -> str:
    return ast.unparse(node).split(".")[-1]


def expect_none(complaints: Iterable[str]) -> None:
    found = list(complaints)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_the_source_is_found() -> None:
    assert SOURCES or not SAGE.exists()


def test_ambient_state_of_threads_and_coroutines_stands_in_one_file() -> None:
    kinds = ("threading.local", "ContextVar(")
    texts = {path.relative_to(SAGE).as_posix(): path.read_text("utf-8") for path in SOURCES}
    assert {name for name, text in texts.items() for kind in kinds if kind in text} == {"_current_job.py"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, modules: set[str]) -> set[str]:
    """Return the modules that a file imports anywhere: at its top, for its types, or in a function."""
    found: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= modules else {node.module, *names}
    return found & modules


def test_no_modules_import_each_other_in_a_circle() -> None:
    """The layers say so for packages; here it holds for each module, also for imports of types."""
    modules = {module_name(path): path for path in SOURCES}
    graph = {name: imported(path, {*modules}) - {name} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])), pytrace=False)


def test_functions_are_short() -> None:
    expect_none(
        complaint(path, node, f"{node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}")
        for path, node in nodes(SOURCES)
        if isinstance(node, Function)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    )


def test_files_are_short() -> None:
    expect_none(
        complaint(path, lines, f"the file has {lines} lines, at most {FILE_LINES_MAX}")
        for path in SOURCES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > FILE_LINES_MAX
        and not inside(path, LONG_FILES)
    )


def sleeps(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(value=ast.Name(id="time"), attr="sleep"):
            return True
        case ast.ImportFrom(module="time", names=names):
            return any(alias.name == "sleep" for alias in names)
    return False


def test_nothing_sleeps() -> None:
    expect_none(
        complaint(path, node, "time.sleep; wait for the condition instead")
        for path, node in nodes(SOURCES)
        if sleeps(node)
    )


def prints(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="print")):
            return True
    return False


def test_nothing_prints() -> None:
    expect_none(
        complaint(path, node, "print; log it, or name the file in PRINTING")
        for path, node in nodes(SOURCES)
        if prints(node) and not inside(path, PRINTING)
    )


def catches_all(node: ast.AST) -> bool:
    match node:
        case ast.ExceptHandler(body=[*_, ast.Raise()]):
            return False  # it only adds something on the way
        case ast.ExceptHandler(type=None):
            return True
        case ast.ExceptHandler(type=ast.Tuple(elts=caught)):
            pass
        case ast.ExceptHandler(type=ast.expr() as kind):
            caught = [kind]
        case ast.Call(func=function, args=caught) if last_name(function) == "suppress":
            pass
        case _:
            return False
    return any(last_name(kind) in {"Exception", "BaseException"} for kind in caught)


def test_broad_handlers_stand_where_a_failure_is_owned() -> None:
    expect_none(
        complaint(path, node, "broad except; the file is not in BROAD_HANDLERS")
        for path, node in nodes(SOURCES)
        if catches_all(node) and not inside(path, BROAD_HANDLERS)
    )


@pytest.mark.skipif(not SOURCES, reason="there is no source yet")
@pytest.mark.parametrize(("table", "needs"), [(BROAD_HANDLERS, catches_all), (PRINTING, prints)])
def test_the_tables_hold_only_what_is_needed(table: dict[str, str], needs: Callable[[ast.AST], bool]) -> None:
    paths = {path for path, node in nodes(SOURCES) if needs(node)}
    unused = [place for place in table if not any(inside(path, [place]) for path in paths)]
    assert not unused


def test_nothing_is_left_unfinished() -> None:
    expect_none(
        complaint(path, number, match.group())
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := UNFINISHED.search(line))
    )


def comment_blocks(path: Path) -> Iterator[list[tuple[int, str]]]:
    """Yield runs of comments on neighbouring lines, as pairs of line number and text."""
    with io.StringIO(path.read_text(encoding="utf-8")) as lines:
        comments = [
            (token.start[0], token.string.lstrip("#"))
            for token in tokenize.generate_tokens(lines.readline)
            if token.type == tokenize.COMMENT and not PRAGMA.match(token.string.lstrip("# "))
        ]
    for _, block in groupby(enumerate(comments), lambda pair: pair[1][0] - pair[0]):
        yield [comment for _, comment in block]


def statements(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(textwrap.dedent(text)).body
    except SyntaxError:
        return []


def is_code(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(value=ast.Call() | ast.Await(value=ast.Call())):
            return True
        case ast.Expr() | ast.AnnAssign(value=None):
            return False
    return True


def commented_out(block: list[tuple[int, str]]) -> int | None:
    """Return the line of the first comment that is a statement of Python.

    A sentence that is wrapped can have a line such as "return early", so that one line of a longer
    block counts only for the statements that no prose looks like.
    """
    if any(map(is_code, statements("\n".join(text for _, text in block)))):
        return block[0][0]
    unlike_prose = ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Expr | ast.ImportFrom
    for number, text in block:
        if any(is_code(found) and isinstance(found, unlike_prose) for found in statements(text)):
            return number
    return None


def test_no_code_is_commented_out() -> None:
    expect_none(
        complaint(path, line, "commented-out code")
        for path in PROGRAMS
        for block in comment_blocks(path)
        if (line := commented_out(block)) is not None
    )


def forbidden_word(name: str) -> str | None:
    words = (word.lower() for word in WORD.findall(name))
    return next(filter(FORBIDDEN_WORD.fullmatch, words), None)


def test_files_have_the_words_of_the_house() -> None:
    expect_none(
        complaint(path, 1, f'the name has the forbidden word "{word}"')
        for path in SOURCES
        for part in path.relative_to(SAGE).with_suffix("").parts
        if (word := forbidden_word(part))
    )


def test_names_have_the_words_of_the_house() -> None:
    expect_none(
        complaint(path, node, f'{node.name} has the forbidden word "{word}"')
        for path, node in nodes(SOURCES)
        if isinstance(node, Function | ast.ClassDef) and not inside(path, OLD_WORD_MODULES)
        if node.name not in OLD_WORDS and (word := forbidden_word(node.name))
    )


def public_definitions(node: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    for child in node.body:
        if not isinstance(child, Function | ast.ClassDef) or child.name.startswith("_"):
            continue
        decorators = {last_name(decorator) for decorator in child.decorator_list}
        if not decorators & {"overload", "override", "setter", "deleter"}:
            yield child
        if isinstance(child, ast.ClassDef):
            yield from public_definitions(child)


def test_modules_have_docstrings() -> None:
    expect_none(
        complaint(path, 1, "the module has no docstring")
        for path in SOURCES
        if parse(path).body and not ast.get_docstring(parse(path))
    )


def test_public_names_have_docstrings() -> None:
    expect_none(
        complaint(path, node, f"{node.name} has no docstring")
        for path in SOURCES
        if not any(re.match("_(?!_)", part) for part in path.relative_to(SAGE).parts)
        for node in public_definitions(parse(path))
        if not ast.get_docstring(node)
    )


def test_files_name_no_machine_and_no_registry() -> None:
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    expect_none(
        complaint(path, number, f"names a machine's path or a registry: {match.group()}")
        for name in filter(None, listing.stdout.split("\0"))
        if (path := ROOT / name).is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if (match := REGISTRY.search(line) or MACHINE_PATH.search(line))
    )


def test_locked_requirements_name_no_address() -> None:
    expect_none(
        complaint(path, number, line)
        for path in sorted((ROOT / "requirements").glob("*.txt"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "://" in line or line.startswith("-")
    )
