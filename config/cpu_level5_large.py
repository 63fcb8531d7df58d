"""CPU level 5 of 5, large: 10,000 tokens to learn from; docs/OVERFITTING.md has what comes out."""

base = "cpu_level1_ultra_tiny.py"           # the same corpus, batch, learning rate, validation text

out_dir = "out/cpu_level5_large"
max_train_tokens = 10_000
n_layer, n_head, n_embd = 4, 4, 128         # N = 928,512
max_iters = 2000                            # the 10,000 tokens 25.6 times
eval_interval = 100
log_interval = 10
