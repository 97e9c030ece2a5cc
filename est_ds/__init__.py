"""Evolving-subnetwork pretraining of language models on DeepSpeed."""

__version__ = "0.1.0"
