"""What small-model speed runs settled on (QK-norm, ReLU2, zero-initialised outputs, untied); else as arch_gpt2.py."""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_modern"
arch_preset = "modern"
notice = ""
