"""Runs of the scaler among everything else that may happen, in every order.

tests/support/machine.py has the world, its moves and what must never be broken: see there. First
safety: nothing that must never happen does, whatever the order. Then liveness: once all events
stop, everything comes to rest and nothing is left behind.

How many: about 580 sequences of one event each (any, before any call of a run) from each of three
beginnings; 240 of another run that takes any number of steps before any call; 3,600 of two runs by
any number of steps each, one of eight events, and either run first to its end; 460 at random, of up
to 60 moves with three runs. The fast tests are a third of it.

A failure prints the sequence of its moves as a call of `replay`, to be put into `BROKE`; those at
random are shrunk first, and hypothesis prints how to play them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.support.looks import simulated
from tests.support.machine import Broken, Machine

Start = Mapping[str, Any]
Move = tuple[str, ...]
Plan = tuple[tuple[int, Move], ...]  # before which of the first run's steps, and what happens
Alphabet = Callable[[Machine], list[Move]]


def replay(moves: str, **start: Any) -> Machine:
    """Plays a sequence as failures print it."""
    machine = Machine(**start)
    with simulated(machine.time):
        try:
            machine.play(moves)
            machine.settle()
        finally:
            machine.close()
    return machine


# --- Every short sequence -----------------------------------------------------------------------

STEPS = 16  # of a run that scales down by two pods


def switches() -> list[Move]:
    """The second run goes on by any number of steps."""
    return [*[("B",) * steps for steps in range(1, STEPS)], ("B ends",)]


def single_events(machine: Machine) -> list[Move]:
    """Whatever may happen, once; of moves that differ in a number only, a few. What begins a
    rollout or deletes a pod also happens together with what the controllers then do."""
    some = {"scale": "13", "order": "2", "wait": "60", "crash": "", "note": "", "roll": ""}
    found = [
        move
        for kind, moves in machine.possible().items()
        for move in moves
        if kind != "run" and not move.startswith("B ")
    ]
    chosen = [
        move
        for move in found
        if move.split()[-1] in some.get(move.split()[0], "012" if move[-1].isdigit() else move)
    ]
    with_controllers = ("rollout", "stall", "rename", "adopt", "delete")
    return [
        *[(move,) for move in chosen],
        *[(move, "controllers") for move in chosen if move.startswith(with_controllers)],
    ]


def play(start: Start, plan: Plan, alphabet: Alphabet | None) -> Iterator[tuple[int, Move]]:
    """Plays a plan, with run A going on whenever nothing else happens; then all that could have
    come next, of the alphabet, and where."""
    machine, following = Machine(**start), []
    with simulated(machine.time):
        try:
            machine.apply("A")
            steps = 0
            for place, move in plan:
                while steps < place:
                    machine.apply("A")
                    steps += 1
                for one in move:
                    machine.apply(one)
            while True:
                if alphabet:
                    following += [(steps, move) for move in alphabet(machine)]
                if machine.runs["A"] is None:
                    break
                machine.apply("A")
                steps += 1
            machine.settle()
        finally:
            machine.close()
    yield from following


def play_all(start: Start, depth: int, alphabet: Alphabet) -> int:
    """Plays every plan of so many events at most; their number."""
    plans: list[Plan] = [()]
    played = 0
    while plans:
        plan = plans.pop()
        played += 1
        deeper = len(plan) < depth
        plans += [(*plan, one) for one in play(start, plan, alphabet if deeper else None)]
    return played


def slow(start: Start) -> Any:
    return pytest.param(start, marks=pytest.mark.slow)


SMALL = {"pods": 3, "busy": 1}  # two of three pods go
WIDE = {"pods": 5, "busy": 4}  # one of five
# A run has removed one of five pods, and two of the others have done their jobs since.
AGAIN = {"pods": 5, "busy": 4, "before": "A ends; controllers; finish 0; finish 1"}


@pytest.mark.parametrize("start", [WIDE, slow(SMALL), slow(AGAIN)], ids=str)
def test_every_event_before_every_call_of_a_run(start: Start) -> None:
    assert play_all(start, 1, single_events) > 400


@pytest.mark.parametrize("start", [SMALL, slow(AGAIN)], ids=str)
def test_another_run_by_any_number_of_steps_before_every_call_of_a_run(start: Start) -> None:
    assert play_all(start, 1, lambda machine: switches()) > 200


EVENTS = (
    "claim 0", "claim 1", "finish 2", "controllers", "delete 0", "unready 2", "wait 44", "A dies",
)  # fmt: skip


@pytest.mark.slow
def test_two_runs_and_one_event_in_every_order() -> None:
    """Run A by any number of steps, then run B, then an event; then one of them ends, then the
    other."""
    played = [replay(moves, **AGAIN) for moves in two_runs_and_one_event(AGAIN)]
    assert len(played) > 2000


def two_runs_and_one_event(start: Start) -> Iterator[str]:
    steps = length_of_a_run(start)
    for first, second, event, last in product(range(1, steps), range(1, steps), EVENTS, "AB"):
        yield "; ".join(["A"] * first + ["B"] * second + [event, f"{last} ends"])


def length_of_a_run(start: Start) -> int:
    """Its calls and its beginning."""
    machine = Machine(**start)
    with simulated(machine.time):
        machine.apply("A")
        for steps in range(1, 100):
            if machine.runs["A"] is None:
                return steps
            machine.apply("A")
    raise AssertionError("a run makes as many calls as that?")


# --- Sequences that broke once ------------------------------------------------------------------

# With 0.2.0: each was found by the tests above and shrunk.
BROKE = {
    "a rollout whose ReplicaSet makes no pods": ("stall", WIDE),
    "a ReplicaSet that was adopted": ("rename; controllers; A ends", SMALL),
    "a ReplicaSet that is about to be adopted": ("rename; A ends", SMALL),
    "two runs, and a job claimed between them": (
        "A; A; A; B; B; B; B; B; B; B; B; B; claim 1",
        AGAIN,
    ),
    "a person's own deletion cost": ("cost 0; A ends", WIDE),
    "a victim replaced between the list and the Deployment's read": (
        "A; A; A; A; A; A; A; A; A; A; A; A; delete 1; replicasets; pods; pods; claim 2",
        SMALL,
    ),
    "two victims replaced between the list and the Deployment's read": (
        "A; A; A; A; A; A; A; A; A; A; A; A; delete 4; delete 3; controllers; A ends",
        {"pods": 5, "busy": 3},
    ),
}
LATE = "; ".join(["A"] * 14)  # up to the second read of the queue, after the last list of the pods
# What remains, as docs/busy-workers.md says: victims that are evicted after the last list, and
# whose replacements are ready before the Deployment controller has noticed.
REMAINS = {
    "a victim is replaced, and its successor claims a job": (
        f"{LATE}; delete 1; replicasets; pods; pods; claim 2",
        SMALL,
    ),
    "two victims are replaced": (
        f"{LATE}; delete 4; delete 3; replicasets; pods; pods; A ends",
        {"pods": 5, "busy": 3},
    ),
}


@pytest.mark.parametrize(("moves", "start"), BROKE.values(), ids=BROKE)
def test_earlier_failures_stay_fixed(moves: str, start: Start) -> None:
    replay(moves, **start)


@pytest.mark.xfail(raises=Broken, strict=True)
@pytest.mark.parametrize(("moves", "start"), REMAINS.values(), ids=REMAINS)
def test_the_known_gap(moves: str, start: Start) -> None:
    replay(moves, **start)


@pytest.mark.parametrize(("moves", "start"), REMAINS.values(), ids=REMAINS)
def test_the_known_gap_is_noticed_if_the_deployment_controller_acts(
    moves: str, start: Start
) -> None:
    replay(moves.replace("replicasets; pods; pods", "controllers"), **start)


# --- Long sequences, at random ------------------------------------------------------------------


class Interleavings(RuleBasedStateMachine):
    """Any number of pods, runs and events."""

    @initialize(pods=st.integers(1, 5), busy=st.integers(0, 4), minimum=st.integers(0, 2))
    def begin(self, pods: int, busy: int, minimum: int) -> None:
        more = {"MIN_REPLICAS": str(minimum)}
        self.machine = Machine(pods, min(pods, busy), "ABC", settings=more)
        self.simulation = simulated(self.machine.time)
        self.simulation.__enter__()

    def move(self, kind: str, data: st.DataObject) -> None:
        if moves := self.machine.possible()[kind]:
            self.machine.apply(data.draw(st.sampled_from(moves)))

    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        self.move("run", data)

    @rule(name=st.sampled_from("ABC"), steps=st.integers(2, 16))
    def several_steps(self, name: str, steps: int) -> None:
        for _ in range(steps):
            if self.machine.runs[name] is None and self.machine.moves[-1:] == [name]:
                return
            self.machine.apply(name)

    @rule(data=st.data())
    def jobs(self, data: st.DataObject) -> None:
        self.move("jobs", data)

    @rule(data=st.data())
    def pods(self, data: st.DataObject) -> None:
        self.move("pods", data)

    @rule(data=st.data())
    def controllers(self, data: st.DataObject) -> None:
        self.move("controllers", data)

    @rule(data=st.data())
    def rollout(self, data: st.DataObject) -> None:
        self.move("rollout", data)

    @rule(data=st.data())
    def person(self, data: st.DataObject) -> None:
        self.move("person", data)

    @precondition(lambda self: any(self.machine.runs.values()))
    @rule(data=st.data())
    def fault(self, data: st.DataObject) -> None:
        self.move("fault", data)

    @rule(data=st.data())
    def time(self, data: st.DataObject) -> None:
        self.move("time", data)

    @rule(data=st.data())
    def outage(self, data: st.DataObject) -> None:
        self.move("outage", data)

    def teardown(self) -> None:
        try:
            self.machine.settle()
        finally:
            self.machine.close()
            self.simulation.__exit__(None, None, None)


def at_random(examples: int, steps: int, **more: Any) -> Any:
    """The test of so many sequences of so many moves each."""
    case: Any = type("Case", (Interleavings.TestCase,), {})
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        **more,
    )
    return case


TestSomeLongSequences = at_random(60, 30, derandomize=True)
TestMoreLongSequences = pytest.mark.slow(at_random(400, 60))
