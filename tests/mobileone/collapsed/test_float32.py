"""Float32 training against float64: the collapsed forms are no less accurate than the branches."""

import copy
import itertools
import os

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models import byobnet

from mobileone import MobileOneBlock, set_collapse
from mobileone.collapsed import Path, gram, path_of
from mobileone.collapsed import cpu_kernels as native
from tests.helpers import twin
from tests.helpers.processes import run_python
from tests.helpers.variants import slow

needs_kernels = pytest.mark.skipif(native.library() is None, reason="no compiler for the kernels")

DEPTHWISE = [
    {"in_chs": 6, "out_chs": 6, "groups": 6, "num_conv_branches": k, "stride": stride}
    for k in (1, 4)
    for stride in (1, 2)
]
POINTWISE = [
    {"in_chs": 16, "out_chs": 16, "kernel_size": 1},
    {"in_chs": 16, "out_chs": 24, "kernel_size": 1},
    {"in_chs": 96, "out_chs": 96, "kernel_size": 1, "num_conv_branches": 4},
    {"in_chs": 16, "out_chs": 24, "kernel_size": 1, "num_conv_branches": 2},
    {"in_chs": 160, "out_chs": 144, "kernel_size": 1, "num_conv_branches": 2},
]
STEM = {"in_chs": 3, "out_chs": 8, "kernel_size": 3, "stride": 2}
SIZES = [(2, 3, 3), (2, 3, 7), (4, 7, 7), (2, 18, 5), (2, 17, 34), (1, 40, 70)]
INPUTS = {
    "ordinary": lambda x: x,
    "small": lambda x: x * 1e-4,
    "dead channels": lambda x: x * (torch.arange(x.shape[1]) % 2)[:, None, None],
    "constant channels": lambda x: torch.where(
        torch.arange(x.shape[1])[:, None, None] % 2 == 0,
        x,
        torch.linspace(-3, 9, x.shape[1], dtype=x.dtype)[:, None, None],
    ),
    "means of 2 deviations": lambda x: torch.randn_like(x) + 2,
    "means of 3.8 deviations": lambda x: torch.randn_like(x) + 3.8,
    "means of 1000 deviations": lambda x: torch.randn_like(x) + 1000,
}


def smooth(size, knots):
    """Planes that vary slowly."""
    small = torch.randn(4, 6, knots, knots)
    return F.interpolate(small, size, mode="bicubic", align_corners=True)


def alike(channels, part, mean=0.0, pixels=14):
    """Channels of which a part of the variance is common."""
    common, own = torch.randn(4, 1, pixels, pixels), torch.randn(4, channels, pixels, pixels)
    return common * part**0.5 + own * (1 - part) ** 0.5 + mean


def cancel(block):
    """Have every output sum its inputs to nothing where they are equal."""
    for name, kernel in block.named_parameters():
        if name.endswith("conv.weight") and kernel.shape[1] > 1:
            kernel.data -= kernel.data.mean((1, 2, 3), keepdim=True)


def unsign(block):
    """Have every output add up what its inputs share."""
    for branch in block.conv_kxk:
        branch.conv.weight.data.abs_()


def laplace(block):
    """Have every 3×3 kernel be a second derivative."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    for branch in block.conv_kxk:
        weight = branch.conv.weight.data
        weight.copy_(kernel * (1 + 0.1 * torch.randn(len(weight), 1, 1, 1)))


@pytest.fixture
def choose(monkeypatch):
    """Have blocks train in a given form, whatever it costs."""
    return lambda path: monkeypatch.setattr("mobileone.collapsed.dispatch.choose", lambda *_: path)


def assert_as_accurate(
    shape, x, path, act=False, mode="auto", prepare=None, along=0.0, worst=None, noise=()
):
    """Ours and timm's block in float32, both against timm's in float64.

    By default without the rectifier: whether an output near 0 passes it is the toss of a rounding.

    Args:
        prepare: What is done to our block first; timm's takes its weights.
        along: How much of the output the gradient contains, the rest being noise. BatchNorm's
            gradient ignores that part, so that it is what is left of a difference.
        worst: Largest error, instead of twice timm's and a few roundings.
        noise: Tensors that are what is left of larger ones: ten times timm's, instead of twice.
    """
    ours, theirs = twin.build(shape, dtype=torch.float32)
    if prepare is not None:
        prepare(ours)
        theirs.load_state_dict(ours.state_dict())
    set_collapse(ours, mode)
    if not act:
        ours.act = theirs.act = torch.nn.Identity()
    exact = copy.deepcopy(theirs).double()
    assert path_of(ours, x) is path
    y = copy.deepcopy(exact)(x.double()).detach()
    scale = y.std() if along else 1.0
    g = (
        torch.randn_like(y) * (0.3 if along else 1.0)
        + along * (y - y.mean((0, 2, 3), True)) / scale
    )
    g = g.float()
    truth = twin.known(exact, x.double(), g.double())
    errors = twin.relative_errors(twin.step(ours.train(), x, g), truth)
    expected = twin.relative_errors(twin.step(theirs, x, g), truth)
    for name, error in errors.items():
        # both are a few roundings from the truth, of which neither is always the smaller; the
        # affine form takes the branches' own sums, in another order
        allowed = (10 if name in noise else 4 if path is Path.AFFINE else 2) * expected[name] + 3e-7
        allowed = allowed if worst is None else worst
        assert error <= allowed, (name, error, expected[name])


def form(shape):
    if "groups" in shape:
        return Path.DEPTHWISE
    one = shape["kernel_size"] == 1 and shape.get("num_conv_branches", 1) == 1
    return Path.AFFINE if one else Path.GRAM


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        *itertools.product(DEPTHWISE, SIZES),
        *itertools.product(POINTWISE[:2], [(4, 7, 7), (2, 17, 34), (1, 70, 70)]),
    ],
    ids=str,
)
def test_the_kernels_train_as_timms_block(shape, size, choose):
    choose(form(shape))
    x = twin.feature_map(size[0], shape["in_chs"], *size[1:], dtype=torch.float32)
    assert_as_accurate(shape, x, form(shape), act=True)


@needs_kernels
@pytest.mark.parametrize("along", [0.0, 1.0])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("shape", [*DEPTHWISE, *POINTWISE], ids=str)
def test_no_less_accurate_than_the_branches(shape, kind, along, choose):
    choose(form(shape))
    x = INPUTS[kind](twin.feature_map(8, shape["in_chs"], 14, 14)).float()
    assert_as_accurate(shape, x, form(shape), along=along)


@needs_kernels
@pytest.mark.parametrize("shape", [*DEPTHWISE, *POINTWISE], ids=str)
def test_values_near_overflow_keep_their_digits(shape, choose):
    """timm's block gives no numbers there, or zeros: what ours gives must be right by itself."""
    choose(form(shape))
    x = (twin.feature_map(4, shape["in_chs"], 7, 7) * 2e17).float()
    assert_as_accurate(shape, x, form(shape), worst=3e-6)


@needs_kernels
@pytest.mark.parametrize("along", [0.0, 1.0])
@pytest.mark.parametrize("shape", [*DEPTHWISE, *POINTWISE, STEM], ids=str)
def test_always_no_less_accurate_where_inputs_are_nearly_equal(shape, along):
    """Smooth images, and channels alike to 1 %: there sums cancel, in the Gram form most of all."""
    x = twin.feature_map(8, shape["in_chs"], 14, 14)
    near = F.interpolate(torch.randn_like(x[:, :, :3, :3]), 14, mode="bilinear")
    for common in (torch.randn_like(x[:, :1]), near):
        image = (common + 0.01 * torch.randn_like(x)).float()
        path = Path.DEPTHWISE if "groups" in shape else Path.GRAM
        assert_as_accurate(shape, image, path, mode="always", along=along)


@needs_kernels
@pytest.mark.parametrize("along", [0.0, 1.0])
@pytest.mark.parametrize("mean", [0.0, 3.8])
@pytest.mark.parametrize("part", [0.5, 0.72, 0.86, 0.97])
@pytest.mark.parametrize(("channels", "branches"), [(64, 4), (160, 4), (64, 1)])
def test_no_less_accurate_where_the_weights_cancel(channels, branches, part, mean, along):
    """On both sides of every limit from which something runs in float64."""
    shape = {"in_chs": channels, "out_chs": channels, "kernel_size": 1}
    shape["num_conv_branches"] = branches
    x = alike(channels, part, mean)
    assert_as_accurate(shape, x, Path.GRAM, mode="always", prepare=cancel, along=along)


@needs_kernels
@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("part", [0.8, 0.97, 0.9999])
def test_no_less_accurate_where_all_outputs_are_one(part, branches):
    """Kernels without a sign see what the channels share, and the gradient ignores just that."""
    shape = {"in_chs": 64, "out_chs": 72, "kernel_size": 1, "num_conv_branches": branches}
    x = alike(64, part)
    assert_as_accurate(shape, x, Path.GRAM, mode="always", prepare=unsign, along=1.0)


@needs_kernels
@pytest.mark.parametrize("along", [0.0, 1.0])
@pytest.mark.parametrize("mean", [0.0, 3.0, 300.0])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [14, 56])
def test_depthwise_derivatives_of_smooth_planes_are_as_accurate(size, stride, mean, along):
    shape = {"in_chs": 6, "out_chs": 6, "groups": 6, "stride": stride}
    x = smooth(size, 3) + mean
    assert_as_accurate(shape, x, Path.DEPTHWISE, mode="always", prepare=laplace, along=along)


@needs_kernels
@pytest.mark.parametrize("seed", [1, 3])
def test_a_fresh_network_on_digits_is_more_accurate(seed):
    """Gray, smooth, mostly background: some branch of the stem sees nearly nothing of them."""
    torch.manual_seed(seed)
    digits = torch.from_numpy(load_digits().images[32 * seed :][:32]).float()[:, None] / 16
    gray = F.interpolate(digits, 64, mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    x = (gray - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / 0.225
    ours = timm.create_model("mobileone_s0", num_classes=10)
    theirs = byobnet.mobileone_s0(num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    g = torch.randn(32, 10)
    truth = twin.step(copy.deepcopy(theirs).double(), x.double(), g.double())
    weights = [name for name, _ in ours.named_parameters()]
    found, expected = (gradient_and_logits(twin.step(m, x, g), weights) for m in (ours, theirs))
    for ours, theirs, exact in zip(
        found, expected, gradient_and_logits(truth, weights), strict=True
    ):
        assert (ours - exact).norm() < 0.6 * (theirs - exact).norm()


def gradient_and_logits(step, weights):
    return torch.cat([step[name].flatten().double() for name in weights]), step["y"].double()


@needs_kernels
def test_the_product_is_as_accurate_where_patches_are_many():
    """The error of C falls with their number, that of a rounded kernel does not."""
    shape = {"in_chs": 3, "out_chs": 8, "kernel_size": 1, "num_conv_branches": 2}
    ours, theirs = twin.build(shape, dtype=torch.float32)
    cancel(ours)
    theirs.load_state_dict(ours.state_dict())
    set_collapse(ours, "always")
    ours.act = theirs.act = torch.nn.Identity()
    x = alike(3, 0.98, pixels=160)
    exact = copy.deepcopy(theirs).double()(x.double())
    error, expected = ((block(x) - exact).norm() for block in (ours, theirs))
    assert error < 0.6 * expected


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_under_autocast_products_stay_narrow_whatever_care_is_needed(narrow, monkeypatch):
    dtypes, product = [], gram._product
    monkeypatch.setattr(gram, "_product", lambda *a: dtypes.append(a[4]) or product(*a))
    shape = {"in_chs": 64, "out_chs": 64, "kernel_size": 1, "num_conv_branches": 4}
    block, _ = twin.build(shape, dtype=torch.float32)
    cancel(block)
    set_collapse(block, "always")
    x = alike(64, 0.999)
    block(x)
    for image in (x, x.to(narrow)):  # that of the network, and what a block before it returns
        with torch.autocast("cpu", narrow):
            assert block(image).dtype is narrow
    assert dtypes == [torch.float64, narrow, narrow]


@needs_kernels
@pytest.mark.parametrize("mean", [2.5, 1000.0])
@pytest.mark.parametrize("shape", DEPTHWISE, ids=str)
def test_depthwise_sums_are_about_the_mean_and_not_its_float(shape, mean):
    """On both sides of the limit from which a channel is summed in float64; timm's lose digits."""
    block, exact = twin.build(shape, dtype=torch.float32)
    set_collapse(block, "always")
    block.act = exact.act = torch.nn.Identity()
    x, name = torch.randn(4, 6, 9, 9) + mean, "conv_kxk.0.conv.weight"
    g = torch.randn_like(exact(x))
    truth = twin.step(exact.double(), x.double(), g.double())
    error = twin.relative_errors(twin.step(block, x, g), truth)[name]
    assert error < 2e-6


def test_planes_too_small_for_the_kernels_take_another_form():
    for size in [(4, 1, 1), (3, 1, 5), (2, 2, 2)]:
        x = twin.feature_map(size[0], 6, *size[1:], dtype=torch.float32)
        path = path_of(MobileOneBlock(6, 6, groups=6), x)
        assert path is not Path.DEPTHWISE
        assert_as_accurate(DEPTHWISE[0], x, path)


@needs_kernels
def test_sums_do_not_depend_on_the_number_of_threads(choose):
    choose(Path.DEPTHWISE)
    block = MobileOneBlock(5, 5, groups=5)
    x = twin.feature_map(3, 5, 20, 20, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        block.zero_grad()
        results.append(twin.step(block, x, torch.ones_like(x)))
    torch.set_num_threads(threads)
    for name in ("y", "x", "conv_scale.bn.weight"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=0)


@needs_kernels
def test_not_a_number_passes_the_kernels(choose):
    forms = (Path.DEPTHWISE, MobileOneBlock(2, 2, groups=2)), (Path.AFFINE, MobileOneBlock(2, 2, 1))
    for path, block in forms:
        choose(path)
        x = torch.ones(2, 2, 4, 4)
        x[0, 0, 0, 0] = torch.nan
        assert block(x).isnan().any()


def test_without_a_compiler_the_branches_run(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    for shape in [DEPTHWISE[0], POINTWISE[0]]:
        x = twin.feature_map(4, shape["in_chs"], 14, 14, dtype=torch.float32)
        block = MobileOneBlock(**shape)
        path = path_of(block, x)
        assert path in (Path.BRANCHES, Path.GRAM)
        assert_as_accurate(shape, x, path)
        set_collapse(block, "always")
        assert path_of(block, x) is Path.GRAM


@pytest.mark.parametrize(
    "compiler",
    ["absent", slow("broken"), slow("unwanted")],
)
def test_the_build_fails_with_a_warning_at_most(compiler, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    code = (
        "import torch, os; os.environ.pop('CXX', None); from mobileone import MobileOneBlock;"
        "from mobileone.collapsed import cpu_kernels; assert cpu_kernels.library() is None;"
        "MobileOneBlock(4, 4, groups=4)(torch.ones(2, 4, 5, 5))"
    )
    variables = {
        "PATH": {"absent": "/nowhere", "broken": str(tmp_path)}.get(compiler, os.environ["PATH"]),
        "MOBILEONE_NATIVE": "0" if compiler == "unwanted" else "1",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = run_python("-c", code, variables=variables)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == (compiler != "unwanted")
    assert all("without its CPU kernels" in line for line in lines)
