"""guardrails.yaml, evaluated here by Google's CEL.

What the scaler's patches change has to be all that the policies allow, and nothing else: the acts
that tests/e2e/forbidden.py tries on a real cluster are tried on the expressions themselves.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from typing import Any

import pytest
from cel_expr_python import cel  # type: ignore[import-not-found, import-untyped, unused-ignore]
from cel_expr_python.ext import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    ext_strings,
)

import scaler
from tests.e2e import forbidden
from tests.e2e.forbidden import ACCOUNTS, BOUND, COST, MINE, NAME, OTHER, PAUSES, Act, life
from tests.support.kubernetes_objects import json_patch, merge
from tests.support.world import REPOSITORY
from tests.test_manifests import load, one, settings, whole_life

pytestmark = pytest.mark.slow

Object = dict[str, Any]
HASH = "5d4f8"
REMOVABLE = ("metadata", "annotations", MINE + "of-an-older-version")

# What `authorizer` is asked, word by word; the Role of rbac.yaml answers that the account may patch
# the Deployment NAME.
ROLE = {"group": "apps", "resource": "deployments", "namespace": "default", "name": NAME,
        "check": "patch"}  # fmt: skip


def member_function(name: str, result: Any, arguments: int, function: Any) -> Any:
    taken = [cel.Type.MAP, *[cel.Type.STRING] * arguments]
    return cel.FunctionDecl(name, [cel.Overload(name, result, taken, True, function)])


AUTHORIZER = [
    *(
        member_function(
            word, cel.Type.MAP, 1, lambda asked, value, word=word: {**asked, word: value}
        )
        for word in ROLE
    ),
    member_function("allowed", cel.Type.BOOL, 0, lambda asked: asked == ROLE),
]


@cache
def compiled(expression: str) -> Any:
    names = ("object", "oldObject", "request", "variables", "params", "authorizer")
    known = dict.fromkeys(names, cel.Type.DYN)
    extensions = [ext_strings.ExtStrings()]
    return cel.NewEnv(variables=known, extensions=extensions, functions=AUTHORIZER).compile(
        expression
    )


def evaluate(expression: str, known: Object) -> Any:
    """Raises ValueError where the evaluation ends in an error."""
    value = compiled(expression).eval(data=known)
    if value.type() == cel.Type.ERROR:
        raise ValueError(str(value.value()))
    return value.plain_value()


def account(name: str, labelled: bool) -> Object:
    label = {"labels": {MINE + "guardrails": "true"}} if labelled else {}
    return {"metadata": {"namespace": "default", "name": name, **label}}


def selects(selector: Object, param: Object) -> bool:
    (term,) = selector["matchExpressions"]
    return (term["key"] in param["metadata"].get("labels", {})) is (term["operator"] == "Exists")


def covers(rule: Object, request: Object) -> bool:
    resource = request["resource"]
    asked = {"apiGroups": resource["group"], "apiVersions": resource["version"],
             "operations": request["operation"],
             "resources": resource["resource"] + "/" * ("subResource" in request)}  # fmt: skip
    return all({"*", "*/*", value} & set(rule[key]) for key, value in asked.items())


@cache
def policies() -> list[tuple[Object, Object]]:
    """Each policy's spec with its binding's."""
    specs = [each["spec"] for each in load("guardrails.yaml")]
    return list(zip(specs[::2], specs[1::2], strict=True))


GROUPS = {"deployments": "apps", "pods": "", "events": ""}


def refusals(
    resource: str,
    old: Object | None,
    new: Object | None,
    account_name: str = "queue-scaler",
    labelled: bool = True,
    group: str | None = None,
    **more: Any,
) -> list[str]:
    """The messages with which the policies refuse a request of an account; none where they let it
    pass. An expression that cannot be evaluated refuses (failurePolicy: Fail)."""
    request = {
        "operation": "UPDATE",
        "userInfo": {"username": f"system:serviceaccount:default:{account_name}"},
        "namespace": "default",
        "resource": {"group": GROUPS[resource] if group is None else group, "version": "v1",
                     "resource": resource},
        "options": {"fieldManager": "queue-scaler"},
        **more,
    }  # fmt: skip
    params = [account(account_name, labelled), account("default", False), account("other", True)]
    return [
        message
        for policy, binding in policies()
        for param in params
        if selects(binding["paramRef"]["selector"], param)
        and any(covers(rule, request) for rule in policy["matchConstraints"]["resourceRules"])
        for message in judged(policy, {
            "object": new, "oldObject": old, "request": request, "variables": {}, "params": param,
            "authorizer": {},
        })
    ]  # fmt: skip


def judged(policy: Object, known: Object) -> Iterator[str]:
    if not all(evaluate(each["expression"], known) for each in policy["matchConditions"]):
        return
    for each in policy.get("variables", []):
        try:
            known["variables"][each["name"]] = evaluate(each["expression"], known)
        except ValueError:  # a real API server evaluates them only where they are used
            continue
    for each in policy["validations"]:
        try:
            passed = evaluate(each["expression"], known) is True
        except ValueError:
            passed = False
        if not passed:
            yield str(each["message"])


def patched(old: Object, body: Any) -> Object:
    """The object as admission sees it after a patch: the API server has done its part."""
    new: Object = json_patch(old, body) if isinstance(body, list) else merge(old, body)
    new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
    new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
    if new["metadata"].get("managedFields") == [{}]:
        del new["metadata"]["managedFields"]
    return new


def entry(manager: str, operation: str = "Update", **fields: Any) -> Object:
    """One of the managedFields, of a subresource where the manager is `NAME/SUBRESOURCE`."""
    manager, _, subresource = manager.partition("/")
    return {"manager": manager, "operation": operation, "apiVersion": "apps/v1",
            **({"subresource": subresource} if subresource else {}),
            "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1",
            "fieldsV1": {f"f:{name}": value for name, value in fields.items()}}  # fmt: skip


REPLICAS: Object = {"f:replicas": {}}
TEMPLATE: Object = {"f:template": {"f:spec": {}}}


def stored(obj: Object) -> Object:
    """An object as the API server stores it, with the metadata that it adds."""
    obj = copy.deepcopy(obj)
    creation = entry(
        "kubectl-create", metadata={"f:labels": {"f:app": {}}}, spec={**REPLICAS, "f:template": {}}
    )
    obj["metadata"] |= {
        "namespace": "default", "uid": "0-0-0", "resourceVersion": "7", "generation": 1,
        "creationTimestamp": "2026-01-01T00:00:00Z", "managedFields": [creation],
    }  # fmt: skip
    return obj


def deployment(**annotations: str) -> Object:
    obj = stored(forbidden.deployment(NAME))
    obj["metadata"]["annotations"] |= {MINE + k: v for k, v in annotations.items()}
    obj["spec"] |= {
        "progressDeadlineSeconds": 600,
        "revisionHistoryLimit": 10,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%"}},
    }
    obj["spec"]["template"]["metadata"]["creationTimestamp"] = None
    return obj


def pod(owner: str = NAME) -> Object:
    """A pod of that Deployment."""
    template = forbidden.deployment(NAME)["spec"]["template"]
    obj = stored({"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)})
    replica_set = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"{owner}-{HASH}",
                   "uid": "1", "controller": True}  # fmt: skip
    obj["metadata"] |= {"name": f"{owner}-{HASH}-x", "ownerReferences": [replica_set]}
    obj["metadata"]["labels"]["pod-template-hash"] = HASH
    obj["metadata"]["annotations"][REMOVABLE[-1]] = "x"  # of a pod it may not
    return obj


OBJECTS: dict[str, Callable[[], Object]] = {"deployments": deployment, "pods": pod}


def created(event: Object) -> Object:
    """An Event as admission sees it."""
    event = {"eventTime": None, **copy.deepcopy(event)}
    now = forbidden.event("default")["firstTimestamp"]
    written = entry("queue-scaler", count={}, message={}, source={"f:component": {}})
    event["metadata"] |= {"creationTimestamp": now, "uid": "1", "managedFields": [written]}
    return event


PATH = re.compile(r"/apis?/(?:([a-z0-9.]+)/)?v1/namespaces/default/(\w+)(?:/[\w-]+)?(?:/(\w+))?")
OPERATIONS = {"POST": "CREATE", "PATCH": "UPDATE", "DELETE": "DELETE"}
CONNECTIONS = ("exec", "attach", "portforward")
# What the API server itself does before admission, or the Role refuses, is tried on a real one.
REAL_ONLY = (
    "Deployment: scale in CI's name", "a pod of nobody's: mark", "another Deployment: scale",
)  # fmt: skip
CORE, OLD_GROUP = "/api/v1/namespaces/default", "/apis/extensions/v1/namespaces/default"
MORE = (
    Act("pod: resize", "PATCH", f"{CORE}/pods/own/resize", {}),
    Act("Event: change", "PATCH", f"{CORE}/events/new", {}),
    Act("Deployment: by another group", "PATCH", f"{OLD_GROUP}/deployments/{NAME}", {}),
)


def request_of(act: Act) -> tuple[str, str, str, str]:
    """What an act is to admission: operation, group, resource and subresource."""
    path = PATH.match(act.path)
    assert path
    group, resource, subresource = (part or "" for part in path.groups())
    operation = "CONNECT" if subresource in CONNECTIONS else OPERATIONS[act.method]
    return operation, group, resource, subresource


def tried(acts: Iterable[Act]) -> list[Any]:
    return [
        pytest.param(act, id=act.what)
        for act in acts
        if act.method in OPERATIONS and PATH.match(act.path) and act.what not in REAL_ONLY
    ]


def refused(act: Act) -> list[str]:
    operation, group, resource, subresource = request_of(act)
    more: Object = {"subResource": subresource} if subresource else {}
    old = OBJECTS.get(resource, pod)() if act.method != "POST" else None
    if old is None:
        new = created(act.body or {"metadata": {}})
    else:
        new = patched(old, act.sent(old) or {})
    return refusals(resource, old, new, group=group, operation=operation, **more)


FORBIDDEN = tried([*forbidden.acts("default", "other", "own"), *MORE])
LIFE = tried(life("default", "own"))
REQUESTS = {request_of(param.values[0]) for param in LIFE}


def test_most_acts_are_tried_here() -> None:
    assert len(FORBIDDEN) >= 110 and len(LIFE) >= 10


@pytest.mark.parametrize("act", FORBIDDEN)
def test_it_refuses(act: Act) -> None:
    """Whatever is no request that the scaler makes, for that reason."""
    found = refused(act)
    assert found and ("may only patch" in found[0]) is (request_of(act) not in REQUESTS)


@pytest.mark.parametrize("act", LIFE)
def test_it_lets_the_scaler(act: Act) -> None:
    assert not refused(act)


@pytest.mark.parametrize(("pause", "replicas", "allowed"), PAUSES, ids=str)
def test_a_pause_binds_it(pause: dict[str, str], replicas: int, allowed: bool) -> None:
    old = deployment(**pause)
    new = patched(old, {"spec": {"replicas": replicas}})
    assert (refusals("deployments", old, new) == []) is allowed
    for name in pause:
        removal = forbidden.annotate(**{MINE + name: None})
        assert refusals("deployments", old, patched(old, removal)), f"it may remove {name}"
    stamp = forbidden.annotate(**{scaler.FAILING_SINCE: "2026-01-01T00:00:00Z"})
    assert not refusals("deployments", old, patched(old, stamp))


def test_it_may_remove_the_last_annotation() -> None:
    old, new = deployment(), deployment()
    old["metadata"]["annotations"] = {scaler.RECOMMENDATIONS: "1767225600:3"}
    del new["metadata"]["annotations"]
    assert not refusals("deployments", old, new)


def test_it_may_mark_only_pods_of_a_deployment_that_it_may_patch() -> None:
    mark = {"metadata": {"annotations": {COST: "1"}}}
    nobodys = {**pod(), "metadata": {**pod()["metadata"], "ownerReferences": []}}
    others = [pod(OTHER), pod(f"{NAME}-canary"), nobodys]
    changes: list[Object] = [{"kind": "StatefulSet"}, {"apiVersion": "example.com/v1"},
                             {"controller": False}, {"name": f"{NAME}-other"}]  # fmt: skip
    for change in changes:
        others.append(pod())
        others[-1]["metadata"]["ownerReferences"][0] |= change
    for each in others:
        assert refusals("pods", each, patched(each, mark))
    assert not refusals("pods", pod(), patched(pod(), mark))


@pytest.mark.parametrize(
    ("manager", "fields"),
    [
        ("kubelet", {"f:count": {}}),
        ("queue-scaler", {f"f:{number}": {} for number in range(13)}),
        ("queue-scaler", {"f:count": {f"f:{number}": {} for number in range(9)}}),
        ("queue-scaler", {"f:" + "x" * 40: {}}),
        ("queue-scaler", {"f:count": {"f:" + "x" * 40: {}}}),
        ("queue-scaler", {"f:count": {"f:x": {"f:y": {}}}}),
    ],
)
def test_the_managed_fields_of_an_event_are_few_and_its_own(manager: str, fields: Object) -> None:
    event = created(forbidden.event("default"))
    assert not refusals("events", None, event, operation="CREATE")
    event["metadata"]["managedFields"] = [entry(manager) | {"fieldsV1": fields}]
    assert refusals("events", None, event, operation="CREATE")


def test_an_event_has_no_event_time_and_is_about_its_own_namespace() -> None:
    """A real API server refuses both before admission."""
    about = {**forbidden.event("default")["involvedObject"], "namespace": "other"}
    for change in ({"eventTime": "2026-01-01T00:00:00.000000Z"}, {"involvedObject": about}):
        event = created(forbidden.event("default", **change))
        assert refusals("events", None, event, operation="CREATE"), change


def test_the_longest_history_that_looks_every_second_leave_fits_with_little_room() -> None:
    """Both windows as long as they can be, the greatest numbers, and a past twice as long. That
    the policies allow it is one of the acts."""
    now, most = 1767229200, scaler.INT32_MAX
    names = {"SCALE_UP_STABILIZATION_SECONDS": "3600", "MAX_REPLICAS": str(most),
             "SCALE_DOWN_STABILIZATION_SECONDS": "3600"}  # fmt: skip
    chosen = scaler.read_settings({"DEPLOYMENT": NAME, "QUEUE_COLLECTION": "jobs", **names})
    past = " ".join(f"{now - age}:{most}" for age in range(1, 7200))
    when = datetime.fromtimestamp(now, UTC)
    state = scaler.parse_state({scaler.RECOMMENDATIONS: past}, chosen, when)
    inputs = scaler.Inputs(when, most - 1, state)
    longest = scaler.write_history(scaler.new_history(chosen, inputs, most, 0)) or ""
    assert longest == forbidden.history(now)
    assert 0.95 * 80_000 < len(longest) <= 80_000


# managedFields before and after a scale, and what the API server itself does to the entries


def keys(*names: str, under: str = "annotations") -> Object:
    return {f"f:{under}": {name if name == "." else f"f:{name}": {} for name in names}}


TIME, PAUSE = keys(scaler.LAST_SCALE_TIME), keys(scaler.PAUSED)
BOTH, X, XY = keys(scaler.LAST_SCALE_TIME, scaler.PAUSED), keys("x"), keys("x", "y")
LABEL_X, LABEL_XY = keys("x", under="labels"), keys("x", "y", under="labels")
OWN_AS_LABEL = keys(scaler.LAST_SCALE_TIME, under="labels")
DEEPER: Object = {"f:template": {"f:spec": {"f:containers": {}}}}
OWN = entry("queue-scaler", spec=REPLICAS, metadata=TIME)
CI, PERSON = entry("ci", "Apply", spec=TEMPLATE), entry("kubectl-annotate", metadata=PAUSE)
OLD = entry("a", spec=TEMPLATE)


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        ([entry("ci", spec={**REPLICAS, **TEMPLATE})], [entry("ci", spec=TEMPLATE), OWN], True),
        ([entry("kubectl-patch", spec=REPLICAS)], [OWN], True),
        ([entry("kubectl-annotate", metadata=TIME)], [OWN], True),
        ([CI], [CI, OWN], True),
        ([OLD, entry("b", metadata=PAUSE)],
         [entry("ancient-changes", spec=TEMPLATE, metadata=PAUSE), OWN], True),
        ([entry("ancient-changes", metadata=PAUSE), OLD],
         [entry("ancient-changes", spec=TEMPLATE, metadata=PAUSE), OWN], True),
        ([entry("ancient-changes", metadata=PAUSE), OLD],
         [entry("ancient-changes", spec=TEMPLATE), OWN], False),
        ([CI], [CI, entry("security", "Apply", spec=TEMPLATE)], False),
        ([CI], [OWN], False),
        ([PERSON], [OWN], False),
        ([PERSON], [entry("kubectl", metadata=PAUSE)], False),
        ([CI, PERSON], [entry("ci", "Apply", spec=TEMPLATE, metadata=PAUSE)], False),
        ([entry("ci", spec=TEMPLATE)], [entry("ci", spec={**TEMPLATE, **REPLICAS})], False),
        ([OLD], [entry("ancient-changes", spec={**TEMPLATE, **REPLICAS})], False),
        ([CI], [entry("ancient-changes", spec=TEMPLATE)], False),
        ([OLD], [entry("ancient-changes/scale", spec=TEMPLATE)], False),
        ([OLD], [OLD, entry("ancient-changes", spec=TEMPLATE)], False),
        ([entry("ci", "Apply", spec=REPLICAS)],
         [entry("ancient-changes", spec=REPLICAS), OWN], False),
        ([entry("ci/scale", spec=TEMPLATE)], [entry("ci", spec=TEMPLATE)], False),
        ([OLD], [entry("ancient-changes", "Apply", spec=TEMPLATE)], False),
        ([entry("a", metadata=BOTH)], [entry("a", metadata=PAUSE), OWN], True),
        ([entry("a", metadata=BOTH)], [entry("a", metadata=TIME), OWN], False),
        ([entry("a", metadata=TIME)], [entry("a", metadata=BOTH)], False),
        ([entry("a", metadata=LABEL_XY)], [entry("a", metadata=LABEL_X)], False),
        ([entry("a", metadata=LABEL_X)], [entry("a", metadata=LABEL_XY)], False),
        ([entry("a", metadata=keys(".", scaler.LAST_SCALE_TIME))], [OWN], True),
        ([entry("a", metadata=keys(".", scaler.LAST_SCALE_TIME, "x"))],
         [entry("a", metadata=X), OWN], True),
        ([CI], [entry("ci", "Apply", spec=DEEPER)], False),
        ([entry("a", status=REPLICAS)], [OWN], False),
        ([entry("a", spec=TIME)], [OWN], False),
        ([entry("a", metadata=OWN_AS_LABEL)], [OWN], False),
        ([entry("a", metadata=BOTH)], [entry("ancient-changes", metadata=PAUSE), OWN], True),
        ([entry("a", metadata=XY)], [entry("ancient-changes", metadata=X), OWN], False),
        ([entry("a", metadata=X)], [entry("ancient-changes", metadata=XY), OWN], False),
        ([entry("a", metadata=LABEL_XY)], [entry("ancient-changes", metadata=LABEL_X)], False),
        ([entry("a", metadata=LABEL_X)], [entry("ancient-changes", metadata=LABEL_XY)], False),
        ([entry("a", metadata=X)], [entry("ancient-changes", metadata={**X, **LABEL_X})], False),
        ([entry("a", metadata=X)], [entry("ancient-changes", metadata=X, spec=TEMPLATE)], False),
        ([], [entry("queue-scaler", metadata=keys(".", scaler.LAST_SCALE_TIME))], True),
        ([], [entry("queue-scaler", status=REPLICAS)], False),
        ([], [entry("queue-scaler", spec=TIME)], False),
        ([], [entry("queue-scaler", metadata=OWN_AS_LABEL)], False),
        ([], [entry("queue-scaler", spec={"f:replicas": TEMPLATE})], False),
        ([], [entry("queue-scaler", metadata={"f:annotations": {"f:" + scaler.LAST_SCALE: X}})],
         False),
        ([], [entry("queue-scaler", spec=TEMPLATE)], False),
        ([], [entry("queue-scaler", metadata=PAUSE)], False),
        ([], [entry("queue-scaler", "Apply", spec=REPLICAS)], False),
        ([], [entry("queue-scaler/scale", spec=REPLICAS)], False),
        ([entry("queue-scaler", "Apply", spec=TEMPLATE)], [OWN], False),
        ([entry("queue-scaler/status", spec=TEMPLATE)], [OWN], False),
    ],
)  # fmt: skip
def test_the_entries_of_others_may_lose_what_the_scaler_sets_and_nothing_else(
    before: list[Object], after: list[Object], allowed: bool
) -> None:
    old, new = deployment(), deployment()
    old["metadata"]["managedFields"], new["metadata"]["managedFields"] = before, after
    assert (refusals("deployments", old, new) == []) is allowed


# The scaler's whole life, and every field that there is

ALLOWED = {
    ("deployments", "spec", "replicas"),
    *(
        ("deployments", "metadata", "annotations", name)
        for name in (
            scaler.LAST_SCALE, scaler.LAST_SCALE_TIME, scaler.RECOMMENDATIONS, scaler.FAILING_SINCE,
        )
    ),
    ("pods", "metadata", "annotations", COST),
}  # fmt: skip


def leaves(body: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if not isinstance(body, dict):
        return {path}
    return {leaf for key, value in body.items() for leaf in leaves(value, (*path, key))}


def test_the_scaler_changes_all_that_it_may_and_nothing_else() -> None:
    life = whole_life()
    seen = set()
    for patch, before in life.patches:
        found = refusals(patch.resource, before, patched(before, patch.body))
        assert not found, (patch.body, found)
        seen |= {(patch.resource, *leaf) for leaf in leaves(patch.body)}
    # The version is a condition of the patch, not a change.
    assert seen - {("deployments", "metadata", "resourceVersion")} == ALLOWED
    assert len(life.events) == 3, "up, down, and up in the fallback"
    for event in life.events:
        named = {key: event["metadata"][key] for key in ("name", "namespace")}
        event["metadata"] = {**named, "creationTimestamp": event["firstTimestamp"]}
        assert not refusals("events", None, event, operation="CREATE"), event


def changed(obj: Object, leaf: tuple[str, ...], remove: bool = False) -> Object:
    """The object with another value there, or with none."""
    new = copy.deepcopy(obj)
    *parents, last = leaf
    holder = new
    for part in parents:
        holder = holder.setdefault(part, {})
    value = holder.pop(last, None)
    if not remove:
        holder[last] = value + 1 if isinstance(value, int) else "changed"
    return new


# What the API server keeps up; managedFields are tested above.
KEPT_UP: set[tuple[str, ...]] = {
    ("metadata", name) for name in ("generation", "resourceVersion", "managedFields")
}


@pytest.mark.parametrize("resource", ["deployments", "pods"])
def test_a_change_is_allowed_of_exactly_these_fields(resource: str) -> None:
    """Every field that there is, changed and removed, and some that there are not."""
    obj = OBJECTS[resource]()
    there = {leaf for leaf in leaves(obj) if leaf[0] in ("metadata", "spec")}
    there -= KEPT_UP
    names = {each[-1] for each in ALLOWED} | {scaler.PAUSED, scaler.PAUSED_UNTIL, "new"}
    more = {("metadata", "annotations", name) for name in names}
    more |= {(part, "a-future-field", "x") for part in ("metadata", "spec")}
    passed = {leaf for leaf in there | more if not refusals(resource, obj, changed(obj, leaf))}
    assert passed == {leaf[1:] for leaf in ALLOWED if leaf[0] == resource}
    gone = {leaf for leaf in there if not refusals(resource, obj, changed(obj, leaf, remove=True))}
    assert gone == ({REMOVABLE} if resource == "deployments" else set())


@pytest.mark.parametrize("case", ACCOUNTS, ids=str)
def test_it_holds_for_the_labelled_and_lets_no_other_account_scale(
    case: forbidden.Someone,
) -> None:
    namespace = "default" if case.here else "elsewhere"
    user = {"username": f"system:serviceaccount:{namespace}:{case.name}"}
    options = {"fieldManager": case.manager} if case.manager else {}
    found = refusals(
        "deployments", deployment(), patched(deployment(), {"spec": {"paused": True}}),
        case.name if case.here else "default", case.labelled and case.here,
        userInfo=user, options=options,
    )  # fmt: skip
    assert [message for message in found if case.refused in message] == found
    assert bool(found) is bool(case.refused)


def test_a_person_is_never_restricted() -> None:
    for user in ("admin", "system:admin", "queue-scaler", "oidc:x:queue-scaler"):
        old, new = deployment(), patched(deployment(), {"spec": {"paused": True}})
        assert not refusals("deployments", old, new, userInfo={"username": user})


@pytest.mark.parametrize(
    ("old", "new", "allowed"),
    [
        (1, BOUND, True),
        (1, BOUND + 1, False),
        (BOUND + 30, BOUND + 10, True),
        (BOUND + 30, BOUND + 30, True),
        (BOUND + 30, BOUND + 31, False),
    ],
)
def test_a_number_over_the_bound_may_only_stay_or_fall(old: int, new: int, allowed: bool) -> None:
    before = merge(deployment(), {"spec": {"replicas": old}})
    after = merge(before, {"spec": {"replicas": new}})
    assert (refusals("deployments", before, after) == []) is allowed


def test_the_bound_is_one_number_on_the_page_too_and_the_range_of_the_example_lies_within() -> None:
    variables = {each["name"]: each["expression"] for each in policies()[0][0]["variables"]}
    assert variables["maxReplicas"] == str(BOUND)
    assert settings().max_replicas <= BOUND
    assert f"For more than {BOUND} pods" in (REPOSITORY / "docs/operations.md").read_text()


def test_each_account_is_the_parameter_of_one_of_the_two_policies_and_both_deny() -> None:
    label = one("rbac.yaml", "ServiceAccount")["metadata"]["labels"]
    operators = []
    for (policy, binding), document in zip(policies(), load("guardrails.yaml")[::2], strict=True):
        assert binding["policyName"] == document["metadata"]["name"]
        assert binding["validationActions"] == ["Deny"]
        assert policy["failurePolicy"] == "Fail"
        assert {each["reason"] for each in policy["validations"]} == {"Forbidden"}
        (term,) = binding["paramRef"]["selector"]["matchExpressions"]
        assert {term["key"]} == label.keys()
        operators.append(term["operator"])
    assert operators == ["Exists", "DoesNotExist"]
