"""A run: its folder, configuration, trainer, tracking, and how it resumes.

`fit` is `mobileone fit`, `validate` and `test` on LightningCLI; `folder` names a run's files,
`resume` finds what `--resume auto` continues, `wandb_logger` survives a lost connection.
"""
