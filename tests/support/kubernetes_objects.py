"""The objects of the Kubernetes fake: kinds, errors, selectors, patches, ownership, the store."""

from __future__ import annotations

import copy
import random
import re
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, NamedTuple

Object = dict[str, Any]
FieldPath = tuple[str, ...]

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
REVISION = "deployment.kubernetes.io/revision"
TEMPLATE_HASH = "pod-template-hash"
ANNOTATIONS_LIMIT = 256 * 1024  # bytes
CONTROLLER = "kube-controller-manager"


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


KINDS = {
    kind.resource: kind
    for kind in (
        Kind(
            "deployments", "Deployment", "apps",
            {"": "get list create patch delete", "scale": "get patch"},
        ),
        Kind("replicasets", "ReplicaSet", "apps", {"": "get list create patch"}),
        Kind("pods", "Pod", "", {"": "get list patch delete"}),
        Kind("events", "Event", "", {"": "get list create"}),
    )
}  # fmt: skip
# Where the reason is not the status' own phrase.
REASONS = {408: "Timeout", 422: "Invalid", 500: "InternalError", 504: "Timeout"}


class ApiError(Exception):
    """An error as the API server answers it: a `Status` object."""

    def __init__(self, code: int, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        reason = reason or REASONS.get(code) or HTTPStatus(code).phrase.replace(" ", "")
        self.status: Object = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason, "code": code,
        }  # fmt: skip


def not_found(kind: Kind, name: str) -> ApiError:
    return ApiError(404, f'{kind.qualified} "{name}" not found')


def conflict(kind: Kind, name: str) -> ApiError:
    why = "the object has been modified; please apply your changes to the latest version and try"
    return ApiError(409, f'Operation cannot be fulfilled on {kind.qualified} "{name}": {why} again')


# --- Requests ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One HTTP request as it came in, and the status that it was answered with (0: none)."""

    verb: str
    query: Mapping[str, str]
    body: Any
    user: str
    user_agent: str
    group: str
    namespace: str
    resource: str
    name: str
    subresource: str
    status: int = 0


_ROUTE = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<resource>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<subresource>[^/]+))?)?/?"
)
_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


def read_request(method: str, target: str, body: Any, user: str, agent: str) -> Request:
    """Reads a request line as the API server does: verb, resource, name, namespace."""
    url = urllib.parse.urlsplit(target)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    match = _ROUTE.fullmatch(url.path)
    parts: Object = match.groupdict("") if match else dict.fromkeys(_ROUTE.groupindex, "")
    verb = _VERBS.get(method, method)
    if verb == "get" and not parts["name"]:
        verb = "watch" if query.get("watch") in ("1", "true") else "list"
    return Request(verb, query, body, user, agent, **parts)


@dataclass(frozen=True)
class Match:
    """Which requests a fault, a hook or a question about the past is about. None: any."""

    verb: str | None = None
    resource: str | None = None
    name: str | None = None

    def __call__(self, request: Request) -> bool:
        return (
            self.verb in (None, request.verb)
            and self.resource in (None, request.resource)
            and self.name in (None, request.name)
        )


# --- Selectors -----------------------------------------------------------------------------------


_REQUIREMENT = re.compile(r"(!?)\s*([\w./-]+)\s*(?:=\s*([\w.-]*)|\s(in|notin)\s*\(([^()]*)\))?")
Labels = Mapping[str, str]


def parse_selector(text: str) -> Callable[[Labels], bool]:
    """A test for a label selector as it stands in a query; ApiError(400) if unreadable."""
    parts = re.split(r",(?![^(]*\))", text) if text else []
    tests = [_requirement(part.strip()) for part in parts]
    return lambda labels: all(test(labels) for test in tests)


def _requirement(text: str) -> Callable[[Labels], bool]:
    found = _REQUIREMENT.fullmatch(text)
    if not found:
        raise ApiError(400, f"unable to parse requirement: found '{text}'")
    absent, key, value, word, values = found.groups()
    if value is None and not word:
        return lambda labels: (key in labels) is not bool(absent)
    wanted = {v.strip() for v in values.split(",")} if word else {value}
    # An object without the key meets `notin`.
    return lambda labels: (labels.get(key) in wanted) is (word != "notin")


def selects(selector: Object, labels: Labels) -> bool:
    """Whether a selector as an object of the API has it meets these labels."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for one in selector.get("matchExpressions") or ():
        value, operator = labels.get(one["key"]), one["operator"]
        met = (
            value is not None if operator in ("Exists", "DoesNotExist") else value in one["values"]
        )
        if met is not (operator in ("In", "Exists")):
            return False
    return True


# The fields that a list can be selected by, apart from those that every kind has.
FIELDS: Mapping[str, Mapping[str, FieldPath]] = {
    "pods": {"status.phase": ("status", "phase"), "spec.nodeName": ("spec", "nodeName")},
    "events": {"reason": ("reason",), "type": ("type",)},
}
EVERY = {"metadata.name": ("metadata", "name"), "metadata.namespace": ("metadata", "namespace")}


def parse_fields(kind: Kind, text: str) -> Callable[[Object], bool]:
    """A test for a field selector as it stands in a query; ApiError(400) if unreadable."""
    known, tests = {**EVERY, **FIELDS.get(kind.resource, {})}, []
    for term in filter(None, text.split(",")):
        found = re.fullmatch(r"([^=!]*)(!=|==?)(.*)", term)
        if not found:
            raise ApiError(400, f"invalid selector: '{text}'; can't understand '{term}'")
        name, operator, value = found.groups()
        if name not in known:
            only = ", ".join(f'"{one}"' for one in EVERY)
            own = f'"{name}" is not a known field selector: only {only}'
            core = f"field label not supported: {name}"
            raise ApiError(400, own if kind.group else core)
        tests.append((known[name], operator == "!=", value))

    def test(obj: Object) -> bool:
        return all((_at(obj, path) == value) is not unequal for path, unequal, value in tests)

    return test


def _at(obj: Any, path: FieldPath) -> Any:
    for part in path:
        obj = obj.get(part, "") if isinstance(obj, dict) else ""
    return obj


# --- Patches -------------------------------------------------------------------------------------


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
    """RFC 6902, of which `replace` and, at the end of a list, `add`."""
    result = copy.deepcopy(target)
    for step in operations:
        *parents, last = step["path"].split("/")[1:]
        holder = result
        for part in parents:
            holder = holder[int(part) if isinstance(holder, list) else part]
        if (step["op"], last) == ("add", "-"):
            holder.append(step["value"])
        else:
            assert step["op"] == "replace" and last in holder, step
            holder[last] = step["value"]
    return result


# --- Field ownership -----------------------------------------------------------------------------


class Writer(NamedTuple):
    """Who writes, as managedFields tells it."""

    manager: str
    subresource: str = ""


_SYSTEM = ("name", "namespace", "uid", "resourceVersion", "managedFields", "generation")
_UNOWNED = {*_SYSTEM, "creationTimestamp", "deletionTimestamp"}


def _leaves(value: Any, path: FieldPath = ()) -> dict[FieldPath, Any]:
    """Every leaf of an object by its FieldsV1 path; a list is one leaf, coarser than upstream's."""
    if not isinstance(value, dict) or not value or path[-1:] == ("f:selector",):
        return {path: value}
    is_map = path[-1:] in (("f:annotations",), ("f:labels",))
    found: dict[FieldPath, Any] = {(*path, "."): None} if is_map else {}
    for key, inner in value.items():
        found |= _leaves(inner, (*path, f"f:{key}"))
    return found


def _owned(obj: Object) -> dict[FieldPath, Any]:
    """The leaves that somebody can own."""
    meta = {key: value for key, value in obj["metadata"].items() if key not in _UNOWNED}
    parts = {**obj, "metadata": meta, "apiVersion": None, "kind": None}
    return _leaves({key: value for key, value in parts.items() if value})


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


def managed_fields(old: Object, new: Object, writer: Writer, now: str) -> list[Object]:
    """The ownership after a write: who changed a field last has it, and nobody else."""
    before, after = _owned(old), _owned(new)
    taken = {p for p, v in after.items() if p not in before or before[p] != v}
    lost = taken | (before.keys() - after.keys())
    entries = []
    for entry in old["metadata"].get("managedFields", []):
        paths = _decode(entry["fieldsV1"])
        if taken and (entry["manager"], entry.get("subresource", "")) == writer:
            taken |= paths & after.keys()
        elif paths - lost:
            entries.append({**entry, "fieldsV1": _encode(paths - lost)})
    if taken:
        mine = {
            "manager": writer.manager, "operation": "Update", "apiVersion": new["apiVersion"],
            "time": now, "fieldsType": "FieldsV1", "fieldsV1": _encode(taken),
        }  # fmt: skip
        entries.append(mine | ({"subresource": writer.subresource} if writer.subresource else {}))
    return sorted(entries, key=lambda e: (e["time"], e["manager"], e.get("subresource", "")))


# --- Validation ----------------------------------------------------------------------------------


_DELETION_COST = re.compile(r"0|[1-9][0-9]*|-[0-9]+")  # no plus sign, no leading zero


def validate(kind: Kind, obj: Object) -> None:
    """Upstream's objections to an object, as far as a client of this server can meet them."""
    for problem in _problems(kind, obj):
        raise invalid(kind, obj, problem)


def invalid(kind: Kind, obj: Object, problem: str) -> ApiError:
    qualified = f"{kind.kind}.{kind.group}" if kind.group else kind.kind
    return ApiError(422, f'{qualified} "{obj["metadata"]["name"]}" is invalid: {problem}')


def _problems(kind: Kind, obj: Object) -> Iterator[str]:
    where, annotations = "metadata.annotations", obj["metadata"].get("annotations") or {}
    replicas = obj.get("spec", {}).get("replicas", 0)
    if type(replicas) is not int or replicas < 0:
        yield f"spec.replicas: Invalid value: {replicas}: must be greater than or equal to 0"
    if not all(isinstance(value, str) for value in annotations.values()):
        yield f"{where}: json: cannot unmarshal into type string"
    if sum(len(f"{key}{value}".encode()) for key, value in annotations.items()) > ANNOTATIONS_LIMIT:
        yield f"{where}: Too long: may not be more than {ANNOTATIONS_LIMIT} bytes"
    cost = annotations.get(DELETION_COST, "0")
    if kind.kind == "Pod" and deletion_cost(cost) is None:
        yield f'{where}[{DELETION_COST}]: Invalid value: "{cost}": must be a 32bit integer'
    about = obj.get("involvedObject", {}).get("namespace", "")
    if kind.kind == "Event" and about != obj["metadata"]["namespace"]:
        yield f'involvedObject.namespace: Invalid value: "{about}": does not match event.namespace'


def deletion_cost(value: str) -> int | None:
    """The annotation's value, None where the API server refuses it."""
    if not _DELETION_COST.fullmatch(value) or not -(2**31) <= int(value) < 2**31:
        return None
    return int(value)


# --- Store ---------------------------------------------------------------------------------------


# What the API server adds where a manifest says nothing.
DEFAULTS: Mapping[str, Object] = {
    "Deployment": {
        "replicas": 1,
        "revisionHistoryLimit": 10,
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"},
        },
    },
    "ReplicaSet": {"replicas": 1},
}


class Scale(NamedTuple):
    """One change of a Deployment's spec.replicas."""

    manager: str
    before: int
    after: int


def stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Store:
    """The objects, under one lock, with one cluster-wide revision."""

    def __init__(self, clock: Callable[[], datetime], rng: random.Random) -> None:
        self.lock = threading.RLock()
        self.clock = clock
        self.rng = rng
        self.revision = 1000
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.scales: list[Scale] = []

    def get(self, resource: str, namespace: str, name: str) -> Object | None:
        return self.objects.get((resource, namespace, name))

    def find(self, resource: str, namespace: str) -> list[Object]:
        """Objects in etcd's order."""
        keys = [key for key in self.objects if key[0] == resource and key[1] == namespace]
        return [self.objects[key] for key in sorted(keys)]

    def create(self, kind: Kind, obj: Object, writer: Writer) -> Object:
        obj = {"kind": kind.kind, "apiVersion": kind.api_version, **copy.deepcopy(obj)}
        if kind.group == "apps":
            obj["spec"] = DEFAULTS[kind.kind] | obj["spec"]
            obj["metadata"]["generation"] = 1
        meta, now = obj["metadata"], stamp(self.clock())
        meta["uid"] = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        meta["creationTimestamp"] = now
        meta["managedFields"] = managed_fields({"metadata": {}}, obj, writer, now)
        return self._put(obj)

    def update(self, old: Object, new: Object, writer: Writer) -> Object:
        """Writes `new` over `old`, or nothing at all where nothing differs."""
        # No part of an object that is stored changes, so that objects may have parts in common.
        meta = {**new["metadata"]}
        new = {**new, "metadata": meta}
        meta |= {key: old["metadata"][key] for key in _SYSTEM if key in old["metadata"]}
        if not meta.get("annotations"):
            meta.pop("annotations", None)
        if new == old:
            return old
        if writer.subresource != "status" and _moves_on(old, new):
            meta["generation"] += 1
        meta["managedFields"] = managed_fields(old, new, writer, stamp(self.clock()))
        if old["kind"] == "Deployment":
            before, after = wanted_replicas(old), wanted_replicas(new)
            if before != after:
                self.scales.append(Scale(writer.manager, before, after))
        return self._put(new)

    def remove(self, obj: Object) -> None:
        self.revision += 1
        self.objects.pop(_key(obj), None)

    def _put(self, obj: Object) -> Object:
        self.revision += 1
        obj["metadata"]["resourceVersion"] = str(self.revision)
        self.objects[_key(obj)] = obj
        return obj


def _moves_on(old: Object, new: Object) -> bool:
    """Whether a write is a new generation: for a Deployment with its annotations, as these are
    copied to its ReplicaSets."""
    before, after = (obj["metadata"].get("annotations") for obj in (old, new))
    annotated = old["kind"] == "Deployment" and before != after
    return "generation" in old["metadata"] and (annotated or old["spec"] != new["spec"])


def _key(obj: Object) -> tuple[str, str, str]:
    return f"{obj['kind'].lower()}s", obj["metadata"]["namespace"], obj["metadata"]["name"]


def wanted_replicas(obj: Object) -> int:
    return int(obj["spec"].get("replicas", 1))


# --- Who controls what ---------------------------------------------------------------------------


def uid_of(obj: Object) -> str:
    return str(obj["metadata"]["uid"])


def controller_of(obj: Object) -> str:
    """The uid of the controller, "" for an orphan."""
    for owner in obj["metadata"].get("ownerReferences") or ():
        if owner.get("controller"):
            return str(owner["uid"])
    return ""


def controller_reference(owner: Object) -> Object:
    same = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "uid": uid_of(owner)}
    return {**same, "name": owner["metadata"]["name"], "controller": True}


def replace_controller(obj: Object, reference: Object | None) -> Object:
    """The object with another controller, or with none."""
    references = [o for o in obj["metadata"].get("ownerReferences") or () if not o["controller"]]
    references += [reference] if reference else []
    result: Object = merge(obj, {"metadata": {"ownerReferences": references or None}})
    return result
