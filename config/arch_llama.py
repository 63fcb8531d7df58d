"""LLaMA's parts (RoPE, RMSNorm, SwiGLU, pre-norm, untied) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_llama"
arch_preset = "llama"
notice = ""
