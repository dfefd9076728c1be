"""A Kubernetes API server and its Deployment controllers, in this process, over real HTTP.

It answers by the rules of the public API, whatever the code under test would like to hear: the
contract tests hold it and a real control plane to the same answers. What it leaves out (watches,
server-side apply, quotas, kubelets) answers as an error, never as a made-up success.

    with FakeKubernetes() as cluster:
        cluster.add_deployment("worker", replicas=3)
        cluster.write_kubeconfig(path)          # ... run a client, then look at
        cluster.replicas("worker"), cluster.requests, cluster.deleted_pods
"""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import hashlib
import ipaddress
import json
import math
import os
import random
import re
import secrets
import select
import socket
import ssl
import struct
import sys
import tempfile
import threading
import traceback
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Object = dict[str, Any]
Key = tuple[str, str, str]  # resource, namespace, name
FieldPath = tuple[str, ...]

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
REVISION = "deployment.kubernetes.io/revision"
DESIRED_REPLICAS = "deployment.kubernetes.io/desired-replicas"
MAX_REPLICAS = "deployment.kubernetes.io/max-replicas"
TEMPLATE_HASH = "pod-template-hash"
CONTROLLER = "kube-controller-manager"
ADMIN_GROUP = "system:masters"
ANNOTATIONS_LIMIT_BYTES = 256 * 1024
SAFE_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # what upstream makes names of: no vowels, no words


# --- Kinds and errors ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One resource type that this API server serves."""

    resource: str
    kind: str
    group: str
    verbs: Mapping[str, str]  # subresource ("" for the object itself) to its verbs

    @property
    def api_version(self) -> str:
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def qualified(self) -> str:
        return f"{self.resource}.{self.group}" if self.group else self.resource

    @property
    def qualified_kind(self) -> str:
        return f"{self.kind}.{self.group}" if self.group else self.kind


_WRITABLE = "get update patch"
KINDS = {
    kind.resource: kind
    for kind in (
        Kind("deployments", "Deployment", "apps", {
            "": "get list create update patch delete", "scale": _WRITABLE, "status": _WRITABLE,
        }),
        Kind("replicasets", "ReplicaSet", "apps", {"": "get list"}),
        Kind("pods", "Pod", "", {"": "get list update patch delete", "status": _WRITABLE}),
        Kind("events", "Event", "", {"": "get list create update patch delete"}),
    )
}
KNOWN_PATHS = ("/version", "/api/v1/", "/apis/apps/v1/")
SCALE = Kind("deployments", "Scale", "autoscaling", {})

REASONS = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound",
    405: "MethodNotAllowed", 408: "Timeout", 409: "Conflict", 410: "Expired",
    415: "UnsupportedMediaType", 422: "Invalid", 429: "TooManyRequests", 500: "InternalError",
    503: "ServiceUnavailable", 504: "Timeout",
}  # fmt: skip


class ApiError(Exception):
    """An error as the API server answers it: a `Status` object."""

    def __init__(
        self, code: int, message: str, details: Object | None = None, reason: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status: Object = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason or REASONS.get(code, "Unknown"),
        }  # fmt: skip
        if details is not None:
            self.status["details"] = {k: v for k, v in details.items() if v}
        self.status["code"] = code


def _details(kind: Kind, name: str) -> Object:
    return {"name": name, "group": kind.group, "kind": kind.resource}


def not_found(kind: Kind, name: str) -> ApiError:
    return ApiError(404, f'{kind.qualified} "{name}" not found', _details(kind, name))


def conflict(kind: Kind, name: str, why: str = "") -> ApiError:
    why = why or (
        "the object has been modified;"
        " please apply your changes to the latest version and try again"
    )
    message = f'Operation cannot be fulfilled on {kind.qualified} "{name}": {why}'
    return ApiError(409, message, _details(kind, name))


@dataclass(frozen=True)
class Problem:
    """One wrong field of an object, in upstream's words."""

    where: str
    text: str
    reason: str = "FieldValueInvalid"


def invalid(kind: Kind, name: str, problems: Sequence[Problem]) -> ApiError:
    texts = [f"{p.where}: {p.text}" for p in problems]
    listed = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    causes = [{"reason": p.reason, "message": p.text, "field": p.where} for p in problems]
    details = {"name": name, "group": kind.group, "kind": kind.kind, "causes": causes}
    return ApiError(422, f'{kind.qualified_kind} "{name}" is invalid: {listed}', details)


# --- Requests ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One HTTP request as it came in, and the status that it was answered with (0: none)."""

    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    user: str
    user_agent: str
    status: int
    verb: str
    group: str
    resource: str
    subresource: str
    name: str
    namespace: str


_ROUTE = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<resource>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<subresource>[^/]+))?)?/?"
)
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}


def _verb(method: str, name: str, query: Mapping[str, str]) -> str:
    if method == "GET":
        watching = query.get("watch") in ("1", "true")
        return "watch" if watching else "get" if name else "list"
    if method == "DELETE":
        return "delete" if name else "deletecollection"
    return _VERBS.get(method, method.lower())


def read_request(method: str, target: str, body: Any, user: str, agent: str) -> Request:
    """Reads a request line as the API server does: verb, resource, name, namespace."""
    url = urllib.parse.urlsplit(target)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    match = _ROUTE.fullmatch(url.path)
    found = match.groupdict() if match else {}
    parts = {key: urllib.parse.unquote(value or "") for key, value in found.items()}
    name = parts.get("name", "")
    verb = _verb(method, name, query) if match else method.lower()
    selected = re.fullmatch(r"metadata\.name==?(.+)", query.get("fieldSelector", ""))
    if verb in ("list", "watch", "deletecollection") and selected:
        name = selected[1]  # so that a rule with resourceNames can allow such a list
    return Request(
        method, url.path, query, body, user, agent, 0, verb, parts.get("group", ""),
        parts.get("resource", ""), parts.get("subresource", ""), name, parts.get("namespace", ""),
    )  # fmt: skip


@dataclass(frozen=True)
class Match:
    """Which requests a fault, a hook or a question about the past is about. None: any."""

    verb: str | None = None
    resource: str | None = None
    subresource: str | None = None
    name: str | None = None
    namespace: str | None = None
    where: Callable[[Request], bool] | None = None

    def __call__(self, request: Request) -> bool:
        wanted = (self.verb, self.resource, self.subresource, self.name, self.namespace)
        found = (
            request.verb, request.resource, request.subresource, request.name, request.namespace
        )  # fmt: skip
        return all(w is None or w == f for w, f in zip(wanted, found, strict=True)) and (
            self.where is None or self.where(request)
        )


# --- Selectors -----------------------------------------------------------------------------------

_REQUIREMENT = re.compile(
    r"\s*(?:(?P<not>!)\s*)?(?P<key>[\w./-]+)"
    r"(?:\s*(?P<op>==|=|!=)\s*(?P<value>[\w.-]*)"
    r"|\s+(?P<set>in|notin)\s*\((?P<values>[^()]*)\))?\s*(?:,|$)"
)
Labels = Mapping[str, str]


def parse_selector(text: str) -> Callable[[Labels], bool]:
    """A test for a label selector as it stands in a query; ApiError(400) if unreadable."""
    tests: list[Callable[[Labels], bool]] = []
    at = 0
    while at < len(text.rstrip()):
        found = _REQUIREMENT.match(text, at)
        if not found:
            raise ApiError(400, f"unable to parse requirement: found '{text[at:]}'")
        tests.append(_requirement(**found.groupdict()))
        at = found.end()
    return lambda labels: all(test(labels) for test in tests)


def _requirement(
    key: str, op: str | None, value: str | None, values: str | None, **rest: str | None
) -> Callable[[Labels], bool]:
    if op or rest["set"]:
        wanted = {v.strip() for v in values.split(",")} if values is not None else {value or ""}
        positive = op in ("=", "==") or rest["set"] == "in"
        # An object without the key meets `!=` and `notin`.
        return lambda labels: (key in labels and labels[key] in wanted) is positive
    return lambda labels: (key in labels) is not bool(rest["not"])


def selector_text(selector: Object) -> str:
    """A LabelSelector object as the text that a query carries."""
    words = {"In": "in", "NotIn": "notin"}
    parts = [f"{k}={v}" for k, v in sorted(selector.get("matchLabels", {}).items())]
    for need in selector.get("matchExpressions", []):
        key, op = need["key"], need["operator"]
        if op in words:
            parts.append(f"{key} {words[op]} ({','.join(sorted(need['values']))})")
        else:
            parts.append(key if op == "Exists" else f"!{key}")
    return ",".join(parts)


_POD_FIELDS = {"spec.nodeName", "spec.restartPolicy", "status.phase", "status.podIP"}
_EVENT_FIELDS = {
    "type", "reason", "reportingComponent", "involvedObject.kind", "involvedObject.namespace",
    "involvedObject.name", "involvedObject.uid", "involvedObject.resourceVersion",
    "involvedObject.apiVersion", "involvedObject.fieldPath",
}  # fmt: skip


def parse_field_selector(kind: Kind, text: str) -> Callable[[Object], bool]:
    allowed = {"metadata.name", "metadata.namespace"}
    allowed |= {"pods": _POD_FIELDS, "events": _EVENT_FIELDS}.get(kind.resource, set())
    tests: list[tuple[str, bool, str]] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"([\w.]+)(==|=|!=)(.*)", part)
        if not found:
            raise ApiError(400, f"invalid selector: '{part}'; can't understand '{part}'")
        if found[1] not in allowed:
            raise ApiError(400, f"field label not supported: {found[1]}")
        tests.append((found[1], found[2] != "!=", found[3]))
    return lambda obj: all((str(dig(obj, path)) == value) is same for path, same, value in tests)


def dig(obj: Object, path: str) -> Any:
    """The value at a dotted path, "" where there is none."""
    for part in path.split("."):
        obj = obj.get(part, "") if isinstance(obj, dict) else ""
    return obj


# --- Patches -------------------------------------------------------------------------------------

PATCH_TYPES = (
    "application/json-patch+json", "application/merge-patch+json",
    "application/strategic-merge-patch+json", "application/apply-patch+yaml",
)  # fmt: skip


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386: null deletes, maps merge, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def json_patch(target: Any, operations: Any) -> Any:
    """RFC 6902: add, replace, remove and test."""
    result = copy.deepcopy(target)
    for step in operations:
        *parents, last = [
            part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]
        ]
        holder = result
        for part in parents:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        _json_patch_step(holder, last, step)
    return result


def _json_patch_step(holder: Any, last: str, step: Object) -> None:
    op = step["op"]
    at: Any = last
    if isinstance(holder, list):
        at = len(holder) if last == "-" else int(last)
    if op == "test":
        if holder[at] != step["value"]:
            raise ValueError(f"testing value {step['path']} failed")
    elif op == "remove":
        del holder[at]
    elif op == "add" and isinstance(holder, list):
        holder.insert(at, step["value"])
    elif op in ("add", "replace"):
        if op == "replace":
            holder[at]  # it has to be there
        holder[at] = step["value"]
    else:
        raise ValueError(f"unexpected kind: {op}")


def apply_patch(current: Object, patch: Any, content_type: str) -> Object:
    """The object with the patch applied, or the error that upstream answers."""
    if content_type not in PATCH_TYPES[:3]:
        accepted = ", ".join(PATCH_TYPES)
        text = "the body of the request was in an unknown format - accepted media types include: "
        raise ApiError(415, text + accepted)
    if content_type == PATCH_TYPES[0]:
        try:
            result = json_patch(current, patch)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            text = "the server rejected our request due to an error in our request"
            raise ApiError(422, text, {}) from error
    else:
        if not isinstance(patch, dict):
            raise ApiError(400, "error decoding patch: json: cannot unmarshal into a map")
        result = merge(current, patch)
    return result if isinstance(result, dict) else {}


# --- Field ownership -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """Who writes, as managedFields tells it."""

    manager: str
    subresource: str = ""


_UNOWNED = {
    "name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp",
    "managedFields", "deletionTimestamp", "deletionGracePeriodSeconds", "generateName",
}  # fmt: skip


def _fields(obj: Object) -> dict[FieldPath, Any]:
    """Every leaf of an object by its FieldsV1 path. A list is one leaf: coarser than upstream."""
    found: dict[FieldPath, Any] = {}

    def walk(value: Any, path: FieldPath) -> None:
        if not isinstance(value, dict) or not value:
            found[path] = value
            return
        if path in (("f:metadata", "f:annotations"), ("f:metadata", "f:labels")):
            found[(*path, ".")] = None
        for key, inner in value.items():
            walk(inner, (*path, f"f:{key}"))

    for key, value in obj.items():
        if key == "metadata":
            value = {k: v for k, v in value.items() if k not in _UNOWNED}
        if key not in ("apiVersion", "kind") and value:
            walk(value, (f"f:{key}",))
    return found


def _encode(paths: Iterable[FieldPath]) -> Object:
    tree: Object = {}
    for path in sorted(paths):
        node = tree
        for part in path:
            node = node.setdefault(part, {})
    return tree


def _decode(tree: Object, path: FieldPath = ()) -> set[FieldPath]:
    if not tree:
        return {path}
    return set().union(*(_decode(inner, (*path, key)) for key, inner in tree.items()))


def managed_fields(
    old: Object, new: Object, writer: Writer, api_version: str, now: str
) -> list[Object]:
    """The ownership after a write: who changed a field last has it, and nobody else."""
    before, after = _fields(old), _fields(new)
    taken = {p for p, v in after.items() if p not in before or before[p] != v}
    lost = taken | (before.keys() - after.keys())
    entries = []
    mine: Object = {
        "manager": writer.manager, "operation": "Update", "apiVersion": api_version, "time": now,
        "fieldsType": "FieldsV1",
    }  # fmt: skip
    for entry in old.get("metadata", {}).get("managedFields", []):
        paths = _decode(entry["fieldsV1"])
        same = (entry["manager"], entry.get("subresource", "")) == (
            writer.manager, writer.subresource,
        )  # fmt: skip
        if same and taken:
            taken |= paths & after.keys()
        elif paths - lost:
            entries.append({**entry, "fieldsV1": _encode(paths - lost)})
    if taken:
        mine["fieldsV1"] = _encode(taken)
        if writer.subresource:
            mine["subresource"] = writer.subresource
        entries.append(mine)
    return entries


# --- Defaults and validation ---------------------------------------------------------------------


def _not_decodable(kind: Kind, obj: Object) -> str | None:
    """What the JSON decoder complains about, before any validation."""
    for place in ("annotations", "labels"):
        values = obj["metadata"].get(place) or {}
        if not isinstance(values, dict):
            return f"json: cannot unmarshal into Go struct field ObjectMeta.metadata.{place}"
        for value in values.values():
            if not isinstance(value, str):
                what = "bool" if isinstance(value, bool) else {
                    int: "number", float: "number", dict: "object", list: "array",
                }.get(type(value), "null")  # fmt: skip
                where = f"Go struct field ObjectMeta.metadata.{place} of type string"
                return f"json: cannot unmarshal {what} into {where}"
    replicas = (obj.get("spec") or {}).get("replicas")
    if kind.kind in ("Deployment", "Scale") and not (replicas is None or type(replicas) is int):
        what = "string" if isinstance(replicas, str) else f"number {replicas}"
        where = f"Go struct field {kind.kind}Spec.spec.replicas of type int32"
        return f"json: cannot unmarshal {what} into {where}"
    return None


def set_defaults(kind: Kind, obj: Object) -> None:
    """The defaults that matter to a client of Deployments."""
    if kind.resource == "events":
        for key in ("reportingComponent", "reportingInstance"):
            obj.setdefault(key, "")
        obj.setdefault("source", {})
        obj.setdefault("eventTime", None)
    if kind.kind != "Deployment":
        return
    spec = obj.setdefault("spec", {})
    spec.setdefault("replicas", 1)
    spec.setdefault("revisionHistoryLimit", 10)
    spec.setdefault("progressDeadlineSeconds", 600)
    strategy = spec.setdefault("strategy", {})
    if strategy.setdefault("type", "RollingUpdate") == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        rolling.setdefault("maxUnavailable", "25%")
        rolling.setdefault("maxSurge", "25%")


_ANNOTATION_KEY = re.compile(
    r"(?:[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9](?:[-\w.]{0,61}[A-Za-z0-9])?"
)
_DELETION_COST = re.compile(r"0|[1-9][0-9]*|-[0-9]+")  # no plus sign, no leading zero


def validate(kind: Kind, obj: Object, old: Object | None) -> list[Problem]:
    """Upstream's objections to an object, for what this server knows of it."""
    problems = _annotation_problems(kind, obj["metadata"].get("annotations") or {})
    if not obj["metadata"].get("name"):
        text = "Required value: name or generateName is required"
        problems.append(Problem("metadata.name", text, "FieldValueRequired"))
    if kind.kind in ("Deployment", "Scale") and obj["spec"].get("replicas", 0) < 0:
        text = f"Invalid value: {obj['spec']['replicas']}: must be greater than or equal to 0"
        problems.append(Problem("spec.replicas", text))
    if kind.kind == "Deployment":
        problems += _deployment_problems(obj["spec"], old)
    if kind.kind == "Pod" and old and obj.get("spec") != old.get("spec"):
        text = "Forbidden: pod updates may not change fields other than `spec.containers[*].image`"
        problems.append(Problem("spec", text, "FieldValueForbidden"))
    if kind.kind == "Event":
        about = obj.get("involvedObject", {}).get("namespace", "")
        if about != obj["metadata"]["namespace"]:
            text = f'Invalid value: "{about}": does not match event.namespace'
            problems.append(Problem("involvedObject.namespace", text))
    return problems


def _annotation_problems(kind: Kind, annotations: Mapping[str, str]) -> list[Problem]:
    where = "metadata.annotations"
    problems = []
    for key in annotations:
        if not _ANNOTATION_KEY.fullmatch(key):
            text = f'Invalid value: "{key}": name part must consist of alphanumeric characters, '
            text += "'-', '_' or '.', and must start and end with an alphanumeric character"
            problems.append(Problem(where, text))
    if sum(len(k.encode()) + len(v.encode()) for k, v in annotations.items()) > (
        ANNOTATIONS_LIMIT_BYTES
    ):
        text = f"Too long: may not be more than {ANNOTATIONS_LIMIT_BYTES} bytes"
        problems.append(Problem(where, text, "FieldValueTooLong"))
    cost = annotations.get(DELETION_COST)
    if kind.kind == "Pod" and cost is not None and deletion_cost(cost) is None:
        text = f'Invalid value: "{cost}": must be a 32bit integer'
        problems.append(Problem(f"{where}[{DELETION_COST}]", text))
    return problems


def _deployment_problems(spec: Object, old: Object | None) -> list[Problem]:
    selector, template = spec.get("selector") or {}, spec.get("template") or {}
    if not selector:
        return [Problem("spec.selector", "Required value", "FieldValueRequired")]
    problems = []
    labels = template.get("metadata", {}).get("labels") or {}
    if not parse_selector(selector_text(selector))(labels):
        text = f"Invalid value: {json.dumps(labels)}: `selector` does not match template `labels`"
        problems.append(Problem("spec.template.metadata.labels", text))
    if not template.get("spec", {}).get("containers"):
        where = "spec.template.spec.containers"
        problems.append(Problem(where, "Required value", "FieldValueRequired"))
    if old and old["spec"].get("selector") != selector:
        text = f"Invalid value: {json.dumps(selector)}: field is immutable"
        problems.append(Problem("spec.selector", text))
    return problems


def deletion_cost(value: str) -> int | None:
    """The annotation's value, None where the API server refuses it."""
    if not _DELETION_COST.fullmatch(value) or not -(2**31) <= int(value) < 2**31:
        return None
    return int(value)


# --- Store ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """One change of a Deployment's spec.replicas."""

    time: datetime
    manager: str
    before: int
    after: int
    name: str
    namespace: str


def stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def random_name(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(SAFE_ALPHABET) for _ in range(length))


class Store:
    """The objects, under one lock, with one cluster-wide revision."""

    def __init__(self, clock: Callable[[], datetime], rng: random.Random) -> None:
        self.lock = threading.RLock()
        self.clock = clock
        self.rng = rng
        self.revision = 1000
        self.objects: dict[Key, Object] = {}
        self.scales: list[Scale] = []

    def get(self, resource: str, namespace: str, name: str) -> Object | None:
        return self.objects.get((resource, namespace, name))

    def find(self, resource: str, namespace: str = "") -> list[Object]:
        """Objects in etcd's order; every namespace's if none is named."""
        return [
            obj
            for (found, space, _), obj in sorted(self.objects.items(), key=lambda item: item[0])
            if found == resource and namespace in ("", space)
        ]

    def create(self, kind: Kind, obj: Object, writer: Writer, keep: bool = True) -> Object:
        obj = copy.deepcopy(obj)
        meta = obj["metadata"]
        now = stamp(self.clock())
        meta["uid"] = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        meta["creationTimestamp"] = now
        if kind.resource in ("deployments", "replicasets"):
            meta["generation"] = 1
        obj = {"kind": kind.kind, "apiVersion": kind.api_version, **obj}
        meta["managedFields"] = managed_fields({}, obj, writer, kind.api_version, now)
        return self._put(kind, obj, keep)

    def update(
        self, kind: Kind, old: Object, new: Object, writer: Writer, keep: bool = True
    ) -> Object:
        """Writes `new` over `old`, or nothing at all where nothing differs."""
        new = copy.deepcopy(new)
        meta = new["metadata"]
        for system in _UNOWNED - {"deletionTimestamp", "deletionGracePeriodSeconds"}:
            meta.pop(system, None)
            if system in old["metadata"]:
                meta[system] = old["metadata"][system]
        for empty in ("annotations", "labels"):
            if not meta.get(empty):
                meta.pop(empty, None)
        if new == old:
            return old
        if writer.subresource != "status" and _bumps_generation(kind, old, new):
            meta["generation"] = meta.get("generation", 0) + 1
        now = stamp(self.clock())
        meta["managedFields"] = managed_fields(old, new, writer, kind.api_version, now)
        if kind.resource == "deployments" and keep:
            self._note_scale(old, new, writer)
        return self._put(kind, new, keep)

    def remove(self, kind: Kind, obj: Object) -> None:
        self.revision += 1
        meta = obj["metadata"]
        self.objects.pop((kind.resource, meta["namespace"], meta["name"]), None)

    def _put(self, kind: Kind, obj: Object, keep: bool) -> Object:
        meta = obj["metadata"]
        if keep:
            self.revision += 1
            meta["resourceVersion"] = str(self.revision)
            self.objects[(kind.resource, meta["namespace"], meta["name"])] = obj
        return obj

    def _note_scale(self, old: Object, new: Object, writer: Writer) -> None:
        before, after = wanted_replicas(old), wanted_replicas(new)
        if before != after:
            meta = new["metadata"]
            self.scales.append(
                Scale(
                    self.clock(), writer.manager, before, after, meta["name"], meta["namespace"]
                )
            )


def _bumps_generation(kind: Kind, old: Object, new: Object) -> bool:
    if kind.resource == "deployments":
        # Annotations count too: the controller has to copy them to the ReplicaSet.
        annotations = (obj["metadata"].get("annotations") for obj in (old, new))
        return old.get("spec") != new.get("spec") or len({json.dumps(a) for a in annotations}) > 1
    return kind.resource == "replicasets" and old.get("spec") != new.get("spec")


def wanted_replicas(obj: Object) -> int:
    return int(obj["spec"].get("replicas", 1))


# --- Controllers ---------------------------------------------------------------------------------


def is_active(pod: Object) -> bool:
    finished = pod["status"].get("phase") in ("Succeeded", "Failed")
    return not finished and "deletionTimestamp" not in pod["metadata"]


def ready_since(pod: Object) -> str | None:
    """When the pod became ready, None if it is not."""
    for condition in pod["status"].get("conditions", []):
        if condition["type"] == "Ready" and condition["status"] == "True":
            return str(condition.get("lastTransitionTime") or "")
    return None


def deletion_order(
    pods: Sequence[Object], related: Sequence[Object], now: datetime, rng: random.Random
) -> list[Object]:
    """Pods in the order in which the ReplicaSet controller deletes them, first victim first.

    The rules are those of ActivePodsWithRanks.Less (pkg/controller/controller_utils.go); `related`
    are the pods of every ReplicaSet of the same Deployment, as that controller counts neighbours.
    """
    crowd = Counter(pod["spec"].get("nodeName", "") for pod in related if is_active(pod))

    def first_rules(pod: Object) -> tuple[bool, int, bool, int, int]:
        node = pod["spec"].get("nodeName", "")
        phase = {"Pending": 0, "Unknown": 1, "Running": 2}.get(pod["status"].get("phase", ""), 0)
        cost = deletion_cost((pod["metadata"].get("annotations") or {}).get(DELETION_COST, "0"))
        return bool(node), phase, ready_since(pod) is not None, cost or 0, -crowd[node]

    def compare(a: Object, b: Object) -> int:
        left, right = first_rules(a), first_rules(b)
        if left != right:
            return -1 if left < right else 1
        created = [pod["metadata"].get("creationTimestamp") for pod in (a, b)]
        uids = _uid(a), _uid(b)
        return (
            _younger_first(ready_since(a), ready_since(b), uids, now)
            or _restarts(b) - _restarts(a)
            or _younger_first(created[0], created[1], uids, now)
        )

    shuffled = rng.sample(pods, len(pods))  # upstream's sort is not stable: ties are luck
    return sorted(shuffled, key=functools.cmp_to_key(compare))


def _younger_first(a: str | None, b: str | None, uids: tuple[str, str], now: datetime) -> int:
    """Compares ages by powers of two of their nanoseconds; the uid settles equal powers."""
    if a == b:
        return 0
    if not a or not b:
        return -1 if not a else 1
    left, right = (_power(now - datetime.fromisoformat(moment)) for moment in (a, b))
    first = left < right if left != right else uids[0] < uids[1]
    return -1 if first else 1


def _power(age: timedelta) -> int:
    nanoseconds = age / timedelta(microseconds=1) * 1000
    return int(math.log2(nanoseconds)) if nanoseconds > 0 else -1


def _restarts(pod: Object) -> int:
    statuses = pod["status"].get("containerStatuses", [])
    return max((int(s.get("restartCount", 0)) for s in statuses), default=0)


def proportional_sizes(deployment: Object, sets: Sequence[Object]) -> dict[str, int]:
    """Sizes of the ReplicaSets of a Deployment that is scaled in the middle of a rollout.

    `sets` are those with pods, the newest first. As in pkg/controller/deployment/sync.go, each
    gets its share of the difference and the largest the rest.
    """
    desired = wanted_replicas(deployment)
    limit = desired + max_surge(deployment) if desired else 0
    to_add = limit - sum(wanted_replicas(s) for s in sets)
    ordered = sorted(sets if to_add > 0 else reversed(sets), key=lambda s: -wanted_replicas(s))
    sizes, added = {}, 0
    for owned in ordered:
        size = wanted_replicas(owned)
        before = int(owned["metadata"].get("annotations", {}).get(MAX_REPLICAS, 0))
        before = before or deployment["status"].get("replicas", 0)
        share = math.floor(size * limit / before + 0.5) - size if desired and before else -size
        left = to_add - added
        share = 0 if not left else min(share, left) if to_add > 0 else max(share, left)
        sizes[owned["metadata"]["name"]] = size + share
        added += share
    if ordered:
        largest = ordered[0]["metadata"]["name"]
        sizes[largest] = max(0, sizes[largest] + to_add - added)
    return sizes


def max_surge(deployment: Object) -> int:
    rolling = deployment["spec"].get("strategy", {}).get("rollingUpdate")
    surge = rolling.get("maxSurge", "25%") if rolling is not None else 0
    if isinstance(surge, int):
        return surge
    return math.ceil(int(surge.rstrip("%")) * wanted_replicas(deployment) / 100)


class Controllers:
    """The Deployment and ReplicaSet controllers; scheduler and kubelets are instant."""

    def __init__(self, store: Store, nodes: Sequence[str]) -> None:
        self.store = store
        self.nodes = nodes
        self.nodes_of: dict[tuple[str, str], Sequence[str]] = {}
        self.held: set[tuple[str, str]] = set()  # rollouts that make no progress
        self.keep_terminating = False
        self.deleted_pods: list[str] = []

    def reconcile(self, namespace: str, name: str) -> Iterator[None]:
        """Brings pods to what the Deployment wants; each step is one write of its own."""
        deployment = self.store.get("deployments", namespace, name)
        if deployment is None:
            return self._collect_garbage(namespace)
        yield from self._status(namespace, name, observed_only=True)
        for deployment in self._resize(namespace, name):
            yield
            for owned in self.sets(deployment):
                yield from self._replace_pods(deployment, owned)
        yield from self._status(namespace, name)

    def sets(self, deployment: Object) -> list[Object]:
        """The Deployment's ReplicaSets, the newest first."""
        owned = [s for s in self._all(deployment, "replicasets") if _owner(s) == _uid(deployment)]
        return sorted(owned, key=lambda s: -int(s["metadata"]["annotations"][REVISION]))

    def pods(self, owner: Object) -> list[Object]:
        """The pods of a Deployment or a ReplicaSet."""
        if owner["kind"] == "Deployment":
            return [pod for owned in self.sets(owner) for pod in self.pods(owned)]
        return [pod for pod in self._all(owner, "pods") if _owner(pod) == _uid(owner)]

    def start_rollout(self, deployment: Object, new_pods: int, old_pods: int) -> None:
        """Leaves the Deployment with pods of an old and a new template, going no further."""
        meta = deployment["metadata"]
        self.held.add((meta["namespace"], meta["name"]))
        new = copy.deepcopy(deployment)
        template = new["spec"]["template"].setdefault("metadata", {})
        restarted = {"kubectl.kubernetes.io/restartedAt": stamp(self.store.clock())}
        template["annotations"] = {**template.get("annotations", {}), **restarted}
        new = self.store.update(KINDS["deployments"], deployment, new, Writer("kubectl-rollout"))
        for owned in self.sets(new):
            self._set_size(new, owned, old_pods)
        self._set_size(new, self._current_set(new, 0), new_pods)

    def _all(self, neighbour: Object, resource: str) -> list[Object]:
        return self.store.find(resource, neighbour["metadata"]["namespace"])

    def _write(self, old: Object, new: Object, subresource: str = "") -> Object:
        kind = KINDS[f"{old['kind'].lower()}s"]
        return self.store.update(kind, old, new, Writer(CONTROLLER, subresource))

    def _resize(self, namespace: str, name: str) -> Iterator[Object]:
        """Sets the ReplicaSets' sizes: in proportion while a rollout stands, else all new."""
        deployment = self.store.objects[("deployments", namespace, name)]
        desired = wanted_replicas(deployment)
        active = [s for s in self.sets(deployment) if wanted_replicas(s)]
        scaled = any(
            s["metadata"]["annotations"].get(DESIRED_REPLICAS) != str(desired) for s in active
        )
        standing = (namespace, name) in self.held or deployment["spec"].get("paused")
        if standing or (scaled and len(active) > 1):
            sizes = proportional_sizes(deployment, active) if scaled else {}
            if len(active) == 1:
                sizes = {active[0]["metadata"]["name"]: desired}
            for owned in active:
                size = sizes.get(owned["metadata"]["name"], wanted_replicas(owned))
                self._set_size(deployment, owned, size)
            yield deployment
            if standing:
                return
        current = self._current_set(deployment, desired)
        for owned in self.sets(deployment):
            self._set_size(deployment, owned, desired if _uid(owned) == _uid(current) else 0)
        yield deployment

    def _current_set(self, deployment: Object, size: int) -> Object:
        """The ReplicaSet of the Deployment's template, made with `size` pods if there is none."""
        spec = deployment["spec"]
        digest = hashlib.sha256(json.dumps(spec["template"], sort_keys=True).encode()).digest()
        suffix = random_name(random.Random(digest), 10)
        owned = self.sets(deployment)
        last = int(owned[0]["metadata"]["annotations"][REVISION]) if owned else 0
        for found in owned:
            if found["metadata"]["labels"][TEMPLATE_HASH] == suffix:
                if found is owned[0]:
                    return found
                new = copy.deepcopy(found)  # a rollback: the old template is the newest again
                new["metadata"]["annotations"][REVISION] = str(last + 1)
                return self._write(found, new)
        template, selector = copy.deepcopy(spec["template"]), copy.deepcopy(spec["selector"])
        template.setdefault("metadata", {}).setdefault("labels", {})[TEMPLATE_HASH] = suffix
        selector.setdefault("matchLabels", {})[TEMPLATE_HASH] = suffix
        meta = deployment["metadata"]
        obj = {
            "metadata": {
                "name": f"{meta['name']}-{suffix}", "namespace": meta["namespace"],
                "labels": template["metadata"]["labels"],
                "annotations": {**_size_annotations(deployment), REVISION: str(last + 1)},
                "ownerReferences": [_reference(deployment)],
            },
            "spec": {"replicas": size, "selector": selector, "template": template},
            "status": {"replicas": 0},
        }  # fmt: skip
        return self.store.create(KINDS["replicasets"], obj, Writer(CONTROLLER))

    def _set_size(self, deployment: Object, owned: Object, size: int) -> None:
        new = copy.deepcopy(owned)
        new["spec"]["replicas"] = size
        new["metadata"]["annotations"] |= _size_annotations(deployment)
        self._write(owned, new)

    def _replace_pods(self, deployment: Object, owned: Object) -> Iterator[None]:
        active = [pod for pod in self.pods(owned) if is_active(pod)]
        surplus = len(active) - wanted_replicas(owned)
        if surplus > 0:
            rng, now = self.store.rng, self.store.clock()
            for pod in deletion_order(active, self.pods(deployment), now, rng)[:surplus]:
                self.delete_pod(pod)
        for _ in range(-surplus):
            self._create_pod(deployment, owned)
        new = copy.deepcopy(owned)
        new["status"] = self._counts(self.pods(owned), owned)
        if self._write(owned, new, "status") is not owned:
            yield

    def delete_pod(self, pod: Object) -> None:
        """Deletes a pod, or marks it as terminating while the test keeps such pods."""
        self.deleted_pods.append(pod["metadata"]["name"])
        if not self.keep_terminating:
            return self.store.remove(KINDS["pods"], pod)
        new = copy.deepcopy(pod)
        new["metadata"]["deletionTimestamp"] = stamp(self.store.clock() + timedelta(seconds=30))
        new["metadata"]["deletionGracePeriodSeconds"] = 30
        self._write(pod, new)

    def _create_pod(self, deployment: Object, owned: Object) -> None:
        meta, template = owned["metadata"], owned["spec"]["template"]
        node = self._next_node(deployment)
        base = f"{meta['name']}-"
        spec = copy.deepcopy(template["spec"]) | ({"nodeName": node} if node else {})
        self.store.create(
            KINDS["pods"],
            {
                "metadata": {
                    "generateName": base, "namespace": meta["namespace"],
                    "name": base[:58] + random_name(self.store.rng, 5),
                    "labels": dict(template["metadata"]["labels"]),
                    "ownerReferences": [_reference(owned)],
                },
                "spec": spec,
                "status": pod_status(spec, stamp(self.store.clock())),
            },
            Writer(CONTROLLER),
        )  # fmt: skip

    def _next_node(self, deployment: Object) -> str:
        meta = deployment["metadata"]
        nodes = self.nodes_of.get((meta["namespace"], meta["name"]), self.nodes)
        used = Counter(pod["spec"].get("nodeName") for pod in self.pods(deployment))
        return min(nodes, key=lambda node: used[node], default="")

    def _counts(self, pods: Sequence[Object], owner: Object) -> Object:
        active = [pod for pod in pods if is_active(pod)]
        ready = sum(1 for pod in active if ready_since(pod) is not None)
        counts = {"replicas": len(active), "observedGeneration": owner["metadata"]["generation"]}
        return counts | ({"readyReplicas": ready, "availableReplicas": ready} if ready else {})

    def _status(self, namespace: str, name: str, observed_only: bool = False) -> Iterator[None]:
        """Writes the Deployment's status as upstream does: first that the spec was seen, then
        that the pods are there, then that they are available."""
        deployment = self.store.objects[("deployments", namespace, name)]
        goal = self._counts(self.pods(deployment), deployment)
        desired, ready = wanted_replicas(deployment), goal.get("readyReplicas", 0)
        seen = {**deployment.get("status", {}), "observedGeneration": goal["observedGeneration"]}
        steps = [seen]
        if not observed_only:
            newest = self.sets(deployment)[:1]
            updated = [pod for owned in newest for pod in self.pods(owned) if is_active(pod)]
            goal["updatedReplicas"] = len(updated)
            if desired > ready:
                goal["unavailableReplicas"] = desired - ready
            steps = [{**seen, "replicas": goal["replicas"]}, goal]
        for step in steps:
            old = self.store.objects[("deployments", namespace, name)]
            new = copy.deepcopy(old)
            enough = step.get("readyReplicas", 0) >= desired
            new["status"] = {**step, "conditions": self._conditions(old, enough)}
            if not observed_only and newest:
                revision = newest[0]["metadata"]["annotations"][REVISION]
                new["metadata"].setdefault("annotations", {})[REVISION] = revision
            if self._write(old, new, "status") is not old:
                yield

    def _conditions(self, old: Object, enough: bool) -> list[Object]:
        words = {True: "MinimumReplicasAvailable", False: "MinimumReplicasUnavailable"}
        before = {c["type"]: c for c in old.get("status", {}).get("conditions", [])}
        now = stamp(self.store.clock())
        found = []
        for kind, status, reason in (
            ("Available", str(enough), words[enough]),
            ("Progressing", "True", "NewReplicaSetAvailable" if enough else "ReplicaSetUpdated"),
        ):
            last = before.get(kind, {})
            if (last.get("status"), last.get("reason")) == (status, reason):
                found.append(last)
                continue
            changed = last.get("lastTransitionTime", now) if last.get("status") == status else now
            found.append({
                "type": kind, "status": status, "reason": reason,
                "lastUpdateTime": now, "lastTransitionTime": changed,
            })  # fmt: skip
        return found

    def _collect_garbage(self, namespace: str) -> None:
        """Removes what belongs to an owner that is gone."""
        for resource in ("replicasets", "pods"):
            alive = {_uid(obj) for obj in self.store.objects.values()}
            for obj in self.store.find(resource, namespace):
                if _owner(obj) and _owner(obj) not in alive:
                    self.store.remove(KINDS[resource], obj)


def pod_status(spec: Object, now: str) -> Object:
    """The status of a new pod: running and ready at once, or waiting for a node."""
    if not spec.get("nodeName"):
        return {"phase": "Pending", "qosClass": "BestEffort"}
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": now}
        for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    ]
    containers = [
        {
            "name": container["name"], "image": container["image"], "imageID": "sha256:0",
            "ready": True, "restartCount": 0, "state": {"running": {"startedAt": now}},
        }
        for container in spec["containers"]
    ]  # fmt: skip
    return {
        "phase": "Running", "conditions": conditions, "containerStatuses": containers,
        "startTime": now, "qosClass": "BestEffort",
    }  # fmt: skip


def _uid(obj: Object) -> str:
    return str(obj["metadata"]["uid"])


def _owner(obj: Object) -> str:
    owners = [o["uid"] for o in obj["metadata"].get("ownerReferences", []) if o.get("controller")]
    return str(owners[0]) if owners else ""


def _reference(owner: Object) -> Object:
    return {
        "apiVersion": owner["apiVersion"], "kind": owner["kind"], "uid": _uid(owner),
        "name": owner["metadata"]["name"], "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip


def _size_annotations(deployment: Object) -> dict[str, str]:
    desired = wanted_replicas(deployment)
    most = desired + max_surge(deployment)
    return {DESIRED_REPLICAS: str(desired), MAX_REPLICAS: str(most)}


# --- Who may do what -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """Whom a request comes from; `refused` if that could not be settled."""

    name: str
    groups: tuple[str, ...] = ()
    refused: ApiError | None = None


@dataclass
class Access:
    """Bearer tokens and, once a manifest is loaded, RBAC. Without rules everybody may do all."""

    tokens: dict[str, Identity] = field(default_factory=dict)
    rules: list[tuple[Object, str, Object]] | None = None  # subject, namespace ("": all), rule

    def load(self, manifest: str, namespace: str) -> None:
        """Adds the Roles and RoleBindings of a multi-document YAML text."""
        documents = [d for d in yaml.safe_load_all(manifest) if d]
        roles = {
            (d["kind"], d["metadata"].get("namespace", namespace), d["metadata"]["name"]): d
            for d in documents
            if d["kind"] in ("Role", "ClusterRole")
        }
        self.rules = self.rules or []
        for binding in documents:
            if binding["kind"] not in ("RoleBinding", "ClusterRoleBinding"):
                continue
            home = binding["metadata"].get("namespace", namespace)
            ref = binding["roleRef"]
            role = roles[(ref["kind"], home, ref["name"])]
            scope = home if binding["kind"] == "RoleBinding" else ""
            for subject in binding["subjects"]:
                if subject["kind"] == "ServiceAccount" and not subject.get("namespace"):
                    raise ValueError("subjects[].namespace: Required value")
                self.rules += [(subject, scope, rule) for rule in role["rules"]]

    def identify(self, headers: Mapping[str, str]) -> Identity:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        caller = self.tokens.get(token.strip()) if scheme.lower() == "bearer" else None
        if caller is None:
            return Identity("", refused=ApiError(401, "Unauthorized"))
        other = headers.get("impersonate-user", "")
        if other and ADMIN_GROUP not in caller.groups:
            text = f'users "{other}" is forbidden: User "{caller.name}" cannot impersonate resource'
            text += ' "users" in API group "" at the cluster scope'
            error = ApiError(403, text, {"name": other, "kind": "users"})
            return Identity(caller.name, refused=error)
        return Identity(other, ("system:authenticated",)) if other else caller

    def check(self, who: Identity, request: Request) -> None:
        if who.refused:
            raise who.refused
        if self.rules is None or ADMIN_GROUP in who.groups:
            return
        allowed = (
            _is_subject(subject, who) and _allows(rule, request)
            for subject, scope, rule in self.rules
            if scope in ("", request.namespace)
        )
        if not any(allowed):
            raise forbidden(request)


def _is_subject(subject: Object, who: Identity) -> bool:
    if subject["kind"] == "ServiceAccount":
        return who.name == f"system:serviceaccount:{subject['namespace']}:{subject['name']}"
    return subject["name"] in ((who.name,) if subject["kind"] == "User" else who.groups)


def _allows(rule: Object, request: Request) -> bool:
    resource, sub = request.resource, request.subresource
    resources = {"*", f"{resource}/{sub}", f"*/{sub}"} if sub else {"*", resource}
    names = rule.get("resourceNames")
    # The name of what is created is not in the path, so resourceNames never allow a create.
    named = not names or (request.verb != "create" and request.name in names)
    return bool(
        named
        and {"*", request.verb} & set(rule["verbs"])
        and {"*", request.group} & set(rule.get("apiGroups", []))
        and resources & set(rule.get("resources", []))
    )


def forbidden(request: Request) -> ApiError:
    if not request.resource:
        text = f'forbidden: User "{request.user}" cannot {request.verb} path "{request.path}"'
        return ApiError(403, text, {})
    resource = "/".join(filter(None, (request.resource, request.subresource)))
    what = ".".join(filter(None, (request.resource, request.group)))
    named = f' "{request.name}"' if request.name and request.verb != "create" else ""
    space = "at the cluster scope"
    if request.namespace:
        space = f'in the namespace "{request.namespace}"'
    text = (
        f'{what}{named} is forbidden: User "{request.user}" cannot {request.verb} resource'
        f' "{resource}" in API group "{request.group}" {space}'
    )
    details = {"name": request.name, "group": request.group, "kind": request.resource}
    return ApiError(403, text, details)


# --- The API -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(status: int, body: Object, headers: Mapping[str, str] | None = None) -> Answer:
    raw = json.dumps(body, separators=(",", ":")).encode() + b"\n"
    return Answer(status, raw, {"Content-Type": "application/json", **(headers or {})})


class Api:
    """What each verb does to the store, and its answer."""

    def __init__(self, store: Store, access: Access, controllers: Controllers) -> None:
        self.store = store
        self.access = access
        self.controllers = controllers
        self.touched: Callable[[str, str], None] = lambda namespace, name: None
        self._snapshots: dict[str, list[Object]] = {}  # what a paged list began with

    def answer(self, request: Request, who: Identity, content_type: str) -> Answer:
        try:
            with self.store.lock:
                self.access.check(who, request)
                if not request.path.startswith(KNOWN_PATHS):
                    plain = {"Content-Type": "text/plain; charset=utf-8"}
                    return Answer(404, b"404 page not found\n", plain)
                return json_answer(*self._dispatch(request, content_type))
        except ApiError as error:
            return json_answer(error.code, error.status)
        except Exception as error:  # a bug of the fake: say so instead of dropping the connection
            traceback.print_exc()
            return json_answer(500, ApiError(500, f"Internal error occurred: {error!r}").status)

    def forget_pages(self) -> None:
        """Lets every continue token expire, as etcd's compaction does after some minutes."""
        self._snapshots.clear()

    def _dispatch(self, request: Request, content_type: str) -> tuple[int, Object]:
        if request.path == "/version":
            return 200, {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        kind = KINDS.get(request.resource)
        known = kind is not None and kind.group == request.group
        if kind is None or not known or request.subresource not in kind.verbs:
            raise ApiError(404, "the server could not find the requested resource", {})
        named_create = request.verb == "create" and request.name
        if named_create or request.verb not in kind.verbs[request.subresource].split():
            text = "the server does not allow this method on the requested resource"
            raise ApiError(405, text, {})
        if request.verb == "list":
            return 200, self._list(kind, request)
        if request.verb == "create":
            return 201, self._create(kind, request)
        obj = self.store.get(kind.resource, request.namespace, request.name)
        if obj is None:
            raise not_found(kind, request.name)
        if request.verb == "delete":
            return 200, self._delete(kind, obj, request)
        if request.verb in ("update", "patch"):
            obj = self._write(kind, obj, request, content_type)
        return 200, scale_of(obj) if request.subresource == "scale" else obj

    def _list(self, kind: Kind, request: Request) -> Object:
        query = request.query
        selected = parse_selector(query.get("labelSelector", ""))
        fields = parse_field_selector(kind, query.get("fieldSelector", ""))
        revision, start, found = self._page_start(kind, request)
        chosen = [
            obj
            for obj in found
            if _key(obj) >= start and fields(obj) and selected(obj["metadata"].get("labels") or {})
        ]
        limit = int(query.get("limit") or 0) or len(chosen)
        page, rest = chosen[:limit], chosen[limit:]
        meta: Object = {"resourceVersion": revision}
        if rest:
            self._snapshots[revision] = found
            # The API server's own form: opaque to a client, the key to go on from within.
            token = {"v": "meta.k8s.io/v1", "rv": int(revision), "start": _key(rest[0])}
            meta["continue"] = base64.urlsafe_b64encode(json.dumps(token).encode()).decode()
            if not query.get("labelSelector") and not query.get("fieldSelector"):
                meta["remainingItemCount"] = len(rest)  # upstream: unknown under a selector
        items = [{k: v for k, v in o.items() if k not in ("kind", "apiVersion")} for o in page]
        list_kind = {"kind": f"{kind.kind}List", "apiVersion": kind.api_version}
        return {**list_kind, "metadata": meta, "items": items}

    def _page_start(self, kind: Kind, request: Request) -> tuple[str, str, list[Object]]:
        token = request.query.get("continue")
        if not token:
            found = self.store.find(kind.resource, request.namespace)
            return str(self.store.revision), "", found
        try:
            page = json.loads(base64.urlsafe_b64decode(token))
            revision, start = str(page["rv"]), str(page["start"])
        except (ValueError, KeyError, TypeError) as error:
            raise ApiError(400, f"continue key is not valid: {error}") from error
        if revision not in self._snapshots:
            text = "The provided continue parameter is too old to display a consistent list result."
            text += " You can start a new list without the continue parameter."
            raise ApiError(410, text)
        return revision, start, self._snapshots[revision]

    def _create(self, kind: Kind, request: Request) -> Object:
        obj = _body_object(kind, request)
        meta = obj["metadata"]
        if meta.get("generateName") and not meta.get("name"):
            meta["name"] = meta["generateName"][:58] + random_name(self.store.rng, 5)
        set_defaults(kind, obj)
        obj.pop("status", None)
        self._validate(kind, obj, None)
        if self.store.get(kind.resource, request.namespace, meta["name"]):
            text = f'{kind.qualified} "{meta["name"]}" already exists'
            raise ApiError(409, text, _details(kind, meta["name"]), "AlreadyExists")
        obj = self.store.create(kind, obj, writer_of(request), _persists(request))
        self._touch(kind, obj, request)
        return obj

    def _write(self, kind: Kind, old: Object, request: Request, content_type: str) -> Object:
        """PUT or PATCH of an object or one of its subresources."""
        scaling = request.subresource == "scale"
        shown_kind, shown = (SCALE, scale_of(old)) if scaling else (kind, old)
        if request.verb == "patch":
            new = apply_patch(shown, request.body, content_type)
        else:
            new = _body_object(shown_kind, request)
        new = copy.deepcopy(new)
        _check_name(new, request)
        _check_preconditions(kind, shown, new)
        problem = _not_decodable(shown_kind, new)
        if problem and request.verb == "patch":
            text = f"Invalid value: {json.dumps(json.dumps(new))}: {problem}"
            raise invalid(Kind("", "", "", {}), "", [Problem("patch", text)])
        if problem:
            raise ApiError(400, _cannot_handle(shown_kind, problem))
        if scaling:
            self._validate(shown_kind, new, None)
            replicas = new.get("spec", {}).get("replicas", 0)
            new = {**old, "spec": {**old["spec"], "replicas": replicas}}
        else:
            new = _only_what_may_change(kind, old, new, request.subresource)
            set_defaults(kind, new)
            self._validate(kind, new, old)
        new = self.store.update(kind, old, new, writer_of(request), _persists(request))
        if new is not old:
            self._touch(kind, new, request)
        return new

    def _delete(self, kind: Kind, obj: Object, request: Request) -> Object:
        options = request.body if isinstance(request.body, dict) else {}
        _check_preconditions(kind, obj, {"metadata": options.get("preconditions") or {}})
        if not _persists(request):
            return obj if kind.resource == "pods" else _deleted(kind, obj)
        if kind.resource == "pods":
            if is_active(obj) or not self.controllers.keep_terminating:
                self.controllers.delete_pod(obj)
        else:
            self.store.remove(kind, obj)
        self._touch(kind, obj, request)
        return obj if kind.resource == "pods" else _deleted(kind, obj)

    def _validate(self, kind: Kind, obj: Object, old: Object | None) -> None:
        problems = validate(kind, obj, old)
        if problems:
            raise invalid(kind, obj["metadata"].get("name", ""), problems)

    def _touch(self, kind: Kind, obj: Object, request: Request) -> None:
        """Wakes the controllers for the Deployment that a write is about."""
        if not _persists(request):
            return
        meta = obj["metadata"]
        if kind.resource == "deployments":
            self.touched(meta["namespace"], meta["name"])
        elif kind.resource == "pods":
            self.touch_owner(obj)

    def touch_owner(self, pod: Object) -> None:
        for owned in self.store.find("replicasets", pod["metadata"]["namespace"]):
            if _uid(owned) == _owner(pod):
                owner = owned["metadata"]["ownerReferences"][0]["name"]
                self.touched(pod["metadata"]["namespace"], owner)


def _key(obj: Object) -> str:
    return f"{obj['metadata']['namespace']}/{obj['metadata']['name']}"


def _persists(request: Request) -> bool:
    return request.query.get("dryRun") != "All"


def writer_of(request: Request) -> Writer:
    """Field manager: as named, else the User-Agent up to its first slash."""
    manager = request.query.get("fieldManager") or request.user_agent.split("/")[0] or "unknown"
    return Writer(manager, request.subresource)


def _cannot_handle(kind: Kind, problem: str) -> str:
    return f'{kind.kind} in version "v1" cannot be handled as a {kind.kind}: {problem}'


def _body_object(kind: Kind, request: Request) -> Object:
    """The object in the body of a create or update, checked against the path."""
    if not isinstance(request.body, dict):
        raise ApiError(400, "the request body is not an object")
    obj = copy.deepcopy(request.body)
    if obj.get("kind", kind.kind) != kind.kind:
        raise ApiError(400, f'no kind "{obj["kind"]}" is registered at this path')
    meta = obj.setdefault("metadata", {})
    if meta.setdefault("namespace", request.namespace) != request.namespace:
        raise ApiError(400, (
            "the namespace of the provided object does not match the namespace sent on the request"
        ))  # fmt: skip
    problem = _not_decodable(kind, obj)
    if problem:
        raise ApiError(400, _cannot_handle(kind, problem))
    return {"kind": kind.kind, "apiVersion": kind.api_version, **obj}


def _check_name(obj: Object, request: Request) -> None:
    name = (obj.get("metadata") or {}).get("name", "")
    if name != request.name:
        text = f"the name of the object ({name}) does not match the name on the URL"
        raise ApiError(400, f"{text} ({request.name})")


def _check_preconditions(kind: Kind, old: Object, new: Object) -> None:
    """resourceVersion and uid, where a write names them, have to be the current ones."""
    name, wanted = old["metadata"]["name"], new.get("metadata", {})
    uid = wanted.get("uid")
    if uid and uid != _uid(old):
        text = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {_uid(old)}"
        raise conflict(kind, name, text)
    if wanted.get("resourceVersion", "0") not in ("", "0", old["metadata"]["resourceVersion"]):
        raise conflict(kind, name)


def _only_what_may_change(kind: Kind, old: Object, new: Object, subresource: str) -> Object:
    """Status is written through /status alone, and /status writes no spec."""
    kept = ("status",) if not subresource else ("spec",)
    new = {k: v for k, v in new.items() if k not in kept} | {k: old[k] for k in kept if k in old}
    meta = {k: v for k, v in new["metadata"].items() if not k.startswith("deletion")}
    kept_meta = ["deletionTimestamp", "deletionGracePeriodSeconds"]
    if subresource and kind.resource == "deployments":
        kept_meta.append("labels")
    new["metadata"] = meta | {k: old["metadata"][k] for k in kept_meta if k in old["metadata"]}
    return {**new, "kind": kind.kind, "apiVersion": kind.api_version}


def _deleted(kind: Kind, obj: Object) -> Object:
    details = {**_details(kind, obj["metadata"]["name"]), "uid": _uid(obj)}
    details = {k: v for k, v in details.items() if v}
    return {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
        "details": details,
    }  # fmt: skip


def scale_of(deployment: Object) -> Object:
    """The Scale that stands for a Deployment; as upstream's, it omits `replicas: 0`."""
    meta, replicas = deployment["metadata"], wanted_replicas(deployment)
    shown = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {k: meta[k] for k in shown if k in meta},
        "spec": {"replicas": replicas} if replicas else {},
        "status": {
            "replicas": deployment.get("status", {}).get("replicas", 0),
            "selector": selector_text(deployment["spec"]["selector"]),
        },
    }


# --- Faults --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Behaviour:
    """What goes wrong with a request; `applied`: whether it takes effect all the same."""

    what: Literal["answer", "hang", "reset", "cut", "drip"]
    applied: bool
    answer: Callable[[Request], Answer] | None = None  # instead of the real one
    seconds: float = 0


def answer(code: int, headers: Mapping[str, str] | None = None, message: str = "") -> Behaviour:
    """Answers with this status, unapplied, in the form that the API server gives it."""
    return Behaviour("answer", False, lambda request: error_answer(request, code, headers, message))


def hang(applied: bool = False) -> Behaviour:
    """Reads the request and never answers, until the peer goes or the fake closes."""
    return Behaviour("hang", applied)


def reset(applied: bool = False) -> Behaviour:
    """Resets the connection (RST) instead of answering; `applied`: after doing the work."""
    return Behaviour("reset", applied)


def cut() -> Behaviour:
    """Does the work, answers with the headers and half of the body, then resets."""
    return Behaviour("cut", True)


def drip(seconds: float) -> Behaviour:
    """Does the work, then answers one byte every so many seconds."""
    return Behaviour("drip", True, seconds=seconds)


def body(raw: bytes, content_type: str = "application/json", applied: bool = True) -> Behaviour:
    """Answers 200 with these bytes."""
    return Behaviour("answer", applied, lambda _: Answer(200, raw, {"Content-Type": content_type}))


def garbage() -> Behaviour:
    return body(b"<html>not what you asked for</html>")


def empty() -> Behaviour:
    return body(b"")


def wrong_kind() -> Behaviour:
    return body(b'{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":"other"}}')


def error_answer(
    request: Request, code: int, headers: Mapping[str, str] | None, message: str
) -> Answer:
    """The API server's own answer of that status to such a request."""
    kind = KINDS.get(request.resource, KINDS["deployments"])
    if code == 429 and not message:  # overload protection answers in plain text, see the headers
        text = "Too many requests, please try again later.\n"
        plain = {"Content-Type": "text/plain; charset=utf-8", "Retry-After": "1"}
        return Answer(429, text.encode(), plain | dict(headers or {}))
    texts = {
        500: "Internal error occurred: etcdserver: request timed out",
        503: "the server is currently unable to handle the request",
        504: "Timeout: request did not complete within the allotted timeout",
    }
    known: dict[int, Callable[[], ApiError]] = {
        401: lambda: ApiError(401, "Unauthorized"),
        403: lambda: forbidden(request),
        404: lambda: not_found(kind, request.name),
        409: lambda: conflict(kind, request.name),
        422: lambda: invalid(kind, request.name, [Problem("spec", "Invalid value: refused")]),
    }
    if message or code not in known:
        error = ApiError(code, message or texts.get(code, HTTPStatus(code).phrase), {})
    else:
        error = known[code]()
    return json_answer(code, error.status, headers)


@dataclass
class Fault:
    """A behaviour for matching requests: `times` of them (None: all), from the `nth` on."""

    match: Match
    behaviour: Behaviour
    times: int | None
    nth: int
    seen: int = 0
    hits: int = 0

    def strikes(self, request: Request) -> bool:
        if not self.match(request):
            return False
        self.seen += 1
        if self.seen < self.nth or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True


@dataclass
class Hook:
    """Something that happens just before or just after a matching request is applied."""

    match: Match
    call: Callable[[Request], object]
    when: Literal["before", "after"]
    times: int | None
    hits: int = 0


# --- HTTP ----------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    """Accepts connections and remembers them, so that closing leaves none behind."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, cluster: FakeKubernetes, tls: ssl.SSLContext | None) -> None:
        self.cluster = cluster
        self.closing = threading.Event()
        self._clients: dict[threading.Thread, socket.socket] = {}
        super().__init__(("127.0.0.1", port), _Handler)
        if tls:
            self.socket = tls.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        self._acceptor = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._acceptor.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._clients = {t: c for t, c in self._clients.items() if t.is_alive()}
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), daemon=True
        )
        self._clients[thread] = request
        thread.start()

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self._acceptor.join()
        self.server_close()
        for thread, connection in self._clients.items():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(10)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the cluster's `requests` are the log."""

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply, behaviour = self.server.cluster.handle(self.command, self.path, raw, headers)
        if behaviour is None or behaviour.what == "answer":
            self.wfile.write(self._bytes(reply))
        elif behaviour.what == "hang":
            self._wait_for_the_peer()
            self.close_connection = True
        elif behaviour.what == "reset":
            self._reset()
        elif behaviour.what == "cut":
            self.wfile.write(self._bytes(reply)[: -len(reply.body) // 2])
            self._reset()
        elif behaviour.what == "drip":
            for byte in self._bytes(reply):
                self.wfile.write(bytes([byte]))
                if self.server.closing.wait(behaviour.seconds):
                    break

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _bytes(self, reply: Answer) -> bytes:
        now = self.server.cluster.store.clock()
        headers = {
            "Audit-Id": str(uuid.uuid4()), "Cache-Control": "no-cache, private",
            "Date": format_datetime(now.astimezone(UTC), usegmt=True),
            "Content-Length": str(len(reply.body)), **reply.headers,
        }  # fmt: skip
        lines = [f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + reply.body

    def _wait_for_the_peer(self) -> None:
        while not self.server.closing.is_set():
            if select.select([self.connection], [], [], 0.05)[0]:
                return  # a client that waits for an answer sends nothing: this is its end

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # with nothing to linger for, closing sends RST
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        os.close(self.connection.detach())
        self.close_connection = True


# --- Certificates --------------------------------------------------------------------------------


def make_certificates() -> tuple[bytes, bytes]:
    """A certificate authority (PEM) and a server's certificate with its key (PEM)."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fake-kubernetes-ca")])
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kube-apiserver")])
    signer = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    ca = (
        _certificate(ca_name, ca_name, ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(signer, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer)
    server = (
        _certificate(name, ca_name, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(signed_by, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return ca.public_bytes(pem), server.public_bytes(pem) + secret


def _certificate(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
    )


def _key_usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=ca, crl_sign=ca, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


# --- The cluster ---------------------------------------------------------------------------------


class FakeKubernetes:
    """A cluster on loopback. `controllers`: "at once" (before a write is answered), "on settle"
    (when `settle` is called) or "in background" (one write every `step_seconds`, as a real
    controller interferes with its clients)."""

    def __init__(
        self,
        *,
        tls: bool = False,
        controllers: Literal["at once", "on settle", "in background"] = "at once",
        nodes: Sequence[str] = ("node-a", "node-b", "node-c"),
        seed: int | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        step_seconds: float = 0.02,
    ) -> None:
        self.store = Store(clock, random.Random(seed))
        self.access = Access()
        self.controllers = Controllers(self.store, nodes)
        self.api = Api(self.store, self.access, self.controllers)
        self.api.touched = self._touched
        self.requests: list[Request] = []
        self._mode = controllers
        self._step_seconds = step_seconds
        self._waiting: dict[tuple[str, str], None] = {}  # Deployments to reconcile, in order
        self._faults: list[Fault] = []
        self._hooks: list[Hook] = []
        self._server: _Server | None = None
        self._port = 0
        self._stopped = threading.Event()
        self._worker: threading.Thread | None = None
        if controllers == "in background":
            self._worker = threading.Thread(target=self._work, daemon=True)
        self._tls: ssl.SSLContext | None = None
        self._ca = b""
        if tls:
            self._tls, self._ca = _server_context()
        self.admin_token = self.add_token("kubernetes-admin", groups=(ADMIN_GROUP,))

    # Life

    def __enter__(self) -> FakeKubernetes:
        self.resume_listening()
        if self._worker:
            self._worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._worker:
            self._worker.join()
        self.stop_listening()

    def stop_listening(self) -> None:
        """Refuses connections from now on and drops those that are open."""
        if self._server:
            self._server.close()
            self._server = None

    def resume_listening(self) -> None:
        self._server = _Server(self._port, self, self._tls)
        self._port = self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._port}"

    # Access

    def add_token(self, user: str, token: str = "", groups: Sequence[str] = ()) -> str:
        """A bearer token for a user name, made up unless given."""
        token = token or secrets.token_urlsafe(24)
        self.access.tokens[token] = Identity(user, ("system:authenticated", *groups))
        return token

    def service_account(self, name: str, namespace: str = "default") -> str:
        """A token of that service account."""
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}")
        return self.add_token(f"system:serviceaccount:{namespace}:{name}", groups=groups)

    def load_rbac(self, manifest: Path | str, namespace: str = "default") -> None:
        """Allows what this manifest (a path or its text) allows, and nothing else."""
        text = manifest.read_text() if isinstance(manifest, Path) else manifest
        self.access.load(text, namespace)

    def write_kubeconfig(self, path: Path, token: str = "", namespace: str = "default") -> Path:
        server: Object = {"server": self.url}
        if self._ca:
            server["certificate-authority-data"] = base64.b64encode(self._ca).decode()
        context = {"cluster": "fake", "user": "fake", "namespace": namespace}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": server}],
            "users": [{"name": "fake", "user": {"token": token or self.admin_token}}],
            "contexts": [{"name": "fake", "context": context}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    def write_service_account(
        self, directory: Path, token: str = "", namespace: str = "default"
    ) -> dict[str, str]:
        """The three files that a pod finds, and the environment that goes with them."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "token").write_text(token or self.admin_token)
        (directory / "namespace").write_text(namespace)
        (directory / "ca.crt").write_bytes(self._ca)
        return {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self._port),
        }  # fmt: skip

    # Faults

    def fault(
        self, match: Match, behaviour: Behaviour, times: int | None = 1, nth: int = 1
    ) -> Fault:
        """Lets matching requests go wrong; the result counts its `hits`."""
        self._faults.append(Fault(match, behaviour, times, nth))
        return self._faults[-1]

    def hook(
        self,
        match: Match,
        call: Callable[[Request], object],
        when: Literal["before", "after"] = "before",
        times: int | None = 1,
    ) -> Hook:
        """Calls `call(request)` just before or after a matching request takes effect."""
        self._hooks.append(Hook(match, call, when, times))
        return self._hooks[-1]

    def clear_faults(self) -> None:
        self._faults.clear()
        self._hooks.clear()

    def handle(
        self, method: str, target: str, raw: bytes, headers: Mapping[str, str]
    ) -> tuple[Answer, Behaviour | None]:
        """One request: what happens before, the answer, what happens after, the record."""
        who = self.access.identify(headers)
        payload, bad = _read_body(raw)
        request = read_request(method, target, payload, who.name, headers.get("user-agent", ""))
        with self.store.lock:
            fault = next((f for f in self._faults if f.strikes(request)), None)
        behaviour = fault.behaviour if fault else None
        self._run_hooks(request, "before")
        reply = json_answer(bad.code, bad.status) if bad else None
        content_type = headers.get("content-type", "").split(";")[0].strip()
        if reply is None and (behaviour is None or behaviour.applied):
            reply = self.api.answer(request, who, content_type)
        if behaviour and behaviour.answer:
            reply = behaviour.answer(request)
        silent = behaviour is not None and behaviour.what in ("hang", "reset")
        request = replace(request, status=reply.status if reply and not silent else 0)
        self._run_hooks(request, "after")
        self.requests.append(request)
        return reply or Answer(0, b""), behaviour

    def _run_hooks(self, request: Request, when: str) -> None:
        for hook in list(self._hooks):
            with self.store.lock:
                due = hook.times is None or hook.hits < hook.times
                if hook.when != when or not due or not hook.match(request):
                    continue
                hook.hits += 1
            hook.call(request)

    # Controllers

    def settle(self) -> None:
        """Lets the controllers finish whatever they have to do."""
        with self.store.lock:
            while self._waiting:
                key = next(iter(self._waiting))
                del self._waiting[key]
                for _ in self.controllers.reconcile(*key):
                    pass

    def _touched(self, namespace: str, name: str) -> None:
        self._waiting[(namespace, name)] = None
        if self._mode == "at once":
            self.settle()

    def _work(self) -> None:
        """The controllers' thread: in the background, one write at a time."""
        while not self._stopped.wait(self._step_seconds):
            with self.store.lock:
                key = next(iter(self._waiting), None)
                if key is None:
                    continue
                del self._waiting[key]
            steps = self.controllers.reconcile(*key)
            while self._step(steps) and not self._stopped.wait(self._step_seconds):
                pass

    def _step(self, steps: Iterator[None]) -> bool:
        with self.store.lock:
            return next(steps, self) is not self

    # The world as a test sets it up and looks at it

    def add_deployment(
        self,
        name: str,
        namespace: str = "default",
        *,
        replicas: int | None = 1,
        annotations: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        selector: Object | None = None,
        nodes: Sequence[str] | None = None,
        manager: str = "kubectl-create",
    ) -> Object:
        """A Deployment with its pods. `replicas` None leaves the field out, which no API server
        stores but clients have to bear; `nodes` are where its pods go, () leaves them pending."""
        labels = dict(labels or {"app": name})
        obj: Object = {
            "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "spec": {
                "selector": selector or {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [{"name": "main", "image": "worker:1"}]},
                },
            },
        }
        if annotations:
            obj["metadata"]["annotations"] = dict(annotations)
        if replicas is not None:
            obj["spec"]["replicas"] = replicas
        set_defaults(KINDS["deployments"], obj)
        if replicas is None:
            del obj["spec"]["replicas"]
        with self.store.lock:
            if nodes is not None:
                self.controllers.nodes_of[(namespace, name)] = nodes
            self.store.create(KINDS["deployments"], obj, Writer(manager))
            self._touched(namespace, name)
        return self.deployment(name, namespace)

    def add_pod(self, name: str, labels: Labels, namespace: str = "default") -> Object:
        """A pod that belongs to no Deployment, whatever its labels say."""
        meta: Object = {"name": name, "namespace": namespace, "labels": dict(labels)}
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": str(uuid.uuid4())}
        meta["ownerReferences"] = [{**owner, "controller": True}]
        spec: Object = {"containers": [{"name": "main", "image": "other:1"}]}
        spec["nodeName"] = "node-a"
        obj: Object = {"metadata": meta, "spec": spec}
        with self.store.lock:
            obj["status"] = pod_status(spec, stamp(self.store.clock()))
            return copy.deepcopy(self.store.create(KINDS["pods"], obj, Writer(CONTROLLER)))

    def edit(
        self,
        resource: str,
        name: str,
        change: Callable[[Object], object],
        namespace: str = "default",
        manager: str = "kubectl-edit",
        subresource: str = "",
    ) -> None:
        """Another writer: changes an object in place, past the API's checks."""
        with self.store.lock:
            old = self.store.objects[(resource, namespace, name)]
            new = copy.deepcopy(old)
            change(new)
            self.store.update(KINDS[resource], old, new, Writer(manager, subresource))
            if resource == "pods":
                self.api.touch_owner(new)
            elif resource == "deployments":
                self._touched(namespace, name)

    def scale(
        self, name: str, replicas: int, namespace: str = "default", manager: str = "kubectl"
    ) -> None:
        """Scales as `kubectl scale` or an HPA does: through the scale subresource."""
        self.edit(
            "deployments", name, lambda d: d["spec"].update(replicas=replicas), namespace, manager,
            "scale",
        )  # fmt: skip

    def annotate(
        self, name: str, namespace: str = "default", **annotations: str | None
    ) -> None:
        """Sets annotations of a Deployment as a person does; None removes one."""
        patch = {"metadata": {"annotations": annotations}}
        self.edit(
            "deployments", name, lambda d: d.update(merge(d, patch)), namespace, "kubectl-annotate"
        )

    def start_rollout(
        self, name: str, new_pods: int, old_pods: int | None = None, namespace: str = "default"
    ) -> None:
        """Puts a rollout half-way, where it stays until `finish_rollout`."""
        with self.store.lock:
            obj = self.store.objects[("deployments", namespace, name)]
            most = wanted_replicas(obj) + max_surge(obj)
            old_pods = max(0, most - new_pods) if old_pods is None else old_pods
            self.controllers.start_rollout(obj, new_pods, old_pods)
            self._touched(namespace, name)

    def finish_rollout(self, name: str, namespace: str = "default") -> None:
        with self.store.lock:
            self.controllers.held.discard((namespace, name))
            self._touched(namespace, name)

    def keep_terminating(self, keep: bool = True) -> None:
        """Lets deleted pods stay, marked as terminating; with False they go, now and later."""
        with self.store.lock:
            self.controllers.keep_terminating = keep
            for pod in self.store.find("pods"):
                if not keep and "deletionTimestamp" in pod["metadata"]:
                    self.store.remove(KINDS["pods"], pod)

    def set_pod(
        self,
        name: str,
        namespace: str = "default",
        *,
        ready: bool | None = None,
        phase: str | None = None,
        node: str | None = None,
        annotations: Mapping[str, str | None] | None = None,
        created: datetime | None = None,
        ready_since: datetime | None = None,
        restarts: int | None = None,
    ) -> None:
        """Changes what a kubelet, a scheduler or time would change."""

        def change(pod: Object) -> None:
            meta, spec, status = pod["metadata"], pod["spec"], pod["status"]
            meta["annotations"] = merge(meta.get("annotations"), dict(annotations or {}))
            if phase is not None:
                status["phase"] = phase
            if node is not None:
                spec["nodeName"] = node
            for condition in status.get("conditions", []):
                if condition["type"] == "Ready" and ready is not None:
                    condition["status"] = str(ready)
                if ready_since is not None:
                    condition["lastTransitionTime"] = stamp(ready_since)
            for container in status.get("containerStatuses", []):
                if restarts is not None:
                    container["restartCount"] = restarts

        with self.store.lock:
            if created is not None:
                found = self.store.objects[("pods", namespace, name)]
                found["metadata"]["creationTimestamp"] = stamp(created)
            self.edit("pods", name, change, namespace, "kubelet", "status")

    def deployment(self, name: str, namespace: str = "default") -> Object:
        with self.store.lock:
            return copy.deepcopy(self.store.objects[("deployments", namespace, name)])

    def replicas(self, name: str, namespace: str = "default") -> int | None:
        """spec.replicas as stored: None where it is absent."""
        found = self.deployment(name, namespace)["spec"].get("replicas")
        return None if found is None else int(found)

    def annotations(self, name: str, namespace: str = "default") -> dict[str, str]:
        return dict(self.deployment(name, namespace)["metadata"].get("annotations", {}))

    def pods(self, name: str, namespace: str = "default") -> list[Object]:
        """The Deployment's pods, terminating ones included."""
        with self.store.lock:
            owner = self.store.objects[("deployments", namespace, name)]
            return copy.deepcopy(self.controllers.pods(owner))

    def events(self, namespace: str = "default") -> list[Object]:
        with self.store.lock:
            return copy.deepcopy(self.store.find("events", namespace))

    def calls(self, match: Match | None = None) -> list[Request]:
        """The requests so far that match."""
        return [request for request in list(self.requests) if match is None or match(request)]

    @property
    def deleted_pods(self) -> list[str]:
        """Names of deleted pods, in the order in which they went."""
        return self.controllers.deleted_pods

    @property
    def scales(self) -> list[Scale]:
        return self.store.scales


def _read_body(raw: bytes) -> tuple[Any, ApiError | None]:
    if not raw:
        return None, None
    try:
        return json.loads(raw), None
    except ValueError as error:
        return None, ApiError(400, f"error decoding the body: {error}")


def _server_context() -> tuple[ssl.SSLContext, bytes]:
    ca, server = make_certificates()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:  # ssl reads keys from files alone
        file.write(server)
        file.flush()
        context.load_cert_chain(file.name)
    return context, ca
