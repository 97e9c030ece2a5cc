"""Who is there, inside a process: its place among the others, notices, the watchdog."""
