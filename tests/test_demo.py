"""The demo shows what it says, and fails when the script fails."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest

from tests.support.world import REPOSITORY
from tools import demo


@pytest.mark.slow
def test_every_scenario_ends_as_expected() -> None:
    command, environ = [sys.executable, "-m", "tools.demo"], {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "Every scenario ended as expected." in done.stdout
    assert "0 busy pods removed" in done.stdout and "2 busy pods removed" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "\x1b" not in done.stdout, "colour is for terminals"


@pytest.mark.slow
def test_the_demo_fails_if_a_scenario_ends_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "working_world", partial(demo.working_world, SCALE_UP_STEP="0"))
    for scenario in ("idle_pods_first", "job_becomes_due", "burst"):
        monkeypatch.setattr(demo, scenario, lambda screen: None)
    assert demo.demo(demo.Screen(colour=False, width=120)) == 1
    said = capsys.readouterr().out
    assert "NOT SO  2 pods one run later" in said
    assert "Not as expected:\n  - 2 pods one run later\n" in said
