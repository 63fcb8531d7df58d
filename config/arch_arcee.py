"""Arcee's parts (LLaMA's, grouped 4 : 1, with an ungated ReLU² feed-forward) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_arcee"
arch_preset = "arcee"
notice = ""
