"""One self-contained HTML page about a data set and its stored scores."""
