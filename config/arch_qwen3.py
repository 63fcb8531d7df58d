"""Qwen3's parts (heads of 128, grouped 2 : 1, QK-norm, tied) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_qwen3"
arch_preset = "qwen3"
notice = ""
