"""The runs of `make gpu`: their steps, and that they go on past whatever a step does."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks.gpu_run import build, runner, steps, summary
from benchmarks.gpu_run.runner import Runner, Step, python
from pooling_ext.backends import cuda_library
from pooling_ext.testing.launches import ACTIVATION_CASES, CASES, CONVOLUTIONS

ROOT = Path(__file__).parents[2]


# --- what is run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", steps.RUNS)
def test_steps(name, tmp_path):
    seconds, make = steps.RUNS[name]
    planned = make(tmp_path)
    assert seconds <= {"first": 330, "second": 270}[name]
    # The last may be killed and waited for.
    assert sum(step.seconds for step in planned) + runner.GONE <= seconds
    assert len({step.name for step in planned}) == len(planned)
    assert planned[0].name == "build" and planned[0].environment == {"POOLING_EXT_CUDA": "1"}
    assert all(step.item_seconds < seconds for step in planned)
    if name == "second":
        check = next(step for step in planned if step.name == "memcheck")
        assert check.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert check.command[-2:] == ("--backends", "cuda")
    else:
        order = [step.name for step in planned]
        assert order.index("smoke-cuda") < order.index("smoke-triton")
        tests = {step.name: step.command for step in planned if step.name.startswith("tests-")}
        assert all("gpu and not large" in command for command in tests.values())


def test_names_are_those_of_the_kernels():
    assert set(steps.OPERATORS) == {case.name for case in CASES}
    assert set(steps.ACTIVATIONS) == {case.name for case in ACTIVATION_CASES}
    assert set(steps.CONVOLUTIONS) == {case.name for case in CONVOLUTIONS}


def test_the_convolutions_are_resnet50s():
    torchvision = pytest.importorskip("torchvision")
    import torch

    found = set()

    def note(conv, inputs, output):
        sides = conv.kernel_size[0], conv.stride[0], inputs[0].shape[-1]
        found.add(" ".join(map(str, (conv.in_channels, conv.out_channels, *sides))))

    model = torchvision.models.resnet50().to("meta")
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    model(torch.empty(2, 3, 224, 224, device="meta"))
    assert found == set(steps.RESNET50)


# --- how it is run -------------------------------------------------------------------------------

WORKER = """
import json, os, signal, sys, time
for item in sys.argv[1:]:
    print(json.dumps({"begin": item}), flush=True)
    if item == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if item == "hang": time.sleep(1000)
    if item == "exit": sys.exit(3)
    print("not JSON", flush=True)
    print(json.dumps({"item": item, "result": item.upper()}), flush=True)
    status = "ValueError: no" if item.startswith("bad") else "ok"
    print(json.dumps({"item": item, "status": status}), flush=True)
    if item == "bad GPU": sys.exit(1)
"""


def worker(name: str, *items: str, seconds: float = 60, **options) -> Step:
    return Step(name, seconds, python("-c", WORKER), items, **options)


def run(folder: Path, *planned: Step, clock=time.monotonic) -> tuple[bool, list[dict]]:
    reports: list[int] = []
    well = Runner(folder, lambda: reports.append(1), clock).run(planned)
    assert len(reports) == len(planned)
    return well, summary.read(folder)


def statuses(lines: list[dict]) -> dict[str, str]:
    return {line["step"]: line["status"] for line in lines if "item" not in line and "status" in line}


def test_it_goes_on_past_items_that_crash_hang_or_fail(tmp_path):
    items = ("a", "crash", "b", "hang", "bad", "c", "bad GPU", "d", "exit", "e")
    well, lines = run(tmp_path, worker("all", *items, item_seconds=2), worker("next", "f"))
    assert not well
    assert [line["result"] for line in lines if "result" in line] == [
        "A",
        "B",
        "BAD",
        "C",
        "BAD GPU",
        "D",
        "E",
        "F",
    ]
    found = {line["item"]: line["status"] for line in lines if "item" in line and "status" in line}
    assert found["crash"] == "crashed: signal 11" and found["hang"] == "timed out"
    assert found["bad"] == found["bad GPU"] == "ValueError: no" and found["exit"] == "failed: exit status 3"
    assert statuses(lines) == {"all": "failed: 5 of 10", "next": "ok"}
    assert "not JSON" in (tmp_path / "log.txt").read_text()
    text = summary.markdown(lines)
    assert "| all | failed: 5 of 10 |" in text and "- all, hang: timed out" in text


def test_lanes_share_the_items(tmp_path):
    well, lines = run(tmp_path, worker("lanes", "a", "b", "crash", "c", "d", lanes=3))
    assert not well and sorted(line["result"] for line in lines if "result" in line) == ["A", "B", "C", "D"]


def test_a_worker_that_cannot_start_is_not_started_again(tmp_path):
    well, lines = run(tmp_path, Step("broken", 60, python("-c", "import nothing_like_this"), ("a", "b")))
    assert not well and statuses(lines) == {"broken": "failed: exit status 1"}
    assert next(line["not_begun"] for line in lines if "not_begun" in line) == ["a", "b"]
    assert "Not begun: a, b." in summary.markdown(lines)


def test_a_command_that_hangs_is_interrupted_and_then_killed(tmp_path, monkeypatch):
    """With what it has started; it may say a last word."""
    monkeypatch.setattr(runner, "GRACE", 5.0)
    polite = (
        # A shell's background jobs, and what they start, are born deaf to it.
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try: time.sleep(1000)\nexcept KeyboardInterrupt: print('last word')"
    )
    child = tmp_path / "child"
    rude = (
        "import signal, subprocess, sys, time, pathlib\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))\ntime.sleep(1000)"
    )
    start = time.monotonic()
    planned = [Step(name, 6, python("-c", code)) for name, code in (("polite", polite), ("rude", rude))]
    well, lines = run(tmp_path, *planned, Step("after", 30, python("-c", "print('after')")))
    assert time.monotonic() - start < 40
    assert not well and statuses(lines) == {"polite": "timed out", "rude": "timed out", "after": "ok"}
    assert {"last word", "after"} <= set((tmp_path / "log.txt").read_text().splitlines())
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_a_step_leaves_over_is_the_next_ones(tmp_path):
    """By a clock of the test's own: each look at it takes a second."""
    now = iter(range(10**6))
    begun = [Step(f"step {number}", 0, python("-c", "")) for number in range(2)]
    quick = Step("quick", 500, python("-c", ""))
    well, lines = run(tmp_path, quick, *begun, clock=lambda: next(now))
    assert statuses(lines)["step 0"] == "ok"
    well, lines = run(tmp_path / "late", Step("late", 2, python("-c", "")), *begun, clock=lambda: next(now))
    assert not well and set(statuses(lines).values()) == {"not begun: no time was left"}


def test_without_its_program_a_step_is_left_out(tmp_path):
    well, lines = run(tmp_path, Step("profile", 10, ("no-such-program",), program="no-such-program"))
    assert well and statuses(lines) == {"profile": "left out: there is no no-such-program"}


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"facts": {"gpu": "a card"}}\n{"step": "bu')
    summary.write(tmp_path)
    assert "- gpu: a card" in (tmp_path / "summary.md").read_text()


def entry(rival: str, ms: float, **more) -> dict:
    fields = dict(what="a step", dtype="bfloat16", layout="NHWC", batch=32, rival=rival, ms=ms, spread=0.0)
    return {"entry": fields | more}


def test_rivals_are_compared_within_an_item():
    """Eager's time of another process is not theirs."""
    lines = [{"facts": {"copy_gb_s": 4000.0}}]
    for item, eager, ours, name in (("training 32", 8.0, 4.0, "patched"), ("training 32 untuned", 9.0, 6.0,
                                                                         "patched, untuned")):  # fmt: skip
        for line in (entry("eager", eager), entry(name, ours)):
            lines.append({"step": "models", "item": item} | line)
    for backend, eager in (("cuda", 2.0), ("triton", 3.0)):
        for line in (entry("eager", eager, least=10**9), entry(backend, 1.0, least=10**9)):
            lines.append({"step": f"operators-{backend}", "item": "x"} | line)
    text = summary.markdown(lines)
    assert "| a step, patched | bfloat16 | 32 | 8 |  |  | 4 | 2.0x |" in text
    assert "| a step, patched, untuned | bfloat16 | 32 | 9 |  |  | 6 | 1.50x |" in text
    assert "| 2 |  | 1 |  | 2.0x |  | 25% |" in text and "| 3 |  |  | 1 | 3.0x |  | 25% |" in text


# --- tests and libraries -------------------------------------------------------------------------

BROKEN = """
import torch
torch.cuda.is_initialized = lambda: True
works = True
def synchronize():
    if not works: raise RuntimeError("an illegal memory access was encountered")
torch.cuda.synchronize = synchronize
def test_a(): pass
def test_b():
    global works
    works = False
    assert False, "wrong"
def test_c(): assert works
def test_d(): assert works
"""


def test_no_test_runs_on_a_gpu_that_another_one_broke(tmp_path):
    (tmp_path / "test_broken.py").write_text(BROKEN)
    lines = tmp_path / "lines"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "benchmarks.gpu_run.pytest_lines",
         "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider", tmp_path],
        capture_output=True, text=True, env=os.environ | {runner.LINES: str(lines), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    outcomes = {line["test"].rpartition("::")[2]: line["outcome"] for line in found}
    assert outcomes == {"test_a": "passed", "test_b": "failed", "test_c": "passed", "test_d": "passed"}, done
    assert "wrong" in next(line["message"] for line in found if line["outcome"] == "failed")
    assert "3 passed" in summary.markdown(found) and "test_b: AssertionError: wrong" in summary.markdown(
        found
    )


def test_libraries_of_an_earlier_run_are_taken_if_they_load(tmp_path, monkeypatch):
    package, folder = tmp_path / "package", tmp_path / "run"
    package.mkdir()
    folder.mkdir()
    monkeypatch.setattr(build, "PACKAGE", package)
    assert build.take(folder) == "they are of other sources"
    (folder / "results.jsonl").write_text(json.dumps({"step": "build", "sources": build.sources()}) + "\n")
    assert build.take(folder) == "there are none"
    for name in ("_C.so", "_cuda.so"):
        (folder / f"{name}.gz").write_bytes(gzip.compress(b"not a library"))
    monkeypatch.setattr(build, "LOADS", "raise SystemExit('they do not load')")
    assert build.take(folder) == "they do not load" and not list(package.iterdir())
    monkeypatch.setattr(build, "LOADS", "")
    assert build.take(folder) is None
    assert {path.name: path.read_bytes() for path in package.iterdir()} == dict.fromkeys(
        ("_C.so", "_cuda.so"), b"not a library"
    )


# --- dry runs ------------------------------------------------------------------------------------

#: Stands for ncu and compute-sanitizer: notes how it is called, and runs what it is to watch.
TOOL = f"""#!{sys.executable}
import os, subprocess, sys
cached = "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ
print(os.path.basename(sys.argv[0]), sys.argv[1:], "cached" if cached else "", flush=True)
if "--log-file" in sys.argv: open(sys.argv[sys.argv.index("--log-file") + 1], "w").write("kernels")
sys.exit(subprocess.call(sys.argv[sys.argv.index({sys.executable!r}):]) if "ncu" in sys.argv[0] else 0)
"""


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.timeout(900)
@pytest.mark.skipif(not cuda_library.on_cpu(), reason="needs the CUDA kernels as a library for the CPU")
@pytest.mark.parametrize("name", steps.RUNS)
def test_dry_run(name, tmp_path):
    """Every step on the CPU's stand-ins, on small inputs."""
    pytest.importorskip("triton")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("ncu", "compute-sanitizer"):
        (tools / tool).write_text(TOOL)
        (tools / tool).chmod(0o755)
    folder = tmp_path / "run"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "POOLING_EXT_CUDA_ON_CPU": str(cuda_library.ON_CPU),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_run", name, "--dry", "--out", folder],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    log = (folder / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    files = {path.name for path in folder.iterdir()}
    assert len(files) <= 8 and {"results.jsonl", "summary.md", "log.txt"} <= files
    lines = summary.read(folder)
    assert set(statuses(lines)) == {step.name for step in steps.RUNS[name][1](folder)}
    assert set(statuses(lines).values()) == {"ok"}
    if name == "first":
        assert {"junit-cuda.xml", "junit-triton.xml"} <= files
        rivals = {line["entry"]["rival"] for line in lines if "entry" in line}
        assert rivals == {"eager", "cuda", "triton"} and any("test" in line for line in lines)
    else:
        assert "ncu ['--clock-control', 'none'" in log and "ncu.csv" in files
        assert "'memcheck'" in log and log.count("cached") == 1
        assert {line["entry"]["rival"] for line in lines if "entry" in line} >= {
            "patched",
            "patched, untuned",
            "frozen",
        }
        assert any("convolution" in line for line in lines) and any("frontend" in line for line in lines)
    assert "## Steps" in done.stdout
