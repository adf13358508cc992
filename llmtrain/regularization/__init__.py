"""What keeps a model from fitting its data too closely (config group `regularization`)."""
