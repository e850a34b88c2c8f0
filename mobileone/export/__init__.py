"""What a trained model becomes: fused artifacts, verified."""

from mobileone.export.artifact import export_model, load_torchscript_artifact
from mobileone.export.checkpoint import export_checkpoint
from mobileone.export.formats import FORMATS
from mobileone.export.manifest import Manifest, TrainingState
from mobileone.export.metadata import Metadata
from mobileone.export.spec import ExportSpec

__all__ = [
    "FORMATS",
    "ExportSpec",
    "Manifest",
    "Metadata",
    "TrainingState",
    "export_checkpoint",
    "export_model",
    "load_torchscript_artifact",
]
