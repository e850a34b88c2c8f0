"""What the data modules hand to the networks, from generated and from real layouts."""

import json

import pytest
import torch
from PIL import Image

from lightning_modules.data.samplers import SampleKey
from lightning_modules.dense.data import DetectionData, SegmentationData
from lightning_modules.dense.shapes import CLASSES, Shapes
from lightning_modules.dense.sources import VOC_CLASSES, CocoBoxes, VocMasks
from tests.helpers.command import error_of

pytest.importorskip("pycocotools", reason="needs the extra `dense`")


def test_shapes_are_reproducible_and_boxes_fit_the_masks():
    pictures = [Shapes(8, 64, 3)[index] for index in range(8)]
    assert torch.equal(pictures[2].image, Shapes(3, 64, 3)[2].image)
    assert not torch.equal(pictures[2].image, Shapes(3, 64, 4)[2].image)
    for picture in pictures:
        assert len(picture.boxes) == len(picture.labels) >= 1
        for box, label in zip(picture.boxes, picture.labels, strict=True):
            rows, columns = torch.where(picture.mask == label)
            x1, y1, x2, y2 = box.tolist()
            inside = (columns >= x1 - 1) & (columns <= x2 + 1) & (rows >= y1 - 1) & (rows <= y2 + 1)
            found = torch.stack([columns[inside].min(), rows[inside].min()])
            assert (found - box[:2]).abs().max() <= 1.5
            found = torch.stack([columns[inside].max(), rows[inside].max()])
            assert (found - box[2:]).abs().max() <= 1.5
    assert {int(label) for p in pictures for label in p.labels} == {1, 2, 3}
    assert len(CLASSES) == 4


def test_no_picture_of_validation_is_one_of_training():
    data = DetectionData(size=32, count=16, num_workers=0)
    train, val = ({split[i][0].sum().item() for i in range(4)} for split in map(data.split, (1, 0)))
    assert len(train) == 4 and not train & val


# --- Pascal VOC


def test_voc_masks_keep_their_classes(voc):
    data = SegmentationData(dataset="voc", root=str(voc), size=64, batch_size=2, num_workers=0)
    assert data.class_names == VOC_CLASSES
    assert VOC_CLASSES[15] == "person" and VOC_CLASSES[20] == "tvmonitor"
    images, masks = next(iter(data.val_dataloader()))
    assert images.shape == (2, 3, 64, 64) and masks.dtype == torch.int64
    for mask, number in zip(masks, (4, 5), strict=True):
        assert set(mask.unique().tolist()) == {0, 1 + number, 255}
        assert (mask[:30] == 1 + number).all() and (mask[36:] == 0).all()


def test_voc_augments_image_and_mask_alike(voc):
    """A black image with a white corner: wherever the crop is, white pixels are of the class."""
    folder = voc / "VOCdevkit/VOC2012"
    image, mask = Image.new("RGB", (50, 40)), Image.new("L", (50, 40))
    image.paste((255, 255, 255), (0, 0, 30, 20))
    mask.paste(1, (0, 0, 30, 20))
    image.save(folder / "JPEGImages/2007_0.jpg", quality=95)
    mask.save(folder / "SegmentationClass/2007_0.png")
    data = SegmentationData(dataset="voc", root=str(voc), size=64, batch_size=2, num_workers=0)
    shown = set()
    for epoch in range(20):
        pixels, mask = data.split(True)[SampleKey(epoch, 0)]
        white = pixels.mean(dim=0) > 0
        assert (white == (mask == 1)).float().mean() > 0.95
        shown.add(round(float(white.float().mean()), 2))
    assert len(shown) > 5  # crops differ


def test_voc_reads_gray_images(voc):
    sample = VocMasks(voc, "train")[2]
    assert sample.image.shape == (3, 70, 40) and sample.mask.shape == (70, 40)
    assert torch.equal(sample.image[0], sample.image[2])


def _replace_mask(voc, image):
    image.save(voc / "VOCdevkit/VOC2012/SegmentationClass/2007_0.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: _replace_mask(v, Image.new("RGB", (50, 40))), "2007_0.png is RGB.*palette"),
        (lambda v: _replace_mask(v, Image.new("L", (40, 50))), r"\(50, 40\)"),
        (lambda v: _replace_mask(v, Image.new("L", (50, 40), 21)), "class 21.*0 to 20, and 255"),
    ],
)
def test_masks_that_are_not_vocs(voc, damage, message):
    damage(voc)
    with pytest.raises(ValueError, match=message):
        VocMasks(voc, "train")[0]


# --- COCO


def test_coco_boxes_are_corners_and_labels_have_no_gaps(coco):
    data = DetectionData(dataset="coco", root=str(coco), batch_size=2, num_workers=0)
    assert data.class_names == ("background", "dog", "bird", "cat")
    val = data.split(False)
    assert len(val) == 6
    image, target = val[0]
    assert image.shape == (3, 40, 50) and 0 <= image.min() and image.max() <= 1
    assert target["boxes"].tolist() == [[10, 5, 40, 25], [2.5, 8, 22.5, 38], [0, 0, 50, 40]]
    assert target["labels"].tolist() == [2, 1, 3]
    assert target["iscrowd"].tolist() == [0, 0, 1]
    gray, target = val[2]
    assert gray.shape == (3, 70, 40) and torch.equal(gray[0], gray[1])
    assert val[3][1]["iscrowd"].tolist() == [1]
    assert val[4][1]["boxes"].shape == (0, 4) and val[4][1]["labels"].shape == (0,)


def test_coco_trains_on_objects_that_are_no_crowds(coco):
    train = CocoBoxes(coco, "train2017", train=True)
    assert len(train) == 4  # not the crowd alone, not the empty one
    assert [sorted(train[i].labels.tolist()) for i in range(4)] == [[1, 2], [3], [1], [1]]
    assert all(not train[i].iscrowd.any() for i in range(4))
    data = DetectionData(dataset="coco", root=str(coco), batch_size=2, num_workers=0)
    for _ in range(10):
        for index in range(4):
            image, target = data.split(True)[index]
            boxes = target["boxes"]
            assert len(boxes) == len(target["labels"]) == len(target["iscrowd"])
            height, width = image.shape[-2:]
            assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
            assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()


def _edit(coco, change, split="val2017"):
    file = coco / f"annotations/instances_{split}.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "val2017/003.jpg").unlink(), "003.jpg is missing, and 0 more of the 6"),
        (lambda c: _edit(c, lambda v: v.pop("categories")), "not in COCO's format"),
        (lambda c: _edit(c, lambda v: v["annotations"][1].pop("bbox")), "not in COCO's format"),
        (lambda c: _edit(c, lambda v: v["annotations"][1]["bbox"].pop()), "four numbers"),
        (
            lambda c: _edit(c, lambda v: v["annotations"][1].update(category_id=5)),
            r"category_id.*\[5\]",
        ),
        (
            lambda c: _edit(c, lambda v: v["categories"].pop(), "train2017"),
            "others than those of val2017.*bird|category_id",
        ),
        (lambda c: (c / "annotations/instances_val2017.json").write_text("{"), "not in COCO's"),
    ],
)
def test_annotations_that_are_not_cocos(coco, damage, message):
    damage(coco)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DetectionData(dataset="coco", root=str(coco), batch_size=2, num_workers=0).setup("fit")


def test_categories_of_training_and_validation_must_agree(coco, make_coco):
    other = make_coco("other", "fish")
    (coco / "annotations/instances_val2017.json").write_text(
        (other / "annotations/instances_val2017.json").read_text()
    )
    with pytest.raises(ValueError, match=r"others than those of val2017: \['bird', 'fish'\]"):
        DetectionData(dataset="coco", root=str(coco), batch_size=2, num_workers=0).setup("fit")


# --- order and augmentation


@pytest.mark.parametrize(("kind", "name"), [(SegmentationData, "voc"), (DetectionData, "coco")])
def test_batches_depend_on_seed_and_epoch_alone(kind, name, request):
    root = str(request.getfixturevalue(name))

    def batches(workers, seed, epoch):
        torch.manual_seed(workers + epoch)  # the global generator has no part in it
        options = {"batch_size": 2, "num_workers": workers, "seed": seed, "size": 64}
        loader = kind(dataset=name, root=root, **options).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [image for images, _ in loader for image in images]

    def same(first, second):
        return all(map(torch.equal, first, second))

    expected = batches(0, 1, 3)
    assert len(expected) == 4
    assert same(expected, batches(2, 1, 3))
    assert not same(expected, batches(0, 1, 4)) and not same(expected, batches(0, 2, 3))


# --- arguments


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SegmentationData, {"dataset": "ade"}, "dataset='ade'.*shapes, voc"),
        (SegmentationData, {"dataset": "voc"}, r"needs --data\.root"),
        (SegmentationData, {"model": "mobileone_s9"}, "mobileone_s9"),
        (DetectionData, {"dataset": "voc"}, "dataset='voc'.*shapes, coco"),
        (DetectionData, {"root": "somewhere"}, "shapes reads no files"),
        (DetectionData, {"size": 40}, "size=40"),
        (DetectionData, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_too_few_images_for_a_batch():
    data = DetectionData(size=32, count=3, batch_size=4, num_workers=0)
    with pytest.raises(ValueError, match="batch_size=4 is larger than the 3 training images"):
        data.setup("fit")
    data.setup("validate")  # which needs no training images


@pytest.mark.parametrize("task", ["segment", "detect"])
@pytest.mark.parametrize("missing", ["root", "an image", "its mask"])
def test_missing_data_are_told_before_a_run_begins(task, missing, request, tmp_path, capsys):
    name = {"segment": "voc", "detect": "coco"}[task]
    root = tmp_path
    if missing != "root":
        root = request.getfixturevalue(name)
        if task == "detect" and missing == "its mask":
            pytest.skip("detection has no masks")
        gone = "2007_1.jpg" if missing == "an image" else "2007_1.png"
        next(root.rglob(gone if task == "segment" else "train2017/001.jpg")).unlink()
    options = ["--data.dataset", name, "--data.root", str(root), "--data.num_workers", "0"]
    options += ["--data.batch_size", "2", "--model.model", "mobileone_mu0"]
    message = error_of(capsys, task, "fit", *options)
    assert f"mobileone {task} fit: error:" in message
    assert ("in " + repr(str(root)) if missing == "root" else "is missing, and 0 more") in message
    assert not (tmp_path / "runs").exists()
