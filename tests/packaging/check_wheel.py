"""Checks a built wheel: what is in it, and that it works in environments that have nothing else.

    python tests/packaging/check_wheel.py dist/*.whl --torch torch==2.11.0 --torch torch

For each PyTorch it makes a new virtual environment in build/wheel-test, installs the wheel there with what it
asks for, and runs the smoke test (abi_smoke.py) and the files of frozen models (common/saving_worker.py)
outside the checkout. Files that one environment wrote have to load in the next. `make wheel-test` runs it.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: What the library may ask the system for: PyTorch's own, which are loaded before it, and what manylinux has.
NEEDED = re.compile(
    r"lib(torch|torch_cpu|c10|stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so(\.\d+)?|ld-linux[\w-]*\.so\.\d+"
)


def check_contents(wheel: Path) -> None:
    """All files of the package, one library, and no others."""
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = [name for name in archive.namelist() if not name.endswith("/")]
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(info))
        with tempfile.TemporaryDirectory() as folder:
            (library,) = [name for name in names if ".so" in Path(name).name]
            check_library(Path(archive.extract(library, folder)))
    assert re.fullmatch(r"pooling_ext/_C\.[\w-]+\.so", library), library
    kinds = (".py", ".pyi", ".json", ".typed")
    sources = {path for path in (ROOT / "pooling_ext").rglob("*") if path.suffix in kinds}
    expected = {path.relative_to(ROOT).as_posix() for path in sources if "__pycache__" not in path.parts}
    found = {name for name in names if ".dist-info/" not in name} - {library}
    assert found == expected, f"missing {expected - found}, too many {found - expected}"
    assert any(name.endswith("licenses/LICENSE") for name in names), "the license is missing"
    requires = metadata.get_all("Requires-Dist") or []
    own = sorted(line for line in requires if "extra ==" not in line)
    assert own == ["numpy", "torch>=2.11"], own
    version = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "pooling_ext/__init__.py").read_text(), re.MULTILINE
    )
    assert version is not None and metadata["Version"] == version[1], metadata["Version"]
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size >> 10} KiB")


def check_library(library: Path) -> None:
    said = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", said)
    assert "libtorch_cpu.so" in needed, needed
    others = [name for name in needed if not NEEDED.fullmatch(name)]
    assert not others, f"the library needs {others}"
    assert "RPATH" not in said and "RUNPATH" not in said, (
        "the library has a path of the machine that built it"
    )


class Environment:
    """A virtual environment that has the wheel, a PyTorch and what they ask for."""

    def __init__(self, folder: Path, wheel: Path, torch: str, keep: bool) -> None:
        self.python = folder / "bin" / "python"
        if not (keep and self.python.exists()):
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True)
        self.pip("install", "--quiet", torch, str(wheel))
        self.pip("install", "--quiet", "--force-reinstall", "--no-deps", str(wheel))
        self.pip("check")

    def pip(self, *args: str) -> None:
        self.run("-m", "pip", "--disable-pip-version-check", *args)

    def run(self, *args: str, cwd: Path | None = None) -> None:
        # Nothing of the checkout, and nothing that says how to run.
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "POOLING_EXT_", "VIRTUAL_ENV"))
        }
        subprocess.run([str(self.python), *args], env=env, cwd=cwd, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--torch", action="append", default=[], help="a requirement, for instance torch==2.11.0"
    )
    parser.add_argument("--keep", action="store_true", help="keep the environments, and use those of before")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "wheel-test")
    options = parser.parse_args()
    check_contents(options.wheel)
    written: list[Path] = []
    with tempfile.TemporaryDirectory() as name:
        outside = Path(name) / "tests"
        outside.mkdir()
        for script in ("packaging/abi_smoke.py", "common/saving_worker.py"):
            shutil.copy(ROOT / "tests" / script, outside)
        for torch in options.torch:
            folder = options.folder / re.sub(r"\W+", "-", torch)
            environment = Environment(folder, options.wheel.resolve(), torch, options.keep)
            environment.run("abi_smoke.py", "--built-here", cwd=outside)
            environment.run(str(folder.resolve() / "bin" / "pooling-ext"), "info", cwd=outside)
            own = outside / folder.name
            environment.run("saving_worker.py", "write", str(own), cwd=outside)
            environment.run("saving_worker.py", "read", str(own), "--exact", cwd=outside)
            for other in written:
                print(f"what {other.name} wrote, read with {torch}:", flush=True)
                environment.run("saving_worker.py", "read", str(other), cwd=outside)
            written.append(own)
            if not options.keep:
                shutil.rmtree(folder)  # several GB
            print(f"the wheel works with {torch}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
