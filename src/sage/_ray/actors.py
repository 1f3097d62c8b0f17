"""The actors of a job: what Ray starts, places and kills. Everything else the processes do among themselves."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from sage._hosts.child import Forward
from sage._logs import log_of
from sage._ray.master import Master
from sage._ray.mesh import Peer
from sage._ray.processes import Began
from sage._ray.shipping import unpickled
from sage._ray.site import Site
from sage._runtime.processes import COOKIE_VARIABLE, carriers, end_all
from sage.errors import ServiceUnavailableError, describe, hint
from sage.services.extras import load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._plan.logical import Place
    from sage._ray.orders import JobOrder, Part, SiteOrder
    from sage.service import ServiceHandle

ORPHAN_S = 30.0
"""How long a service waits for the next master when it has lost its own, before it ends itself."""

ORPHAN_STOP_S = 10.0
"""How long its end may take then."""

STORE = b"sage"
STORE_S = 5.0
"""How long the cluster's store may take to answer."""

WATCH_S = 1.0
SILENT_S = 4.0
"""After how long without an answer the cluster counts as lost."""

LEAVE_S = 20.0
"""How long a master waits for the driver to take it away."""

EXIT_S = 0.1
"""How long a process that ends itself gives its answer to arrive."""

CHILD_TERM_S = 0.2
"""How long what a killed process left behind may take to end by itself."""

log = log_of("sage.dispatcher")


class SiteActor:
    """A process of a job: the sites of tasks and of services.

    Args:
        order: what it is.
        cookie: what its children carry in their environment.
    """

    def __init__(self, order: SiteOrder, cookie: str) -> None:
        os.environ[COOKIE_VARIABLE] = ":".join(filter(None, [os.environ.get(COOKIE_VARIABLE), cookie]))
        for place in order.path:
            if place not in sys.path:
                sys.path.append(place)
        self._order = order
        self._attached = threading.Event()
        self._site = Site(
            *(order.name, order.secret, _own_ip(), order.options, order.sites, self._load, self._master_lost),
            answers={"exit": lambda: self._exit(cookie)},
        )
        logging.getLogger().setLevel(order.level)
        logging.getLogger().addHandler(Forward(Peer(order.driver, order.secret, {})))

    def began(self) -> Began:
        """Tell where it is."""
        return Began(self._site.listener.address, os.getpid(), _own_node())

    def _exit(self, cookie: str) -> tuple[str, ...]:
        """End what this process has left behind, and soon itself, where the cluster cannot."""
        left = end_left(cookie)
        threading.Timer(EXIT_S, os._exit, (1,)).start()
        return left

    def _load(self, handles: Mapping[str, ServiceHandle[Any]]) -> Part:
        return unpickled(self._order.part, handles)

    def _master_lost(self) -> None:
        """Wait for the master that follows, if there is a service to be ended in order; then end."""
        log.error("master lost site=%r", self._order.name)
        epoch = self._site.epoch
        self._site.cancel()
        if self._site.tasks or not self._site.wait_attached(epoch, ORPHAN_S):
            self._site.end_services(ORPHAN_STOP_S)
            os._exit(1)


class MasterActor:
    """The process of a job's master.

    Args:
        order: the job.
        name: the name of the actor, by which it ends itself.
    """

    def __init__(self, order: JobOrder, name: str) -> None:
        self._name = name
        memory = ClusterMemory(order.job)
        cluster = RayCluster(order.job, order.runtime_env)
        known = memory.read()
        self._master = Master(order, cluster, memory, _own_ip(), self._over, self._followed, known)
        logging.getLogger("sage").setLevel(order.level)
        logging.getLogger("sage").addHandler(Forward(Peer(order.driver, order.secret, {})))
        self._ends_itself = order.ends_itself
        if known is not None:
            self._master.take_over()

    def begin(self, orders: Mapping[str, Any]) -> Began:
        """Begin the job, given what its processes are, and tell where the master is."""
        self._master.begin(orders)
        return Began(self._master.address, os.getpid(), _own_node())

    def _followed(self) -> None:
        """End at once: whatever this process did now would be done beside the master that followed it."""
        log.error("master followed pid=%s, it was taken for dead and ends", os.getpid())
        os._exit(1)

    def _over(self, is_told: bool) -> None:
        """Go, when the driver has had time to take this process away."""
        if self._ends_itself is not None and os.path.exists(self._ends_itself):
            os.unlink(self._ends_itself)
        if self._master.is_cluster_lost:
            os._exit(1)
        if is_told:
            threading.Event().wait(LEAVE_S)
        ray = load("ray", "ray")
        ray.kill(ray.get_actor(self._name), no_restart=True)


class ActorProcess:
    """One process of the cluster: an actor."""

    def __init__(self, cluster: RayCluster, name: str, actor: Any, wanted: str, cookie: str) -> None:
        self._cluster = cluster
        self._name = name
        self._actor = actor
        self._wanted = wanted
        self.cookie = cookie
        self._node = ""

    def began(self, timeout_s: float) -> Began:
        """Wait until it answers."""
        ray = load("ray", "ray")
        exceptions = load("ray.exceptions", "ray")
        try:
            began: Began = ray.get(self._actor.began.remote(), timeout=timeout_s)
        except exceptions.GetTimeoutError:
            error = ServiceUnavailableError(f"{self._name} has no place in the cluster after {timeout_s:g} s")
            free = ", ".join(f"{name} {amount:g}" for name, amount in sorted(ray.available_resources().items()))
            raise hint(error, f"It reserves {self._wanted}; free are {free}.") from None
        except exceptions.RayError as error:
            raise ServiceUnavailableError(f"{self._name} was not started: {describe(error)}") from error
        self._node = began.node
        return began

    def kill(self) -> tuple[str, ...]:
        """End it by force, and what it left behind."""
        if self._cluster.is_lost:
            raise ServiceUnavailableError(f"{self._name} cannot be ended by a cluster that is lost")
        load("ray", "ray").kill(self._actor, no_restart=True)
        if not self._node:
            return ()
        if self._node == _own_node():
            return end_left(self.cookie)
        return end_left_at(self._node, self.cookie)


class RayCluster:
    """The cluster that this process is connected to.

    Args:
        job: the id of the job, of which the names of its actors are made.
        runtime_env: what Ray prepares for its processes.

    Attributes:
        is_lost: whether it can neither start nor end processes any more.
    """

    def __init__(self, job: str, runtime_env: Mapping[str, Any] | None) -> None:
        self.is_lost = False
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

    def start(self, name: str, order: Any, place: Place, *, outlives_master: bool) -> ActorProcess:
        """Begin to start a process for a site and return it at once."""
        cookie = secrets.token_hex(8)
        options: dict[str, Any] = {
            "num_cpus": place.num_cpus,
            "num_gpus": place.num_gpus,
            "resources": dict(place.resources),
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
            "runtime_env": self._runtime_env,
        }
        if outlives_master:
            options |= {"name": actor_name(self._job, name), "lifetime": "detached"}
        actor = load("ray", "ray").remote(SiteActor).options(**options).remote(order, cookie)
        wanted = {"CPU": place.num_cpus, "GPU": place.num_gpus, **dict(place.resources)}
        listed = ", ".join(f"{resource} {amount:g}" for resource, amount in wanted.items() if amount)
        return ActorProcess(self, name, actor, listed or "nothing", cookie)

    def find(self, name: str, cookie: str) -> ActorProcess | None:
        """Return a process that an earlier master started and that outlives it, or None if it is gone."""
        try:
            actor = load("ray", "ray").get_actor(actor_name(self._job, name))
        except ValueError:
            return None
        return ActorProcess(self, name, actor, "nothing", cookie)


class ClusterMemory:
    """Keeps what a master knows in the cluster's own store, beside what Ray keeps of its actors."""

    def __init__(self, job: str) -> None:
        self._key = f"sage/{job}".encode()

    def read(self) -> dict[str, Any] | None:
        """Return what was written last, or None."""
        data = _store().internal_kv_get(self._key, STORE, timeout=STORE_S)
        known: dict[str, Any] | None = None if data is None else json.loads(data)
        return known

    def write(self, known: dict[str, Any]) -> None:
        """Keep what is known, and return when it is kept."""
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
    """Return the name of an actor of a job."""
    return f"sage/{job}/{site}"


def end_left(cookie: str) -> tuple[str, ...]:
    """End what a process of this machine, which was killed, has left behind; return that in words."""
    found = carriers(cookie)
    if not found:
        return ()
    ended = end_all(lambda: carriers(cookie), CHILD_TERM_S)
    return tuple(
        f"process {one.pid}" + (" does not end" if one in ended.left else "")
        for one in sorted({*ended.killed, *ended.left})
    )


def end_left_at(node: str, cookie: str) -> tuple[str, ...]:
    """End what a process of another machine, which was killed, has left behind there.

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
def _own_ip() -> str:
    ip: str = load("ray.util", "ray").get_node_ip_address()
    return ip


@cache
def _own_node() -> str:
    node: str = load("ray", "ray").get_runtime_context().get_node_id()
    return node
