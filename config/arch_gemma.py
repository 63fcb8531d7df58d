"""Gemma's parts (one key head, heads of 128, GELU-gated, scaled embeddings, tied) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_gemma"
arch_preset = "gemma"
notice = ""
