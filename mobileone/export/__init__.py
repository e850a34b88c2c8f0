"""What a trained model becomes: fused artifacts, verified."""

from mobileone.export.artifact import RejectedError, export_model
from mobileone.export.checkpoint import ExportJob, export_checkpoint
from mobileone.export.formats.table import FORMATS, Format
from mobileone.export.load import load_runner, load_torchscript_artifact
from mobileone.export.manifest import Manifest, TrainingState
from mobileone.export.preprocess import normalize
from mobileone.export.spec import ExportSpec, Metadata

__all__ = [
    "FORMATS",
    "ExportJob",
    "ExportSpec",
    "Format",
    "Manifest",
    "Metadata",
    "RejectedError",
    "TrainingState",
    "export_checkpoint",
    "export_model",
    "load_runner",
    "load_torchscript_artifact",
    "normalize",
]
