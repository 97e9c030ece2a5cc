"""What a trained model is worth: held-out losses, tasks and fine-tuning of its exported folder."""
