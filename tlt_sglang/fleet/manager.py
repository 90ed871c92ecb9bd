"""The manager of a fleet: a detached actor that has Ray keep a keeper for each member.

It decides nothing that is not in the plan. Where it dies Ray starts it again, it finds the keepers
that live by their names, and makes those that are missing. Nodes may join and leave: each gets an
exporter, and what a lost one has left in the store is removed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from tlt_sglang.fleet.keeper import FleetStatus, Keeper, MemberStatus
from tlt_sglang.fleet.plan import NAMESPACE, Member, Plan
from tlt_sglang.harvest import announce
from tlt_sglang.weights import files
from tlt_sglang.weights.lease import FOLDER

logger = logging.getLogger(__name__)

MANAGER = "manager"
LOOK_SECONDS = 1.0
ASK_SECONDS = 2.0
"""Time that keepers have to answer a question."""
LAST_ASK_SECONDS = 10.0
"""The same before the end: the member of a keeper that is late would outlive `stop`."""
STOP_SECONDS = 90.0
Actor = Any
"""A handle of an actor: Ray gives its methods no types."""


class Manager:
    """Keeps the members of `plan` running until `stop`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._keepers: dict[Member, Actor] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._group = self._placement()
        self._look()
        self._thread = threading.Thread(target=self._follow, name="fleet", daemon=True)
        self._thread.start()

    def status(self) -> FleetStatus:
        """Return the members and their states."""
        with self._lock:
            keepers = dict(self._keepers)
        statuses = _ask(keepers)
        waiting = [member.name for member in keepers if member not in statuses]
        return FleetStatus(self._plan, list(statuses.values()), waiting)

    def stop(self) -> None:
        """End all members, engines first, so that trainers can save what those have sent."""
        with self._lock:
            self._stopped = True
            keepers = dict(self._keepers)
            self._keepers.clear()
        placed = _ask(keepers, LAST_ASK_SECONDS)
        for kind in ("engine", "trainer", "exporter", "coordinator"):
            ends = [keepers[member].stop.remote() for member in placed if member.kind == kind]
            if ends:
                ray.wait(ends, num_returns=len(ends), timeout=STOP_SECONDS)
            for member, keeper in keepers.items():
                if member.kind == kind:
                    ray.kill(keeper, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)

    def _placement(self) -> PlacementGroup | None:
        """Return the placement group of the members that need resources, made where it is not."""
        if not (bundles := self._plan.bundles()):
            return None
        name = self._plan.actor("members")
        group: PlacementGroup
        try:
            group = get_placement_group(name)
        except ValueError:
            group = placement_group(bundles, strategy="SPREAD", name=name, lifetime="detached")
        return group

    def _follow(self) -> None:
        while not self._stopped:
            time.sleep(LOOK_SECONDS)
            try:
                self._look()
            except Exception:  # what runs goes on, and the next look may succeed
                logger.exception("The members of %s could not be looked at", self._plan.name)

    def _look(self) -> None:
        """Make the keepers that are missing, and clear up after nodes that have left."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        with self._lock:
            if self._stopped:
                return
            here = ray.get_runtime_context().get_node_id()
            # Manager and coordinator should not be lost together, and either may move.
            others = [node["NodeID"] for node in nodes if node["NodeID"] != here]
            self._keep(Member("coordinator"), _on_node(min(others, default=here), stays=False))
            exporters = {Member("exporter", node["NodeID"][:8]): node["NodeID"] for node in nodes}
            for member, node_id in exporters.items():
                self._keep(member, _on_node(node_id))
            for member in [m for m in self._keepers if m.kind == "exporter"]:
                if member not in exporters:
                    ray.kill(self._keepers.pop(member), no_restart=True)
            for bundle, member in enumerate(self._plan.placed()):
                self._keep(member, self._in_bundle(member, bundle))
        left = {node["NodeManagerHostname"] for node in ray.nodes() if not node["Alive"]}
        left -= {node["NodeManagerHostname"] for node in nodes}
        if not left:
            return
        store = self._plan.store
        with contextlib.suppress(OSError):
            for folder in (store / announce.FOLDER, store / FOLDER, *store.glob("v*")):
                files.remove_owned_by(left, folder)

    def _keep(self, member: Member, place: dict[str, Any]) -> None:
        if member in self._keepers:
            return
        self._keepers[member] = (
            keeper_class()
            .options(
                name=self._plan.actor(member.name),
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=4,
                **place,
            )
            .remote(self._plan, member)
        )

    def _in_bundle(self, member: Member, bundle: int) -> dict[str, Any]:
        assert self._group is not None
        strategy = PlacementGroupSchedulingStrategy(self._group, bundle)
        size = self._plan.engine if member.kind == "engine" else self._plan.trainer
        return {"num_cpus": size.cpus, "num_gpus": size.gpus, "scheduling_strategy": strategy}


def _ask(
    keepers: Mapping[Member, Actor], seconds: float = ASK_SECONDS
) -> dict[Member, MemberStatus]:
    """Return the status of each member whose keeper answers in time."""
    answers = {member: keeper.status.remote() for member, keeper in keepers.items()}
    if answers:
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=seconds)
    statuses = {}
    for member, answer in answers.items():
        with contextlib.suppress(RayError):
            statuses[member] = ray.get(answer, timeout=0)
    return statuses


class _NodeKeeper(Keeper):
    """A keeper that asks Ray where it is."""

    def __init__(self, plan: Plan, member: Member) -> None:
        node = ray.get_runtime_context().get_node_id()
        super().__init__(plan, member, ray.util.get_node_ip_address(), node)


def keeper_class() -> Any:
    """Return the actor class of keepers."""
    return ray.remote(_NodeKeeper)


def manager_class() -> Any:
    """Return the actor class of managers."""
    return ray.remote(Manager)


def _on_node(node: str, *, stays: bool = True) -> dict[str, Any]:
    return {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=not stays),
    }
