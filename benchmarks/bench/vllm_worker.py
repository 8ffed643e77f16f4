"""One offline vLLM engine as a worker of the bench: `python -m benchmarks.bench.vllm_worker`."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any

from benchmarks.bench.protocol import Json, Ranges, Serve, ranges, work


def build(spec: Json) -> tuple[Json, Serve]:
    from vllm import LLM

    engine = LLM(model=spec["model"], skip_tokenizer_init=True, **spec["engine"]).llm_engine
    marks = ranges(spec["nvtx"])

    def serve(order: Json) -> Callable[[], Json]:
        requests = _requests(engine, order)
        return lambda: Loop(engine, requests, order, marks).run()

    return _hello(engine), serve


def _hello(engine: Any) -> Json:
    import torch
    import vllm

    cache = engine.vllm_config.cache_config
    kv_tokens = cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None
    chunked = engine.vllm_config.scheduler_config.enable_chunked_prefill
    return {"vllm": vllm.__version__, "torch": torch.__version__, "kv_tokens": kv_tokens, "chunked_prefill": chunked}


def _requests(engine: Any, order: Json) -> list[Any]:
    """The round's requests, made before time runs. Temperature 1: greedy random weights repeat one token for ever."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    tasks = engine.get_supported_tasks()
    return [
        engine.input_processor.process_inputs(
            str(number),
            TokensPrompt(prompt_token_ids=prompt),
            SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            supported_tasks=tasks,
        )
        for number, (prompt, tokens) in enumerate(zip(order["prompts"], order["output_tokens"], strict=True))
    ]


class Loop:
    """Drives an engine through one round: requests enter when due and allowed, the engine steps, tokens are timed."""

    def __init__(self, engine: Any, requests: list[Any], order: Json, marks: Ranges) -> None:
        self._engine = engine
        self._waiting = collections.deque(zip(order["at_s"], requests, strict=True))
        self._limit = order["limit"] or len(requests)
        self._marks = marks
        self._seen: dict[str, list[float]] = {}
        self._before_first: set[str] = set()
        self._made: list[tuple[float, int]] = []
        self._running = 0

    def run(self) -> Json:
        go_s = time.monotonic()
        while self._waiting or self._running:
            self._admit(go_s)
            if self._running:
                self._marks.enter("prompt" if self._before_first else "token")
                self._note(self._step())
            else:
                time.sleep(max(0.0, go_s + self._waiting[0][0] - time.monotonic()))
        self._marks.enter(None)
        return {"requests": list(self._seen.values()), "made": self._made}

    def _admit(self, go_s: float) -> None:
        now_s = time.monotonic()
        while self._waiting and self._running < self._limit and go_s + self._waiting[0][0] <= now_s:
            at_s, request = self._waiting.popleft()
            # Held back by the limit alone, it is due now; otherwise at its own time, a step or less ago.
            due_s = now_s if self._made and at_s == 0.0 else go_s + at_s
            name = self._engine.add_request(request.request_id, request, request.params)  # renames the request
            self._seen[name] = [due_s, due_s, 0.0, 0.0, 0]
            self._before_first.add(name)
            self._running += 1

    def _step(self) -> Any:
        """`LLMEngine.step` of vLLM 0.29 without its statistics; its outputs carry the engine core's own time stamp."""
        outputs = self._engine.engine_core.get_output()
        processed = self._engine.output_processor.process_outputs(
            outputs.outputs, engine_core_timestamp=outputs.timestamp
        )
        self._engine.engine_core.abort_requests(processed.reqs_to_abort)
        return outputs

    def _note(self, outputs: Any) -> None:
        at_s, made = outputs.timestamp, 0
        for output in outputs.outputs:
            seen = self._seen[output.request_id]
            if output.new_token_ids and output.request_id in self._before_first:
                self._before_first.remove(output.request_id)
                seen[2] = at_s
            made += len(output.new_token_ids)
            seen[4] += len(output.new_token_ids)
            if output.finished:
                seen[3] = at_s
                self._running -= 1
        if made:
            self._made.append((at_s, made))


if __name__ == "__main__":
    work(build)
