"""Ray Serve LLM with several replicas on one GPU, as its guide to fractional GPUs says: a rival.

`build_app(args)` is an `import_path` for `serve run`; `args` are `model`, `served_model_name`, `replicas`, `engine`.
Needs pyarrow beside ray[serve] and vllm.
"""

from __future__ import annotations

from typing import Any

from ray import serve


def build_app(args: dict[str, Any]) -> serve.Application:
    from ray.serve.config import RequestRouterConfig
    from ray.serve.llm import LLMConfig, build_openai_app  # type: ignore[import-untyped]

    share = 1 / args["replicas"]
    config = LLMConfig(
        model_loading_config={"model_id": args["served_model_name"], "model_source": args["model"]},
        engine_kwargs={**args["engine"], "gpu_memory_utilization": 0.05},
        deployment_config={
            "num_replicas": args["replicas"],
            "max_ongoing_requests": 100_000,
            # Direct streaming defaults to round robin; this is Serve's own default, the stronger rival.
            "request_router_config": RequestRouterConfig(
                request_router_class="ray.serve._private.request_router.PowerOfTwoChoicesRequestRouter"
            ),
        },
        placement_group_config={"bundles": [{"GPU": share}]},
        # As its guide to fractional GPUs has it; without it the engine asks for a whole GPU and cannot be placed.
        runtime_env={"env_vars": {"VLLM_RAY_PER_WORKER_GPUS": str(share)}},
    )
    return build_openai_app({"llm_configs": [config]})
