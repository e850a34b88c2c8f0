"""The experiments of the paper that train.

`ablation` trains variants of the network and the recipe (Tables 5, 6 and 8).
"""
