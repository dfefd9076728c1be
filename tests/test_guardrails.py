"""guardrails.yaml, evaluated here by Google's CEL, and by a real API server where there is one.

What the scaler's patches change has to be all that the policies allow, and nothing else: the same
acts that tests/e2e/forbidden.py tries on a real cluster are tried on the expressions themselves.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from cel_expr_python import cel  # type: ignore[import-not-found, import-untyped, unused-ignore]

import scaler
from tests.e2e import forbidden
from tests.e2e.forbidden import BOUND, COST, FOREIGN, MINE, NAME, OTHER, Act
from tests.fakes.kubernetes_objects import json_patch, merge
from tests.test_manifests import USER, load, settings, whole_life
from tests.world import REPOSITORY

pytestmark = pytest.mark.slow

VARIABLES = dict.fromkeys(("object", "oldObject", "request", "variables"), cel.Type.DYN)
Object = dict[str, Any]


@cache
def compiled(expression: str) -> Any:
    return cel.NewEnv(variables=VARIABLES).compile(expression)


def policy(resource: str) -> Object:
    named = {each["metadata"]["name"]: each for each in load("guardrails.yaml")
             if each["kind"] == "ValidatingAdmissionPolicy"}  # fmt: skip
    return dict(named[f"queue-scaler-{resource}"]["spec"])


def evaluate(expression: str, known: Object) -> Any:
    """Raises ValueError where the evaluation ends in an error."""
    value = compiled(expression).eval(data=known)
    if value.type() == cel.Type.ERROR:
        raise ValueError(str(value.value()))
    return value.plain_value()


def refusals(
    resource: str, old: Object | None, new: Object | None, user: str = USER, **request: str
) -> list[str]:
    """The messages with which the policy refuses a request; none where it lets it pass or is not
    about this account. An expression that cannot be evaluated refuses (failurePolicy: Fail)."""
    spec = policy(resource)
    assert spec["failurePolicy"] == "Fail"
    asked = {"operation": "UPDATE", "userInfo": {"username": user}, **request}
    known: Object = {"object": new, "oldObject": old, "request": asked, "variables": {}}
    if not all(evaluate(each["expression"], known) for each in spec["matchConditions"]):
        return []
    for each in spec.get("variables", []):
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
    obj["metadata"] |= {
        "namespace": "default",
        "uid": "0-0-0",
        "resourceVersion": "7",
        "generation": 1,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "managedFields": [{"manager": "kubectl-create", "operation": "Update"}],
    }
    return obj


def deployment() -> Object:
    obj = stored(forbidden.deployment(NAME))
    obj["spec"] |= {
        "progressDeadlineSeconds": 600,
        "revisionHistoryLimit": 10,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%"}},
    }
    obj["spec"]["template"]["metadata"]["creationTimestamp"] = None
    return obj


def pod() -> Object:
    found = [each for each in forbidden.bystanders()["items"] if each["kind"] == "Pod"]
    return stored(found[0])


def ids(acts: list[Act]) -> list[str]:
    return [act.what for act in acts]


DEPLOYMENT_ACTS = list(forbidden.deployment_acts("default"))
POD_ACTS = [
    act
    for act in forbidden.pod_acts("default")
    if act.method == "PATCH" and act.path.endswith(f"/pods/{OTHER}")
]
EVENT_ACTS = [act for act in forbidden.event_acts("default") if act.method == "POST"]
LIFE = [act for act in forbidden.life("default", OTHER) if act.method in ("PATCH", "POST")]


def test_there_are_more_than_thirty_forbidden_acts() -> None:
    assert len(DEPLOYMENT_ACTS) + len(POD_ACTS) + len(EVENT_ACTS) > 50
    assert len({act.what for act in forbidden.acts("a", "b")}) > 100


@pytest.mark.parametrize("act", DEPLOYMENT_ACTS, ids=ids(DEPLOYMENT_ACTS))
def test_it_refuses_on_the_deployment_to(act: Act) -> None:
    old = deployment()
    assert refusals("deployments", old, patched(old, act.body))


@pytest.mark.parametrize("act", POD_ACTS, ids=ids(POD_ACTS))
def test_it_refuses_on_a_pod_to(act: Act) -> None:
    old = pod()
    assert refusals("pods", old, patched(old, act.body))


@pytest.mark.parametrize("act", EVENT_ACTS, ids=ids(EVENT_ACTS))
def test_it_refuses_to_create(act: Act) -> None:
    assert refusals("events", None, act.body, operation="CREATE")


@pytest.mark.parametrize("act", LIFE, ids=ids(LIFE))
def test_it_lets_the_scaler(act: Act) -> None:
    if act.method == "POST":
        assert not refusals("events", None, act.body, operation="CREATE")
        return
    resource, old = ("pods", pod()) if "/pods/" in act.path else ("deployments", deployment())
    assert not refusals(resource, old, patched(old, act.body))


def test_every_patch_and_event_of_a_whole_life_passes() -> None:
    life = whole_life()
    assert len(life.patches) > 5
    for patch in life.patches:
        found = refusals(patch.resource, patch.before, patched(patch.before, patch.body))
        assert not found, (patch.body, found)
    for event in life.events:
        assert not refusals("events", None, event, operation="CREATE")


def leaves(body: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if not isinstance(body, dict):
        return {path}
    return {leaf for key, value in body.items() for leaf in leaves(value, (*path, key))}


def kind_of(resource: str, leaf: tuple[str, ...]) -> tuple[str, ...]:
    """A field that was changed, with our annotations, whose pauses are people's, as one."""
    own = leaf[:2] == ("metadata", "annotations") and leaf[2].startswith(MINE)
    if resource == "deployments" and own and not leaf[2].startswith(scaler.PAUSED):
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
    assert written == {
        scaler.LAST_SCALE, scaler.LAST_SCALE_TIME, scaler.RECOMMENDATIONS, scaler.FAILING_SINCE,
    }  # fmt: skip


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


@pytest.mark.parametrize(
    "changes",
    [
        {"reason": "Killing"},
        {"reason": None},
        {"source": {"component": "kubelet"}},
        {"source": {}},
        {"reportingComponent": "kubelet"},
        {"involvedObject": {"kind": "Node", "name": "node-1"}},
        {"involvedObject": {}},
    ],
    ids=str,
)
def test_it_refuses_an_event_that_is_not_its_own(changes: Object) -> None:
    event = forbidden.event("default")
    assert not refusals("events", None, event, operation="CREATE")
    assert refusals("events", None, {**event, **changes}, operation="CREATE")
    assert refusals("events", event, event, operation="UPDATE")


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
            if not refusals(resource, obj, changed(obj, leaf)):
                passed.add(kind_of(resource, leaf))
    kept = {(resource, "metadata", name) for resource in ("deployments", "pods")
            for name in ("generation", "managedFields", "resourceVersion")}  # fmt: skip
    assert passed - kept == ALLOWED


@pytest.mark.parametrize("resource", ["deployments", "pods"])
@pytest.mark.parametrize("operation", ["CREATE", "DELETE", "CONNECT"])
def test_it_refuses_everything_but_updates(resource: str, operation: str) -> None:
    obj = deployment() if resource == "deployments" else pod()
    old = None if operation == "CREATE" else obj
    new = None if operation == "DELETE" else obj
    messages = refusals(resource, old, new, operation=operation)
    assert messages and "may only update" in messages[0]


@pytest.mark.parametrize("resource", ["deployments", "pods"])
@pytest.mark.parametrize("subresource", ["scale", "status", "ephemeralcontainers", "resize"])
def test_it_refuses_subresources(resource: str, subresource: str) -> None:
    obj = deployment() if resource == "deployments" else pod()
    assert refusals(resource, obj, obj, subResource=subresource)


@pytest.mark.parametrize(
    "user",
    [
        "system:serviceaccount:default:queue-scaler",
        "system:serviceaccount:media:queue-scaler-thumbnails",
        "system:serviceaccount:media:team-a-queue-scaler",
        "system:serviceaccount:media:team-a-queue-scaler-thumbnails",
    ],
)
def test_it_is_about_every_scaler_that_kustomize_can_name(user: str) -> None:
    old = deployment()
    new = patched(old, {"spec": {"paused": True}})
    assert refusals("deployments", old, new, user=user)


@pytest.mark.parametrize(
    "user",
    [
        "system:admin",
        "queue-scaler",
        "system:serviceaccount:kube-system:deployment-controller",
        "system:serviceaccount:queue-scaler:default",
        "system:serviceaccount:default:myqueue-scaler",
        "system:serviceaccount:default:queue-scalers",
        "someone@example.com:queue-scaler",
    ],
)
def test_it_is_about_nobody_else(user: str) -> None:
    old = deployment()
    for resource in ("deployments", "pods", "events"):
        new = patched(old, {"spec": {"paused": True}})
        assert not refusals(resource, old, new, user=user)


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
    numbers = [each["expression"] for each in policy("deployments")["variables"]
               if each["name"] == "maxReplicas"]  # fmt: skip
    assert numbers == [str(BOUND)]
    assert settings().max_replicas <= BOUND


def test_each_policy_is_bound_and_denies_with_a_reason() -> None:
    documents = load("guardrails.yaml")
    kinds = [each["kind"] for each in documents]
    assert kinds == ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"] * 3
    for one, binding in zip(documents[::2], documents[1::2], strict=True):
        assert binding["spec"] == {
            "policyName": one["metadata"]["name"],
            "validationActions": ["Deny"],
        }
        # Named, so that the API server checks the expressions against the types.
        for rule in one["spec"]["matchConstraints"]["resourceRules"]:
            assert not {"*"} & {*rule["apiGroups"], *rule["apiVersions"], *rule["resources"]}
        assert {each["reason"] for each in one["spec"]["validations"]} == {"Forbidden"}


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


def test_the_foreign_annotations_of_the_acts_are_there_to_be_changed() -> None:
    assert FOREIGN.items() <= deployment()["metadata"]["annotations"].items()
    assert json.dumps(forbidden.bystanders())
