"""CPU level 3 of 5, small: 1,000 tokens to learn from; docs/OVERFITTING.md has what comes out."""

base = "cpu_level1_ultra_tiny.py"           # the same corpus, batch, learning rate, validation text

out_dir = "out/cpu_level3_small"
max_train_tokens = 1_000
n_layer, n_head, n_embd = 3, 3, 96          # N = 437,088
max_iters = 800                             # the 1,000 tokens 102.4 times
eval_interval = 40
log_interval = 4
