"""The workflows and the files for editors and hooks: what they repeat is the same everywhere, and
the steps of a release do what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import scaler
from tests.support.world import REPOSITORY


def load(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


WORKFLOWS = {path.name: load(path) for path in (REPOSITORY / ".github/workflows").iterdir()}


def steps(workflow: str) -> list[dict[str, Any]]:
    jobs = WORKFLOWS[workflow]["jobs"].values()
    return [step for job in jobs for step in job.get("steps", [])]


def succeeds(name: str, directory: Path, **environ: str) -> bool:
    """Whether a step of the release does, run as GitHub does, with the variables that it sets."""
    [step] = [one for one in steps("release.yml") if one.get("name") == name]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = ["bash", "-e", "-c", step["run"]]
    return not subprocess.run(command, cwd=directory, env={"PATH": path, **environ}).returncode


@pytest.mark.slow
def test_a_tag_has_to_be_the_version(tmp_path: Path) -> None:
    step, version = "The tag is the version that the script has", scaler.__version__
    shutil.copy(REPOSITORY / "scaler.py", tmp_path)
    assert succeeds(step, tmp_path, GITHUB_REF_NAME=f"v{version}")
    for wrong in (version, "v99.0.0"):
        assert not succeeds(step, tmp_path, GITHUB_REF_NAME=wrong)


@pytest.mark.slow
def test_a_release_runs_its_own_image_or_fails(tmp_path: Path) -> None:
    step = "Put the image into cronjob.yaml"
    manifest = Path(shutil.copy(REPOSITORY / "cronjob.yaml", tmp_path))
    image = "ghcr.io/somebody/queue-scaler:1.2.3@sha256:" + 64 * "0"
    expected = load(manifest)
    template = expected["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    template["containers"][0]["image"] = image
    assert succeeds(step, tmp_path, IMAGE=image)
    assert load(manifest) == expected
    assert not succeeds(step, tmp_path, IMAGE="another"), "its place is taken"


@pytest.mark.slow
def test_the_notes_of_a_release_are_its_part_of_the_changelog(tmp_path: Path) -> None:
    step, tag = "Take the notes from CHANGELOG.md", f"v{scaler.__version__}"
    changes = Path(shutil.copy(REPOSITORY / "CHANGELOG.md", tmp_path))
    assert succeeds(step, tmp_path, GITHUB_REF_NAME=tag), "this version has some"
    changes.write_text("## 0.2.0\n\n- new\n\n## 0.1.0\n\n- old\n")
    assert succeeds(step, tmp_path, GITHUB_REF_NAME="v0.2.0")
    assert (tmp_path / "notes.md").read_text().strip() == "- new"


def test_jobs_write_only_what_they_have_to() -> None:
    found = set()
    for file, workflow in WORKFLOWS.items():
        for name, job in workflow["jobs"].items():
            rights = job.get("permissions", workflow["permissions"])
            assert isinstance(rights, dict), f"{file}: {name} has {rights}"
            found |= {(name, what) for what, right in rights.items() if right != "read"}
    assert found == {("image", "packages"), ("release", "contents")}


def test_actions_are_pinned_to_a_version_and_to_the_same_one() -> None:
    used = {one["uses"] for workflow in WORKFLOWS for one in steps(workflow) if "uses" in one}
    assert used and not [one for one in used if not re.fullmatch(r"[^@]+@v\d+\.\d+\.\d+", one)]
    assert len(used) == len({one.partition("@")[0] for one in used}), sorted(used)


def test_the_workflow_runs_what_ci_run_runs() -> None:
    assert (REPOSITORY / ".ci/run").read_text().splitlines()[-1] == "make ci"
    assert "make ci PYTHON=python" in [step.get("run") for step in steps("ci.yml")]


def test_pre_commit_has_the_versions_of_requirements_dev() -> None:
    requirements = (REPOSITORY / "requirements-dev.txt").read_text()
    for one in load(REPOSITORY / ".pre-commit-config.yaml")["repos"]:
        if one["repo"] != "local":
            package = one["repo"].rpartition("/")[2].removesuffix("-pre-commit")
            assert f"\n{package}=={one['rev'].removeprefix('v')} " in requirements


def test_every_tool_has_the_same_line_length() -> None:
    editor = ConfigParser()
    editor.read_string("[top]\n" + (REPOSITORY / ".editorconfig").read_text())
    ruff = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["ruff"]
    yamllint = load(REPOSITORY / ".yamllint.yaml")["rules"]["line-length"]["max"]
    assert int(editor["*"]["max_line_length"]) == ruff["line-length"] == yamllint


@pytest.mark.slow
def test_yamllint_passes() -> None:
    command = [sys.executable, "-m", "yamllint", "--strict", "."]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout
