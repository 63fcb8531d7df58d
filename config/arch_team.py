"""The starting documents' model_v1: LLaMA's parts in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_team"
arch_preset = "team"
notice = ""
