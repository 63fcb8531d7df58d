"""StarCoder2's parts (LayerNorm and biases with RoPE, grouped 12 : 1, sliding window, tied) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_starcoder2"
arch_preset = "starcoder2"
sliding_window = 256                        # a quarter of the context, as 4096 is of StarCoder2's 16,384
notice = ""
