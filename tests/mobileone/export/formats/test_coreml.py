import logging
import sys
import warnings

import pytest
import torch
from torch import nn

from mobileone import reparameterize
from mobileone.export.formats import coreml
from mobileone.export.preprocess import normalize
from mobileone.export.spec import Metadata
from mobileone.export.verify.parity import NotVerifiedError, fixed_images
from tests.helpers.tiny import tiny_network, tiny_spec

ct = pytest.importorskip("coremltools")

SOURCE = "com.github.apple.coremltools.source_dialect"
NAMES = ('the "cat", sat', "crème brûlée", "猫")


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    """Convert the tiny model once a spec; returns Core ML's description and operations."""
    done = {}

    def run(channels=3, names=NAMES, size=(32, 48)):
        key = (channels, names, size)
        if key not in done:
            path = tmp_path_factory.mktemp("coreml") / "model.mlpackage"
            spec = tiny_spec(channels, size, names)
            model = reparameterize(tiny_network(channels, len(names)))
            metadata = Metadata("Ada Ö.", "MIT", 'says "hi"', "1.2")
            interface = coreml.write(model, spec, path, metadata)
            proto = ct.models.MLModel(str(path), skip_model_load=True).get_spec()
            done[key] = proto, interface, path
        return done[key]

    return run


def operations(proto):
    (block,) = proto.mlProgram.functions["main"].block_specializations.values()
    return [op for op in block.operations if op.type != "const"]


@pytest.mark.parametrize(
    ("channels", "space", "size"), [(3, "RGB", (32, 48)), (1, "GRAYSCALE", (48, 32))]
)
def test_the_input_is_an_image_of_the_right_size_and_colors(convert, channels, space, size):
    proto, interface, _ = convert(channels, size=size)
    (feature,) = proto.description.input
    image = feature.type.imageType
    assert feature.name == "image"
    assert (image.height, image.width) == size
    assert image.ColorSpace.Name(image.colorSpace) == space
    described = interface["input"]
    assert described["type"] == "image"
    assert (described["color_space"], described["height"], described["width"]) == (space, *size)


def test_other_channel_counts_take_an_array(convert):
    proto, interface, _ = convert(4)
    (feature,) = proto.description.input
    assert list(feature.type.multiArrayType.shape) == [1, 4, 32, 48]
    assert interface["input"]["type"] == "multi_array"
    assert interface["input"]["shape"] == [1, 4, 32, 48]
    assert interface["input"]["range"] == [0, 255]


@pytest.mark.parametrize("names", [NAMES, ("only",)])
def test_it_is_a_classifier_with_the_labels_in_order(convert, names):
    proto, interface, _ = convert(names=names)
    (classify,) = [op for op in operations(proto) if op.type == "classify"]
    labels = classify.inputs["classes"].arguments[0].value.immediateValue.list.values
    assert tuple(v.immediateValue.tensor.strings.values[0] for v in labels) == names
    assert proto.description.predictedFeatureName == "classLabel"
    assert proto.description.predictedProbabilitiesName == interface["output"]["name"]


def test_weights_and_arithmetic_are_half_precision(convert):
    proto, interface, _ = convert()
    kinds = {
        op.type: {o.type.tensorType.dataType for o in op.outputs}
        for op in operations(proto)
        if op.type in {"sub", "mul", "conv", "linear", "softmax"}
    }
    float16 = 10  # FLOAT16 in coremltools' MIL.proto
    assert kinds == {name: {float16} for name in ("sub", "mul", "conv", "linear", "softmax")}
    assert interface["compute_precision"] == "float16"
    assert interface["minimum_deployment_target"] == "iOS16"
    assert proto.specificationVersion == 7  # iOS 16


def test_the_program_is_normalization_two_fused_convolutions_and_softmax(convert):
    types = [op.type for op in operations(convert()[0])]
    assert types.count("conv") == 2
    assert types.count("sub") == types.count("mul") == 1
    assert types.index("sub") < types.index("mul") < types.index("conv")
    assert types[-1] == "classify"
    assert "softmax" in types
    assert "batch_norm" not in types


def test_metadata_is_inside(convert):
    metadata = convert()[0].description.metadata
    assert (metadata.author, metadata.license) == ("Ada Ö.", "MIT")
    assert (metadata.shortDescription, metadata.versionString) == ('says "hi"', "1.2")


def test_nothing_else_is_left_beside(convert):
    path = convert()[2]
    assert [p.name for p in path.parent.iterdir()] == ["model.mlpackage"]


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has the runtime")
def test_without_a_mac_there_is_no_runtime(convert):
    with pytest.raises(NotVerifiedError, match="macOS only"):
        coreml.runtime(convert()[2], tiny_spec())


@pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS")
def test_the_runtime_agrees(convert):
    spec = tiny_spec(3, (32, 48), NAMES)
    images = fixed_images(spec)
    expected = tiny_network()(normalize(images, spec)).softmax(1)
    assert torch.allclose(coreml.runtime(convert()[2], spec)(images), expected, atol=5e-3)


def test_conversion_is_silent_but_hides_nothing_else(tmp_path, capfd, caplog, monkeypatch):
    convert = ct.convert

    def talkative(*args, **kwargs):
        print("something new", file=sys.stderr)
        logging.getLogger("coremltools").warning("a new problem")
        warnings.warn("be careful", UserWarning, stacklevel=1)
        return convert(*args, **kwargs)

    monkeypatch.setattr(ct, "convert", talkative)
    with pytest.warns(UserWarning, match="be careful"):
        coreml.write(
            reparameterize(tiny_network()), tiny_spec(), tmp_path / "m.mlpackage", Metadata()
        )
    out, err = capfd.readouterr()
    assert out == ""
    assert err.split("\n") == ["something new", ""]
    said = [r.message for r in caplog.records if r.levelno > logging.DEBUG]  # torch traces itself
    assert said == ["a new problem"]


class Undecided(nn.Module):
    """A network whose control flow depends on values, which torch.export cannot express."""

    def __init__(self):
        super().__init__()
        self.network = reparameterize(tiny_network())

    def forward(self, x):
        return self.network(x) if x.sum() > -1e9 else x.mean((2, 3))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("network", "road"), [(tiny_network(), "TorchExport"), (Undecided(), "TorchScript")]
)
def test_a_network_is_exported_and_traced_only_where_that_is_refused(network, road, tmp_path):
    """Either way the program computes the same."""
    path, spec = tmp_path / "m.mlpackage", tiny_spec()
    coreml.write(reparameterize(network), spec, path, Metadata(), precision="float32")
    proto = ct.models.MLModel(str(path), skip_model_load=True).get_spec()
    assert road in proto.description.metadata.userDefined[SOURCE]
    images = fixed_images(spec)
    expected = tiny_network()(normalize(images, spec)).softmax(1)
    assert torch.allclose(coreml.runner(path, spec)(images), expected, atol=1e-5)
