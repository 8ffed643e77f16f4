"""One vLLM engine behind vLLM's own OpenAI application. vLLM is imported inside functions: it takes seconds."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import types
from pathlib import Path
from typing import Any

from deployments import unsupported
from deployments.config import ConfigError, ServeArgs

_ARGUMENT_CLASSES = {
    "engine/arg_utils.py": ("EngineArgs", "AsyncEngineArgs"),
    "entrypoints/launchers/cli_args.py": ("BaseFrontendArgs", "FrontendArgs"),
}


def vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def argument_names() -> set[str]:
    """The arguments that `vllm serve` of the installed vLLM takes, read from its source without importing it.

    Raises ConfigError when vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("vLLM is not installed here; run `make setup`, or install the extra `gpu` or `cpu`")
    root = Path(spec.submodule_search_locations[0])
    return {
        statement.target.id
        for file, classes in _ARGUMENT_CLASSES.items()
        for node in ast.parse((root / file).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if not statement.target.id.startswith("_")
    }


def server_arguments(args: ServeArgs, model_path: str, settings: dict[str, Any]) -> argparse.Namespace:
    """The namespace that `vllm serve` would have made of these arguments, `settings` overruling `args.engine`.

    Raises ConfigError with vLLM's own reason.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = ["--model", model_path, "--served-model-name", args.public_name, *command_line({**args.engine, **settings})]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            namespace: argparse.Namespace = make_arg_parser(FlexibleArgumentParser(prog="engine")).parse_args(words)
            validate_parsed_serve_args(namespace)
    except SystemExit:
        reason = complaint.getvalue().strip().rsplit("error: ", 1)[-1]
        raise ConfigError(f"vLLM refuses a value under `engine`: {reason}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses a value under `engine`: {error}") from None
    return namespace


def command_line(engine: dict[str, Any]) -> list[str]:
    """`engine` as the words of vLLM's command line, so that vLLM checks the values itself."""
    return [word for key, value in engine.items() if value is not None for word in _words(key.replace("_", "-"), value)]


def _words(flag: str, value: Any) -> list[str]:
    match value:
        case True:
            return [f"--{flag}"]
        case False:
            return [f"--no-{flag}"]
        case dict():
            return [f"--{flag}", json.dumps(value)]
        case list():
            return [f"--{flag}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
        case _:
            return [f"--{flag}", str(value)]


def start_engine(namespace: argparse.Namespace, stat_loggers: list[Any]) -> Any:
    """Start an AsyncLLM (its engine core in a process of its own). Must be called inside the event loop that serves it.

    Takes tens of seconds. Raises what vLLM raises, after its engine process has ended.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(
        AsyncEngineArgs.from_cli_args(namespace),
        usage_context=UsageContext.OPENAI_API_SERVER,
        stat_loggers=stat_loggers,
    )


async def warm_up(engine: Any) -> None:
    """Let the engine answer one short prompt: its first step compiles and allocates, for up to 10 s on a CPU."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    wish = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
    async for _ in engine.generate(TokensPrompt(prompt_token_ids=[2, 2, 2, 2]), wish, request_id="warm-up"):
        pass


def cache_environment() -> None:
    """Have vLLM read its environment once: its front end looks a variable up for every token. The engine's own process
    does this by itself. Nothing may be set afterwards."""
    from vllm.envs import enable_envs_cache

    enable_envs_cache()


def process_ids(engine: Any) -> list[int]:
    """The processes of the engine core, which own the CUDA context."""
    return [process.pid for process in engine.engine_core.resources.engine_manager.processes]


async def build_openai_app(engine: Any, namespace: argparse.Namespace) -> Any:
    """vLLM's whole OpenAI server as an ASGI application (a FastAPI object) around `engine`."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await engine.get_supported_tasks()
    app = build_app(namespace, tasks, engine.model_config)
    unsupported.refuse_kindly(app)
    await init_app_state(engine, app.state, namespace, tasks)
    # vLLM's handler of a dead engine asks its own server to exit before it answers; without one it would raise, and
    # the client would get a bare 500. Serve ends the replica.
    app.state.server = types.SimpleNamespace(should_exit=False)
    return app
