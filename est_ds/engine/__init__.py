"""DeepSpeed engines behind one `train_batch`. The only package that imports DeepSpeed."""
