"""A design with open corpora, and its folder."""
