"""What comes after the five CPU levels: the same recipe on TinyStories, which is never read twice.

Prepare the text first (1 GB to download; or give a copy with --source=DIR), by a BPE of its own:
    python data/tinystories/prepare.py --tokenizer=bpe --vocab_size=4096
"""

out_dir = "out/cpu_level6_tinystories"
dataset = "tinystories"                     # two million stories: about 5 · 10⁸ tokens, in place of 10,000

arch_preset = "gpt2"
n_layer, n_head, n_embd = 4, 4, 256         # heads of 64; N = 4.3 M with the 4,096-token vocabulary
block_size = 256                            # a whole story, most of the time

batch_size = 32                             # 32 × 256 = 8,192 tokens an iteration
max_iters = 10_000                          # 82 M tokens, about 20 for each parameter
learning_rate = 1e-3                        # as the five levels
warmup_iters = 200

eval_interval = 500
eval_iters = 20                             # 163,840 tokens of the dataset's own validation split
log_interval = 20
