"""Smaller files: `methods` is the table, `bias_correction` restores accuracy after rounding."""
