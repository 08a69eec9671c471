"""patch and unpatch: the report, what a patched model keeps, and undoing it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchvision
from helpers import run_python
from torch import nn

import pooling_ext
from pooling_ext import PatchReport


def resnet18():
    return torchvision.models.resnet18(weights=None, num_classes=10)


def small_resnet():
    """For comparisons in training; batch norms over few values magnify rounding, so give it 4 x 64 x 64."""
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10).double()


def squeezenet():
    return torchvision.models.squeezenet1_1(weights=None)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.MaxPool2d(3, 2, 1),
        nn.Sequential(nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)),
        nn.LPPool2d(2, 2),
        nn.AdaptiveAvgPool2d(1),
    )


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_report():
    model = small()
    report = pooling_ext.patch(model)
    assert isinstance(report, PatchReport)
    assert [(entry.path, entry.what) for entry in report.replaced] == [
        ("1", "MaxPool2d"),
        ("2.1", "AvgPool2d"),
        ("3", "LPPool2d"),
        ("4", "AdaptiveAvgPool2d"),
    ]
    text = str(report)
    assert "2.1" in text and "AvgPool2d" in text and "4 replaced, 0 skipped" in text
    assert "no convolution, BatchNorm and ReLU to fuse" in text


def test_report_names_the_parts_of_chains():
    report = pooling_ext.patch(resnet18())
    assert [(entry.path, entry.what) for entry in report.replaced[:4]] == [
        ("(root)", "conv1-bn1-relu-maxpool"),
        ("maxpool", "MaxPool2d"),
        ("layer1.0", "conv1-bn1-relu"),
        ("layer1.0", "conv2-bn2-add-relu"),
    ]
    entry = report.replaced[2]
    assert entry.why == "pooling_ext.functional.conv_bn_act"
    assert "layer2.0.downsample  Conv2d(0)-BatchNorm2d(1)" in str(report)
    assert "to fuse" not in str(report)


def test_identity_attributes_mode_and_hooks_stay():
    model = small().eval()
    pool = model[1]
    calls = []
    pool.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    pool.tag = "mine"
    pooling_ext.patch(model)
    assert model[1] is pool and isinstance(pool, nn.MaxPool2d) and isinstance(pool, pooling_ext.MaxPool2d)
    assert (pool.kernel_size, pool.stride, pool.padding, pool.tag, pool.training) == (3, 2, 1, "mine", False)
    x = torch.randn(1, 3, 20, 20)
    model(x)
    assert calls == [(1, 4, 9, 9)]
    model.train()
    assert pool.training
    pooling_ext.unpatch(model)
    assert type(pool) is nn.MaxPool2d and pool.tag == "mine"
    model(x)
    assert len(calls) == 2
    assert not any("pooling_ext" in key for module in model.modules() for key in vars(module))


def test_copies_of_a_patched_model():
    model = small()
    pooling_ext.patch(model)
    x = torch.rand(1, 3, 20, 20)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert classes(twin) == classes(model)
        assert torch.equal(twin(x), model(x))
        pooling_ext.unpatch(twin)
        assert classes(twin) == classes(small())
    assert type(model[1]) is pooling_ext.MaxPool2d


def test_patching_twice_and_unpatching_twice():
    model = small()
    pooling_ext.patch(model)
    again = pooling_ext.patch(model, strict=True)
    assert not again.replaced and len(again.skipped) == 4
    assert all("already" in entry.why for entry in again.skipped)
    pooling_ext.unpatch(model)
    pooling_ext.unpatch(model)
    assert classes(model) == classes(small())


def test_ours_from_the_start_stay_ours():
    model = nn.Sequential(pooling_ext.MaxPool2d(2, padding="same"), nn.MaxPool2d(2))
    pooling_ext.patch(model)
    pooling_ext.unpatch(model)
    assert [type(module) for module in model] == [pooling_ext.MaxPool2d, nn.MaxPool2d]


class OddPool(nn.MaxPool2d):
    """A class of its own, whose forward must not be taken away."""

    def forward(self, input):
        return super().forward(input) + 1


def test_what_is_skipped_and_why():
    model = nn.Sequential(OddPool(2), nn.FractionalMaxPool2d(2, output_size=2), nn.MaxPool2d(2))
    report = pooling_ext.patch(model)
    assert [entry.path for entry in report.replaced] == ["2"]
    assert [(entry.path, entry.what) for entry in report.skipped] == [
        ("0", "OddPool"),
        ("1", "FractionalMaxPool2d"),
    ]
    assert all(entry.why for entry in report.skipped)
    assert type(model[0]) is OddPool
    assert "OddPool" in str(report) and "1 replaced, 2 skipped" in str(report)


def test_strict_is_all_or_nothing():
    model = nn.Sequential(nn.MaxPool2d(2), OddPool(2), nn.AvgPool2d(2))
    before = classes(model)
    with pytest.raises(ValueError, match=r"1 \(OddPool\)"):
        pooling_ext.patch(model, strict=True)
    assert classes(model) == before
    assert not any("pooling_ext" in key for module in model.modules() for key in vars(module))


def test_a_pool_by_itself():
    pool = nn.MaxPool2d(2)
    report = pooling_ext.patch(pool)
    assert len(report.replaced) == 1 and type(pool) is pooling_ext.MaxPool2d
    pooling_ext.unpatch(pool)
    assert type(pool) is nn.MaxPool2d


def test_a_pool_used_twice_is_patched_once():
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(pool, nn.ReLU(), pool)
    assert len(pooling_ext.patch(model).replaced) == 1
    assert model[0] is model[2] is pool
    assert model(torch.rand(1, 1, 8, 8)).shape == (1, 1, 2, 2)


def test_nothing_to_patch():
    report = pooling_ext.patch(nn.Linear(2, 2), strict=True)
    assert not report.replaced and not report.skipped
    assert "0 replaced, 0 skipped" in str(report)


def test_channels_last_and_lower_precision():
    model = squeezenet().eval().to(torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(1, 3, 96, 96).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        pooling_ext.patch(model)
        actual = model(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_max_pooling_models_are_bitwise_equal():
    """SqueezeNet's features use max pooling alone, which is exact, beside convolutions."""
    features = squeezenet().eval().features
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = features(x)
        pooling_ext.patch(features, exact=True)
        assert torch.equal(features(x), expected)


def test_patched_models_are_copied_pickled_and_saved():
    model = resnet18()
    plain = [type(module) for module in model.modules()]
    pooling_ext.patch(model)
    x = torch.randn(2, 3, 64, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    twins.append(copy.copy(model))
    expected = model(x)
    for twin in twins[:3]:
        assert classes(twin) == classes(model)
        assert torch.equal(twin(x), expected)
        assert twin.layer1[0].bn1 is not model.layer1[0].bn1
        pooling_ext.unpatch(twin)
        assert classes(twin) == plain
    # A shallow copy has a dictionary of children of its own, and looks there.
    shallow = twins[3]
    shallow._modules = {**model._modules, "fc": nn.Identity()}
    assert shallow(x).shape == (2, 512) and model(x).shape == (2, 10)


def test_a_pickled_model_is_fused_again_in_another_process(tmp_path):
    model = nn.Sequential(resnet18(), nn.Linear(10, 2)).eval()
    pooling_ext.patch(model)
    x = torch.randn(2, 3, 64, 64)
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    code = f"""
import torch, pooling_ext
model, x, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(model(x), expected)
again = pooling_ext.patch(model)
print(len(again.replaced), len(again.skipped))
pooling_ext.unpatch(model)
print(type(model[0]), type(model[0].layer1[0]))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    counts, types = result.stdout.splitlines()
    assert counts == "0 22"  # all of it was fused already
    assert types == f"{torchvision.models.ResNet} {torchvision.models.resnet.BasicBlock}"


def test_unpatch_restores_exactly():
    model = resnet18()
    plain = [(type(module), dict(module.__dict__)) for module in model.modules()]
    pooling_ext.patch(model)
    assert type(model) is not torchvision.models.ResNet and isinstance(model, torchvision.models.ResNet)
    assert repr(model) == repr(resnet18())
    pooling_ext.unpatch(model)
    assert [(type(module), module.__dict__) for module in model.modules()] == plain


def test_patching_a_fused_model_twice():
    model = resnet18()
    first = pooling_ext.patch(model)
    before = classes(model)
    again = pooling_ext.patch(model, strict=True)
    assert not again.replaced and len(again.skipped) == len(first.replaced)
    assert classes(model) == before
    # What was replaced since is patched then.
    model.layer1[0] = resnet18().layer1[0]
    assert [entry.path for entry in pooling_ext.patch(model).replaced] == ["layer1.0"] * 2
    assert classes(model) == before


def test_a_model_that_changed_is_planned_anew():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    pooling_ext.patch(model)
    model.append(nn.ReLU())
    (entry,) = pooling_ext.patch(model).replaced
    assert entry.what == "Conv2d(0)-BatchNorm2d(1)-ReLU(2)"
    pooling_ext.unpatch(model)
    assert type(model) is nn.Sequential


def test_nothing_changes_if_patch_fails(monkeypatch):
    from pooling_ext.patching import api

    model = resnet18()
    before = classes(model)
    set_class, calls = api._set_class, []

    def failing(module, cls):
        calls.append(cls)
        if len(calls) == 10:
            raise TypeError("__class__ assignment")
        set_class(module, cls)

    monkeypatch.setattr(api, "_set_class", failing)
    with pytest.raises(TypeError, match="assignment"):
        pooling_ext.patch(model)
    assert classes(model) == before
    assert not any("pooling_ext" in key for module in model.modules() for key in vars(module))


def test_unpatch_does_not_take_a_class_that_was_made_later():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    pooling_ext.patch(model)
    model.__class__ = type("Wrapped", (type(model),), {})
    with pytest.raises(ValueError, match=r"\(root\).*Wrapped"):
        pooling_ext.unpatch(model)


def test_feature_extraction():
    """Only the head is trained; the backbone needs no gradient, and in evaluation mode stays as it is."""
    model = resnet18()
    twin = copy.deepcopy(model)
    pooling_ext.patch(model)
    x = torch.randn(2, 3, 64, 64)
    for net in (model, twin):
        net.eval().requires_grad_(False)
        net.fc = nn.Linear(512, 3)
        net.fc.load_state_dict({"weight": torch.full((3, 512), 0.1), "bias": torch.ones(3)})
        net(x).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["fc.weight", "fc.bias"]
    torch.testing.assert_close(model.fc.weight.grad, twin.fc.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_gradient_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_resnet()

        def forward(self, x):
            net = self.net
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
            for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return net.fc(net.avgpool(x).flatten(1))

    model = Checkpointed()
    twin = copy.deepcopy(model)
    report = pooling_ext.patch(model)
    assert any(entry.path == "net.layer1.0" for entry in report.replaced)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for net in (model, twin):
        net(x).square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-8, atol=1e-10)


def test_compiled():
    model = small_resnet()
    twin = copy.deepcopy(model)
    pooling_ext.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    compiled(x).square().mean().backward()
    twin(x).square().mean().backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            one.grad, other.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(model.bn1.running_var, twin.bn1.running_var)


DDP = """
import copy, os
import torch, torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import pooling_ext

rank = int(os.environ["RANK"])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://{file}", rank=rank, world_size=2)
torch.manual_seed(0)
plain = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4).double()
patched = copy.deepcopy(plain)
pooling_ext.patch(patched)
data = torch.randn(8, 3, 64, 64, dtype=torch.float64)
mine = data[4 * rank : 4 * rank + 4]

def step(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters()]

ddp = DistributedDataParallel(patched)
for _ in range(2):
    torch.testing.assert_close(
        step(ddp, mine), step(DistributedDataParallel(plain), mine), rtol=1e-8, atol=1e-10
    )
torch.testing.assert_close(patched.state_dict(), plain.state_dict(), rtol=1e-8, atol=1e-10)

# With statistics of all processes it is one process with the whole batch. (DistributedDataParallel itself
# refuses SyncBatchNorm on the CPU.)
if pooling_ext.backends.choose("batch_norm_act", data).name != "aten":
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(patched))
    assert isinstance(synced.layer1[0].bn1, nn.SyncBatchNorm)
    grads = step(synced, mine)
    for grad in grads:
        torch.distributed.all_reduce(grad, torch.distributed.ReduceOp.SUM)
        grad.div_(2)
    torch.testing.assert_close(grads, step(plain, data), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(synced.state_dict(), plain.state_dict(), rtol=1e-8, atol=1e-10)
torch.distributed.destroy_process_group()
"""


def test_distributed(tmp_path):
    """Two processes; gradients and statistics are those of the unpatched model."""
    from concurrent.futures import ThreadPoolExecutor

    code = DDP.replace("{file}", str(tmp_path / "store"))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda rank: run_python(code, RANK=str(rank)), range(2)))
    for result in results:
        assert result.returncode == 0, result.stderr
