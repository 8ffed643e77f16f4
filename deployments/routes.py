"""The routes that clients may ask for. What is not here does not exist for them, whatever vLLM serves.

vLLM 0.29's application has more: administration (`/scale_elastic_ep`, `/v1/load_lora_adapter`, `/start_profile`, and
in its development mode `/sleep`, `/pause`, `/collective_rpc`, `/update_weights`, `/server_info` ...), its own metrics,
its documentation, SageMaker's `/invocations`, and halves of requests (`/inference/v1/generate`, `.../render`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

PROBE_PATH = "/splitwiser/probe"
# Without a key: load balancers ask whether the service lives, and the launcher whether its router does.
OPEN = frozenset({"/health", PROBE_PATH})
PUBLIC = frozenset({
    "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses",
    "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/v1/audio/transcriptions",
    "/v1/audio/translations", "/v1/files", "/v1/batches", "/tokenize", "/detokenize", "/pooling", "/classify",
    "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/v2/embed",
})  # fmt: skip
# Routes that go on with an identifier.
PREFIXES = ("/v1/models/", "/v1/responses/", "/v1/files/", "/v1/batches/")
# At a replica's own port, which is on loopback: what Prometheus and people who look for a fault ask.
PRIVATE = frozenset({"/metrics", "/openapi.json", "/version", "/load"})
FILES = "/v1/files"


@dataclass(frozen=True, slots=True)
class Routes:
    """`exact` paths and `prefixes` that may be asked for."""

    exact: frozenset[str]
    prefixes: tuple[str, ...] = PREFIXES

    def __contains__(self, path: str) -> bool:
        return path in self.exact or path.startswith(self.prefixes)


def public(extra: Collection[str] = ()) -> Routes:
    """What everybody may ask for, and `extra` that the configuration opens."""
    return Routes(PUBLIC | OPEN | frozenset(extra))


def at_the_replica(extra: Collection[str] = ()) -> Routes:
    """What a replica's own port answers besides."""
    return Routes(public(extra).exact | PRIVATE)
