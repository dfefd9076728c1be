"""guardrails.yaml, evaluated here by Google's CEL, and by a real API server where there is one.

What the scaler's patches change has to be all that the policy allows, and nothing else: the same
acts that tests/e2e/forbidden.py tries on a real cluster are tried on the expressions themselves.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from cel_expr_python import cel  # type: ignore[import-not-found, import-untyped, unused-ignore]
from cel_expr_python.ext import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    ext_strings,
)

import scaler
from tests.e2e import forbidden
from tests.e2e.forbidden import BOUND, COST, MINE, NAME, OTHER, PAUSES, Act
from tests.support.kubernetes_objects import json_patch, merge
from tests.support.world import REPOSITORY
from tests.test_manifests import USER, load, one, settings, whole_life

pytestmark = pytest.mark.slow

Object = dict[str, Any]
NAMES = ("object", "oldObject", "request", "variables", "params", "authorizer")
HASH = "5d4f8"


def chain(name: str, impl: Any, arguments: int = 1) -> Any:
    """A member function of `authorizer` on plain values."""
    known = cel.Type.MAP
    answer = known if arguments else cel.Type.BOOL
    overload = cel.Overload(name, answer, [known, *[cel.Type.STRING] * arguments], True, impl)
    return cel.FunctionDecl(name, [overload])


# `authorizer` asks the Role of rbac.yaml: it may patch the Deployment NAME.
AUTHORIZER = [
    *(
        chain(word, lambda asked, value, word=word: {**asked, word: value})
        for word in ("group", "resource", "namespace", "name", "check")
    ),
    chain(
        "allowed",
        lambda asked: (
            asked
            == {
                "group": "apps",
                "resource": "deployments",
                "namespace": "default",
                "name": NAME,
                "check": "patch",
            }
        ),
        0,
    ),
]


@cache
def compiled(expression: str) -> Any:
    names = dict.fromkeys(NAMES, cel.Type.DYN)
    return cel.NewEnv(
        variables=names, extensions=[ext_strings.ExtStrings()], functions=AUTHORIZER
    ).compile(expression)


def policy() -> Object:
    return dict(one("guardrails.yaml", "ValidatingAdmissionPolicy")["spec"])


def evaluate(expression: str, known: Object) -> Any:
    """Raises ValueError where the evaluation ends in an error."""
    value = compiled(expression).eval(data=known)
    if value.type() == cel.Type.ERROR:
        raise ValueError(str(value.value()))
    return value.plain_value()


KINDS = {"deployments": "apps", "pods": "", "events": ""}


def refusals(
    resource: str,
    old: Object | None,
    new: Object | None,
    user: str = USER,
    account: str = "queue-scaler",
    **request: Any,
) -> list[str]:
    """The messages with which the policy refuses a request; none where it lets it pass or is not
    about this account. An expression that cannot be evaluated refuses (failurePolicy: Fail)."""
    spec = policy()
    assert spec["failurePolicy"] == "Fail"
    asked = {
        "operation": "UPDATE",
        "userInfo": {"username": user},
        "namespace": "default",
        "resource": {"group": KINDS.get(resource, ""), "version": "v1", "resource": resource},
        **request,
    }
    asked["resource"] = asked.pop("resource_", asked["resource"])
    params = {"metadata": {"namespace": "default", "name": account}}
    known: Object = {
        "object": new, "oldObject": old, "request": asked, "variables": {}, "params": params,
        "authorizer": {},
    }  # fmt: skip
    if not all(evaluate(each["expression"], known) for each in spec["matchConditions"]):
        return []
    for each in spec["variables"]:
        try:
            known["variables"][each["name"]] = evaluate(each["expression"], known)
        except ValueError:  # a real API server evaluates them only where they are used
            continue
    found = []
    for each in spec["validations"]:
        try:
            passed = evaluate(each["expression"], known) is True
        except ValueError:
            passed = False
        if not passed:
            found.append(str(each["message"]))
    return found


def patched(old: Object, body: Any) -> Object:
    """The object as admission sees it after a patch: the API server has done its part."""
    new: Object = json_patch(old, body) if isinstance(body, list) else merge(old, body)
    new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
    new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
    if new["metadata"].get("managedFields") == [{}]:
        del new["metadata"]["managedFields"]
    return new


def stored(obj: Object) -> Object:
    """An object as the API server stores it, with the metadata that it adds."""
    obj = copy.deepcopy(obj)
    fields = {
        "f:metadata": {"f:labels": {"f:app": {}}},
        "f:spec": {"f:replicas": {}, "f:template": {}},
    }
    obj["metadata"] |= {
        "namespace": "default",
        "uid": "0-0-0",
        "resourceVersion": "7",
        "generation": 1,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "managedFields": [
            {"manager": "kubectl-create", "operation": "Update", "apiVersion": "apps/v1",
             "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": fields},
        ],
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
    obj["metadata"]["name"] = f"{owner}-{HASH}-x"
    obj["metadata"]["labels"]["pod-template-hash"] = HASH
    obj["metadata"]["ownerReferences"] = [
        {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"{owner}-{HASH}", "uid": "1",
         "controller": True}
    ]  # fmt: skip
    return obj


def created(event: Object) -> Object:
    """An Event as admission sees it."""
    event = copy.deepcopy(event)
    event.setdefault("eventTime", None)
    now = forbidden.event("default")["firstTimestamp"]
    event["metadata"] |= {"creationTimestamp": now, "uid": "1"}
    return event


def ids(acts: list[Act]) -> list[str]:
    return [act.what for act in acts]


# What the API server itself does before admission is tried on a real one only.
REAL_ONLY = ("Deployment: scale in CI's name",)
DEPLOYMENT_ACTS = [act for act in forbidden.deployment_acts("default") if act.what not in REAL_ONLY]
POD_ACTS = [
    act
    for act in forbidden.pod_acts("default", "own")
    if act.method == "PATCH" and "/pods/own?" in act.path
]
EVENT_ACTS = [
    act
    for act in forbidden.event_acts("default")
    if act.method == "POST" and act.path.startswith("/api/v1/")
]
LIFE = [act for act in forbidden.life("default", OTHER) if act.method in ("PATCH", "POST")]


@pytest.mark.parametrize("act", DEPLOYMENT_ACTS, ids=ids(DEPLOYMENT_ACTS))
def test_it_refuses_on_the_deployment_to(act: Act) -> None:
    old = deployment()
    body = act.body(old) if callable(act.body) else act.body
    assert len(refusals("deployments", old, patched(old, body))) >= 1


@pytest.mark.parametrize("act", POD_ACTS, ids=ids(POD_ACTS))
def test_it_refuses_on_a_pod_to(act: Act) -> None:
    assert refusals("pods", pod(), patched(pod(), act.body))


@pytest.mark.parametrize("act", EVENT_ACTS, ids=ids(EVENT_ACTS))
def test_it_refuses_to_create(act: Act) -> None:
    assert refusals("events", None, created(act.body), operation="CREATE")


@pytest.mark.parametrize("act", LIFE, ids=ids(LIFE))
def test_it_lets_the_scaler(act: Act) -> None:
    if act.method == "POST":
        assert not refusals("events", None, created(act.body), operation="CREATE")
        return
    resource, old = ("pods", pod()) if "/pods/" in act.path else ("deployments", deployment())
    assert not refusals(resource, old, patched(old, act.body))


@pytest.mark.parametrize(("pause", "replicas", "allowed"), PAUSES, ids=str)
def test_a_pause_binds_it(pause: dict[str, str], replicas: int, allowed: bool) -> None:
    old = deployment(**pause)
    new = patched(old, {"spec": {"replicas": replicas}})
    assert (refusals("deployments", old, new) == []) is allowed


def test_it_may_mark_only_pods_of_a_deployment_that_it_may_patch() -> None:
    mark = {"metadata": {"annotations": {COST: "1"}}}
    nobodys = {**pod(), "metadata": {**pod()["metadata"], "ownerReferences": []}}
    for each in (pod(OTHER), pod(f"{NAME}-canary"), nobodys):
        assert refusals("pods", each, patched(each, mark))
    assert not refusals("pods", pod(), patched(pod(), mark))


def test_the_history_of_the_longest_windows_fits() -> None:
    entries = [(9_999_999_999 - n, 2_147_483_647) for n in range(3601)]
    longest = scaler.write_history(entries) or ""
    assert 75_000 < len(longest) <= 80_000
    old = deployment()
    body = {"metadata": {"annotations": {scaler.RECOMMENDATIONS: longest}}}
    assert not refusals("deployments", old, patched(old, body))


# managedFields before and after a scale, and what the API server itself does to the entries


def entry(manager: str, operation: str = "Update", **fields: Any) -> Object:
    return {"manager": manager, "operation": operation, "apiVersion": "apps/v1",
            "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1",
            "fieldsV1": {f"f:{name}": value for name, value in fields.items()}}  # fmt: skip


REPLICAS: Object = {"f:replicas": {}}
TEMPLATE: Object = {"f:template": {"f:spec": {}}}
TIME: Object = {"f:annotations": {f"f:{scaler.LAST_SCALE_TIME}": {}}}
PAUSE: Object = {"f:annotations": {f"f:{scaler.PAUSED}": {}}}
OWN = entry("queue-scaler", spec=REPLICAS, metadata=TIME)


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        ([entry("ci", spec={**REPLICAS, **TEMPLATE})], [entry("ci", spec=TEMPLATE), OWN], True),
        ([entry("kubectl-patch", spec=REPLICAS)], [OWN], True),
        ([entry("kubectl-annotate", metadata=TIME)], [OWN], True),
        ([entry("ci", "Apply", spec=TEMPLATE)], [entry("ci", "Apply", spec=TEMPLATE), OWN], True),
        ([entry("a", spec=TEMPLATE), entry("b", metadata=PAUSE)],
         [entry("ancient-changes", spec=TEMPLATE, metadata=PAUSE), OWN], True),
        ([entry("ancient-changes", metadata=PAUSE), entry("a", spec=TEMPLATE)],
         [entry("ancient-changes", spec=TEMPLATE, metadata=PAUSE), OWN], True),
        ([entry("ancient-changes", metadata=PAUSE), entry("a", spec=TEMPLATE)],
         [entry("ancient-changes", spec=TEMPLATE), OWN], False),
        ([entry("ci", "Apply", spec=TEMPLATE)], [OWN], False),
        ([entry("kubectl-annotate", metadata=PAUSE)], [OWN], False),
        ([entry("kubectl-annotate", metadata=PAUSE)], [entry("kubectl", metadata=PAUSE)], False),
        ([entry("ci", "Apply", spec=TEMPLATE), entry("kubectl-annotate", metadata=PAUSE)],
         [entry("ci", "Apply", spec=TEMPLATE, metadata=PAUSE)], False),
        ([entry("ci", spec=TEMPLATE)], [entry("ci", spec={**TEMPLATE, **REPLICAS})], False),
        ([entry("ci", spec=TEMPLATE)], [entry("ancient-changes", spec={**TEMPLATE, **REPLICAS})],
         False),
        ([entry("ci", "Apply", spec=TEMPLATE)], [entry("ancient-changes", spec=TEMPLATE)], False),
        ([], [entry("queue-scaler", spec=TEMPLATE)], False),
        ([], [entry("queue-scaler", metadata=PAUSE)], False),
        ([], [entry("queue-scaler", "Apply", spec=REPLICAS)], False),
    ],
)  # fmt: skip
def test_the_entries_of_others_may_lose_what_the_scaler_sets_and_nothing_else(
    before: list[Object], after: list[Object], allowed: bool
) -> None:
    old, new = deployment(), deployment()
    old["metadata"]["managedFields"], new["metadata"]["managedFields"] = before, after
    assert (refusals("deployments", old, new) == []) is allowed


def test_every_patch_and_event_of_a_whole_life_passes() -> None:
    life = whole_life()
    assert len(life.patches) > 5
    for patch in life.patches:
        found = refusals(patch.resource, patch.before, patched(patch.before, patch.body))
        assert not found, (patch.body, found)
    for event in life.events:
        named = {key: event["metadata"][key] for key in ("name", "namespace")}
        event["metadata"] = {**named, "creationTimestamp": event["firstTimestamp"]}
        assert not refusals("events", None, event, operation="CREATE"), event


def leaves(body: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if not isinstance(body, dict):
        return {path}
    return {leaf for key, value in body.items() for leaf in leaves(value, (*path, key))}


OWNED = {scaler.LAST_SCALE, scaler.LAST_SCALE_TIME, scaler.RECOMMENDATIONS, scaler.FAILING_SINCE}


def kind_of(resource: str, leaf: tuple[str, ...]) -> tuple[str, ...]:
    """A field that was changed, with our annotations, whose pauses are people's, as one."""
    if resource == "deployments" and leaf[:2] == ("metadata", "annotations") and leaf[2] in OWNED:
        return (resource, "metadata", "annotations", MINE + "*")
    return (resource, *leaf)


ALLOWED = {
    ("deployments", "spec", "replicas"),
    ("deployments", "metadata", "annotations", MINE + "*"),
    ("pods", "metadata", "annotations", COST),
}


def test_the_scaler_changes_everything_that_it_may_and_nothing_else() -> None:
    seen = {
        kind_of(patch.resource, leaf)
        for patch in whole_life().patches
        for leaf in leaves(patch.body)
        if leaf != ("metadata", "resourceVersion")  # a condition of the patch, not a change
    }
    assert seen == ALLOWED
    written = {
        leaf[2]
        for patch in whole_life().patches
        for leaf in leaves(patch.body)
        if patch.resource == "deployments" and leaf[:2] == ("metadata", "annotations")
    }
    assert written == OWNED


def changed(obj: Object, leaf: tuple[str, ...]) -> Object:
    """The object with another value there."""
    new = copy.deepcopy(obj)
    *parents, last = leaf
    holder = new
    for part in parents:
        holder = holder.setdefault(part, {})
    value = holder.get(last)
    holder[last] = value + 1 if isinstance(value, int) else "changed"
    return new


def removed(obj: Object, leaf: tuple[str, ...]) -> Object:
    new = copy.deepcopy(obj)
    *parents, last = leaf
    holder = new
    for part in parents:
        holder = holder[part]
    del holder[last]
    return new


@pytest.mark.parametrize("resource", ["deployments", "pods"])
def test_it_refuses_to_remove_any_field(resource: str) -> None:
    obj = deployment() if resource == "deployments" else pod()
    kept = [("spec", "replicas"), ("metadata", "generation"), ("metadata", "resourceVersion")]
    for leaf in leaves(obj):
        if leaf[0] in ("metadata", "spec") and leaf not in kept:
            assert refusals(resource, obj, removed(obj, leaf)), leaf


def test_the_policies_allow_a_change_of_exactly_these_fields() -> None:
    """Every field that there is, changed and removed, and some that there are not."""
    additions = {
        "deployments": [
            ("metadata", "annotations", MINE + "last-scale"),
            ("metadata", "annotations", scaler.PAUSED),
            ("metadata", "annotations", "new"),
            ("metadata", "a-future-field"),
            ("spec", "a-future-field"),
        ],
        "pods": [
            ("metadata", "annotations", COST),
            ("metadata", "annotations", MINE + "last-scale"),
            ("spec", "a-future-field"),
        ],
    }
    passed = set()
    for resource, obj in (("deployments", deployment()), ("pods", pod())):
        fields = [leaf for leaf in leaves(obj) if leaf[0] in ("metadata", "spec")]
        for leaf in [*fields, *additions[resource]]:
            if "managedFields" in leaf:  # tested above
                continue
            if not refusals(resource, obj, changed(obj, leaf)):
                passed.add(kind_of(resource, leaf))
    kept = {(resource, "metadata", name) for resource in ("deployments", "pods")
            for name in ("generation", "resourceVersion")}  # fmt: skip
    assert passed - kept == ALLOWED


@pytest.mark.parametrize(
    ("operation", "group", "resource", "subresource"),
    [
        *(("UPDATE", "apps", "deployments", each) for each in ("scale", "status")),
        *(("UPDATE", "", "pods", each) for each in ("status", "ephemeralcontainers", "resize")),
        *((operation, "apps", "deployments", "") for operation in ("CREATE", "DELETE", "CONNECT")),
        *((operation, "", "pods", "") for operation in ("CREATE", "DELETE")),
        *((operation, "", "events", "") for operation in ("UPDATE", "DELETE")),
        ("CONNECT", "", "pods", "exec"),
        ("CREATE", "", "bindings", ""),
        ("CREATE", "events.k8s.io", "events", ""),
        ("UPDATE", "", "secrets", ""),
        ("UPDATE", "extensions", "deployments", ""),
    ],
)
def test_it_refuses_everything_but_three_requests(
    operation: str, group: str, resource: str, subresource: str
) -> None:
    obj = deployment()
    more = {"subResource": subresource} if subresource else {}
    asked = {"group": group, "version": "v1", "resource": resource}
    found = refusals(resource, obj, obj, operation=operation, resource_=asked, **more)
    assert found and "may only patch" in found[0]


@pytest.mark.parametrize(
    ("account", "user", "restricted"),
    [
        ("queue-scaler", USER, True),
        ("prodqueue-scaler", "system:serviceaccount:default:prodqueue-scaler", True),
        ("queue-scaler2", "system:serviceaccount:default:queue-scaler2", True),
        ("queue-scaler", "system:serviceaccount:default:rabbitmq-queue-scaler-operator", False),
        ("queue-scaler", "system:serviceaccount:other:queue-scaler", False),
        ("queue-scaler", "system:admin", False),
    ],
)
def test_it_is_about_the_labelled_accounts_and_nobody_else(
    account: str, user: str, restricted: bool
) -> None:
    old = deployment()
    new = patched(old, {"spec": {"paused": True}})
    assert bool(refusals("deployments", old, new, user, account)) is restricted


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


def test_the_bound_is_one_number_and_the_range_of_the_example_lies_within() -> None:
    numbers = [each["expression"] for each in policy()["variables"]
               if each["name"] == "maxReplicas"]  # fmt: skip
    assert numbers == [str(BOUND)]
    assert settings().max_replicas <= BOUND


def test_the_policy_is_bound_to_the_accounts_that_rbac_labels_and_denies() -> None:
    first, binding = load("guardrails.yaml")
    label = one("rbac.yaml", "ServiceAccount")["metadata"]["labels"]
    assert binding["spec"] == {
        "policyName": first["metadata"]["name"],
        "validationActions": ["Deny"],
        "paramRef": {
            "selector": {"matchLabels": label},
            "parameterNotFoundAction": "Allow",
        },
    }
    assert {each["reason"] for each in first["spec"]["validations"]} == {"Forbidden"}


def test_a_real_api_server_agrees() -> None:
    """tests/e2e/forbidden.py, on the cluster of E2E_KUBECONFIG."""
    kubeconfig = os.environ.get("E2E_KUBECONFIG")
    if not kubeconfig:
        pytest.skip("E2E_KUBECONFIG names no real cluster")
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.forbidden"],
        cwd=REPOSITORY,
        env={**os.environ, "KUBECONFIG": kubeconfig},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
