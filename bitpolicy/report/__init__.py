"""The report: the results of `bitpolicy probe` or of a search, as one self-contained HTML file."""
