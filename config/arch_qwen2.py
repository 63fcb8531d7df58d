"""Qwen2's parts (grouped 6 : 1, biases on q, k and v, tied) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_qwen2"
arch_preset = "qwen2"
notice = ""
