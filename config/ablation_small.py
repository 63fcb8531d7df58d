"""A small GPT-2 for ablations on a CPU: under a minute a run on one thread; docs/ABLATIONS.md has what came out.

    python ablate.py config/ablation_small.py --vary norm_position=pre,post --seeds=3 --match=params
"""

out_dir = "out/ablation_small"
dataset = "pydocs"                          # English that comes with every Python; prepares itself on first use

arch_preset = "gpt2"                        # learned positions, LayerNorm, GELU, pre-norm, biases, tied: what is varied
n_layer, n_head, n_embd = 4, 4, 128         # N = 1.33 M, 0.52 M of it the table of 4,096 tokens
block_size = 128

batch_size = 16                             # 16 × 128 = 2,048 tokens an iteration
max_iters = 300                             # 614,400 tokens: about one pass
learning_rate = 2e-3                        # small models stand a high rate
warmup_iters = 30
lr_schedule = "wsd"                         # constant, then straight down over the last fifth

eval_interval = 150
eval_iters = 0                              # the whole validation text: no scatter from choosing windows
log_interval = 20
keep_last = 1                               # a study has many runs; their checkpoints are only there to go on from
threads = 1                                 # so that --jobs changes no bit
