"""How training samples are varied (config group `augment`); what is measured on held-out data never is."""
