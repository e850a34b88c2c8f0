"""Files that would run code are refused by name of what they call, and run nothing."""

import io
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from mobileone.export import load_runner
from mobileone.export.checkpoint import read_checkpoint
from mobileone.export.formats import onnx as onnx_format
from mobileone.export.formats import torch_export, torchscript
from mobileone.export.formats.archive import only_computes
from mobileone.export.inspect import describe_artifact
from mobileone.export.spec import Metadata
from mobileone.io.safe_pickle import UnsafeFileError
from tests.helpers.tiny import tiny_network, tiny_spec

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Evil:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self):
        return (os.system, (f"touch {self.touched}",))


def pickled(value: object, **options: object) -> bytes:
    contents = io.BytesIO()
    torch.save(value, contents, **options)
    return contents.getvalue()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """What a sound .pt2 file holds."""
    path = tmp_path_factory.mktemp("sound") / "model.pt2"
    torch_export.write(tiny_network(), tiny_spec(), path, Metadata())
    assert len(torch_export.operations(path)) > 3
    reader = torch._C.PyTorchFileReader(str(path))
    names = [n for n in reader.get_all_records() if n != "version" and ".data/" not in n]
    return {name: reader.get_record(name) for name in names}


def edited(name, edit):
    def change(records, touched):
        values = json.loads(records[name])
        edit(values, f"touch {touched}")
        return {name: json.dumps(values).encode()}

    return change


def first_node(values):
    return values["graph_module"]["graph"]["nodes"][0]


def set_shape(values, command):
    graph = values["graph_module"]["graph"]
    shapes = [value["sizes"] for value in graph["tensor_values"].values()]
    free = next(sizes[0] for sizes in shapes if sizes and "as_expr" in sizes[0])
    free["as_expr"]["expr_str"] = f"__import__('os').system('{command}')"


def set_tree(values, command):
    context = {"default_factory_module": "os", "default_factory_name": "abort", "dict_context": []}
    tree = {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": []}
    signature = values["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = json.dumps([1, tree])


def set_signature(values, command):
    signature = values["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = [f"x=__import__('os').system('{command}')"]


def use_pickle(values, command):
    next(iter(values["config"].values()))["use_pickle"] = True


def opaque(values, command):
    values["config"]["x"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}


ROUTES = {
    "sample inputs": lambda r, t: {"data/sample_inputs/model.pt": pickled(Evil(t))},
    "weights": lambda r, t: {
        **edited(WEIGHTS, use_pickle)(r, t),
        "data/weights/weight_0": pickled(Evil(t)),
    },
    "old weights": lambda r, t: {"data/weights/model.pt": pickled(Evil(t))},
    "old constants": lambda r, t: {"data/constants/model.pt": pickled(Evil(t))},
    "an object": edited(CONSTANTS, opaque),
    "a library": lambda r, t: {"data/aotinductor/model/model.so": b"\x7fELF"},
    "a target": edited(PROGRAM, lambda v, c: first_node(v).update(target="torch.os.system")),
    "a file operation": edited(
        PROGRAM, lambda v, c: first_node(v).update(target="torch.ops.aten.from_file.default")
    ),
    "a shape": edited(PROGRAM, set_shape),
    "a signature": edited(PROGRAM, set_tree),
    "an argument": edited(PROGRAM, set_signature),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_program_that_could_run_code_is_refused(route, records, tmp_path, caplog):
    path, touched = tmp_path / "model.pt2", tmp_path / "touched"
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in {**records, **ROUTES[route](records, touched)}.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    for read in (load_runner, torch_export.operations):
        with pytest.raises(UnsafeFileError, match=r"(could|would) run code") as caught:
            read(path)
        assert "weights_only" not in str(caught.value) + caplog.text
    assert not touched.exists()


def test_a_damaged_program_is_called_damaged(records, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match=r"model\.pt2 is damaged") as caught:
        torch_export.spec(path)
    assert not isinstance(caught.value, UnsafeFileError)


SCRIPTS = {  # what a method does; {0} is a path
    "a line continuation": 'return torch.from_file \\\n("{0}", True, 4)',
    "a call": 'return torch.from_file("{0}", True, 4)',
    "a method of a tensor": '_0 = x.save("{0}")\n    return x',
    "a tensor": '_0 = torch.save(x, "{0}")\n    return x',
    "a comment between": "_0 = torch.save # (\n    return x",
    "an extension": '_0 = __torch__.torch.classes.c10d.TCPStore("{0}")\n    return x',
    "another library": '_0 = ops.image.write_file("{0}", x)\n    return x',
    "a function passed on": '_0 = getattr(torch, "save")\n    return x',
    "a process": "_0 = fork(self.forward, x)\n    return x",
    "Python": "_0 = ^Evil()(x)\n    return x",
    "a file name": '_0 = x.to("../{0}")\n    return x',
}


def script(path, body, method="forward"):
    """A TorchScript file whose root class has this method, and no `spec.json`."""
    torchscript.write(nn.ReLU().eval(), tiny_spec(), path, Metadata())
    reader = torch._C.PyTorchFileReader(str(path))
    records = {name: reader.get_record(name) for name in reader.get_all_records()}
    name = next(n for n in records if "/activation" in n and n.endswith(".py"))
    code = records[name].decode()
    head = code[: code.index("  def ")]
    own = name[len("code/") : -len(".py")].replace("/", ".") + ".ReLU"
    records[name] = f"{head}  def {method}(self: {own}, x: Tensor):\n    {body}\n".encode()
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in records.items():
        if name != "version" and not name.startswith(".data"):
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()


@pytest.mark.parametrize("route", SCRIPTS)
def test_a_script_that_reaches_beyond_its_tensors_is_refused(route, tmp_path):
    path, touched = tmp_path / "model.torchscript.pt", tmp_path / "touched"
    script(path, SCRIPTS[route].format(touched))
    for read in (torchscript.load, torchscript.operations):
        with pytest.raises(UnsafeFileError, match=r"could reach files or run code .*: refused"):
            read(path)
    assert not touched.exists()


def test_what_runs_at_loading_is_looked_at_too(tmp_path):
    """PyTorch calls `__setstate__` while it loads, before anybody has seen a graph."""
    path, touched = tmp_path / "model.torchscript.pt", tmp_path / "touched"
    body = f'_0 = torch.from_file \\\n("{touched}", True, 4)\n    self.training = True'
    script(path, body, "__setstate__")
    with pytest.raises(UnsafeFileError, match=r"calls or names 'torch\.from_file'"):
        torchscript.load(path)
    assert not touched.exists()


def test_a_script_of_other_operators_is_read(tmp_path):
    path = tmp_path / "model.torchscript.pt"
    script(path, "return torch.add(torch.mul(x, 2), torch.sigmoid(x))")
    x = torch.randn(3)
    assert torch.equal(torchscript.load(path)(x), 2 * x + x.sigmoid())


def test_operators_on_files_do_more_than_compute():
    names = {schema.name.removeprefix("aten::") for schema in torch._C._jit_get_all_schemas()}
    assert {"from_file", "save", "set_", "record_stream"} <= names
    assert not any(map(only_computes, ("from_file", "save", "set_", "record_stream", "nothing")))
    assert all(map(only_computes, ("conv2d", "_convolution", "batch_norm", "add", "gelu", "index")))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_code_is_told_from_a_damaged_one(protocol, zipped, tmp_path):
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    path = tmp_path / "x.ckpt"
    path.write_bytes(pickled({"state_dict": Evil(tmp_path / "touched")}, **options))
    with pytest.raises(UnsafeFileError, match=r"x\.ckpt names 'posix\.system', .*: refused") as e:
        read_checkpoint(path)
    assert "weights_only" not in str(e.value)
    assert not (tmp_path / "touched").exists()

    path.write_bytes(pickled({"state_dict": {"a": torch.zeros(999)}})[:-900])
    with pytest.raises(ValueError, match="damaged, cut short") as e:
        read_checkpoint(path)
    assert not isinstance(e.value, UnsafeFileError)
    assert "weights_only" not in str(e.value)


PLACES = {
    "an initializer": lambda proto: proto.graph.initializer[0],
    "a constant": lambda proto: proto.graph.node.add(op_type="Constant").attribute.add(name="v").t,
    "a function": lambda proto: (
        proto.functions.add(name="f").node.add(op_type="Constant").attribute.add(name="v").t
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/passwd"])
def test_a_graph_that_takes_weights_from_other_files_is_refused(place, location, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "inner/model.onnx"
    path.parent.mkdir()
    onnx_format.write(tiny_network(), tiny_spec(), path, Metadata())
    assert "Conv" in onnx_format.operations(path)
    proto = onnx.load(path)
    tensor = PLACES[place](proto)
    for folder in (path.parent, tmp_path):  # so that a reader would find it
        (folder / "weights.bin").write_bytes(bytes(tensor.raw_data) or bytes(4))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    path.write_bytes(proto.SerializeToString())
    for read in (load_runner, describe_artifact):
        with pytest.raises(UnsafeFileError, match=f"from the file '{location}': refused"):
            read(path)


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.pte", "model.pt2", "x.aimodel/metadata.json", "manifest.json"]
)
def test_a_named_pipe_in_an_artifact_is_not_waited_for(name, tmp_path):
    """As `tar` brings it."""
    pipe = tmp_path / "artifact" / name
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    path = pipe.parent if pipe.parent.suffix or name == "manifest.json" else pipe
    for read in (load_runner, describe_artifact):
        with pytest.raises(ValueError, match=f"{pipe.name} is a named pipe or a device"):
            read(path)
