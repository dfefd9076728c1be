"""Thousands of pods as a real cluster has them: 8 to 10 KB of JSON each, most of it the template
and managedFields."""

from __future__ import annotations

from tests.support.kubernetes import FakeKubernetes
from tests.support.kubernetes_objects import Object, stamp

VARIABLES = {f"WORKER_SETTING_{number:02}": "x" * 20 for number in range(40)}
CONDITIONS = (
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
)


def crowd(cluster: FakeKubernetes, live: int, evicted: int = 0, name: str = "worker") -> list[str]:
    """Gives a Deployment of 0 replicas that many pods, and leaves some evicted ones behind that its
    ReplicaSet still controls. Returns the names of the live ones."""
    cluster.set_template(name, containers=[container()])
    cluster.scale(name, live + evicted)
    pods = cluster.store.find("pods", "default")
    names = [pod["metadata"]["name"] for pod in pods]
    for number, pod in enumerate(pods):
        pod["spec"] = {**pod["spec"], "nodeName": f"node-{number % 250:03}"}
        pod["metadata"]["managedFields"] = managed_fields(stamp(cluster.store.clock()))
        if number >= live:
            status = {"phase": "Failed", "reason": "Evicted", "message": "low on memory"}
            pod["status"] = {**pod["status"], **status}
    if evicted:
        cluster.controllers.luck = lambda found: found  # no live one goes, as failed ones are gone
        with cluster.by_steps():
            cluster.scale(name, live)
            for resource in ("deployments", "replicasets"):
                for one in cluster.store.find(resource, "default"):
                    cluster.controllers.step("default", resource, one["metadata"]["name"])
    return names[:live]


def container() -> Object:
    env = [{"name": one, "value": value} for one, value in VARIABLES.items()]
    return {"name": "main", "image": "registry.example.com/team/worker:1.2.3", "env": env}


def managed_fields(time: str) -> list[Object]:
    """As kube-controller-manager and a kubelet own a pod's."""
    named: Object = {".": {}, "f:name": {}, "f:value": {}}
    env = {f'k:{{"name":"{one}"}}': named for one in VARIABLES}
    main = {".": {}, "f:image": {}, "f:name": {}, "f:env": {".": {}, **env}}
    spec = {"f:containers": {'k:{"name":"main"}': main}, "f:restartPolicy": {}}
    kind: Object = {".": {}, "f:lastTransitionTime": {}, "f:status": {}, "f:type": {}}
    conditions = {f'k:{{"type":"{one}"}}': kind for one in CONDITIONS}
    status = {"f:conditions": conditions, "f:phase": {}, "f:podIPs": {".": {}}}
    labels: Object = {".": {}, "f:app": {}, "f:pod-template-hash": {}}
    entry = {"apiVersion": "v1", "operation": "Update", "fieldsType": "FieldsV1", "time": time}
    created = {"f:metadata": {"f:labels": labels, "f:generateName": {}}, "f:spec": spec}
    return [
        {**entry, "manager": "kube-controller-manager", "fieldsV1": created},
        {
            **entry,
            "manager": "kubelet",
            "subresource": "status",
            "fieldsV1": {"f:status": status},
        },
    ]
