"""The reservations of processes in the cluster: missing resources, their totals, and their holders."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sage._extras import load
from sage.errors import UnsupportedPlanError, describe, hint, short

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sage._plan.logical import Place

    Amounts = Mapping[str, float]

HOLDERS_SHOWN_MAX = 5


def reserved(place: Place) -> dict[str, float]:
    """Return the reservation of a process, by Ray's names."""
    wanted = {"CPU": place.num_cpus, "GPU": place.num_gpus, **dict(place.resources)}
    return {name: amount for name, amount in wanted.items() if amount}


def listed(amounts: Amounts) -> str:
    """Return amounts in words."""
    return ", ".join(f"{name} {amount:g}" for name, amount in amounts.items()) or "nothing"


def never_there(wanted: Amounts, nodes: Sequence[Amounts]) -> str:
    """Describe the resources that every node lacks, even when idle, or return "" if one node has them all."""
    if any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        return ""
    for name, amount in wanted.items():
        largest = max((node.get(name, 0) for node in nodes), default=0)
        if largest < amount:
            total = sum(node.get(name, 0) for node in nodes)
            on_one = f" and {largest:g} on one node" if largest < total else ""
            return f"it reserves {name} {amount:g}, of which the cluster has {total:g}{on_one}"
    return f"it reserves {listed(wanted)}, which no node has together"


def check_there(places: Mapping[str, Place], nodes: Sequence[Amounts]) -> None:
    """Refuse reservations that a cluster of fixed size can never satisfy.

    Args:
        places: the reservation of each process of the job, by its name.
        nodes: the resources of each node.

    Raises:
        UnsupportedPlanError: one process, or all of them together, reserve more.
    """
    wanted = {name: reserved(place) for name, place in places.items()}
    whole: Counter[str] = Counter()
    for amounts in wanted.values():
        whole.update(amounts)
    there: Counter[str] = Counter()
    for node in nodes:
        there.update(node)
    missing = {name: never_there(amounts, nodes) for name, amounts in wanted.items()}
    missing["all processes of the job together"] = never_there(whole, [there]).replace("it reserves", "they reserve")
    for name, text in missing.items():
        if text:
            error = UnsupportedPlanError(f"{name} cannot have a place in the cluster: {text}")
            raise hint(error, "Reserve less, or give the address of a cluster that has more.")


def not_there_now(
    wanted: Amounts, nodes: Sequence[Amounts], free: Amounts, holders: Iterable[tuple[str, Amounts]]
) -> str:
    """Describe the resources missing for a process, and their holders.

    Args:
        wanted: its reservation.
        nodes: the resources of each node.
        free: the free resources of the whole cluster.
        holders: the actors of the cluster with their reservations.
    """
    never = never_there(wanted, nodes)
    if never:
        return never
    short_of = [name for name, amount in wanted.items() if free.get(name, 0) < amount]
    texts = []
    for name in short_of or wanted:
        total = sum(node.get(name, 0) for node in nodes)
        held = [f"{who} {amounts[name]:g}" for who, amounts in holders if amounts.get(name)]
        more = f" and {len(held) - HOLDERS_SHOWN_MAX} more" if len(held) > HOLDERS_SHOWN_MAX else ""
        by = f", held by {', '.join(held[:HOLDERS_SHOWN_MAX])}{more}" if held else ""
        texts.append(f"{name} {wanted[name]:g}, of which {free.get(name, 0):g} of {total:g} is free{by}")
    return f"it reserves {'; '.join(texts)}"


def nodes_now() -> list[dict[str, float]]:
    """Return the resources of each node of the cluster."""
    return [dict(node["Resources"]) for node in load("ray", "ray").nodes() if node["Alive"]]


def missing_now(wanted: Amounts) -> str:
    """Describe the resources currently missing for a process, as far as the cluster tells."""
    ray = load("ray", "ray")
    try:
        return not_there_now(wanted, nodes_now(), ray.available_resources(), _holders())
    except load("ray.exceptions", "ray").RayError as error:
        return f"the cluster does not say what it has: {describe(error)}"


def _holders() -> list[tuple[str, dict[str, float]]]:
    """Return every actor that runs, with its reservation; Ray tells that to its own programs only."""
    try:
        accessor = load("ray._private.state", "ray").state._connect_and_get_accessor()
        table = load("ray.core.generated.gcs_pb2", "ray").ActorTableData
        actors = [table.FromString(data) for data in accessor.get_actor_table(None, "ALIVE")]
        return [(_name_of(actor), dict(actor.required_resources)) for actor in actors]
    except (AttributeError, TypeError):  # another version of Ray
        return []


def _name_of(actor: Any) -> str:
    return f"{short(actor.name) if actor.name else actor.class_name} (process {actor.pid})"
