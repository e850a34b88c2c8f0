"""Compressed files against arithmetic and coremltools' own reading."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mobileone
from mobileone.export import FORMATS, Metadata, RejectedError, load_runner
from mobileone.export.compress.coreml import correct_biases, palettize, write_palettes
from mobileone.export.compress.methods import compress_model, methods
from mobileone.export.formats import coreml
from mobileone.export.preprocess import normalize
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.export.verify.mlprogram_ops import KERNELS
from mobileone.io.noise import quiet
from mobileone.quantization import quantize
from tests.helpers.norms import randomize_bn
from tests.helpers.tiny import tiny_spec


def test_packed_indices_are_read_lowest_bits_first():
    table = torch.arange(8.0) * 10
    # 1, 2, 3, 4, 5 in three bits each: 0b100_011_010_001 + 5 << 12
    word = 1 | 2 << 3 | 3 << 6 | 4 << 9 | 5 << 12
    packed = torch.tensor([word & 255, word >> 8])
    dense = KERNELS["constexpr_lut_to_dense"](packed, table, [5])
    assert dense.tolist() == [10.0, 20.0, 30.0, 40.0, 50.0]


@pytest.fixture(scope="module")
def wide():
    """Layers with more weights than the 2048 below which coremltools leaves them alone."""
    torch.manual_seed(2)
    model = nn.Sequential(
        mobileone.MobileOneBlock(3, 48, stride=2),
        mobileone.MobileOneBlock(48, 64, kernel_size=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return randomize_bn(model).eval()


@pytest.mark.parametrize("bits", [6, 4])
def test_compressed_packages_are_read_as_coremltools_reads_them(wide, tmp_path, bits):
    ct = pytest.importorskip("coremltools")
    from coremltools.optimize.coreml import decompress_weights

    source, small, large = (tmp_path / f"{n}.mlpackage" for n in ("source", "small", "large"))
    coreml.write(mobileone.reparameterize(wide), tiny_spec(), source, Metadata())
    palettize(source, small, bits)
    with quiet():
        decompress_weights(ct.models.MLModel(str(small), skip_model_load=True)).save(str(large))
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    assert any("constexpr" in op for op in MLProgram(small).operations())
    assert not any("constexpr" in op for op in MLProgram(large).operations())
    ours, theirs = (MLProgram(p).predict(images).logits for p in (small, large))
    assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2)


def test_a_folder_of_files_and_their_table(wide, tmp_path):
    """Of every method: also the formats of integers, each executed in its runtime."""
    spec = tiny_spec()
    images = torch.randint(0, 256, (12, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        targets = wide(normalize(images, spec)).argmax(1)
    rows = compress_model(wide, spec, tmp_path / "small", images, images, targets, methods())
    assert [row.method for row in rows] == ["float32", *methods()]
    assert {"onnx_int8", "coreml_int8", "executorch_int8", "litert_int8"} < set(methods())
    assert rows[0].accuracy == rows[0].agreement == 1
    for row in rows[1:]:
        assert row.agreement >= 0.75
        assert 0 < row.worst_error < 0.5
    table = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["float32", *methods()]
    files = {p.name for p in (tmp_path / "small").iterdir()} - {"compression.json"}
    assert {file.partition(".")[0] for file in files} == set(methods())
    for file in files:
        assert load_runner(tmp_path / "small" / file).spec == spec  # each runs by itself
    with pytest.raises(FileExistsError, match="exists"):
        compress_model(wide, spec, tmp_path / "small", images, images, targets)
    with pytest.raises(ValueError, match=r"\['int3'\]: choose from.*onnx_int8"):
        compress_model(wide, spec, tmp_path / "x", images, images, targets, ["int3"])


def test_a_network_that_was_trained_as_integers_is_sent_to_export(wide, tmp_path):
    network, images = quantize(deepcopy(wide)), torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"trained as integers.*`mobileone export`"):
        compress_model(network, tiny_spec(), tmp_path / "x", images, images, torch.zeros(1))


def test_an_integer_file_that_is_another_network_is_refused(wide, tmp_path, monkeypatch):
    spec, row = tiny_spec(), FORMATS["onnx_int8"]
    images = torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8)

    def write(network, *arguments):
        changed = deepcopy(network)
        changed[1].reparam_conv.bias += 3
        return row.write(changed, *arguments)

    monkeypatch.setitem(FORMATS, "onnx_int8", replace(row, write=write))
    with pytest.raises(RejectedError, match=r"onnx_int8: .*parity"):
        compress_model(wide, spec, tmp_path / "x", images, images, torch.zeros(4), ["onnx_int8"])
    assert not (tmp_path / "x").exists()


def rounded(weight):
    """To multiples of a coarse step, downwards: the mean must shift."""
    step = weight.abs().amax() / 40
    return (weight / step).floor() * step


def test_corrected_biases_restore_every_layers_mean(wide):
    """By arithmetic: each layer by itself, on what the corrected layers before it give."""
    fused = mobileone.reparameterize(wide).double()
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    images = torch.randn(6, 3, 32, 48, dtype=torch.float64)
    layers = [m for m in fused.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    weights = [rounded(layer.weight.detach()) for layer in layers]
    corrected = correct_biases(fused, weights, images)
    found = [m for m in corrected.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    x = y = images
    with torch.no_grad():
        for own, new, weight in zip(layers, found, weights, strict=True):
            assert torch.equal(own.weight, new.weight)
            if isinstance(own, nn.Linear):
                x, y = x.mean((2, 3)), y.mean((2, 3))
                x, y = x @ own.weight.T + own.bias, y @ weight.T + new.bias
                assert torch.allclose(x.mean(0), y.mean(0), atol=1e-12)
                continue
            options = {"stride": own.stride, "padding": own.padding, "groups": own.groups}
            x = F.conv2d(x, own.weight, own.bias, **options)
            y = F.conv2d(y, weight, new.bias, **options)
            assert torch.allclose(x.mean((0, 2, 3)), y.mean((0, 2, 3)), atol=1e-12)
            x, y = x.relu(), y.relu()
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())


def test_weights_of_another_network_are_refused(wide):
    fused = mobileone.reparameterize(wide)
    layers = [m for m in fused.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    weights = [layer.weight.detach().clone() for layer in layers]
    images = torch.randn(2, 3, 32, 48)
    with pytest.raises(ValueError, match="are not the network's 3 in their order"):
        correct_biases(fused, [*weights[:-1], -weights[-1]], images)
    with pytest.raises(ValueError, match="the 2 weights in the file"):
        correct_biases(fused, weights[1:], images)


def test_corrected_files_have_the_right_mean(wide, tmp_path):
    """The last layer's mean is that of the logits."""
    spec, fused = tiny_spec(), mobileone.reparameterize(wide)
    images = torch.randint(0, 256, (8, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        mean = wide(normalize(images, spec)).mean(0)
    shifts = []
    for given in (None, normalize(images, spec)):
        file = tmp_path / f"{given is None}.mlpackage"
        with torch.no_grad():
            write_palettes(fused, spec, file, given, bits=4)
        logits = MLProgram(file).predict(images).logits
        shifts.append(float((logits.mean(0) - mean).abs().max()))
    assert shifts[1] < shifts[0] / 4
