"""To the Hugging Face hub: `python push_to_hub.py RUN/checkpoints/best you/name`."""

import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from timm.models import save_for_hf

from mobileone.export import Manifest
from mobileone.export.checkpoint import load_model, read_checkpoint

if len(sys.argv) != 3:
    sys.exit(__doc__)
artifact, repository = Path(sys.argv[1]), sys.argv[2]
checkpoint, manifest = artifact.with_name(f"{artifact.name}.ckpt"), Manifest.load(artifact)
metrics = manifest.training.metrics.items()
network, spec = load_model(read_checkpoint(checkpoint), checkpoint)
card = [
    "---\nlibrary_name: timm\npipeline_tag: image-classification\n---",
    f"# {spec.model_name}, {spec.num_classes} classes\n",
    f'`timm.create_model("hf-hub:{repository}", pretrained=True)`\n',
    "## Metrics\n",
    *(f"- {name}: {value:.4g}" for name, value in metrics if name.startswith("val/")),
    "\n## Files, compared with the network\n",
    *(f"- {name}: {text}" for name, text in manifest.described().items()),
]
about = {name: value for name, value in spec.to_dict().items() if name in network.pretrained_cfg}
about |= {"tag": "", "license": manifest.metadata.license}  # not those of timm's own weights
with tempfile.TemporaryDirectory() as folder:
    shutil.copytree(artifact, folder, dirs_exist_ok=True)
    Path(folder, "README.md").write_text("\n".join(card), encoding="utf-8")
    config = {"label_names": list(spec.class_names), "pretrained_cfg": about}
    save_for_hf(network, folder, config, {"in_chans": spec.input_size[0]}, safe_serialization=True)
    HfApi().create_repo(repository, exist_ok=True)
    HfApi().upload_folder(repo_id=repository, folder_path=folder)
