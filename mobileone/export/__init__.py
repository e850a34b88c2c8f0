"""What a trained model becomes: fused artifacts, verified."""
