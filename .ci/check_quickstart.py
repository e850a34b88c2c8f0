"""The quickstart's TorchScript file, judged by a process that knows torch, torchvision and PIL.

Usage: check_quickstart.py ARTIFACT_FOLDER VALIDATION_FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2

AT_LEAST = 0.95  # validation accuracy of the averaged weights


def main(artifact: Path, images: Path) -> None:
    """Classify the validation images; compare with the manifest."""
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    spec = manifest["spec"]
    _, height, width = spec["input_size"]
    transform = v2.Compose(
        [
            v2.Resize(int(height / spec["crop_pct"]), v2.InterpolationMode(spec["interpolation"])),
            v2.CenterCrop((height, width)),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(spec["mean"], spec["std"]),
        ]
    )
    network = torch.jit.load(artifact / manifest["formats"]["torchscript"]["path"])
    right = []
    for file in sorted(images.glob("*/*.png")):
        with torch.no_grad(), Image.open(file) as image:
            logits = network(transform(image.convert("RGB"))[None])
        right.append(spec["class_names"][int(logits.argmax())] == file.parent.name)
    accuracy = sum(right) / len(right)
    claimed = manifest["training"]["metrics"]["val/acc1"]
    print(f"{len(right)} images: {accuracy:.4f}; the manifest says {claimed:.4f}")
    foreign = {"timm", "lightning", "mobileone", "lightning_modules"} & set(sys.modules)
    if foreign or abs(accuracy - claimed) > 1e-6 or accuracy < AT_LEAST:
        sys.exit(f"expected the manifest's accuracy, at least {AT_LEAST}; imported: {foreign}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
