"""A Kubernetes API that kubectl talks to: the fake, and what kubectl asks besides."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tests.support.kubernetes import FakeKubernetes
from tests.support.kubernetes_api import Answer, json_answer

# What kubectl asks an API server about its resources before it does anything.
RESOURCES = {
    "v1": {"pods": "Pod", "events": "Event"},
    "apps/v1": {"deployments": "Deployment", "replicasets": "ReplicaSet"},
    "batch/v1": {"cronjobs": "CronJob", "jobs": "Job"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "rbac.authorization.k8s.io/v1": {
        "roles": "Role",
        "rolebindings": "RoleBinding",
        "clusterrolebindings": "ClusterRoleBinding",
    },
    "admissionregistration.k8s.io/v1": {
        "validatingadmissionpolicies": "ValidatingAdmissionPolicy",
        "validatingadmissionpolicybindings": "ValidatingAdmissionPolicyBinding",
        "mutatingwebhookconfigurations": "MutatingWebhookConfiguration",
    },
    "keda.sh/v1alpha1": {"scaledobjects": "ScaledObject"},
}
SHORT_NAMES = {"horizontalpodautoscalers": ["hpa"]}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


class ForKubectl(FakeKubernetes):
    """The fake with what kubectl needs besides: lists of what there is, `objects` of the other API
    groups by resource and name, and the log of every pod. kubectl sends its token over TLS only."""

    objects: dict[str, dict[str, dict[str, Any]]]
    log = "AutoScaler says this"
    asked = 0

    def handle(
        self, method: str, target: str, raw: bytes, headers: Mapping[str, str]
    ) -> tuple[Answer, Any]:
        path = target.partition("?")[0].rstrip("/")
        if found := discovery(path):
            return json_answer(200, found), None
        self.asked += 1
        if path.endswith("/log"):
            return Answer(200, self.log.encode(), {"Content-Type": "text/plain"}), None
        if re.match("/apis/(batch|autoscaling|networking.k8s.io)/", path):
            found = self._others(method, path, raw)
            return json_answer(200 if found else 404, found or {"kind": "Status"}), None
        return super().handle(method, target, raw, headers)

    def _others(self, method: str, path: str, raw: bytes) -> dict[str, Any] | None:
        resource, _, name = path.partition("/namespaces/default/")[2].partition("/")
        if method == "POST":
            # `create job` sends protobuf, of which the name is enough; `create -f` sends JSON.
            named = re.search(rb"^k8s.*?\n.([a-z0-9-]+)\x12\x00", raw, re.DOTALL)
            job = {} if named else json.loads(raw)
            ended = ended_job(named[1].decode() if named else job["metadata"]["name"])
            ended["spec"] |= job.get("spec", {})
            return self.objects["jobs"].setdefault(ended["metadata"]["name"], ended)
        objects = self.objects[resource]
        if method == "DELETE":
            return objects.pop(name, None)
        items = [*objects.values()]
        return objects.get(name) if name else {"kind": "List", "apiVersion": "v1", "items": items}


def ended_job(name: str) -> dict[str, Any]:
    """A Job of the CronJob's, complete."""
    return {
        "kind": "Job",
        "apiVersion": "batch/v1",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": "queue-scaler"}}},
        "status": {"conditions": [{"type": "Complete", "status": "True"}]},
    }


def discovery(path: str) -> dict[str, Any] | None:
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [
            {"name": version.split("/")[0], "versions": [named], "preferredVersion": named}
            for version in RESOURCES
            if "/" in version
            for named in [{"groupVersion": version, "version": version.split("/")[1]}]
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/openapi/v3":
        return {"paths": {"apis/batch/v1": {"serverRelativeURL": "/openapi/v3/batch"}}}
    if path == "/openapi/v3/batch":  # kubectl asks whether the server validates fields
        kind = {"group": "batch", "version": "v1", "kind": "Job"}
        parameters = [{"name": "fieldValidation", "in": "query"}]
        patch = {"x-kubernetes-group-version-kind": kind, "parameters": parameters}
        return {"openapi": "3.0.0", "paths": {"/jobs": {"patch": patch}}}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version not in RESOURCES:
        return None
    listed = [
        {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind,
         "verbs": VERBS, "shortNames": SHORT_NAMES.get(name, [])}
        for name, kind in RESOURCES[version].items()
    ]  # fmt: skip
    return {"kind": "APIResourceList", "groupVersion": version, "resources": listed}
