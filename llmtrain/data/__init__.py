"""What is learned from (config group `data`)."""
