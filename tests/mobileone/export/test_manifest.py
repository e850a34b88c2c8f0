import dataclasses
import json

import pytest

from mobileone.export import Manifest, TrainingState, load_runner
from mobileone.export.inspect import ChecksumMismatchError, describe_artifact
from mobileone.export.manifest import SCHEMA_VERSION


def test_a_manifest_survives_the_disk(exported):
    _, folder, manifest = exported
    loaded = Manifest.load(folder)
    assert loaded == manifest
    assert Manifest.load(folder / "manifest.json") == manifest
    loaded.verify(folder)


def test_it_says_what_is_inside(exported):
    _, folder, manifest = exported
    assert manifest.spec.class_names == ("a", "b", "c")
    assert manifest.channel_order == "RGB"
    assert {"python", "torch", "timm", "coremltools"} <= set(manifest.versions)
    entry = manifest.formats["torchscript"]
    assert entry["output"]["kind"] == "logits"
    assert entry["bytes"] == (folder / entry["path"]).stat().st_size
    # convolutions 3->8 (3x3) and 8 depthwise (3x3) with biases, classifier 8->3
    assert manifest.parameters == (8 * 3 * 9 + 8) + (8 * 9 + 8) + (8 * 3 + 3)


def test_a_changed_a_missing_and_an_unknown_file_are_found(exported):
    _, folder, manifest = exported
    file = folder / "model.torchscript.pt"
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)
    with pytest.raises(ValueError, match="has changed"):
        manifest.verify(folder)
    file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        manifest.verify(folder)
    file.mkdir()
    (file / "extra").write_text("")
    with pytest.raises(ValueError, match="is unknown"):
        manifest.verify(folder)


def edit(folder, change):
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "name", ["../x.pt", "/etc/passwd", "..", ".", "a/../../x.pt", r"..\x.pt", ""]
)
def test_a_manifest_names_nothing_outside_of_its_folder(exported, name):
    folder = exported[1]
    (folder.parent / "x.pt").write_bytes(b"")
    edit(folder, lambda values: values["formats"]["torchscript"].update(path=name))
    for read in (load_runner, describe_artifact):
        with pytest.raises(ValueError, match="leads out of the artifact's folder"):
            read(folder)


@pytest.mark.parametrize(
    "field, value",
    [("class_names", ["c", "b", "a"]), ("mean", [0.1, 0.2, 0.3]), ("model_name", "other")],
)
def test_a_manifest_that_contradicts_its_files_is_not_believed(exported, field, value):
    folder = exported[1]
    edit(folder, lambda values: values["spec"].update({field: value}))
    for path in (folder, folder / "model.torchscript.pt"):
        with pytest.raises(ValueError, match=f"the manifest says `{field}`"):
            load_runner(path)
    with pytest.raises(ChecksumMismatchError, match=f"NOT AS THE MANIFEST SAYS: .*`{field}`"):
        describe_artifact(folder)


def test_a_manifest_of_no_file_is_not_as_it_says(exported):
    folder = exported[1]
    edit(folder, lambda values: values.update(formats={}))
    with pytest.raises(ChecksumMismatchError, match="it lists no file"):
        describe_artifact(folder)


def test_values_that_json_lacks_become_null(exported, tmp_path):
    manifest = exported[2]
    training = TrainingState(1, 2, {"val/acc1": float("nan"), "val/loss": 0.5}, "x.ckpt")
    dataclasses.replace(manifest, training=training).save(tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    assert "NaN" not in text
    assert Manifest.load(tmp_path).training.metrics == {"val/acc1": None, "val/loss": 0.5}


def test_unreadable_manifests_say_why(exported, tmp_path):
    _, folder, _ = exported
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        Manifest.load(tmp_path)
    file = folder / "manifest.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(ValueError, match="schema version"):
        Manifest.load(folder)
    wrong = [{"formats": [1]}, {"formats": {"onnx": {"path": "x"}}}, {"versions": 5}]
    wrong += [{"parameters": "x"}, {"training": {"metrics": {"acc": "high"}}}]
    for damaged in ("{", "[" * 100_000, *(json.dumps({**values, **part}) for part in wrong)):
        file.write_text(damaged)
        with pytest.raises(ValueError, match="not a readable manifest"):
            Manifest.load(folder)


def test_a_forged_name_is_no_command_to_the_terminal(exported):
    folder = exported[1]
    edit(folder, lambda values: values.update(created="\x1b]0;mine\x07"))
    text = describe_artifact(folder)
    assert "\x1b" not in text and r"\x1b]0;mine\x07" in text
