"""Writes trained models as Hugging Face folders, and proves that they are the trained models."""

from est_ds.export.folder import Exported, Wish, export

__all__ = ["Exported", "Wish", "export"]
