"""CPU level 2 of 5, tiny: 200 tokens to learn from; docs/OVERFITTING.md has what comes out."""

base = "cpu_level1_ultra_tiny.py"           # the same corpus, batch, learning rate, validation text

out_dir = "out/cpu_level2_tiny"
max_train_tokens = 200
n_layer, n_head, n_embd = 2, 2, 64          # N = 167,680
max_iters = 500                             # the 200 tokens 320 times
eval_interval = 25
log_interval = 2
