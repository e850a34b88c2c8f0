import io
import json
import os

import pytest
import torch

from mobileone.export import ExportSpec
from tests.helpers.tiny import tiny_spec

FIELDS = {
    "model_name": "mobileone_s0",
    "class_names": ["crème, brûlée", 'the "cat"', "猫"],
    "input_size": [3, 64, 96],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.1],
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


def test_a_spec_survives_json_and_a_checkpoint_of_primitives():
    spec = ExportSpec.from_dict(FIELDS)
    assert ExportSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    buffer = io.BytesIO()
    torch.save(spec.to_dict(), buffer)
    buffer.seek(0)
    assert ExportSpec.from_dict(torch.load(buffer, weights_only=True)) == spec


def test_lists_become_tuples_of_plain_numbers():
    spec = ExportSpec.from_dict({**FIELDS, "mean": list(torch.tensor([0.5, 0.25, 1.0]))})
    assert spec.mean == (0.5, 0.25, 1.0)
    assert {type(m) for m in spec.mean} == {float}
    assert spec.num_classes == 3
    hash(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": []}, "empty"),
        ({"class_names": ["a", "a", "b"]}, r"repeated: \['a'\]"),
        ({"class_names": "cat"}, "must be a list"),
        ({"input_size": [3, 64]}, "channels, height, width"),
        ({"input_size": [3, 0, 64]}, "positive"),
        ({"mean": [0.5]}, "one value for each of the 3"),
        ({"std": [0.2, 0.0, 0.1]}, "positive"),
        ({"std": [0.2, float("nan"), 0.1]}, "finite"),
        ({"crop_pct": 0}, r"\(0, 1\]"),
        ({"model_name": ""}, "empty"),
        ({"color": 1}, "unknown fields"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ExportSpec.from_dict({**FIELDS, **change})


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"missing fields \['std'\]"):
        ExportSpec.from_dict({k: v for k, v in FIELDS.items() if k != "std"})


def test_a_class_name_that_no_file_can_hold_is_refused():
    """As `os.fsdecode` makes it of a folder's name in another encoding."""
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(ValueError, match=r"class name 'caf\\udce9' is not Unicode text"):
        tiny_spec(names=("a", name))
    assert tiny_spec(names=("a", "café")).class_names == ("a", "café")
