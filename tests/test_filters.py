"""Filters with times, references and alternatives; several collections; the oldest waiting job."""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud.firestore import Client, DocumentReference
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import scaler
from tests.conftest import Queue
from tests.support.firestore import Call, Fail, FakeFirestore, On, missing_index
from tests.support.world import BUSY, PROJECT, START, Run, World

MINUTE = timedelta(minutes=1)
NOW = {"timestampValue": "now"}
NEEDED = {"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs"}
WAITING, PROCESSING = ["status", "==", "waiting"], ["status", "==", "processing"]
EXPIRED = ["leaseUntil", "<", NOW]
EAGER = {
    "MAX_REPLICAS": "10",
    "SCALE_DOWN_COOLDOWN_SECONDS": "0",
    "SCALE_DOWN_STABILIZATION_SECONDS": "0",
}

Either = tuple[World, Queue]


@pytest.fixture
def either(world: World, any_queue: Queue) -> Either:
    """The same world, its queue once the fake and once the official emulator."""
    world.firestore = any_queue.host
    return world, any_queue


def reference(path: str) -> DocumentReference:
    client = Client(PROJECT, AnonymousCredentials())  # type: ignore[no-untyped-call]
    document: DocumentReference = client.document(path)
    return document


def fill(queue: Queue, jobs: Mapping[str, Mapping[str, object]], collection: str = "jobs") -> None:
    for name, fields in jobs.items():
        queue.put(f"{collection}/{name}", fields)


def waiting(world: World, *conditions: object, **settings: str) -> object:
    """How many jobs a dry run counts."""
    run = world.run("--dry-run", WAITING_FILTER=json.dumps(conditions), **settings)
    assert run.exit_code == 0, run
    return run.record["waiting"]


def problem(**environ: object) -> str:
    """Why settings are refused, in one sentence; values that are not text become JSON."""
    texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in environ.items()}
    with pytest.raises(scaler.Failure) as caught:
        scaler.read_settings({**NEEDED, **texts})
    assert (caught.value.reason, caught.value.exit_code) == ("InvalidSettings", 2)
    return str(caught.value)


def warnings(run: Run) -> list[str]:
    return [line for line in run.stdout.splitlines() if " WARNING " in line]


# --- Typed values -------------------------------------------------------------------------------

# How many of the jobs of `due` have a `runAt` of at most this time; the clock is at START.
DUE = {
    "now": 4,
    "now-15m": 3,
    "now-16m": 2,
    "now-900s": 3,
    "now-901s": 2,
    "now-1h": 2,
    "now-2d": 1,
    "now-3d": 0,
    "now+0s": 4,
    "now+59m": 4,
    "now+2h": 5,
    "now+7d": 6,
    "2026-01-01T00:00:00Z": 4,
    "2025-12-31T23:59:59.999Z": 3,
    "2026-01-01T09:00:00+09:00": 4,
    "2025-12-31T18:44:59-05:00": 2,
}


def test_a_job_with_a_due_time_waits_from_then_on(either: Either) -> None:
    world, queue = either
    offsets = (-2 * 1440, -60, -15, 0, 60, 7 * 1440)  # in minutes
    fill(queue, {f"due{n}": {"status": "scheduled", "runAt": START + n * MINUTE} for n in offsets})
    fill(queue, {"text": {"status": "scheduled", "runAt": "2020-01-01T00:00:00Z"}, "none": {}})
    for text, expected in DUE.items():
        due = ["runAt", "<=", {"timestampValue": text}]
        assert waiting(world, ["status", "==", "scheduled"], due) == expected, text
    for op, expected in {"<": 3, "<=": 4, "==": 1, "!=": 6, ">": 2, ">=": 3}.items():
        assert waiting(world, ["runAt", op, NOW]) == expected, op
    both = ["runAt", "in", [NOW, {"timestampValue": "now-1h"}]]
    assert waiting(world, both) == 2


def test_now_is_the_time_of_each_look(world: World) -> None:
    fill(world.queue, {"later": {"runAt": START + MINUTE}})
    assert waiting(world, ["runAt", "<=", NOW]) == 0
    world.pass_time(60)
    assert waiting(world, ["runAt", "<=", NOW]) == 1


def test_a_job_may_refer_to_a_document(either: Either) -> None:
    world, queue = either
    fast, slow = {"referenceValue": "lanes/fast"}, {"referenceValue": "regions/eu/lanes/slow"}
    fill(queue, {f"fast{n}": {"lane": reference("lanes/fast")} for n in range(2)})
    fill(queue, {"slow": {"lane": reference("regions/eu/lanes/slow")}})
    fill(queue, {"text": {"lane": "lanes/fast"}, "map": {"lane": {"referenceValue": "x"}}})
    assert waiting(world, ["lane", "==", fast]) == 2
    assert waiting(world, ["lane", "in", [fast, slow]]) == 3
    assert waiting(world, ["lane", "==", "lanes/fast"]) == 1


def test_any_other_object_is_a_map(either: Either) -> None:
    world, queue = either
    maps: list[dict[str, object]] = [{}, {"region": "eu"}, {"stringValue": "a"}, {"seconds": 1}]
    fill(queue, {f"job{n}": {"place": place} for n, place in enumerate(maps)})
    for place in maps:
        assert waiting(world, ["place", "==", place]) == 1, place


TIMES = [
    "tomorrow", "now-5x", "now-5", "now - 5m", "now-m", "now5m", "now-1.5h", "now-5m-5s", "",
    "-15m", "now-9999999999d", "2026-01-01", "2026-02-30T00:00:00Z",
    "2026-01-01T25:00:00Z", 1767225600, None, True, ["now"], {"a": 1},
]  # fmt: skip
PATHS = [
    "lanes", "lanes/fast/jobs", "", "/", "lanes/", "lanes//fast/x", " lanes/fast", "lanes/ fast",
    5, None, ["lanes", "fast"],
]  # fmt: skip


@pytest.mark.parametrize("value", TIMES, ids=repr)
def test_an_invalid_time_is_rejected(value: object) -> None:
    for operand in ({"timestampValue": value}, [{"timestampValue": value}]):
        op = "in" if isinstance(operand, list) else "<="
        text = problem(WAITING_FILTER=[["runAt", op, operand]])
        assert text.startswith("WAITING_FILTER="), text
        assert "now-15m" in text and "2026-01-01T00:00:00Z" in text, text


@pytest.mark.parametrize("value", PATHS, ids=repr)
def test_an_invalid_reference_is_rejected(value: object) -> None:
    text = problem(BUSY_FILTER=[["lane", "==", {"referenceValue": value}]])
    assert text.startswith("BUSY_FILTER=") and "lanes/fast" in text, text


@pytest.mark.parametrize("more", [{"referenceValue": "lanes/fast"}, {"x": 1}], ids=repr)
def test_a_typed_value_has_one_key(more: dict[str, object]) -> None:
    assert "timestampValue" in problem(WAITING_FILTER=[["a", "==", {**NOW, **more}]])


def test_every_mistake_in_filters_is_named_at_once() -> None:
    wrong = [["runAt", "<=", {"timestampValue": "tomorrow"}]]
    text = problem(WAITING_FILTER=wrong, BUSY_FILTER=[[]], WAITING_SINCE_FIELD="a..b")
    for name in ("WAITING_FILTER", "BUSY_FILTER", "WAITING_SINCE_FIELD"):
        assert f"{name}=" in text, text
    assert "'tomorrow'" in text, text


# --- Alternatives -------------------------------------------------------------------------------


def lease_queue(queue: Queue) -> None:
    """Two fresh jobs, two that were given back, two of lost workers, one at work."""
    past, future = START - MINUTE, START + MINUTE
    for number in range(2):
        queue.put(f"jobs/fresh{number}", {"status": "waiting"})
        queue.put(f"jobs/again{number}", {"status": "waiting", "leaseUntil": past})
        queue.put(f"jobs/lost{number}", {"status": "processing", "leaseUntil": past})
    queue.put("jobs/busy", {"status": "processing", "leaseUntil": future})
    queue.put("jobs/done", {"status": "done", "leaseUntil": None})


def test_jobs_of_lost_workers_wait_beside_fresh_ones(either: Either) -> None:
    """Fresh jobs have no lease: an inequality must not keep them out."""
    world, queue = either
    lease_queue(queue)
    assert waiting(world, [WAITING], [PROCESSING, EXPIRED]) == 6
    assert waiting(world, [PROCESSING, EXPIRED], [WAITING]) == 6
    assert waiting(world, [WAITING]) == waiting(world, WAITING) == 4


def test_a_job_that_matches_several_alternatives_counts_once(either: Either) -> None:
    world, queue = either
    lease_queue(queue)
    assert waiting(world, [WAITING], [EXPIRED]) == 6
    assert waiting(world, [WAITING], [WAITING]) == 4
    assert waiting(world, [["leaseUntil", "<=", NOW]], [EXPIRED]) == 4
    fill(queue, {"old": {"createdAt": START - 60 * MINUTE}})
    fill(queue, {"all": {"status": "waiting", "leaseUntil": START - MINUTE, "createdAt": START}})
    old = ["createdAt", "<=", NOW]
    assert waiting(world, [WAITING], [EXPIRED], [old]) == 8
    assert waiting(world, [WAITING, EXPIRED], [WAITING, old]) == 3
    assert waiting(world, [["status", "in", ["waiting", "done"]]], [EXPIRED]) == 8
    assert waiting(world, [["status", "!=", "done"]], [EXPIRED]) == 8


SMALL, FIELD = st.integers(0, 2), st.sampled_from("abc")
CONDITION = st.one_of(
    st.tuples(FIELD, st.sampled_from(["==", "<", ">="]), SMALL),
    st.tuples(FIELD, st.just("in"), st.lists(SMALL, min_size=1, max_size=2)),
)
ALTERNATIVES = st.lists(st.lists(CONDITION, min_size=1, max_size=2), min_size=2, max_size=3)
EVERY_JOB = [
    {name: value for name, value in zip("abc", values, strict=True) if value is not None}
    for values in itertools.product((None, 0, 1, 2), repeat=3)
]
MEETS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "<": operator.lt, ">=": operator.ge, "in": lambda one, many: one in many,
}  # fmt: skip


@hypothesis_settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ALTERNATIVES)
def test_alternatives_count_what_any_of_them_would_find(
    world: World, alternatives: list[list[tuple[str, str, Any]]]
) -> None:
    """Among one job of every kind: each field is missing, or has one of three values."""
    fill(world.queue, {str(number): job for number, job in enumerate(EVERY_JOB)})
    expected = sum(
        any(all(n in job and MEETS[op](job[n], v) for n, op, v in one) for one in alternatives)
        for job in EVERY_JOB
    )
    assert waiting(world, *alternatives) == expected


def test_an_or_of_equalities_is_one_read(world: World) -> None:
    lease_queue(world.queue)
    assert waiting(world, [WAITING], [["status", "==", "done"]]) == 5
    assert len(world.queue.calls) == 1


@pytest.mark.parametrize("name", ["WAITING_FILTER", "BUSY_FILTER"])
@pytest.mark.parametrize(
    "value",
    [
        [[]],
        [[WAITING], []],
        [WAITING, [PROCESSING]],
        [[PROCESSING], WAITING],
        [[WAITING], {"status": "waiting"}],
        [[[WAITING]]],
        [[WAITING], ["status"]],
    ],
    ids=json.dumps,
)
def test_alternatives_are_lists_of_conditions(name: str, value: object) -> None:
    text = problem(**{name: value})
    assert text.startswith(f"{name}=") and '["status", "==", "waiting"]' in text, text


def equalities(number: int) -> list[list[list[object]]]:
    return [[["lane", "==", n]] for n in range(number)]


def one_of(field: str, number: int) -> list[object]:
    return [field, "in", [*range(number)]]


TOO_MANY: list[object] = [
    equalities(31),
    [[one_of("a", 20)], [one_of("b", 11)]],
    [one_of("a", 6), one_of("b", 6)],
    [[one_of("a", 5), ["b", "array-contains-any", [*range(6)]]], [WAITING]],
]
JUST_RIGHT: list[object] = [
    equalities(30),
    [[one_of("a", 20)], [one_of("b", 10)]],
    [one_of("a", 6), one_of("b", 5)],
]


@pytest.mark.parametrize("value", TOO_MANY, ids=range(4))
def test_too_many_disjunctions_are_rejected(value: object) -> None:
    for name in ("WAITING_FILTER", "BUSY_FILTER"):
        text = problem(**{name: value})
        assert text.startswith(name) and "30" in text, text


@pytest.mark.parametrize("value", JUST_RIGHT, ids=range(3))
def test_thirty_disjunctions_are_taken(value: list[object], world: World) -> None:
    world.cluster.scale("worker", 3)
    assert waiting(world, *value, BUSY_FILTER=json.dumps(value)) == 0


def test_alternatives_for_busy_jobs_share_the_limit_with_the_names(either: Either) -> None:
    world, queue = either
    world.cluster.scale("worker", 20)
    pods = [pod["metadata"]["name"] for pod in world.cluster.pods("worker")]
    heartbeat = {"heartbeat": START - MINUTE}
    for number, pod in enumerate(pods):
        kinds = ({"status": "processing"}, {"status": "uploading"}, heartbeat, {"status": "done"})
        queue.put(f"jobs/{pod}", {"assignedPodId": pod, **kinds[number % 4]})
    queue.put("jobs/both", {"assignedPodId": pods[0], "status": "processing", **heartbeat})
    queue.put("jobs/else", {"assignedPodId": "another", "status": "processing", **heartbeat})
    alive = [
        [["status", "in", ["processing", "uploading"]]],
        [["heartbeat", ">", {"timestampValue": "now-2m"}]],
    ]
    run = world.run("--dry-run", BUSY_FILTER=json.dumps(alive), MAX_REPLICAS="30")
    assert (run.record["busy"], run.exit_code) == (16, 0), run
    if isinstance(queue, FakeFirestore):
        asked = [names_in(call) for call in queue.calls if call.kind == "count"]
        assert {name for names in asked for name in names} == set(pods)


def names_in(call: Call) -> list[str]:
    return [
        one for name, op, v in call.filters if (name, op) == ("assignedPodId", "in") for one in v
    ]


def test_a_pod_that_is_busy_by_any_alternative_stays(either: Either) -> None:
    world, queue = either
    world.cluster.scale("worker", 3)
    pods = [pod["metadata"]["name"] for pod in world.cluster.pods("worker")]
    lease = {"status": "leased", "leaseUntil": START + 60 * MINUTE}
    fill(queue, {"a": {"status": "processing", "assignedPodId": pods[1]}})
    fill(queue, {"b": {**lease, "assignedPodId": pods[2]}})
    fill(queue, {"c": {**lease, "leaseUntil": START - MINUTE, "assignedPodId": pods[0]}})
    leased = [["status", "==", "leased"], ["leaseUntil", ">", NOW]]
    run = world.run(
        BUSY_FILTER=json.dumps([[PROCESSING], leased]),
        **EAGER,
    )
    assert (run.reason, run.record["busy"], world.replicas) == ("ScaledDown", 2, 2), run
    left = {pod["metadata"]["name"] for pod in world.cluster.pods("worker")}
    assert left == set(pods[1:]), run


# --- Several collections ------------------------------------------------------------------------

LANES = "urgent, tenants/acme/jobs ,jobs"


def test_several_collections_are_added_up(either: Either) -> None:
    world, queue = either
    world.cluster.scale("worker", 4)
    pods = [pod["metadata"]["name"] for pod in world.cluster.pods("worker")]
    for collection, number in {"jobs": 1, "urgent": 2, "tenants/acme/jobs": 3, "other": 9}.items():
        for job in range(number):
            queue.put(f"{collection}/{job}", {"status": "waiting"})
        queue.put(f"{collection}/x", {"status": "processing", "assignedPodId": pods[number % 4]})
    run = world.run("--dry-run", QUEUE_COLLECTION=LANES, BUSY_FILTER=BUSY, MAX_REPLICAS="20")
    assert (run.record["waiting"], run.record["busy"]) == (6, 3), run
    assert "6 jobs waiting, 3 busy" in run.stdout, run


def test_a_pod_that_is_busy_in_any_collection_stays(either: Either) -> None:
    world, queue = either
    world.cluster.scale("worker", 4)
    pods = [pod["metadata"]["name"] for pod in world.cluster.pods("worker")]
    for collection, pod in (("jobs", pods[3]), ("urgent", pods[2])):
        queue.put(f"{collection}/x", {"status": "processing", "assignedPodId": pod})
    run = world.run(
        QUEUE_COLLECTION=LANES,
        BUSY_FILTER=BUSY,
        **EAGER,
    )
    assert (run.reason, world.replicas) == ("ScaledDown", 2), run
    left = {pod["metadata"]["name"] for pod in world.cluster.pods("worker")}
    assert left == set(pods[2:]), run


def test_a_collection_that_cannot_be_read_leaves_no_partial_sum(world: World) -> None:
    fill(world.queue, {f"job{n}": {"status": "waiting"} for n in range(3)})
    unreadable = Fail(missing_index().code, missing_index().message)
    world.queue.fault(On("count", where=lambda call: call.collection == "urgent"), unreadable)
    run = world.run(QUEUE_COLLECTION="jobs,urgent")
    assert (run.record["waiting"], run.exit_code, world.replicas) == (None, 2, 1), run


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        ("jobs,jobs", "jobs"),
        ("jobs,/jobs/", "jobs"),
        ("jobs,", "none of them empty"),
        (",", "none of them empty"),
        ("jobs,tenants/acme", "odd number of segments"),
    ],
)
def test_each_collection_is_named_once_and_is_one(value: str, accepted: str) -> None:
    text = problem(QUEUE_COLLECTION=value)
    assert text.startswith(f"QUEUE_COLLECTION='{value}'") and accepted in text, text


def test_each_of_several_groups_is_a_bare_id(emulated: World, jobs: Client) -> None:
    for path in ("jobs/1", "tenants/acme/jobs/2", "tenants/acme/mails/3"):
        jobs.document(path).set({"status": "waiting"})
    run = emulated.run(
        "--dry-run", QUEUE_COLLECTION="jobs,mails", QUEUE_COLLECTION_GROUP="true", MAX_REPLICAS="9"
    )
    assert run.record["waiting"] == 3, run
    text = problem(QUEUE_COLLECTION="mails,tenants/acme/jobs", QUEUE_COLLECTION_GROUP="true")
    assert text.startswith("QUEUE_COLLECTION=") and "bare" in text, text


# --- The oldest waiting job ---------------------------------------------------------------------

SINCE = {"WAITING_SINCE_FIELD": "createdAt"}
OLDEST = On("query", where=lambda call: call.order_by == ("createdAt",))


def aged(queue: Queue, *minutes: float, collection: str = "jobs", **more: object) -> None:
    for age in minutes:
        job = {"status": "waiting", "createdAt": START - age * MINUTE, **more}
        queue.put(f"{collection}/aged-{age}", job)


def test_the_line_and_the_record_have_the_oldest_jobs_age(either: Either) -> None:
    world, queue = either
    aged(queue, 1, 12, 3, 0.5, 5)
    aged(queue, 90, status="done")
    run = world.run(**SINCE)
    assert run.record["oldestWaitingSeconds"] == 720, run
    assert "5 jobs waiting, the oldest for 12 min" in run.stdout, run
    assert run.reason == "ScaledUp", run
    if isinstance(queue, FakeFirestore):
        [read] = [call for call in queue.calls if call.kind == "query"]
        assert (read.limit, read.select, read.reads_billed) == (1, ("createdAt",), 1)


def test_the_json_line_has_the_oldest_jobs_age(world: World) -> None:
    aged(world.queue, 2)
    run = world.run(**SINCE, LOG_FORMAT="json")
    assert json.loads(run.stdout)["oldestWaitingSeconds"] == 120, run


def test_without_the_field_nothing_more_is_read(world: World) -> None:
    aged(world.queue, 2)
    run = world.run()
    assert "oldestWaitingSeconds" not in run.record and "oldest" not in run.stdout, run
    assert [call.kind for call in world.queue.calls] == ["count"]


def test_without_a_waiting_job_there_is_no_age(either: Either) -> None:
    world, queue = either
    aged(queue, 90, status="done")
    run = world.run(**SINCE)
    assert run.record["oldestWaitingSeconds"] is None, run
    assert "oldest" not in run.stdout and not warnings(run), run


def test_a_clock_that_is_ahead_makes_no_negative_age(world: World) -> None:
    aged(world.queue, -5)
    run = world.run(**SINCE)
    assert run.record["oldestWaitingSeconds"] == 0, run


def test_the_oldest_job_of_all_collections_and_alternatives(either: Either) -> None:
    world, queue = either
    aged(queue, 3)
    aged(queue, 7, collection="urgent")
    settings = {**SINCE, "QUEUE_COLLECTION": "jobs,urgent"}
    settings["WAITING_FILTER"] = json.dumps([[WAITING], [PROCESSING, EXPIRED]])
    assert world.run("--dry-run", **settings).record["oldestWaitingSeconds"] == 420
    aged(queue, 9, status="processing", leaseUntil=START - MINUTE)
    aged(queue, 11, status="processing", leaseUntil=START + MINUTE)
    run = world.run("--dry-run", **settings)
    assert (run.record["oldestWaitingSeconds"], run.record["waiting"]) == (540, 3), run


def test_a_missing_index_for_the_oldest_job_costs_a_warning_only(world: World) -> None:
    aged(world.queue, 1, 2, 3)
    world.queue.fault(OLDEST, missing_index(PROJECT))
    run = world.run(**SINCE)
    assert (run.exit_code, run.reason, world.replicas) == (0, "ScaledUp", 3), run
    assert run.record["oldestWaitingSeconds"] is None and run.record["waiting"] == 3, run
    [warning] = warnings(run)
    assert "WAITING_SINCE_FIELD" in warning and "https://console.firebase" in warning, run


@pytest.mark.parametrize(
    ("value", "age"),
    [(1767225000000, 600), (1767225540, 60), ("2025-12-31T23:00:00Z", 3600)],
    ids=["milliseconds", "seconds", "text"],
)
def test_a_time_need_not_be_a_timestamp(value: object, age: int, world: World) -> None:
    fill(world.queue, {"one": {"status": "waiting", "createdAt": value}})
    run = world.run(**SINCE)
    assert run.record["oldestWaitingSeconds"] == age and not warnings(run), run


@pytest.mark.parametrize("value", [None, True, "yesterday", [1]], ids=repr)
def test_an_invalid_waiting_since_only_gives_a_warning(value: object, world: World) -> None:
    """null and booleans sort before all times, and would hide the oldest job silently."""
    fill(world.queue, {"odd": {"status": "waiting", "createdAt": value}})
    run = world.run(**SINCE)
    assert (run.exit_code, run.record["oldestWaitingSeconds"]) == (0, None), run
    [warning] = warnings(run)
    assert "WAITING_SINCE_FIELD" in warning and "createdAt" in warning, run


# --- The silent trap ----------------------------------------------------------------------------


def test_a_time_written_as_text_that_matches_nothing_is_warned_about(either: Either) -> None:
    world, queue = either
    fill(queue, {f"job{n}": {"runAt": START - n * MINUTE} for n in range(3)})
    for op in ("<", "<=", ">", ">="):
        run = world.run("--dry-run", WAITING_FILTER=f'[["runAt", "{op}", "2026-11-26T16:12:53Z"]]')
        [warning] = warnings(run)
        assert "WAITING_FILTER" in warning and "timestampValue" in warning, run
        assert (run.record["waiting"], run.exit_code) == (0, 0), run


def test_texts_that_match_are_not_warned_about(world: World) -> None:
    fill(world.queue, {"text": {"runAt": "2025-01-01T00:00:00Z"}, "label": {"runAt": "b"}})
    for condition in (
        ["runAt", "<=", "2026-11-26T16:12:53Z"],
        ["runAt", "==", "2026-11-26T16:12:53Z"],
        ["runAt", "<", "a"],
        ["runAt", "<=", {"timestampValue": "2026-11-26T16:12:53Z"}],
    ):
        run = world.run("--dry-run", WAITING_FILTER=json.dumps([condition]))
        assert not warnings(run), run


def test_the_trap_is_found_in_one_of_several_alternatives(world: World) -> None:
    trap: list[Any] = [[WAITING], [PROCESSING, ["leaseUntil", "<", datetime.now(UTC).isoformat()]]]
    fill(world.queue, {"lost": {"status": "processing", "leaseUntil": START - MINUTE}})
    [warning] = warnings(world.run("--dry-run", WAITING_FILTER=json.dumps(trap)))
    assert "timestampValue" in warning


# --- How alternatives are asked -----------------------------------------------------------------

A, B = ("a", "==", 1), ("b", "==", 2)


@pytest.mark.parametrize("op", ["<", "<=", ">", ">=", "!="])
def test_an_inequality_gets_a_query_of_its_own(op: str) -> None:
    """Firestore would leave out the jobs without its field."""
    other = ("c", op, 3)
    signs = {question: sign for sign, question in scaler.signed_union(((A,), (other,), (B,)))}
    assert signs == {(((A,), (B,)),): 1, (((other,),),): 1, (((A,), (B,)), ((other,),)): -1}


def test_alternatives_that_exclude_each_other_have_nothing_to_subtract() -> None:
    fresh, lost = (("s", "==", "waiting"),), (("s", "==", "processing"), ("lease", "<", 1))
    assert [sign for sign, _ in scaler.signed_union((fresh, lost))] == [1, 1]


@pytest.mark.parametrize(
    ("others", "excluded"), [(["b", "c"], False), (["c", "d"], True), (["c"], True)]
)
def test_lists_of_values_exclude_each_other_if_they_share_none(
    others: list[str], excluded: bool
) -> None:
    left: scaler.Filter = ((("status", "in", ["a", "b"]),),)
    right: scaler.Filter = ((("status", "in", others),),)
    for one, other in ((left, right), (right, left)):
        assert scaler.exclusive(one, other) is excluded
    single: scaler.Filter = ((("status", "==", others[0]),),)
    assert scaler.exclusive(left, single) is excluded


def test_many_alternatives_that_exclude_each_other_need_a_query_each() -> None:
    found = scaler.filters(
        json.dumps([[["status", "==", n], [f"a{n}", "<", 1]] for n in range(30)])
    )
    assert [sign for sign, _ in scaler.signed_union(found)] == [1] * 30


@pytest.mark.parametrize("text", ["now-800000d", "now+8000000d", "now-999999999d"])
def test_a_time_out_of_range_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="expected now"):
        scaler.timestamp_value(text)


def test_a_reference_may_have_slashes_around_it() -> None:
    assert scaler.reference_value("/X/fast X/") == scaler.Reference("X/fast X")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ('[["a", "==", {"referenceValue": "lanes"}]]',
         "referenceValue 'lanes': expected a document path such as lanes/fast: an even number of "
         "segments"),
        ('[[["a", "==", 1]], ["a", "==", 1]]',
         "a list of such lists has no condition, and no empty list, beside them"),
        ('[["a", "=", 1]]',
         "'=' is not one of the operators ==, !=, <, <=, >, >=, in, not-in, array-contains, "
         "array-contains-any, array_contains, array_contains_any"),
        ('[["a", "not-in", [1]], ["b", "in", [1]]]',
         "Firestore cannot combine not-in with alternatives, in or any"),
        ('[["a", "not-in", [1]], ["b", "array-contains-any", [1]]]',
         "Firestore cannot combine not-in with alternatives, in or any"),
        ('[[["a", "not-in", [1]]], [["b", "==", 1]]]',
         "Firestore cannot combine not-in with alternatives, in or any"),
        (json.dumps([[[a, "in", [*range(7)]], [b, "<", 1]] for a, b in ("ab", "cd")]),
         "a job can match several alternatives, which multiply to 49, lists included, and "
         "Firestore takes at most 30"),
        (json.dumps([[[f"a{number}", "<", 1]] for number in range(16)]),
         "counting each job once would take more than 30 queries: a job can match too many "
         "alternatives with inequalities on different fields"),
        ('[["a", "==", {"timestampValue": "now", "x": 1}]]',
         "{'timestampValue': 'now', 'x': 1}: expected timestampValue alone"),
    ],
)  # fmt: skip
def test_rejection_messages(raw: str, said: str) -> None:
    with pytest.raises(ValueError, match="expected a JSON list") as refused:
        scaler.filters(raw)
    form = 'expected a JSON list of [field, op, value], such as [["status", "==", "waiting"]]'
    assert str(refused.value) == f"{form}; {said}"
