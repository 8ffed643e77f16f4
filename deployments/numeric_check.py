"""Whether matrix products are right on a GPU under some setting: run as a process under it, compared with float64.

Written for caps of the SMs: under `CUDA_MPS_ACTIVE_THREAD_PERCENTAGE` wrong BF16 products have been seen on an H200.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

# Relative Frobenius error of a product with float32 accumulation: half a unit in the last place of the result's type,
# doubled.
TOLERANCES = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 1e-5}
# Odd ones too, and the shapes of a decode step and a prefill.
_SHAPES = ((1, 4096, 4096), (64, 1024, 3072), (1000, 777, 513), (2048, 2048, 2048))
_REPEATS = 5
_LIMIT_S = 120.0


def refusal(environment: Mapping[str, str]) -> str:
    """One sentence when products are wrong under `environment`, or cannot be checked; empty when they are right."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "deployments.numeric_check"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return f"the numerical check did not end within {_LIMIT_S:.0f} s: unset mps_limits.thread_percentage"
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"the numerical check could not run ({last}): unset mps_limits.thread_percentage"
    return judge(json.loads(done.stdout))


def judge(errors: Mapping[str, float]) -> str:
    """`errors`: the worst relative error by number type."""
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCES[name]}
    if not wrong:
        return ""
    found = ", ".join(f"{name} off by {error:.1e}" for name, error in wrong.items())
    return f"matrix products are wrong under this SM cap ({found}): unset mps_limits.thread_percentage"


def measure(torch: Any, device: str) -> dict[str, float]:
    """The worst relative error of products on `device` by number type, against float64 on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    return {name: max(_error(torch, device, name, shape) for shape in _SHAPES) for name in TOLERANCES}


def _error(torch: Any, device: str, name: str, shape: tuple[int, int, int]) -> float:
    rows, inner, columns = shape
    left = torch.randn(rows, inner).to(getattr(torch, name))
    right = torch.randn(inner, columns).to(getattr(torch, name))
    exact = left.double() @ right.double()
    on_device = left.to(device), right.to(device)
    products = [(on_device[0] @ on_device[1]).cpu().double() for _ in range(_REPEATS)]
    return max(float((product - exact).norm() / exact.norm()) for product in products)


def main() -> int:
    import torch

    print(json.dumps(measure(torch, "cuda")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
