"""Arguments of a network by which timm fetches a file of the sender's choice."""

__all__ = ["fetching"]


def fetching(tmp_path):
    """A folder that timm would make, and the arguments that let it."""
    (tmp_path / "sent.py").write_text("print('code ran')")
    overlay = {"url": (tmp_path / "sent.py").as_uri(), "hf_hub_id": None}
    folder = tmp_path / "site-packages"
    return folder, {
        "pretrained": True,
        "pretrained_cfg_overlay": overlay,
        "cache_dir": str(folder),
    }
