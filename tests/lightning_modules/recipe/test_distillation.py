"""The distillation loss against its definition and its gradient; the teacher in a training."""

import pytest
import timm
import torch

from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.recipe.distillation import Teacher, distillation_loss


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_is_the_divergence_and_its_gradient_the_difference(temperature):
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, dtype=torch.float64)
    p, q = ((x / temperature).exp() for x in (teacher, student))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    expected = temperature**2 * (p * (p / q).log()).sum(1)
    loss = distillation_loss(student, teacher, temperature)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    torch.testing.assert_close(student.grad, (temperature * (q - p)).detach())
    assert distillation_loss(teacher, teacher, temperature).abs().max() < 1e-12


@pytest.fixture
def teacher_file(tmp_path):
    torch.save(timm.create_model("test_byobnet", num_classes=2).state_dict(), tmp_path / "t.pth")
    return str(tmp_path / "t.pth")


def test_teacher_sees_its_own_normalization(teacher_file):
    theirs = timm.create_model("test_byobnet", num_classes=2)
    theirs.load_state_dict(torch.load(teacher_file, weights_only=True))
    cfg = timm.data.resolve_data_config(model=theirs)
    pixels, mean, std = torch.rand(2, 3, 32, 32), (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)
    teacher = Teacher("test_byobnet", 2, 3, teacher_file, mean, std, torch.device("cpu"))

    def normalized(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    expected = theirs.eval()(normalized(cfg["mean"], cfg["std"]))
    torch.testing.assert_close(teacher(normalized(mean, std)), expected)


def student(**options):
    torch.manual_seed(1)
    return ImageClassifier("test_byobnet", num_classes=2, lr=0.05, **options)


def test_student_follows_the_teacher_and_the_checkpoint_holds_the_student_alone(
    train, tmp_path, teacher_file
):
    options = {"teacher": "test_byobnet", "teacher_weights": teacher_file}
    model = student(**options)
    trainer = train(model, batch_size=5, epochs=3)
    assert not any("teacher" in name for name in model.state_dict())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    (tmp_path / "t.pth").unlink()
    ImageClassifier.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)  # needs no file


def test_weight_zero_is_training_without_a_teacher(train, teacher_file):
    options = {"teacher": "test_byobnet", "teacher_weights": teacher_file}
    alone, unheard, heard = (
        student(**more) for more in ({}, {**options, "distill_weight": 0.0}, options)
    )
    for model in (alone, unheard, heard):
        train(model, batch_size=5, epochs=3)
    key = "model.head.fc.weight"
    assert torch.equal(alone.state_dict()[key], unheard.state_dict()[key])
    assert not torch.allclose(alone.state_dict()[key], heard.state_dict()[key])


def test_a_teacher_of_other_classes_is_refused(train, monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda n, pretrained=False, **o: real(n, **o))
    with pytest.raises(ValueError, match="knows 1000 classes, the data have 2"):
        train(student(teacher="test_byobnet"), batch_size=5, epochs=3)
