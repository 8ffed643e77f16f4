"""These tests run only where the driver shows a GPU and vLLM for GPUs is installed; elsewhere they say so and skip."""

from __future__ import annotations

import pytest

from deployments import device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    for item in items if reason else ():
        if "/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason=reason))


def _missing() -> str:
    if not device.gpu_count():
        return "the NVIDIA driver shows no GPU here"
    return "vLLM for CPUs is installed" if device.vllm_device() == "cpu" else ""
