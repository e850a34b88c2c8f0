"""torchvision's decoder gives Pillow's pixels, and the transforms the same crops."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from lightning_modules.data.decoders import accept_tensors, read_tensor
from lightning_modules.data.image_io import read_image
from lightning_modules.data.transforms import resolve_config, train_transform


@pytest.fixture(scope="module")
def photographs():
    """JPEG files of two real photographs."""
    files = []
    for pixels, quality in zip(load_sample_images().images, (85, 95), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        files.append(buffer.getvalue())
    return files


def test_pixels_of_jpegs_are_pillows(photographs):
    for content in photographs:
        tensor = read_tensor(io.BytesIO(content), "RGB")
        assert isinstance(tensor, torch.Tensor)
        expected = np.asarray(read_image(io.BytesIO(content), "RGB"))
        difference = tensor.permute(1, 2, 0).numpy().astype(int) - expected
        # both carry their own libjpeg-turbo, which may differ in the last bit
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_and_flips_are_the_same_up_to_rounding(photographs, interpolation):
    pillow = train_transform(resolve_config("mobileone_s0", 64, interpolation=interpolation))
    both = accept_tensors(pillow)
    for seed in range(10):
        for content in photographs:
            outputs = []
            for image, transform in (
                (read_image(io.BytesIO(content), "RGB"), pillow),
                (read_tensor(io.BytesIO(content), "RGB"), both),
                (read_image(io.BytesIO(content), "RGB"), both),
            ):
                random.seed(seed)
                torch.manual_seed(seed)
                outputs.append(transform(image))
            assert torch.equal(outputs[0], outputs[2])
            std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
            levels = (outputs[0] - outputs[1]).abs() * std * 255
            # torchvision's weights are 16-bit numbers: rounding differs by up to 8 levels
            assert levels.mean() < 1
            assert levels.max() < 10


def test_other_images_are_pillows(photographs):
    gray, png = io.BytesIO(), io.BytesIO()
    Image.new("L", (5, 4), 90).save(gray, "JPEG")
    Image.new("RGB", (5, 4), (1, 2, 3)).save(png, "PNG")
    for file in (gray, png):
        file.seek(0)
        assert isinstance(read_tensor(file, "RGB"), Image.Image)
    assert isinstance(read_tensor(io.BytesIO(photographs[0]), "L"), Image.Image)


def test_truncated_jpeg_is_an_error_in_words(photographs):
    with pytest.raises(OSError, match=r"^Image is incomplete or truncated$"):
        read_tensor(io.BytesIO(photographs[0][:5000]), "RGB")


def test_images_that_need_no_conversion_are_not_copied(photographs):
    image = Image.open(io.BytesIO(photographs[0]))
    expected = np.asarray(image.convert("RGB"))
    read = read_image(io.BytesIO(photographs[0]), "RGB")
    assert np.array_equal(np.asarray(read), expected)
    assert np.array_equal(np.asarray(read.crop((5, 5, 9, 9))), expected[5:9, 5:9])
