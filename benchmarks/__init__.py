"""Benchmarks that run cnnpipe and its peers side by side: `make bench`."""
