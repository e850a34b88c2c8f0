"""What is optimized, and how.

`classifier.ImageClassifier` is the LightningModule; `optimizers` and `schedules` build what it
steps, `mixing` and `metrics` what it adds, `finetuning` loads and freezes weights, `distillation`
adds a teacher, `nonfinite_guard` stops a run before NaN reaches the weights.
"""
