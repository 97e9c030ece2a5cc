"""Reading packed corpora: file format, sample order and batches.

Import from the modules: `indexed.Corpus`, `order.positions`, `loader.Batches`.
Nothing is imported here, so that `order` and `manifest` stay free of torch.
"""
