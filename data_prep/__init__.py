"""Text to corpus: gather documents, train a tokenizer, pack tokens, verify files."""
