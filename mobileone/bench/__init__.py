"""Measurement: parameters, operations, latency, memory, and the cost of a training step.

`results` is one result with its machine and versions, `paper` the paper's numbers, `suites` lists
of networks; `timing` is the order and the statistic, `runtimes` the table of runtimes; `inference`
and `training_step` measure, `studies` repeats the paper's experiments, `show` draws tables and
charts.
"""
