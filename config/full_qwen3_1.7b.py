"""Qwen3 1.7B's architecture: N = 1,720,574,976 (tied, heads of 128, QK-norm). Wants a dataset in its vocabulary.

Shape: the published config.json of Qwen3-1.7B. The schedule is full_llama_1.36b.py's.
"""

base = "full_llama_1.36b.py"                # the same batch, schedule and length

out_dir = "out-qwen3-1.7b"
dataset = "slimpajama_6b_qwen3"             # any dataset in the Qwen3 vocabulary

arch_preset = "qwen3"
n_layer, n_head, n_kv_head, n_embd = 28, 16, 8, 2048
d_ff = 6144                                 # 3 × 2048
vocab_size = 151936
