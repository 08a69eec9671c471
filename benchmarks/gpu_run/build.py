"""Builds both libraries for the card that is there, or takes those of an earlier run if they load."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from .runner import LINES, RESULTS, ROOT

PACKAGE = ROOT / "pooling_ext"
LIBRARIES = ("_C*.so", "_cuda*.so")
#: Both load, and the second without a word of what it lacks.
LOADS = """
import torch
from pooling_ext.backends import cpu_library, cuda_library
for why_not in (cpu_library.why_not, cuda_library.why_not()):
    if why_not: raise SystemExit(why_not)
"""


def sources() -> str:
    """A digest of what the libraries are made of."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def built_from(folder: Path) -> str | None:
    """The digest of what an earlier run built its libraries from."""
    file = folder / RESULTS
    lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line).get("sources") for line in lines if '"sources"' in line]
    return found[-1] if found else None


def take(folder: Path) -> str | None:
    """Put an earlier run's libraries in place; why they are of no use, or None."""
    if built_from(folder) != sources():
        return "they are of other sources"
    paths = [path for pattern in LIBRARIES for path in folder.glob(f"{pattern}.gz")]
    if len(paths) < len(LIBRARIES):
        return "there are none"
    for path in paths:
        (PACKAGE / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    done = subprocess.run([sys.executable, "-c", LOADS], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    for path in paths:
        (PACKAGE / path.stem).unlink()
    return done.stderr.strip()[-300:]


def note(**content: object) -> None:
    if LINES in os.environ:
        with open(os.environ[LINES], "a") as file:
            file.write(json.dumps({"step": "build", **content}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--libraries", type=Path, help="the folder of an earlier run")
    parser.add_argument("--keep", type=Path, help="where to copy what was built")
    parser.add_argument("--as-it-is", action="store_true", help="build nothing, for a dry run")
    args = parser.parse_args()
    why_not = take(args.libraries) if args.libraries else "none were named"
    note(libraries_taken=why_not is None, why_not=why_not)
    if why_not is not None and not args.as_it_is:
        status = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT).returncode
        if status:
            return status
    if args.keep:
        for pattern in LIBRARIES:
            for path in PACKAGE.glob(pattern):
                # Less than half the size, for files that go from one machine to another.
                (args.keep / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        note(sources=sources())
    return 0


if __name__ == "__main__":
    sys.exit(main())
