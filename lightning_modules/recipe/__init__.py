"""What is optimized, and how.

`classifier.ImageClassifier` is the LightningModule. It shares `training_module` (seeds, guard,
optimizer and schedules) with the dense tasks; `optimizers`, `schedules`, `mixing` and `metrics`
build what it uses, `finetuning` loads and freezes weights, `distillation` adds a teacher,
`nonfinite_guard` stops a run before NaN reaches the weights.
"""
