"""The experiments of the paper that train."""
