"""GPT-2 124M's shape and parts for a short comparison run: 100 iterations of 16 × 1024 tokens on real code."""

out_dir = "out/arch_gpt2"
dataset = "pystdlib"                        # the standard library's sources; prepares itself on first use

arch_preset = "gpt2"                        # 12 layers, 12 heads, width 768: pre-norm, biases, GELU-tanh, tied
vocab_size = 50304                          # fixed, so that N does not depend on the dataset's tokenizer
notice = ("arch_preset 'gpt2' is GPT-2 as released (pre-norm, biases); the post-norm, bias-free variant is "
          "config/arch_gpt2_postnorm.py")

batch_size = 4                              # sequences in a micro-batch: 4 × 1024 × 50304 logits in fp32 are 0.8 GB
gradient_accumulation_steps = 4             # 4 × 4 × 1024 = 16,384 tokens an iteration
max_iters = 100
learning_rate = 6e-4                        # GPT-2 124M's usual peak
warmup_iters = 10

eval_interval = 50
eval_iters = 1                              # one global batch: 16 fixed validation windows
log_interval = 1
save_interval = 0                           # one checkpoint, at the end
