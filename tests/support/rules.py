"""What both fakes have in common: the requests that a fault or a hook is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Rule:
    """For matching requests from the `nth` on, `times` of them (None: all)."""

    match: Callable[[Any], bool]
    act: Any
    times: int | None
    nth: int = 1
    seen: int = 0

    def due(self, request: Any) -> bool:
        """To be asked once about each request: it counts them."""
        if not self.match(request):
            return False
        self.seen += 1
        return self.nth <= self.seen and (self.times is None or self.seen < self.nth + self.times)
