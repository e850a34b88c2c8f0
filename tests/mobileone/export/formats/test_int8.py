"""Integer files: published if they are the quantized network, and only then."""

import sys
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import numpy
import onnx
import pytest
import torch
from torch import nn

from mobileone.export import FORMATS, Metadata
from mobileone.export.artifact import RejectedError, export_model
from mobileone.export.formats import int8
from mobileone.export.formats.table import check_formats, check_integers, check_packages
from mobileone.export.inspect import describe_artifact
from mobileone.export.preprocess import normalize
from mobileone.export.verify import integers
from mobileone.export.verify.parity import Reference, fixed_images
from mobileone.io import optional_import
from mobileone.quantization.deployed import QuantizedConv2d, QuantizedLinear, round_bias
from mobileone.quantization.deployed import QuantizeDequantize as GRID
from mobileone.quantization.network import quantize_trained
from tests.helpers.formats import skip_without_packages
from tests.helpers.tiny import tiny_network, tiny_spec
from tests.helpers.variants import slow

LAYERS = QuantizedConv2d, QuantizedLinear
INTEGER = sorted(name for name, row in FORMATS.items() if row.integers)
SPEC = tiny_spec()
IMAGES = fixed_images(SPEC, 64)


@pytest.fixture(scope="module")
def quantized():
    return quantize_trained(tiny_network(), [normalize(IMAGES, SPEC)])


@pytest.fixture(scope="module", params=["int4", "palette4"])
def few_bits(request):
    skip_without_packages("onnx_int8", request.param)
    return quantize_trained(tiny_network(), [normalize(IMAGES, SPEC)], request.param)


def export(network, name, folder, change=None):
    """Export; with `change`, of a network that was changed after it was validated."""
    row = FORMATS[name]

    def write(model, *arguments):
        changed = deepcopy(model)
        if change:
            change(changed)
        return row.write(changed, *arguments)

    table = {name: replace(row, write=write)}
    return export_model(network, SPEC, folder, [name], images=IMAGES, table=table)


@pytest.mark.parametrize("name", INTEGER)
def test_a_quantized_network_becomes_a_file_of_integers(name, quantized, tmp_path):
    manifest = export(quantized, name, tmp_path / "artifact")
    entry = manifest.formats[name]
    gains = [
        (m.weight.abs() * m.weight_scale.view(-1, *[1] * (m.weight.ndim - 1))).max() * m.input.scale
        for m in quantized.modules()
        if isinstance(m, QuantizedConv2d | QuantizedLinear)
    ]
    assert manifest.condition == pytest.approx(max(gains).item())
    assert f"by {manifest.condition:.3g}" in describe_artifact(tmp_path / "artifact")
    assert entry["operations"]["conv.integer"] == 2
    assert entry["operations"]["linear.integer"] == 1
    assert not {"float_conv", "linear", "fully_connected"} & set(entry["operations"])
    assert entry["parity"]["images"] == 64
    assert entry["parity"]["top1_agreement"] >= 0.99
    assert entry["weights_parity"]["max_relative_error"] == 0


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("onnx_int8", 4),
        ("coreml_int8", 4),
        slow("executorch_int8", 8),
        slow("litert_int8", 8),
    ],
)
def test_weights_of_4_bits_are_so_in_the_file_where_a_runtime_multiplies_them(
    name, bits, few_bits, tmp_path
):
    entry = export(few_bits, name, tmp_path / "artifact").formats[name]
    assert entry["weight_bits"] == bits
    assert (entry["operations"]["conv.integer"], entry["operations"]["linear.integer"]) == (2, 1)
    assert entry["weights_parity"]["max_relative_error"] == 0


def test_onnx_keeps_the_integers_of_4_bits(few_bits, tmp_path):
    """Read by the package of ONNX: integers, or a table and places in it."""
    path = tmp_path / "model.onnx"
    FORMATS["onnx_int8"].write(few_bits, SPEC, path, Metadata())
    contents = onnx.load(path)
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in contents.graph.initializer}
    kinds = {t.data_type for t in contents.graph.initializer if len(t.dims) > 1}
    layers = {n: m for n, m in few_bits.named_modules() if isinstance(m, LAYERS)}
    assert contents.opset_import[0].version == 21 and len(layers) == 3
    tables = next(iter(layers.values())).scheme == "palette4"
    assert kinds == {onnx.TensorProto.UINT4 if tables else onnx.TensorProto.INT4}
    for name, layer in layers.items():
        found = kept[f"{name}.weight"].astype(int)
        if tables:
            found = kept[f"{name}.weight.table"][found]
        assert (found[:, : layer.weight.shape[1]] == layer.weight.numpy()).all()


def test_a_fourth_channel_of_zeros_changes_no_bit(quantized, tmp_path, monkeypatch):
    row, found = FORMATS["onnx_int8"], {}
    for name in ("padded", "plain"):
        path = tmp_path / f"{name}.onnx"
        row.write(quantized, SPEC, path, Metadata())
        found[name] = row.runner(path, SPEC)(IMAGES)
        assert row.count_operations(path)["Pad"] == (name == "padded")
        monkeypatch.setattr(int8, "_with_four_channels", lambda network: network)
    assert torch.equal(found["padded"], found["plain"])


@pytest.mark.parametrize("name", ["onnx_int8", "coreml_int8"])
def test_a_changed_weight_of_4_bits_is_caught(name, few_bits, tmp_path):
    with pytest.raises(RejectedError, match=r"weights parity: .*'0.reparam_conv"):
        export(few_bits, name, tmp_path / "artifact", move_weights)


def move_weights(network):
    """Two of them change places: the table stays."""
    weight = convolution(network).weight.view(-1)
    other = next(i for i, value in enumerate(weight) if value != weight[0])
    weight[[0, other]] = weight[[other, 0]]


def test_a_changed_table_is_caught(tmp_path):
    """Where each weight has the place in the table that it had."""
    skip_without_packages("onnx_int8", "palette4")
    network = quantize_trained(tiny_network(), [normalize(IMAGES, SPEC)], "palette4")
    least = convolution(network).weight.min()
    assert least + 1 not in convolution(network).weight

    def change(network):
        weight = convolution(network).weight
        weight[weight == least] += 1

    with pytest.raises(RejectedError, match=r"weights parity: .*'0.reparam_conv"):
        export(network, "onnx_int8", tmp_path / "artifact", change)


def test_weights_of_4_bits_need_an_onnxruntime_that_reads_them(few_bits, tmp_path, monkeypatch):
    known = optional_import.version
    monkeypatch.setattr(
        optional_import, "version", lambda name: "1.22" if name == "onnxruntime" else known(name)
    )
    with pytest.raises(ImportError, match=r"`onnx_int8` \(here is onnxruntime 1.22\).*>=1.23'"):
        export_model(few_bits, SPEC, tmp_path / "artifact", ["onnx_int8"], images=IMAGES)
    check_packages(["onnx_int8"], scheme="int8")


def convolution(network) -> QuantizedConv2d:
    return next(m for m in network.modules() if isinstance(m, QuantizedConv2d))


def change_weight(network):
    weight = convolution(network).weight
    weight.view(-1)[7] += 1 if weight.view(-1)[7] < 100 else -1


def change_weight_scale(network):
    convolution(network).weight_scale[3] *= 1.01


def change_input_scale(network):
    convolution(network).input.scale *= 1.5


def change_zero_point(network):
    convolution(network).input.zero_point -= 60


def change_bias(network):
    convolution(network).bias += 3


CHANGES = [
    change_weight,
    change_weight_scale,
    change_input_scale,
    change_zero_point,
    change_bias,
]
SOME = (change_weight, change_zero_point)  # of the converters that take seconds


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (name, change)
        if change in SOME or name in ("onnx_int8", "coreml_int8")
        else slow(name, change)
        for name in INTEGER
        for change in CHANGES
    ],
)
def test_a_changed_number_is_caught(name, change, quantized, tmp_path):
    with pytest.raises(RejectedError, match=f"{name}: .*weights parity: .*'0.reparam_conv"):
        export(quantized, name, tmp_path / "artifact", change)
    assert not (tmp_path / "artifact").exists()


def in_floats(network):
    """Its first convolution as one of floats with the same results."""
    layer = convolution(network)
    conv = nn.Conv2d(3, 8, 3, stride=layer.stride, padding=layer.padding).requires_grad_(False)
    conv.weight.copy_(layer.dequantized_weight())
    conv.bias.copy_(layer.bias)
    network[0].reparam_conv = conv


@pytest.mark.parametrize("name", INTEGER)
def test_a_convolution_that_is_not_of_integers_is_caught(name, quantized, tmp_path):
    with pytest.raises(RejectedError, match="1 convolutions where the fused network has 2"):
        export(quantized, name, tmp_path / "artifact", in_floats)


@pytest.mark.parametrize("name", ["executorch_int8", "litert_int8"])  # which count biases
def test_a_bias_of_more_bits_than_float32_has_is_found(name, quantized, tmp_path):
    network = deepcopy(quantized)
    layer = convolution(network)
    layer.weight_scale *= torch.logspace(0, -5, len(layer.weight_scale))
    bias = round_bias(torch.linspace(0.3, 1.7, 8), layer.input.scale, layer.weight_scale)
    layer.bias.copy_(bias)
    counts = bias.double() / (layer.input.scale * layer.weight_scale.double())
    assert 2**26 < counts.max() < 2**31
    path = tmp_path / FORMATS[name].filename
    FORMATS[name].write(network, SPEC, path, Metadata())
    assert integers.missing_weights(path, network) == []


class MultipliedInFloats(nn.Module):
    """A linear layer of which the file has all numbers, and multiplies other ones."""

    def __init__(self, layer):
        super().__init__()
        self.input, self.bias = layer.input, layer.bias
        self.register_buffer("codes", layer.weight.detach())
        self.register_buffer("weight_scale", layer.weight_scale)

    def forward(self, x):
        weight = self.codes.float() * self.weight_scale[:, None]
        return nn.functional.linear(self.input(x), weight, self.bias)


def test_a_linear_layer_that_is_not_of_integers_is_caught(quantized, tmp_path, monkeypatch):
    """Also where nothing is missing but the integers in its product."""

    def multiply_in_floats(network):
        network[4] = MultipliedInFloats(network[4])

    monkeypatch.setattr(integers, "missing_weights", lambda *_: [])
    with pytest.raises(RejectedError, match=r"1 linear layers of integers \(0\)"):
        export(quantized, "onnx_int8", tmp_path / "artifact", multiply_in_floats)


def test_a_grid_of_two_layers_is_in_the_file_twice(quantized):
    network = deepcopy(quantized)
    grids = [(m.scale, m.zero_point) for m in network.modules() if isinstance(m, GRID)]
    assert integers.missing_grids(grids, network) == []
    first, second = (m for m in (network[0].reparam_conv, network[1].reparam_conv))
    second.input.scale, second.input.zero_point = first.input.scale, first.input.zero_point
    assert integers.missing_grids(grids, network) == ["1.reparam_conv.input"]
    assert integers.missing_grids([*grids, grids[0]], network) == []


@pytest.mark.parametrize("kind", ["QuantizeLinear", "DequantizeLinear"])
def test_both_ends_of_a_grid_are_read(quantized, kind, tmp_path):
    path, row = tmp_path / "model.onnx", FORMATS["onnx_int8"]
    row.write(quantized, SPEC, path, Metadata())
    contents = onnx.load(path)
    made = {name: node for node in contents.graph.node for name in node.output}
    last = next(n for n in contents.graph.node if n.op_type == "Gemm")
    node = made[last.input[0]]
    node = node if kind == "DequantizeLinear" else made[node.input[0]]
    scale = onnx.numpy_helper.from_array(numpy.array(0.5, numpy.float32), "other")
    contents.graph.initializer.append(scale)
    node.input[1] = "other"
    onnx.save(contents, path)
    grids = int8.ROADS["onnx"].read(path).grids
    assert integers.missing_grids(grids, quantized) == ["4.input"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_have_no_typical_error_of_0(quantized, bad, tmp_path):
    with torch.no_grad():
        logits = quantized(normalize(IMAGES, SPEC))
    broken = logits.clone()
    broken[:40] = bad
    checks = integers.check(
        tmp_path,
        SPEC,
        Reference(quantized, {"logits": logits}, IMAGES),
        runner=lambda *_: lambda images: broken,
        returns=lambda spec: "logits",
        read=lambda path: integers.Contents(Counter(), []),
    )
    assert not checks["parity"].accepted and not checks["typical_parity"].accepted


@pytest.mark.parametrize("name", sorted(set(FORMATS) - set(INTEGER)))
def test_floats_do_not_hold_a_quantized_network(name, quantized, tmp_path):
    with pytest.raises(ValueError, match=rf"\['{name}'\] hold floats.*onnx_int8"):
        export_model(quantized, SPEC, tmp_path / "artifact", [name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", INTEGER)
def test_integers_do_not_hold_a_network_of_floats(name, tmp_path):
    ways = r"--model.quantize int8 \(configs/quantize\.yaml.*`mobileone compress`"
    with pytest.raises(ValueError, match=ways):
        export_model(tiny_network(), SPEC, tmp_path / "artifact", [name])
    assert list(tmp_path.iterdir()) == []


def test_formats_are_checked_without_a_network():
    with pytest.raises(ValueError, match=r"coreai-torch 0\.4\.3 refuses"):
        check_formats(["coreai_int8"])
    check_integers(["onnx"], quantized=False)
    check_integers(["onnx_int8", "coreml_int8"], quantized=True)
    with pytest.raises(ValueError, match="hold floats"):
        check_integers(["onnx_int8", "onnx"], quantized=True)


def test_a_missing_runtime_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.schema_py_generated", None)
    with pytest.raises(ImportError, match=r"pip install 'mobileone-lightning\[litert\]'"):
        int8.ROADS["litert"].read(tmp_path / "model.tflite")
