"""What follows a write to a Deployment: the controllers, the scheduler, the kubelets."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from tests.support.kubernetes_objects import (
    CONTROLLER,
    DELETION_COST,
    DESIRED_REPLICAS,
    KINDS,
    MAX_REPLICAS,
    REVISION,
    TEMPLATE_HASH,
    Object,
    Store,
    Writer,
    deletion_cost,
    random_name,
    stamp,
    wanted_replicas,
)


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
    pods: Sequence[Object], related: Sequence[Object], now: datetime, rng: random.Random
) -> list[Object]:
    """Pods in the order in which the ReplicaSet controller deletes them, first victim first.

    The rules are those of ActivePodsWithRanks.Less (pkg/controller/controller_utils.go); `related`
    are the pods of every ReplicaSet of the same Deployment, as that controller counts neighbours.
    """
    crowd = Counter(pod["spec"].get("nodeName", "") for pod in related if is_active(pod))

    def first_rules(pod: Object) -> tuple[bool, int, bool, int, int]:
        node = pod["spec"].get("nodeName", "")
        phase = {"Pending": 0, "Unknown": 1, "Running": 2}.get(pod["status"].get("phase", ""), 0)
        cost = deletion_cost((pod["metadata"].get("annotations") or {}).get(DELETION_COST, "0"))
        return bool(node), phase, ready_since(pod) is not None, cost or 0, -crowd[node]

    def compare(a: Object, b: Object) -> int:
        left, right = first_rules(a), first_rules(b)
        if left != right:
            return -1 if left < right else 1
        created = [pod["metadata"].get("creationTimestamp") for pod in (a, b)]
        uids = _uid(a), _uid(b)
        return (
            _younger_first(ready_since(a), ready_since(b), uids, now)
            or _restarts(b) - _restarts(a)
            or _younger_first(created[0], created[1], uids, now)
        )

    shuffled = rng.sample(pods, len(pods))  # upstream's sort is not stable: ties are luck
    return sorted(shuffled, key=functools.cmp_to_key(compare))


def _younger_first(a: str | None, b: str | None, uids: tuple[str, str], now: datetime) -> int:
    """Compares ages by powers of two of their nanoseconds; the uid settles equal powers."""
    if a == b:
        return 0
    if not a or not b:
        return -1 if not a else 1
    left, right = (_power(now - datetime.fromisoformat(moment)) for moment in (a, b))
    first = left < right if left != right else uids[0] < uids[1]
    return -1 if first else 1


def _power(age: timedelta) -> int:
    nanoseconds = age / timedelta(microseconds=1) * 1000
    return int(math.log2(nanoseconds)) if nanoseconds > 0 else -1


def _restarts(pod: Object) -> int:
    statuses = pod["status"].get("containerStatuses", [])
    return max((int(s.get("restartCount", 0)) for s in statuses), default=0)


def proportional_sizes(deployment: Object, sets: Sequence[Object]) -> list[int]:
    """Sizes for the ReplicaSets of a Deployment that is scaled in the middle of a rollout.

    `sets` are those with pods, the newest first. As in pkg/controller/deployment/sync.go, each
    gets its share of the difference and the largest gets the rest.
    """
    desired = wanted_replicas(deployment)
    limit = desired + max_surge(deployment) if desired else 0
    sizes = [wanted_replicas(owned) for owned in sets]
    to_add = limit - sum(sizes)
    newer_first = range(len(sets)) if to_add > 0 else reversed(range(len(sets)))
    largest_first = sorted(newer_first, key=lambda i: -sizes[i])
    left = to_add
    for i in largest_first:
        before = int(sets[i]["metadata"].get("annotations", {}).get(MAX_REPLICAS, 0))
        before = before or deployment["status"].get("replicas", 0)
        share = -sizes[i]
        if desired:
            share = math.floor(sizes[i] * limit / before + 0.5) - sizes[i] if before else 0
        share = min(share, left) if to_add > 0 else max(share, left)
        sizes[i] += share if left else 0
        left -= share if left else 0
    sizes[largest_first[0]] = max(0, sizes[largest_first[0]] + left)
    return sizes


def max_surge(deployment: Object) -> int:
    rolling = deployment["spec"].get("strategy", {}).get("rollingUpdate")
    surge = rolling.get("maxSurge", "25%") if rolling is not None else 0
    if isinstance(surge, int):
        return surge
    return math.ceil(int(surge.rstrip("%")) * wanted_replicas(deployment) / 100)


class Controllers:
    """The Deployment and ReplicaSet controllers; scheduler and kubelets are instant."""

    def __init__(self, store: Store, nodes: Sequence[str]) -> None:
        self.store = store
        self.nodes = nodes
        self.held: set[tuple[str, str]] = set()  # rollouts that make no progress
        self.keep_terminating = False
        self.deleted_pods: list[str] = []

    def reconcile(self, namespace: str, name: str) -> None:
        """Brings the pods to what the Deployment wants, as it is now."""
        for step in (
            self._keep_proportions, self._replace_pods, self._roll_out, self._replace_pods,
            self._report,
        ):  # fmt: skip
            deployment = self.store.get("deployments", namespace, name)
            if deployment is not None:
                step(deployment)

    def sets(self, deployment: Object) -> list[Object]:
        """The Deployment's ReplicaSets, the newest first."""
        owned = [s for s in self._all(deployment, "replicasets") if _owner(s) == _uid(deployment)]
        return sorted(owned, key=lambda s: -int(s["metadata"]["annotations"][REVISION]))

    def pods(self, owner: Object) -> list[Object]:
        """The pods of a Deployment or a ReplicaSet."""
        if owner["kind"] == "Deployment":
            return [pod for owned in self.sets(owner) for pod in self.pods(owned)]
        return [pod for pod in self._all(owner, "pods") if _owner(pod) == _uid(owner)]

    def start_rollout(self, deployment: Object, new_pods: int, old_pods: int) -> None:
        """Leaves the Deployment with pods of an old and a new template, going no further."""
        meta = deployment["metadata"]
        self.held.add((meta["namespace"], meta["name"]))
        new = copy.deepcopy(deployment)
        template = new["spec"]["template"].setdefault("metadata", {})
        restarted = {"kubectl.kubernetes.io/restartedAt": stamp(self.store.clock())}
        template["annotations"] = {**template.get("annotations", {}), **restarted}
        new = self.store.update(KINDS["deployments"], deployment, new, Writer("kubectl-rollout"))
        for owned in self.sets(new):
            self._set_size(new, owned, old_pods)
        self._set_size(new, self._current_set(new, 0), new_pods)

    def _all(self, neighbour: Object, resource: str) -> list[Object]:
        return self.store.find(resource, neighbour["metadata"]["namespace"])

    def _write(self, old: Object, new: Object, subresource: str = "") -> Object:
        kind = KINDS[f"{old['kind'].lower()}s"]
        return self.store.update(kind, old, new, Writer(CONTROLLER, subresource))

    def _stands(self, deployment: Object) -> bool:
        meta = deployment["metadata"]
        held = (meta["namespace"], meta["name"]) in self.held
        return held or bool(deployment["spec"].get("paused"))

    def _keep_proportions(self, deployment: Object) -> None:
        """Shares out a changed number of pods between the ReplicaSets of a rollout."""
        desired = wanted_replicas(deployment)
        active = [s for s in self.sets(deployment) if wanted_replicas(s)]
        known = {s["metadata"]["annotations"].get(DESIRED_REPLICAS) for s in active}
        if known <= {str(desired)} or not (len(active) > 1 or self._stands(deployment)):
            return
        sizes = [desired] if len(active) == 1 else proportional_sizes(deployment, active)
        for owned, size in zip(active, sizes, strict=True):
            self._set_size(deployment, owned, size)

    def _roll_out(self, deployment: Object) -> None:
        """Gives all pods to the ReplicaSet of the present template."""
        if self._stands(deployment):
            return
        desired = wanted_replicas(deployment)
        current = self._current_set(deployment, desired)
        for owned in self.sets(deployment):
            self._set_size(deployment, owned, desired if _uid(owned) == _uid(current) else 0)

    def _current_set(self, deployment: Object, size: int) -> Object:
        """The ReplicaSet of the Deployment's template, made with `size` pods if there is none."""
        spec = deployment["spec"]
        digest = hashlib.sha256(json.dumps(spec["template"], sort_keys=True).encode()).digest()
        suffix = random_name(random.Random(digest), 10)
        owned = self.sets(deployment)
        last = int(owned[0]["metadata"]["annotations"][REVISION]) if owned else 0
        for found in owned:
            if found["metadata"]["labels"][TEMPLATE_HASH] == suffix:
                if found is owned[0]:
                    return found
                new = copy.deepcopy(found)  # a rollback: the old template is the newest again
                new["metadata"]["annotations"][REVISION] = str(last + 1)
                return self._write(found, new)
        template, selector = copy.deepcopy(spec["template"]), copy.deepcopy(spec["selector"])
        template.setdefault("metadata", {}).setdefault("labels", {})[TEMPLATE_HASH] = suffix
        selector.setdefault("matchLabels", {})[TEMPLATE_HASH] = suffix
        meta = deployment["metadata"]
        obj = {
            "metadata": {
                "name": f"{meta['name']}-{suffix}", "namespace": meta["namespace"],
                "labels": template["metadata"]["labels"],
                "annotations": {**_set_annotations(deployment), REVISION: str(last + 1)},
                "ownerReferences": [_reference(deployment)],
            },
            "spec": {"replicas": size, "selector": selector, "template": template},
            "status": {"replicas": 0},
        }  # fmt: skip
        return self.store.create(KINDS["replicasets"], obj, Writer(CONTROLLER))

    def _set_size(self, deployment: Object, owned: Object, size: int) -> None:
        new = copy.deepcopy(owned)
        new["spec"]["replicas"] = size
        new["metadata"]["annotations"] |= _set_annotations(deployment)
        self._write(owned, new)

    def _replace_pods(self, deployment: Object) -> None:
        """The ReplicaSet controller: creates the pods that lack, deletes those in surplus."""
        rng, now = self.store.rng, self.store.clock()
        for owned in self.sets(deployment):
            active = [pod for pod in self.pods(owned) if is_active(pod)]
            surplus = len(active) - wanted_replicas(owned)
            if surplus > 0:
                for pod in deletion_order(active, self.pods(deployment), now, rng)[:surplus]:
                    self.delete_pod(pod)
            for _ in range(-surplus):
                self._create_pod(deployment, owned)
            self._write_status(owned, self._counts(self.pods(owned), owned))

    def delete_pod(self, pod: Object) -> None:
        """Deletes a pod, or marks it as terminating while the test keeps such pods."""
        self.deleted_pods.append(pod["metadata"]["name"])
        if not self.keep_terminating:
            return self.store.remove(KINDS["pods"], pod)
        new = copy.deepcopy(pod)
        new["metadata"]["deletionTimestamp"] = stamp(self.store.clock() + timedelta(seconds=30))
        new["metadata"]["deletionGracePeriodSeconds"] = 30
        self._write(pod, new)

    def _create_pod(self, deployment: Object, owned: Object) -> None:
        meta, template = owned["metadata"], owned["spec"]["template"]
        node = self._next_node(deployment)
        base = f"{meta['name']}-"
        spec = copy.deepcopy(template["spec"]) | ({"nodeName": node} if node else {})
        self.store.create(
            KINDS["pods"],
            {
                "metadata": {
                    "generateName": base, "namespace": meta["namespace"],
                    "name": base[:58] + random_name(self.store.rng, 5),
                    "labels": dict(template["metadata"]["labels"]),
                    "ownerReferences": [_reference(owned)],
                },
                "spec": spec,
                "status": pod_status(spec, stamp(self.store.clock())),
            },
            Writer(CONTROLLER),
        )  # fmt: skip

    def _next_node(self, deployment: Object) -> str:
        used = Counter(pod["spec"].get("nodeName") for pod in self.pods(deployment))
        return min(self.nodes, key=lambda node: used[node], default="")

    def _counts(self, pods: Sequence[Object], owner: Object) -> Object:
        active = [pod for pod in pods if is_active(pod)]
        ready = sum(1 for pod in active if ready_since(pod) is not None)
        counts = {"replicas": len(active), "observedGeneration": owner["metadata"]["generation"]}
        return counts | ({"readyReplicas": ready, "availableReplicas": ready} if ready else {})

    def _report(self, deployment: Object) -> None:
        """The Deployment's status: so many are there, and so many are ready."""
        status = self._counts(self.pods(deployment), deployment)
        newest = self.sets(deployment)[:1]
        updated = [pod for owned in newest for pod in self.pods(owned) if is_active(pod)]
        status["updatedReplicas"] = len(updated)
        missing = wanted_replicas(deployment) - status.get("readyReplicas", 0)
        if missing > 0:
            status["unavailableReplicas"] = missing
        annotations = newest[0]["metadata"]["annotations"] if newest else {}
        revision = {k: v for k, v in annotations.items() if k == REVISION}
        self._write_status(deployment, status, revision)

    def _write_status(
        self, old: Object, status: Object, annotations: Mapping[str, str] | None = None
    ) -> None:
        new = copy.deepcopy(old)
        new["status"] = status
        if annotations:
            new["metadata"].setdefault("annotations", {}).update(annotations)
        self._write(old, new, "status")


def pod_status(spec: Object, now: str) -> Object:
    """The status of a new pod: running and ready at once, or waiting for a node."""
    if not spec.get("nodeName"):
        return {"phase": "Pending", "qosClass": "BestEffort"}
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": now}
        for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    ]
    containers = [
        {
            "name": container["name"], "image": container["image"], "imageID": "sha256:0",
            "ready": True, "restartCount": 0, "state": {"running": {"startedAt": now}},
        }
        for container in spec["containers"]
    ]  # fmt: skip
    return {
        "phase": "Running", "conditions": conditions, "containerStatuses": containers,
        "startTime": now, "qosClass": "BestEffort",
    }  # fmt: skip


def _uid(obj: Object) -> str:
    return str(obj["metadata"]["uid"])


def _owner(obj: Object) -> str:
    owners = [o["uid"] for o in obj["metadata"].get("ownerReferences", []) if o.get("controller")]
    return str(owners[0]) if owners else ""


def _reference(owner: Object) -> Object:
    return {
        "apiVersion": owner["apiVersion"], "kind": owner["kind"], "uid": _uid(owner),
        "name": owner["metadata"]["name"], "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip


def _set_annotations(deployment: Object) -> dict[str, str]:
    """What a ReplicaSet bears of its Deployment: its annotations and its size."""
    own = (REVISION, "kubectl.kubernetes.io/last-applied-configuration")
    copied = deployment["metadata"].get("annotations", {}).items()
    desired = wanted_replicas(deployment)
    most = desired + max_surge(deployment)
    sizes = {DESIRED_REPLICAS: str(desired), MAX_REPLICAS: str(most)}
    return {k: v for k, v in copied if k not in own} | sizes
