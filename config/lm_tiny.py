"""GPT-2's parts with 16 M parameters on WikiText-2: the "tiny" of the training guide, documented at a perplexity of about 70.

python data/wikitext2/prepare.py
python train.py config/lm_tiny.py
"""

out_dir = "out/lm_tiny"
dataset = "wikitext2"

arch_preset = "lm_tiny"                     # 4 layers, 4 heads, width 256, T 256; N = 16,090,880 with GPT-2's 50,257 ids

batch_size = 32                             # 32 × 256 = 8,192 tokens an iteration
epochs = 20
learning_rate = 3e-4
min_lr_ratio = 0.1
warmup_iters = 1000
weight_decay, grad_clip = 0.1, 1.0

eval_interval = 250
eval_iters = 0                              # the whole validation set
log_interval = 50
snapshot_epochs = 5                         # checkpoints that stay
