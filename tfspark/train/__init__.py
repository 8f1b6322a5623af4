"""What the user trains with: optimizers, triggers, metrics, summaries, checkpoints."""
