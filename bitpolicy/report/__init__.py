"""The report: what `bitpolicy probe` found, as one HTML file that needs nothing else."""
