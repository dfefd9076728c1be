"""What follows a write to a Deployment: the controllers, the scheduler, the kubelets."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta

from tests.support.kubernetes_objects import (
    CONTROLLER,
    DELETION_COST,
    KINDS,
    REVISION,
    TEMPLATE_HASH,
    Object,
    Store,
    Writer,
    deletion_cost,
    merge,
    stamp,
    wanted_replicas,
)

NODES = ("node-a", "node-b", "node-c")


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

    def age(moment: str | None) -> int:
        """A power of two of nanoseconds, as upstream compares ages: the younger goes first."""
        seconds = (now - datetime.fromisoformat(moment)).total_seconds() if moment else 0
        return int(seconds * 1e9).bit_length()

    def rank(pod: Object) -> tuple[bool | int, ...]:
        meta, status, node = pod["metadata"], pod["status"], pod["spec"].get("nodeName", "")
        phase = {"Pending": 0, "Unknown": 1, "Running": 2}.get(status.get("phase", ""), 0)
        cost = deletion_cost((meta.get("annotations") or {}).get(DELETION_COST, "0")) or 0
        ready, containers = ready_since(pod), status.get("containerStatuses", [])
        restarts = max((container["restartCount"] for container in containers), default=0)
        stands = bool(node), phase, ready is not None, cost
        return *stands, -crowd[node], age(ready), -restarts, age(meta["creationTimestamp"])

    # Upstream's sort is not stable: ties are luck.
    return sorted(rng.sample(pods, len(pods)), key=rank)


class Controllers:
    """The Deployment and ReplicaSet controllers; scheduler and kubelets are instant."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.held: set[str] = set()  # the Deployments whose rollout makes no progress
        self.keep_terminating = False
        self.deleted_pods: list[str] = []

    def reconcile(self, namespace: str) -> None:
        """Brings the pods to what each Deployment wants, as it is now."""
        for step in (self._roll_out, self._replace_pods, self._report):
            for deployment in self.store.find("deployments", namespace):
                step(deployment)

    def sets(self, deployment: Object) -> list[Object]:
        """The Deployment's ReplicaSets, the newest first."""
        found = self.store.find("replicasets", deployment["metadata"]["namespace"])
        owned = [one for one in found if _owner(one) == _uid(deployment)]
        return sorted(owned, key=lambda s: -int(s["metadata"]["annotations"][REVISION]))

    def pods(self, owner: Object) -> list[Object]:
        """The pods of a Deployment or a ReplicaSet."""
        if owner["kind"] == "Deployment":
            return [pod for owned in self.sets(owner) for pod in self.pods(owned)]
        found = self.store.find("pods", owner["metadata"]["namespace"])
        return [pod for pod in found if _owner(pod) == _uid(owner)]

    def start_rollout(self, deployment: Object, new_pods: int, old_pods: int) -> None:
        """Leaves the Deployment with pods of an old and a new template, where it then stands: not
        even a scale changes the sizes, which upstream would share out in proportion."""
        self.held.add(_uid(deployment))
        restarted = {"kubectl.kubernetes.io/restartedAt": stamp(self.store.clock())}
        patch = {"spec": {"template": {"metadata": {"annotations": restarted}}}}
        new = self.store.update(deployment, merge(deployment, patch), Writer("kubectl-rollout"))
        for owned in self.sets(new):
            self._set_size(owned, old_pods)
        self._set_size(self._current_set(new, 0), new_pods)

    def _write(self, old: Object, patch: Object, subresource: str = "") -> None:
        self.store.update(old, merge(old, patch), Writer(CONTROLLER, subresource))

    def _roll_out(self, deployment: Object) -> None:
        """Gives all pods to the ReplicaSet of the present template."""
        if _uid(deployment) in self.held:
            return
        desired = wanted_replicas(deployment)
        current = self._current_set(deployment, desired)
        for owned in self.sets(deployment):
            self._set_size(owned, desired if _uid(owned) == _uid(current) else 0)

    def _current_set(self, deployment: Object, size: int) -> Object:
        """The ReplicaSet of the Deployment's template, made with `size` pods if there is none."""
        spec, owned = deployment["spec"], self.sets(deployment)
        text = json.dumps(spec["template"], sort_keys=True)
        suffix = hashlib.sha256(text.encode()).hexdigest()[:10]
        for found in owned:
            if found["metadata"]["labels"][TEMPLATE_HASH] == suffix:
                return found
        last = int(owned[0]["metadata"]["annotations"][REVISION]) if owned else 0
        meta, label = deployment["metadata"], {TEMPLATE_HASH: suffix}
        template = merge(spec["template"], {"metadata": {"labels": label}})
        obj = {
            "metadata": {
                "name": f"{meta['name']}-{suffix}",
                "namespace": meta["namespace"],
                "labels": template["metadata"]["labels"],
                "annotations": {REVISION: str(last + 1)},
                "ownerReferences": [_reference(deployment)],
            },
            "spec": {"replicas": size, "template": template},
        }
        return self.store.create(KINDS["replicasets"], obj, Writer(CONTROLLER))

    def _set_size(self, owned: Object, size: int) -> None:
        self._write(owned, {"spec": {"replicas": size}})

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

    def delete_pod(self, pod: Object) -> None:
        """Deletes a pod, or marks it as terminating while the test keeps such pods."""
        self.deleted_pods.append(pod["metadata"]["name"])
        if not self.keep_terminating:
            return self.store.remove(pod)
        end = stamp(self.store.clock() + timedelta(seconds=30))
        self._write(pod, {"metadata": {"deletionTimestamp": end}})

    def _create_pod(self, deployment: Object, owned: Object) -> None:
        template, base = owned["spec"]["template"], f"{owned['metadata']['name']}-"
        used = Counter(pod["spec"]["nodeName"] for pod in self.pods(deployment))
        spec = merge(template["spec"], {"nodeName": min(NODES, key=lambda node: used[node])})
        meta = {
            "name": f"{base[:58]}{self.store.rng.getrandbits(20):05x}",
            "namespace": owned["metadata"]["namespace"],
            "labels": template["metadata"]["labels"],
            "ownerReferences": [_reference(owned)],
        }
        pod = {"metadata": meta, "spec": spec, "status": pod_status(spec, self.store.clock())}
        self.store.create(KINDS["pods"], pod, Writer(CONTROLLER))

    def _report(self, deployment: Object) -> None:
        """The Deployment's status: so many are there, and so many are ready."""
        active = [pod for pod in self.pods(deployment) if is_active(pod)]
        ready = sum(ready_since(pod) is not None for pod in active)
        revision = self.sets(deployment)[0]["metadata"]["annotations"][REVISION]
        meta, status = {"annotations": {REVISION: revision}}, {"replicas": len(active)}
        patch = {"metadata": meta, "status": {**status, "readyReplicas": ready}}
        self._write(deployment, patch, "status")


def pod_status(spec: Object, now: datetime) -> Object:
    """The status of a new pod, which is running and ready at once; whole, as `make bench` has the
    client's typed models read it."""
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


def _uid(obj: Object) -> str:
    return str(obj["metadata"]["uid"])


def _owner(obj: Object) -> str:
    owners = [o["uid"] for o in obj["metadata"].get("ownerReferences", []) if o.get("controller")]
    return str(owners[0]) if owners else ""


def _reference(owner: Object) -> Object:
    same = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "uid": _uid(owner)}
    return {**same, "name": owner["metadata"]["name"], "controller": True}
