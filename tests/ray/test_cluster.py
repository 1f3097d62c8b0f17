"""Which Ray a program uses, who else can, and what is left of it."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.ray_nodes import GivenCluster, known

from sage import AuthenticationError, JobError, ServerUnreachableError
from sage._control import doctor
from sage._extras import load
from sage._guardian.lease import runs_folder
from sage._processes import Grace, Process, in_session, is_alive, process, wait_gone
from sage._ray.connection import Connected, cluster
from sage.testing import assert_clean

if TYPE_CHECKING:
    from sage._testing.leftovers import CleanBlock

BOUND_S = 30.0
TAKEN_OVER_S = 15.0
"""How long it takes to end a cluster: 4 s for its job, 2 s of grace, and what a busy machine adds to that."""


def ray() -> Any:
    return load("ray", "ray")


def clean() -> CleanBlock:
    """Return a block that fails if it leaves anything.

    Ray keeps connections to a few of the last clusters open, and the logs of the last one, until others take their
    place. Other programs have files in the same folders, so that the tests look at their own.
    """
    own = ("file descriptor socket:*", "file descriptor */logs/*", "temporary *", "shared memory *")
    return assert_clean(ignore=own)


def listening(processes: set[Process]) -> set[int]:
    """Return the TCP ports that processes listen on."""
    inodes = set()
    for one in processes:
        for entry in Path(f"/proc/{one.pid}/fd").iterdir():
            target = os.readlink(entry)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def can_be_bound(port: int) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def processes_of(connected: Connected) -> set[Process]:
    """Return the processes of a Ray of our own, by the folder that all of them name or by their session."""
    assert connected.folder is not None
    found, folder = set(), connected.folder.encode()
    for entry in Path("/proc").iterdir():
        one = process(int(entry.name)) if entry.name.isdecimal() else None
        if one is not None and one.pid != os.getpid() and folder in (entry / "cmdline").read_bytes():
            found.add(one)
    (raylet,) = {one for one in found if Path(f"/proc/{one.pid}/comm").read_text().strip() == "raylet"}
    return found | in_session(Process(os.getsid(raylet.pid), 0))


def wait_ended(processes: set[Process], bound_s: float = BOUND_S) -> set[Process]:
    """Wait until processes have ended, and return those that have not."""
    grace = Grace(time.monotonic() + bound_s)
    try:
        wait_gone(processes, grace)
    finally:
        grace.close()
    return {one for one in processes if is_alive(one)}


@pytest.fixture(scope="module", autouse=True)
def used_before() -> None:
    """Let Ray make what a process keeps of it for good, so that the tests see what each connection leaves."""
    for _ in range(2):
        with cluster():
            pass


class TestOwn:
    def test_nothing_is_left_of_it(self) -> None:
        """Line 49."""
        handler, dumps, before = signal.getsignal(signal.SIGTERM), faulthandler.is_enabled(), dict(os.environ)
        with clean(), cluster() as connected:
            assert ray().cluster_resources()["CPU"] == os.cpu_count()
            namespace = ray().get_runtime_context().namespace
            assert namespace == connected.namespace
            assert ray().get_runtime_context().gcs_address == connected.address
            sleeper = ray().remote(num_cpus=0)(sleeper_class()).options(lifetime="detached", name="sleeper").remote()
            worker, *children = [known(pid) for pid in ray().get(sleeper.start.remote())]
            processes = processes_of(connected) | {worker, *children}
            ports = listening(processes)
            assert connected.folder is not None
            private = Path(connected.folder).parent
            assert stat.S_IMODE(private.stat().st_mode) == 0o700
            assert stat.S_IMODE((private / "token").stat().st_mode) == 0o600
            assert len(processes) > 6
            assert len(ports) > 3
            assert signal.getsignal(signal.SIGTERM) is handler
            assert faulthandler.is_enabled() is dumps
        assert not [one for one in processes if is_alive(one)]
        assert [port for port in ports if not can_be_bound(port)] == []
        assert not private.parent.exists()
        assert not ray().is_initialized()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert dict(os.environ) == before

    def test_blocks_of_two_threads_share_one(self) -> None:
        both, found = threading.Barrier(2, timeout=BOUND_S), []
        problems = []

        def use() -> None:
            try:
                with cluster() as connected:
                    found.append(connected)
                    both.wait()
                    assert ray().get(ray().put(1)) == 1
                    both.wait()
            except BaseException as error:
                problems.append(error)

        with clean():
            threads = [threading.Thread(target=use) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert problems == []
        assert found[0] is found[1]
        assert not ray().is_initialized()

    def test_it_ends_although_its_gcs_was_killed(self) -> None:
        with clean():
            with cluster() as connected:
                processes = processes_of(connected)
                (gcs,) = {one for one in processes if "gcs_server" in Path(f"/proc/{one.pid}/comm").read_text()}
                os.kill(gcs.pid, signal.SIGKILL)
                began_at = time.monotonic()
            assert time.monotonic() - began_at < BOUND_S
            assert not [one for one in processes if is_alive(one)]

    @pytest.mark.parametrize("is_killed", [pytest.param(False, marks=pytest.mark.proof), True], ids=["ended", "killed"])
    def test_a_folder_with_a_long_name_is_no_matter(self, tmp_path: Path, is_killed: bool) -> None:
        """The sockets of Ray need a short one: it has a private folder of its own elsewhere, which is removed."""
        folder = tmp_path / ("x" * 60)
        folder.mkdir()
        program = f"""
            import os
            from sage._ray.connection import cluster
            with cluster() as connected:
                print(connected.folder, oct(os.stat(os.path.dirname(connected.folder)).st_mode)[-3:], flush=True)
                os.kill(os.getpid(), 9) if {is_killed} else None
        """
        done = run(program, TMPDIR=str(folder))
        where, mode = done.stdout.split()
        assert mode == "700", done.stderr
        assert not Path(where).is_relative_to(folder)
        due = time.monotonic() + TAKEN_OVER_S
        while Path(where).parent.exists() and time.monotonic() < due:
            time.sleep(0.05)
        assert not Path(where).parent.exists()


def sleeper_class() -> type:
    """Return the class of an actor; one that is made in a function travels by value."""

    class Sleeper:
        """Has a child in a session of its own, which ignores SIGTERM."""

        def start(self) -> list[int]:
            program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
            child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
            assert child.stdout is not None
            child.stdout.readline()
            return [os.getpid(), child.pid]

    return Sleeper


class TestGiven:
    def test_a_cluster_that_was_not_given_is_left_alone(
        self, given: GivenCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One runs, the environment names it and has its token."""
        before = {one for one in given.processes() if "worker" not in Path(f"/proc/{one.pid}/cmdline").read_text()}
        variables = {**given.variables, "RAY_ADDRESS": given.address, "RAY_NAMESPACE": "strange"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with clean():
            with cluster() as own:
                assert own.address != given.address
                assert ray().get_runtime_context().gcs_address == own.address
                assert len([node for node in ray().nodes() if node["Alive"]]) == 1
                with pytest.raises(JobError, match=f"connected to Ray at {own.address}") as caught, cluster("auto"):
                    pass
                assert "one connection" in caught.value.__notes__[0]
            assert {name: os.environ[name] for name in variables} == variables
        assert [one for one in before if not is_alive(one)] == []

    def test_auto_is_the_one_that_the_environment_names(
        self, given: GivenCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {**given.variables, "RAY_ADDRESS": given.address}.items():
            monkeypatch.setenv(name, value)
        namespaces = set()
        for address in ("auto", given.address):
            with cluster(address) as connected, cluster(given.address) as same:
                assert same is connected
                assert (connected.address, connected.folder, connected.jobs) == (given.address, None, None)
                assert connected.ends_itself("job-1", 1.0) is None
                namespaces.add(ray().get_runtime_context().namespace)
                with pytest.raises(JobError, match="so it cannot start a Ray of its own"), cluster():
                    pass
        assert len(namespaces) == 2
        assert is_alive(given.nodes[0].process("raylet"))

    def test_a_submitted_program_is_on_the_cluster_that_it_was_given(
        self, given: GivenCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`ray job submit` names the cluster, and says in another variable that the program is one of its own."""
        submitted = {"RAY_ADDRESS": given.address, "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {}, "metadata": {}}'}
        for name, value in {**given.variables, **submitted}.items():
            monkeypatch.setenv(name, value)
        with cluster() as connected, cluster() as same:
            assert same is connected
            assert (connected.address, connected.folder) == (given.address, None)

    def test_connecting_again_leaves_nothing(self, given: GivenCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in given.variables.items():
            monkeypatch.setenv(name, value)
        counts = []
        for _ in range(6):
            with cluster(given.address):
                assert ray().get(ray().put(1)) == 1
            counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
        assert len(set(counts[1:])) == 1

    def test_a_connection_of_the_program_is_used_and_left(
        self, given: GivenCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in given.variables.items():
            monkeypatch.setenv(name, value)
        read_token_again()
        ray().init(address=given.address, namespace="mine", configure_logging=False)
        try:
            for address in ("auto", None):
                with cluster(address) as connected:
                    assert (connected.address, connected.namespace) == (given.address, "mine")
                assert ray().is_initialized()
            with pytest.raises(JobError, match='so it cannot connect to "127'), cluster("127.0.1.9:1"):
                pass
        finally:
            ray().shutdown()

    @pytest.mark.parametrize(
        ("variables", "why"),
        [
            ({}, "this process shows none"),
            ({"RAY_AUTH_MODE": "token"}, "this process has none"),
            ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"}, "its token is a wrong one"),
            ({"RAY_AUTH_TOKEN": "wrong"}, "its token is a wrong one"),
        ],
        ids=["no mode", "no token", "wrong token", "wrong token without mode"],
    )
    def test_without_its_token_nobody_is_let_in(
        self, given: GivenCluster, tmp_path: Path, variables: dict[str, str], why: str
    ) -> None:
        done = run(CONNECT.format(given.address), HOME=str(tmp_path), **variables)
        error, took_s = json.loads(done.stdout)
        assert error == f"AuthenticationError: the Ray cluster at {given.address} wants a token, and {why}"
        assert took_s < 5.0
        assert given.token not in done.stdout + done.stderr

    def test_its_token_is_enough(self, given: GivenCluster, tmp_path: Path) -> None:
        """Ray itself does not use a token that it finds, as long as nothing says that there is one."""
        done = run(CONNECT.format(given.address), HOME=str(tmp_path), RAY_AUTH_TOKEN_PATH=str(given.token_path))
        assert json.loads(done.stdout)[0] is None, done.stderr

    def test_nothing_answers(self) -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(ServerUnreachableError, match="no Ray cluster answers at"), cluster(address):
                pass

    @pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "local", "somewhere"])
    def test_what_is_no_address(self, address: str) -> None:
        with pytest.raises(JobError, match=f'address "{address}" is not one of a cluster') as caught, cluster(address):
            pass
        assert '"warm"' in caught.value.__notes__[0]

    def test_a_wrong_token_in_this_process_is_forgotten(
        self, given: GivenCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        with pytest.raises(AuthenticationError), cluster(given.address):
            pass
        with cluster() as own:
            assert own.address != given.address
        assert os.environ["RAY_AUTH_TOKEN"] == "wrong"


CONNECT = """
import json, sys, time
from sage import SageError
from sage._ray.connection import cluster
import ray
began_at, error = time.monotonic(), None
try:
    with cluster("{}"):
        assert ray.get(ray.put(1)) == 1
except SageError as raised:
    error = type(raised).__name__ + ": " + str(raised)
print(json.dumps([error, time.monotonic() - began_at]))
"""

DRIVER = """
import json, os, subprocess, sys, threading
from sage._ray.connection import cluster
import ray

@ray.remote(num_cpus=0)
class Master:
    def start(self, lease, path, mark):
        opened = threading.Event()
        threading.Thread(target=self.guard, args=(lease, path, mark, opened), daemon=True).start()
        program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
        child.stdout.readline()
        opened.wait()
        return [os.getpid(), child.pid]

    def guard(self, lease, path, mark, opened):
        with open(lease) as file:
            opened.set()
            file.read()  # until the driver dies
        threading.Event().wait(4)  # longer than whatever ends with the cluster is given
        open(mark, "w").close()
        if path is not None:
            os.unlink(path)

bound_s, lease, mark = float(sys.argv[1]), sys.argv[2], sys.argv[3]
with cluster() as connected:
    path = connected.ends_itself("job-1", bound_s) if bound_s >= 0 else None
    master = Master.options(lifetime="detached", name="master").remote()
    started = master.start.remote(lease, path, mark)
    line = open(lease, "w")
    print(json.dumps([ray.get(started), connected.folder]), flush=True)
    sys.stdin.read()
"""


def read_token_again() -> None:
    """Let Ray, which reads it once, see the environment as it is now."""
    raylet: Any = load("ray._raylet", "ray")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=100)


class TestDriverDeath:
    @pytest.mark.parametrize(
        ("bound_s", "is_marked"), [(-1, False), (20.0, True), (0.1, False)], ids=["no job", "a job", "a late job"]
    )
    def test_a_killed_driver_leaves_nothing(self, tmp_path: Path, bound_s: float, is_marked: bool) -> None:
        """Line 50: what carries no cookie, what ignores SIGTERM and what called setsid included."""
        lease, mark = tmp_path / "lease", tmp_path / "mark"
        os.mkfifo(lease)
        with clean():
            command = [sys.executable, "-c", DRIVER, str(bound_s), str(lease), str(mark)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
                assert driver.stdout is not None
                pids, folder = json.loads(driver.stdout.readline())
                processes = processes_of(Connected("", "", folder)) | {known(pid) for pid in pids}
                assert len(processes) > 8
                driver.kill()
            began_at = time.monotonic()
            assert wait_ended(processes) == set()
            assert time.monotonic() - began_at < TAKEN_OVER_S
            assert mark.exists() is is_marked
            guardians = {one for entry in Path("/proc").iterdir() if (one := guardian_of(entry, folder)) is not None}
            assert wait_ended(guardians) == set()
            assert not Path(folder).parents[1].exists()
            assert Path(folder).parents[2] == Path(runs_folder())

    def test_an_exit_without_an_end_of_the_block_ends_it(self, tmp_path: Path) -> None:
        program = """
            from sage._ray.connection import cluster
            block = cluster()
            print(block.__enter__().folder)
        """
        with clean():
            done = run(program)
            assert done.returncode == 0, done.stderr
            assert not Path(done.stdout.strip()).parents[1].exists()


def guardian_of(entry: Path, folder: str) -> Process | None:
    """Return the process behind an entry of /proc if it is the guardian of the run that a folder is in."""
    if not entry.name.isdecimal() or (found := process(int(entry.name))) is None:
        return None
    words = (entry / "cmdline").read_bytes().split(b"\0")
    return (
        found
        if any(word.endswith(b"guardian.py") for word in words) and str(Path(folder).parents[1]).encode() in words
        else None
    )


class TestTwoNodes:
    def test_tasks_run_on_both(self, two_nodes: GivenCluster) -> None:
        with cluster(two_nodes.address) as connected:
            assert connected.address == two_nodes.address
            alive = {node["NodeManagerAddress"] for node in ray().nodes() if node["Alive"]}
            assert alive == {node.address for node in two_nodes.nodes}
            assert ray().cluster_resources()["CPU"] == 4
            where = [
                ray().remote(num_cpus=0, resources={f"node:{node.address}": 0.01})(node_of_task()).remote()
                for node in two_nodes.nodes
            ]
            assert ray().get(where) == [node.address for node in two_nodes.nodes]


def node_of_task() -> Any:
    def address() -> str:
        import ray

        return str(ray.util.get_node_ip_address())

    return address


class TestDoctor:
    def test_it_tells_of_ray(self) -> None:
        version, memory = doctor.ray()
        assert (version.name, version.is_good, version.detail) == ("Ray", True, ray().__version__)
        assert memory.name == "shared memory for Ray"
        assert re.fullmatch(r"[\d.]+ GiB free in /dev/shm, [\d.]+ GiB are wanted.*", memory.detail)

    def test_too_little_shared_memory_is_wrong(self) -> None:
        _, memory = doctor.ray(Path("/proc"))  # which has no room at all
        assert not memory.is_good
        assert re.fullmatch(r"0\.0 GiB free in /proc, .* wanted; what does not fit goes to the disk", memory.detail)
        _, memory = doctor.ray(Path("/nowhere"))
        assert (memory.is_good, memory.detail) == (False, "/nowhere: No such file or directory")
