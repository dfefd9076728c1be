"""The API of the Kubernetes fake: who may do what, and what each verb does."""

from __future__ import annotations

import json
import secrets
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from tests.support.kubernetes_controllers import Controllers
from tests.support.kubernetes_objects import (
    KINDS,
    ApiError,
    Kind,
    Object,
    Request,
    Store,
    Writer,
    conflict,
    invalid,
    merge,
    not_found,
    parse_fields,
    parse_selector,
    validate,
    wanted_replicas,
)

# --- Who may do what -----------------------------------------------------------------------------


@dataclass
class Access:
    """Bearer tokens and, once a manifest is loaded, RBAC. Without rules everybody may do all."""

    tokens: dict[str, str] = field(default_factory=dict)  # to the user's name
    admins: set[str] = field(default_factory=set)
    rules: list[tuple[str, str, Object]] | None = None  # user, namespace, rule

    def load(self, manifest: str) -> None:
        """Adds the Roles that RoleBindings of a multi-document YAML text give service accounts."""
        documents = list(yaml.safe_load_all(manifest))
        roles = {d["metadata"]["name"]: d["rules"] for d in documents if d["kind"] == "Role"}
        self.rules = self.rules or []
        for binding in (d for d in documents if d["kind"] == "RoleBinding"):
            home = binding["metadata"].get("namespace", "default")
            for subject in binding["subjects"]:
                user = f"system:serviceaccount:{subject['namespace']}:{subject['name']}"
                self.rules += [(user, home, rule) for rule in roles[binding["roleRef"]["name"]]]

    def identify(self, headers: Mapping[str, str]) -> str:
        """Whose token this is or, from an administrator, whom it is to stand for. "": nobody's."""
        # "bearer" as well: the Python client writes it so inside a cluster.
        scheme, _, token = headers.get("authorization", "").partition(" ")
        user = self.tokens.get(token.strip(), "") if scheme.lower() == "bearer" else ""
        return headers.get("impersonate-user", user) if user in self.admins else user

    def check(self, request: Request) -> None:
        if not request.user:
            raise ApiError(401, "Unauthorized")
        if self.rules is None or request.user in self.admins:
            return
        mine = [rule for *who, rule in self.rules if who == [request.user, request.namespace]]
        if not any(_allows(rule, request) for rule in mine):
            raise forbidden(request)


def _allows(rule: Object, request: Request) -> bool:
    """Whether it does so by name: no wildcards here."""
    # The name of what is created is not in the path, so resourceNames never allow a create.
    named = not rule.get("resourceNames") or request.name in rule["resourceNames"]
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


MERGE_PATCHES = ("application/merge-patch+json", "application/strategic-merge-patch+json")


class Api:
    """What each verb does to the store, and its answer."""

    def __init__(self, store: Store, access: Access, controllers: Controllers) -> None:
        self.store = store
        self.access = access
        self.controllers = controllers
        # By token: the revision and the rest of a list, which is read to its end as it was.
        self.pages: dict[str, tuple[int, list[Object]]] = {}

    def answer(self, request: Request, content_type: str) -> Answer:
        try:
            with self.store.lock:
                self.access.check(request)
                return json_answer(*self._dispatch(request, content_type))
        except ApiError as error:
            return json_answer(error.code, error.status)
        except Exception as error:  # a bug of the fake: say so instead of dropping the connection
            traceback.print_exc()
            return json_answer(500, ApiError(500, f"Internal error occurred: {error!r}").status)

    def _dispatch(self, request: Request, content_type: str) -> tuple[int, Object]:
        kind, subresource = KINDS.get(request.resource), request.subresource
        if kind is None or kind.group != request.group or subresource not in kind.verbs:
            raise ApiError(404, "the server could not find the requested resource")
        known = request.verb in kind.verbs[subresource].split()
        if not known or (request.verb == "create" and request.name):
            raise ApiError(405, "the server does not allow this method on the requested resource")
        if request.verb == "list":
            return 200, self._list(kind, request)
        if request.verb == "create":
            created = self._create(kind, request)
            self.controllers.reconcile(request.namespace)
            return 201, created
        obj = self.store.get(kind.resource, request.namespace, request.name)
        if obj is None:
            raise not_found(kind, request.name)
        if request.verb == "delete":
            orphan = (request.body or request.query).get("propagationPolicy") == "Orphan"
            self.controllers.delete(obj, orphan)
        elif request.verb == "patch":
            obj = self._patch(kind, obj, request, content_type)
        if request.verb != "get":
            self.controllers.reconcile(request.namespace)
        return 200, scale_of(obj) if subresource == "scale" else obj

    def _list(self, kind: Kind, request: Request) -> Object:
        """A page of at most `limit`. As upstream, what does not meet the selectors does not count
        for the limit, but may be all that a next page would have had."""
        query, found = request.query, self.store.find(kind.resource, request.namespace)
        labelled = parse_selector(query.get("labelSelector", ""))
        selected = parse_fields(kind, query.get("fieldSelector", ""))
        revision, limit = self.store.revision, int(query.get("limit") or 0)
        if token := query.get("continue"):
            if token not in self.pages:
                raise ApiError(400, "invalid continue token: continue key is not valid")
            revision, found = self.pages[token]
        items: list[Object] = []
        meta = {"resourceVersion": str(revision)}
        for position, obj in enumerate(found):
            if limit and len(items) == limit:
                meta["continue"] = secrets.token_urlsafe(60)
                self.pages[meta["continue"]] = (revision, found[position:])
                break
            if labelled(obj["metadata"].get("labels") or {}) and selected(obj):
                items.append({k: v for k, v in obj.items() if k not in ("kind", "apiVersion")})
        named = {"kind": f"{kind.kind}List", "apiVersion": kind.api_version}
        return {**named, "metadata": meta, "items": items}

    def _create(self, kind: Kind, request: Request) -> Object:
        obj: Object = merge({"metadata": {"namespace": request.namespace}}, request.body)
        name = obj["metadata"]["name"]
        validate(kind, obj)
        if self.store.get(kind.resource, request.namespace, name):
            raise ApiError(409, f'{kind.qualified} "{name}" already exists', "AlreadyExists")
        return self.store.create(kind, obj, writer_of(request))

    def _patch(self, kind: Kind, old: Object, request: Request, content_type: str) -> Object:
        """PATCH of an object or of its scale."""
        scaling = request.subresource == "scale"
        if content_type not in MERGE_PATCHES:
            raise ApiError(415, "415: Unsupported Media Type")
        new = merge(scale_of(old) if scaling else old, request.body)
        read = new["metadata"].get("resourceVersion")
        if read and read != old["metadata"]["resourceVersion"]:
            raise conflict(kind, request.name)
        if new["metadata"]["uid"] != old["metadata"]["uid"]:
            raise invalid(kind, new, "metadata.uid: Invalid value: field is immutable")
        if scaling:
            new = merge(old, {"spec": {"replicas": new["spec"].get("replicas", 0)}})
        validate(kind, new)
        return self.store.update(old, new, writer_of(request))


def writer_of(request: Request) -> Writer:
    """Field manager: as named, else the User-Agent up to its first slash."""
    manager = request.query.get("fieldManager") or request.user_agent.split("/")[0] or "unknown"
    return Writer(manager, request.subresource)


def scale_of(deployment: Object) -> Object:
    """The Scale that stands for a Deployment; as upstream's, it omits `replicas: 0`."""
    meta, replicas = deployment["metadata"], wanted_replicas(deployment)
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {key: meta[key] for key in ("name", "namespace", "uid", "resourceVersion")},
        "spec": {"replicas": replicas} if replicas else {},
        "status": {"replicas": deployment.get("status", {}).get("replicas", 0)},
    }
