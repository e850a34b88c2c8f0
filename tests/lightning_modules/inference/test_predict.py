"""Folders of images to CSV, from a checkpoint and from an artifact."""

import csv
import os
import shutil
import sys
import warnings

import pytest
import timm
import torch
from PIL import Image

from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.dataset import Sample
from lightning_modules.data.image_io import find_images, why_unreadable
from lightning_modules.inference import predict
from lightning_modules.inference.predict import load_classifier, predict_folder
from mobileone.export import ExportSpec, export_model
from tests.helpers.variants import slow

NAMES = ('cat, "big"', "chien é")
MODEL = "mobileone_mu0"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    network = timm.create_model(MODEL, num_classes=2).train()
    with torch.no_grad():
        for _ in range(3):  # running statistics that keep the outputs of eval mode moderate
            network(torch.randn(16, 3, 32, 32))
    return network.eval()


@pytest.fixture
def spec(pets):
    config = ImageDataModule(str(pets), model=MODEL, input_size=32).data_config
    return ExportSpec(model_name=MODEL, class_names=NAMES, **config)


@pytest.fixture
def checkpoint(model, spec, tmp_path):
    path = tmp_path / "best.ckpt"
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save(
        {
            "state_dict": weights,
            "export_spec": spec.to_dict(),
            "hyper_parameters": {"model": MODEL, "num_classes": 2},
            "pytorch-lightning_version": "2.6.6",
        },
        path,
    )
    return path


def rows(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def expected(model, pets):
    """Path -> probabilities, by the validation loader of the data module."""
    data = ImageDataModule(str(pets), model=MODEL, input_size=32, num_workers=0)
    data.setup("validate")
    loader = data.val_dataloader()
    with torch.no_grad():
        probabilities = torch.cat([model(images).softmax(1) for images, _ in loader])
    files = [path for path, _ in loader.dataset.source.reader.samples]
    return dict(zip(files, probabilities.tolist(), strict=True))


def test_predictions_equal_validation(checkpoint, model, pets, tmp_path):
    output = tmp_path / "new" / "out.csv"
    summary = predict_folder(checkpoint, pets / "val", output, top_k=None, progress=False)
    assert (summary.output, summary.images, summary.unreadable) == (output, 4, ())
    table = rows(output)
    assert list(table[0]) == [
        "path",
        "label",
        "probability",
        *(f"p({name})" for name in NAMES),
        "error",
    ]
    reference = expected(model, pets)
    assert [row["path"] for row in table] == list(reference)
    for row in table:
        values = reference[row["path"]]
        assert [float(row[f"p({name})"]) for name in NAMES] == pytest.approx(values, rel=1e-4)
        assert row["label"] == NAMES[values.index(max(values))]
        assert float(row["probability"]) == pytest.approx(max(values), rel=1e-4)
        assert row["error"] == ""


def test_artifact_and_checkpoint_agree(checkpoint, model, spec, pets, tmp_path):
    export_model(model, spec, tmp_path / "artifact", formats=("torchscript",))
    for source in (checkpoint, tmp_path / "artifact"):
        predict_folder(source, pets, tmp_path / f"{source.name}.csv", top_k=2, progress=False)
    one, two = rows(tmp_path / "best.ckpt.csv"), rows(tmp_path / "artifact.csv")
    assert len(one) == 14
    assert list(one[0]) == ["path", "label", "probability", "label_2", "probability_2", "error"]
    for a, b in zip(one, two, strict=True):
        assert (a["path"], a["label"], a["label_2"]) == (b["path"], b["label"], b["label_2"])
        assert float(a["probability"]) == pytest.approx(float(b["probability"]), rel=1e-3)
        assert float(a["probability"]) + float(a["probability_2"]) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_get_a_row_with_the_reason(checkpoint, pets, tmp_path, workers):
    bad = pets / "val" / "cat" / "0.png"
    bad.write_bytes(bad.read_bytes()[:100])
    (pets / "val" / "cat" / "1.png").write_bytes(b"")  # a whole batch of them, with batch_size 2
    (pets / "val" / "dog" / "0.png").write_bytes(b"hello")
    options = {"batch_size": 2, "num_workers": workers, "progress": False}
    summary = predict_folder(
        checkpoint, pets / "val", tmp_path / "out.csv", overwrite=True, **options
    )
    table = rows(tmp_path / "out.csv")
    assert [bool(row["error"]) for row in table] == [True, True, True, False]
    assert [row["label"] == "" for row in table] == [True, True, True, False]
    assert "truncated" in table[0]["error"]
    assert table[1]["error"] == table[2]["error"]
    assert table[1]["error"] == "it is empty, or not an image of a known format"
    assert summary.images == 1
    assert [path for path, _ in summary.unreadable] == [row["path"] for row in table[:3]]

    options["skip_unreadable"] = True
    summary = predict_folder(
        checkpoint, pets / "val", tmp_path / "out.csv", overwrite=True, **options
    )
    assert [row["path"] for row in rows(tmp_path / "out.csv")] == [table[3]["path"]]
    assert len(summary.unreadable) == 3


def test_interruption_keeps_the_old_file_and_the_new_rows(checkpoint, pets, tmp_path, monkeypatch):
    output = tmp_path / "out.csv"
    output.write_text("old")
    real, calls = predict.load_classifier, []

    def failing(*arguments):
        classify, spec = real(*arguments)

        def fail_at_third(images):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return classify(images)

        return fail_at_third, spec

    monkeypatch.setattr(predict, "load_classifier", failing)
    with pytest.raises(KeyboardInterrupt):
        predict_folder(checkpoint, pets, output, batch_size=2, progress=False, overwrite=True)
    assert output.read_text() == "old"
    assert len(rows(tmp_path / "out.csv.partial")) == 4
    monkeypatch.setattr(predict, "load_classifier", real)
    with pytest.raises(FileExistsError, match="overwrite true"):
        predict_folder(checkpoint, pets, output, progress=False)
    assert output.read_text() == "old"
    predict_folder(checkpoint, pets, output, batch_size=2, progress=False, overwrite=True)
    assert len(rows(output)) == 14
    assert not (tmp_path / "out.csv.partial").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_file_names_of_any_kind(checkpoint, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    names = ['a,"b".png', "ü é.png", os.fsdecode(b"\xff.png"), "line\nbreak.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    predict_folder(checkpoint, folder, tmp_path / "out.csv", progress=False)
    assert {row["path"] for row in rows(tmp_path / "out.csv")} == {str(folder / n) for n in names}


def test_all_color_modes(checkpoint, tmp_path):
    folder = tmp_path / "modes"
    folder.mkdir()
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        Image.new(mode, (1, 1)).save(folder / f"{mode.replace(';', '')}.png")
    Image.new("CMYK", (3, 2)).save(folder / "cmyk.jpg")
    summary = predict_folder(checkpoint, folder, tmp_path / "out.csv", progress=False)
    assert (summary.images, summary.unreadable) == (8, ())


def test_finding_images(pets):
    everything = find_images(pets)
    assert len(everything) == 14
    one = pets / "val" / "cat" / "1.png"
    assert find_images(str(one)) == [one]
    assert find_images(f"{pets}/val/*/1.png") == [one, pets / "val" / "dog" / "1.png"]
    assert find_images([one, pets / "val", str(one)])[:2] == [one, pets / "val" / "cat" / "0.png"]
    assert len(find_images([one, pets])) == 14
    many = pets / "many"
    many.mkdir()
    for number in (10, 9, 1):
        Image.new("L", (1, 1)).save(many / f"{number}.PNG")
    (many / "notes.txt").write_text("")
    assert [path.stem for path in find_images(many)] == ["1", "9", "10"]


@pytest.mark.parametrize("what", ["empty folder", "pattern", "empty list", "missing"])
def test_no_images(tmp_path, what):
    (tmp_path / "empty").mkdir()
    images = {
        "empty folder": tmp_path / "empty",
        "pattern": f"{tmp_path}/*.png",
        "empty list": [],
        "missing": tmp_path / "missing",
    }[what]
    message = "does not exist" if what == "missing" else r"no images in .*\.png"
    with pytest.raises(FileNotFoundError, match=message):
        find_images(images)


def test_errors_come_before_the_work(checkpoint, pets, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt' does not exist.*artifact folder"):
        load_classifier(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError):
        load_classifier(pets)  # a folder, but no artifact
    (tmp_path / "bad.ckpt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"bad\.ckpt"):
        load_classifier(tmp_path / "bad.ckpt")
    for options, message in (({"top_k": 3}, "top_k=3"), ({"batch_size": 0}, "batch_size=0")):
        with pytest.raises(ValueError, match=message):
            predict_folder(checkpoint, pets, tmp_path / "out.csv", progress=False, **options)
    assert not list(tmp_path.glob("out.csv*"))


@pytest.mark.parametrize(
    "name",
    ["torchscript", "onnx", "coreml_fp32", slow("torch_export")],
)
def test_a_file_of_an_artifact_is_enough(checkpoint, model, spec, pets, tmp_path, name):
    """In its folder, and taken out of it: it says itself what it takes and returns."""
    pytest.importorskip({"onnx": "onnxruntime", "coreml_fp32": "coremltools"}.get(name, "torch"))
    manifest = export_model(model, spec, tmp_path / "artifact", formats=[name])
    file = tmp_path / "artifact" / manifest.formats[name]["path"]
    alone = tmp_path / f"renamed{file.suffix}"
    (shutil.copytree if file.is_dir() else shutil.copy)(file, alone)
    assert load_classifier(alone)[1] == load_classifier(file)[1] == spec
    tables = []
    for source in (checkpoint, file, alone, tmp_path / "artifact" / "manifest.json"):
        predict_folder(source, pets / "val", tmp_path / f"{source.name}.csv", progress=False)
        tables.append(rows(tmp_path / f"{source.name}.csv"))
    for table in tables[1:]:
        for row, reference in zip(table, tables[0], strict=True):
            assert row["label"] == reference["label"]
            assert abs(float(row["probability"]) - float(reference["probability"])) < 1e-3
    with pytest.raises(ValueError, match=f"is a file of the format '{name}', not 'other'"):
        load_classifier(file, "other")


def test_files_that_cannot_run_say_why(model, spec, tmp_path):
    export_model(model, spec, tmp_path / "artifact", formats=["torchscript"])
    file = tmp_path / "artifact" / "model.torchscript.pt"
    bare = tmp_path / "bare.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Identity()).save(str(bare))
    with pytest.raises(ValueError, match=r"does not record its classes.* export it again"):
        load_classifier(bare)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="does not match its manifest"):
        load_classifier(file)
    shutil.copy(file, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"cut\.pt cannot be run as 'torchscript'"):
        load_classifier(tmp_path / "cut.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.onnx' does not exist"):
        load_classifier(tmp_path / "none.onnx")


@pytest.mark.parametrize("contents", [b"nonsense", b"", {"weight": torch.ones(1)}, {"x": Sample}])
def test_files_that_are_no_checkpoints(checkpoint, tmp_path, contents):
    path = tmp_path / "weights.pth"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        torch.save(contents, path)
    known = not isinstance(contents, dict) or "x" not in contents
    said = r"weights\.pth' is not a checkpoint of a" if known else "names '.*Sample', .* refused"
    with pytest.raises(ValueError, match=said) as caught:
        load_classifier(path)
    assert "weights_only" not in str(caught.value)
    assert str(caught.value).count(". ") == 1  # what is wrong, what to give


def test_checkpoint_of_another_module(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt' is not a checkpoint of a training"):
        load_classifier(tmp_path / "other.ckpt")


@pytest.mark.parametrize("device", ["cuda:99", "warp"])
def test_device_that_is_not_there(checkpoint, pets, tmp_path, device):
    with pytest.raises(
        ValueError, match=f"`device` .*{device}.* is not on this machine; there is cpu"
    ):
        predict_folder(checkpoint, pets, tmp_path / "out.csv", device=device, progress=False)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.png"), "No such file or directory"),
        (OSError("image file is truncated"), "image file is truncated"),
        (SyntaxError("broken PNG file"), "it is damaged: broken PNG file"),
        (EOFError(), "it is damaged"),
    ],
)
def test_reasons_in_plain_words(error, words):
    assert why_unreadable(error) == words


def test_progress_does_not_touch_standard_output(checkpoint, pets, tmp_path, capfd):
    predict_folder(checkpoint, pets, tmp_path / "out.csv", progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Classifying" in captured.err


def test_a_folder_in_the_place_of_the_csv_file_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="is a folder: give the CSV file"):
        predict_folder("no.ckpt", tmp_path, tmp_path)
