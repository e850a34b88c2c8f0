"""The stacked form, made for GPUs: exact, as accurate as the branches, few launches, no waiting."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mobileone import MobileOneBlock
from mobileone.collapsed import Path, dispatch, path_of, stacked
from mobileone.collapsed.branches import describe, parameters
from mobileone.collapsed.cost_model import Setting, choose
from tests.helpers import twin
from tests.mobileone.collapsed import test_float32 as adverse
from tests.mobileone.collapsed.test_collapsed import SHAPES, SIZES

# of the blocks of S0 (k = 4), the stem first
S0 = [
    {"in_chs": 3, "out_chs": 8, "stride": 2, "num_conv_branches": 4},
    {"in_chs": 8, "out_chs": 8, "groups": 8, "num_conv_branches": 4},
    {"in_chs": 8, "out_chs": 8, "groups": 8, "stride": 2, "num_conv_branches": 4},
    {"in_chs": 8, "out_chs": 8, "kernel_size": 1, "num_conv_branches": 4},
    {"in_chs": 8, "out_chs": 12, "kernel_size": 1, "num_conv_branches": 4},
]


@pytest.fixture(autouse=True)
def stack(monkeypatch):
    """Have every block train in the stacked form."""
    monkeypatch.setattr(dispatch, "choose", lambda *_: Path.STACKED)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_trains_as_timms_block(shape, size, channels_last):
    ours, theirs = twin.build(shape)
    x = twin.feature_map(size[0], shape["in_chs"], *size[1:])
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    assert path_of(ours, x) is Path.STACKED
    g = torch.randn_like(ours.eval()(x))
    twin.assert_same(twin.step(ours.train(), x, g), twin.step(theirs, x, g))


@pytest.mark.parametrize("along", [0.0, 1.0])
@pytest.mark.parametrize("kind", adverse.INPUTS)
@pytest.mark.parametrize("shape", [*adverse.DEPTHWISE, *adverse.POINTWISE, adverse.STEM], ids=str)
def test_no_less_accurate_than_the_branches(shape, kind, along):
    x = adverse.INPUTS[kind](twin.feature_map(8, shape["in_chs"], 14, 14)).float()
    # BatchNorm takes all of this gradient but ε's part: the factor of a kernel of one tap
    noise = ("conv_scale.conv.weight",) if "groups" in shape else ()
    adverse.assert_as_accurate(shape, x, Path.STACKED, along=along, noise=noise)


@pytest.mark.parametrize("along", [0.0, 1.0])
@pytest.mark.parametrize("prepare", [adverse.cancel, adverse.unsign])
@pytest.mark.parametrize("part", [0.5, 0.72, 0.97, 0.9999])
@pytest.mark.parametrize("mean", [0.0, 3.8])
def test_no_less_accurate_where_sums_cancel(prepare, part, mean, along):
    shape = {"in_chs": 64, "out_chs": 72, "kernel_size": 1, "num_conv_branches": 4}
    x = adverse.alike(64, part, mean)
    adverse.assert_as_accurate(shape, x, Path.STACKED, prepare=prepare, along=along)


@pytest.mark.parametrize("mean", [0.0, 3.0, 300.0])
@pytest.mark.parametrize("shape", [*adverse.DEPTHWISE, adverse.STEM], ids=str)
def test_no_less_accurate_on_smooth_planes(shape, mean):
    x = adverse.smooth(56, 3)[:, : shape["in_chs"]] + mean
    adverse.assert_as_accurate(shape, x, Path.STACKED, prepare=adverse.laplace, along=1.0)


class Record(TorchDispatchMode):
    """Notes every operation that runs a kernel; views and allocations run none."""

    def __init__(self):
        super().__init__()
        self.names, self.float64 = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = function._schema.returns
        is_view = any(r.alias_info and not r.alias_info.is_write for r in returns)
        name = function._schema.name.removeprefix("aten::")
        if not is_view and not name.startswith(("empty", "new_empty", "detach")):
            self.names.append(name)
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype is torch.float64:
            self.float64.append(name)
        return result


def record(block, x, g, autocast=False):
    with Record() as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(x)
        y.backward(g.to(y.dtype))
    return seen


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", S0, ids=str)
def test_a_step_launches_no_more_than_timms_and_never_waits(shape, autocast, monkeypatch):
    monkeypatch.setattr(dispatch, "_is_ordinary", lambda x: True)  # which a dispatch mode is not
    ours, theirs = twin.build(shape, dtype=torch.float32)
    x = twin.feature_map(2, shape["in_chs"], 8, 8, dtype=torch.float32).requires_grad_()
    g = torch.randn_like(theirs(x))
    seen, expected = (record(block, x, g, autocast) for block in (ours, theirs))
    assert len(seen.names) <= len(expected.names), seen.names
    waits = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal"}
    assert not waits & set(seen.names)
    assert not seen.float64
    setting = Setting("cuda", torch.float32, False)
    assert choose(describe(ours), 1000, 10, setting, "always") is Path.STACKED


@pytest.mark.parametrize("shape", S0, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensors_of_a_gpu_are_never_read(shape, dtype):
    """Fake ones have no values: to ask for one is an error."""
    with FakeTensorMode(), torch.device("cuda"):
        block = MobileOneBlock(**{"kernel_size": 3, **shape})
        x = torch.empty(2, shape["in_chs"], 8, 8)
        geometry, tensors = describe(block), [p.detach() for p in parameters(block)]
        y, *kept = stacked.forward(x, tensors, geometry, True, dtype, True)
        grads = stacked.backward(torch.empty_like(y), x, y, kept, tensors, geometry, True)
    assert y.dtype == dtype and y.device.type == "cuda"
    for grad, tensor in zip(grads, [x, *tensors], strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (tensor.shape, tensor.dtype, tensor.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", S0, ids=str)
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_autocast_is_as_accurate_as_the_branches(shape, dtype, shift):
    ours, theirs = twin.build(shape, dtype=torch.float32)
    ours.act = theirs.act = nn.Identity()
    exact = copy.deepcopy(theirs).double()
    x = twin.feature_map(8, shape["in_chs"], 14, 14) + shift
    wide = x.clone().requires_grad_()
    truth = exact(wide)
    g = torch.randn_like(truth)
    truth.backward(g)
    steps = []
    for block in (ours, theirs):
        own = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = block(own)
        assert y.dtype is dtype
        y.backward(g.to(dtype))
        found = {name: p.grad for name, p in block.named_parameters()}
        steps.append({"y": y, "x": own.grad, **found, **dict(block.named_buffers())})
    known = {"y": truth, "x": wide.grad, **dict(exact.named_buffers())}
    known |= {name: p.grad for name, p in exact.named_parameters()}
    for name, value in known.items():
        if not value.is_floating_point():
            continue
        error, allowed = (twin.rms(step[name].double() - value) for step in steps)
        assert error <= 2 * allowed + 1e-3 * twin.rms(value), (name, error, allowed)


def test_the_memory_kept_is_that_of_the_input():
    block = MobileOneBlock(64, 64, 1, num_conv_branches=4)
    x = torch.randn(4, 64, 20, 20).requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x)
    weights = sum(p.numel() for p in block.parameters()) + 6 * 64 * 64
    assert sum(kept.values()) <= 4 * (2 * x.numel() + 2 * weights)  # x, y


def test_few_branches_or_several_eps_run_the_branches_on_a_gpu():
    """Stacking two BatchNorms would launch more than it saves, and one has one ε."""
    setting = Setting("cuda", torch.float32, False)
    blocks = [MobileOneBlock(8, 8, 1), MobileOneBlock(8, 8, groups=8, num_conv_branches=4)]
    blocks[1].identity.eps = 1e-3
    for block in blocks:
        assert choose(describe(block), 1000, 10, setting, "always") is Path.BRANCHES
