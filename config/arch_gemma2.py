"""Gemma 2's parts (sandwich norms, soft caps, every other layer sliding) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_gemma2"
arch_preset = "gemma2"
sliding_window = 512                        # half the context, as 4096 is of Gemma 2's 8,192
notice = ""
