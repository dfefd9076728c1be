"""What follows a write: the ReplicaSet controller, the scheduler and the kubelets.

The Deployment controller is in kubernetes_deployments.py. Both follow upstream's controllers
(pkg/controller/replicaset, pkg/controller/deployment) step by step; where they differ, as they
read the store and no cache, is what tests/test_kubernetes_contract.py holds against the real ones.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from tests.support.kubernetes_deployments import DeploymentController
from tests.support.kubernetes_objects import (
    CONTROLLER,
    DELETION_COST,
    KINDS,
    Object,
    Store,
    Writer,
    controller_of,
    controller_reference,
    deletion_cost,
    merge,
    replace_controller,
    selects,
    stamp,
    uid_of,
    wanted_replicas,
)

NODES = ("node-a", "node-b", "node-c")
NAME_CHARACTERS = "bcdfghjklmnpqrstvwxz2456789"
BURST = 500  # the most pods that one sync makes or deletes


# --- Which pods go first ------------------------------------------------------------------------


def is_active(pod: Object) -> bool:
    finished = pod["status"].get("phase") in ("Succeeded", "Failed")
    return not finished and "deletionTimestamp" not in pod["metadata"]


def ready_since(pod: Object) -> str | None:
    """When the pod became ready, None if it is not."""
    for condition in pod["status"].get("conditions", []):
        if condition["type"] == "Ready" and condition["status"] == "True":
            return str(condition.get("lastTransitionTime") or "")
    return None


def deletion_order(
    pods: Sequence[Object],
    related: Sequence[Object],
    now: datetime,
    luck: Callable[[list[Object]], list[Object]],
) -> list[Object]:
    """Pods in the order in which the ReplicaSet controller deletes them, first victim first.

    The rules are those of ActivePodsWithRanks.Less (pkg/controller/controller_utils.go); `related`
    are the pods of every ReplicaSet of the same Deployment, as that controller counts neighbours.
    Upstream's sort is not stable: `luck` is the order of those that no rule tells apart.
    """
    crowd = Counter(pod["spec"].get("nodeName", "") for pod in related if is_active(pod))

    def age(moment: str) -> int:
        """A power of two of nanoseconds, as upstream compares ages: the younger goes first."""
        seconds = (now - datetime.fromisoformat(moment)).total_seconds() if moment else 0
        return int(seconds * 1e9).bit_length()

    def rank(pod: Object) -> tuple[bool | int, ...]:
        meta, status, node = pod["metadata"], pod["status"], pod["spec"].get("nodeName", "")
        phase = {"Pending": 0, "Unknown": 1, "Running": 2}.get(status.get("phase", ""), 0)
        cost = deletion_cost((meta.get("annotations") or {}).get(DELETION_COST, "0")) or 0
        return bool(node), phase, ready_since(pod) is not None, cost, -crowd[node]

    def restarts(pod: Object) -> int:
        containers = pod["status"].get("containerStatuses", [])
        return max((container["restartCount"] for container in containers), default=0)

    def compare(one: Object, other: Object) -> int:
        """Times in the same power of two of nanoseconds are as good as one, and the uid decides."""
        a, b = rank(one), rank(other)
        if a != b:
            return -1 if a < b else 1
        uids = -1 if uid_of(one) < uid_of(other) else 1
        since, others = ready_since(one), ready_since(other)
        if since and others and since != others:
            return age(since) - age(others) or uids
        if restarts(one) != restarts(other):
            return restarts(other) - restarts(one)
        since, others = (str(pod["metadata"]["creationTimestamp"]) for pod in (one, other))
        return (age(since) - age(others) or uids) if since != others else 0

    return sorted(luck(list(pods)), key=functools.cmp_to_key(compare))


# --- The controllers ----------------------------------------------------------------------------


class Controllers:
    """All of them. `instant`: they are done before a write is answered, else each takes its steps
    when `step` says so, and a new pod is pending until its node does.

    `ended` is told of each pod that is deleted.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.instant = True
        self.keep_terminating = False
        self.deleted_pods: list[str] = []
        self.nodes: Sequence[str] = NODES  # without one, pods stay pending
        self.accounts = {"default"}  # the ServiceAccounts: a pod of another one is not created
        self.ended: Callable[[Object], object] = lambda pod: None
        self.luck: Callable[[list[Object]], list[Object]] = self._shuffled
        self.deployments = DeploymentController(store)

    def _shuffled(self, pods: list[Object]) -> list[Object]:
        return self.store.rng.sample(pods, len(pods))

    # Steps

    def reconcile(self, namespace: str) -> None:
        """Follows a write, if they do so by themselves."""
        if self.instant:
            self.run(namespace)

    def run(self, namespace: str) -> None:
        """All of them, until nothing changes any more."""
        for _ in range(1000):
            before = self.store.revision
            for actor, name in self.steps(namespace):
                self.step(namespace, actor, name)
            if self.store.revision == before:
                return
        raise AssertionError("the controllers do not come to rest")

    def steps(self, namespace: str) -> list[tuple[str, str]]:
        """Who could take a step now: resource and name. Most would find nothing to do."""
        return [
            (resource, obj["metadata"]["name"])
            for resource in ("deployments", "replicasets", "pods")
            for obj in self.store.find(resource, namespace)
            if resource != "pods" or (not self.instant and _unfinished(obj))
        ]

    def step(self, namespace: str, resource: str, name: str) -> bool:
        """One sync of a Deployment or a ReplicaSet by its controller, or a pod's next stage on its
        way to run or to its end. Whether that wrote anything."""
        before, obj = self.store.revision, self.store.get(resource, namespace, name)
        if obj is not None and resource == "deployments":
            self.deployments.sync(obj)
        elif obj is not None and resource == "replicasets":
            self._sync_set(obj)
        elif obj is not None:
            self._advance(obj)
        return self.store.revision != before

    # What there is

    def sets(self, deployment: Object) -> list[Object]:
        """The Deployment's ReplicaSets."""
        return self.deployments.sets(deployment)

    def pods(self, owner: Object) -> list[Object]:
        """The pods of a Deployment or a ReplicaSet."""
        if owner["kind"] == "Deployment":
            return [pod for owned in self.sets(owner) for pod in self.pods(owned)]
        found = self.store.find("pods", owner["metadata"]["namespace"])
        return [pod for pod in found if controller_of(pod) == uid_of(owner)]

    # The ReplicaSet controller

    def _sync_set(self, owned: Object) -> None:
        """What syncReplicaSet does: claims pods, makes or deletes some, and reports on those that
        it found, so that the next sync reports on the new ones."""
        active = [pod for pod in self._claim(owned) if is_active(pod)]
        surplus, failure = len(active) - wanted_replicas(owned), ""
        if surplus > 0:
            self._delete_some(owned, active, min(surplus, BURST))
        elif surplus < 0:
            failure = self._create_some(owned, min(-surplus, BURST))
        status = {
            "replicas": len(active),
            "fullyLabeledReplicas": len(active),
            "readyReplicas": sum(ready_since(pod) is not None for pod in active),
            "observedGeneration": owned["metadata"]["generation"],
        }
        status["availableReplicas"] = status["readyReplicas"]
        found: Object = {"replicas": status["replicas"]} | {k: n for k, n in status.items() if n}
        if failure:
            reason = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate"}
            found["conditions"] = [{**reason, "message": failure}]
        self.store.update(owned, {**owned, "status": found}, Writer(CONTROLLER, "status"))

    def _claim(self, owned: Object) -> list[Object]:
        """The pods that it controls: adopts the orphans that its selector meets, and lets go of
        those whose labels it does not meet any more."""
        meta, selector, claimed = owned["metadata"], owned["spec"]["selector"], []
        for pod in self.store.find("pods", meta["namespace"]):
            owner = controller_of(pod)
            if owner not in ("", meta["uid"]) or (not owner and not is_active(pod)):
                continue
            meets = selects(selector, pod["metadata"].get("labels") or {})
            if meets == bool(owner):
                claimed += [pod] if meets else []
                continue
            reference = controller_reference(owned) if meets else None
            pod = self.store.update(pod, replace_controller(pod, reference), Writer(CONTROLLER))
            claimed += [pod] if meets else []
        return claimed

    def _related(self, owned: Object) -> list[Object]:
        """The pods of all ReplicaSets with the same controller."""
        found = self.store.find("replicasets", owned["metadata"]["namespace"])
        owner = controller_of(owned)
        uids = {uid_of(owned)} | {uid_of(one) for one in found if owner == controller_of(one) != ""}
        pods = self.store.find("pods", owned["metadata"]["namespace"])
        return [pod for pod in pods if controller_of(pod) in uids]

    def _delete_some(self, owned: Object, active: list[Object], number: int) -> None:
        now, related = self.store.clock(), self._related(owned)
        order = deletion_order(active, related, now, self.luck) if number < len(active) else active
        for pod in order[:number]:
            self.delete_pod(pod)

    def _create_some(self, owned: Object, number: int) -> str:
        """Creates pods; why it could not, if so."""
        template = owned["spec"]["template"]
        account = template["spec"].get("serviceAccountName", "default")
        if account not in self.accounts:
            base, space = owned["metadata"]["name"], owned["metadata"]["namespace"]
            return (
                f'pods "{base}-" is forbidden: error looking up service account {space}/{account}'
            )
        used = Counter(pod["spec"].get("nodeName", "") for pod in self._related(owned))
        for _ in range(number):
            node = self._free_node(used) if self.instant else ""
            used[node] += 1
            self._create_pod(owned, node)
        return ""

    def _free_node(self, used: Mapping[str, int]) -> str:
        return min(self.nodes, key=lambda node: used[node], default="")

    def _create_pod(self, owned: Object, node: str) -> None:
        template, space = owned["spec"]["template"], owned["metadata"]["namespace"]
        spec = template["spec"] | ({"nodeName": node} if node else {})
        name = self._new_name(space, f"{owned['metadata']['name']}-"[:58])
        meta = {
            **template["metadata"],
            "name": name,
            "namespace": space,
            "ownerReferences": [controller_reference(owned)],
        }
        status = pod_status(spec, self.store.clock()) if node else {"phase": "Pending"}
        pod = {"metadata": meta, "spec": spec, "status": status}
        self.store.create(KINDS["pods"], pod, Writer(CONTROLLER))

    def _new_name(self, namespace: str, stem: str) -> str:
        while True:
            name = stem + "".join(self.store.rng.choices(NAME_CHARACTERS, k=5))
            if self.store.get("pods", namespace, name) is None:
                return name

    # Scheduler and kubelet

    def _advance(self, pod: Object) -> None:
        """Pending, then on a node, then running and ready; once terminating, gone."""
        if "deletionTimestamp" in pod["metadata"]:
            if not self.keep_terminating:
                self.store.remove(pod)
        elif not pod["spec"].get("nodeName"):
            used = Counter(
                other["spec"].get("nodeName", "")
                for other in self.store.find("pods", pod["metadata"]["namespace"])
            )
            assigned = merge(pod, {"spec": {"nodeName": self._free_node(used) or None}})
            self.store.update(pod, assigned, Writer("kube-scheduler"))
        elif pod["status"].get("phase") == "Pending":
            status = pod_status(pod["spec"], self.store.clock())
            self.store.update(pod, {**pod, "status": status}, Writer("kubelet", "status"))

    # Ends

    def delete_pod(self, pod: Object) -> None:
        """Deletes a pod, or marks it as terminating: its node ends it, unless the test keeps it."""
        if "deletionTimestamp" in pod["metadata"]:
            return
        self.deleted_pods.append(pod["metadata"]["name"])
        self.ended(pod)
        if self.instant and not self.keep_terminating:
            return self.store.remove(pod)
        end = stamp(self.store.clock() + timedelta(seconds=30))
        ending = merge(pod, {"metadata": {"deletionTimestamp": end}})
        self.store.update(pod, ending, Writer(CONTROLLER))
        return None

    def delete(self, obj: Object, orphan: bool) -> None:
        """Deletes an object, and what it controls, unless that is to be orphaned."""
        if obj["kind"] == "Pod":
            return self.delete_pod(obj)
        self.store.remove(obj)
        for owned in self.sets(obj) if obj["kind"] == "Deployment" else self.pods(obj):
            if orphan:
                self.store.update(owned, replace_controller(owned, None), Writer(CONTROLLER))
            else:
                self.delete(owned, orphan)
        return None


def _unfinished(pod: Object) -> bool:
    meta, phase = pod["metadata"], pod["status"].get("phase")
    return "deletionTimestamp" in meta or phase == "Pending"


def pod_status(spec: Object, now: datetime) -> Object:
    """The status of a pod that is running and ready; whole, as `make bench` has the client's typed
    models read it."""
    since = stamp(now)
    started = {"imageID": "sha256:0", "ready": True, "restartCount": 0}
    true = {"status": "True", "lastTransitionTime": since}
    kinds = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    return {
        "phase": "Running",
        "startTime": since,
        "conditions": [{"type": kind, **true} for kind in kinds],
        "containerStatuses": [{**one, **started} for one in spec["containers"]],
    }
