"""Which pods are the Deployment's, which of them are busy, and which may go: the pure functions.

The order of pods is the ReplicaSet controller's: unassigned, pending, not ready, deletion cost.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud.firestore import Client, DocumentReference
from hypothesis import given
from hypothesis import strategies as st

import scaler
from scaler import (
    INT32_MIN,
    Lease,
    Pod,
    ReplicaSet,
    choose_victims,
    find_busy_pods,
    make_fleet,
    parse_pod,
    parse_replica_set,
    removable,
    victim_cost,
)
from tests.support.kubernetes_objects import DELETION_COST
from tests.support.world import START

READY, NOT_READY, PENDING, UNKNOWN = (
    (True, 2, True), (True, 2, False), (True, 0, False), (True, 1, False)
)  # fmt: skip
UNASSIGNED = (False, 0, False)


def pod(name: str = "a", owner: str = "rs", node: str = "node-a", **more: Any) -> Pod:
    return replace(Pod(name, f"uid-of-{name}", "1", owner, node, READY), **more)


def fleet_of(*pods: Pod) -> scaler.Fleet:
    return make_fleet(len(pods), True, [ReplicaSet("rs", len(pods))], pods)


A, B, C = pod("a"), pod("b"), pod("c")


# --- Whose pods -----------------------------------------------------------------------------------


def owner(kind: str, uid: str, name: str = "worker", controller: bool = True) -> dict[str, Any]:
    return {"kind": kind, "uid": uid, "name": name, "controller": controller}


def replica_set(*owners: dict[str, Any], replicas: int | None = 2) -> dict[str, Any]:
    metadata = {"name": "worker-5d4", "uid": "rs", "ownerReferences": list(owners)}
    return {"metadata": metadata, "spec": {} if replicas is None else {"replicas": replicas}}


SETS = {
    "the Deployment's own": (replica_set(owner("Deployment", "d")), ReplicaSet("rs", 2)),
    "one without a number has one pod": (
        replica_set(owner("Deployment", "d"), replicas=None), ReplicaSet("rs", 1)),
    "one under another name, adopted": (
        replica_set(owner("Deployment", "d", name="renamed")), ReplicaSet("rs", 2)),
    "another Deployment's of the same name": (
        replica_set(owner("Deployment", "deleted-and-created-again")), None),
    "one that this Deployment only owns": (
        replica_set(owner("Deployment", "d", controller=False)), None),
    "one of a rollout controller": (replica_set(owner("Rollout", "d")), None),
    "an orphan": (replica_set(), None),
}  # fmt: skip


@pytest.mark.parametrize(("item", "expected"), SETS.values(), ids=SETS)
def test_a_replica_set_is_ours_by_the_uid_of_its_controller(
    item: dict[str, Any], expected: ReplicaSet | None
) -> None:
    assert parse_replica_set(item, "d") == expected


def pod_item(
    *owners: dict[str, Any], status: dict[str, Any] | None = None, **meta: Any
) -> dict[str, Any]:
    metadata = {"name": "a", "uid": "u", "resourceVersion": "7", "ownerReferences": list(owners)}
    ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    spec = {"nodeName": "node-a"}
    return {"metadata": {**metadata, **meta}, "spec": spec, "status": status or ready}


OWNED = owner("ReplicaSet", "rs")
PODS: dict[str, tuple[dict[str, Any], bool]] = {
    "of a ReplicaSet": (pod_item(OWNED), True),
    "of a ReplicaSet beside another owner": (
        pod_item(owner("Node", "n", controller=False), OWNED), True),
    "of a Job": (pod_item(owner("Job", "rs")), False),
    "made by hand": (pod_item(), False),
    "only owned by a ReplicaSet": (pod_item(owner("ReplicaSet", "rs", controller=False)), False),
    "terminating": (pod_item(OWNED, deletionTimestamp="2026-01-01T00:00:00Z"), False),
    "succeeded": (pod_item(OWNED, status={"phase": "Succeeded"}), False),
    "evicted": (pod_item(OWNED, status={"phase": "Failed", "reason": "Evicted"}), False),
    "without a status yet": (pod_item(OWNED, status={"phase": "Pending"}), True),
}  # fmt: skip


@pytest.mark.parametrize(("item", "live"), PODS.values(), ids=PODS)
def test_a_pod_counts_if_it_lives_and_a_replica_set_controls_it(
    item: dict[str, Any], live: bool
) -> None:
    found = parse_pod(item)
    assert (found is not None) is live
    assert found is None or (found.name, found.owner, found.version) == ("a", "rs", "7")


def test_pods_of_other_replica_sets_are_not_in_the_fleet() -> None:
    """By UID, whatever the names: adopted ReplicaSets keep theirs, and long ones are truncated."""
    mine, canary = pod("worker-5d4-x"), pod("worker-canary-7f9-x", owner="another")
    fleet = make_fleet(1, True, [ReplicaSet("rs", 1)], [mine, canary])
    assert (fleet.names, fleet.unsettled) == (["worker-5d4-x"], "")


def setter(manager: str, cost: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"f:metadata": {"f:annotations": {f"f:{DELETION_COST}": {}}}}
    managed = [{"manager": "kubelet"}, {"manager": manager, "fieldsV1": fields}]
    return pod_item(OWNED, annotations={DELETION_COST: cost}, managedFields=managed)


@pytest.mark.parametrize(
    ("item", "cost", "own"),
    [
        (setter("queue-scaler", "-189388800"), -189_388_800, True),
        (setter("queue-scaler", "-100000000"), -100_000_000, True),
        (setter("queue-scaler", "-99999999"), -99_999_999, True),
        (setter("kubectl-annotate", "-5"), -5, False),
        (setter("queue-scaler", "2147483647"), 2**31 - 1, True),
        (setter("somebody", "1.5"), 0, False),
        (pod_item(OWNED), 0, False),
    ],
)
def test_a_deletion_cost_is_ours_if_our_field_manager_set_it(
    item: dict[str, Any], cost: int, own: bool
) -> None:
    found = parse_pod(item)
    assert found and (found.cost, found.own_cost) == (cost, own)
    assert bool(make_fleet(1, True, [ReplicaSet("rs", 1)], [found]).marked) is (
        own and cost <= -100_000_000
    ), "others' costs, which a run has restored, are higher"


# --- Rollouts, and controllers that lag behind ----------------------------------------------------

APPLIES = "the Deployment controller has not applied the last change yet"
ROLLOUT, REMOVING = "a rollout is in progress", "the last scale-down has not finished yet"
# Replicas of the Deployment, whether its generation was observed, what each ReplicaSet wants and
# has, and why a scale-down cannot be steered.
FLEETS: dict[str, tuple[int, bool, list[tuple[int, int]], str]] = {
    "at rest": (3, True, [(3, 3)], ""),
    "at rest, with an old revision": (3, True, [(3, 3), (0, 0)], ""),
    "no pods wanted": (0, True, [(0, 0)], ""),
    "pods still to come": (3, True, [(3, 1)], ""),
    "half-way in a rollout": (3, True, [(2, 2), (2, 2)], ROLLOUT),
    "a new revision that makes no pods": (3, True, [(1, 0), (3, 3)], ROLLOUT),
    "a rollout that ends": (3, True, [(3, 3), (0, 1)], REMOVING),
    "the last change not observed": (3, False, [(3, 3)], APPLIES),
    "the last change observed, but not passed on": (3, True, [(5, 5)], APPLIES),
    "a scale-up not passed on": (5, True, [(3, 3)], APPLIES),
    "a new Deployment without a ReplicaSet": (3, True, [], APPLIES),
    "more pods than wanted": (3, True, [(3, 4)], REMOVING),
    "more pods than wanted of an old revision": (3, True, [(3, 2), (0, 1)], REMOVING),
}


@pytest.mark.parametrize(("replicas", "observed", "sets", "why"), FLEETS.values(), ids=FLEETS)
def test_a_rollout_is_read_from_the_replica_sets(
    replicas: int, observed: bool, sets: list[tuple[int, int]], why: str
) -> None:
    wanted = [ReplicaSet(f"rs-{number}", want) for number, (want, _) in enumerate(sets)]
    live = [
        pod(f"{number}-{one}", owner=f"rs-{number}")
        for number, (_, has) in enumerate(sets)
        for one in range(has)
    ]
    fleet = make_fleet(replicas, observed, wanted, live)
    assert (fleet.unsettled, len(fleet.pods)) == (why, len(live))
    assert fleet.removing is (why == REMOVING or not observed), "then no deletion cost may change"
    if live:
        held = removable(fleet, replicas, frozenset([live[0].name]), -1)
        assert (held.pods == 0) is bool(why)
        assert held.because == (f", as {why} and 1 pod is busy" if why else held.because)
    idle = removable(fleet, replicas, frozenset(), -1)
    if why == APPLIES:
        assert idle.pods == 0, "whose the pods are is not known yet, so that one may be busy"
    else:
        assert idle.pods == replicas, "no busy pod can be hit"


@pytest.mark.parametrize(("listed", "why"), [(3, ""), (2, "only 2 of 3 pods were listed")])
def test_a_list_without_some_of_the_pods_removes_nothing(listed: int, why: str) -> None:
    """The ReplicaSet's own status says how many there are."""
    fleet = make_fleet(3, True, [ReplicaSet("rs", 3, present=3)], [A, B, C][:listed])
    assert fleet.unsettled == why
    for busy in (frozenset[str](), frozenset("a")):
        can = removable(fleet, 3, busy, -1)
        assert can.pods == (0 if why else 3 - len(busy)), busy
        assert why in can.because


# --- How many can go ------------------------------------------------------------------------------

MARK = -100
REMOVABLE: dict[str, tuple[list[Pod], set[str], int | None, int]] = {
    "all idle": ([A, B, C], set(), MARK, 3),
    "one busy": ([A, B, C], {"a"}, MARK, 2),
    "all busy": ([A, B], {"a", "b"}, MARK, 0),
    "a busy job of a pod that is gone": ([A, B], {"z"}, MARK, 2),
    "marks not set yet": ([A, B], {"a"}, None, 0),
    "marks set": ([A, replace(B, cost=MARK), C], {"a"}, None, 1),
    "a busy pod with the same cost": (
        [replace(A, cost=MARK), replace(B, cost=MARK)], {"a"}, None, 0),
    "a busy pod with a lower cost": ([replace(A, cost=MARK - 1), B, C], {"a"}, MARK, 0),
    "a busy pod with a high cost": ([replace(A, cost=5), B, C], {"a"}, None, 2),
    "a busy pod not ready": ([replace(A, rank=NOT_READY), B, C], {"a"}, MARK, 0),
    "a busy and an idle pod not ready": (
        [replace(A, rank=NOT_READY), replace(B, rank=NOT_READY), C], {"a"}, MARK, 1),
    "an idle pod pending before a busy one not ready": (
        [replace(A, rank=NOT_READY), replace(B, rank=PENDING), C], {"a"}, None, 1),
    "a busy pod of an unknown phase": (
        [replace(A, rank=UNKNOWN), replace(B, rank=PENDING), C], {"a"}, MARK, 1),
    "a busy pod without a node": ([replace(A, rank=UNASSIGNED), B, C], {"a"}, MARK, 0),
}  # fmt: skip


@pytest.mark.parametrize(("live", "busy", "cost", "expected"), REMOVABLE.values(), ids=REMOVABLE)
def test_idle_pods_can_go_if_they_come_before_every_busy_one(
    live: list[Pod], busy: set[str], cost: int | None, expected: int
) -> None:
    can = removable(fleet_of(*live), len(live), frozenset(busy), cost)
    assert can.pods == expected
    if not busy & {one.name for one in live}:
        assert can.because == ""
    elif expected or cost is None or len(busy) == len(live):
        assert can.because == ", as removing one would hit a busy pod"
    else:
        assert can.because == ", as the busy pod a would be removed first"


def test_replicas_without_a_pod_go_before_any_pod() -> None:
    fleet = make_fleet(5, True, [ReplicaSet("rs", 5)], [A, B])
    assert removable(fleet, 5, frozenset(["a", "b"]), MARK).pods == 3


# --- Victims --------------------------------------------------------------------------------------


def on(node: str, *names: str, rank: tuple[bool, int, bool] = READY) -> list[Pod]:
    return [pod(name, node=node, rank=rank) for name in names]


VICTIMS: dict[str, tuple[list[Pod], set[str], int, list[str]]] = {
    "none wanted": ([A, B], set(), 0, []),
    "fewer than none": ([A, B], set(), -2, []),
    "more than are idle": ([A, B, C], {"b"}, 9, ["a", "c"]),
    "those that the controller removes first": (
        [*on("n1", "ready"), *on("n1", "not-ready", rank=NOT_READY),
         *on("n1", "pending", rank=PENDING), *on("", "unassigned", rank=UNASSIGNED)],
        set(), 3, ["unassigned", "pending", "not-ready"]),
    "those on the nodes with the fewest busy pods": (
        [*on("n1", "a1", "a2", "a3"), *on("n2", "b1", "b2"), *on("n3", "c1", "c2", "c3")],
        {"a1", "a2", "c1", "c2", "c3"}, 2, ["b1", "b2"]),
    "then those that free a node soonest": (
        [*on("n1", "a1", "a2", "a3"), *on("n2", "b1"), *on("n3", "c1", "c2")],
        set(), 3, ["b1", "c1", "c2"]),
    "rank before nodes, as the controller sees no nodes there": (
        [*on("n1", "a1", "a2"), *on("n2", "b1"), *on("n1", "a3", rank=NOT_READY)],
        {"a1", "a2"}, 2, ["a3", "b1"]),
}  # fmt: skip


@pytest.mark.parametrize(("live", "busy", "count", "expected"), VICTIMS.values(), ids=VICTIMS)
def test_the_victims_are_idle_and_free_whole_nodes(
    live: list[Pod], busy: set[str], count: int, expected: list[str]
) -> None:
    for order in (live, live[::-1]):
        assert [one.name for one in choose_victims(order, busy, count)] == expected


RANKS = st.sampled_from([READY, READY, READY, NOT_READY, PENDING, UNKNOWN])
LIVE = st.lists(
    st.tuples(RANKS, st.sampled_from(["n1", "n2", "n3"]), st.sampled_from([0, -5, 7])), max_size=12
).map(
    lambda rows: [
        pod(f"p{number}", node=node, rank=rank, cost=cost)
        for number, (rank, node, cost) in enumerate(rows)
    ]
)


@given(LIVE, st.sets(st.integers(0, 11)), st.integers(0, 12))
def test_once_marked_the_victims_come_before_every_busy_pod(
    live: list[Pod], chosen: set[int], count: int
) -> None:
    """So the controller, which takes the lowest in its order, takes none that is busy."""
    busy = frozenset(one.name for number, one in enumerate(live) if number in chosen)
    cost = victim_cost(START, live, None)
    count = min(count, removable(fleet_of(*live), len(live), busy, cost).pods)
    victims = choose_victims(live, busy, count)
    assert len(victims) == count
    names = {one.name for one in victims}
    marked = [replace(one, cost=cost) if one.name in names else one for one in live]
    first = sorted(marked, key=lambda one: (one.rank, one.cost))[:count]
    if busy:
        assert not {one.name for one in first} & busy
        assert removable(fleet_of(*marked), len(marked), busy, None).pods >= count


@given(LIVE, st.integers(0, 12))
def test_no_other_choice_frees_more_nodes(live: list[Pod], count: int) -> None:
    """Among pods of the same rank, none of them busy, whose deletion costs nobody has set."""
    live = [replace(one, rank=READY, cost=0) for one in live]
    left = Counter(one.node for one in live)
    left.subtract(one.node for one in choose_victims(live, (), count))
    freed, budget = 0, count
    for size in sorted(Counter(one.node for one in live).values()):
        budget -= size
        freed += budget >= 0
    assert sum(number == 0 for number in left.values()) == freed


# --- The cost of a victim -------------------------------------------------------------------------


def test_a_later_run_sets_a_lower_cost() -> None:
    assert victim_cost(START, [], None) == -189_388_800, "the seconds since 2020"
    costs = [victim_cost(START + timedelta(seconds=s), [], None) for s in (0, 1, 60)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 3


def test_a_cost_is_lower_than_any_that_is_there() -> None:
    low = -1_000_000_000
    assert victim_cost(START, [pod(cost=low)], None) == low - 1
    assert victim_cost(START, [pod(cost=7)], Lease(START, low, "ab")) == low - 1
    assert victim_cost(START, [pod(cost=INT32_MIN)], None) == INT32_MIN, "and an int32"


# --- Which pods are busy --------------------------------------------------------------------------

W1, W2 = (
    pod(f"worker-5d4-{end}", node=node, uid=f"0c1a-{end}", addresses=addresses)
    for end, node, addresses in (
        ("aaaaa", "node-a", ("10.0.0.1", "fd00::1")),
        ("bbbbb", "node-b", ("10.0.0.3", "fd00::3")),
    )
)
SAME_NODE = replace(W1, name="worker-5d4-ccccc", uid="0c1a-ccccc", addresses=())


def reference(path: str) -> DocumentReference:
    nobody = AnonymousCredentials()  # type: ignore[no-untyped-call]
    return Client("demo", nobody).document(path)


FORMS: dict[str, tuple[object, str]] = {
    "a trailing newline": ("worker-5d4-aaaaa\n", "'worker-5d4-aaaaa\\n'"),
    "spaces around it": (" worker-5d4-aaaaa ", "' worker-5d4-aaaaa '"),
    "upper case": ("WORKER-5D4-AAAAA", "'WORKER-5D4-AAAAA'"),
    "a host name with its domain": (
        "worker-5d4-aaaaa.workers.default.svc.cluster.local",
        "'worker-5d4-aaaaa.workers.default.svc.cluster.local'"),
    "with its namespace": ("default/worker-5d4-aaaaa", "'default/worker-5d4-aaaaa'"),
    "with its kind": ("pod/worker-5d4-aaaaa", "'pod/worker-5d4-aaaaa'"),
    "with a process number": ("worker-5d4-aaaaa:17", "'worker-5d4-aaaaa:17'"),
    "its UID": ("0c1a-aaaaa", "'0c1a-aaaaa'"),
    "its UID in upper case": ("0C1A-AAAAA", "'0C1A-AAAAA'"),
    "an array": (["worker-5d4-aaaaa"], "['worker-5d4-aaaaa']"),
    "an array that also has other things": (
        [None, 3, "worker-5d4-aaaaa"], "[None, 3, 'worker-5d4-aaaaa']"),
    "a map": ({"pod": "worker-5d4-aaaaa"}, "{'pod': 'worker-5d4-aaaaa'}"),
    "a map in an array": ([{"pod": "worker-5d4-aaaaa"}], "[{'pod': 'worker-5d4-aaaaa'}]"),
    "the name of its node": ("node-a", "'node-a'"),
    "the name of its node in upper case": ("Node-A", "'Node-A'"),
    "the name of its node with a domain": ("node-a.example.com", "'node-a.example.com'"),
    "its address": ("10.0.0.1", "'10.0.0.1'"),
    "its address with a port": ("10.0.0.1:8080", "'10.0.0.1:8080'"),
    "its address in a URL": ("http://10.0.0.1:8080/run", "'http://10.0.0.1:8080/run'"),
    "its IPv6 address with a port": ("[fd00::1]:8080", "'[fd00::1]:8080'"),
    "its IPv6 address with a port and no brackets": ("fd00::1:8080", "'fd00::1:8080'"),
    "an address in a list as text": ("[10.0.0.9, 10.0.0.1]", "'[10.0.0.9, 10.0.0.1]'"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "shown"), FORMS.values(), ids=FORMS)
def test_a_pod_named_in_another_form_is_busy_and_the_value_is_shown(
    value: object, shown: str
) -> None:
    found = find_busy_pods([W1, W2], [("jobs/1", value)], "assignedPodId")
    assert ({*found.names}, found.jobs, found.inexact) == ({W1.name}, 1, True)
    [warning] = found.warnings
    assert f"{shown} in jobs/1 counts as worker-5d4-aaaaa" in warning


def test_a_reference_to_a_document_named_like_the_pod_protects_it() -> None:
    value = reference("workers/worker-5d4-aaaaa")
    found = find_busy_pods([W1, W2], [("jobs/1", value)], "pod")
    assert ({*found.names}, found.inexact) == ({W1.name}, True)
    assert "'workers/worker-5d4-aaaaa' in jobs/1" in found.warnings[0]


def test_the_name_of_a_node_protects_all_its_pods() -> None:
    """With hostNetwork a worker's host name is its node's; which of its pods it is, is unknown."""
    found = find_busy_pods([W1, W2, SAME_NODE], [("jobs/1", "node-a")], "pod")
    assert ({*found.names}, found.jobs) == ({W1.name, SAME_NODE.name}, 1)
    assert "'node-a' in jobs/1 counts as worker-5d4-aaaaa, worker-5d4-ccccc" in found.warnings[0]


@pytest.mark.parametrize(
    "value", ["worker-5d4-zzzzz", "", " ", None, 7, True, [], {}, "node-c", "node", b"\xff"]
)
def test_a_busy_job_that_names_no_live_pod_protects_none(value: object) -> None:
    jobs = [("jobs/1", value), ("jobs/2", W2.name)]
    found = find_busy_pods([W1, W2, pod("unassigned", node="")], jobs, "pod")
    assert ({*found.names}, found.jobs, found.inexact) == ({W2.name}, 1, False)
    [warning] = found.warnings
    assert f"pod={value!r} in jobs/1" in warning


@pytest.mark.parametrize(("number", "more"), [(3, ""), (4, " and 1 more"), (10, " and 7 more")])
def test_a_warning_names_three_of_many_pods(number: int, more: str) -> None:
    pods = [replace(W1, name=f"w-{index}", uid=f"u-{index}") for index in range(number)]
    [warning] = find_busy_pods(pods, [("jobs/1", "node-a")], "pod").warnings
    assert f"counts as w-0, w-1, w-2{more}; such a pod" in warning


def test_busy_jobs_are_reported_by_number_with_one_example() -> None:
    jobs: list[tuple[str, object]] = [(f"jobs/{n}", f"gone-{n}") for n in range(40)]
    jobs += [(f"jobs/x{n}", f"{W1.name}.local") for n in range(5)]
    odd, unknown = find_busy_pods([W1], jobs, "pod").warnings
    assert "5 " in odd and odd.count("jobs/x") == 1
    assert "40 " in unknown and unknown.count("gone-") == 1


def test_a_plain_name_is_busy_without_a_warning() -> None:
    jobs = [("jobs/1", W1.name), ("jobs/2", W1.name), ("jobs/3", W2.name)]
    found = find_busy_pods([W1, W2, SAME_NODE], jobs, "pod")
    assert ({*found.names}, found.jobs, found.warnings) == ({W1.name, W2.name}, 3, ())


def test_a_job_that_names_two_pods_counts_once() -> None:
    """It was read twice, and changed hands meanwhile."""
    found = find_busy_pods([W1, W2], [("jobs/1", W1.name), ("jobs/1", W2.name)], "pod")
    assert ({*found.names}, found.jobs) == ({W1.name, W2.name}, 1)


@given(st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.none() | st.floats()))
def test_no_value_is_an_error(value: object) -> None:
    found = find_busy_pods([W1, W2], [("jobs/1", value)], "pod")
    assert len(found.warnings) == 1 and len(found.warnings[0]) < 500


def test_the_short_name_of_a_node_protects_its_pods() -> None:
    named = replace(W1, node="ip-10-0-0-7.example.internal")
    numbered = replace(W2, node="10.0.0.8")
    found = find_busy_pods([named, numbered], [("jobs/1", "ip-10-0-0-7"), ("jobs/2", "10")], "pod")
    assert {*found.names} == {W1.name}


@pytest.mark.parametrize("value", ["10.0.0.10", "110.0.0.1", "fd00::12", "http://10.0.0.2/10.0.0"])
def test_another_address_protects_no_pod(value: str) -> None:
    found = find_busy_pods([W1, W2], [("jobs/1", value)], "pod")
    assert (found.names, "names no live pod" in found.warnings[0]) == (frozenset(), True)


def test_a_cost_that_a_run_gave_back_orders_victims() -> None:
    high = replace(A, cost=1000, own_cost=True, node="a")
    none = replace(B, node="b")
    assert [one.name for one in choose_victims([high, none], (), 1)] == [none.name]


def test_a_mark_orders_victims_as_no_cost_at_all_does() -> None:
    marked = replace(B, cost=scaler.HIGHEST_MARK, own_cost=True, node="n")
    low, none = replace(A, cost=-5, node="n"), replace(A, name="c", node="n")
    order = [one.name for one in choose_victims([none, marked, low], (), 3)]
    assert order == [low.name, marked.name, none.name], "b before c, by their names"


def test_a_cost_that_a_run_has_set_does_not_order_victims() -> None:
    """As 0.2.0 left the highest one on pods that were busy then."""
    left = replace(A, cost=2**31 - 1, own_cost=True, node="a")
    kept = replace(B, cost=5, node="b")
    assert [one.name for one in choose_victims([kept, left], (), 1)] == ["a"]
