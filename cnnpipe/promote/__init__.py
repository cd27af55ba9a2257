"""Decide whether a run becomes the champion."""
