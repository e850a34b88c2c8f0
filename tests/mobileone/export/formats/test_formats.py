"""Every row of the table, by the same questions."""

import sys

import pytest
import torch

from mobileone.export import FORMATS, export_model, load_runner
from mobileone.export.preprocess import normalize
from mobileone.export.verify.parity import NotVerifiedError
from mobileone.export.verify.structure import count_kinds
from mobileone.io.optional_import import import_optional
from tests.helpers.tiny import tiny_network, tiny_spec

PACKAGES = {"onnx": "onnxruntime", "coreml": "coremltools", "coreml_fp32": "coremltools"}


@pytest.fixture(scope="module", params=FORMATS)
def written(request, tmp_path_factory):
    """The tiny model in one format: its name, the model, spec, folder and manifest."""
    name = request.param
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    folder = tmp_path_factory.mktemp(name) / "artifact"
    model, spec = tiny_network(), tiny_spec()
    return name, model, spec, folder, export_model(model, spec, folder, [name])


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch_of_images_gets_the_models_answers(written, batch):
    name, model, spec, folder, _ = written
    images = torch.randint(0, 256, (batch, 3, 32, 48), dtype=torch.uint8)
    loaded = load_runner(folder, name)
    assert loaded.format == name and loaded.spec == tiny_spec()
    run = loaded.run
    with torch.no_grad():
        expected = model(normalize(images, spec))
    if FORMATS[name].output == "probabilities":
        expected = expected.softmax(1)
    tolerance = 1e-2 if name == "coreml" else 1e-4
    assert (run(images) - expected).abs().max() < tolerance * expected.abs().max()


def test_the_manifest_says_what_was_written(written):
    name, _, _, folder, manifest = written
    entry = manifest.formats[name]
    files = [p for p in (folder / entry["path"]).rglob("*") if p.is_file()]
    files = files or [folder / entry["path"]]
    assert entry["bytes"] == sum(p.stat().st_size for p in files)
    assert entry["parity"]["status"] == "measured"
    assert entry["parity"]["tolerance"] >= entry["parity"]["max_relative_error"]
    assert entry["parity"]["top1_agreement"] == 1


def test_one_convolution_a_layer_and_no_trace_of_the_branches(written):
    name, _, _, folder, manifest = written
    counted = FORMATS[name].operations(folder / manifest.formats[name]["path"])
    assert dict(counted) == manifest.formats[name]["operations"]
    assert count_kinds(counted) == {"convolutions": 2, "norms": 0, "additions": 0}


def test_the_file_names_differ():
    assert len({row.filename for row in FORMATS.values()}) == len(FORMATS)


def test_a_missing_package_is_named_with_its_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'mobileone-lightning\[onnx\]'"):
        export_model(tiny_network(), tiny_spec(), tmp_path / "artifact", ["onnx"])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ImportError, match="pip install 'coremltools'"):
        export_model(tiny_network(), tiny_spec(), tmp_path / "artifact", ["coreml"])
    assert import_optional("json", "x", "y").dumps([]) == "[]"


def test_the_first_file_that_can_run_is_taken(tmp_path, monkeypatch):
    folder = tmp_path / "artifact"
    export_model(tiny_network(), tiny_spec(), folder, ["torchscript", "torch_export"])

    def cannot(path, spec):
        raise NotVerifiedError("not here")

    monkeypatch.setitem(FORMATS, "torchscript", replaced(FORMATS["torchscript"], cannot))
    assert load_runner(folder).format == "torch_export"
    with pytest.raises(ValueError, match="torchscript: not here"):
        load_runner(folder, "torchscript")
    with pytest.raises(FileNotFoundError, match=r"\['torchscript', 'torch_export'\] and no 'onnx'"):
        load_runner(folder, "onnx")


def replaced(row, runner):
    import dataclasses

    return dataclasses.replace(row, runner=runner)


def test_the_onnx_file_describes_itself(tmp_path):
    onnx = pytest.importorskip("onnx")
    import json

    spec = tiny_spec(names=('the "cat", sat', "crème brûlée", "猫"))
    export_model(tiny_network(), spec, tmp_path / "artifact", ["onnx"])
    proto = onnx.load(tmp_path / "artifact" / "model.onnx")
    properties = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(properties["spec"])["class_names"] == list(spec.class_names)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
