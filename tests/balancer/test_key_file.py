"""The file of API keys: read again when it changes, refused when others may read it, and never locks everybody out."""

from __future__ import annotations

from pathlib import Path

import pytest

from balancer.access import Limits
from balancer.key_file import INTERNAL_VARIABLE, VARIABLE, KeyFileError, KeySource

ALICE, BOB = "alice-" + "a" * 32, "bob-" + "b" * 32


class Drawer:
    """A file of keys, a clock, and the source that reads both."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys"
        self.now_s = 50.0
        self.write(f"alice {ALICE}")

    def write(self, text: str, mode: int = 0o600) -> None:
        self.path.write_text(text)
        self.path.chmod(mode)

    def source(self) -> KeySource:
        return KeySource(self.path, Limits(), lambda: self.now_s)


@pytest.fixture
def drawer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawer:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(INTERNAL_VARIABLE, raising=False)
    return Drawer(tmp_path)


def names(source: KeySource) -> list[str]:
    return [key.name for key in source() or ()]


def test_without_file_and_variable_there_are_no_keys(drawer: Drawer) -> None:
    """None, which lets everybody in; not an empty set of keys, which would let in nobody."""
    assert KeySource(None, Limits(), lambda: 0.0)() is None


def test_the_environment_adds_keys_to_those_of_the_file(drawer: Drawer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either alone does as well."""
    monkeypatch.setenv(VARIABLE, f"bob {BOB}; carol {ALICE}")
    assert names(drawer.source()) == ["alice", "bob", "carol"]
    assert names(KeySource(None, Limits(), lambda: 0.0)) == ["bob", "carol"]


def test_the_runs_own_parts_have_a_key_without_limits(drawer: Drawer, monkeypatch: pytest.MonkeyPatch) -> None:
    """But none where nobody needs one: it would close an open door."""
    monkeypatch.setenv(INTERNAL_VARIABLE, "of-this-run-only-" + "z" * 16)
    keys = drawer.source()()
    assert keys is not None
    assert (keys[-1].name, keys[-1].limits) == ("splitwiser itself", Limits())
    assert KeySource(None, Limits(), lambda: 0.0)() is None


def test_a_changed_file_is_read_again_within_a_second(drawer: Drawer) -> None:
    """A key that was taken out is no longer good; between two looks the file is not even asked for."""
    source = drawer.source()
    assert names(source) == ["alice"]
    drawer.write(f"bob {BOB}")
    assert names(source) == ["alice"]
    drawer.now_s += 1.0
    assert names(source) == ["bob"]


@pytest.mark.parametrize("damage", ["nonsense", "", "unreadable by its owner's will", "gone", "not text"])
def test_a_file_that_became_useless_is_reported_and_changes_nothing(
    drawer: Drawer, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither is everybody let in, nor everybody locked out; mended, it counts again."""
    source = drawer.source()
    match damage:
        case "gone":
            drawer.path.unlink()
        case "unreadable by its owner's will":
            drawer.path.chmod(0o644)
        case "not text":
            drawer.path.write_bytes(b"\xff\xfe")
        case _:
            drawer.write(damage)
    drawer.now_s += 1.0
    assert names(source) == ["alice"]
    assert "the keys read before stay valid" in caplog.text
    assert ALICE not in caplog.text
    drawer.write(f"bob {BOB}")
    drawer.now_s += 1.0
    assert names(source) == ["bob"]


def test_a_file_that_others_may_read_is_refused_with_the_mend(drawer: Drawer) -> None:
    """At the start, before anything is served."""
    drawer.write(f"alice {ALICE}", mode=0o640)
    with pytest.raises(KeyFileError, match=f"chmod 600 {drawer.path}"):
        drawer.source()


@pytest.mark.parametrize("text", ["", "# nobody\n", "alice"])
def test_a_file_without_a_usable_key_is_refused(drawer: Drawer, text: str) -> None:
    """It would lock everybody out."""
    drawer.write(text)
    with pytest.raises(KeyFileError, match=str(drawer.path)):
        drawer.source()


def test_a_missing_file_is_refused_by_name(drawer: Drawer) -> None:
    """A misspelt path must not open the door."""
    drawer.path.unlink()
    with pytest.raises(KeyFileError, match="cannot read the API keys"):
        drawer.source()
