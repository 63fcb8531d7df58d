"""LLaMA 3's parts (grouped-query attention 4 : 1, RoPE theta 500,000) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_llama3"
arch_preset = "llama3"
notice = ""
