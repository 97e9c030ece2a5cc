"""Checkpoints that belong to no layout: their format, their checks, and which of them are kept.

A checkpoint is a folder `step_XXXXXXXX` (steps done): `checkpoint.json`, and for every process that
wrote it one `rank_XXXXX.safetensors` with flat ranges of weights and moments under Hugging Face
names. Any process reads any range from any number of such files.
"""
