"""The tutorial runs from start to end, on fewer images and for fewer epochs than `make docs` takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pooling_ext import memory

DOCS = Path(__file__).parents[2] / "docs"
SMALLER = {
    "digits=DIGITS, flip": "limit=12, digits=DIGITS, flip",
    '"all": 4': '"all": 1',
    "(0, 800)": "(0, 80)",
    "range(32)": "range(8)",
    "randn(8, 3, 224, 224)": "randn(2, 3, 64, 64)",
    "len(splits.classes), (8,)": "len(splits.classes), (2,)",
    "seconds=5": "seconds=0.1",
    "fast_large, large)], 5)": "fast_large, large)], 0.1)",
}

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs the checkout")


def cells() -> list[dict]:
    return json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_stored_without_results():
    """Those of its reader's machine are made when it is executed."""
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells())


@pytest.mark.slow
def test_the_tutorial_runs(monkeypatch, capsys, tmp_path):
    for name in ("rich", "matplotlib", "sklearn", "torchvision"):
        pytest.importorskip(name)
    monkeypatch.chdir(DOCS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shown: list[Path] = []
    code = "\n\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")
    for large, small in SMALLER.items():
        assert large in code
        code = code.replace(large, small)
    # Jupyter's, which shows pictures.
    code = code.replace("from IPython.display import Image\n", "")
    names: dict = {"Image": lambda path, **_: shown.append(path)}
    try:
        exec(compile(code, "tutorial", "exec"), names)
    finally:
        memory.stop_reusing_cpu_memory()
    assert [path.name for path in shown] == ["curves.png", "predictions.png"]
    assert all(path.stat().st_size > 10_000 for path in shown)
    assert [epoch.stage for epoch in names["trainer"].history] == ["head", "all"]
    assert list(names["rates"]) == ["training", "inference", "inference, frozen"]
    printed = capsys.readouterr().out
    assert "fused 20 of 20 batch norms" in printed
    assert "120 training and 120 validation images of zero, one" in printed
