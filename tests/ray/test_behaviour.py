"""The tests of streams on one machine, run on a cluster."""

from __future__ import annotations

import inspect

import pytest
from ray_tests import OnRay, load

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]

MODULES = (
    "test_methods",
    "test_policies",
    "test_connected",
    "test_keys",
    "test_loops",
    "test_batches",
    "test_async",
    "test_fused",
)


@pytest.fixture(autouse=True)
def _address(ray_address: str) -> None:
    OnRay.address = ray_address


for _name in MODULES:
    for _test, _function in vars(load("stream", _name)).items():
        if _test.startswith("test_") and "backend" in inspect.signature(_function).parameters:
            globals()[f"{_test}_of_{_name}"] = _function
