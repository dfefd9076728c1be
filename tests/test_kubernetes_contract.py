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
from tests.support.kubernetes_deployments import DESIRED, MOST, REVISION_HISTORY
from tests.support.kubernetes_objects import DELETION_COST, REVISION, Object, stamp

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

    def add_deployment(self, name: str = "worker", replicas: int = 1, app: str = "") -> str:
        """A Deployment with its pods; returns its path."""
        meta = {"name": name, "annotations": {"who": "me"}}
        body = {"metadata": meta, "spec": workload(app or name, replicas)}
        self.ok("POST", self.path("deployments"), body, fieldManager="creator")
        self.settle(name, app)
        return self.path("deployments", name)

    def settle(self, name: str = "worker", app: str = "") -> None:
        """Waits until the controllers have done what the Deployment says, and are quiet."""
        seen: list[str] = []

        def quiet() -> bool:
            found = self.ok("GET", self.path("deployments", name))
            seen.append(found["metadata"]["resourceVersion"])
            status = found.get("status", {})
            current = status.get("observedGeneration") == found["metadata"].get("generation")
            counts = {status.get("replicas", 0), len(self.pods(app or name))}
            return current and counts == {found["spec"]["replicas"]} and seen[-5:] == seen[-1:] * 5

        wait_for(quiet)

    def pods(self, app: str = "worker") -> list[Object]:
        found = self.ok("GET", self.path("pods"), labelSelector=f"app={app}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def sets(self, app: str = "worker") -> list[Object]:
        """The ReplicaSets, the oldest first."""
        query = {"labelSelector": f"app={app}"}
        found = self.ok("GET", self.path("replicasets"), **query)["items"]
        return sorted(
            found, key=lambda one: int(one["metadata"].get("annotations", {}).get(REVISION, 0))
        )

    def wait_for_sizes(self, *sizes: int) -> list[Object]:
        """Waits until the ReplicaSets want so many pods, and goes on wanting them."""
        seen: list[list[int]] = []

        def quiet() -> bool:
            seen.append([one["spec"].get("replicas", 0) for one in self.sets()])
            return seen[-10:] == [[*sizes]] * 10

        try:
            wait_for(quiet)
        except AssertionError:
            raise AssertionError(f"expected {sizes}, found {seen[-1]}") from None
        return self.sets()

    def observe(self, name: str = "worker") -> None:
        """Waits until the Deployment controller has acted on what was written last."""

        def observed() -> bool:
            found = self.ok("GET", self.path("deployments", name))
            return bool(found["status"]["observedGeneration"] == found["metadata"]["generation"])

        wait_for(observed)

    def load_rbac(self, manifest: str) -> None:
        """Creates the Roles and RoleBindings of a manifest."""
        for document in yaml.safe_load_all(manifest):
            plural = f"{document['kind'].lower()}s"
            self.ok("POST", f"{RBAC}/namespaces/{self.namespace}/{plural}", document)


@dataclass(frozen=True)
class FakeServer(Server):
    """The fake serves no RBAC objects: tests load them. It has no node, either."""

    cluster: FakeKubernetes

    def load_rbac(self, manifest: str) -> None:
        self.cluster.load_rbac(manifest)


def workload(app: str, replicas: int, **template: Any) -> Object:
    """The spec of a Deployment or a ReplicaSet whose pods no node takes."""
    labels, nowhere = {"app": app}, {"queue-scaler.example.com/contract": "no-node"}
    pod = {"nodeSelector": nowhere, "containers": [{"name": "main", "image": "none"}], **template}
    selector = {"matchLabels": labels}
    return {
        "replicas": replicas,
        "selector": selector,
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
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
            fake.controllers.nodes = ()
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


def test_a_merge_patch_applies_only_to_the_version_that_it_names(server: Server) -> None:
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


def test_the_last_writer_owns_replicas_also_through_the_scale_subresource(server: Server) -> None:
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


FIELDS = {
    "": 5, "status.phase!=Running": 5, "status.phase=Running": 0, "status.phase==Pending": 5,
    "status.phase!=Succeeded,status.phase!=Failed": 5, "status.phase!=Pending": 0,
    "metadata.name=nope": 0, "metadata.name!=nope,spec.nodeName=": 5,
}  # fmt: skip


def test_field_selectors(server: Server) -> None:
    server.add_deployment(replicas=5)
    for selector, expected in FIELDS.items():
        found = server.ok("GET", server.path("pods"), fieldSelector=selector)["items"]
        assert len(found) == expected, selector
    name = str(found[0]["metadata"]["name"])
    found = server.ok("GET", server.path("pods"), fieldSelector=f"metadata.name={name}")["items"]
    assert [pod["metadata"]["name"] for pod in found] == [name]
    found = server.ok("GET", server.path("replicasets"), fieldSelector="metadata.name!=nope")
    assert len(found["items"]) == 1


@pytest.mark.parametrize("selector", [{}, {"labelSelector": "app=worker"}], ids=["all", "some"])
def test_a_list_comes_in_pages_of_exactly_its_limit(server: Server, selector: Object) -> None:
    """All pages show what there was when the first was read."""
    server.add_deployment("other", replicas=2)
    server.add_deployment(replicas=5)
    query = {"limit": "2", "fieldSelector": "status.phase!=Failed", **selector}
    expected = 5 if selector else 7
    page = server.ok("GET", server.path("pods"), **query)
    items, sizes, revision = (
        page["items"],
        [len(page["items"])],
        page["metadata"]["resourceVersion"],
    )
    server.ok("PATCH", server.path("deployments", "worker"), scale(0))
    server.settle()
    while token := page["metadata"].get("continue"):
        page = server.ok("GET", server.path("pods"), **{**query, "continue": token})
        assert page["metadata"]["resourceVersion"] == revision
        items, sizes = items + page["items"], [*sizes, len(page["items"])]
    names = [item["metadata"]["name"] for item in items]
    assert names == sorted(set(names)) and len(names) == expected
    full, rest = divmod(expected, 2)
    assert [size for size in sizes if size] == [2] * full + [rest] * bool(rest)
    assert not server.pods()


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
    "no such page": ("GET", "pods?continue=nope", None, 400, "BadRequest", "continue token"),
    "no such field": (
        "GET", "pods?fieldSelector=a%3D1", None, 400, "BadRequest",
        "field label not supported: a",
    ),
    "no such field of a ReplicaSet": (
        "GET", "replicasets?fieldSelector=a%3D1", None, 400, "BadRequest",
        '"a" is not a known field selector: only "metadata.name", "metadata.namespace"',
    ),
    "no field selector": (
        "GET", "pods?fieldSelector=a", None, 400, "BadRequest",
        "invalid selector: 'a'; can't understand 'a'",
    ),
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
    keep = random.Random(3).sample(names, 4)
    for name in names:
        assert mark(name, "100" if name in keep else "-100").status == 200
    time.sleep(0.5)  # the controller's cache has to hear of the marks; the fake's is the store
    server.ok("PATCH", deployment, scale(4))
    server.settle()
    assert sorted(pod["metadata"]["name"] for pod in server.pods()) == sorted(keep)


def test_a_pod_patch_applies_only_to_the_version_that_it_names(server: Server) -> None:
    server.add_deployment()
    [pod] = server.pods()
    path = server.path("pods", pod["metadata"]["name"])
    pod = server.ok("GET", path)
    patch = annotated(**{DELETION_COST: "-7"})
    patch["metadata"]["resourceVersion"] = pod["metadata"]["resourceVersion"]
    written = server.ok("PATCH", path, patch, fieldManager="queue-scaler")
    assert written["metadata"]["uid"] == pod["metadata"]["uid"]
    assert written["metadata"]["resourceVersion"] != pod["metadata"]["resourceVersion"]
    assert owners(written, "metadata", DELETION_COST) == [("queue-scaler", "")]
    reply = server.call("PATCH", path, patch)
    assert failure(reply) == (409, "Conflict")
    assert "Operation cannot be fulfilled on pods" in reply.body["message"]
    other = {"metadata": {"uid": str(uuid.uuid4())}}
    assert failure(server.call("PATCH", path, other)) == (422, "Invalid")
    other = server.ok("PATCH", path, annotated(**{DELETION_COST: "5"}), fieldManager="another")
    assert owners(other, "metadata", DELETION_COST) == [("another", "")]
    gone = server.ok("PATCH", path, annotated(**{DELETION_COST: None}), fieldManager="queue-scaler")
    assert owners(gone, "metadata", DELETION_COST) == []
    assert {entry["manager"] for entry in gone["metadata"]["managedFields"]} == {
        entry["manager"] for entry in pod["metadata"]["managedFields"]
    }


# --- The Deployment controller and its ReplicaSets ---------------------------------------------


def test_each_write_but_one_of_the_status_is_a_generation_that_the_controller_observes(
    server: Server,
) -> None:
    path = server.add_deployment()
    for patch, generation in ((annotated(a="1"), 2), (annotated(a="1"), 2), (scale(2), 3)):
        assert server.ok("PATCH", path, patch)["metadata"]["generation"] == generation
    server.settle()
    settled = server.ok("GET", path)
    assert settled["metadata"]["generation"] == settled["status"]["observedGeneration"] == 3
    [owned] = server.sets()
    assert owned["metadata"]["generation"] == owned["status"]["observedGeneration"] == 2
    assert owned["metadata"]["annotations"].items() >= {
        ("who", "me"), ("a", "1"), (DESIRED, "2"),
        (MOST, "3"), (REVISION, "1"),
    }  # fmt: skip
    server.ok("PATCH", path, annotated(a=None))
    server.settle()
    [owned] = server.sets()
    assert owned["metadata"]["annotations"].get("a") == "1", "a rollback will bring it back"


def rollout(**template: Any) -> Object:
    return {"spec": {"template": {"spec": template}}}


NO_SUCH_ACCOUNT = rollout(serviceAccountName="missing")


def test_a_rollout_whose_replica_set_makes_no_pods_shares_a_rescale_in_proportion(
    server: Server,
) -> None:
    path = server.add_deployment(replicas=8)
    server.ok("PATCH", path, NO_SUCH_ACCOUNT)
    server.wait_for_sizes(6, 4)
    wait_for(lambda: len(server.pods()) == 6)
    _, new = server.sets()
    assert new["status"].get("replicas", 0) == 0
    [problem] = new["status"]["conditions"]
    assert (problem["type"], problem["reason"]) == ("ReplicaFailure", "FailedCreate")
    assert "service account" in problem["message"] and "missing" in problem["message"]
    for replicas, *sizes in ((4, 3, 2), (5, 4, 3), (12, 9, 6), (0, 0, 0)):
        server.ok("PATCH", path, scale(replicas))
        server.wait_for_sizes(*sizes)
    wait_for(lambda: not server.pods())


def test_a_paused_rollout_changes_only_with_a_rescale(server: Server) -> None:
    path = server.add_deployment(replicas=10)
    stalled = {"maxSurge": 2, "maxUnavailable": 0}
    server.ok("PATCH", path, {"spec": {"strategy": {"rollingUpdate": stalled}}})
    server.ok("PATCH", path, rollout(priority=0))
    server.wait_for_sizes(10, 2)
    server.ok("PATCH", path, {"spec": {"paused": True}})
    server.observe()
    server.ok("PATCH", path, scale(5))
    server.wait_for_sizes(6, 1)
    server.ok("PATCH", path, rollout(terminationGracePeriodSeconds=7))
    server.wait_for_sizes(6, 1)
    server.ok("PATCH", path, {"spec": {"paused": False}})
    server.wait_for_sizes(4, 1, 2)


def test_recreate_ends_all_old_pods_before_it_makes_new_ones(server: Server) -> None:
    path = server.add_deployment(replicas=3)
    recreate = {"spec": {"strategy": {"type": "Recreate", "rollingUpdate": None}}}
    server.ok("PATCH", path, recreate)
    server.ok("PATCH", path, NO_SUCH_ACCOUNT)
    server.wait_for_sizes(0, 3)
    wait_for(lambda: not server.pods())
    server.ok("PATCH", path, scale(2))
    server.wait_for_sizes(0, 2)
    server.ok("PATCH", path, rollout(serviceAccountName="default"))
    server.wait_for_sizes(0, 0, 2)
    wait_for(lambda: len(server.pods()) == 2)


def test_a_rollout_to_an_earlier_template_takes_its_replica_set_again(server: Server) -> None:
    path = server.add_deployment(replicas=2)
    at_once = {"spec": {"strategy": {"rollingUpdate": {"maxUnavailable": "100%"}}}}
    server.ok("PATCH", path, at_once)
    for grace in (7, 8, 7):
        server.ok("PATCH", path, rollout(terminationGracePeriodSeconds=grace))
        server.settle()
    _, old, new = server.sets()
    assert old["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 8
    annotations = new["metadata"]["annotations"]
    assert (annotations[REVISION], annotations[REVISION_HISTORY]) == ("4", "2")
    assert server.ok("GET", path)["metadata"]["annotations"][REVISION] == "4"


def test_a_renamed_deployment_adopts_the_old_replica_set_with_its_name(server: Server) -> None:
    path = server.add_deployment("before", replicas=3, app="worker")
    [owned], pods = server.sets(), {pod["metadata"]["uid"] for pod in server.pods()}
    assert server.call("DELETE", path, {"propagationPolicy": "Orphan"}).status == 200
    wait_for(lambda: "ownerReferences" not in server.sets()[0]["metadata"])
    path = server.add_deployment("after", replicas=3, app="worker")
    [adopted] = server.sets()
    assert adopted["metadata"]["name"] == owned["metadata"]["name"]
    assert adopted["metadata"]["uid"] == owned["metadata"]["uid"]
    [reference] = adopted["metadata"]["ownerReferences"]
    assert reference["uid"] == server.ok("GET", path)["metadata"]["uid"]
    assert {pod["metadata"]["uid"] for pod in server.pods()} == pods
    server.ok("PATCH", path, scale(1))
    server.settle("after", "worker")
    assert {pod["metadata"]["uid"] for pod in server.pods()} < pods


def test_a_replica_set_made_by_hand_is_adopted_and_scaled_down_as_an_old_one(
    server: Server,
) -> None:
    spec = workload("worker", 3, terminationGracePeriodSeconds=7)
    spec["selector"]["matchLabels"]["by"] = spec["template"]["metadata"]["labels"]["by"] = "hand"
    by_hand = {"metadata": {"name": "by-hand", "labels": {"app": "worker"}}, "spec": spec}
    server.ok("POST", server.path("replicasets"), by_hand)
    wait_for(lambda: len(server.pods()) == 3)
    body = {"metadata": {"name": "worker"}, "spec": workload("worker", 4)}
    server.ok("POST", server.path("deployments"), body)
    found = {one["metadata"]["name"]: one for one in server.wait_for_sizes(3, 2)}
    assert found["by-hand"]["spec"]["replicas"] == 3, "as none of the new pods is available"
    uid = server.ok("GET", server.path("deployments", "worker"))["metadata"]["uid"]
    assert {one["metadata"]["ownerReferences"][0]["uid"] for one in found.values()} == {uid}


def test_long_names_of_replica_sets_and_pods_are_truncated(server: Server) -> None:
    name = "w" * 245
    server.add_deployment(name, app="worker")
    [owned], [pod] = server.sets(), server.pods()
    suffix = owned["metadata"]["labels"]["pod-template-hash"]
    found = owned["metadata"]["name"]
    assert found == f"{name[: 252 - len(suffix)]}-{suffix}" and len(found) <= 253
    assert len(pod["metadata"]["name"]) == 63
    assert pod["metadata"]["name"][:58] == name[:58]


def test_a_relabeled_pod_is_released_and_replaced(server: Server) -> None:
    server.add_deployment(replicas=2)
    first, second = (pod["metadata"]["name"] for pod in server.pods())
    released = {"metadata": {"labels": {"app": "debug"}}}
    server.ok("PATCH", server.path("pods", first), released)
    wait_for(lambda: len(server.pods()) == 2)
    left = server.ok("GET", server.path("pods", first))["metadata"]
    assert "ownerReferences" not in left
    assert second in {pod["metadata"]["name"] for pod in server.pods()}


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


def test_a_role_allows_what_it_names_and_a_denial_names_user_and_verb(server: Server) -> None:
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
    meta = {
        "name": name, "uid": name, "creationTimestamp": created,
        "annotations": {DELETION_COST: cost},
    }  # fmt: skip
    containers = [{"restartCount": restarts}]
    status = {"phase": phase, "conditions": [condition], "containerStatuses": containers}
    return {"metadata": meta, "spec": {"nodeName": node}, "status": status}


def shuffled(seed: int) -> Callable[[list[Object]], list[Object]]:
    rng = random.Random(seed)
    return lambda pods: rng.sample(pods, len(pods))


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
        order = deletion_order(pods, related, NOW, shuffled(seed))
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
