"""CPU level 1 of 5, ultra tiny: 100 tokens to learn from, seconds on one CPU core; docs/OVERFITTING.md has what comes out.

All five, three seeds each, with tests and plots:
    python experiments/cpu_levels.py all
"""

out_dir = "out/cpu_level1_ultra_tiny"
dataset = "stories"                         # from a grammar, by a BPE of 1,024; prepares itself on first use
max_train_tokens = 100                      # one story and the beginning of the next

arch_preset = "gpt2"
n_layer, n_head, n_embd = 2, 2, 32          # N = 59,264 with the vocabulary of 1,024
block_size = 32

batch_size = 4                              # 4 × 32 = 128 tokens an iteration: more than there are
max_iters = 200                             # the 100 tokens 256 times
learning_rate = 1e-3                        # cosine down to a tenth

eval_interval = 10
eval_iters = 0                              # the whole validation text: about 10,000 tokens, the same at every level
log_interval = 1
save_interval = 0                           # only at the end
device, dtype, threads = "cpu", "float32", 1   # the same figures on every machine of a kind; two threads gain nothing here
