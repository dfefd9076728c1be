"""What the scaler's account may do on this cluster, and what it may not.

    python -m tests.e2e.forbidden

Installs rbac.yaml and guardrails.yaml in scratch namespaces of the current context's cluster and,
as the scaler's service account (kubectl --as), first does all that the scaler ever does, which has
to be allowed, then everything in ACTS, which has to be refused and to change nothing. No pod has
to run for it, so a control plane without nodes is enough.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.e2e.kubectl import (
    REPOSITORY,
    Account,
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
SELF = "system:serviceaccount:{}:queue-scaler"


@dataclass(frozen=True)
class Act:
    """One request in the account's name. A PATCH with a list is a JSON patch, else a merge one."""

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
            "template": {"metadata": {"labels": labels}, "spec": pod_spec()},
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
    """An Event as the scaler writes it."""
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{NAME}.", "namespace": namespace},
        "involvedObject": {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": NAME,
            "namespace": namespace,
        },
        "type": "Normal",
        "reason": "SuccessfulRescale",
        "message": "New size: 3; end-to-end check",
        "source": {"component": "queue-scaler"},
        "reportingComponent": "queue-scaler",
        "reportingInstance": "queue-scaler",
        "firstTimestamp": "2026-01-01T00:00:00Z",
        "lastTimestamp": "2026-01-01T00:00:00Z",
        "count": 1,
        **changes,
    }


def paths(namespace: str) -> tuple[str, str, str]:
    """The Deployments', the core group's and the batch group's part of the API."""
    end = f"/namespaces/{namespace}"
    return f"/apis/apps/v1{end}/deployments", f"/api/v1{end}", f"/apis/batch/v1{end}"


def life(namespace: str, pod: str) -> Iterator[Act]:
    """All that the scaler ever asks of the API server, in the forms in which it does."""
    deployments, core, _ = paths(namespace)
    mine, manager = f"{deployments}/{NAME}", "?fieldManager=queue-scaler"

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


def deployment_acts(namespace: str) -> Iterator[Act]:
    """Patches of the account's own Deployment, which RBAC would allow."""
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": OTHER, "uid": "1-2-3"}
    host = {"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}
    rolling = {"strategy": {"type": "Recreate", "rollingUpdate": None}}
    patches = {
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


def pod_acts(namespace: str) -> Iterator[Act]:
    _, core, _ = paths(namespace)
    pods, pod = f"{core}/pods", f"{core}/pods/{OTHER}"
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": OTHER, "uid": "1-2-3"}
    debug = {"name": "debug", "image": "example.com/evil"}
    toleration = {"key": "example.com/new", "operator": "Exists"}
    image = {"op": "replace", "path": "/spec/containers/0/image", "value": "example.com/evil"}
    patches: dict[str, Any] = {
        "change the image": [image],
        "end it soon": {"spec": {"activeDeadlineSeconds": 1}},
        "tolerate a taint": [{"op": "add", "path": "/spec/tolerations/-", "value": toleration}],
        "add a label": {"metadata": {"labels": {"a": "b"}}},
        "remove a label": {"metadata": {"labels": {"run": None}}},
        "add a finalizer": {"metadata": {"finalizers": ["example.com/stay"]}},
        "add an owner": {"metadata": {"ownerReferences": [owner]}},
        "clear the record of who set what": {"metadata": {"managedFields": [{}]}},
        "add a foreign annotation": annotate(**{"example.com/new": "x"}),
        "change a foreign annotation": annotate(**{"example.com/note": "x"}),
        "remove a foreign annotation": annotate(**{"example.com/note": None}),
        "hide a change behind a mark": annotate(**{COST: "0", "example.com/note": "x"}),
    }
    for what, body in patches.items():
        yield Act(f"pod: {what}", "PATCH", pod, body)
    ephemeral = {"spec": {"ephemeralContainers": [debug]}}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": OTHER}}
    node = {"apiVersion": "v1", "kind": "Node", "name": "node-1"}
    binding = {
        "apiVersion": "v1", "kind": "Binding", "metadata": {"name": OTHER}, "target": node,
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
    yield Act("pod: replace", "PUT", pod, {**new, "metadata": {"name": OTHER}})
    yield Act("pod: delete", "DELETE", pod)
    yield Act("pods: delete all", "DELETE", pods)
    yield Act("pods: create", "POST", pods, new)


def event_acts(namespace: str) -> Iterator[Act]:
    _, core, _ = paths(namespace)
    events = f"{core}/events"
    about_pod = {"apiVersion": "v1", "kind": "Pod", "name": OTHER, "namespace": namespace}
    spoofed = {"source": {"component": "kubelet"}, "reportingComponent": "kubelet"}
    yield Act("Event: about a pod", "POST", events, event(namespace, involvedObject=about_pod))
    yield Act("Event: with another reason", "POST", events, event(namespace, reason="Killing"))
    yield Act("Event: in another's name", "POST", events, event(namespace, **spoofed))
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
    yield Act("guardrails: loosen", "PATCH", f"{policies}/queue-scaler-deployments", allow)
    yield Act("guardrails: delete", "DELETE", f"{policies}/queue-scaler-deployments")
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


def acts(namespace: str, elsewhere: str) -> list[Act]:
    """All that has to be refused."""
    return [
        *deployment_acts(namespace),
        *other_deployment_acts(namespace),
        *pod_acts(namespace),
        *event_acts(namespace),
        *foreign_acts(namespace, elsewhere),
    ]


def rbac(namespace: str) -> str:
    text = (REPOSITORY / "rbac.yaml").read_text()
    return text.replace("namespace: default", f"namespace: {namespace}")


def state(namespaces: list[str]) -> Any:
    """What the forbidden acts could have changed, without what the controllers keep up."""
    kinds = "deployments.apps,pods,secrets,configmaps,roles,rolebindings,serviceaccounts"
    kept = {}
    for namespace in namespaces:
        for item in read(kinds, "-n", namespace)["items"]:
            metadata, name = item["metadata"], item["metadata"]["name"]
            if item["kind"] == "Pod" and name != OTHER:
                continue
            for own in ("managedFields", "resourceVersion", "generation"):
                metadata.pop(own, None)
            item.pop("status", None)
            kept[f"{namespace} {item['kind']} {name}"] = item
    return kept


def set_up(namespaces: list[str]) -> str:
    """The account and the bystanders. The name of one of the Deployment's pods."""
    kubectl("apply", "-n", namespaces[0], "-f", "-", stdin=rbac(namespaces[0]))
    for namespace in namespaces:
        kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(bystanders()))

    def pod() -> str:
        found = read("pods", "-n", namespaces[0], "-l", f"app={NAME}")["items"]
        return str(found[0]["metadata"]["name"]) if len(found) == 2 else ""

    return eventually(pod, 60, "two pods of the Deployment")


def in_force(scaler: Account, namespace: str) -> bool:
    """Whether the API server has taken in the policies: their own words refuse a dry run."""
    deployments, core, _ = paths(namespace)
    label = {"metadata": {"labels": {"a": "b"}}}
    probes = [
        scaler.ask("PATCH", f"{deployments}/{NAME}?dryRun=All", label),
        scaler.ask("PATCH", f"{core}/pods/{OTHER}?dryRun=All", label),
        scaler.ask("POST", f"{core}/events?dryRun=All", event(namespace, reason="Probe")),
    ]
    return all("ValidatingAdmissionPolicy" in probe.message for probe in probes)


def refused(scaler: Account, act: Act) -> tuple[str | None, str]:
    """The problem, if it was not refused; who refused it."""
    answer = scaler.ask(act.method, act.path, act.body)
    if answer.status != 403:
        return f"{answer.status} {answer.message}".strip(), ""
    return None, "admission" if "ValidatingAdmissionPolicy" in answer.message else "RBAC"


def try_account(checks: Checks, scaler: Account, namespaces: list[str], pod: str) -> None:
    checks.that("guardrails.yaml has no type warnings", no_type_warnings)
    eventually(lambda: in_force(scaler, namespaces[0]), 60, "policies in force")
    for act in life(namespaces[0], pod):
        answer = scaler.ask(act.method, act.path, act.body)
        good = 200 <= answer.status < 300
        checks.note(f"may: {act.what}", None if good else f"{answer.status} {answer.message}")
    before = state(namespaces)
    for act in acts(*namespaces):
        problem, by = refused(scaler, act)
        checks.note(f"may not: {act.what}", problem, by)
    after = state(namespaces)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    checks.note("nothing has changed by it", f"{sorted(changed)}" if changed else None)


def no_type_warnings() -> str:
    found = type_warnings()
    assert not found, "; ".join(found)
    return ""


def check_rights(checks: Checks) -> None:
    with scratch_namespaces("", "-other") as namespaces, guardrails():
        pod = set_up(namespaces)
        with account(SELF.format(namespaces[0])) as scaler:
            try_account(checks, scaler, namespaces, pod)


if __name__ == "__main__":
    checks = Checks()
    check_rights(checks)
    sys.exit(checks.end())
