"""The result record: where it goes, what it holds, and that it always fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scaler
from tests.support.firestore import FakeFirestore
from tests.support.world import World


@pytest.mark.slow
def test_a_path_that_was_set_is_created(world: World, tmp_path: Path) -> None:
    log = tmp_path / "not" / "there" / "yet"
    world.start(log=log, MIN_REPLICAS="none").communicate()
    assert json.loads(log.read_text())["reason"] == "InvalidSettings"


@pytest.mark.slow
def test_the_default_is_written_only_where_it_exists(world: World) -> None:
    default = Path(scaler.DEFAULT_TERMINATION_LOG)
    existed = default.exists()
    assert world.start(log=default, MIN_REPLICAS="none").wait() == 2
    assert default.exists() is existed


@pytest.mark.slow
def test_a_record_that_cannot_be_written_is_a_warning(world: World, queue: FakeFirestore) -> None:
    process = world.start(log=world.directory)
    stdout, _ = process.communicate()
    assert process.returncode == 0
    assert "WARNING AutoScaler the result record was not written" in stdout


@given(st.text(max_size=9000), st.text(max_size=300))
def test_a_record_always_fits_what_the_kubelet_keeps(message: str, name: str) -> None:
    data = scaler.encode_record({"deployment": name, "message": message, "replicas": 3})
    assert len(data) < 4096
    record = json.loads(data)
    assert record["replicas"] == 3 and message.startswith(record["message"][:10])


@pytest.mark.parametrize("name", ["\udcff", "x" * 10_000, "a\nb", "한글"])
def test_a_name_that_no_deployment_can_have_is_reported_all_the_same(
    name: str, world: World
) -> None:
    run = world.run(DEPLOYMENT=name)
    assert (run.exit_code, run.reason) == (2, "InvalidSettings"), run
    assert run.stdout.count("\n") == 1


def test_a_failed_run_says_where_the_replicas_are(world: World, queue: FakeFirestore) -> None:
    run = world.run(FIRESTORE_EMULATOR_HOST="127.0.0.1:1", TIMEOUT_SECONDS="2")
    assert (run.exit_code, run.reason) == (1, "QueueUnavailable"), run
    record = run.record
    assert (record["current"], record["replicas"], record["desired"]) == (1, 1, None)
    assert record["action"] == "none" and "stays at 1 pod" in record["message"]
