"""Documents out of every kind of source.

A reader cuts its source into pieces of about a mebibyte, in order and cheaply; a piece turns into
documents wherever it is sent. So one process feeds many that parse and tokenize, and any piece
can be the first one after an interruption.
"""
