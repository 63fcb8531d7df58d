"""Phi-3's parts (LLaMA's with a sliding window) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_phi3"
arch_preset = "phi3"
sliding_window = 512                        # half the context, as 2047 is of Phi-3 mini's 4,096
notice = ""
