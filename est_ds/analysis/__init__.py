"""What the papers measured: of a run's full model at a checkpoint, or of networks made here."""
