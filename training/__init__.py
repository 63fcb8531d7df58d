"""What the training loop is made of: data, optimizers, schedules, precision, checkpoints."""
