"""Train and export on two ranks, each of which would rank the scores differently.

artifacts_on_two_ranks.py FOLDER works|fails: writes rank-0.txt and rank-1.txt next to the folder.
"""

import sys
from pathlib import Path

from mobileone.export import checkpoint
from tests.helpers.checkpoints import fit, saver
from tests.helpers.modules import ScoredClassifier


def fail(*arguments, **options):
    raise RuntimeError("no such operator")


class Unequal(ScoredClassifier):
    def on_validation_epoch_end(self):
        scores = [0.9, 0.1, 0.5] if self.global_rank == 0 else [0.1, 0.9, 0.5]
        self.log("val/acc1", scores[self.current_epoch], sync_dist=False)


folder = Path(sys.argv[1])
if sys.argv[2] == "fails":
    checkpoint.export_model = fail
callback = saver(folder, background=False)
trainer = fit(Unequal(), callback, folder, max_epochs=3, devices=2, strategy="ddp")
# not to the standard output, where lines of two processes mix
result = f"{trainer.global_rank} {callback.best_model_path} {callback.last_error}"
(folder.parent / f"rank-{trainer.global_rank}.txt").write_text(result)
