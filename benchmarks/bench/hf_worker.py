"""Hugging Face `generate`, whole or split, as a worker of the bench: `python -m benchmarks.bench.hf_worker`.

This process only hands out work; `processes` others hold the model. A round is served in batches of at most `batch`
requests, each computed as one, and is either

    sequential   one process calls `generate` for batch after batch
    split        Splitwiser's coarse split: half of the processes compute prompts, half of them tokens. Prompt process
                 i runs the forward pass over a batch's prompts, samples the first tokens, and hands these and the KV
                 cache to token process i, which generates the rest while the next batch's prompts are computed.

The KV cache of a batch travels as one tensor: on a GPU as a CUDA IPC handle (nothing is copied between the processes),
without one in shared memory. Token times are taken once a step, after the device has caught up.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.bench.protocol import Json, Ranges, Serve, ranges, work

HELD_BATCHES = 2
"""KV caches that may wait between a prompt and its token process: more would only hold memory."""
HELLO_LIMIT_S = 300.0


def build(spec: Json) -> tuple[Json, Serve]:
    # On CPUs the processes are forks of a server that has imported torch and transformers once. CUDA does not survive a
    # fork, and importing transformers may already ask it for its devices.
    forks = multiprocessing.get_context("spawn" if spec["device"] == "cuda" else "forkserver")
    forks.set_forkserver_preload(["benchmarks.bench.hf_imports"])
    orders = [forks.Queue() for _ in range(spec["processes"])]
    caches = [forks.Queue(HELD_BATCHES) for _ in range(spec["processes"])]
    done = forks.Queue()
    for rank in range(spec["processes"]):
        forks.Process(target=_process, args=(spec, rank, orders, caches, done), daemon=True).start()
    for _ in range(spec["processes"]):
        done.get(timeout=HELLO_LIMIT_S)

    def serve(order: Json) -> Callable[[], Json]:
        plans = shares(order)

        def run() -> Json:
            for rank, plan in enumerate(plans):
                orders[rank].put(plan)
            return merged(_answers(done, len(plans)))

        return run

    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}, serve


def _answers(done: Any, count: int) -> list[Json]:
    """Raises RuntimeError at the first that failed: others may wait for it for ever."""
    answers: list[Json] = []
    while len(answers) < count:
        answers.append(done.get())
        if "error" in answers[-1]:
            raise RuntimeError(answers[-1]["error"])
    return answers


def batches(order: Json, parts: int) -> list[list[int]]:
    """The requests, by number, in batches of at most `batch`, small enough that each of `parts` gets one."""
    count = len(order["prompts"])
    size = max(1, min(order["batch"], -(-count // parts)))
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def shares(order: Json) -> list[Json]:
    """What each process of the round is to do; the processes beyond have no part in it."""
    processes = order["processes"]
    if order["mode"] == "sequential":
        return [{"role": "both", "batches": _filled(order, batches(order, 1))}]
    pairs = processes // 2
    cut = batches(order, pairs)
    dealt = [_filled(order, cut[pair::pairs]) for pair in range(pairs)]
    prompts = [{"role": "prompt", "batches": dealt[k], "to": pairs + k} for k in range(pairs)]
    tokens = [{"role": "token", "batches": len(dealt[k])} for k in range(pairs)]
    return prompts + tokens


def _filled(order: Json, cut: Sequence[Sequence[int]]) -> list[Json]:
    return [
        {
            "numbers": numbers,
            "prompts": [order["prompts"][n] for n in numbers],
            "output_tokens": order["output_tokens"][numbers[0]],
        }
        for numbers in cut
    ]


def merged(parts: Sequence[Json]) -> Json:
    """One report of the processes' parts: each knows some times of a request, 0 stands for the others."""
    known: dict[str, list[float]] = {}
    for part in parts:
        for number, times in part["requests"].items():
            known.setdefault(number, [0.0, 0.0, 0.0, 0.0, 0])
            known[number] = [new or old for new, old in zip(times, known[number], strict=True)]
    return {"requests": list(known.values()), "made": sorted(m for part in parts for m in part["made"])}


# In a process that holds the model


def _process(spec: Json, rank: int, orders: Sequence[Any], caches: Sequence[Any], done: Any) -> None:
    import torch

    torch.set_num_threads(spec["threads"])
    model = Model(spec)
    done.put({"hello": os.getpid()})
    while True:
        plan = orders[rank].get()
        try:
            done.put(_PLAYED[plan["role"]](model, plan, caches, rank))
        except Exception as error:  # told to the host, which fails the round; a silent process would hang it
            done.put({"error": f"{type(error).__name__}: {error}"})


class Model:
    """The model on its device, and the three calls that the roles need. Shapes: b sequences, l layers, h heads."""

    def __init__(self, spec: Json) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.device = spec["device"]
        self.marks: Ranges = ranges(spec["nvtx"])
        # CPUs without bfloat16 units compute it 2.4 times slower than float32 (seen with AVX-512).
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype).to(self.device).eval()
        self.generate(self.tensor([[10] * 8]), 2, None, lambda at_s, sequences: None)  # first times load kernels

    def tensor(self, prompts: Sequence[Sequence[int]]) -> Any:
        return self.torch.tensor(prompts, device=self.device)

    def now_s(self) -> float:
        """The time at which all that was asked of the device is done."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.monotonic()

    def prompt(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """Token ids with one sampled token more [b, n + 1], and the KV cache [l, 2, b, h, n, d]."""
        ids = self.tensor(prompts)
        with self.torch.inference_mode():
            out = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
            first = self.torch.multinomial(out.logits[:, -1].float().softmax(-1), 1)
            layers = out.past_key_values.layers
            cache = self.torch.stack([self.torch.stack([layer.keys, layer.values]) for layer in layers])
            return self.torch.cat([ids, first], dim=1), cache

    def generate(self, ids: Any, tokens: int, cache: Any, each_step: Callable[[float, int], None]) -> None:
        """Sample `tokens` more for every sequence at temperature 1; `each_step` gets every step's time and b."""
        from transformers import DynamicCache, StoppingCriteriaList

        never = self.torch.zeros(ids.shape[0], dtype=self.torch.bool, device=self.device)

        def tick(ids: Any, scores: Any, **_: Any) -> Any:
            each_step(self.now_s(), ids.shape[0])
            self.marks.enter("token")
            return never

        held = None
        if cache is not None:
            self.marks.enter("token")
            held = DynamicCache()
            for number, (keys, values) in enumerate(cache):
                held.update(keys, values, number)
        with self.torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=self.torch.ones_like(ids),
                past_key_values=held,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=1,
                stopping_criteria=StoppingCriteriaList([tick]),
            )
        self.marks.enter(None)


class Notes:
    """What a process knows of its round, as the protocol wants it."""

    def __init__(self, due_s: float) -> None:
        self.due_s = due_s
        self.requests: dict[str, list[float]] = {}
        self.made: list[tuple[float, int]] = []

    def step(self, at_s: float, sequences: int) -> None:
        self.made.append((at_s, sequences))

    def request(self, numbers: Sequence[int], begun_s: float, first_s: float, ended_s: float, tokens: int) -> None:
        for number in numbers:
            self.requests[str(number)] = [self.due_s, begun_s, first_s, ended_s, tokens]

    def report(self) -> Json:
        return {"requests": self.requests, "made": self.made}


def _both(model: Model, plan: Json, caches: Sequence[Any], rank: int) -> Json:
    notes = Notes(time.monotonic())
    for batch in plan["batches"]:
        begun_s, steps = time.monotonic(), len(notes.made)
        model.marks.enter("prompt")
        model.generate(model.tensor(batch["prompts"]), batch["output_tokens"], None, notes.step)
        first_s = notes.made[steps][0]
        notes.request(batch["numbers"], begun_s, first_s, model.now_s(), batch["output_tokens"])
    return notes.report()


def _prompt(model: Model, plan: Json, caches: Sequence[Any], rank: int) -> Json:
    notes = Notes(time.monotonic())
    for batch in plan["batches"]:
        begun_s = time.monotonic()
        model.marks.enter("prompt")
        ids, cache = model.prompt(batch["prompts"])
        first_s = model.now_s()
        model.marks.enter(None)
        notes.step(first_s, len(batch["numbers"]))
        notes.request(batch["numbers"], begun_s, first_s, 0.0, 0)
        caches[plan["to"]].put((batch["numbers"], batch["output_tokens"], ids, cache))
        del ids, cache
    return notes.report()


def _token(model: Model, plan: Json, caches: Sequence[Any], rank: int) -> Json:
    notes = Notes(0.0)  # when a request was due and begun its prompt process knows
    for _ in range(plan["batches"]):
        numbers, tokens, ids, cache = caches[rank].get()
        if tokens > 1:
            model.generate(ids, tokens - 1, cache, notes.step)
        notes.request(numbers, 0.0, 0.0, model.now_s(), tokens)
        del ids, cache
    return notes.report()


_PLAYED = {"both": _both, "prompt": _prompt, "token": _token}


if __name__ == "__main__":
    work(build)
