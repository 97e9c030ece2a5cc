"""Evolving-subnetwork pretraining of language models on DeepSpeed."""

import logging

__version__ = "0.1.0"

# It logs to standard output, where verbs print JSON, and transformers imports it.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
