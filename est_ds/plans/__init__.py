"""Plans: which layers, heads and MLP columns train at a step. No torch, no rank, no clock."""
