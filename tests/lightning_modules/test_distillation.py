"""The distillation loss against its definition and its gradient; the teacher in a training."""

import pytest
import timm
import torch
from lightning.pytorch import Trainer

from callbacks.ema import EMA
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data import ImageDataModule
from lightning_modules.distillation import Teacher, distillation_loss


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


def test_teacher_sees_its_own_normalisation(teacher_file):
    theirs = timm.create_model("test_byobnet", num_classes=2)
    theirs.load_state_dict(torch.load(teacher_file, weights_only=True))
    cfg = timm.data.resolve_data_config(model=theirs)
    pixels, mean, std = torch.rand(2, 3, 32, 32), (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)
    teacher = Teacher("test_byobnet", 2, 3, teacher_file, mean, std, torch.device("cpu"))

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    expected = theirs.eval()(normalised(cfg["mean"], cfg["std"]))
    torch.testing.assert_close(teacher(normalised(mean, std)), expected)


def fit(root, folder, **options):
    torch.manual_seed(1)
    model = ImageClassifier("test_byobnet", num_classes=2, lr=0.05, **options)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[EMA(0.5)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = ImageDataModule(str(root), batch_size=5, input_size=32, num_workers=0, seed=0)
    trainer.fit(model, data)
    return model, trainer


def test_student_follows_the_teacher_and_the_checkpoint_holds_the_student_alone(
    pets, tmp_path, teacher_file
):
    options = {"teacher": "test_byobnet", "teacher_weights": teacher_file}
    model, trainer = fit(pets, tmp_path, **options)
    assert not any("teacher" in name for name in model.state_dict())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    (tmp_path / "t.pth").unlink()
    ImageClassifier.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)  # needs no file


def test_weight_zero_is_training_without_a_teacher(pets, tmp_path, teacher_file):
    options = {"teacher": "test_byobnet", "teacher_weights": teacher_file}
    alone, _ = fit(pets, tmp_path)
    unheard, _ = fit(pets, tmp_path, **options, distill_weight=0.0)
    heard, _ = fit(pets, tmp_path, **options)
    key = "model.head.fc.weight"
    assert torch.equal(alone.state_dict()[key], unheard.state_dict()[key])
    assert not torch.allclose(alone.state_dict()[key], heard.state_dict()[key])


def test_a_teacher_of_other_classes_is_refused(pets, tmp_path, monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda n, pretrained=False, **o: real(n, **o))
    with pytest.raises(ValueError, match="knows 1000 classes, the data have 2"):
        fit(pets, tmp_path, teacher="test_byobnet")
