"""Optimizers (config group `optim`)."""
