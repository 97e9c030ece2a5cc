"""Who starts the processes, from outside."""
