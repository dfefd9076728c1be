"""What the scaler's account may do on a cluster, and what it may not.

As that account (kubectl --as), first everything that the scaler does, which has to be allowed, then
all of `acts`, which have to be denied and to change nothing. No pod has to run, so a control plane
without nodes is enough. `check_guardrails` is for an administrator: are the guardrails of this
cluster still in force?
"""

from __future__ import annotations

import copy
import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

from tests.e2e.kubectl import (
    GUARDRAILS,
    REPOSITORY,
    Answer,
    Ask,
    Checks,
    account,
    eventually,
    kubectl,
    live_pods,
    read,
    scratch,
)

Object = dict[str, Any]

NAME = "eventstorming-generator"  # the Deployment of rbac.yaml
OTHER = "bystander"
MINE = "queue-scaler/"
COST = "controller.kubernetes.io/pod-deletion-cost"
REPLICA_SETS = MINE + "replica-sets"  # on the ServiceAccount
FOREIGN = {"example.com/owner": "team-a", "example.com/note": "hands off"}
BOUND = 20  # of guardrails.yaml
MANAGER = "?fieldManager=queue-scaler"
WHEN = "2026-01-01T00:00:00Z"
MICRO = "2026-01-01T00:00:00.000000Z"
SCALE = {"spec": {"replicas": 3}}
MARK = {"metadata": {"annotations": {COST: "-9"}}}
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


def thing(kind: str, name: str, api: str = "v1", **more: Any) -> Object:
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


def event(namespace: str, **changes: Any) -> Object:
    """An Event as the scaler writes it, but for `changes`, of which those to `metadata` and
    `involvedObject` add to what stands there."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    named = {"name": f"{NAME}.{secrets.token_hex(8)}", "namespace": namespace}
    about = {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME, "namespace": namespace}
    return {
        "apiVersion": "v1", "kind": "Event", "type": "Normal", "reason": "SuccessfulRescale",
        "message": "New size: 3; end-to-end check", "source": {"component": "queue-scaler"},
        "reportingComponent": "queue-scaler", "reportingInstance": "queue-scaler",
        "firstTimestamp": now, "lastTimestamp": now, "count": 1, **changes,
        "metadata": {**named, **changes.get("metadata", {})},
        "involvedObject": {**about, "uid": "1-2-3", **changes.get("involvedObject", {})},
    }  # fmt: skip


def paths(namespace: str) -> tuple[str, str]:
    """The Deployments', and the core group's part of the API."""
    return f"/apis/apps/v1/namespaces/{namespace}/deployments", f"/api/v1/namespaces/{namespace}"


def life(namespace: str, pod: str, bound: int = BOUND) -> Iterator[Act]:
    """All that the scaler ever asks of the API server, in the forms in which it does."""
    deployments, core = paths(namespace)
    mine = f"{deployments}/{NAME}"

    def patch(what: str, replicas: int | None, **annotations: str | None) -> Act:
        body = annotate(**{MINE + name.replace("_", "-"): v for name, v in annotations.items()})
        scale = {} if replicas is None else {"spec": {"replicas": replicas}}
        return Act(what, "PATCH", mine + MANAGER, {**body, **scale})

    yield Act("read the Deployment", "GET", mine)
    replica_sets = f"/apis/apps/v1/namespaces/{namespace}/replicasets"
    live = "fieldSelector=status.phase%21%3DSucceeded%2Cstatus.phase%21%3DFailed"
    selected = f"labelSelector=app%3D{NAME}&limit=500"
    yield Act("list its ReplicaSets", "GET", f"{replica_sets}?{selected}")
    yield Act("list its pods", "GET", f"{core}/pods?{selected}&{live}")
    yield patch("scale up", 3, last_scale="up 2->3", last_scale_time=WHEN)
    yield Act("write the Event of it", "POST", f"{core}/events{MANAGER}", event(namespace))
    yield patch("remember the longest history", None, recommendations=history(1767229200))
    yield patch("remember that the queue fails", None, queue_failing_since=WHEN)
    yield patch("scale to the bound", bound, last_scale=f"up 3->{bound}", last_scale_time=WHEN)
    yield patch("take the lease", None, scale_down_lease=f"{WHEN} -2147483648 0123abcd")
    for cost in ("-205000000", "-2147483648", None):
        mark = annotate(**{COST: cost})
        yield Act(f"set a pod's cost to {cost}", "PATCH", f"{core}/pods/{pod}{MANAGER}", mark)
    down = {"last_scale": f"down {bound}->0", "last_scale_time": "2026-01-01T00:10:00Z"}
    gone = dict.fromkeys(("recommendations", "queue_failing_since", "scale_down_lease"))
    yield patch("scale to zero", 0, **gone, **down)
    yield patch("scale up from zero", 2, last_scale="up 0->2", last_scale_time=WHEN)
    yield patch("remove what an older version left", None, of_an_older_version=None)


# What it may not do


def forged(change: Callable[[Object, list[Object]], Any]) -> Callable[[Object], Object]:
    """A patch of managedFields: by the entry of whoever made the object, and the list of all."""

    def body(old: Object) -> Object:
        entries = copy.deepcopy(old["metadata"]["managedFields"])
        made = {"f:template", "f:containers"}
        change(next(e for e in entries if made & {*e["fieldsV1"].get("f:spec", {})}), entries)
        return {"metadata": {"managedFields": entries}}

    return body


FORGED = {"manager": "queue-scaler", "fieldsV1": {"f:spec": {"f:template": {}, "f:strategy": {}}}}
A_PAUSE: Object = {"f:queue-scaler/paused-scale-in": {}, "f:example.com/x": {}}


# What is refused of a Deployment and of a pod alike.
ALIKE: dict[str, Any] = {
    "add a label": {"metadata": {"labels": {"a": "b"}}},
    "remove a label": {"metadata": {"labels": {"app": None}}},
    "add a finalizer": {"metadata": {"finalizers": ["example.com/stay"]}},
    "clear the record of who set what": {"metadata": {"managedFields": [{}]}},
    "forge others' records: a new manager": forged(lambda entry, _: entry.update(manager="ci")),
    "forge a record of its own": forged(lambda entry, them: them.append({**entry, **FORGED})),
    "add a foreign annotation": annotate(**{"example.com/new": "x"}),
    "change a foreign annotation": annotate(**{"example.com/note": "x"}),
    "remove a foreign annotation": annotate(**{"example.com/note": None}),
    "remove all annotations": {"metadata": {"annotations": None}},
}
# fmt: off
TO_A_DEPLOYMENT: dict[str, Any] = {
    **ALIKE,
    "change the image": {"spec": {"template": {"spec": container(image="example.com/evil")}}},
    "add a capability": {"spec": {"template": {"spec": container(
        securityContext={"capabilities": {"add": ["SYS_ADMIN"]}})}}},
    "label the pods": {"spec": {"template": {"metadata": {"labels": {"a": "b"}}}}},
    "restart the pods":
        {"spec": {"template": {"metadata": {"annotations": {"example.com/restarted": "now"}}}}},
    "pause the rollout": {"spec": {"paused": True}},
    "change the strategy": {"spec": {"strategy": {"type": "Recreate", "rollingUpdate": None}}},
    "forge others' records: more of the spec":
        forged(lambda entry, _: entry["fieldsV1"]["f:spec"].update({"f:strategy": {}})),
    "forge others' records: a pause":
        forged(lambda entry, _: entry["fieldsV1"]["f:metadata"]["f:annotations"].update(A_PAUSE)),
    "forge others' records: drop what they own":
        forged(lambda entry, _: entry["fieldsV1"]["f:spec"].pop("f:template", None)),
    "forge others' records: an apply": forged(lambda entry, _: entry.update(operation="Apply")),
    "fill an annotation under its prefix": annotate(**{MINE + "junk": "x" * 250_000}),
    "add an annotation under its prefix": annotate(**{MINE + "new": "x"}),
    "change an annotation under its prefix": annotate(**{MINE + "of-an-older-version": "y"}),
    "fill the history": annotate(**{MINE + "recommendations": "1" * 80_001}),
    "fill the time of the last scale": annotate(**{MINE + "last-scale-time": "1" * 65}),
    "fill the last scale": annotate(**{MINE + "last-scale": "1" * 65}),
    "fill the time of a failure": annotate(**{MINE + "queue-failing-since": "1" * 65}),
    "fill the lease": annotate(**{MINE + "scale-down-lease": "1" * 65}),
    "write a history that is not in ASCII": annotate(**{MINE + "recommendations": "\u00e9"}),
    "end a person's pause": annotate(**{MINE + "paused-until": WHEN}),
    "add one whose name only begins like ours": annotate(**{"queue-scaler.io/a": "x"}),
    "pause itself": annotate(**{MINE + "paused": "true"}),
    "order replicas": annotate(**{MINE + "paused-replicas": "9"}),
    "switch scale-up off": annotate(**{MINE + "paused-scale-out": "true"}),
    "change a person's pause": annotate(**{MINE + "paused-scale-in": "true"}),
    "remove a person's pause": annotate(**{MINE + "paused-scale-in": None}),
    "hide a change behind a scale": {"metadata": {"labels": {"team": "b"}}, **SCALE},
}
TO_A_POD: dict[str, Any] = {
    **ALIKE,
    "change the image":
        [{"op": "replace", "path": "/spec/containers/0/image", "value": "example.com/evil"}],
    "end it soon": {"spec": {"activeDeadlineSeconds": 1}},
    "tolerate a taint": [{"op": "add", "path": "/spec/tolerations/-",
                          "value": {"key": "example.com/new", "operator": "Exists"}}],
    "add an annotation of the Deployment's": annotate(**{MINE + "last-scale": "x"}),
}
# fmt: on
# Changes to an Event as the scaler writes it.
EVENTS: dict[str, Object] = {
    "about another Deployment": {"involvedObject": {"name": OTHER}},
    "about another API": {"involvedObject": {"apiVersion": "evil/v9"}},
    "about another kind": {"involvedObject": {"kind": "StatefulSet"}},
    "about a long uid": {"involvedObject": {"uid": "x" * 65}},
    "about a field": {"involvedObject": {"fieldPath": "spec"}},
    "with another reason": {"reason": "Killing"},
    "of the type Warning": {"type": "Warning"},
    "in the kubelet's name": {"source": {"component": "kubelet"}},
    "reported by the kubelet": {"reportingComponent": "kubelet"},
    "reported by an instance of the kubelet": {"reportingInstance": "kubelet, node1"},
    "with a long message": {"message": "x" * 1025},
    "of the year 2099": dict.fromkeys(("firstTimestamp", "lastTimestamp"), "2099-01-01T00:00:00Z"),
    "of long ago": dict.fromkeys(("firstTimestamp", "lastTimestamp"), "2020-01-01T00:00:00Z"),
    "of two times": {"lastTimestamp": "2099-01-01T00:00:00Z"},
    "a thousand times": {"count": 1000},
    "with an annotation": {"metadata": {"annotations": {"a": "x" * 200_000}}},
    "with another name": {"metadata": {"name": "a-name"}},
    "with a series": {"series": {"count": 9, "lastObservedTime": MICRO}},
    "with an event time": {"eventTime": MICRO, "action": "Scale"},
}


def acts(namespace: str, elsewhere: str, name: str, bound: int = BOUND) -> Iterator[Act]:
    """All that has to be denied. First what its Role allows: to patch its Deployment and its pods,
    and to create Events. Then other requests, other kinds, and its own permissions."""
    deployments, core = paths(namespace)
    mine, pod = f"{deployments}/{NAME}", f"{core}/pods/{name}"
    too_many = {"set more replicas than the bound": {"spec": {"replicas": bound + 1}}}
    for what, body in {**TO_A_DEPLOYMENT, **too_many}.items():
        yield Act(f"Deployment: {what}", "PATCH", mine + MANAGER, body)
    for what, body in TO_A_POD.items():
        yield Act(f"pod: {what}", "PATCH", pod + MANAGER, body)
    for what, changes in EVENTS.items():
        body = event(namespace, **changes)
        yield Act(f"Event: {what}", "POST", f"{core}/events{MANAGER}", body)
    second = {"spec": {"ephemeralContainers": [{"name": "second", "image": "example.com/evil"}]}}
    note = thing(
        "Event", f"{NAME}.0123456789abcdef", "events.k8s.io/v1", eventTime=MICRO, action="Scale",
        regarding=event(namespace)["involvedObject"], reportingController="queue-scaler",
        reportingInstance="queue-scaler", type="Normal", reason="SuccessfulRescale",
    )  # fmt: skip
    events = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
    account, unlabel = f"{core}/serviceaccounts/queue-scaler", {MINE + "guardrails": None}
    token = thing("TokenRequest", "", "authentication.k8s.io/v1", spec={})
    role = f"/apis/{RBAC}/v1/namespaces/{namespace}/roles/queue-scaler"
    yield Act("Deployment: patch its scale", "PATCH", f"{mine}/scale", SCALE)
    yield Act("Deployment: replace", "PUT", mine, deployment(NAME))
    yield Act("Deployments: create", "POST", deployments, deployment("new"))
    yield Act("pod: add a debug container", "PATCH", f"{pod}/ephemeralcontainers", second)
    yield Act("pod: evict", "POST", f"{pod}/eviction", thing("Eviction", name, "policy/v1"))
    yield Act("Event: through events.k8s.io", "POST", events, note)
    yield Act("ConfigMap: patch", "PATCH", f"{core}/configmaps/{OTHER}", {"data": {"a": "b"}})
    yield Act("a token: create", "POST", f"{account}/token", token)
    yield Act("its label: remove", "PATCH", account, {"metadata": {"labels": unlabel}})
    yield Act("its Role: widen", "PATCH", role, EVERYTHING)
    yield from acts_without_a_body(namespace, elsewhere, name)


def acts_without_a_body(namespace: str, elsewhere: str, pod: str) -> Iterator[Act]:
    """What it may not read, delete or enter, or the Role refuses before it looks at a body."""
    deployments, core = paths(namespace)
    there, core_there = paths(elsewhere)
    pods = ["/pods?watch=true", f"/pods/{pod}", f"/pods/{pod}/log", f"/pods/{pod}/proxy/"]
    others = ["/events", "/services", "/secrets", f"/secrets/{OTHER}", f"/configmaps/{OTHER}"]
    policies = [f"{POLICIES}/queue-scaler", f"{POLICIES}/queue-scaler-label"]
    table = [
        ("GET", deployments, ["", "?watch=true", f"/{NAME}/scale", f"/{OTHER}"]),
        ("DELETE", deployments, ["", f"/{NAME}", f"/{OTHER}"]),
        ("GET", core, [*pods, *others]),
        ("DELETE", core, ["/pods", f"/pods/{pod}", "/events"]),
        ("POST", f"{core}/pods/{pod}", ["/exec?command=id&stdout=true"]),
        (
            "GET",
            f"/apis/apps/v1/namespaces/{namespace}",
            ["/replicasets?watch=true", f"/replicasets/{NAME}", "/statefulsets"],
        ),
        ("DELETE", f"/apis/apps/v1/namespaces/{namespace}", ["/replicasets"]),
        ("GET", f"/apis/batch/v1/namespaces/{namespace}", ["/jobs", "/cronjobs/queue-scaler"]),
        ("GET", f"/apis/{RBAC}/v1/namespaces/{namespace}", ["/rolebindings"]),
        ("GET", "", [f"{there}/{NAME}", f"{core_there}/pods", "/apis/apps/v1/deployments"]),
        ("GET", "", ["/api/v1/pods", "/api/v1/nodes", "/api/v1/namespaces", "/metrics"]),
        ("PATCH", "", [f"{there}/{NAME}", f"{core_there}/pods/{OTHER}", *policies]),
        ("POST", "", [f"{core_there}/events", f"/apis/{RBAC}/v1/clusterrolebindings"]),
        ("DELETE", "", [f"/api/v1/namespaces/{elsewhere}", *policies]),
    ]
    for method, begin, ends in table:
        for end in ends:
            yield Act(f"{method} {begin}{end}", method, begin + end)


def acts_about_others(namespace: str) -> Iterator[Act]:
    """Of which only the API server knows the objects."""
    deployments, core = paths(namespace)
    strange = own_pod(namespace, OTHER)
    yield Act("scale in CI's name", "PATCH", f"{deployments}/{NAME}?fieldManager=ci", SCALE)
    yield Act("another Deployment: scale", "PATCH", f"{deployments}/{OTHER}", SCALE)
    yield Act("a pod of nobody's: mark", "PATCH", f"{core}/pods/{OTHER}{MANAGER}", MARK)
    yield Act("another Deployment's pod: mark", "PATCH", f"{core}/pods/{strange}{MANAGER}", MARK)


# Where the Role grants everything, that is a Deployment which the account may patch.
OPENED = "Event: about another Deployment"

# What the user has set on the Deployment, the replicas (2 before) that the account requests, and
# whether that is allowed.
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
# What the user has set, what the account then changes, and whether that is allowed: only to remove
# paused-until, and pauses together with it.
UNTIL = {"paused-until": WHEN}
ALL_FIVE = dict.fromkeys(("paused", "paused-scale-in", "paused-scale-out"), TRUE)
ALL_FIVE |= {"paused-replicas": "5", **UNTIL}
ENDINGS: list[tuple[dict[str, str], dict[str, str | None], bool]] = [
    (UNTIL, {"paused-until": None}, True),
    (ALL_FIVE, dict.fromkeys(ALL_FIVE), True),
    ({"paused": TRUE, **UNTIL}, {"paused": None, "paused-until": None}, True),
    ({"paused": TRUE, **UNTIL}, {"paused-until": None}, True),
    ({"paused": TRUE, **UNTIL}, {"paused": None}, False),
    ({"paused": TRUE, **UNTIL}, {"paused": "false", "paused-until": None}, False),
    ({"paused": TRUE, **UNTIL}, {"paused-replicas": "0", "paused-until": None}, False),
    ({"paused": TRUE, **UNTIL}, {"paused-until": "2099-01-01T00:00:00Z"}, False),
    ({"paused": TRUE}, {"paused": None, "paused-until": WHEN}, False),
    ({"paused": TRUE}, {"paused": None}, False),
    ({"paused-replicas": "5"}, {"paused-replicas": None}, False),
    ({"paused-scale-in": TRUE}, {"paused-scale-in": None}, False),
    ({"paused-scale-out": TRUE}, {"paused-scale-out": None}, False),
]


# Accounts that may edit all Deployments, with names as kustomize makes them or as others choose
# them: the name, whether it is in the Deployment's namespace, whether it has the label, as which
# field manager it labels pods, and the words of the denial, if any.
RULES, LABEL = "queue-scaler may change nothing in", "needs the label"
Someone = tuple[str, bool, bool, str, str]
ACCOUNTS: list[Someone] = [
    ("prodqueue-scaler", True, True, "queue-scaler", RULES),
    ("queue-scaler2", True, True, "", RULES),
    ("whatever", True, True, "kubectl", RULES),
    ("rabbitmq-queue-scaler-operator", True, False, "rabbitmq-operator", ""),
    ("queue-scaler", False, False, "kubectl", ""),
    ("deployer", True, False, "", ""),
    ("forgotten", True, False, "queue-scaler", LABEL),
    ("queue-scaler", False, True, "queue-scaler", LABEL),
    ("default", False, False, "queue-scaler", LABEL),
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


def labelling(namespace: str, manager: str = "", name: str = NAME) -> Act:
    """A dry run of a change that any account with a usual Role may make, but not the scaler's."""
    query = "?dryRun=All" + (f"&fieldManager={manager}" if manager else "")
    body = TO_A_DEPLOYMENT["label the pods"]
    return Act("label the pods", "PATCH", f"{paths(namespace)[0]}/{name}{query}", body)


def by_guardrails(answer: Answer) -> bool:
    return "ValidatingAdmissionPolicy" in answer.message


def tried(ask: Ask, act: Act) -> Answer:
    old = {}
    if callable(act.body):
        namespace, kind, name = act.path.partition("?")[0].split("/")[-3:]
        old = read(kind, name, "-n", namespace, "--show-managed-fields")
    return ask(act.method, act.path, act.sent(old))


def type_checks() -> str:
    """What the API server says of the expressions' types, once it has looked at both policies."""
    policies = read("validatingadmissionpolicies", "queue-scaler", "queue-scaler-label")["items"]
    found = [each.get("status", {}) for each in policies]
    current = [each["metadata"]["generation"] for each in policies]
    return json.dumps(found) if [f.get("observedGeneration") for f in found] == current else ""


def bound_in_force() -> int:
    """maxReplicas, which an administrator may have edited."""
    variables = read("validatingadmissionpolicies", "queue-scaler")["spec"]["variables"]
    return next(int(each["expression"]) for each in variables if each["name"] == "maxReplicas")


def try_account(checks: Checks, ask: Ask, namespaces: list[str]) -> None:
    here, bound = namespaces[0], bound_in_force()
    with checks.that("guardrails.yaml has no type warnings"):
        said = eventually(type_checks, 30, "a type check")
        assert '"warning":' not in said, said
    for act in life(here, own_pod(here), bound):
        answer = tried(ask, act)
        checks.note(f"may: {act.what}", 200 <= answer.status < 300, answer)
    pod = own_pod(here)
    before = state(namespaces, pod)
    for act in [*acts(here, namespaces[1], pod, bound), *acts_about_others(here)]:
        answer = tried(ask, act)
        by = "admission" if by_guardrails(answer) else "RBAC"
        checks.note(f"may not: {act.what}", answer.status == 403, answer, f"  ({by})")
    after = state(namespaces, pod)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    checks.note("nothing has changed by it", not changed, changed)


def try_pauses(checks: Checks, ask: Ask, namespace: str) -> None:
    path = f"{paths(namespace)[0]}/{NAME}{MANAGER}&dryRun=All"
    annotating = ("annotate", "--overwrite", "-n", namespace, "deployment", NAME)

    def attempt(what: str, body: Object, allowed: bool) -> None:
        answer = ask("PATCH", path, body)
        right = answer.status == 200 if allowed else by_guardrails(answer)
        checks.note(f"{'may' if allowed else 'may not'}: {what}", right, answer)

    for pause, replicas, allowed in PAUSES:
        kubectl(*annotating, *(f"{MINE}{name}={value}" for name, value in pause.items()))
        stamp = annotate(**{MINE + "queue-failing-since": WHEN})
        attempt(f"set {replicas} replicas with {pause}", {"spec": {"replicas": replicas}}, allowed)
        attempt(f"record a failure with {pause}", stamp, True)
        kubectl(*annotating, *(f"{MINE}{name}-" for name in pause))
    for pause, change, allowed in ENDINGS:
        kubectl(*annotating, *(f"{MINE}{name}={value}" for name, value in pause.items()))
        change_it = annotate(**{MINE + name: value for name, value in change.items()})
        attempt(f"set {change} with {pause}", change_it, allowed)
        kubectl(*annotating, *(f"{MINE}{name}-" for name in pause))


def try_replica_sets(checks: Checks, ask: Ask, namespace: str) -> None:
    """Pods whose ReplicaSet has another name than the Deployment: those that the account lists."""
    pods, annotating = f"{paths(namespace)[1]}/pods", ("annotate", "serviceaccount", "queue-scaler")

    def mark(pod: str) -> Answer:
        return ask("PATCH", f"{pods}/{pod}{MANAGER}&dryRun=All", MARK)

    strange = own_pod(namespace, OTHER)
    answer = mark(strange)
    told = by_guardrails(answer) and REPLICA_SETS in answer.message
    checks.note("the denial names the annotation that lists ReplicaSets", told, answer)
    for listed in (OTHER, f"x, {strange.rpartition('-')[0]}"):
        kubectl(*annotating, "-n", namespace, f"{REPLICA_SETS}={listed}")
        with checks.that(f"may: mark a pod of a listed ReplicaSet ({listed})"):
            eventually(lambda: mark(strange).status == 200, 15, "the annotation in force")
        answer = mark(OTHER)
        checks.note("may not: mark a pod without a ReplicaSet", by_guardrails(answer), answer)
        kubectl(*annotating, "-n", namespace, f"{REPLICA_SETS}-")
        eventually(lambda: by_guardrails(mark(strange)), 15, "the annotation gone")


def try_wide_role(checks: Checks, ask: Ask, namespaces: list[str]) -> None:
    """A Role that allows everything: the guardrails deny every write by themselves."""
    here = namespaces[0]
    widen = json.dumps(EVERYTHING)
    kubectl("patch", "role", "queue-scaler", "-n", here, "--type=merge", "-p", widen)
    secret = f"{paths(here)[1]}/secrets/{OTHER}"
    eventually(lambda: ask("GET", secret).status == 200, 30, "the wider Role")
    for act in acts(here, namespaces[1], own_pod(here), bound_in_force()):
        within = f"/namespaces/{here}/" in act.path
        if within and act.method != "GET" and act.what != OPENED:
            answer = tried(ask, act)
            name = f"may not, with all permissions in the namespace: {act.what}"
            checks.note(name, by_guardrails(answer), answer)


def try_name(checks: Checks, namespaces: list[str], someone: Someone) -> None:
    name, here, labelled, manager, refused = someone
    home = namespaces[0 if here else 1]
    sa = thing("ServiceAccount", name)
    sa["metadata"]["labels"] = {MINE + "guardrails": "true"} if labelled else {}
    kubectl("apply", "-n", home, "-f", "-", stdin=json.dumps(sa))
    kubectl("create", "rolebinding", secrets.token_hex(4), "-n", namespaces[0],
            "--clusterrole=edit", f"--serviceaccount={home}:{name}")  # fmt: skip
    act = labelling(namespaces[0], manager)

    def as_expected() -> bool:
        answer = tried(them, act)
        if refused:
            return by_guardrails(answer) and refused in answer.message
        return answer.status == 200

    what = f"{'refused' if refused else 'left alone'}: {someone}"
    with account(home, name) as them, checks.that(what):
        eventually(as_expected, 15, what)


def check_rights(checks: Checks) -> None:
    with scratch() as namespaces:
        here = namespaces[0]
        rbac = (REPOSITORY / "rbac.yaml").read_text()
        rbac = rbac.replace("namespace: default", f"namespace: {here}")
        kubectl("apply", "-n", here, "-f", "-", stdin=rbac)
        for namespace in namespaces:
            kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(bystanders()))
        # More writers than the API server keeps apart: from here on it merges their entries.
        for n in range(9):
            writer = (f"writer-{n}=x", f"--field-manager=writer-{n}")
            kubectl("label", "deployment", NAME, "-n", here, *writer)
        time.sleep(1.1)  # their times are in seconds, and the scaler's own has to be the newest
        with account(here, "queue-scaler") as ask:
            # A dry run that the policy's own words refuse, once the API server has taken it in.
            forbidden = labelling(here)
            eventually(lambda: by_guardrails(tried(ask, forbidden)), 60, "the policy in force")
            try_account(checks, ask, namespaces)
            try_replica_sets(checks, ask, here)
            for each in ACCOUNTS:
                try_name(checks, namespaces, each)
            try_wide_role(checks, ask, namespaces)
            try_pauses(checks, ask, here)


def scalers() -> Iterator[tuple[str, str, str]]:
    """Namespace, account and Deployment of each scaler in the cluster."""
    for cronjob in read("cronjobs", "-A", "-l", "app=queue-scaler")["items"]:
        pod = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        values = {each["name"]: each.get("value", "") for each in pod["containers"][0]["env"]}
        account_name = pod.get("serviceAccountName", "default")
        yield cronjob["metadata"]["namespace"], account_name, values.get("DEPLOYMENT", "")


def without_bound(spec: Object) -> Object:
    kept = [each for each in spec.get("variables", []) if each["name"] != "maxReplicas"]
    return {**spec, "variables": kept}


def check_guardrails(checks: Checks) -> bool:
    """Whether the cluster's guardrails are those of guardrails.yaml, apart from maxReplicas, and
    deny a change to each scaler's account. Changes nothing."""
    failed = checks.failed
    applied = kubectl("apply", "--dry-run=server", "-f", GUARDRAILS, "-o", "json")
    for each in json.loads(applied)["items"]:
        name = f"{each['kind'].lower()}/{each['metadata']['name']}"
        with checks.that(f"in force as in guardrails.yaml: {name}"):
            there = without_bound(read(name)["spec"])
            assert there == without_bound(each["spec"]), "not as in guardrails.yaml: apply it again"
    for namespace, name, deployment_name in scalers():
        with checks.that(f"denied: a change of its Deployment's pods by {namespace}/{name}"):
            with account(namespace, name) as ask:
                answer = ask(*astuple(labelling(namespace, name=deployment_name))[1:])
            assert by_guardrails(answer), answer
    return checks.failed == failed
