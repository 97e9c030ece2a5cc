"""What a plan costs: FLOPs, and how a pipeline is cut by them. No torch."""
