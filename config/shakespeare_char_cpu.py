"""nanoGPT's CPU example: Shakespeare by characters, a small GPT-2; its own run reached a validation loss of 1.88.

Prepare the text first (1.1 MB to download):
    python data/shakespeare_char/prepare.py
"""

out_dir = "out/shakespeare_char_cpu"
dataset = "shakespeare_char"

arch_preset = "gpt2"
n_layer, n_head, n_embd = 4, 4, 128
block_size = 64
dropout = 0.0

batch_size = 12                             # 12 × 64 = 768 tokens an iteration
max_iters = 2000                            # 1.5 passes over the text
learning_rate, min_lr = 1e-3, 1e-4
warmup_iters = 100
beta2 = 0.99                                # few tokens an iteration: remember longer

eval_interval = 250
eval_iters = 0                              # the whole validation set: 111,540 characters
log_interval = 50
