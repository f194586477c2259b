"""The commands `search-policy` and `bitpolicy`."""
