"""What a trial holds of the cluster, and how many have a place there."""

from __future__ import annotations

import math

import ray

from raysseg.config import Scaling
from raysseg.runtime import gpus_per_worker
from raysseg.schema import InputError


def trains_here(scaling: Scaling) -> bool:
    """Whether a trial trains in its own process."""
    return scaling.max_workers <= 1


def resources(scaling: Scaling) -> dict[str, float]:
    """What Ray Tune reserves for a trial; one of several workers looks on, and would take a CPU from them."""
    return _each(scaling) if trains_here(scaling) else {"memory": 1e6}


def room(scaling: Scaling, wanted: int | None) -> int:
    """How many trials run at once, of one scaling.

    Trials of one worker wait in Ray Tune for their place, which a cluster that grows may make: as many begin as are
    wanted. Those of several workers reserve theirs on their own: only as many begin as have one now.
    """
    if wanted is not None and trains_here(scaling):
        return wanted
    fits = _num_places(scaling)
    return min(fits, wanted or fits)


def check_room(scaling: Scaling, wanted: int | None) -> None:
    """Raises InputError where not even one trial has a place."""
    if room(scaling, wanted) > 0:
        return
    there = ray.cluster_resources()
    need = ", ".join(f"{amount:g} {name}s" for name, amount in _each(scaling).items())
    has = ", ".join(f"{there.get(name, 0):g} {name}s" for name in _each(scaling))
    raise InputError(
        f"scaling: a trial of {max(1, scaling.max_workers)} workers, {need} each, has no place in the cluster's {has}"
        f"{'' if trains_here(scaling) else ', of which data tasks need a CPU'}; lower scaling.workers, "
        "scaling.cpus_per_worker or scaling.gpus_per_worker; on a cluster that grows, set search.concurrent"
    )


def _num_places(scaling: Scaling) -> int:
    """Trials that have a place, node by node; one CPU is left to the data tasks of workers."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if not trains_here(scaling):
        largest = max(nodes, key=lambda node: float(node.get("CPU", 0.0)))
        largest["CPU"] = largest.get("CPU", 0.0) - 1
    slots = sum(_slots(node, _each(scaling)) for node in nodes)
    return slots // max(1, scaling.max_workers)


def _slots(node: dict[str, float], each: dict[str, float]) -> int:
    return max(0, min(math.floor(node.get(name, 0.0) / amount) for name, amount in each.items()))


def _each(scaling: Scaling) -> dict[str, float]:
    """Of a worker; one that trains in Ray Tune's process decodes there, too."""
    gpus = gpus_per_worker(scaling)
    cpus = max(1.0, scaling.cpus_per_worker) if trains_here(scaling) else scaling.cpus_per_worker
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
