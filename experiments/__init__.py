"""Studies made of the commands: each of their runs goes through train.py's own loop."""
