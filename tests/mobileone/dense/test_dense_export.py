"""What ships: the whole network fused, in every format; Core ML's detector as Vision wants it."""

import json
import sys

import pytest
import torch
from torch import nn
from torchvision.ops import box_convert

from lightning_modules.data.transforms import resolve_config
from lightning_modules.dense.export import export_detector, export_segmenter
from lightning_modules.dense.models import Detector, Segmenter
from mobileone.dense import fuse, segmenter, ssdlite
from mobileone.dense.detection import SSDBoxes
from mobileone.dense.export import (
    Suppression,
    box_formats,
    map_formats,
    write_boxes,
)
from mobileone.export import Metadata, RejectedError, export_model
from mobileone.export.inspect import describe_artifact
from mobileone.export.preprocess import normalize
from mobileone.export.spec import ExportSpec
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.export.verify.mlprogram_ops import KERNELS
from tests.helpers.core_ml_boxes import candidates

NAMES = ("background", "circle", "square", "triangle")
DEVICES = ["executorch", "litert", *(["coreai"] if sys.version_info >= (3, 11) else [])]
WHOLE_DETECTOR = "detector.torchscript.pt"


def export_boxes(network, size, folder, formats):
    anchors = len(SSDBoxes(network).centers)
    shapes = {"boxes": (anchors, 4), "scores": (anchors, 4)}
    boxes = SSDBoxes(network).eval()
    return export_model(
        boxes, spec(size), folder, formats, outputs=shapes, table=box_formats(network)
    )


def export_maps(network, size, folder, formats):
    shapes = {"logits": (4, size, size)}
    return export_model(network, spec(size), folder, formats, outputs=shapes, table=map_formats())


def settle(network, size):
    """Statistics as a few batches leave them: fresh ones let float16 overflow."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.train()
    with torch.no_grad():
        for _ in range(3):
            images = torch.randn(4, 3, size, size)
            if hasattr(network, "anchor_generator"):
                network.head(list(network.backbone(images).values()))
            else:
                network(images)
    return network.eval()


def spec(size):
    return ExportSpec("mobileone_mu0", NAMES, **resolve_config("mobileone_mu0", size))


@pytest.fixture(scope="module")
def detector():
    """Trained weights would do as well; these are quicker."""
    torch.manual_seed(1)
    return fuse(settle(ssdlite("mobileone_mu0", 4, size=96), 96)).requires_grad_(False)


@pytest.fixture(scope="module")
def package(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("coreml") / "model.mlpackage"
    write_boxes(SSDBoxes(detector).eval(), spec(96), path, Metadata())
    return path


def pixels(count, size=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.slow
def test_a_detector_ships_in_every_format(detector, tmp_path):
    formats = ["torchscript", "torch_export", "onnx", "coreml", *DEVICES]
    manifest = export_boxes(detector, 96, tmp_path / "out", formats)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in detector.modules())
    for name, entry in manifest.formats.items():
        kinds = [(k.lower(), n) for k, n in entry["operations"].items()]
        assert sum(n for k, n in kinds if "conv" in k) == convolutions, name
        assert not any("norm" in k for k, _ in kinds), name
        limit = 5e-2 if name == "coreml" else 1e-4
        assert entry["parity"]["max_relative_error"] < limit
    assert "as the manifest says" in describe_artifact(tmp_path / "out")
    # the free batch size, and the names, of the ONNX file as its user sees them
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"))
    images = normalize(pixels(3), spec(96))
    boxes, scores = session.run(["boxes", "scores"], {"images": images.numpy()})
    expected = SSDBoxes(detector)(images)
    assert torch.allclose(torch.from_numpy(boxes), expected[0], atol=1e-4)
    assert torch.allclose(torch.from_numpy(scores), expected[1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["deeplabv3", "unet"])
def test_a_segmenter_ships_in_every_format(architecture, tmp_path):
    pytest.importorskip("segmentation_models_pytorch", reason="needs the extra `dense`")
    network = fuse(settle(segmenter(architecture, "mobileone_mu0", 4), 64))
    formats = ["torchscript", "torch_export", "onnx", "coreml", *DEVICES]
    manifest = export_maps(network, 64, tmp_path / "out", formats)
    assert list(manifest.formats) == formats
    assert manifest.formats["coreml"]["parity"]["max_relative_error"] < 5e-2
    for name in DEVICES:  # pixels in: their bytes, as no normalization is outside
        assert manifest.formats[name]["input"]["range"] == [0, 255]
        assert manifest.formats[name]["parity"]["max_relative_error"] < 1e-4
    program = MLProgram(tmp_path / "out/model.mlpackage")
    image = pixels(1, 64, seed=5)
    with torch.no_grad():
        expected = network(normalize(image, spec(64)))
    (found,) = program.outputs(image, ["logits"])
    assert (found - expected).abs().max() < 5e-2 * expected.abs().max()


# --- Core ML's detector


def test_core_mls_boxes_are_the_networks(detector, tmp_path):
    """In float32, where nothing but the order of sums differs."""
    path = tmp_path / "model.mlpackage"
    write_boxes(SSDBoxes(detector).eval(), spec(96), path, Metadata(), precision="float32")
    (image,) = pixels(1, seed=3)
    confidence, coordinates = candidates(MLProgram(path), image)
    with torch.no_grad():
        boxes, scores = SSDBoxes(detector)(normalize(image[None], spec(96)))
    assert torch.allclose(confidence, scores[0, :, 1:], atol=1e-4)
    assert torch.allclose(box_convert(coordinates, "cxcywh", "xyxy"), boxes[0], atol=1e-4)


def test_what_vision_reads_of_the_package(package):
    """Inputs, outputs, thresholds and labels, in the fields of Apple's format."""
    from coremltools.models.utils import load_spec

    from mobileone.io.noise import quiet

    with quiet():
        read = load_spec(str(package))
    network, suppression = read.pipeline.models
    assert network.WhichOneof("Type") == "mlProgram"
    nms_spec = suppression.nonMaximumSuppression
    assert list(nms_spec.stringClassLabels.vector) == ["circle", "square", "triangle"]
    assert (nms_spec.iouThreshold, nms_spec.confidenceThreshold) == Suppression()
    assert nms_spec.pickTop.perClass
    # each input of the second is an output of the first, or given by the app
    outputs = {o.name: o.type.multiArrayType for o in network.description.output}
    assert {nms_spec.confidenceInputFeatureName, nms_spec.coordinatesInputFeatureName} == set(
        outputs
    )
    anchors = 6 * (6 * 6 + 3 * 3 + 2 * 2 + 1 + 1 + 1)
    shapes = sorted(tuple(a.shape) for a in outputs.values())
    assert shapes == [(anchors, 3), (anchors, 4)]
    assert len({a.dataType for a in outputs.values()}) == 1
    image, *thresholds = read.description.input
    kind = image.type.imageType
    assert (image.name, kind.width, kind.height) == ("image", 96, 96)
    assert kind.ColorSpace.Name(kind.colorSpace) == "RGB"
    assert {t.name: t.type.isOptional for t in thresholds} == {
        "iouThreshold": True,
        "confidenceThreshold": True,
    }
    assert [o.name for o in read.description.output] == ["confidence", "coordinates"]
    assert json.loads(read.description.metadata.userDefined["spec"])["class_names"] == [*NAMES]


def test_slices_of_core_ml():
    """Against the rules of Apple's specification, by hand."""
    x = torch.arange(24).reshape(2, 3, 4)
    cut = KERNELS["slice_by_index"]
    opened = {"begin_mask": [True, False, False], "end_mask": [True, True, False]}
    assert torch.equal(cut(x, [1, 1, 0], [1, 2, 2], **opened), x[:, 1:, :2])
    squeezed = cut(x, [1, 0, 2], [2, 3, 3], squeeze_mask=[True, False, True])
    assert torch.equal(squeezed, x[1, :, 2])


# --- refusals


class _Wrong(nn.Module):
    """A network whose boxes depend on Python, which a trace does not see."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.convolution(x) * self.calls


def test_a_file_that_computes_something_else_is_not_published(tmp_path):
    with pytest.raises(RejectedError, match=r"parity: relative error .* of the logits"):
        export_maps(_Wrong().eval(), 32, tmp_path / "out", ["torchscript"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]


def test_the_norms_of_the_head_fold_too(tmp_path):
    """Only `fuse` folds them."""
    network = settle(segmenter("deeplabv3", "mobileone_mu0", 4), 32)
    manifest = export_maps(network, 32, tmp_path / "out", ["torchscript"])
    assert manifest.formats["torchscript"]["operations"]["aten::batch_norm"] > 0
    fused = export_maps(fuse(network), 32, tmp_path / "fused", ["torchscript"])
    assert "aten::batch_norm" not in fused.formats["torchscript"]["operations"]


def test_outputs_must_have_their_shapes_and_formats_must_be_known(tmp_path):
    network = nn.Conv2d(3, 4, 1).eval()
    with pytest.raises(ValueError, match=r"returned \[\(8, 4, 32, 32\)\] where logits of 8 images"):
        export_model(network, spec(32), tmp_path / "out", outputs={"logits": (5, 32, 32)})
    with pytest.raises(ValueError, match=r"\['tflite'\].*coreml.*onnx.*torch_export.*torchscript"):
        export_maps(network, 32, tmp_path / "out", ["tflite"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter").touch()
    with pytest.raises(FileExistsError, match="choose another folder"):
        export_maps(network, 32, tmp_path / "full", ["torchscript"])
    with pytest.raises(ValueError, match="input_size=70"):
        export_segmenter(tmp_path / "none.ckpt", tmp_path / "out", input_size=70)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        export_detector(tmp_path / "none.ckpt", tmp_path / "out")


# --- checkpoints


def save(module, path):
    """As the trainer does, without one."""
    contents = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": "2.6.6",
        "epoch": 3,
        "global_step": 12,
    }
    module.on_save_checkpoint(contents)
    torch.save(contents, path)
    return path


@pytest.mark.filterwarnings("ignore:SSD always returns:UserWarning")
def test_a_detectors_checkpoint_becomes_files(tmp_path):
    pytest.importorskip("pycocotools", reason="needs the extra `dense`")
    module = Detector("mobileone_mu0", num_classes=4, size=64)
    module.class_names = NAMES
    settle(module.model, 64)
    checkpoint = save(module, tmp_path / "best.ckpt")
    manifest = export_detector(checkpoint, tmp_path / "out", formats=["torchscript"])
    assert manifest.spec.class_names == NAMES
    assert (manifest.training.epoch, manifest.training.step) == (3, 12)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"manifest.json", "model.torchscript.pt", WHOLE_DETECTOR}
    assert manifest.formats["detector"]["parity"]["max_relative_error"] < 1e-3
    images = [torch.rand(3, 64, 64), torch.rand(3, 50, 90)]
    found = torch.jit.load(tmp_path / "out" / WHOLE_DETECTOR)(images)[1]  # the first: losses
    with torch.no_grad():
        expected = module.model.eval()(images)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one["scores"], other["scores"], atol=1e-4)
        assert torch.allclose(one["boxes"], other["boxes"], atol=1e-2)


def test_a_segmenters_checkpoint_becomes_files(tmp_path):
    module = Segmenter("mobileone_mu0", num_classes=4)
    settle(module.model, 64)
    checkpoint = save(module, tmp_path / "best.ckpt")
    manifest = export_segmenter(checkpoint, tmp_path / "out", 64, formats=["torchscript"])
    assert manifest.spec.class_names == ("background", "class 1", "class 2", "class 3")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = module.model.eval()(images)
    found = torch.jit.load(tmp_path / "out/model.torchscript.pt")(images)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
