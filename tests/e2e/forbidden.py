"""What the scaler's account may do on this cluster, and what it may not.

    python -m tests.e2e.forbidden

Installs rbac.yaml and guardrails.yaml in scratch namespaces of the current context's cluster and,
as the scaler's service account (kubectl --as), first does all that the scaler ever does, which has
to be allowed, then everything in ACTS, which has to be refused and to change nothing. No pod has
to run for it, so a control plane without nodes is enough.
"""

from __future__ import annotations

import copy
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from tests.e2e.kubectl import (
    REPOSITORY,
    Account,
    Answer,
    Checks,
    account,
    eventually,
    guardrails,
    kubectl,
    read,
    scratch_namespaces,
    type_warnings,
)

NAME = "eventstorming-generator"  # the Deployment of rbac.yaml
OTHER = "bystander"
MINE = "queue-scaler/"
COST = "controller.kubernetes.io/pod-deletion-cost"
FOREIGN = {"example.com/owner": "team-a", "example.com/note": "hands off"}
BOUND = 20  # of guardrails.yaml
MANAGER = "?fieldManager=queue-scaler"
LONGEST_HISTORY = " ".join(f"{1767225600 + n}:2147483647" for n in range(3601))
SELF = "system:serviceaccount:{}:queue-scaler"


@dataclass(frozen=True)
class Act:
    """One request in the account's name. A PATCH with a list is a JSON patch, else a merge one.

    A body that depends on the object as it is now is a function of it.
    """

    what: str
    method: str
    path: str
    body: Any = None


def pod_spec(**more: Any) -> dict[str, Any]:
    """A pod that no scheduler takes, so that nothing but the checks touches it."""
    container = {"name": "main", "image": "registry.k8s.io/pause:3.10"}
    toleration = {"key": "example.com/old", "operator": "Exists"}
    return {
        "schedulerName": "nobody", "containers": [container], "tolerations": [toleration], **more,
    }  # fmt: skip


def deployment(name: str) -> dict[str, Any]:
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name,
            "labels": {"app": name, "team": "a"},
            "annotations": {**FOREIGN, MINE + "paused-scale-in": "false"},
        },
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels, "annotations": FOREIGN},
                "spec": pod_spec(),
            },
        },
    }


def bystanders() -> dict[str, Any]:
    """What lies about in a namespace: the Deployment, another one, a pod, a Secret, a ConfigMap."""
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            deployment(NAME),
            deployment(OTHER),
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": OTHER, "annotations": FOREIGN, "labels": {"run": OTHER}},
                "spec": pod_spec(),
            },
            *(
                {"apiVersion": "v1", "kind": kind, "metadata": {"name": OTHER}}
                for kind in ("Secret", "ConfigMap")
            ),
        ],
    }


def event(namespace: str, **changes: Any) -> dict[str, Any]:
    """An Event as the scaler writes it, but for `changes`; None leaves a field out."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    whole = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{NAME}.{secrets.token_hex(8)}", "namespace": namespace},
        "involvedObject": {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": NAME,
            "namespace": namespace,
            "uid": "1-2-3",
        },
        "type": "Normal",
        "reason": "SuccessfulRescale",
        "message": "New size: 3; end-to-end check",
        "source": {"component": "queue-scaler"},
        "reportingComponent": "queue-scaler",
        "reportingInstance": "queue-scaler",
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
        **changes,
    }
    return {key: value for key, value in whole.items() if value is not None}


def paths(namespace: str) -> tuple[str, str, str]:
    """The Deployments', the core group's and the batch group's part of the API."""
    end = f"/namespaces/{namespace}"
    return f"/apis/apps/v1{end}/deployments", f"/api/v1{end}", f"/apis/batch/v1{end}"


def life(namespace: str, pod: str) -> Iterator[Act]:
    """All that the scaler ever asks of the API server, in the forms in which it does."""
    deployments, core, _ = paths(namespace)
    mine, manager = f"{deployments}/{NAME}", MANAGER

    def patch(what: str, replicas: int | None, **annotations: str | None) -> Act:
        named = {MINE + name.replace("_", "-"): value for name, value in annotations.items()}
        body: dict[str, Any] = {"metadata": {"annotations": named}}
        if replicas is not None:
            body["spec"] = {"replicas": replicas}
        return Act(what, "PATCH", mine + manager, body)

    def mark(what: str, cost: str) -> Act:
        body = {"metadata": {"annotations": {COST: cost}}}
        return Act(what, "PATCH", f"{core}/pods/{pod}{manager}", body)

    when = "2026-01-01T00:00:00Z"
    yield Act("read the Deployment", "GET", mine)
    yield Act("list its pods", "GET", f"{core}/pods?labelSelector=app%3D{NAME}&limit=500")
    yield patch("scale up", 3, last_scale="up 2->3", last_scale_time=when)
    yield Act("write the Event of it", "POST", f"{core}/events{manager}", event(namespace))
    yield patch("remember a recommendation", None, recommendations="1767225600:3")
    yield patch("remember the longest history", None, recommendations=LONGEST_HISTORY)
    yield patch("remember that the queue fails", None, queue_failing_since=when)
    yield patch("scale to the bound", BOUND, last_scale=f"up 3->{BOUND}", last_scale_time=when)
    yield mark("mark a pod as busy", "2147483647")
    yield mark("mark a pod as idle", "0")
    down = {"last_scale": f"down {BOUND}->0", "last_scale_time": "2026-01-01T00:10:00Z"}
    yield patch("scale to zero", 0, recommendations=None, queue_failing_since=None, **down)
    yield patch("scale up from zero", 2, last_scale="up 0->2", last_scale_time=when)


def template(**spec: Any) -> dict[str, Any]:
    return {"spec": {"template": {"spec": spec}}}


def annotate(**values: str | None) -> dict[str, Any]:
    return {"metadata": {"annotations": values}}


def container(**changes: Any) -> dict[str, Any]:
    """The one container, as a merge patch has to give it: whole."""
    return {"containers": [{"name": "main", "image": "registry.k8s.io/pause:3.10", **changes}]}


def forged(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], dict[str, Any]]:
    """A patch that changes the entry of whoever made the Deployment."""

    def body(old: Any) -> dict[str, Any]:
        entries = copy.deepcopy(old["metadata"]["managedFields"])
        change(next(e for e in entries if "f:template" in e["fieldsV1"].get("f:spec", {})))
        return {"metadata": {"managedFields": entries}}

    return body


def deployment_acts(namespace: str) -> Iterator[Act]:
    """Patches of the account's own Deployment, which RBAC would allow."""
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": OTHER, "uid": "1-2-3"}
    host = {"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}
    rolling = {"strategy": {"type": "Recreate", "rollingUpdate": None}}
    patches: dict[str, Any] = {
        "change the image": template(**container(image="example.com/evil")),
        "change the command": template(**container(command=["sh"])),
        "add a variable": template(**container(env=[{"name": "A", "value": "b"}])),
        "add a capability": template(
            **container(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}})
        ),
        "add a container": template(
            containers=[*container()["containers"], {"name": "second", "image": "example.com/evil"}]
        ),
        "add an init container": template(initContainers=[{"name": "i", "image": "example.com/e"}]),
        "change the pods' service account": template(serviceAccountName="default"),
        "use the host's network": template(hostNetwork=True),
        "mount the host's files": template(**host),
        "choose the node": template(nodeName="node-1"),
        "change the pods' grace period": template(terminationGracePeriodSeconds=0),
        "label the pods": {"spec": {"template": {"metadata": {"labels": {"a": "b"}}}}},
        "restart the pods": {
            "spec": {"template": {"metadata": {"annotations": {"example.com/restarted": "now"}}}}
        },
        "pause the rollout": {"spec": {"paused": True}},
        "change the strategy": {"spec": rolling},
        "change minReadySeconds": {"spec": {"minReadySeconds": 60}},
        "forget old revisions": {"spec": {"revisionHistoryLimit": 0}},
        "change the progress deadline": {"spec": {"progressDeadlineSeconds": 1200}},
        "set more replicas than the bound": {"spec": {"replicas": BOUND + 1}},
        "add a label": {"metadata": {"labels": {"a": "b"}}},
        "change a label": {"metadata": {"labels": {"team": "b"}}},
        "remove a label": {"metadata": {"labels": {"team": None}}},
        "add a finalizer": {"metadata": {"finalizers": ["example.com/stay"]}},
        "add an owner": {"metadata": {"ownerReferences": [owner]}},
        "clear the record of who set what": {"metadata": {"managedFields": [{}]}},
        "forge others' records: take a container into them": forged(
            lambda entry: entry["fieldsV1"].setdefault("f:spec", {}).update({"f:strategy": {}})
        ),
        "forge others' records: a pause": forged(
            lambda entry: (
                entry["fieldsV1"]
                .setdefault("f:metadata", {})
                .setdefault("f:annotations", {})
                .update({"f:queue-scaler/paused-scale-in": {}, "f:example.com/x": {}})
            )
        ),
        "forge others' records: drop what they own": forged(
            lambda entry: entry["fieldsV1"]["f:spec"].pop("f:template", None)
        ),
        "forge others' records: a new manager": forged(lambda entry: entry.update(manager="ci")),
        "forge others' records: an apply": forged(lambda entry: entry.update(operation="Apply")),
        "forge a record of its own": lambda old: {
            "metadata": {
                "managedFields": [
                    *old["metadata"]["managedFields"],
                    {
                        "manager": "queue-scaler",
                        "operation": "Update",
                        "apiVersion": "apps/v1",
                        "fieldsType": "FieldsV1",
                        "time": "2026-01-01T00:00:00Z",
                        "fieldsV1": {"f:spec": {"f:template": {}, "f:strategy": {}}},
                    },
                ]
            }
        },
        "fill an annotation under its prefix": annotate(**{MINE + "junk": "x" * 250_000}),
        "add an annotation under its prefix": annotate(**{MINE + "new": "x"}),
        "fill the history": annotate(**{MINE + "recommendations": "1" * 80_001}),
        "fill the time of the last scale": annotate(**{MINE + "last-scale-time": "1" * 65}),
        "fill the last scale": annotate(**{MINE + "last-scale": "1" * 65}),
        "fill the time of a failure": annotate(**{MINE + "queue-failing-since": "1" * 65}),
        "write a history that is not in ASCII": annotate(**{MINE + "recommendations": "\u00e9"}),
        "end a person's pause": annotate(**{MINE + "paused-until": "2026-01-01T00:00:00Z"}),
        "add a foreign annotation": annotate(**{"example.com/new": "x"}),
        "add one of kubectl's": annotate(
            **{"kubectl.kubernetes.io/last-applied-configuration": "{}"}
        ),
        "add one whose name only begins like ours": annotate(**{"queue-scaler.io/a": "x"}),
        "change a foreign annotation": annotate(**{"example.com/note": "x"}),
        "remove a foreign annotation": annotate(**{"example.com/note": None}),
        "remove all annotations": {"metadata": {"annotations": None}},
        "pause itself": annotate(**{MINE + "paused": "true"}),
        "order replicas": annotate(**{MINE + "paused-replicas": "9"}),
        "switch scale-up off": annotate(**{MINE + "paused-scale-out": "true"}),
        "change a person's pause": annotate(**{MINE + "paused-scale-in": "true"}),
        "remove a person's pause": annotate(**{MINE + "paused-scale-in": None}),
        "hide a change behind a scale": {
            "metadata": {"annotations": {MINE + "last-scale": "up 2->3"}, "labels": {"team": "b"}},
            "spec": {"replicas": 3},
        },
    }
    path = f"{paths(namespace)[0]}/{NAME}"
    yield Act("Deployment: scale in CI's name", "PATCH", f"{path}?fieldManager=ci",
              {"spec": {"replicas": 3}})  # fmt: skip
    path += MANAGER
    for what, body in patches.items():
        yield Act(f"Deployment: {what}", "PATCH", path, body)


def other_deployment_acts(namespace: str) -> Iterator[Act]:
    deployments, _, _ = paths(namespace)
    scale = {"spec": {"replicas": 3}}
    mine, other = f"{deployments}/{NAME}", f"{deployments}/{OTHER}"
    yield Act("scale subresource: read", "GET", f"{mine}/scale")
    yield Act("scale subresource: patch", "PATCH", f"{mine}/scale", scale)
    yield Act("status subresource: patch", "PATCH", f"{mine}/status", {"status": {"replicas": 9}})
    yield Act("Deployment: replace", "PUT", mine, deployment(NAME))
    yield Act("Deployment: delete", "DELETE", mine)
    yield Act("Deployments: list", "GET", deployments)
    yield Act("Deployments: watch", "GET", f"{deployments}?watch=true")
    yield Act("Deployments: create", "POST", deployments, deployment("new"))
    yield Act("Deployments: delete all", "DELETE", deployments)
    yield Act("another Deployment: read", "GET", other)
    yield Act("another Deployment: scale", "PATCH", other, scale)
    yield Act("another Deployment: delete", "DELETE", other)


def pod_acts(namespace: str, name: str) -> Iterator[Act]:
    """Patches of a pod of the account's own Deployment, and all else that is done to pods."""
    _, core, _ = paths(namespace)
    pods, pod = f"{core}/pods", f"{core}/pods/{name}"
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": OTHER, "uid": "1-2-3"}
    debug = {"name": "debug", "image": "example.com/evil"}
    toleration = {"key": "example.com/new", "operator": "Exists"}
    image = {"op": "replace", "path": "/spec/containers/0/image", "value": "example.com/evil"}
    patches: dict[str, Any] = {
        "change the image": [image],
        "end it soon": {"spec": {"activeDeadlineSeconds": 1}},
        "tolerate a taint": [{"op": "add", "path": "/spec/tolerations/-", "value": toleration}],
        "add a label": {"metadata": {"labels": {"a": "b"}}},
        "remove a label": {"metadata": {"labels": {"app": None}}},
        "add a finalizer": {"metadata": {"finalizers": ["example.com/stay"]}},
        "add an owner": {"metadata": {"ownerReferences": [owner]}},
        "clear the record of who set what": {"metadata": {"managedFields": [{}]}},
        "add an annotation of the Deployment's": annotate(**{MINE + "last-scale": "x"}),
        "add a foreign annotation": annotate(**{"example.com/new": "x"}),
        "change a foreign annotation": annotate(**{"example.com/note": "x"}),
        "remove a foreign annotation": annotate(**{"example.com/note": None}),
        "hide a change behind a mark": annotate(**{COST: "0", "example.com/note": "x"}),
    }
    for what, body in patches.items():
        yield Act(f"pod: {what}", "PATCH", pod + MANAGER, body)
    ephemeral = {"spec": {"ephemeralContainers": [debug]}}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    node = {"apiVersion": "v1", "kind": "Node", "name": "node-1"}
    binding = {
        "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": node,
    }  # fmt: skip
    new = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "new"}, "spec": pod_spec()}
    yield Act("pod: read", "GET", pod)
    yield Act("pods: watch", "GET", f"{pods}?watch=true")
    yield Act("pod: read its log", "GET", f"{pod}/log")
    yield Act("pod: exec", "POST", f"{pod}/exec?command=id&stdout=true")
    yield Act("pod: attach", "POST", f"{pod}/attach?stdout=true")
    yield Act("pod: forward a port", "POST", f"{pod}/portforward")
    yield Act("pod: proxy", "GET", f"{pod}/proxy/")
    yield Act("pod: add a debug container", "PATCH", f"{pod}/ephemeralcontainers", ephemeral)
    yield Act("pod: change the status", "PATCH", f"{pod}/status", {"status": {"phase": "Failed"}})
    yield Act("pod: evict", "POST", f"{pod}/eviction", eviction)
    yield Act("pod: bind to a node", "POST", f"{pod}/binding", binding)
    yield Act("pod: bind to a node, the old way", "POST", f"{core}/bindings", binding)
    yield Act("pod: replace", "PUT", pod, {**new, "metadata": {"name": name}})
    yield Act(
        "a pod of nobody's: mark", "PATCH", f"{pods}/{OTHER}{MANAGER}", annotate(**{COST: "-9"})
    )
    yield Act("pod: delete", "DELETE", pod)
    yield Act("pods: delete all", "DELETE", pods)
    yield Act("pods: create", "POST", pods, new)


def event_acts(namespace: str) -> Iterator[Act]:
    _, core, _ = paths(namespace)
    events = f"{core}/events"
    good = event(namespace)
    about, named = good["involvedObject"], good["metadata"]
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": OTHER, "uid": "1-2-3"}
    later = {"firstTimestamp": "2099-01-01T00:00:00Z", "lastTimestamp": "2099-01-01T00:00:00Z"}
    earlier = dict.fromkeys(later, "2020-01-01T00:00:00Z")
    wrong: dict[str, dict[str, Any]] = {
        "about a pod": {"involvedObject": {**about, "apiVersion": "v1", "kind": "Pod"}},
        "about another Deployment": {"involvedObject": {**about, "name": OTHER}},
        "about no Deployment": {"involvedObject": {**about, "name": "nobody"}},
        "about another API": {"involvedObject": {**about, "apiVersion": "evil/v9"}},
        "about a field": {"involvedObject": {**about, "fieldPath": "spec"}},
        "with another reason": {"reason": "Killing"},
        "of the type Warning": {"type": "Warning"},
        "in the kubelet's name": {"source": {"component": "kubelet"}},
        "from a host": {"source": {"component": "queue-scaler", "host": "node1"}},
        "reported by the kubelet": {"reportingComponent": "kubelet"},
        "reported by an instance of the kubelet": {"reportingInstance": "kubelet, node1"},
        "with a long message": {"message": "x" * 1025},
        "of the year 2099": later,
        "of long ago": earlier,
        "of two times": {"firstTimestamp": "2020-01-01T00:00:00Z"},
        "a thousand times": {"count": 1000},
        "with a finalizer": {"metadata": {**named, "finalizers": ["example.com/stay"]}},
        "with an owner": {"metadata": {**named, "ownerReferences": [owner]}},
        "with a label": {"metadata": {**named, "labels": {"a": "b"}}},
        "with an annotation": {"metadata": {**named, "annotations": {"a": "x" * 200_000}}},
        "with another name": {"metadata": {**named, "name": "a-name"}},
        "with a related object": {"related": about},
        "with a series": {
            "series": {"count": 9, "lastObservedTime": "2026-01-01T00:00:00.000000Z"}
        },
        "with an action": {"action": "Killing"},
        "with an event time": {"eventTime": "2026-01-01T00:00:00.000000Z", "action": "Scale"},
    }
    for what, changes in wrong.items():
        yield Act(f"Event: {what}", "POST", events + MANAGER, event(namespace, **changes))
    note = {"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": named,
            "eventTime": "2026-01-01T00:00:00.000000Z", "reportingController": "queue-scaler",
            "reportingInstance": "queue-scaler", "action": "Scale", "type": "Normal",
            "reason": "SuccessfulRescale", "regarding": about, "note": "x"}  # fmt: skip
    newer = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
    yield Act("Event: through events.k8s.io", "POST", newer, note)
    yield Act("Events: list", "GET", events)
    yield Act("Events: delete all", "DELETE", events)


def foreign_acts(namespace: str, elsewhere: str) -> Iterator[Act]:
    """Everything else: other kinds, its own rights, other namespaces, the cluster."""
    _, core, batch = paths(namespace)
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    any_rule = {"rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]}
    admin = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "queue-scaler-e2e-admin"},
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "ClusterRole",
            "name": "cluster-admin",
        },
        "subjects": [{"kind": "ServiceAccount", "name": "queue-scaler", "namespace": namespace}],
    }
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "new"}}
    token = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    policies = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
    allow = {"spec": {"validations": [{"expression": "true"}]}}
    there, core_there, _ = paths(elsewhere)
    yield Act("Secrets: list", "GET", f"{core}/secrets")
    yield Act("Secret: read", "GET", f"{core}/secrets/{OTHER}")
    yield Act("ConfigMap: read", "GET", f"{core}/configmaps/{OTHER}")
    yield Act("ConfigMap: create", "POST", f"{core}/configmaps", config_map)
    yield Act("ConfigMap: patch", "PATCH", f"{core}/configmaps/{OTHER}", {"data": {"a": "b"}})
    yield Act("Services: list", "GET", f"{core}/services")
    yield Act("a token: create", "POST", f"{core}/serviceaccounts/queue-scaler/token", token)
    yield Act("ReplicaSets: list", "GET", f"/apis/apps/v1/namespaces/{namespace}/replicasets")
    yield Act("CronJob: read", "GET", f"{batch}/cronjobs/queue-scaler")
    yield Act("CronJob: suspend", "PATCH", f"{batch}/cronjobs/queue-scaler", {"spec": {}})
    yield Act("Jobs: list", "GET", f"{batch}/jobs")
    yield Act("its Role: widen", "PATCH", f"{rbac}/roles/queue-scaler", any_rule)
    yield Act("RoleBindings: list", "GET", f"{rbac}/rolebindings")
    bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
    yield Act("cluster-admin: take", "POST", bindings, admin)
    yield Act("guardrails: loosen", "PATCH", f"{policies}/queue-scaler", allow)
    yield Act("guardrails: delete", "DELETE", f"{policies}/queue-scaler")
    yield Act("another namespace: read", "GET", f"{there}/{NAME}")
    yield Act("another namespace: scale", "PATCH", f"{there}/{NAME}", {"spec": {"replicas": 3}})
    yield Act("another namespace: list pods", "GET", f"{core_there}/pods")
    yield Act("another namespace: mark a pod", "PATCH", f"{core_there}/pods/{OTHER}",
              annotate(**{COST: "1"}))  # fmt: skip
    yield Act("another namespace: write an Event", "POST", f"{core_there}/events", event(elsewhere))
    yield Act("all pods: list", "GET", "/api/v1/pods")
    yield Act("all Deployments: list", "GET", "/apis/apps/v1/deployments")
    yield Act("Nodes: list", "GET", "/api/v1/nodes")
    yield Act("Namespaces: list", "GET", "/api/v1/namespaces")
    yield Act("Namespace: delete", "DELETE", f"/api/v1/namespaces/{elsewhere}")
    yield Act("the API server's metrics: read", "GET", "/metrics")


def acts(namespace: str, elsewhere: str, pod: str) -> list[Act]:
    """All that has to be refused."""
    return [
        *deployment_acts(namespace),
        *other_deployment_acts(namespace),
        *pod_acts(namespace, pod),
        *event_acts(namespace),
        *foreign_acts(namespace, elsewhere),
    ]


def rbac(namespace: str) -> str:
    text = (REPOSITORY / "rbac.yaml").read_text()
    return text.replace("namespace: default", f"namespace: {namespace}")


# What people have set on the Deployment, the replicas (2 before) that the account asks for, and
# whether it gets them.
TRUE = "true"
PAUSES: list[tuple[dict[str, str], int, bool]] = [
    ({"paused": TRUE}, 0, False),
    ({"paused": TRUE}, 3, False),
    ({"paused": "unreadable"}, 3, False),
    ({"paused": "False"}, 3, True),
    ({"paused-replicas": "0"}, 0, True),
    ({"paused-replicas": " 5 "}, 5, True),
    ({"paused-replicas": "5"}, 4, False),
    ({"paused-replicas": "15"}, 5, False),
    ({"paused-replicas": "unreadable"}, 0, False),
    ({"paused": TRUE, "paused-replicas": "0"}, 0, False),
    ({"paused-scale-in": TRUE}, 1, False),
    ({"paused-scale-in": TRUE}, 3, True),
    ({"paused-scale-out": TRUE}, 3, False),
    ({"paused-scale-out": TRUE}, 1, True),
    ({"paused-scale-in": TRUE, "paused-replicas": "1"}, 1, True),
    ({"paused": TRUE, "paused-until": "2026-01-01T00:00:00Z"}, 0, True),
]


def state(namespaces: list[str], pod: str) -> Any:
    """What the forbidden acts could have changed, without what the controllers keep up."""
    kinds = "deployments.apps,pods,secrets,configmaps,roles,rolebindings,serviceaccounts"
    kept = {}
    for namespace in namespaces:
        for item in read(kinds, "-n", namespace)["items"]:
            metadata, name = item["metadata"], item["metadata"]["name"]
            if item["kind"] == "Pod" and name not in (OTHER, pod):
                continue
            for own in ("managedFields", "resourceVersion", "generation"):
                metadata.pop(own, None)
            item.pop("status", None)
            kept[f"{namespace} {item['kind']} {name}"] = item
    return kept


def own_pod(namespace: str, name: str = NAME) -> str:
    """A pod of the Deployment, once it has both."""

    def pod() -> str:
        found = read("pods", "-n", namespace, "-l", f"app={name}")["items"]
        live = [each for each in found if "deletionTimestamp" not in each["metadata"]]
        return str(live[0]["metadata"]["name"]) if len(live) == 2 else ""

    return eventually(pod, 60, f"two pods of {name}")


def set_up(namespaces: list[str]) -> None:
    """The account and the bystanders."""
    kubectl("apply", "-n", namespaces[0], "-f", "-", stdin=rbac(namespaces[0]))
    for namespace in namespaces:
        kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(bystanders()))
    # More writers than the API server keeps apart: from here on it merges their entries.
    for number in range(9):
        kubectl("label", "deployment", NAME, "-n", namespaces[0], f"writer-{number}=x",
                f"--field-manager=writer-{number}")  # fmt: skip
    time.sleep(1.1)  # their times are in seconds, and the scaler's own has to be the newest


def in_force(scaler: Account, namespace: str) -> bool:
    """Whether the API server has taken in the policy: its own words refuse a dry run."""
    label = {"metadata": {"labels": {"a": "b"}}}
    probe = scaler.ask("PATCH", f"{paths(namespace)[0]}/{NAME}?dryRun=All", label)
    return by_guardrails(probe)


def by_guardrails(answer: Answer) -> bool:
    return "ValidatingAdmissionPolicy" in answer.message


def tried(scaler: Account, act: Act) -> Answer:
    body = act.body
    if callable(body):
        namespace, name = act.path.split("/")[5], act.path.split("/")[7].partition("?")[0]
        body = body(read("deployment", name, "-n", namespace, "--show-managed-fields"))
    return scaler.ask(act.method, act.path, body)


def try_account(checks: Checks, scaler: Account, namespaces: list[str]) -> None:
    here = namespaces[0]
    checks.that("guardrails.yaml has no type warnings", no_type_warnings)
    for act in life(here, own_pod(here)):
        answer = tried(scaler, act)
        good = 200 <= answer.status < 300
        checks.note(f"may: {act.what}", None if good else f"{answer.status} {answer.message}")
    pod = own_pod(here)
    before = state([*namespaces], pod)
    strange = own_pod(here, OTHER)
    path = f"{paths(here)[1]}/pods/{strange}{MANAGER}"
    mark = Act("another Deployment's pod: mark", "PATCH", path, annotate(**{COST: "-9"}))
    for act in [*acts(here, namespaces[1], pod), mark]:
        answer = tried(scaler, act)
        problem = None if answer.status == 403 else f"{answer.status} {answer.message}"
        checks.note(
            f"may not: {act.what}", problem, "admission" if by_guardrails(answer) else "RBAC"
        )
    after = state([*namespaces], pod)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    checks.note("nothing has changed by it", f"{sorted(changed)}" if changed else None)


def try_pauses(checks: Checks, scaler: Account, namespace: str) -> None:
    path = f"{paths(namespace)[0]}/{NAME}{MANAGER}&dryRun=All"
    for pause, replicas, allowed in PAUSES:
        words = [f"{MINE}{name}={value}" for name, value in pause.items()]
        kubectl("annotate", "--overwrite", "-n", namespace, "deployment", NAME, *words)
        answer = scaler.ask("PATCH", path, {"spec": {"replicas": replicas}})
        name = f"{'may' if allowed else 'may not'}: set {replicas} where {pause}"
        expected = answer.status == 200 if allowed else by_guardrails(answer)
        checks.note(name, None if expected else f"{answer.status} {answer.message}")
        gone = [f"{MINE}{name}-" for name in pause]
        kubectl("annotate", "-n", namespace, "deployment", NAME, *gone)


# With a Role that opens everything: what is then about a Deployment that the account may patch, and
# what fails before admission.
OPENED = (
    "another Deployment: scale", "Event: about another Deployment", "Event: about no Deployment",
    "pod: replace", "CronJob: suspend",
)  # fmt: skip


def try_wide_role(checks: Checks, scaler: Account, namespaces: list[str]) -> None:
    """The Role opened to everything: the guardrails refuse every write by themselves."""
    here = namespaces[0]
    widen = '{"rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]}'
    kubectl("patch", "role", "queue-scaler", "-n", here, "--type=merge", "-p", widen)
    secret = f"{paths(here)[1]}/secrets/{OTHER}"
    eventually(lambda: scaler.ask("GET", secret).status == 200, 30, "the wider Role")
    within = f"/namespaces/{here}/"
    for act in acts(here, namespaces[1], own_pod(here)):
        if act.method == "GET" or within not in act.path or act.what in OPENED:
            continue
        answer = tried(scaler, act)
        problem = None if by_guardrails(answer) else f"{answer.status} {answer.message}"
        checks.note(f"may not, with every right in the namespace: {act.what}", problem)


def try_names(checks: Checks, namespace: str) -> None:
    """Accounts as an overlay may name them, and one that is somebody else's."""
    names = {
        "prodqueue-scaler": True,
        "queue-scaler2": True,
        "rabbitmq-queue-scaler-operator": False,
    }
    label = {"metadata": {"labels": {"a": "b"}}}
    for name, ours in names.items():
        kubectl("create", "serviceaccount", name, "-n", namespace)
        if ours:
            kubectl("label", "sa", name, "-n", namespace, MINE + "guardrails=true")
        kubectl("create", "rolebinding", name, "-n", namespace, "--clusterrole=edit",
                f"--serviceaccount={namespace}:{name}")  # fmt: skip
        with account(f"system:serviceaccount:{namespace}:{name}") as someone:
            path = f"{paths(namespace)[0]}/{NAME}?dryRun=All"

            def answered(path: str = path, someone: Account = someone, ours: bool = ours) -> str:
                answer = someone.ask("PATCH", path, label)
                right = by_guardrails(answer) if ours else answer.status == 200
                return ("restricted" if ours else "left alone") if right else ""

            checks.that(f"the account {name}", partial(eventually, answered, 15, name))


def no_type_warnings() -> str:
    found = type_warnings()
    assert not found, "; ".join(found)
    return ""


def check_rights(checks: Checks) -> None:
    with scratch_namespaces("", "-other") as namespaces, guardrails():
        set_up(namespaces)
        with account(SELF.format(namespaces[0])) as scaler:
            eventually(lambda: in_force(scaler, namespaces[0]), 60, "the policy in force")
            try_account(checks, scaler, namespaces)
            try_names(checks, namespaces[0])
            try_wide_role(checks, scaler, namespaces)
            try_pauses(checks, scaler, namespaces[0])


if __name__ == "__main__":
    checks = Checks()
    check_rights(checks)
    sys.exit(checks.end())
