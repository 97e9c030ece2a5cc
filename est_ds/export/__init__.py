"""To Hugging Face: the whole model, or a part of it."""
