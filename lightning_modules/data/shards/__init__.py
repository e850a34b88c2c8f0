"""WebDataset shards: written, verified, and read in exact epochs."""
