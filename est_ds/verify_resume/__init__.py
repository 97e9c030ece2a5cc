"""`est-ds verify-resume`: that a killed and resumed run is the run that was never killed."""
