"""`llmtrain report`: runs and sweeps as one page that opens anywhere."""
