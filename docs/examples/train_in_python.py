"""Training, validation and export without the command."""

from lightning.pytorch import Trainer

from callbacks import EMA, ReparameterizeOnSave
from lightning_modules import ImageClassifier, ImageDataModule
from mobileone.export import export_checkpoint

data = ImageDataModule("images", input_size=32, batch_size=4)
model = ImageClassifier("mobileone_mu0", num_classes=len(data.class_names), lr=0.01)
saver = ReparameterizeOnSave(dirpath="mine", formats=["torchscript"], background=False)
trainer = Trainer(max_epochs=2, logger=False, callbacks=[EMA(decay=0.9), saver])
trainer.fit(model, data)
trainer.validate(model, data)
print(saver.best_artifact_path)
export_checkpoint(saver.best_model_path, "shipped", formats=["torchscript", "onnx"])
