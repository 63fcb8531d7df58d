"""Parameters, FLOPs, memory, time, scaling laws and hardware peaks: the only place where any of them is computed.

Everyone may ask these modules; they know `ModelConfig` and nothing of training. `detailed_cost_analysis.py` (with its
tables in `cost_report.py`) is a command, and like every command may read recipes and other configurations.
"""
