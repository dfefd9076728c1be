"""The Deployment controller of the Kubernetes fake: one `sync` is one syncDeployment of upstream's
(pkg/controller/deployment), and its parts bear the names of upstream's there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from tests.support.kubernetes_objects import (
    CONTROLLER,
    KINDS,
    REVISION,
    TEMPLATE_HASH,
    Object,
    Store,
    Writer,
    controller_of,
    controller_reference,
    merge,
    replace_controller,
    selects,
    uid_of,
    wanted_replicas,
)

DESIRED = "deployment.kubernetes.io/desired-replicas"
MOST = "deployment.kubernetes.io/max-replicas"
REVISION_HISTORY = "deployment.kubernetes.io/revision-history"
# Annotations that a Deployment and its ReplicaSets do not share.
OWN = {
    DESIRED,
    MOST,
    REVISION,
    REVISION_HISTORY,
    "kubectl.kubernetes.io/last-applied-configuration",
}
NAME_LIMIT = 253


def surge_and_unavailable(deployment: Object) -> tuple[int, int]:
    """How many pods a rolling update may have too many and too few."""
    strategy, wanted = deployment["spec"]["strategy"], wanted_replicas(deployment)
    if strategy["type"] != "RollingUpdate":
        return 0, 0

    def number(value: int | str, rounded: Callable[[float], int]) -> int:
        if isinstance(value, int):
            return value
        return rounded(int(value.rstrip("%")) * wanted / 100)

    limits = strategy["rollingUpdate"]
    surge = number(limits["maxSurge"], math.ceil)
    unavailable = number(limits["maxUnavailable"], math.floor)
    unavailable = unavailable if surge or unavailable else 1
    return surge, min(unavailable, wanted)


def bare_template(owner: Object) -> Object:
    """A pod template without the label that tells ReplicaSets apart."""
    template: Object = merge(
        owner["spec"]["template"], {"metadata": {"labels": {TEMPLATE_HASH: None}}}
    )
    return template


def annotation(obj: Object, name: str) -> int:
    """A number in an annotation, 0 if there is none."""
    return int((obj["metadata"].get("annotations") or {}).get(name, 0))


def status_of(obj: Object, name: str) -> int:
    return int(obj.get("status", {}).get(name, 0))


def active(sets: Iterable[Object]) -> list[Object]:
    return [one for one in sets if wanted_replicas(one)]


def by_age(one: Object) -> tuple[str, str]:
    return one["metadata"]["creationTimestamp"], one["metadata"]["name"]


class DeploymentController:
    """`resized` is told of each new size of a ReplicaSet: the ReplicaSet as it was, the size, and
    whether a rescale of the Deployment or its rollout is the cause."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.resized: Callable[[Object, int, str], object] = lambda owned, size, cause: None

    def sets(self, deployment: Object) -> list[Object]:
        """The Deployment's ReplicaSets, the oldest first."""
        found = self.store.find("replicasets", deployment["metadata"]["namespace"])
        return sorted(
            (one for one in found if controller_of(one) == uid_of(deployment)), key=by_age
        )

    def sync(self, deployment: Object) -> None:
        self._claim(deployment)
        if not deployment["spec"].get("paused") and not self._is_scaling_event(deployment):
            recreate = deployment["spec"]["strategy"]["type"] == "Recreate"
            (self._recreate if recreate else self._roll)(deployment)
        else:
            self._scale(deployment)
        self._report(deployment)

    def _write(self, obj: Object, patch: Object, subresource: str = "") -> Object:
        """A merge patch of what is stored now."""
        meta = obj["metadata"]
        resource = f"{obj['kind'].lower()}s"
        old = self.store.objects[(resource, meta["namespace"], meta["name"])]
        return self.store.update(old, merge(old, patch), Writer(CONTROLLER, subresource))

    # Its ReplicaSets

    def _claim(self, deployment: Object) -> None:
        """Adopts the orphans that the selector meets, and lets go of those that it does not."""
        selector = deployment["spec"]["selector"]
        for one in self.store.find("replicasets", deployment["metadata"]["namespace"]):
            meets = selects(selector, one["metadata"].get("labels") or {})
            owner = controller_of(one)
            if owner in ("", uid_of(deployment)) and meets != bool(owner):
                reference = controller_reference(deployment) if meets else None
                self.store.update(one, replace_controller(one, reference), Writer(CONTROLLER))

    def new_and_old(self, deployment: Object) -> tuple[Object | None, list[Object]]:
        """The ReplicaSet of the Deployment's template, the oldest if there are several; the
        others."""
        template, sets = bare_template(deployment), self.sets(deployment)
        new = next((one for one in sets if bare_template(one) == template), None)
        return new, [one for one in sets if one is not new]

    def _sync_revision(self, deployment: Object) -> tuple[Object | None, list[Object]]:
        """The same, once the new one has the annotations of the Deployment and the highest
        revision, and the Deployment has that revision."""
        new, old = self.new_and_old(deployment)
        if new is None:
            return None, old
        revision = max((annotation(one, REVISION) for one in old), default=0) + 1
        annotations = self._shared(deployment)
        before = annotation(new, REVISION)
        if before < revision:
            annotations[REVISION] = str(revision)
            if before:
                history = new["metadata"]["annotations"].get(REVISION_HISTORY)
                annotations[REVISION_HISTORY] = ",".join(filter(None, (history, str(before))))
        written = self._write(new, {"metadata": {"annotations": annotations}})
        if written is new:
            mine = {REVISION: new["metadata"]["annotations"][REVISION]}
            self._write(deployment, {"metadata": {"annotations": mine}}, "status")
        return written, old

    def _shared(self, deployment: Object) -> dict[str, str]:
        """The Deployment's annotations that its ReplicaSet gets, to be restored by a rollback."""
        annotations = deployment["metadata"].get("annotations") or {}
        return {name: value for name, value in annotations.items() if name not in OWN}

    def _create_new(self, deployment: Object, old: list[Object]) -> Object:
        meta, spec = deployment["metadata"], deployment["spec"]
        text = json.dumps(spec["template"], sort_keys=True)
        suffix = hashlib.sha256(text.encode()).hexdigest()[:10]
        label = {TEMPLATE_HASH: suffix}
        template = merge(spec["template"], {"metadata": {"labels": label}})
        revision = max((annotation(one, REVISION) for one in old), default=0) + 1
        size, most = self._new_size(deployment, None, old), wanted_replicas(deployment)
        most += surge_and_unavailable(deployment)[0]
        numbers = {DESIRED: str(wanted_replicas(deployment)), MOST: str(most)}
        obj = {
            "metadata": {
                "name": f"{meta['name'][: NAME_LIMIT - 1 - len(suffix)]}-{suffix}",
                "namespace": meta["namespace"],
                "labels": template["metadata"]["labels"],
                "annotations": {**self._shared(deployment), REVISION: str(revision), **numbers},
                "ownerReferences": [controller_reference(deployment)],
            },
            "spec": {
                "replicas": size,
                "selector": merge(spec["selector"], {"matchLabels": label}),
                "template": template,
            },
        }
        created = self.store.create(KINDS["replicasets"], obj, Writer(CONTROLLER))
        self.resized({**created, "spec": {**created["spec"], "replicas": 0}}, size, "rollout")
        mine = {"metadata": {"annotations": {REVISION: str(revision)}}}
        self._write(deployment, mine, "status")
        return created

    def _new_size(self, deployment: Object, new: Object | None, old: list[Object]) -> int:
        """How large the new ReplicaSet may be as long as the old ones are as they are."""
        wanted, size = wanted_replicas(deployment), wanted_replicas(new) if new else 0
        if deployment["spec"]["strategy"]["type"] != "RollingUpdate":
            return wanted
        most = wanted + surge_and_unavailable(deployment)[0]
        others = sum(wanted_replicas(one) for one in old)
        return size if size + others >= most else size + min(most - size - others, wanted - size)

    # Scaling

    def _is_scaling_event(self, deployment: Object) -> bool:
        """Whether an active ReplicaSet was last sized for another number of replicas."""
        new, old = self._sync_revision(deployment)
        sized = [annotation(one, DESIRED) for one in active([*old, *([new] if new else [])])
                 if DESIRED in (one["metadata"].get("annotations") or {})]  # fmt: skip
        return any(number != wanted_replicas(deployment) for number in sized)

    def resize(
        self, deployment: Object, owned: Object, size: int, cause: str, forced: bool = False
    ) -> bool:
        """Upstream's scaleReplicaSet; `forced`: at least its annotations are brought up to date."""
        if not forced and wanted_replicas(owned) == size:
            return False
        wanted = wanted_replicas(deployment)
        most = wanted + surge_and_unavailable(deployment)[0]
        annotations = {DESIRED: str(wanted), MOST: str(most)}
        patch: Object = {"metadata": {"annotations": annotations}, "spec": {"replicas": size}}
        self._write(owned, patch)
        if wanted_replicas(owned) == size:
            return False
        self.resized(owned, size, cause)
        return True

    def _scale(self, deployment: Object) -> None:
        """Gives a new number of replicas to the ReplicaSets: to the only active one, else to all in
        proportion to their sizes, whether they have pods or not."""
        new, old = self._sync_revision(deployment)
        wanted, every = wanted_replicas(deployment), [*old, *([new] if new else [])]
        sets = active(every)
        if len(sets) < 2:
            for one in sets or ([new] if new else sorted(every, key=by_age)[-1:]):
                self.resize(deployment, one, wanted, "scale")
            return
        if new and _is_saturated(deployment, new):
            for one in active(old):
                self.resize(deployment, one, 0, "scale")
            return
        if deployment["spec"]["strategy"]["type"] != "RollingUpdate":
            return
        surge, _ = surge_and_unavailable(deployment)
        missing = (wanted + surge if wanted else 0) - sum(wanted_replicas(one) for one in sets)
        sets.sort(key=by_age, reverse=missing > 0)
        sets.sort(key=wanted_replicas, reverse=True)
        sizes, added = [], 0
        for one in sets:
            share = _proportion(deployment, one, missing, added) if missing else 0
            sizes.append(wanted_replicas(one) + share)
            added += share
        sizes[0] = max(0, sizes[0] + missing - added)
        for one, size in zip(sets, sizes, strict=True):
            self.resize(deployment, one, size, "scale", forced=True)

    # Rollouts

    def _recreate(self, deployment: Object) -> None:
        """No new pod before all old ones have gone."""
        new, old = self._sync_revision(deployment)
        for one in active(old):
            self.resize(deployment, one, 0, "rollout")
        if active(old):
            return
        uids = {uid_of(one) for one in old}
        pods = self.store.find("pods", deployment["metadata"]["namespace"])
        running = [
            pod
            for pod in pods
            if controller_of(pod) in uids
            and pod["status"].get("phase") not in ("Succeeded", "Failed")
        ]
        if running or any(status_of(one, "replicas") for one in old):
            return
        new = new or self._create_new(deployment, old)
        self.resize(deployment, new, wanted_replicas(deployment), "rollout")
        self._clean_up(deployment, old)

    def _roll(self, deployment: Object) -> None:
        """One step: larger the new one, else smaller the old ones."""
        new, old = self._sync_revision(deployment)
        if new is None:
            self._create_new(deployment, old)
            return
        wanted = wanted_replicas(deployment)
        size = min(wanted, self._new_size(deployment, new, old))
        if wanted_replicas(new) != wanted and self.resize(deployment, new, size, "rollout"):
            return
        if not self._shrink_old(deployment, new, active(old)):
            self._clean_up(deployment, old)

    def _shrink_old(self, deployment: Object, new: Object, old: list[Object]) -> bool:
        """Takes pods from old ReplicaSets: first those that are not available, then as many as
        the new one has made up for."""
        total = sum(wanted_replicas(one) for one in (new, *old))
        least = wanted_replicas(deployment) - surge_and_unavailable(deployment)[1]
        missing = wanted_replicas(new) - status_of(new, "availableReplicas")
        if not old or total - least - missing <= 0:
            return False
        sizes, most = {}, total - least - missing
        for one in old:
            broken = wanted_replicas(one) - status_of(one, "availableReplicas")
            cut = max(0, min(most, broken))
            sizes[uid_of(one)] = wanted_replicas(one) - cut
            most -= cut
        spare = sum(status_of(one, "availableReplicas") for one in (new, *old)) - least
        for one in old:
            cut = max(0, min(sizes[uid_of(one)], spare))
            sizes[uid_of(one)] -= cut
            spare -= cut
        done = [self.resize(deployment, one, sizes[uid_of(one)], "rollout") for one in old]
        return any(done)

    def _clean_up(self, deployment: Object, old: list[Object]) -> None:
        """Removes the oldest ReplicaSets that nobody needs once a rollout is done."""
        wanted, status = wanted_replicas(deployment), deployment.get("status", {})
        counts = [status.get(f"{kind}eplicas", 0) for kind in ("r", "updatedR", "availableR")]
        if counts != [wanted] * 3:
            return
        surplus = len(old) - deployment["spec"]["revisionHistoryLimit"]
        for one in sorted(old, key=lambda one: annotation(one, REVISION))[: max(0, surplus)]:
            if not wanted_replicas(one) and not status_of(one, "replicas"):
                self.store.remove(one)

    # Status

    def _report(self, deployment: Object) -> None:
        new, old = self.new_and_old(deployment)
        every = [*old, *([new] if new else [])]
        available = sum(status_of(one, "availableReplicas") for one in every)
        total = sum(wanted_replicas(one) for one in every)
        status: dict[str, Any] = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": sum(status_of(one, "replicas") for one in every),
            "updatedReplicas": status_of(new, "replicas") if new else 0,
            "readyReplicas": sum(status_of(one, "readyReplicas") for one in every),
            "availableReplicas": available,
            "unavailableReplicas": max(0, total - available),
        }
        # Zero is left out, as in upstream's JSON.
        self._write(
            deployment, {"status": {name: n or None for name, n in status.items()}}, "status"
        )


def _is_saturated(deployment: Object, owned: Object) -> bool:
    numbers = (wanted_replicas(owned), status_of(owned, "availableReplicas"))
    return {*numbers, annotation(owned, DESIRED)} == {wanted_replicas(deployment)}


def _proportion(deployment: Object, owned: Object, missing: int, added: int) -> int:
    """How many of the missing pods (or, below 0, of those too many) this ReplicaSet gets."""
    size, wanted = wanted_replicas(owned), wanted_replicas(deployment)
    if missing == added:
        return 0
    before = annotation(owned, MOST) or status_of(deployment, "replicas")
    share = -size
    if wanted:
        most = wanted + surge_and_unavailable(deployment)[0]
        exact = size * most / before if before else size
        share = math.floor(exact + 0.5) - size
    left = missing - added
    return min(share, left) if missing > 0 else max(share, left)
