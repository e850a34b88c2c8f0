"""Layers of integers against the same arithmetic written with integers, in float64."""

import pytest
import timm
import torch
from torch import nn

from mobileone.quantization.deployed import (
    QuantizedConv2d,
    QuantizeDequantize,
    QuantizedLinear,
    round_bias,
)
from mobileone.quantization.network import conditions, quantize_trained, scheme_of
from tests.helpers.tiny import tiny_network


def codes(x, scale, zero_point):
    """The integers 0..255 less the zero point."""
    return (x.double() / scale).round().add(zero_point).clamp(0, 255) - zero_point


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("geometry", [{}, {"stride": (2, 2), "padding": (1, 1), "groups": 4}])
def test_a_convolution_is_a_sum_of_integers(signed, scheme, geometry):
    torch.manual_seed(0)
    limit = 8 if scheme == "int4" else 128
    weight = torch.randint(-limit, limit, (8, 4 // geometry.get("groups", 1), 3, 3)).to(torch.int8)
    scale, bias = torch.rand(8) + 0.1, torch.randn(8)
    grid = QuantizeDequantize(0.02, 100, signed)
    layer = QuantizedConv2d(weight, scale, bias, grid, None, scheme, **geometry)
    x = 2 * torch.randn(2, 4, 9, 9)
    whole = torch.nn.functional.conv2d(codes(x, 0.02, 100), weight.double(), **geometry)
    expected = whole * (0.02 * scale.double()).view(-1, 1, 1) + bias.double().view(-1, 1, 1)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_linear_layer_rounds_its_output_if_asked():
    torch.manual_seed(0)
    weight, scale, bias = (
        torch.randint(-128, 128, (3, 5)).to(torch.int8),
        torch.rand(3),
        torch.ones(3),
    )
    grids = QuantizeDequantize(0.1), QuantizeDequantize(0.5, 128)
    x = torch.rand(7, 5)
    exact = codes(x, 0.1, 0) @ weight.double().T * (0.1 * scale.double()) + bias
    found = QuantizedLinear(weight, scale, bias, *grids)(x)
    torch.testing.assert_close(found.double(), codes(exact, 0.5, 128) * 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.full((2, 3), 8, dtype=torch.int8)}, "int4"),
        ({"weight": torch.arange(18).to(torch.int8).view(2, 9), "scheme": "palette4"}, "palette4"),
        ({"weight": torch.zeros(2, 3)}, "int8"),
        ({"weight_scale": torch.tensor([1.0, 0.0])}, "`weight_scale`"),
    ],
)
def test_a_layer_refuses_what_no_kernel_takes(change, message):
    given = {
        "weight": torch.ones(2, 3, dtype=torch.int8),
        "weight_scale": torch.ones(2),
        "bias": torch.zeros(2),
        "input": QuantizeDequantize(1.0),
        "scheme": "int4",
    }
    with pytest.raises(ValueError, match=message):
        QuantizedLinear(**{**given, **change})


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_step_is_positive_and_finite(scale):
    with pytest.raises(ValueError, match="`scale`"):
        QuantizeDequantize(scale)


def test_a_zero_point_is_a_code():
    with pytest.raises(ValueError, match=r"`zero_point` \(=256\)"):
        QuantizeDequantize(1.0, 256)


def test_a_bias_stays_within_32_bits_of_its_step():
    steps = round_bias(torch.tensor([1.26, 1e9]), 0.5, torch.tensor([0.5, 0.1])) / torch.tensor(
        [0.25, 0.05]
    )
    assert steps.tolist() == pytest.approx([5, 2**31 - 1])


def test_a_rounded_network_is_close_and_rounds_before_what_is_no_layer():
    trained = tiny_network()
    images = torch.randn(16, 3, 32, 48)
    network = quantize_trained(trained, images.split(5))
    assert (scheme_of(network), scheme_of(trained)) == ("int8", None)
    layers = [m for m in network.modules() if isinstance(m, (QuantizedConv2d, QuantizedLinear))]
    rounds = [isinstance(layer.output, QuantizeDequantize) for layer in layers]
    assert rounds == [False, True, False]  # the pooling follows the second convolution
    with torch.no_grad():
        expected, found = trained(images), network(images)
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.05


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="no convolution"):
        quantize_trained(nn.ReLU(), [torch.zeros(1, 3, 4, 4)])


@pytest.mark.parametrize("name", ["resnet18", "repvit_m0_9"])
def test_without_training_networks_of_other_blocks_are_rounded_too(name):
    """Plain ones as they are, those that fold in an unknown way after they have."""
    model = timm.create_model(name, num_classes=4)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        model.train()(images)
        model.eval()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        network = quantize_trained(model, [images])
        expected, found = model(images), network(images)
    kinds = {type(module) for module in network.modules()}
    assert QuantizedConv2d in kinds and nn.Conv2d not in kinds
    assert float((found - expected).norm() / expected.norm()) < 0.2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_without_training_the_noise_of_rounding_is_folded():
    """A dead channel of the input of the second block: 1 / sqrt(ε) in the float network."""
    trained = tiny_network()
    trained[1].conv_kxk[0].bn.running_var[3] = 1e-12
    images = torch.randn(16, 3, 32, 48)
    plain, aware = (
        max(conditions(quantize_trained(trained, [images], kappa=kappa)).values())
        for kappa in (0.0, 1.0)
    )
    assert aware < 0.1 * plain
