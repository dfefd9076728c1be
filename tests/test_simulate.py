"""The simulator, compared with the real script, with the windows' model, and with hand counts."""

from __future__ import annotations

import json
import random
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from google.cloud.firestore import Client

import scaler
from tests.support.emulator import Emulator
from tests.support.firestore import FakeFirestore
from tests.support.kubernetes import FakeKubernetes
from tests.support.world import BUSY, PROJECT, REPOSITORY, START, World
from tests.test_stabilization import Hpa
from tools import chart, simulate
from tools.chart import Panel, Point
from tools.simulate import Job, Outcome

AWARE = {"BUSY_FILTER": BUSY}
BEGIN = int(START.timestamp())


def settings(environ: Mapping[str, str]) -> scaler.Settings:
    return scaler.read_settings({"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs", **environ})


def random_jobs(number: int, seconds: int, seed: int = 1) -> list[Job]:
    """Jobs in bursts and alone, in whole seconds, of 20 s to an hour."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    while len(jobs) < number:
        created = BEGIN + rng.randrange(seconds)
        for _ in range(rng.choice((1, 1, 1, 2, 15))):
            length = int(min(3600, max(20, rng.lognormvariate(5.5, 1))))
            jobs.append(Job(created, created, created + length))
    return sorted(jobs[:number], key=lambda job: job.created)


def job(created: float, seconds: float) -> Job:
    return Job(BEGIN + created, BEGIN + created, BEGIN + created + seconds)


class NewestFirst(random.Random):
    """Which of equal pods goes is luck; this one goes for the newest, as the simulator does."""

    def sample(self, population: Any, k: int, *, counts: Any = None) -> list[Any]:
        ages = [
            (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]) for pod in population
        ]
        newest_first = sorted(zip(ages, population, strict=True), key=lambda one: one[0])[::-1]
        return [pod for _, pod in newest_first][:k]


@dataclass
class Naive:
    """The same jobs on the fake's pods, second by second."""

    cluster: FakeKubernetes
    queue: FakeFirestore
    jobs: Sequence[Job]
    pod_start: int
    status: list[str] = field(default_factory=list)  # of each job that has been created
    ready_at: dict[str, int] = field(default_factory=dict)  # by pod, the oldest first
    working: dict[str, tuple[int, int]] = field(default_factory=dict)  # by pod: job, end

    def see_pods(self, now: int, pod_start: int) -> None:
        """New pods are on a node of their own; jobs of pods that went wait again."""
        there = {pod["metadata"]["name"] for pod in self.cluster.pods("worker")}
        for name in sorted(there - self.ready_at.keys()):
            self.ready_at[name] = now + pod_start
            self.cluster.set_pod(name, node=name, ready=False, phase="Pending")
        for name in self.ready_at.keys() - there:
            del self.ready_at[name]
            if name in self.working:
                self.status[self.working.pop(name)[0]] = "waiting"

    def work(self, now: int) -> None:
        """What happens in this second."""
        while len(self.status) < len(self.jobs) and self.jobs[len(self.status)].created <= now:
            self.status.append("waiting")
        for pod, (job, end) in list(self.working.items()):
            if end == now:
                self.status[job] = "done"
                del self.working[pod]
        for pod, ready_at in self.ready_at.items():
            if ready_at == now:
                since = START + timedelta(seconds=now - BEGIN)
                self.cluster.set_pod(pod, ready=True, phase="Running", ready_since=since)
            if ready_at <= now and pod not in self.working and "waiting" in self.status:
                job = self.status.index("waiting")
                self.status[job] = "processing"
                self.working[pod] = job, now + int(self.jobs[job].seconds)

    def show(self) -> None:
        """The queue as it is now."""
        self.queue.clear()
        pods = {job: pod for pod, (job, _) in self.working.items()}
        for job, status in enumerate(self.status):
            if status != "done":
                self.queue.put(f"jobs/{job}", {"status": status, "assignedPodId": pods.get(job)})


@dataclass
class Course(World):
    """The naive workers go on while time passes; `looks` are when the script looked, in seconds
    from the start, and the replicas after that."""

    naive: Naive = field(init=False)
    looks: list[tuple[int, int]] = field(default_factory=list)

    @property
    def second(self) -> int:
        assert self.now
        return int(self.now.timestamp())

    def pass_time(self, seconds: float = 60) -> None:
        """Between two looks, and at the end of a run. The script counts the time that it took
        itself, and a little more for the end of a delay; here both take none."""
        replicas = self.replicas
        assert replicas is not None
        self.looks.append((self.second - BEGIN, replicas))
        self.naive.see_pods(self.second, self.naive.pod_start)
        self.naive.work(self.second)
        for _ in range(round(seconds)):
            super().pass_time(1)
            self.naive.work(self.second)
        self.naive.show()


def real_looks(
    jobs: Sequence[Job], environ: Mapping[str, str], pod_start: int, minutes: int, directory: Path
) -> list[tuple[int, int]]:
    """The looks of the real script, a run a minute."""
    course: Course
    with (
        FakeKubernetes(clock=lambda: course.now or START) as cluster,
        FakeFirestore(project=PROJECT) as queue,
    ):
        course = Course(cluster, queue, "worker", START, dict(environ), directory)
        cluster.store.rng = NewestFirst(1)
        cluster.add_deployment("worker", replicas=int(environ.get("MIN_REPLICAS", "1")))
        course.naive = Naive(cluster, queue, jobs, pod_start)
        course.naive.see_pods(BEGIN, 0)
        course.naive.work(BEGIN)
        course.naive.show()
        for _ in range(minutes):
            run = course.run()
            assert run.exit_code == 0, run
            course.pass_time(60 - course.second % 60)
    return course.looks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environ", "pod_start", "minutes"),
    [
        ({**AWARE, "MAX_REPLICAS": "8"}, 45, 1440),
        ({"MAX_REPLICAS": "8", "SCALE_DOWN_STABILIZATION_SECONDS": "120"}, 45, 300),
        (
            {
                **AWARE,
                "MIN_REPLICAS": "0",
                "MAX_REPLICAS": "10",
                "JOBS_PER_POD": "3",
                "SCALE_UP_STABILIZATION_SECONDS": "60",
                "SCALE_DOWN_COOLDOWN_SECONDS": "60",
                "SCALE_UP_STEP": "50%",
                "SCALE_DOWN_STEP": "2",
                "SCHEDULED_MIN_REPLICAS": "4 Thu 02:00-03:00 UTC",
            },
            100,
            300,
        ),
        (
            {
                **AWARE,
                "MAX_REPLICAS": "12",
                "SCALE_UP_COOLDOWN_SECONDS": "70",
                "SCALE_DOWN_COOLDOWN_SECONDS": "60",
                "SCALE_DOWN_STABILIZATION_SECONDS": "130",
            },
            30,
            300,
        ),
    ],
    ids=["a day", "without a busy filter", "other settings", "delays that end between the runs"],
)
def test_the_replicas_are_those_of_the_real_script(
    environ: dict[str, str], pod_start: int, minutes: int, tmp_path: Path
) -> None:
    end = BEGIN + minutes * 60
    jobs = [job(0, 1), *random_jobs(minutes // 4, minutes * 50), Job(end, end, end)]
    points = simulate.simulate("", settings(environ), jobs, pod_start).panel.points
    real = real_looks(jobs, environ, pod_start, minutes, tmp_path)
    assert [(point.at - BEGIN, point.pods) for point in points if point.at < end] == real
    assert len({replicas for _, replicas in real}) > 4, "the test is of a load that changes"
    between = any(at % 60 for at, _ in real)
    assert between is (environ.get("SCALE_UP_COOLDOWN_SECONDS") == "70")


def outcome_of(jobs: Sequence[Job], environ: Mapping[str, str], pod_start: float = 30) -> Outcome:
    return simulate.simulate("", settings(environ), jobs, pod_start)


# --------------------------------------------------------------------------------- the windows


@pytest.mark.parametrize(("up", "down"), [(0, 300), (120, 300), (300, 0)])
def test_a_week_in_windows_is_that_of_the_hpa(up: int, down: int) -> None:
    environ = {
        "MIN_REPLICAS": "0",
        "MAX_REPLICAS": "100",
        "SCALE_UP_COOLDOWN_SECONDS": "0",
        "SCALE_DOWN_COOLDOWN_SECONDS": "0",
        "SCALE_UP_STABILIZATION_SECONDS": str(up),
        "SCALE_DOWN_STABILIZATION_SECONDS": str(down),
    }
    looks: list[tuple[scaler.Decision, bool]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate.Scaler, "look", watched(simulate.Scaler.look, looks.append))
        outcome_of(random_jobs(3000, 7 * 86_400), environ)
    hpa, now = Hpa(up, down), BEGIN
    for decision, kept in looks:
        if not kept:
            hpa.recommendations.clear()  # at rest the scaler keeps nothing, and starts over
        assert decision.current is not None and decision.desired is not None
        expected = hpa.stabilize(now, decision.current, decision.desired)
        assert decision.replicas == expected, (now, decision)
        now += 60
    assert len(looks) > 10_000 and len({decision.replicas for decision, _ in looks}) > 9


def watched(look: Any, note: Any) -> Any:
    """`look`, noting each decision and whether it rested on a history."""

    def call(self: simulate.Scaler, workers: simulate.Workers) -> Any:
        kept = scaler.RECOMMENDATIONS in self.annotations
        found = look(self, workers)
        note((found[0], kept))
        return found

    return call


# ------------------------------------------------------------------------------------ by hand


def test_an_idle_pod_takes_the_oldest_job_immediately() -> None:
    jobs = [job(0, 100), job(20, 10), job(10, 50)]
    row = outcome_of(jobs, {"MAX_REPLICAS": "1"}).row
    # Started after 0, 100 and 150 s: they waited for 0, 90 and 130 s.
    assert (row.mean_wait_seconds, row.max_wait_seconds) == (round(220 / 3, 1), 130)
    assert (row.pod_hours, row.busy_share) == (round(160 / 3600, 2), 1)
    assert (row.scale_ups, row.scale_downs, row.killed) == (0, 0, 0)
    assert row.at_maximum_seconds == 160


def test_a_job_waits_for_the_next_look_and_for_its_pod() -> None:
    row = outcome_of([job(0, 600), job(65, 60)], AWARE, pod_start=45).row
    assert row.max_wait_seconds == 120 + 45 - 65
    # Its pod goes 300 s after the first look, at 240 s, that saw the second job done.
    assert (row.scale_downs, row.pod_hours) == (1, round((600 + 540 - 120) / 3600, 2))


@pytest.mark.parametrize(
    ("polling", "wait"), [({}, 55), ({"POLLING_INTERVAL_SECONDS": "10"}, 5)], ids=["", "polling"]
)
def test_looks_are_once_a_minute_or_as_polling_says(polling: dict[str, str], wait: int) -> None:
    environ = {**AWARE, **polling, "MIN_REPLICAS": "0"}
    row = outcome_of([job(65, 60)], environ, pod_start=0).row
    assert row.max_wait_seconds == wait


def test_a_polling_run_looks_until_its_time_is_up() -> None:
    for timeout, offsets in ((45, [0, 20, 40]), (41, [0, 20, 40]), (40, [0, 20])):
        polling = {"POLLING_INTERVAL_SECONDS": "20", "TIMEOUT_SECONDS": str(timeout)}
        points = outcome_of([job(0, 100)], {**AWARE, **polling}).panel.points
        assert [int(point.at) - BEGIN for point in points][: len(offsets)] == offsets
        assert points[len(offsets)].at == BEGIN + 60


@pytest.mark.parametrize(
    ("interval", "timeout", "offset", "first", "wait", "due"),
    [
        ("", 45, 0, True, None, None),
        ("", 45, 0, True, 15, 15),
        ("", 45, 0, True, 16, None),
        ("", 45, 15, False, 5, None),
        ("", 10, 0, True, 9, 9),
        ("", 10, 0, True, 10, None),
        ("20", 45, 0, True, 12, 12),
        ("20", 45, 12, False, 14, 20),
        ("20", 45, 20, False, 14, 34),
        ("20", 45, 40, False, None, None),
        ("20", 3600, 40, False, 14, 54),
        ("20", 3600, 40, False, None, None),
    ],
)
def test_when_a_run_looks_again(
    interval: str, timeout: int, offset: float, first: bool, wait: float | None, due: float | None
) -> None:
    environ = {"POLLING_INTERVAL_SECONDS": interval, "TIMEOUT_SECONDS": str(timeout)}
    assert simulate.next_look(settings(environ), offset, first, wait) == due


NO_DELAYS = {"SCALE_DOWN_STABILIZATION_SECONDS": "0", "SCALE_DOWN_COOLDOWN_SECONDS": "0"}


def test_without_a_busy_filter_the_newest_pods_are_killed_and_their_jobs_start_over() -> None:
    jobs = [job(0, 900), job(0, 900), job(0, 900)]
    row = outcome_of(jobs, NO_DELAYS, pod_start=0).row
    aware = outcome_of(jobs, {**NO_DELAYS, **AWARE}, pod_start=0).row
    assert (aware.killed, aware.max_wait_seconds, aware.busy_share) == (0, 0, 1)
    assert row.killed and row.killed > 1
    assert row.max_wait_seconds >= 900, "the third one starts when the first is done"


def test_pods_that_are_not_ready_go_first() -> None:
    workers = simulate.Workers([job(0, 900)], 60, BEGIN, 1)
    workers.advance(BEGIN)
    workers.scale(1, [])
    found = simulate.Scaler(settings({**NO_DELAYS, "MIN_REPLICAS": "1"}), 2, {})
    decision, victims = found.look(workers)
    assert (decision.reason, victims) == ("ScaledDown", [2])


def test_a_variant_that_never_ends_is_stopped_a_day_later() -> None:
    outcome = outcome_of([job(0, 60), job(10, 60)], {"MIN_REPLICAS": "0", "SCALE_UP_STEP": "0"})
    assert (outcome.unfinished, outcome.row.pod_hours, outcome.row.busy_share) == (2, 0, 0)
    assert 86_000 < outcome.row.max_wait_seconds < 86_500


def test_what_happened_is_read_from_the_jobs() -> None:
    jobs = [Job(BEGIN + n, BEGIN + 2 * n, BEGIN + 3 * n) for n in range(100)]
    outcome = simulate.what_happened(jobs)
    waits = outcome.row
    assert (waits.mean_wait_seconds, waits.p95_wait_seconds, waits.max_wait_seconds) == (
        49.5,
        94,
        99,
    )
    assert (waits.pod_hours, waits.killed) == (None, None)
    assert min(min(point.waiting, point.busy) for point in outcome.panel.points) == 0
    assert outcome.panel.points[-1][1:3] == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("polling", "most"),
    [({}, 5), ({"POLLING_INTERVAL_SECONDS": "10", "TIMEOUT_SECONDS": "58"}, 20)],
    ids=["each minute", "each 10 s"],
)
def test_a_week_of_10_000_jobs_takes_seconds(polling: dict[str, str], most: float) -> None:
    jobs = random_jobs(10_000, 7 * 86_400)
    begun = time.process_time()
    outcome = outcome_of(jobs, {**AWARE, **polling, "MAX_REPLICAS": "20"})
    assert time.process_time() - begun <= most
    assert not outcome.unfinished and len(outcome.panel.points) > (60_000 if polling else 10_000)


# ------------------------------------------------------------------------------ as a command

KEYS = [
    *("variant", "meanWaitSeconds", "p95WaitSeconds", "maxWaitSeconds", "podHours", "busyShare"),
    *("scaleUps", "scaleDowns", "atMaximumSeconds", "killed"),
]
SAMPLE = str(REPOSITORY / "examples" / "week.csv")
HEADER = "created,started,finished"
GOOD = "2026-01-05T00:00:00Z,1767571201,2026-01-05T09:00:02.5+09:00"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "jobs.csv"


def said(capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> tuple[int, str, str]:
    code = simulate.main(argv, environ)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("lines", "problems"),
    [
        ([], ["1: no column names, such as created,started,finished"]),
        ([HEADER], ["2: no jobs"]),
        (["created,started", "1,2"], ["1: no column finished (--finished); the columns are "]),
        ([f"created,{HEADER}", f"1,{GOOD}"], ["1: 2 columns created (--created); the columns "]),
        (
            [
                HEADER,
                "1767571200,,1767571300",
                GOOD,
                "1767571200,1767571300,1767571299",
                "1767571200,1767571199,1767571299",
                ",,",
                "",
                "1767571200,1767571300",
                "1767571200,1767571300,1767571299000",
                '1767571200,"yester\nday",1767571299',
            ],
            [
                "2: started is missing",
                "4: ends (1767571299) before it starts (1767571300)",
                "5: starts (1767571199) before it is created (1767571200)",
                "6: created is missing; started is missing; finished is missing",
                "8: 2 cells, where line 1 has 3",
                "9: finished is '1767571299000', not a time such as 2026-01-01T00:00:00Z or ",
                "11: started is 'yester\\nday', not a time",
            ],
        ),
        ([HEADER, GOOD, f'"{GOOD}'], ["3: not CSV: unexpected end of data"]),
        (
            [HEADER, GOOD, "1167571200,1767571300,1767571301"],
            ["3: created 6944 days before the end of {file}:3: expected at most 366 days"],
        ),
    ],
    ids=["empty", "no job", "no column", "two columns", "rows", "a quote", "years"],
)
def test_each_mistake_in_a_file_is_named_with_its_line(
    lines: list[str], problems: list[str], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("".join(f"{line}\n" for line in lines))
    code, out, err = said(capsys, str(file))
    assert (code, out) == (2, "")
    told = err.splitlines()
    assert len(told) == len(problems), err
    for line, problem in zip(told, problems, strict=True):
        assert line.startswith(f"{file}:{problem.replace('{file}', str(file))}"), err


def test_a_file_that_cannot_be_read_is_named(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, str(file)) == (2, "", f"{file}: No such file or directory\n")
    file.write_bytes(b"\xff\xfe")
    assert said(capsys, str(file)) == (2, "", f"{file}: not text in UTF-8\n")


def test_columns_can_have_other_names_and_others_beside_them(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(f"id,createdAt,start,end\na,{GOOD}\n", encoding="utf-8-sig")
    names = ("--created", "createdAt", "--started", "start", "--finished", "end")
    code, out, err = said(capsys, str(file), *names, "--json")
    assert (code, err) == (0, f"{file}:1: columns not used: id\n")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [list(row) for row in rows] == [KEYS, KEYS]
    assert [row["variant"] for row in rows] == ["what happened", "current settings"]
    assert [row["maxWaitSeconds"] for row in rows] == [1, 0]
    assert [rows[0][key] for key in KEYS[4:]] == [None] * 6
    assert isinstance(rows[1]["podHours"], float) and rows[1]["killed"] == 0


@pytest.mark.parametrize(
    ("tries", "problem"),
    [
        (["MAX_REPLICA=8"], "--try 'MAX_REPLICA=8': the variable MAX_REPLICA is "),
        (["FOO=8"], "--try 'FOO=8': 'FOO=8' is not a setting such as MAX_REPLICAS=8"),
        (["MAX_REPLICAS"], "--try 'MAX_REPLICAS': 'MAX_REPLICAS' is not a setting such as "),
        ([" "], "--try ' ': expected settings, such as MAX_REPLICAS=8"),
        (["MAX_REPLICAS=1 MAX_REPLICAS=2"], "MAX_REPLICAS given twice"),
        (['QUEUE_COLLECTION="a'], "No closing quotation"),
        (["MAX_REPLICAS=8", " MAX_REPLICAS=8"], "--try ' MAX_REPLICAS=8': given twice"),
    ],
)
def test_an_invalid_variant_is_an_error(
    tries: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, SAMPLE, *(word for text in tries for word in ("--try", text)))
    assert (code, out) == (2, "")
    assert problem in err and len(err.splitlines()) == 1, err


def test_an_invalid_setting_gets_the_scalers_own_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(scaler.Failure) as own:
        settings({"MAX_REPLICAS": "0", "JOBS_PER_POD": "x"})
    code, out, err = said(
        capsys, SAMPLE, "--try", "JOBS_PER_POD=x", MAX_REPLICAS="0", MIN_REPLICA="0"
    )
    assert (code, out) == (2, "")
    warning, current, tried = err.splitlines()
    assert "MIN_REPLICA" in warning
    assert current.startswith("current settings: MAX_REPLICAS='0': expected ")
    assert tried == f"JOBS_PER_POD=x: {own.value}"


def test_settings_of_a_manifest_take_the_place_of_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "cronjob.yaml"
    text = (REPOSITORY / "cronjob.yaml").read_text()
    manifest.write_text(text.replace('value: "3"', 'value: "9"'))
    as_environment = said(capsys, SAMPLE, MAX_REPLICAS="9", BUSY_FILTER=BUSY)
    assert as_environment[0] == 0
    found = said(capsys, SAMPLE, "--cronjob", str(manifest), MAX_REPLICAS="no number")
    assert found == as_environment
    for broken, problem in (
        (text.replace('value: "3"', "value: 3"), "MAX_REPLICAS: expected a value in quotes"),
        (text.replace("kind: CronJob", "kind: Job"), "0 CronJobs: expected 1"),
        (f"{text}\n---\n{text}", "2 CronJobs: expected 1"),
        (text.replace("containers:", "container:"), "not the manifest of a CronJob with a "),
        ("a: b: c", "not YAML: mapping values are not allowed here"),
    ):
        manifest.write_text(broken)
        code, out, err = said(capsys, SAMPLE, "--cronjob", str(manifest))
        assert (code, out) == (2, "") and err.startswith(f"{manifest}: {problem}"), err


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "expected a file of jobs or --collection"),
        ([SAMPLE, "--collection", "jobs"], "expected a file of jobs or --collection"),
        ([SAMPLE, "--csv", "x"], "--csv and --since go with --collection"),
        ([SAMPLE, "--created", "at", "--started", "at"], "expected three names, not at, at, "),
        ([SAMPLE, "--pod-start", "-1"], "'-1': expected seconds from 0 to 86400"),
        (["--collection", "jobs", "--since", "monday"], "'monday' is not a time such as"),
    ],
)
def test_arguments_that_do_not_go_together(
    argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        simulate.main(argv, {})
    assert ended.value.code == 2 and problem in capsys.readouterr().err


def test_the_example_of_the_page_is_what_the_tool_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In operations.md, the command and the table under it."""
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    shown = re.search(r"^(make simulate ARGS='.*?')\n```\n+```text\n(.*?)```", page, re.M | re.S)
    assert shown
    monkeypatch.chdir(REPOSITORY)
    (arguments,) = (word[5:] for word in shlex.split(shown[1]) if word.startswith("ARGS="))
    code, out, err = said(capsys, *shlex.split(arguments.replace("\\\n", " ")))
    assert (code, err) == (0, "")
    assert out == shown[2]


def test_the_sample_is_a_week_with_bursts_nights_and_a_weekend() -> None:
    jobs = simulate.read_csv(Path(SAMPLE), ("created", "started", "finished"))
    times = [datetime.fromtimestamp(one.created, UTC) for one in jobs]
    assert [(times[0].weekday(), times[-1].weekday())] == [(0, 6)]
    days = [sum(at.weekday() == day for at in times) for day in range(7)]
    assert min(days[:5]) > 2 * max(days[5:]) > 0
    assert any(at.hour < 6 for at in times)
    assert any(
        (later - at).total_seconds() < 120 for at, later in zip(times, times[20:], strict=False)
    )
    assert min(one.seconds for one in jobs) >= 60 and max(one.seconds for one in jobs) > 7200


# ------------------------------------------------------------------------------------ Firestore


@pytest.fixture
def documents(jobs: Client) -> Client:
    """Three that are done, with their times in each form, one that waits, one that works."""
    at = datetime(2026, 1, 5, tzinfo=UTC)
    for number, times in enumerate(
        [
            (at, at + timedelta(seconds=1), at + timedelta(seconds=2.5)),
            (at - timedelta(days=1), 1767571201, "2026-01-05T09:00:02+09:00"),
            (at + timedelta(days=1), at + timedelta(days=1), 1767657660.25),
            (at, None),
            (at, at),
        ]
    ):
        names = ("createdAt", "work.startedAt", "finishedAt")
        fields: dict[str, Any] = dict(zip(names, times, strict=False))
        if "work.startedAt" in fields:
            fields["work"] = {"startedAt": fields.pop("work.startedAt")}
        jobs.document(f"jobs/{number}").set({**fields, "prompt": "never read"})
    return jobs


FROM_FIRESTORE = [
    *("--collection", "jobs", "--created", "createdAt"),
    *("--started", "work.startedAt", "--finished", "finishedAt"),
]


def in_firestore(emulator: Emulator) -> dict[str, str]:
    return {"FIRESTORE_PROJECT": PROJECT, "FIRESTORE_EMULATOR_HOST": emulator.host}


def test_jobs_are_read_from_firestore_in_pages_and_written_as_csv(
    documents: Client,
    emulator: Emulator,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(simulate, "PAGE", 2)
    argv = (*FROM_FIRESTORE, "--csv", str(file))
    code, out, err = said(capsys, *argv, **in_firestore(emulator))
    assert code == 0, err
    assert err.splitlines() == [
        "jobs: 2 documents read",
        "jobs: 4 documents read",
        "jobs: 5 documents read",
        "skipped: jobs/3: work.startedAt is missing; finishedAt is missing",
        "skipped: jobs/4: finishedAt is missing",
    ]
    assert file.read_text().splitlines() == [
        HEADER,
        "2026-01-05T00:00:00+00:00,2026-01-05T00:00:01+00:00,2026-01-05T00:00:02.500000+00:00",
        "2026-01-04T00:00:00+00:00,2026-01-05T00:00:01+00:00,2026-01-05T00:00:02+00:00",
        "2026-01-06T00:00:00+00:00,2026-01-06T00:00:00+00:00,2026-01-06T00:01:00.250000+00:00",
    ]
    assert said(capsys, str(file)) == (0, out, "")


def test_since_leaves_the_older_jobs_in_firestore(
    documents: Client,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(simulate, "PAGE", 2)
    argv = (*FROM_FIRESTORE, "--since", "2026-01-05T12:00:00Z", "--json")
    code, out, err = said(capsys, *argv, **in_firestore(emulator))
    assert (code, err) == (0, "jobs: 1 documents read\n")
    argv = (*FROM_FIRESTORE, "--since", "2026-01-05", "--json")
    code, out, err = said(capsys, *argv, **in_firestore(emulator))
    assert (code, err.splitlines()[:2]) == (0, ["jobs: 2 documents read", "jobs: 4 documents read"])
    assert len(out.splitlines()) == 2


def test_documents_that_are_wrong_and_collections_that_are_empty_are_named(
    documents: Client, emulator: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--since", "2027-01-01", *FROM_FIRESTORE]
    code, _, err = said(capsys, *argv, **in_firestore(emulator))
    assert code == 2
    assert err.splitlines()[1:] == ["jobs: no job with createdAt, work.startedAt, finishedAt"]
    documents.document("jobs/0").update({"finishedAt": "soon"})
    documents.document("jobs/2").update({"finishedAt": 1767571201})
    code, _, err = said(capsys, *FROM_FIRESTORE, **in_firestore(emulator))
    assert code == 2
    assert [line[:32] for line in err.splitlines()[1:]] == [
        "jobs/0: finishedAt is 'soon', no",
        "jobs/2: ends (1767571201) before",
    ]
    code, _, err = said(capsys, "--collection", "a/b", **in_firestore(emulator))
    assert code == 2 and err.startswith("QUEUE_COLLECTION='a/b': expected a collection path"), err


# ---------------------------------------------------------------------------------- the chart

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def drawn(text: str) -> ElementTree.Element:
    """A picture that needs no other file, in colours for white and for black pages."""
    assert "href" not in text and "<style" not in text
    picture = ElementTree.fromstring(text)
    assert picture.tag.endswith("svg")
    colours = {path.get("fill") or path.get("stroke") for path in picture.findall("{*}path")}
    assert colours == {chart.INK, chart.WAITING, chart.WORKING, chart.PODS}
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
    for path in picture.findall("{*}path"):
        for command, numbers in re.findall(r"([MHV])([^MHVZ]*)", path.get("d", "")):
            found = [float(number) for number in NUMBER.findall(numbers)]
            most = {"M": (width, height), "H": (width,), "V": (height,)}[command]
            assert all(0 <= n <= top for n, top in zip(found, most, strict=True)), path.get("d")
    return picture


def test_the_chart_of_the_readme_is_small_and_self_contained() -> None:
    text = (REPOSITORY / "docs" / "replicas.svg").read_text()
    assert len(text) < 10_000
    drawn(text)


def test_a_chart_has_a_panel_for_each_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "week.svg"
    tries = ("--try", "MAX_REPLICAS=8 JOBS_PER_POD=2", "--try", 'DEPLOYMENT="a" MIN_REPLICAS=0')
    assert said(capsys, SAMPLE, "--svg", str(file), *tries)[0] == 0
    text = file.read_text()
    assert len(text) < 200_000
    words = [element.text or "" for element in drawn(text).findall("{*}text")]
    titles = ["what happened", "current settings", tries[1], tries[3]]
    assert [word for word in words if word in titles] == titles
    limits = [word for word in words if word.startswith("MAX_")]
    assert limits == [
        "MAX_REPLICAS=3",
        "MAX_REPLICAS=8 JOBS_PER_POD=2",
        "MAX_REPLICAS=8",
        *limits[3:],
    ]
    assert words.count("Sat 10 Jan") == 4 and words.count("pods") == 4
    missing = str(tmp_path / "no" / "file.svg")
    code, _, err = said(capsys, SAMPLE, "--svg", missing)
    assert (code, err) == (2, f"{missing}: No such file or directory\n")


@pytest.mark.parametrize("span", [1, 59, 3600, 5 * 3600, 86_400, 9 * 86_400, 90 * 86_400])
@pytest.mark.parametrize("most", [0, 1, 7, 10, 99, 12_345])
def test_labels_are_few_and_apart_whatever_the_span_and_the_numbers(span: int, most: int) -> None:
    points = [Point(BEGIN, 0, 0, 0), Point(BEGIN + span, most, most, most)]
    panel = Panel(points, BEGIN + span, "a <b> & c " * 20, max(1, most))
    text = chart.draw([panel], "caption")
    labels = drawn(text).findall("{*}text")
    assert "a <b> & c" in (labels[0].text or "")
    places = [(float(one.get("x", 0)), float(one.get("y", 0)), one.text or "") for one in labels]
    ticks = sorted(place for place in places if place[1] == max(y for _, y, _ in places))
    for (x, _, text), (after, _, _) in pairwise(ticks):
        assert x + 8 * len(text) < after + 8, ticks
    scale = sorted(y for x, y, _ in places if x == chart.LEFT - 6)
    assert all(later - y >= 12 for y, later in pairwise(scale)), scale
    assert len(scale) <= 13
