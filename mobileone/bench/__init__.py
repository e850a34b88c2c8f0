"""What is measured about the family: parameters, operations, latency, the cost of training."""
