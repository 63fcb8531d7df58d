"""CPU level 4 of 5, medium: 3,000 tokens to learn from; docs/OVERFITTING.md has what comes out."""

base = "cpu_level1_ultra_tiny.py"           # the same corpus, batch, learning rate, validation text

out_dir = "out/cpu_level4_medium"
max_train_tokens = 3_000
n_layer, n_head, n_embd = 3, 3, 96          # N = 437,088, as level 3: only the text is longer
max_iters = 1500                            # the 3,000 tokens 64 times
eval_interval = 75
log_interval = 5
