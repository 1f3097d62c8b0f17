"""What programs that use Ray themselves find on a cluster: files, references, other actors, and its own functions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from sage import GraphError, RemoteEnvironment, ServiceOptions, ServiceStartError
from sage._extras import load

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]


def test_files_are_sent_along(ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says: `working_dir` names a folder here, and functions run in a copy of it."""
    (tmp_path / "sent_along.py").write_text("VALUE = 41")
    (tmp_path / "data.txt").write_text("data")
    monkeypatch.chdir(tmp_path)

    def read(_: int) -> tuple[str, int, bool]:
        import sent_along  # type: ignore[import-not-found]

        with open("data.txt", encoding="utf-8") as file:
            return file.read(), sent_along.VALUE, os.getcwd() == str(tmp_path)

    env = RemoteEnvironment("files", address=ray_address, runtime_env={"working_dir": "."})
    arrived: list[Any] = []
    env.from_batch([1]).map(read).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [("data", 41, False)]
    env = RemoteEnvironment("files", address=ray_address, runtime_env={"working_dir": "nowhere"})
    env.from_batch([1]).map(read).sink(arrived.append)
    with pytest.raises(GraphError, match="runtime_env cannot be prepared: directory nowhere must be"):
        env.submit(autostop=True)


def test_references_keep_their_owner(ray_address: str) -> None:
    """In records, in closures, in arguments and answers of services, and among records of a task of another process."""
    ray = load("ray", "ray")
    large = ray.put(list(range(1_000)))

    class Store:
        def size(self, reference: Any) -> Any:
            return ray.put(len(ray.get(reference)))

    env = RemoteEnvironment("references", address=ray_address)
    store = env.register_service("store", Store)
    arrived: list[int] = []
    stream = env.from_batch([ray.put(1), ray.put(2)]).map(ray.get)
    stream = stream.map(lambda x: ray.put(x + len(ray.get(large)))).map(ray.get, parallelism=2)
    stream.map(lambda x: x + ray.get(store.size(large))).sink(arrived.append)
    env.submit(autostop=True)
    assert sorted(arrived) == [2_001, 2_002]


def test_a_service_without_a_place_says_what_is_missing(ray_address: str) -> None:
    """Which resource, how much of it there is, and who holds it."""
    ray = load("ray", "ray")

    class Plain:
        def get(self, data: int) -> int:
            return data

    def fails(options: ServiceOptions) -> str:
        env = RemoteEnvironment("greedy", address=ray_address)
        env.from_batch([1]).map(env.register_service("plain", Plain, options=options).get).sink(abs)
        with pytest.raises(ServiceStartError) as caught:
            env.submit(autostop=True)
        return str(caught.value)

    assert "it reserves GPU 1, of which the cluster has 0" in fails(ServiceOptions(num_gpus=1, start_timeout_s=3))
    holder = ray.remote(Plain).options(name="another", num_cpus=2).remote()
    try:
        ray.get(holder.get.remote(1))
        told = fails(ServiceOptions(num_cpus=1, start_timeout_s=3))
        assert "it reserves CPU 1, of which 0 of 2 is free, held by 'another' (process" in told
    finally:
        ray.kill(holder)


def test_a_function_may_leave_ray(ray_address: str) -> None:
    """The processes of a job speak to each other without it."""

    def leave(data: int) -> int:
        load("ray", "ray").shutdown()
        return data

    env = RemoteEnvironment("leaving", address=ray_address)
    arrived: list[int] = []
    env.from_batch([1, 2, 3]).map(leave).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [1, 2, 3]
