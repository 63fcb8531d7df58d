"""LLaMA's parts in GPT-2 124M's shape on OpenWebText: N = 162,220,800, as the head is not tied."""

base = "full_gpt2_124m.py"                  # the same data, batch, schedule and length: comparable runs

out_dir = "out-llama-124m"
arch_preset = "llama"
vocab_size = 50304
