"""The options of a service: how it is started, called, watched and stopped."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

from sage._arguments import check_backoff, check_count, check_seconds, is_number
from sage.errors import GraphError, hint, short
from sage.rate import Rate

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

NO_RESOURCES: Mapping[str, float] = {}
"""One for all, since the options of every service of every job that is known hold it."""


NOT_IDLE = ("shared", "replicas", "idempotent", "recycle_calls", "recycle_rss_mb", "recycle_age_s")
"""Options that do not go together with `idle_stop_s`."""


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """How a service is started, called, watched and stopped.

    Attributes:
        depends_on: names of services that must be ready before this one starts and that are stopped after it.
            A handle among the constructor's arguments is seen without being declared.
        concurrency: how many calls may run at once; 1 is serial, None is unlimited, for a class that is thread-safe.
        call_timeout_s: bound of a call that names none, in seconds; None is unbounded, and the only kind of call that
            runs on the caller's own thread.
        start_timeout_s: bound of constructor, `setup`, `start` and getting `ready` together, in seconds.
        drain_timeout_s: how long running calls may take to end before `stop` is called, in seconds.
        stop_timeout_s: bound of `stop` and of `cleanup`, each, in seconds.
        restart: whether to restart the service when its start or its `health` fails.
        restarts_max: how many restarts are allowed within `restart_window_s` seconds.
        backoff_s: first and longest pause before a restart, in seconds; it doubles each time.
        required: whether the job fails with the service; if not, calls fail at once and the job goes on.
        health_interval_s: pause between two calls of `health`, where the service has one, in seconds.
        replace: whether registering takes the place of an earlier service of the same name; handles that were given out
            lead to the new one.
        host: where it runs: "inline" in the process that submits the job, "process" in one of its own, which can be
            killed, "ray" in one of a cluster. None is "inline" for jobs on one machine and "ray" on a cluster.
        kill_grace_s: how long a process may take to end after its cleanup before it is killed, in seconds.
        shared: whether the environments of this process share one instance, which the last of them cleans up.
        num_cpus: processors that its process reserves in a cluster; 0 reserves nothing.
        num_gpus: GPUs that its process reserves in a cluster, and sees.
        resources: other resources of the cluster that its process reserves, by name.
        rate: how fast its calls may begin; they wait for that in the order in which they came.
        replicas: how many instances share the calls; each has hooks, health, restarts and `concurrency` of its own.
        replicas_min: the job fails when fewer replicas than this can be had.
        affinity: gives a key for the arguments of a call; calls with the same key go to one replica while it lives.
            Without it, a call goes to the replica with the fewest running calls.
        idempotent: whether a call may be made again by another replica if its replica dies during it.
        recycle_calls: after how many calls a new process takes the place of a replica's; it is ready before the old one
            ends.
        recycle_rss_mb: the same, when the process uses more memory than this, in megabytes.
        recycle_age_s: the same, when the process has been ready for so long, in seconds.
        idle_stop_s: stop the service when nobody has called it for so long while the job runs, in seconds, and start it
            again for the next call, which waits for that. Not while another service of the job depends on it.
    """

    depends_on: tuple[str, ...] | list[str] = ()
    concurrency: int | None = 1
    call_timeout_s: float | None = None
    start_timeout_s: float = 60.0
    drain_timeout_s: float = 5.0
    stop_timeout_s: float = 10.0
    restart: Literal["never", "on_failure", "always"] = "never"
    restarts_max: int = 3
    restart_window_s: float = 60.0
    backoff_s: tuple[float, float] = (0.1, 10.0)
    required: bool = True
    health_interval_s: float = 5.0
    replace: bool = False
    host: Literal["inline", "process", "ray"] | None = None
    kill_grace_s: float = 5.0
    shared: bool = False
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=lambda: NO_RESOURCES)
    rate: Rate | None = None
    replicas: int = 1
    replicas_min: int = 1
    affinity: Callable[..., Hashable] | None = None
    idempotent: bool = False
    recycle_calls: int | None = None
    recycle_rss_mb: float | None = None
    recycle_age_s: float | None = None
    idle_stop_s: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the option."""
        if isinstance(self.depends_on, str):
            error = GraphError(f"service option depends_on is the string {self.depends_on!r}, not a list of names")
            raise hint(error, f"Write depends_on=[{self.depends_on!r}].")
        names: object = self.depends_on
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
            raise hint(GraphError(f"service option depends_on is {short(names)}"), "Give a list of names.")
        if self.restart not in ("never", "on_failure", "always"):
            error = GraphError(f"service option restart is {self.restart!r}")
            raise hint(error, 'It is "never", "on_failure" or "always".')
        if self.host not in (None, "inline", "process", "ray"):
            raise hint(GraphError(f"service option host is {self.host!r}"), 'It is "inline", "process" or "ray".')
        if not isinstance(self.rate, Rate | None):
            raise hint(GraphError(f"service option rate is {short(self.rate)}"), "Give Rate(requests_per_minute=...).")
        if self.concurrency is not None:
            check_count("service option concurrency is", self.concurrency)
        check_count("service option restarts_max is", self.restarts_max, least=0)
        check_backoff("service option backoff_s is", self.backoff_s)
        for one in fields(self):
            value = getattr(self, one.name)
            is_unbounded = one.name in ("call_timeout_s", "recycle_age_s", "idle_stop_s") and value is None
            if one.name.endswith("_s") and one.name != "backoff_s" and not is_unbounded:
                check_seconds(f"service option {one.name} is", value, may_be_zero=one.name != "idle_stop_s")
        for name, amount in {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, **self.resources}.items():
            if amount < 0:
                raise GraphError(f"service option {name} is {amount}, which is negative")
        self._check_replicas()
        self._check_idle()

    def _check_idle(self) -> None:
        if self.idle_stop_s is None:
            return
        others = [one.name for one in fields(self) if one.name in NOT_IDLE and getattr(self, one.name) != one.default]
        for other in [*others, *(['host="ray"'] if self.host == "ray" else ())]:
            error = GraphError(f"service options idle_stop_s and {other} do not go together")
            raise hint(error, f"Leave {other} out: a service that rests has one instance, on this machine.")

    def _check_replicas(self) -> None:
        check_count("service option replicas is", self.replicas)
        check_count("service option replicas_min is", self.replicas_min)
        if self.replicas_min > self.replicas:
            error = GraphError(f"service option replicas_min is {self.replicas_min}, with replicas={self.replicas}")
            raise hint(error, "The job fails when fewer replicas can be had, so it is at most their number.")
        if self.affinity is not None and not callable(self.affinity):
            error = GraphError(f"service option affinity is {short(self.affinity)}, which is not callable")
            raise hint(error, "Give a function of the arguments of a call: affinity=lambda prompt: prompt[:100].")
        if self.has_replicas and self.shared:
            error = GraphError("service options replicas and shared do not go together")
            raise hint(error, "Leave shared=True out: a replicated service belongs to one environment.")
        if self.recycle_calls is not None:
            check_count("service option recycle_calls is", self.recycle_calls)
        if self.recycle_rss_mb is not None and not (is_number(self.recycle_rss_mb) and self.recycle_rss_mb > 0):
            error = GraphError(f"service option recycle_rss_mb is {short(self.recycle_rss_mb)}")
            raise hint(error, "Give a number of megabytes, more than 0.")
        if self.recycles and self.host != "process":
            error = GraphError(f"service option host is {self.host!r}, but only a process of its own can be recycled")
            raise hint(error, 'Give host="process". A command is not recycled, since its callers keep its address.')

    def of_one(self) -> ServiceOptions:
        """Return the options of one replica, or of a service that stands for all of them."""
        return replace(
            self,
            replicas=1,
            replicas_min=1,
            affinity=None,
            idempotent=False,
            recycle_calls=None,
            recycle_rss_mb=None,
            recycle_age_s=None,
        )

    @property
    def recycles(self) -> bool:
        """Whether new processes take the place of old ones while the job runs."""
        return (self.recycle_calls, self.recycle_rss_mb, self.recycle_age_s) != (None, None, None)

    @property
    def has_replicas(self) -> bool:
        """Whether a front chooses among replicas for each call."""
        return self.replicas > 1 or self.idempotent or self.recycles


DEFAULT_OPTIONS = ServiceOptions()
