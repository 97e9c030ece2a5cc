"""Does a schedule pay? Studies of arms against a baseline."""
