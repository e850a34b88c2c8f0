"""Train for an epoch and export: train_with_formats.py FOLDER BACKGROUND FORMAT..."""

import sys
from pathlib import Path

from tests.helpers.checkpoints import fit, saver
from tests.helpers.modules import ScoredClassifier

folder, background, *formats = sys.argv[1:]
callback = saver(Path(folder) / "saved", formats=formats, background=background == "true")
fit(ScoredClassifier([0.5]), callback, Path(folder))
assert callback.last_error is None
assert callback.artifact_path is not None
