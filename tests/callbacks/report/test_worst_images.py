"""The images of highest loss: found over all batches, written, read back."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.report.worst_images import WorstImages, read_worst, write_worst


def test_the_worst_of_all_batches_are_kept():
    logits, targets = torch.randn(40, 5), torch.randint(5, (40,))
    images = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 3, 2, 2)
    worst = WorstImages(7)
    for at in range(0, 40, 6):
        worst.add(images[at : at + 6], targets[at : at + 6], logits[at : at + 6])
    losses, kept, _, probabilities = worst.found()
    expected = -torch.log_softmax(logits, dim=1)[torch.arange(40), targets]
    order = expected.argsort(descending=True)[:7]
    assert torch.allclose(losses, expected[order])
    assert kept[:, 0, 0, 0].tolist() == order.tolist()
    assert torch.allclose(probabilities, logits.softmax(dim=1)[order])


def test_fewer_images_than_asked_for():
    worst = WorstImages(9)
    assert worst.found() is None
    worst.add(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]), torch.zeros(2, 4))
    assert len(worst.found()[0]) == 2


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA"), (5, "L")])
def test_what_is_written_is_read(tmp_path, channels, mode):
    pixels = torch.rand(1, channels, 3, 4)
    path = tmp_path / "worst.json"
    names = ("cat", "<b>dog</b>")
    write_worst(
        path, pixels, torch.tensor([2.0]), torch.tensor([1]), torch.tensor([[0.9, 0.1]]), names
    )
    (found,) = read_worst(path)
    assert (found.true, found.predicted, found.loss) == ("<b>dog</b>", "cat", 2.0)
    assert (found.probability, found.probability_true) == pytest.approx((0.9, 0.1))
    image = Image.open(io.BytesIO(base64.b64decode(found.png)))
    assert (image.mode, image.size) == (mode, (4, 3))
    shown = np.asarray(image) if image.mode != "L" else np.asarray(image)[..., None]
    expected = pixels[0, : shown.shape[-1]].permute(1, 2, 0).numpy() * 255
    assert np.abs(shown - expected).max() <= 0.5
    assert [file.name for file in tmp_path.iterdir()] == ["worst.json"]


@pytest.mark.parametrize("content", ["[", '{"a": 1}', '[{"png": "é"}]', '[{"true": 1}]'])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "worst.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="does not hold images"):
        read_worst(path)


def test_pictures_must_be_base64(tmp_path):
    path = tmp_path / "worst.json"
    fields = {"true": "a", "predicted": "b", "probability": 1, "probability_true": 0, "loss": 1}
    path.write_text(json.dumps([fields | {"png": '"><script>'}]), encoding="utf-8")
    with pytest.raises(ValueError, match="does not hold images"):
        read_worst(path)
