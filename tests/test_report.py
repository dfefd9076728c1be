"""The result record: where it goes, what it holds, and that it always fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.kubernetes import Match, answer
from tests.support.world import World


@pytest.mark.slow
def test_a_path_that_was_set_is_created(world: World, tmp_path: Path) -> None:
    log = tmp_path / "not" / "there" / "yet"
    world.start(log=log, MIN_REPLICAS="none").communicate()
    assert json.loads(log.read_text())["reason"] == "InvalidSettings"


@pytest.mark.slow
def test_the_default_is_written_only_where_it_exists(world: World) -> None:
    default = Path("/dev/termination-log")
    existed = default.exists()
    assert world.start(log=default, MIN_REPLICAS="none").wait() == 2
    assert default.exists() is existed


@pytest.mark.slow
def test_a_record_that_cannot_be_written_is_a_warning(world: World) -> None:
    process = world.start(log=world.directory)
    stdout, _ = process.communicate()
    assert process.returncode == 0
    assert "WARNING AutoScaler the result record was not written" in stdout


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


def test_the_message_of_a_record_gives_way_where_it_is_too_long(world: World) -> None:
    world.cluster.fault(Match("get"), answer(403, message="한글" * 4_000))
    run = world.run()
    assert (run.exit_code, run.reason) == (2, "Forbidden"), run
    assert (world.directory / "termination-log").stat().st_size < 4096
