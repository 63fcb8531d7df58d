"""OLMo 2's parts (norms on the branches' outputs, QK-norm over all heads) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_olmo2"
arch_preset = "olmo2"
notice = ""
