"""llmtrain: train large-model architectures from one YAML file or one command line."""

__version__ = "0.1.0"
