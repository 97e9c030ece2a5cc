"""`est-ds fields`: all fields of run files and study files, from the models that read them."""
