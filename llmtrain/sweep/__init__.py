"""Many runs: the jobs of a grid or of cross-validation, each a process of its own, and what they come to."""
