"""Lightning callbacks that work for any reparameterizable timm model."""
