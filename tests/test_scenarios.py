"""Four scenarios with the default settings, on the official emulator, minute by minute; and what
a run leaves behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from google.cloud.firestore import Client

import scaler
from tests.support.firestore import FakeFirestore
from tests.support.kubernetes import FakeKubernetes, Match, answer
from tests.support.world import START, Run, World


def wait(jobs: Client, number: int) -> None:
    for job in range(number):
        jobs.document(f"jobs/{job}").set({"status": "waiting"})


def finish_all(jobs: Client) -> None:
    for document in jobs.collection("jobs").stream():
        document.reference.update({"status": "done"})


def minutes(world: World, number: int) -> list[Run]:
    """So many runs, a minute apart."""
    runs = []
    for _ in range(number):
        runs.append(world.run())
        assert runs[-1].exit_code == 0, runs[-1]
        world.pass_time()
    return runs


def test_four_scenarios_one_after_the_other(emulated: World, jobs: Client) -> None:
    before = emulated.resource_version
    assert [run.reason for run in minutes(emulated, 3)] == ["AtTarget"] * 3, "no job: 1 pod"
    assert emulated.replicas == 1 and emulated.resource_version == before
    wait(jobs, 2)
    assert minutes(emulated, 1)[0].reason == "ScaledUp" and emulated.replicas == 2
    wait(jobs, 5)
    reasons = [run.reason for run in minutes(emulated, 3)]
    assert reasons == ["ScaleUpCooldown", "ScaledUp", "AtTarget"], "two minutes after the last one"
    assert emulated.replicas == 3, "the maximum"
    finish_all(jobs)
    numbers = []
    for _ in range(7):
        minutes(emulated, 1)
        numbers.append(emulated.replicas)
    assert numbers == [3, 3, 3, 3, 3, 1, 1], "about 5 minutes after the jobs are done"


def test_a_run_is_one_line_for_people_or_one_object_for_cloud_logging(world: World) -> None:
    world.queue.fill(1)
    line = world.run().stdout
    assert line.count("\n") == 1 and "AutoScaler default/worker AtTarget: 1 job waiting" in line
    entry = json.loads(world.run(LOG_FORMAT="json").stdout)
    assert entry["severity"] == "INFO" and "AutoScaler" in entry["message"]
    assert entry["reason"] == "AtTarget" and entry["waiting"] == 1


def test_debug_shows_every_call_with_its_duration(world: World) -> None:
    world.queue.fill(2)
    lines = world.run(LOG_LEVEL="DEBUG").stdout.splitlines()
    debug = "\n".join(line for line in lines if " DEBUG " in line)
    for call in ("GET /apis", "PATCH /apis", "POST /api/v1"):
        assert re.search(rf"{call}\S*: 20\d in \d+\.\d{{3}} s", debug), debug
    assert re.search(r"counting waiting jobs took \d+\.\d{3} s: 2", debug), debug


def test_no_more_jobs_are_counted_than_the_range_can_use(world: World) -> None:
    world.run(MAX_REPLICAS="600", JOBS_PER_POD="2")
    assert [call.limit for call in world.queue.calls if call.kind == "count"] == [1200]


def test_inside_a_cluster_a_run_is_the_service_account_of_its_pod(
    queue: FakeFirestore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(scaler.SERVICE_ACCOUNT) == "/var/run/secrets/kubernetes.io/serviceaccount"
    account = tmp_path / "account"
    monkeypatch.setattr(scaler, "SERVICE_ACCOUNT", account)
    with FakeKubernetes(tls=True) as cluster:
        cluster.add_deployment("worker", replicas=1)
        world = World(cluster, queue, now=START, directory=tmp_path)
        queue.fill(2)
        run = world.run(KUBECONFIG="", **cluster.write_service_account(account))
        assert (run.exit_code, run.record["namespace"], world.replicas) == (0, "default", 2), run


def test_collection_groups_nested_paths_and_other_filters(emulated: World, jobs: Client) -> None:
    for tenant in ("acme", "zeta"):
        for job in range(2):
            jobs.document(f"tenants/{tenant}/jobs/{job}").set({"state": "new", "prio": job})

    def waiting(**settings: str) -> object:
        return emulated.run("--dry-run", **settings).record["waiting"]

    new, urgent = '[["state", "==", "new"]]', '[["prio", ">", 0]]'
    assert waiting(QUEUE_COLLECTION="tenants/acme/jobs", WAITING_FILTER=new) == 2
    assert waiting(QUEUE_COLLECTION_GROUP="true", WAITING_FILTER="[]") == 4
    assert waiting(QUEUE_COLLECTION_GROUP="true", WAITING_FILTER=urgent) == 2


@pytest.mark.parametrize(
    "value", ["\udcff", "x" * 10_000, "한" * 3_000, '"' * 5_000, "a\nb"], ids=len
)
def test_a_record_always_fits_what_the_kubelet_keeps(value: str, world: World) -> None:
    """Whatever has landed in the variables; their values are shown."""
    names = ("DEPLOYMENT", "NAMESPACE", "WAITING_FILTER", "BUSY_FILTER", "SCALE_UP_STEP")
    run = world.run(**dict.fromkeys(names, value))
    assert (run.exit_code, run.reason) == (2, "InvalidSettings"), run
    assert run.stdout.count("\n") == 1
    assert (world.directory / "termination-log").stat().st_size < 4096


def test_the_message_of_a_record_is_truncated_if_it_is_too_long(world: World) -> None:
    world.cluster.fault(Match("get"), answer(403, message="한글" * 4_000))
    run = world.run()
    assert (run.exit_code, run.reason) == (2, "Forbidden"), run
    assert (world.directory / "termination-log").stat().st_size < 4096
