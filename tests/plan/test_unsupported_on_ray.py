"""Services that a cluster cannot run are refused at submit, before anything is looked for or started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sage import Rate, RemoteEnvironment, ServiceOptions, UnsupportedPlanError

if TYPE_CHECKING:
    from collections.abc import Callable


def answer(question: Any) -> Any:
    return question


WAYS: dict[str, Callable[[RemoteEnvironment], object]] = {
    "is shared": lambda env: env.register_service("service", dict, options=ServiceOptions(shared=True)),
    "has idle_stop_s": lambda env: env.register_service("service", dict, options=ServiceOptions(idle_stop_s=60)),
    "is recycled": lambda env: env.register_service(
        "service", dict, options=ServiceOptions(host="process", recycle_calls=2)
    ),
    "has replicas and a rate": lambda env: env.register_service(
        "service", dict, options=ServiceOptions(replicas=2, rate=Rate(requests_per_minute=60))
    ),
    "answers piece by piece": lambda env: env.serve("service", lambda asked: asked.map(answer), stream=True),
}


@pytest.mark.parametrize("what", WAYS)
def test_what_a_cluster_cannot_run_is_refused(what: str) -> None:
    env = RemoteEnvironment("far", address="127.0.0.1:1")  # where nothing answers
    WAYS[what](env)
    env.from_batch([1]).sink(print)
    with pytest.raises(UnsupportedPlanError) as caught:
        env.submit(autostop=True)
    assert str(caught.value) == f'service "service" {what}, which environment "far" cannot run'
    assert len(caught.value.__notes__) == 1


def test_kept_services_are_refused() -> None:
    env = RemoteEnvironment("far", address="127.0.0.1:1")
    env.register_service("service", dict)
    env.from_batch([1]).sink(print)
    with pytest.raises(UnsupportedPlanError, match='environment "far" cannot keep services in a cluster'):
        env.submit(autostop=True, keep_services=["service"])
