"""nanoGPT's first example under its own name: Shakespeare by characters, 10.7 M parameters, for a GPU.

Its command line for a CPU works as it stands:
    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 \\
        --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0
"""

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

arch_preset = "gpt2"
n_layer, n_head, n_embd = 6, 6, 384
block_size = 256
dropout = 0.2                               # the text is seen 80 times

batch_size = 64                             # 64 × 256 = 16,384 tokens an iteration
gradient_accumulation_steps = 1
max_iters = lr_decay_iters = 5000
learning_rate, min_lr = 1e-3, 1e-4
warmup_iters = 100
beta2 = 0.99                                # few tokens an iteration: remember longer

eval_interval = 250                         # it overfits, so look often
eval_iters = 200
log_interval = 10
always_save_checkpoint = False              # keep the latest and the best
wandb_project, wandb_run_name = "shakespeare-char", "mini-gpt"
