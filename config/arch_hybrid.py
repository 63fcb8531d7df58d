"""GPT-2's feed-forward and tied head with RoPE and a bias-free pre-norm; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_hybrid"
arch_preset = "hybrid"
notice = ""
