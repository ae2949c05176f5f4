"""The run report: an HTML page about one or several runs, made from their work directories."""
