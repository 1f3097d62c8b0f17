"""The actors of a job: Ray starts, places and kills them. The processes do everything else among themselves."""

from __future__ import annotations

import logging
import os
import sys
import threading
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from sage._extras import load
from sage._logs import log_of
from sage._processes import COOKIE_VARIABLE
from sage._ray.connection import allow_references
from sage._ray.master import Master
from sage._ray.processes import (
    LEAVE_S,
    NAMESPACE,
    WATCH_S,
    Began,
    ClusterMemory,
    RayCluster,
    end_left,
    own_node,
)
from sage._ray.requests import ActorSide
from sage._ray.shipping import unpickled
from sage._ray.site import Site
from sage._remote.process import Forward
from sage._remote.tcp import TcpRpcClient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sage._ray.orders import JobLaunch, SiteLaunch, SitePayload
    from sage.service import ServiceHandle

ORPHAN_S = 30.0
"""How long a service waits for the next master when it has lost its own, before it ends itself."""

ORPHAN_STOP_S = 10.0
"""How long its end may take then."""

LEAVE_TRIES_MAX = 5

EXIT_S = 0.1
"""How long a process that ends itself gives its answer to arrive."""

log = log_of("sage.dispatcher")


class SiteActor(ActorSide):
    """A process of a job: the sites of tasks and of services.

    Args:
        order: its description.
        cookie: the cookie in its children's environment.
    """

    def __init__(self, order: SiteLaunch, cookie: str) -> None:
        os.environ[COOKIE_VARIABLE] = ":".join(filter(None, [os.environ.get(COOKIE_VARIABLE), cookie]))
        for place in order.path:
            if place not in sys.path:
                sys.path.append(place)
        allow_references()
        self._order = order
        self._cookie = cookie
        self._site = Site(
            *(order.name, order.secret, _own_ip(), order.options, order.sites, self._load, self._master_lost),
            further=((ActorSide, self),),
            budget=order.budget,
        )
        logging.getLogger().setLevel(order.level)
        logging.getLogger().addHandler(Forward(TcpRpcClient(order.driver, order.secret, {})))
        if order.name not in order.sites.values():  # a service, which would stay without a master
            threading.Thread(target=self._wait_for_first_master, name="sage-orphan", daemon=True).start()

    def began(self) -> Began:
        """Tell where it is."""
        return Began(self._site.listener.address, os.getpid(), own_node())

    def exit(self) -> tuple[str, ...]:
        """End this process's leftovers, and soon itself, if the cluster cannot."""
        left = end_left(self._cookie)
        threading.Timer(EXIT_S, os._exit, (1,)).start()
        return left

    def _load(self, handles: Mapping[str, ServiceHandle[object]]) -> SitePayload:
        return unpickled(self._order.part, handles)

    def _wait_for_first_master(self) -> None:
        if not self._site.wait_attached(0, ORPHAN_S):
            os._exit(1)

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

    def __init__(self, order: JobLaunch, name: str) -> None:
        self._name = name
        memory = ClusterMemory(order.job)
        cluster = RayCluster(order.job, order.runtime_env, SiteActor)
        known = memory.read()
        self._master = Master(order, cluster, memory, _own_ip(), self._over, self._followed, known)
        logging.getLogger("sage").setLevel(order.level)
        logging.getLogger("sage").addHandler(Forward(TcpRpcClient(order.driver, order.secret, {})))
        self._ends_itself = order.ends_itself
        self._follows = known is not None
        if self._follows:
            self._master.take_over()
        else:
            self._master.wait_for_begin()

    def begin(self, orders: Mapping[str, object]) -> Began:
        """Begin the job, given its processes, and return the master's address; one that follows has begun."""
        if not self._follows:
            self._master.begin(orders)
        return Began(self._master.address, os.getpid(), own_node())

    def _followed(self) -> None:
        """End at once: it must not act beside the master that followed it."""
        log.error("master followed pid=%s, it was taken for dead and ends", os.getpid())
        os._exit(1)

    def _over(self, is_taken_away: bool) -> None:
        """Go, when the driver has had time to take this process away."""
        if self._ends_itself is not None and os.path.exists(self._ends_itself):
            os.unlink(self._ends_itself)
        if self._master.is_cluster_lost:
            os._exit(1)
        if is_taken_away:
            threading.Event().wait(LEAVE_S)
        ray = load("ray", "ray")
        for _ in range(LEAVE_TRIES_MAX):
            with suppress(ValueError, load("ray.exceptions", "ray").RayError):  # the cluster does not know it just now
                ray.kill(ray.get_actor(self._name, namespace=NAMESPACE), no_restart=True)
            threading.Event().wait(WATCH_S)
        os._exit(1)


@cache
def _own_ip() -> str:
    ip: str = load("ray.util", "ray").get_node_ip_address()
    return ip
