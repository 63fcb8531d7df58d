"""The post-norm, bias-free, tied variant that the starting documents call GPT-2; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_gpt2_postnorm"
arch_preset = "gpt2_postnorm"
notice = ""
