"""A small LLaMA on the Python documentation, in a few minutes on two CPU cores: what `make demo` trains."""

out_dir = "out/quickstart"
dataset = "pydocs"                          # English that comes with every Python; prepares itself on first use

arch_preset = "llama"
n_layer, n_head, n_embd = 4, 4, 256         # heads of 64; N = 4.3 M with the 4,096-token vocabulary
block_size = 128                            # enough for a paragraph of a docstring
weight_tying = True                         # a second table would add a quarter to that

batch_size = 16                             # 16 × 128 = 2,048 tokens an iteration
max_iters = 600                             # 1.2 M tokens
learning_rate = 2e-3                        # small models stand a high rate
warmup_iters = 50
lr_schedule = "wsd"                         # constant, then straight down over the last fifth

eval_interval = 200
eval_iters = 20
log_interval = 20
