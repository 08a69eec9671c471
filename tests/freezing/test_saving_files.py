"""Files of frozen models that are cut off, damaged, altered or none: clear errors, and no code run."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from freezing_cases import conv, norm
from torch import nn

import pooling_ext
from pooling_ext import ArgumentError
from pooling_ext.freezing.saving import files

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv(3, 4), norm(4), nn.GELU()
        self.stay, self.linear = nn.LayerNorm(8, eps=1e-3), nn.Linear(8, 3)
        self.register_buffer("shift", torch.ones(4, 1, 1))

    def forward(self, x, scale=2.0):
        x = self.act(self.norm(self.conv(x))) + self.shift
        return torch.cat([self.linear(self.stay(x * scale)), x.flatten(2, 3).unsqueeze(2)[..., :3]], 2)


@pytest.fixture(scope="module")
def frozen():
    torch.manual_seed(0)
    return pooling_ext.freeze(Small().eval(), X)


@pytest.fixture(scope="module")
def written(frozen) -> bytes:
    file = io.BytesIO()
    frozen.save(file)
    return file.getvalue()


def load(content: bytes) -> pooling_ext.Frozen:
    return pooling_ext.load(io.BytesIO(content))


# --- damage ------------------------------------------------------------------------------------------------


def test_cut_off_anywhere(written):
    generator = random.Random(0)
    ends = [
        *range(0, 64),
        *range(len(written) - 64, len(written)),
        *generator.sample(range(len(written)), 50),
    ]
    for end in ends:
        with pytest.raises(ArgumentError, match=r"path \(BytesIO\) is "):
            load(written[:end])


def test_flipped_bits(written, frozen):
    """An error, or the same model where a bit meant nothing."""
    generator, refused = random.Random(0), 0
    for _ in range(200):
        position, bit = generator.randrange(len(written)), generator.randrange(8)
        damaged = bytearray(written)
        damaged[position] ^= 1 << bit
        try:
            twin = load(bytes(damaged))
        except ArgumentError as error:
            assert "path (BytesIO) " in str(error)
            refused += 1
        else:
            assert torch.equal(twin(X), frozen(X)) and twin.report == frozen.report
    assert refused > 50


def test_overwritten_with_others(written):
    generator = random.Random(1)
    for _ in range(30):
        damaged = bytearray(written)
        position = generator.randrange(len(written) - 64)
        damaged[position : position + 64] = generator.randbytes(64)
        try:
            load(bytes(damaged))
        except ArgumentError:
            continue


def test_a_weight_that_changed_is_noticed(written):
    """Although the file is whole, and its own checksums are right."""
    data = torch.load(io.BytesIO(written), weights_only=True)
    name = next(name for name, x in data["tensors"].items() if x.numel() > 8)
    data["tensors"][name].view(-1)[3] += 1
    with pytest.raises(ArgumentError, match="is damaged or was altered: its contents"):
        load(packed(data))
    data = torch.load(io.BytesIO(written), weights_only=True)
    data["model"] = data["model"].replace('"Small"', '"Large"')
    with pytest.raises(ArgumentError, match="is damaged or was altered: its contents"):
        load(packed(data))


def packed(data: Any) -> bytes:
    file = io.BytesIO()
    torch.save(data, file)
    return file.getvalue()


# --- other files -------------------------------------------------------------------------------------------


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (Path.write_text, (Path("evil"), "evil"))


def test_files_that_are_none(frozen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled = io.BytesIO()
    torch.save(frozen, pickled)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"cos\nsystem\n")
    contents = [
        *(b"", b"PK", b"PK\3\4", b"text", b"\x80\x02." * 9, archive.getvalue(), pickled.getvalue()),
        *map(
            packed,
            (frozen.state_dict(), [1], {"format": "other"}, {"format": files.FORMAT}, Evil(), {"a": Evil()}),
        ),
        packed({"format": files.FORMAT, "version": 1, "model": 3, "tensors": {}, "checksum": ""}),
        packed({"format": files.FORMAT, "version": 1, "model": "{}", "tensors": {3: X}, "checksum": ""}),
        packed(
            {"format": files.FORMAT, "version": 1, "model": "{}", "tensors": {"a": X}, "checksum": Evil()}
        ),
    ]
    for content in contents:
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(ArgumentError, match=f"path '{path}' is "):
            pooling_ext.load(path)
        with pytest.raises(ArgumentError, match=r"path \(BytesIO\) is "):
            load(content)
    assert not (tmp_path / "evil").exists()


def test_paths(frozen, tmp_path):
    frozen.save(str(tmp_path / "a.pt"))
    frozen.save(tmp_path / "b.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]
    for path in (tmp_path / "a.pt", str(tmp_path / "b.pt")):
        assert torch.equal(pooling_ext.load(path)(X), frozen(X))
    with pytest.raises(FileNotFoundError):
        pooling_ext.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        pooling_ext.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        frozen.save(tmp_path / "none" / "a.pt")
    for call in (pooling_ext.load, frozen.save):
        with pytest.raises(TypeError, match="path must be a path or a binary file object, but got int"):
            call(3)


def test_versions(written):
    for version, message in (
        (files.VERSION + 1, r"newer version of pooling_ext \(format 2, .* up to 1\); update pooling_ext"),
        (0, "was altered"),
    ):
        data = torch.load(io.BytesIO(written), weights_only=True)
        data["version"] = version
        if version == 0:
            data["checksum"] = "0" * 64
        with pytest.raises(ArgumentError, match=message):
            load(packed(data))
    data = {"format": files.FORMAT, "version": 7, "something": "else"}  # as another version may have it
    with pytest.raises(ArgumentError, match="newer version"):
        load(packed(data))


# --- altered by somebody who makes the checksum right ------------------------------------------------------


def altered(written: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    data = torch.load(io.BytesIO(written), weights_only=True)
    model = json.loads(data["model"])
    change(model)
    data["model"] = json.dumps(model)
    data["checksum"] = files._checksum(data["version"], data["model"], data["tensors"])
    return packed(data)


def node(model: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for node in model["region"]["nodes"] if node["op"] == op)


def layer(model: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(layer for layer in model["region"]["layers"].values() if layer["kind"] == kind)


def put(find: Callable[..., Any], *what: Any, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda model: find(model, *what).update(values)


def region(model: dict[str, Any]) -> dict[str, Any]:
    return model["region"]


def rename(model: dict[str, Any], name: str) -> None:
    layers, paths = model["region"]["layers"], model["region"]["paths"]
    old = next(iter(layers))
    layers[name] = layers.pop(old)
    paths[name] = paths.pop(old, old)
    for each in model["region"]["nodes"]:
        if each["op"] == "call_module" and each["target"] == old:
            each["target"] = name


CALL = {"kind": "call", "args": ["tuple", "touch evil"], "kwargs": ["dict"]}
INJECTION = "x\n    __import__('os').system('touch evil')"
ALTERED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    **{
        f"function {name}": (put(node, "call_function", target=name), "which no frozen model does")
        for name in (
            *("os.system", "builtins.eval", "builtins.exec", "builtins.__import__", "operator.methodcaller"),
            *(
                "operator.attrgetter",
                "operator.call",
                "torch.load",
                "torch.hub.load",
                "torch.ops.load_library",
            ),
            *("torch.nn.functional.__builtins__", "subprocess.run", "torchvision.io.read_file", "", "torch."),
        )
    },
    **{
        f"method {name}": (put(node, "call_method", target=name), "is nothing that a frozen model does")
        for name in ("__reduce__", "apply_", "map_", "numpy", "register_hook", "__class__", "x y", INJECTION)
    },
    "attribute": (
        put(
            node, "call_function", target="builtins.getattr", args=["tuple", ["node", "input_0"], "__class__"]
        ),
        "it asks for the attribute '__class__'",
    ),
    "attribute by a value": (
        put(
            node,
            "call_function",
            target="builtins.getattr",
            args=["tuple", ["node", "input_0"], ["node", "input_0"]],
        ),
        "it asks for the attribute",
    ),
    "keyword": (
        put(node, "call_function", kwargs=["dict", [INJECTION, 1]]),
        "args must be a tuple, and kwargs",
    ),
    "name of a node": (put(node, "call_function", name=INJECTION), "is no node"),
    "name of an input": (put(node, "placeholder", target=INJECTION), "placeholder of"),
    "name of a module": (put(node, "call_module", target="conv', x"), "call_module of"),
    "name of an attribute": (put(node, "get_attr", target="__class__"), "get_attr of '__class__'"),
    "attribute that is a module": (put(node, "get_attr", target="conv"), "get_attr of 'conv'"),
    "name of a layer": (
        lambda m: rename(m, 'a"), __import__("os").system("touch evil'),
        "is no name of a layer",
    ),
    "name of a layer that GraphModule has": (lambda m: rename(m, "recompile"), "is no name of a layer"),
    "op": (put(node, "call_function", op="call"), "is no node"),
    "two outputs": (lambda m: region(m)["nodes"].append(node(m, "output")), "one output"),
    "no nodes": (put(region, nodes=[]), "has 0 inputs"),
    "a node before its time": (
        put(node, "call_function", args=["tuple", ["node", "output"]]),
        "stands for no value",
    ),
    "class of a module": (put(layer, "module", **{"class": "torch.nn.Sequential"}), "which no file has"),
    "class of another package": (put(layer, "module", **{"class": "os.system"}), "which no file has"),
    "argument of a module": (put(layer, "module", config={"size": 3}), "cannot be made of its arguments"),
    "tensors of a module": (put(layer, "module", state={}), "cannot be made of its arguments"),
    "kind": (put(layer, "linear", kind="pickle"), "it is a 'pickle', which no file has"),
    "function of a call": (put(layer, "module", **CALL, function="os.system"), "which no frozen model does"),
    "getattr as a call": (put(layer, "module", **CALL, function="builtins.getattr"), "asks for an attribute"),
    "tensor": (put(layer, "conv", weight=["tensor", "t99"]), r"conv: \['tensor', 't99'\] names no tensor"),
    "weight of another rank": (put(layer, "conv", weight=["tensor", "t0"]), "conv: weight must be floating"),
    "stride": (
        put(layer, "conv", stride=[0, 1]),
        r"conv: stride must be 2 numbers of at least 1, but got \[0, 1\]",
    ),
    "padding": (put(layer, "conv", padding=[-1, 1]), "conv: padding must be 2 numbers of at least 0"),
    "dilation": (put(layer, "conv", dilation=[1]), "conv: dilation must be 2 numbers"),
    "groups": (put(layer, "conv", groups=3), "conv: groups must divide 4, but got 3"),
    "bias": (put(layer, "linear", bias=["tensor", "t0"]), "linear: bias must have 3 elements"),
    "residual": (put(layer, "conv", residual="free"), "conv: residual must be one of"),
    "way": (put(layer, "conv", way="fastest"), "conv: way must be one of"),
    "activation": (
        put(layer, "conv", activation=["activation", "exec", [], ""]),
        "conv: there is no activation 'exec'",
    ),
    "missing": (lambda m: layer(m, "conv").pop("groups"), "conv: groups is missing"),
    "device": (put(region, device="cuda:77"), r"frozen on 'cuda:77', which is not here"),
    "no device": (put(region, device="nothing"), r"frozen on 'nothing', which is"),
    "meta device": (put(region, device="meta"), r"frozen on 'meta', which is no device"),
    "dtype": (put(region, dtype=["dtype", "float31"]), "has no dtype 'float31'"),
    "dtype that is none": (put(region, dtype=["dtype", "load"]), "has no dtype 'load'"),
    "value": (put(region, dtype=["object", 1]), "stands for no value"),
    "signature": (lambda m: region(m)["signature"]["parameters"][0].update(name="x y"), "is no parameter"),
    "nest": (lambda m: region(m)["outputs"].update(nest=["tuple", 0, 0]), "outputs: the nest has"),
    "changed": (lambda m: region(m)["outputs"].update(changed=[9]), "outputs: changed is"),
    "input": (put(region, inputs=[["a", "b", True, None]]), "inputs: "),
    "report": (lambda m: m["report"].update(warnings=[3]), "report: warnings must be a list of str"),
    "no object": (lambda m: m.update(report=3), "report: expected an object"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_altered_files_are_refused(written, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    change, message = ALTERED[what]
    with pytest.raises(ArgumentError, match=r"(?s)path \(BytesIO\) cannot be loaded: .*" + message):
        load(altered(written, change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "3", "[]", '{"report": NaN}', "null"])
def test_models_that_are_no_objects(written, text):
    data = torch.load(io.BytesIO(written), weights_only=True)
    data["model"] = text
    data["checksum"] = files._checksum(data["version"], text, data["tensors"])
    with pytest.raises(ArgumentError, match=r"path \(BytesIO\) cannot be loaded: "):
        load(packed(data))


def test_what_is_altered_is_what_would_load_otherwise(written, frozen):
    assert torch.equal(load(altered(written, lambda model: None))(X), frozen(X))
    kinds = {layer["kind"] for layer in json.loads(model_of(written))["region"]["layers"].values()}
    assert kinds == {"conv", "constant", "module", "linear"}


def model_of(content: bytes) -> str:
    return torch.load(io.BytesIO(content), weights_only=True)["model"]


def test_random_changes_of_the_data(written):
    """A value put in place of another, with the checksum made right: an error of ours, or a model."""
    generator = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        3,
        1e400,
        "conv",
        "add",
        [],
        ["node", "input_0"],
        ["tensor", "t1"],
        {},
        ["dict"],
    ]
    for _ in range(150):

        def change(model: Any) -> None:
            position = model["region"]
            while True:
                keys = list(position) if isinstance(position, dict) else list(range(len(position)))
                key = generator.choice(keys)
                inner = position[key]
                if isinstance(inner, (dict, list)) and inner and generator.random() < 0.85:
                    position = inner
                    continue
                position[key] = generator.choice(values)
                return

        try:
            twin = load(altered(written, change))
        except ArgumentError:
            continue
        try:
            twin(X)
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, KeyError):
            continue
