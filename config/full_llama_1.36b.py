"""LLaMA with 18 layers of width 2304 on SlimPajama-6B, documented as "1.36B": N = 1,294,159,104.

25,000 iterations are 6.55 B tokens, 1.1 times the dataset.
"""

out_dir = "out-llama-1.36b"
dataset = "slimpajama_6b_llama"             # LLaMA-2 tokenizer, 32,000 ids

arch_preset = "llama"
n_layer, n_head, n_embd = 18, 18, 2304      # heads of 128
d_ff = 6144                                 # 8/3 × 2304
vocab_size = 32000
block_size = 2048

batch_size = 8                              # sequences in a micro-batch on one GPU
gradient_accumulation_steps = 16            # over all GPUs: 8 × 16 × 2048 = 262,144 tokens an iteration
max_iters = 25000
learning_rate, min_lr = 3e-4, 3e-5
warmup_iters = 2000
weight_decay, beta1, beta2, grad_clip = 0.1, 0.9, 0.95, 1.0

dtype = "bfloat16"
compile = True
eval_interval = 1000
eval_iters = 3                              # 3 × 128 sequences: about the documented 50 batches of 8
log_interval = 10
