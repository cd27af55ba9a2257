"""Classify folders of images."""
