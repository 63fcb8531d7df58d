"""Mix your own: every part of the architecture by name; else as arch_gpt2.py.

`python -c "from model_components import list_components; list_components()"` prints what there is to choose from.
"""

base = "arch_gpt2.py"                       # the same data, batch, schedule and length: comparable runs

out_dir = "out/arch_custom"
arch_preset = "custom"
notice = ""

normalization = "rmsnorm"                   # from LLaMA
position_encoding = "rope"                  # from LLaMA
ffn_type = "standard"                       # from GPT-2
activation = "gelu"                         # from GPT-2
norm_position = "pre"
bias = False
weight_tying = True                         # from GPT-2
dropout = 0.0
