"""OPT's parts (GPT-2's with ReLU) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_opt"
arch_preset = "opt"
notice = ""
