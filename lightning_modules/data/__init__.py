"""Images and labels: splits, transforms, samplers and loaders that resume exactly.

`datamodule.ImageDataModule` puts them together; `splits` finds the images, `transforms` augments
them, `samplers` order them as a function of (seed, epoch), `shards` reads and writes WebDataset.
"""
