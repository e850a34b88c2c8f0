"""The artifact at every validation: queued, exported by a subprocess, published in a folder."""
