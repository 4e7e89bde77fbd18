"""An ordinary torch training loop; the two marked lines are all that tierflow adds.

python train_loop.py MODEL_FOLDER TEXT_FILE [CONFIG.json]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tierflow  # 1

folder, text = sys.argv[1:3]
config = sys.argv[3] if len(sys.argv) > 3 else {"optimizer": {"type": "AdamW", "params": {"lr": 5e-5}}}
length, steps = 256, 10

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
model, optimizer = tierflow.offload(model, config)  # 2
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=5)

with open(text, encoding="utf-8") as file:
    tokens = tokenizer(file.read(), return_tensors="pt", verbose=False)["input_ids"][0]
rows = tokens[: len(tokens) // length * length].view(-1, length)

model.train()
for step in range(steps):
    batch = rows[step % len(rows)][None]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(f"step {step + 1:2}  loss {loss.item():.4f}")
