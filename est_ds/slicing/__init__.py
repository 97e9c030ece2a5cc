"""Subnetworks of unmodified Hugging Face models, by slicing leaf modules in place."""
