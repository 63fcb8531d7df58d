"""Parameters, FLOPs, memory, time and hardware peaks: the only place where any of them is computed.

Everyone may ask this package; it knows `ModelConfig` and nothing of training.
"""
