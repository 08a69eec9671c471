"""The benchmark suites run, check results before they time them, and say what they found."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torchvision

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import pooling_ext
from benchmarks.__main__ import main
from benchmarks.harness import machine, memory
from benchmarks.reports import model_report, operator_report, plots, report, targets
from benchmarks.reports.model_results import (
    COMPILED,
    EAGER,
    FAMILIES,
    FORWARD,
    FROZEN,
    INFERENCE,
    PATCHED,
    STEP,
    TRAINING,
    Entry,
    Memory,
    Models,
    Setup,
)
from benchmarks.reports.report import Document, Grid, milliseconds, ratio, size
from benchmarks.reports.results import Results, Row
from benchmarks.suites import (
    block,
    block_cases,
    coverage,
    coverage_models,
    depthwise,
    memory_traffic,
    model_families,
    model_inference,
    model_training,
    model_zoo,
    pool,
)
from benchmarks.suites.block_cases import BlockCase
from pooling_ext.testing.launches import CASES as traffic_cases
from pooling_ext.testing.shapes import PoolCase

FACTS = machine.facts() | {"copy_gb_s": 10.0, "cores_busy_with_others": 0.5}


def row(case: str, op: str, torch_ms: float, **more) -> Row:
    phase = more.pop("phase", "forward + backward")
    fields = {"dtype": "float32", "layout": "NHWC"} | more
    return Row(case, op, phase=phase, torch_ms=torch_ms, ours_ms=1.0, torch_spread=0.0, ours_spread=0.0,
               nbytes=1000, copy_gb_s=1.0, **fields)  # fmt: skip


def models() -> Models:
    found = Models(FACTS)

    def add(part: str, task: str, model: str, dtype: str, batch: int = 16, **ms: float) -> None:
        setup = Setup(part, task, model, batch, dtype, "NHWC")
        found.entries.extend(
            Entry(setup, rival.replace("_", "."), "", value, 0.0) for rival, value in ms.items()
        )

    add(TRAINING, STEP, "resnet50", "float32", eager=1800, patched=1400, torch_compile=1600)
    add(TRAINING, STEP, "resnet50", "bfloat16", eager=700, patched=600, torch_compile=590)
    add(INFERENCE, FORWARD, "resnet50", "float32", 1, eager=50, frozen=25, torch_compile=30)
    # Another setting of the same rival: its best counts.
    add(INFERENCE, FORWARD, "resnet50", "float32", 1, torch_compile=28)
    add(FAMILIES, STEP, "alexnet", "float32", 8, eager=10, patched=10.2)
    for rival, live, rss in ((EAGER, 1000, 3000), (PATCHED, 900, None)):
        found.memory.append(Memory("resnet50", 16, "float32", rival, live, rss))
    return found


def verdicts(goals, results) -> dict[str, tuple[float, bool]]:
    return {goal.what: (value, met) for goal, value, met in targets.verdicts(goals, results)}


def test_figures_are_short():
    assert [ratio(x) for x in (41.2, 4.06, 1.256, 0.967)] == ["41x", "4.1x", "1.26x", "0.97x"]
    assert [milliseconds(x) for x in (1234.5, 12.34, 0.0012)] == ["1234", "12.3", "0.0012"]
    assert [size(x) for x in (None, 12, 12_345, 25_690_000)] == ["", "12 B", "12.3 kB", "25.7 MB"]


def test_targets_of_blocks_are_on_the_slowest_shape():
    op, stem = "batch_norm_act", "batch_norm_relu_max_pool"
    rows = [row("a", op, 3.0), row("b", op, 1.9), row("c", stem, 3.5, torch_peak=100, ours_peak=51)]
    found = verdicts(targets.BLOCK, Results(FACTS, rows))
    assert len(found) == 3  # what was not measured has no verdict
    assert next(value for what, value in found.items() if "shapes" in what) == (1.9, False)
    assert next(value for what, value in found.items() if what.startswith("stem's batch")) == (3.5, True)
    assert found["stem's peak memory over PyTorch's"] == (0.51, False)


def test_targets_of_models():
    found = verdicts(targets.MODEL, models())
    assert found["resnet50 training step, patched, float32 NHWC"] == (pytest.approx(1800 / 1400), False)
    assert found["resnet50 training step, patched, bfloat16 NHWC"] == (pytest.approx(700 / 600), True)
    assert found["resnet50 training step, patched, over torch.compile"] == (pytest.approx(590 / 600), False)
    assert found["training step, live bytes over eager's"] == (0.9, True)
    assert "training step, process's memory over eager's" not in found
    assert found["resnet50 inference, frozen, float32, batch 1, over the best other engine"] == (
        28 / 25,
        False,
    )
    assert "resnet50 inference, frozen, float32, batch 16" not in found
    assert found["slowest patched model of torchvision's families"] == (pytest.approx(10 / 10.2), True)


def test_names_of_rivals_are_told_apart():
    (rivals,) = models().best(part=INFERENCE).values()
    assert set(rivals) == {EAGER, FROZEN, COMPILED}
    assert rivals[COMPILED].ms == 28


def test_documents_name_all_they_show(tmp_path):
    text = model_report.document(models()).markdown()
    for heading in ("Targets", "Training step", "Memory of a training step", "Inference", "Families"):
        assert f"## {heading}" in text
    assert "kept 0.5 cores busy" in text
    table = re.findall(r"^\| resnet50 \| 16 \| float32 \|.*$", text, re.M)
    assert any("1800 | 1400 | 1.29x | 1600 | 1.14x" in line for line in table)
    plots.draw_models(models(), tmp_path / "model.png")
    assert (tmp_path / "model.png").stat().st_size > 1000


def test_a_wrong_result_is_shown():
    document = Document(
        "T", FACTS, "how", "what", [Grid("Empty", ("a",), [])], wrong={"case": "off by 1\nmore"}
    )
    text = document.markdown()
    assert "Wrong result, not timed: case: off by 1\n" in text and "Empty" not in text


def test_operator_tables_leave_out_what_was_not_measured():
    rows = [row("a", "op", 4.0), row("b", "op", 1.0), row("b", "op", 2.0, dtype="bfloat16")]
    grid = operator_report.operators(Results(FACTS, rows))
    assert grid.rows == [["op", "forward + backward", "2.0x", "1.00x", "2.0x", "2.0x"]]
    assert "under 0.95x" in operator_report.headline(Results(FACTS, rows))
    assert operator_report.headline(Results(FACTS)) == "No case was measured."
    assert not report.targets(targets.BLOCK, Results(FACTS)).rows


def test_peak_counts_what_is_live_at_once():
    def call() -> torch.Tensor:
        first = torch.empty(1000)
        del first
        return torch.empty(2000) + torch.empty(500).sum()

    # The sum's input, its result and both of the others.
    assert 16000 <= memory.peak_bytes(call) <= 19000


@pytest.mark.parametrize("case", block_cases.CASES, ids=lambda case: case.name)
def test_block_cases_have_both_rivals(case: BlockCase):
    assert set(case.rivals(torch.float32, torch.channels_last)) == {"torch", "ours"}


def test_families_are_all_of_torchvision():
    def module(name: str) -> str:
        return torchvision.models.get_model_builder(name).__module__

    names = [case.name for case in model_zoo.FAMILIES]
    assert {module(name) for name in names} == {module(case.name) for case in model_zoo.known()}
    assert len(names) == len(set(names))


def run(suite: str, folder, *options: str) -> dict:
    """A suite's JSON from a run of it."""
    assert (
        main([suite, "--quick", "--threads", str(torch.get_num_threads()), "--out", str(folder), *options])
        == 0
    )
    assert {path.name for path in folder.iterdir()} == {f"{suite}.{kind}" for kind in ("json", "md", "png")}
    return json.loads((folder / f"{suite}.json").read_text())


@pytest.mark.native
@pytest.mark.no_poison
def test_conv_suite(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.harness.suite._LARGE_COPY", 2**20)
    monkeypatch.setattr("benchmarks.suites.conv.QUICK_BUDGET", 1e-3)
    assert main(["conv", "--quick", "--out", str(tmp_path), "--cases", "resnet-64-64-56-b1"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"conv.json", "conv.md"}
    found = json.loads((tmp_path / "conv.json").read_text())
    assert not found["wrong"] and len(found["rows"]) == 3


# Timings need deterministic algorithms off, and the suites' own speed memory that is not filled.
@pytest.mark.no_poison
@pytest.mark.parametrize("suite", ["pool", "block", "model"])
def test_smoke(suite: str, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.harness.suite._LARGE_COPY", 2**20)
    monkeypatch.setattr("pooling_ext.reuse_cpu_memory", lambda: type("Memory", (), {"reason": "a test"}))
    if suite == "pool":
        monkeypatch.setattr(
            pool, "CASES", (PoolCase("tiny", "max_pool2d", (2, 8, 8, 8), {"kernel_size": 2}),)
        )
        found = run(suite, tmp_path, "--cases", "tiny")
        assert not found["wrong"] and len(found["rows"]) == 12
    elif suite == "block":
        small = [
            BlockCase(case.name, case.op, (2, 8, *case.shape[2:]), case.kwargs, case.phases)
            for case in block_cases.CASES
            if case.name in ("resnet-tail", "bn-add-relu-2048-7", "conv3x3-512-7", "resnet-stem")
        ]
        monkeypatch.setattr(block, "CASES", tuple(small))
        monkeypatch.setattr(block, "QUICK_BUDGET", 0.01)
        found = run(suite, tmp_path, "--cases", "*")
        assert not found["wrong"] and {row["case"] for row in found["rows"]} == {case.name for case in small}
        stem = next(row for row in found["rows"] if row["case"] == "resnet-stem")
        assert stem["ours_peak"] < stem["torch_peak"] and stem["ours_saved"] < stem["torch_saved"]
    else:
        monkeypatch.setattr(model_zoo, "SIZE", 64)
        for module in (model_training, model_inference, model_families):
            monkeypatch.setattr(module, "QUICK_BUDGET", 0.01)
        options = ("--cases", "shufflenet_v2_x0_5", "--batch", "2", "--dtypes", "float32", "--all")
        found = run(suite, tmp_path, *options)
        assert not found["wrong"]
        rivals = {(entry["part"], entry["rival"]) for entry in found["entries"]}
        assert rivals == {(TRAINING, EAGER), (TRAINING, PATCHED), (INFERENCE, EAGER), (INFERENCE, FROZEN),
                          (FAMILIES, EAGER), (FAMILIES, PATCHED)}  # fmt: skip


@pytest.mark.native
@pytest.mark.no_poison
def test_smoke_depthwise(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.harness.suite._LARGE_COPY", 2**20)
    monkeypatch.setattr("pooling_ext.reuse_cpu_memory", lambda: type("Memory", (), {"reason": "a test"}))
    monkeypatch.setattr(depthwise, "CASES", (depthwise.LayerCase(5, 3, 2, 9),))
    monkeypatch.setattr(depthwise, "QUICK_BUDGET", 0.01)
    threads = str(torch.get_num_threads())
    assert main(["depthwise", "--quick", "--cases", "*", "--threads", threads, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"depthwise.json", "depthwise.md"}
    found = json.loads((tmp_path / "depthwise.json").read_text())
    assert not found["wrong"] and len(found["rows"]) == 12
    assert {row["phase"] for row in found["rows"]} == set(depthwise.PHASES)


def test_wrong_gradients_fail_the_gate(monkeypatch):
    case = BlockCase("tiny", "batch_norm_act", (2, 8, 4, 4))
    reference = block.Reference(case)

    def off(input, *args, **kwargs):
        return batch_norm_act(input, *args, **kwargs) * 1.01

    batch_norm_act = pooling_ext.functional.batch_norm_act
    monkeypatch.setattr(pooling_ext.functional, "batch_norm_act", off)
    with pytest.raises(AssertionError, match="output: off by"):
        list(block.measure_case(case, reference, "float32", "NCHW", 0.01))


@pytest.mark.parametrize("suite", ["pool", "block", "depthwise", "model"])
@pytest.mark.parametrize("options", [["--cases", "nothing-like-this"], ["--threads", "0"]])
def test_bad_options_end_the_program(suite: str, options: list[str], capsys):
    with pytest.raises(SystemExit) as raised:
        main([suite, *options])
    assert raised.value.code == 2
    assert options[1] in capsys.readouterr().err


@pytest.mark.native
def test_bytes_of_triton_kernels(monkeypatch):
    """Pools and batch norm read and write little more than they must; counted on a few programs."""
    pytest.importorskip("triton")
    from pooling_ext.triton.pool import geometry

    # Of few images more programs are made than of many, each with less that its tiles share.
    monkeypatch.setattr(geometry, "ENOUGH_PROGRAMS", 64)
    geometry.tiling.cache_clear()
    for name, layout in (("max-3x3-s2", "NHWC"), ("max-2x2-s2", "NCHW"), ("bn-relu-256-14", "NHWC")):
        case = next(case for case in traffic_cases if case.name == name)
        for count in memory_traffic.measure(case, "bfloat16", layout, batch=16):
            assert 0.95 < count.ratio <= memory_traffic.LIMIT, count
    geometry.tiling.cache_clear()


def test_a_few_programs_stand_for_all(monkeypatch):
    """Those at an edge, which have less to do, too."""
    pytest.importorskip("triton")
    from benchmarks.harness import traffic

    x = torch.randn(1, 64, 38, 50).contiguous(memory_format=torch.channels_last)
    least = 4 * 64 * (38 * 50 + 19 * 25)
    for sample in (10**6, 8, 4):
        monkeypatch.setattr(traffic, "SAMPLE", sample)
        with pooling_ext.use_backend("triton"), traffic.counted() as found:
            pooling_ext.functional.max_pool2d(x, 2)
        assert found.nbytes == pytest.approx(least, rel=1e-3), sample


def test_summary_of_bytes():
    counts = [
        memory_traffic.Count("a", dtype, "NCHW", phase, 1, 100, moved, sectors)
        for phase in ("forward", "training forward", "backward")
        for dtype, moved, sectors in (
            ("float32", 101, 105),
            ("bfloat16", 105, 120 if phase == "backward" else 1),
        )
    ]
    assert list(memory_traffic.summary(counts).rows) == [("a", "1.050", "1.050", "1.050 (1.20)")]


def test_coverage():
    """The table has what the reports count, and why batch norms are left."""

    class Doubled(torch.nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) * 2

    def make(last):
        layers = [torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 1), last]
        return torch.nn.Sequential(*layers)

    whole = coverage_models.CoverageCase("torchvision", "whole", lambda: make(torch.nn.ReLU()), (3, 8, 8))
    part = coverage_models.CoverageCase("torchvision", "part", lambda: make(Doubled(4)), (3, 8, 8))
    rows = [coverage.count(case) for case in (whole, part)]
    assert [(row.patched, row.alone) for row in rows] == [((1, 1), 0), ((1, 2), 0)]
    assert [row.is_met for row in rows] == [True, False]
    page = coverage.table(rows)
    assert "1 of 2 models have 95% or more" in page and "| whole | 1 of 1 | 0 | 1 of 1 |" in page
    assert "- part: patch leaves 1 (Doubled 3): its forward is not known" in page


def test_coverage_knows_its_models():
    names = [case.name for case in coverage_models.cases()]
    assert {case.name for case in model_zoo.FAMILIES} <= set(names) and "r3d_18" in names
    model, example = next(case for case in coverage_models.cases() if case.name == "r3d_18").build()
    assert pooling_ext.patch(model, strict=True).batch_norms_fused == 20 and example.dim() == 5
