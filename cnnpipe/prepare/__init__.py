"""Prepare a dataset."""
