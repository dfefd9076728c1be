"""What the scaler and kubectl rely on at a Kubernetes API server, asked of the fake and of a real
one alike.

The real one is the cluster of the kubeconfig that E2E_KUBECONFIG names; the tests live in
namespaces of their own there and delete them. Their pods are for no node, so that nothing depends
on kubelets and images. At the end comes the order in which pods are deleted, of which a real
cluster without kubelets shows only a part.
"""

from __future__ import annotations

import json
import os
import random
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import yaml
from kubernetes import client, config

from tests.support.kubernetes import FakeKubernetes
from tests.support.kubernetes_controllers import deletion_order
from tests.support.kubernetes_objects import DELETION_COST, Object, stamp

T = TypeVar("T")

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
        self,
        method: str,
        path: str,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request with the official client's own connections and credentials."""
        kind = "merge-patch+json" if method == "PATCH" else "json"
        sent = {"Content-Type": f"application/{kind}", "User-Agent": "contract-test/1.0"}
        for setting in self.api.configuration.auth_settings().values():
            sent[setting["key"]] = setting["value"]
        url = f"{self.api.configuration.host}{path}?{urllib.parse.urlencode(query or {})}"
        raw, sent = json.dumps(body) if body is not None else None, sent | dict(headers or {})
        got = self.api.rest_client.pool_manager.request(method, url, body=raw, headers=sent)
        return Reply(got.status, json.loads(got.data))

    def ok(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        reply = self.call(method, path, body, query)
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

    def settle(self, name: str = "worker") -> Object:
        """Waits until the controllers have done what the Deployment says, and are quiet."""
        seen: list[str] = []

        def quiet() -> Object | None:
            found: Object = self.ok("GET", self.path("deployments", name))
            seen.append(found["metadata"]["resourceVersion"])
            status = found.get("status", {})
            current = status.get("observedGeneration") == found["metadata"].get("generation")
            counts = {status.get("replicas", 0), len(self.pods(app=name))}
            done = current and counts == {found["spec"]["replicas"]}
            return found if done and seen[-5:] == seen[-1:] * 5 else None

        return wait_for(quiet)

    def pods(self, **labels: str) -> list[Object]:
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        found = self.ok("GET", self.path("pods"), labelSelector=selector)["items"]
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


def wait_for(condition: Callable[[], T | None], seconds: float = 30) -> T:
    end = time.monotonic() + seconds
    while (found := condition()) is None:
        assert time.monotonic() < end, "this did not happen in time"
        time.sleep(0.015)
    return found


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
    if request.param == "real":
        yield from real_server(E2E_KUBECONFIG)
        return
    with FakeKubernetes(nodes=()) as fake:
        path = fake.write_kubeconfig(tmp_path / "kubeconfig")
        with config.new_client_from_config(str(path)) as api:
            yield FakeServer(api, "default", fake)


def real_server(kubeconfig: str) -> Iterator[Server]:
    """A namespace of a real cluster, deleted afterwards with all that is in it."""
    with config.new_client_from_config(kubeconfig) as api:
        server = Server(api, f"contract-{uuid.uuid4().hex[:8]}")
        server.ok("POST", "/api/v1/namespaces", {"metadata": {"name": server.namespace}})
        yield server
        server.call("DELETE", f"/api/v1/namespaces/{server.namespace}")


# --- Patches, versions, owners -----------------------------------------------------------------


def test_a_merge_patch_sets_and_null_deletes_and_other_fields_stay(server: Server) -> None:
    path = server.add_deployment()
    found = server.ok(
        "PATCH", path, {**scale(2), **annotated(**{"queue-scaler/a": "1", "who": None})}
    )
    assert found["spec"]["replicas"] == 2 and found["spec"]["selector"]
    assert found["metadata"]["annotations"].get("queue-scaler/a") == "1"
    assert "who" not in found["metadata"]["annotations"]


def test_a_resource_version_is_good_for_one_write(server: Server) -> None:
    path = server.add_deployment()
    version = server.ok("GET", path)["metadata"]["resourceVersion"]
    first = {"metadata": {"resourceVersion": version}, **scale(2)}
    assert server.call("PATCH", path, first).status == 200
    reply = server.call("PATCH", path, first)
    assert failure(reply) == (409, "Conflict")
    assert reply.body["message"] == (
        'Operation cannot be fulfilled on deployments.apps "worker": the object has been'
        " modified; please apply your changes to the latest version and try again"
    )


def test_a_write_that_changes_nothing_keeps_the_resource_version(server: Server) -> None:
    path = server.add_deployment(replicas=2)
    before = server.ok("GET", path)
    for after in (
        server.ok("PATCH", path, {"spec": {"replicas": 2}}, fieldManager="another"),
        server.ok("PATCH", path, annotated(who="me", absent=None)),
    ):
        assert after["metadata"] == before["metadata"]


def test_every_write_of_the_controllers_moves_the_resource_version_on(server: Server) -> None:
    path = server.add_deployment()
    written = server.ok("PATCH", path, scale(3))
    settled = server.settle()
    assert settled["metadata"]["resourceVersion"] != written["metadata"]["resourceVersion"]
    assert settled["status"]["replicas"] == 3
    assert settled["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "1"


def test_the_field_manager_that_changed_replicas_last_owns_them(server: Server) -> None:
    path = server.add_deployment()
    assert owners(server.ok("GET", path), "spec", "replicas") == [("creator", "")]
    patch = {"spec": {"replicas": 2}, **annotated(**{"queue-scaler/last-scale": "up 1->2"})}
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


def test_the_scale_subresource_reads_and_writes_replicas_and_owns_them(server: Server) -> None:
    path = server.add_deployment(replicas=2)
    found = server.ok("GET", f"{path}/scale")
    assert (found["kind"], found["apiVersion"]) == ("Scale", "autoscaling/v1")
    assert (found["spec"], found["status"]["replicas"]) == ({"replicas": 2}, 2)
    server.ok("PATCH", f"{path}/scale", scale(3), fieldManager="autoscaler")
    assert owners(server.ok("GET", path), "spec", "replicas") == [("autoscaler", "scale")]
    found = server.ok("PATCH", f"{path}/scale", scale(0))
    assert found["spec"] == {}, "a Scale omits zero"


# --- Lists -------------------------------------------------------------------------------------

SELECTORS = {
    "app=worker": {"worker"},
    "app in (worker,other)": {"worker", "other"},
    "app in (worker,other), app notin (other)": {"worker"},
    "absent notin (x)": {"worker", "other"},
    "app": {"worker", "other"},
    "!app": set(),
    "!absent,app=worker": {"worker"},
    "app=worker,app=other": set(),
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
        place, _, query = where.partition("?")
        reply = server.call(method, server.path(place), body, dict(urllib.parse.parse_qsl(query)))
        assert failure(reply) == (status, reason), name
        assert words in reply.body["message"], (name, reply)
    patched = server.call("PATCH", path, scale(2), headers={"Content-Type": "application/json"})
    assert failure(patched) == (415, "UnsupportedMediaType")
    assert server.ok("GET", path)["spec"]["replicas"] == 1
    unknown = server.call("GET", path, headers={"authorization": "Bearer nobody's"})
    assert failure(unknown) == (401, "Unauthorized")


# --- Events ------------------------------------------------------------------------------------


def event(server: Server, about: Object, namespace: str = "") -> Object:
    now, name = stamp(datetime.now(UTC)), about["metadata"]["name"]
    involved = {"kind": "Deployment", "name": name, "namespace": namespace or server.namespace}
    return {
        "metadata": {"name": f"{name}.{uuid.uuid4().hex}"}, "involvedObject": involved,
        "reason": "SuccessfulRescale", "message": "New size: 3", "type": "Normal",
        "source": {"component": "queue-scaler"},
        "firstTimestamp": now, "lastTimestamp": now, "count": 1,
    }  # fmt: skip


def test_an_event_is_created_once_and_found_by_the_object_that_it_is_about(server: Server) -> None:
    found, events = server.ok("GET", server.add_deployment()), server.path("events")
    body = event(server, found)
    assert server.call("POST", events, body).status == 201
    assert failure(server.call("POST", events, body)) == (409, "AlreadyExists")
    elsewhere = server.call("POST", events, event(server, found, "elsewhere"))
    assert failure(elsewhere) == (422, "Invalid")
    assert "does not match" in elsewhere.body["message"]
    for selector, expected in (
        ("involvedObject.name=worker,involvedObject.kind=Deployment", ["New size: 3"]),
        ("involvedObject.name=other", []),
        ("involvedObject.name!=worker", []),
    ):
        selector += ",reason=SuccessfulRescale"
        items = server.ok("GET", events, fieldSelector=selector)["items"]
        assert [item["message"] for item in items] == expected


# --- Pods and their controllers ----------------------------------------------------------------


def test_pods_are_named_labelled_and_owned_by_their_replica_set(server: Server) -> None:
    server.add_deployment(replicas=2)
    [owner] = server.ok("GET", server.path("replicasets"), labelSelector="app=worker")["items"]
    template_hash = owner["metadata"]["labels"]["pod-template-hash"]
    assert owner["metadata"]["name"] == f"worker-{template_hash}"
    for pod in server.pods(app="worker"):
        stem, _, suffix = pod["metadata"]["name"].rpartition("-")
        assert (stem, len(suffix)) == (owner["metadata"]["name"], 5)
        assert pod["metadata"]["labels"]["pod-template-hash"] == template_hash
        [reference] = pod["metadata"]["ownerReferences"]
        assert (reference["kind"], reference["uid"], reference["controller"]) == (
            "ReplicaSet", owner["metadata"]["uid"], True,
        )  # fmt: skip


def test_a_deletion_cost_is_a_32_bit_integer(server: Server) -> None:
    server.add_deployment()
    [pod] = server.pods(app="worker")
    path = server.path("pods", pod["metadata"]["name"])
    for value in ("0", "-1", "2147483647", "-2147483648"):
        assert server.ok("PATCH", path, annotated(**{DELETION_COST: value}))
    for value in ("", "+1", "01", "1.0", "high", "2147483648"):
        reply = server.call("PATCH", path, annotated(**{DELETION_COST: value}))
        assert failure(reply) == (422, "Invalid")
        assert f'Invalid value: "{value}": must be a 32bit integer' in reply.body["message"]


def test_the_pods_of_lower_deletion_cost_go_first(server: Server) -> None:
    path = server.add_deployment(replicas=8)
    names = [pod["metadata"]["name"] for pod in server.pods(app="worker")]
    keep = random.Random(3).sample(names, 4)
    for name in keep:
        cost = annotated(**{DELETION_COST: "100"})
        server.ok("PATCH", server.path("pods", name), cost)
    time.sleep(0.5)  # the controller's cache has to hear of the marks; the fake's is the store
    server.ok("PATCH", path, scale(4))
    server.settle()
    assert sorted(pod["metadata"]["name"] for pod in server.pods(app="worker")) == sorted(keep)


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
    wait_for(lambda: server.call("GET", path, headers=headers).status == 200 or None)

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
    made = event(server, server.ok("GET", path))
    assert server.call("POST", server.path("events"), made, headers=headers).status == 201
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
