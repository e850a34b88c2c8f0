"""Images and labels: splits, transforms, samplers and loaders that resume exactly."""
