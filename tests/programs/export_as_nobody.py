"""Export as a user who may not write there; prints the error: export_as_nobody.py FOLDER."""

import os
import sys

from mobileone.export import export_model
from tests.helpers.tiny import tiny_network, tiny_spec

os.setuid(65534)
try:
    export_model(tiny_network(), tiny_spec(), sys.argv[1], ["torchscript"])
except PermissionError as error:
    print(error)
