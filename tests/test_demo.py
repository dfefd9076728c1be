"""The demo shows what it says, fails when the script fails, and draws the picture of the README."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.world import REPOSITORY
from tools import demo

pytestmark = pytest.mark.slow

PICTURE = REPOSITORY / "docs" / "replicas.svg"


def test_every_scenario_ends_as_the_guide_says() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo"],
        cwd=REPOSITORY, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "Every scenario ended as the guide says." in done.stdout
    assert "NOT SO" not in done.stdout
    assert "0 busy pods removed" in done.stdout and "2 busy pods removed" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "\x1b" not in done.stdout, "colour is for terminals"


def test_the_demo_fails_where_a_scenario_ends_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = demo.stage

    def never_up(**settings: str) -> AbstractContextManager[demo.Stage]:
        return stage(SCALE_UP_STEP="0", **settings)

    monkeypatch.setattr(demo, "stage", never_up)
    monkeypatch.setattr(demo, "idle_pods_first", lambda screen: None)
    assert demo.demo(demo.Screen(colour=False, width=120)) == 1
    said = capsys.readouterr().out
    assert "NOT SO  2 pods one run later" in said
    assert "Not as the guide says:\n  - 2 pods one run later\n" in said


def test_the_picture_is_what_the_script_decides(tmp_path: Path) -> None:
    """`make picture` draws it again."""
    drawn = tmp_path / "replicas.svg"
    assert demo.main(["--picture", str(drawn)]) == 0
    assert drawn.read_text() == PICTURE.read_text()


def test_the_picture_is_small_and_stands_by_itself() -> None:
    text = PICTURE.read_text()
    assert len(text) < 10_000
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "href" not in text and "<style" not in text
