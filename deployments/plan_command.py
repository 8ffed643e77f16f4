"""`splitwiser plan`: the memory plan as a table, with or without a GPU, and nothing started."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pynvml  # type: ignore[import-untyped]

from deployments import gpu_setup, memory
from deployments.config import ConfigError, ServeArgs, load
from deployments.mps import MpsError

_UNITS = {"GiB": 1 << 30, "GB": 10**9, "MiB": 1 << 20}


def show_plan(file: Path, card: str | None) -> int:
    """Print the plan of `file` on this machine's GPUs, or on the card named. 0 when it holds, 1 when it cannot.

    Raises ConfigError when there is nothing to plan for.
    """
    args, _ = load(file)
    cards = [card_named(card)] if card else gpus_here(args)
    try:
        # Elsewhere MPS is there when it is wanted; here it may be missing.
        made = min((gpu_setup.plan(args, c, _mps_on(args, card)) for c in cards), key=lambda made: made.kv_cache_bytes)
    except (memory.MemoryPlanError, MpsError) as error:
        print(f"splitwiser: {error}", file=sys.stderr)
        return 1
    print(memory.render(made))
    print(f"at most {memory.largest_replicas(made)} such replicas would fit, each with {_least(made)}")
    return 0


def card_named(name: str) -> memory.Card:
    """A common card by its name, or a size such as 24GiB. Raises ConfigError."""
    known = {key.lower().replace(" ", ""): card for key, card in memory.KNOWN_CARDS.items()}
    if card := known.get(name.lower().replace(" ", "")):
        return card
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB)", name)
    if found is None or not float(found[1]):
        raise ConfigError(
            f"the card '{name}' is unknown; give a size such as 24GiB, or {', '.join(memory.KNOWN_CARDS)}"
        )
    return memory.Card(name, int(float(found[1]) * _UNITS[found[2]]))


def gpus_here(args: ServeArgs) -> list[memory.Card]:
    """The cards that `args` would use. Raises ConfigError where there is none."""
    try:
        return [gpu_setup.this_card(gpu) for gpu in gpu_setup.chosen_gpus(args.gpus)]
    except pynvml.NVMLError as error:
        why = f"no GPU can be read here ({error})"
        raise ConfigError(f"{why}; name a card, as in `splitwiser plan --card A10` or `--card 24GiB`") from None


def _mps_on(args: ServeArgs, card: str | None) -> bool | None:
    return (args.mps != "off" and args.replicas > 1) if card else None


def _least(plan: memory.MemoryPlan) -> str:
    if plan.demand.kv_cache_bytes is not None:
        return "the KV cache that is pinned"
    return f"a KV cache for one sequence of {plan.demand.max_model_len_tokens} tokens"
