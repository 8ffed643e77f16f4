"""The verdict on matrix products under a cap; the products themselves need a GPU (tests/gpu)."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from deployments import numeric_check
from deployments.numeric_check import TOLERANCES, judge, refusal

RIGHT = dict.fromkeys(TOLERANCES, 1e-7)


def test_right_products_are_no_refusal() -> None:
    """Errors of rounding are expected."""
    assert judge(RIGHT) == ""
    assert judge(dict(TOLERANCES)) == ""


@pytest.mark.parametrize("error", [0.3, float("nan"), float("inf")])
def test_a_wrong_product_is_named_with_the_setting(error: float) -> None:
    """Also where the result is not a number at all."""
    said = judge({**RIGHT, "bfloat16": error})
    assert said.startswith("matrix products are wrong under this SM cap (bfloat16 off by")
    assert said.endswith("unset mps_limits.thread_percentage")


RUN = subprocess.run


def run_as(monkeypatch: pytest.MonkeyPatch, program: str) -> dict[str, str]:
    """The check's process is `program`; what it was started with is returned."""
    environment: dict[str, str] = {}

    def run(_: Any, env: dict[str, str], **options: Any) -> Any:
        environment.update(env)
        return RUN([sys.executable, "-c", program], env=env, **options)

    monkeypatch.setattr(numeric_check.subprocess, "run", run)
    return environment


def test_the_check_is_a_process_under_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the environment that a replica would get, and its errors are judged."""
    environment = run_as(monkeypatch, 'print(\'{"bfloat16": 0.5, "float16": 0, "float32": 0}\')')
    assert "bfloat16 off by 5.0e-01" in refusal({"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25"})
    assert environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"


def test_a_check_that_cannot_run_refuses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a verdict the cap is not used; the last line of the failure is passed on."""
    run_as(monkeypatch, "raise SystemExit('no CUDA here')")
    assert refusal({}) == "the numerical check could not run (no CUDA here): unset mps_limits.thread_percentage"
    monkeypatch.setattr(numeric_check, "_LIMIT_S", 0.1)
    run_as(monkeypatch, "import time; time.sleep(60)")
    assert refusal({}).startswith("the numerical check did not end within")
