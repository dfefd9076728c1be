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
PODS = 3  # the most by default, so that no number of waiting jobs changes anything

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
    """The servers' process as the measuring one sees it, with the environments of a busy-aware
    run on a queue of 10 and of 20,000 waiting jobs."""

    pipe: Connection
    few: dict[str, str]
    many: dict[str, str]

    def seen(self) -> Seen:
        """What has come in at the fakes since this was last asked."""
        self.pipe.send("seen")
        answer: Seen = self.pipe.recv()
        return answer


@contextmanager
def servers() -> Iterator[Servers]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Servers(ours, *ours.recv())
    finally:
        ours.close()
        process.join()


def serve(pipe: Connection) -> None:
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
        pipe.send((few, many))
        answer_questions(pipe, cluster, fakes)


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


def run(command: Sequence[str], environ: Mapping[str, str]) -> Cost:
    """One process, which has to find the Deployment as it should be."""
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
    if process.returncode or "AtTarget" not in said:
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


REACTION_INTERVAL = 2
BURSTS = 20


def reaction_seconds() -> float:
    """From a job's commit to the patch that answers it, the worst of twenty, at any moment of the
    interval. Its servers are a process of its own, for the sake of this one's memory."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.reaction", str(REACTION_INTERVAL), str(BURSTS)],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


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
        "1 a query",
        billed_once,
    )
    plain, busy_aware = found["few"].api_calls, found["few, busy-aware"].api_calls
    yield Row(
        "calls to the API server",
        f"{plain}; busy-aware {busy_aware}",
        "",
        "",
        "1; 2",
        (plain, busy_aware) == (1, 2),
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
    yield Row("calls to the API server a look, busy-aware", a_look, "", "", "2", a_look == "2")
    worst, goal = reaction_seconds(), REACTION_INTERVAL + 1
    what = f"from a job to the patch, looking every {REACTION_INTERVAL} s"
    yield Row(what, f"{worst:.1f} s, worst of {BURSTS}", "", "", f"≤ {goal} s", worst <= goal)


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
    with servers() as running, tempfile.TemporaryDirectory() as directory:
        python = lean_python(Path(directory))
        rows = [*cost_rows(costs(python, running, options.rounds))]
        rows.append(length_row(lengths(python, running, options.rounds)))
        rows += call_rows(calls(python, running))
        rows += polling_rows(python, running)
    if not options.no_image:
        rows.append(image_row())
    print(f"{table(rows)}\n")
    held = sum(row.holds is True for row in rows)
    print(f"{held} of {len(rows)} goals hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
