"""Capture and graph language: what the passes read and write."""
