"""Networks of integers: 8-bit activations, weights of 8 or fewer bits."""
