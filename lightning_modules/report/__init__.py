"""One HTML page of results and a run."""
