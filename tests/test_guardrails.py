"""guardrails.yaml, evaluated here by Google's CEL.

The policies have to allow exactly what the scaler's patches change: the acts that
tests/e2e/forbidden.py tries on a real cluster are tried on the expressions themselves.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any

import pytest
from cel_expr_python import cel  # type: ignore[import, unused-ignore]
from cel_expr_python.ext import ext_strings  # type: ignore[import, unused-ignore]

import scaler
from tests.e2e import forbidden
from tests.e2e.forbidden import (
    ACCOUNTS,
    BOUND,
    COST,
    ENDINGS,
    MINE,
    NAME,
    OTHER,
    PAUSES,
    REPLICA_SETS,
    Act,
    life,
)
from tests.support.kubernetes import FakeKubernetes
from tests.support.kubernetes_objects import KINDS, Writer, json_patch, merge, read_request
from tests.support.world import REPOSITORY
from tests.test_manifests import load, one, settings, whole_life

pytestmark = pytest.mark.slow

Object = dict[str, Any]
REMOVABLE = ("metadata", "annotations", MINE + "of-an-older-version")


# The policies

RULES, LABEL = (
    each["spec"] for each in load("guardrails.yaml") if each["kind"] == "ValidatingAdmissionPolicy"
)
# The one form in which the policies use `authorizer`. By the Role of rbac.yaml, the account may
# patch the Deployment NAME.
AUTHORIZER = re.compile(
    r"authorizer\.group\('apps'\)\.resource\('deployments'\)\.namespace\(request\.namespace\)"
    r"\s*\.name\((.+?)\s*\)\s*\.check\('patch'\)\.allowed\(\)"
)


@cache
def compiled(expression: str) -> Any:
    names = ("object", "oldObject", "request", "variables", "params")
    known = dict.fromkeys(names, cel.Type.DYN)
    environment = cel.NewEnv(variables=known, extensions=[ext_strings.ExtStrings()])
    return environment.compile(AUTHORIZER.sub(rf"(\1 == '{NAME}')", expression))


def evaluate(rule: Object, known: Object) -> Any:
    """None where the evaluation ends in an error."""
    value = compiled(rule["expression"]).eval(data=known)
    return None if value.type() == cel.Type.ERROR else value.plain_value()


def judged(policy: Object, known: Object) -> Iterator[str]:
    """The messages with which a policy denies. An expression that cannot be evaluated denies
    (failurePolicy: Fail)."""
    met = [evaluate(each, known) for each in policy["matchConditions"]]
    assert None not in met
    if not all(met):
        return
    for each in policy.get("variables", []):
        value = evaluate(each, known)
        if value is not None:  # a real API server evaluates them only where they are used
            known["variables"][each["name"]] = value
    for each in policy["validations"]:
        if evaluate(each, known) is not True:
            by_expression = each.get("messageExpression")
            said = by_expression and evaluate({"expression": by_expression}, known)
            yield str(said or each["message"])


def refusals(
    resource: str,
    old: Object | None,
    new: Object | None,
    labelled: Sequence[str] = ("queue-scaler",),
    others: Sequence[str] = (),
    replica_sets: str | None = None,
    **more: Any,
) -> list[str]:
    """The messages with which the policies deny a request about a GROUP/RESOURCE, given accounts
    with the label and without; none if they allow it."""
    group, _, name = resource.rpartition("/")
    request = {
        "operation": "UPDATE" if old else "CREATE",
        "userInfo": {"username": "system:serviceaccount:default:queue-scaler"},
        "namespace": "default",
        "resource": {"group": group, "version": "v1", "resource": name},
        "options": {"fieldManager": "queue-scaler"},
        **more,
    }
    known = {"object": new, "oldObject": old, "request": request}
    listed = {} if replica_sets is None else {"annotations": {REPLICA_SETS: replica_sets}}
    return [
        message
        for policy, accounts in ((RULES, labelled), (LABEL, others))
        for account in accounts
        for params in [{"metadata": {"namespace": "default", "name": account, **listed}}]
        for message in judged(policy, {**known, "variables": {}, "params": params})
    ]


# The objects, as an API server stores them


def entry(manager: str, operation: str = "Update", **fields: Any) -> Object:
    """One of the managedFields, of a subresource where the manager is `NAME/SUBRESOURCE`."""
    manager, _, subresource = manager.partition("/")
    return {"manager": manager, "operation": operation, "apiVersion": "apps/v1",
            **({"subresource": subresource} if subresource else {}),
            "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1",
            "fieldsV1": {f"f:{name}": value for name, value in fields.items()}}  # fmt: skip


@cache
def stored() -> dict[str, Object]:
    """The Deployment of the acts, and a pod of it."""
    cluster = FakeKubernetes(seed=1)
    obj = merge(forbidden.deployment(NAME), {"metadata": {"namespace": "default"}})
    cluster.store.create(KINDS["deployments"], obj, Writer("kubectl-create"))
    cluster.controllers.reconcile("default")
    annotations = {**forbidden.FOREIGN, REMOVABLE[-1]: "x"}  # the last it may not remove of a pod
    pod = merge(cluster.pods(NAME)[0], {"metadata": {"annotations": annotations}})
    return {"apps/deployments": cluster.deployment(NAME), "/pods": pod}


def deployment(**annotations: str) -> Object:
    named = forbidden.annotate(**{MINE + name: value for name, value in annotations.items()})
    return copy.deepcopy(merge(stored()["apps/deployments"], named))


def patched(old: Object, body: Any) -> Object:
    """The object as admission sees it after a patch: the API server has done its part."""
    new: Object = json_patch(old, body) if isinstance(body, list) else merge(old, body)
    new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
    new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
    if new["metadata"].get("managedFields") == [{}]:
        del new["metadata"]["managedFields"]
    return new


def created(event: Object) -> Object:
    """An Event as admission sees it."""
    now = forbidden.event("default")["firstTimestamp"]
    written = entry("queue-scaler", count={}, message={}, source={"f:component": {}})
    metadata = {"creationTimestamp": now, "uid": "1", "managedFields": [written]}
    return {"eventTime": None, **event, "metadata": {**metadata, **event["metadata"]}}


# The acts

OPERATIONS = {"POST": "CREATE", "PATCH": "UPDATE", "DELETE": "DELETE"}
OLD_GROUP = f"/apis/extensions/v1/namespaces/default/deployments/{NAME}"
TOO_LONG = forbidden.annotate(**{COST: "1" * 12})  # the API server itself rejects it
MORE = (
    Act("pod: fill the cost", "PATCH", "/api/v1/namespaces/default/pods/own", TOO_LONG),
    Act("Event: change", "PATCH", "/api/v1/namespaces/default/events/new", {}),
    Act("Deployment: by another group", "PATCH", OLD_GROUP, {}),
)


def request_of(act: Act) -> tuple[str, str, str]:
    """An act as admission sees it: operation, GROUP/RESOURCE, and subresource."""
    asked = read_request(act.method, act.path, None, "", "")
    operation = "CONNECT" if asked.subresource == "exec" else OPERATIONS[act.method]
    return operation, f"{asked.group}/{asked.resource}", asked.subresource


def refused(act: Act) -> list[str]:
    operation, resource, subresource = request_of(act)
    more: Object = {"subResource": subresource} if subresource else {}
    old = new = None
    if act.method == "POST":
        new = created(act.body or {"metadata": {}})
    else:
        old = copy.deepcopy(stored().get(resource, stored()["/pods"]))
        new = patched(old, act.sent(old) or {})
    return refusals(resource, old, new, operation=operation, **more)


def tried(acts: Iterable[Act]) -> list[Act]:
    """Those that reach admission, in the namespace."""
    return [act for act in acts if act.method in OPERATIONS and "/namespaces/default/" in act.path]


FORBIDDEN = tried([*forbidden.acts("default", "other", "own"), *MORE])
LIFE = tried(life("default", "own"))
REQUESTS = {request_of(act) for act in LIFE}


def test_most_acts_reach_admission() -> None:
    assert len(FORBIDDEN) >= 80 and len(LIFE) >= 10


@pytest.mark.parametrize("act", FORBIDDEN, ids=lambda act: act.what)
def test_it_denies(act: Act) -> None:
    """Anything that is not a request of the scaler's is denied for that reason."""
    found = refused(act)
    assert found and ("may only patch" in found[0]) is (request_of(act) not in REQUESTS)


@pytest.mark.parametrize("act", LIFE, ids=lambda act: act.what)
def test_it_allows_the_scaler_to(act: Act) -> None:
    assert not refused(act)


@pytest.mark.parametrize(("pause", "replicas", "allowed"), PAUSES, ids=str)
def test_a_pause_restricts_the_replicas(
    pause: dict[str, str], replicas: int, allowed: bool
) -> None:
    old = deployment(**pause)
    new = patched(old, {"spec": {"replicas": replicas}})
    assert (refusals("apps/deployments", old, new) == []) is allowed
    stamp = forbidden.annotate(**{scaler.FAILING_SINCE: "2026-01-01T00:00:00Z"})
    assert not refusals("apps/deployments", old, patched(old, stamp))


@pytest.mark.parametrize(("pause", "change", "allowed"), ENDINGS, ids=str)
def test_it_may_remove_pauses_only_with_paused_until(
    pause: dict[str, str], change: dict[str, str | None], allowed: bool
) -> None:
    old = deployment(**pause)
    new = patched(old, forbidden.annotate(**{MINE + name: v for name, v in change.items()}))
    assert (refusals("apps/deployments", old, new) == []) is allowed
    scaled = patched(new, {"spec": {"replicas": 1}})
    assert (refusals("apps/deployments", old, scaled) == []) is allowed, "in the same patch"


def test_it_may_remove_the_last_annotation() -> None:
    old, new = deployment(), deployment()
    old["metadata"]["annotations"] = {scaler.RECOMMENDATIONS: "1767225600:3"}
    del new["metadata"]["annotations"]
    assert not refusals("apps/deployments", old, new)


HASH = "7d4b9c6f5"
REPLICA_SET = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "uid": "1", "controller": True}
OTHERS: list[Object] = [
    {"name": f"{OTHER}-{HASH}"}, {"name": f"{NAME}-canary-{HASH}"}, {"name": NAME},
    {"name": NAME + "x" * 10}, {"kind": "StatefulSet"}, {"apiVersion": "example.com/v1"},
    {"controller": False},
]  # fmt: skip


def marking(owners: list[Object], listed: str | None = None, label: str | None = HASH) -> list[str]:
    """The denials for marking a pod with these owners and this hash, and a list of ReplicaSets."""
    metadata = {"ownerReferences": owners, "labels": {"pod-template-hash": label}}
    pod = merge(stored()["/pods"], {"metadata": metadata})
    return refusals("/pods", pod, patched(pod, forbidden.MARK), replica_sets=listed)


def test_it_may_mark_only_pods_of_a_deployment_that_it_may_patch() -> None:
    owner = REPLICA_SET | {"name": f"{NAME}-{HASH}"}
    assert not marking([owner])
    assert marking([]) == [
        "queue-scaler may set the deletion cost only of pods of a Deployment that it may patch"
    ]
    for other in OTHERS:
        assert marking([owner | other]), other
    assert marking([owner], label=None)


@pytest.mark.parametrize(
    ("name", "listed", "allowed"),
    [
        (f"old-name-{HASH}", f"old-name-{HASH}", True),
        (f"old-name-{HASH}", "old-name", True),
        (f"old-name-{HASH}", f"one, old-name-{HASH} ,two", True),
        (f"old-name-{HASH}", "", False),
        (f"old-name-{HASH}", ",", False),
        (f"old-name-{HASH}", "old", False),
        (f"old-name-{HASH}", "name", False),
        (f"old-name-{HASH}", "*", False),
        ("old-name-58d7f", "old-name", False),
        ("by-hand", "by-hand", True),
    ],
)
def test_it_may_mark_pods_of_replica_sets_that_its_account_lists(
    name: str, listed: str, allowed: bool
) -> None:
    """An adopted ReplicaSet keeps its name, and a long name is truncated."""
    owner = REPLICA_SET | {"name": name}
    assert (marking([owner], listed) == []) is allowed
    if "-name-" not in name:
        assert (marking([owner], listed, label=None) == []) is allowed, "a pod without a hash"
    [denial] = marking([owner])
    assert f"ReplicaSet {name} is" in denial
    assert f"annotation {REPLICA_SETS} of ServiceAccount queue-scaler" in denial
    for other in OTHERS[-3:]:
        assert marking([owner | other], listed)


def test_an_event_may_not_carry_hidden_data_or_name_another_namespace() -> None:
    """Which a real API server itself rejects or sets."""
    long = "f:" + "x" * 40
    too_much: list[Object] = [
        {f"f:{number}": {} for number in range(13)},
        {"f:count": {f"f:{number}": {} for number in range(9)}},
        {long: {}}, {"f:count": {long: {}}}, {"f:count": {"f:x": {"f:y": {}}}},
    ]  # fmt: skip
    entries = [{**entry("queue-scaler"), "fieldsV1": fields} for fields in too_much]
    entries.append(entry("kubelet", count={}))
    changes: list[Object] = [{"metadata": {"managedFields": [each]}} for each in entries]
    changes += [{"eventTime": forbidden.MICRO}, {"involvedObject": {"namespace": "other"}}]
    for change in changes:
        assert refusals("/events", None, created(forbidden.event("default", **change))), change


def test_the_longest_history_of_a_poll_every_second_just_fits() -> None:
    """The longest windows, the highest numbers, and a history twice as long. One of the acts is to
    write it, which the policies allow."""
    now, most = 1767229200, scaler.INT32_MAX
    hours = dict.fromkeys((f"SCALE_{way}_STABILIZATION_SECONDS" for way in ("UP", "DOWN")), "3600")
    named = {"DEPLOYMENT": NAME, "QUEUE_COLLECTION": "jobs", "MAX_REPLICAS": str(most)}
    chosen = scaler.read_settings({**named, **hours})
    past = " ".join(f"{now - age}:{most}" for age in range(1, 7200))
    when = datetime.fromtimestamp(now, UTC)
    state = scaler.parse_state({scaler.RECOMMENDATIONS: past}, chosen, when)
    inputs = scaler.Inputs(when, most - 1, state)
    longest = scaler.write_history(scaler.new_history(chosen, inputs, most, 0)) or ""
    assert longest == forbidden.history(now)
    assert 0.95 * 80_000 < len(longest) <= 80_000


# managedFields before and after a rescale, and what the API server itself does to the entries


def keys(*names: str, under: str = "annotations") -> Object:
    return {f"f:{under}": {name if name == "." else f"f:{name}": {} for name in names}}


REPLICAS: Object = {"f:replicas": {}}
TEMPLATE: Object = {"f:template": {"f:spec": {}}}
TIME, PAUSE = keys(scaler.LAST_SCALE_TIME), keys(scaler.PAUSED)
BOTH, X, XY = keys(scaler.LAST_SCALE_TIME, scaler.PAUSED), keys("x"), keys("x", "y")
LABEL_X, LABEL_XY = keys("x", under="labels"), keys("x", "y", under="labels")
OWN_AS_LABEL = keys(scaler.LAST_SCALE_TIME, under="labels")
DEEPER: Object = {"f:template": {"f:spec": {"f:containers": {}}}}
from_a, merged = partial(entry, "a"), partial(entry, "ancient-changes")
mine = partial(entry, "queue-scaler")
CI, PERSON = entry("ci", "Apply", spec=TEMPLATE), entry("kubectl-annotate", metadata=PAUSE)
OLD = from_a(spec=TEMPLATE)


ENDED = keys(scaler.PAUSED, scaler.PAUSED_UNTIL)


@pytest.mark.parametrize(
    ("before", "after", "removed", "allowed"),
    [
        ([from_a(metadata=ENDED)], [], True, True),
        ([from_a(metadata=ENDED)], [], False, False),
        ([from_a(metadata={**ENDED, **LABEL_X})], [from_a(metadata=LABEL_X)], True, True),
        ([from_a(metadata={**ENDED, **LABEL_X})], [], True, False),
        ([from_a(metadata=ENDED, spec=TEMPLATE)], [merged(spec=TEMPLATE)], True, True),
        ([], [mine(metadata=ENDED)], True, False),
        ([], [from_a(metadata=ENDED)], True, False),
    ],
)
def test_others_entries_may_lose_the_pauses_that_it_ends(
    before: list[Object], after: list[Object], removed: bool, allowed: bool
) -> None:
    old = deployment(**{"paused": "true", "paused-until": forbidden.WHEN})
    new = deployment() if removed else copy.deepcopy(old)
    old["metadata"]["managedFields"], new["metadata"]["managedFields"] = before, after
    assert (refusals("apps/deployments", old, new) == []) is allowed


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        ([entry("ci", spec={**REPLICAS, **TEMPLATE})], [entry("ci", spec=TEMPLATE)], True),
        ([entry("kubectl-patch", spec=REPLICAS)], [], True),
        ([entry("kubectl-annotate", metadata=TIME)], [], True),
        ([OLD, PERSON], [merged(spec=TEMPLATE, metadata=PAUSE)], True),
        ([merged(metadata=PAUSE), OLD], [merged(spec=TEMPLATE, metadata=PAUSE)], True),
        ([merged(metadata=PAUSE), OLD], [merged(spec=TEMPLATE)], False),
        ([CI], [CI, entry("security", "Apply", spec=TEMPLATE)], False),
        ([PERSON], [], False),
        ([PERSON], [entry("kubectl", metadata=PAUSE)], False),
        ([entry("ci", spec=TEMPLATE)], [entry("ci", spec={**TEMPLATE, **REPLICAS})], False),
        ([OLD], [merged(spec={**TEMPLATE, **REPLICAS})], False),
        ([OLD], [entry("ancient-changes/scale", spec=TEMPLATE)], False),
        ([OLD], [OLD, merged(spec=TEMPLATE)], False),
        ([entry("ci", "Apply", spec=REPLICAS)], [merged(spec=REPLICAS)], False),
        ([entry("ci/scale", spec=TEMPLATE)], [entry("ci", spec=TEMPLATE)], False),
        ([OLD], [merged("Apply", spec=TEMPLATE)], False),
        ([from_a(metadata=BOTH)], [from_a(metadata=PAUSE)], True),
        ([from_a(metadata=BOTH)], [from_a(metadata=TIME)], False),
        ([from_a(metadata=TIME)], [from_a(metadata=BOTH)], False),
        ([from_a(metadata=LABEL_X)], [from_a(metadata=LABEL_XY)], False),
        ([from_a(metadata=keys(".", scaler.LAST_SCALE_TIME))], [], True),
        ([from_a(metadata=keys(".", scaler.LAST_SCALE_TIME, "x"))], [from_a(metadata=X)], True),
        ([CI], [entry("ci", "Apply", spec=DEEPER)], False),
        ([from_a(spec={**TEMPLATE, "f:paused": {}})], [OLD], False),
        ([from_a(status=REPLICAS)], [], False),
        ([from_a(spec=TIME)], [], False),
        ([from_a(metadata=OWN_AS_LABEL)], [], False),
        ([from_a(metadata=BOTH)], [merged(metadata=PAUSE)], True),
        ([from_a(metadata=XY)], [merged(metadata=X)], False),
        ([from_a(metadata=X)], [merged(metadata=XY)], False),
        ([from_a(metadata=LABEL_X)], [merged(metadata=LABEL_XY)], False),
        ([from_a(metadata=X)], [merged(metadata={**X, **LABEL_X})], False),
        ([from_a(metadata=X)], [merged(metadata=X, spec=TEMPLATE)], False),
        ([], [mine(metadata=keys(".", scaler.LAST_SCALE_TIME))], True),
        ([], [mine(status=REPLICAS)], False),
        ([], [mine(spec=TIME)], False),
        ([], [mine(metadata=OWN_AS_LABEL)], False),
        ([], [mine(spec={"f:replicas": TEMPLATE})], False),
        ([], [mine(metadata={"f:annotations": {"f:" + scaler.LAST_SCALE: X}})], False),
        ([], [mine(metadata=PAUSE)], False),
        ([], [mine("Apply", spec=REPLICAS)], False),
        ([], [entry("queue-scaler/scale", spec=REPLICAS)], False),
        ([mine("Apply", spec=TEMPLATE)], [], False),
        ([entry("queue-scaler/status", spec=TEMPLATE)], [], False),
    ],
)  # fmt: skip
def test_others_entries_may_lose_what_it_sets(
    before: list[Object], after: list[Object], allowed: bool
) -> None:
    old, new = deployment(), deployment()
    after = [*after, mine(spec=REPLICAS, metadata=TIME)]
    old["metadata"]["managedFields"], new["metadata"]["managedFields"] = before, after
    assert (refusals("apps/deployments", old, new) == []) is allowed


# Everything that the scaler does, and every field of the objects

LEASE = MINE + "scale-down-lease"
OWN = (
    scaler.LAST_SCALE,
    scaler.LAST_SCALE_TIME,
    scaler.RECOMMENDATIONS,
    scaler.FAILING_SINCE,
    LEASE,
)
ALLOWED: dict[str, set[tuple[str, ...]]] = {
    "apps/deployments": {("spec", "replicas"), *(("metadata", "annotations", a) for a in OWN)},
    "/pods": {("metadata", "annotations", COST)},
}


def leaves(body: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if not isinstance(body, dict):
        return {path}
    return {leaf for key, value in body.items() for leaf in leaves(value, (*path, key))}


def test_the_scaler_changes_all_that_it_may_and_nothing_else() -> None:
    cluster, patches = whole_life()
    seen: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for patch, before in patches:
        resource = f"{patch.group}/{patch.resource}"
        found = refusals(resource, before, patched(before, patch.body))
        assert not found, (patch.body, found)
        seen[resource] |= leaves(patch.body)
    for changed_fields in seen.values():  # the version is a condition of each patch, not a change
        changed_fields.remove(("metadata", "resourceVersion"))
    assert seen == ALLOWED
    assert len(cluster.events()) == 3, "up, down, and up in the fallback"
    for event in cluster.events():
        named = {key: event["metadata"][key] for key in ("name", "namespace")}
        event["metadata"] = {**named, "creationTimestamp": event["firstTimestamp"]}
        assert not refusals("/events", None, event), event


def changed(obj: Object, leaf: tuple[str, ...], value: Any) -> Any:
    """The object with this value there, or with none."""
    for part in reversed(leaf):
        value = {part: value}
    return merge(obj, value)


# Maintained by the API server; managedFields are tested above.
MAINTAINED = {("metadata", name) for name in ("generation", "resourceVersion", "managedFields")}


@pytest.mark.parametrize("resource", ALLOWED)
def test_exactly_these_fields_may_change(resource: str) -> None:
    """Every field changed and removed, and some new ones added."""
    obj = stored()[resource]
    there = leaves({part: obj[part] for part in ("metadata", "spec")}) - MAINTAINED
    names = {*OWN, COST, scaler.PAUSED, scaler.PAUSED_UNTIL, "new"}
    more = {("metadata", "annotations", name) for name in names}
    more |= {(part, "a-future-field", "x") for part in ("metadata", "spec")}
    new = {leaf: 3 if leaf[-1] == "replicas" else "changed" for leaf in there | more}
    passed = {leaf for leaf in new if not refusals(resource, obj, changed(obj, leaf, new[leaf]))}
    assert passed == ALLOWED[resource]
    gone = {leaf for leaf in there if not refusals(resource, obj, changed(obj, leaf, None))}
    assert gone == ({REMOVABLE} if resource == "apps/deployments" else set())


# Accounts and the limit


@pytest.mark.parametrize(("name", "here", "labelled", "manager", "words"), ACCOUNTS)
def test_only_labeled_accounts_are_restricted(
    name: str, here: bool, labelled: bool, manager: str, words: str
) -> None:
    accounts = {True: ["another"], False: ["default"]}
    if here:
        accounts[labelled].append(name)
    found = refusals(
        "apps/deployments", deployment(), patched(deployment(), {"spec": {"paused": True}}),
        accounts[True], accounts[False], options={"fieldManager": manager} if manager else {},
        userInfo={"username": f"system:serviceaccount:{'default' if here else 'elsewhere'}:{name}"},
    )  # fmt: skip
    assert [message for message in found if words in message] == found
    assert bool(found) is bool(words)


@pytest.mark.parametrize("user", ["admin", "system:admin", "queue-scaler", "oidc:x:queue-scaler"])
def test_a_person_is_never_restricted(user: str) -> None:
    old, new = deployment(), patched(deployment(), {"spec": {"paused": True}})
    accounts = (["queue-scaler"], ["admin"])
    assert not refusals("apps/deployments", old, new, *accounts, userInfo={"username": user})


@pytest.mark.parametrize(("new", "allowed"), [(BOUND + 10, True), (BOUND + 31, False)])
def test_a_number_above_the_bound_may_only_stay_or_fall(new: int, allowed: bool) -> None:
    before = patched(deployment(), {"spec": {"replicas": BOUND + 30}})
    stays = forbidden.annotate(**{scaler.LAST_SCALE: "x"})
    assert not refusals("apps/deployments", before, patched(before, stays))
    after = patched(before, {"spec": {"replicas": new}})
    assert (refusals("apps/deployments", before, after) == []) is allowed


def test_the_docs_state_the_bound_and_the_example_range_is_within_it() -> None:
    variables = {each["name"]: each["expression"] for each in RULES["variables"]}
    assert variables["maxReplicas"] == str(BOUND)
    assert settings().max_replicas <= BOUND
    assert f"For more than {BOUND} pods" in (REPOSITORY / "docs/operations.md").read_text()


def test_each_account_is_the_parameter_of_one_of_the_two_policies_and_both_deny() -> None:
    """The rules match everything in a namespace, the label policy only Deployments."""
    (label,) = one("rbac.yaml", "ServiceAccount")["metadata"]["labels"]
    every = {key: ["*"] for key in ("apiGroups", "apiVersions", "operations")}
    everything = {**every, "resources": ["*/*"], "scope": "Namespaced"}
    updates = {**every, "apiGroups": ["apps"], "operations": ["UPDATE"], "scope": "*"}
    matches: tuple[Object, Object] = (
        {"matchPolicy": "Exact", "resourceRules": [everything]},
        {"resourceRules": [{**updates, "resources": ["deployments"]}]},
    )
    policies = load("guardrails.yaml")
    for match, operator in zip(matches, ("Exists", "DoesNotExist"), strict=True):
        policy, binding = policies.pop(0), policies.pop(0)
        selector = {"matchExpressions": [{"key": label, "operator": operator}]}
        assert binding["spec"] == {
            "policyName": policy["metadata"]["name"], "validationActions": ["Deny"],
            "paramRef": {"selector": selector, "parameterNotFoundAction": "Allow"},
        }  # fmt: skip
        assert policy["spec"]["matchConstraints"] == match
        assert policy["spec"]["paramKind"] == {"apiVersion": "v1", "kind": "ServiceAccount"}
        assert policy["spec"]["failurePolicy"] == "Fail"
        assert {each["reason"] for each in policy["spec"]["validations"]} == {"Forbidden"}
