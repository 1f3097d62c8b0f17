"""Tests of jobs on one machine, made tests of jobs on a cluster."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle

from sage import RemoteEnvironment
from sage._plan.logical import Kind, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType

    from sage._plan.logical import LogicalGraph
    from sage.stream import DataStream

TESTS = Path(__file__).parents[1]


class SinksHere(RemoteEnvironment):
    """Runs the sinks in this process, as they write into the objects that a test looks at."""

    def _graph(self) -> LogicalGraph:
        for id_ in range(len(self._builder)):
            if self._builder.node(id_).kind is Kind.SINK:
                self._builder.set(id_, place=Place("driver"))
        return super()._graph()


class OnRay(SinksHere):
    """Takes the place of `LocalEnvironment` in the tests."""

    address = ""

    def __init__(self, *args: Any, backend: object = None, **kwargs: Any) -> None:
        super().__init__(*args, address=OnRay.address, **kwargs)


def run_on_ray(
    records: Iterable[Any], build: Callable[[DataStream], DataStream], *, backend: object = None
) -> list[Any]:
    """Take the place of `sage.testing.run`."""
    env = OnRay("test")
    arrived: list[Any] = []
    build(env.from_batch(records)).sink(arrived.append)
    env.submit(autostop=True)
    return arrived


def load(folder: str, name: str) -> ModuleType:
    """Return a module of tests whose environments are remote, and whose code travels with them."""
    spec = importlib.util.spec_from_file_location(f"{name}_on_ray", TESTS / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    for own, other in (("LocalEnvironment", OnRay), ("run", run_on_ray)):
        if hasattr(module, own):
            setattr(module, own, other)
    return module
