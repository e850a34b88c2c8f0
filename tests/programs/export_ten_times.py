"""Export ten times once a line was read from stdin: export_ten_times.py FOLDER CHECKPOINT."""

import sys

from mobileone.export import TrainingState, export_model
from tests.helpers.tiny import tiny_network, tiny_spec

input()
for step in range(10):
    run = TrainingState(step=step, checkpoint=sys.argv[2])
    model = tiny_network()
    export_model(model, tiny_spec(), sys.argv[1], ["torchscript"], run, overwrite=True)
