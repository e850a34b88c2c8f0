"""The file formats: one file a format, one row in `table.FORMATS`."""
