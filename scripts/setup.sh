#!/usr/bin/env bash
# Makes .venv with everything the project needs on this machine: vLLM for GPUs where the driver shows one, else for CPUs.
# Works without PyTorch's own index when PIP_FIND_LINKS or UV_FIND_LINKS names a folder with a torch wheel.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${SPLITWISER_EXTRA:-}" ]; then extra=$SPLITWISER_EXTRA
elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then extra=gpu
else extra=cpu; fi

stamp=.venv/installed-$extra-$(sha256sum pyproject.toml | cut -c1-16)
[ -e "$stamp" ] && exit 0

fits() { command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }
for python in "${PYTHON:-}" python3 python3.12 python3.11; do
    [ -n "$python" ] && fits "$python" && break
    python=
done
[ -n "$python" ] || { echo "setup: no Python 3.11 or 3.12 found; install one, or name it with PYTHON=..." >&2; exit 1; }

echo "setup: $("$python" --version), vLLM for the $extra, into .venv (about two minutes)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check 'uv==0.13.9'

export VIRTUAL_ENV=$PWD/.venv
export UV_FIND_LINKS=${UV_FIND_LINKS:-$(echo "${PIP_FIND_LINKS:-}" | tr ' ' ',')}
[ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS
backend=()
# The CPU build of torch is not on PyPI: it comes from a folder of wheels, or from PyTorch's index.
if [ "$extra" = cpu ] && ! ls ${UV_FIND_LINKS:+$(echo "$UV_FIND_LINKS" | tr ',' ' ')} 2>/dev/null | grep -q '^torch-.*+cpu'; then
    backend=(--torch-backend cpu)
fi
# Compiled now, once: where Python may not write bytecode (containers often forbid it) each of a dozen processes would
# compile vLLM anew at every start.
.venv/bin/uv pip install --quiet --compile-bytecode ${backend[@]+"${backend[@]}"} -e ".[$extra,dev,bench]"
touch "$stamp"
