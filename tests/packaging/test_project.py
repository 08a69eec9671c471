"""The version stands in one place; what is written about the project agrees with it and the Makefile."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pooling_ext

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "CITATION.cff").exists(), reason="needs the checkout")


def text(name: str) -> str:
    return (ROOT / name).read_text()


def test_the_version_is_the_package_s():
    """The build reads it from there; the changelog and the citation file repeat it."""
    version = pooling_ext.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert 'version = { attr = "pooling_ext.__version__" }' in text("pyproject.toml")
    assert re.findall(r"^## \[(.+?)\]", text("CHANGELOG.md"), re.MULTILINE)[0] == version
    assert re.findall(r"^version: (.+)$", text("CITATION.cff"), re.MULTILINE) == [version]


def test_the_build_has_that_version():
    found = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.stdout.split()[-1:] == [pooling_ext.__version__], found.stderr[-2000:]


def test_hosted_ci_calls_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    called = set(re.findall(r"- run: make ([a-z-]+)", text(".github/workflows/ci.yml")))
    assert {"lint", "test", "oldest", "wheel", "wheel-test"} <= called <= targets
    assert called <= set(re.findall(r"\bmake ([a-z-]+)", text(".ci/run"))) | {"wheel-test"}


def test_the_license_is_one():
    assert 'license = "Apache-2.0"' in text("pyproject.toml") and "license: Apache-2.0" in text(
        "CITATION.cff"
    )
    assert text("LICENSE").lstrip().startswith("Apache License")
