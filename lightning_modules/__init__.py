"""LightningModule, data module and command line of the training template."""
