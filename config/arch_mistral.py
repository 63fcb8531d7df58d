"""Mistral's parts (grouped-query attention, sliding window) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_mistral"
arch_preset = "mistral"
sliding_window = 256                        # a quarter of the context, so that it matters at this length
notice = ""
