"""Reading packed corpora: file format, sample order, objectives and batches.

Import from the modules: `indexed.Corpus`, `order.positions`, `loader.Batches`, `objectives`.
Nothing is imported here, so that `order` and `manifest` stay free of torch.
"""
