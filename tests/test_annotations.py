"""What users write into the annotations, and what the scaler writes there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

import scaler
from scaler import ANNOTATION, LAST_SCALE_TIME, State, parse_state, read_time, write_time
from tests.support.firestore import Fail, Hang
from tests.support.kubernetes import Match
from tests.support.world import START, World

SETTINGS = scaler.read_settings({"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs"})

SAME_INSTANT = [
    "2026-01-01T00:00:00Z",
    "2026-01-01t00:00:00z",
    "2026-01-01 00:00:00Z",
    "2026-01-01T00:00:00.000Z",
    "2026-01-01T00:00:00.000000000+00:00",
    "2026-01-01T09:00:00+09:00",
    "2025-12-31T19:00:00-05:00",
    "2026-01-01T00:00:00",
    " 2026-01-01T00:00:00Z\n",
    "20260101",
    " 1767225600\n",
    "1767225600.0",
]


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is nine hours ahead."""
    monkeypatch.setenv("TZ", "Asia/Seoul")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("typed", SAME_INSTANT)
def test_a_time_is_read_as_people_type_it(typed: str, far_from_utc: None) -> None:
    read = read_time(typed)
    assert read == START and read.utcoffset() == timedelta(0)
    assert write_time(read.astimezone()) == "2026-01-01T00:00:00Z"


def test_unix_seconds_have_nine_digits_or_more() -> None:
    assert read_time("100000000.25") == datetime(1973, 3, 3, 9, 46, 40, 250_000, UTC)


NO_TIMES = ["", "now", "5m", "-5", "12345678", "2026-13-01T00:00:00Z", "0001-01-01T00:00+14:00"]


@pytest.mark.parametrize("typed", [*NO_TIMES, "9" * 400])
def test_anything_else_is_rejected_as_a_time(typed: str) -> None:
    with pytest.raises(ValueError, match=r"^not a time such as 2026-01-01T00:00:00Z or 17672256"):
        read_time(typed)


@given(st.text())
def test_any_text_is_a_time_or_rejected_plainly(typed: str) -> None:
    try:
        read_time(typed)
    except ValueError as error:
        assert "not a time" in str(error)


@given(st.datetimes(datetime(1970, 1, 2), datetime(9000, 1, 1), timezones=st.just(UTC)))
def test_a_written_time_is_read_back_to_the_second(when: datetime) -> None:
    assert read_time(write_time(when)) == when.replace(microsecond=0)


@pytest.mark.parametrize("name", ["last-scale-time", "queue-failing-since"])
@pytest.mark.parametrize("longest", ["scale_up_cooldown_seconds", "scale_down_cooldown_seconds"])
def test_a_time_too_far_ahead_is_warned_about_and_ignored(name: str, longest: str) -> None:
    settings = replace(SETTINGS, **{longest: 400})  # type: ignore[arg-type]
    for ahead, warnings in ((401, 0), (402, 1)):  # timestamps are the next whole second
        typed = write_time(START + timedelta(seconds=ahead))
        state = parse_state({ANNOTATION + name: typed}, settings, START)
        assert len(state.warnings) == warnings
        assert state == State(warnings=state.warnings) or not warnings, "counts as absent"
    assert ANNOTATION + name in state.warnings[0] and repr(typed) in state.warnings[0]
    assert "further ahead than the longest cooldown: counts as absent" in state.warnings[0]


@pytest.mark.parametrize(
    ("value", "paused", "warned"),
    [
        ("true", True, False),
        ("True ", True, False),
        ("t", True, False),
        ("1", True, False),
        ("false", False, False),
        ("f", False, False),
        ("0", False, False),
        ("yes please", True, True),
        ("", True, True),
    ],
)
def test_an_unreadable_pause_pauses(value: str, paused: bool, warned: bool) -> None:
    for name in ("paused", "paused-scale-in", "paused-scale-out"):
        state = parse_state({ANNOTATION + name: value}, SETTINGS, START)
        assert getattr(state, name.replace("-", "_")) is paused
        assert bool(state.warnings) is warned
        assert all(ANNOTATION + name in warning for warning in state.warnings)
        assert all("not true or false: counts as true" in warning for warning in state.warnings)


def test_an_unreadable_paused_replicas_holds_the_current_number() -> None:
    state = parse_state({scaler.PAUSED_REPLICAS: "lots"}, SETTINGS, START)
    assert state.paused and state.paused_replicas is None
    assert "'lots'" in state.warnings[0] and "a whole number of pods from 0" in state.warnings[0]


INTENDED = "; delete it, and set it again with kubectl annotate if intended"
DROPPED, HOLDS = "not applied" + INTENDED, "the pause holds" + INTENDED


@pytest.mark.parametrize(
    ("name", "value", "paused", "said"),
    [
        ("paused", "true", {"paused"}, HOLDS),
        ("paused", "false", set(), DROPPED),
        ("paused", "yes please", {"paused"}, DROPPED),
        ("paused-replicas", "0", {"paused"}, DROPPED),
        ("paused-scale-in", "true", {"paused_scale_in"}, HOLDS),
        ("paused-scale-out", "true", {"paused_scale_out"}, HOLDS),
        ("paused-until", "2027-01-01T00:00:00Z", set(), DROPPED),
        ("paused-until", "2025-01-01T00:00:00Z", set(), DROPPED),
        ("recommendations", "1767225600:3", set(), "not applied"),
        ("queue-failing-since", "2025-12-31T00:00:00Z", set(), "not applied"),
    ],
)
def test_a_restored_value_is_not_applied(
    name: str, value: str, paused: set[str], said: str
) -> None:
    name = ANNOTATION + name
    state = parse_state({name: value, "team": "renders"}, SETTINGS, START, frozenset((name,)))
    [warning] = state.warnings
    assert warning == f"{name}={value!r}: may have been restored by a rollback: {said}"
    assert state == State(warnings=(warning,), **dict.fromkeys(paused, True))  # type: ignore[arg-type]


# --- paused-until ---------------------------------------------------------------------------------

OVER, LATER = "2025-12-01T00:00:00Z", "2026-02-01T00:00:00Z"
P, R, IN, OUT, UNTIL = (
    ANNOTATION + name
    for name in ("paused", "paused-replicas", "paused-scale-in", "paused-scale-out", "paused-until")
)


@pytest.mark.parametrize(
    ("annotations", "restored", "expired"),
    [
        ({UNTIL: OVER, P: "true", R: "3", IN: "true", OUT: "true"}, (), (UNTIL, P, R, IN, OUT)),
        ({UNTIL: "2026-01-01T00:00:00Z", P: "true"}, (), (UNTIL, P)),
        ({UNTIL: "2026-01-01T00:00:01Z", P: "true"}, (), ()),
        ({UNTIL: OVER, P: "yes please"}, (), (UNTIL, P)),
        ({UNTIL: OVER}, (), (UNTIL,)),
        ({UNTIL: OVER, P: "true", R: "0"}, (R,), (UNTIL, P)),
        ({UNTIL: OVER, P: "true"}, (UNTIL,), ()),
        ({UNTIL: "tomorrow", P: "true"}, (), ()),
        ({P: "true"}, (), ()),
    ],
)
def test_an_expired_pause_is_to_be_removed(
    annotations: dict[str, str], restored: tuple[str, ...], expired: tuple[str, ...]
) -> None:
    state = parse_state(annotations, SETTINGS, START, frozenset(restored))
    assert set(state.expired) == set(expired)
    held = {name for name in annotations if name != UNTIL} - set(expired)
    assert state.paused is bool(held), "and everything that has not expired holds"
    assert state.paused_replicas is None and not state.paused_scale_in


@pytest.mark.parametrize(
    ("later", "reason", "replicas"),
    [({R: "3"}, "Paused", 3), ({P: "true"}, "Paused", 1), ({OUT: "true"}, "ScaleUpDisabled", 1)],
)
def test_a_pause_set_after_an_expired_one_applies(
    world: World, later: dict[str, str], reason: str, replicas: int
) -> None:
    """Last month's end is removed in time; if it stayed, it would end the next pause, too."""
    world.queue.fill(2)
    world.cluster.annotate("worker", **{R: "1", UNTIL: OVER})
    run = world.run(MAX_REPLICAS="1")
    removed = "the pause has expired, queue-scaler/paused-until, queue-scaler/paused-replicas rem"
    assert run.record["message"].startswith(removed), run
    assert world.annotations == {}
    world.cluster.annotate("worker", **later)
    run = world.run()
    assert (run.reason, world.replicas) == (reason, replicas), run
    assert "expired" not in run.stdout, "it is said once"


def test_the_write_that_ends_a_pause_also_scales(world: World) -> None:
    world.queue.fill(3)
    world.cluster.annotate("worker", **{P: "true", UNTIL: OVER, "team": "renders"})
    world.cluster.requests.clear()
    assert world.run().reason == "ScaledUp"
    assert len(world.cluster.calls(Match("patch"))) == 1
    assert world.cluster.annotations("worker")["team"] == "renders"
    assert set(world.annotations) == {"last-scale", "last-scale-time"}


@pytest.mark.parametrize("code", [StatusCode.UNKNOWN, StatusCode.PERMISSION_DENIED])
def test_a_pause_also_expires_while_the_queue_is_unreadable(world: World, code: object) -> None:
    world.cluster.annotate("worker", **{P: "true", UNTIL: OVER})
    world.queue.fault("count", Fail(code))
    run = world.run()
    assert run.exit_code in (1, 2) and "the pause has expired" in run.record["message"], run
    assert (world.annotations, world.replicas) == ({}, 1)


def test_a_dry_run_removes_no_expired_pause(world: World) -> None:
    world.cluster.annotate("worker", **{P: "true", UNTIL: OVER})
    before = world.resource_version
    run = world.run("--dry-run")
    assert run.reason == "AtTarget" and "dry run, nothing is changed: the pause" in run.stdout, run
    assert world.resource_version == before


# --- Misspelled annotations -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("pause", "did you mean queue-scaler/paused?"),
        ("paused-replica", "did you mean queue-scaler/paused-replicas?"),
        ("pausedReplicas", "did you mean queue-scaler/paused-replicas?"),
        ("paused-scale-down", "did you mean queue-scaler/paused-scale-in?"),
        ("pause-until", "did you mean queue-scaler/paused-until?"),
        ("lastscale", "did you mean queue-scaler/last-scale?"),
        ("Note", "delete it"),
    ],
)
def test_an_unknown_annotation_is_warned_about(name: str, meant: str) -> None:
    state = parse_state({ANNOTATION + name: "true"}, SETTINGS, START)
    expected = f"the annotation queue-scaler/{name} is unknown to the scaler: {meant}"
    assert state == State(warnings=(expected,))


@pytest.mark.parametrize("name", ["team", "my.queue-scaler/paused", "queue-scaler.io/paused"])
def test_other_prefixes_are_none_of_our_business(name: str) -> None:
    assert parse_state({name: "true"}, SETTINGS, START) == State()


# --- What a run does ------------------------------------------------------------------------------


def test_a_huge_value_is_truncated_in_its_warning() -> None:
    state = parse_state({LAST_SCALE_TIME: "x" * 200_000}, SETTINGS, START)
    assert len(state.warnings[0]) < 400


@pytest.fixture
def just_scaled(world: World) -> World:
    """A world whose Deployment went from 1 to 2 pods a minute ago and now wants 3."""
    world.queue.fill(2)
    assert world.run().reason == "ScaledUp"
    world.queue.fill(3)
    world.pass_time()
    return world


def test_the_annotation_is_the_cooldown(just_scaled: World) -> None:
    """As a user edits it and deletes it; a run that changes nothing writes nothing."""
    assert just_scaled.annotations == {
        "last-scale-time": "2026-01-01T00:00:00Z",
        "last-scale": "up 1->2",
    }
    before = just_scaled.resource_version
    run = just_scaled.run()
    assert run.reason == "ScaleUpCooldown" and "60 s more" in run.record["message"], run
    assert just_scaled.resource_version == before
    for typed in ("2025-12-31T23:59:00Z", "2026-01-01T08:59:00.0+09:00", "1767225540"):
        just_scaled.cluster.annotate("worker", **{LAST_SCALE_TIME: typed})
        run = just_scaled.run(SCALE_UP_COOLDOWN_SECONDS="150")
        assert run.reason == "ScaleUpCooldown" and "30 s more" in run.record["message"], run
        assert just_scaled.run("--dry-run").reason == "ScaledUp", "2 minutes have passed"
    just_scaled.cluster.annotate("worker", **{LAST_SCALE_TIME: "a minute ago"})
    run = just_scaled.run("--dry-run")
    assert run.reason == "ScaledUp", run
    assert "WARNING AutoScaler" in run.stdout and "'a minute ago'" in run.stdout
    just_scaled.cluster.annotate("worker", **{LAST_SCALE_TIME: None})
    assert just_scaled.run().reason == "ScaledUp"


def test_a_paused_run_does_not_wait_for_the_queue(world: World) -> None:
    world.cluster.annotate("worker", **{scaler.PAUSED: "true"})
    world.queue.fault("count", Hang())
    run = world.run()
    assert (run.exit_code, run.reason) == (0, "Paused"), run
    assert run.seconds < 10 and len(world.cluster.requests) == 1


def test_a_dry_run_decides_and_changes_nothing(world: World) -> None:
    world.queue.fill(3)
    before = world.resource_version
    for run in (world.run("--dry-run"), world.run(DRY_RUN="true")):
        assert (run.exit_code, run.reason) == (0, "ScaledUp"), run
        assert run.record["dryRun"] is True and run.record["action"] == "scale-up"
        assert run.record["replicas"] == 1 and "dry run" in run.stdout
    assert world.resource_version == before and world.cluster.events() == []


@pytest.mark.parametrize(("ahead", "counts"), [(0, True), (1, False)])
def test_a_lease_longer_than_any_run_counts_as_absent(ahead: int, counts: bool) -> None:
    """A run lasts TIMEOUT_SECONDS, and clocks may differ by a minute."""
    until = START + timedelta(seconds=SETTINGS.timeout_seconds + 60 + ahead)
    lease = scaler.Lease(until, -189388800, "abcd1234")
    state = scaler.parse_state({scaler.LEASE: str(lease)}, SETTINGS, START)
    assert (state.scale_down_lease == lease, not state.warnings) == (counts, counts)


@pytest.mark.parametrize("value", ["up 1->2", "up", "up 1->2 by hand", " up 1->2 "])
def test_the_direction_of_the_last_scale_is_its_first_word(value: str) -> None:
    assert scaler.parse_state({scaler.LAST_SCALE: value}, SETTINGS, START).last_scale == "up"


@pytest.mark.parametrize("microseconds", [0, 1, 999_999])
def test_the_next_whole_second(microseconds: int) -> None:
    when = START + timedelta(microseconds=microseconds)
    assert scaler.whole_second(when) == START + timedelta(seconds=microseconds > 0)


def test_a_part_of_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"^expected int, not '3'$"):
        scaler.expect(int, "3")


def test_a_restored_lease_that_is_unreadable_is_dropped_silently() -> None:
    state = scaler.parse_state({scaler.LEASE: "odd"}, SETTINGS, START, frozenset([scaler.LEASE]))
    assert state.scale_down_lease is None


def test_a_restored_lease_is_dropped_silently() -> None:
    """Nobody could act on a warning."""
    lease = f"{scaler.write_time(START + timedelta(seconds=30))} -189388800 abcd1234"
    for restored in (frozenset[str](), frozenset([scaler.LEASE])):
        state = scaler.parse_state({scaler.LEASE: lease}, SETTINGS, START, restored)
        assert (state.scale_down_lease is None) is bool(restored) and not state.warnings
