"""Export ten times once a line was read from stdin: export_ten_times.py FOLDER CHECKPOINT."""

import sys

from mobileone.export import TrainingState, export_model
from tests.helpers.tiny import plain_network, plain_spec

input()
for step in range(10):
    run = TrainingState(step=step, checkpoint=sys.argv[2])
    model = plain_network()
    export_model(model, plain_spec(), sys.argv[1], ["torchscript"], run, overwrite=True)
