"""LLaMA 3 8B's architecture: N = 8,030,261,248. Wants FSDP on many GPUs and a dataset in its 128,256-token vocabulary.

Shape and vocabulary: Grattafiori et al. 2024, table 3. Schedule: its peak rate 3e-4, warm-up 8,000, cosine to a hundredth.
"""

out_dir = "out-llama3-8b"
dataset = "slimpajama_llama3"               # any dataset in the LLaMA 3 vocabulary

arch_preset = "llama3"
n_layer, n_head, n_kv_head, n_embd = 32, 32, 8, 4096
d_ff = 14336                                # 1.3 × 8/3 × 4096, up to a multiple of 1024
vocab_size = 128256
block_size = 8192

batch_size = 1                              # sequences in a micro-batch on one GPU
gradient_accumulation_steps = 512           # over all GPUs: 1 × 512 × 8192 = 4,194,304 tokens an iteration
max_iters = 25000
learning_rate, min_lr = 3e-4, 3e-6
warmup_iters = 8000

dtype = "bfloat16"
compile = True
activation_checkpointing = "full"
eval_interval = 1000
eval_iters = 1
