"""The API of the Kubernetes fake: who may do what, and what each verb does."""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import yaml

from tests.support.kubernetes_controllers import (
    Controllers,
    _owner,
    _uid,
)
from tests.support.kubernetes_objects import (
    KINDS,
    KNOWN_PATHS,
    SCALE,
    ApiError,
    Kind,
    Object,
    Request,
    Store,
    Writer,
    apply_patch,
    conflict,
    not_found,
    parse_field_selector,
    parse_selector,
    set_defaults,
    validate,
    wanted_replicas,
)

# --- Who may do what -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """Whom a request comes from; nobody knows one without a name."""

    name: str = ""
    admin: bool = False


@dataclass
class Access:
    """Bearer tokens and, once a manifest is loaded, RBAC. Without rules everybody may do all."""

    tokens: dict[str, Identity] = field(default_factory=dict)
    rules: list[tuple[str, str, Object]] | None = None  # user, namespace, rule

    def load(self, manifest: str, namespace: str) -> None:
        """Adds the Roles that RoleBindings of a multi-document YAML text give service accounts."""
        documents = list(yaml.safe_load_all(manifest))
        roles = {d["metadata"]["name"]: d["rules"] for d in documents if d["kind"] == "Role"}
        self.rules = self.rules or []
        for binding in documents:
            if binding["kind"] == "RoleBinding":
                home = binding["metadata"].get("namespace", namespace)
                for subject in binding["subjects"]:
                    user = f"system:serviceaccount:{subject['namespace']}:{subject['name']}"
                    rules = roles[binding["roleRef"]["name"]]
                    self.rules += [(user, home, rule) for rule in rules]

    def identify(self, headers: Mapping[str, str]) -> Identity:
        """Whose token this is or, from an administrator, whom it is to stand for."""
        # "bearer" as well: the Python client writes it so inside a cluster.
        scheme, _, token = headers.get("authorization", "").partition(" ")
        caller = self.tokens.get(token.strip() if scheme.lower() == "bearer" else "", Identity())
        other = headers.get("impersonate-user", "")
        return Identity(other if caller.admin else "") if other else caller

    def check(self, who: Identity, request: Request) -> None:
        if not who.name:
            raise ApiError(401, "Unauthorized")
        if self.rules is None or who.admin:
            return
        where = (who.name, request.namespace)
        if not any((u, space) == where and _allows(rule, request) for u, space, rule in self.rules):
            raise forbidden(request)


def _allows(rule: Object, request: Request) -> bool:
    """Whether it does so by name: no wildcards here."""
    names = rule.get("resourceNames")
    # The name of what is created is not in the path, so resourceNames never allow a create.
    named = not names or (request.verb != "create" and request.name in names)
    resource = "/".join(filter(None, (request.resource, request.subresource)))
    place = request.group in rule["apiGroups"] and resource in rule["resources"]
    return named and place and request.verb in rule["verbs"]


def forbidden(request: Request) -> ApiError:
    resource = "/".join(filter(None, (request.resource, request.subresource)))
    what = ".".join(filter(None, (request.resource, request.group)))
    named = f' "{request.name}"' if request.name else ""
    space = f'in the namespace "{request.namespace}"'
    return ApiError(403, (
        f'{what}{named} is forbidden: User "{request.user}" cannot {request.verb} resource'
        f' "{resource}" in API group "{request.group}" {space}'
    ))  # fmt: skip


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

    def _dispatch(self, request: Request, content_type: str) -> tuple[int, Object]:
        if request.path == "/version":
            return 200, {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        kind = KINDS.get(request.resource)
        known = kind is not None and kind.group == request.group
        if kind is None or not known or request.subresource not in kind.verbs:
            raise ApiError(404, "the server could not find the requested resource")
        named_create = request.verb == "create" and request.name
        if named_create or request.verb not in kind.verbs[request.subresource].split():
            text = "the server does not allow this method on the requested resource"
            raise ApiError(405, text)
        if request.verb == "list":
            return 200, self._list(kind, request)
        if request.verb == "create":
            return 201, self._create(kind, request)
        obj = self.store.get(kind.resource, request.namespace, request.name)
        if obj is None:
            raise not_found(kind, request.name)
        if request.verb == "delete":
            return 200, self._delete(obj)
        if request.verb == "patch":
            obj = self._write(kind, obj, request, content_type)
        return 200, scale_of(obj) if request.subresource == "scale" else obj

    def _list(self, kind: Kind, request: Request) -> Object:
        """All of it at once: a page may be longer than `limit`, and then is the only one."""
        selected = parse_selector(request.query.get("labelSelector", ""))
        fields = parse_field_selector(request.query.get("fieldSelector", ""))
        items = [
            {key: value for key, value in obj.items() if key not in ("kind", "apiVersion")}
            for obj in self.store.find(kind.resource, request.namespace)
            if fields(obj) and selected(obj["metadata"].get("labels") or {})
        ]
        metadata = {"resourceVersion": str(self.store.revision)}
        named = {"kind": f"{kind.kind}List", "apiVersion": kind.api_version}
        return {**named, "metadata": metadata, "items": items}

    def _create(self, kind: Kind, request: Request) -> Object:
        obj = _body_object(kind, request)
        meta = obj["metadata"]
        set_defaults(kind, obj)
        obj.pop("status", None)
        validate(kind, obj)
        if self.store.get(kind.resource, request.namespace, meta["name"]):
            text = f'{kind.qualified} "{meta["name"]}" already exists'
            raise ApiError(409, text, "AlreadyExists")
        obj = self.store.create(kind, obj, writer_of(request))
        self._touch(kind, obj)
        return obj

    def _write(self, kind: Kind, old: Object, request: Request, content_type: str) -> Object:
        """PATCH of an object or of its scale."""
        scaling = request.subresource == "scale"
        shown_kind, shown = (SCALE, scale_of(old)) if scaling else (kind, old)
        new = copy.deepcopy(apply_patch(shown, request.body, content_type))
        read = new["metadata"].get("resourceVersion")
        if read and read != old["metadata"]["resourceVersion"]:
            raise conflict(kind, request.name)
        validate(shown_kind, new)
        if scaling:
            replicas = new.get("spec", {}).get("replicas", 0)
            new = {**old, "spec": {**old["spec"], "replicas": replicas}}
        else:
            # The status is written through a subresource alone, which this server has not.
            new["status"] = old.get("status")
            set_defaults(kind, new)
        new = self.store.update(kind, old, new, writer_of(request))
        if new is not old:
            self._touch(kind, new)
        return new

    def _delete(self, pod: Object) -> Object:
        self.controllers.delete_pod(pod)
        self.touch_owner(pod)
        return pod

    def _touch(self, kind: Kind, obj: Object) -> None:
        """Wakes the controllers for the Deployment that a write is about."""
        if kind.resource == "deployments":
            self.touched(obj["metadata"]["namespace"], obj["metadata"]["name"])
        elif kind.resource == "pods":
            self.touch_owner(obj)

    def touch_owner(self, pod: Object) -> None:
        for owned in self.store.find("replicasets", pod["metadata"]["namespace"]):
            if _uid(owned) == _owner(pod):
                owner = owned["metadata"]["ownerReferences"][0]["name"]
                self.touched(pod["metadata"]["namespace"], owner)


def writer_of(request: Request) -> Writer:
    """Field manager: as named, else the User-Agent up to its first slash."""
    manager = request.query.get("fieldManager") or request.user_agent.split("/")[0] or "unknown"
    return Writer(manager, request.subresource)


def _body_object(kind: Kind, request: Request) -> Object:
    """The object in the body of a create or update, checked against the path."""
    if not isinstance(request.body, dict):
        raise ApiError(400, "the request body is not an object")
    obj = copy.deepcopy(request.body)
    meta = obj.setdefault("metadata", {})
    if meta.setdefault("namespace", request.namespace) != request.namespace:
        raise ApiError(400, "the namespace of the object is not that of the request")
    return {"kind": kind.kind, "apiVersion": kind.api_version, **obj}


def scale_of(deployment: Object) -> Object:
    """The Scale that stands for a Deployment; as upstream's, it omits `replicas: 0`."""
    meta, replicas = deployment["metadata"], wanted_replicas(deployment)
    shown = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {k: meta[k] for k in shown if k in meta},
        "spec": {"replicas": replicas} if replicas else {},
        "status": {"replicas": deployment.get("status", {}).get("replicas", 0)},
    }
