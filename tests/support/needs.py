"""Tools that a test wants the real thing of: skipped where one is missing, but in CI a failure."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def lacking(reason: str) -> NoReturn:
    """Skip the test that is running, with the reason; where CI is set, fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need(tool: str) -> str:
    """The path of a command."""
    return shutil.which(tool) or lacking(f"{tool} is not on the PATH")
