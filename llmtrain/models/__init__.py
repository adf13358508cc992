"""Architectures (config group `model`)."""
