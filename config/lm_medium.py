"""GPT-2 124M with dropout on WikiText-103: the training guide's "medium", documented at a perplexity of 35 to 40.

python data/wikitext103/prepare.py
python train.py config/lm_medium.py --fp16 --gradient_checkpointing
"""

base = "lm_tiny.py"

out_dir = "out/lm_medium"
dataset = "wikitext103"

arch_preset = "lm_medium"                   # 12 layers, 12 heads, width 768, T 1024; N = 124,439,808 with GPT-2's 50,257 ids

batch_size = 32                             # 32 × 1024 = 32,768 tokens an iteration
eval_interval = 2000
