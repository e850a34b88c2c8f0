"""What can go wrong around an export: nothing may be half there, and every message is of use."""

import dataclasses
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from mobileone.export import (
    FORMATS,
    Manifest,
    RejectedError,
    TrainingState,
    export_model,
    load_runner,
)
from mobileone.export.preprocess import normalize
from tests.helpers.formats import OF_FLOATS, network_for, skip_without_packages
from tests.helpers.paths import PROGRAMS
from tests.helpers.processes import run_program, start_python
from tests.helpers.tiny import tiny_network, tiny_spec

ODD = ('the "cat", sat', "crème brûlée", "猫\t", "it's; {odd}")


# coreml_fp32 is written by the same code as coreml
@pytest.mark.parametrize("name", [name for name in OF_FLOATS if name != "coreml_fp32"])
@pytest.mark.parametrize(
    ("channels", "size", "names"),
    [
        (1, (32, 32), ("only",)),
        (4, (513, 257), ("a", "b")),
        (3, (32, 32), (*ODD, *(f"class {i}" for i in range(20_000)))),
    ],
    ids=["one class, gray", "four channels, 513x257", "20,000 classes and odd names"],
)
def test_every_format_takes_what_is_unusual(name, channels, size, names, tmp_path):
    skip_without_packages(name)
    model, spec = tiny_network(channels, len(names)), tiny_spec(channels, size, names)
    images = torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8)
    manifest = export_model(model, spec, tmp_path / "artifact", [name], images=images)
    assert Manifest.load(tmp_path / "artifact").spec.class_names == names
    assert manifest.channel_order == {1: "L", 3: "RGB"}.get(channels, "unspecified")
    entry = manifest.formats[name]
    assert entry["parity"]["status"] == "measured"
    kind = entry["input"]["type"]
    if name.startswith("coreml"):
        assert kind == ("image" if channels in (1, 3) else "multi_array")
    run = load_runner(tmp_path / "artifact", name).run
    assert FORMATS[name].spec(tmp_path / "artifact" / FORMATS[name].filename) == spec
    with torch.no_grad():
        expected = model(normalize(images, spec))
    if FORMATS[name].output == "probabilities":
        expected = expected.softmax(1)
    scale = expected.abs().max()
    assert (run(images) - expected).abs().max() < (2e-2 if name == "coreml" else 1e-4) * scale


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_read_only_folder_is_said(tmp_path):
    """As a user: root may write anywhere."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.geteuid() != 0:
        with pytest.raises(PermissionError, match="locked"):
            export_model(tiny_network(), tiny_spec(), locked / "artifact", ["torchscript"])
        return
    for parent in [tmp_path, *tmp_path.parents]:  # pytest keeps its folders to itself
        if parent.stat().st_uid == 0 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match="locked"):
            export_model(tiny_network(), tiny_spec(), locked / "artifact", ["torchscript"])
    finally:
        os.seteuid(0)
    assert list(locked.iterdir()) == []


def full(model, spec, path, metadata):
    path.write_bytes(b"half a file")
    path.with_name("more").write_bytes(b"of the writer's own")
    raise OSError(28, "No space left on device")


def test_a_full_disk_while_a_file_is_written_leaves_the_other_files(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["onnx"], write=full))
    folder = tmp_path / "artifact"
    manifest = export_model(tiny_network(), tiny_spec(), folder, ["onnx", "torchscript"])
    assert manifest.rejected == {"onnx": "OSError: [Errno 28] No space left on device"}
    assert manifest == Manifest.load(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    assert {p.name for p in folder.iterdir()} == {"model.torchscript.pt", "manifest.json"}
    load_runner(folder).run(torch.zeros(1, 3, 32, 48, dtype=torch.uint8))


def test_a_full_disk_for_all_files_leaves_nothing_and_may_be_tried_again(tmp_path, monkeypatch):
    for name in ("onnx", "torchscript"):
        monkeypatch.setitem(FORMATS, name, dataclasses.replace(FORMATS[name], write=full))
    with pytest.raises(RejectedError, match=r"onnx: OSError.*; torchscript: .*No space") as caught:
        export_model(tiny_network(), tiny_spec(), tmp_path / "a", ["onnx", "torchscript"])
    assert not caught.value.final
    assert isinstance(caught.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["torchscript", "torch_export"])
def test_a_disk_that_is_really_full(tmp_path, name):
    """The kernel's own refusal; PyTorch's writer would end the process."""
    row = FORMATS[name]
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        row.write(tiny_network(), tiny_spec(), tmp_path / "full", None)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_file_that_the_system_cuts_short_is_an_error_in_every_format(tmp_path):
    """Writers in C++ too: none may take a short write for a good one."""
    for package in ("coremltools", "onnxruntime", "executorch", "litert_torch", "coreai_torch"):
        if not find_spec(package):  # found, not imported: that brings warnings
            pytest.skip(f"needs {package}")
    done = run_program("export_with_a_limit.py", tmp_path / "out" / "artifact")
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said) == {*OF_FLOATS}
    assert all("too large" in text or "while writing" in text for text in said.values()), said
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("name", "point"),
    [
        *((name, "writing") for name in (*OF_FLOATS, "litert_int8") if name != "coreml_fp32"),
        ("torchscript", "publishing"),
        ("coreai", "publishing"),  # a folder
        ("torchscript", "replaced"),
    ],
)
def test_a_kill_leaves_whole_files_and_the_next_export_cleans_up(name, point, tmp_path):
    skip_without_packages(name)
    folder, images = tmp_path / "artifact", torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    old = export_model(network_for(name), tiny_spec(), folder, [name], TrainingState(step=1))
    run_program("kill_export.py", folder, name, point, status=-9)
    assert len(list(tmp_path.iterdir())) == 2  # and what the kill has left
    found = Manifest.load(folder)
    assert found.training.step == (None if point == "replaced" else old.training.step)
    found.verify(folder)
    expected = load_runner(folder).run(images)
    export_model(network_for(name), tiny_spec(), folder, [name], overwrite=True)
    assert list(tmp_path.iterdir()) == [folder]
    assert torch.equal(load_runner(folder).run(images), expected)


@pytest.mark.slow
def test_two_processes_that_export_to_one_folder_leave_one_whole_artifact(tmp_path):
    folder = tmp_path / "artifact"
    program, pipes = PROGRAMS / "export_ten_times.py", {"stdin": PIPE, "stderr": PIPE}
    processes = [start_python(program, folder, name, **pipes) for name in "ab"]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    seen = 0
    while any(process.poll() is None for process in processes):
        if folder.is_dir():
            seen += 1
            assert (folder / "manifest.json").is_file()
    errors = [process.communicate()[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0 or "OSError" in error or "FileExistsError" in error
    assert seen
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    manifest = Manifest.load(folder)
    manifest.verify(folder)
    assert manifest.training.step == 9
