"""Versions of what the project depends on: the pinned ones, and the ends of the declared ranges.

    python tools/dependencies.py pin       rewrite constraints.txt: the newest versions in the declared ranges
    python tools/dependencies.py oldest    print the declared dependencies at their oldest versions
    python tools/dependencies.py newest    print the declared dependencies with their ranges

torch is printed by neither: environments that test the ends of the ranges share the installed one.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = ("dev", "slow-tokenizers")
_HEADER = """\
# Versions that the project is tested with: pip install -c constraints.txt .
# Written by: python tools/dependencies.py pin
# torch stands without the name of its build, so the one for CPUs and the one for CUDA both fit; the libraries of the
# latter are left to torch, which names their exact versions. It names triton's too: that one has to be here.
"""
_LEFT_TO_TORCH = re.compile(r"nvidia-|cuda-|torch-")
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<extras>\[[\w,-]+\])?(?P<range>[^;]*)(?P<marker>;.*)?")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pin", "oldest", "newest"])
    action = parser.parse_args(argv).action
    if action == "pin":
        CONSTRAINTS.write_text(_HEADER + "".join(f"{line}\n" for line in _resolve()), encoding="utf-8")
    else:
        print(
            *(_oldest(item) if action == "oldest" else item for item in declared() if _name(item) != "torch"), sep="\n"
        )


def declared() -> list[str]:
    """The dependencies that pyproject.toml states, without those of extras."""
    found: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return found


def _resolve() -> list[str]:
    """The versions that pip would install into an empty environment, as `name==version`. Installs nothing."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*command, f"{ROOT}[{','.join(EXTRAS)}]"], check=True, stdout=subprocess.PIPE, text=True)
    pins = {}
    for item in json.loads(done.stdout)["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        if name != "fastserve" and not _LEFT_TO_TORCH.match(name):
            pins[name] = item["metadata"]["version"].partition("+")[0]
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


def _oldest(requirement: str) -> str:
    """The requirement at its oldest version. Raises ValueError if it states none."""
    match = _REQUIREMENT.fullmatch(requirement)
    oldest = re.search(r">=\s*([\w.]+)", match["range"]) if match else None
    if match is None or oldest is None:
        raise ValueError(f"pyproject.toml: {requirement!r} states no oldest version (>=)")
    return f"{match['name']}{match['extras'] or ''}=={oldest[1]}{match['marker'] or ''}"


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


if __name__ == "__main__":
    main()
