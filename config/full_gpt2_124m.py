"""GPT-2 124M on OpenWebText, nanoGPT's reproduction: N = 124,439,808; 295 B tokens give a validation loss of ~2.85.

https://github.com/karpathy/nanoGPT (README, "reproducing GPT-2").
"""

out_dir = "out-gpt2-124m"
dataset = "openwebtext"                     # GPT-2 BPE; a folder that nanoGPT prepared can be read as it is

arch_preset = "gpt2"
vocab_size = 50257
pad_vocab_multiple = 1                      # 64 would be faster on a GPU and make N 124,475,904

batch_size = 12
gradient_accumulation_steps = 40            # over all GPUs: 12 × 40 × 1024 = 491,520 tokens an iteration
max_iters = 600000
learning_rate, min_lr = 6e-4, 6e-5
warmup_iters = 2000

dtype = "bfloat16"
compile = True
eval_interval = 1000
eval_iters = 5                              # 5 × 480 sequences: 2.5 M of the 4.4 M validation tokens
