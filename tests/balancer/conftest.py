"""What several tests of this room need."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def threads_take_quick_turns() -> Iterator[None]:
    """A reader and a writer in one process meet in the middle of each other's work, not once in 5 ms."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before_s)
