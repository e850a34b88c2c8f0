"""Quantized blocks against one convolution a branch, BatchNorm and rounding, in float64."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from timm.models import byobnet, fastvit
from torch import nn

import mobileone
from mobileone import MobileOneBlock
from mobileone.quantization import SCHEMES, calibrate_quantization, conditions, quantize
from mobileone.quantization.deployed import QuantizedConv2d
from mobileone.quantization.layer import QuantizedLayer
from mobileone.quantization.rounding import ActivationQuantizer, WeightQuantizer
from tests.helpers import twin
from tests.helpers.norms import randomize_bn
from tests.helpers.variants import slow

SHAPES = [
    {"in_chs": 3, "out_chs": 8, "stride": 2},  # stem
    {"in_chs": 8, "out_chs": 8, "groups": 8, "num_conv_branches": 4},
    {"in_chs": 8, "out_chs": 8, "groups": 8, "stride": 2, "num_conv_branches": 2},
    {"in_chs": 8, "out_chs": 8, "groups": 8, "use_skip": False},
    {"in_chs": 8, "out_chs": 8, "groups": 8, "use_scale": False},
    {"in_chs": 8, "out_chs": 8, "kernel_size": 1, "num_conv_branches": 3},
    {"in_chs": 8, "out_chs": 12, "kernel_size": 1},
    {"in_chs": 8, "out_chs": 8, "kernel_size": 5, "groups": 2},
    {"in_chs": 8, "out_chs": 12, "groups": 4, "num_conv_branches": 2},
    {"in_chs": 8, "out_chs": 8, "groups": 8, "dilation": 2},
]
DEAD = 0.1


class Reference(nn.Module):
    """The block as the paper draws it, on running or a batch's statistics, and rounding on top."""

    def __init__(self, block, step, zero_point, kappa, on_batch=False):
        super().__init__()
        self.block, self.zero_point, self.kappa = block, zero_point, kappa
        self.on_batch = on_batch
        self.step = nn.Parameter(step.clone())

    def branches(self):
        """Branches as (convolution of the input, kernel as the folded one has it, BatchNorm)."""
        block, conv = self.block, self.block.conv_kxk[0].conv
        margin = conv.kernel_size[0] // 2
        for branch in block.conv_kxk:
            yield branch.conv, branch.conv.weight, branch.bn
        if block.conv_scale is not None:
            yield (
                block.conv_scale.conv,
                F.pad(block.conv_scale.conv.weight, [margin] * 4),
                block.conv_scale.bn,
            )
        if block.identity is not None:
            kernel = torch.zeros_like(conv.weight)
            for channel in range(len(kernel)):
                kernel[channel, channel % kernel.shape[1], margin, margin] = 1
            yield nn.Identity(), kernel, block.identity

    def forward(self, x):
        rounded = self.round_input(x)
        noise = self.kappa * self.step.detach() ** 2 / 12
        y, kernel, bias = 0, 0, 0
        for convolve, weight, norm in self.branches():
            added, z = noise * weight.square().sum((1, 2, 3)), convolve(rounded)
            mean, var = norm.running_mean, norm.running_var
            if self.on_batch:
                norm.train()(z.detach())  # moves the running statistics
                var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
            scale = norm.weight / (var + added + norm.eps).sqrt()
            scale = scale * (var >= DEAD * added)
            z = z - mean.view(-1, 1, 1)
            y = y + scale.view(-1, 1, 1) * z + norm.bias.view(-1, 1, 1)
            kernel = kernel + scale.view(-1, 1, 1, 1) * weight
            bias = bias + norm.bias - scale * mean
        conv = self.block.conv_kxk[0].conv
        steps = kernel.detach().abs().amax((1, 2, 3)) / 127
        steps = steps.clamp(min=steps.max() / 65536)  # of dead channels
        per = steps.view(-1, 1, 1, 1)
        error = (kernel / per).round() * per - kernel
        y = y + F.conv2d(
            rounded, error.detach(), None, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        unit = steps * self.step.detach()  # of an integer bias
        y = y + ((bias / unit).round() * unit - bias).detach().view(-1, 1, 1)
        return self.block.act(y)

    def round_input(self, x):
        low, high = -self.zero_point, 255 - self.zero_point
        code = (x / self.step).round()
        inside = (code >= low) & (code <= high)
        value = torch.where(inside, x, 0)
        rest = torch.where(inside, code - x / self.step, code.clamp(low, high)).detach()
        factor = (x.numel() * 255) ** -0.5
        step = self.step * factor + (self.step * (1 - factor)).detach()
        return value + rest * step


def build(shape):
    block = randomize_bn(MobileOneBlock(**shape, dtype=torch.float64))
    for parameter in block.parameters():
        if parameter.ndim == 4:
            nn.init.normal_(parameter)
    block.conv_kxk[0].bn.running_var[0] = 1e-3  # dead where κ is large
    return block.train()


def quantized(block, x, scheme="int8", statistics="frozen", kappa=1.0, scales="learned"):
    """The block in quantized form, its largest inputs clipped."""
    layer = QuantizedLayer(copy.deepcopy(block), scheme, statistics, kappa, scales, image=False)
    layer.input_quantizer.observe(0.9 * x.min(), 0.9 * x.max())
    return layer


def steps(layer, reference, x):
    """A training step of each, the reference's names being the layer's."""
    g = torch.randn_like(layer.eval()(x))
    ours = twin.step(layer.train(), x, g)
    theirs = twin.step(reference, x, g)
    theirs["input_quantizer.step"] = theirs.pop("step")
    theirs = {name.removeprefix("block."): value for name, value in theirs.items()}
    return ours, theirs


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kappa", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_its_branches_and_rounding(shape, kappa, signed):
    block = build(shape)
    x = twin.feature_map(3, shape["in_chs"], 9, 8) - 0.5 * signed
    layer = quantized(block, x, kappa=kappa)
    quantizer = layer.input_quantizer
    reference = Reference(
        copy.deepcopy(block), quantizer.step.detach(), int(quantizer.zero_point), kappa
    )
    ours, theirs = steps(layer, reference, x)
    twin.assert_same({name: ours[name] for name in theirs}, theirs)
    unnamed = {"weight_quantizer.clip", "input_quantizer.zero_point"}
    assert ours.keys() - theirs.keys() == unnamed
    assert kappa < 300 or (ours["conv_kxk.0.conv.weight"][0] == 0).all()


@pytest.mark.parametrize("kappa", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_statistics_are_those_of_the_branches(shape, kappa):
    block = build(shape)
    with torch.no_grad():
        block.conv_kxk[0].conv.weight[0] *= 1e-3
    x = twin.feature_map(3, shape["in_chs"], 9, 8)
    layer = quantized(block, x, statistics="exact", kappa=kappa)
    step = layer.input_quantizer.step.detach()
    reference = Reference(copy.deepcopy(block), step, 0, kappa, on_batch=True)
    ours, theirs = steps(layer, reference, x)
    twin.assert_same({name: ours[name] for name in theirs}, theirs)


@pytest.mark.parametrize("stride", [1, 2])
def test_exact_statistics_on_the_kernels_of_depthwise_blocks(stride):
    """In float32, on the kernels of the CPU, against float64."""
    block = build({"in_chs": 8, "out_chs": 8, "groups": 8, "stride": stride})
    x = twin.feature_map(4, 8, 12, 11)
    layer = quantized(block, x, statistics="exact")
    # what is next to a middle may round either way
    layer.input_quantizer.forward = lambda x: x
    layer.round = lambda weight, bias: (weight, bias)
    g, narrow = torch.randn_like(layer.eval()(x)), copy.deepcopy(layer).float()
    truth, ours = twin.step(layer.train(), x, g), twin.step(narrow.train(), x.float(), g.float())
    names = ("x", "conv_kxk.0.conv.weight", "conv_scale.bn.running_var")
    twin.assert_same({n: ours[n] for n in names}, {n: truth[n] for n in names}, 1e-4)


def test_the_diagonal_estimate_takes_inputs_for_uncorrelated():
    """RepQ-BNEst: the sum of two equal channels has half of its variance."""
    block = build({"in_chs": 2, "out_chs": 2, "kernel_size": 1, "use_skip": False})
    with torch.no_grad():
        block.conv_kxk[0].conv.weight.fill_(1.0)
    x = twin.feature_map(4, 1, 9, 9).expand(-1, 2, -1, -1)
    found = {}
    for statistics in ("exact", "diagonal"):
        layer = quantized(block, x, statistics=statistics, kappa=0.0)
        norm = layer.norms()[0]
        norm.momentum = 1.0
        layer(x)
        found[statistics] = norm.running_var
    torch.testing.assert_close(found["exact"], 2 * found["diagonal"])


def test_a_channel_that_rounding_silences_explodes_without_noise_in_its_variance():
    """The trap of batch statistics: a weak channel rounds to 0, its variance is 0, a = γ / √ε."""
    block = build({"in_chs": 8, "out_chs": 8, "groups": 8})
    x = twin.feature_map(4, 8, 9, 9)
    x[:, 0] *= 1e-3  # below half a step
    largest = {}
    for kappa in (0.0, 1.0):
        layer = quantized(block, x, statistics="exact", kappa=kappa)
        for norm in layer.norms():
            norm.momentum = 1.0
        layer(x)
        shown = x.clone()
        shown[:, 0] = 3 * layer.input_quantizer.step  # the channel shows itself, by three steps
        largest[kappa] = layer.eval()(shown)[:, 0].abs().max()
    assert largest[0.0] > 10 and largest[1.0] < 2


TIMMS = {
    "mobileone": lambda: byobnet.MobileOneBlock(8, 8, 3, num_conv_branches=2, group_size=1),
    "repvgg": lambda: byobnet.RepVggBlock(8, 8, 3),
    "repvgg_stride": lambda: byobnet.RepVggBlock(8, 12, 3, stride=2),
    "fastvit": lambda: fastvit.MobileOneBlock(8, 8, 3, use_se=True),
    "large_kernel": lambda: fastvit.ReparamLargeKernelConv(8, 16, 7, 2, 1, 3),
    "mixer": lambda: fastvit.RepMixer(8, 3, layer_scale_init_value=0.3),
    "position": lambda: fastvit.RepConditionalPosEnc(8, 8, (7, 7)),
    "conv_norm": lambda: ConvNormAct(8, 8, 3, groups=8),
}


@pytest.mark.parametrize("name", TIMMS)
def test_timms_blocks_fold_to_what_they_compute(name):
    block = randomize_bn(TIMMS[name]().double()).eval()
    x = twin.feature_map(2, 8, 9, 9)
    layer = quantized(block, x, kappa=0.0)
    layer.input_quantizer.forward = lambda x: x
    layer.round = lambda weight, bias: (weight, bias)
    twin.assert_same({"y": layer(x)}, {"y": block(x)})
    assert set(layer.state_dict()) > set(block.state_dict())
    layer(x).square().sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if "quantizer" not in n)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", ["mobileone_mu0", "repvgg", slow("fastvit_t8")])
def test_the_deployed_network_is_the_trained_one_to_the_last_bit(model, scheme):
    if model == "repvgg":  # as timm's, of a block a stage
        blocks = byobnet._rep_vgg_bcfg(d=(1, 1, 1, 1), wf=(0.25, 0.25, 0.25, 0.25))
        config = replace(byobnet.model_cfgs["repvgg_a0"], blocks=blocks, stem_chs=16)
        network = byobnet.ByobNet(config, num_classes=4)
    else:
        network = timm.create_model(model, num_classes=4)
    x = torch.rand(2, 3, 64, 64)
    network.train()(x)
    network = quantize(network.eval(), scheme)
    calibrate_quantization(network, [x])
    fused = mobileone.reparameterize(network)
    in_training, deployed = conditions(network), conditions(fused)
    assert len(in_training) == len(deployed)
    assert max(in_training.values()) == pytest.approx(max(deployed.values()), rel=0.2)
    assert any(type(module) is QuantizedConv2d for module in fused.modules())
    assert not any(isinstance(module, QuantizedLayer) for module in fused.modules())
    torch.testing.assert_close(fused(x), network(x), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_processes_that_see_different_images_find_the_same_steps(scheme):
    block = randomize_bn(MobileOneBlock(3, 8, kernel_size=3))
    # so much noise that the folded kernels differ where the steps do
    network = quantize(nn.Sequential(block, nn.Conv2d(8, 4, 1)), scheme, kappa=3000.0)
    copies, seen = [copy.deepcopy(network), network], ([], [])
    batches = [torch.randn(2, 3, 16, 16), 0.1 * torch.randn(2, 3, 16, 16)]
    for model, x, values in zip(copies, batches, seen, strict=True):
        calibrate_quantization(model, [x], lambda v, values=values: values.append(v) or v)
    for model, x in zip(copies, batches, strict=True):
        common = iter([torch.maximum(*pair) for pair in zip(*seen, strict=True)])
        calibrate_quantization(model, [x], lambda v, common=common: next(common))
    ours, theirs = (model.state_dict() for model in copies)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, msg=name)


def test_what_is_pooled_or_added_is_rounded_before():
    for model in ("mobileone_s0", "repvgg_a0"):
        network = quantize(timm.create_model(model, num_classes=4).eval())
        layers = {n: m for n, m in network.named_modules() if isinstance(m, QuantizedLayer)}
        last = [name for name in layers if "head" not in name][-1:]
        assert [n for n, m in layers.items() if m.output_quantizer is not None] == last
    attended = nn.Sequential(byobnet.RepVggBlock(3, 8), nn.Conv2d(8, 8, 1), nn.GELU())
    attended[0].attn = nn.Sigmoid()
    assert quantize(attended)[0].output_quantizer is not None
    assert attended[1].output_quantizer is not None


def test_a_plain_convolution_may_be_the_first():
    network = quantize(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), byobnet.RepVggBlock(8, 8)))
    calibrate_quantization(network, [torch.randn(2, 4, 16, 16)])
    assert network[0].fuse().groups == 2


def test_what_is_unknown_is_refused():
    with pytest.raises(ValueError, match=r"`scheme` \(='int2'\) must be one of int8, int4"):
        quantize(build(SHAPES[1]), "int2")
    with pytest.raises(ValueError, match=r"`kappa` \(=-1\) must be at least 0"):
        quantize(build(SHAPES[1]), kappa=-1)
    with pytest.raises(ValueError, match="ResNet has no block with branches to fold"):
        quantize(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match=r"stem.* \(timm.*ConvNorm\) folds in a way"):
        quantize(timm.create_model("repvit_m0_9"))
    with pytest.raises(ValueError, match=r"RepMixer.*choose 'frozen'"):
        quantize(timm.create_model("fastvit_t8"), statistics="exact")
    network = quantize(timm.create_model("mobileone_s0"))
    with pytest.raises(ValueError, match="no input step: call calibrate_quantization"):
        mobileone.reparameterize(network)
    with pytest.raises(ValueError, match="no images to calibrate on"):
        calibrate_quantization(network, [])


def test_float_weights_load_and_keep_their_names():
    model = timm.create_model("mobileone_s0", num_classes=4)
    weights = model.state_dict()
    network = quantize(copy.deepcopy(model))
    assert set(weights) < set(network.state_dict())
    network.load_state_dict(weights)
    quantized = copy.deepcopy(network.state_dict())
    quantized["stem.input_quantizer.step"].fill_(0.25)
    network.load_state_dict(quantized)
    assert network.stem.input_quantizer.step == 0.25


def test_weights_of_few_bits_have_few_values():
    x = twin.feature_map(2, 16, 9, 9)
    block = build({"in_chs": 16, "out_chs": 16, "kernel_size": 1})
    for scheme, most in {"int8": 255, "int4": 15, "palette4": 16}.items():
        layer = quantized(block, x, scheme)
        layer.weight_quantizer.fit(*layer.fold(), layer.input_quantizer.step)
        codes = layer.fuse().reparam_conv.weight
        assert codes.dtype is torch.int8 and 8 < codes.unique().numel() <= most


def test_clips_follow_their_gradient_back():
    weight, quantizer = torch.randn(6, 40, dtype=torch.float64), WeightQuantizer(6, "int4").double()
    quantizer.fit(weight, torch.zeros(6), torch.tensor(1.0))
    with torch.no_grad():
        quantizer.clip.mul_(1.5)
    (quantizer(weight, torch.zeros(6), torch.tensor(1.0)) - weight).square().sum().backward()
    assert (quantizer.clip.grad > 0).all()


def test_an_entry_of_a_table_gets_the_mean_gradient_of_its_weights():
    weight, quantizer = torch.randn(6, 40), WeightQuantizer(6, "palette4")
    quantizer.fit(weight, torch.zeros(6), torch.tensor(1.0))
    rounded, g = quantizer(weight, torch.zeros(6), torch.tensor(1.0)), torch.randn(6, 40)
    rounded.backward(g)
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (rounded.detach() / scale).round()
    for value, grad in zip(quantizer.table.detach(), quantizer.table.grad, strict=True):
        torch.testing.assert_close(grad, (g * scale)[codes == value.round()].mean())


def test_a_table_stays_within_8_bits():
    quantizer = WeightQuantizer(1, "palette4")
    with torch.no_grad():
        quantizer.table[-1] = 200
    weight, bias = torch.tensor([[-1.0, 0.9, 1.7, 2.0]]), torch.zeros(1)
    steps = quantizer.steps(weight, bias, torch.tensor(1.0)).fill_(0.01)
    assert quantizer.codes(weight, steps).max() == 127


def test_biases_fit_int32_and_dead_channels_have_steps():
    x = twin.feature_map(2, 8, 9, 9)
    block = build({"in_chs": 8, "out_chs": 8, "groups": 8})
    with torch.no_grad():
        for branch in [*block.conv_kxk, block.conv_scale]:
            branch.conv.weight[0] = 1e-12
            branch.conv.weight[1] = 0
        block.identity.weight[:2] = 0
        block.conv_scale.bn.bias[0] = 1e3
    layer = quantized(block, x, kappa=0.0)
    conv = layer.fuse().reparam_conv
    counts = conv.bias.double() / (conv.input.scale * conv.weight_scale.double())
    assert counts.abs().max() < 2**31 and (conv.weight_scale > 0).all()
    expected = block.eval()(layer.input_quantizer(x))
    torch.testing.assert_close(layer.eval()(x), expected, atol=0.1, rtol=0.01)


def test_a_channel_of_noise_becomes_its_constant():
    """Dead inputs: the float block divides by sqrt(ε), and one step of rounding is the output."""
    block = build({"in_chs": 8, "out_chs": 8, "kernel_size": 1, "use_skip": False})
    block.conv_kxk[0].bn.running_var[3] = 1e-9
    x = twin.feature_map(2, 8, 9, 9)
    plain, aware = quantized(block, x, kappa=0.0), quantized(block, x, kappa=1.0)
    step = plain.input_quantizer.step
    assert conditions(plain)[""] > 1 and conditions(aware)[""] < 0.2 * conditions(plain)[""]
    y = aware.eval()(x)[:, 3]
    constant = block.conv_kxk[0].bn.bias[3].relu()
    torch.testing.assert_close(y, constant.expand_as(y), atol=1e-6, rtol=0)
    assert plain(x + step)[:, 3].std() > 0.1


def test_rounding_is_of_the_variance_that_folding_adds():
    x = torch.rand(100_000, dtype=torch.float64)
    quantizer = ActivationQuantizer().double()
    quantizer.observe(x.min(), x.max())
    error = quantizer(x).detach() - x
    torch.testing.assert_close(error.var(), quantizer.variance(), rtol=0.02, atol=0)


@pytest.mark.parametrize("step", [-0.1, 0.0, torch.inf, -torch.inf])
def test_a_step_that_training_drives_out_of_its_bounds_stays_usable(step):
    """Outputs and gradients are numbers, what ships is what is trained."""
    block = build(SHAPES[1])
    x = twin.feature_map(2, 8, 9, 9)
    layer = quantized(block, x).float()
    layer.input_quantizer.step.data.fill_(step)
    y = layer.eval()(x.float())
    y.square().sum().backward()
    assert y.isfinite().all() and 0 <= layer.noise() < torch.inf
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    assert torch.equal(layer.fuse()(x.float()), y)
    with torch.no_grad():
        layer.input_quantizer.observe(*layer.input_quantizer.extremes())  # as running steps do
    assert 0 < layer.input_quantizer.step < torch.inf


def test_a_step_below_its_bounds_comes_back_by_its_gradient():
    x, quantizer = torch.rand(4096, dtype=torch.float64), ActivationQuantizer().double()
    quantizer.observe(x.min(), x.max())
    good = quantizer.step.item()
    quantizer.step.data.fill_(-2 * good)
    descent = torch.optim.SGD(quantizer.parameters(), lr=2e-6)
    errors = []
    for _ in range(60):
        descent.zero_grad()
        loss = (quantizer(x) - x).square().sum()
        loss.backward()
        errors.append(loss.item())
        descent.step()
    assert 0.5 * good < quantizer.step < 2 * good and errors[-1] < 1e-2 * errors[0]


def test_no_step_is_no_number():
    quantizer = ActivationQuantizer()
    assert not quantizer.calibrated and quantizer.scale.isnan()
    assert quantizer(torch.ones(3)).isnan().all()


@pytest.mark.parametrize(
    ("mean", "std", "values"),
    [(0.0, 1.0, 256), (0.4, 0.25, 256), (0.5, 0.5, 255), (0.485, 0.229, 255)],
)
def test_the_image_keeps_its_256_values_or_nearly(mean, std, values):
    """All of them where the mean is a multiple of 1/255."""
    pixels = (torch.arange(256, dtype=torch.float64) / 255 - mean) / std
    quantizer = ActivationQuantizer(fixed=True).double()
    quantizer.observe(pixels.min(), pixels.max())
    assert quantizer(pixels).unique().numel() == values
    moved = (quantizer(pixels) - pixels).abs().max() * 255 * std
    assert moved < (1e-9 if values == 256 else 0.51)
    assert not list(quantizer.parameters())


def test_the_image_has_its_grid_whatever_calibration_sees():
    """Black and white of three channels, of which gray images show nothing."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    network = quantize(nn.Sequential(build(SHAPES[0]).float(), nn.Conv2d(8, 4, 1)), "int4")
    gray = 0.1 * torch.rand(2, 3, 16, 16)
    calibrate_quantization(network, [gray], mean=mean, std=std)
    low, high = network[0].input_quantizer.extremes()
    step = network[0].input_quantizer.scale
    assert -0.485 / 0.229 - step < low <= -0.485 / 0.229 + 1e-6
    assert (1 - 0.406) / 0.225 - 1e-6 <= high < (1 - 0.406) / 0.225 + step


@pytest.mark.parametrize("statistics", ["exact", "diagonal"])
def test_statistics_of_one_process_are_not_taken_for_those_of_all(statistics):
    x = twin.feature_map(3, 8, 9, 8)
    layer = quantized(build(SHAPES[5]), x, statistics=statistics)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    before = copy.deepcopy(synchronized.state_dict())
    synchronized.eval()(x)
    with pytest.raises(ValueError, match=rf"`statistics` \(='{statistics}'\).*SyncBatchNorm"):
        synchronized.train()(x)
    after = synchronized.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_running_extremes_move_in_training_only():
    x = twin.feature_map(2, 8, 9, 9)
    layer = quantized(build(SHAPES[5]), x, scales="running")
    before = layer.input_quantizer.step.clone()
    layer.eval()(2 * x)
    assert layer.input_quantizer.step == before
    layer.train()(2 * x)
    moved = 0.99 * before * 255 + 0.01 * 2 * x.max()
    torch.testing.assert_close(layer.input_quantizer.step, moved / 255)
