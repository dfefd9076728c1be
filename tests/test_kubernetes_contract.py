"""What a Kubernetes API server does, asked of the fake and of a real one alike.

The real one is the cluster of the kubeconfig that E2E_KUBECONFIG names; the tests live in a
namespace of their own there and delete it. They need no kubelets: a Deployment's pods may stay
pending. At the end come tests of what only the fake can be asked for.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import urllib3
import yaml
from kubernetes import client, config

from tests.support.kubernetes import (
    Behaviour,
    FakeKubernetes,
    Match,
    answer,
    cut,
    drip,
    empty,
    garbage,
    hang,
    reset,
    wrong_kind,
)
from tests.support.kubernetes_controllers import deletion_order, proportional_sizes
from tests.support.kubernetes_objects import DELETION_COST

pytestmark = pytest.mark.slow

Object = dict[str, Any]
T = TypeVar("T")

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"
APPS = "/apis/apps/v1"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
PAUSE_IMAGE = "registry.k8s.io/pause:3.10"


@dataclass(frozen=True)
class Reply:
    status: int
    body: Any


@dataclass(frozen=True)
class Server:
    """An API server, one namespace in it, and the few calls that every test makes."""

    api: client.ApiClient
    namespace: str

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request with the official client's own connections and credentials."""
        sent = {"Accept": "application/json", "User-Agent": "contract-test/1.0", **(headers or {})}
        for setting in self.api.configuration.auth_settings().values():
            sent[setting["key"]] = setting["value"]
        if body is not None:
            sent["Content-Type"] = content_type
        url = f"{self.api.configuration.host}{path}?{urllib.parse.urlencode(query or {})}"
        raw = json.dumps(body) if body is not None else None
        got = self.api.rest_client.pool_manager.request(method, url, body=raw, headers=sent)
        is_json = "json" in got.headers.get("Content-Type", "")
        return Reply(got.status, json.loads(got.data) if is_json else got.data.decode())

    def ok(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        content_type = MERGE if method == "PATCH" else "application/json"
        reply = self.call(method, path, body, query=query, content_type=content_type)
        assert reply.status < 300, reply
        return reply.body

    def patch(self, path: str, body: Any, content_type: str = MERGE, **query: str) -> Reply:
        return self.call("PATCH", path, body, content_type=content_type, query=query)

    def path(self, resource: str, *parts: str) -> str:
        base = APPS if resource in ("deployments", "replicasets") else "/api/v1"
        return "/".join([base, "namespaces", self.namespace, resource, *parts])

    def requires(self, minor: int) -> None:
        """Skips the test on an older server; one built without a version counts as new."""
        found = self.call("GET", "/version").body.get("minor", "").rstrip("+")
        if found and int(found) < minor:
            pytest.skip(f"this server, 1.{found}, is older than 1.{minor}")

    def add_deployment(self, name: str = "worker", replicas: int | None = 1) -> str:
        """Creates a Deployment and waits for its pods; returns its path."""
        body = deployment(name)
        if replicas is not None:
            body["spec"]["replicas"] = replicas
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
            current = status.get("observedGeneration") == found["metadata"]["generation"]
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
    """The fake takes the manifest as a whole: it serves no RBAC objects."""

    cluster: FakeKubernetes

    def load_rbac(self, manifest: str) -> None:
        self.cluster.load_rbac(manifest, self.namespace)


def deployment(name: str) -> Object:
    labels = {"app": name, "tier": f"of-{name}"}
    template = {
        "metadata": {"labels": labels},
        "spec": {"containers": [{"name": "main", "image": PAUSE_IMAGE}]},
    }
    spec: Object = {"selector": {"matchLabels": {"app": name}}, "template": template}
    return {"metadata": {"name": name, "annotations": {"who": "me"}}, "spec": spec}


def wait_for(condition: Callable[[], T | None], seconds: float = 30) -> T:
    end = time.monotonic() + seconds
    while (found := condition()) is None:
        assert time.monotonic() < end, "this did not happen in time"
        time.sleep(0.015)
    return found


def annotated(**values: str | None) -> Object:
    return {"metadata": {"annotations": values}}


def scale(replicas: int | None) -> Object:
    return {"spec": {"replicas": replicas}}


def owners(obj: Object, *path: str) -> list[tuple[str, str]]:
    """Who owns a field by managedFields: (manager, subresource) of each entry that holds it."""
    found = []
    for entry in obj["metadata"]["managedFields"]:
        node = entry["fieldsV1"]
        for part in path:
            node = node.get(f"f:{part}") if node is not None else None
        if node is not None:
            found.append((entry["manager"], entry.get("subresource", "")))
    return found


def is_failure(reply: Reply, code: int, reason: str) -> bool:
    """Whether this is a Status object as every failure of the API carries one."""
    body = reply.body
    assert (body["kind"], body["apiVersion"], body["status"]) == ("Status", "v1", "Failure")
    assert (reply.status, body["code"], body["reason"]) == (code, code, reason), reply
    return True


E2E_KUBECONFIG = os.environ.get("E2E_KUBECONFIG", "")


@pytest.fixture(params=["fake", "real"] if E2E_KUBECONFIG else ["fake"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    if request.param == "real":
        yield from real_server(E2E_KUBECONFIG)
        return
    with FakeKubernetes(controllers="in background", nodes=(), step_seconds=0.002) as fake:
        path = fake.write_kubeconfig(tmp_path / "kubeconfig")
        with config.new_client_from_config(str(path)) as api:
            yield FakeServer(api, "contract", fake)


def real_server(kubeconfig: str) -> Iterator[Server]:
    """A namespace of a real cluster, deleted afterwards with all that is in it."""
    with config.new_client_from_config(kubeconfig) as api:
        server = Server(api, f"contract-{uuid.uuid4().hex[:8]}")
        server.ok("POST", "/api/v1/namespaces", {"metadata": {"name": server.namespace}})
        try:
            yield server
        finally:
            for resource in ("deployments", "replicasets", "pods", "events"):
                server.call("DELETE", server.path(resource))
            server.call("DELETE", f"/api/v1/namespaces/{server.namespace}")


# --- Patches and versions ------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", [MERGE, STRATEGIC])
def test_a_merge_patch_adds_annotations_and_null_deletes_them(
    server: Server, content_type: str
) -> None:
    path = server.add_deployment()
    patch = {"metadata": {"annotations": {"queue-scaler/a": "1", "who": None}}}
    reply = server.patch(path, patch, content_type)
    assert reply.status == 200
    found = server.ok("GET", path)["metadata"]["annotations"]
    assert found["queue-scaler/a"] == "1"
    assert "who" not in found


def test_a_json_patch_replaces_removes_and_tests(server: Server) -> None:
    path = server.add_deployment()
    steps = [
        {"op": "test", "path": "/spec/replicas", "value": 1},
        {"op": "replace", "path": "/spec/replicas", "value": 2},
        {"op": "remove", "path": "/metadata/annotations/who"},
        {"op": "add", "path": "/metadata/annotations/queue-scaler~1a", "value": "1"},
    ]
    body = server.patch(path, steps, JSON_PATCH).body
    assert body["spec"]["replicas"] == 2
    assert body["metadata"]["annotations"].get("queue-scaler/a") == "1"
    assert "who" not in body["metadata"]["annotations"]
    assert is_failure(server.patch(path, steps, JSON_PATCH), 422, "Invalid")


def test_a_stale_resource_version_is_a_conflict(server: Server) -> None:
    path = server.add_deployment()
    stale = server.ok("GET", path)
    current = server.ok("PATCH", path, annotated(a="1"))
    version = {"resourceVersion": stale["metadata"]["resourceVersion"]}
    replies = [
        server.patch(path, {"metadata": version, "spec": {"replicas": 2}}),
        server.call("PUT", path, stale),
    ]
    for reply in replies:
        assert is_failure(reply, 409, "Conflict")
        assert reply.body["message"] == (
            'Operation cannot be fulfilled on deployments.apps "worker": the object has been'
            " modified; please apply your changes to the latest version and try again"
        )
        assert reply.body["details"] == {"name": "worker", "group": "apps", "kind": "deployments"}
    assert current["spec"]["replicas"] == server.ok("GET", path)["spec"]["replicas"] == 1


def test_a_fresh_resource_version_is_accepted_once(server: Server) -> None:
    path = server.add_deployment()
    version = server.ok("GET", path)["metadata"]["resourceVersion"]
    patches = [{"metadata": {"resourceVersion": version, "annotations": {"a": str(i)}}}
               for i in range(2)]  # fmt: skip
    assert [server.patch(path, patch).status for patch in patches] == [200, 409]


def test_a_write_that_changes_nothing_keeps_the_resource_version(server: Server) -> None:
    path = server.add_deployment(replicas=2)
    before = server.ok("GET", path)
    for after in (
        server.ok("PATCH", path, {"spec": {"replicas": 2}}, fieldManager="another"),
        server.ok("PATCH", path, annotated(who="me", absent=None)),
        server.ok("PUT", path, before),
    ):
        assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
        assert after["metadata"]["managedFields"] == before["metadata"]["managedFields"]


def test_generation_counts_changes_of_spec_and_annotations_and_of_nothing_else(
    server: Server,
) -> None:
    path = server.add_deployment()
    first = server.ok("GET", path)["metadata"]["generation"]
    patches = [{"metadata": {"labels": {"x": "y"}}}, scale(2), annotated(a="1"), scale(2)]
    found = [server.ok("PATCH", path, patch)["metadata"]["generation"] for patch in patches]
    assert [generation - first for generation in found] == [0, 1, 2, 2]


def test_every_write_of_the_controllers_moves_the_resource_version_on(server: Server) -> None:
    path = server.add_deployment()
    written = server.ok("PATCH", path, scale(3))
    settled = server.settle()
    assert settled["metadata"]["generation"] == written["metadata"]["generation"]
    assert settled["metadata"]["resourceVersion"] != written["metadata"]["resourceVersion"]
    assert settled["status"]["replicas"] == 3
    assert settled["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "1"


def test_absent_replicas_mean_one(server: Server) -> None:
    path = server.add_deployment(replicas=None)
    assert server.ok("GET", path)["spec"]["replicas"] == 1
    server.ok("PATCH", path, scale(3))
    assert server.ok("PATCH", path, scale(None))["spec"]["replicas"] == 1


def test_a_dry_run_answers_but_keeps_nothing(server: Server) -> None:
    path = server.add_deployment()
    assert server.ok("PATCH", path, scale(3), dryRun="All")["spec"]["replicas"] == 3
    assert server.ok("GET", path)["spec"]["replicas"] == 1


def test_the_status_subresource_changes_no_spec_and_the_object_no_status(server: Server) -> None:
    path = server.add_deployment()
    patch = {"spec": {"replicas": 5}, "status": {"collisionCount": 7}}
    assert "collisionCount" not in server.ok("PATCH", path, patch)["status"]
    server.ok("PATCH", path, scale(1))
    assert server.ok("PATCH", f"{path}/status", patch)["spec"]["replicas"] == 1


# --- Who owns a field ----------------------------------------------------------------------------


def test_the_field_manager_that_changed_replicas_last_owns_them(server: Server) -> None:
    path = server.add_deployment()
    assert owners(server.ok("GET", path), "spec", "replicas") == [("creator", "")]
    patch = {"spec": {"replicas": 2}, **annotated(**{"queue-scaler/last-scale": "up 1->2"})}
    mine = server.ok("PATCH", path, patch, fieldManager="queue-scaler")
    where = ("metadata", "annotations", "queue-scaler/last-scale")
    assert owners(mine, "spec", "replicas") == [("queue-scaler", "")]
    assert owners(mine, *where) == [("queue-scaler", "")]
    theirs = server.ok("PATCH", path, scale(3), fieldManager="kubectl-edit")
    assert owners(theirs, "spec", "replicas") == [("kubectl-edit", "")]
    assert owners(theirs, *where) == [("queue-scaler", "")]
    assert owners(theirs, "spec", "selector") == [("creator", "")]


def test_a_write_of_the_same_value_takes_nothing_over(server: Server) -> None:
    path = server.add_deployment()
    same = server.ok("PATCH", path, {**scale(1), **annotated(a="1")}, fieldManager="another")
    assert owners(same, "spec", "replicas") == [("creator", "")]
    assert owners(same, "metadata", "annotations", "a") == [("another", "")]


def test_without_a_field_manager_the_user_agent_names_it(server: Server) -> None:
    path = server.add_deployment()
    assert owners(server.ok("PATCH", path, scale(2)), "spec", "replicas") == [("contract-test", "")]


def test_an_entry_says_how_and_when(server: Server) -> None:
    path = server.add_deployment()
    found = server.ok("PATCH", path, scale(2), fieldManager="queue-scaler")
    [entry] = [e for e in found["metadata"]["managedFields"] if e["manager"] == "queue-scaler"]
    assert (entry["operation"], entry["apiVersion"]) == ("Update", "apps/v1")
    assert (entry["fieldsType"], entry["fieldsV1"]) == (
        "FieldsV1", {"f:spec": {"f:replicas": {}}},
    )  # fmt: skip
    when = datetime.strptime(entry["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=2)


def test_scaling_through_the_subresource_is_owned_as_such(server: Server) -> None:
    server.requires(22)
    path = server.add_deployment()
    server.ok("PATCH", f"{path}/scale", scale(2), fieldManager="autoscaler")
    assert owners(server.ok("GET", path), "spec", "replicas") == [("autoscaler", "scale")]
    mine = server.ok("PATCH", path, scale(3), fieldManager="queue-scaler")
    assert owners(mine, "spec", "replicas") == [("queue-scaler", "")]


# --- Scale ---------------------------------------------------------------------------------------


def test_the_scale_subresource_reads_and_writes_replicas(server: Server) -> None:
    path = server.add_deployment(replicas=2)
    found = server.ok("GET", f"{path}/scale")
    assert (found["kind"], found["apiVersion"]) == ("Scale", "autoscaling/v1")
    assert (found["spec"], found["status"]) == (
        {"replicas": 2}, {"replicas": 2, "selector": "app=worker"},
    )  # fmt: skip
    found["spec"]["replicas"] = 0
    assert server.ok("PUT", f"{path}/scale", found)["spec"] == {}  # a Scale omits zero
    assert server.ok("GET", path)["spec"]["replicas"] == 0
    assert is_failure(server.call("PUT", f"{path}/scale", found), 409, "Conflict")


# --- Lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("app=worker", {"worker"}),
        ("app==other", {"other"}),
        ("app!=worker", {"other"}),
        ("app in (worker,other)", {"worker", "other"}),
        ("app in (worker), tier notin (of-other)", {"worker"}),
        ("app notin (worker)", {"other"}),
        ("absent notin (x)", {"worker", "other"}),
        ("absent!=x", {"worker", "other"}),
        ("app", {"worker", "other"}),
        ("!app", set()),
        ("absent", set()),
        ("!absent,app=worker", {"worker"}),
        ("app=worker,app=other", set()),
        ("", {"worker", "other"}),
    ],
)
def test_label_selectors(server: Server, selector: str, expected: set[str]) -> None:
    for name in ("worker", "other"):
        server.add_deployment(name)
    found = server.ok("GET", server.path("pods"), labelSelector=selector)
    assert {pod["metadata"]["labels"]["app"] for pod in found["items"]} == expected


@pytest.mark.parametrize("selector", ["app in worker", "=x", "app=worker,,!", "a b"])
def test_an_unreadable_label_selector_is_a_bad_request(server: Server, selector: str) -> None:
    reply = server.call("GET", server.path("pods"), query={"labelSelector": selector})
    assert is_failure(reply, 400, "BadRequest")


def test_field_selectors(server: Server) -> None:
    server.add_deployment(replicas=2)
    [first, second] = server.pods(app="worker")
    name = first["metadata"]["name"]
    selected = server.ok("GET", server.path("pods"), fieldSelector=f"metadata.name={name}")["items"]
    assert [pod["metadata"]["name"] for pod in selected] == [name]
    others = server.ok("GET", server.path("pods"), fieldSelector=f"metadata.name!={name}")["items"]
    assert [pod["metadata"]["name"] for pod in others] == [second["metadata"]["name"]]
    reply = server.call("GET", server.path("pods"), query={"fieldSelector": "spec.nonsense=1"})
    assert is_failure(reply, 400, "BadRequest")


def test_a_list_comes_in_pages_that_show_the_moment_of_the_first(server: Server) -> None:
    server.add_deployment(replicas=5)
    names = sorted(pod["metadata"]["name"] for pod in server.pods(app="worker"))
    page = server.ok("GET", server.path("pods"), limit="2")
    assert (page["kind"], page["metadata"]["remainingItemCount"]) == ("PodList", 3)
    found = [page]
    server.ok("DELETE", server.path("pods", names[-1]))
    while token := found[-1]["metadata"].get("continue"):
        found.append(server.ok("GET", server.path("pods"), limit="2", **{"continue": token}))
    assert [len(page["items"]) for page in found] == [2, 2, 1]
    assert [pod["metadata"]["name"] for page in found for pod in page["items"]] == names
    assert {page["metadata"]["resourceVersion"] for page in found} == {
        page["metadata"]["resourceVersion"]
    }
    assert not {"kind", "apiVersion"} & found[0]["items"][0].keys()


def test_a_page_under_a_selector_does_not_say_how_many_remain(server: Server) -> None:
    server.add_deployment(replicas=3)
    query = {"limit": "2", "labelSelector": "app=worker"}
    page = server.ok("GET", server.path("pods"), **query)
    assert page["metadata"]["continue"]
    assert "remainingItemCount" not in page["metadata"]
    query["continue"] = page["metadata"]["continue"]
    assert len(server.ok("GET", server.path("pods"), **query)["items"]) == 1


def test_a_made_up_continue_token_is_a_bad_request(server: Server) -> None:
    query = {"limit": "1", "continue": "not-a-token"}
    assert is_failure(server.call("GET", server.path("pods"), query=query), 400, "BadRequest")


# --- Failures ------------------------------------------------------------------------------------


def test_what_does_not_exist_is_not_found_by_name(server: Server) -> None:
    for method, body in (("GET", None), ("PATCH", scale(1)), ("DELETE", None)):
        reply = server.call(method, server.path("deployments", "nope"), body, content_type=MERGE)
        assert is_failure(reply, 404, "NotFound")
        assert reply.body["message"] == 'deployments.apps "nope" not found'
        assert reply.body["details"] == {"name": "nope", "group": "apps", "kind": "deployments"}
    reply = server.call("GET", server.path("pods", "nope"))
    assert is_failure(reply, 404, "NotFound")
    assert reply.body["message"] == 'pods "nope" not found'
    assert reply.body["details"] == {"name": "nope", "kind": "pods"}


def test_an_unknown_resource_is_not_found(server: Server) -> None:
    pod = server.path("pods", "x", "nonsense")
    for path in (server.path("nonsenses"), f"{APPS}/nonsenses", pod):
        reply = server.call("GET", path)
        assert is_failure(reply, 404, "NotFound")
        assert reply.body["message"] == "the server could not find the requested resource"


def test_an_unknown_path_or_group_is_not_found_but_no_status(server: Server) -> None:
    for path in ("/nonsense", "/apis/nonsense.example.com/v1/namespaces/x/things"):
        reply = server.call("GET", path)
        assert reply.status == 404
        assert "kind" not in reply.body


def test_a_method_that_a_resource_lacks_is_not_allowed(server: Server) -> None:
    reply = server.call("POST", server.path("deployments", "x"), {})
    assert is_failure(reply, 405, "MethodNotAllowed")
    assert reply.body["message"] == (
        "the server does not allow this method on the requested resource"
    )


def test_an_unknown_option_is_invalid(server: Server) -> None:
    path = server.add_deployment()
    assert is_failure(server.patch(path, scale(2), dryRun="Some"), 422, "Invalid")
    assert is_failure(server.patch(path, scale(2), fieldManager="x" * 129), 422, "Invalid")
    reply = server.call("GET", server.path("pods"), query={"limit": "x"})
    assert is_failure(reply, 400, "BadRequest")
    assert server.ok("GET", path)["spec"]["replicas"] == 1


@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_a_patch_of_another_type_is_unsupported(server: Server, content_type: str) -> None:
    path = server.add_deployment()
    reply = server.patch(path, scale(2), content_type)
    assert is_failure(reply, 415, "UnsupportedMediaType")
    assert reply.body["message"] == "415: Unsupported Media Type"


@pytest.mark.parametrize("subresource", ["", "/scale"])
def test_negative_replicas_are_invalid(server: Server, subresource: str) -> None:
    path = server.add_deployment()
    reply = server.patch(path + subresource, scale(-1))
    assert is_failure(reply, 422, "Invalid")
    kind = "Scale.autoscaling" if subresource else "Deployment.apps"
    text = "Invalid value: -1: must be greater than or equal to 0"
    assert reply.body["message"] == f'{kind} "worker" is invalid: spec.replicas: {text}'
    [cause] = reply.body["details"]["causes"]
    assert cause == {"reason": "FieldValueInvalid", "message": text, "field": "spec.replicas"}


@pytest.mark.parametrize("value", [1, True, 1.5, ["x"], {"x": "y"}])
def test_an_annotation_that_is_no_string_is_invalid(server: Server, value: object) -> None:
    path = server.add_deployment()
    patch = {"metadata": {"annotations": {"a": value}}}
    for content_type in (MERGE, STRATEGIC):
        assert is_failure(server.patch(path, patch, content_type), 422, "Invalid")
    whole = server.ok("GET", path)
    whole["metadata"]["annotations"]["a"] = value
    assert is_failure(server.call("PUT", path, whole), 400, "BadRequest")


@pytest.mark.parametrize("value", ["3", 1.5, True])
def test_replicas_that_are_no_integer_are_invalid(server: Server, value: object) -> None:
    path = server.add_deployment()
    assert is_failure(server.patch(path, {"spec": {"replicas": value}}), 422, "Invalid")


def test_annotations_have_256_kib_together(server: Server) -> None:
    path = server.add_deployment()
    assert server.patch(path, annotated(big="x" * (200 * 1024))).status == 200
    server.settle()
    reply = server.patch(path, annotated(more="x" * (60 * 1024)))
    assert is_failure(reply, 422, "Invalid")
    assert reply.body["details"]["causes"][0]["reason"] == "FieldValueTooLong"


@pytest.mark.parametrize("key", ["with space", "/x", "a/b/c", "-x", "x" * 64, "x_/x", ""])
def test_annotation_keys_are_qualified_names(server: Server, key: str) -> None:
    path = server.add_deployment()
    assert is_failure(server.patch(path, annotated(**{key: "v"})), 422, "Invalid")


def test_the_selector_of_a_deployment_is_fixed_and_fits_its_template(server: Server) -> None:
    path = server.add_deployment()
    labels = {"matchLabels": {"app": "worker", "tier": "of-worker"}}
    assert is_failure(server.patch(path, {"spec": {"selector": labels}}), 422, "Invalid")
    odd = deployment("odd")
    odd["spec"]["selector"] = {"matchLabels": {"app": "another"}}
    assert is_failure(server.call("POST", server.path("deployments"), odd), 422, "Invalid")


def test_name_and_uid_in_path_and_body_have_to_agree(server: Server) -> None:
    path = server.add_deployment()
    reply = server.patch(path, {"metadata": {"name": "other"}})
    assert is_failure(reply, 400, "BadRequest")
    uid = "00000000-0000-0000-0000-000000000000"
    reply = server.patch(path, {"metadata": {"uid": uid}})
    assert is_failure(reply, 422, "Invalid")
    another = server.ok("GET", path)
    another["metadata"]["uid"] = uid
    assert is_failure(server.call("PUT", path, another), 409, "Conflict")


def test_a_name_can_be_created_once(server: Server) -> None:
    server.add_deployment()
    reply = server.call("POST", server.path("deployments"), deployment("worker"))
    assert is_failure(reply, 409, "AlreadyExists")
    assert reply.body["message"] == 'deployments.apps "worker" already exists'


# --- Events --------------------------------------------------------------------------------------


def event(server: Server, about: Object, **changes: Any) -> Object:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    meta = about["metadata"]
    involved = {
        "apiVersion": "apps/v1", "kind": "Deployment", "name": meta["name"],
        "namespace": meta["namespace"], "uid": meta["uid"],
    }  # fmt: skip
    return {
        "metadata": {"generateName": "worker.", "namespace": server.namespace},
        "involvedObject": involved, "reason": "SuccessfulRescale", "type": "Normal",
        "message": "New size: 3", "source": {"component": "queue-scaler"},
        "firstTimestamp": now, "lastTimestamp": now, "count": 1, **changes,
    }  # fmt: skip


def test_an_event_is_created_and_found_by_the_object_that_it_is_about(server: Server) -> None:
    found = server.ok("GET", server.add_deployment())
    created = server.call("POST", server.path("events"), event(server, found))
    assert created.status == 201
    assert created.body["metadata"]["name"].startswith("worker.")
    for selector, expected in (
        ("involvedObject.name=worker,involvedObject.kind=Deployment", ["New size: 3"]),
        ("involvedObject.name=other", []),
    ):
        selector += ",reason=SuccessfulRescale"
        items = server.ok("GET", server.path("events"), fieldSelector=selector)["items"]
        assert [item["message"] for item in items] == expected


def test_an_event_lies_in_the_namespace_of_its_object(server: Server) -> None:
    found = server.ok("GET", server.add_deployment())
    elsewhere = {"kind": "Deployment", "name": "worker", "namespace": "elsewhere"}
    body = event(server, found, involvedObject=elsewhere)
    reply = server.call("POST", server.path("events"), body)
    assert is_failure(reply, 422, "Invalid")


# --- Pods and their controllers ------------------------------------------------------------------


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


def test_a_deleted_pod_is_replaced(server: Server) -> None:
    path = server.add_deployment(replicas=2)
    [first, _] = server.pods(app="worker")
    name = first["metadata"]["name"]
    assert server.ok("DELETE", server.path("pods", name))["kind"] in ("Pod", "Status")
    server.settle()
    assert name not in [pod["metadata"]["name"] for pod in server.pods(app="worker")]
    assert server.ok("GET", path)["spec"]["replicas"] == 2
    assert is_failure(server.call("DELETE", server.path("pods", name)), 404, "NotFound")


@pytest.mark.parametrize("value", ["0", "-1", "2147483647", "-2147483648", "-08"])
def test_a_deletion_cost_is_a_32_bit_integer(server: Server, value: str) -> None:
    server.add_deployment()
    [pod] = server.pods(app="worker")
    path = server.path("pods", pod["metadata"]["name"])
    assert server.patch(path, annotated(**{DELETION_COST: value})).status == 200


@pytest.mark.parametrize("value", ["", "+1", "01", "1.0", "high", "2147483648", "-", " 1"])
def test_another_deletion_cost_is_invalid(server: Server, value: str) -> None:
    server.requires(21)
    server.add_deployment()
    [pod] = server.pods(app="worker")
    name = pod["metadata"]["name"]
    reply = server.patch(server.path("pods", name), annotated(**{DELETION_COST: value}))
    assert is_failure(reply, 422, "Invalid")
    [cause] = reply.body["details"]["causes"]
    assert cause == {
        "reason": "FieldValueInvalid",
        "message": f'Invalid value: "{value}": must be a 32bit integer',
        "field": f"metadata.annotations[{DELETION_COST}]",
    }


def test_the_pods_of_lower_deletion_cost_go_first(server: Server) -> None:
    server.requires(22)
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


def test_deleting_a_deployment_takes_its_pods_along(server: Server) -> None:
    path = server.add_deployment(replicas=2)
    reply = server.call("DELETE", path, query={"propagationPolicy": "Background"})
    assert (reply.status, reply.body["status"]) == (200, "Success")
    assert reply.body["details"]["kind"] == "deployments"
    assert is_failure(server.call("GET", path), 404, "NotFound")
    wait_for(lambda: True if not server.pods(app="worker") else None)


# --- Access --------------------------------------------------------------------------------------

ROLE = """
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{name: scaler}}
rules:
- {{apiGroups: [apps], resources: [deployments], resourceNames: [worker], verbs: [get, patch]}}
- {{apiGroups: [""], resources: [pods], resourceNames: [one], verbs: [list]}}
- {{apiGroups: [""], resources: [events], verbs: [create]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: scaler}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: scaler}}
subjects: [{{kind: ServiceAccount, name: scaler, namespace: {namespace}}}]
"""


def test_a_role_allows_what_it_names_and_nothing_else(server: Server) -> None:
    user = f"system:serviceaccount:{server.namespace}:scaler"
    headers = {"Impersonate-User": user}
    path, other = server.add_deployment(), server.add_deployment("other")
    server.load_rbac(ROLE.format(namespace=server.namespace))
    wait_for(lambda: server.call("GET", path, headers=headers).status == 200 or None)

    def status(method: str, target: str, body: Any = None, **query: str) -> int:
        return server.call(
            method, target, body, query=query, content_type=MERGE, headers=headers
        ).status

    assert status("PATCH", path, scale(1)) == 200
    assert status("GET", path) == 200
    pods = server.path("pods")
    assert status("GET", pods, fieldSelector="metadata.name=one") == 200
    denied = [
        status("PATCH", other, scale(1)),
        status("GET", other),
        status("DELETE", path),
        status("PATCH", f"{path}/scale", scale(1)),
        status("PUT", path, {}),
        status("GET", server.path("deployments")),
        status("GET", pods),
        status("GET", f"{APPS}/namespaces/default/deployments/worker"),
        status("GET", server.path("events")),
    ]
    assert denied == [403] * 9
    made = event(server, server.ok("GET", path))
    assert server.call("POST", server.path("events"), made, headers=headers).status == 201


def test_a_refusal_says_who_cannot_do_what_where(server: Server) -> None:
    server.load_rbac(ROLE.format(namespace=server.namespace))
    user = "system:serviceaccount:ns:name"
    headers = {"Impersonate-User": user}
    space = f'in the namespace "{server.namespace}"'
    reply = server.call(
        "PATCH", server.path("deployments", "x"), {}, headers=headers, content_type=MERGE
    )
    assert is_failure(reply, 403, "Forbidden")
    assert reply.body["details"] == {"name": "x", "group": "apps", "kind": "deployments"}
    assert reply.body["message"] == (
        f'deployments.apps "x" is forbidden: User "{user}" cannot patch resource "deployments"'
        f' in API group "apps" {space}'
    )
    reply = server.call("GET", server.path("pods"), headers=headers)
    assert reply.body["details"] == {"kind": "pods"}
    assert reply.body["message"] == (
        f'pods is forbidden: User "{user}" cannot list resource "pods" in API group "" {space}'
    )
    reply = server.call("GET", server.path("deployments", "x", "scale"), headers=headers)
    assert (
        f'cannot get resource "deployments/scale" in API group "apps" {space}'
        in (reply.body["message"])
    )


def test_an_unknown_token_is_unauthorized(server: Server) -> None:
    request = server.api.rest_client.pool_manager.request
    url = f"{server.api.configuration.host}{server.path('pods')}"
    if server.api.configuration.cert_file:
        pytest.skip("this kubeconfig's connection carries a client certificate")
    got = request("GET", url, headers={"Authorization": "Bearer nonsense"})
    reply = Reply(got.status, json.loads(got.data))
    assert is_failure(reply, 401, "Unauthorized")
    assert reply.body["message"] == "Unauthorized"


# --- What only the fake can be asked for ---------------------------------------------------------

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def fake() -> Iterator[FakeKubernetes]:
    with FakeKubernetes(seed=7, nodes=("node-a",)) as fake:
        fake.add_deployment("worker", replicas=3)
        yield fake


def get(fake: FakeKubernetes, path: str = "", timeout: float = 5) -> urllib3.BaseHTTPResponse:
    """Reads the Deployment "worker", without any retry."""
    path = path or "/apis/apps/v1/namespaces/default/deployments/worker"
    return send(fake, "GET", path, timeout=timeout)


def send(
    fake: FakeKubernetes, method: str, path: str, body: Any = None, timeout: float = 5
) -> urllib3.BaseHTTPResponse:
    headers = {"Authorization": f"Bearer {fake.admin_token}", "Content-Type": MERGE}
    with urllib3.PoolManager(retries=False, timeout=timeout) as pool:
        raw = None if body is None else json.dumps(body)
        return pool.request(method, fake.url + path, body=raw, headers=headers)


def scale_to(fake: FakeKubernetes, replicas: int) -> urllib3.BaseHTTPResponse:
    path = "/apis/apps/v1/namespaces/default/deployments/worker"
    return send(fake, "PATCH", path, scale(replicas))


def names(fake: FakeKubernetes) -> list[str]:
    return [pod["metadata"]["name"] for pod in fake.pods("worker")]


def pod(name: str, **changes: Any) -> Object:
    """A running, ready pod, ten minutes old, but for the changes."""
    given = {
        "node": "a", "phase": "Running", "ready": True, "cost": None, "since": 600,
        "restarts": 0, "age": 600, **changes,
    }  # fmt: skip

    def ago(seconds: int | None) -> str | None:
        return None if seconds is None else (NOW - timedelta(seconds=seconds)).isoformat()

    ready = {
        "type": "Ready", "status": str(given["ready"]), "lastTransitionTime": ago(given["since"]),
    }  # fmt: skip
    marks = {} if given["cost"] is None else {DELETION_COST: given["cost"]}
    return {
        "metadata": {
            "name": name, "uid": name, "annotations": marks, "creationTimestamp": ago(given["age"]),
        },
        "spec": {"nodeName": given["node"]},
        "status": {
            "phase": given["phase"], "conditions": [ready],
            "containerStatuses": [{"restartCount": given["restarts"]}],
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"node": "", "cost": "9"}, {"cost": "0"}, id="unassigned"),
        pytest.param({"phase": "Pending", "cost": "9"}, {"phase": "Unknown"}, id="pending"),
        pytest.param({"phase": "Unknown", "cost": "9"}, {}, id="unknown"),
        pytest.param({"ready": False, "cost": "9"}, {"cost": "0"}, id="not-ready"),
        pytest.param({"since": 9000}, {"cost": "1", "since": 1}, id="lower-cost"),
        pytest.param({"cost": "-1"}, {}, id="negative-cost"),
        pytest.param({"cost": "9"}, {"cost": "10"}, id="cost-is-a-number"),
        pytest.param({"node": "crowded", "since": 9000}, {"since": 1}, id="crowded-node"),
        pytest.param({"since": 60}, {"since": 600, "restarts": 5}, id="ready-for-a-shorter-time"),
        pytest.param({"restarts": 1, "age": 9000}, {"age": 1}, id="more-restarts"),
        pytest.param({"age": 60}, {"age": 600}, id="younger"),
        pytest.param({"age": None}, {"age": 1}, id="without-an-age"),
    ],
)
def test_the_replica_set_controller_deletes_first(first: Object, second: Object) -> None:
    pods = [pod("z", **first), pod("a", **second)]
    related = [*pods, pod("x", node="crowded"), pod("y", node="crowded", phase="Failed")]
    for seed in range(10):
        order = deletion_order(pods, related, NOW, random.Random(seed))
        assert [victim["metadata"]["name"] for victim in order] == ["z", "a"]


def test_pods_of_nearly_the_same_age_go_by_their_uid() -> None:
    pods = [pod("b", since=300), pod("a", since=310), pod("c", since=290)]
    for seed in range(10):
        order = deletion_order(pods, pods, NOW, random.Random(seed))
        assert [victim["metadata"]["name"] for victim in order] == ["a", "b", "c"]


def test_equal_pods_go_by_luck() -> None:
    pods = [pod(name) for name in "abcd"]
    orders = [deletion_order(pods, pods, NOW, random.Random(seed)) for seed in range(40)]
    assert {order[0]["metadata"]["name"] for order in orders} == set("abcd")


@pytest.mark.parametrize(
    ("before", "after", "sizes", "expected"),
    [
        ((5, 0), (10, 0), [2, 3], [4, 6]),
        ((5, 0), (3, 0), [2, 3], [1, 2]),
        ((9, 0), (4, 0), [8, 1], [4, 0]),
        ((7, 0), (10, 0), [2, 3, 2], [3, 4, 3]),
        ((13, 0), (8, 0), [2, 8, 3], [1, 5, 2]),
        ((3, 0), (4, 0), [1, 1, 1], [2, 1, 1]),
        ((3, 0), (2, 0), [1, 1, 1], [1, 1, 0]),
        ((4, 0), (5, 0), [2, 2], [3, 2]),
        ((6, 0), (0, 0), [3, 2, 1], [0, 0, 0]),
        ((10, 2), (20, 2), [6, 6], [11, 11]),
        ((10, 3), (50, 6), [5, 8], [22, 34]),
    ],
)
def test_a_deployment_scaled_in_a_rollout_keeps_its_proportions(
    before: tuple[int, int], after: tuple[int, int], sizes: list[int], expected: list[int]
) -> None:
    """The numbers of upstream's own TestScale (pkg/controller/deployment/sync_test.go)."""
    rolling = {"rollingUpdate": {"maxSurge": after[1]}}
    scaled = {"spec": {"replicas": after[0], "strategy": rolling}, "status": {}}
    most = {"deployment.kubernetes.io/max-replicas": str(sum(before))}
    sets = [{"metadata": {"annotations": most}, "spec": {"replicas": size}} for size in sizes]
    assert proportional_sizes(scaled, sets) == expected


def test_a_rollout_stands_half_way_and_is_scaled_in_proportion(fake: FakeKubernetes) -> None:
    scale_to(fake, 8)
    fake.start_rollout("worker", new_pods=4, old_pods=6)
    old = set(names(fake)[4:])
    assert len(names(fake)) == 10
    scale_to(fake, 4)
    assert len(names(fake)) == 5
    assert 0 < len(old & set(names(fake))) < 5
    fake.finish_rollout("worker")
    assert len(names(fake)) == 4
    assert not old & set(names(fake))


def test_only_active_pods_count(fake: FakeKubernetes) -> None:
    failed = names(fake)[0]
    fake.set_pod(failed, phase="Failed")
    assert len(names(fake)) == 4
    fake.keep_terminating()
    scale_to(fake, 1)
    assert len(names(fake)) == 4
    assert len([p for p in fake.pods("worker") if "deletionTimestamp" in p["metadata"]]) == 2
    assert failed not in fake.deleted_pods
    fake.keep_terminating(False)
    assert len(names(fake)) == 2


def test_the_controllers_wait_for_settle_if_told_to() -> None:
    with FakeKubernetes(controllers="on settle") as fake:
        fake.add_deployment("worker", replicas=2)
        assert names(fake) == []
        fake.settle()
        assert len(names(fake)) == 2


def test_pods_spread_over_the_nodes() -> None:
    with FakeKubernetes() as fake:
        fake.add_deployment("worker", replicas=4, nodes=("x", "y"))
        nodes = sorted(pod["spec"]["nodeName"] for pod in fake.pods("worker"))
        assert nodes == ["x", "x", "y", "y"]


def test_absent_replicas_and_annotations_are_stored_as_such() -> None:
    with FakeKubernetes(controllers="on settle") as fake:
        fake.add_deployment("worker", replicas=None)
        found = json.loads(get(fake).data)
        assert "replicas" not in found["spec"]
        assert "annotations" not in found["metadata"]
        fake.settle()
        assert len(names(fake)) == 1


def test_requests_scales_and_victims_are_recorded(fake: FakeKubernetes) -> None:
    before = names(fake)
    scale_to(fake, 1)
    fake.scale("worker", 2, manager="autoscaler")
    [call] = fake.calls(Match("patch", "deployments"))
    assert (call.name, call.namespace, call.status, call.user) == (
        "worker", "default", 200, "kubernetes-admin",
    )  # fmt: skip
    assert call.body == scale(1)
    assert [(s.manager, s.before, s.after) for s in fake.scales] == [
        ("python-urllib3", 3, 1), ("autoscaler", 1, 2),
    ]  # fmt: skip
    assert set(fake.deleted_pods) < set(before)
    assert len(fake.deleted_pods) == 2


@pytest.mark.parametrize("code", [401, 403, 404, 409, 410, 422, 500, 503, 504])
def test_a_fault_answers_as_the_api_server_would(fake: FakeKubernetes, code: int) -> None:
    fault = fake.fault(Match("get", "deployments"), answer(code, {"Retry-After": "3"}), nth=2)
    assert [get(fake).status, (reply := get(fake)).status, get(fake).status] == [200, code, 200]
    assert (reply.headers["Retry-After"], json.loads(reply.data)["code"]) == ("3", code)
    assert fault.hits == 1


def test_overload_is_answered_in_plain_text(fake: FakeKubernetes) -> None:
    fake.fault(Match("get"), answer(429))
    reply = get(fake)
    assert (reply.status, reply.headers["Retry-After"]) == (429, "1")
    assert reply.data == b"Too many requests, please try again later.\n"


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("make", [reset, hang])
def test_a_broken_connection_leaves_the_outcome_open(
    fake: FakeKubernetes, make: Callable[[bool], Behaviour], applied: bool
) -> None:
    fake.fault(Match("patch"), make(applied))
    path = "/apis/apps/v1/namespaces/default/deployments/worker"
    with pytest.raises(urllib3.exceptions.HTTPError):
        send(fake, "PATCH", path, scale(5), timeout=0.3)
    assert fake.replicas("worker") == (5 if applied else 3)
    assert [call.status for call in fake.calls(Match("patch"))] == [0]


def test_an_answer_can_be_cut(fake: FakeKubernetes) -> None:
    fake.fault(Match("get"), cut())
    with pytest.raises(urllib3.exceptions.HTTPError):
        get(fake)


def test_an_answer_can_drip(fake: FakeKubernetes) -> None:
    fake.fault(Match("get"), drip(0.1))
    with pytest.raises(urllib3.exceptions.HTTPError):
        get(fake, timeout=0.05)
    fake.fault(Match("get"), drip(0.0001))
    assert get(fake).status == 200


def test_an_answer_can_be_nonsense(fake: FakeKubernetes) -> None:
    for make in (garbage, empty, wrong_kind):
        fake.fault(Match("get"), make())
    assert [get(fake).data[:9] for _ in range(3)] == [b"<html>not", b"", b'{"kind":"']


def test_hooks_run_before_and_after_a_request_takes_effect(fake: FakeKubernetes) -> None:
    seen: list[int | None] = []
    look = Match("patch", "deployments")
    fake.hook(look, lambda _: seen.append(fake.replicas("worker")), "before")
    fake.hook(look, lambda _: seen.append(fake.replicas("worker")), "after")
    fake.hook(Match("patch"), lambda _: fake.annotate("worker", who="another"))
    scale_to(fake, 5)
    scale_to(fake, 6)
    assert seen == [3, 5]
    assert fake.annotations("worker")["who"] == "another"


def test_of_20_writers_of_one_version_one_wins(fake: FakeKubernetes) -> None:
    version = fake.deployment("worker")["metadata"]["resourceVersion"]
    body = {"metadata": {"resourceVersion": version}, **scale(5)}
    path = "/apis/apps/v1/namespaces/default/deployments/worker"
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(send(fake, "PATCH", path, body).status))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200] + [409] * 19
    assert len(fake.scales) == 1


def test_pages_expire(fake: FakeKubernetes) -> None:
    pods = "/api/v1/namespaces/default/pods?limit=2"
    token = json.loads(get(fake, pods).data)["metadata"]["continue"]
    fake.api.forget_pages()
    reply = get(fake, f"{pods}&continue={token}")
    assert (reply.status, json.loads(reply.data)["reason"]) == (410, "Expired")


def test_it_refuses_connections_and_takes_them_again(fake: FakeKubernetes) -> None:
    url = fake.url
    fake.stop_listening()
    with pytest.raises(urllib3.exceptions.NewConnectionError):
        get(fake)
    fake.resume_listening()
    assert (fake.url, get(fake).status) == (url, 200)


def test_nothing_is_left_running() -> None:
    before = set(threading.enumerate())
    with FakeKubernetes(controllers="in background") as fake:
        fake.add_deployment("worker", replicas=2)
        fake.fault(Match(), hang())
        kept_alive = urllib3.PoolManager(retries=False, timeout=0.2)
        with pytest.raises(urllib3.exceptions.HTTPError):
            kept_alive.request("GET", fake.url)
        assert kept_alive.request("GET", fake.url).status == 401
    assert set(threading.enumerate()) == before


def test_a_pod_finds_its_service_account(tmp_path: Path) -> None:
    with FakeKubernetes(tls=True) as fake:
        fake.add_deployment("worker", "jobs")
        fake.load_rbac(ROLE.format(namespace="jobs"), "jobs")
        token = fake.service_account("scaler", "jobs")
        variables = fake.write_service_account(tmp_path, token, "jobs")
        settings = config.incluster_config.InClusterConfigLoader(
            token_filename=str(tmp_path / "token"), cert_filename=str(tmp_path / "ca.crt"),
            environ=variables,
        )  # fmt: skip
        configuration = client.Configuration()
        settings.load_and_set(configuration)
        with client.ApiClient(configuration) as api:
            apps = client.AppsV1Api(api)
            assert apps.read_namespaced_deployment("worker", "jobs").spec.replicas == 1
            with pytest.raises(client.ApiException) as refusal:
                apps.read_namespaced_deployment("other", "jobs")
        assert refusal.value.status == 403
        assert fake.requests[0].user == "system:serviceaccount:jobs:scaler"
