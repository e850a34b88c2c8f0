"""One HTML page of benchmark results and a run.

`page.write_report` writes it; the file needs no network and no other file.
"""
