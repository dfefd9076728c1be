"""What the scaler's account may do on a cluster, and what it may not.

As that account (kubectl --as), first all that the scaler ever does, which has to be allowed, then
all of `acts`, which has to be refused and to change nothing. No pod has to run for it, so a control
plane without nodes is enough.
"""

from __future__ import annotations

import copy
import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.e2e.kubectl import (
    REPOSITORY,
    Account,
    Answer,
    Checks,
    account,
    eventually,
    kubectl,
    live_pods,
    read,
    scratch_namespaces,
)

Object = dict[str, Any]

NAME = "eventstorming-generator"  # the Deployment of rbac.yaml
OTHER = "bystander"
MINE = "queue-scaler/"
COST = "controller.kubernetes.io/pod-deletion-cost"
FOREIGN = {"example.com/owner": "team-a", "example.com/note": "hands off"}
BOUND = 20  # of guardrails.yaml
MANAGER = "?fieldManager=queue-scaler"
WHEN = "2026-01-01T00:00:00Z"
MICRO = "2026-01-01T00:00:00.000000Z"
OWNER = {"apiVersion": "v1", "kind": "ConfigMap", "name": OTHER, "uid": "1-2-3"}
SCALE = {"spec": {"replicas": 3}}
RBAC = "rbac.authorization.k8s.io"
POLICIES = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
EVERYTHING = {"rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]}


@dataclass(frozen=True)
class Act:
    """One request in the account's name. A body that depends on the object as it is now is a
    function of it."""

    what: str
    method: str
    path: str
    body: Any = None

    def sent(self, old: Object) -> Any:
        return self.body(old) if callable(self.body) else self.body


# What lies about in a namespace


def container(**changes: Any) -> Object:
    """The one container, as a merge patch has to give it: whole."""
    return {"containers": [{"name": "main", "image": "registry.k8s.io/pause:3.10", **changes}]}


def pod_spec() -> Object:
    """A pod that no scheduler takes, so that nothing but the checks touches it."""
    toleration = {"key": "example.com/old", "operator": "Exists"}
    return {"schedulerName": "nobody", **container(), "tolerations": [toleration]}


def thing(kind: str, name: str = "new", api: str = "v1", **more: Any) -> Object:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name}, **more}


def deployment(name: str) -> Object:
    labels = {"app": name}
    template = {"metadata": {"labels": labels, "annotations": FOREIGN}, "spec": pod_spec()}
    spec = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
    made = thing("Deployment", name, "apps/v1", spec=spec)
    annotations = {MINE + "paused-scale-in": "false", MINE + "of-an-older-version": "x", **FOREIGN}
    made["metadata"] |= {"labels": {**labels, "team": "a"}, "annotations": annotations}
    return made


def bystanders() -> Object:
    """The Deployment, another one, a pod, a Secret and a ConfigMap."""
    pod = thing("Pod", OTHER, spec=pod_spec())
    pod["metadata"] |= {"annotations": FOREIGN, "labels": {"run": OTHER}}
    items = [deployment(NAME), deployment(OTHER), pod, thing("Secret", OTHER)]
    return {"apiVersion": "v1", "kind": "List", "items": [*items, thing("ConfigMap", OTHER)]}


# What the scaler does


def annotate(**values: str | None) -> Object:
    return {"metadata": {"annotations": values}}


def history(now: int) -> str:
    """The longest that the scaler writes: windows of an hour, a look every second."""
    return " ".join(f"{now - age}:2147483647" for age in reversed(range(3600)))


def about(namespace: str) -> Object:
    """What an Event says that it is about."""
    mine = {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME, "namespace": namespace}
    return {**mine, "uid": "1-2-3"}


def event(namespace: str, **changes: Any) -> Object:
    """An Event as the scaler writes it, but for `changes`, of which those to `metadata` and
    `involvedObject` add to what stands there."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    named = {"name": f"{NAME}.{secrets.token_hex(8)}", "namespace": namespace}
    return {
        "apiVersion": "v1",
        "kind": "Event",
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
        "metadata": {**named, **changes.get("metadata", {})},
        "involvedObject": {**about(namespace), **changes.get("involvedObject", {})},
    }


def paths(namespace: str) -> tuple[str, str]:
    """The Deployments', and the core group's part of the API."""
    return f"/apis/apps/v1/namespaces/{namespace}/deployments", f"/api/v1/namespaces/{namespace}"


def life(namespace: str, pod: str) -> Iterator[Act]:
    """All that the scaler ever asks of the API server, in the forms in which it does."""
    deployments, core = paths(namespace)
    mine = f"{deployments}/{NAME}"

    def patch(what: str, replicas: int | None, **annotations: str | None) -> Act:
        body = annotate(**{MINE + name.replace("_", "-"): v for name, v in annotations.items()})
        if replicas is not None:
            body["spec"] = {"replicas": replicas}
        return Act(what, "PATCH", mine + MANAGER, body)

    def mark(what: str, cost: str) -> Act:
        return Act(what, "PATCH", f"{core}/pods/{pod}{MANAGER}", annotate(**{COST: cost}))

    yield Act("read the Deployment", "GET", mine)
    yield Act("list its pods", "GET", f"{core}/pods?labelSelector=app%3D{NAME}&limit=500")
    yield patch("scale up", 3, last_scale="up 2->3", last_scale_time=WHEN)
    yield Act("write the Event of it", "POST", f"{core}/events{MANAGER}", event(namespace))
    yield patch("remember a recommendation", None, recommendations="1767225600:3")
    yield patch("remember the longest history", None, recommendations=history(1767229200))
    yield patch("remember that the queue fails", None, queue_failing_since=WHEN)
    yield patch("scale to the bound", BOUND, last_scale=f"up 3->{BOUND}", last_scale_time=WHEN)
    yield mark("mark a pod as busy", "2147483647")
    yield mark("mark a pod as idle", "0")
    down = {"last_scale": f"down {BOUND}->0", "last_scale_time": "2026-01-01T00:10:00Z"}
    yield patch("scale to zero", 0, recommendations=None, queue_failing_since=None, **down)
    yield patch("scale up from zero", 2, last_scale="up 0->2", last_scale_time=WHEN)
    yield patch("remove what an older version left", None, of_an_older_version=None)


# What it may not do


def forged(change: Callable[[Object], Any]) -> Callable[[Any], Object]:
    """A patch that changes the entry of whoever made the Deployment or the pod."""

    def body(old: Any) -> Object:
        entries = copy.deepcopy(old["metadata"]["managedFields"])
        made = {"f:template", "f:containers"}
        change(next(e for e in entries if made & {*e["fieldsV1"].get("f:spec", {})}))
        return {"metadata": {"managedFields": entries}}

    return body


def forge_a_pause(entry: Object) -> None:
    metadata = entry["fieldsV1"].setdefault("f:metadata", {})
    annotations: Object = {"f:queue-scaler/paused-scale-in": {}, "f:example.com/x": {}}
    metadata.setdefault("f:annotations", {}).update(annotations)


def with_own_entry(old: Any) -> Object:
    entry = {"manager": "queue-scaler", "operation": "Update",
             "apiVersion": old["apiVersion"], "fieldsType": "FieldsV1", "time": WHEN,
             "fieldsV1": {"f:spec": {"f:template": {}, "f:strategy": {}}}}  # fmt: skip
    return {"metadata": {"managedFields": [*old["metadata"]["managedFields"], entry]}}


def template(**spec: Any) -> Object:
    return {"spec": {"template": {"spec": spec}}}


# What is refused of a Deployment and of a pod alike.
ALIKE: dict[str, Any] = {
    "add a label": {"metadata": {"labels": {"a": "b"}}},
    "remove a label": {"metadata": {"labels": {"app": None}}},
    "add a finalizer": {"metadata": {"finalizers": ["example.com/stay"]}},
    "add an owner": {"metadata": {"ownerReferences": [OWNER]}},
    "clear the record of who set what": {"metadata": {"managedFields": [{}]}},
    "forge others' records: a new manager": forged(lambda entry: entry.update(manager="ci")),
    "forge a record of its own": with_own_entry,
    "add a foreign annotation": annotate(**{"example.com/new": "x"}),
    "change a foreign annotation": annotate(**{"example.com/note": "x"}),
    "remove a foreign annotation": annotate(**{"example.com/note": None}),
    "remove all annotations": {"metadata": {"annotations": None}},
}
SECOND = {"name": "second", "image": "example.com/evil"}
# fmt: off
TO_A_DEPLOYMENT: dict[str, Any] = {
    **ALIKE,
    "change the image": template(**container(image="example.com/evil")),
    "change the command": template(**container(command=["sh"])),
    "add a variable": template(**container(env=[{"name": "A", "value": "b"}])),
    "add a capability":
        template(**container(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}})),
    "add a container": template(containers=[*container()["containers"], SECOND]),
    "add an init container": template(initContainers=[SECOND]),
    "change the pods' service account": template(serviceAccountName="default"),
    "use the host's network": template(hostNetwork=True),
    "mount the host's files": template(volumes=[{"name": "host", "hostPath": {"path": "/"}}]),
    "choose the node": template(nodeName="node-1"),
    "change the pods' grace period": template(terminationGracePeriodSeconds=0),
    "label the pods": {"spec": {"template": {"metadata": {"labels": {"a": "b"}}}}},
    "restart the pods":
        {"spec": {"template": {"metadata": {"annotations": {"example.com/restarted": "now"}}}}},
    "pause the rollout": {"spec": {"paused": True}},
    "change the strategy": {"spec": {"strategy": {"type": "Recreate", "rollingUpdate": None}}},
    "change minReadySeconds": {"spec": {"minReadySeconds": 60}},
    "forget old revisions": {"spec": {"revisionHistoryLimit": 0}},
    "change the progress deadline": {"spec": {"progressDeadlineSeconds": 1200}},
    "set more replicas than the bound": {"spec": {"replicas": BOUND + 1}},
    "change a label": {"metadata": {"labels": {"team": "b"}}},
    "forge others' records: more of the spec":
        forged(lambda entry: entry["fieldsV1"]["f:spec"].update({"f:strategy": {}})),
    "forge others' records: a pause": forged(forge_a_pause),
    "forge others' records: drop what they own":
        forged(lambda entry: entry["fieldsV1"]["f:spec"].pop("f:template", None)),
    "forge others' records: an apply": forged(lambda entry: entry.update(operation="Apply")),
    "fill an annotation under its prefix": annotate(**{MINE + "junk": "x" * 250_000}),
    "add an annotation under its prefix": annotate(**{MINE + "new": "x"}),
    "change an annotation under its prefix": annotate(**{MINE + "of-an-older-version": "y"}),
    "fill the history": annotate(**{MINE + "recommendations": "1" * 80_001}),
    "fill the time of the last scale": annotate(**{MINE + "last-scale-time": "1" * 65}),
    "fill the last scale": annotate(**{MINE + "last-scale": "1" * 65}),
    "fill the time of a failure": annotate(**{MINE + "queue-failing-since": "1" * 65}),
    "write a history that is not in ASCII": annotate(**{MINE + "recommendations": "\u00e9"}),
    "end a person's pause": annotate(**{MINE + "paused-until": WHEN}),
    "add one of kubectl's": annotate(**{"kubectl.kubernetes.io/last-applied-configuration": "{}"}),
    "add one whose name only begins like ours": annotate(**{"queue-scaler.io/a": "x"}),
    "pause itself": annotate(**{MINE + "paused": "true"}),
    "order replicas": annotate(**{MINE + "paused-replicas": "9"}),
    "switch scale-up off": annotate(**{MINE + "paused-scale-out": "true"}),
    "change a person's pause": annotate(**{MINE + "paused-scale-in": "true"}),
    "remove a person's pause": annotate(**{MINE + "paused-scale-in": None}),
    "hide a change behind a scale": {
        "metadata": {"annotations": {MINE + "last-scale": "up 2->3"}, "labels": {"team": "b"}},
        **SCALE},
}
TO_A_POD: dict[str, Any] = {
    **ALIKE,
    "change the image":
        [{"op": "replace", "path": "/spec/containers/0/image", "value": "example.com/evil"}],
    "end it soon": {"spec": {"activeDeadlineSeconds": 1}},
    "tolerate a taint": [{"op": "add", "path": "/spec/tolerations/-",
                          "value": {"key": "example.com/new", "operator": "Exists"}}],
    "add an annotation of the Deployment's": annotate(**{MINE + "last-scale": "x"}),
    "hide a change behind a mark": annotate(**{COST: "0", "example.com/note": "x"}),
}
# fmt: on
# Changes to an Event as the scaler writes it.
EVENTS: dict[str, Object] = {
    "about a pod": {"involvedObject": {"apiVersion": "v1", "kind": "Pod"}},
    "about another Deployment": {"involvedObject": {"name": OTHER}},
    "about no Deployment": {"involvedObject": {"name": "nobody"}},
    "about another API": {"involvedObject": {"apiVersion": "evil/v9"}},
    "about another kind": {"involvedObject": {"kind": "StatefulSet"}},
    "about a long uid": {"involvedObject": {"uid": "x" * 65}},
    "about a field": {"involvedObject": {"fieldPath": "spec"}},
    "with another reason": {"reason": "Killing"},
    "of the type Warning": {"type": "Warning"},
    "in the kubelet's name": {"source": {"component": "kubelet"}},
    "from a host": {"source": {"component": "queue-scaler", "host": "node1"}},
    "reported by the kubelet": {"reportingComponent": "kubelet"},
    "reported by an instance of the kubelet": {"reportingInstance": "kubelet, node1"},
    "with a long message": {"message": "x" * 1025},
    "of the year 2099": dict.fromkeys(("firstTimestamp", "lastTimestamp"), "2099-01-01T00:00:00Z"),
    "of long ago": dict.fromkeys(("firstTimestamp", "lastTimestamp"), "2020-01-01T00:00:00Z"),
    "of two times": {"lastTimestamp": "2099-01-01T00:00:00Z"},
    "a thousand times": {"count": 1000},
    "with a finalizer": {"metadata": {"finalizers": ["example.com/stay"]}},
    "with an owner": {"metadata": {"ownerReferences": [OWNER]}},
    "with a label": {"metadata": {"labels": {"a": "b"}}},
    "with an annotation": {"metadata": {"annotations": {"a": "x" * 200_000}}},
    "with another name": {"metadata": {"name": "a-name"}},
    "with a related object": {"related": about("default")},
    "with a series": {"series": {"count": 9, "lastObservedTime": MICRO}},
    "with an action": {"action": "Killing"},
    "with an event time": {"eventTime": MICRO, "action": "Scale"},
}


def own_acts(namespace: str, pod: str) -> Iterator[Act]:
    """What its Role allows: to patch its Deployment and its pods, and to create Events."""
    deployments, core = paths(namespace)
    mine = f"{deployments}/{NAME}"
    yield Act("Deployment: scale in CI's name", "PATCH", f"{mine}?fieldManager=ci", SCALE)
    for what, body in TO_A_DEPLOYMENT.items():
        yield Act(f"Deployment: {what}", "PATCH", mine + MANAGER, body)
    for what, body in TO_A_POD.items():
        yield Act(f"pod: {what}", "PATCH", f"{core}/pods/{pod}{MANAGER}", body)
    for what, changes in EVENTS.items():
        body = event(namespace, **changes)
        yield Act(f"Event: {what}", "POST", f"{core}/events{MANAGER}", body)


def other_acts(namespace: str, elsewhere: str, name: str) -> Iterator[Act]:
    """What else there is to write: by other requests, of other kinds, its own rights, elsewhere."""
    deployments, core = paths(namespace)
    there, core_there = paths(elsewhere)
    mine, pod, pods = f"{deployments}/{NAME}", f"{core}/pods/{name}", f"{core}/pods"
    ephemeral = {"spec": {"ephemeralContainers": [SECOND]}}
    node = {"apiVersion": "v1", "kind": "Node", "name": "node-1"}
    binding, replacement = thing("Binding", name, target=node), thing("Pod", name, spec=pod_spec())
    note = thing(
        "Event", f"{NAME}.0123456789abcdef", "events.k8s.io/v1", eventTime=MICRO, note="x",
        regarding=about(namespace), reportingController="queue-scaler",
        reportingInstance="queue-scaler", action="Scale", type="Normal",
        reason="SuccessfulRescale",
    )  # fmt: skip
    events = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
    config_maps, cronjobs = f"{core}/configmaps", f"/apis/batch/v1/namespaces/{namespace}/cronjobs"
    scaler, unlabel = f"{core}/serviceaccounts/queue-scaler", {MINE + "guardrails": None}
    token = thing("TokenRequest", "", "authentication.k8s.io/v1", spec={})
    cluster_admin = thing(
        "ClusterRoleBinding", "queue-scaler-e2e-admin", f"{RBAC}/v1",
        roleRef={"apiGroup": RBAC, "kind": "ClusterRole", "name": "cluster-admin"},
        subjects=[{"kind": "ServiceAccount", "name": "queue-scaler", "namespace": namespace}],
    )  # fmt: skip
    allow, mark = {"spec": {"validations": [{"expression": "true"}]}}, annotate(**{COST: "-9"})
    status = {"status": {"replicas": 9}}
    yield Act("Deployment: patch its scale", "PATCH", f"{mine}/scale", SCALE)
    yield Act("Deployment: patch its status", "PATCH", f"{mine}/status", status)
    yield Act("Deployment: replace", "PUT", mine, deployment(NAME))
    yield Act("Deployments: create", "POST", deployments, deployment("new"))
    yield Act("another Deployment: scale", "PATCH", f"{deployments}/{OTHER}", SCALE)
    yield Act("pod: add a debug container", "PATCH", f"{pod}/ephemeralcontainers", ephemeral)
    yield Act("pod: change the status", "PATCH", f"{pod}/status", {"status": {"phase": "Failed"}})
    yield Act("pod: evict", "POST", f"{pod}/eviction", thing("Eviction", name, "policy/v1"))
    yield Act("pod: bind to a node", "POST", f"{pod}/binding", binding)
    yield Act("pod: bind to a node, the old way", "POST", f"{core}/bindings", binding)
    yield Act("pod: replace", "PUT", pod, replacement)
    yield Act("a pod of nobody's: mark", "PATCH", f"{pods}/{OTHER}{MANAGER}", mark)
    yield Act("pods: create", "POST", pods, thing("Pod", spec=pod_spec()))
    yield Act("Event: through events.k8s.io", "POST", events, note)
    yield Act("ConfigMap: create", "POST", config_maps, thing("ConfigMap"))
    yield Act("ConfigMap: patch", "PATCH", f"{config_maps}/{OTHER}", {"data": {"a": "b"}})
    yield Act("a token: create", "POST", f"{scaler}/token", token)
    yield Act("its label: remove", "PATCH", scaler, {"metadata": {"labels": unlabel}})
    yield Act("CronJob: suspend", "PATCH", f"{cronjobs}/queue-scaler", {"spec": {}})
    role = f"/apis/{RBAC}/v1/namespaces/{namespace}/roles/queue-scaler"
    yield Act("its Role: widen", "PATCH", role, EVERYTHING)
    bindings = f"/apis/{RBAC}/v1/clusterrolebindings"
    yield Act("cluster-admin: take", "POST", bindings, cluster_admin)
    for each in ("queue-scaler", "queue-scaler-label"):
        yield Act(f"{each}: loosen", "PATCH", f"{POLICIES}/{each}", allow)
    yield Act("another namespace: scale", "PATCH", f"{there}/{NAME}", SCALE)
    yield Act("another namespace: mark a pod", "PATCH", f"{core_there}/pods/{OTHER}", mark)
    yield Act("another namespace: write an Event", "POST", f"{core_there}/events", event(elsewhere))


def acts_without_a_body(namespace: str, elsewhere: str, pod: str) -> Iterator[Act]:
    """What it may not read, delete or enter."""
    deployments, core = paths(namespace)
    there, core_there = paths(elsewhere)
    pods = ["/pods?watch=true", f"/pods/{pod}", f"/pods/{pod}/log", f"/pods/{pod}/proxy/"]
    others = ["/events", "/services", "/secrets", f"/secrets/{OTHER}", f"/configmaps/{OTHER}"]
    enter = ["/exec?command=id&stdout=true", "/attach?stdout=true", "/portforward"]
    table = [
        ("GET", deployments, ["", "?watch=true", f"/{NAME}/scale", f"/{OTHER}"]),
        ("DELETE", deployments, ["", f"/{NAME}", f"/{OTHER}"]),
        ("GET", core, [*pods, *others]),
        ("DELETE", core, ["/pods", f"/pods/{pod}", "/events"]),
        ("POST", f"{core}/pods/{pod}", enter),
        ("GET", f"/apis/apps/v1/namespaces/{namespace}", ["/replicasets"]),
        ("GET", f"/apis/batch/v1/namespaces/{namespace}", ["/jobs", "/cronjobs/queue-scaler"]),
        ("GET", f"/apis/{RBAC}/v1/namespaces/{namespace}", ["/rolebindings"]),
        ("DELETE", POLICIES, ["/queue-scaler", "/queue-scaler-label"]),
        ("GET", "", [f"{there}/{NAME}", f"{core_there}/pods", "/apis/apps/v1/deployments"]),
        ("GET", "", ["/api/v1/pods", "/api/v1/nodes", "/api/v1/namespaces", "/metrics"]),
        ("DELETE", "", [f"/api/v1/namespaces/{elsewhere}"]),
    ]
    for method, begin, ends in table:
        for end in ends:
            yield Act(f"{method} {begin}{end}", method, begin + end)


def acts(namespace: str, elsewhere: str, pod: str) -> list[Act]:
    """All that has to be refused."""
    place = (namespace, elsewhere, pod)
    return [*own_acts(namespace, pod), *other_acts(*place), *acts_without_a_body(*place)]


# What that Role makes an act about a Deployment that the account may patch, and what then fails
# before admission.
OPENED = (
    "another Deployment: scale", "Event: about another Deployment", "Event: about no Deployment",
    "pod: replace", "CronJob: suspend",
)  # fmt: skip

# What people have set on the Deployment, the replicas (2 before) that the account asks for, and
# whether it gets them. It never may remove what they have set.
TRUE = "true"
PAUSES: list[tuple[dict[str, str], int, bool]] = [
    ({"paused": TRUE}, 0, False),
    ({"paused": TRUE}, 3, False),
    ({"paused": "unreadable"}, 3, False),
    ({"paused": "False"}, 3, True),
    ({"paused-replicas": "0"}, 0, True),
    ({"paused-replicas": "0"}, 1, False),
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
    ({"paused": TRUE, "paused-until": WHEN}, 0, True),
]


@dataclass(frozen=True)
class Someone:
    """An account that may edit all Deployments, and the words with which it is refused to label
    one in a manager's name; none where it is left alone. `here`: of the Deployment's namespace."""

    name: str
    labelled: bool
    manager: str
    refused: str = ""
    here: bool = True


RULES, LABEL = "queue-scaler may change nothing of", "needs the label"
# As kustomize names it by prefix or suffix, as others name theirs, and without the label.
ACCOUNTS = [
    Someone("prodqueue-scaler", True, "queue-scaler", RULES),
    Someone("queue-scaler2", True, "", RULES),
    Someone("whatever", True, "kubectl", RULES),
    Someone("rabbitmq-queue-scaler-operator", False, "rabbitmq-operator"),
    Someone("queue-scaler", False, "kubectl", here=False),
    Someone("deployer", False, ""),
    Someone("forgotten", False, "queue-scaler", LABEL),
    Someone("queue-scaler", True, "queue-scaler", LABEL, here=False),
    Someone("default", False, "queue-scaler", LABEL, here=False),
]


# The checks


def state(namespaces: list[str], pod: str) -> Any:
    """What the forbidden acts could have changed, without what the controllers keep up."""
    kinds = "deployments.apps,pods,secrets,configmaps,roles,rolebindings,serviceaccounts"
    kept = {}
    for namespace in namespaces:
        for item in read(kinds, "-n", namespace)["items"]:
            kind, name = item["kind"], item["metadata"]["name"]
            if kind != "Pod" or name in (OTHER, pod):
                item["metadata"] |= {"resourceVersion": "", "generation": 0}
                kept[namespace, kind, name] = {**item, "status": {}}
    return kept


def own_pod(namespace: str, name: str = NAME) -> str:
    """A pod of the Deployment, once it has both."""

    def pod() -> str:
        found = live_pods(namespace, name)
        return found[0] if len(found) == 2 else ""

    return eventually(pod, 60, f"two pods of {name}")


def set_up(namespaces: list[str]) -> None:
    """The account and the bystanders."""
    here = namespaces[0]
    rbac = (REPOSITORY / "rbac.yaml").read_text()
    rbac = rbac.replace("namespace: default", f"namespace: {here}")
    kubectl("apply", "-n", here, "-f", "-", stdin=rbac)
    for namespace in namespaces:
        kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(bystanders()))
    # More writers than the API server keeps apart: from here on it merges their entries.
    for number in range(9):
        label, manager = f"writer-{number}=x", f"--field-manager=writer-{number}"
        kubectl("label", "deployment", NAME, "-n", here, label, manager)
    time.sleep(1.1)  # their times are in seconds, and the scaler's own has to be the newest


def labelling(namespace: str, manager: str = "") -> Act:
    """A change that every account with a usual Role may make, but not the scaler's."""
    query = "?dryRun=All" + (f"&fieldManager={manager}" if manager else "")
    body = TO_A_DEPLOYMENT["label the pods"]
    return Act("label the pods", "PATCH", f"{paths(namespace)[0]}/{NAME}{query}", body)


def by_guardrails(answer: Answer) -> bool:
    return "ValidatingAdmissionPolicy" in answer.message


def tried(scaler: Account, act: Act) -> Answer:
    old = {}
    if callable(act.body):
        namespace, kind, name = act.path.partition("?")[0].split("/")[-3:]
        old = read(kind, name, "-n", namespace, "--show-managed-fields")
    return scaler.ask(act.method, act.path, act.sent(old))


def type_checks() -> str:
    """What the API server says of the expressions' types, once it has looked at both policies."""
    policies = read("validatingadmissionpolicies", "queue-scaler", "queue-scaler-label")["items"]
    found = [each.get("status", {}) for each in policies]
    current = [each["metadata"]["generation"] for each in policies]
    return json.dumps(found) if [f.get("observedGeneration") for f in found] == current else ""


def try_account(checks: Checks, scaler: Account, namespaces: list[str]) -> None:
    here = namespaces[0]
    with checks.that("guardrails.yaml has no type warnings"):
        said = eventually(type_checks, 30, "a type check")
        assert '"warning":' not in said, said
    for act in life(here, own_pod(here)):
        answer = tried(scaler, act)
        checks.note(f"may: {act.what}", 200 <= answer.status < 300, answer)
    pod = own_pod(here)
    before = state(namespaces, pod)
    strange = f"{paths(here)[1]}/pods/{own_pod(here, OTHER)}{MANAGER}"
    mark = Act("another Deployment's pod: mark", "PATCH", strange, annotate(**{COST: "-9"}))
    for act in [*acts(here, namespaces[1], pod), mark]:
        answer = tried(scaler, act)
        by = "admission" if by_guardrails(answer) else "RBAC"
        checks.note(f"may not: {act.what}", answer.status == 403, answer, f"  ({by})")
    after = state(namespaces, pod)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    checks.note("nothing has changed by it", not changed, changed)


def try_pauses(checks: Checks, scaler: Account, namespace: str) -> None:
    path = f"{paths(namespace)[0]}/{NAME}{MANAGER}&dryRun=All"
    annotating = ("annotate", "--overwrite", "-n", namespace, "deployment", NAME)
    stamp = annotate(**{MINE + "queue-failing-since": WHEN})
    for pause, replicas, allowed in PAUSES:
        kubectl(*annotating, *(f"{MINE}{name}={value}" for name, value in pause.items()))
        answer = scaler.ask("PATCH", path, {"spec": {"replicas": replicas}})
        right = answer.status == 200 if allowed else by_guardrails(answer)
        may = "may" if allowed else "may not"
        checks.note(f"{may}: set {replicas} where {pause}", right, answer)
        for each in pause:
            answer = scaler.ask("PATCH", path, annotate(**{MINE + each: None}))
            name = f"may not: remove {MINE}{each} of {pause}"
            checks.note(name, by_guardrails(answer), answer)
        answer = scaler.ask("PATCH", path, stamp)
        checks.note(f"may: stamp a failure where {pause}", answer.status == 200, answer)
        kubectl(*annotating, *(f"{MINE}{name}-" for name in pause))


def try_wide_role(checks: Checks, scaler: Account, namespaces: list[str]) -> None:
    """The Role opened to everything: the guardrails refuse every write by themselves."""
    here = namespaces[0]
    widen = json.dumps(EVERYTHING)
    kubectl("patch", "role", "queue-scaler", "-n", here, "--type=merge", "-p", widen)
    secret = f"{paths(here)[1]}/secrets/{OTHER}"
    eventually(lambda: scaler.ask("GET", secret).status == 200, 30, "the wider Role")
    for act in acts(here, namespaces[1], own_pod(here)):
        within = f"/namespaces/{here}/" in act.path
        if within and act.method != "GET" and act.what not in OPENED:
            answer = tried(scaler, act)
            name = f"may not, with every right in the namespace: {act.what}"
            checks.note(name, by_guardrails(answer), answer)


def try_names(checks: Checks, namespaces: list[str]) -> None:
    """Accounts as an overlay may name them, those of others, and some that lack the label."""
    here = namespaces[0]
    for someone in ACCOUNTS:
        home = namespaces[0 if someone.here else 1]
        found = kubectl("get", "sa", someone.name, "-n", home, "--ignore-not-found", "-o", "name")
        if not found:
            kubectl("create", "serviceaccount", someone.name, "-n", home)
        label = MINE + ("guardrails=true" if someone.labelled else "guardrails-")
        kubectl("label", "--overwrite", "sa", someone.name, "-n", home, label)
        kubectl("create", "rolebinding", secrets.token_hex(4), "-n", here, "--clusterrole=edit",
                f"--serviceaccount={home}:{someone.name}")  # fmt: skip
        with account(home, someone.name) as them, checks.that(str(someone)) as say:

            def answered(them: Account = them, someone: Someone = someone) -> str:
                answer = tried(them, labelling(here, someone.manager))
                if someone.refused:
                    refused = by_guardrails(answer) and someone.refused in answer.message
                    return "refused" if refused else ""
                return "left alone" if answer.status == 200 else ""

            say(eventually(answered, 15, str(someone)))


def check_rights(checks: Checks) -> None:
    with scratch_namespaces("", "-other") as namespaces:
        here = namespaces[0]
        set_up(namespaces)
        with account(here, "queue-scaler") as scaler:
            # A dry run that the policy's own words refuse, once the API server has taken it in.
            forbidden = labelling(here)
            eventually(lambda: by_guardrails(tried(scaler, forbidden)), 60, "the policy in force")
            try_account(checks, scaler, namespaces)
            try_names(checks, namespaces)
            try_wide_role(checks, scaler, namespaces)
            try_pauses(checks, scaler, here)
