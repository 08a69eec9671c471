"""Patched models in use: copies and pickles, checkpointing, compiling, several processes."""

from __future__ import annotations

import copy
import io
import pickle

import torch
import torchvision
from helpers import run_python
from patching_cases import classes, resnet18, small, small_resnet
from torch import nn

import pooling_ext
from pooling_ext.ops import conv_speeds


def squeezenet():
    return torchvision.models.squeezenet1_1(weights=None)


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


def test_channels_last_and_lower_precision():
    model = squeezenet().eval().to(torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(1, 3, 96, 96).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        pooling_ext.patch(model)
        actual = model(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_max_pooling_models_are_bitwise_equal(monkeypatch):
    """SqueezeNet's features use max pooling alone, which is exact, and here PyTorch's convolutions."""
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: (0.5, True))
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
from patching_cases import classes, resnet18, small, small_resnet
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
