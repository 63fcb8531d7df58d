"""GPT-2's parts with 45 M parameters on WikiText-103: the training guide's "small", documented at a perplexity of 50 to 60.

python data/wikitext103/prepare.py
python train.py config/lm_small.py --dataset=wikitext103 --epochs=20 --batch_size=32
"""

base = "lm_tiny.py"

out_dir = "out/lm_small"
dataset = "wikitext103"

arch_preset = "lm_small"                    # 6 layers, 8 heads, width 512, T 512; N = 44,909,056 with GPT-2's 50,257 ids

batch_size = 32                             # 32 × 512 = 16,384 tokens an iteration
eval_interval = 2000
