"""Export of a trained segmentation or detection network, fused as a whole."""

import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_modules.dense.models import Detector, Segmenter
from lightning_modules.transforms import resolve_config
from mobileone import reparameterize
from mobileone.dense.detection import RawSSD
from mobileone.export.formats import FLOAT16_TOLERANCE, FLOAT32_TOLERANCE
from mobileone.export.preprocess import denormalise, normalise
from mobileone.export.spec import ExportSpec

__all__ = ["export_detector", "export_segmenter"]


def export_segmenter(
    checkpoint: str | Path, directory: str | Path, size: int = 512, coreml: bool = True
) -> list[Path]:
    """Write a segmentation checkpoint's fused network as TorchScript and Core ML.

    TorchScript takes normalised images (N, 3, size, size), Core ML one RGB image of that size;
    both return logits (N, classes, size, size), and both are compared with the network.

    Args:
        checkpoint: written by `mobileone segment fit`.
        directory: where to write `model.torchscript.pt` and `model.mlpackage`.
        size: side of the images in pixels, a multiple of 32.
        coreml: write the Core ML package, too, in float16.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: the files exist.
        ValueError: the size cannot be used, or a file computes something else than the network.
    """
    if size < 32 or size % 32:
        raise ValueError(f"size={size} must be a multiple of 32.")
    module = _load(Segmenter, checkpoint)
    network = _fused(module)
    model, classes = module.hparams["model"], module.hparams["num_classes"]
    names = tuple(f"class {number}" for number in range(classes))
    spec = ExportSpec(model, names, **resolve_config(model, size))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.uint8)
    example = normalise(pixels, spec)
    folder = _new(directory)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(network, example, check_trace=False)
        _compare(traced(example), network(example), FLOAT32_TOLERANCE, "TorchScript")
    files = [_save(traced, folder / "model.torchscript.pt")]
    if coreml:
        files.append(_coreml(network, spec, example, folder / "model.mlpackage"))
    return files


def export_detector(checkpoint: str | Path, directory: str | Path) -> list[Path]:
    """Write a detection checkpoint's fused network as TorchScript, in two forms.

    `detector.torchscript.pt` is everything, from images in 0..1 to boxes after non-maximum
    suppression; it needs torchvision's operators where it runs. `raw.torchscript.pt` takes
    normalised images (N, 3, size, size) and returns offsets (N, A, 4) and logits
    (N, A, classes) of all anchors.

    Args:
        checkpoint: written by `mobileone detect fit`.
        directory: where to write the files.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: the files exist.
        ValueError: a file computes something else than the network.
    """
    module = _load(Detector, checkpoint)
    network, size = _fused(module), module.hparams["size"]
    folder = _new(directory)
    image = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        warnings.filterwarnings("ignore", message="RCNN always returns|SSD always returns")
        whole = torch.jit.script(network)
        raw_network = RawSSD(network).eval()
        raw = torch.jit.trace(raw_network, image[None], check_trace=False)
        for found, expected in zip(raw(image[None]), raw_network(image[None]), strict=True):
            _compare(found, expected, FLOAT32_TOLERANCE, "TorchScript")
        _compare(whole([image])[1][0]["boxes"], network([image])[0]["boxes"], 1e-2, "TorchScript")
    return [
        _save(whole, folder / "detector.torchscript.pt"),
        _save(raw, folder / "raw.torchscript.pt"),
    ]


def _load(kind: type[LightningModule], checkpoint: str | Path) -> LightningModule:
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist.")
    try:
        return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is no checkpoint of a {kind.__name__}: {error}") from error


def _fused(module: LightningModule) -> nn.Module:
    network = module.model
    assert isinstance(network, nn.Module)
    return reparameterize(network.eval()).requires_grad_(False)


def _new(directory: str | Path) -> Path:
    folder = Path(directory).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{str(folder)!r} exists and is not empty. Give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save(module: torch.jit.ScriptModule, path: Path) -> Path:
    beside = path.with_name(f".{path.name}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        torch.jit.save(module, str(beside))
    return beside.replace(path)


def _coreml(network: nn.Module, spec: ExportSpec, example: Tensor, path: Path) -> Path:
    """Convert, read the file back, and compare what it computes with the network."""
    from mobileone.export.dense import MapProgram, write_map

    beside = path.with_name(f"beside-{path.name}")
    write_map(network, spec, beside)
    pixels = denormalise(example, spec)
    found = MapProgram(beside).run(pixels[0])
    _compare(found, network(normalise(pixels, spec)), FLOAT16_TOLERANCE, "Core ML")
    return beside.rename(path)


def _compare(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    if found.shape != expected.shape:
        raise ValueError(f"the {name} file returns {found.shape}, not {expected.shape}")
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not error <= tolerance:
        raise ValueError(f"the {name} file differs by {error:.1e} from the network")
