"""OLMo 3's parts (OLMo 2's, three of four layers sliding) in GPT-2's shape; else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_olmo3"
arch_preset = "olmo3"
sliding_window = 512                        # half the context, as 4096 is of the 8,192 that OLMo 3 begins with
notice = ""
