"""The artifact at every validation: queued, exported by a subprocess, published in a folder.

`callback.ReparameterizeOnSave` is the callback; `publisher` runs the exports one after the other,
keeps the best and updates links; `folder` knows the names of a run's files.
"""
