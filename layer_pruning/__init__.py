"""Which layers of a model can go, and what may take their place. What `compress.py` is made of."""
