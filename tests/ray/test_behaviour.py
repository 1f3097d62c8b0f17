"""The tests of streams on one machine, run on a cluster; without `--proof`, each with its first parameters only."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from support.ray_tests import OnRay, load

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]

MODULES = (
    "test_methods",
    "test_policies",
    "test_connected",
    "test_keys",
    "test_stateful",
    "test_states",
    "test_loops",
    "test_batches",
    "test_async",
    "test_fused",
)


@pytest.fixture(autouse=True)
def _address(ray_address: str) -> None:
    OnRay.address = ray_address


def _runs_on_ray(test: Any) -> bool:
    """Tell whether a test takes a backend, and does not look at changes that only its own process has."""
    marks = {mark.name for mark in getattr(test, "pytestmark", ())}
    return "backend" in inspect.signature(test).parameters and "in_one_process" not in marks


for _name in MODULES:
    for _test, _function in vars(load("stream", _name)).items():
        if _test.startswith("test_") and _runs_on_ray(_function):
            globals()[f"{_test}_of_{_name}"] = _function
