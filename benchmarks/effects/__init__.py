"""What each knob does, seen: the experiments, their measures, their figures and their page."""
