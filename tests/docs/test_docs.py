"""The documentation: its links, its commands and its code; and, where Sphinx is installed, the site."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pooling_ext
import pooling_ext.functional as F

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LIBRARIES = tuple(importlib.machinery.EXTENSION_SUFFIXES)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs the checkout")

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted([*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")])


def text_of(page: Path) -> str:
    """A page's Markdown; of a notebook that of its Markdown cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return text


def prose_of(page: Path) -> str:
    """The Markdown without code."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub and MyST give to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M)
    headings = re.findall(r"^#+ +(.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links_of(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


def included(page: Path) -> list[str]:
    return re.findall(r"^```\{include\} (\S+)$", text_of(page), flags=re.M)


def code_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text_of(page), flags=re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    broken = []
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    broken += [name for name in included(page) if not (page.parent / name).exists()]
    assert not broken


def test_links_are_found():
    """So that the test above can fail: some page has links, and headings have the anchors that they name."""
    assert sum(len(list(links_of(page))) for page in PAGES) > 40
    assert "accuracy-of-winograds-convolution" in anchors_of(DOCS / "semantics.md")


def test_every_page_is_in_the_table_of_contents():
    entries = re.findall(r"^```\{toctree\}$(.*?)^```$", text_of(DOCS / "index.md"), flags=re.S | re.M)
    listed = [line for entry in entries for line in entry.split("\n") if line and not line.startswith(":")]
    pages = [page.stem for page in PAGES if page.parent == DOCS and page.stem != "index"]
    assert sorted(listed) == sorted(pages)


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_has_the_targets_that_are_named(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    # In prose "make" is followed by a word that is no code.
    named = re.findall(r"(?:`|^    )make ([a-z][a-z-]+)", text_of(page), flags=re.M)
    assert set(named) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_exist(page):
    missing = []
    for name in set(re.findall(r"\bpooling_ext((?:\.[A-Za-z_]\w*)+)(?![\w/])", text_of(page))):
        found = pooling_ext
        for part in name.strip(".").split("."):
            path = f"{found.__name__}.{part}" if hasattr(found, "__path__") else None
            if path and not hasattr(found, part) and (spec := importlib.util.find_spec(path)):
                # A library of operators is no Python module, and Lightning need not be installed.
                is_imported = part != "lightning" and not (spec.origin or "").endswith(LIBRARIES)
                found = importlib.import_module(path) if is_imported else object()
                continue
            if not hasattr(found, part):
                missing.append(name)
                break
            found = getattr(found, part)
    example = ".triton.pool.median_pool"  # CONTRIBUTING's operator
    assert [name for name in missing if name not in (".lightning", "._cuda", "._C", example)] == []


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_code_of_the_first_pages_runs(page, capsys):
    """All blocks of a page in turn, on a smaller model and smaller images."""
    smaller = {"resnet50": "resnet18", "randn(16,": "randn(2,", "224, 224": "64, 64", "56, 56": "14, 14"}
    names: dict = {}
    for block in code_of(ROOT / page):
        for large, small in smaller.items():
            block = block.replace(large, small)
        exec(compile(block, page, "exec"), names)
    assert "fused 20 of 20 batch norms" in capsys.readouterr().out
    assert names["logits"].shape == (2, 1000)


# --- the site ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if built := os.environ.get("POOLING_EXT_SITE"):  # .ci/run has just built it, by `make docs`
        return ROOT / built
    if importlib.util.find_spec("sphinx") is None or importlib.util.find_spec("myst_nb") is None:
        pytest.skip("Sphinx is not installed: make docs")
    out = tmp_path_factory.mktemp("site")
    # The tutorial takes a minute: make docs runs it.
    environment = os.environ | {"POOLING_EXT_EXECUTE": "off"}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_has_all_names(site):
    functions = (site / "functional.html").read_text(encoding="utf-8")
    missing = [name for name in F.__all__ if f'id="pooling_ext.functional.{name}"' not in functions]
    modules = (site / "modules.html").read_text(encoding="utf-8")
    missing += [name for name in pooling_ext.nn.__all__ if f'id="pooling_ext.nn.{name}"' not in modules]
    others = "".join(page.read_text(encoding="utf-8") for page in site.glob("*.html"))
    for name in sorted(set(pooling_ext.__all__) - set(pooling_ext.nn.__all__)):
        if name not in ("functional", "nn", "PatchReport") and f'id="pooling_ext.{name}"' not in others:
            missing.append(name)
    assert not missing


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_page_in_a_browser(site, tmp_path):
    """What a reader sees: the page is laid out, its picture is loaded, and its table has rows."""
    url = (site / "benchmarks.html").as_uri()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,1600"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    shot = tmp_path / "page.png"
    run = [str(CHROMIUM), *options]
    subprocess.run([*run, f"--screenshot={shot}", url], check=True, capture_output=True, timeout=120)
    dom = subprocess.run([*run, "--dump-dom", url], check=True, capture_output=True, text=True, timeout=120)
    assert "resnet-stem" in dom.stdout
    from PIL import Image

    with Image.open(shot) as image:
        pixels = image.convert("RGB")
    assert pixels.size == (1280, 1600)
    # The picture's bars are teal. A page without its picture or its style has none of that color.
    teal = (0x0B, 0x72, 0x85)
    near = sum(
        count
        for count, color in pixels.getcolors(1280 * 1600) or []
        if all(abs(a - b) < 12 for a, b in zip(color, teal, strict=True))
    )
    assert near > 500
