"""What clouds do: credentials that come late, proxies, thousands of pods, processes that freeze.

The first part runs the script as on GKE, without the emulator's variable: Google's libraries find
credentials at a metadata server or in a file, and reach Firestore through a proxy, with TLS.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import scaler
from tests.support.crowd import crowd
from tests.support.firestore import Hang
from tests.support.google import ConnectProxy, GoogleHttp
from tests.support.kubernetes import Match, hang
from tests.support.needs import need
from tests.support.world import BUSY, PROJECT, Run, World

pytestmark = pytest.mark.slow


@pytest.fixture
def process(world: World) -> World:
    world.process, world.now = True, None
    world.queue.fill(2)
    return world


# ------------------------------------------------------------------------------- credentials


@dataclass
class Cloud:
    """A run's way to Google: `environ` is that of a pod with no emulator and no credentials."""

    google: GoogleHttp
    proxy: ConnectProxy
    world: World
    environ: dict[str, str]

    def run(self, **settings: str) -> Run:
        return self.world.run_with({**self.environ, **settings})


@pytest.fixture
def cloud(process: World) -> Iterator[Cloud]:
    with GoogleHttp(PROJECT) as google:
        hosts = {"firestore.googleapis.com": process.queue.host, "sts.googleapis.com": google.host}
        with ConnectProxy(hosts) as proxy:
            environ = process.environment(TIMEOUT_SECONDS="25")
            del environ["FIRESTORE_EMULATOR_HOST"]
            environ |= proxy.environment(process.directory)
            yield Cloud(google, proxy, process, environ)


@pytest.mark.parametrize("given", [True, False], ids=["project given", "project from the server"])
def test_a_metadata_server_that_is_late_is_waited_for(cloud: Cloud, given: bool) -> None:
    if not given:
        del cloud.environ["FIRESTORE_PROJECT"]
    timer = threading.Timer(10, cloud.google.listen)
    timer.start()
    run = cloud.run(**cloud.google.environment())
    timer.join()
    assert (run.exit_code, run.reason, cloud.world.replicas) == (0, "ScaledUp", 2), run
    assert 9 < run.seconds < 20 and "firestore.googleapis.com" in cloud.proxy.asked, run


def test_a_token_that_is_late_is_waited_for(cloud: Cloud) -> None:
    """The metadata server is up before it knows the account, as with a new Workload Identity."""
    cloud.google.denies.set()
    cloud.google.listen()
    timer = threading.Timer(8, cloud.google.denies.clear)
    timer.start()
    run = cloud.run(**cloud.google.environment())
    timer.join()
    assert (run.exit_code, run.reason, cloud.world.replicas) == (0, "ScaledUp", 2), run
    assert 7 < run.seconds < 18, run


@pytest.mark.parametrize("sign", ["GCE_METADATA_*", "KUBERNETES_SERVICE_HOST"])
def test_without_a_metadata_server_a_run_ends_within_its_budget(cloud: Cloud, sign: str) -> None:
    environ = cloud.google.environment()
    if sign == "KUBERNETES_SERVICE_HOST":
        environ = {sign: "10.0.0.1"}  # on any cluster; the kubeconfig goes first
    run = cloud.run(**environ, TIMEOUT_SECONDS="12")
    assert (run.exit_code, run.reason, cloud.world.replicas) == (1, "QueueUnavailable", 1), run
    assert "metadata server" in run.record["message"] and run.seconds < 12.5, run


def damaged_key(directory: Path) -> Path:
    path = directory / "damaged.json"
    path.write_text('{"type": "service_account", "private_key": "-----BEGIN')
    return path


@pytest.mark.parametrize("broken", [lambda path: path / "missing.json", damaged_key])
def test_a_key_file_that_is_missing_or_damaged_is_reported_at_once(
    cloud: Cloud, broken: Callable[[Path], Path]
) -> None:
    path = str(broken(cloud.world.directory))
    for environ in ({}, cloud.google.environment(), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}):
        run = cloud.run(GOOGLE_APPLICATION_CREDENTIALS=path, **environ)
        assert (run.exit_code, run.reason) == (2, "Forbidden") and run.seconds < 12, run
        assert "GOOGLE_APPLICATION_CREDENTIALS" in run.record["message"]
        assert "BEGIN" not in run.stdout + run.stderr, "no part of a key"


def test_the_project_is_not_looked_up_if_it_is_given(cloud: Cloud) -> None:
    """With Workload Identity Federation, Google's library asks the Resource Manager for it, which
    hangs where that API is blocked."""
    cloud.google.listen()
    token = cloud.world.directory / "token"
    token.write_text("subject-token")
    key = cloud.world.directory / "federation.json"
    pool = "projects/123/locations/global/workloadIdentityPools/pool/providers/cluster"
    credentials = {
        "type": "external_account",
        "audience": f"//iam.googleapis.com/{pool}",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": "https://sts.googleapis.com/v1/token",
        "credential_source": {"file": str(token)},
    }
    key.write_text(json.dumps(credentials))
    run = cloud.run(GOOGLE_APPLICATION_CREDENTIALS=str(key))
    assert (run.exit_code, run.reason, cloud.world.replicas) == (0, "ScaledUp", 2), run
    assert cloud.google.paths == ["/v1/token"]
    assert "cloudresourcemanager.googleapis.com" not in cloud.proxy.asked


# ------------------------------------------------------------------------------------ proxies


def test_a_proxy_that_grpc_does_not_read_is_named(cloud: Cloud) -> None:
    """Whatever is reached past the proxy has no certificate that the run trusts."""
    cloud.google.listen()
    cloud.environ |= {**cloud.google.environment(), "TIMEOUT_SECONDS": "8"}
    proxy = cloud.environ.pop("https_proxy")
    run = cloud.run(HTTPS_PROXY=proxy)
    assert (run.exit_code, run.reason, cloud.world.replicas) == (1, "QueueUnavailable", 1), run
    assert "firestore.googleapis.com" not in cloud.proxy.asked
    assert "HTTPS_PROXY is set, but gRPC reads only https_proxy" in run.record["message"], run
    run = cloud.run(https_proxy=proxy)
    assert (run.exit_code, run.reason) == (0, "ScaledUp"), run
    assert "firestore.googleapis.com" in cloud.proxy.asked


# --------------------------------------------------------------------------------- KUBECONFIG


def write_config(path: Path, name: str, current: str | None = "", namespace: str = "") -> None:
    """A file with one cluster, one user and one context of that name; None: no current-context."""
    context = {"cluster": name, "user": name} | ({"namespace": namespace} if namespace else {})
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": f"https://{name}.{path.stem}:6443"}}],
        "users": [{"name": name, "user": {"token": name}}],
        "contexts": [{"name": name, "context": context}],
    }
    path.write_text(json.dumps(config | ({} if current is None else {"current-context": current})))


KUBECONFIGS = {
    "the first file's context": "a:b",
    "the second file's, if the first has none": "none:b",
    "a context of another file": "elsewhere:b",
    "one of two clusters of one name": "a:twin",
    "a missing file": "missing:b",
    "an empty file": "empty:b",
    "an empty entry": ":a:",
    "an empty file at the end": "a:empty",
    "one file": "b",
}


@pytest.mark.parametrize("files", KUBECONFIGS.values(), ids=KUBECONFIGS)
def test_a_list_of_kubeconfig_files_means_what_it_means_to_kubectl(
    files: str, tmp_path: Path
) -> None:
    write_config(tmp_path / "a", "a", "a", "team-a")
    write_config(tmp_path / "b", "b", "b")
    write_config(tmp_path / "none", "a", None)
    write_config(tmp_path / "elsewhere", "a", "b")
    write_config(tmp_path / "twin", "a", "a", "team-twin")
    (tmp_path / "empty").touch()
    paths = ":".join(one and str(tmp_path / one) for one in files.split(":"))
    form = "{.clusters[0].cluster.server} {.contexts[0].context.namespace}"
    view = [need("kubectl"), "config", "view", "--minify", "-o", f"jsonpath={form}"]
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KUBECONFIG": paths}
    shown = subprocess.run(view, env=environ, capture_output=True, text=True, check=True).stdout
    server, _, namespace = shown.partition(" ")
    settings = scaler.read_settings({"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs"})
    api = scaler.open_cluster(settings, environ)
    assert (api.client.configuration.host, api.namespace) == (server, namespace or "default")


# ---------------------------------------------------------------------------- thousands of pods

LIMIT_MEBIBYTES = 128
# Live pods, evicted ones, and the idle ones among the live.
CROWDS = {"5,000 live, 20 of them idle": (5_000, 0, 20), "6,000 evicted": (3, 6_000, 1)}


@pytest.mark.parametrize(("live", "evicted", "idle"), CROWDS.values(), ids=CROWDS)
def test_a_scale_down_among_thousands_of_pods_fits_memory_and_time(
    world: World, live: int, evicted: int, idle: int
) -> None:
    world.cluster.scale("worker", 0)
    names = crowd(world.cluster, live, evicted)
    for name in names[idle:]:
        world.queue.put(f"jobs/{name}", {"status": "processing", "assignedPodId": name})
    world.cluster.deleted_pods.clear()
    world.now = None
    world.settings = {"MAX_REPLICAS": "10000", "SCALE_DOWN_STABILIZATION_SECONDS": "0"}
    run = world.start(log=world.directory / "log", BUSY_FILTER=BUSY)
    peak = peak_mebibytes(run)
    stdout, _ = run.communicate()
    assert run.returncode == 0 and "ScaledDown" in stdout, stdout
    assert set(world.cluster.deleted_pods) == set(names[:idle])
    assert peak <= LIMIT_MEBIBYTES, stdout
    pages = [request for request in world.cluster.requests if Match("list", "pods")(request)]
    assert len(pages) == 2 * -(-live // 500), "the server leaves out the evicted ones"


class AtOnce:
    """Takes a twentieth of a second, and counts how many do so at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, _: object) -> None:
        for change in (1, -1):
            with self._lock:
                self.now += change
                self.most = max(self.most, self.now)
            time.sleep(0.05 if change > 0 else 0)


def test_queries_and_patches_of_pods_are_sent_several_at_a_time(world: World) -> None:
    world.cluster.scale("worker", 600)
    names = [str(pod["metadata"]["name"]) for pod in world.cluster.pods("worker")]
    for name in names[20:]:
        world.queue.put(f"jobs/{name}", {"status": "processing", "assignedPodId": name})
    counts, patches = AtOnce(), AtOnce()
    world.queue.hook("count", counts)
    world.cluster.hook(Match("patch", "pods"), patches, times=None)
    world.settings = {"MAX_REPLICAS": "1000", "SCALE_DOWN_STABILIZATION_SECONDS": "0"}
    run = world.run(BUSY_FILTER=BUSY)
    assert (run.reason, world.replicas) == ("ScaledDown", 580), run
    assert counts.most == patches.most == scaler.CONCURRENT_CALLS


def peak_mebibytes(run: subprocess.Popen[str]) -> float:
    """Of a run until its end. What `wait4` reports includes the memory of this process, which
    starts the other."""
    peak = 0
    while run.poll() is None:
        status = Path(f"/proc/{run.pid}/status").read_text()
        peak = max([peak, *map(int, re.findall(r"VmHWM:\s+(\d+) kB", status))])
        time.sleep(0.02)
    assert peak, "Linux has /proc"
    return peak / 1024


# ----------------------------------------------------------------------------- frozen processes

FROZEN_SECONDS = 6  # of runs with a budget of 4


def freeze(run: subprocess.Popen[str]) -> None:
    """Stop a run, once it waits for the answer, until well past its end."""
    time.sleep(0.2)
    run.send_signal(signal.SIGSTOP)
    time.sleep(FROZEN_SECONDS)


def thaw(run: subprocess.Popen[str]) -> tuple[str, float]:
    """Its output, and how long it still ran."""
    thawed = time.monotonic()
    run.send_signal(signal.SIGCONT)
    stdout, _ = run.communicate(timeout=30)
    return stdout, time.monotonic() - thawed


def answer_late(world: World, call: str, answered: bool) -> threading.Event:
    """Has a call answered after a second, or never; set when it comes in."""
    reached = threading.Event()

    def arrive(_: object) -> None:
        reached.set()
        time.sleep(1)

    if call == "count":
        world.queue.hook("count", arrive)
        if not answered:
            world.queue.fault("count", Hang())
    else:
        match = Match(call, "deployments")
        world.cluster.hook(match, arrive)
        if not answered:
            world.cluster.fault(match, hang(), times=None)
    return reached


@pytest.mark.parametrize("answered", [True, False], ids=["answered meanwhile", "never answered"])
@pytest.mark.parametrize("call", ["get", "count", "patch"])
def test_a_run_frozen_in_a_call_past_its_end_is_no_failure(
    process: World, call: str, answered: bool
) -> None:
    log, reached = process.directory / "log", answer_late(process, call, answered)
    run = process.start(log=log, TIMEOUT_SECONDS="4")
    assert reached.wait(30)
    freeze(run)
    stdout, seconds = thaw(run)
    record = json.loads(log.read_text())
    [line] = (line for line in stdout.splitlines() if "worker: no Event was written" not in line)
    assert seconds < 5 and " INFO " in line, (seconds, stdout)
    assert record["current"] == (None if call == "get" and not answered else 1)
    if call == "patch" and answered:
        assert (run.returncode, record["reason"], process.replicas) == (0, "ScaledUp", 2), stdout
        return
    assert (run.returncode, record["reason"], process.replicas) == (143, "Interrupted", 1), stdout
    assert record["replicas"] == (None if call == "patch" else record["current"]), stdout


def test_sigterm_ends_a_run_that_was_frozen(process: World) -> None:
    log, reached = process.directory / "log", answer_late(process, "get", answered=False)
    run = process.start(log=log, TIMEOUT_SECONDS="4")
    assert reached.wait(30)
    freeze(run)
    run.send_signal(signal.SIGTERM)
    stdout, seconds = thaw(run)
    assert (run.returncode, seconds < 5) == (143, True), stdout
    assert json.loads(log.read_text())["reason"] == "Interrupted", "by the signal, or by its end"


def test_a_polling_run_frozen_between_two_looks_reports_its_last(process: World) -> None:
    log, scaled = process.directory / "log", threading.Event()
    process.cluster.hook(Match("create", "events"), lambda _: scaled.set(), when="after")
    run = process.start(log=log, TIMEOUT_SECONDS="4", POLLING_INTERVAL_SECONDS="3")
    assert scaled.wait(30)
    freeze(run)
    stdout, seconds = thaw(run)
    record = json.loads(log.read_text())
    assert (run.returncode, seconds < 5) == (0, True), stdout
    assert (record["reason"], record["replicas"], record["looks"]) == ("ScaledUp", 2, 1), stdout
    assert stdout.count("AutoScaler") == 1 and " INFO " in stdout, stdout


def test_a_run_frozen_within_its_budget_goes_on(process: World) -> None:
    log, reached = process.directory / "log", answer_late(process, "get", answered=True)
    run = process.start(log=log, TIMEOUT_SECONDS="30")
    assert reached.wait(30)
    freeze(run)
    stdout, _ = thaw(run)
    assert run.returncode == 0 and json.loads(log.read_text())["reason"] == "ScaledUp", stdout
    assert process.replicas == 2
