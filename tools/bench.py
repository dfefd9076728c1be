"""What a run costs: `python -m tools.bench` (or `make bench`) measures it and prints a table.

Every figure is of whole processes, as a CronJob starts them: processor time (user and system),
wall time and peak memory, as the kernel gives them when the process ends. Each round runs the
scaler and what it is held against in turn, so that a busy machine is unfair to none; the first
round, which compiles and fills caches, is not counted. All of them see the packages of
requirements.txt and no others, as in the image; the servers have a process of their own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# This process has to stay small, as the kernel counts the memory of a process that starts another
# as the other's own. What is large is imported where it is used, by the servers' process.
if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from tests.support.firestore import FakeFirestore
    from tests.support.kubernetes import FakeKubernetes

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("kubernetes", "google-cloud-firestore", "grpcio", "tenacity")
FEW, MANY = 10, 20_000
PODS = 3  # the maximum by default, so that no number of waiting jobs changes anything
CROWDS = (PODS, 1_000, 5_000)
REMOVED = 20

# As the image runs it: by the module's name, which finds its byte-code.
SCALER = ("-m", "scaler")

# The same calls in the straightforward way: the typed clients, the defaults of each.
REFERENCE = """
import os

from google.cloud import firestore
from google.cloud.firestore import FieldFilter
from kubernetes import client, config

config.load_kube_config()
apps, core = client.AppsV1Api(), client.CoreV1Api()
deployment = apps.read_namespaced_deployment(os.environ["DEPLOYMENT"], "default")
labels = deployment.spec.selector.match_labels
selector = ",".join(f"{key}={value}" for key, value in labels.items())
pods = core.list_namespaced_pod("default", label_selector=selector).items

jobs = firestore.Client(os.environ["FIRESTORE_PROJECT"]).collection("jobs")
waiting = jobs.where(filter=FieldFilter("status", "==", "waiting"))
busy = jobs.where(filter=FieldFilter("status", "==", "processing")).where(
    filter=FieldFilter("assignedPodId", "in", [pod.metadata.name for pod in pods])
)
counts = [query.limit(1000).count().get()[0][0].value for query in (waiting, busy)]
print("AtTarget" if deployment.spec.replicas == min(3, sum(counts)) else "not at the target")
"""

# The clients' entry points, and not a single call.
IMPORTS = """
from google.cloud import firestore
from kubernetes import config
from kubernetes.client import ApiClient

print("AtTarget")
"""


# ------------------------------------------------------------------------------------ the servers


@dataclass(frozen=True)
class Seen:
    """What the fakes saw of one run."""

    api_calls: int
    queries: int
    reads_billed: int


@dataclass(frozen=True)
class Servers:
    """The servers' process as the measuring one sees it, with the environments of busy-aware runs:
    `few` and `many` have a queue of 10 and of 20,000 waiting jobs."""

    pipe: Connection
    environs: Sequence[dict[str, str]]

    @property
    def few(self) -> dict[str, str]:
        return self.environs[0]

    @property
    def many(self) -> dict[str, str]:
        return self.environs[1]

    def seen(self) -> Seen:
        """What has come in at the fakes since this was last asked."""
        self.pipe.send("seen")
        answer: Seen = self.pipe.recv()
        return answer


@contextmanager
def servers(serve: Callable[..., None], *arguments: int) -> Iterator[Servers]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Servers(ours, ours.recv())
    finally:
        ours.close()
        process.join()


def serve_queues(pipe: Connection) -> None:
    """A cluster whose Deployment is as it should be, and the queues, until the pipe is closed."""
    from tests.support.firestore import FakeFirestore
    from tests.support.kubernetes import FakeKubernetes
    from tests.support.world import BUSY, World

    with ExitStack() as stack:
        cluster = stack.enter_context(FakeKubernetes(tls=True, seed=1))
        cluster.add_deployment("worker", replicas=PODS)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fakes = [stack.enter_context(FakeFirestore(f"bench-{jobs}")) for jobs in (FEW, MANY)]
        environ = World(cluster, fakes[0], directory=directory).environment(BUSY_FILTER=BUSY)
        for jobs, fake in zip((FEW, MANY), fakes, strict=True):
            fake.fill(jobs)
            for pod in cluster.pods("worker"):
                fake.fill(1, "processing", assignedPodId=pod["metadata"]["name"])
        few, many = (
            {**environ, "FIRESTORE_EMULATOR_HOST": fake.host, "FIRESTORE_PROJECT": fake.project}
            for fake in fakes
        )
        pipe.send([few, many])
        answer_questions(pipe, cluster, fakes)


def serve_crowd(pipe: Connection, pods: int) -> None:
    """A cluster with so many pods, all busy but a few, until the pipe is closed."""
    from tests.support.crowd import crowd
    from tests.support.firestore import FakeFirestore
    from tests.support.kubernetes import FakeKubernetes
    from tests.support.world import BUSY, World

    with ExitStack() as stack:
        cluster = stack.enter_context(FakeKubernetes(tls=True, seed=1))
        cluster.add_deployment("worker", replicas=0)
        queue = stack.enter_context(FakeFirestore("bench-crowd"))
        for name in crowd(cluster, pods)[min(REMOVED, pods - 1) :]:
            queue.fill(1, "processing", assignedPodId=name)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = {"MAX_REPLICAS": str(pods), "SCALE_DOWN_STABILIZATION_SECONDS": "0"}
        world = World(cluster, queue, settings=settings, directory=directory)
        pipe.send([world.environment(BUSY_FILTER=BUSY, FIRESTORE_PROJECT=queue.project)])
        answer_questions(pipe, cluster, [queue])


def answer_questions(
    pipe: Connection, cluster: FakeKubernetes, fakes: Sequence[FakeFirestore]
) -> None:
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        calls = [call for fake in fakes for call in fake.calls]
        billed = sum(call.reads_billed for call in calls)
        pipe.send(Seen(len(cluster.requests), len(calls), billed))
        cluster.requests.clear()
        for fake in fakes:
            fake.calls.clear()


# ------------------------------------------------------------------------------------ measurements


def lean_python(directory: Path) -> str:
    """A Python in a virtual environment that has the packages of requirements.txt only: more
    would cost something, as clients look for optional ones (kubernetes-validate, for instance)."""
    venv.create(directory, symlinks=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    pinned = re.findall(
        r"^([\w.-]+)==", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE
    )
    for name in pinned:
        with suppress(importlib.metadata.PackageNotFoundError):  # not for this platform
            found = importlib.metadata.distribution(name)
            tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
            for top in tops:
                with suppress(FileExistsError):  # such as "google", which several share
                    (packages / top).symlink_to(Path(str(found.locate_file(top))))
    return str(directory / "bin/python")


@dataclass(frozen=True)
class Cost:
    """Of one process, from its start to its end."""

    cpu_seconds: float
    wall_seconds: float
    memory_mebibytes: float


Runs = dict[str, list[Cost]]


def run(command: Sequence[str], environ: Mapping[str, str], reason: str = "AtTarget") -> Cost:
    """One process, which has to end with this reason."""
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=environ,
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read()
    if process.returncode or reason not in said:
        raise RuntimeError(f"{' '.join(command)[:60]} ended with {process.returncode}: {said}")
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / unit)


def in_turn(commands: Mapping[str, Callable[[], Cost]], rounds: int) -> Runs:
    for command in commands.values():
        command()
    runs: Runs = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            runs[name].append(command())
    return runs


def costs(python: str, servers: Servers, rounds: int) -> Runs:
    return in_turn(
        {
            "scaler": lambda: run((python, *SCALER), servers.few),
            "reference": lambda: run((python, "-c", REFERENCE), servers.few),
            "imports": lambda: run((python, "-c", IMPORTS), servers.few),
        },
        rounds,
    )


def lengths(python: str, servers: Servers, rounds: int) -> Runs:
    """Runs on a short and on a long queue, not busy-aware. The fake reads as many index entries as
    the limit says, as Firestore does; the official emulator looks at every document."""
    command = (python, *SCALER)
    few, many = without_busy_filter(servers.few), without_busy_filter(servers.many)
    return in_turn({"few": lambda: run(command, few), "many": lambda: run(command, many)}, rounds)


def without_busy_filter(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name != "BUSY_FILTER"}


def calls(python: str, servers: Servers) -> dict[str, Seen]:
    found = {}
    for name, busy_aware in (("few", servers.few), ("many", servers.many)):
        plain = without_busy_filter(busy_aware)
        for aware, environ in (("", plain), (", busy-aware", busy_aware)):
            servers.seen()
            run((python, *SCALER), environ)
            found[name + aware] = servers.seen()
    return found


LOOKS_SECONDS = 52


def polling(python: str, servers: Servers) -> tuple[Cost, Seen, Cost, Seen]:
    """A run of some fifty looks, busy-aware, and one of a single look, with what they asked."""
    environ = {**servers.few, "POLLING_INTERVAL_SECONDS": "1"}
    many = {**environ, "TIMEOUT_SECONDS": str(LOOKS_SECONDS)}
    one = {**servers.few, "TIMEOUT_SECONDS": str(LOOKS_SECONDS)}
    servers.seen()
    of_one = run((python, *SCALER), one)
    asked_by_one = servers.seen()
    of_many = run((python, *SCALER), many)
    return of_one, asked_by_one, of_many, servers.seen()


def crowds(python: str) -> list[tuple[Cost, Seen]]:
    """A scale-down by twenty, or of three pods by two, with all other pods busy."""
    found = []
    for pods in CROWDS:
        with servers(serve_crowd, pods) as running:
            running.seen()
            cost = run((python, *SCALER), running.environs[0], "ScaledDown")
            found.append((cost, running.seen()))
    return found


REACTION_INTERVAL = 2
BURSTS = 20
SCALE_UPS = 20
INTERVALS = (2, 10)
POLLING_TIMEOUT = 62  # as in cronjob.yaml


def waits(*measures: Sequence[object]) -> list[float]:
    """What tools/waits.py measures, all at once. Its servers are not in this process, for the sake
    of this one's memory."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "tools.waits", *map(str, measure)],
            cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        )
        for measure in measures
    ]  # fmt: skip
    return [float(run.communicate()[0]) for run in runs]


# --------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """One line of the table. `holds` is None where nothing was measured."""

    what: str
    measured: str
    against: str
    value: str
    goal: str
    holds: bool | None

    def cells(self) -> list[str]:
        verdict = {None: "not measured", True: "holds", False: "MISSED"}[self.holds]
        return [self.what, self.measured, self.against, self.value, self.goal, verdict]


HEADINGS = ["a run that changes nothing", "scaler", "against", "ratio", "goal", ""]


def spread(values: Sequence[float], unit: str) -> str:
    digits = 0 if unit == "MiB" else 3
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f})"


def ratio(
    what: str, mine: Sequence[float], name: str, other: Sequence[float], unit: str, goal: float
) -> Row:
    value = statistics.median(mine) / statistics.median(other)
    against = f"{name}: {spread(other, unit)}"
    return Row(what, spread(mine, unit), against, f"{value:.2f}", f"≤ {goal:.2f}", value <= goal)


def cost_rows(found: Runs) -> Iterator[Row]:
    mine, reference, imports = found["scaler"], found["reference"], found["imports"]
    typed = "typed clients"

    def cpu(runs: Sequence[Cost]) -> list[float]:
        return [cost.cpu_seconds for cost in runs]

    def wall(runs: Sequence[Cost]) -> list[float]:
        return [cost.wall_seconds for cost in runs]

    def memory(runs: Sequence[Cost]) -> list[float]:
        return [cost.memory_mebibytes for cost in runs]

    yield ratio("processor time", cpu(mine), typed, cpu(reference), "s", 0.45)
    yield ratio("wall time", wall(mine), typed, wall(reference), "s", 0.48)
    yield ratio("peak memory", memory(mine), typed, memory(reference), "MiB", 0.78)
    yield ratio("processor time", cpu(mine), "imports alone", cpu(imports), "s", 1.10)


def length_row(found: Runs) -> Row:
    few, many = ([cost.wall_seconds for cost in found[name]] for name in ("few", "many"))
    return ratio(f"wall time, {MANY:,} waiting", many, f"{FEW} waiting", few, "s", 1.20)


def call_rows(found: Mapping[str, Seen]) -> Iterator[Row]:
    reads = {name: f"{seen.reads_billed} for {seen.queries}" for name, seen in found.items()}
    billed_once = all(seen.reads_billed == seen.queries > 0 for seen in found.values())
    yield Row(
        "Firestore reads billed, for so many queries",
        f"{reads['few']}; busy-aware {reads['few, busy-aware']}",
        f"{MANY:,} waiting: {reads['many']}; busy-aware {reads['many, busy-aware']}",
        "",
        "1 per query",
        billed_once,
    )
    plain, busy_aware = found["few"].api_calls, found["few, busy-aware"].api_calls
    yield Row(
        "calls to the API server",
        f"{plain}; busy-aware {busy_aware}",
        "",
        "",
        "1; 3",
        (plain, busy_aware) == (1, 3),
    )


def polling_rows(python: str, servers: Servers) -> Iterator[Row]:
    one, asked_by_one, many, asked = polling(python, servers)
    looks = asked.api_calls // asked_by_one.api_calls
    more = (many.cpu_seconds - one.cpu_seconds) / (looks - 1)
    what = f"processor time of one more look, of {looks}"
    yield Row(what, f"{more * 1000:.1f} ms", "", "", "≤ 30 ms", more <= 0.030)
    mine, other = many.memory_mebibytes, one.memory_mebibytes
    yield ratio(f"peak memory after {looks} looks", [mine], "one look", [other], "MiB", 1.10)
    a_look = f"{asked.api_calls / looks:g}"
    yield Row("calls to the API server per look, busy-aware", a_look, "", "", "3", a_look == "3")


def wait_rows() -> Iterator[Row]:
    [worst] = waits(("reaction", REACTION_INTERVAL, BURSTS))
    goal = REACTION_INTERVAL + 1
    what = f"from a job to the patch, looking every {REACTION_INTERVAL} s"
    yield Row(what, f"{worst:.1f} s, worst of {BURSTS}", "", "", f"≤ {goal} s", worst <= goal)
    gaps = waits(*(("gap", interval, POLLING_TIMEOUT) for interval in INTERVALS))
    for interval, gap in zip(INTERVALS, gaps, strict=True):
        what = f"between looks, across two runs, looking every {interval} s"
        yield Row(what, f"{gap:.1f} s at most", "", "", f"≤ {interval + 1} s", gap <= interval + 1)
    [late] = waits(("cooldowns", SCALE_UPS))
    what = f"scale-ups at a cooldown of 120 s that took a third run, of {SCALE_UPS}"
    yield Row(what, f"{late:g}", "", "", "0", late == 0)


def crowd_rows(found: Sequence[tuple[Cost, Seen]]) -> Iterator[Row]:
    """Most of the wall time is that of the servers, which are Python, too."""
    (few, few_seen), *_, (many, many_seen) = found

    def row(
        what: str, show: Callable[[Cost, Seen], str], growth: float, goal: str, holds: bool
    ) -> Row:
        *others, last = [show(*one) for one in found]
        against = [f"{pods:,}: {one}" for pods, one in zip(CROWDS, others, strict=False)]
        what = f"scale-down by {REMOVED} of {CROWDS[-1]:,} pods, {what}"
        return Row(what, last, "; ".join(against), f"{growth:.2f}", goal, holds)

    memory, seconds, calls = many.memory_mebibytes, many.cpu_seconds, many_seen.api_calls
    yield row(
        "peak memory",
        lambda cost, _: f"{cost.memory_mebibytes:.0f} MiB",
        memory / few.memory_mebibytes,
        "≤ 128 MiB",
        memory <= 128,
    )
    yield row(
        "processor (wall) time",
        lambda cost, _: f"{cost.cpu_seconds:.1f} ({cost.wall_seconds:.1f}) s",
        seconds / few.cpu_seconds,
        "≤ 5 s",
        seconds <= 5,
    )
    most = REMOVED + 7 + 2 * CROWDS[-1] // 500
    yield row(
        "calls to the API server",
        lambda _, seen: str(seen.api_calls),
        calls / few_seen.api_calls,
        f"≤ {most}",
        calls <= most,
    )
    queries = many_seen.queries
    yield row(
        "queries",
        lambda _, seen: str(seen.queries),
        queries / few_seen.queries,
        f"≤ {CROWDS[-1] // 30 + 5}",
        queries <= CROWDS[-1] // 30 + 5,
    )


def image_row() -> Row:
    """The image's size, where one can be built."""
    from tests.support import image as images

    what, goal = "what the build adds to the base image", f"≤ {images.RATIO:.2f}"
    try:
        with images.builder() as build:
            images.build_image(build)
            image, plain = images.measure(build)
    except images.NoBuilder as why:
        return Row(what, "", str(why), "", goal, None)
    mine, other = f"{image / 1e6:.1f} MB", f"plain pip install: {plain / 1e6:.1f} MB"
    return Row(what, mine, other, f"{image / plain:.2f}", goal, image / plain <= images.RATIO)


def table(rows: Sequence[Row]) -> str:
    """In Markdown, aligned to be read as it is."""
    cells = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    lines = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in cells
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    load = f"load {os.getloadavg()[0]:.1f} before the first run"
    return f"{os.cpu_count()} cores, {model}, {platform.system()} {platform.release()}, {load}"


def versions() -> str:
    packages = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *packages])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description="What a run costs.")
    parser.add_argument("--rounds", type=int, default=15, help="counted runs of each (default 15)")
    parser.add_argument(
        "--no-image", action="store_true", help="build no image, which takes longest"
    )
    options = parser.parse_args()
    print(f"{machine()}\n{versions()}\nmedians of {options.rounds} rounds (lowest to highest)\n")
    with servers(serve_queues) as running, tempfile.TemporaryDirectory() as directory:
        python = lean_python(Path(directory))
        rows = [*cost_rows(costs(python, running, options.rounds))]
        rows.append(length_row(lengths(python, running, options.rounds)))
        rows += call_rows(calls(python, running))
        rows += polling_rows(python, running)
        rows += crowd_rows(crowds(python))
    rows += wait_rows()
    if not options.no_image:
        rows.append(image_row())
    print(f"{table(rows)}\n")
    held = sum(row.holds is True for row in rows)
    print(f"{held} of {len(rows)} goals hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
