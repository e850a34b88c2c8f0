"""The experiments of the paper that measure without training."""
