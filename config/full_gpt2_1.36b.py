"""GPT-2 with 18 layers of width 2432 on SlimPajama-6B, documented as "1.36B": N = 1,405,452,800.

The documented 18 heads do not divide 2432; 19 heads of 128 keep the documented 1.41 B parameters.
"""

base = "full_llama_1.36b.py"                # the same batch, schedule and length

out_dir = "out-gpt2-1.36b"
dataset = "slimpajama_6b_gpt2"              # GPT-2 BPE

arch_preset = "gpt2"
n_layer, n_head, n_embd = 18, 19, 2432      # heads of 128
d_ff = 9728                                 # 4 × 2432
vocab_size = 50257
pad_vocab_multiple = 64                     # 50,304 rows: 47 × 2432 parameters are padding, for speed
