"""A vLLM engine in a process of its own, for the tests of shared weights: orders in, one line of JSON each out."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    began_s = time.monotonic()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.stdin.readline())
    import vllm._custom_ops as kernels
    from vllm import LLM

    # Shared weights are not packed for oneDNN; packed ones round otherwise, so texts compare only without.
    kernels._supports_onednn = False
    llm = LLM(model=spec["model"], **spec["engine"])
    _answer(answers, {"ready_s": time.monotonic() - began_s})
    orders = {"texts": _texts, "memory": lambda _: _memory_bytes()}
    while line := sys.stdin.readline():
        _answer(answers, orders[line.strip()](llm))


def _answer(answers: Any, what: Any) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


def _texts(llm: Any) -> list[str]:
    from vllm import SamplingParams

    prompts = ["Once upon a time", "The river", "It was a"]
    wish = SamplingParams(temperature=0.0, max_tokens=24)
    return [llm.generate([prompt], wish, use_tqdm=False)[0].outputs[0].text for prompt in prompts]


def _memory_bytes() -> dict[str, int]:
    """Proportional set size: a page that several processes map counts in shares; and what only this process holds."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {key: int(lines[key].split()[0]) * 1024 for key in ("Pss", "Pss_Anon", "Pss_Shmem")}


if __name__ == "__main__":
    main()
