"""Mutation testing: change one thing in scaler.py, and see whether a test fails.

The changes are mutmut's. mutmut itself keeps all of them in one file, inside functions only; here
they are tried one at a time, as most of the settings stand outside of functions. Each mutant is
tested in a copy of the repository, by a child of a process that has the libraries loaded already.

    python -m tools.mutants                        the settings and the decision, every mutant
    python -m tools.mutants --sample 100 --seed 1  some of them
    python -m tools.mutants --whole --sample 100   all of scaler.py, with all tests: the slow ones
                                                   for those that the fast ones let live

Fails where fewer than 90 % are killed and, without --whole, where one survives that
tests/mutants.md does not explain.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import libcst
import pytest
from libcst.matchers import Call, Name, matches
from libcst.metadata import MetadataWrapper, WhitespaceInclusivePositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

SCRIPT = Path("scaler.py")
EXPLAINED = Path("tests/mutants.md")
# The sections to change, and the tests that are likely to notice, which come before the others.
SECTIONS = {
    "filters": ("filters", "settings"),
    "output and settings": ("settings", "messages"),
    "annotations": ("annotations", "other_writers"),
    "decision": ("decide", "schedule", "stabilization"),
    "removal": ("removal", "busy"),
}
TESTS = dict.fromkeys([*itertools.chain(*SECTIONS.values()), "pages"])
AT_LEAST = 90
LIBRARIES = ("google.cloud.firestore", "kubernetes.client", "kubernetes.config", "yaml")


# From this line to before that one, there is this text instead, in this section.
Change = tuple[int, int, str, str]
NO_CHANGE = (0, 0, "", "")


@dataclass(frozen=True, order=True)
class Mutant:
    """Where it is, by what does not move: not by a line number. The changed words and some around
    them."""

    function: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.function}: {self.before} → {self.after}".rstrip()


def shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def changed_part(before: str, after: str, around: int = 25) -> tuple[str, str]:
    """What differs, with so many characters before and after it, to the ends of their words."""
    same = shared(before, after)
    tail = shared(before[same:][::-1], after[same:][::-1])
    first = before.rfind(" ", 0, max(0, same - around)) + 1
    ends = (text.find(" ", len(text) - tail + around) for text in (before, after))
    last = [end if end >= 0 else None for end in ends]
    return before[first : last[0]], after[first : last[1]]


class Mutations(libcst.CSTVisitor):
    """Finds every mutant, within functions and outside of them, with the change that it is.
    `sections` are those of the script's banners to look at; none for all."""

    METADATA_DEPENDENCIES = (WhitespaceInclusivePositionProvider,)

    def __init__(self, source: str, sections: Sequence[str]) -> None:
        super().__init__()
        self.found: list[tuple[Mutant, Change]] = []
        self._lines, self._sections = source.splitlines(keepends=True), sections
        self._names: list[str] = []
        self._wrapper = MetadataWrapper(libcst.parse_module(source))
        self._wrapper.visit(self)

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, libcst.FunctionDef | libcst.ClassDef):
            self._names.append(node.name.value)
        # What mutmut leaves alone, too: types, decorators, and calls that could only fail.
        if isinstance(node, libcst.Annotation | libcst.Decorator) or (
            matches(node, Call(func=Name("len") | Name("isinstance")))
        ):
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind) and (
                not self._sections or self._section(node) in self._sections
            ):
                changed = list(operator(node))
                # The others of a string are the same in lower case and in upper case.
                for after in changed[:1] if operator is operator_string else changed:
                    self._add(node, self._wrapper.module.code_for_node(after))
        return True

    def on_leave(self, node: libcst.CSTNode) -> None:
        if isinstance(node, libcst.FunctionDef | libcst.ClassDef):
            self._names.pop()

    def _section(self, node: libcst.CSTNode) -> str:
        line = self.get_metadata(WhitespaceInclusivePositionProvider, node).start.line
        banners = (re.match(r"# -{9,} (.+)", text) for text in self._lines[line - 1 :: -1])
        return next((banner[1] for banner in banners if banner), "")

    def _add(self, node: libcst.CSTNode, after: str) -> None:
        span = self.get_metadata(WhitespaceInclusivePositionProvider, node)
        first, last = span.start.line - 1, span.end.line
        old = "".join(self._lines[first:last])
        tail = self._lines[last - 1][span.end.column :] if last <= len(self._lines) else ""
        new = old[: span.start.column] + after + tail
        was, now = ([line.strip() for line in text.splitlines()] for text in (old, new))
        diff = [line for line in difflib.ndiff(was, now) if line[0] in "-+"]
        lines = [" ".join(line[2:] for line in diff if line[0] == sign) for sign in "-+"]
        mutant = Mutant(".".join(self._names) or "module", *changed_part(lines[0], lines[1]))
        self.found.append((mutant, (first, last, new, self._section(node))))


def enter_a_copy(repository: Path, directory: str) -> None:
    """A copy of this worker's own, in which scaler.py is changed."""
    copy = Path(directory, str(os.getpid()))
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__")
    shutil.copytree(repository, copy, ignore=ignored)
    os.chdir(copy)
    sys.path[:] = [str(copy) if entry == str(repository) else entry for entry in sys.path]


def passes(source: str, change: Change, tests: Sequence[str], limit: int) -> bool:
    """Whether no test fails: those for the section first, as most mutants die there."""
    lines, (first, last, new, section) = source.splitlines(keepends=True), change
    SCRIPT.write_text("".join([*lines[:first], new, *lines[last:]]))
    # Else two mutants of the same length within a second share their compiled file.
    os.utime(SCRIPT, (random.randrange(2**31),) * 2)
    likely = SECTIONS.get(section)
    return (not likely or succeeds(fast(likely), limit)) and succeeds(tests, limit)


def fast(names: Iterable[str]) -> list[str]:
    return ["-m", "not slow", *(f"tests/test_{name}.py" for name in names)]


def succeeds(tests: Sequence[str], limit: int) -> bool:
    """Whether pytest ends well, in a child process that has so many seconds."""
    child = os.fork()
    if not child:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        signal.alarm(limit)
        os._exit(pytest.main(["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", *tests]))
    _, status = os.waitpid(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return status == 0


def let_live(
    drawn: Sequence[tuple[Mutant, Change]], source: str, tests: Sequence[str], jobs: int | None
) -> list[tuple[Mutant, Change]]:
    """Those of these mutants that the tests do not notice. Ends the program where the tests fail on
    scaler.py as it is, and so would notice all."""
    living: list[tuple[Mutant, Change]] = []
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as copies:
        place = (Path.cwd(), copies)
        with ProcessPoolExecutor(jobs, context, enter_a_copy, place) as pool:
            started = time.monotonic()
            if not pool.submit(passes, source, NO_CHANGE, tests, 900).result():
                sys.exit(f"fails on scaler.py as it is: python -m pytest {' '.join(tests)}")
            limit = 20 + 2 * int(time.monotonic() - started)
            asked = {pool.submit(passes, source, one[1], tests, limit): one for one in drawn}
            for number, answer in enumerate(as_completed(asked), 1):
                if number % 100 == 0:
                    print(f"{number}: {len(living)} survived", flush=True)
                if answer.result():
                    living.append(asked[answer])
                    print(f"{number}: survives\n{asked[answer][0]}", flush=True)
    return living


def explained() -> set[Mutant]:
    found = re.findall(r"^([\w.]+): (.+) → ?(.*)$", EXPLAINED.read_text(), re.MULTILINE)
    return {Mutant(*parts) for parts in found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.mutants")
    parser.add_argument("--whole", action="store_true", help="all of scaler.py, all tests")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn by chance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    chosen = parser.parse_args()

    tests = [*fast(TESTS), *(["tests"] if chosen.whole else [])]
    known, source, begun = explained(), SCRIPT.read_text(), time.monotonic()
    found = Mutations(source, () if chosen.whole else tuple(SECTIONS)).found
    drawn = found
    if chosen.sample is not None:
        drawn = random.Random(chosen.seed).sample(found, min(chosen.sample, len(found)))
    print(f"{len(drawn)} of {len(found)} mutants", flush=True)

    for library in LIBRARIES:
        importlib.import_module(library)
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, deadline=None, max_examples=50
    )
    hypothesis.settings.load_profile("mutants")
    living = let_live(drawn, source, tests, chosen.jobs)
    if chosen.whole and living:
        print("the slow tests, one at a time: they share the emulator and the image builder")
        living = let_live(living, source, ["-m", "slow", "tests"], 1)

    survivors = {mutant for mutant, _ in living}
    killed = len(drawn) - len(living)
    percent, minutes = 100 * killed / len(drawn), (time.monotonic() - begun) / 60
    print(f"killed {killed} of {len(drawn)}: {percent:.1f} %, in {minutes:.1f} minutes")
    unexplained = [] if chosen.whole else sorted(survivors - known)
    for mutant in unexplained:
        print(f"survives, and {EXPLAINED} does not explain it:\n{mutant}")
    if drawn is found and not chosen.whole:
        for mutant in sorted(known - survivors):
            print(f"explained, but killed or gone:\n{mutant}")
    return int(bool(unexplained) or percent < AT_LEAST)


if __name__ == "__main__":
    sys.exit(main())
