"""What the scaler and kubectl rely on at a Kubernetes API server, asked of the fake and of a real
one alike.

The real one is the cluster of the kubeconfig that E2E_KUBECONFIG names. There the pods are for no
node, so that nothing depends on kubelets and images. At the end comes the order in which pods are
deleted, of which a real cluster without kubelets shows only a part.
"""

from __future__ import annotations

import json
import os
import random
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from kubernetes import client, config

from tests.support.kubernetes import FakeKubernetes
from tests.support.kubernetes_controllers import deletion_order
from tests.support.kubernetes_objects import DELETION_COST, Object, stamp

RBAC = "/apis/rbac.authorization.k8s.io/v1"
E2E_KUBECONFIG = os.environ.get("E2E_KUBECONFIG", "")


class Reply(NamedTuple):
    status: int
    body: Any


@dataclass(frozen=True)
class Server:
    """A real API server, one namespace in it, and the few calls that every test makes."""

    api: client.ApiClient
    namespace: str

    def call(
        self, method: str, path: str, body: Any = None, headers: Object | None = None
    ) -> Reply:
        """One request with the official client's own connections and credentials."""
        kind = "merge-patch+json" if method == "PATCH" else "json"
        sent = {"Content-Type": f"application/{kind}", "User-Agent": "contract-test/1.0"}
        settings = self.api.configuration.auth_settings().values()
        sent |= {one["key"]: one["value"] for one in settings} | (headers or {})
        pool, url = self.api.rest_client.pool_manager, self.api.configuration.host + path
        got = pool.request(method, url, json=body, headers=sent)
        return Reply(got.status, got.json())

    def ok(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        reply = self.call(method, f"{path}?{urllib.parse.urlencode(query)}", body)
        assert reply.status < 300, reply
        return reply.body

    def path(self, resource: str, *parts: str) -> str:
        apps = resource.startswith(("deployments", "replicasets"))
        base = "/apis/apps/v1" if apps else "/api/v1"
        return "/".join([base, "namespaces", self.namespace, resource, *parts])

    def add_deployment(self, name: str = "worker", replicas: int = 1) -> str:
        """A Deployment with its pods; returns its path."""
        labels, nowhere = {"app": name}, {"queue-scaler.example.com/contract": "no-node"}
        pod = {"nodeSelector": nowhere, "containers": [{"name": "main", "image": "none"}]}
        template = {"metadata": {"labels": labels}, "spec": pod}
        spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
        body = {"metadata": {"name": name, "annotations": {"who": "me"}}, "spec": spec}
        self.ok("POST", self.path("deployments"), body, fieldManager="creator")
        self.settle(name)
        return self.path("deployments", name)

    def settle(self, name: str = "worker") -> None:
        """Waits until the controllers have done what the Deployment says, and are quiet."""
        seen: list[str] = []

        def quiet() -> bool:
            found = self.ok("GET", self.path("deployments", name))
            seen.append(found["metadata"]["resourceVersion"])
            status = found.get("status", {})
            current = status.get("observedGeneration") == found["metadata"].get("generation")
            counts = {status.get("replicas", 0), len(self.pods(name))}
            return current and counts == {found["spec"]["replicas"]} and seen[-5:] == seen[-1:] * 5

        wait_for(quiet)

    def pods(self, app: str = "worker") -> list[Object]:
        found = self.ok("GET", self.path("pods"), labelSelector=f"app={app}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def load_rbac(self, manifest: str) -> None:
        """Creates the Roles and RoleBindings of a manifest."""
        for document in yaml.safe_load_all(manifest):
            plural = f"{document['kind'].lower()}s"
            self.ok("POST", f"{RBAC}/namespaces/{self.namespace}/{plural}", document)


@dataclass(frozen=True)
class FakeServer(Server):
    """The fake serves neither RBAC objects nor the creation of Deployments: tests make them."""

    cluster: FakeKubernetes

    def add_deployment(self, name: str = "worker", replicas: int = 1) -> str:
        who = {"who": "me"}
        self.cluster.add_deployment(name, replicas=replicas, annotations=who, manager="creator")
        return self.path("deployments", name)

    def load_rbac(self, manifest: str) -> None:
        self.cluster.load_rbac(manifest)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "this did not happen in time"
        time.sleep(0.015)


def annotated(**values: str | None) -> Object:
    return {"metadata": {"annotations": values}}


def scale(replicas: int) -> Object:
    return {"spec": {"replicas": replicas}}


def owners(obj: Object, part: str, field: str) -> list[tuple[str, str]]:
    """Who owns a field by managedFields: (manager, subresource) of each entry that holds it."""
    return [
        (entry["manager"], entry.get("subresource", ""))
        for entry in obj["metadata"]["managedFields"]
        if f'"f:{field}"' in json.dumps(entry["fieldsV1"].get(f"f:{part}", {}))
    ]


def failure(reply: Reply) -> tuple[int, str]:
    """Code and reason of the Status object that every failure of the API is."""
    body = reply.body
    assert (body["kind"], body["apiVersion"], body["status"]) == ("Status", "v1", "Failure")
    assert reply.status == body["code"], reply
    return body["code"], body["reason"]


@pytest.fixture(params=["fake", *(["real"] if E2E_KUBECONFIG else [])])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """The fake, or a namespace of a real cluster, deleted afterwards with all that is in it."""
    if request.param == "fake":
        with FakeKubernetes() as fake:
            path = fake.write_kubeconfig(tmp_path / "kubeconfig")
            with config.new_client_from_config(str(path)) as api:
                yield FakeServer(api, "default", fake)
        return
    with config.new_client_from_config(E2E_KUBECONFIG) as api:
        server = Server(api, f"contract-{uuid.uuid4().hex[:8]}")
        server.ok("POST", "/api/v1/namespaces", {"metadata": {"name": server.namespace}})
        yield server
        server.call("DELETE", f"/api/v1/namespaces/{server.namespace}")


# --- Patches, versions, owners -----------------------------------------------------------------


def test_a_merge_patch_is_good_for_the_version_that_it_names(server: Server) -> None:
    path = server.add_deployment()
    before = server.ok("GET", path)
    for nothing in (scale(1), annotated(who="me", absent=None)):
        assert server.ok("PATCH", path, nothing)["metadata"] == before["metadata"]
    patch = {**scale(3), **annotated(**{"queue-scaler/a": "1", "who": None})}
    patch["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
    written = server.ok("PATCH", path, patch)
    assert written["spec"] == before["spec"] | {"replicas": 3}
    annotations = written["metadata"]["annotations"]
    assert (annotations.get("queue-scaler/a"), annotations.get("who")) == ("1", None)
    reply = server.call("PATCH", path, patch)
    assert failure(reply) == (409, "Conflict")
    assert reply.body["message"] == (
        'Operation cannot be fulfilled on deployments.apps "worker": the object has been'
        " modified; please apply your changes to the latest version and try again"
    )
    server.settle()  # the controllers' writes move the version on, too
    settled = server.ok("GET", path)
    assert settled["metadata"]["resourceVersion"] != written["metadata"]["resourceVersion"]
    assert settled["status"]["replicas"] == 3
    assert settled["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "1"


def test_who_changed_replicas_last_owns_them_through_the_scale_as_well(server: Server) -> None:
    path = server.add_deployment()
    assert owners(server.ok("GET", path), "spec", "replicas") == [("creator", "")]
    patch = {**scale(2), **annotated(**{"queue-scaler/last-scale": "up 1->2"})}
    mine = server.ok("PATCH", path, patch, fieldManager="queue-scaler")
    where = ("metadata", "queue-scaler/last-scale")
    assert owners(mine, "spec", "replicas") == [("queue-scaler", "")]
    assert owners(mine, *where) == [("queue-scaler", "")]
    theirs = server.ok("PATCH", path, scale(3), fieldManager="kubectl-edit")
    assert owners(theirs, "spec", "replicas") == [("kubectl-edit", "")]
    assert owners(theirs, *where) == [("queue-scaler", "")]
    [entry] = [e for e in theirs["metadata"]["managedFields"] if e["manager"] == "kubectl-edit"]
    when = datetime.strptime(entry.pop("time"), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=2)
    assert entry == {
        "manager": "kubectl-edit", "operation": "Update", "apiVersion": "apps/v1",
        "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {"f:replicas": {}}},
    }  # fmt: skip
    same = server.ok("PATCH", path, scale(3), fieldManager="another")
    assert owners(same, "spec", "replicas") == [("kubectl-edit", "")], "the same takes nothing over"
    unnamed = server.ok("PATCH", path, scale(4))
    assert owners(unnamed, "spec", "replicas") == [("contract-test", "")], "by the user agent"
    assert owners(unnamed, "spec", "selector") == [("creator", "")]

    server.settle()
    found = server.ok("GET", f"{path}/scale")
    assert (found["kind"], found["apiVersion"]) == ("Scale", "autoscaling/v1")
    assert (found["spec"], found["status"]["replicas"]) == ({"replicas": 4}, 4)
    server.ok("PATCH", f"{path}/scale", scale(3), fieldManager="autoscaler")
    assert owners(server.ok("GET", path), "spec", "replicas") == [("autoscaler", "scale")]
    found = server.ok("PATCH", f"{path}/scale", scale(0))
    assert found["spec"] == {}, "a Scale omits zero"


# --- Lists -------------------------------------------------------------------------------------

SELECTORS = {
    "app=worker": {"worker"},
    "app in (worker,other), app notin (other)": {"worker"},
    "absent notin (x)": {"worker", "other"},
    "app": {"worker", "other"},
    "!app": set(),
    "!absent,app=worker": {"worker"},
}


def test_label_selectors(server: Server) -> None:
    for name in ("worker", "other"):
        server.add_deployment(name)
    for selector, expected in SELECTORS.items():
        found = server.ok("GET", server.path("pods"), labelSelector=selector)["items"]
        assert {pod["metadata"]["labels"]["app"] for pod in found} == expected, selector
    found = server.ok("GET", server.path("pods"), labelSelector="app=worker")
    assert (found["kind"], "kind" in found["items"][0]) == ("PodList", False)


# --- Failures ----------------------------------------------------------------------------------

TOO_MUCH = annotated(more="x" * 257 * 1024)
NUMBER = {"metadata": {"annotations": {"a": 1}}}
WORKER, SCALE, NOWHERE = "deployments/worker", "deployments/worker/scale", "deployments/nope"
# Method, path in the namespace, body; status, reason, and words of the message.
FAILURES: dict[str, tuple[str, str, Any, int, str, str]] = {
    "no such Deployment": ("GET", NOWHERE, None, 404, "NotFound", 's.apps "nope" not found'),
    "no such pod": ("PATCH", "pods/nope", {}, 404, "NotFound", 'pods "nope" not found'),
    "no such resource": ("GET", "nonsenses", None, 404, "NotFound", "could not find the requested"),
    "no such method": ("POST", WORKER, {}, 405, "MethodNotAllowed", "not allow this method"),
    "no such selector": ("GET", "pods?labelSelector=a+b", None, 400, "BadRequest", "unable to"),
    "negative replicas": (
        "PATCH", WORKER, scale(-1), 422, "Invalid",
        'Deployment.apps "worker" is invalid: spec.replicas: Invalid value: -1: must be greater',
    ),
    "negative replicas of a scale": ("PATCH", SCALE, scale(-1), 422, "Invalid", "spec.replicas"),
    "an annotation that is no text": ("PATCH", WORKER, NUMBER, 422, "Invalid", ""),
    "too many annotations": ("PATCH", WORKER, TOO_MUCH, 422, "Invalid", "may not be more than"),
}  # fmt: skip


def test_a_failure_is_a_status_object_with_upstreams_words(server: Server) -> None:
    path = server.add_deployment()
    for name, (method, where, body, status, reason, words) in FAILURES.items():
        reply = server.call(method, server.path(where), body)
        assert failure(reply) == (status, reason), name
        assert words in reply.body["message"], (name, reply)
    patched = server.call("PATCH", path, scale(2), {"Content-Type": "application/json"})
    assert failure(patched) == (415, "UnsupportedMediaType")
    assert server.ok("GET", path)["spec"]["replicas"] == 1
    unknown = server.call("GET", path, None, {"authorization": "Bearer nobody's"})
    assert failure(unknown) == (401, "Unauthorized")


# --- Events ------------------------------------------------------------------------------------


def event(namespace: str) -> Object:
    """An Event about the Deployment "worker" of a namespace."""
    now = stamp(datetime.now(UTC))
    return {
        "metadata": {"name": f"worker.{uuid.uuid4().hex}"},
        "involvedObject": {"kind": "Deployment", "name": "worker", "namespace": namespace},
        "reason": "SuccessfulRescale", "message": "New size: 3", "type": "Normal",
        "source": {"component": "queue-scaler"},
        "firstTimestamp": now, "lastTimestamp": now, "count": 1,
    }  # fmt: skip


def test_an_event_is_created_once_and_found_by_its_reason(server: Server) -> None:
    body, events = event(server.namespace), server.path("events")
    assert server.call("POST", events, body).status == 201
    assert failure(server.call("POST", events, body)) == (409, "AlreadyExists")
    elsewhere = server.call("POST", events, event("elsewhere"))
    assert failure(elsewhere) == (422, "Invalid")
    assert "does not match" in elsewhere.body["message"]
    for reason, expected in (("SuccessfulRescale", ["New size: 3"]), ("Another", [])):
        items = server.ok("GET", events, fieldSelector=f"reason={reason}")["items"]
        assert [item["message"] for item in items] == expected


# --- Pods and their controllers ----------------------------------------------------------------


def test_pods_are_of_their_replica_set_and_go_by_their_deletion_cost(server: Server) -> None:
    deployment = server.add_deployment(replicas=8)
    [found] = server.ok("GET", server.path("replicasets"), labelSelector="app=worker")["items"]
    owner, names = found["metadata"], []
    template_hash = owner["labels"]["pod-template-hash"]
    assert owner["name"] == f"worker-{template_hash}"
    for meta in (pod["metadata"] for pod in server.pods()):
        names.append(meta["name"])
        stem, _, suffix = meta["name"].rpartition("-")
        assert (stem, len(suffix)) == (owner["name"], 5)
        assert meta["labels"]["pod-template-hash"] == template_hash
        [reference] = meta["ownerReferences"]
        assert reference.items() >= {("kind", "ReplicaSet"), ("uid", owner["uid"])}
        assert reference["controller"] is True

    def mark(name: str, cost: str) -> Reply:
        return server.call("PATCH", server.path("pods", name), annotated(**{DELETION_COST: cost}))

    for value in ("", "+1", "01", "1.0", "high", "2147483648"):
        reply = mark(names[0], value)
        assert failure(reply) == (422, "Invalid")
        assert f'Invalid value: "{value}": must be a 32bit integer' in reply.body["message"]
    for value in ("0", "2147483647", "-2147483648", "-1"):
        assert mark(names[0], value).status == 200
    keep = random.Random(3).sample(names[1:], 4)
    for name in keep:
        assert mark(name, "100").status == 200
    time.sleep(0.5)  # the controller's cache has to hear of the marks; the fake's is the store
    server.ok("PATCH", deployment, scale(4))
    server.settle()
    assert sorted(pod["metadata"]["name"] for pod in server.pods()) == sorted(keep)


# --- Access ------------------------------------------------------------------------------------

ROLE = """
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{name: scaler}}
rules:
- {{apiGroups: [apps], resources: [deployments], resourceNames: [worker], verbs: [get, patch]}}
- {{apiGroups: [apps], resources: [pods], verbs: [get]}}
- {{apiGroups: [""], resources: [events], verbs: [create]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: scaler}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: scaler}}
subjects: [{{kind: ServiceAccount, name: scaler, namespace: {namespace}}}]
"""


def test_a_role_allows_what_it_names_and_a_refusal_says_who_cannot_do_what(server: Server) -> None:
    user = f"system:serviceaccount:{server.namespace}:scaler"
    headers = {"Impersonate-User": user}
    path, other = server.add_deployment(), server.add_deployment("other")
    server.load_rbac(ROLE.format(namespace=server.namespace))
    wait_for(lambda: server.call("GET", path, headers=headers).status == 200)

    assert server.call("PATCH", path, scale(1), headers=headers).status == 200
    for method, target in (
        ("PATCH", other),
        ("GET", other),
        ("DELETE", path),
        ("PATCH", f"{path}/scale"),
        ("PUT", path),
        ("GET", server.path("deployments")),
        ("GET", server.path("pods")),
        ("GET", server.path("pods", "worker")),
        ("GET", path.replace(server.namespace, "kube-system")),
        ("GET", server.path("events")),
    ):
        denied = server.call(method, target, None if method == "GET" else {}, headers=headers)
        assert failure(denied) == (403, "Forbidden"), (method, target)
    made = server.call("POST", server.path("events"), event(server.namespace), headers)
    assert made.status == 201
    reply = server.call("PATCH", other, {}, headers=headers)
    assert reply.body["message"] == (
        f'deployments.apps "other" is forbidden: User "{user}" cannot patch resource "deployments"'
        f' in API group "apps" in the namespace "{server.namespace}"'
    )


# --- Which pods go first ------------------------------------------------------------------------

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def pod(
    name: str, *, node: str = "a", phase: str = "Running", ready: bool = True, cost: str = "0",
    since: int = 600, restarts: int = 0, age: int = 600,
) -> Object:  # fmt: skip
    """A pod, as long ready and as old as so many seconds."""
    created, became = (stamp(NOW - timedelta(seconds=seconds)) for seconds in (age, since))
    condition = {"type": "Ready", "status": str(ready), "lastTransitionTime": became}
    meta = {"name": name, "creationTimestamp": created, "annotations": {DELETION_COST: cost}}
    containers = [{"restartCount": restarts}]
    status = {"phase": phase, "conditions": [condition], "containerStatuses": containers}
    return {"metadata": meta, "spec": {"nodeName": node}, "status": status}


# The rules of upstream's ActivePodsWithRanks.Less, in their order: what is first goes first.
FIRST: dict[str, tuple[Object, Object]] = {
    "unassigned": ({"node": "", "cost": "9"}, {}),
    "pending": ({"phase": "Pending", "cost": "9"}, {"phase": "Unknown"}),
    "unknown": ({"phase": "Unknown", "cost": "9"}, {}),
    "not ready": ({"ready": False, "cost": "9"}, {}),
    "lower cost": ({"since": 9000}, {"cost": "1", "since": 1}),
    "negative cost": ({"cost": "-1"}, {}),
    "cost is a number": ({"cost": "9"}, {"cost": "10"}),
    "crowded node": ({"node": "crowded", "since": 9000}, {"since": 1}),
    "ready for a shorter time": ({"since": 60}, {"since": 600, "restarts": 5}),
    "more restarts": ({"restarts": 1, "age": 9000}, {"age": 1}),
    "younger": ({"age": 60}, {"age": 600}),
}


@pytest.mark.parametrize(("first", "second"), FIRST.values(), ids=FIRST)
def test_the_replica_set_controller_deletes_first(first: Object, second: Object) -> None:
    pods = [pod("z", **first), pod("a", **second)]
    related = [*pods, pod("x", node="crowded"), pod("y", node="crowded", phase="Failed")]
    for seed in range(10):
        order = deletion_order(pods, related, NOW, random.Random(seed))
        assert [victim["metadata"]["name"] for victim in order] == ["z", "a"]


def test_only_active_pods_count() -> None:
    with FakeKubernetes(seed=7) as fake:
        fake.add_deployment("worker", replicas=3)
        failed = str(fake.pods("worker")[0]["metadata"]["name"])
        fake.set_pod(failed, phase="Failed")
        assert len(fake.pods("worker")) == 4
        fake.keep_terminating()
        fake.scale("worker", 1)
        fake.scale("worker", 2)
        pods = [pod["metadata"] for pod in fake.pods("worker")]
        assert (len(pods), sum("deletionTimestamp" in meta for meta in pods)) == (5, 2)
        assert failed not in fake.deleted_pods
