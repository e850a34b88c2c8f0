"""Export of networks with several outputs."""
