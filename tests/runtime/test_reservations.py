"""What is said of a process that has no place in the cluster."""

from __future__ import annotations

import pytest

from sage import UnsupportedPlanError
from sage._plan.logical import Place
from sage._ray.reservations import check_there, never_there, not_there_now, reserved

NODES = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0, "disk": 2.0}]


def test_only_what_is_reserved_counts() -> None:
    assert reserved(Place("cluster", 0.5, 0, (("disk", 1.0),))) == {"CPU": 0.5, "disk": 1.0}


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({}, ""),
        ({"CPU": 8, "disk": 2}, ""),
        ({"GPU": 2}, "it reserves GPU 2, of which the cluster has 1"),
        ({"TPU": 1}, "it reserves TPU 1, of which the cluster has 0"),
        ({"CPU": 9}, "it reserves CPU 9, of which the cluster has 12 and 8 on one node"),
        ({"CPU": 5, "GPU": 1}, "it reserves CPU 5, GPU 1, which no node has together"),
    ],
)
def test_what_can_never_be(wanted: dict[str, float], text: str) -> None:
    assert never_there(wanted, NODES) == text


def test_what_is_held_by_others() -> None:
    holders: list[tuple[str, dict[str, float]]] = [("Trainer (process 7)", {"CPU": 8.0}), ("Idle (process 8)", {})]
    text = not_there_now({"CPU": 5}, NODES, {"CPU": 4.0}, holders)
    assert text == "it reserves CPU 5, of which 4 of 12 is free, held by Trainer (process 7) 8"
    many = [(f"one {number}", {"CPU": 1.0}) for number in range(7)]
    assert not_there_now({"CPU": 5}, NODES, {}, many).endswith("one 4 1 and 2 more")
    assert not_there_now({"TPU": 1}, NODES, {}, many) == "it reserves TPU 1, of which the cluster has 0"


def test_processes_have_to_fit_together() -> None:
    each = Place("cluster", 5)
    check_there({"one": each, "other": each}, NODES)
    with pytest.raises(UnsupportedPlanError, match="one cannot have a place in the cluster: it reserves CPU 20"):
        check_there({"one": Place("cluster", 20)}, NODES)
    together = "all processes of the job together .*: they reserve CPU 15, of which the cluster has 12"
    with pytest.raises(UnsupportedPlanError, match=together):
        check_there({"one": each, "other": each, "third": each}, NODES)
