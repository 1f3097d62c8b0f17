"""The cluster as the job master needs it: processes for its sites, which it can end by force, and a place for notes."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from sage._extras import load
from sage._logs import log_of
from sage._processes import end_all, with_cookie
from sage._ray.reservations import listed, missing_now, reserved
from sage.errors import ServiceUnavailableError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._plan.logical import Place
    from sage._remote.protocol import Address

NAMESPACE = "sage"
"""Of the names of actors, which are unique by the id of their job; a program's own connection may have none."""

STORE = b"sage"

STORE_S = 5.0
"""How long the cluster's store may take to answer."""

WATCH_S = 1.0

SILENT_S = 4.0
"""After how long without an answer the cluster counts as lost."""

LEAVE_S = 20.0
"""How long a master waits for the driver to take it away."""

CHILD_TERM_S = 0.2
"""How long leftovers of a killed process may take to end by themselves."""

log = log_of("sage.dispatcher")


class Began(NamedTuple):
    """A process that answers.

    Attributes:
        address: where it listens.
        pid: its process id on its machine.
        node: the machine.
    """

    address: Address
    pid: int
    node: str


class ActorProcess:
    """One process of the cluster: an actor."""

    def __init__(self, cluster: RayCluster, name: str, actor: Any, wanted: Mapping[str, float], cookie: str) -> None:
        self._cluster = cluster
        self._name = name
        self._actor = actor
        self._wanted = wanted
        self.cookie = cookie
        self._node = ""

    def began(self, timeout_s: float) -> Began:
        """Wait until it answers.

        Raises:
            ServiceUnavailableError: it did not get its place in the cluster in time, or it has ended; it says why.
        """
        ray = load("ray", "ray")
        exceptions = load("ray.exceptions", "ray")
        try:
            began: Began = ray.get(self._actor.began.remote(), timeout=timeout_s)
        except exceptions.GetTimeoutError:
            text = f"{self._name} has no place in the cluster after {timeout_s:.3g} s: {missing_now(self._wanted)}"
            free = dict(sorted(ray.available_resources().items()))
            text_free = f"It reserves {listed(self._wanted)}; free are {listed(free)}."
            raise hint(ServiceUnavailableError(text), text_free) from None
        except exceptions.RayError as error:
            raise ServiceUnavailableError(f"{self._name} was not started: {describe(error)}") from error
        self._node = began.node
        return began

    def kill(self) -> tuple[str, ...]:
        """End it by force, with its leftovers, and describe these. A second call does nothing.

        Raises:
            ServiceUnavailableError: the cluster cannot end it, or cannot find its leftovers.
        """
        if self._cluster.is_lost:
            raise ServiceUnavailableError(f"{self._name} cannot be ended by a cluster that is lost")
        load("ray", "ray").kill(self._actor, no_restart=True)
        if not self._node:
            return ()
        if self._node == own_node():
            return end_left(self.cookie)
        return end_left_at(self._node, self.cookie)


class RayCluster:
    """The cluster that this process is connected to.

    Args:
        job: the id of the job, of which the names of its actors are made.
        runtime_env: the environment that Ray prepares for its processes.
        site: the class of the actors of its sites.

    Attributes:
        is_lost: whether it can neither start nor end processes any more.
    """

    def __init__(self, job: str, runtime_env: Mapping[str, object] | None, site: type) -> None:
        self.is_lost = False
        self._site = site
        self._job = job
        self._runtime_env = runtime_env

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Have `on_lost` called once when Ray's control store (GCS) does not answer: a minute later Ray ends us all."""

        def work() -> None:
            answered_at = time.monotonic()
            while (silent_s := time.monotonic() - answered_at) < SILENT_S:
                try:
                    _store().internal_kv_exists(STORE, STORE, timeout=WATCH_S)
                    answered_at = time.monotonic()
                except load("ray.exceptions", "ray").RayError as error:
                    log.debug("cluster silent error=%s", describe(error))
                threading.Event().wait(WATCH_S)
            self.is_lost = True
            on_lost(f"Ray's control store (GCS) does not answer for {silent_s:.0f} s")

        threading.Thread(target=work, name="sage-cluster", daemon=True).start()

    def start(self, name: str, order: object, place: Place, cookie: str, *, outlives_master: bool) -> ActorProcess:
        """Begin to start a process for a site and return it at once.

        Args:
            name: the name of the site.
            order: a `SiteLaunch`, or its reference in the cluster.
            place: its reservation.
            cookie: the cookie in its children's environment.
            outlives_master: whether it stays when the master is killed, so that the next one can end it in order.
        """
        options: dict[str, object] = {
            "num_cpus": place.num_cpus,
            "num_gpus": place.num_gpus,
            "resources": dict(place.resources),
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
            "runtime_env": self._runtime_env,
        }
        if outlives_master:
            options |= named(self._job, name)
        actor = load("ray", "ray").remote(self._site).options(**options).remote(order, cookie)
        return ActorProcess(self, name, actor, reserved(place), cookie)

    def find(self, name: str, cookie: str) -> ActorProcess | None:
        """Return a process that an earlier master started and that outlives it, or None if it is gone."""
        try:
            actor = load("ray", "ray").get_actor(actor_name(self._job, name), namespace=NAMESPACE)
        except ValueError:
            return None
        return ActorProcess(self, name, actor, {}, cookie)


class LeftService(TypedDict, total=False):
    """Where an instance of a service may be; it has no address before its process is up."""

    site: str
    cookie: str
    address: tuple[str, int] | None
    pid: int
    incarnation: int
    hooks: list[str]


class Knowledge(TypedDict):
    """The knowledge of a master that the next one needs."""

    epoch: int
    pid: int
    services: dict[str, LeftService]


class ClusterMemory:
    """Keeps a master's knowledge in the cluster's own store, beside Ray's data about its actors."""

    def __init__(self, job: str) -> None:
        self._key = f"sage/{job}".encode()

    def read(self) -> Knowledge | None:
        """Return the last written value, or None."""
        data = _store().internal_kv_get(self._key, STORE, timeout=STORE_S)
        known: Knowledge | None = None if data is None else json.loads(data)
        return known

    def write(self, known: Knowledge) -> None:
        """Store the value, and return when it is stored.

        Raises:
            ServiceUnavailableError: the cluster does not answer.
        """
        try:
            _store().internal_kv_put(self._key, json.dumps(known).encode(), True, STORE, timeout=STORE_S)
        except load("ray.exceptions", "ray").RayError as error:
            raise ServiceUnavailableError(f"the cluster keeps nothing any more: {describe(error)}") from error

    def clear(self) -> None:
        """Forget it, if the cluster answers."""
        with suppress(load("ray.exceptions", "ray").RayError):
            _store().internal_kv_del(self._key, False, STORE, timeout=STORE_S)


def _store() -> Any:
    return load("ray.experimental.internal_kv", "ray").internal_kv_get_gcs_client()


def actor_name(job: str, site: str) -> str:
    return f"sage/{job}/{site}"


def named(job: str, site: str) -> dict[str, object]:
    """Return the options of an actor that outlives whoever made it, and is found by its name."""
    return {"name": actor_name(job, site), "namespace": NAMESPACE, "lifetime": "detached"}


def end_left(cookie: str) -> tuple[str, ...]:
    """End the leftovers of a killed process on this machine, and describe them."""
    found = with_cookie(cookie)
    if not found:
        return ()
    ended = end_all(lambda: with_cookie(cookie), CHILD_TERM_S)
    return tuple(
        f"process {one.pid}" + (" does not end" if one in ended.left else "")
        for one in sorted({*ended.killed, *ended.left})
    )


def end_left_at(node: str, cookie: str) -> tuple[str, ...]:
    """End the leftovers of a killed process on another machine.

    Raises:
        ServiceUnavailableError: nothing can be run there.
    """
    ray = load("ray", "ray")
    strategies = load("ray.util.scheduling_strategies", "ray")
    there = strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(end_left).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
    try:
        left: tuple[str, ...] = ray.get(task.remote(cookie), timeout=LEAVE_S)
    except load("ray.exceptions", "ray").RayError as error:
        raise ServiceUnavailableError(f"whatever is left on node {node}, which does not answer") from error
    return left


@cache
def own_node() -> str:
    node: str = load("ray", "ray").get_runtime_context().get_node_id()
    return node
