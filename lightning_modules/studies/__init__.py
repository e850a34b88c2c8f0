"""Experiments that train, those of the paper and one of integers.

`ablation` trains variants of the network and the recipe (Tables 5, 6 and 8), `quantization` folds
and trains integer networks; `cells` keeps what is finished.
"""
