"""Every row of the table, by the same questions."""

import ast
import dataclasses
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from mobileone.export import FORMATS, RejectedError, export_model, load_runner
from mobileone.export.formats.table import check_packages
from mobileone.export.inspect import ChecksumMismatchError, describe_artifact
from mobileone.export.preprocess import normalize
from mobileone.export.verify.parity import NotVerifiedError
from mobileone.export.verify.structure import count_kinds
from mobileone.io import optional_import
from mobileone.io.optional_import import import_optional
from tests.helpers.formats import OF_FLOATS, skip_without_packages
from tests.helpers.tiny import tiny_network, tiny_spec


@pytest.fixture(scope="module", params=OF_FLOATS)
def written(request, tmp_path_factory):
    """The tiny model in one format: its name, the model, spec, folder and manifest."""
    name = request.param
    skip_without_packages(name)
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


def test_a_label_that_was_changed_is_seen(written, tmp_path):
    """In the file, and in the manifest, which has other names then than the file has."""
    name, _, _, folder, _ = written
    files, manifest = (shutil.copytree(folder, tmp_path / copy) for copy in ("file", "manifest"))
    label = re.compile(rb'(class_names\\?": \[\\?")a(\\?", \\?"b\\?", \\?"c)')
    holders = []
    for file in (p for p in files.rglob("*") if p.is_file() and p.name != "manifest.json"):
        changed, times = label.subn(rb"\1z\2", file.read_bytes())
        file.write_bytes(changed)
        holders += [file] * times
    assert len(holders) == 1
    text = (manifest / "manifest.json").read_text()
    (manifest / "manifest.json").write_text(re.sub(r'"a",(\s+"b",\s+"c")', r'"z",\1', text))
    for changed, said in ((files, "does not match its manifest"), (manifest, "says `class_names`")):
        with pytest.raises(ValueError, match=said):
            load_runner(changed, name)
        with pytest.raises(ChecksumMismatchError, match=said):
            describe_artifact(changed)


def test_the_file_names_differ():
    assert len({row.filename for row in FORMATS.values()}) == len(FORMATS)


def test_a_package_that_cannot_be_imported_is_named_with_its_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RejectedError, match=r"pip install 'mobileone-lightning\[onnx\]'"):
        export_model(tiny_network(), tiny_spec(), tmp_path / "artifact", ["onnx"])
    assert not (tmp_path / "artifact").exists()
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(RejectedError, match="pip install 'coremltools'"):
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


@pytest.mark.parametrize("name", ["torchscript", "torch_export", "onnx"])
def test_pixels_in_and_probabilities_out_by_option(name, tmp_path):
    """The file itself, alone, says what it takes; normalization and softmax are written out."""
    skip_without_packages(name)
    spec = dataclasses.replace(tiny_spec(), pixels=True)
    model, images = tiny_network(), torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    entry = export_model(model, spec, tmp_path / "artifact", [name]).formats[name]
    assert entry["input"]["range"] == [0, 255] and not entry["input"]["normalized"]
    assert entry["output"]["kind"] == "probabilities"
    mean, std = (torch.tensor(v).double().view(-1, 1, 1) for v in (spec.mean, spec.std))
    with torch.no_grad():
        expected = model.double()((images.double() / 255 - mean) / std).softmax(1)
    alone = shutil.copy(tmp_path / "artifact" / entry["path"], tmp_path)
    loaded = load_runner(alone)
    assert loaded.spec == spec
    assert (loaded.run(images) - expected).abs().max() < 1e-6
    assert "pixel values 0..255" in describe_artifact(alone)


@pytest.mark.parametrize("name", ["executorch", "litert", "coreai"])
def test_files_for_devices_describe_themselves(name, tmp_path):
    """The spec is in the file: it runs, and is described, outside of its folder."""
    skip_without_packages(name)
    spec = tiny_spec(names=('the "cat", sat', "crème brûlée", "猫"))
    export_model(tiny_network(), spec, tmp_path / "artifact", [name])
    file = tmp_path / "artifact" / FORMATS[name].filename
    alone = file.rename(tmp_path / file.name)
    assert FORMATS[name].spec(alone) == load_runner(alone).spec == spec
    described = describe_artifact(alone)
    assert "probabilities" in described and "pixel values 0..255" in described


@pytest.mark.parametrize("name", ["executorch", "litert", "coreai"])
def test_conversion_and_first_run_print_nothing(name, tmp_path, capfd):
    skip_without_packages(name)
    export_model(tiny_network(), tiny_spec(), tmp_path / "artifact", [name])
    load_runner(tmp_path / "artifact").run(torch.zeros(1, 3, 32, 48, dtype=torch.uint8))
    assert capfd.readouterr() == ("", "")


def test_packages_are_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    def found(package):
        if package == "litert-torch":
            raise PackageNotFoundError(package)
        return {"executorch": "1.5.1", "torch": "2.13.0+cu130"}[package]

    monkeypatch.setattr(optional_import, "version", found)
    both = (
        "formats without their packages: `executorch` (here is torch 2.13.0+cu130), `litert` (here "
        "is no litert-torch): `pip install 'executorch>=1.5,<1.6' 'torch>=2.14,<2.15' "
        "'litert-torch>=0.10,<0.11'`, or leave them out of `formats`"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(both)}$"):
        check_packages(["torchscript", "executorch", "litert"])
    with pytest.raises(
        ImportError, match=r"^formats without their packages: `litert` \(here is no"
    ):
        export_model(tiny_network(), tiny_spec(), tmp_path / "a", ["torchscript", "litert"])
    assert list(tmp_path.iterdir()) == []
    old = r'`it` \(needs python_version < "3", and this is Python 3[\d.]+\): leave them out of'
    with pytest.raises(ImportError, match=old):
        optional_import.require({"it": ["x>=1; python_version < '3'"]}, "formats")


def test_a_package_of_another_pytorch_is_named_with_it(monkeypatch):
    """As a runtime's library says it, which is linked against one version."""

    def cannot(package):
        raise ImportError("libtorch_python.so: undefined symbol: _ZN5torch\nand more")

    monkeypatch.setattr(optional_import, "import_module", cannot)
    monkeypatch.setattr(optional_import, "version", lambda name: {"torch": "2.13.0"}.get(name, "9"))
    said = (
        "a file needs packages that fit each other, and `runtime` 9 and PyTorch 2.13.0 do not "
        "(libtorch_python.so: undefined symbol: _ZN5torch): `pip install 'runtime'`"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(said)}$"):
        import_optional("runtime.inner", "a file", "runtime")


def test_the_extras_are_what_the_formats_need():
    """By the metadata of the project's file, which says it to pip."""
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    for name in ("executorch", "litert", "coreai", "onnx"):
        line = re.search(rf"^{name} = (\[.*\])$", text, re.MULTILINE)[1]
        assert tuple(ast.literal_eval(line)) == FORMATS[name].needs
